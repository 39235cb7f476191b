"""The CUDA side of `stretto bench ops`: what a GPU can do at most, and how calls on it are timed."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

COPY_BYTES = 2 << 30  # many times the L2
MATMUL = 8192
ROUND_SECONDS = 0.005  # one sample is a graph of so much work
MAX_CALLS = 200


@dataclass(frozen=True)
class DeviceCeilings:
    """Of one GPU, measured on random data: zeros take less power and run faster than anything real does."""

    device: str
    copy_gb_per_s: float
    bf16_gflops: float
    f32_gflops: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def bandwidth(self) -> float:
        """GB/s, bytes read and written counted alike."""
        return self.copy_gb_per_s

    def peak(self, family: str, dtype: torch.dtype | None) -> float:
        """GFLOP/s: the tensor cores for 16-bit operands, else the CUDA cores."""
        return self.bf16_gflops if dtype in (torch.float16, torch.bfloat16) else self.f32_gflops


def describe() -> dict[str, Any]:
    """Name, capability, driver and clocks of the current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    about: dict[str, Any] = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    try:
        values = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.SubprocessError):
        return about
    return about | dict(zip(fields, values, strict=False))


def ceilings() -> DeviceCeilings:
    """Copy bandwidth and matmul rates of the current GPU, a second in all."""
    copied = _copy(min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        rates = [_matmul(MATMUL, torch.bfloat16), _matmul(MATMUL // 2, torch.float32)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return DeviceCeilings(torch.cuda.get_device_name(), copied, *rates)


def _copy(size: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source)) / 1e9


def _matmul(n: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _fastest(lambda: torch.mm(a, b, out=out)) / 1e9


def _fastest(call: Callable[[], object], runs: int = 20) -> float:
    """Median seconds of a call that takes long enough for events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(median(times))


class DeviceRunner:
    """Times a function on copies of its arguments that take turns: replays of a CUDA graph, so that launch gaps and Python stay out; eager calls
    between events where the function cannot be captured (`mode` says which)."""

    def __init__(self, function: Callable[..., Any], copies: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.function = function
        self.turns = itertools.cycle(copies)
        for _ in range(2):
            self._call()  # raises where the function cannot run this case; compiles and loads what it needs
        once = max(_fastest(self._call, 5), 1e-6)
        self.calls = max(len(copies), min(MAX_CALLS, int(ROUND_SECONDS / once)))
        self.graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                for _ in range(self.calls):
                    self._call()
        except RuntimeError:  # it waits for the device, or copies to the host
            self.graph = None
            torch.cuda.synchronize()
        self.mode = "graph" if self.graph is not None else "eager"
        self.seconds()

    def _call(self) -> None:
        args, kwargs = next(self.turns)
        self.function(*args, **kwargs)

    def seconds(self) -> float:
        """Mean of one call over about ROUND_SECONDS."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            for _ in range(self.calls):
                self._call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / self.calls


def moved(values: Any, device: str) -> Any:
    """The same arguments with their tensors on `device`."""
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, tuple | list):
        return type(values)(moved(v, device) for v in values)
    if isinstance(values, dict):
        return {k: moved(v, device) for k, v in values.items()}
    return values
