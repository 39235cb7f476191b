"""Normalisations over the last dimension."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check_tensors, dtype_as, rows_contiguous
from stretto.ops.table import BadCase, Case, Cost, Make, register


def _written(out: Tensor | None, result: Tensor, num_rows: Tensor | None) -> Tensor:
    """A reference's result, or `out` with its rows below num_rows."""
    if out is None:
        return result
    rows = len(result) if num_rows is None else min(max(int(num_rows), 0), len(result))
    out[:rows] = result[:rows]
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, out: Tensor | None = None, num_rows: Tensor | None = None
) -> Tensor:
    """Scale each row to unit root mean square.

    Args:
        x: [rows, width], float32 / float16 / bfloat16; any strides (a copy is made when elements of a row are not adjacent).
        weight: [width] float32.
        eps: added to the mean square; finite, not negative.
        residual: [rows, width] of x's dtype, added to the result.
        out: written instead of a new tensor; like x, may be x or residual.
        num_rows: [1] int32; only rows below it are computed, the rest of `out` is left alone. For captured steps.
    Returns: [rows, width] of x's dtype. Float sums; a row's bits do not depend on other rows or on threads.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 1910.07467. Reference: ops.ref.norm.rms_norm. Bound by memory.
    """
    if out is None and num_rows is None and needs_dispatch(x, weight, residual):
        result: Tensor = torch.ops.stretto.rms_norm(x, weight, eps, residual)
        return result
    return _rms_norm(x, weight, eps, residual, out=out, num_rows=num_rows)


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, out: Tensor | None = None, num_rows: Tensor | None = None
) -> Tensor:
    check_tensors(
        "rms_norm", x=(x, "rows width", FLOATS), weight=(weight, "width", F32), residual=(residual, "rows width", dtype_as(x)),
        out=(out, "rows width", dtype_as(x)), num_rows=(num_rows, "1", I32),
    )  # fmt: skip
    if not 0 <= eps < math.inf:  # spelt out: formatting a float for a message that is not needed costs as much as a small kernel
        raise ValueError(f"rms_norm: eps: {eps}, expected finite and at least 0")
    if _backend.use_reference("rms_norm", x):
        return _written(out, ref.norm.rms_norm(x, weight, eps, residual), num_rows)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual = None if residual is None else rows_contiguous(residual)
    _backend._C.rms_norm(rows_contiguous(x), weight.contiguous(), eps, residual, out, num_rows)  # type: ignore[union-attr]
    return out


def _rms_norm_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for rows, width in [(0, 8), (1, 1), (3, 17), (5, 576), (33, 64), (2, 2049)]:
            yield Case(f"{rows}x{width}-{dtype}", (make.randn(rows, width, dtype=dtype), make.randn(width), 1e-5))
        yield Case(f"residual-{dtype}", (make.randn(5, 40, dtype=dtype), make.randn(40), 1e-6, make.randn(5, 40, dtype=dtype)))
        yield Case(f"strided-{dtype}", (make.randn(40, 6, dtype=dtype).t(), make.randn(40), 1e-6))
        yield Case(f"zeros-{dtype}", (make.randn(4, 32, dtype=dtype) * 0, make.randn(32), 1e-6))


def _rms_norm_bad(make: Make) -> Iterator[BadCase]:
    x, w = make.randn(2, 8), make.randn(8)
    yield BadCase("rank", (x[0], w, 1e-5), "rms_norm: x: shape [8]")
    yield BadCase("width", (x, make.randn(7), 1e-5), "rms_norm: weight: shape [7]")
    yield BadCase("dtype", (x.long(), w, 1e-5), "rms_norm: x: int64")
    yield BadCase("eps", (x, w, -1.0), "rms_norm: eps: -1.0")
    yield BadCase("nan-eps", (x, w, float("nan")), "rms_norm: eps: nan")


register(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual=None) -> Tensor",
    _rms_norm,
    function=rms_norm,
    reference=ref.norm.rms_norm,
    fake=lambda x, weight, eps, residual=None: torch.empty_like(x, memory_format=torch.contiguous_format),
    cases=_rms_norm_cases,
    bad_cases=_rms_norm_bad,
    bench_cases=lambda make: (Case(f"{name} {rows} rows", (make.randn(rows, width), make.randn(width), 1e-5))
                              for name, width in [("SmolLM2-135M", 576), ("Llama-3-8B", 4096)] for rows in (1, 512)),
    cost=lambda x, weight, eps, residual=None: Cost((2 if residual is None else 3) * x.nbytes + weight.nbytes, flops=4 * x.numel()),
    bound="memory",
    peers={"torch": lambda x, weight, eps: torch.nn.functional.rms_norm(x, weight.shape, weight, eps)},
    source="arXiv 1910.07467",
)  # fmt: skip


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, sum: Tensor | None = None, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, and normalise it for the next layer, in one pass.

    Args:
        x, residual: [rows, width], float32 / float16 / bfloat16; any strides (a copy is made when elements of a row are not adjacent).
        weight: [width] float32.
        eps: added to the mean square; finite, not negative.
        out: written instead of a new tensor; like x, may be x.
        sum: written instead of a new tensor; like x, may be residual: the stream is then updated in place.
        num_rows: [1] int32; only rows below it are computed, the rest of `out` and `sum` is left alone. For captured steps.
    Returns: (out, sum): sum = x + residual in x's dtype, out = rms_norm(sum, weight, eps), bit for bit.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 1910.07467. Reference: ops.ref.norm.add_rms_norm. Bound by memory.
    """
    if out is None and sum is None and num_rows is None and needs_dispatch(x, residual, weight):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.add_rms_norm(x, residual, weight, eps)
        return result
    return _add_rms_norm(x, residual, weight, eps, out=out, sum=sum, num_rows=num_rows)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, sum: Tensor | None = None, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_tensors(
        "add_rms_norm", x=(x, "rows width", FLOATS), residual=(residual, "rows width", dtype_as(x)), weight=(weight, "width", F32),
        out=(out, "rows width", dtype_as(x)), sum=(sum, "rows width", dtype_as(x)), num_rows=(num_rows, "1", I32),
    )  # fmt: skip
    if not 0 <= eps < math.inf:
        raise ValueError(f"add_rms_norm: eps: {eps}, expected finite and at least 0")
    if _backend.use_reference("add_rms_norm", x):
        normed, total = ref.norm.add_rms_norm(x, residual, weight, eps)
        return _written(out, normed, num_rows), _written(sum, total, num_rows)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if sum is None:
        sum = torch.empty_like(x, memory_format=torch.contiguous_format)
    _backend._C.add_rms_norm(rows_contiguous(x), rows_contiguous(residual), weight.contiguous(), eps, out, sum, num_rows)  # type: ignore[union-attr]
    return out, sum


def _add_rms_norm_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for rows, width in [(0, 8), (1, 1), (3, 17), (5, 576), (33, 64), (2, 2049)]:
            x, residual = make.randn(rows, width, dtype=dtype), make.randn(rows, width, dtype=dtype)
            yield Case(f"{rows}x{width}-{dtype}", (x, residual, make.randn(width), 1e-5))
        x = make.randn(40, 6, dtype=dtype).t()
        yield Case(f"strided-{dtype}", (x, make.randn(6, 80, dtype=dtype)[:, :40], make.randn(40), 1e-6))
        yield Case(f"zeros-{dtype}", (x.contiguous(), -x.contiguous(), make.randn(40), 1e-6))


def _add_rms_norm_bad(make: Make) -> Iterator[BadCase]:
    x, w = make.randn(2, 8), make.randn(8)
    yield BadCase("rank", (x[0], x, w, 1e-5), "add_rms_norm: x: shape [8]")
    yield BadCase("residual", (x, x[:1], w, 1e-5), "add_rms_norm: residual: shape [1, 8]")
    yield BadCase("residual-dtype", (x, x.half(), w, 1e-5), "add_rms_norm: residual: float16")
    yield BadCase("width", (x, x, w[:7], 1e-5), "add_rms_norm: weight: shape [7]")
    yield BadCase("eps", (x, x, w, -1.0), "add_rms_norm: eps: -1.0")
    yield BadCase("nan-eps", (x, x, w, math.nan), "add_rms_norm: eps: nan")
    yield BadCase("same-memory", (x, x, w, 1e-5), "add_rms_norm: sum: is out", {"out": (y := torch.empty(2, 8)), "sum": y})


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A peer at its best: torch's own fusing compiler. Compiled at the first call."""
    return torch.compile(function, dynamic=False)


def _torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch.nn.functional.rms_norm(total, weight.shape, weight, eps), total


register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    function=add_rms_norm,
    reference=ref.norm.add_rms_norm,
    fake=lambda x, residual, weight, eps: (torch.empty_like(x, memory_format=torch.contiguous_format),
                                           torch.empty_like(x, memory_format=torch.contiguous_format)),
    cases=_add_rms_norm_cases,
    bad_cases=_add_rms_norm_bad,
    bench_cases=lambda make: (Case(f"{name} {rows} rows", (make.randn(rows, width), make.randn(rows, width), make.randn(width), 1e-5))
                              for name, width in [("SmolLM2-135M", 576), ("Llama-3-8B", 4096)] for rows in (1, 512)),
    cost=lambda x, residual, weight, eps: Cost(4 * x.nbytes + weight.nbytes, flops=5 * x.numel()),
    bound="memory",
    peers={"torch": _torch_add_rms_norm, "torch.compile": lambda *args: _compiled(_torch_add_rms_norm)(*args)},
    source="arXiv 1910.07467",
)  # fmt: skip


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, out: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
    """Shift each row to mean 0 and scale it to variance 1, then scale and shift its columns.

    Args:
        x: [rows, width], float32 / float16 / bfloat16; any strides (a copy is made when elements of a row are not adjacent).
        weight: [width] float32. bias: [width] float32, or None.
        eps: added to the variance; finite, not negative.
        out: written instead of a new tensor; like x, may be x.
        num_rows: [1] int32; only rows below it are computed, the rest of `out` is left alone. For captured steps.
    Returns: [rows, width] of x's dtype. Float sums; a row's bits do not depend on other rows or on threads.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 1607.06450. Reference: ops.ref.norm.layer_norm. Bound by memory.
    """
    if out is None and num_rows is None and needs_dispatch(x, weight, bias):
        result: Tensor = torch.ops.stretto.layer_norm(x, weight, bias, eps)
        return result
    return _layer_norm(x, weight, bias, eps, out=out, num_rows=num_rows)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, out: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
    check_tensors(
        "layer_norm", x=(x, "rows width", FLOATS), weight=(weight, "width", F32), bias=(bias, "width", F32), out=(out, "rows width", dtype_as(x)),
        num_rows=(num_rows, "1", I32),
    )  # fmt: skip
    if not 0 <= eps < math.inf:
        raise ValueError(f"layer_norm: eps: {eps}, expected finite and at least 0")
    if _backend.use_reference("layer_norm", x):
        return _written(out, ref.norm.layer_norm(x, weight, bias, eps), num_rows)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    bias = None if bias is None else bias.contiguous()
    _backend._C.layer_norm(rows_contiguous(x), weight.contiguous(), bias, eps, out, num_rows)  # type: ignore[union-attr]
    return out


def _layer_norm_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for rows, width in [(0, 8), (1, 1), (3, 17), (5, 80), (5, 384), (33, 64), (2, 2049)]:
            yield Case(f"{rows}x{width}-{dtype}", (make.randn(rows, width, dtype=dtype), make.randn(width), make.randn(width), 1e-5))
        yield Case(f"no-bias-{dtype}", (make.randn(5, 40, dtype=dtype), make.randn(40), None, 1e-6))
        yield Case(f"strided-{dtype}", (make.randn(40, 6, dtype=dtype).t(), make.randn(40), make.randn(40), 1e-6))
        yield Case(f"zeros-{dtype}", (make.randn(4, 32, dtype=dtype) * 0, make.randn(32), make.randn(32), 1e-6))


def _layer_norm_bad(make: Make) -> Iterator[BadCase]:
    x, w = make.randn(2, 8), make.randn(8)
    yield BadCase("rank", (x[0], w, w, 1e-5), "layer_norm: x: shape [8]")
    yield BadCase("width", (x, w[:7], w, 1e-5), "layer_norm: weight: shape [7]")
    yield BadCase("bias", (x, w, w[:7], 1e-5), "layer_norm: bias: shape [7]")
    yield BadCase("dtype", (x.long(), w, w, 1e-5), "layer_norm: x: int64")
    yield BadCase("weight-dtype", (x, w.half(), w, 1e-5), "layer_norm: weight: float16")
    yield BadCase("eps", (x, w, None, math.inf), "layer_norm: eps: inf")


register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    _layer_norm,
    function=layer_norm,
    reference=ref.norm.layer_norm,
    fake=lambda x, weight, bias, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
    cases=_layer_norm_cases,
    bad_cases=_layer_norm_bad,
    bench_cases=lambda make: (Case(f"{name} {rows} rows", (make.randn(rows, width), make.randn(width), make.randn(width), 1e-5))
                              for name, width in [("MiniLM-L6", 384), ("Pythia-2.8B", 2560)] for rows in (1, 512)),
    cost=lambda x, weight, bias, eps: Cost((2 * x.nbytes + (1 if bias is None else 2) * weight.nbytes), flops=8 * x.numel()),
    bound="memory",
    peers={"torch": lambda x, weight, bias, eps: torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)},
    source="arXiv 1607.06450",
)  # fmt: skip


def gather_rows(x: Tensor, rows: Tensor, *, out: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
    """Copy the rows named.

    Args:
        x: [n, width] float32. rows: [m] int32, each 0 to n - 1. out: [m, width] float32. num_rows: [1] int32, how many of `rows` are in use.
    Returns: [m, width] float32. Raises: ValueError naming the argument. Reference: ops.ref.norm.gather_rows. Bound by memory.
    """
    if out is None and num_rows is None and needs_dispatch(x, rows):
        result: Tensor = torch.ops.stretto.gather_rows(x, rows)
        return result
    return _gather_rows(x, rows, out=out, num_rows=num_rows)


def _gather_rows(x: Tensor, rows: Tensor, *, out: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
    check_tensors("norm.gather_rows", x=(x, "n width", F32), rows=(rows, "m", I32), out=(out, "m width", F32), num_rows=(num_rows, "1", I32))
    if _backend.use_reference("gather_rows", x):
        used = rows if num_rows is None else rows[: int(num_rows[0])]
        result = ref.norm.gather_rows(x, used)
        if out is None:
            return result
        out[: len(used)] = result
        return out
    if out is None:
        out = x.new_empty(rows.shape[0], x.shape[1])
    _backend._C.gather_rows(rows_contiguous(x), rows.contiguous(), out, num_rows)  # type: ignore[union-attr]
    return out


def _gather_bad(make: Make) -> Iterator[BadCase]:
    x = make.randn(4, 8)
    for bad in (-1, 4, -(2**31), 2**31 - 1):
        yield BadCase(f"row{bad}", (x, torch.tensor([0, bad], dtype=torch.int32)), f"norm.gather_rows: rows: {bad}")


register(
    "gather_rows(Tensor x, Tensor rows) -> Tensor",
    _gather_rows,
    function=gather_rows,
    reference=ref.norm.gather_rows,
    fake=lambda x, rows: x.new_empty(rows.shape[0], x.shape[1]),
    cases=lambda make: (Case(f"{n}x{w}-{m}", (make.randn(n, w), make.randint(0, n, m))) for n, w, m in [(1, 1, 0), (3, 17, 5), (64, 576, 2)]),
    bad_cases=_gather_bad,
    bench_cases=lambda make: iter([Case("512 rows of 576", (make.randn(512, 576), make.randint(0, 512, 512)))]),
    cost=lambda x, rows: Cost(2 * rows.shape[0] * x.shape[1] * 4, 0),
    bound="memory",
)
