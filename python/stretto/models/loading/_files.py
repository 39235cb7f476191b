"""What the file readers share: mapping, bounded JSON, error texts."""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from stretto.errors import ModelFileError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def shown(value: object) -> str:
    """``repr`` for an error message, cut to 80 characters: a name in a hostile file may be megabytes long."""
    if isinstance(value, str | bytes):
        value = value[:80]
    elif isinstance(value, int) and value.bit_length() > 256:  # printing a number takes time quadratic in its length
        return f"an integer of {value.bit_length()} bits"
    elif isinstance(value, list | tuple | dict | np.ndarray) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} items"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def fail(path: Path, field: str, value: object, expected: str) -> NoReturn:
    """Raise the ModelFileError for one field of a file."""
    raise ModelFileError(f"{path}: {field}: {shown(value)}, expected {expected}")


def map_file(path: Path) -> tuple[mmap.mmap, int]:
    """Map a regular file read-only; returns (map, size in bytes). ModelFileError if it is no regular file or empty."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking: opening a FIFO must not hang
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            fail(path, "mode", stat.filemode(status.st_mode), "a regular file")
        if status.st_size == 0:
            fail(path, "file size", 0, "at least one byte")
        return mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ), status.st_size
    finally:
        os.close(fd)


def forget(data: npt.NDArray[np.uint8]) -> None:
    """Let go of the memory behind a view of a mapped file whose bytes have been used; reading it again reads the file again."""
    owner: Any = data
    while isinstance(owner, np.ndarray):
        owner = owner.base
    mapped = owner.obj if isinstance(owner, memoryview) else owner
    if not isinstance(mapped, mmap.mmap) or data.nbytes == 0:
        return
    start = data.ctypes.data - np.frombuffer(mapped, np.uint8, 1).ctypes.data
    first = start // mmap.PAGESIZE * mmap.PAGESIZE  # pages shared with a neighbour are read once more by it
    mapped.madvise(mmap.MADV_DONTNEED, first, start + data.nbytes - first)


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole regular file of at most ``limit`` bytes. ModelFileError otherwise."""
    buffer, size = map_file(path)
    with buffer:
        if size > limit:
            fail(path, "file size", size, f"at most {limit}")
        return buffer[:]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} occurs twice")
    return items


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_json_object(raw: bytes, path: Path, field: str, *, max_items: int) -> dict[str, Any]:
    """Parse a JSON object. ModelFileError if it is none, repeats a key, or holds more than ``max_items`` values.

    The values are counted by their separators before parsing: a list of ones takes 30 times its bytes as Python objects.
    """
    items = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if items > max_items:
        fail(path, f"{field} values", items, f"at most {max_items}")
    try:
        text = raw.decode()
        parsed = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        if _SURROGATE.search(text):  # half a pair is no text: it could be neither printed nor tokenised later
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # ValueError covers JSON, UTF-8 and integers of more than 4,300 digits
        raise ModelFileError(f"{path}: {field}: not valid JSON: {shown(str(error))}") from None
    if not isinstance(parsed, dict):
        fail(path, field, parsed, "a JSON object")
    return parsed
