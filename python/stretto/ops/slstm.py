"""sLSTM: scalar memory with exponential gates and recurrent weights, the other cell of xLSTM."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check, check_tensors, dtype_as, rows_contiguous
from stretto.ops.mlstm import check_bounds, check_slots
from stretto.ops.table import BadCase, Case, Cost, Make, register


def slstm(Wx: Tensor, R: Tensor, b: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run whole sequences through an sLSTM cell.

    Args:
        Wx: [tokens, 4, heads, dim], float32 / float16 / bfloat16: the input's part of i, f, z and o, in this order. Any strides; a copy
            is made when elements of a row are not adjacent.
        R: [heads, dim, 4, dim], Wx's type or float32: what y of the token before adds to them. b: [4, heads, dim] float32.
        state: [B, 4, heads, dim] float32: y, c, n, m to start from; None: zeros. Where n is 0 the cell holds nothing and m is not read.
        cu_seqlens: [B + 1] int32, sequence s has tokens cu_seqlens[s] to cu_seqlens[s + 1]; None: one sequence.
    Returns: (y, state): y [tokens, heads, dim] like Wx; the state after the last token, that given for a sequence without tokens. Float
        sums; the bits do not depend on other sequences, on threads, or on where a sequence is cut. NaN stays in its sequence and head.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2405.04517. Reference: ops.ref.mlstm.slstm, whose gradient is the op's. Bound by latency: tokens wait for each other.
    """
    if needs_dispatch(Wx, R, b, state, cu_seqlens):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.slstm(Wx, R, b, state, cu_seqlens)
        return result
    return _slstm(Wx, R, b, state, cu_seqlens)


def slstm_step(
    Wx: Tensor, R: Tensor, b: Tensor, state: Tensor, slot_ids: Tensor, cu_seqlens: Tensor | None = None, update: bool = True,
    *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Advance states in place by one token or several.

    Args:
        Wx, R, b, cu_seqlens: as in slstm; one token a sequence, or as cu_seqlens says.
        state: [slots, 4, heads, dim] float32, contiguous; written.
        slot_ids: [B] int32, the slot of each sequence, each at most once; -1: an idle sequence, its rows of y are zero.
        update: False reads the states and leaves them as they are; slots may repeat then. To keep accepted tokens, step again with them.
        out: like y; written instead of a new tensor; contiguous.
    Returns: y [tokens, heads, dim], the bits of slstm and of one call a token.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2405.04517. Reference: ops.ref.mlstm.slstm_step. Bound by memory: R is read once.
    """
    if out is None and needs_dispatch(Wx, R, b, state, slot_ids, cu_seqlens):
        result: Tensor = torch.ops.stretto.slstm_step(Wx, R, b, state, slot_ids, cu_seqlens, update)
        return result
    return _slstm_step(Wx, R, b, state, slot_ids, cu_seqlens, update, out=out)


def _weight_dtypes(Wx: object) -> tuple[torch.dtype, ...]:
    return tuple(dict.fromkeys((*dtype_as(Wx), torch.float32)))


def _slstm(Wx: Tensor, R: Tensor, b: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    sizes = check_tensors(
        "slstm", Wx=(Wx, "tokens 4 heads dim", FLOATS), R=(R, "heads dim 4 dim", _weight_dtypes(Wx)), b=(b, "4 heads dim", F32),
        state=(state, "B 4 heads dim", F32), cu_seqlens=(cu_seqlens, "bounds", I32),
    )  # fmt: skip
    batch = sizes.get("bounds", 2) - 1
    check(batch >= 0, "slstm: cu_seqlens: shape [0], expected [B + 1]")
    check(sizes.get("B", batch) == batch, f"slstm: state: {sizes.get('B')} sequences, expected {batch}")
    if _backend.use_reference("slstm", Wx):
        if cu_seqlens is not None:
            check_bounds("slstm", cu_seqlens, batch, sizes["tokens"])
        return ref.mlstm.slstm(Wx, R, b, state, cu_seqlens)
    new = torch.zeros(batch, 4, *Wx.shape[2:]) if state is None else state.clone(memory_format=torch.contiguous_format)
    y = torch.empty(sizes["tokens"], *Wx.shape[2:], dtype=Wx.dtype)
    cu = torch.tensor([0, sizes["tokens"]], dtype=torch.int32) if cu_seqlens is None else cu_seqlens.contiguous()
    _backend._C.slstm("slstm", rows_contiguous(Wx), R.contiguous(), b.contiguous(), new, y, cu, None, True)  # type: ignore[union-attr]
    return y, new


def _slstm_step(
    Wx: Tensor, R: Tensor, b: Tensor, state: Tensor, slot_ids: Tensor, cu_seqlens: Tensor | None = None, update: bool = True,
    *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    sizes = check_tensors(
        "slstm_step", Wx=(Wx, "tokens 4 heads dim", FLOATS), R=(R, "heads dim 4 dim", _weight_dtypes(Wx)), b=(b, "4 heads dim", F32),
        state=(state, "slots 4 heads dim", F32), slot_ids=(slot_ids, "B", I32), cu_seqlens=(cu_seqlens, "bounds", I32),
        out=(out, "tokens heads dim", dtype_as(Wx)),
    )  # fmt: skip
    for name, tensor in (("state", state), ("out", out)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"slstm_step: {name}: strided, expected contiguous (it is written in place)")
    if cu_seqlens is None and sizes["tokens"] != sizes["B"]:
        raise ValueError(f"slstm_step: slot_ids: {sizes['B']} sequences, expected {sizes['tokens']}, one a token (or cu_seqlens)")
    if cu_seqlens is not None and sizes["bounds"] != sizes["B"] + 1:
        raise ValueError(f"slstm_step: cu_seqlens: shape [{sizes['bounds']}], expected [{sizes['B'] + 1}]")
    if _backend.use_reference("slstm_step", Wx):
        if cu_seqlens is not None:
            check_bounds("slstm_step", cu_seqlens, sizes["B"], sizes["tokens"])
        check_slots("slstm_step", slot_ids, sizes["slots"], update)
        y = ref.mlstm.slstm_step(Wx, R, b, state, slot_ids, cu_seqlens, update)
        return y if out is None else out.copy_(y)
    if out is None:
        out = torch.empty(sizes["tokens"], *Wx.shape[2:], dtype=Wx.dtype)
    cu = None if cu_seqlens is None else cu_seqlens.contiguous()
    _backend._C.slstm(  # type: ignore[union-attr]
        "slstm_step", rows_contiguous(Wx), R.contiguous(), b.contiguous(), state, out, cu, slot_ids.contiguous(), update
    )
    return out


def _inputs(make: Make, tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return make.randn(tokens, 4, heads, dim, dtype=dtype), make.randn(heads, dim, 4, dim, dtype=dtype, scale=dim**-0.5), make.randn(4, heads, dim)


def _state(make: Make, batch: int, heads: int, dim: int) -> Tensor:
    state = make.randn(batch, 4, heads, dim)
    state[:, 2] = state[:, 2].abs() + 1
    return state


def _i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for tokens, heads, dim in [(1, 2, 16), (5, 1, 1), (9, 3, 17), (12, 2, 40), (3, 1, 100)]:
            yield Case(f"{tokens}x{heads}x{dim}-{dtype}", _inputs(make, tokens, heads, dim, dtype))
        Wx, R, b = _inputs(make, 23, 2, 24, dtype)
        yield Case(f"ragged-{dtype}", (Wx, R, b, _state(make, 6, 2, 24), _i32(0, 0, 3, 4, 10, 22, 23)))
        yield Case(f"float-weights-{dtype}", (Wx[:8], R.float(), b, _state(make, 1, 2, 24)))
    yield Case("no-tokens", (*_inputs(make, 0, 2, 8), _state(make, 2, 2, 8), _i32(0, 0, 0)))


def _step_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        yield Case(f"one-each-{dtype}", (*_inputs(make, 5, 2, 24, dtype), _state(make, 6, 2, 24), _i32(3, -1, 0, 5, 1)))
        rows = (*_inputs(make, 9, 2, 17, dtype), _state(make, 4, 2, 17))
        yield Case(f"rows-{dtype}", (*rows, _i32(2, -1, 0), _i32(0, 4, 6, 9)))
        yield Case(f"read-only-{dtype}", (*rows, _i32(1, 1, 3), _i32(0, 4, 6, 9)), {"update": False})


def _bad_rows(op: str, make: Make, *behind: Tensor) -> Iterator[BadCase]:
    Wx, R, b = _inputs(make, 6, 2, 8)
    state, cu = _state(make, 2, 2, 8), _i32(0, 3, 6)
    yield BadCase("rank", (Wx[:, 0], R, b, state, *behind, cu), f"{op}: Wx: shape [6, 2, 8]")
    yield BadCase("three-gates", (Wx[:, :3], R, b, state, *behind, cu), f"{op}: Wx: shape [6, 3, 2, 8]")
    yield BadCase("weights", (Wx, R[:, :, :, :7], b, state, *behind, cu), f"{op}: R: shape [2, 8, 4, 7]")
    yield BadCase("weight-type", (Wx, R.half(), b, state, *behind, cu), f"{op}: R: float16, expected float32")
    yield BadCase("half-state", (Wx, R, b, state.half(), *behind, cu), f"{op}: state: float16")
    yield BadCase("bounds-order", (Wx, R, b, state, *behind, _i32(0, 7, 6)), f"{op}: cu_seqlens: 6 at 2, expected at least 7")
    yield BadCase("bounds-end", (Wx, R, b, state, *behind, _i32(0, 3, 5)), f"{op}: cu_seqlens: 5 at 2, expected 6")


def _bad(make: Make) -> Iterator[BadCase]:
    yield from _bad_rows("slstm", make)
    yield BadCase("state-batch", (*_inputs(make, 6, 2, 8), _state(make, 3, 2, 8), _i32(0, 3, 6)), "slstm: state: 3 sequences, expected 2")


def _step_bad(make: Make) -> Iterator[BadCase]:
    yield from _bad_rows("slstm_step", make, _i32(1, 0))
    Wx, R, b = _inputs(make, 2, 2, 8)
    state = _state(make, 2, 2, 8)
    for bad in (-2, 2, -(2**31), 2**31 - 1):
        yield BadCase(f"slot{bad}", (Wx, R, b, state, _i32(0, bad)), f"slstm_step: slot_ids: {bad} at 1, expected -1 (idle) or a slot below 2")
    yield BadCase("slot-twice", (Wx, R, b, state, _i32(1, 1)), "slstm_step: slot_ids: 1 at 1, expected each slot once")
    yield BadCase("slots", (Wx, R, b, state, _i32(1)), "slstm_step: slot_ids: 1 sequences, expected 2")
    yield BadCase("strided", (Wx, R, b, state.mT.contiguous().mT, _i32(0, 1)), "slstm_step: state: strided")


def _cost(Wx: Tensor, R: Tensor, b: Tensor, state: Tensor | None, rest: Tensor | None = None, cu: Tensor | None = None, update: bool = True) -> Cost:
    return Cost(Wx.nbytes * 5 // 4 + R.nbytes + b.nbytes + (0 if state is None else 2 * state.nbytes), 2 * Wx.shape[0] * R.numel())


def _bench(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(f"256 tokens, 4 heads of 128, {str(dtype).removeprefix('torch.')}", (*_inputs(make, 256, 4, 128, dtype), _state(make, 1, 4, 128)))


def _step_bench(make: Make) -> Iterator[Case]:
    for batch in (1, 8):
        yield Case(f"batch {batch}, 4 heads of 128", (*_inputs(make, batch, 4, 128), _state(make, batch, 4, 128), _i32(*range(batch))))


def _fake(Wx: Tensor, R: Tensor, b: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens, _, heads, dim = Wx.shape
    return Wx.new_empty(tokens, heads, dim), Wx.new_empty(batch, 4, heads, dim, dtype=torch.float32)


register(
    "slstm(Tensor Wx, Tensor R, Tensor b, Tensor? state=None, Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
    _slstm,
    function=slstm,
    reference=ref.mlstm.slstm,
    fake=_fake,
    cases=_cases,
    bad_cases=_bad,
    bench_cases=_bench,
    cost=lambda Wx, R, b, state=None, cu_seqlens=None: _cost(Wx, R, b, state),
    bound="latency",
    tolerance=4.0,  # every token feeds the next through y: a tanh of 3 ulps instead of 2 is felt in all that follow
    source="arXiv 2405.04517",
)
register(
    "slstm_step(Tensor Wx, Tensor R, Tensor b, Tensor(a!) state, Tensor slot_ids, Tensor? cu_seqlens=None, bool update=True) -> Tensor",
    _slstm_step,
    function=slstm_step,
    reference=ref.mlstm.slstm_step,
    fake=lambda Wx, *rest, **named: Wx.new_empty(Wx.shape[0], *Wx.shape[2:]),
    cases=_step_cases,
    bad_cases=_step_bad,
    bench_cases=_step_bench,
    cost=_cost,
    bound="memory",
    tolerance=4.0,
    source="arXiv 2405.04517",
)
