"""The schedule of `stretto bench ops`: each op of the table on its bench shapes, against its reference and its peers."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from stretto.cli.bench.agreement import agree
from stretto.cli.bench.ceilings import Ceilings, torch_threads
from stretto.cli.bench.device import DeviceCeilings, DeviceRunner, moved
from stretto.cli.bench.ratios import paired_ratio, rotated
from stretto.ops.table import OPS, Case, Cost, Make, Op, missing_on_cuda

COLD_BYTES = 96 << 20  # of copies that calls take turns on: past the caches, as weights and KV pages are in a model
MAX_COPIES = 64
ROUND_SECONDS = 0.01  # one sample repeats the call for about this long: far above the clock's resolution
OURS, REFERENCE = "stretto", "reference"
REFERENCE_SECONDS = 0.1  # a reference that loops over tokens is checked against, and not timed


def chosen(names: Sequence[str]) -> list[Op]:
    """Ops by names of ops or families; none: all. Raises ValueError listing what there is."""
    known = {*OPS, *(op.family for op in OPS.values())}
    for name in names:
        if name not in known:
            raise ValueError(f"bench ops: name: {name!r}, expected an op or family: {', '.join(sorted(known))}")
    return [op for op in OPS.values() if not names or op.name in names or op.family in names]


@dataclass(frozen=True)
class Choice:
    """What is timed: cases of one dtype or any; these peers, or all (None), where the reference counts as one."""

    dtype: torch.dtype | None = None
    peers: tuple[str, ...] | None = None
    rounds: int = 7


def run(ops: Sequence[Op], choice: Choice, ceilings: Ceilings | DeviceCeilings, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One entry for each op and bench shape, slow results included. An op that cannot run on the device is said, and left out."""
    from stretto.ops import num_threads, set_num_threads

    before = num_threads()
    threads = ceilings.threads if isinstance(ceilings, Ceilings) else before
    set_num_threads(threads)
    try:
        with torch_threads(threads), torch.inference_mode():
            entries = []
            for op in ops:
                if isinstance(ceilings, DeviceCeilings) and (reason := missing_on_cuda(op)):
                    say(f"{op.name}: {reason}")
                    continue
                for case in op.bench_cases(Make()):
                    if choice.dtype is None or dtype_of(case) == choice.dtype:
                        entries.append(measure(op, case, choice, ceilings))
                        say(line(entries[-1]))
            return entries
    finally:
        set_num_threads(before)


def dtype_of(case: Case) -> torch.dtype | None:
    """Of the first floating tensor: what the op computes in; of the first tensor where all hold integers."""
    dtypes = [t.dtype for t in _tensors(case)]
    return next((d for d in dtypes if d.is_floating_point), dtypes[0] if dtypes else None)


def measure(op: Op, case: Case, choice: Choice, ceilings: Ceilings | DeviceCeilings) -> dict[str, Any]:
    """Check the output, then time ours, the reference and the peers in turn."""
    on_cuda = isinstance(ceilings, DeviceCeilings)
    cost = op.cost(*case.args, **case.kwargs)
    dtype = dtype_of(case)
    verdict = agree(op, case, "cuda" if on_cuda else "cpu")
    entry: dict[str, Any] = {
        "op": op.name, "family": op.family, "case": case.id, "dtype": str(dtype).removeprefix("torch."),
        "device": ceilings.device if isinstance(ceilings, DeviceCeilings) else "cpu", "bound": op.bound,
        "threads": None if isinstance(ceilings, DeviceCeilings) else ceilings.threads, "bytes": cost.bytes, "flops": cost.flops,
        "check": {"ok": verdict.ok, "error": verdict.error, "allowed": verdict.allowed, "problem": verdict.problem},
    }  # fmt: skip
    given = moved((case.args, dict(case.kwargs)), "cuda") if on_cuda else (case.args, dict(case.kwargs))
    copies = [copy.deepcopy(given) for _ in range(_copies(case))]
    runs: dict[str, Runner | DeviceRunner] = {}
    refused: dict[str, str] = {}
    for name, function in {OURS: op.function, REFERENCE: op.reference, **op.peers}.items():
        if name != OURS and choice.peers is not None and name not in choice.peers:
            continue
        if name == REFERENCE and (once := _seconds_of(function, copies[0])) > REFERENCE_SECONDS:
            refused[name] = f"{once:.1f} s a call: a meaning, not a rival"
            continue
        try:
            runs[name] = (DeviceRunner if on_cuda else Runner)(function, copies)
        except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:  # a peer not installed, or without this shape
            if name == OURS:
                raise
            refused[name] = str(error).splitlines()[0]
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(choice.rounds):
        for name in rotated(list(runs), turn):
            samples[name].append(runs[name].seconds())
    peers = {name: median(times) * 1e6 for name, times in samples.items() if name not in (OURS, REFERENCE)}
    ours = median(samples[OURS])
    return entry | {
        **share(cost, ours, op.family, dtype, ceilings),
        "peers": peers,
        "ratio": min(peers.values()) / (ours * 1e6) if peers else None,
        "seconds": samples,
        "ratios": {name: paired_ratio(samples[OURS], samples[name]).to_dict() for name in runs if name != OURS},
        "modes": {name: r.mode for name, r in runs.items() if isinstance(r, DeviceRunner)},
        "refused": refused,
    }


def share(cost: Cost, seconds: float, family: str, dtype: torch.dtype | None, ceilings: Ceilings | DeviceCeilings) -> dict[str, float]:
    """Speed, and the part of the measured roofline it is."""
    bound = max(cost.bytes / ceilings.bandwidth, cost.flops / ceilings.peak(family, dtype)) / 1e9
    return {"us": seconds * 1e6, "gb_per_s": cost.bytes / seconds / 1e9, "gflops": cost.flops / seconds / 1e9, "roof_share": bound / seconds}


def _seconds_of(function: Callable[..., Any], given: tuple[tuple[Any, ...], dict[str, Any]]) -> float:
    """Of one call."""
    start = time.perf_counter()
    function(*given[0], **given[1])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
        f"{100 * entry['roof_share']:.0f} % of roofline; {ratios}{check}"
    )
