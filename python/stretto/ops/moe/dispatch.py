"""Who sends which token where, and the statistics that decide where experts live."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import I32, check, check_tensors
from stretto.ops.moe.rows import check_count, check_ids, routing
from stretto.ops.table import BadCase, Case, Cost, Make, register

MOST_DEVICES = 1024  # counts are kept for each pair of them
MOST_COACTIVE = 4096  # experts whose pairs are counted


class Dispatch(NamedTuple):
    """All sends of one layer, sorted by (source, destination, token); all int32."""

    counts: Tensor  # [sources, devices] tokens sent; row s is what s sends, column d what d receives
    offsets: Tensor  # [sources * devices + 1] first send of each (source, destination) in `tokens`
    recv_offsets: Tensor  # [devices, sources + 1] first row of each source in a device's receive buffer
    tokens: Tensor  # [tokens * min(k, devices)] the token of each send; -1 behind the last
    slots: Tensor  # [tokens, k] the send that carries a token to the device of its j-th expert; -1: none


def plan_dispatch(
    experts: Tensor, device_of: Tensor, num_devices: int, source_of: Tensor | None = None, num_sources: int = 1, capacity: int | None = None
) -> Dispatch:
    """Plan the exchange of an expert-parallel layer before any row moves; a token goes once to each device that holds one of its experts.

    `permute(x, tokens, 1)` packs the rows to send, and `unpermute(results, slots, weights)` adds up what comes back.

    Args:
        experts: [tokens, k] int32, each an expert, or -1 for a pair that goes nowhere.
        device_of: [num_experts] int32, where each expert lives.
        source_of: [tokens] int32, the device that holds a token; all on 0 without it.
        num_devices, num_sources: how many devices hold experts, and how many hold tokens; 1 to 1024.
        capacity: at most so many tokens from one source to one device, the first in token order; what is beyond gets slot -1.
    Returns: Dispatch. Integers only, so the same on every run and for any number of threads.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2503.04398. Reference: ops.ref.moe.plan_dispatch. Bound by latency.
    """
    if needs_dispatch(experts, device_of, source_of):
        return Dispatch(*torch.ops.stretto.moe_plan_dispatch(experts, device_of, num_devices, source_of, num_sources, capacity))
    return Dispatch(*_plan_dispatch(experts, device_of, num_devices, source_of, num_sources, capacity))


def _plan_dispatch(
    experts: Tensor, device_of: Tensor, num_devices: int, source_of: Tensor | None = None, num_sources: int = 1, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "moe.plan_dispatch"
    sizes = check_tensors(op, experts=(experts, "tokens k", I32), device_of=(device_of, "num_experts", I32), source_of=(source_of, "tokens", I32))
    check_count(op, "num_devices", num_devices, 1, MOST_DEVICES)
    check_count(op, "num_sources", num_sources, 1, MOST_DEVICES)
    if capacity is not None and capacity < 0:
        raise ValueError(f"{op}: capacity: {capacity}, expected at least 0")
    if _backend.use_reference(op, experts, device_of, source_of):
        check_ids(op, "experts", experts, sizes["num_experts"])
        check_ids(op, "device_of", device_of, num_devices, 0)
        if source_of is not None:
            check_ids(op, "source_of", source_of, num_sources, 0)
        return ref.moe.plan_dispatch(experts, device_of, num_devices, source_of, num_sources, capacity)
    result = _empty(experts, num_devices, num_sources)
    limit = sizes["tokens"] if capacity is None else min(capacity, sizes["tokens"])
    _backend._C.plan_dispatch(experts.contiguous(), device_of.contiguous(), None if source_of is None else source_of.contiguous(), limit, *result)  # type: ignore[union-attr]
    return result


def _empty(experts: Tensor, devices: int, sources: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, k = experts.shape
    return (experts.new_empty(sources, devices), experts.new_empty(sources * devices + 1), experts.new_empty(devices, sources + 1),
            experts.new_empty(tokens * min(k, devices)), experts.new_empty(tokens, k))  # fmt: skip


def coactivation(experts: Tensor, num_experts: int) -> Tensor:
    """How often two experts are visited by the same token.

    Args:
        experts: [tokens, k] int32, different experts of a token; -1 is skipped. num_experts: 0 to 4096.
    Returns: [num_experts, num_experts] int32, symmetric; the diagonal counts the visits of each expert.
    Raises: ValueError naming the argument. Reference: ops.ref.moe.coactivation. Bound by latency.
    """
    if needs_dispatch(experts):
        result: Tensor = torch.ops.stretto.moe_coactivation(experts, num_experts)
        return result
    return _coactivation(experts, num_experts)


def _coactivation(experts: Tensor, num_experts: int) -> Tensor:
    op = "moe.coactivation"
    check_tensors(op, experts=(experts, "tokens k", I32))
    check_count(op, "num_experts", num_experts, 0, MOST_COACTIVE)
    if _backend.use_reference(op, experts):
        check_ids(op, "experts", experts, num_experts)
        return ref.moe.coactivation(experts, num_experts)
    counts = experts.new_empty(num_experts, num_experts)
    _backend._C.coactivation(experts.contiguous(), counts)  # type: ignore[union-attr]
    return counts


def count_routes(counts: Tensor, ids: Tensor, experts: Tensor) -> Tensor:
    """Add to a profile which experts each token id visits: counts[ids[t], experts[t, j]] += 1. In place.

    Args:
        counts: [vocab, num_experts] int32, contiguous; changed.
        ids: [tokens] int32, each 0 to vocab - 1. experts: [tokens, k] int32; -1 is skipped.
    Returns: counts. Raises: ValueError naming the argument. Reference: ops.ref.moe.count_routes.
    """
    if needs_dispatch(counts, ids, experts):
        torch.ops.stretto.moe_count_routes(counts, ids, experts)
    else:
        _count_routes(counts, ids, experts)
    return counts


def _count_routes(counts: Tensor, ids: Tensor, experts: Tensor) -> None:
    op = "moe.count_routes"
    sizes = check_tensors(op, counts=(counts, "vocab num_experts", I32), ids=(ids, "tokens", I32), experts=(experts, "tokens k", I32))
    check(counts.is_contiguous(), f"{op}: counts: strided, expected contiguous")
    if _backend.use_reference(op, counts, ids, experts):
        check_ids(op, "ids", ids, sizes["vocab"], 0)
        check_ids(op, "experts", experts, sizes["num_experts"])
        ref.moe.count_routes(counts, ids, experts)
    else:
        _backend._C.count_routes(counts, ids.contiguous(), experts.contiguous())  # type: ignore[union-attr]


def _plan_cases(make: Make) -> Iterator[Case]:
    for tokens, experts, k, devices in [(0, 8, 2, 2), (1, 8, 2, 4), (60, 8, 2, 3), (50, 64, 6, 8), (2500, 16, 4, 4)]:
        yield Case(f"{tokens}x{k}-{experts}-{devices}", (routing(make, tokens, experts, k), make.randint(0, devices, experts), devices))
        sources = (make.randint(0, devices, tokens), devices, max(1, tokens // 10))
        yield Case(
            f"{tokens}x{k}-{experts}-{devices}-capacity", (routing(make, tokens, experts, k), make.randint(0, devices, experts), devices, *sources)
        )
    yield Case("nowhere", (make.randint(-1, 5, 40, 3), make.randint(0, 2, 5), 2))
    yield Case("capacity-0", (routing(make, 9, 4, 2), make.randint(0, 2, 4), 2, None, 1, 0))


def _plan_bad(make: Make) -> Iterator[BadCase]:
    chosen, device_of = make.randint(0, 4, 3, 2), make.randint(0, 2, 4)
    for bad in (-2, 4, -(2**31), 2**31 - 1):
        wrong = torch.tensor([[0, bad]], dtype=torch.int32)
        yield BadCase(f"expert{bad}", (wrong, device_of, 2), f"moe.plan_dispatch: experts: {bad} at 1, expected -1..3")
    for bad in (-1, 2, 2**31 - 1):
        wrong = torch.tensor([0, 0, bad, 0], dtype=torch.int32)
        yield BadCase(f"device{bad}", (chosen, wrong, 2), f"moe.plan_dispatch: device_of: {bad} at 2, expected 0..1")
        yield BadCase(f"source{bad}", (chosen, device_of, 2, wrong[:3], 2), f"moe.plan_dispatch: source_of: {bad} at 2, expected 0..1")
    yield BadCase("devices", (chosen, device_of, 0), "moe.plan_dispatch: num_devices: 0")
    yield BadCase("sources", (chosen, device_of, 2, None, 0), "moe.plan_dispatch: num_sources: 0")
    yield BadCase("capacity", (chosen, device_of, 2, None, 1, -1), "moe.plan_dispatch: capacity: -1")


def _coactivation_bad(make: Make) -> Iterator[BadCase]:
    for bad in (-2, 4, 2**31 - 1):
        yield BadCase(f"id{bad}", (torch.tensor([[0, bad]], dtype=torch.int32), 4), f"moe.coactivation: experts: {bad} at 1, expected -1..3")
    yield BadCase("rank", (make.randint(0, 4, 3), 4), "moe.coactivation: experts: shape [3]")


def _count_bad(make: Make) -> Iterator[BadCase]:
    counts = torch.zeros(5, 4, dtype=torch.int32)
    for bad in (-1, 5, 2**31 - 1):
        wrong = torch.tensor([0, bad], dtype=torch.int32)
        yield BadCase(f"id{bad}", (counts, wrong, make.randint(0, 4, 2, 2)), f"moe.count_routes: ids: {bad} at 1, expected 0..4")
    yield BadCase("expert", (counts, make.randint(0, 5, 1), torch.tensor([[0, 4]], dtype=torch.int32)), "moe.count_routes: experts: 4 at 1")
    yield BadCase("strided", (counts.t(), make.randint(0, 4, 1), make.randint(0, 5, 1, 2)), "moe.count_routes: counts: strided")


def _torch_plan(experts: Tensor, device_of: Tensor, num_devices: int) -> tuple[Tensor, ...]:
    """One source, no capacity."""
    device = device_of[experts].long()
    visits = torch.zeros(num_devices, len(experts), dtype=torch.bool)
    visits[device, torch.arange(len(experts))[:, None]] = True
    counts = visits.sum(1)
    place = visits.flatten().cumsum(0) - 1
    return counts, counts.cumsum(0), visits.nonzero()[:, 1], place.view(num_devices, -1)[device, torch.arange(len(experts))[:, None]]


def _torch_coactivation(experts: Tensor, num_experts: int) -> Tensor:
    visits = torch.zeros(len(experts), num_experts).scatter_(1, experts.long(), 1.0)
    return (visits.t() @ visits).int()


_MODELS = [("Mixtral", 8, 2, 4), ("Qwen3-30B-A3B", 128, 8, 8), ("DeepSeek-V3", 256, 8, 32)]

register(
    "moe_plan_dispatch(Tensor experts, Tensor device_of, int num_devices, Tensor? source_of=None, int num_sources=1, int? capacity=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _plan_dispatch,
    function=plan_dispatch,
    reference=ref.moe.plan_dispatch,
    fake=lambda experts, device_of, num_devices, source_of=None, num_sources=1, capacity=None: _empty(experts, num_devices, num_sources),
    cases=_plan_cases,
    bad_cases=_plan_bad,
    bench_cases=lambda make: (Case(f"{model} {tokens} tokens, {devices} devices",
                                   (routing(make, tokens, experts, k), torch.arange(experts, dtype=torch.int32) % devices, devices))
                              for model, experts, k, devices in _MODELS for tokens in (1, 64, 4096)),
    cost=lambda experts, device_of, num_devices: Cost(3 * experts.nbytes, 0),
    bound="latency",
    peers={"torch scatter, nonzero, cumsum": _torch_plan},
    source="arXiv 2503.04398",
)  # fmt: skip

register(
    "moe_coactivation(Tensor experts, int num_experts) -> Tensor",
    _coactivation,
    function=coactivation,
    reference=ref.moe.coactivation,
    fake=lambda experts, num_experts: experts.new_empty(num_experts, num_experts),
    cases=lambda make: (Case(f"{t}x{k}-{e}", (make.randint(-1, e, t, k), e)) for t, e, k in [(0, 4, 2), (1, 1, 1), (50, 8, 2), (300, 70, 6)]),
    bad_cases=_coactivation_bad,
    bench_cases=lambda make: (Case(f"{model} 4096 tokens", (routing(make, 4096, experts, k), experts)) for model, experts, k, _ in _MODELS),
    cost=lambda experts, num_experts: Cost(experts.nbytes + 4 * num_experts**2, 0),
    bound="latency",
    peers={"torch one-hot product": _torch_coactivation},
)

register(
    "moe_count_routes(Tensor(a!) counts, Tensor ids, Tensor experts) -> ()",
    _count_routes,
    function=count_routes,
    reference=ref.moe.count_routes,
    fake=lambda counts, ids, experts: None,
    cases=lambda make: (Case(f"{t}x{k}", (make.randint(0, 9, 30, 8), make.randint(0, 30, t), make.randint(-1, 8, t, k))) for t, k in [(0, 2), (1, 1), (90, 3)]),
    bad_cases=_count_bad,
    bench_cases=lambda make: (Case(f"{model} 4096 tokens of 32000", (torch.zeros(32000, experts, dtype=torch.int32), make.randint(0, 32000, 4096),
                                                                     routing(make, 4096, experts, k))) for model, experts, k, _ in _MODELS),
    cost=lambda counts, ids, experts: Cost(experts.nbytes * 3, 0),
    bound="latency",
    peers={"torch index_put": ref.moe.count_routes},
)  # fmt: skip
