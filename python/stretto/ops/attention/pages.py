"""Attention over a paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, I32, I64, check, check_tensors, dtype_as
from stretto.ops.table import BadCase, Case, Cost, Make, register

PAGES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, cu_q: Tensor, cached: Tensor, scale: float, window: int | None = None,
    softcap: float | None = None, mask: Tensor | None = None, mask_start: Tensor | None = None, k_scales: Tensor | None = None,
    v_scales: Tensor | None = None, *, out: Tensor | None = None, num_seqs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of ragged rows over a paged cache: prefill chunks, decode steps and draft trees in one call.

    Sequence r owns rows cu_q[r] .. cu_q[r + 1], whose keys and values stand in the pages already, behind cached[r] earlier ones. A causal
    sequence's row i sees positions 0 .. cached + i. A tree's node i stands in slot position cached + i and sees the cached positions and the
    nodes whose bits are set in its mask row (its ancestors and itself).

    Args:
        q: [rows, heads, head_dim] float32; rows and heads may be strided. head_dim a multiple of 16.
        k_pages: [pages, kv_heads, head_dim, page_size], float32 / float16 / bfloat16 / int8: keys are columns, so that a lane is a key.
        v_pages: [pages, kv_heads, page_size, head_dim] of the same dtype.
        table: [seqs, n] int32, page of each page_size positions. cu_q: [seqs + 1] int32. cached: [seqs] int32.
        scale: of the scores, before the softmax. window: a row at position p sees positions > p - window. softcap: scores become
            softcap * tanh(score / softcap).
        mask: [mask_rows, words] int64, 64 bits a word, at most 4 words. mask_start: [seqs] int32, first mask row of the sequence; -1: causal.
        k_scales, v_scales: [pages, kv_heads, page_size] float32, with int8 pages only: value = int8 * scale.
        out: [rows, heads, head_dim] float32, written instead of a new tensor. num_seqs: [1] int32, sequences in use; for captured steps.
    Returns: [rows, heads, head_dim] float32. A row's bits depend on its own query and visible keys alone: not on other rows, page size,
        chunks, threads, nor on whether it came as a chain or as a tree node. Rows of no sequence are not written where `out` is given.
    Raises: ValueError naming the argument; NotImplementedError for a head_dim that is no multiple of 16.
    Source: online softmax, arXiv 1805.02867; pages, arXiv 2309.06180. Reference: ops.ref.attention.paged. Bound by memory (decode), compute.
    """
    if out is None and num_seqs is None and needs_dispatch(q, k_pages, v_pages):
        result: Tensor = torch.ops.stretto.paged_attention(
            q, k_pages, v_pages, table, cu_q, cached, scale, window, softcap, mask, mask_start, k_scales, v_scales
        )
        return result
    return _paged(q, k_pages, v_pages, table, cu_q, cached, scale, window, softcap, mask, mask_start, k_scales, v_scales, out=out, num_seqs=num_seqs)


def _paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, cu_q: Tensor, cached: Tensor, scale: float, window: int | None = None,
    softcap: float | None = None, mask: Tensor | None = None, mask_start: Tensor | None = None, k_scales: Tensor | None = None,
    v_scales: Tensor | None = None, *, out: Tensor | None = None, num_seqs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check_tensors(
        "attention.paged", q=(q, "rows heads head_dim", F32), k_pages=(k_pages, "pages kv_heads head_dim page_size", PAGES),
        v_pages=(v_pages, "pages kv_heads page_size head_dim", dtype_as(k_pages)), table=(table, "seqs _", I32), cu_q=(cu_q, "_", I32),
        cached=(cached, "seqs", I32), mask=(mask, "_ _", I64), mask_start=(mask_start, "seqs", I32),
        k_scales=(k_scales, "pages kv_heads page_size", F32), v_scales=(v_scales, "pages kv_heads page_size", F32),
        out=(out, "rows heads head_dim", F32), num_seqs=(num_seqs, "1", I32),
    )  # fmt: skip
    heads, kv_heads, head_dim = q.shape[1], k_pages.shape[1], q.shape[2]
    ok = kv_heads > 0 and heads > 0 and heads % kv_heads == 0
    check(ok, f"attention.paged: q: {heads} heads, expected a positive multiple of the {kv_heads} in k_pages")
    check(cu_q.shape[0] == cached.shape[0] + 1, f"attention.paged: cu_q: {cu_q.shape[0]} values, expected {cached.shape[0] + 1}")
    check(scale == scale and abs(scale) < float("inf"), f"attention.paged: scale: {scale}, expected a finite number")
    check(window is None or window >= 1, f"attention.paged: window: {window}, expected at least 1")
    check(softcap is None or 0 < softcap < float("inf"), f"attention.paged: softcap: {softcap}, expected above 0")
    scaled = k_pages.dtype == torch.int8
    check(scaled == (k_scales is not None), "attention.paged: k_scales: expected with int8 pages, and only then")
    check(scaled == (v_scales is not None), "attention.paged: v_scales: expected with int8 pages, and only then")
    if head_dim % 16 and q.shape[0]:
        raise NotImplementedError(f"attention.paged: head_dim: {head_dim}, expected a multiple of 16; ops.ref.attention.paged takes any")
    if _backend.use_reference("paged_attention", q):
        used = cached if num_seqs is None else cached[: max(int(num_seqs), 0)]
        result = ref.attention.paged(q, k_pages, v_pages, table, cu_q, used, scale, window, softcap, mask, mask_start, k_scales, v_scales)
        if out is None:
            return result
        owned = slice(int(cu_q[0]), int(cu_q[len(used)]))
        out[owned] = result[owned]
        return out
    if out is None:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    _backend._C.paged_attention(  # type: ignore[union-attr]
        q if q.stride(-1) == 1 else q.contiguous(), k_pages, v_pages, table, cu_q, cached, scale, min(window or 0, 1 << 31), softcap or 0.0, mask, mask_start,
        k_scales, v_scales, out, num_seqs,
    )  # fmt: skip
    return out


def make_paged(
    make: Make,
    lengths: list[tuple[int, int]],
    *,
    heads: int = 3,
    kv_heads: int = 1,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float16,
) -> tuple[Any, ...]:
    """(q, k_pages, v_pages, table, cu_q, cached, scale) of sequences with (cached, new) rows; pages are shuffled, unused slots hold NaN.

    int8: all arguments of `paged`, the scales of unused slots being NaN.
    """
    need = [-(-(c + n) // page_size) for c, n in lengths]
    order = torch.randperm(sum(need) + 2, generator=make.generator).to(torch.int32)
    width = max(need, default=0) + 1
    table = torch.full((len(lengths), width), 2**31 - 1, dtype=torch.int32)  # page ids behind the used part must not be followed
    poison = 0 if dtype == torch.int8 else float("nan")
    k_pages = torch.full((len(order), kv_heads, head_dim, page_size), poison).to(dtype)
    v_pages = torch.full((len(order), kv_heads, page_size, head_dim), poison).to(dtype)
    scales = [torch.full((len(order), kv_heads, page_size), float("nan")) for _ in range(2)] if dtype == torch.int8 else []
    taken = 0
    for r, (c, n) in enumerate(lengths):
        table[r, : need[r]] = order[taken : taken + need[r]]
        taken += need[r]
        positions = torch.arange(c + n)
        page, offset = table[r, positions // page_size].long(), positions % page_size
        if dtype == torch.int8:
            k_pages[page, :, :, offset] = make.randint(-127, 128, c + n, kv_heads, head_dim, dtype=dtype)
            v_pages[page, :, offset, :] = make.randint(-127, 128, c + n, kv_heads, head_dim, dtype=dtype)
            for s in scales:
                s[page, :, offset] = make.randn(c + n, kv_heads).abs() / 64
            continue
        k_pages[page, :, :, offset] = make.randn(c + n, kv_heads, head_dim).to(dtype)
        v_pages[page, :, offset, :] = make.randn(c + n, kv_heads, head_dim).to(dtype)
    cu_q = torch.tensor([0, *torch.tensor([n for _, n in lengths]).cumsum(0).tolist()] if lengths else [0], dtype=torch.int32)
    q = make.randn(int(cu_q[-1]), heads, head_dim)
    cached = torch.tensor([c for c, _ in lengths], dtype=torch.int32)
    return q, k_pages, v_pages, table, cu_q, cached, head_dim**-0.5, *((None,) * 4 if scales else ()), *scales


def _tree_arguments(make: Make, cached: list[int], parents: list[list[int]], window: int | None = None, **shape: Any) -> tuple[Any, ...]:
    """Sequences whose new rows are trees; the last one is causal."""
    args = make_paged(make, [*zip(cached, map(len, parents), strict=True), (9, 4)], **shape)
    words = (max(map(len, parents)) + 63) // 64
    masks = [ref.tree.ancestor_mask(torch.tensor([p]), torch.tensor([len(p)]))[0][0] for p in parents]
    mask = torch.cat([torch.nn.functional.pad(m, (0, words - m.shape[1])) for m in masks])
    starts = torch.tensor([0, *map(len, parents)]).cumsum(0).int()
    starts[-1] = -1
    return (*args[:7], window, None, mask, starts, *args[11:])


def _cases(make: Make) -> Iterator[Case]:
    ragged = [(0, 1), (37, 1), (5, 19), (0, 0), (290, 3)]
    for dtype in PAGES[:3]:
        yield Case(f"ragged-{dtype}", make_paged(make, ragged, dtype=dtype))
    for page_size in (1, 7, 16, 32, 64, 256):
        yield Case(f"page-{page_size}", make_paged(make, ragged, page_size=page_size))
    for heads, kv_heads, head_dim in [(4, 4, 64), (8, 1, 80), (2, 1, 96), (6, 2, 128), (4, 1, 256)]:
        yield Case(f"heads-{heads}-{kv_heads}-{head_dim}", make_paged(make, [(20, 5), (0, 33)], heads=heads, kv_heads=kv_heads, head_dim=head_dim))
    for page_size, heads, kv_heads, head_dim in [(16, 4, 1, 64), (7, 3, 3, 80), (1, 8, 1, 128)]:
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        yield Case(f"int8-{page_size}-{heads}-{kv_heads}-{head_dim}", make_paged(make, ragged, page_size=page_size, dtype=torch.int8, **shape))
    chain, star, bush = [-1, 0, 1, 2, 3], [-1, 0, 0, 0], [-1, 0, 0, 1, 1, 2, 4]
    for dtype in (torch.float16, torch.int8):
        yield Case(f"trees-{dtype}", _tree_arguments(make, [30, 0, 255], [chain, star, bush], dtype=dtype))
    wide = [-1, *make.randint(0, 3, 80).tolist()]
    yield Case("tree-of-81", _tree_arguments(make, [19], [[p if p < i else 0 for i, p in enumerate(wide)]], heads=8, kv_heads=2, page_size=5))
    yield Case("tree-window", _tree_arguments(make, [30, 5], [chain, bush], window=4))
    yield Case("window", (*make_paged(make, ragged), 24))
    yield Case("softcap", (*make_paged(make, ragged), None, 20.0))
    yield Case("empty", make_paged(make, []))


def _bad_cases(make: Make) -> Iterator[BadCase]:
    args = make_paged(make, [(20, 5)])
    q, k_pages, v_pages, table, cu_q, cached, scale = args
    yield BadCase("rank", (q[0], *args[1:]), "attention.paged: q: shape")
    yield BadCase("head_dim", (q[..., :48], *args[1:]), "attention.paged: k_pages: shape")
    yield BadCase("page-id", (q, k_pages, v_pages, table + 99, cu_q, cached, scale), "attention.paged: table: page")
    yield BadCase("cached", (q, k_pages, v_pages, table, cu_q, cached + 1000, scale), "attention.paged: cached: 1025 positions")
    yield BadCase("negative", (q, k_pages, v_pages, table, cu_q, cached - 21, scale), "attention.paged: cached: -1")
    yield BadCase("cu_q", (q, k_pages, v_pages, table, cu_q + 1, cached, scale), "attention.paged: cu_q: rows")
    yield BadCase("scale", (*args[:6], float("nan")), "attention.paged: scale: nan")
    yield BadCase("no-heads", (q[:, :0], *args[1:]), "attention.paged: q: 0 heads")
    yield BadCase("scales", (*args, None, None, None, None, torch.zeros(4, 1, 16)), "attention.paged: k_scales: expected with int8")
    yield BadCase("window", (*args, 0), "attention.paged: window: 0")


def _cost(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, cu_q: Tensor, cached: Tensor, scale: float, *_: object) -> Cost:
    kv_heads, head_dim = k_pages.shape[1], q.shape[2]
    rows = cu_q.diff().tolist()
    keys = [c + n for c, n in zip(cached.tolist(), rows, strict=True)]
    visible = sum(n * c + n * (n + 1) // 2 for c, n in zip(cached.tolist(), rows, strict=True))
    return Cost(2 * q.nbytes + 2 * sum(keys) * kv_heads * head_dim * k_pages.dtype.itemsize, 4 * q.shape[1] * head_dim * visible)


def _bench_cases(make: Make) -> Iterator[Case]:
    for name, lengths in [("decode 1 x 4096", [(4095, 1)]), ("decode 8 x 1024", [(1023, 1)] * 8), ("prefill 2048", [(0, 2048)])]:
        yield Case(f"SmolLM2-135M {name}", make_paged(make, lengths, heads=9, kv_heads=3))


register(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor table, Tensor cu_q, Tensor cached, float scale, int? window=None, "
    "float? softcap=None, Tensor? mask=None, Tensor? mask_start=None, Tensor? k_scales=None, Tensor? v_scales=None) -> Tensor",
    _paged,
    function=paged,
    reference=ref.attention.paged,
    fake=lambda q, *_, **__: q.new_empty(q.shape),
    cases=_cases,
    bad_cases=_bad_cases,
    bench_cases=_bench_cases,
    cost=_cost,
    bound="memory",
    tolerance=4.0,  # exp here has 2 ulps, torch's sums over keys are pairwise
    source="arXiv 1805.02867, 2309.06180",
)
