"""mLSTM and sLSTM in plain PyTorch. Half types are computed in float32, float32 and float64 as they are."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]


def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None, cu_seqlens: Tensor | None = None,
    chunk: int = 64, eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The chunkwise form: attention inside a chunk, the state between chunks. Differentiable; memory grows with tokens * chunk."""
    dtype = v.dtype
    q, k, v, i, f = map(_wide, (q, k, v, i, f))
    i, f = _capped(i, gate_cap), _capped(f, gate_cap)
    bounds = cu_seqlens.tolist() if cu_seqlens is not None else [0, k.shape[0]]
    batch, heads, dk, dv = (k.shape[0] if k.dim() == 4 else len(bounds) - 1), k.shape[1], k.shape[-1], v.shape[-1]
    C = k.new_zeros(batch, heads, dk, dv) if C is None else C
    n = k.new_zeros(batch, heads, dk) if n is None else n
    m = k.new_zeros(batch, heads) if m is None else m
    if k.dim() == 4:
        h, state = _sequence(q, k, v, i, f, (C, n, m), chunk, eps, variant)
        return h.to(dtype), *state
    rows, states = [v[:0]], []
    for b, (first, last) in enumerate(pairwise(bounds)):
        q_, k_, v_, i_, f_ = (x[first:last].transpose(0, 1) for x in (q, k, v, i, f))
        h, state = _sequence(q_, k_, v_, i_, f_, (C[b], n[b], m[b]), chunk, eps, variant)
        rows.append(h.transpose(0, 1))
        states.append(state)
    C, n, m = (torch.stack(parts) for parts in zip(*states, strict=True)) if states else (C, n, m)
    return torch.cat(rows).to(dtype), C, n, m


def _sequence(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State, chunk: int, eps: float, variant: str) -> tuple[Tensor, State]:
    rows = [v[..., :0, :]]
    one_chunk = _chunk_exp if variant == "exp" else _chunk_sig
    for t in range(0, k.shape[-2], chunk):
        at = slice(t, t + chunk)
        h, state = one_chunk(q[..., at, :] * k.shape[-1] ** -0.5, k[..., at, :], v[..., at, :], i[..., at], f[..., at], state, eps)
        rows.append(h)
    return torch.cat(rows, -2), state


def _decay(f: Tensor, log_input: Tensor) -> tuple[Tensor, Tensor]:
    """log of the weight that token j <= t has at token t (-inf above the diagonal), and of what is left of the state before the chunk."""
    length = f.shape[-1]
    lf = torch.nn.functional.logsigmoid(f)
    later = torch.ones(length, length, dtype=torch.bool, device=f.device).tril(-1)
    steps = torch.where(later, lf[..., :, None], 0).cumsum(-2)  # sums, not differences of sums: lf may be -inf
    return (steps + log_input[..., None, :]).masked_fill(later.transpose(0, 1), -torch.inf), lf.cumsum(-1)


def _chunk_exp(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State, eps: float) -> tuple[Tensor, State]:
    C, n, m = state
    log_d, before = _decay(f, i)
    old = before + m[..., None]
    row_m = torch.maximum(old, log_d.amax(-1))
    base = row_m.masked_fill(row_m == -torch.inf, 0)  # an empty memory: every weight is 0
    scores = q @ k.transpose(-1, -2) * torch.exp(log_d - base[..., None])
    carry = torch.exp(old - base)[..., None]
    numerator = scores @ v + carry * (q @ C)
    dot = scores.sum(-1, keepdim=True) + carry * (q @ n[..., None])
    h = numerator / (torch.maximum(dot.abs(), torch.exp(-row_m)[..., None]) + eps)
    weights = torch.exp(log_d[..., -1, :] - base[..., -1:])[..., None] * k
    keep = carry[..., -1, :]
    return h, (keep[..., None] * C + weights.transpose(-1, -2) @ v, keep * n + weights.sum(-2), row_m[..., -1])


def _chunk_sig(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State, eps: float) -> tuple[Tensor, State]:
    log_d, before = _decay(f, torch.nn.functional.logsigmoid(i))
    weights, carry = torch.exp(log_d), torch.exp(before)[..., None]
    h = (q @ k.transpose(-1, -2) * weights) @ v + carry * (q @ state[0])
    return h, (carry[..., -1:, :] * state[0] + (weights[..., -1, :, None] * k).transpose(-1, -2) @ v, *state[1:])


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, cu_seqlens: Tensor | None = None,
    eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp", update: bool = True,
) -> Tensor:  # fmt: skip
    """The recurrent form, one token of every sequence at a time; the states of the slots are written unless `update` is false."""
    out = torch.zeros_like(v)
    _recurrent(q, k, v, i, f, C, n, m, slot_ids, None, cu_seqlens, out, eps, gate_cap, variant, update)
    return out


def mlstm_replay(
    k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, counts: Tensor, cu_seqlens: Tensor | None = None,
    gate_cap: float | None = None, variant: str = "exp",
) -> None:  # fmt: skip
    """What mlstm_step makes of the states with the first counts[b] tokens of each sequence."""
    _recurrent(None, k, v, i, f, C, n, m, slot_ids, counts, cu_seqlens, None, 0.0, gate_cap, variant, True)


def _recurrent(
    q: Tensor | None, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, counts: Tensor | None,
    cu_seqlens: Tensor | None, out: Tensor | None, eps: float, gate_cap: float | None, variant: str, update: bool,
) -> None:  # fmt: skip
    slots = slot_ids.tolist()
    first = cu_seqlens.tolist() if cu_seqlens is not None else list(range(len(slots) + 1))
    count = [b - a for a, b in pairwise(first)] if counts is None else counts.tolist()
    i, f = _capped(_wide(i), gate_cap), _capped(_wide(f), gate_cap)
    where, carried = slot_ids.long(), tuple[Tensor, ...]((C, n, m))
    if not update:
        where, carried = torch.arange(len(slots), device=slot_ids.device), tuple(x[slot_ids.clamp(min=0).long()] for x in carried)
    for t in range(max(count, default=0)):
        active = [b for b in range(len(slots)) if slots[b] >= 0 and t < count[b]]
        rows, at = torch.tensor([first[b] + t for b in active], dtype=torch.int64, device=k.device), where[active]
        state, a, b = _gates(i[rows], f[rows], carried[2][at], variant)
        weighted = b[..., None] * _wide(k[rows])
        carried[0][at] = a[..., None, None] * carried[0][at] + weighted[..., None] * _wide(v[rows])[..., None, :]
        if variant == "exp":
            carried[1][at] = a[..., None] * carried[1][at] + weighted
            carried[2][at] = state
        if q is None or out is None:
            continue
        scaled = _wide(q[rows])[..., None, :] * k.shape[-1] ** -0.5
        h = (scaled @ carried[0][at])[..., 0, :]
        if variant == "exp":
            dot = (scaled @ carried[1][at][..., None])[..., 0]
            h = h / (torch.maximum(dot.abs(), torch.exp(-state)[..., None]) + eps)
        out[rows] = h.to(out.dtype)


def _gates(i: Tensor, f: Tensor, m: Tensor, variant: str) -> State:
    """The new m, and what the old state and the new token are multiplied with."""
    if variant == "sig":
        return m, torch.sigmoid(f), torch.sigmoid(i)
    decayed = torch.nn.functional.logsigmoid(f) + m
    new = torch.maximum(decayed, i)
    base = new.masked_fill(new == -torch.inf, 0)
    return new, torch.exp(decayed - base), torch.exp(i - base)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def slstm(Wx: Tensor, R: Tensor, b: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scalar-memory cell, token by token."""
    bounds = [0, Wx.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    if state is None:
        state = _wide(Wx).new_zeros(len(bounds) - 1, 4, *Wx.shape[2:])
    out, after = [Wx[:0, 0]], [state[:0]]
    for s, (first, last) in enumerate(pairwise(bounds)):
        cell = state[s : s + 1]
        for t in range(first, last):
            cell = _slstm_token(Wx[t : t + 1], R, b, cell)
            out.append(cell[:, 0].to(Wx.dtype))
        after.append(cell)
    return torch.cat(out), torch.cat(after)


def slstm_step(Wx: Tensor, R: Tensor, b: Tensor, state: Tensor, slot_ids: Tensor, cu_seqlens: Tensor | None = None, update: bool = True) -> Tensor:
    """slstm on the states of the slots, written unless `update` is false."""
    out = torch.zeros_like(Wx[:, 0])
    bounds = range(len(slot_ids) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    for slot, (first, last) in zip(slot_ids.tolist(), pairwise(bounds), strict=True):
        cell = state[slot : slot + 1] if slot >= 0 else state[:0]
        for t in range(first, last if slot >= 0 else first):
            cell = _slstm_token(Wx[t : t + 1], R, b, cell)
            out[t] = cell[0, 0].to(out.dtype)
        if update and slot >= 0:
            state[slot] = cell[0]
    return out


def _slstm_token(Wx: Tensor, R: Tensor, b: Tensor, state: Tensor) -> Tensor:
    y, c, n, m = state.unbind(1)
    i, f, z, o = (_wide(Wx) + b + torch.einsum("shd,hdge->sghe", y, _wide(R))).unbind(1)
    decayed = torch.where(n == 0, -torch.inf, torch.nn.functional.logsigmoid(f) + m)
    m = torch.maximum(decayed, i)
    keep, take = torch.exp(decayed - m), torch.exp(i - m)
    c, n = keep * c + take * torch.tanh(z), keep * n + take
    return torch.stack((torch.sigmoid(o) * c / n, c, n, m), 1)
