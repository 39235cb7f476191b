"""References of the moe family."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from stretto.ops.ref import quant

LOWEST = -torch.finfo(torch.float32).max


def topk_route(
    logits: Tensor, k: int, scoring: str = "softmax", renormalise: bool = True, bias: Tensor | None = None,
    groups: int = 1, top_groups: int = 1, group_top: int = 2, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits [tokens, experts] -> weights [tokens, k], experts [tokens, k] int32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    score = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    choice = wide if bias is None and groups == 1 else score if bias is None else score + bias.to(score.dtype)
    choice = choice.nan_to_num(nan=LOWEST, posinf=torch.inf, neginf=LOWEST).clamp(min=LOWEST)
    if groups > 1:
        by_group = choice.unflatten(-1, (groups, -1))
        best = by_group.topk(min(group_top, by_group.shape[-1])).values.sum(-1).clamp(min=LOWEST)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.argsort(stable=True, dim=-1, descending=True)[:, :top_groups], True)
        choice = by_group.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    experts = choice.argsort(stable=True, dim=-1, descending=True)[:, :k]
    weights = score.gather(-1, experts)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, experts.int()


def sort_by_expert(experts: Tensor, num_experts: int, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """experts [tokens, k] -> counts [num_experts], offsets [num_experts + 1], pairs [padded], rows [tokens, k], all int32."""
    flat = experts.flatten().long()
    order = flat.argsort(stable=True)
    order = order[flat[order] >= 0]
    counts = flat[order].bincount(minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), ((counts + multiple - 1) // multiple * multiple).cumsum(0)])
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    place = offsets[flat[order]] + torch.arange(len(order), device=flat.device) - before[flat[order]]
    pairs = torch.full((flat.numel() + min(flat.numel(), num_experts) * (multiple - 1),), -1, dtype=torch.int32, device=flat.device)
    pairs[place] = order.int()
    rows = torch.full_like(flat, -1)
    rows[order] = place
    return counts.int(), offsets.int(), pairs, rows.view(experts.shape).int()


def permute(x: Tensor, pairs: Tensor, k: int) -> Tensor:
    """x [tokens, width] at pairs [rows] // k; zeros where a pair is negative."""
    token = pairs.clamp(min=0).long() // k
    return torch.where(pairs[:, None] < 0, x.new_zeros(()), x[token]) if len(x) else x.new_zeros(len(pairs), x.shape[1])


def unpermute(y: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_j weights[t, j] y[rows[t, j]] over the rows that are not negative, in order."""
    wide = y if y.dtype == torch.float64 else y.float()
    out = wide.new_zeros(rows.shape[0], y.shape[1])
    for j in range(rows.shape[1] if len(y) else 0):
        there = rows[:, j, None] >= 0
        taken = wide[rows[:, j].clamp(min=0).long()]
        out = torch.where(there, out + (taken if weights is None else weights[:, j, None].to(wide.dtype) * taken), out)
    return out.to(y.dtype)


def plan_dispatch(
    experts: Tensor, device_of: Tensor, num_devices: int, source_of: Tensor | None = None, num_sources: int = 1, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> counts [sources, devices], offsets [sources * devices + 1], recv_offsets [devices, sources + 1], tokens [most], slots [tokens, k]."""
    tokens, k = experts.shape
    sends: list[list[int]] = [[] for _ in range(num_sources * num_devices)]
    keys = [[-1] * k for _ in range(tokens)]
    for t, chosen in enumerate(experts.tolist()):
        for j, expert in enumerate(chosen):
            if expert >= 0:
                key = keys[t][j] = (0 if source_of is None else int(source_of[t])) * num_devices + int(device_of[expert])
                if sends[key][-1:] != [t] and (capacity is None or len(sends[key]) < capacity):
                    sends[key].append(t)
    counts = torch.tensor([len(s) for s in sends], dtype=torch.int32, device=experts.device).view(num_sources, num_devices)
    offsets = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0)).int()
    sent = torch.full((tokens * min(k, num_devices),), -1, dtype=torch.int32, device=experts.device)
    sent[: int(offsets[-1])] = torch.tensor([t for s in sends for t in s], dtype=torch.int32, device=experts.device)
    slots = torch.full_like(experts, -1)
    for t in range(tokens):
        for j, key in enumerate(keys[t]):
            if key >= 0 and t in sends[key]:
                slots[t, j] = offsets[key] + sends[key].index(t)
    return counts, offsets, torch.nn.functional.pad(counts.t().cumsum(1), (1, 0)).int(), sent, slots


def coactivation(experts: Tensor, num_experts: int) -> Tensor:
    """[num_experts, num_experts] int32: tokens that visit both."""
    visits = torch.zeros(experts.shape[0], num_experts + 1, dtype=torch.int64, device=experts.device)
    visits.scatter_add_(1, torch.where(experts < 0, num_experts, experts).long(), torch.ones_like(experts, dtype=torch.int64))
    visits = visits[:, :-1]
    return (visits.t().float() @ visits.float()).int() if visits.numel() else visits.new_zeros(num_experts, num_experts).int()


def count_routes(counts: Tensor, ids: Tensor, experts: Tensor) -> Tensor:
    """counts [vocab, experts] += 1 at (ids[t], experts[t, j])."""
    there = experts >= 0
    token = ids[:, None].expand(experts.shape)[there].long()
    return counts.index_put_((token, experts[there].long()), torch.ones_like(token, dtype=torch.int32), accumulate=True)


def grouped_linear(x: Tensor, offsets: Tensor, packed: Tensor, format: str, n: int, gate: str = "none") -> Tensor:
    """Rows offsets[e] .. offsets[e + 1] of x [rows, k] times the transposed weight e; rows beyond the last group are zeros."""
    out = x.new_zeros(x.shape[0], n if gate == "none" else n // 2)
    bounds = offsets.tolist()
    for e, (first, last) in enumerate(pairwise(bounds)):
        if last > first:
            out[first:last] = quant.linear(x[first:last], packed[e], format, n, None, None, gate)
    return out
