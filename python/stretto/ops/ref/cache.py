"""Moves inside a paged key-value cache, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def copy_pages(k: Tensor, v: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None) -> None:
    """Page dst[i] := page src[i] in every layer, in order of i; a negative id skips the pair."""
    for tensor in (k, v, k_scales, v_scales):
        if tensor is not None:
            for s, d in zip(src.tolist(), dst.tolist(), strict=True):
                if s >= 0 and d >= 0:
                    tensor[:, d] = tensor[:, s].clone()


def move_rows(k: Tensor, v: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None) -> None:
    """Row dst[i] := row src[i], slots page * page_size + offset, in every layer, in order of i; a negative id skips."""
    page_size = k.shape[-1]
    for tensor, axis in ((k, 4), (v, 3), (k_scales, 3), (v_scales, 3)):
        if tensor is not None:
            for s, d in zip(src.tolist(), dst.tolist(), strict=True):
                if s >= 0 and d >= 0:
                    row = tensor.select(1, s // page_size).select(axis - 1, s % page_size).clone()
                    tensor.select(1, d // page_size).select(axis - 1, d % page_size).copy_(row)
