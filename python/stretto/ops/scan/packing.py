"""What the ops of the scan family share: packed sequences, slots, and checks of small integer tensors."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from stretto.ops._check import check

Lead = tuple[int, int] | None
"""(batch, length) of a call with a batch, None for packed sequences."""


def lead_of(x: Any, rank: int, cu_seqlens: Tensor | None) -> Lead:
    """Whether `x`, packed of `rank` dimensions, comes as a batch [batch, length, ...]."""
    return (x.shape[0], x.shape[1]) if isinstance(x, Tensor) and x.dim() == rank + 1 and cu_seqlens is None else None


def packed(t: Any, lead: Lead) -> Any:
    """[tokens, ...] of a tensor that may be a batch: a view where its strides allow."""
    return t.flatten(0, 1) if lead is not None and isinstance(t, Tensor) and t.dim() > 1 and t.shape[:2] == lead else t


def unpacked(t: Tensor, lead: Lead) -> Tensor:
    return t if lead is None else t.view(*lead, *t.shape[1:])


def bounds(op: str, cu_seqlens: Tensor | None, lead: Lead, tokens: int, device: torch.device) -> Tensor:
    """The cu_seqlens of a call, checked: those given, those of a batch, or one sequence of all tokens."""
    if cu_seqlens is None:
        batch, length = lead or (1, tokens)
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    check_bounds(op, cu_seqlens, tokens)
    return cu_seqlens.contiguous()


def batch_of(x: Tensor, rank: int, cu_seqlens: Tensor | None) -> int:
    """How many sequences a call has, from shapes alone."""
    lead = lead_of(x, rank, cu_seqlens)
    return lead[0] if lead is not None else 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_bounds(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless 0 = first <= ... <= last = tokens."""
    values = cu_seqlens.tolist()
    check(bool(values), f"{op}: cu_seqlens: no elements, expected batch + 1")
    check(values[0] == 0, f"{op}: cu_seqlens: {values[0]} at 0, expected 0")
    for b, (first, last) in enumerate(itertools.pairwise(values)):
        if last < first:
            raise ValueError(f"{op}: cu_seqlens: {last} after {first} at {b + 1}, expected it not to decrease")
    check(values[-1] == tokens, f"{op}: cu_seqlens: {values[-1]} at {len(values) - 1}, expected {tokens}, the number of rows")


def check_slots(op: str, slots: Tensor | None, batch: int, num_slots: int, update: bool) -> None:
    """Raise ValueError unless each sequence has a state, and no two write the same one."""
    if slots is None:
        check(batch <= num_slots, f"{op}: state: {num_slots} slots, expected {batch} or more for as many sequences")
        return
    seen: set[int] = set()
    for b, slot in enumerate(slots.tolist()):
        if slot >= num_slots:
            raise ValueError(f"{op}: slots: {slot} at {b}, expected less than {num_slots}")
        if update and slot in seen:
            raise ValueError(f"{op}: slots: {slot} at {b} a second time, expected each once where states are written")
        if slot >= 0:
            seen.add(slot)


def check_groups(op: str, name: str, count: int, groups: int, states: int) -> None:
    """Raise ValueError unless `count` channels (or heads) share `groups` evenly."""
    if states < 1:
        raise ValueError(f"{op}: A: {states} states, expected at least 1" if name == "channels" else f"{op}: B: {states} states, expected at least 1")
    if groups < 1 or count % groups:
        raise ValueError(f"{op}: B: {groups} groups, expected a divisor of {count} {name}")


def check_batch(op: str, slots: Tensor | None, cu_seqlens: Tensor | None, tokens: int) -> None:
    """Raise ValueError unless shapes agree on the number of sequences of a step."""
    batch = tokens if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check(batch >= 0, f"{op}: cu_seqlens: no elements, expected batch + 1")
    if slots is not None and slots.shape[0] != batch:
        raise ValueError(f"{op}: slots: {slots.shape[0]} sequences, expected {batch}")


def check_step(op: str, slots: Tensor | None, cu_seqlens: Tensor | None, parent: Tensor | None, update: bool, tokens: int, num_slots: int) -> None:
    """Raise ValueError for what a step over `tokens` rows cannot mean."""
    check(parent is None or not update, f"{op}: update: True with parent, expected False: a tree has no last row")
    if cu_seqlens is not None:
        check_bounds(op, cu_seqlens, tokens)
    batch = tokens if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_slots(op, slots, batch, num_slots, update)
    if parent is None:
        return
    starts = list(range(tokens + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    parents = parent.tolist()
    for first, last in itertools.pairwise(starts):
        for t in range(first, last):
            if parents[t] >= t - first:
                raise ValueError(f"{op}: parent: {parents[t]} at {t}, row {t - first} of its sequence, expected a row before it or -1")


def check_replay(op: str, rows: Tensor, n: Tensor, slots: Tensor | None, inputs: int, num_slots: int) -> None:
    """Raise ValueError unless rows[b, :n[b]] name inputs and slots name states."""
    check_slots(op, slots, rows.shape[0], num_slots, True)
    for b, (row, count) in enumerate(zip(rows.tolist(), n.tolist(), strict=True)):
        check(0 <= count <= len(row), f"{op}: n: {count} at {b}, expected 0 to {len(row)}")
        for i in range(count):
            if not 0 <= row[i] < inputs:
                raise ValueError(f"{op}: rows: {row[i]} at {b}, {i}, expected 0 to {inputs - 1}")


def dense_rows(t: Any) -> Any:
    """`t` itself where its dimensions after the first are dense, else a dense copy; None stays."""
    if t is None or t.is_contiguous():
        return t
    dense = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != dense:
            return t.contiguous()
        dense *= size
    return t


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
