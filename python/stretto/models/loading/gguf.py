"""GGUF files: validate everything, then map. The file is hostile until proved otherwise.

Layout (all little-endian): magic "GGUF", u32 version, u64 tensor count, u64 key count, the keys, the tensor records, padding to
the alignment, tensor data. A string is u64 length + bytes; an array is u32 element type + u64 count + elements.
Every count, length and offset is compared with the bytes that are really left before anything of that size is made, so a lying
header costs nothing. Numeric arrays and tensors are views of the mapped file; string arrays are cut once and decoded when used.
Source: the format description in ggml-org/ggml docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, overload

import numpy as np
import numpy.typing as npt

from stretto.errors import ModelFileError
from stretto.models.loading._files import fail, map_file

Bytes = npt.NDArray[np.uint8]

# Type number in the file -> (name, values per block, bytes per block). Types removed from the format (4, 5, 31-33, 36-38) are absent.
BLOCK_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType({
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
})  # fmt: skip
_SCALARS: dict[int, tuple[str, int]] = {
    0: ("<u1", 1), 1: ("<i1", 1), 2: ("<u2", 2), 3: ("<i2", 2), 4: ("<u4", 4), 5: ("<i4", 4), 6: ("<f4", 4), 7: ("?", 1),
    10: ("<u8", 8), 11: ("<i8", 8), 12: ("<f8", 8),
}  # fmt: skip
_UNPACK = {kind: struct.Struct({"<u1": "<B", "<i1": "<b", "<u2": "<H", "<i2": "<h", "<u4": "<I", "<i4": "<i", "<f4": "<f", "?": "<B",
                                "<u8": "<Q", "<i8": "<q", "<f8": "<d"}[code]) for kind, (code, _) in _SCALARS.items()}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

MAX_TENSORS = MAX_KEYS = 65_536
MAX_KEY_BYTES = 65_536
MAX_NAME_BYTES = 256  # the format says 64; converters for vision models have gone beyond
MAX_STRING_BYTES = 16 << 20
MAX_STRINGS = 2 << 20  # in one array; the largest vocabularies have 262,144 tokens and about 515,000 merges
MAX_RANK = 4
MAX_ALIGNMENT = 4096


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. ``shape`` is in torch order (rows first), ``offset`` counts from the start of the file, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class StringArray(Sequence[str]):
    """Array of strings of a GGUF file: cut from the file at once, decoded together on first use (ModelFileError if not UTF-8)."""

    def __init__(self, raw: list[bytes], field: str) -> None:
        self.raw, self._field = raw, field

    @cached_property
    def _decoded(self) -> list[str]:
        try:
            return [item.decode() for item in self.raw]
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{self._field}: {error.object[:32]!r}, expected UTF-8") from None

    def __len__(self) -> int:
        return len(self.raw)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._decoded[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded)


class GgufFile:
    """A validated GGUF file. It stays mapped while this object or any array taken from it lives; do not change the file meanwhile."""

    def __init__(self, path: Path, data: Bytes, version: int, metadata: dict[str, Any], tensors: dict[str, TensorInfo]):
        self.path, self.version = path, version
        self.metadata: Mapping[str, Any] = MappingProxyType(metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self._data = data

    def raw(self, name: str) -> Bytes:
        """Bytes of tensor ``name``: uint8 [nbytes], read-only view of the mapped file. ModelFileError if there is no such tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.path}: tensor {name!r}: missing")
        return self._data[info.offset : info.offset + info.nbytes]


class _Reader:
    """Cursor over the header. Every method checks the bytes left before it takes them."""

    def __init__(self, path: Path, buffer: mmap.mmap, size: int) -> None:
        self.path, self.buffer, self.end, self.pos = path, buffer, size, 0

    def fail(self, field: str, value: object, expected: str) -> NoReturn:
        fail(self.path, field, value, expected)

    def unpack(self, kind: struct.Struct, field: str) -> Any:
        if kind.size > self.end - self.pos:
            self.fail(field, f"file ends at byte {self.end}", f"{kind.size} more bytes at byte {self.pos}")
        (value,) = kind.unpack_from(self.buffer, self.pos)
        self.pos += kind.size
        return value

    def count(self, field: str, limit: int, item_bytes: int) -> int:
        """A u64 count of items that take at least ``item_bytes`` each."""
        value = int(self.unpack(_U64, field))
        if value > limit:
            self.fail(field, value, f"at most {limit}")
        if value * item_bytes > self.end - self.pos:
            self.fail(field, value, f"at most {(self.end - self.pos) // item_bytes}: {self.end - self.pos} bytes are left")
        return value

    def string(self, field: str, limit: int) -> str:
        size = self.count(field + " length", limit, 1)
        raw = self.buffer[self.pos : self.pos + size]
        self.pos += size
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(field, raw[:32], "UTF-8")

    def string_array(self, field: str) -> StringArray:
        # The one loop that is long in a good file (100,000 to 800,000 turns), hence the local names and the single comparison.
        count = self.count(field + " array count", MAX_STRINGS, 8)
        buffer, pos, end, length_at = self.buffer, self.pos, self.end, _U64.unpack_from
        items: list[bytes] = []
        append = items.append
        for index in range(count):
            if end - pos < 8:
                self.fail(f"{field}[{index}]", f"file ends at byte {end}", f"8 more bytes at byte {pos}")
            (size,) = length_at(buffer, pos)
            start = pos + 8
            pos = start + size
            if pos > end or size > MAX_STRING_BYTES:
                self.fail(f"{field}[{index}] length", size, f"at most {min(end - start, MAX_STRING_BYTES)}")
            append(buffer[start:pos])
        self.pos = pos
        return StringArray(items, f"{self.path}: {field}")

    def numbers(self, field: str, kind: int) -> npt.NDArray[Any]:
        code, item_bytes = _SCALARS[kind]
        count = self.count(field + " array count", self.end, item_bytes)
        values = np.frombuffer(self.buffer, np.dtype(code), count, self.pos) if count else np.empty(0, np.dtype(code))
        self.pos += count * item_bytes
        if kind == _BOOL and count and values.view(np.uint8).max() > 1:
            self.fail(field, int(values.view(np.uint8).max()), "booleans that are 0 or 1")
        return values

    def value(self, field: str) -> Any:
        kind = self.unpack(_U32, field + " type")
        if kind == _STRING:
            return self.string(field, MAX_STRING_BYTES)
        if kind == _ARRAY:
            item = self.unpack(_U32, field + " array type")
            if item == _STRING:
                return self.string_array(field)
            if item not in _SCALARS:
                self.fail(field + " array type", item, "a number, boolean or string type (arrays do not nest)")
            return self.numbers(field, item)
        if kind not in _SCALARS:
            self.fail(field + " type", kind, "a value type 0 to 12")
        value = self.unpack(_UNPACK[kind], field)
        if kind != _BOOL:
            return value
        if value > 1:
            self.fail(field, value, "a boolean that is 0 or 1")
        return bool(value)


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = reader.string(f"key {index}", MAX_KEY_BYTES)
        if not key:
            reader.fail(f"key {index}", key, "a name")
        if key in metadata:
            reader.fail(f"key {index}", key, "a name that did not occur before")
        metadata[key] = reader.value(key if len(key) <= 80 else key[:77] + "...")
    return metadata


def _read_tensor(reader: _Reader, index: int) -> tuple[str, tuple[int, ...], str, int, int]:
    """One record: (name, shape rows first, type, bytes, offset from the start of the data)."""
    name = reader.string(f"tensor {index} name", MAX_NAME_BYTES)
    if not name:
        reader.fail(f"tensor {index} name", name, "a name")
    field = f"tensor {name[:80]!r}"
    rank = reader.unpack(_U32, field + " rank")
    if not 1 <= rank <= MAX_RANK:
        reader.fail(field + " rank", rank, f"1 to {MAX_RANK}")
    dims = [int(reader.unpack(_U64, f"{field} dimension {axis}")) for axis in range(rank)]
    kind = reader.unpack(_U32, field + " type")
    offset = int(reader.unpack(_U64, field + " offset"))
    if kind not in BLOCK_TYPES:
        reader.fail(field + " type", kind, "a tensor type this version knows")
    dtype, block, block_bytes = BLOCK_TYPES[kind]
    blocks = 1  # Python integers do not overflow; the size is compared with the file before it is used
    for axis, dim in enumerate(dims):
        if dim < 1:
            reader.fail(f"{field} dimension {axis}", dim, "at least 1")
        blocks *= dim
    if dims[0] % block:
        reader.fail(f"{field} dimension 0", dims[0], f"a multiple of {block}, the block of {dtype}")
    nbytes = blocks // block * block_bytes
    if nbytes > reader.end:
        reader.fail(f"{field} size of shape {dims}", nbytes, f"at most {reader.end} bytes, the size of the file")
    return name, tuple(reversed(dims)), dtype, nbytes, offset


def _place(reader: _Reader, records: list[tuple[str, tuple[int, ...], str, int, int]], alignment: int) -> dict[str, TensorInfo]:
    """Turn relative offsets into absolute ones: aligned, inside the file, disjoint."""
    base = -(-reader.pos // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, dtype, nbytes, offset in records:
        field = f"tensor {name[:80]!r}"
        if name in tensors:
            reader.fail(field, name, "a name that did not occur before")
        if offset % alignment:
            reader.fail(field + " offset", offset, f"a multiple of the alignment {alignment}")
        if base + offset + nbytes > reader.end:
            reader.fail(field + " offset", offset, f"{nbytes} bytes from there to lie inside the file of {reader.end} bytes")
        tensors[name] = TensorInfo(name, shape, dtype, base + offset, nbytes)
    last_end, last_name = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < last_end:
            reader.fail(f"tensor {info.name[:80]!r} offset", info.offset - base, f"no overlap with tensor {last_name[:80]!r}")
        last_end, last_name = info.offset + info.nbytes, info.name
    return tensors


def read_gguf(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> GgufFile:
    """Validate and map a GGUF file of version 2 or 3.

    Args:
        path: a regular file.
        max_bytes: refuse a file whose tensors take more than this many bytes together.
    Returns: metadata (int, float, bool, str, numpy view, StringArray), tensor records, and views of the tensor bytes.
    Raises: ModelFileError naming the file, the field and its value, before anything large is allocated.
    """
    path = Path(path)
    buffer, size = map_file(path)
    reader = _Reader(path, buffer, size)
    magic = buffer[:4]
    if magic != b"GGUF":
        reader.fail("magic", magic, "b'GGUF'")
    reader.pos = 4
    version = reader.unpack(_U32, "version")
    if version not in (2, 3):
        swapped = version in (2 << 24, 3 << 24)
        reader.fail("version", version, "2 or 3" + (" (this file is big-endian: convert it on a little-endian machine)" if swapped else ""))
    num_tensors = reader.count("tensor count", MAX_TENSORS, 8 + 1 + 4 + 8 + 4 + 8)
    num_keys = reader.count("key count", MAX_KEYS, 8 + 1 + 4 + 1)
    metadata = _read_metadata(reader, num_keys)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        reader.fail("general.alignment", alignment, f"a power of two from 8 to {MAX_ALIGNMENT}")
    tensors = _place(reader, [_read_tensor(reader, index) for index in range(num_tensors)], alignment)
    total = sum(info.nbytes for info in tensors.values())
    if max_bytes is not None and total > max_bytes:
        reader.fail("tensor bytes", total, f"at most max_bytes={max_bytes}")
    return GgufFile(path, np.frombuffer(buffer, np.uint8), version, metadata, tensors)
