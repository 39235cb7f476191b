"""Paged keys and values: fixed pages, counted references, copy on write, and a prefix index.

Who may hold a page. Every page is in exactly one of three states: free; used by the sequences that `_refs` counts; or
published without a user, kept for later prompts until space is needed. A full page may be used and published at once;
published and shared pages are never written. The one invariant that eviction rests on: a sequence that holds a
published page holds the pages above it in the prefix tree too. So a page loses its last user after all pages below it,
and the least recently used order is leaf-first.
"""

from __future__ import annotations

import array
import os
from collections import OrderedDict
from collections.abc import Sequence as Run
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import stretto.ops as ops
from stretto.cache.prefix import PrefixIndex
from stretto.errors import OutOfPages
from stretto.ops.cache import CACHE_DTYPES

_MAX_SLOTS = 2**31  # slot ids are int32


@dataclass(frozen=True)
class CacheShape:
    """What one row of the cache is: keys and values of one token in every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int = 64  # the chunk in which attention walks keys; smaller pages share more and read slower
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "page_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"CacheShape: {name}: {value!r}, expected an integer of at least 1")
        if self.page_size > 256:
            raise ValueError(f"CacheShape: page_size: {self.page_size}, expected 1 to 256")
        if self.dtype not in CACHE_DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in CACHE_DTYPES)
            raise ValueError(f"CacheShape: dtype: {self.dtype}, expected one of {names}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one token over all layers, scales of int8 included."""
        values = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return values + (8 * self.num_layers * self.num_kv_heads if self.dtype == torch.int8 else 0)

    @property
    def page_bytes(self) -> int:
        return self.row_bytes * self.page_size


@dataclass(frozen=True)
class Ledger:
    """Where the pages are. Always total = free + used + cached."""

    total: int
    free: int
    used: int
    """Pages that at least one sequence holds."""
    shared: int
    """Of those, pages that more than one sequence holds."""
    published: int
    """Pages in the prefix index, used or not."""
    cached: int
    """Published pages that no sequence holds: evicted when space is needed."""
    sequences: int
    """Live sequences."""
    peak_used: int
    evicted: int
    """Pages evicted so far."""
    copied: int
    """Pages copied on write so far."""
    reused_tokens: int
    """Tokens that alloc found in the prefix index so far."""


class Sequence:
    """A handle on the rows of one token sequence, made by PagedCache.alloc and fork; its methods do the work."""

    __slots__ = ("_cache", "_pages", "_pins", "_published", "_reserved", "_salt", "length")

    def __init__(self, cache: PagedCache, pages: Run[int], length: int, salt: int, published: int) -> None:
        self._cache: PagedCache | None = cache
        self._pages = array.array("i", pages)
        self._reserved = 0  # rows behind length that may be written
        self._published = published  # leading pages known to be in the prefix index
        self._pins = 0
        self._salt = salt
        self.length = length
        """Committed rows."""

    @property
    def pages(self) -> list[int]:
        """Page ids in order; those behind the committed rows are reserve."""
        return list(self._pages)

    @property
    def reserved(self) -> int:
        """Rows behind `length` that may be written and committed."""
        return self._reserved

    @property
    def pinned(self) -> bool:
        return self._pins > 0

    @property
    def freed(self) -> bool:
        return self._cache is None

    def __repr__(self) -> str:
        state = "freed" if self.freed else f"length={self.length}, pages={self.pages}, reserved={self._reserved}"
        return f"Sequence({state})"


class PagedCache:
    """Keys and values of many sequences in pages of `shape.page_size` rows.

    Args:
        shape: what a row is.
        num_pages: pages of all sequences together. The system hands the memory out as pages are first written.
    Attributes:
        k_pages[layer]: [pages, kv_heads, head_dim, page_size] of shape.dtype: a page's keys lie side by side, as a dot
            product wants them.
        v_pages[layer]: [pages, kv_heads, page_size, head_dim].
        k_scales[layer], v_scales[layer]: [pages, kv_heads, page_size] float32 for int8 (value = int8 * scale), else
            None.
    Raises: ValueError naming the argument for a count below 1, more slots than int32 holds, or more bytes than the
        machine has.
    Not thread-safe: one thread, the engine's, calls it.
    Source: arXiv 2309.06180 (pages), 2312.07104 (prefix tree).
    """

    def __init__(self, shape: CacheShape, num_pages: int) -> None:
        if isinstance(num_pages, bool) or not isinstance(num_pages, int) or num_pages < 1:
            raise ValueError(f"PagedCache: num_pages: {num_pages!r}, expected an integer of at least 1")
        if num_pages * shape.page_size > _MAX_SLOTS:
            raise ValueError(f"PagedCache: num_pages: {num_pages}, expected at most {_MAX_SLOTS // shape.page_size} (slot ids are int32)")
        memory, wanted = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), num_pages * shape.page_bytes
        if wanted > memory:
            raise ValueError(
                f"PagedCache: num_pages: {num_pages} pages of {shape.page_bytes} bytes are {wanted / 2**30:.1f} GiB, "
                f"expected at most the {memory / 2**30:.1f} GiB of this machine: {memory // shape.page_bytes} pages"
            )
        self.shape = shape
        self.num_pages = num_pages
        quantised = shape.dtype == torch.int8
        self._k = self._planes(shape.head_dim, shape.page_size, dtype=shape.dtype)
        self._v = self._planes(shape.page_size, shape.head_dim, dtype=shape.dtype)
        self._k_scales = self._planes(shape.page_size, dtype=torch.float32) if quantised else None
        self._v_scales = self._planes(shape.page_size, dtype=torch.float32) if quantised else None
        self.k_pages: tuple[Tensor, ...] = self._k.unbind(0)
        self.v_pages: tuple[Tensor, ...] = self._v.unbind(0)
        self.k_scales: tuple[Tensor | None, ...] = self._k_scales.unbind(0) if self._k_scales is not None else (None,) * shape.num_layers
        self.v_scales: tuple[Tensor | None, ...] = self._v_scales.unbind(0) if self._v_scales is not None else (None,) * shape.num_layers

        self._refs = array.array("i", bytes(4 * num_pages))  # sequences holding each page
        self._recycled: list[int] = []  # free pages, last in first out: those are still in the caches of the CPU
        self._fresh = 0  # pages from here on were never used
        self._index = PrefixIndex(shape.page_size)
        self._unused: OrderedDict[int, None] = OrderedDict()  # published, without a user; least recently used first
        self._live = 0
        self._shared = 0
        self._peak_used = 0
        self._evicted = 0
        self._copied = 0
        self._reused_tokens = 0

    def _planes(self, *page: int, dtype: torch.dtype) -> Tensor:
        """[layers, pages, kv_heads, *page]. In memory a page's layers lie side by side, so that few huge pages of the system hold what few tokens
        use. What those gain depends on the machine: 2 to 18 % of the time of attention over 4,096 tokens were seen."""
        pages = ops.memory.empty(self.num_pages, self.shape.num_layers, self.shape.num_kv_heads, *page, dtype=dtype)
        return pages.transpose(0, 1)

    # sequences

    def alloc(self, tokens: Run[int] = (), *, salt: int = 0) -> Sequence:
        """A new sequence that shares the longest published prefix of `tokens`.

        Its `length` is the number of rows that are there already: a multiple of the page size, and less than
        len(tokens), because the last token must be computed to get logits. Prefixes are found only under the salt they
        were published with. Takes no free page. Tokens given as an array are read as integers.
        """
        if isinstance(tokens, np.ndarray):
            tokens = tokens.tolist()
        pages = self._index.match(tokens, salt, (len(tokens) - 1) // self.shape.page_size)
        for page in pages:
            self._hold(page)
        self._note_peak()
        self._live += 1
        length = len(pages) * self.shape.page_size
        self._reused_tokens += length
        return Sequence(self, pages, length, salt, len(pages))

    def fork(self, seq: Sequence, n: int) -> list[Sequence]:
        """`n` new sequences with the committed rows of `seq`, on the same pages.

        A partial last page is copied by whoever writes it while others hold it. O(pages). The reserve of `seq` is void
        afterwards: reserve again before writing.
        """
        self._check(seq, "fork")
        if n < 1:
            raise ValueError(f"fork: n: {n}, expected at least 1")
        pages = seq._pages[: self._pages_of(seq.length)]
        for page in pages:
            if self._refs[page] == 1:
                self._shared += 1
            self._refs[page] += n
        seq._reserved = 0
        self._live += n
        return [Sequence(self, pages, seq.length, seq._salt, seq._published) for _ in range(n)]

    def free(self, seq: Sequence) -> None:
        """Give all pages of `seq` back; published ones stay findable until evicted. The handle is dead afterwards."""
        self._check(seq, "free")
        if seq._pins:
            raise ValueError(f"free: seq: pinned {seq._pins} times, expected a sequence without pins")
        self._drop_pages(seq, 0)
        seq._cache = None
        self._live -= 1

    def pin(self, seq: Sequence) -> None:
        """Mark `seq` as not to be given up under memory pressure: free refuses it until every pin is undone."""
        self._check(seq, "pin")
        seq._pins += 1

    def unpin(self, seq: Sequence) -> None:
        """Undo one pin."""
        self._check(seq, "unpin")
        if not seq._pins:
            raise ValueError("unpin: seq: not pinned, expected a pinned sequence")
        seq._pins -= 1

    # rows

    def reserve(self, seq: Sequence, rows: int) -> None:
        """Make room for `rows` rows behind the committed ones, in pages that only `seq` holds.

        Copies a shared or published last page, and evicts published pages without users, least recently used first,
        when no page is free. Raises OutOfPages, with nothing changed, when even that gives too few.
        """
        self._check(seq, "reserve")
        if rows <= seq._reserved:
            if rows < 0:
                raise ValueError(f"reserve: rows: {rows}, expected at least 0")
            return
        pages = seq._pages
        last, partial = divmod(seq.length, self.shape.page_size)
        copy = partial and (self._refs[pages[last]] > 1 or pages[last] in self._index)
        missing = self._pages_of(seq.length + rows) - len(pages)
        need = max(missing, 0) + bool(copy)
        if need:
            available = self._free_pages() + len(self._unused)
            if need > available:
                raise OutOfPages(f"reserve: rows: {rows} rows behind {seq.length} need {need} more pages, {available} of {self.num_pages} can be had")
            if copy:
                self._copy_on_write(seq, last)
            for _ in range(missing):
                pages.append(self._take())
            self._note_peak()
        seq._reserved = rows

    def slots(self, seq: Sequence, rows: int) -> npt.NDArray[np.int32]:
        """Slots (page * page_size + offset) of the next `rows` reserved rows, [rows] int32."""
        self._check(seq, "slots")
        if not 0 <= rows <= seq._reserved:
            raise ValueError(f"slots: rows: {rows}, expected 0 to {seq._reserved} (the reserved rows)")
        page, offset = divmod(seq.length, self.shape.page_size)
        if 0 < rows <= self.shape.page_size - offset:  # the usual decode step: one page
            first = seq._pages[page] * self.shape.page_size + offset
            return np.arange(first, first + rows, dtype=np.int32)
        return self._slots_at(seq, np.arange(seq.length, seq.length + rows))

    def commit(self, seq: Sequence, path: int | Run[int] | npt.NDArray[np.integer]) -> None:
        """Keep reserved rows.

        Args:
            path: a count k: the first k reserved rows are kept. A list of strictly increasing row numbers (nodes of a
                draft tree that was written at slots(seq, n)): row length + path[i] becomes row length + i, moved in all
                layers by one native call where it is not there already, and len(path) rows are kept.
        What is left of the reserve stays reserved; truncate(seq, seq.length) gives it back.
        Raises: ValueError, with nothing changed, for a path that is not increasing or leaves the reserve.
        """
        self._check(seq, "commit")
        if isinstance(path, int | np.integer):
            count = int(path)
            if not 0 <= count <= seq._reserved:
                raise ValueError(f"commit: path: {count} rows, expected 0 to {seq._reserved} (the reserved rows)")
        else:
            nodes = np.asarray(path, dtype=np.int64)
            count = nodes.size
            if nodes.ndim != 1 or (count and (nodes[0] < 0 or nodes[-1] >= seq._reserved or (nodes[1:] <= nodes[:-1]).any())):
                raise ValueError(
                    f"commit: path: {nodes.tolist()}, expected strictly increasing rows from 0 below {seq._reserved} (the reserved rows)"
                )
            if count and nodes[-1] != count - 1:  # increasing, so otherwise it is 0..count-1
                first = int((nodes != np.arange(count)).argmax())
                source = self._slots_at(seq, seq.length + nodes[first:])
                target = self._slots_at(seq, np.arange(seq.length + first, seq.length + count))
                ops.cache.move_rows(self._k, self._v, torch.from_numpy(source), torch.from_numpy(target), self._k_scales, self._v_scales)
        seq.length += count
        seq._reserved -= count

    def truncate(self, seq: Sequence, length: int) -> None:
        """Forget the rows from `length` on, and the reserve. A shared or published last page is copied when written."""
        self._check(seq, "truncate")
        if not 0 <= length <= seq.length:
            raise ValueError(f"truncate: length: {length}, expected 0 to {seq.length} (the committed rows)")
        self._drop_pages(seq, self._pages_of(length))
        seq.length = length
        seq._reserved = 0
        seq._published = min(seq._published, length // self.shape.page_size)

    def publish(self, seq: Sequence, tokens: Run[int]) -> None:
        """Let alloc find the full committed pages of `seq`.

        Args:
            tokens: the tokens of the sequence from its start, at least `length` of them; an array or a list.
        A page whose tokens are published already is given back and the published one used in its place: the rows are
        the same, because a row depends on nothing but the tokens before it. Where such a page is shared with another
        sequence, publishing stops before it.
        """
        self._check(seq, "publish")
        if len(tokens) < seq.length:
            raise ValueError(f"publish: tokens: {len(tokens)}, expected at least {seq.length} (the committed rows)")
        if isinstance(tokens, np.ndarray):
            tokens = tokens.tolist()
        pages = seq._pages
        while seq._published < seq.length // self.shape.page_size:
            i = seq._published
            page = pages[i]
            key, known = self._index.child(pages[i - 1] if i else None, seq._salt, tokens, i)
            if known != page and page in self._index:
                raise ValueError(f"publish: tokens: {list(key[1])} in page {i}, expected the tokens it was published with before")
            if known is None:
                self._index.add(key, page)
            elif known != page:
                if self._refs[page] > 1:
                    return  # its other users hold the pages above it that we have, not the published ones
                self._hold(known)
                pages[i] = known
                self._release(page)
            seq._published += 1

    # views

    def write_table(self, seq: Sequence, row: npt.NDArray[np.int32]) -> int:
        """Write the page ids of `seq` into `row`, int32 [places], and -1 behind them; returns the number of pages."""
        self._check(seq, "write_table")
        count = len(seq._pages)
        if row.dtype != np.int32 or row.ndim != 1 or row.size < count:
            raise ValueError(f"write_table: row: {row.dtype} {list(row.shape)}, expected int32 with at least {count} places")
        row[:count] = seq._pages
        row[count:] = -1
        return count

    def ledger(self) -> Ledger:
        """Count the pages. O(1)."""
        free, cached = self._free_pages(), len(self._unused)
        return Ledger(
            total=self.num_pages, free=free, used=self.num_pages - free - cached, shared=self._shared,
            published=len(self._index), cached=cached, sequences=self._live, peak_used=self._peak_used,
            evicted=self._evicted, copied=self._copied, reused_tokens=self._reused_tokens,
        )  # fmt: skip

    def evict(self, pages: int | None = None) -> int:
        """Drop up to `pages` published pages without users (None: all), oldest first; returns how many were dropped."""
        if pages is not None and pages < 0:
            raise ValueError(f"evict: pages: {pages}, expected at least 0")
        count = len(self._unused) if pages is None else min(pages, len(self._unused))
        for _ in range(count):
            self._recycled.append(self._evict_one())
        return count

    # pages

    def _check(self, seq: Sequence, op: str) -> None:
        if seq._cache is not self:
            what = "freed" if seq._cache is None else "of another cache"
            raise ValueError(f"{op}: seq: {what}, expected a live sequence of this cache")

    def _pages_of(self, rows: int) -> int:
        return -(-rows // self.shape.page_size)

    def _free_pages(self) -> int:
        return len(self._recycled) + self.num_pages - self._fresh

    def _note_peak(self) -> None:
        self._peak_used = max(self._peak_used, self.num_pages - self._free_pages() - len(self._unused))

    def _slots_at(self, seq: Sequence, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        size = self.shape.page_size
        pages = np.asarray(seq._pages, dtype=np.int64)
        slots: npt.NDArray[np.int32] = (pages[rows // size] * size + rows % size).astype(np.int32)
        return slots

    def _evict_one(self) -> int:
        page, _ = self._unused.popitem(last=False)
        self._index.remove(page)
        self._evicted += 1
        return page

    def _take(self) -> int:
        """A page with one reference; reserve has made sure there is one."""
        if self._recycled:
            page = self._recycled.pop()
        elif self._fresh < self.num_pages:
            page = self._fresh
            self._fresh += 1
        else:
            page = self._evict_one()
        self._refs[page] = 1
        return page

    def _hold(self, page: int) -> None:
        self._refs[page] += 1
        if self._refs[page] == 1:
            del self._unused[page]  # only a published page is found without a user
        elif self._refs[page] == 2:
            self._shared += 1

    def _release(self, page: int) -> None:
        self._refs[page] -= 1
        if self._refs[page] == 1:
            self._shared -= 1
        elif self._refs[page] == 0:
            if page in self._index:
                self._unused[page] = None
            else:
                self._recycled.append(page)

    def _drop_pages(self, seq: Sequence, keep: int) -> None:
        while len(seq._pages) > keep:  # deepest first: see the order of eviction above
            self._release(seq._pages.pop())

    def _copy_on_write(self, seq: Sequence, index: int) -> None:
        old, new = seq._pages[index], self._take()
        ids = torch.tensor([[old], [new]], dtype=torch.int32)
        ops.cache.copy_pages(self._k, self._v, ids[0], ids[1], self._k_scales, self._v_scales)
        seq._pages[index] = new
        self._release(old)
        self._copied += 1
