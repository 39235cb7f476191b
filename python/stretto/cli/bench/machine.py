"""What a measurement was taken on: processor, limits, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "llama-cpp-python", "gguf")


def describe() -> dict[str, Any]:
    """Processor, instruction set in use, processors granted, memory, versions, commit."""
    from stretto.ops import _backend

    native = _backend._C
    return {
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "isa": native.isa() if native is not None else None,
        "cpus": available_cpus(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's own name with family and model: hypervisors often hide the product name but not these."""
    fields = _cpuinfo()
    return f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def cpu_flags() -> list[str]:
    """Those flags that decide which kernels run."""
    return [f for f in _cpuinfo().get("flags", "").split() if f.startswith(("avx", "fma", "f16c", "amx"))]


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}


def available_cpus() -> dict[str, float | int | None]:
    """Processors of the machine, those this process may be scheduled on, and the cgroup's quota (None: no limit)."""
    return {"machine": os.cpu_count(), "affinity": len(os.sched_getaffinity(0)), "cgroup": cgroup_quota()}


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors that the cgroup (v2, else v1) grants: the smallest quota on the way from this process's group to the root."""
    try:
        entries = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None
    quotas: list[float] = []
    for _, controllers, name in (e for e in entries if len(e) == 3):
        if controllers == "":
            quotas += _quotas_above(root, name, "cpu.max")
        elif "cpu" in controllers.split(","):
            quotas += _quotas_above(root / "cpu", name, "cpu.cfs_quota_us")
    return min(quotas, default=None)


def _quotas_above(root: Path, name: str, file: str) -> list[float]:
    quotas = []
    folder = root / name.lstrip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(root):
            break
        try:
            words = (place / file).read_text().split()
            period = words[1] if len(words) > 1 else (place / "cpu.cfs_period_us").read_text()
        except OSError:
            continue
        if words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(period))
    return quotas


def versions() -> dict[str, str]:
    """Versions of what takes part, where it is installed."""
    import stretto

    found = {"stretto": stretto.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout this package runs from, "+changes" where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    run = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        # the package's own files only: a result file that was just written is no change of what was measured
        root = subprocess.run([*run, "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        status = ["git", "-C", root, "status", "--porcelain", "--", "python", "csrc", "CMakeLists.txt"]
        changed = subprocess.run(status, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed.strip() else "")


def openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes loaded in this process: more than one means threads that fight for the same cores."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = {line.split(maxsplit=5)[5] for line in lines if line.count(" ") >= 5 and len(line.split(maxsplit=5)) == 6}
    return sorted(f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp")))
