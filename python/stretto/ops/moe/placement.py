"""Host solvers: which device an expert lives on, and on which a token should be. They run when a model is deployed, not in a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.ops import _backend
from stretto.ops._check import F32, I32, check, check_tensors


@dataclass(frozen=True)
class Placement:
    """What place_experts found."""

    expert_device: Tensor  # [num_experts] int32, equally many on each device
    token_device: Tensor  # [vocab] int32, where a token id finds most of its experts; -1: never seen
    local: float  # part of all (token, expert) visits that meet on one device
    imbalance: float  # visits of the busiest device's tokens, over the mean


def _native(op: str) -> None:
    if _backend._C is None:
        raise NotImplementedError(f"{op}: needs the native module, which is missing: {_backend.missing_reason}")


def _check_devices(op: str, experts: int, devices: int, starts: int) -> None:
    check(devices >= 1 and experts % devices == 0, f"{op}: devices: {devices}, expected a divisor of {experts} experts")
    check(starts >= 1, f"{op}: starts: {starts}, expected at least 1")


def balanced_assignment(score: Tensor) -> Tensor:
    """The assignment of items to devices, equally many on each, with the largest sum of scores; exact.

    Args:
        score: [items, devices] float64 or float32, finite; devices divides items.
    Returns: [items] int32. Raises: ValueError naming the argument; NotImplementedError without the native module.
    """
    op = "moe.balanced_assignment"
    sizes = check_tensors(op, score=(score, "items devices", (torch.float64, torch.float32)))
    _check_devices(op, sizes["items"], sizes["devices"], 1)
    check(bool(score.isfinite().all()), f"{op}: score: NaN or infinity, expected finite numbers")
    _native(op)
    return torch.tensor(_backend._C.balanced_assignment(score.double().flatten().tolist(), *score.shape), dtype=torch.int32)  # type: ignore[union-attr]


def group_experts(affinity: Tensor, devices: int, *, starts: int = 8, seed: int = 0) -> Tensor:
    """Equal groups of experts with much affinity inside a group, such as `coactivation` counts.

    Args:
        affinity: [num_experts, num_experts], any real dtype, symmetric and finite; the diagonal does not count.
        devices: number of groups, a divisor of num_experts.
        starts: the best of so many starts wins: the first is greedy, the others random from `seed`. Each is improved by swaps until none helps.
    Returns: [num_experts] int32, the group of each expert. The same for equal arguments.
    Raises: ValueError naming the argument; NotImplementedError without the native module.
    """
    op = "moe.group_experts"
    check(affinity.dim() == 2 and affinity.shape[0] == affinity.shape[1], f"{op}: affinity: shape {list(affinity.shape)}, expected a square")
    wide = affinity.double()
    check(bool(wide.isfinite().all()) and torch.equal(wide, wide.t()), f"{op}: affinity: expected a symmetric matrix of finite numbers")
    _check_devices(op, len(affinity), devices, starts)
    _native(op)
    return torch.tensor(_backend._C.group_experts(wide.flatten().tolist(), len(affinity), devices, starts, seed), dtype=torch.int32)  # type: ignore[union-attr]


def place_experts(counts: Tensor, devices: int, *, slack: float = 0.05, starts: int = 4, seed: int = 0) -> Placement:
    """Place experts and token ids together, so that most visits are local.

    Token ids take the device with most of their experts, those with most to lose first, none above (1 + slack) / devices of all visits;
    experts take the best balanced assignment for those tokens; in turn, while that helps, from several starts.

    Args:
        counts: [vocab, num_experts] int32 from `count_routes`, none negative, at least one positive.
        devices: a divisor of num_experts. slack: at least 0. starts, seed: as in group_experts; the first start groups by co-activation.
    Returns: Placement. Routing itself does not change; a wrong guess costs a transfer.
    Raises: ValueError naming the argument; NotImplementedError without the native module.
    Source: arXiv 2503.04398 (objective); solved by alternation with exact assignments.
    """
    op = "moe.place_experts"
    sizes = check_tensors(op, counts=(counts, "vocab num_experts", I32))
    _check_devices(op, sizes["num_experts"], devices, starts)
    check(0 <= slack < math.inf, f"{op}: slack: {slack}, expected finite and at least 0")
    check(
        counts.numel() > 0 and int(counts.min()) >= 0 and int(counts.max()) > 0, f"{op}: counts: expected no negative and at least one positive count"
    )
    _native(op)
    experts, tokens, local = _backend._C.place_experts(counts.contiguous(), devices, slack, starts, seed)  # type: ignore[union-attr]
    token_device = torch.tensor(tokens, dtype=torch.int64)
    visits = counts.sum(1, dtype=torch.float64)
    load = torch.zeros(devices, dtype=torch.float64).scatter_add_(0, token_device.clamp(min=0), visits)
    return Placement(torch.tensor(experts, dtype=torch.int32), token_device.int(), local / float(visits.sum()), float(load.max() / load.mean()))


def shuffle_rows(wanted: Tensor, devices: int, confidence: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """Order rows so that equal slices, one a device, hold the rows that want to be there.

    Args:
        wanted: [rows] int32, a device or -1 for no wish.
        confidence: [rows] float32, no NaN; where too many want a slice the least confident leave, the last among equals.
    Returns: (order [rows] int32: the row at each place; inverse [rows] int32: the place of each row; how many rows are not where they
        wanted). The first rows % devices slices have one row more. Within a slice rows keep their order.
    Raises: ValueError naming the argument; NotImplementedError without the native module.
    """
    op = "moe.shuffle_rows"
    check_tensors(op, wanted=(wanted, "rows", I32), confidence=(confidence, "rows", F32))
    check(devices >= 1, f"{op}: devices: {devices}, expected at least 1")
    check(confidence is None or not bool(confidence.isnan().any()), f"{op}: confidence: NaN, expected numbers")
    _native(op)
    order = torch.empty_like(wanted, memory_format=torch.contiguous_format)
    moved: int = _backend._C.shuffle_rows(wanted.contiguous(), None if confidence is None else confidence.contiguous(), devices, order)  # type: ignore[union-attr]
    return order, torch.empty_like(order).scatter_(0, order.long(), torch.arange(len(order), dtype=torch.int32)), moved
