"""References of the sampling family, Philox noise included: integers in int64, probabilities in the dtype given (tests give float64)."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both below 2^32, without leaving int64: b is split into halves of 16 bits."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 of counters [..., 4] and keys [..., 2] (int64 holding 32-bit words), as [..., 4]. Source: SC 2011 paper of Salmon et al."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        (ha, la), (hb, lb) = _mulhilo(0xD2511F53, c0), _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hb ^ c1 ^ k0, lb, ha ^ c3 ^ k1, la
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3), -1)


def noise_words(seed: Tensor, lineage: Tensor, pos: Tensor, purpose: int, index: Tensor) -> Tensor:
    """Words [rows, len(index), 4] for seed, lineage int64 [rows], pos int32 [rows] and counters index int64 [blocks]."""
    shape = (seed.shape[0], index.shape[0])
    first = ((purpose << 28) | index).expand(shape)
    rest = ((pos.long() & _MASK32), (lineage & _MASK32), ((lineage >> 32) & _MASK32))
    counter = torch.stack((first, *(r[:, None].expand(shape) for r in rest)), -1)
    key = torch.stack((seed & _MASK32, (seed >> 32) & _MASK32), -1)[:, None].expand(*shape, 2)
    return philox4x32(counter, key)


def uniform(seed: Tensor, lineage: Tensor, pos: Tensor, purpose: int = 0, index: int = 0) -> Tensor:
    """float64 [rows] in [0, 1): the upper 53 of 64 bits."""
    words = noise_words(seed, lineage, pos, purpose, torch.tensor([index], device=seed.device))[:, 0]
    return ((words[:, 1] << 21) | (words[:, 0] >> 11)).double() * 2.0**-53


def _token_uniforms(seed: Tensor, lineage: Tensor, pos: Tensor, num_tokens: int, purpose: int) -> Tensor:
    words = noise_words(seed, lineage, pos, purpose, torch.arange((num_tokens + 3) // 4, device=seed.device))
    return (words.flatten(1)[:, :num_tokens].double() + 0.5) * 2.0**-32


def gumbel(seed: Tensor, lineage: Tensor, pos: Tensor, num_tokens: int, purpose: int = 0) -> Tensor:
    """float64 [rows, num_tokens]: -log(-log u)."""
    return -torch.log(-torch.log(_token_uniforms(seed, lineage, pos, num_tokens, purpose)))


def _usable(logits: Tensor) -> Tensor:
    """[rows] bool: no NaN, no +inf, something finite."""
    return ~logits.isnan().any(-1) & ~(logits == torch.inf).any(-1) & logits.isfinite().any(-1)


def row_status(logits: Tensor) -> Tensor:
    """int32 [rows]: 0 all finite, 1 usable but holds -inf, 2 unusable."""
    return torch.where(_usable(logits), (~logits.isfinite().all(-1)).int(), 2).int()


def _first_max(values: Tensor) -> Tensor:
    """Index of the first largest entry of each row."""
    return (values == values.max(-1, keepdim=True).values).int().argmax(-1)


def argmax(logits: Tensor) -> Tensor:
    """int32 [rows]; -1 where a row is unusable."""
    return torch.where(_usable(logits), _first_max(logits.nan_to_num(nan=-torch.inf)), -1).int()


def penalize(
    logits: Tensor, history: Tensor, cu_history: Tensor | None, repetition: Tensor, presence: Tensor, frequency: Tensor,
    bias_ids: Tensor | None = None, bias_values: Tensor | None = None, cu_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """In place; returns logits."""
    width = logits.shape[1]
    for row in range(logits.shape[0]):
        seen = history[row] if cu_history is None else history[int(cu_history[row]) : int(cu_history[row + 1])]
        ids, counts = seen[(seen >= 0) & (seen < width)].unique(return_counts=True)
        l = logits[row, ids.long()]  # noqa: E741
        l = torch.where(l > 0, l / repetition[row], l * repetition[row])  # noqa: E741
        logits[row, ids.long()] = l - (presence[row] + frequency[row] * counts)
        if bias_ids is not None and bias_values is not None and cu_bias is not None:
            begin, end = int(cu_bias[row]), int(cu_bias[row + 1])
            logits[row].index_put_((bias_ids[begin:end].long(),), bias_values[begin:end].to(logits.dtype), accumulate=True)
    return logits


def warp(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Temperature, top-k, top-p, min-p in this order, by a full stable sort."""
    out = torch.full_like(logits, torch.nan)
    for row in range(logits.shape[0]):
        l, t, k = logits[row], temperature[row].to(logits.dtype), int(top_k[row])  # noqa: E741
        if not bool(_usable(l[None])):
            continue
        order = l.argsort(descending=True, stable=True)
        if t == 0:
            out[row] = 0
            out[row, order[0]] = 1
            continue
        mass = torch.exp((l[order] - l[order[0]]) / t)
        keep = torch.ones_like(mass, dtype=torch.bool)
        if k > 0:
            keep[k:] = False
        if top_p[row] < 1:
            before = torch.where(keep, mass, 0).double().cumsum(0).roll(1)
            before[0] = 0
            keep &= before < float(top_p[row]) * torch.where(keep, mass, 0).double().sum()
            keep[0] = True
        keep &= mass >= min_p[row].to(mass.dtype)
        out[row, order] = torch.where(keep, mass, 0) / torch.where(keep, mass, 0).sum()
    return out


def draw(p: Tensor, seed: Tensor, lineage: Tensor, pos: Tensor, purpose: int = 0, method: str = "inverse") -> Tensor:
    """int32 [rows]; -1 where a row holds NaN, inf or a negative entry, or nothing."""
    wide = p.double()
    good = wide.isfinite().all(-1) & (wide >= 0).all(-1) & (wide.sum(-1) > 0)
    if method == "gumbel":
        times = -torch.log(_token_uniforms(seed, lineage, pos, p.shape[1], purpose)) / wide
        token = _first_max(-times.nan_to_num(nan=torch.inf))
    else:
        sums = wide.cumsum(-1)
        token = (sums <= uniform(seed, lineage, pos, purpose)[:, None] * sums[:, -1:]).sum(-1)
        last = p.shape[1] - 1 - (wide > 0).flip(-1).int().argmax(-1)
        token = token.minimum(last)
    return torch.where(good, token, -1).int()
