"""References of the attention family."""

from __future__ import annotations

import torch
from torch import Tensor


def _sees(row: int, cached: int, mask: Tensor | None, first: int, window: int | None, rows: int) -> list[int]:
    """Slot positions of the keys that a row sees, by absolute position."""
    if mask is None or first < 0:
        keys, position = list(range(cached + row + 1)), cached + row
    else:
        words = mask[first + row].tolist()
        tree = [j for j in range(rows) if (words[j // 64] >> (j % 64)) & 1]
        keys, position = [*range(cached), *(cached + j for j in tree)], cached + len(tree) - 1
    positions = range(len(keys))
    return [k for k, p in zip(keys, positions, strict=True) if window is None or p > position - window]


def paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, cu_q: Tensor, cached: Tensor, scale: float, window: int | None = None,
    softcap: float | None = None, mask: Tensor | None = None, mask_start: Tensor | None = None, k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q K^T) V for each row over the keys it sees; see ops.attention.paged."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    page_size, group = k_pages.shape[3], q.shape[1] // k_pages.shape[1]
    for r, done in enumerate(cached.tolist()):
        start, end = int(cu_q[r]), int(cu_q[r + 1])
        for row in range(end - start):
            keys = torch.tensor(_sees(row, done, mask, -1 if mask_start is None else int(mask_start[r]), window, end - start), dtype=torch.long)
            page, offset = table[r, keys // page_size].long(), keys % page_size
            k, v = k_pages[page, :, :, offset].to(q.dtype), v_pages[page, :, offset, :].to(q.dtype)  # [keys, kv_heads, head_dim]
            if k_scales is not None and v_scales is not None:
                k, v = k * k_scales[page, :, offset].to(q.dtype)[..., None], v * v_scales[page, :, offset].to(q.dtype)[..., None]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = scale * torch.einsum("hd,khd->hk", q[start + row], k)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[start + row] = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
    return out


def merge_states(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two results over disjoint keys as one; see ops.attention.merge_states."""
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    out = torch.zeros(a.shape, dtype=lse.dtype)
    for x, l in ((a, lse_a), (b, lse_b)):
        weight = (l - shift).exp()[..., None]
        out = out + torch.where(weight == 0, torch.zeros_like(out), weight * x.to(lse.dtype))
    return out.to(a.dtype), lse


def masked(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float | None = None, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [batch, rows, heads, dim] over k, v [batch, keys, kv_heads, dim] where sees [batch or 1, heads or 1, rows, keys] is True.

    Returns (out, lse [batch, rows, heads]); a row that sees nothing gives zeros and -inf, and values it does not see do not reach it.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group, keys = q.shape[2] // k.shape[2], k.shape[1]
    wk, wv = (x.to(wide).repeat_interleave(group, 2) for x in (k, v))
    scores = (q.shape[3] ** -0.5 if scale is None else scale) * torch.einsum("bqhd,bkhd->bhqk", q.to(wide), wk)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees, -torch.inf)
    lse = scores.logsumexp(-1) if keys else scores.new_full(scores.shape[:3], -torch.inf)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = torch.einsum("bhqk,bkhd->bqhd", weights, wv)
    return out.to(q.dtype), lse.transpose(1, 2).to(torch.float64 if wide == torch.float64 else torch.float32).contiguous()


def dense_sees(rows: int, keys: int, causal: bool, window: int | None) -> Tensor:
    """[1, 1, rows, keys]: what dense attention lets each query see."""
    away = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)
    sees = away >= 0 if causal else torch.ones_like(away, dtype=torch.bool)
    return (sees if window is None else sees & (away.abs() < window))[None, None]


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None,
    softcap: float | None = None, cu_q: Tensor | None = None, cu_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale q K^T) V; see ops.attention.dense."""
    if cu_q is None or cu_k is None:
        return masked(q, k, v, dense_sees(q.shape[1], k.shape[1], causal, window), scale, softcap)
    sequence_q, sequence_k = (
        torch.bucketize(torch.arange(n), cu.long(), right=True).masked_fill(torch.arange(n) >= cu[-1], 0) for n, cu in ((q.shape[1], cu_q), (k.shape[1], cu_k))
    )
    sees = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    for s in range(1, len(cu_q)):
        (rows,), (keys,) = (sequence_q == s).nonzero(as_tuple=True), (sequence_k == s).nonzero(as_tuple=True)
        sees[rows[:, None], keys] = dense_sees(len(rows), len(keys), causal, window)[0, 0]
    return masked(q, k, v, sees[None, None], scale, softcap)
