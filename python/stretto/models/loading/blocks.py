"""Quantised block formats in numpy: the meaning of the bytes, and the exact quantisers of the simple ones.

A row of K values is K / block blocks laid end to end. Scales are little-endian float16. Sub-blocks and bit fields are as in the
GGUF format (ggml-org/llama.cpp, ggml-common.h); each function turns [blocks, bytes] uint8 into [blocks, values] float32 with the
same roundings as the reference, so results are equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from stretto.models.loading.gguf import BLOCK_TYPES, Bytes

Floats = npt.NDArray[np.float32]
# name -> (values per block, bytes per block)
BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType({name: (values, nbytes) for name, values, nbytes in BLOCK_TYPES.values()})


def _half(raw: Bytes) -> Floats:
    """[blocks, 2 n] bytes of float16 -> [blocks, n] float32."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[blocks, n] -> [blocks, 2 n]: the n low halves, then the n high halves."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _high_bits(raw: Bytes) -> Bytes:
    """[blocks, 4] -> [blocks, 32]: bit j of the little-endian word, for value j, at the place of value 16."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=-1, bitorder="little") << np.uint8(4)


def _f32(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<f4").astype(np.float32)


def _bf16(raw: Bytes) -> Floats:
    return (np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(raw: Bytes) -> Floats:
    return _half(raw[:, :2]) * raw[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(raw: Bytes) -> Floats:
    return _half(raw[:, :2]) * (_nibbles(raw[:, 2:]).astype(np.float32) - np.float32(8))


def _q4_1(raw: Bytes) -> Floats:
    return _half(raw[:, :2]) * _nibbles(raw[:, 4:]).astype(np.float32) + _half(raw[:, 2:4])


def _q5_0(raw: Bytes) -> Floats:
    values = _nibbles(raw[:, 6:]) | _high_bits(raw[:, 2:6])
    return _half(raw[:, :2]) * (values.astype(np.float32) - np.float32(16))


def _q5_1(raw: Bytes) -> Floats:
    values = _nibbles(raw[:, 8:]) | _high_bits(raw[:, 4:8])
    return _half(raw[:, :2]) * values.astype(np.float32) + _half(raw[:, 2:4])


def _k_scales(raw: Bytes) -> tuple[Bytes, Bytes]:
    """[blocks, 12] -> eight 6-bit scales and eight 6-bit minima.

    Bytes 0-3 and 4-7 hold the first four of each in their low six bits; bytes 8-11 hold the low nibbles of the last four, whose
    top two bits sit in the top of bytes 0-7.
    """
    low, mid, high = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=-1)
    return scales, minima


def _k_blocks(raw: Bytes, values: npt.NDArray[np.uint8]) -> Floats:
    """Common end of Q4_K and Q5_K: eight sub-blocks of 32 with scale d * sc and minimum dmin * m."""
    scales, minima = _k_scales(raw[:, 4:16])
    d = _half(raw[:, 0:2]) * scales.astype(np.float32)
    m = _half(raw[:, 2:4]) * minima.astype(np.float32)
    grouped = values.reshape(-1, 8, 32).astype(np.float32)
    return (d[:, :, None] * grouped - m[:, :, None]).reshape(-1, 256)


def _q4_k(raw: Bytes) -> Floats:
    return _k_blocks(raw, _nibbles(raw[:, 16:144].reshape(-1, 4, 32)))  # pairs of sub-blocks share 32 bytes


def _q5_k(raw: Bytes) -> Floats:
    # Bit s of byte j is the fifth bit of value j of sub-block s.
    fifth = (raw[:, 16:48, None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)
    return _k_blocks(raw, _nibbles(raw[:, 48:176].reshape(-1, 4, 32)).reshape(-1, 8, 32) | (fifth.swapaxes(1, 2) << np.uint8(4)))


def _q6_k(raw: Bytes) -> Floats:
    # Two halves of 128 values; in each, 64 bytes give the low nibbles (low halves of both 32-byte rows, then high halves) and 32
    # bytes the top two bits, two bits for each of the four groups of 32. One int8 scale for 16 values.
    low = _nibbles(raw[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    top = (raw[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    values = ((low | (top << 4)).astype(np.int8) - np.int8(32)).astype(np.float32).reshape(-1, 16, 16)
    scales = _half(raw[:, 208:210]) * raw[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[:, :, None] * values).reshape(-1, 256)


DEQUANTIZERS: Mapping[str, Callable[[Bytes], Floats]] = MappingProxyType({
    "F32": _f32, "F16": _half, "BF16": _bf16, "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
})  # fmt: skip
"""Formats this library reads. Each expands to at most 8 bytes of float32 per byte of file."""


def _inverse(scale: Floats) -> Floats:
    """1 / scale in float32; zero where the scale is zero, or so small (below 2^-128) that its inverse is infinite."""
    usable = np.abs(scale) > np.float32(2.0**-128)
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=usable)


def _pack_nibbles(values: Floats) -> Bytes:
    """[blocks, 32] numbers -> [blocks, 16]: value j in the low half of byte j, value j + 16 in the high half."""
    quants = np.trunc(values).clip(0, 15).astype(np.uint8)
    return quants[:, :16] | (quants[:, 16:] << np.uint8(4))


def _half_bytes(values: Floats) -> Bytes:
    if (np.abs(values) >= 65520).any():  # the first float32 that rounds to infinity
        raise ValueError(f"quantize: array: block scale {float(np.abs(values).max()):g}, expected at most 65504 (float16)")
    return values.astype("<f2").view(np.uint8)


def _to_q8_0(x: Floats) -> Bytes:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    whole = np.trunc(scaled)  # halves go away from zero; np.round would send them to even
    rounded = whole + np.trunc(np.float32(2) * (scaled - whole))
    return np.concatenate([_half_bytes(d), rounded.astype(np.int8).view(np.uint8)], axis=1)


def _to_q4_0(x: Floats) -> Bytes:
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)  # with its sign, mapped to -8
    d = largest / np.float32(-8)
    return np.concatenate([_half_bytes(d), _pack_nibbles(x * _inverse(d) + np.float32(8.5))], axis=1)


def _to_q4_1(x: Floats) -> Bytes:
    low = x.min(axis=1, keepdims=True)
    with np.errstate(over="ignore"):  # a range beyond float32 is refused as a scale beyond float16
        d = (x.max(axis=1, keepdims=True) - low) / np.float32(15)
    header = [_half_bytes(d), _half_bytes(low)]
    return np.concatenate([*header, _pack_nibbles((x - low) * _inverse(d) + np.float32(0.5))], axis=1)


QUANTIZERS: Mapping[str, Callable[[Floats], Bytes]] = MappingProxyType({"Q8_0": _to_q8_0, "Q4_0": _to_q4_0, "Q4_1": _to_q4_1})


def quantize_rows(array: npt.NDArray[Any], fmt: str) -> Bytes:
    """Quantise the last dimension of ``array`` in blocks of 32: float32 [..., K] -> uint8 [..., K / 32 * block bytes].

    Bit-equal to the reference quantiser of the format ("Q8_0", "Q4_0", "Q4_1").
    Raises: NotImplementedError for another format, ValueError if K is no multiple of 32 or a value is not finite.
    """
    if fmt not in QUANTIZERS:
        raise NotImplementedError(f"quantize: fmt: {fmt!r}, can be {', '.join(QUANTIZERS)} (others need a search for scales)")
    values = np.ascontiguousarray(array, dtype=np.float32)
    if values.ndim == 0 or values.shape[-1] % 32:
        raise ValueError(f"quantize: array: shape {values.shape}, expected rows that are a multiple of 32")
    if not np.isfinite(values).all():
        raise ValueError("quantize: array: not finite, expected finite values")
    rows = QUANTIZERS[fmt](values.reshape(-1, 32))
    return rows.reshape(*values.shape[:-1], -1)
