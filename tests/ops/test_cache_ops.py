"""copy_pages and move_rows: only what is named moves, in order, whatever the page size, dtype and thread count."""

from __future__ import annotations

import pytest
import stretto.ops as ops
import torch
from stretto.ops import _backend
from stretto.ops.cache import CACHE_DTYPES, copy_pages, move_rows
from torch import Tensor

from tests.ops.fuzzing import Arena
from tests.oracle import same_bits

pytestmark = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")

SHAPES = [(3, 9, 2, 64, 16), (1, 40, 3, 80, 1), (5, 6, 1, 32, 7), (2, 4, 2, 16, 64), (1, 3, 1, 48, 256)]


def make_cache(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor | None]:
    """k, v and scales, every element another number where the type has that many; some NaN among them, which must move as they are."""
    layers, pages, heads, dim, page_size = shape
    g = torch.Generator().manual_seed(seed)
    plane = (layers, pages, heads)
    if dtype == torch.int8:
        k, v = (torch.randint(-128, 128, (*plane, *tail), generator=g).to(dtype) for tail in ((dim, page_size), (page_size, dim)))
        return [k, v, *(torch.randn(*plane, page_size, generator=g) for _ in range(2))]
    k, v = (torch.randn(*plane, *tail, generator=g).to(dtype) for tail in ((dim, page_size), (page_size, dim)))
    k.view(-1)[::97], v.view(-1)[5::89] = torch.nan, torch.inf
    return [k, v, None, None]


def rows_of(cache: list[Tensor | None]) -> list[Tensor]:
    """Each tensor as [slots, layers, heads, ...]."""
    k, v, *scales = cache
    seen = [k.permute(1, 4, 0, 2, 3), v.permute(1, 3, 0, 2, 4), *(s.permute(1, 3, 0, 2) for s in scales if s is not None)]
    return [t.flatten(0, 1) for t in seen]


def ids(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_move_as_a_list_of_rows_would(shape, dtype, threads, isa):
    ops.set_num_threads(threads)
    slots = shape[1] * shape[4]
    g = torch.Generator().manual_seed(1)
    for case in range(12):
        pairs = [0, 1, 3, slots][case % 4]
        src, dst = (torch.randint(-1, slots, (pairs,), generator=g) for _ in range(2))
        cache = make_cache(shape, dtype, case)
        lists = [list(t.clone()) for t in rows_of(cache)]
        for s, d in zip(src.tolist(), dst.tolist(), strict=True):
            if s >= 0 and d >= 0:
                for rows in lists:
                    rows[d] = rows[s]
        move_rows(cache[0], cache[1], src.int(), dst.int(), *cache[2:])
        for now, rows in zip(rows_of(cache), lists, strict=True):
            assert same_bits(now, torch.stack(rows))


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_pages_are_copied_whole_and_no_others(shape, dtype, threads, isa):
    ops.set_num_threads(threads)
    pages = shape[1]
    cache, before = make_cache(shape, dtype), make_cache(shape, dtype)
    copy_pages(cache[0], cache[1], ids([pages - 1, 0, -1, 1]), ids([1, 0, 2, -1]), *cache[2:])
    for now, old in zip(cache, before, strict=True):
        if now is not None and old is not None:
            assert same_bits(now[:, 1], old[:, pages - 1])
            others = torch.arange(pages) != 1
            assert same_bits(now[:, others], old[:, others])


def test_accepted_rows_close_up_in_place(isa):
    """What a commit does: the accepted nodes of a tree move down to the slots behind the prefix, rising, over page borders."""
    cache = make_cache((4, 6, 2, 64, 7), torch.float16)
    path = [20, 22, 23, 27, 35, 41]
    want = [t[path].clone() for t in rows_of(cache)]
    move_rows(cache[0], cache[1], ids(path), ids(range(20, 26)))
    for now, rows in zip(rows_of(cache), want, strict=True):
        assert same_bits(now[20:26], rows)


def test_strided_ids(isa):
    cache, same = make_cache(SHAPES[0], torch.float32), make_cache(SHAPES[0], torch.float32)
    src, dst = ids([5, 9, 30]), ids([0, 140, 70])
    move_rows(cache[0], cache[1], src.repeat_interleave(2)[::2], dst.flip(0).flip(0))
    move_rows(same[0], same[1], src, dst)
    assert all(same_bits(a, b) for a, b in zip(rows_of(cache), rows_of(same), strict=True))


@pytest.mark.parametrize("move", [copy_pages, move_rows])
def test_a_wrong_id_leaves_the_cache_as_it_was(move, isa):
    limit = 9 * (16 if move is move_rows else 1)
    for bad in (-2, limit, -(2**31), 2**31 - 1):
        for place in (0, 1):
            cache, before = make_cache(SHAPES[0], torch.float16), make_cache(SHAPES[0], torch.float16)
            pair = [ids([1, 2, 3]), ids([4, 5, 6])]
            pair[place][2] = bad
            with pytest.raises(ValueError, match=f"{move.__name__}: {('src', 'dst')[place]}: {bad}"):
                move(cache[0], cache[1], *pair)
            assert all(same_bits(a, b) for a, b in zip(cache[:2], before[:2], strict=True))


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_memory_beside_the_cache_is_not_touched(dtype, isa):
    for at_end in (True, False):
        cache = [None if t is None else Arena().place(t, at_end) for t in make_cache((2, 3, 2, 16, 7), dtype)]
        want = make_cache((2, 3, 2, 16, 7), dtype)
        for c in (cache, want):
            copy_pages(c[0], c[1], ids([0, 2]), ids([2, 0]), *c[2:])
            move_rows(c[0], c[1], ids([0, 20]), ids([20, 0]), *c[2:])
        assert all(same_bits(a, b) for a, b in zip(rows_of(cache), rows_of(want), strict=True))
