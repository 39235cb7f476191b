"""Which experts a token visits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check, check_tensors, rows_contiguous
from stretto.ops.table import BadCase, Case, Cost, Make, register

Scoring = Literal["softmax", "sigmoid"]


def topk_route(
    logits: Tensor, k: int, scoring: Scoring = "softmax", renormalise: bool = True, bias: Tensor | None = None,
    groups: int = 1, top_groups: int = 1, group_top: int = 2, scale: float = 1.0, *,
    out: tuple[Tensor, Tensor] | None = None, num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose k experts for each token, and their weights.

    score = softmax or sigmoid of the logits; choice = score + bias, or the logits where neither bias nor groups are given (the order is
    the same, without ties made by rounding). With groups, only experts of the `top_groups` groups whose `group_top` best choices have the
    largest sum can be chosen. The k largest choices win, equal ones by lowest id. Mixtral and Qwen3: the defaults. DeepSeek-V3: sigmoid,
    bias, groups 8, top_groups 4, scale 2.5; DeepSeek-V2: groups with group_top=1 and renormalise=False.

    Args:
        logits: [tokens, experts], float32 / float16 / bfloat16; any strides (a copy is made when elements of a row are not adjacent).
        k: 1 to the number of experts that can be chosen.
        renormalise: divide the weights of a token by their sum (plus 1e-20).
        bias: [experts] float32, for the choice only, not for the weights.
        groups: of equal size, neighbours in id. top_groups: 1 to groups. group_top: 1 or 2.
        scale: multiplies the weights; finite.
        out: (weights, experts) written instead of new tensors.
        num_rows: [1] int32; only rows below it are computed, the rest of `out` is left alone. For captured steps.
    Returns: (weights [tokens, k] float32, experts [tokens, k] int32), largest choice first. A row's bits do not depend on other rows or
        threads. Ids are legal whatever the logits; NaN (softmax: anywhere in the row, also +inf) gives NaN weights.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2401.04088, 2405.04434, 2412.19437. Reference: ops.ref.moe.topk_route. Bound by latency.
    """
    if out is None and num_rows is None and needs_dispatch(logits, bias):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.moe_topk_route(logits, k, scoring, renormalise, bias, groups, top_groups, group_top, scale)
        return result
    return _topk_route(logits, k, scoring, renormalise, bias, groups, top_groups, group_top, scale, out=out, num_rows=num_rows)


def _topk_route(
    logits: Tensor, k: int, scoring: str = "softmax", renormalise: bool = True, bias: Tensor | None = None,
    groups: int = 1, top_groups: int = 1, group_top: int = 2, scale: float = 1.0, *,
    out: tuple[Tensor, Tensor] | None = None, num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "moe.topk_route"
    weights, chosen = out or (None, None)
    sizes = check_tensors(op, logits=(logits, "tokens experts", FLOATS), bias=(bias, "experts", F32), weights=(weights, f"tokens {k}", F32),
                          experts=(chosen, f"tokens {k}", I32), num_rows=(num_rows, "1", I32))  # fmt: skip
    if groups < 1 or sizes["experts"] % groups:
        raise ValueError(f"{op}: groups: {groups}, expected a divisor of {sizes['experts']} experts")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"{op}: top_groups: {top_groups}, expected 1 to {groups} groups")
    if not 1 <= k <= top_groups * (sizes["experts"] // groups):
        raise ValueError(f"{op}: k: {k}, expected 1 to the {top_groups * (sizes['experts'] // groups)} experts that can be chosen")
    if group_top not in (1, 2) or scoring not in ("softmax", "sigmoid"):
        name, value, expected = ("scoring", repr(scoring), "'softmax' or 'sigmoid'") if group_top in (1, 2) else ("group_top", group_top, "1 or 2")
        raise ValueError(f"{op}: {name}: {value}, expected {expected}")
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale: {scale}, expected a finite number")
    if _backend.use_reference(op, logits):
        found = ref.moe.topk_route(logits, k, scoring, renormalise, bias, groups, top_groups, group_top, scale)
        if weights is None or chosen is None:
            return found
        rows = sizes["tokens"] if num_rows is None else min(max(int(num_rows), 0), sizes["tokens"])
        weights[:rows], chosen[:rows] = found[0][:rows], found[1][:rows]
        return weights, chosen
    if weights is None or chosen is None:
        weights = torch.empty(sizes["tokens"], k)
        chosen = torch.empty(sizes["tokens"], k, dtype=torch.int32)
    check(weights.is_contiguous() and chosen.is_contiguous(), f"{op}: out: strided, expected contiguous")
    _backend._C.topk_route(rows_contiguous(logits), None if bias is None else bias.contiguous(), groups, top_groups, group_top,  # type: ignore[union-attr]
                           scoring == "sigmoid", renormalise, scale, weights, chosen, num_rows)  # fmt: skip
    return weights, chosen


def _cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for tokens, experts, k in [(0, 8, 2), (1, 1, 1), (3, 8, 2), (17, 60, 4), (5, 128, 8), (2, 17, 17)]:
            yield Case(f"{tokens}x{experts}-{k}-{dtype}", (make.randn(tokens, experts, dtype=dtype, scale=2), k))
        deepseek = ("sigmoid", True, make.randn(64, scale=0.1), 8, 4, 2, 2.5)
        yield Case(f"deepseek-v3-{dtype}", (make.randn(9, 64, dtype=dtype), 6, *deepseek))
        yield Case(f"strided-{dtype}", (make.randn(8, 5, dtype=dtype).t(), 2, "sigmoid", False))
    yield Case("deepseek-v2", (make.randn(9, 60), 6, "softmax", False, None, 6, 3, 1, 16.0))
    yield Case("groups-of-one", (make.randn(9, 8), 2, "softmax", True, None, 8, 3))
    yield Case("ties", (make.randint(0, 3, 9, 40).float(), 5))
    yield Case("ties-in-groups", (make.randint(0, 2, 9, 32).float(), 5, "sigmoid", True, None, 4, 2))
    yield Case("biased-softmax", (make.randn(5, 24), 3, "softmax", True, make.randn(24)))
    infinite = make.randn(6, 20)
    infinite[0, 3:], infinite[1, :], infinite[2, 7], infinite[3, 4], infinite[4, 19] = -torch.inf, -torch.inf, torch.inf, torch.nan, -torch.inf
    yield Case("infinities", (infinite, 4))
    yield Case("infinities-sigmoid", (infinite.clone(), 4, "sigmoid"))
    yield Case("infinities-in-groups", (infinite.clone(), 4, "sigmoid", True, None, 5, 2))


def _bad(make: Make) -> Iterator[BadCase]:
    x = make.randn(2, 8)
    yield BadCase("rank", (x[0], 2), "moe.topk_route: logits: shape [8]")
    yield BadCase("dtype", (x.int(), 2), "moe.topk_route: logits: int32")
    yield BadCase("k0", (x, 0), "moe.topk_route: k: 0, expected 1 to the 8 experts")
    yield BadCase("k9", (x, 9), "moe.topk_route: k: 9")
    yield BadCase("k-of-groups", (x, 3, "softmax", True, None, 4, 1), "moe.topk_route: k: 3, expected 1 to the 2 experts")
    yield BadCase("groups", (x, 2, "softmax", True, None, 3, 1), "moe.topk_route: groups: 3, expected a divisor of 8")
    yield BadCase("top-groups", (x, 2, "softmax", True, None, 2, 3), "moe.topk_route: top_groups: 3")
    yield BadCase("group-top", (x, 2, "softmax", True, None, 2, 1, 3), "moe.topk_route: group_top: 3")
    yield BadCase("scoring", (x, 2, "relu"), "moe.topk_route: scoring: 'relu'")
    yield BadCase("bias", (x, 2, "softmax", True, make.randn(7)), "moe.topk_route: bias: shape [7]")
    yield BadCase("scale", (x, 2, "softmax", True, None, 1, 1, 2, math.nan), "moe.topk_route: scale: nan")


ROUTERS: dict[str, tuple[int, int, tuple[object, ...]]] = {
    "Mixtral": (8, 2, ()), "Qwen3-MoE": (128, 8, ()), "DeepSeek-V3": (256, 8, ("sigmoid", True, "bias", 8, 4, 2, 2.5)),
}  # fmt: skip
"""Experts, k and further arguments of the routers of named models."""


def _bench(make: Make) -> Iterator[Case]:
    for model, (experts, k, extra) in ROUTERS.items():
        for tokens in (1, 64, 4096):
            yield Case(
                f"{model} {tokens} tokens", (make.randn(tokens, experts), k, *(make.randn(experts, scale=0.1) if v == "bias" else v for v in extra))
            )


def _torch_route(
    logits: Tensor, k: int, scoring: str = "softmax", renormalise: bool = True, bias: Tensor | None = None,
    groups: int = 1, top_groups: int = 1, group_top: int = 2, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As models write it: torch.topk, whose ties are not defined."""
    score = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = score if bias is None else score + bias
    if groups > 1:
        by_group = choice.view(len(logits), groups, -1)
        kept = by_group.topk(group_top, sorted=False).values.sum(-1).topk(top_groups, sorted=False).indices
        mask = torch.ones(len(logits), groups, dtype=torch.bool).scatter_(1, kept, False)
        choice = by_group.masked_fill(mask[..., None], -torch.inf).view(len(logits), -1)
    if bias is None and groups == 1:
        weights, experts = choice.topk(k)
    else:
        experts = choice.topk(k).indices
        weights = score.gather(1, experts)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights if scale == 1.0 else weights * scale, experts.int()


register(
    "moe_topk_route(Tensor logits, int k, str scoring='softmax', bool renormalise=True, Tensor? bias=None, int groups=1, int top_groups=1, "
    "int group_top=2, float scale=1.0) -> (Tensor, Tensor)",
    _topk_route,
    function=topk_route,
    reference=ref.moe.topk_route,
    fake=lambda logits, k, *_, **__: (logits.new_empty(logits.shape[0], k, dtype=torch.float32), logits.new_empty(logits.shape[0], k, dtype=torch.int32)),
    cases=_cases,
    bad_cases=_bad,
    bench_cases=_bench,
    cost=lambda logits, k, *_: Cost(logits.nbytes + 8 * logits.shape[0] * k, flops=(8 + k) * logits.numel()),
    bound="latency",
    peers={"torch topk": _torch_route},
    source="arXiv 2401.04088, 2405.04434, 2412.19437",
)  # fmt: skip
