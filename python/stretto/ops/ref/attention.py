"""References of the attention family."""

from __future__ import annotations

from collections.abc import Sequence

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
    out = q.new_zeros(q.shape)
    page_size, group = k_pages.shape[3], q.shape[1] // k_pages.shape[1]
    for r, done in enumerate(cached.tolist()):
        start, end = int(cu_q[r]), int(cu_q[r + 1])
        for row in range(end - start):
            seen = _sees(row, done, mask, -1 if mask_start is None else int(mask_start[r]), window, end - start)
            keys = torch.tensor(seen, dtype=torch.long, device=q.device)
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
    out = lse.new_zeros(a.shape)
    for x, part in ((a, lse_a), (b, lse_b)):
        weight = (part - shift).exp()[..., None]
        out = out + torch.where(weight == 0, torch.zeros_like(out), weight * x.to(lse.dtype))
    return out.to(a.dtype), lse


def masked(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float | None = None, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [batch, rows, heads, dim] over k, v [batch, keys, kv_heads, dim] where sees [batch or 1, heads or 1, rows, keys] is True.

    Returns (out, lse [batch, rows, heads]); a row that sees nothing gives zeros and -inf, and values it does not see do not reach it.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    out, lse = [], []
    for h in range(q.shape[2]):  # head by head: the matrix of one is large enough
        wq, wk, wv = q[:, :, h].to(wide), k[:, :, h // group].to(wide), v[:, :, h // group].to(wide)
        scores = (q.shape[3] ** -0.5 if scale is None else scale) * wq @ wk.transpose(1, 2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~sees[:, h if sees.shape[1] > 1 else 0], -torch.inf)
        total = scores.logsumexp(-1) if k.shape[1] else scores.new_full(scores.shape[:2], -torch.inf)
        out.append((scores - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp() @ wv)
        lse.append(total)
    if not out:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=wide)
    return torch.stack(out, 2).to(q.dtype), torch.stack(lse, 2)


def dense_sees(rows: int, keys: int, causal: bool, window: int | None, device: torch.device | None = None) -> Tensor:
    """[1, 1, rows, keys]: what dense attention lets each query see."""
    away = torch.arange(rows, device=device)[:, None] + keys - rows - torch.arange(keys, device=device)
    sees = away >= 0 if causal else torch.ones_like(away, dtype=torch.bool)
    return (sees if window is None else sees & (away.abs() < window))[None, None]


def packed_sees(rows: int, keys: int, causal: bool, window: int | None, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """[1, 1, rows, keys]: what packed sequences let each query see."""
    sees = cu_q.new_zeros(1, 1, rows, keys, dtype=torch.bool)
    for s in range(len(cu_q) - 1):
        q, k = slice(int(cu_q[s]), int(cu_q[s + 1])), slice(int(cu_k[s]), int(cu_k[s + 1]))
        sees[..., q, k] = dense_sees(q.stop - q.start, k.stop - k.start, causal, window, cu_q.device)
    return sees


def sees_of(q: Tensor, k: Tensor, causal: bool, window: int | None, cu_q: Tensor | None, cu_k: Tensor | None) -> Tensor:
    """[1, 1, rows, keys]: what the arguments of `dense` let each query see."""
    rows, keys = q.shape[1], k.shape[1]
    if cu_q is None or cu_k is None:
        return dense_sees(rows, keys, causal, window, q.device)
    return packed_sees(rows, keys, causal, window, cu_q, cu_k)


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None,
    softcap: float | None = None, cu_q: Tensor | None = None, cu_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale q K^T) V; see ops.attention.dense."""
    return masked(q, k, v, sees_of(q, k, causal, window, cu_q, cu_k), scale, softcap)


def lists_sees(
    interval_ptr: Tensor, intervals: Tensor, column_ptr: Tensor, columns: Tensor, block: int, rows: int, keys: int, causal: bool
) -> Tensor:
    """[list batch, list heads, rows, keys]: what lists of keys let each query see; see ops.attention.sparse_prefill."""
    batch, heads, pointers = interval_ptr.shape
    sees = columns.new_zeros(batch, heads, rows, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(pointers - 1):
                some = sees[b, h, i * block : (i + 1) * block]
                for begin, end in intervals[int(interval_ptr[b, h, i]) : int(interval_ptr[b, h, i + 1])].tolist():
                    some[:, begin:end] = True
                some[:, columns[int(column_ptr[b, h, i]) : int(column_ptr[b, h, i + 1])].long()] = True
    return sees & dense_sees(rows, keys, causal, None, sees.device)


def sparse_prefill(
    q: Tensor, k: Tensor, v: Tensor, interval_ptr: Tensor, intervals: Tensor, column_ptr: Tensor, columns: Tensor, block: int = 64,
    scale: float | None = None, causal: bool = True, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over each block's list of keys, as a mask; see ops.attention.sparse_prefill."""
    sees = lists_sees(interval_ptr, intervals, column_ptr, columns, block, q.shape[1], k.shape[1], causal)
    return masked(q, k, v, sees, scale, softcap)


def lines_seen(verticals: Tensor, slashes: Tensor, rows: int, keys: int, block: int) -> Tensor:
    """[batch, heads, blocks, keys]: keys on vertical lines and in the shadow of a block along slashes; see ops.attention.lines_to_lists."""
    blocks = -(-rows // block)
    sees = verticals.new_zeros(*verticals.shape[:2], blocks, keys, dtype=torch.bool)
    for b in range(verticals.shape[0]):
        for h in range(verticals.shape[1]):
            for i in range(blocks):
                first, last = i * block + keys - rows, min((i + 1) * block, rows) + keys - rows
                for o in slashes[b, h].tolist():
                    sees[b, h, i, max(first - o, 0) : max(last - o, 0)] = True
                sees[b, h, i, verticals[b, h][verticals[b, h] < last].long()] = True
    return sees


def weights(q: Tensor, k: Tensor, lse: Tensor, sees: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """[batch, heads, rows, keys]: the attention weights, from the lse of each query."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    wk = k.to(wide).repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = (q.shape[3] ** -0.5 if scale is None else scale) * torch.einsum("bqhd,bkhd->bhqk", q.to(wide), wk)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shift = lse.to(wide).transpose(1, 2)[..., None]
    return (scores - shift.masked_fill(shift == -torch.inf, 0.0)).exp().masked_fill(~sees, 0.0)


def sums(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None, softcap: float | None = None,
    cu_q: Tensor | None = None, cu_k: Tensor | None = None, diagonals: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of the attention weights by key, and by key position less query position; see ops.attention.sums."""
    rows, keys = q.shape[1], k.shape[1]
    a = weights(q, k, lse, sees_of(q, k, causal, window, cu_q, cu_k), scale, softcap)
    by_diagonal = a.new_zeros(*a.shape[:2], max(rows + keys - 1, 0) if diagonals else 0)
    if diagonals:
        index = torch.arange(keys, device=q.device) - torch.arange(rows, device=q.device)[:, None] + rows - 1
        by_diagonal = by_diagonal.scatter_add(2, index.reshape(1, 1, -1).expand(*a.shape[:2], -1), a.flatten(2))
    return a.sum(2), by_diagonal


def seen_along(queries: int, keys: int, window: int, stride: int, causal: bool, device: torch.device | None = None) -> Tensor:
    """[queries, keys]: what queries, the last of the keys, see along one axis of a grid; see ops.attention.attention3d."""
    i, j = (torch.arange(queries, device=device) + keys - queries)[:, None], torch.arange(keys, device=device)
    run = i // stride * stride
    if causal:
        return (j <= i) & ((run + stride - 1).clamp(max=keys - 1) - j < (window or keys + stride))
    if window == 0:
        return torch.ones(queries, keys, dtype=torch.bool, device=device)
    after = window // 2 - 1 + window % 2
    centre = (run + stride // 2).clamp(max=keys - 1).clamp(min=window // 2, max=keys - 1 - after)
    return (j >= centre - window // 2) & (j <= centre + after)


def grid_sees(
    grid: Sequence[int], key_frames: int, window: Sequence[int], stride: Sequence[int], causal: bool, device: torch.device | None = None
) -> Tensor:
    """[rows, keys] over the flattened grid."""
    t, h, w = (
        seen_along(n, m, window[axis], stride[axis], causal and axis == 0, device)
        for axis, (n, m) in enumerate(zip(grid, (key_frames, grid[1], grid[2]), strict=True))
    )
    sees = t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    return sees.reshape(grid[0] * grid[1] * grid[2], key_frames * grid[1] * grid[2])


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """x [batch, rows, heads, dim] with its pairs (2 i, 2 i + 1) turned by table [rows, dim]: cosines, then sines."""
    cosine, sine = table.to(x.dtype)[:, None].chunk(2, -1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], -1).flatten(-2)


def attention3d(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], window: Sequence[int] | None = None, stride: Sequence[int] = (1, 1, 1),
    causal: bool = False, scale: float | None = None, softcap: float | None = None, frames: Tensor | None = None, rope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over a grid of tokens, as a mask; see ops.attention.attention3d."""
    place = grid[1] * grid[2]
    if frames is not None:  # the pool's frames, entry by entry, in time order
        k, v = (x[0].unflatten(0, (-1, place))[frames.long()].flatten(1, 2) for x in (k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    wq, wk, wv = (x.to(wide) for x in (q, k, v))
    if rope is not None:
        wq, wk = rotate_pairs(wq, rope[rope.shape[0] - q.shape[1] :]), rotate_pairs(wk, rope)
    key_frames = k.shape[1] // place if place else grid[0]
    sees = grid_sees(grid, key_frames, window or (0, 0, 0), stride, causal, q.device)[None, None]
    out, lse = masked(wq, wk, wv, sees, scale, softcap)
    return out.to(q.dtype), lse


def with_probs(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None,
    softcap: float | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`dense` and its weights; see ops.attention.with_probs."""
    out, lse = dense(q, k, v, scale, causal, window, softcap)
    probs = weights(q, k, lse, dense_sees(q.shape[1], k.shape[1], causal, window, q.device), scale, softcap)
    return out, lse, probs.to(dtype or q.dtype)


def apply_probs(probs: Tensor, v: Tensor) -> Tensor:
    """probs [batch, heads, rows, keys] times v [batch, keys, kv_heads, dim]; see ops.attention.apply_probs."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    values = v.to(wide).repeat_interleave(probs.shape[1] // v.shape[2], 2)
    return torch.einsum("bhqk,bkhd->bqhd", probs.to(wide), values).to(v.dtype)
