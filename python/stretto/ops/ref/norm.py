"""References of the norm family."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x [rows, width] * weight [width] / sqrt(mean(x^2) + eps) (+ residual)."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (normed if residual is None else residual.to(wide.dtype) + normed).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), all [rows, width]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x [rows, width] - mean) / sqrt(variance + eps) * weight [width] (+ bias [width])."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (normed if bias is None else normed + bias.to(wide.dtype)).to(x.dtype)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [n, width] at rows [m]."""
    return x[rows.long()]
