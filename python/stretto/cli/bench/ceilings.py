"""What this machine can do at most, measured here and now: the denominators of every share that is reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

READ_BYTES = 384 << 20  # larger than any last-level cache met so far
MATMUL = 1024  # square: 2 GFLOP a call, all operands in L2 and L3


@dataclass(frozen=True)
class Ceilings:
    """Of one number of threads. `int8_gops` counts a multiplication and an addition as two; None where torch has no int8 matmul here."""

    threads: int
    read_gb_per_s: float
    f32_gflops: float
    int8_gops: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def bandwidth(self) -> float:
        """GB/s."""
        return self.read_gb_per_s

    def peak(self, family: str, dtype: torch.dtype | None) -> float:
        """Gop/s. Products with block weights may use int8 arithmetic: their peak is the int8 one."""
        return max(self.f32_gflops, self.int8_gops or 0.0) if family == "quant" else self.f32_gflops


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch's number of threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(run: Callable[[], object], seconds: float) -> float:
    """Shortest time of one call, repeated for about `seconds`, twice at least, after one call that is not counted."""
    run()
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def measure(threads: int, seconds: float = 1.5) -> Ceilings:
    """Measure with torch's kernels, the best of several for each figure; about `seconds` in all."""
    with torch_threads(threads):
        return Ceilings(threads, _read(seconds / 2), _f32(seconds / 4), _int8(seconds / 4))


def _read(seconds: float) -> float:
    # Which reduction comes closest to the memory's speed depends on how torch was compiled: take the best.
    data = torch.ones(READ_BYTES // 4)
    integers, half = data.view(torch.int64), data.numel() // 2
    runs: tuple[Callable[[], object], ...] = (data.amax, integers.sum, lambda: torch.dot(data[:half], data[half:]))
    return max(READ_BYTES / fastest(run, seconds / len(runs)) for run in runs) / 1e9


def _f32(seconds: float) -> float:
    a = torch.ones(MATMUL, MATMUL)
    out = torch.empty_like(a)
    return 2 * MATMUL**3 / fastest(lambda: torch.mm(a, a, out=out), seconds) / 1e9


def _int8(seconds: float) -> float | None:
    a = torch.ones(MATMUL, MATMUL, dtype=torch.int8)
    try:
        return 2 * MATMUL**3 / fastest(lambda: torch._int_mm(a, a), seconds) / 1e9
    except (AttributeError, RuntimeError, NotImplementedError):  # a private function: may go, or be without a CPU kernel
        return None
