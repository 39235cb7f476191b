"""The weights of attention, returned once in a compact type and used again by layers that share them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import FLOATS, check, check_tensors, rows_contiguous
from stretto.ops.attention.prefill import check_attention, empty_result, make_qkv, seen_pairs
from stretto.ops.table import BadCase, Case, Cost, Make, register


def with_probs(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None,
    softcap: float | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`dense`, and the weights it used.

    Args:
        q, k, v, scale, causal, window, softcap: as for `dense`. dtype: of the weights, float32 / float16 / bfloat16; None: q's.
    Returns: (out, lse, probs): out and lse with the bits of `dense`; probs [batch, heads, rows, keys], zero where a key is not seen. The matrix
        grows with rows * keys: take long prompts in chunks of queries.
    Raises: ValueError naming the argument.
    Source: arXiv 2409.14595. Reference: ops.ref.attention.with_probs. Bound by compute; by memory for few rows.
    """
    if needs_dispatch(q, k, v):
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.stretto.attention_with_probs(q, k, v, scale, causal, window, softcap, dtype)
        return result
    return _with_probs(q, k, v, scale, causal, window, softcap, dtype)


def _with_probs(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None,
    softcap: float | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "attention.with_probs"
    scale = check_attention(op, q, k, v, scale, softcap)
    check(window is None or window >= 1, f"{op}: window: {window}, expected at least 1")
    check(dtype is None or dtype in FLOATS, f"{op}: dtype: {dtype}, expected torch.float32, torch.float16 or torch.bfloat16")
    if _backend.use_reference("attention_with_probs", q):
        return ref.attention.with_probs(q, k, v, scale, causal, window, softcap, dtype)
    out, lse, probs = _empty(q, k, dtype)
    _backend._C.attention_with_probs(  # type: ignore[union-attr]
        rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), scale, causal, window or 0, softcap or 0.0, out, lse, probs
    )
    return out, lse, probs


def _empty(q: Tensor, k: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    return *empty_result(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), dtype=dtype or q.dtype)


def apply_probs(probs: Tensor, v: Tensor) -> Tensor:
    """Weighted sums of values by weights that another layer computed.

    Args:
        probs: [batch, heads, rows, keys], float32 / float16 / bfloat16. v: [batch, keys, kv_heads, head_dim], likewise, of any of these types.
    Returns: [batch, rows, heads, head_dim] of v's dtype. Values are added in order, in float: a row's bits depend on its weights and values
        alone. A value of weight zero is not read.
    Raises: ValueError naming the argument.
    Source: arXiv 2409.14595. Reference: ops.ref.attention.apply_probs. Bound by memory for few rows, else by compute: half of `dense`.
    """
    if needs_dispatch(probs, v):
        result: Tensor = torch.ops.stretto.apply_probs(probs, v)
        return result
    return _apply_probs(probs, v)


def _apply_probs(probs: Tensor, v: Tensor) -> Tensor:
    op = "attention.apply_probs"
    check_tensors(op, probs=(probs, "batch heads rows keys", FLOATS), v=(v, "batch keys kv_heads head_dim", FLOATS))
    check(v.shape[3] > 0, f"{op}: v: head_dim 0, expected at least 1")
    check(
        v.shape[2] > 0 and probs.shape[1] > 0 and probs.shape[1] % v.shape[2] == 0,
        f"{op}: probs: {probs.shape[1]} heads, expected a multiple of the {v.shape[2]} in v",
    )
    if _backend.use_reference("apply_probs", v):
        return ref.attention.apply_probs(probs, v)
    out = _empty_out(probs, v)
    _backend._C.apply_probs(rows_contiguous(probs), rows_contiguous(v), out)  # type: ignore[union-attr]
    return out


def _empty_out(probs: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(probs.shape[0], probs.shape[2], probs.shape[1], v.shape[3])


def _cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        yield Case(f"causal-{dtype}", (*make_qkv(make, 2, 77, 300, 6, 2, 64, dtype), None, True))
    yield Case("full", (*make_qkv(make, 1, 5, 19, 3, 1, 13), None, False, None, 4.0))
    yield Case("window", (*make_qkv(make, 1, 300, 310, 2, 1, 32), None, True, 20))
    yield Case("compact", (*make_qkv(make, 1, 40, 50, 2, 1, 32), None, False, None, None, torch.bfloat16))
    yield Case("rows-before-keys", (*make_qkv(make, 1, 40, 7, 3, 3, 32), None, True))
    yield Case("no-keys", make_qkv(make, 1, 4, 0, 2, 1, 32))


def _bad_cases(make: Make) -> Iterator[BadCase]:
    q, k, v = make_qkv(make, 1, 5, 7, 4, 2, 16)
    yield BadCase("rank", (q, k[0], v), "attention.with_probs: k: shape")
    yield BadCase("dtype", (q, k, v), "attention.with_probs: dtype: torch.float64", {"dtype": torch.float64})
    yield BadCase("window", (q, k, v), "attention.with_probs: window: 0", {"window": 0})


def _bench_cases(make: Make) -> Iterator[Case]:
    for name, rows, dtype in [("prefill chunk 256 of", 256, torch.float32), ("decode at", 1, torch.bfloat16)]:
        yield Case(f"TinyLlama {name} 2048 {dtype}", (*make_qkv(make, 1, rows, 2048, 32, 4, 64, dtype), None, True))


def _torch_probs(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Eager attention, which is what returns weights in torch."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q.shape[3] ** -0.5 * q @ k.mT).float()
    probs = scores.masked_fill(~ref.attention.dense_sees(q.shape[2], k.shape[2], causal, None), -torch.inf).softmax(-1).to(q.dtype)
    return probs @ v, probs


register(
    "attention_with_probs(Tensor q, Tensor k, Tensor v, float? scale=None, bool causal=False, int? window=None, float? softcap=None, "
    "ScalarType? dtype=None) -> (Tensor, Tensor, Tensor)",
    _with_probs,
    function=with_probs,
    reference=ref.attention.with_probs,
    fake=lambda q, k, *args, dtype=None, **_: _empty(q, k, args[5] if len(args) > 5 else dtype),
    cases=_cases,
    bad_cases=_bad_cases,
    bench_cases=_bench_cases,
    cost=lambda q, k, v, scale=None, causal=False, window=None, softcap=None, dtype=None: Cost(
        2 * q.nbytes + k.nbytes + v.nbytes + q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] * (dtype or q.dtype).itemsize,
        4 * q.shape[0] * seen_pairs(q.shape[1], k.shape[1], causal, window) * q.shape[2] * q.shape[3],
    ),
    bound="compute",
    tolerance=4.0,  # as dense_attention
    peers={"torch eager": _torch_probs},
    source="arXiv 2409.14595",
)


def _apply_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for batch, heads, kv_heads, rows, keys, head_dim in [(2, 4, 2, 33, 300, 64), (1, 3, 1, 1, 70, 13), (1, 2, 2, 0, 5, 16), (1, 2, 1, 3, 0, 16)]:
            probs = make.randn(batch, heads, rows, keys).softmax(-1).to(dtype)
            yield Case(f"{batch}x{heads}x{rows}x{keys}x{head_dim}-{dtype}", (probs, make.randn(batch, keys, kv_heads, head_dim, dtype=dtype)))
    probs = make.randn(1, 4, 40, 40).tril().to(torch.bfloat16)
    yield Case("mixed-types-strided", (probs, make.randn(1, 2, 40, 32).transpose(1, 2)))


def _apply_bad_cases(make: Make) -> Iterator[BadCase]:
    probs, v = make.randn(1, 4, 3, 5), make.randn(1, 5, 2, 16)
    yield BadCase("keys", (probs, v[:, :4]), "attention.apply_probs: v: shape")
    yield BadCase("heads", (probs[:, :3], v), "attention.apply_probs: probs: 3 heads")
    yield BadCase("dtype", (probs.long(), v), "attention.apply_probs: probs: int64")


def _apply_bench_cases(make: Make) -> Iterator[Case]:
    for name, rows, dtype in [("prefill chunk 256 of", 256, torch.float32), ("decode at", 1, torch.bfloat16)]:
        probs = make.randn(1, 32, rows, 2048).softmax(-1).to(dtype)
        yield Case(f"TinyLlama {name} 2048 {dtype}", (probs, make.randn(1, 2048, 4, 64, dtype=dtype)))


register(
    "apply_probs(Tensor probs, Tensor v) -> Tensor",
    _apply_probs,
    function=apply_probs,
    reference=ref.attention.apply_probs,
    fake=_empty_out,
    cases=_apply_cases,
    bad_cases=_apply_bad_cases,
    bench_cases=_apply_bench_cases,
    cost=lambda probs, v: Cost(probs.nbytes + v.nbytes + probs[..., 0].numel() * v.shape[3] * v.dtype.itemsize, 2 * probs.numel() * v.shape[3]),
    bound="memory",
    tolerance=4.0,  # keys are added in order, torch's sums are blocked
    peers={"torch matmul": lambda probs, v: probs @ v.repeat_interleave(probs.shape[1] // v.shape[2], 2).transpose(1, 2)},
    source="arXiv 2409.14595",
)
