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
    check(theta > 0, f"rope.table: theta: {theta}, expected above 0")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    base = theta * scaling.factor ** (rotary_dim / (rotary_dim - 2)) if scaling is not None and scaling.type == "ntk" else theta
    frequency = base**-exponents
    if scaling is not None and scaling.type == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None and scaling.type == "yarn":
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
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
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
    _append(*args)  # type: ignore[arg-type]


def _arguments(make: Make, rows: int, order: str, dtype: torch.dtype = torch.float32, norms: bool = False, page_size: int = 16) -> tuple[object, ...]:
    heads, kv_heads, head_dim, pages = 3, 1, 64, 8
    slots = torch.randperm(pages * page_size, generator=make.generator)[:rows].to(torch.int32)
    slots[1::3] = -1
    return (
        make.randn(rows, (heads + 2 * kv_heads) * head_dim), make.randint(0, 100, rows), slots, table(torch.arange(100), 64, 10000.0),
        make.randn(pages, kv_heads, head_dim, page_size, dtype=dtype), make.randn(pages, kv_heads, page_size, head_dim, dtype=dtype), heads, kv_heads,
        order, make.randn(head_dim) if norms else None, make.randn(head_dim) if norms else None, 1e-6,
    )  # fmt: skip


def _cases(make: Make) -> Iterator[Case]:
    for order in ORDERS:
        for rows in (0, 1, 33):
            yield Case(f"{order}-{rows}", _arguments(make, rows, order))
    yield Case("norms", _arguments(make, 9, "half", norms=True))
    yield Case("page-5", _arguments(make, 9, "interleaved", page_size=5))


def _bad_cases(make: Make) -> Iterator[BadCase]:
    args = _arguments(make, 4, "half")
    yield BadCase("order", (*args[:8], "odd", *args[9:]), "rope.append: order: 'odd'")
    yield BadCase("position", (args[0], torch.full((4,), 100, dtype=torch.int32), *args[2:]), "rope.append: positions: 100")
    yield BadCase("slot", (*args[:2], torch.full((4,), 128, dtype=torch.int32), *args[3:]), "rope.append: slots: 128")
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
)
