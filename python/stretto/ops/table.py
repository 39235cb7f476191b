"""The op table. One `register(...)` call creates an op and its row; tests, fuzzing, `bench ops`, `doctor` and the docs read the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stretto.ops import _backend

_library = torch.library.Library("stretto", "DEF")


@dataclass(frozen=True)
class Cost:
    """What a call must move and compute at least: the roofline of an op is max(bytes / bandwidth, flops / peak)."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """One legal call. `id` names it in tests; args and kwargs are passed to op and reference alike."""

    id: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadCase:
    """One illegal call and a fragment of the message it must raise."""

    id: str
    args: tuple[Any, ...]
    message: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    error: type[Exception] = ValueError


class Make:
    """Seeded inputs for cases: every tensor of a case comes from here, so that a case is the same on every run."""

    def __init__(self, seed: int = 0, device: str = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.generator)).to(self.device, dtype)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device, dtype)


@dataclass(frozen=True)
class Op:
    """A row: the public function, its meaning, and everything needed to test and time it."""

    name: str
    family: str
    schema: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    cases: Callable[[Make], Iterator[Case]]
    bad_cases: Callable[[Make], Iterator[BadCase]]
    bench_cases: Callable[[Make], Iterator[Case]]
    cost: Callable[..., Cost]
    bound: Literal["memory", "compute", "latency"]
    tolerance: float
    peers: Mapping[str, Callable[..., Any]]
    source: str
    kernels: tuple[str, ...]


OPS: dict[str, Op] = {}


def _plain(value: Any) -> Any:
    """A subclass without a dispatcher of its own as the Tensor it is: the native module takes exact types only."""
    return value.as_subclass(Tensor) if isinstance(value, Tensor) and type(value) not in (Tensor, torch.nn.Parameter) else value


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.inputs = inputs


def _backward(reference: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """The gradient of an op is that of its reference, computed anew: right rather than fast, since these are ops of inference."""

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        given = len(ctx.needs_input_grad)  # the inputs that follow are defaults, and no tensors
        with torch.enable_grad():
            inputs = [
                value.detach().requires_grad_(i < given and ctx.needs_input_grad[i]) if isinstance(value, Tensor) else value
                for i, value in enumerate(ctx.inputs)
            ]
            result = reference(*inputs)
        results = result if isinstance(result, tuple | list) else (result,)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return tuple(next(found) if isinstance(value, Tensor) and value.requires_grad else None for value in inputs[:given])

    return backward


def _given_backward(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    def run(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return backward(ctx.inputs, *grads)[: len(ctx.needs_input_grad)]

    return run


def no_second_derivative(inputs: tuple[Any, ...], *grads: Tensor | None) -> tuple[Any, ...]:
    """The `backward` of ops that are themselves a backward."""
    raise NotImplementedError("second derivatives of this op are not there; differentiate its reference in ops.ref instead")


def register(
    schema: str,
    kernel: Callable[..., Any],
    *,
    function: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cases: Callable[[Make], Iterator[Case]],
    bad_cases: Callable[[Make], Iterator[BadCase]],
    bench_cases: Callable[[Make], Iterator[Case]],
    cost: Callable[..., Cost],
    bound: Literal["memory", "compute", "latency"],
    tolerance: float = 2.0,
    peers: Mapping[str, Callable[..., Any]] | None = None,
    source: str = "",
    backward: Callable[..., tuple[Any, ...]] | None = None,
    kernels: tuple[str, ...] | None = None,
) -> None:
    """Create `torch.ops.stretto.<name>` and its row in OPS.

    Args:
        schema: torch.library schema, e.g. "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor".
        kernel: checks arguments and calls `_C` (or the reference); what eager inference runs.
        function: the public wrapper of ops/FAMILY.py, which chooses between kernel and dispatcher.
        reference: the meaning, in plain PyTorch; computes in the dtype it is given (tests give float64).
        fake: shapes and dtypes only, for tracing.
        cases, bad_cases, bench_cases: makers of legal, illegal and timed calls; bench shapes come from named models.
        cost: least bytes and FLOPs of a call, from the same arguments.
        tolerance: for float32 results, in multiples of the error that the reference itself makes in float32 (STYLE: at most 2), plus 2 ulps.
        peers: name -> callable with the same arguments, timed beside ours.
        backward: (inputs of the call, *gradients of its results) -> a gradient or None for each input; without it, that of the reference.
        kernels: names that `_C` launches for this op; the op's own name without its family, if that is all.
    """
    name = schema.split("(", 1)[0]
    if name in OPS:
        raise ValueError(f"register: schema: {name!r} is there already, expected a new name")
    _library.define(schema)
    _library.impl(name, lambda *args, **kwargs: kernel(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()}), "CompositeExplicitAutograd")
    torch.library.register_fake(f"stretto::{name}", fake, lib=_library)
    gradient = _backward(reference) if backward is None else _given_backward(backward)
    if "!" not in schema:  # an op that writes its arguments has no gradient
        torch.library.register_autograd(f"stretto::{name}", gradient, setup_context=_keep_inputs, lib=_library)
    family = function.__module__.split(".")[2]
    kernels = _backend.KERNELS[name] = kernels or (name.removeprefix(f"{family}_"),)
    OPS[name] = Op(
        name, family, schema, function, reference, cases, bad_cases, bench_cases, cost, bound, tolerance,
        dict(peers or {}), source, kernels,
    )  # fmt: skip


def missing_on_cuda(op: Op) -> str:
    """Why `op` would run its reference on CUDA tensors; "" where it has kernels."""
    return _backend.no_kernel(op.name, torch.device("cuda"))


def cuda_missing_reason() -> str:
    """Why this build has no CUDA kernels; "" where it has some."""
    return _backend.cuda_kernels()[1]


def native_available() -> bool:
    """Whether `_C` is loaded."""
    return _backend._C is not None
