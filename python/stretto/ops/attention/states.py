"""Joining attention results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, check_tensors, dtype_as
from stretto.ops.table import BadCase, Case, Cost, Make, register


def merge_states(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join two attention results computed over disjoint sets of keys.

    Args:
        a, b: [tokens, heads, head_dim], float32 / float16 / bfloat16.
        lse_a, lse_b: [tokens, heads] float32, natural log of the sum of exponentials; -inf marks an empty set, whose values are not read.
    Returns: (out, lse), shaped and typed as (a, lse_a). Float sums; the same bits for any batch. Two empty sets give zeros and -inf.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 1805.02867. Reference: ops.ref.attention.merge_states. Bound by memory.
    """
    if needs_dispatch(a, lse_a, b, lse_b):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.merge_states(a, lse_a, b, lse_b)
        return result
    return _merge_states(a, lse_a, b, lse_b)


def _merge_states(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    check_tensors(
        "attention.merge_states", a=(a, "tokens heads head_dim", FLOATS), lse_a=(lse_a, "tokens heads", F32),
        b=(b, "tokens heads head_dim", dtype_as(a)), lse_b=(lse_b, "tokens heads", F32),
    )  # fmt: skip
    if _backend.use_reference("merge_states", a):
        return ref.attention.merge_states(a, lse_a, b, lse_b)
    out, lse = _empty(a, lse_a)
    _backend._C.merge_states(a.contiguous(), lse_a.contiguous(), b.contiguous(), lse_b.contiguous(), out, lse)  # type: ignore[union-attr]
    return out, lse


def _empty(a: Tensor, lse_a: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a, memory_format=torch.contiguous_format), torch.empty_like(lse_a, memory_format=torch.contiguous_format)


def _states(make: Make, tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b = make.randn(tokens, heads, head_dim, dtype=dtype), make.randn(tokens, heads, head_dim, dtype=dtype)
    return a, make.randn(tokens, heads, scale=20), b, make.randn(tokens, heads, scale=20)


def _cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for tokens, heads, head_dim in [(0, 4, 64), (1, 1, 8), (57, 5, 72), (3, 2, 13), (64, 8, 128)]:
            yield Case(f"{tokens}x{heads}x{head_dim}-{dtype}", _states(make, tokens, heads, head_dim, dtype))
        a, lse_a, b, lse_b = _states(make, 9, 3, 40, dtype)
        a[:4], lse_a[:4] = float("nan"), -torch.inf  # an empty set is never read
        b[2:6], lse_b[2:6] = float("nan"), -torch.inf
        yield Case(f"empty-sets-{dtype}", (a, lse_a, b, lse_b))
    a, lse_a, b, lse_b = _states(make, 4, 6, 32)
    yield Case("strided", (a.transpose(0, 1), lse_a.t(), b.transpose(0, 1), lse_b.t()))


def _bad_cases(make: Make) -> Iterator[BadCase]:
    a, lse_a, b, lse_b = _states(make, 3, 2, 16)
    yield BadCase("rank", (a[0], lse_a, b, lse_b), "attention.merge_states: a: shape [2, 16]")
    yield BadCase("dtype", (a, lse_a, b.half(), lse_b), "attention.merge_states: b: float16")
    yield BadCase("lse", (a, lse_a[:2], b, lse_b), "attention.merge_states: lse_a: shape [2, 2]")
    yield BadCase("lse-dtype", (a, lse_a, b, lse_b.double()), "attention.merge_states: lse_b: float64")


def _bench_cases(make: Make) -> Iterator[Case]:
    for name, tokens in [("tree step", 64), ("prefill chunk", 2048)]:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(f"Llama-3-8B {name} {dtype}", _states(make, tokens, 32, 128, dtype))


register(
    "merge_states(Tensor a, Tensor lse_a, Tensor b, Tensor lse_b) -> (Tensor, Tensor)",
    _merge_states,
    function=merge_states,
    reference=ref.attention.merge_states,
    fake=lambda a, lse_a, b, lse_b: _empty(a, lse_a),
    cases=_cases,
    bad_cases=_bad_cases,
    bench_cases=_bench_cases,
    cost=lambda a, lse_a, b, lse_b: Cost(3 * a.nbytes + 3 * lse_a.nbytes, 3 * a.numel()),
    bound="memory",
    source="arXiv 1805.02867",
)
