"""References of the scan family: one token after the other, as the recurrences read.

They compute in the dtype of the parameters (weight, A): float32 as the kernels do, float64 in tests; outputs have the inputs' dtype. Sequences
are packed `[tokens, ...]` with `cu_seqlens`, or a batch `[batch, length, ...]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def spans(cu_seqlens: Tensor | None, tokens: int) -> list[tuple[int, int]]:
    """(begin, end) of each packed sequence; without cu_seqlens there is one."""
    if cu_seqlens is None:
        return [(0, tokens)]
    bounds = cu_seqlens.tolist()
    return list(itertools.pairwise(bounds))


def even(x: Tensor) -> Tensor:
    """The cu_seqlens of a batch [batch, length, ...] of equal lengths."""
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]


def steps(cu_seqlens: Tensor | None, slots: Tensor | None, tokens: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, slot) of each sequence of a step; without cu_seqlens each row is one."""
    bounds = list(range(tokens + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    for b, (i, j) in enumerate(itertools.pairwise(bounds)):
        yield i, j, b if slots is None else int(slots[b])


def activated(y: Tensor, activation: str | None) -> Tensor:
    return torch.nn.functional.silu(y) if activation == "silu" else y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, final): y[t] = act(bias + sum_k weight[k] x[t - K + 1 + k]); final holds the last K - 1 inputs of each sequence."""
    if x.dim() == 3:
        y, final = causal_conv1d(x.flatten(0, 1), weight, bias, activation, initial, even(x))
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


def step_size(dt: Tensor, dt_bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias
    return torch.nn.functional.softplus(delta) if softplus else delta


def gated(y: Tensor, z: Tensor | None) -> Tensor:
    return y if z is None else y * torch.nn.functional.silu(z.to(y.dtype))


def per_channel(b: Tensor, channels: int) -> Tensor:
    """[..., groups, states] of each of `channels` channels (or heads): consecutive ones share a group."""
    return b.repeat_interleave(channels // max(b.shape[-2], 1), -2)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, h_last): h = exp(delta A) h + delta u B; y = (C h + D u) silu(z)."""
    if u.dim() == 3:
        flat_u, flat_dt, flat_b, flat_c = (t.flatten(0, 1) for t in (u, dt, B, C))
        flat_z = None if z is None else z.flatten(0, 1)
        y, last = selective_scan(flat_u, flat_dt, A, flat_b, flat_c, D, flat_z, dt_bias, softplus, h0, even(u))
        return y.view(u.shape), last
    delta, x = step_size(dt, dt_bias, softplus, A.dtype), u.to(A.dtype)
    b, c = per_channel(B.to(A.dtype), u.shape[1]), per_channel(C.to(A.dtype), u.shape[1])
    ys, lasts = [], [A.new_zeros(0, *A.shape)]
    for s, (i, j) in enumerate(spans(cu_seqlens, len(u))):
        h = torch.zeros_like(A) if h0 is None else h0[s]
        for t in range(i, j):
            h = torch.exp(delta[t, :, None] * A) * h + (delta[t] * x[t])[:, None] * b[t]
            ys.append((h * c[t]).sum(-1))
        lasts.append(h[None])
    y = torch.stack(ys) if ys else torch.zeros_like(x)
    return gated(y if D is None else y + D * x, z).to(u.dtype), torch.cat(lasts)


def selective_scan_step(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = False, slots: Tensor | None = None, cu_seqlens: Tensor | None = None, parent: Tensor | None = None,
    update: bool = True,
) -> Tensor:  # fmt: skip
    """y of rows that continue `state`; a row follows parent[row] of its sequence, or the row before."""
    delta, x = step_size(dt, dt_bias, softplus, A.dtype), u.to(A.dtype)
    b, c = per_channel(B.to(A.dtype), u.shape[1]), per_channel(C.to(A.dtype), u.shape[1])
    y = torch.zeros_like(u)
    for i, j, slot in steps(cu_seqlens, slots, len(u)):
        if slot < 0:
            continue
        after: list[Tensor] = []
        for t in range(i, j):
            p = t - i - 1 if parent is None else int(parent[t])
            h = torch.exp(delta[t, :, None] * A) * (state[slot] if p < 0 else after[p]) + (delta[t] * x[t])[:, None] * b[t]
            out = (h * c[t]).sum(-1)
            y[t] = gated(out if D is None else out + D * x[t], None if z is None else z[t]).to(u.dtype)
            after.append(h)
        if update and after:
            state[slot] = after[-1]
    return y


def selective_scan_replay(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, rows: Tensor, n: Tensor, dt_bias: Tensor | None = None, softplus: bool = False,
    slots: Tensor | None = None,
) -> None:  # fmt: skip
    """state after the inputs rows[b, :n[b]]."""
    for s, (row, count) in enumerate(zip(rows.tolist(), n.tolist(), strict=True)):
        slot = s if slots is None else int(slots[s])
        if slot >= 0:
            r = row[:count]
            y = selective_scan(u[r], dt[r], A, B[r], B[r], None, None, dt_bias, softplus, state[slot : slot + 1].clone(), None)
            state[slot] = y[1][0]


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, h_last): H = exp(delta A) H + delta x B^T; y = (H C + D x) silu(z). `chunk` does not change the meaning."""
    if x.dim() == 4:
        flat = [t.flatten(0, 1) for t in (x, dt, B, C)]
        gate = None if z is None else z.flatten(0, 1)
        y, last = ssd(flat[0], flat[1], A, flat[2], flat[3], D, gate, dt_bias, softplus, h0, even(x), chunk)
        return y.view(x.shape), last
    delta, v = step_size(dt, dt_bias, softplus, A.dtype), x.to(A.dtype)
    b, c = per_channel(B.to(A.dtype), x.shape[1]), per_channel(C.to(A.dtype), x.shape[1])
    ys, lasts = [], [A.new_zeros(0, *x.shape[1:], B.shape[2])]
    for s, (i, j) in enumerate(spans(cu_seqlens, len(x))):
        h = A.new_zeros(*x.shape[1:], B.shape[2]) if h0 is None else h0[s]
        for t in range(i, j):
            h, y = ssd_row(h, v[t], delta[t], A, b[t], c[t])
            ys.append(y)
        lasts.append(h[None])
    y = torch.stack(ys) if ys else torch.zeros_like(v)
    return gated(y if D is None else y + D[:, None] * v, z).to(x.dtype), torch.cat(lasts)


def ssd_row(h: Tensor, x: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(state, sum_n C h) of all heads after one row."""
    h = torch.exp(delta * A)[:, None, None] * h + (delta[:, None] * x)[..., None] * b[:, None]
    return h, (h * c[:, None]).sum(-1)


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = False, slots: Tensor | None = None, cu_seqlens: Tensor | None = None, parent: Tensor | None = None,
    update: bool = True,
) -> Tensor:  # fmt: skip
    """y of rows that continue `state`; a row follows parent[row] of its sequence, or the row before."""
    delta, v = step_size(dt, dt_bias, softplus, A.dtype), x.to(A.dtype)
    b, c = per_channel(B.to(A.dtype), x.shape[1]), per_channel(C.to(A.dtype), x.shape[1])
    y = torch.zeros_like(x)
    for i, j, slot in steps(cu_seqlens, slots, len(x)):
        if slot < 0:
            continue
        after: list[Tensor] = []
        for t in range(i, j):
            p = t - i - 1 if parent is None else int(parent[t])
            h, out = ssd_row(state[slot] if p < 0 else after[p], v[t], delta[t], A, b[t], c[t])
            y[t] = gated(out if D is None else out + D[:, None] * v[t], None if z is None else z[t]).to(x.dtype)
            after.append(h)
        if update and after:
            state[slot] = after[-1]
    return y


def ssd_replay(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, rows: Tensor, n: Tensor, dt_bias: Tensor | None = None, softplus: bool = False,
    slots: Tensor | None = None,
) -> None:  # fmt: skip
    """state after the inputs rows[b, :n[b]]."""
    for s, (row, count) in enumerate(zip(rows.tolist(), n.tolist(), strict=True)):
        slot = s if slots is None else int(slots[s])
        if slot >= 0:
            r = row[:count]
            state[slot] = ssd(x[r], dt[r], A, B[r], B[r], None, None, dt_bias, softplus, state[slot : slot + 1].clone(), None)[1][0]


def _gradients(function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient of function(*inputs) for each tensor among the inputs; no elements where there is none."""
    with torch.inference_mode(False), torch.enable_grad():  # copies, since tensors made in inference mode have no gradients anywhere
        leaves = [t if t is None else t.detach().clone().requires_grad_() for t in inputs]
        results = function(*leaves)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad([r for r, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True))
    some = next(t for t in inputs if t is not None)
    return tuple(some.new_zeros(0) if t is None else next(found) for t in leaves)


def causal_conv1d_backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, dweight, dbias, dinitial); what was not given gets no elements."""
    return _gradients(lambda x, w, b, i: causal_conv1d(x, w, b, activation, i, cu_seqlens), (x, weight, bias, initial), (dy, dfinal))


def selective_scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(du, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0); what was not given gets no elements."""
    return _gradients(
        lambda u, dt, A, B, C, D, z, bias, h0: selective_scan(u, dt, A, B, C, D, z, bias, softplus, h0, cu_seqlens),
        (u, dt, A, B, C, D, z, dt_bias, h0), (dy, dlast),
    )  # fmt: skip


def ssd_backward(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0); what was not given gets no elements."""
    return _gradients(
        lambda x, dt, A, B, C, D, z, bias, h0: ssd(x, dt, A, B, C, D, z, bias, softplus, h0, cu_seqlens, chunk),
        (x, dt, A, B, C, D, z, dt_bias, h0), (dy, dlast),
    )  # fmt: skip
