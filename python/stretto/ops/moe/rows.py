"""Tokens sorted by expert, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check_tensors, rows_contiguous
from stretto.ops.table import BadCase, Case, Cost, Make, register


class SortedPairs(NamedTuple):
    """Where each (token, slot) pair goes when pairs are sorted by expert; pair = token * k + slot. All int32."""

    counts: Tensor  # [num_experts] pairs of each expert
    offsets: Tensor  # [num_experts + 1] first row of each expert
    pairs: Tensor  # [rows] which pair a row holds; -1: none
    rows: Tensor  # [tokens, k] which row a pair takes; -1: none


def sort_by_expert(experts: Tensor, num_experts: int, multiple: int = 1) -> SortedPairs:
    """Sort the (token, slot) pairs of a routing by expert; pairs of one expert keep their order.

    Args:
        experts: [tokens, k] int32, each 0 to num_experts - 1, or -1 for a pair that goes nowhere.
        num_experts: 0 to 65536.
        multiple: 1 to 65536; the rows of each expert are padded to a multiple of it.
    Returns: SortedPairs with tokens * k rows, plus room for the padding; rows that hold no pair stand between the groups and at the end.
    Raises: ValueError naming the argument, what it is and what was expected.
    Reference: ops.ref.moe.sort_by_expert. Bound by latency.
    """
    if needs_dispatch(experts):
        return SortedPairs(*torch.ops.stretto.moe_sort_by_expert(experts, num_experts, multiple))
    return SortedPairs(*_sort_by_expert(experts, num_experts, multiple))


def _sort_by_expert(experts: Tensor, num_experts: int, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "moe.sort_by_expert"
    sizes = check_tensors(op, experts=(experts, "tokens k", I32))
    rows = _num_rows(op, sizes["tokens"] * sizes["k"], num_experts, multiple)
    if _backend.use_reference(op, experts):
        check_ids(op, "experts", experts, num_experts)
        return ref.moe.sort_by_expert(experts, num_experts, multiple)
    experts = experts.contiguous()
    result = (torch.empty(num_experts, dtype=torch.int32), torch.empty(num_experts + 1, dtype=torch.int32),
              torch.empty(rows, dtype=torch.int32), torch.empty_like(experts))  # fmt: skip
    _backend._C.sort_by_expert(experts, multiple, *result)  # type: ignore[union-attr]
    return result


MOST_EXPERTS = 1 << 16  # far above any model; a mistaken number must not become gigabytes of counts


def check_count(op: str, name: str, value: int, least: int = 0, most: int = MOST_EXPERTS) -> None:
    """Raise ValueError unless least <= value <= most."""
    if not least <= value <= most:
        raise ValueError(f"{op}: {name}: {value}, expected {least} to {most}")


def _num_rows(op: str, pairs: int, num_experts: int, multiple: int) -> int:
    """Rows of the sorted matrix: known from sizes alone, so that a captured step and a trace can hold it."""
    check_count(op, "num_experts", num_experts)
    check_count(op, "multiple", multiple, 1)
    rows = pairs + min(pairs, num_experts) * (multiple - 1)
    if rows >= 2**31:
        raise ValueError(f"{op}: multiple: {rows} rows with padding, expected less than 2^31")
    return rows


def check_ids(op: str, name: str, ids: Tensor, end: int, lowest: int = -1) -> None:
    """What the native module checks itself, for the reference path."""
    wrong = ((ids < lowest) | (ids >= end)).flatten().nonzero()
    if len(wrong):
        raise ValueError(f"{op}: {name}: {int(ids.flatten()[wrong[0]])} at {int(wrong[0])}, expected {lowest}..{end - 1}")


def permute(x: Tensor, pairs: Tensor, k: int) -> Tensor:
    """The rows of `x` in the order of a sort by expert.

    Args:
        x: [tokens, width], float32 / float16 / bfloat16; a copy is made when elements of a row are not adjacent.
        pairs: [rows] int32 from sort_by_expert: token * k + slot, each -1 (a row of zeros) to tokens * k - 1.
        k: slots of a token, at least 1; 1 where `pairs` names tokens, as plan_dispatch does.
    Returns: [rows, width] of x's dtype. Raises: ValueError naming the argument. Reference: ops.ref.moe.permute. Bound by memory.
    """
    if needs_dispatch(x, pairs):
        result: Tensor = torch.ops.stretto.moe_permute(x, pairs, k)
        return result
    return _permute(x, pairs, k)


def _permute(x: Tensor, pairs: Tensor, k: int) -> Tensor:
    op = "moe.permute"
    sizes = check_tensors(op, x=(x, "tokens width", FLOATS), pairs=(pairs, "rows", I32))
    if k < 1:
        raise ValueError(f"{op}: k: {k}, expected at least 1")
    if _backend.use_reference(op, x, pairs):
        check_ids(op, "pairs", pairs, sizes["tokens"] * k)
        return ref.moe.permute(x, pairs, k)
    out = x.new_empty(sizes["rows"], sizes["width"])
    _backend._C.permute_rows(rows_contiguous(x), pairs.contiguous(), k, out)  # type: ignore[union-attr]
    return out


def unpermute(y: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Bring the experts' results back to their tokens: out[t] = sum_j weights[t, j] y[rows[t, j]].

    Args:
        y: [num_rows, width], float32 / float16 / bfloat16; a copy is made when elements of a row are not adjacent.
        rows: [tokens, k] int32 from sort_by_expert, each -1 (adds nothing) to num_rows - 1.
        weights: [tokens, k] float32; all 1 without it. The weight of a -1 is not looked at.
    Returns: [tokens, width] of y's dtype: float sums in order of j, so a token's bits depend on its own rows only.
    Raises: ValueError naming the argument. Reference: ops.ref.moe.unpermute. Bound by memory.
    """
    if needs_dispatch(y, rows, weights):
        result: Tensor = torch.ops.stretto.moe_unpermute(y, rows, weights)
        return result
    return _unpermute(y, rows, weights)


def _unpermute(y: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    op = "moe.unpermute"
    sizes = check_tensors(op, y=(y, "num_rows width", FLOATS), rows=(rows, "tokens k", I32), weights=(weights, "tokens k", F32))
    if _backend.use_reference(op, y, rows, weights):
        check_ids(op, "rows", rows, sizes["num_rows"])
        return ref.moe.unpermute(y, rows, weights)
    out = y.new_empty(sizes["tokens"], sizes["width"])
    _backend._C.unpermute_rows(rows_contiguous(y), rows.contiguous(), None if weights is None else weights.contiguous(), out)  # type: ignore[union-attr]
    return out


def routing(make: Make, tokens: int, num_experts: int, k: int) -> Tensor:
    """k different experts for each token, at random."""
    return torch.rand(tokens, num_experts, generator=make.generator).topk(k).indices.int()


def _sort_cases(make: Make) -> Iterator[Case]:
    for tokens, experts, k, multiple in [(0, 4, 2, 1), (1, 8, 2, 1), (33, 8, 2, 4), (7, 128, 8, 8), (700, 60, 6, 1), (3000, 8, 2, 16)]:
        yield Case(f"{tokens}x{k}-{experts}-{multiple}", (routing(make, tokens, experts, k), experts, multiple))
    yield Case("nowhere", (make.randint(-1, 5, 40, 3), 5, 4))
    yield Case("one-expert", (make.randint(2, 3, 50, 1), 5))
    yield Case("strided", (routing(make, 9, 8, 4)[:, ::2], 8))


def _sort_bad(make: Make) -> Iterator[BadCase]:
    for bad in (-2, 4, -(2**31), 2**31 - 1):
        yield BadCase(f"id{bad}", (torch.tensor([[0, bad]], dtype=torch.int32), 4), f"moe.sort_by_expert: experts: {bad} at 1, expected -1..3")
    yield BadCase("dtype", (torch.zeros(2, 2, dtype=torch.int64), 4), "moe.sort_by_expert: experts: int64")
    yield BadCase("multiple", (make.randint(0, 4, 2, 2), 4, 0), "moe.sort_by_expert: multiple: 0")
    yield BadCase("huge", (make.randint(0, 4, 2, 2), 4, 2**30), "moe.sort_by_expert: multiple: ")
    yield BadCase("num-experts", (make.randint(0, 4, 2, 2), -1), "moe.sort_by_expert: num_experts: -1")


def _permute_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for tokens, k, width in [(1, 1, 1), (5, 2, 17), (33, 4, 130), (0, 2, 8)]:
            pairs = sort_by_expert(routing(make, tokens, 8, k), 8, 4).pairs
            yield Case(f"{tokens}x{width}-{k}-{dtype}", (make.randn(tokens, width, dtype=dtype), pairs, k))
        yield Case(f"strided-{dtype}", (make.randn(6, 40, dtype=dtype)[:, 3:20], make.randint(-1, 12, 9), 2))


def _permute_bad(make: Make) -> Iterator[BadCase]:
    x = make.randn(3, 4)
    for bad in (-2, 6, -(2**31), 2**31 - 1):
        yield BadCase(f"pair{bad}", (x, torch.tensor([0, bad], dtype=torch.int32), 2), f"moe.permute: pairs: {bad} at 1, expected -1..5")
    yield BadCase("k", (x, make.randint(0, 3, 4), 0), "moe.permute: k: 0")
    yield BadCase("rank", (x[0], make.randint(0, 3, 4), 1), "moe.permute: x: shape [4]")


def _unpermute_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for tokens, k, width in [(1, 1, 1), (5, 2, 17), (33, 4, 130), (0, 2, 8), (3, 8, 64)]:
            found = sort_by_expert(routing(make, tokens, 8, k), 8, 4)
            y = make.randn(len(found.pairs), width, dtype=dtype)
            yield Case(f"{tokens}x{width}-{k}-{dtype}", (y, found.rows, make.randn(tokens, k).abs()))
        yield Case(f"plain-{dtype}", (make.randn(9, 20, dtype=dtype), make.randint(-1, 9, 7, 3)))
        yield Case(f"strided-{dtype}", (make.randn(9, 40, dtype=dtype)[:, 5:31], make.randint(-1, 9, 7, 3), make.randn(3, 7).t()))


def _unpermute_bad(make: Make) -> Iterator[BadCase]:
    y = make.randn(3, 4)
    for bad in (-2, 3, -(2**31), 2**31 - 1):
        yield BadCase(f"row{bad}", (y, torch.tensor([[0, bad]], dtype=torch.int32)), f"moe.unpermute: rows: {bad} at 1, expected -1..2")
    yield BadCase("weights", (y, make.randint(0, 3, 2, 2), make.randn(2, 3)), "moe.unpermute: weights: shape [2, 3]")
    yield BadCase("weights-dtype", (y, make.randint(0, 3, 2, 2), make.randn(2, 2).half()), "moe.unpermute: weights: float16")


_MODELS = [("Mixtral", 8, 2, 4096), ("Qwen3-30B-A3B", 128, 8, 2048), ("DeepSeek-V3", 256, 8, 7168)]


def _permute_bench(make: Make) -> Iterator[Case]:
    for model, experts, k, width in _MODELS:
        for tokens in (1, 64, 1024 if model == "DeepSeek-V3" else 4096):
            for dtype in (torch.float32, torch.bfloat16) if tokens != 1 else (torch.bfloat16,):
                pairs = sort_by_expert(routing(make, tokens, experts, k), experts).pairs
                yield Case(f"{model} {tokens} tokens {dtype}", (make.randn(tokens, width, dtype=dtype), pairs, k))


def _unpermute_bench(make: Make) -> Iterator[Case]:
    for model, experts, k, width in _MODELS:
        for tokens in (1, 64, 1024 if model == "DeepSeek-V3" else 4096):
            for dtype in (torch.float32, torch.bfloat16) if tokens != 1 else (torch.bfloat16,):
                rows = sort_by_expert(routing(make, tokens, experts, k), experts).rows
                yield Case(f"{model} {tokens} tokens {dtype}", (make.randn(tokens * k, width, dtype=dtype), rows, make.randn(tokens, k).abs()))


def _torch_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=num_experts)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return counts, counts.cumsum(0), order, rows.view(experts.shape)


register(
    "moe_sort_by_expert(Tensor experts, int num_experts, int multiple=1) -> (Tensor, Tensor, Tensor, Tensor)",
    _sort_by_expert,
    function=sort_by_expert,
    reference=ref.moe.sort_by_expert,
    fake=lambda experts, num_experts, multiple=1: (
        experts.new_empty(num_experts), experts.new_empty(num_experts + 1),
        experts.new_empty(experts.numel() + min(experts.numel(), num_experts) * (multiple - 1)), experts.new_empty(experts.shape)),
    cases=_sort_cases,
    bad_cases=_sort_bad,
    bench_cases=lambda make: (Case(f"{model} {tokens} tokens", (routing(make, tokens, experts, k), experts))
                              for model, experts, k, _ in _MODELS for tokens in (1, 64, 4096)),
    cost=lambda experts, num_experts, multiple=1: Cost(3 * experts.nbytes + 8 * num_experts, 0),
    bound="latency",
    peers={"torch argsort": _torch_sort},
)  # fmt: skip

register(
    "moe_permute(Tensor x, Tensor pairs, int k) -> Tensor",
    _permute,
    function=permute,
    reference=ref.moe.permute,
    fake=lambda x, pairs, k: x.new_empty(pairs.shape[0], x.shape[1]),
    cases=_permute_cases,
    bad_cases=_permute_bad,
    bench_cases=_permute_bench,
    cost=lambda x, pairs, k: Cost(x.nbytes + pairs.shape[0] * x.shape[1] * x.element_size() + pairs.nbytes, 0),
    bound="memory",
    peers={"torch index_select": lambda x, pairs, k: x.index_select(0, pairs // k)},
)

register(
    "moe_unpermute(Tensor y, Tensor rows, Tensor? weights=None) -> Tensor",
    _unpermute,
    function=unpermute,
    reference=ref.moe.unpermute,
    fake=lambda y, rows, weights=None: y.new_empty(rows.shape[0], y.shape[1]),
    cases=_unpermute_cases,
    bad_cases=_unpermute_bad,
    bench_cases=_unpermute_bench,
    cost=lambda y, rows, weights=None: Cost((rows.numel() + rows.shape[0]) * y.shape[1] * y.element_size(), 2 * rows.numel() * y.shape[1]),
    bound="memory",
    peers={
        "torch index, mul, sum": lambda y, rows, weights: (y[rows.long()] * weights[..., None].to(y.dtype)).sum(1),
        "torch index, bmm": lambda y, rows, weights: torch.bmm(weights[:, None].to(y.dtype), y[rows.long()])[:, 0],
    },
)
