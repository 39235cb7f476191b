"""Cosine transforms over token grids: the low frequencies of a feature map, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import FLOATS, check, check_tensors, rows_contiguous
from stretto.ops.table import BadCase, Case, Cost, Make, register

Rescale = Literal["mean", "ortho"]
Pair = tuple[int, int]


def lowpass(x: Tensor, keep: Sequence[int], inverse: bool = False, grid: Sequence[int] | None = None, rescale: Rescale = "mean") -> Tensor:
    """The lowest frequencies of each channel over a grid of tokens, as coefficients or as a smaller grid of feature vectors.

    y = C_h x C_w^T for each channel, C_n the first rows of the orthonormal DCT-II of length n. With `inverse` the kept block goes through
    the inverse transform of its own size, which gives a smoothed, smaller picture of x. keep = grid gives the whole DCT (or x again).

    Args:
        x: [batch, h, w, channels], or [batch, tokens, channels] with `grid`; float32 / float16 / bfloat16; any strides (a copy is made
            when the channels of a token are not adjacent).
        keep: (kept rows, kept columns), each 1 to the grid's size.
        inverse: give the smaller grid instead of its coefficients.
        grid: (h, w) of x's tokens, in row order. A class token must be dropped before.
        rescale: of the inverse: "mean" keeps the mean of a channel (a constant stays what it is), "ortho" its energy. Coefficients are
            orthonormal with either.
    Returns: [batch, *keep, channels], or [batch, kept tokens, channels] where x came as tokens; x's dtype. Float sums; a channel's bits do
        not depend on batch, other channels or threads. NaN stays in its image and channel.
    Raises: ValueError naming the argument, what it is and what was expected. Differentiable: the gradient is lowpass_adjoint.
    Source: arXiv 2508.06038. Reference: ops.ref.dct.lowpass. Bound by memory.
    """
    if needs_dispatch(x):
        result: Tensor = torch.ops.stretto.dct_lowpass(x, keep, inverse, grid, rescale)
        return result
    return _lowpass(x, keep, inverse, grid, rescale)


def lowpass_adjoint(y: Tensor, grid: Sequence[int], inverse: bool = False, keep: Sequence[int] | None = None, rescale: Rescale = "mean") -> Tensor:
    """The transpose of `lowpass` with the same `grid`, `inverse` and `rescale`: x = C_h^T y C_w for each channel.

    Without `inverse` this is the inverse DCT of a block whose missing high frequencies are zero: lowpass_adjoint(lowpass(x, keep), grid)
    is x smoothed on its full grid.

    Args:
        y: [batch, kept rows, kept columns, channels], or [batch, kept tokens, channels] with `keep`; types and strides as in lowpass.
        grid: (h, w) of the result, each at least what is kept.
        keep: (kept rows, kept columns) of y's tokens, in row order.
    Returns: [batch, *grid, channels], or [batch, tokens, channels] where y came as tokens; y's dtype, sums as in lowpass.
    Raises: ValueError naming the argument, what it is and what was expected. Differentiable: the gradient is lowpass.
    Source: arXiv 2508.06038. Reference: ops.ref.dct.lowpass_adjoint. Bound by memory.
    """
    if needs_dispatch(y):
        result: Tensor = torch.ops.stretto.dct_lowpass_adjoint(y, grid, inverse, keep, rescale)
        return result
    return _lowpass_adjoint(y, grid, inverse, keep, rescale)


def _lowpass(x: Tensor, keep: Sequence[int], inverse: bool = False, grid: Sequence[int] | None = None, rescale: str = "mean") -> Tensor:
    op = "dct.lowpass"
    on_grid, full = _on_grid(op, "x", x, "grid", grid)
    kept = _pair(op, "keep", keep)
    _check_sizes(op, "keep", kept, full, kept, rescale)
    if _backend.use_reference(op, x):
        return ref.dct.lowpass(x, kept, inverse, None if grid is None else full, rescale)
    y = _separable(on_grid, kept, tuple(_halves(n, k, inverse, rescale == "mean", False) for n, k in zip(full, kept, strict=True)), True, inverse)
    return y if grid is None else y.flatten(1, 2)


def _lowpass_adjoint(y: Tensor, grid: Sequence[int], inverse: bool = False, keep: Sequence[int] | None = None, rescale: str = "mean") -> Tensor:
    op = "dct.lowpass_adjoint"
    on_grid, kept = _on_grid(op, "y", y, "keep", keep)
    full = _pair(op, "grid", grid)
    _check_sizes(op, "grid", full, full, kept, rescale)
    if _backend.use_reference(op, y):
        return ref.dct.lowpass_adjoint(y, full, inverse, None if keep is None else kept, rescale)
    x = _separable(on_grid, full, tuple(_halves(n, k, inverse, rescale == "mean", True) for n, k in zip(full, kept, strict=True)), inverse, True)
    return x if keep is None else x.flatten(1, 2)


def _pair(op: str, name: str, value: Sequence[int]) -> Pair:
    if len(value) != 2 or not all(isinstance(n, int) and n >= 1 for n in value):
        raise ValueError(f"{op}: {name}: {value}, expected two integers of at least 1")
    return value[0], value[1]


def _on_grid(op: str, name: str, x: Tensor, sizes_name: str, sizes: Sequence[int] | None) -> tuple[Tensor, Pair]:
    """x as [batch, rows, columns, channels], and (rows, columns)."""
    if sizes is None:
        found = check_tensors(op, **{name: (x, "batch rows columns channels", FLOATS)})
        check(min(found["rows"], found["columns"]) >= 1, f"{op}: {name}: a grid of {found['rows']} x {found['columns']}, expected at least one token")
        return x, (found["rows"], found["columns"])
    rows, columns = _pair(op, sizes_name, sizes)
    tokens = check_tensors(op, **{name: (x, "batch tokens channels", FLOATS)})["tokens"]
    if tokens != rows * columns:
        hint = ": drop the class token" if tokens == rows * columns + 1 else ""
        raise ValueError(f"{op}: {name}: {tokens} tokens, expected {rows * columns} for {sizes_name} {rows} x {columns}{hint}")
    return x.unflatten(1, (rows, columns)), (rows, columns)


def _check_sizes(op: str, name: str, value: Pair, full: Pair, kept: Pair, rescale: str) -> None:
    if kept[0] > full[0] or kept[1] > full[1]:
        expected = f"at most the grid {full}" if name == "keep" else f"at least what is kept {kept}"
        raise ValueError(f"{op}: {name}: {value}, expected {expected}")
    if rescale not in ("mean", "ortho"):
        raise ValueError(f"{op}: rescale: {rescale!r}, expected 'mean' or 'ortho'")


@lru_cache(maxsize=256)
def _halves(n: int, keep: int, inverse: bool, mean: bool, adjoint: bool) -> tuple[Tensor, Tensor]:
    """The matrix of one axis as its two halves, packed as csrc/kernels/dct/dct_separable.h says: even [ceil(in/2), pitch], odd [in/2, pitch]."""
    m = ref.dct.lowpass_matrix(n, keep, inverse, "mean" if mean else "ortho")
    m = m.t() if adjoint else m  # [out, in]
    outputs, inputs = m.shape
    if inverse:  # folded on both sides: m[i, j] = m[out-1-i, in-1-j]
        even, odd = (m + m.flip(1)) / 2, (m - m.flip(1)) / 2
        if inputs % 2:
            even[:, inputs // 2] = m[:, inputs // 2]
        even, odd = even[: (outputs + 1) // 2, : (inputs + 1) // 2], odd[: outputs // 2, : inputs // 2]
    elif adjoint:  # dealt in, folded out
        even, odd = m[: (outputs + 1) // 2, ::2], m[: outputs // 2, 1::2]
    else:  # folded in, dealt out
        even, odd = m[::2, : (inputs + 1) // 2], m[1::2, : inputs // 2]
    pitch = (even.shape[0] + 3) // 4 * 4
    packed = (torch.zeros(half.shape[1], pitch).index_copy_(1, torch.arange(half.shape[0]), half.t().float()) for half in (even, odd))
    return next(packed), next(packed)


def _separable(x: Tensor, size: Pair, halves: tuple[tuple[Tensor, Tensor], ...], fold_in: bool, fold_out: bool) -> Tensor:
    out = torch.empty(x.shape[0], *size, x.shape[3], dtype=x.dtype)
    (even_h, odd_h), (even_w, odd_w) = halves
    _backend._C.dct_separable(rows_contiguous(x), even_h, odd_h, even_w, odd_w, fold_in, fold_out, out)  # type: ignore[union-attr]
    return out


def _shape(x: Tensor, sizes: Sequence[int], flat: bool) -> tuple[int, ...]:
    return (x.shape[0], sizes[0] * sizes[1], x.shape[-1]) if flat else (x.shape[0], *sizes, x.shape[-1])


def _lowpass_backward(inputs: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    x, keep, inverse, grid, rescale = inputs
    return lowpass_adjoint(grad, x.shape[1:3] if grid is None else grid, inverse, None if grid is None else keep, rescale), None, None, None, None


def _adjoint_backward(inputs: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    y, grid, inverse, keep, rescale = inputs
    return lowpass(grad, y.shape[1:3] if keep is None else keep, inverse, None if keep is None else grid, rescale), None, None, None, None


_GRIDS: list[tuple[Pair, Pair, int]] = [
    ((24, 24), (8, 8), 40),
    ((5, 7), (5, 3), 17),
    ((1, 9), (1, 2), 16),
    ((16, 6), (5, 6), 130),
    ((3, 3), (1, 1), 1),
]


def _lowpass_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for grid, keep, channels in _GRIDS:
            for inverse in (False, True):
                x = make.randn(2, *grid, channels, dtype=dtype)
                yield Case(f"{grid}-{keep}-{channels}-{inverse}-{dtype}", (x, keep, inverse))
        yield Case(f"tokens-{dtype}", (make.randn(3, 30, 33, dtype=dtype), (2, 4), True, (5, 6), "ortho"))
        yield Case(f"strided-{dtype}", (make.randn(2, 7, 6, 80, dtype=dtype)[:, :, :, 13:61].transpose(1, 2), (3, 4)))
        yield Case(f"channels-first-{dtype}", (make.randn(2, 20, 7, 6, dtype=dtype).permute(0, 2, 3, 1), (3, 4)))
        yield Case(f"empty-{dtype}", (make.randn(0, 4, 4, 8, dtype=dtype), (2, 2)))
        yield Case(f"no-channels-{dtype}", (make.randn(2, 4, 4, 0, dtype=dtype), (2, 2)))


def _adjoint_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for grid, keep, channels in _GRIDS:
            for inverse in (False, True):
                yield Case(f"{grid}-{keep}-{channels}-{inverse}-{dtype}", (make.randn(2, *keep, channels, dtype=dtype), grid, inverse))
        yield Case(f"tokens-{dtype}", (make.randn(3, 8, 33, dtype=dtype), (5, 6), True, (2, 4), "ortho"))
        yield Case(f"strided-{dtype}", (make.randn(2, 4, 3, 80, dtype=dtype)[:, :, :, 13:61].transpose(1, 2), (7, 6)))
        yield Case(f"empty-{dtype}", (make.randn(0, 2, 2, 8, dtype=dtype), (4, 4)))


def _lowpass_bad(make: Make) -> Iterator[BadCase]:
    x, tokens = make.randn(2, 4, 6, 8), make.randn(2, 25, 8)
    yield BadCase("rank", (x[0], (2, 2)), "dct.lowpass: x: shape [4, 6, 8]")
    yield BadCase("dtype", (x.int(), (2, 2)), "dct.lowpass: x: int32")
    yield BadCase("no-grid", (tokens, (2, 2)), "dct.lowpass: x: shape [2, 25, 8]")
    yield BadCase("class-token", (tokens, (2, 2), False, (4, 6)), "dct.lowpass: x: 25 tokens, expected 24 for grid 4 x 6: drop the class token")
    yield BadCase("tokens", (tokens, (2, 2), False, (4, 4)), "dct.lowpass: x: 25 tokens, expected 16")
    yield BadCase("keep-more", (x, (4, 7)), "dct.lowpass: keep: (4, 7), expected at most the grid (4, 6)")
    yield BadCase("keep-none", (x, (0, 2)), "dct.lowpass: keep: (0, 2), expected two integers of at least 1")
    yield BadCase("keep-three", (x, (1, 2, 3)), "dct.lowpass: keep: (1, 2, 3)")
    yield BadCase("empty-grid", (x[:, :0], (1, 1)), "dct.lowpass: x: a grid of 0 x 6")
    yield BadCase("rescale", (x, (2, 2), True, None, "max"), "dct.lowpass: rescale: 'max'")


def _adjoint_bad(make: Make) -> Iterator[BadCase]:
    y = make.randn(2, 4, 6, 8)
    yield BadCase("grid-less", (y, (3, 6)), "dct.lowpass_adjoint: grid: (3, 6), expected at least what is kept (4, 6)")
    yield BadCase("tokens", (y.flatten(1, 2), (8, 8), False, (5, 5)), "dct.lowpass_adjoint: y: 24 tokens, expected 25 for keep 5 x 5")
    yield BadCase("dtype", (y.double(), (8, 8)), "dct.lowpass_adjoint: y: float64")
    yield BadCase("rescale", (y, (8, 8), True, None, ""), "dct.lowpass_adjoint: rescale: ''")


_BENCH: list[tuple[str, Pair, Pair, int]] = [
    ("LLaVA-1.5", (24, 24), (8, 8), 1024), ("Qwen2-VL 1280x720 merged", (26, 46), (13, 23), 3584), ("SigLIP-384", (27, 27), (6, 6), 1152),
]  # fmt: skip


def _lowpass_bench(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for model, grid, keep, channels in _BENCH:
            for batch in (1, 8) if model == "LLaVA-1.5" else (2,):
                yield Case(f"{model} {grid} keep {keep} batch {batch} {dtype}", (make.randn(batch, *grid, channels, dtype=dtype), keep))
        yield Case(f"LLaVA-1.5 to 6x6 tokens, inverse, batch 8 {dtype}", (make.randn(8, 24, 24, 1024, dtype=dtype), (6, 6), True))


def _adjoint_bench(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(f"LLaVA-1.5 8x8 to (24, 24) batch 8 {dtype}", (make.randn(8, 8, 8, 1024, dtype=dtype), (24, 24)))


def _cost(x: Tensor, size: Pair) -> Cost:
    """Either order of the axes; the cheaper counts. Half of a matrix product's multiplications, by symmetry."""
    (a, b), (u, v) = x.shape[1:3], size
    lines = min(a * v * (b + u), b * u * (a + v))
    return Cost(x.nbytes + x[:, :1, :1].nbytes * u * v, flops=lines * x.shape[0] * x.shape[-1])


@lru_cache(maxsize=64)
def _peer_matrices(sizes: Pair, wanted: Pair, inverse: bool, adjoint: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both matrices as a user of torch would keep them, (rows, columns), each [out, in]."""
    pairs = zip(wanted, sizes, strict=True) if adjoint else zip(sizes, wanted, strict=True)
    rows, columns = (ref.dct.lowpass_matrix(n, k, inverse, "mean") for n, k in pairs)
    return (rows.t().to(dtype), columns.t().to(dtype)) if adjoint else (rows.to(dtype), columns.to(dtype))


def _two_matmuls(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    half = torch.matmul(columns, x)  # [B, h, v, C]
    b, h, v, c = half.shape
    return torch.matmul(rows, half.view(b, h, v * c)).view(b, -1, v, c)


def _scipy(x: Tensor, keep: Pair, inverse: bool = False) -> Tensor:
    from scipy import fft

    if inverse or x.dtype != torch.float32:
        raise NotImplementedError("scipy.fft: timed for float32 coefficients only")
    return torch.from_numpy(fft.dctn(x.numpy(), axes=(1, 2), norm="ortho")[:, : keep[0], : keep[1]])


def _torch_dct(x: Tensor, keep: Pair, inverse: bool = False) -> Tensor:
    import torch_dct

    if inverse or x.dtype != torch.float32:
        raise NotImplementedError("torch-dct: timed for float32 coefficients only")
    spectrum: Tensor = torch_dct.dct_2d(x.permute(0, 3, 1, 2), norm="ortho")
    return spectrum[:, :, : keep[0], : keep[1]].permute(0, 2, 3, 1)


def _peers(adjoint: bool) -> dict[str, Callable[..., Tensor]]:
    def with_matrices(apply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda x, sizes, inverse=False: apply(x, *_peer_matrices(x.shape[1:3], sizes, inverse, adjoint, x.dtype))

    return {
        "two matmuls": with_matrices(_two_matmuls),
        "two matmuls in float32": with_matrices(lambda x, rows, columns: _two_matmuls(x.float(), rows.float(), columns.float()).to(x.dtype)),
        "einsum": with_matrices(lambda x, rows, columns: torch.einsum("ui,vj,bijc->buvc", rows, columns, x)),
    }


register(
    "dct_lowpass(Tensor x, int[] keep, bool inverse=False, int[]? grid=None, str rescale='mean') -> Tensor",
    _lowpass,
    function=lowpass,
    reference=ref.dct.lowpass,
    fake=lambda x, keep, inverse=False, grid=None, rescale="mean": x.new_empty(_shape(x, keep, grid is not None)),
    cases=_lowpass_cases,
    bad_cases=_lowpass_bad,
    bench_cases=_lowpass_bench,
    cost=lambda x, keep, inverse=False: _cost(x, keep),
    bound="memory",
    backward=_lowpass_backward,
    peers=_peers(adjoint=False) | {"scipy.fft": _scipy, "torch-dct": _torch_dct},
    source="arXiv 2508.06038",
)  # fmt: skip

register(
    "dct_lowpass_adjoint(Tensor y, int[] grid, bool inverse=False, int[]? keep=None, str rescale='mean') -> Tensor",
    _lowpass_adjoint,
    function=lowpass_adjoint,
    reference=ref.dct.lowpass_adjoint,
    fake=lambda y, grid, inverse=False, keep=None, rescale="mean": y.new_empty(_shape(y, grid, keep is not None)),
    cases=_adjoint_cases,
    bad_cases=_adjoint_bad,
    bench_cases=_adjoint_bench,
    cost=lambda y, grid, inverse=False: _cost(y, grid),
    bound="memory",
    backward=_adjoint_backward,
    peers=_peers(adjoint=True),
    source="arXiv 2508.06038",
)  # fmt: skip
