"""Attention in which each block of queries has its own list of keys: vertical and slash lines, windows, blocks, sinks, prompt pools."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import I32, check, check_tensors, rows_contiguous
from stretto.ops.attention.prefill import check_attention, dense, empty_result, make_qkv
from stretto.ops.attention.weights import sums
from stretto.ops.table import BadCase, Case, Cost, Make, register

SHORT_RUN = 16  # keys; a shorter run is kept as single keys, a longer one as an interval: both take about the same memory at 2


class KeyLists(NamedTuple):
    """Which keys each block of `block` queries sees; unpacks into sparse_prefill(q, k, v, *lists)."""

    interval_ptr: Tensor  # [batch or 1, heads or 1, blocks + 1] int32: block b has intervals[interval_ptr[b] : interval_ptr[b + 1]]
    intervals: Tensor  # [n, 2] int32: begin, end
    column_ptr: Tensor  # [batch or 1, heads or 1, blocks + 1] int32
    columns: Tensor  # [n] int32
    block: int


def sparse_prefill(
    q: Tensor, k: Tensor, v: Tensor, interval_ptr: Tensor, intervals: Tensor, column_ptr: Tensor, columns: Tensor, block: int = 64,
    scale: float | None = None, causal: bool = True, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of blocks of queries over their own lists of keys: intervals, and single keys beside them.

    Args:
        q, k, v: as for `dense`; every stride but the last is free.
        interval_ptr, column_ptr: [batch or 1, heads or 1, blocks + 1] int32; size 1 shares the lists. blocks = ceil(rows / block).
        intervals: [n, 2] int32, begin and end. columns: [n] int32. Those of a block grow and are apart from each other; see KeyLists.
        block: queries that share a list.
        causal: a query sees only the keys of its list up to its own position, i + keys - rows.
        scale, softcap: as for `dense`.
    Returns: (out, lse) as from `dense`; exp(lse - lse of dense) is the attention mass that the lists keep. An empty list gives zeros, -inf.
        Keys are taken in growing order, so each block has the bits of `dense` over its keys, gathered, and those of `dense` itself where
        its list holds all keys that it may see.
    Raises: ValueError naming the argument, block and list.
    Source: arXiv 2407.02490, 2501.15383. Reference: ops.ref.attention.sparse_prefill. Bound by compute.
    """
    if needs_dispatch(q, k, v):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.sparse_prefill(
            q, k, v, interval_ptr, intervals, column_ptr, columns, block, scale, causal, softcap
        )
        return result
    return _sparse_prefill(q, k, v, interval_ptr, intervals, column_ptr, columns, block, scale, causal, softcap)


def _sparse_prefill(
    q: Tensor, k: Tensor, v: Tensor, interval_ptr: Tensor, intervals: Tensor, column_ptr: Tensor, columns: Tensor, block: int = 64,
    scale: float | None = None, causal: bool = True, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "attention.sparse_prefill"
    scale = check_attention(
        op, q, k, v, scale, softcap, interval_ptr=(interval_ptr, "list_batch list_heads pointers", I32), intervals=(intervals, "_ 2", I32),
        column_ptr=(column_ptr, "list_batch list_heads pointers", I32), columns=(columns, "_", I32),
    )  # fmt: skip
    check(block >= 1, f"{op}: block: {block}, expected at least 1")
    blocks = -(-q.shape[1] // block)
    for size, name, of_q in ((interval_ptr.shape[0], "batch", q.shape[0]), (interval_ptr.shape[1], "heads", q.shape[2])):
        check(size in (1, of_q), f"{op}: interval_ptr: {size} {name}, expected {of_q} or 1")
    check(interval_ptr.shape[2] == blocks + 1, f"{op}: interval_ptr: {interval_ptr.shape[2]} pointers, expected {blocks + 1}")
    if _backend.use_reference("sparse_prefill", q):
        return ref.attention.sparse_prefill(q, k, v, interval_ptr, intervals, column_ptr, columns, block, scale, causal, softcap)
    out, lse = empty_result(q)
    _backend._C.sparse_prefill(  # type: ignore[union-attr]
        rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), interval_ptr.contiguous(), intervals.contiguous(), column_ptr.contiguous(),
        columns.contiguous(), block, scale, causal, softcap or 0.0, out, lse,
    )  # fmt: skip
    return out, lse


def key_lists(sees: Tensor, block: int = 64) -> KeyLists:
    """Lists from a mask by blocks of queries: block-sparse patterns, sliding windows, sinks, pools of prompts.

    Args:
        sees: [batch or 1, heads or 1, blocks, keys] bool: whether the queries of a block see a key. block: queries of a block.
    Returns: KeyLists with runs of at least 16 keys as intervals and the rest as columns.
    Raises: ValueError naming the argument.
    """
    check_tensors("attention.key_lists", sees=(sees, "batch heads blocks keys", (torch.bool,)))
    check(block >= 1, f"attention.key_lists: block: {block}, expected at least 1")
    lists, keys = sees.shape[:3], sees.shape[3]
    flat = torch.nn.functional.pad(sees.reshape(-1, keys).to(torch.int8), (1, 1))
    change = flat.diff(dim=1)
    row, begin = (change == 1).nonzero(as_tuple=True)
    end = (change == -1).nonzero(as_tuple=True)[1]
    long = end - begin >= SHORT_RUN
    short_row, short_begin, length = row[~long], begin[~long], (end - begin)[~long]
    inside = torch.arange(int(length.sum()), device=sees.device) - (length.cumsum(0) - length).repeat_interleave(length)
    columns = short_begin.repeat_interleave(length) + inside

    def pointers(of_row: Tensor) -> Tensor:
        counts = torch.bincount(of_row, minlength=flat.shape[0]).reshape(lists)
        return _pointers(torch.nn.functional.pad(counts, (1, 0)))

    return KeyLists(
        pointers(row[long]), torch.stack([begin[long], end[long]], 1).to(torch.int32),
        pointers(short_row.repeat_interleave(length)), columns.to(torch.int32), block,
    )  # fmt: skip


def _pointers(counts: Tensor) -> Tensor:
    """[.., blocks + 1] counts of each block behind a zero -> offsets of each block, lists one after the other."""
    inside = counts.long().cumsum(-1)
    before = inside[..., -1].flatten().cumsum(0).reshape(inside.shape[:-1]) - inside[..., -1]
    total = int(inside[..., -1].sum())
    check(total < 2**31, f"attention.key_lists: {total} entries, expected less than 2^31; use larger blocks")
    return (inside + before[..., None]).to(torch.int32)


def vertical_slash_index(
    q: Tensor, k: Tensor, num_vertical: int, num_slash: int, *, block: int = 64, scale: float | None = None, softcap: float | None = None,
    last: int = 64, sinks: int = 30, local: int = 100,
) -> KeyLists:  # fmt: skip
    """Guess from the last queries which keys (verticals) and which distances (slashes) matter, for each query head.

    The attention of the last `last` queries is summed by key and by distance; the first `sinks` keys and the nearest `local` distances are
    always taken, ties go to the lower index. The lists hold each chosen pair and what shares its 64 x 64 neighbourhood.

    Args:
        q: [batch, rows, heads, head_dim], the queries the lists are for. k: [batch, keys, kv_heads, head_dim], keys >= rows; as for `dense`.
        num_vertical, num_slash: how many of each, at least 1; more than there are keys means all.
        block: queries that share a list. scale, softcap: as for `dense`.
    Returns: KeyLists for sparse_prefill(q, k, v, *lists). Cost: about 3 * last / rows of dense attention, and two sorts of the keys a head.
    Raises: ValueError naming the argument.
    Source: arXiv 2407.02490; numbers of sinks and local distances, arXiv 2501.15383.
    """
    op = "attention.vertical_slash_index"
    scale = check_attention(op, q, k, k, scale, softcap)
    rows, keys = q.shape[1], k.shape[1]
    check(rows <= keys, f"{op}: k: {keys} keys, expected at least the {rows} of q")
    for name, value in (("num_vertical", num_vertical), ("num_slash", num_slash), ("block", block), ("last", last)):
        check(value >= 1, f"{op}: {name}: {value}, expected at least 1")
    tail = q[:, max(rows - last, 0) :]
    _, lse = dense(tail, k, k, scale, causal=True, softcap=softcap)
    columns, diagonals = sums(tail, k, lse, scale, causal=True, softcap=softcap, diagonals=True)
    by_distance = diagonals.flip(-1)[..., max(tail.shape[1] - 1, 0) :]  # distance 0 first
    columns[..., :sinks] = math.inf
    by_distance[..., :local] = math.inf
    return lines_to_lists(_top(columns, num_vertical), _top(by_distance, num_slash), rows, keys, block)


def _top(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest scores in growing order, [batch, heads, count] int32."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return best.sort(dim=-1).values.to(torch.int32)


def lines_to_lists(verticals: Tensor, slashes: Tensor, rows: int, keys: int, block: int = 64) -> KeyLists:
    """Lists of the keys on given lines: each block of queries at positions a .. b sees [a - o, b - o) for a slash o, and each vertical below b.

    Args:
        verticals, slashes: [batch or 1, heads or 1, n] int32, growing: keys, and distances (position of the query less that of the key).
        rows, keys: of the attention, rows <= keys. block: queries that share a list.
    Returns: KeyLists. Raises: ValueError naming the argument.
    """
    op = "attention.lines_to_lists"
    check_tensors(op, verticals=(verticals, "batch heads _", I32), slashes=(slashes, "batch heads _", I32))
    check(0 <= rows <= keys, f"{op}: rows: {rows}, expected 0 to {keys} (keys)")
    check(block >= 1, f"{op}: block: {block}, expected at least 1")
    for name, lines in (("verticals", verticals), ("slashes", slashes)):
        grows = bool((lines.diff(dim=-1) > 0).all()) and (lines.numel() == 0 or (int(lines.min()) >= 0 and int(lines.max()) < keys))
        check(grows, f"{op}: {name}: expected growing numbers in 0..{keys - 1}")
    blocks = -(-rows // block)
    shape = (*verticals.shape[:2], blocks + 1)
    if _backend.use_reference("vertical_slash", verticals):
        return key_lists(ref.attention.lines_seen(verticals, slashes, rows, keys, block), block)
    flat = [x.flatten(0, 1).contiguous() for x in (verticals, slashes)]
    counts = [torch.zeros(flat[0].shape[0], blocks + 1, dtype=torch.int32) for _ in range(2)]
    _backend._C.vertical_slash(*flat, block, rows, keys, *counts, None, None)  # type: ignore[union-attr]
    interval_ptr, column_ptr = (_pointers(c.reshape(shape)) for c in counts)
    intervals = torch.empty(_total(interval_ptr), 2, dtype=torch.int32)
    columns = torch.empty(_total(column_ptr), dtype=torch.int32)
    pointers = [p.flatten(0, 1) for p in (interval_ptr, column_ptr)]
    _backend._C.vertical_slash(*flat, block, rows, keys, *pointers, intervals, columns)  # type: ignore[union-attr]
    return KeyLists(interval_ptr, intervals, column_ptr, columns, block)


def _total(pointers: Tensor) -> int:
    return int(pointers[-1, -1, -1]) if pointers.numel() else 0


def random_lists(make: Make, batch: int, heads: int, rows: int, keys: int, block: int, density: float = 0.3) -> KeyLists:
    """Lists of runs of random length, some blocks empty."""
    blocks = -(-rows // block)
    coarse = torch.rand(batch, heads, blocks, -(-keys // 8), generator=make.generator) < density
    fine = torch.rand(batch, heads, blocks, keys, generator=make.generator) < density / 4
    sees = coarse.repeat_interleave(8, -1)[..., :keys] | fine
    sees[..., ::5, :] = False
    return key_lists(sees, block)


def _cases(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield Case(f"causal-{dtype}", (*make_qkv(make, 2, 150, 150, 4, 2, 64, dtype), *random_lists(make, 2, 4, 150, 150, 32)))
        yield Case(f"shared-{dtype}", (*make_qkv(make, 2, 150, 290, 6, 2, 40, dtype), *random_lists(make, 1, 1, 150, 290, 64)))
    yield Case("every-key", (*make_qkv(make, 1, 40, 600, 3, 1, 32), *random_lists(make, 1, 3, 40, 600, 7, 4.0), None, False))
    yield Case("big-blocks", (*make_qkv(make, 1, 300, 300, 6, 2, 32), *random_lists(make, 1, 1, 300, 300, 200), 0.3, True, 4.0))
    yield Case("no-keys", (*make_qkv(make, 1, 40, 40, 2, 2, 32), *random_lists(make, 1, 2, 40, 40, 16, 0.0)))
    yield Case("no-rows", (*make_qkv(make, 1, 0, 40, 2, 2, 32), *random_lists(make, 1, 2, 0, 40, 16)))


def _bad_cases(make: Make) -> Iterator[BadCase]:
    qkv = make_qkv(make, 1, 40, 40, 2, 1, 32)
    lists = random_lists(make, 1, 2, 40, 40, 16, 2.0)
    op = "attention.sparse_prefill"
    yield BadCase("heads", (*qkv, *lists._replace(interval_ptr=lists.interval_ptr.repeat(1, 2, 1), column_ptr=lists.column_ptr.repeat(1, 2, 1))),
                  f"{op}: interval_ptr: 4 heads")  # fmt: skip
    yield BadCase("blocks", (*qkv, *lists._replace(block=8)), f"{op}: interval_ptr: 4 pointers, expected 6")
    yield BadCase("block", (*qkv, *lists._replace(block=0)), f"{op}: block: 0")
    yield BadCase("keys", (*qkv, *lists._replace(intervals=lists.intervals + 1)), f"{op}: intervals: 1 to 41 in block 1")
    yield BadCase("order", (*qkv, *lists._replace(intervals=lists.intervals.flip(1))), f"{op}: intervals: 40 to 0 in block 1")
    yield BadCase("pointer", (*qkv, *lists._replace(interval_ptr=lists.interval_ptr + 9)), f"{op}: interval_ptr: 9 at block 0")
    two = torch.tensor([3, 3], dtype=torch.int32)
    empty, pointers = torch.zeros(0, 2, dtype=torch.int32), torch.tensor([[[0, 2]]], dtype=torch.int32)
    yield BadCase("twice", (*qkv, pointers * 0, empty, pointers, two, 64), f"{op}: columns: 3 in block 0")
    yield BadCase("column", (*qkv, pointers * 0, empty, pointers, two + torch.tensor([0, 40], dtype=torch.int32), 64), f"{op}: columns: a key of 40")


def lists_pairs(q: Tensor, k: Tensor, lists: KeyLists, causal: bool) -> int:
    """How many (query, key) pairs the lists keep, over all batch entries and heads."""
    pairs, rows, keys = 0, q.shape[1], k.shape[1]
    for b in range(lists.interval_ptr.shape[2] - 1):
        positions = torch.arange(b * lists.block, min((b + 1) * lists.block, rows)) + keys - rows
        limit = positions + 1 if causal else torch.full_like(positions, keys)
        for pointers, values in ((lists.interval_ptr, lists.intervals), (lists.column_ptr, lists.columns[:, None].expand(-1, 2))):
            for begin, end in pointers[..., b : b + 2].reshape(-1, 2).tolist():
                part = values[begin:end].long()
                last = part[:, 1] + (values is not lists.intervals)
                pairs += int((torch.minimum(last[:, None], limit) - part[:, :1]).clamp(min=0).sum())
    return pairs * (q.shape[0] // lists.interval_ptr.shape[0]) * (q.shape[2] // lists.interval_ptr.shape[1])


def _cost(
    q: Tensor, k: Tensor, v: Tensor, interval_ptr: Tensor, intervals: Tensor, column_ptr: Tensor, columns: Tensor, block: int = 64,
    scale: float | None = None, causal: bool = True, softcap: float | None = None,
) -> Cost:  # fmt: skip
    pairs = lists_pairs(q, k, KeyLists(interval_ptr, intervals, column_ptr, columns, block), causal)
    return Cost(2 * q.nbytes + k.nbytes + v.nbytes + 8 * intervals.shape[0] + 4 * columns.shape[0], 4 * pairs * q.shape[3])


def _bench_cases(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = make_qkv(make, 1, 4096, 4096, 7, 1, 128, dtype)  # a quarter of the heads: the peers' masks fit memory
        yield Case(f"Qwen2.5-7B-1M 4096 vertical-slash {dtype}", (q, k, v, *vertical_slash_index(q, k, 150, 110)))
        q, k, v = make_qkv(make, 1, 4096, 4096, 9, 3, 64, dtype)
        blocks = torch.arange(64)
        near = (blocks[:, None] - blocks).abs() < 4  # 256 keys back, and four sinks
        sees = near.repeat_interleave(64, 1)
        sees[:, :4] = True
        yield Case(f"SmolLM2-135M 4096 window and sinks {dtype}", (q, k, v, *key_lists(sees[None, None])))


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, interval_ptr: Tensor, intervals: Tensor, column_ptr: Tensor, columns: Tensor, block: int = 64,
    scale: float | None = None, causal: bool = True, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """torch's compiled FlexAttention with a block mask made beforehand, which is not timed."""
    from stretto.ops.attention.peers import flex

    def mask() -> Tensor:
        return ref.attention.lists_sees(interval_ptr, intervals, column_ptr, columns, block, q.shape[1], k.shape[1], causal)

    return flex((interval_ptr, column_ptr, causal), mask, q, k, v)


def masked_sdpa(
    q: Tensor, k: Tensor, v: Tensor, interval_ptr: Tensor, intervals: Tensor, column_ptr: Tensor, columns: Tensor, block: int = 64,
    scale: float | None = None, causal: bool = True, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """torch SDPA with a boolean mask made beforehand, which is not timed."""
    from stretto.ops.attention.peers import sdpa_masked

    def mask() -> Tensor:
        return ref.attention.lists_sees(interval_ptr, intervals, column_ptr, columns, block, q.shape[1], k.shape[1], causal)

    return sdpa_masked((interval_ptr, column_ptr, causal), mask, q, k, v)


register(
    "sparse_prefill(Tensor q, Tensor k, Tensor v, Tensor interval_ptr, Tensor intervals, Tensor column_ptr, Tensor columns, int block=64, "
    "float? scale=None, bool causal=True, float? softcap=None) -> (Tensor, Tensor)",
    _sparse_prefill,
    function=sparse_prefill,
    reference=ref.attention.sparse_prefill,
    fake=lambda q, *_, **__: empty_result(q),
    cases=_cases,
    bad_cases=_bad_cases,
    bench_cases=_bench_cases,
    cost=_cost,
    bound="compute",
    tolerance=4.0,  # as dense_attention
    peers={"FlexAttention compiled": flex_attention, "masked torch sdpa": masked_sdpa},
    source="arXiv 2407.02490, 2501.15383",
)
