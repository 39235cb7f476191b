"""References of the dct family: the cosine transform as two matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cosine_matrix(n: int, keep: int, device: torch.device | None = None) -> Tensor:
    """The first `keep` rows of the orthonormal DCT-II of length n: [keep, n] float64."""
    k, i = (torch.arange(count, dtype=torch.float64, device=device) for count in (keep, n))
    rows = math.sqrt(2 / n) * torch.cos(math.pi / (2 * n) * k[:, None] * (2 * i + 1))
    rows[:1] *= math.sqrt(0.5)
    return rows


def lowpass_matrix(n: int, keep: int, inverse: bool, rescale: str, device: torch.device | None = None) -> Tensor:
    """What low-pass does to one axis: [keep, n] float64."""
    rows = cosine_matrix(n, keep, device)
    if not inverse:
        return rows
    return (math.sqrt(keep / n) if rescale == "mean" else 1.0) * cosine_matrix(keep, keep, device).t() @ rows


def separable(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """rows [u, h] and columns [v, w] on both axes of x [B, h, w, C], in float or what is wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    rows, columns = (m.to(wide.dtype) for m in (rows, columns))
    return torch.einsum("ui,bivc->buvc", rows, torch.einsum("vj,bijc->bivc", columns, wide)).to(x.dtype)


def lowpass(x: Tensor, keep: Sequence[int], inverse: bool = False, grid: Sequence[int] | None = None, rescale: str = "mean") -> Tensor:
    """x [B, h, w, C], or [B, tokens, C] with a grid -> rows x columns^T for each channel."""
    on_grid = x if grid is None else x.unflatten(1, tuple(grid))
    rows, columns = (lowpass_matrix(n, k, inverse, rescale, x.device) for n, k in zip(on_grid.shape[1:3], keep, strict=True))
    y = separable(rows, columns, on_grid)
    return y if grid is None else y.flatten(1, 2)


def lowpass_adjoint(y: Tensor, grid: Sequence[int], inverse: bool = False, keep: Sequence[int] | None = None, rescale: str = "mean") -> Tensor:
    """y [B, kh, kw, C], or [B, kept, C] with keep -> rows^T y columns for each channel."""
    on_grid = y if keep is None else y.unflatten(1, tuple(keep))
    rows, columns = (lowpass_matrix(n, k, inverse, rescale, y.device) for n, k in zip(grid, on_grid.shape[1:3], strict=True))
    x = separable(rows.t(), columns.t(), on_grid)
    return x if keep is None else x.flatten(1, 2)
