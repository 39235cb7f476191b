"""References of the scan family: one token after the other, as the recurrences read.

They compute in the dtype of the parameters (weight, A): float32 as the kernels do, float64 in tests; outputs have the inputs' dtype. Sequences
are packed `[tokens, ...]` with `cu_seqlens`, or a batch `[batch, length, ...]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def spans(cu_seqlens: Tensor | None, tokens: int) -> list[tuple[int, int]]:
    """(begin, end) of each packed sequence; without cu_seqlens there is one."""
    if cu_seqlens is None:
        return [(0, tokens)]
    bounds = cu_seqlens.tolist()
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def even(batch: int, length: int) -> Tensor:
    """The cu_seqlens of a batch of equal lengths."""
    return torch.arange(batch + 1, dtype=torch.int32) * length


def steps(cu_seqlens: Tensor | None, slots: Tensor | None, tokens: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, slot) of each sequence of a step; without cu_seqlens each row is one."""
    bounds = list(range(tokens + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    for b, (i, j) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        yield i, j, b if slots is None else int(slots[b])


def activated(y: Tensor, activation: str | None) -> Tensor:
    return torch.nn.functional.silu(y) if activation == "silu" else y


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, initial: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y, final): y[t] = act(bias + sum_k weight[k] x[t - K + 1 + k]); final holds the last K - 1 inputs of each sequence."""
    if x.dim() == 3:
        y, final = causal_conv1d(x.flatten(0, 1), weight, bias, activation, initial, even(*x.shape[:2]))
        return y.view(x.shape), final
    channels, width = weight.shape
    ys, finals = [x[:0].to(weight.dtype)], [x.new_zeros(0, channels, width - 1, dtype=weight.dtype)]
    for b, (i, j) in enumerate(spans(cu_seqlens, len(x))):
        before = weight.new_zeros(channels, width - 1) if initial is None else initial[b]
        window = torch.cat([before, x[i:j].to(weight.dtype).t()], 1)
        y = window.new_zeros(channels, j - i) if bias is None else bias[:, None].expand(channels, j - i)
        for k in range(width):
            y = y + weight[:, k : k + 1] * window[:, k : k + j - i]
        ys.append(activated(y, activation).t())
        finals.append(window[None, :, j - i :])
    return torch.cat(ys).to(x.dtype), torch.cat(finals)


def causal_conv1d_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None, parent: Tensor | None = None, update: bool = True,
) -> Tensor:  # fmt: skip
    """y of rows that continue `state`; a row follows parent[row] of its sequence, or the row before."""
    y = torch.zeros_like(x)
    for i, j, slot in steps(cu_seqlens, slots, len(x)):
        if slot < 0:
            continue
        windows: list[Tensor] = []  # the last K - 1 inputs after each row
        for t in range(i, j):
            p = t - i - 1 if parent is None else int(parent[t])
            window = torch.cat([state[slot] if p < 0 else windows[p], x[t, :, None].to(weight.dtype)], 1)
            total = (weight * window).sum(1) if bias is None else (weight * window).sum(1) + bias
            y[t] = activated(total, activation).to(x.dtype)
            windows.append(window[:, 1:])
        if update and windows:
            state[slot] = windows[-1]
    return y


def causal_conv1d_replay(state: Tensor, x: Tensor, rows: Tensor, n: Tensor, slots: Tensor | None = None) -> None:
    """state after the inputs x[rows[b, :n[b]]]."""
    for b, (row, count) in enumerate(zip(rows.tolist(), n.tolist(), strict=True)):
        slot = b if slots is None else int(slots[b])
        if slot >= 0:
            state[slot] = torch.cat([state[slot], x[row[:count]].to(state.dtype).t()], 1)[:, count:]
