"""What else a user can install and call today, with the arguments of our ops; the bench times them beside ours."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.nn.functional import softplus as plus


def _module(name: str, package: str) -> Any:
    """An installed module; the bench shows the message where there is none."""
    try:
        return importlib.import_module(name)
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


def transformers_selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, softplus: bool, use_mambapy: bool = False
) -> Tensor:
    """What MambaMixer runs where mamba-ssm is not installed; with mambapy's parallel scan if asked."""
    module = _module("transformers.models.mamba.modeling_mamba", "transformers")
    _only(not use_mambapy or module.is_mambapy_available(), "mambapy is not installed")
    _only(u.dim() == 3 and B.shape[2] == 1, "a batch with one group only")
    turned = [t.mT for t in (u, dt, B[:, :, 0], C[:, :, 0], z)]
    y = module.mamba_selective_scan(turned[0], turned[1], A, turned[2], turned[3], D, turned[4], dt_bias, softplus, use_mambapy=use_mambapy)
    return y.mT  # type: ignore[no-any-return]


mambapy_selective_scan = functools.partial(transformers_selective_scan, use_mambapy=True)


def transformers_selective_step(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, softplus: bool
) -> Tensor:
    module = _module("transformers.models.mamba.modeling_mamba", "transformers")
    _only(B.shape[1] == 1, "one group only")
    return module.mamba_selective_state_update(state, u, dt, A, B[:, 0], C[:, 0], D, dt_bias, softplus, z)  # type: ignore[no-any-return]


def transformers_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, softplus: bool, chunk: int = 64
) -> Tensor:
    """What Mamba2Mixer runs where mamba-ssm is not installed, and the gate."""
    module = _module("transformers.models.mamba2.modeling_mamba2", "transformers")
    _only(x.dim() == 4, "a batch only")
    y = module.mamba2_chunk_scan(x, dt, A, B, C, chunk, D, dt_bias, dt_softplus=softplus)
    return (y * silu(z.float())).to(x.dtype)  # type: ignore[no-any-return]


def _ssd_update(h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    delta, v = plus(dt.float() + dt_bias), x.float()
    h = torch.exp(delta * A)[..., None, None] * h + (delta[..., None] * v)[..., None] * B.float()[:, :, None]
    y = (h * C.float()[:, :, None]).sum(-1) + D[:, None] * v
    return h, (y * silu(z.float())).to(x.dtype)


def compiled_ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, softplus: bool
) -> Tensor:
    """The update of one row as torch.compile fuses it."""
    _only(B.shape[1] == 1 and softplus, "one group and softplus only")
    h, y = _compiled(_ssd_update)(state, x, dt, A, B, C, D, z, dt_bias)
    state.copy_(h)
    return y  # type: ignore[no-any-return]


def chunked_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, softplus: bool, chunk: int = 64
) -> Tensor:
    """The chunk form in float32 on torch's matrix products: what a careful user writes, several times faster than transformers' own."""
    _only(x.dim() == 4 and B.shape[2] == 1 and softplus and x.shape[1] % chunk == 0, "a batch of whole chunks with one group and softplus only")
    batch, length, heads, dim = x.shape
    delta = plus(dt.float() + dt_bias).view(batch, -1, chunk, heads)  # [b, c, q, h]
    v = x.float().view(batch, -1, chunk, heads, dim)
    b, c = (t.float()[:, :, 0].reshape(batch, -1, chunk, t.shape[3]) for t in (B, C))
    cs = (delta * A).cumsum(2).permute(0, 1, 3, 2)  # [b, c, h, q]
    scores = (c @ b.mT)[:, :, None] * torch.exp(
        (cs[..., :, None] - cs[..., None, :]).masked_fill(~torch.ones(chunk, chunk, dtype=torch.bool).tril(), -torch.inf)
    )
    dv = (delta[..., None] * v).transpose(2, 3)  # [b, c, h, q, p]
    y = scores @ dv
    states = (dv * torch.exp(cs[..., -1:] - cs)[..., None]).mT @ b[:, :, None]  # [b, c, h, p, n]
    h, before = torch.zeros_like(states[:, 0]), []
    for i in range(states.shape[1]):
        before.append(h)
        h = torch.exp(cs[:, i, :, -1])[..., None, None] * h + states[:, i]
    y = y + torch.exp(cs)[..., None] * (c[:, :, None] @ torch.stack(before, 1).mT)
    out = y.transpose(2, 3).reshape(batch, length, heads, dim) + D[:, None] * x.float()
    return (out * silu(z.float())).to(x.dtype)
