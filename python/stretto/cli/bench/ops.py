"""The schedule of `stretto bench ops`: each op of the table on its bench shapes, against its reference and its peers."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from stretto.cli.bench.agreement import agree
from stretto.cli.bench.ceilings import Ceilings, torch_threads
from stretto.cli.bench.ratios import paired_ratio, rotated
from stretto.ops.table import OPS, Case, Cost, Make, Op

COLD_BYTES = 96 << 20  # of copies that calls take turns on: past the caches, as weights and KV pages are in a model
MAX_COPIES = 64
ROUND_SECONDS = 0.01  # one sample repeats the call for about this long: far above the clock's resolution
OURS, REFERENCE = "stretto", "reference"


def chosen(name: str | None) -> list[Op]:
    """Ops by name or family; None: all. Raises ValueError listing what there is."""
    ops = [op for op in OPS.values() if name in (None, op.name, op.family)]
    if not ops:
        raise ValueError(f"bench ops: name: {name!r}, expected an op or family: {', '.join(sorted({*OPS, *(op.family for op in OPS.values())}))}")
    return ops


def run(ops: Sequence[Op], threads: int, rounds: int, ceilings: Ceilings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One entry for each op and bench shape, slow results included."""
    from stretto.ops import num_threads, set_num_threads

    before = num_threads()
    set_num_threads(threads)
    try:
        with torch_threads(threads), torch.inference_mode():
            entries = []
            for op in ops:
                for case in op.bench_cases(Make()):
                    entries.append(measure(op, case, rounds, ceilings))
                    say(line(entries[-1]))
            return entries
    finally:
        set_num_threads(before)


def measure(op: Op, case: Case, rounds: int, ceilings: Ceilings) -> dict[str, Any]:
    """Check the output, then time ours, the reference and the peers in turn."""
    verdict = agree(op, case)
    cost = op.cost(*case.args, **case.kwargs)
    entry: dict[str, Any] = {
        "op": op.name, "family": op.family, "case": case.id, "bound": op.bound, "threads": ceilings.threads,
        "bytes": cost.bytes, "flops": cost.flops,
        "check": {"ok": verdict.ok, "error": verdict.error, "allowed": verdict.allowed, "problem": verdict.problem},
    }  # fmt: skip
    copies = [copy.deepcopy((case.args, dict(case.kwargs))) for _ in range(_copies(case))]
    runs: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    for name, function in {OURS: op.function, REFERENCE: op.reference, **op.peers}.items():
        try:
            runs[name] = Runner(function, copies)
        except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:  # a peer not installed, or without this shape
            if name == OURS:
                raise
            refused[name] = str(error).splitlines()[0]
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in rotated(list(runs), turn):
            samples[name].append(runs[name].seconds())
    best_peer = min((n for n in runs if n not in (OURS, REFERENCE)), key=lambda n: median(samples[n]), default=None)
    ratios = {name: paired_ratio(samples[OURS], samples[name]).to_dict() for name in runs if name != OURS}
    return entry | {
        "seconds": samples,
        "ratios": ratios,
        "best_peer": best_peer,
        "refused": refused,
        **share(cost, median(samples[OURS]), op.family, ceilings),
    }


def share(cost: Cost, seconds: float, family: str, ceilings: Ceilings) -> dict[str, float]:
    """Speed, and the part of the measured roofline it is. Products with block weights may use int8 arithmetic: their peak is the int8 one."""
    peak = max(ceilings.f32_gflops, ceilings.int8_gops or 0.0) if family == "quant" else ceilings.f32_gflops
    bound = max(cost.bytes / ceilings.read_gb_per_s, cost.flops / peak) / 1e9
    return {"us": seconds * 1e6, "gb_per_s": cost.bytes / seconds / 1e9, "gflops": cost.flops / seconds / 1e9, "roofline": bound / seconds}


class Runner:
    """Times a function on copies of its arguments that take turns."""

    def __init__(self, function: Callable[..., Any], copies: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.function = function
        self.turns = itertools.cycle(copies)
        self._call()  # raises where the function cannot run this case
        start = time.perf_counter()
        self._call()
        once = max(time.perf_counter() - start, 1e-7)
        self.calls = max(1, int(ROUND_SECONDS / once))

    def _call(self) -> None:
        args, kwargs = next(self.turns)
        self.function(*args, **kwargs)

    def seconds(self) -> float:
        """Mean of one call over about ROUND_SECONDS."""
        start = time.perf_counter()
        for _ in range(self.calls):
            self._call()
        return (time.perf_counter() - start) / self.calls


def _copies(case: Case) -> int:
    bytes_of_one = sum(t.nbytes for t in _tensors(case))
    return min(MAX_COPIES, 1 + COLD_BYTES // max(bytes_of_one, 1))


def _tensors(case: Case) -> Iterator[Tensor]:
    return (v for v in (*case.args, *case.kwargs.values()) if isinstance(v, Tensor))


def line(entry: dict[str, Any]) -> str:
    """One entry for the person who waits."""
    check = "" if entry["check"]["ok"] else f"  WRONG: {entry['check']['problem'] or entry['check']['error']}"
    ratios = ", ".join(f"{r['median']:.2f}x {name} ({r['low']:.2f} to {r['high']:.2f})" for name, r in entry["ratios"].items())
    return (
        f"{entry['op']} {entry['case']}: {entry['us']:.1f} us, {entry['gb_per_s']:.1f} GB/s, {entry['gflops']:.1f} GFLOP/s, "
        f"{100 * entry['roofline']:.0f} % of roofline; {ratios}{check}"
    )
