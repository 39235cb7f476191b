"""References of the quant family: block formats decoded, packed and multiplied in plain PyTorch.

Slow and short. Packing here is what csrc/host/pack_weights.cpp does; the layout is described in csrc/kernels/quant/formats.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A weight format: values of a block along k, its bytes in a file, and the bytes of 16 rows of it when packed."""

    block: int
    raw_bytes: int
    packed_bytes: int
    float_dtype: torch.dtype | None = None


FORMATS = {
    "F32": Format(1, 4, 64, torch.float32),
    "F16": Format(1, 2, 32, torch.float16),
    "BF16": Format(1, 2, 32, torch.bfloat16),
    "Q8_0": Format(32, 34, 544),
    "Q4_0": Format(32, 18, 288),
    "Q4_1": Format(32, 20, 320),
    "Q5_0": Format(32, 22, 352),
    "Q5_1": Format(32, 24, 384),
    "Q4_K": Format(256, 144, 2368),
    "Q5_K": Format(256, 176, 2880),
    "Q6_K": Format(256, 210, 3360),
}


@dataclass(frozen=True)
class Blocks:
    """Integers and scales of a matrix. A value is d * sc * (q - offset) - dmin * mn, or + m where the format stores that.

    q: [n, units, block] uint8. d, m, dmin: [n, units] float16 (None where the format has none). sc, mn: [n, units, parts] uint8 or int8.
    """

    q: Tensor
    d: Tensor
    m: Tensor | None = None
    sc: Tensor | None = None
    mn: Tensor | None = None


_OFFSETS = {"Q8_0": 128, "Q4_0": 8, "Q5_0": 16, "Q6_K": 32}
_BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}


def _halves(raw: Tensor, at: int) -> Tensor:
    return raw[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def _bits(data: Tensor, width: int) -> Tensor:
    """[..., bytes] -> [..., 8 / width, bytes]: run i holds bits [i * width, (i + 1) * width) of every byte."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)[:, None]
    return (data[..., None, :] >> shifts) & ((1 << width) - 1)


def _fifth(four: Tensor) -> Tensor:
    """[..., 4] bytes -> [..., 32]: bit i of the little-endian word, at position 4 of a byte."""
    return ((four[..., :, None] >> torch.arange(8, dtype=torch.uint8, device=four.device)) & 1).flatten(-2) << 4


def parse(raw: Tensor, fmt: str) -> Blocks:
    """File rows, uint8 [n, units * raw_bytes], as integers and scales."""
    raw = raw.unflatten(1, (-1, FORMATS[fmt].raw_bytes))
    if fmt == "Q8_0":
        return Blocks(raw[..., 2:] ^ 0x80, _halves(raw, 0))
    if fmt in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        q = _bits(raw[..., -16:], 4).flatten(-2)
        if fmt[1] == "5":
            q = q | _fifth(raw[..., -20:-16])
        return Blocks(q, _halves(raw, 0), _halves(raw, 2) if fmt[3] == "1" else None)
    if fmt == "Q6_K":
        low = torch.cat([_bits(part, 4).flatten(-2) for part in raw[..., :128].split(64, -1)], -1)
        high = torch.cat([_bits(part, 2).flatten(-2) for part in raw[..., 128:192].split(32, -1)], -1)
        return Blocks(low | high << 4, _halves(raw, 208), sc=raw[..., 192:208].contiguous().view(torch.int8))
    s = raw[..., 4:16]
    sc = torch.cat([s[..., :4] & 63, (s[..., 8:] & 15) | (s[..., :4] >> 6) << 4], -1)
    mn = torch.cat([s[..., 4:8] & 63, s[..., 8:] >> 4 | (s[..., 4:8] >> 6) << 4], -1)
    q = torch.cat([_bits(part, 4).flatten(-2) for part in raw[..., -128:].split(32, -1)], -1)
    if fmt == "Q5_K":
        q = q | _bits(raw[..., 16:48], 1).flatten(-2) << 4
    return Blocks(q, _halves(raw, 0), _halves(raw, 2), sc, mn)


def _values(b: Blocks, fmt: str) -> Tensor:
    """float32 [n, k], every operation rounded as in the format's definition."""
    q = (b.q.int() - _OFFSETS.get(fmt, 0)).float()
    d = b.d.float()[..., None]
    if b.sc is not None:
        q = q.unflatten(-1, (b.sc.shape[-1], -1))
        d = (d * b.sc.float())[..., None]
    value = d * q
    if b.mn is not None and b.m is not None:
        value = value - (b.m.float()[..., None] * b.mn.float())[..., None]
    elif b.m is not None:
        value = value + b.m.float()[..., None]
    return value.flatten(1)


def dequantize(raw: Tensor, fmt: str) -> Tensor:
    """File rows, uint8 [n, row_bytes], as float32 [n, k]."""
    dtype = FORMATS[fmt].float_dtype
    return raw.contiguous().view(dtype).float() if dtype is not None else _values(parse(raw, fmt), fmt)


def _rows16(t: Tensor) -> Tensor:
    """[16 * groups, units, ...] -> [groups, units, 16, ...]"""
    groups: Tensor = t.unflatten(0, (-1, 16))
    return groups.transpose(1, 2)


def _bytes(t: Tensor) -> Tensor:
    """Any [groups, units, ...] as its bytes, [groups, units, bytes]."""
    t = t.contiguous()
    return (t.view(torch.uint8) if t.dtype != torch.uint8 else t).flatten(2)


def _pack_block(q: Tensor, bits: int) -> Tensor:
    """[..., 16 rows, 32] -> [..., bytes of a block without scales]"""
    quads: Tensor = q.unflatten(-1, (8, 4)).transpose(-3, -2).flatten(-2)  # [..., 8 quads, 64]
    if bits == 8:
        return quads.flatten(-2)
    parts = [((quads[..., :4, :] & 15) | quads[..., 4:, :] << 4).flatten(-2)]
    if bits == 5:
        shift = torch.arange(8, dtype=torch.uint8, device=q.device)[:, None]
        parts.append(((quads >> 4) << shift).sum(-2, dtype=torch.uint8))
    if bits == 6:
        shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=q.device)[:, None]
        parts.append(((quads.unflatten(-2, (2, 4)) >> 4) << shift).sum(-2, dtype=torch.uint8).flatten(-2))
    return torch.cat(parts, -1)


def pack(raws: Sequence[Tensor], fmt: str, interleave: bool) -> Tensor:
    """File rows of matrices stacked along n (or two, alternating by 16 rows), in the packed layout: uint8 [bytes]."""
    if interleave:
        raw = torch.stack([r.unflatten(0, (-1, 16)) for r in raws], 1).flatten(0, 2)
    else:
        raw = torch.cat(list(raws))
    raw = torch.nn.functional.pad(raw, (0, 0, 0, -len(raw) % 16))
    dtype = FORMATS[fmt].float_dtype
    if dtype is not None:
        return _bytes(_rows16(raw.contiguous().view(dtype))).flatten()
    b = parse(raw, fmt)
    if b.sc is None:
        parts = [_pack_block(_rows16(b.q), _BITS[fmt]), _bytes(_rows16(b.d))]
        if b.m is not None:
            parts.append(_bytes(_rows16(b.m)))
        return torch.cat(parts, -1).flatten()
    q = _pack_block(_rows16(b.q.unflatten(-1, (8, 32))).transpose(2, 3), _BITS[fmt])
    parts = [_bytes(_rows16(b.d))]
    if b.m is not None:
        parts.append(_bytes(_rows16(b.m)))
    scales = [_rows16(s.view(torch.uint8)).transpose(2, 3) for s in (b.sc, b.mn) if s is not None]  # [groups, units, parts, 16]
    return torch.cat([*parts, torch.cat(scales, -1).flatten(2), q.flatten(2)], -1).flatten()


def _unpack_block(data: Tensor, bits: int) -> Tensor:
    """Inverse of _pack_block: [..., bytes] -> [..., 16, 32]"""
    if bits == 8:
        quads = data.unflatten(-1, (8, 64))
    else:
        quads = _bits(data[..., :256], 4).unflatten(-1, (4, 64)).flatten(-3, -2)
        if bits == 5:
            quads = quads | _bits(data[..., 256:320], 1) << 4
        if bits == 6:
            quads = quads | _bits(data[..., 256:384].unflatten(-1, (2, 64)), 2).flatten(-3, -2) << 4
    rows: Tensor = quads.unflatten(-1, (16, 4))
    return rows.transpose(-3, -2).flatten(-2)


def unpack(packed: Tensor, fmt: str, n: int, k: int) -> Tensor:
    """The packed matrix as float32 [n, k]."""
    f = FORMATS[fmt]
    if n == 0:
        return packed.new_empty(0, k, dtype=torch.float32)
    units = packed.view(-1, k // f.block, f.packed_bytes)
    if f.float_dtype is not None:
        return units.view(f.float_dtype).transpose(1, 2).flatten(0, 1)[:n].float()
    bits = _BITS[fmt]

    def rows(t: Tensor) -> Tensor:  # [groups, units, 16, ...] -> [n, units, ...]
        return t.transpose(1, 2).flatten(0, 1)[:n]

    def halves(at: int) -> Tensor:
        return rows(units[..., at : at + 32].contiguous().view(torch.float16))

    if f.block == 32:
        size = {4: 256, 5: 320, 8: 512}[bits]
        m = halves(size + 32) if fmt[3] == "1" else None
        return _values(Blocks(rows(_unpack_block(units[..., :size], bits)), halves(size), m), fmt)
    size = {4: 256, 5: 320, 6: 384}[bits]
    q = rows(_unpack_block(units[..., -8 * size :].unflatten(-1, (8, size)), bits).transpose(2, 3)).flatten(-2)
    if fmt == "Q6_K":
        sc = rows(units[..., 32:288].unflatten(-1, (16, 16)).transpose(2, 3)).view(torch.int8)
        return _values(Blocks(q, halves(0), sc=sc), fmt)
    scales = units[..., 64:320].unflatten(-1, (8, 2, 16)).movedim(-1, 2)  # [groups, units, 16, 8, 2]
    return _values(Blocks(q, halves(0), halves(32), rows(scales)[..., 0], rows(scales)[..., 1]), fmt)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 q [m, k] and float32 d [m, k / 32], as csrc/kernels/quant/linear.h defines them; always from float32."""
    blocks = x.float().unflatten(1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    finite = blocks.isfinite().all(-1, keepdim=True)
    live = finite & (largest >= 2.0**-120)
    inverse = torch.full_like(largest, 127.0) / largest  # 127.0 / largest would be 127 times a reciprocal, rounded twice
    q = torch.where(live, (blocks * inverse).round(), 0.0)
    d = torch.where(live, largest / 127.0, torch.where(finite, 0.0, torch.nan))
    return q.to(torch.int8).flatten(1), d[..., 0]


def linear(x: Tensor, packed: Tensor, fmt: str, n: int, bias: Tensor | None = None, residual: Tensor | None = None, gate: str = "none") -> Tensor:
    """x [m, k] times the packed matrix, in x's dtype, with activations rounded to int8 where the weights are quantised."""
    k = x.shape[1]
    w = unpack(packed, fmt, n, k).to(x.dtype)
    if FORMATS[fmt].float_dtype is None:
        q, d = quantize_activations(x)
        x = (q.to(x.dtype).unflatten(1, (-1, 32)) * d.to(x.dtype)[..., None]).flatten(1)
    y = x @ w.T
    if bias is not None:
        y = y + bias
    if gate != "none":
        a, up = y.unflatten(1, (-1, 2, 16)).unbind(2)
        act = torch.nn.functional.silu(a) if gate == "silu" else torch.nn.functional.gelu(a, approximate="tanh")
        y = (act * up).flatten(1)
    return y if residual is None else y + residual


def embedding(ids: Tensor, packed: Tensor, fmt: str, n: int, k: int, scale: float = 1.0) -> Tensor:
    """Rows `ids` of the packed matrix, times scale; zeros for an id out of range."""
    legal = (ids >= 0) & (ids < n)
    rows = unpack(packed, fmt, n, k)[torch.where(legal, ids, 0).long()]
    return torch.where(legal[:, None], rows * scale, 0.0)
