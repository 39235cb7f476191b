"""The n-gram trie behind Lookahead decoding: what the running prompt says and what answers said before."""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from stretto.errors import ModelFileError
from stretto.ops import _backend

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]
Mode = Literal["mix", "input", "output"]
Shape = Literal["tree", "one"]

_MODES = ("mix", "input", "output")
_SHAPES = ("tree", "one")
_NO_REQUEST = -(2**63)

_MAGIC = b"strtrie\0"
_VERSION = 1
# magic, version, vocabulary, tokens below a root, reserved 0, payload words, digests of the fingerprint and of the payload
_HEADER = struct.Struct("<8sIIIIQ32s32s")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


class NgramTrie:
    """Counts n-grams of prompts, for one request each, and of outputs, for good; drafts continuations from them.

    Args:
        branch_length: deepest draft, 1 to 128.
        max_query_length: how many of the last tokens are matched, 1 to 16.
        max_bytes: of everything held. Beyond it whole trees of outputs go, least recently used roots first.
        vocab_size: token ids are below it.
        fingerprint: names the tokenizer; a file saved under another one is refused by load.
        eos: an output ends before the first of these tokens.
        stop_tokens: too common to start an output branch, or to be looked up alone.
        max_tree_nodes: a root with more n-grams than this is squeezed when a request ends: counts above one are halved,
            the rest is dropped.
    Safe to use from many threads; the interpreter lock is released while it works.
    Raises: ValueError naming the argument; NotImplementedError where the native module is missing.
    Source: arXiv 2312.12728.
    """

    def __init__(
        self,
        branch_length: int = 12,
        max_bytes: int = 256 << 20,
        vocab_size: int = 2**31 - 1,
        *,
        fingerprint: str = "",
        max_query_length: int = 2,
        eos: Sequence[int] = (),
        stop_tokens: Sequence[int] = (),
        max_tree_nodes: int = 512,
    ) -> None:
        _in_range("branch_length", branch_length, 1, 128)
        _in_range("max_query_length", max_query_length, 1, 16)
        _in_range("max_bytes", max_bytes, 1 << 16, 1 << 40)
        _in_range("vocab_size", vocab_size, 1, 2**31 - 1)
        _in_range("max_tree_nodes", max_tree_nodes, 1, 2**31 - 1)
        for name, tokens in (("eos", eos), ("stop_tokens", stop_tokens)):
            for token in tokens:
                _in_range(name, token, 0, vocab_size - 1)
        if _backend._C is None:
            raise NotImplementedError(f"NgramTrie: needs the native module, and {_backend.missing_reason}; decode='ngram' works without it")
        self.branch_length = branch_length
        self.max_query_length = max_query_length
        self.max_bytes = max_bytes
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self._native = _backend._C.NgramTrie(
            branch_length=branch_length, max_query_length=max_query_length, max_bytes=max_bytes, vocab_size=vocab_size,
            max_tree_nodes=max_tree_nodes, eos=list(eos), stop_tokens=list(stop_tokens),
        )  # fmt: skip

    @property
    def depth(self) -> int:
        """Tokens counted below each root."""
        return self.branch_length + self.max_query_length - 1

    def insert(self, tokens: Ids, kind: Literal["input", "output"] = "output", request: int | None = None) -> None:
        """Count the n-grams of a text.

        Args:
            tokens: ids, a list or an integer array.
            kind: "input": the prompt of `request`, found by its queries only; the first token (BOS) is left out.
                "output": with a request, the next tokens of its answer, counted as they come; without one, a whole
                text.
        Raises: ValueError("insert: argument: got, expected"), with nothing counted.
        """
        ids = self._ids("insert", tokens)
        if kind == "input":
            if request is None:
                raise ValueError("insert: request: None, expected the request that the input belongs to")
            self._native.insert_input(request, ids)
        elif kind == "output":
            if request is None:
                self._native.insert_output(ids)
            else:
                self._native.extend_output(request, ids)
        else:
            raise ValueError(f"insert: kind: {kind!r}, expected 'input' or 'output'")

    def query(
        self,
        suffix: Sequence[int],
        budget: int = 64,
        max_depth: int | None = None,
        mode: Mode = "mix",
        request: int | None = None,
        shape: Shape = "tree",
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Draft what may follow.

        Args:
            suffix: the last tokens, at least one; no more than max_query_length of them are used, longest match first.
            budget: most nodes, the root included.
            max_depth: deepest node, at most branch_length (None: that).
            mode: "mix": the request's prompt wins, outputs break ties, half of the nodes by outputs alone; "input" or
                "output": that side only.
            request: whose prompt to use.
            shape: "tree", or "one": always the best child, a chain.
        Returns: tokens and parent, [nodes] int32 each. Node 0 is suffix[-1], parent[0] = -1, parent[i] < i;
            depth-first, the likelier child first. The root alone when nothing is known.
        Raises: ValueError("query: argument: got, expected").
        """
        if budget < 1:
            raise ValueError(f"query: budget: {budget}, expected at least 1")
        if max_depth is not None and max_depth < 0:
            raise ValueError(f"query: max_depth: {max_depth}, expected at least 0")
        if mode not in _MODES:
            raise ValueError(f"query: mode: {mode!r}, expected one of {', '.join(_MODES)}")
        if shape not in _SHAPES:
            raise ValueError(f"query: shape: {shape!r}, expected one of {', '.join(_SHAPES)}")
        draft: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] = self._native.query(
            suffix[-self.max_query_length :],
            min(budget, 65536),
            self.branch_length if max_depth is None else min(max_depth, self.branch_length),
            _MODES.index(mode),
            _SHAPES.index(shape),
            _NO_REQUEST if request is None else request,
        )
        return draft

    def release(self, request: int) -> None:
        """Forget the prompt of `request` and close its output; trees that have grown too large are squeezed."""
        self._native.release(request)

    def count(self, ngram: Ids, request: int | None = None) -> tuple[int, int]:
        """How often an n-gram of two or more tokens stands in the prompt of `request`, and in outputs."""
        ids = self._ids("count", ngram)
        if ids.size < 2:
            raise ValueError(f"count: ngram: {ids.size} tokens, expected at least 2")
        found: tuple[int, int] = self._native.count(ids, _NO_REQUEST if request is None else request)
        return found

    def stats(self) -> dict[str, int]:
        """nodes, trees, bytes, requests (live); evicted_trees, squeezed_trees; queries, hits (of them), drafted (nodes)."""
        numbers: dict[str, int] = self._native.stats()
        return numbers

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the output counts to `path`, replacing it at once or not at all. Prompts are not saved."""
        payload = self._native.dump().astype("<i4").tobytes()
        header = _HEADER.pack(
            _MAGIC,
            _VERSION,
            self.vocab_size,
            self.depth,
            0,
            len(payload) // 4,
            _digest(self.fingerprint.encode()),
            _digest(payload),
        )
        target = Path(path)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, delete=False) as file:
            try:
                file.write(header)
                file.write(payload)
                file.close()
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace the output counts by those of a file that save wrote.

        Raises: ModelFileError naming the file, the field and its value for a file that is no trie, of another version,
            vocabulary or tokenizer, larger than max_bytes, truncated, altered, or contradictory; the trie is unchanged
            then. OSError as usual.
        """
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size:
                raise ModelFileError(f"{path}: size: {size} bytes, expected at least {_HEADER.size}")
            magic, version, vocab_size, depth, reserved, words, fingerprint, digest = _HEADER.unpack(head)
            expected: tuple[tuple[str, object, object], ...] = (
                ("magic", magic, _MAGIC),
                ("version", version, _VERSION),
                ("vocabulary", vocab_size, self.vocab_size),
                ("reserved", reserved, 0),
                ("tokenizer fingerprint", fingerprint.hex(), _digest(self.fingerprint.encode()).hex()),
            )
            for field, got, want in expected:
                if got != want:
                    raise ModelFileError(f"{path}: {field}: {got!r}, expected {want!r}")
            if not 1 <= depth <= self.depth:
                raise ModelFileError(f"{path}: depth: {depth}, expected 1 to {self.depth}")
            if words % 3 or _HEADER.size + 4 * words != size:
                raise ModelFileError(f"{path}: words: {words}, expected {(size - _HEADER.size) / 4} and a multiple of 3")
            if 4 * words > self.max_bytes:
                raise ModelFileError(f"{path}: words: {words}, expected at most {self.max_bytes // 4} (max_bytes)")
            payload = file.read(4 * words)
        if _digest(payload) != digest:
            raise ModelFileError(f"{path}: checksum: {_digest(payload).hex()}, expected {digest.hex()}")
        problem = self._native.restore(np.frombuffer(payload, dtype="<i4").astype(np.int32))
        if problem:
            raise ModelFileError(f"{path}: {problem}")

    def _ids(self, op: str, tokens: Ids) -> npt.NDArray[np.int32]:
        ids = np.asarray(tokens)
        if ids.size == 0 and ids.ndim == 1:
            return np.zeros(0, np.int32)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"{op}: tokens: {ids.dtype} {list(ids.shape)}, expected a list of integers")
        if (bad := (ids < 0) | (ids >= self.vocab_size)).any():
            raise ValueError(f"{op}: tokens: {ids[bad][0]}, expected 0 to {self.vocab_size - 1}")
        return np.ascontiguousarray(ids, dtype=np.int32)


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"NgramTrie: {name}: {value!r}, expected an integer of {low} to {high}")
