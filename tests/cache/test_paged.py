"""The paged cache, case by case. tests/cache/test_machine.py drives the same calls at random against a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stretto.cache import CacheShape, PagedCache
from stretto.errors import OutOfPages

SHAPE = CacheShape(num_layers=2, num_kv_heads=2, head_dim=4, page_size=4, dtype=torch.float32)


def write(cache: PagedCache, slots: np.ndarray, values: list[float]) -> None:
    """Fill each row with its value, negated in layer 1 and in the values."""
    for slot, value in zip(slots.tolist(), values, strict=True):
        page, offset = divmod(slot, cache.shape.page_size)
        for layer, sign in ((0, 1), (1, -1)):
            cache.k_pages[layer][page, :, :, offset] = sign * value
            cache.v_pages[layer][page, :, offset] = -sign * value


def read(cache: PagedCache, seq) -> list[float]:
    """Values of the committed rows through the page table; every copy of a value must agree."""
    table = np.full(64, 7, np.int32)
    pages = cache.write_table(seq, table)
    assert (table[pages:] == -1).all()
    values = []
    for row in range(seq.length):
        page, offset = int(table[row // cache.shape.page_size]), row % cache.shape.page_size
        value = cache.k_pages[0][page, 0, 0, offset].item()
        for layer, sign in ((0, 1), (1, -1)):
            assert (cache.k_pages[layer][page, :, :, offset] == sign * value).all()
            assert (cache.v_pages[layer][page, :, offset] == -sign * value).all()
        values.append(value)
    return values


def append(cache: PagedCache, seq, values: list[float]) -> None:
    cache.reserve(seq, len(values))
    write(cache, cache.slots(seq, len(values)), values)
    cache.commit(seq, len(values))


def test_rows_come_back():
    cache = PagedCache(SHAPE, 8)
    seq = cache.alloc()
    append(cache, seq, [1, 2, 3])
    append(cache, seq, [4, 5, 6, 7, 8, 9])
    assert read(cache, seq) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert len(seq.pages) == 3
    ledger = cache.ledger()
    assert (ledger.free, ledger.used, ledger.cached, ledger.sequences) == (5, 3, 0, 1)
    cache.free(seq)
    assert cache.ledger().free == 8
    assert cache.ledger().peak_used == 3


@pytest.mark.parametrize("path", [[0], [0, 1, 2], [0, 2, 5], [3, 4, 8], [8], [], np.array([1, 3, 5, 7])], ids=str)
@pytest.mark.parametrize("start", [0, 3, 4])
def test_commit_gathers_a_tree_path(path, start):
    cache = PagedCache(SHAPE, 8)
    seq = cache.alloc()
    append(cache, seq, [100.0 + i for i in range(start)])
    cache.reserve(seq, 9)
    write(cache, cache.slots(seq, 9), list(range(9)))
    cache.commit(seq, path)
    assert read(cache, seq) == [100.0 + i for i in range(start)] + list(path)
    assert seq.reserved == 9 - len(path)
    cache.truncate(seq, seq.length)
    assert len(seq.pages) == -(-seq.length // 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("page_size", [1, 5, 16, 256])
def test_scales_and_dtypes_move_with_the_rows(dtype, page_size):
    cache = PagedCache(CacheShape(3, 2, 8, page_size, dtype), 20)
    seq = cache.alloc()
    cache.reserve(seq, 12)
    for row, slot in enumerate(cache.slots(seq, 12).tolist()):
        page, offset = divmod(slot, page_size)
        for layer in range(3):
            cache.k_pages[layer][page, :, :, offset] = row
            cache.v_pages[layer][page, :, offset] = -row
            if dtype == torch.int8:
                cache.k_scales[layer][page, :, offset] = row
                cache.v_scales[layer][page, :, offset] = -row
    cache.commit(seq, [1, 6, 11])
    for row, want in enumerate((1, 6, 11)):
        page, offset = seq.pages[row // page_size], row % page_size
        for layer in range(3):
            assert (cache.k_pages[layer][page, :, :, offset] == want).all()
            assert (cache.v_pages[layer][page, :, offset] == -want).all()
            if dtype == torch.int8:
                assert (cache.k_scales[layer][page, :, offset] == want).all()
                assert (cache.v_scales[layer][page, :, offset] == -want).all()


def test_fork_shares_pages_and_copies_the_last_on_write():
    cache = PagedCache(SHAPE, 8)
    seq = cache.alloc()
    append(cache, seq, [1, 2, 3, 4, 5])
    a, b = cache.fork(seq, 2)
    assert cache.ledger().used == 2
    assert cache.ledger().shared == 2
    append(cache, a, [10])
    append(cache, seq, [20])
    append(cache, b, [30])  # the last user of the page writes it in place
    assert cache.ledger().copied == 2
    assert read(cache, seq) == [1, 2, 3, 4, 5, 20]
    assert read(cache, a) == [1, 2, 3, 4, 5, 10]
    assert read(cache, b) == [1, 2, 3, 4, 5, 30]
    assert len({s.pages[0] for s in (seq, a, b)}) == 1
    for s in (seq, a, b):
        cache.free(s)
    assert cache.ledger().free == 8


def test_fork_voids_the_reserve():
    cache = PagedCache(SHAPE, 8)
    seq = cache.alloc()
    append(cache, seq, [1])
    cache.reserve(seq, 5)
    (child,) = cache.fork(seq, 1)
    assert child.pages == seq.pages[:1]
    with pytest.raises(ValueError, match=r"slots: rows: 1, expected 0 to 0"):
        cache.slots(seq, 1)
    append(cache, seq, [2])
    assert read(cache, child) == [1]


def test_published_prefix_is_found_under_its_salt_only():
    cache = PagedCache(SHAPE, 16)
    tokens = list(range(10))
    seq = cache.alloc(tokens, salt=1)
    assert seq.length == 0
    append(cache, seq, tokens)
    cache.publish(seq, tokens)
    assert cache.ledger().published == 2
    again = cache.alloc(np.array([*tokens, 99]), salt=1)
    assert again.length == 8
    assert again.pages == seq.pages[:2]
    assert read(cache, again) == tokens[:8]
    assert cache.alloc(tokens, salt=2).length == 0
    assert cache.alloc([0, 1, 2, 3, 4, 5, 6, 8, 8], salt=1).length == 4
    assert cache.alloc(tokens[:8], salt=1).length == 4, "the last token is always computed"
    assert cache.alloc(tokens[:9], salt=1).length == 8
    assert cache.alloc([], salt=1).length == 0
    assert cache.ledger().reused_tokens == 8 + 4 + 4 + 8


def test_published_pages_outlive_their_sequence_and_are_evicted_in_order():
    cache = PagedCache(SHAPE, 4)
    for first in (0, 100):
        seq = cache.alloc()
        append(cache, seq, list(range(first, first + 8)))
        cache.publish(seq, list(range(first, first + 8)))
        cache.free(seq)
    assert cache.ledger().cached == 4
    cache.free(cache.alloc(list(range(9))))  # use the older one: now the other is the least recent
    seq = cache.alloc()
    append(cache, seq, [1, 2])
    assert cache.alloc(list(range(100, 109))).length == 4, "its leaf went first"
    assert cache.alloc(list(range(9))).length == 8
    with pytest.raises(OutOfPages, match=r"reserve: rows: 3 rows behind 2 need 1 more pages, 0 of 4"):
        cache.reserve(seq, 3)
    assert (seq.pages, seq.length, seq.reserved) == ([seq.pages[0]], 2, 0)


def test_publish_gives_a_duplicate_page_back():
    cache = PagedCache(SHAPE, 8)
    tokens = list(range(8))
    first, second = cache.alloc(), cache.alloc()
    for seq in (first, second):
        append(cache, seq, tokens)
        cache.publish(seq, tokens)
    assert first.pages == second.pages
    assert cache.ledger().used == 2
    cache.publish(second, tokens)
    append(cache, second, [8, 9, 10, 11])
    cache.publish(second, list(range(12)))
    assert cache.alloc(list(range(13))).length == 12


def test_publish_stops_where_a_duplicate_is_shared():
    """Swapping a shared page would leave its other user with a published child but without the published parent."""
    cache = PagedCache(SHAPE, 8)
    tokens = list(range(9))
    other, seq = cache.alloc(), cache.alloc()
    append(cache, other, tokens[:4])
    append(cache, seq, tokens)
    (child,) = cache.fork(seq, 1)
    cache.publish(other, tokens[:4])
    cache.publish(seq, tokens)
    assert cache.ledger().published == 1
    cache.free(other)
    cache.free(seq)
    cache.free(child)
    assert cache.evict() == 1
    assert cache.ledger().free == 8


def test_published_page_is_not_written_after_truncate():
    cache = PagedCache(SHAPE, 8)
    seq = cache.alloc()
    append(cache, seq, [1, 2, 3, 4, 5])
    cache.publish(seq, [1, 2, 3, 4, 5])
    cache.truncate(seq, 2)
    append(cache, seq, [7, 8])
    assert read(cache, seq) == [1, 2, 7, 8]
    assert read(cache, cache.alloc([1, 2, 3, 4, 5])) == [1, 2, 3, 4]
    cache.publish(seq, [1, 2, 7, 8])
    assert read(cache, cache.alloc([1, 2, 7, 8, 9])) == [1, 2, 7, 8]


def test_out_of_pages_counts_the_copy_on_write_page():
    cache = PagedCache(SHAPE, 2)
    seq = cache.alloc()
    append(cache, seq, [1, 2])
    (child,) = cache.fork(seq, 1)
    with pytest.raises(OutOfPages, match="need 2 more pages, 1 of 2"):
        cache.reserve(child, 3)
    assert cache.ledger().copied == 0
    append(cache, child, [3, 4])
    assert read(cache, child) == [1, 2, 3, 4]
    assert read(cache, seq) == [1, 2]


def test_misuse_is_refused():
    cache, other = PagedCache(SHAPE, 4), PagedCache(SHAPE, 4)
    seq = cache.alloc()
    append(cache, seq, [1, 2, 3])
    with pytest.raises(ValueError, match="free: seq: of another cache"):
        other.free(seq)
    with pytest.raises(ValueError, match=r"truncate: length: -1, expected 0 to 3"):
        cache.truncate(seq, -1)
    with pytest.raises(ValueError, match=r"truncate: length: 4, expected 0 to 3"):
        cache.truncate(seq, 4)
    with pytest.raises(ValueError, match=r"reserve: rows: -1"):
        cache.reserve(seq, -1)
    with pytest.raises(ValueError, match=r"slots: rows: -1"):
        cache.slots(seq, -1)
    with pytest.raises(ValueError, match=r"fork: n: 0"):
        cache.fork(seq, 0)
    with pytest.raises(ValueError, match=r"publish: tokens: 2, expected at least 3"):
        cache.publish(seq, [1, 2])
    with pytest.raises(ValueError, match=r"evict: pages: -1"):
        cache.evict(-1)
    with pytest.raises(ValueError, match=r"write_table: row: int64"):
        cache.write_table(seq, np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=r"write_table: row: int32 \[0\], expected int32 with at least 1"):
        cache.write_table(seq, np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="unpin: seq: not pinned"):
        cache.unpin(seq)
    cache.pin(seq)
    with pytest.raises(ValueError, match="free: seq: pinned 1 times"):
        cache.free(seq)
    cache.unpin(seq)
    cache.free(seq)
    methods = {"free": (), "fork": (1,), "reserve": (1,), "slots": (0,), "commit": (0,), "truncate": (0,)}
    methods |= {"publish": ([],), "pin": (), "unpin": (), "write_table": (np.zeros(1, np.int32),)}
    for name, args in methods.items():
        with pytest.raises(ValueError, match=f"{name}: seq: freed, expected a live sequence"):
            getattr(cache, name)(seq, *args)
    assert cache.ledger().free == 4


@pytest.mark.parametrize("path", [-1, 4, [0, 0], [1, 0], [-1, 0], [0, 3], [[0]]], ids=str)
def test_commit_refuses_rows_that_were_not_reserved(path):
    cache = PagedCache(SHAPE, 4)
    seq = cache.alloc()
    cache.reserve(seq, 3)
    with pytest.raises(ValueError, match="commit: path: "):
        cache.commit(seq, path)
    assert (seq.length, seq.reserved) == (0, 3)


def test_publish_refuses_other_tokens_for_a_published_page():
    cache = PagedCache(SHAPE, 4)
    seq = cache.alloc()
    append(cache, seq, [1, 2, 3, 4])
    (child,) = cache.fork(seq, 1)
    cache.publish(seq, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="publish: tokens: "):
        cache.publish(child, [1, 2, 3, 5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 0}, "page_size: 0"),
        ({"page_size": 257}, "page_size: 257, expected 1 to 256"),
        ({"num_layers": -1}, "num_layers: -1"),
        ({"head_dim": 2.5}, "head_dim: 2.5"),
        ({"num_kv_heads": True}, "num_kv_heads: True"),
        ({"dtype": torch.float64}, "dtype: torch.float64"),
    ],
)
def test_shape_is_checked(change, message):
    fields = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "page_size": 4, "dtype": torch.float32} | change
    with pytest.raises(ValueError, match=f"CacheShape: {message}"):
        CacheShape(**fields)


@pytest.mark.parametrize("pages", [0, -1, 2.0, True, 2**29 + 1, 2**63, 2**200], ids=str)
def test_page_count_is_checked(pages):
    with pytest.raises(ValueError, match="PagedCache: num_pages: "):
        PagedCache(SHAPE, pages)


def test_more_memory_than_the_machine_has_is_refused():
    with pytest.raises(ValueError, match=r"PagedCache: num_pages: 100000 pages of .* expected at most the .* GiB of this machine"):
        PagedCache(CacheShape(80, 64, 256, 256, torch.float32), 100_000)


def test_memory_is_taken_lazily():
    before = resident_bytes()
    cache = PagedCache(CacheShape(30, 3, 64, 16, torch.float16), 2000)  # 737 MB
    seq = cache.alloc()
    cache.reserve(seq, 16)
    assert resident_bytes() - before < 50 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096
