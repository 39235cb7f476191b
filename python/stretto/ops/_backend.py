"""Where an op runs: the native module if it can, else the PyTorch reference, and never without saying so."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from stretto.errors import FallbackRefused

fallbacks: Counter[tuple[str, str]] = Counter()
"""How often each (op, reason) ran on the reference path in this process."""

_strict: contextvars.ContextVar[bool] = contextvars.ContextVar("stretto_strict", default=False)


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("STRETTO_NATIVE", "1") == "0":
        return None, "STRETTO_NATIVE=0 is set"
    try:
        native = importlib.import_module("stretto._C")
    except ImportError as error:  # not built, or built for another Python
        return None, f"the native module could not be loaded: {error}"
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return None, f"torch {torch.__version__} has no DLPack exchange table; 2.10 or newer has"
    native.register_tensor_types(Tensor, torch.nn.Parameter)
    if wish := os.environ.get("STRETTO_NUM_THREADS"):
        if not wish.isdigit() or int(wish) < 1:
            raise ValueError(f"STRETTO_NUM_THREADS: {wish!r}, expected a positive integer")
        native.set_num_threads(min(int(wish), native.available_cpus()))
    return native, ""


_C, missing_reason = _load()
"""The native module, or None and why."""

if _C is None:
    warnings.warn(f"stretto runs on its slow PyTorch reference path: {missing_reason}", RuntimeWarning, stacklevel=2)


CUDA_LIBRARY = Path(__file__).parent.parent / "_cuda.so"

KERNELS: dict[str, tuple[str, ...]] = {}
"""The kernels each op of the table runs on, by its name there; filled by `table.register`."""


@functools.cache
def cuda_kernels() -> tuple[frozenset[str], str]:
    """Names of the CUDA kernels of this build, or why there are none. Loaded at the first call: a plain import touches no driver."""
    if _C is None:
        return frozenset(), missing_reason
    if not CUDA_LIBRARY.exists():
        return frozenset(), "no CUDA kernels in this build (no nvcc was found when it was built; `make cuda` in a checkout builds them)"
    try:
        target, names = _C.load_kernels(str(CUDA_LIBRARY))
    except RuntimeError as error:  # built for another system, or from other sources
        return frozenset(), f"the CUDA kernels could not be loaded: {error}"
    return (frozenset(names), "") if target == "cuda" else (frozenset(), f"{CUDA_LIBRARY.name} holds kernels for {target}")


def no_kernel(op: str, device: torch.device) -> str:
    """Why `op` has no kernel for tensors on `device`; "" where it has."""
    if device.type != "cuda":
        return f"no kernels for {device.type}"
    names, reason = cuda_kernels()
    if reason:
        return reason
    key = op.replace(".", "_")
    return "" if names.issuperset(KERNELS.get(key, (key,))) else f"no CUDA kernel for {op}"


_PLAIN = (Tensor, torch.nn.Parameter)


def needs_dispatch(*tensors: Tensor | None) -> bool:
    """True where torch's dispatcher must see the call: tracing, subclasses, or a gradient is wanted."""
    if is_compiling():
        return True
    grad = is_grad_enabled()
    for t in tensors:  # noqa: SIM110  any() costs twice as much, and this is asked for at every call
        if t is not None and (type(t) not in _PLAIN or (grad and t.requires_grad)):
            return True
    return False


def use_reference(op: str, *tensors: Tensor | None) -> bool:
    """Whether `op` must run on the reference for these tensors; counts it, says it once, and raises FallbackRefused under strict."""
    if _C is None:
        reason = missing_reason
    else:
        for t in tensors:
            if t is not None and not t.is_cpu:
                reason = no_kernel(op, t.device)
                break
        else:
            return False
        if not reason:
            return False
    if _strict.get():
        raise FallbackRefused(f"{op}: {reason}; strict=True forbids the PyTorch reference")
    if fallbacks[op, reason] == 0 and _C is not None:
        warnings.warn(f"stretto.ops: {op} runs on the PyTorch reference: {reason}", RuntimeWarning, stacklevel=4)
    fallbacks[op, reason] += 1
    return True


@contextlib.contextmanager
def strict(on: bool = True) -> Iterator[None]:
    """Within the context an op that would fall back to the reference raises FallbackRefused instead."""
    token = _strict.set(on)
    try:
        yield
    finally:
        _strict.reset(token)


def num_threads() -> int:
    """Threads that native ops use: STRETTO_NUM_THREADS, else torch's number, never more than the cgroup allows."""
    return int(_C.num_threads()) if _C is not None else torch.get_num_threads()


def granted_threads(n: int) -> int:
    """`n`, or what this process may use where that is less, with a warning. Raises ValueError below 1."""
    if n < 1:
        raise ValueError(f"threads: {n}, expected at least 1")
    limit = int(_C.available_cpus()) if _C is not None else torch.get_num_threads()
    if n > limit:
        warnings.warn(f"threads: {n}, but this process may use {limit} CPUs; using {limit}", RuntimeWarning, stacklevel=3)
    return min(n, limit)


def set_num_threads(n: int) -> None:
    """Set the number of threads for native ops called one by one. Raises ValueError below 1; see granted_threads."""
    granted = granted_threads(n)
    if _C is None:
        torch.set_num_threads(granted)
    else:
        _C.set_num_threads(granted)
