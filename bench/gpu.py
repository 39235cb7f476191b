"""`make gpu`: everything that needs a GPU, in one command that fits ten minutes. A part that fails loses none of the others.

    python bench/gpu.py [--part NAME] [--peers DIR] [--results DIR]

Builds for the GPU found, runs the op tests on it, compute-sanitizer where it is installed, then `stretto bench ops --device cuda` beside the peers that
import. Writes RESULTS/<device>/ops[-NAME].json (times, ceilings, clocks, versions, commit) and gpu[-NAME].json (how each part went). No network: peers, and
build tools that the machine lacks, come as wheels from DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build-gpu" / "site"
TAIL = 4000  # characters of a part's output that are kept
STRETTO = "import sys; sys.argv[0] = 'stretto'; from stretto.cli import main; main()"


@dataclass(frozen=True)
class Outcome:
    """How one part went. status: ok, failed, timeout, or skipped with the reason in `output`."""

    part: str
    status: str
    seconds: float
    output: str


Run = Callable[[Sequence[str], float], tuple[int, str]]
"""(command, limit in seconds) -> (exit code, output); raises subprocess.TimeoutExpired."""


def run(command: Sequence[str], limit: float) -> tuple[int, str]:
    paths = [str(ROOT / "python"), str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PATH": f"{SITE / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit, check=False)
    return done.returncode, done.stdout


def attempt(part: str, command: Sequence[str], limit: float, run: Run = run) -> Outcome:
    """Run one part; whatever happens to it is its outcome."""
    start = time.monotonic()
    try:
        code, output = run(command, limit)
        status = "ok" if code == 0 else "failed"
    except subprocess.TimeoutExpired as error:
        text = error.output.decode(errors="replace") if isinstance(error.output, bytes) else error.output or ""
        status, output = "timeout", f"{text}\nmore than {limit:.0f} s"
    except OSError as error:  # the program is not there
        status, output = "skipped", str(error)
    return Outcome(part, status, round(time.monotonic() - start, 1), output[-TAIL:])


def architecture(capability: tuple[int, int]) -> str:
    """What CMake builds for: 9.0 has instructions of its own under 90a."""
    return "90a-real" if capability == (9, 0) else f"{capability[0]}{capability[1]}-real"


def slug(device: str) -> str:
    """A device's name as a folder: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def parts(python: str, arch: str, part: str | None, peers: Path | None, result: Path, torch_cmake: str) -> list[tuple[str, list[str], float]]:
    """(name, command, limit in seconds) in order; the limits leave a minute of ten."""
    chosen = ["-k", part] if part else []
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda", "tests/ops/test_table.py", *chosen]
    steps: list[tuple[str, list[str], float]] = []
    if peers is not None:
        wheels = sorted(str(w) for w in peers.glob("*.whl"))
        steps.append(
            ("peers", [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--upgrade", "--target", str(SITE), *wheels], 60)
        )
    steps += [
        ("configure", ["cmake", "-G", "Ninja", "-S", ".", "-B", "build-gpu", "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={python}",
                       "-DSTRETTO_CUDA=ON", "-DSTRETTO_CUDA_SHIM=OFF", f"-DCMAKE_CUDA_ARCHITECTURES={arch}", *([torch_cmake] if torch_cmake else [])], 50),
        ("build", ["cmake", "--build", "build-gpu", "-j", str(os.cpu_count())], 150),
        ("tests", [*tests, "tests/ops/test_cuda.py"], 90),
        ("bench", [python, "-c", STRETTO, "bench", "ops", *([part] if part else []), "--device", "cuda", "--out", str(result)], 120),
    ]  # fmt: skip
    steps.append(("page", [python, "-m", "bench.performance"], 20))
    for tool in ("memcheck", "racecheck", "synccheck"):  # last: the slowest, and what they find the tests mostly see too
        steps.append((tool, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *tests], 35))
    return steps


def main(arguments: Sequence[str] | None = None, run: Run = run) -> int:
    parser = argparse.ArgumentParser(description="build, test, sanitize and time the CUDA kernels on this machine's GPU")
    parser.add_argument("--part", help="one op or family only")
    parser.add_argument("--peers", type=Path, help="folder of wheels: peers, and build tools the machine lacks")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    if options.peers is not None and not any(options.peers.glob("*.whl")):
        parser.error(f"--peers: {options.peers}: no wheels, expected a folder of .whl files")
    about = attempt(
        "gpu", [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), sep='|')"], 60, run
    )
    if about.status != "ok":
        print(f"gpu: torch finds no GPU: {about.output.strip().splitlines()[-1:] or about.status}", file=sys.stderr)
        return 1
    device, major, minor = about.output.strip().splitlines()[-1].split("|")
    folder, suffix = options.results / slug(device), f"-{options.part}" if options.part else ""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [about]
    for name, command, limit in parts(
        sys.executable, architecture((int(major), int(minor))), options.part, options.peers, folder / f"ops{suffix}.json", _pybind11()
    ):
        outcomes.append(attempt(name, command, limit, run))
        print(f"{name}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
        if outcomes[-1].status not in ("ok", "skipped"):
            print(outcomes[-1].output, flush=True)
        (folder / f"gpu{suffix}.json").write_text(
            json.dumps({"kind": "gpu", "device": device, "parts": [asdict(o) for o in outcomes]}, indent=1) + "\n"
        )
    return 0 if all(o.status in ("ok", "skipped") for o in outcomes) else 1


def _pybind11() -> str:
    """Where CMake finds pybind11 if it came as a wheel; "" leaves it to the interpreter's own."""
    config = SITE / "pybind11" / "share" / "cmake" / "pybind11"
    return f"-Dpybind11_DIR={config}" if (SITE / "pybind11").exists() else ""


if __name__ == "__main__":
    sys.exit(main())
