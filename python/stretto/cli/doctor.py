"""`stretto doctor`: what this installation is, whether its kernels are right here, and how fast the machine is."""

from __future__ import annotations

import os
import time
from typing import Any

import typer

from stretto.cli.common import FAILED, Debug, Json, print_json

CASES = 3  # of each op
OPS_SECONDS = 12.0  # for all ops together; the rest of the 20 s is import and the ceilings
CEILING_SECONDS = 0.8  # for each number of threads


def doctor(json: Json = False, debug: Debug = False) -> None:
    """Check the installation: versions, processors, each kernel against its reference, measured limits. Exit code 1 where a kernel is wrong."""
    report = examine()
    if json:
        print_json(report)
    else:
        _show(report)
    if any(op["status"] == "wrong" for op in report["ops"]):
        raise typer.Exit(FAILED)


def examine() -> dict[str, Any]:
    """Everything `stretto doctor` says, as plain data."""
    import torch

    import stretto.ops  # noqa: F401  fills the table
    from stretto.cli.bench import ceilings, machine
    from stretto.ops import _backend, num_threads
    from stretto.ops.table import OPS, missing_on_cuda

    native = _backend._C
    about = machine.describe()
    ops = check_ops(time.perf_counter() + OPS_SECONDS)  # before the limits: these touch half a gigabyte
    threads = num_threads()
    return {
        "versions": about.pop("versions"),
        "commit": about.pop("commit"),
        "machine": about,
        "native": {
            "loaded": native is not None,
            "reason": _backend.missing_reason,
            "file": getattr(native, "__file__", None),
            "isa": native.isa() if native is not None else None,
            "isas": list(native.isas()) if native is not None else [],
        },
        "cuda": {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "reason": _backend.cuda_kernels()[1],
            "ops": [op.name for op in OPS.values() if not missing_on_cuda(op)],
        },
        "threads": {
            "used": threads,
            "available": int(native.available_cpus()) if native is not None else len(os.sched_getaffinity(0)),
            "environment": {k: os.environ[k] for k in ("STRETTO_NUM_THREADS", "OMP_NUM_THREADS", "STRETTO_NATIVE") if k in os.environ},
        },
        "openmp_runtimes": machine.openmp_runtimes(),
        "ceilings": [ceilings.measure(n, CEILING_SECONDS).to_dict() for n in dict.fromkeys((1, threads))],
        "ops": ops,
    }


def check_ops(deadline: float) -> list[dict[str, Any]]:
    """Each op of the table against its reference on three shapes; what the time does not reach is reported as skipped."""
    import torch

    import stretto.ops  # noqa: F401  fills the table
    from stretto.cli.bench.agreement import agree
    from stretto.ops.table import OPS

    rows = []
    for op in OPS.values():
        row: dict[str, Any] = {"op": op.name, "family": op.family, "status": "ok", "cases": [], "problem": ""}
        with torch.inference_mode():
            for case in _three(op):
                if time.perf_counter() > deadline:
                    row |= {"status": "skipped", "problem": f"more than {OPS_SECONDS:.0f} s for all ops"} if row["status"] == "ok" else {}
                    break
                try:
                    verdict = agree(op, case)
                except Exception as error:  # a kernel that raises on a legal call is wrong, and the other ops still want checking
                    row |= {"status": "wrong", "problem": f"{case.id}: {type(error).__name__}: {error}"}
                    continue
                row["cases"].append({"case": case.id, "error": verdict.error, "allowed": verdict.allowed})
                if not verdict.ok:
                    row |= {
                        "status": "wrong",
                        "problem": f"{case.id}: {verdict.problem or f'error {verdict.error:.3g}, allowed {verdict.allowed:.3g}'}",
                    }
        rows.append(row)
    return rows


def _three(op: Any) -> list[Any]:
    """First, middle and last of the cases that have elements: cases run from small to large and through the dtypes."""
    from stretto.cli.bench.agreement import has_elements
    from stretto.ops.table import Make

    cases = [c for c in op.cases(Make()) if has_elements(c)]
    return [cases[i] for i in dict.fromkeys((0, len(cases) // 2, len(cases) - 1)) if cases][:CASES]


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    native, threads, cpus = report["native"], report["threads"], report["machine"]["cpus"]
    console.print("  ".join(f"{k} {v}" for k, v in report["versions"].items()))
    console.print(f"{report['machine']['cpu']}; {', '.join(report['machine']['cpu_flags'])}")
    if native["loaded"]:
        console.print(f"native module: {native['file']}, runs {native['isa']} of {', '.join(native['isas'])}")
    else:
        console.print(f"[yellow]no native module, the slow reference runs[/yellow]: {native['reason']}")
    cuda = report["cuda"]
    gpu = cuda["gpu"] or "torch finds no GPU"
    console.print(f"CUDA: {gpu}; " + (f"[yellow]{cuda['reason']}[/yellow]" if cuda["reason"] else f"kernels for {', '.join(cuda['ops'])}"))
    quota = "none" if cpus["cgroup"] is None else f"{cpus['cgroup']:g}"
    console.print(
        f"threads: {threads['used']} used, {threads['available']} available (machine {cpus['machine']}, affinity {cpus['affinity']}, cgroup {quota})"
    )
    runtimes = report["openmp_runtimes"]
    console.print(
        f"OpenMP runtimes: {', '.join(runtimes) or 'none'}" + ("  [yellow]more than one: their threads compete[/yellow]" if len(runtimes) > 1 else "")
    )
    for limits in report["ceilings"]:
        int8 = f", int8 {limits['int8_gops']:.0f} Gop/s" if limits["int8_gops"] else ""
        console.print(f"{limits['threads']} thread(s): reads {limits['read_gb_per_s']:.1f} GB/s, f32 {limits['f32_gflops']:.0f} GFLOP/s{int8}")
    table = Table("op", "family", "result", "largest error / allowed")
    for op in report["ops"]:
        worst = max(op["cases"], key=lambda c: c["error"], default=None)
        colour = {"ok": "green", "wrong": "red"}.get(op["status"], "yellow")
        errors = f"{worst['error']:.2g} / {worst['allowed']:.2g}" if worst else ""
        table.add_row(op["op"], op["family"], f"[{colour}]{op['status']}[/{colour}] {op['problem']}".strip(), errors)
    console.print(table)
