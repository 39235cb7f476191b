"""safetensors files, single or sharded: validate the header and the index, then map.

Layout: u64 header size, JSON header {name: {dtype, shape, data_offsets}}, data. The tensors must tile the data without hole or
overlap. A shard index maps each tensor to a file name; the files must lie in the directory itself.
Source: the format description in huggingface/safetensors README.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from stretto.errors import ModelFileError
from stretto.models.loading._files import fail, map_file, parse_json_object, read_bytes, shown
from stretto.models.loading.gguf import Bytes, TensorInfo

_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
           "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_INDEX_BYTES = 64 << 20
MAX_TENSORS = 65_536
MAX_SHARDS = 1_024
MAX_RANK = 8
_MAX_ITEMS = MAX_TENSORS * 16  # separators in a header of that many tensors of rank 8
INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"


class SafetensorsFiles:
    """Validated safetensors of one model. The files stay mapped while this object or an array taken from it lives."""

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], data: dict[str, Bytes]) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self._data = data  # per tensor, the whole mapped file it lies in

    def raw(self, name: str) -> Bytes:
        """Bytes of tensor ``name``: uint8 [nbytes], read-only view of the mapped file. ModelFileError if there is no such tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.path}: tensor {name!r}: missing")
        return self._data[name][info.offset : info.offset + info.nbytes]


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _read_record(path: Path, name: str, record: Any, data_bytes: int) -> tuple[int, int, tuple[int, ...], str]:
    """Check one header entry; returns (begin, end, shape, dtype)."""
    field = f"tensor {shown(name)}"
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        fail(path, field, record, "an object with dtype, shape and data_offsets")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        fail(path, field + " dtype", dtype, "one of " + ", ".join(_DTYPES))
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(dim) for dim in shape):
        fail(path, field + " shape", shape, f"a list of at most {MAX_RANK} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        fail(path, field + " data_offsets", offsets, "two offsets")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        fail(path, field + " data_offsets", offsets, f"begin <= end <= {data_bytes}, the bytes of data")
    nbytes = _DTYPES[dtype]
    for dim in shape:
        nbytes *= dim
    if nbytes != end - begin:
        fail(path, field + " data_offsets", offsets, f"{nbytes} bytes for {dtype} {shown(shape)}")
    return begin, end, tuple(shape), dtype


def _read_file(path: Path) -> tuple[dict[str, TensorInfo], Bytes]:
    buffer, size = map_file(path)
    if size < 8:
        fail(path, "file size", size, "at least 8 bytes")
    header_bytes = int.from_bytes(buffer[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, size - 8):
        fail(path, "header size", header_bytes, f"at most {min(MAX_HEADER_BYTES, size - 8)}")
    raw = buffer[8 : 8 + header_bytes]
    if not raw.startswith(b"{"):
        fail(path, "header", raw[:16], "a JSON object")
    header = parse_json_object(raw, path, "header", max_items=_MAX_ITEMS)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        fail(path, "__metadata__", metadata, "an object of strings")
    if len(header) > MAX_TENSORS:
        fail(path, "tensor count", len(header), f"at most {MAX_TENSORS}")
    base, tensors = 8 + header_bytes, {}
    position = 0
    records = ((*_read_record(path, name, record, size - base), name) for name, record in header.items())
    for begin, end, shape, dtype, name in sorted(records):
        if begin != position:
            kind = "overlap" if begin < position else "hole"
            fail(path, f"tensor {shown(name)} data_offsets", [begin, end], f"begin {position} ({kind} after the tensor before)")
        position = end
        tensors[name] = TensorInfo(name, shape, dtype, base + begin, end - begin)
    if position != size - base:
        fail(path, "data size", size - base, f"{position}, the end of the last tensor")
    return tensors, np.frombuffer(buffer, np.uint8)


def _inside(directory: Path, name: object, index: Path) -> Path:
    """Path of the shard ``name``; ModelFileError unless it is a plain file name whose target lies in the directory.

    A download cache keeps its files in ../../blobs and links to them from snapshots/REVISION; that one target is allowed.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or any(char in name for char in "/\\\0") or len(name) > 255:
        fail(index, "weight_map file", name, "a plain file name")
    root = directory.resolve()
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    try:
        target = (root / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        fail(index, "weight_map file", name, "an existing file in the directory of the index")
    if target.parent not in allowed:
        fail(index, "weight_map file", name, "a file in the directory of the index, not a link out of it")
    return target


def _read_sharded(index: Path) -> SafetensorsFiles:
    parsed = parse_json_object(read_bytes(index, MAX_INDEX_BYTES), index, "index", max_items=_MAX_ITEMS)
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not 0 < len(weight_map) <= MAX_TENSORS:
        fail(index, "weight_map", weight_map, f"an object of 1 to {MAX_TENSORS} tensors")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            fail(index, f"weight_map {shown(name)}", shard, "a file name")
    shards = sorted(set(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        fail(index, "weight_map files", len(shards), f"at most {MAX_SHARDS}")
    paths = {shard: _inside(index.parent, shard, index) for shard in shards}
    tensors: dict[str, TensorInfo] = {}
    data: dict[str, Bytes] = {}
    for shard, path in paths.items():
        found, mapped = _read_file(path)
        for name, info in found.items():
            if name in tensors:
                fail(index, f"tensor {shown(name)}", shard, "a tensor to be in one file only")
            if weight_map.get(name) != shard:
                fail(index, f"weight_map {shown(name)}", weight_map.get(name), f"{shown(shard)}, where the tensor is")
            tensors[name], data[name] = info, mapped
    for name, shard in weight_map.items():
        if name not in tensors:
            fail(index, f"weight_map {shown(name)}", shard, "a file that holds this tensor")
    return SafetensorsFiles(index, tensors, data)


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsFiles:
    """Validate and map the safetensors of a model.

    Args:
        path: a .safetensors file, a shard index (.json), or a directory holding model.safetensors.index.json, model.safetensors
            or exactly one other .safetensors file.
    Raises: ModelFileError naming the file, the field and its value, before anything large is allocated.
    """
    path = Path(path)
    if path.is_dir():
        single = sorted(path.glob("*.safetensors"))
        if (path / INDEX_NAME).exists():
            path = path / INDEX_NAME
        elif (path / SINGLE_NAME).exists() or len(single) == 1:
            name = SINGLE_NAME if (path / SINGLE_NAME).exists() else single[0].name
            path = _inside(path, name, path)
        else:
            fail(path, "weights", f"{len(single)} .safetensors files", f"{INDEX_NAME}, {SINGLE_NAME} or one .safetensors file")
    if path.suffix == ".json":
        return _read_sharded(path)
    tensors, data = _read_file(path)
    return SafetensorsFiles(path, tensors, dict.fromkeys(tensors, data))
