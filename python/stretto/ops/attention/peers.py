"""torch's ways to attention with a mask, for `bench ops`. What depends on the mask alone is made at the first call and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_masks: dict[Any, Any] = {}


def _key(kind: str, parts: tuple[object, ...]) -> tuple[object, ...]:
    return (kind, *(p.data_ptr() if isinstance(p, Tensor) else p for p in parts))


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(name: tuple[object, ...], mask: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention over q, k, v [batch, rows, heads, dim] where mask() [batch or 1, heads or 1, rows, keys] is True."""
    from torch.nn.attention.flex_attention import create_block_mask

    key = _key("flex", name)
    if key not in _masks:
        sees = mask()
        batch, heads, rows, keys = sees.shape

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return sees[b if batch > 1 else 0, h if heads > 1 else 0, i, j]

        _masks[key] = create_block_mask(mask_mod, batch, heads, rows, keys, device="cpu")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    result: Tensor = _compiled()(q, k, v, block_mask=_masks[key], enable_gqa=q.shape[1] != k.shape[1])
    return result


def sdpa_masked(name: tuple[object, ...], mask: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch SDPA over q, k, v [batch, rows, heads, dim] where mask() is True."""
    key = _key("sdpa", name)
    if key not in _masks:
        _masks[key] = torch.zeros(()).masked_fill(~mask(), -torch.inf).to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=_masks[key], enable_gqa=q.shape[1] != k.shape[1])
