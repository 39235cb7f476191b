"""Reference of rotary embedding fused with the write into the cache."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_append(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos_sin: Tensor, k_pages: Tensor, v_pages: Tensor, num_heads: int, num_kv_heads: int, order: str,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, norm_eps: float = 1e-6, k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Rotate q in qkv in place, write rotated k and v at `slots`; see ops.rope.append."""
    head_dim, page_size, half = k_pages.shape[2], k_pages.shape[3], cos_sin.shape[1] // 2
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, head_dim))
    cos, sin = (part[positions.long()][:, None].to(qkv.dtype) for part in (cos_sin[:, :half], cos_sin[:, half:]))

    def prepared(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps) * weight.to(x.dtype)
        x = x.clone()
        a, b = (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]) if order == "interleaved" else (x[..., :half], x[..., half : 2 * half])
        ra, rb = a * cos - b * sin, b * cos + a * sin
        a.copy_(ra)
        b.copy_(rb)
        return x

    k, v = prepared(heads[:, num_heads : num_heads + num_kv_heads], k_norm), heads[:, num_heads + num_kv_heads :]
    heads[:, :num_heads] = prepared(heads[:, :num_heads], q_norm)
    kept = slots >= 0
    page, offset = (slots[kept] // page_size).long(), (slots[kept] % page_size).long()
    for values, pages, scales, key in ((k[kept], k_pages, k_scales, True), (v[kept], v_pages, v_scales, False)):
        if scales is not None:
            scale = values.abs().amax(-1) / 127
            scales[page, :, offset] = scale.to(scales.dtype)
            values = torch.where(scale[..., None] > 0, values / scale[..., None], 0).round()
        if key:
            pages[page, :, :, offset] = values.to(pages.dtype)
        else:
            pages[page, :, offset, :] = values.to(pages.dtype)
