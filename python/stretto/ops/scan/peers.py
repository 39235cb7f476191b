"""What else a user can install and call today, with the arguments of our ops; the bench times them beside ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.nn.functional import softplus as plus


def _module(name: str, package: str) -> Any:
    """An installed module; the bench shows the message where there is none."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise NotImplementedError(f"{package} is not installed ({error})") from error


def _only(ok: bool, what: str) -> None:
    if not ok:
        raise NotImplementedError(what)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _selective_update(
    h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    delta, x = plus(dt.float() + dt_bias), u.float()
    h = torch.exp(delta[..., None] * A) * h + (delta * x)[..., None] * B.float()
    y = (h * C.float()).sum(-1) + D * x
    return h, (y * silu(z.float())).to(u.dtype)


def compiled_selective_step(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, softplus: bool
) -> Tensor:
    """The update of one row as torch.compile fuses it."""
    _only(B.shape[1] == 1 and softplus, "one group and softplus only")
    h, y = _compiled(_selective_update)(state, u, dt, A, B, C, D, z, dt_bias)
    state.copy_(h)
    return y  # type: ignore[no-any-return]


def compiled_selective_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, softplus: bool) -> Tensor:
    """A loop over tokens, its body fused by torch.compile."""
    _only(u.dim() == 3 and B.shape[2] == 1 and softplus, "a batch with one group and softplus only")
    body, ys = _compiled(_selective_update), []
    h = torch.zeros(u.shape[0], *A.shape)
    for t in range(u.shape[1]):
        h, y = body(h, u[:, t], dt[:, t], A, B[:, t], C[:, t], D, z[:, t], dt_bias)
        ys.append(y)
    return torch.stack(ys, 1)


def mambapy_selective_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, softplus: bool) -> Tensor:
    """mambapy's parallel scan."""
    pscan = _module("mambapy.pscan", "mambapy").pscan
    _only(u.dim() == 3 and B.shape[2] == 1 and softplus, "a batch with one group and softplus only")
    delta, x = plus(dt.float() + dt_bias), u.float()
    h = pscan(torch.exp(delta[..., None] * A), (delta * x)[..., None] * B.float())
    y: Tensor = (h @ C.float().mT).squeeze(3) + D * x
    return (y * silu(z.float())).to(u.dtype)
