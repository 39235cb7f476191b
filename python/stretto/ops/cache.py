"""Moves inside a paged key-value cache, all layers in one call: pages (copy on write) and rows (accepted drafts).

Layout: k [layers, pages, kv_heads, head_dim, page_size], v [layers, pages, kv_heads, page_size, head_dim], scales of
int8 rows [layers, pages, kv_heads, page_size] float32. The page of one layer is contiguous; layers and pages may lie any
distance apart, in any order. Both ops write into these tensors and return nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check, check_tensors, dtype_as
from stretto.ops.table import BadCase, Case, Cost, Make, register

CACHE_DTYPES = (*FLOATS, torch.int8)


def copy_pages(k: Tensor, v: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None) -> None:
    """Copy page src[i] to page dst[i] in every layer, in order of i.

    Args:
        k, v: the cache, float32 / float16 / bfloat16 / int8; written.
        src, dst: [pairs] int32 page ids; -1 in either skips the pair.
        k_scales, v_scales: for int8; written.
    Raises: ValueError naming the argument, what it is and what was expected; an id out of range leaves the cache
        untouched.
    Reference: ops.ref.cache.copy_pages. Bound by memory.
    """
    if needs_dispatch(k, v, src, dst, k_scales, v_scales):
        torch.ops.stretto.copy_pages(k, v, src, dst, k_scales, v_scales)
    else:
        _copy_pages(k, v, src, dst, k_scales, v_scales)


def move_rows(k: Tensor, v: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None) -> None:
    """Copy row src[i] to row dst[i] in every layer, in order of i.

    Args:
        k, v: the cache, float32 / float16 / bfloat16 / int8; written.
        src, dst: [pairs] int32 slots, page * page_size + offset; -1 in either skips the pair. A row written by an
            earlier pair is read as written, so rows can be moved down in place when src is increasing and dst[i] <=
            src[i].
        k_scales, v_scales: for int8; written.
    Raises: ValueError naming the argument, what it is and what was expected; an id out of range leaves the cache
        untouched.
    Reference: ops.ref.cache.move_rows. Bound by memory.
    """
    if needs_dispatch(k, v, src, dst, k_scales, v_scales):
        torch.ops.stretto.move_rows(k, v, src, dst, k_scales, v_scales)
    else:
        _move_rows(k, v, src, dst, k_scales, v_scales)


def _checked(op: str, k: Tensor, v: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> bool:
    """Check all but the ids; True where the reference must run (ids checked too: native code checks its own)."""
    sizes = check_tensors(
        op,
        k=(k, "layers pages kv_heads head_dim page_size", CACHE_DTYPES),
        v=(v, "layers pages kv_heads page_size head_dim", dtype_as(k)),
        src=(src, "pairs", I32),
        dst=(dst, "pairs", I32),
        k_scales=(k_scales, "layers pages kv_heads page_size", F32),
        v_scales=(v_scales, "layers pages kv_heads page_size", F32),
    )
    for name, tensor in (("k", k), ("v", v), ("k_scales", k_scales), ("v_scales", v_scales)):
        check(
            tensor is None or not tensor.numel() or tensor[0, 0].is_contiguous(),
            f"{op}: {name}: strided, expected the page of a layer to be contiguous (it is written in place)",
        )
    if not _backend.use_reference(op, k):
        return False
    limit = sizes["pages"] * (sizes["page_size"] if op == "move_rows" else 1)
    for name, ids in (("src", src), ("dst", dst)):
        for i in ids.tolist():
            check(-1 <= i < limit, f"{op}: {name}: {i}, expected -1 (skip) or an id below {limit}")
    return True


def _copy_pages(k: Tensor, v: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None) -> None:
    if _checked("copy_pages", k, v, src, dst, k_scales, v_scales):
        return ref.cache.copy_pages(k, v, src, dst, k_scales, v_scales)
    _backend._C.copy_pages(k, v, src.contiguous(), dst.contiguous(), k_scales, v_scales)  # type: ignore[union-attr]


def _move_rows(k: Tensor, v: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None) -> None:
    if _checked("move_rows", k, v, src, dst, k_scales, v_scales):
        return ref.cache.move_rows(k, v, src, dst, k_scales, v_scales)
    _backend._C.move_rows(k, v, src.contiguous(), dst.contiguous(), k_scales, v_scales)  # type: ignore[union-attr]


def _cache(make: Make, layers: int, pages: int, heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype == torch.int8:
        return (make.randint(-128, 128, layers, pages, heads, head_dim, page_size, dtype=dtype),
                make.randint(-128, 128, layers, pages, heads, page_size, head_dim, dtype=dtype))  # fmt: skip
    return (make.randn(layers, pages, heads, head_dim, page_size, dtype=dtype),
            make.randn(layers, pages, heads, page_size, head_dim, dtype=dtype))  # fmt: skip


def _cases(make: Make, rows: bool) -> Iterator[Case]:
    def ids(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=make.device)

    for dtype in CACHE_DTYPES:
        for shape in [(2, 5, 3, 64, 16), (9, 4, 1, 80, 7), (1, 6, 2, 1, 1), (17, 4, 2, 3, 5)]:
            layers, pages, heads, head_dim, page_size = shape
            k, v = _cache(make, *shape, dtype)
            scales = [make.randn(layers, pages, heads, page_size) for _ in range(2 if dtype == torch.int8 else 0)]
            last = pages * (page_size if rows else 1) - 1
            tag = f"{layers}x{pages}x{heads}x{head_dim}x{page_size}-{dtype}"
            yield Case(tag, (k, v, ids(last, 2, 0, 3), ids(0, 1, 2, 3), *scales))
    k, v = _cache(make, 2, 3, 2, 8, 4, torch.float32)
    k[0, 0], v[1, 0] = float("nan"), float("inf")
    yield Case("non-finite", (k, v, ids(0), ids(2)))
    yield Case("skips", (*_cache(make, 2, 3, 2, 8, 4, torch.float32), ids(-1, 1, 0, -1), ids(0, -1, 2, -1)))
    yield Case("chained", (*_cache(make, 2, 3, 2, 8, 4, torch.float32), ids(0, 1, 2), ids(1, 2, 0)))
    yield Case("no-pairs", (*_cache(make, 2, 3, 2, 8, 4, torch.float32), ids(), ids()))
    pages_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in _cache(make, 3, 4, 2, 8, 4, torch.float16)]
    yield Case("pages-first", (*pages_first, ids(3, 2), ids(0, 1)))
    yield Case("no-layers", (*_cache(make, 0, 3, 2, 8, 4, torch.float32), ids(0), ids(1)))


def _bad_cases(make: Make, op: str, limit: int) -> Iterator[BadCase]:
    k, v = _cache(make, 2, 3, 2, 8, 4, torch.float32)
    one = torch.zeros(1, dtype=torch.int32)
    yield BadCase("src", (k, v, one + limit, one), f"{op}: src: {limit}, expected -1 (skip) or an id below {limit}")
    yield BadCase("dst", (k, v, one, one - 2), f"{op}: dst: -2")
    yield BadCase("layout", (k, k, one, one), f"{op}: v: shape [2, 3, 2, 8, 4]")
    yield BadCase("dtype", (k, v.half(), one, one), f"{op}: v: float16")
    yield BadCase("ids", (k, v, one.long(), one), f"{op}: src: int64")
    yield BadCase("pairs", (k, v, one, torch.zeros(2, dtype=torch.int32)), f"{op}: dst: shape [2]")
    yield BadCase("strided", (k.transpose(2, 3).contiguous().transpose(2, 3), v, one, one), f"{op}: k: strided")
    yield BadCase("scales", (k, v, one, one, torch.zeros(2, 3, 2, 5)), f"{op}: k_scales: shape [2, 3, 2, 5]")


def _bench_cases(make: Make, rows: bool) -> Iterator[Case]:
    for name, layers, heads, head_dim in [("SmolLM2-135M", 30, 3, 64), ("Llama-3-8B", 32, 8, 128)]:
        k, v = _cache(make, layers, 16, heads, head_dim, 16, torch.float16)
        for pairs in (1, 8):
            src = torch.arange(pairs, dtype=torch.int32)
            yield Case(f"{name} {pairs} {'rows' if rows else 'pages'}", (k, v, src + 8, src))


def _cost(rows: bool) -> Callable[..., Cost]:
    def cost(k: Tensor, v: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None = None, v_scales: Tensor | None = None) -> Cost:
        units = k.shape[1] * (k.shape[4] if rows else 1)
        moved = sum(t.nbytes for t in (k, v, k_scales, v_scales) if t is not None) // max(1, units)
        return Cost(bytes=2 * moved * src.numel(), flops=0)

    return cost


for _name, _kernel, _function, _reference in (
    ("copy_pages", _copy_pages, copy_pages, ref.cache.copy_pages),
    ("move_rows", _move_rows, move_rows, ref.cache.move_rows),
):
    _rows = _name == "move_rows"
    register(
        f"{_name}(Tensor(a!) k, Tensor(b!) v, Tensor src, Tensor dst, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()",
        _kernel,
        function=_function,
        reference=_reference,
        fake=lambda k, v, src, dst, k_scales=None, v_scales=None: None,
        cases=functools.partial(_cases, rows=_rows),
        bad_cases=functools.partial(_bad_cases, op=_name, limit=12 if _rows else 3),
        bench_cases=functools.partial(_bench_cases, rows=_rows),
        cost=_cost(_rows),
        bound="memory",
        peers={"torch": _reference},
        source="arXiv 2309.06180 (pages, copy on write)",
    )
