"""Attention over plain tensors: the whole of a prompt, an image, a batch of texts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import FLOATS, I32, check, check_tensors, dtype_as, rows_contiguous
from stretto.ops.table import BadCase, Case, Cost, Make, register


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None,
    softcap: float | None = None, cu_q: Tensor | None = None, cu_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of all rows of q over all rows of k and v, or sequence by sequence where they are packed.

    Args:
        q: [batch, rows, heads, head_dim], float32 / float16 / bfloat16, any strides: views of [batch, heads, rows, head_dim] are read in place.
        k, v: [batch, keys, kv_heads, head_dim] of q's dtype; heads is a multiple of kv_heads.
        scale: of the scores, before the softmax; None: head_dim ** -0.5.
        causal: a query sees keys up to its own position. The last query stands at the last key: query i is at position i + keys - rows.
        window: a query sees only keys less than this many positions away.
        softcap: scores become softcap * tanh(score / softcap).
        cu_q, cu_k: [seqs + 1] int32, for batch 1: sequence s is rows cu_q[s] .. cu_q[s + 1] over keys cu_k[s] .. cu_k[s + 1].
    Returns: (out, lse): out like q, with q's order of strides; lse [batch, rows, heads] float32, the natural log of the sum of exponentials.
        A row that sees no key, or belongs to no sequence, gives zeros and -inf. Float sums; a row's bits depend on its query and the keys it
        sees alone, not on the batch, other rows or threads, and equal those of `paged` over the same values.
    Raises: ValueError naming the argument.
    Source: arXiv 2205.14135. Reference: ops.ref.attention.dense. Bound by compute.
    """
    if needs_dispatch(q, k, v):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.dense_attention(q, k, v, scale, causal, window, softcap, cu_q, cu_k)
        return result
    return _dense(q, k, v, scale, causal, window, softcap, cu_q, cu_k)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None,
    softcap: float | None = None, cu_q: Tensor | None = None, cu_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scale = check_attention("attention.dense", q, k, v, scale, softcap, cu_q=(cu_q, "offsets", I32), cu_k=(cu_k, "offsets", I32))
    check(window is None or window >= 1, f"attention.dense: window: {window}, expected at least 1")
    check((cu_q is None) == (cu_k is None), "attention.dense: cu_k: expected with cu_q, and only then")
    check(cu_q is None or q.shape[0] == 1, f"attention.dense: q: batch {q.shape[0]}, expected 1 with cu_q")
    check(cu_q is None or cu_q.shape[0] > 0, "attention.dense: cu_q: no values, expected at least 1")
    if _backend.use_reference("dense_attention", q):
        return ref.attention.dense(q, k, v, scale, causal, window, softcap, cu_q, cu_k)
    out, lse = empty_result(q)
    if cu_q is not None and cu_k is not None:  # rows of no sequence are not written
        out.zero_()
        lse.fill_(-math.inf)
        cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    _backend._C.dense_attention(  # type: ignore[union-attr]
        rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), scale, causal, window or 0, softcap or 0.0, cu_q, cu_k, out, lse
    )
    return out, lse


def check_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None, **more: tuple[Tensor | None, str, tuple[torch.dtype, ...]]
) -> float:
    """What every op over plain tensors asks of q, k and v; returns the scale."""
    check_tensors(
        op, q=(q, "batch rows heads head_dim", FLOATS), k=(k, "batch keys kv_heads head_dim", dtype_as(q)),
        v=(v, "batch keys kv_heads head_dim", dtype_as(q)), **more,
    )  # fmt: skip
    heads, kv_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
    check(head_dim > 0, f"{op}: q: head_dim 0, expected at least 1")
    check(kv_heads > 0 and heads > 0 and heads % kv_heads == 0, f"{op}: q: {heads} heads, expected a positive multiple of the {kv_heads} in k")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap: {softcap}, expected above 0")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{op}: scale: {scale}, expected a finite number")
    return float(head_dim**-0.5) if scale is None else scale


def empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) for queries q [batch, rows, heads, head_dim]: out in q's order of strides, elements of a head adjacent."""
    out = torch.empty_like(q)
    if q.shape[-1] > 1 and out.stride(-1) != 1:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def make_qkv(
    make: Make, batch: int, rows: int, keys: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Random (q, k, v) as [batch, rows, heads, head_dim]."""
    q = make.randn(batch, rows, heads, head_dim, dtype=dtype)
    return q, make.randn(batch, keys, kv_heads, head_dim, dtype=dtype), make.randn(batch, keys, kv_heads, head_dim, dtype=dtype)


def _cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        yield Case(f"causal-{dtype}", make_qkv(make, 2, 77, 77, 6, 2, 64, dtype), {"causal": True})
        yield Case(f"full-{dtype}", make_qkv(make, 1, 33, 300, 4, 4, 80, dtype))
        yield Case(f"odd-{dtype}", make_qkv(make, 1, 5, 19, 3, 1, 13, dtype), {"causal": True})
    for heads, kv_heads, head_dim in [(8, 1, 128), (4, 2, 72), (5, 5, 32), (2, 1, 256), (200, 1, 16)]:
        yield Case(f"heads-{heads}-{kv_heads}-{head_dim}", make_qkv(make, 1, 40, 40, heads, kv_heads, head_dim), {"causal": True})
    yield Case("chunk", make_qkv(make, 1, 40, 530, 3, 3, 32), {"causal": True})
    yield Case("rows-before-keys", make_qkv(make, 1, 40, 7, 3, 3, 32), {"causal": True})
    yield Case("window", make_qkv(make, 1, 300, 310, 2, 1, 32), {"causal": True, "window": 20})
    yield Case("window-both-ways", make_qkv(make, 1, 300, 300, 2, 1, 32), {"window": 30})
    yield Case("softcap", make_qkv(make, 1, 20, 20, 2, 1, 32), {"softcap": 5.0, "scale": 1.0})
    for rows, keys in [(0, 5), (5, 0), (1, 1)]:
        yield Case(f"{rows}-over-{keys}", make_qkv(make, 1, rows, keys, 2, 1, 32))
    q, k, v = make_qkv(make, 2, 3, 20, 20, 2, 64)
    yield Case("heads-first", (q.transpose(1, 2), k.transpose(1, 2)[:, :, :1], v.transpose(1, 2)[:, :, 1:2]), {"causal": True})
    q, k, v = make_qkv(make, 1, 30, 40, 3, 1, 48)
    cu = [torch.tensor(list(x), dtype=torch.int32) for x in ((0, 4, 4, 25, 28), (0, 9, 12, 33, 33))]
    yield Case("packed", (q, k, v, None, True, None, None, *cu))


def _bad_cases(make: Make) -> Iterator[BadCase]:
    q, k, v = make_qkv(make, 1, 5, 7, 4, 2, 16)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    yield BadCase("rank", (q[0], k, v), "attention.dense: q: shape")
    yield BadCase("dtype", (q, k.half(), v), "attention.dense: k: float16")
    yield BadCase("heads", (q[:, :, :3], k, v), "attention.dense: q: 3 heads")
    yield BadCase("keys", (q, k, v[:, :6]), "attention.dense: v: shape")
    yield BadCase("scale", (q, k, v, float("inf")), "attention.dense: scale: inf")
    yield BadCase("softcap", (q, k, v), "attention.dense: softcap: -1.0", {"softcap": -1.0})
    yield BadCase("window", (q, k, v), "attention.dense: window: 0", {"window": 0})
    yield BadCase("cu_k", (q, k, v), "attention.dense: cu_k: expected with", {"cu_q": cu})
    yield BadCase("cu_q", (q, k, v), "attention.dense: cu_q: 6 at 1", {"cu_q": cu + torch.tensor([0, 1], dtype=torch.int32), "cu_k": cu})
    yield BadCase("falling", (q, k, v), "attention.dense: cu_k: 0 at 1", {"cu_q": cu, "cu_k": cu.flip(0)})


def seen_pairs(rows: int, keys: int, causal: bool, window: int | None) -> int:
    """How many (query, key) pairs dense attention visits."""
    position = torch.arange(rows) + keys - rows
    end = (position + 1).clamp(max=keys) if causal else torch.full_like(position, keys)
    begin = torch.zeros_like(position)
    if window is not None:
        begin, end = (position - window + 1).clamp(min=0), torch.minimum(end, position + window)
    return int((end - begin).clamp(min=0).sum())


def _cost(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None,
    softcap: float | None = None, cu_q: Tensor | None = None, cu_k: Tensor | None = None,
) -> Cost:  # fmt: skip
    if cu_q is None or cu_k is None:
        pairs = q.shape[0] * seen_pairs(q.shape[1], k.shape[1], causal, window)
    else:
        pairs = sum(seen_pairs(n, m, causal, window) for n, m in zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True))
    return Cost(2 * q.nbytes + k.nbytes + v.nbytes, 4 * pairs * q.shape[2] * q.shape[3])


def _bench_cases(make: Make) -> Iterator[Case]:
    for name, rows, heads, kv_heads, head_dim in [("Llama-3-8B", 1024, 32, 8, 128), ("SmolLM2-135M", 2048, 9, 3, 64)]:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(f"{name} causal {rows} {dtype}", make_qkv(make, 1, rows, rows, heads, kv_heads, head_dim, dtype), {"causal": True})
    yield Case("MiniLM-L6 32 x 128", make_qkv(make, 32, 128, 128, 12, 12, 32))


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """torch's own, on the layout it likes best."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


register(
    "dense_attention(Tensor q, Tensor k, Tensor v, float? scale=None, bool causal=False, int? window=None, float? softcap=None, "
    "Tensor? cu_q=None, Tensor? cu_k=None) -> (Tensor, Tensor)",
    _dense,
    function=dense,
    reference=ref.attention.dense,
    fake=lambda q, *_, **__: empty_result(q),
    cases=_cases,
    bad_cases=_bad_cases,
    bench_cases=_bench_cases,
    cost=_cost,
    bound="compute",
    tolerance=4.0,  # exp here has 2 ulps, torch's sums over keys are pairwise
    peers={"torch sdpa": torch_sdpa},
    source="arXiv 2205.14135",
)
