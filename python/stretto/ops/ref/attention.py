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
