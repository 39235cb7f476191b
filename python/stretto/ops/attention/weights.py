"""What is read off attention beside its output: sums of the weights by key and distance, the weights themselves, and their reuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check, rows_contiguous
from stretto.ops.attention.prefill import check_attention, make_qkv, seen_pairs
from stretto.ops.table import BadCase, Case, Cost, Make, register

if TYPE_CHECKING:
    from typing_extensions import Unpack


def sums(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None, softcap: float | None = None,
    cu_q: Tensor | None = None, cu_k: Tensor | None = None, diagonals: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How much attention each key receives, and each distance, without the matrix of weights.

    Args:
        q, k, scale, causal, window, softcap, cu_q, cu_k: as given to `dense`, of which `lse` [batch, rows, heads] float32 is the second result.
        diagonals: whether sums by distance are wanted too; not with cu_q.
    Returns: (columns, by_diagonal) float32. columns [batch, heads, keys]: the sum of a key's weights over all queries; its mean over heads is
        the importance of a token, and sums over runs of keys are the mass of segments. by_diagonal [batch, heads, rows + keys - 1]: index
        j - i + rows - 1 sums the weights of queries i and keys j, so distance o (of positions) is at keys - 1 - o; else [batch, heads, 0].
        Queries are added in order: the same bits on every run, for any batch and threads.
    Raises: ValueError naming the argument; NotImplementedError for diagonals of packed sequences: call once a sequence.
    Reference: ops.ref.attention.sums. Bound by compute: half of `dense`.
    """
    if needs_dispatch(q, k, lse):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.attention_sums(q, k, lse, scale, causal, window, softcap, cu_q, cu_k, diagonals)
        return result
    return _sums(q, k, lse, scale, causal, window, softcap, cu_q, cu_k, diagonals)


def _sums(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None, softcap: float | None = None,
    cu_q: Tensor | None = None, cu_k: Tensor | None = None, diagonals: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "attention.sums"
    scale = check_attention(op, q, k, k, scale, softcap, lse=(lse, "batch rows heads", F32), cu_q=(cu_q, "offsets", I32), cu_k=(cu_k, "offsets", I32))
    check(window is None or window >= 1, f"{op}: window: {window}, expected at least 1")
    check((cu_q is None) == (cu_k is None), f"{op}: cu_k: expected with cu_q, and only then")
    check(cu_q is None or q.shape[0] == 1, f"{op}: q: batch {q.shape[0]}, expected 1 with cu_q")
    check(cu_q is None or cu_q.shape[0] > 0, f"{op}: cu_q: no values, expected at least 1")
    if diagonals and cu_q is not None:
        raise NotImplementedError(f"{op}: diagonals: of packed sequences; call it for one sequence at a time")
    if _backend.use_reference("attention_sums", q):
        return ref.attention.sums(q, k, lse, scale, causal, window, softcap, cu_q, cu_k, diagonals)
    columns, by_diagonal = _empty_sums(q, k, diagonals)
    if cu_q is not None:
        columns.zero_()  # keys of no sequence
    _backend._C.attention_sums(  # type: ignore[union-attr]
        rows_contiguous(q), rows_contiguous(k), lse.contiguous(), scale, causal, window or 0, softcap or 0.0, cu_q, cu_k, columns,
        by_diagonal if diagonals else None,
    )  # fmt: skip
    return columns, by_diagonal


def _empty_sums(q: Tensor, k: Tensor, diagonals: bool) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    width = max(rows + k.shape[1] - 1, 0) if diagonals else 0
    return q.new_empty((batch, heads, k.shape[1]), dtype=torch.float32), q.new_empty((batch, heads, width), dtype=torch.float32)


def _with_lse(
    make: Make,
    *sizes: Unpack[tuple[int, int, int, int, int, int]],
    dtype: torch.dtype = torch.float32,
    causal: bool = False,
    window: int | None = None,
) -> tuple[Tensor, ...]:
    q, k, v = make_qkv(make, *sizes, dtype=dtype)
    return q, k, ref.attention.dense(q, k, v, None, causal, window)[1]


def _cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        yield Case(f"full-{dtype}", _with_lse(make, 2, 40, 50, 4, 2, 64, dtype=dtype), {"diagonals": True})
        yield Case(f"causal-{dtype}", (*_with_lse(make, 1, 130, 300, 3, 1, 40, dtype=dtype, causal=True), None, True), {"diagonals": True})
    yield Case("window", (*_with_lse(make, 1, 130, 130, 2, 2, 32, causal=True, window=9), None, True, 9))
    yield Case("unseen", (*_with_lse(make, 1, 20, 7, 2, 2, 32, causal=True), None, True), {"diagonals": True})
    yield Case("no-keys", _with_lse(make, 1, 3, 0, 2, 2, 32), {"diagonals": True})
    q, k, v = make_qkv(make, 1, 30, 40, 3, 1, 48)
    cu = [torch.tensor(list(x), dtype=torch.int32) for x in ((0, 4, 4, 25, 28), (0, 9, 12, 33, 33))]
    lse = ref.attention.dense(q, k, v, None, True, None, 3.0, *cu)[1]
    yield Case("packed", (q, k, lse, None, True, None, 3.0, *cu))


def _bad_cases(make: Make) -> Iterator[BadCase]:
    q, k, lse = _with_lse(make, 1, 5, 7, 4, 2, 16)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    yield BadCase("lse", (q, k, lse[:, :4]), "attention.sums: lse: shape [1, 4, 4]")
    yield BadCase("window", (q, k, lse), "attention.sums: window: -1", {"window": -1})
    yield BadCase("packed", (q, k, lse), "attention.sums: diagonals: of packed", {"cu_q": cu, "cu_k": cu, "diagonals": True}, NotImplementedError)
    yield BadCase("cu_k", (q, k, lse), "attention.sums: cu_k: 8 at 1", {"cu_q": cu, "cu_k": torch.tensor([0, 8], dtype=torch.int32)})


def _cost(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None = None, causal: bool = False, window: int | None = None, softcap: float | None = None,
    cu_q: Tensor | None = None, cu_k: Tensor | None = None, diagonals: bool = False,
) -> Cost:  # fmt: skip
    pairs = q.shape[0] * seen_pairs(q.shape[1], k.shape[1], causal, window)
    if cu_q is not None and cu_k is not None:
        pairs = sum(seen_pairs(n, m, causal, window) for n, m in zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True))
    return Cost(q.nbytes + k.nbytes + lse.nbytes + 4 * q.shape[2] * k.shape[1], 2 * pairs * q.shape[2] * q.shape[3])


def _bench_cases(make: Make) -> Iterator[Case]:
    yield Case("BERT-base 16 x 128", _with_lse(make, 16, 128, 128, 12, 12, 64))
    q, k, _v = make_qkv(make, 1, 64, 16384, 28, 4, 128, torch.bfloat16)
    lse = torch.zeros(1, 64, 28) + 10.0  # its value does not change the work
    yield Case("Qwen2.5-7B-1M last 64 of 16384", (q, k, lse, None, True), {"diagonals": True})


def _torch_sums(q: Tensor, k: Tensor, lse: Tensor, scale: float | None = None, causal: bool = False, **_: object) -> Tensor:
    """Eager torch that makes the matrix."""
    scores = q.transpose(1, 2) @ k.repeat_interleave(q.shape[2] // k.shape[2], 2).permute(0, 2, 3, 1)
    if causal:
        scores = scores.masked_fill(~ref.attention.dense_sees(q.shape[1], k.shape[1], True, None), -torch.inf)
    sums: Tensor = (q.shape[3] ** -0.5 * scores.float()).softmax(-1).sum(2)
    return sums


register(
    "attention_sums(Tensor q, Tensor k, Tensor lse, float? scale=None, bool causal=False, int? window=None, float? softcap=None, "
    "Tensor? cu_q=None, Tensor? cu_k=None, bool diagonals=False) -> (Tensor, Tensor)",
    _sums,
    function=sums,
    reference=ref.attention.sums,
    fake=lambda q, k, *args, diagonals=False, **_: _empty_sums(q, k, args[7] if len(args) > 7 else diagonals),
    cases=_cases,
    bad_cases=_bad_cases,
    bench_cases=_bench_cases,
    cost=_cost,
    bound="compute",
    tolerance=4.0,  # queries are added one by one, torch's sums are pairwise
    peers={"torch softmax and sum": _torch_sums},
    source="arXiv 2201.03327 (token importance), 2407.02490 (diagonals)",
)
