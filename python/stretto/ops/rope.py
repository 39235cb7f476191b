"""Rotary position embedding, fused with the write into the paged cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._check import F32, I32, check, check_tensors, dtype_as
from stretto.ops.attention import PAGES
from stretto.ops.table import BadCase, Case, Cost, Make, register

ORDERS = ("interleaved", "half")


class Scaling(Protocol):
    """How frequencies are stretched: models.loading.config.RopeScaling."""

    @property
    def type(self) -> str: ...
    @property
    def factor(self) -> float: ...
    @property
    def original_context(self) -> int: ...
    @property
    def low_freq_factor(self) -> float: ...
    @property
    def high_freq_factor(self) -> float: ...
    @property
    def attn_factor(self) -> float: ...
    @property
    def beta_fast(self) -> float: ...
    @property
    def beta_slow(self) -> float: ...


def table(positions: Tensor, rotary_dim: int, theta: float, scaling: Scaling | None = None) -> Tensor:
    """Cosines and sines for rope.append.

    Args:
        positions: [n] integers. rotary_dim: dimensions of a head that rotate, even. theta: base of the frequencies.
        scaling: linear, ntk (a larger base), yarn (arXiv 2309.00071) or llama3 (by wavelength); None: plain.
    Returns: [n, rotary_dim] float32, cosines of the rotary_dim / 2 pairs, then sines; computed in float64.
    Raises: ValueError naming the argument.
    """
    check(rotary_dim > 0 and rotary_dim % 2 == 0, f"rope.table: rotary_dim: {rotary_dim}, expected positive and even")
    check(0 < theta < math.inf, f"rope.table: theta: {theta}, expected finite and above 0")
    if scaling is not None:
        check(0 < scaling.factor < math.inf, f"rope.table: scaling: factor {scaling.factor}, expected finite and above 0")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device) / rotary_dim
    base = theta
    if scaling is not None and scaling.type == "ntk":
        check(rotary_dim > 2, "rope.table: rotary_dim: 2, expected at least 4 with ntk scaling, which leaves the first pair alone")
        base = theta * scaling.factor ** (rotary_dim / (rotary_dim - 2))
    frequency = base**-exponents
    if scaling is not None and scaling.type == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None and scaling.type == "yarn":
        check(theta > 1, f"rope.table: theta: {theta}, expected above 1 with yarn scaling")
        frequency = _yarn(frequency, rotary_dim, theta, scaling)
    elif scaling is not None and scaling.type == "llama3":
        frequency = _llama3(frequency, scaling)
    elif scaling is not None:
        check(scaling.type == "ntk", f"rope.table: scaling: {scaling.type!r}, expected linear, ntk, yarn or llama3")
    angles = positions.double()[:, None] * frequency
    factor = scaling.attn_factor if scaling is not None else 1.0
    return (factor * torch.cat([angles.cos(), angles.sin()], dim=1)).float()


def _yarn(frequency: Tensor, dim: int, theta: float, s: Scaling) -> Tensor:
    """Fast pairs keep their frequency, slow ones are interpolated, with a ramp between."""

    def pair_turning(rotations: float) -> float:  # index of the pair that turns this often within the original context
        return dim * math.log(s.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_turning(s.beta_fast)), 0), min(math.ceil(pair_turning(s.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64, device=frequency.device) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency / s.factor * ramp + frequency * (1 - ramp)


def _llama3(frequency: Tensor, s: Scaling) -> Tensor:
    """Long wavelengths are interpolated, short ones kept, those between blended."""
    turns = s.original_context * frequency / (2 * math.pi)  # within the original context
    smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - smooth.clamp(0, 1)) * frequency / s.factor + smooth.clamp(0, 1) * frequency


def append(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor, k_pages: Tensor, v_pages: Tensor, *, num_heads: int, num_kv_heads: int, order: str,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, norm_eps: float = 1e-6, k_scales: Tensor | None = None,
    v_scales: Tensor | None = None, num_rows: Tensor | None = None,
) -> None:  # fmt: skip
    """Rotate queries in place; write rotated keys and the values into the pages.

    Args:
        qkv: [rows, (num_heads + 2 num_kv_heads) * head_dim] float32, contiguous rows: queries, keys, values. Its keys are left alone.
        positions: [rows] int32, rows of cos_sin. slots: [rows] int32, page * page_size + offset, or -1: write nothing.
        cos_sin: [positions, rotary_dim] float32 of rope.table; rotary_dim at most head_dim.
        k_pages, v_pages, k_scales, v_scales: as in attention.paged; int8 pages get one scale per row and kv head, largest magnitude / 127.
        order: which elements form a pair: "interleaved" (2i, 2i + 1), "half" (i, i + rotary_dim / 2).
        q_norm, k_norm: [head_dim] float32, RMS norm per head before the rotation, with norm_eps.
        num_rows: [1] int32, rows in use; for captured steps.
    Raises: ValueError naming the argument.
    Source: arXiv 2104.09864. Reference: ops.ref.rope.rope_append. Bound by memory.
    """
    _append(qkv, positions, slots, cos_sin, k_pages, v_pages, num_heads, num_kv_heads, order, q_norm, k_norm, norm_eps, k_scales, v_scales, num_rows)


def _append(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor, k_pages: Tensor, v_pages: Tensor, num_heads: int, num_kv_heads: int, order: str,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, norm_eps: float = 1e-6, k_scales: Tensor | None = None,
    v_scales: Tensor | None = None, num_rows: Tensor | None = None,
) -> None:  # fmt: skip
    check_tensors(
        "rope.append", qkv=(qkv, "rows _", F32), positions=(positions, "rows", I32), slots=(slots, "rows", I32), cos_sin=(cos_sin, "_ _", F32),
        k_pages=(k_pages, "pages kv_heads head_dim page_size", PAGES), v_pages=(v_pages, "pages kv_heads page_size head_dim", dtype_as(k_pages)),
        q_norm=(q_norm, "head_dim", F32), k_norm=(k_norm, "head_dim", F32), k_scales=(k_scales, "pages kv_heads page_size", F32),
        v_scales=(v_scales, "pages kv_heads page_size", F32), num_rows=(num_rows, "1", I32),
    )  # fmt: skip
    check(order in ORDERS, f"rope.append: order: {order!r}, expected interleaved or half")
    if num_heads < 0 or num_kv_heads < 0:
        raise ValueError(f"rope.append: num_heads, num_kv_heads: {num_heads}, {num_kv_heads}, expected at least 0")
    if not 0 <= norm_eps < math.inf:
        raise ValueError(f"rope.append: norm_eps: {norm_eps}, expected finite and at least 0")
    width = (num_heads + 2 * num_kv_heads) * k_pages.shape[2]
    check(qkv.shape[1] == width, f"rope.append: qkv: {qkv.shape[1]} columns, expected {width} for these heads")
    check(num_kv_heads == k_pages.shape[1], f"rope.append: num_kv_heads: {num_kv_heads}, expected {k_pages.shape[1]} as in k_pages")
    if _backend.use_reference("rope_append", qkv):
        ref.rope.rope_append(
            qkv, positions, slots, cos_sin, k_pages, v_pages, num_heads, num_kv_heads, order, q_norm, k_norm, norm_eps, k_scales, v_scales
        )
        return
    _backend._C.rope_append(  # type: ignore[union-attr]
        qkv, positions, slots, cos_sin, k_pages, v_pages, num_heads, num_kv_heads, order == "interleaved", q_norm, k_norm, norm_eps, k_scales, v_scales,
        num_rows,
    )  # fmt: skip


def _positional(*args: object) -> None:
    """`append` with every argument by position, as torch.ops.stretto.rope_append takes them."""
    _append(*args)  # type: ignore[arg-type]


def _arguments(
    make: Make, rows: int, order: str, dtype: torch.dtype = torch.float32, norms: bool = False, page_size: int = 16, *,
    heads: int = 3, kv_heads: int = 1, head_dim: int = 64, rotary_dim: int = 64,
) -> tuple[object, ...]:  # fmt: skip
    pages = 8
    scales = [make.randn(pages, kv_heads, page_size) for _ in range(2)] if dtype == torch.int8 else [None, None]
    slots = torch.randperm(pages * page_size, generator=make.generator)[:rows].to(torch.int32)
    slots[1::3] = -1
    return (
        make.randn(rows, (heads + 2 * kv_heads) * head_dim), make.randint(0, 100, rows), slots, table(torch.arange(100), rotary_dim, 10000.0),
        make.randn(pages, kv_heads, head_dim, page_size, dtype=dtype), make.randn(pages, kv_heads, page_size, head_dim, dtype=dtype), heads, kv_heads,
        order, make.randn(head_dim) if norms else None, make.randn(head_dim) if norms else None, 1e-6, *scales,
    )  # fmt: skip


def _cases(make: Make) -> Iterator[Case]:
    for order in ORDERS:
        for rows in (0, 1, 33):
            yield Case(f"{order}-{rows}", _arguments(make, rows, order))
    yield Case("norms", _arguments(make, 9, "half", norms=True))
    yield Case("page-5", _arguments(make, 9, "interleaved", page_size=5))
    for dtype in PAGES[1:]:
        for order in ORDERS:
            yield Case(f"{order}-{dtype}", _arguments(make, 20, order, dtype, page_size=7, heads=4, kv_heads=2, head_dim=80, rotary_dim=80))
    yield Case("partly-rotated-int8", _arguments(make, 9, "half", torch.int8, heads=8, kv_heads=1, head_dim=128, rotary_dim=32))
    yield Case("norms-int8", _arguments(make, 9, "interleaved", torch.int8, norms=True, heads=3, kv_heads=3, head_dim=256, rotary_dim=256))


def _bad_cases(make: Make) -> Iterator[BadCase]:
    args = _arguments(make, 4, "half")
    yield BadCase("order", (*args[:8], "odd", *args[9:]), "rope.append: order: 'odd'")
    yield BadCase("position", (args[0], torch.full((4,), 100, dtype=torch.int32), *args[2:]), "rope.append: positions: 100")
    yield BadCase("slot", (*args[:2], torch.full((4,), 128, dtype=torch.int32), *args[3:]), "rope.append: slots: 128")
    yield BadCase("negative-heads", (*args[:6], -1, *args[7:]), "rope.append: num_heads, num_kv_heads: -1, 1")
    yield BadCase("norm_eps", (*args[:11], math.nan, *args[12:]), "rope.append: norm_eps: nan")
    yield BadCase("scales", (*args[:12], torch.zeros(8, 1, 16), None), "rope.append: k_scales, v_scales: expected with int8 pages")
    yield BadCase("heads", (*args[:6], 4, *args[7:]), "rope.append: qkv: 320 columns")


register(
    "rope_append(Tensor(a!) qkv, Tensor positions, Tensor slots, Tensor cos_sin, Tensor(b!) k_pages, Tensor(c!) v_pages, int num_heads, int num_kv_heads, "
    "str order, Tensor? q_norm=None, Tensor? k_norm=None, float norm_eps=1e-6, Tensor(d!)? k_scales=None, Tensor(e!)? v_scales=None) -> ()",
    _append,
    function=_positional,
    reference=ref.rope.rope_append,
    fake=lambda *_, **__: None,
    cases=_cases,
    bad_cases=_bad_cases,
    bench_cases=lambda make: iter([Case("SmolLM2-135M head_dim, 33 rows", _arguments(make, 33, "interleaved", torch.float16))]),
    cost=lambda qkv, positions, slots, cos_sin, k_pages, *_: Cost(2 * qkv.nbytes, 6 * qkv.numel()),
    bound="memory",
    source="arXiv 2104.09864",
    kernels=("rope_append",),
)
