"""The experts' matrix products over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, I32, check, check_tensors, rows_contiguous
from stretto.ops.quant import PackedWeight, linear_packed, packed_nbytes, random_packed
from stretto.ops.ref.quant import FORMATS
from stretto.ops.table import BadCase, Case, Cost, Make, register

U8 = (torch.uint8,)
_GATES = {"none": 0, "silu": 1, "gelu_tanh": 2}


@dataclass(frozen=True)
class ExpertWeights:
    """One matrix [n, k] an expert, all of one format, packed side by side. Made by `pack_experts`."""

    data: Tensor  # [experts, bytes]
    format: str
    n: int
    k: int


def pack_experts(weights: Sequence[PackedWeight]) -> ExpertWeights:
    """Lay packed matrices of equal format and shape side by side; copies them.

    Raises: ValueError where there is none, or one differs.
    """
    check(len(weights) > 0, "moe.pack_experts: weights: none, expected at least one")
    first = weights[0]
    for i, w in enumerate(weights):
        check((w.format, w.n, w.k) == (first.format, first.n, first.k),
              f"moe.pack_experts: weights: {w.format} [{w.n}, {w.k}] at {i}, expected {first.format} [{first.n}, {first.k}] as the first")  # fmt: skip
    return ExpertWeights(torch.stack([w.data for w in weights]), first.format, first.n, first.k)


def grouped_linear(x: Tensor, offsets: Tensor, w: ExpertWeights, *, gate: Literal["silu", "gelu_tanh"] | None = None) -> Tensor:
    """Rows sorted by expert times the transposed weight of their expert.

    Args:
        x: [rows, k] float32, sorted by expert (sort_by_expert, permute); a copy is made when elements of a row are not adjacent.
        offsets: [experts + 1] int32 from sort_by_expert: expert e has rows offsets[e] to offsets[e + 1] - 1.
        w: from pack_experts.
        gate: each weight holds (gate, up) interleaved, n a multiple of 32; the result is act(gate) * up with n / 2 columns.
    Returns: [rows, n] float32, [rows, n / 2] with a gate; rows from offsets[experts] on are zeros. A row has the bits that `linear` with
        its expert's weight gives.
    Raises: ValueError naming the argument, what it is and what was expected.
    Reference: ops.ref.moe.grouped_linear. Bound by memory for few rows of an expert, by arithmetic for many.
    """
    check(x.dim() != 2 or x.shape[1] == w.k, f"moe.grouped_linear: x: shape {list(x.shape)}, expected [rows, k] with k = {w.k}")
    return grouped_linear_packed(x, offsets, w.data, w.format, w.n, gate or "none")


def grouped_linear_packed(x: Tensor, offsets: Tensor, packed: Tensor, format: str, n: int, gate: str = "none") -> Tensor:
    """`grouped_linear` on plain values, as torch.ops.stretto.moe_grouped_linear takes them; gate is "none", "silu" or "gelu_tanh"."""
    if needs_dispatch(x, offsets, packed):
        result: Tensor = torch.ops.stretto.moe_grouped_linear(x, offsets, packed, format, n, gate)
        return result
    return _grouped_linear(x, offsets, packed, format, n, gate)


def _grouped_linear(x: Tensor, offsets: Tensor, packed: Tensor, format: str, n: int, gate: str = "none") -> Tensor:
    op = "moe.grouped_linear"
    if format not in FORMATS:
        raise NotImplementedError(f"{op}: format: {format!r}, expected one of {', '.join(FORMATS)}")
    check(gate in _GATES, f"{op}: gate: {gate!r}, expected one of {', '.join(_GATES)}")
    check(n >= 0, f"{op}: n: {n}, expected at least 0")
    check(gate == "none" or n % 32 == 0, f"{op}: n: {n}, expected a multiple of 32 with a gate")
    sizes = check_tensors(op, x=(x, "rows k", F32), offsets=(offsets, "bounds", I32), packed=(packed, "experts bytes", U8))
    experts, k = sizes["experts"], sizes["k"]
    check(sizes["bounds"] == experts + 1, f"{op}: offsets: {sizes['bounds']} of them, expected experts + 1 = {experts + 1}")
    check(k > 0 and sizes["bytes"] == packed_nbytes(format, n, k),
          f"{op}: packed: {sizes['bytes']} bytes, expected {packed_nbytes(format, n, k)} for {format} [{n}, {k}]")  # fmt: skip
    if _backend.use_reference(op, x, offsets, packed):
        _check_offsets(op, offsets, sizes["rows"])
        return ref.moe.grouped_linear(x, offsets, packed, format, n, gate)
    out = x.new_empty(sizes["rows"], n if gate == "none" else n // 2)
    _backend._C.grouped_linear(rows_contiguous(x), offsets.contiguous(), packed.contiguous(), format, n, _GATES[gate], out)  # type: ignore[union-attr]
    return out


def _check_offsets(op: str, offsets: Tensor, rows: int) -> None:
    """What the native module checks itself, for the reference path."""
    least, most = 0, 0
    for i, bound in enumerate(offsets.tolist()):
        if not least <= bound <= most:
            raise ValueError(f"{op}: offsets: {bound} at {i}, expected {least}..{most}")
        least, most = bound, rows


def expert_mlp(x: Tensor, offsets: Tensor, gate_up: ExpertWeights, down: ExpertWeights, activation: Literal["silu", "gelu_tanh"] = "silu") -> Tensor:
    """down(act(gate(x)) * up(x)) with each row's own expert: two grouped products, the activation inside the first.

    Args:
        x: [rows, k] float32 sorted by expert. offsets: [experts + 1] int32, as in grouped_linear.
        gate_up: n = 2 * width, each expert's gate and up interleaved (`quant.pack(..., interleave=True)`). down: [k, width] an expert.
    Returns: [rows, k] float32. Raises: ValueError naming the argument.
    """
    check(gate_up.n == 2 * down.k, f"moe.expert_mlp: down: k = {down.k}, expected half of gate_up's n = {gate_up.n}")
    return grouped_linear(grouped_linear(x, offsets, gate_up, gate=activation), offsets, down)


def _random_experts(make: Make, format: str, experts: int, n: int, k: int, *, interleave: bool = False) -> Tensor:
    return torch.stack([random_packed(make, format, n, k, interleave=interleave).data for _ in range(experts)])


def _offsets(*counts: int) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()


def _cases(make: Make) -> Iterator[Case]:
    for format in ("F32", "BF16", "Q8_0", "Q4_1", "Q6_K"):
        k = 256 if format == "Q6_K" else 64
        yield Case(f"{format}", (make.randn(17, k), _offsets(3, 0, 9, 5), _random_experts(make, format, 4, 40, k), format, 40))
        packed = _random_experts(make, format, 2, 64, k, interleave=True)
        yield Case(f"{format}-gate", (make.randn(9, k), _offsets(1, 6), packed, format, 64, "silu"))
    yield Case("empty", (make.randn(0, 32), _offsets(0, 0), _random_experts(make, "Q8_0", 2, 16, 32), "Q8_0", 16))
    yield Case("strided", (make.randn(32, 6).t(), _offsets(4, 2), _random_experts(make, "F32", 2, 16, 32), "F32", 16))


def _bad(make: Make) -> Iterator[BadCase]:
    x, packed = make.randn(6, 32), _random_experts(make, "Q8_0", 2, 16, 32)
    for i, bounds, wrong in [(0, [1, 3, 6], "1 at 0, expected 0..0"), (1, [0, -1, 6], "-1 at 1, expected 0..6"), (2, [0, 3, 2], "2 at 2, expected 3..6"),
                             (3, [0, 3, 7], "7 at 2, expected 3..6"), (4, [0, 2**31 - 1, 6], "2147483647 at 1")]:  # fmt: skip
        yield BadCase(f"offsets{i}", (x, torch.tensor(bounds, dtype=torch.int32), packed, "Q8_0", 16), f"moe.grouped_linear: offsets: {wrong}")
    yield BadCase("bounds", (x, _offsets(6), packed, "Q8_0", 16), "moe.grouped_linear: offsets: 2 of them, expected experts + 1 = 3")
    yield BadCase("bytes", (x, _offsets(3, 3), packed, "Q8_0", 32), "moe.grouped_linear: packed: 544 bytes, expected 1088")
    yield BadCase("gate", (x, _offsets(3, 3), packed, "Q8_0", 16, "silu"), "moe.grouped_linear: n: 16, expected a multiple of 32")
    yield BadCase("format", (x, _offsets(3, 3), packed, "Q2_K", 16), "moe.grouped_linear: format: 'Q2_K'", error=NotImplementedError)


def _bench(make: Make) -> Iterator[Case]:
    """An eighth of Mixtral's width and Qwen3's own expert size, one token and many."""
    for model, experts, k, n, format in [("Mixtral/8", 8, 512, 1792, "F32"), ("Qwen3-30B-A3B", 16, 2048, 768, "Q8_0")]:
        packed = _random_experts(make, format, experts, n, k)
        for rows in (8, 512):
            counts = torch.full((experts,), rows // experts, dtype=torch.int32)
            counts[: rows - int(counts.sum())] += 1
            yield Case(f"{model} {format} {rows} rows", (make.randn(rows, k), _offsets(*counts.tolist()), packed, format, n))


def _loop(x: Tensor, offsets: Tensor, packed: Tensor, format: str, n: int) -> Tensor:
    """Our own `linear` for each expert in turn: what grouping saves."""
    bounds = offsets.tolist()
    return torch.cat([linear_packed(x[a:b], packed[e], format, n, None, None, "none") for e, (a, b) in enumerate(pairwise(bounds))])


register(
    "moe_grouped_linear(Tensor x, Tensor offsets, Tensor packed, str format, int n, str gate='none') -> Tensor",
    _grouped_linear,
    function=grouped_linear_packed,
    reference=ref.moe.grouped_linear,
    fake=lambda x, offsets, packed, format, n, gate="none": x.new_empty(x.shape[0], n if gate == "none" else n // 2),
    cases=_cases,
    bad_cases=_bad,
    bench_cases=_bench,
    cost=lambda x, offsets, packed, format, n, gate="none": Cost(
        bytes=packed.nbytes * min(1, x.shape[0]) + x.nbytes + 4 * x.shape[0] * n, flops=2 * x.numel() * n),
    bound="memory",
    peers={"stretto linear in a loop": _loop},
)  # fmt: skip
