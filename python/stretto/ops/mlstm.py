"""mLSTM: matrix memory with exponential gates, the recurrent layer of xLSTM. Sequences, steps in place, and replay of accepted inputs.

The three ops compute one token after another with the same bits, so a prompt may be cut anywhere, and guesses checked in one call
give what single steps would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check, check_tensors, dtype_as, rows_contiguous
from stretto.ops.table import BadCase, Case, Cost, Make, register

VARIANTS = ("exp", "sig")


def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None, cu_seqlens: Tensor | None = None,
    chunk: int = 64, eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run whole sequences through an mLSTM cell.

    Args:
        q, k: [tokens, heads, dk], v: [tokens, heads, dv], float32 / float16 / bfloat16, all alike; i, f: [tokens, heads], the same type or
            float32: gates before any activation. Or [batch, heads, tokens, dk | dv] and [batch, heads, tokens]. Any strides; a copy is
            made when elements of a row are not adjacent.
        C, n, m: state to start from, float32 [B, heads, dk, dv], [B, heads, dk], [B, heads]; all or none (zeros). The true state is
            e^m C, e^m n. m = -inf is an empty memory too.
        cu_seqlens: [B + 1] int32, sequence b has tokens cu_seqlens[b] to cu_seqlens[b + 1]; None: one sequence (or the batch).
        chunk: tokens of a tile. On CPU it changes the speed but no bit.
        eps: added to the normaliser. gate_cap: gates become gate_cap * tanh(gate / gate_cap) first; None: as they are.
        variant: "exp", or "sig": sigmoid input gate, no normaliser, n and m stay.
    Returns: (h, C, n, m): h like v, contiguous; the state after the last token, that given for a sequence without tokens. Float sums over
        tokens in order: the bits of h and of the state do not depend on other sequences, on threads, or on where a sequence is cut.
        NaN in a gate stays in its sequence and head.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2405.04517. Reference: ops.ref.mlstm.mlstm, whose gradient is the op's. Bound by arithmetic.
    """
    if needs_dispatch(q, k, v, i, f, C, n, m, cu_seqlens):
        result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.stretto.mlstm(q, k, v, i, f, C, n, m, cu_seqlens, chunk, eps, gate_cap, variant)
        return result
    return _mlstm(q, k, v, i, f, C, n, m, cu_seqlens, chunk, eps, gate_cap, variant)


def mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, cu_seqlens: Tensor | None = None,
    eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp", update: bool = True, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Advance states in place by one token or several, and read them after each.

    Args:
        q, k, v, i, f, eps, gate_cap, variant: as in mlstm, [tokens, heads, ...]: one token a sequence, or as cu_seqlens says.
        C, n, m: float32 [slots, heads, dk, dv], [slots, heads, dk], [slots, heads], contiguous; written.
        slot_ids: [B] int32, the slot of each sequence, each at most once; -1: an idle sequence, its rows of h are zero.
        cu_seqlens: [B + 1] int32, as in mlstm.
        update: False reads the states and leaves them as they are: guesses are checked so, mlstm_replay then takes the accepted ones.
            Slots may repeat then: several continuations of one state.
        out: like v; written instead of a new tensor.
    Returns: h like v. The bits are those of mlstm, and of one call a token.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2405.04517. Reference: ops.ref.mlstm.mlstm_step. Bound by memory: C is read and written once.
    """
    if out is None and needs_dispatch(q, k, v, i, f, C, n, m, slot_ids, cu_seqlens):
        result: Tensor = torch.ops.stretto.mlstm_step(q, k, v, i, f, C, n, m, slot_ids, cu_seqlens, eps, gate_cap, variant, update)
        return result
    return _mlstm_step(q, k, v, i, f, C, n, m, slot_ids, cu_seqlens, eps, gate_cap, variant, update, out=out)


def mlstm_replay(
    k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, counts: Tensor, cu_seqlens: Tensor | None = None,
    gate_cap: float | None = None, variant: str = "exp",
) -> None:  # fmt: skip
    """Advance states in place by the first counts[b] tokens of each sequence, without reading them: what was guessed and accepted.

    Args:
        k, v, i, f, C, n, m, slot_ids, cu_seqlens, gate_cap, variant: as in mlstm_step.
        counts: [B] int32, 0 to the tokens of the sequence. Tokens behind are not read.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2405.04517. Reference: ops.ref.mlstm.mlstm_replay. Same bits as mlstm_step.
    """
    if needs_dispatch(k, v, i, f, C, n, m, slot_ids, counts, cu_seqlens):
        torch.ops.stretto.mlstm_replay(k, v, i, f, C, n, m, slot_ids, counts, cu_seqlens, gate_cap, variant)
    else:
        _mlstm_replay(k, v, i, f, C, n, m, slot_ids, counts, cu_seqlens, gate_cap, variant)


def _check_numbers(op: str, sizes: dict[str, int], eps: float, gate_cap: float | None, variant: str) -> None:
    if sizes["dk"] == 0:
        raise ValueError(f"{op}: k: width 0, expected at least 1")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps: {eps}, expected finite and at least 0")
    if gate_cap is not None and not 0 < gate_cap < math.inf:
        raise ValueError(f"{op}: gate_cap: {gate_cap}, expected None or positive and finite")
    if variant not in VARIANTS:
        raise ValueError(f"{op}: variant: {variant!r}, expected one of {', '.join(VARIANTS)}")


def _gate_dtypes(k: object, i: object) -> tuple[torch.dtype, ...]:
    """Gates come in the type of k or in float32, both alike; `i` None asks for the first of them."""
    return tuple(dict.fromkeys((*dtype_as(k), torch.float32))) if i is None else dtype_as(i)


def _mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None, cu_seqlens: Tensor | None = None,
    chunk: int = 64, eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    is_batch = isinstance(k, Tensor) and k.dim() == 4
    lead = "B heads tokens" if is_batch else "tokens heads"
    sizes = check_tensors(
        "mlstm", k=(k, f"{lead} dk", FLOATS), q=(q, f"{lead} dk", dtype_as(k)), v=(v, f"{lead} dv", dtype_as(k)),
        i=(i, lead, _gate_dtypes(k, None)), f=(f, lead, _gate_dtypes(k, i)), cu_seqlens=(cu_seqlens, "bounds", I32),
        C=(C, "B heads dk dv", F32), n=(n, "B heads dk", F32), m=(m, "B heads", F32),
    )  # fmt: skip
    _check_numbers("mlstm", sizes, eps, gate_cap, variant)
    check((C is None) == (n is None) == (m is None), "mlstm: C, n, m: some of them, expected all or none")
    check(chunk >= 1, f"mlstm: chunk: {chunk}, expected at least 1")
    check(not is_batch or cu_seqlens is None, "mlstm: cu_seqlens: given, expected None with [batch, heads, tokens, dk]")
    batch = sizes["B"] if is_batch else sizes.get("bounds", 2) - 1
    check(batch >= 0, "mlstm: cu_seqlens: shape [0], expected [B + 1]")
    check(sizes.get("B", batch) == batch, f"mlstm: C: {sizes.get('B')} sequences, expected {batch}")
    heads, dk, dv = sizes["heads"], sizes["dk"], sizes["dv"]
    if _backend.use_reference("mlstm", k):
        if cu_seqlens is not None:
            _check_bounds("mlstm", cu_seqlens, batch, sizes["tokens"])
        h, *state = ref.mlstm.mlstm(q, k, v, i, f, C, n, m, cu_seqlens, chunk, eps, gate_cap, variant)
        return h, *(new.clone() if new is old else new for new, old in zip(state, (C, n, m), strict=True))  # type: ignore[return-value]
    state = [
        torch.zeros(shape) if given is None else given.clone(memory_format=torch.contiguous_format)
        for given, shape in ((C, (batch, heads, dk, dv)), (n, (batch, heads, dk)), (m, (batch, heads)))
    ]
    h = torch.empty_like(v, memory_format=torch.contiguous_format)
    cu = None if cu_seqlens is None else cu_seqlens.contiguous()
    _native("mlstm", q, k, v, i, f, state, h, cu, None, None, chunk, eps, gate_cap, variant, True)
    return h, *state  # type: ignore[return-value]


def _native(
    op: str, q: Tensor | None, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: Sequence[Tensor], out: Tensor | None, cu_seqlens: Tensor | None,
    slots: Tensor | None, counts: Tensor | None, block: int, eps: float, gate_cap: float | None, variant: str, update: bool,
) -> None:  # fmt: skip
    _backend._C.mlstm(  # type: ignore[union-attr]
        op, None if q is None else rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), i, f, *state, out, cu_seqlens, slots, counts,
        block, k.shape[-1] ** -0.5, eps, gate_cap or 0.0, variant == "sig", update,
    )  # fmt: skip


STEP_BLOCK = 64  # tokens that pass a tile of C at a time


def _mlstm_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, cu_seqlens: Tensor | None = None,
    eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp", update: bool = True, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    sizes = check_tensors(
        "mlstm_step", k=(k, "tokens heads dk", FLOATS), q=(q, "tokens heads dk", dtype_as(k)), v=(v, "tokens heads dv", dtype_as(k)),
        i=(i, "tokens heads", _gate_dtypes(k, None)), f=(f, "tokens heads", _gate_dtypes(k, i)),
        C=(C, "slots heads dk dv", F32), n=(n, "slots heads dk", F32), m=(m, "slots heads", F32),
        slot_ids=(slot_ids, "B", I32), cu_seqlens=(cu_seqlens, "bounds", I32), out=(out, "tokens heads dv", dtype_as(k)),
    )  # fmt: skip
    _check_numbers("mlstm_step", sizes, eps, gate_cap, variant)
    if _checked_states("mlstm_step", sizes, k, C, n, m, slot_ids, None, cu_seqlens, update):
        h = ref.mlstm.mlstm_step(q, k, v, i, f, C, n, m, slot_ids, cu_seqlens, eps, gate_cap, variant, update)
        return h if out is None else out.copy_(h)
    if out is None:
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
    cu = None if cu_seqlens is None else cu_seqlens.contiguous()
    _native("mlstm_step", q, k, v, i, f, (C, n, m), out, cu, slot_ids.contiguous(), None, STEP_BLOCK, eps, gate_cap, variant, update)
    return out


def _mlstm_replay(
    k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, counts: Tensor, cu_seqlens: Tensor | None = None,
    gate_cap: float | None = None, variant: str = "exp",
) -> None:  # fmt: skip
    sizes = check_tensors(
        "mlstm_replay", k=(k, "tokens heads dk", FLOATS), v=(v, "tokens heads dv", dtype_as(k)),
        i=(i, "tokens heads", _gate_dtypes(k, None)), f=(f, "tokens heads", _gate_dtypes(k, i)),
        C=(C, "slots heads dk dv", F32), n=(n, "slots heads dk", F32), m=(m, "slots heads", F32),
        slot_ids=(slot_ids, "B", I32), counts=(counts, "B", I32), cu_seqlens=(cu_seqlens, "bounds", I32),
    )  # fmt: skip
    _check_numbers("mlstm_replay", sizes, 0.0, gate_cap, variant)
    if _checked_states("mlstm_replay", sizes, k, C, n, m, slot_ids, counts, cu_seqlens, True):
        return ref.mlstm.mlstm_replay(k, v, i, f, C, n, m, slot_ids, counts, cu_seqlens, gate_cap, variant)
    cu = None if cu_seqlens is None else cu_seqlens.contiguous()
    _native(
        "mlstm_replay", None, k, v, i, f, (C, n, m), None, cu, slot_ids.contiguous(), counts.contiguous(), STEP_BLOCK, 0.0, gate_cap, variant, True
    )
    return None


def _checked_states(
    op: str, sizes: dict[str, int], k: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, counts: Tensor | None, cu_seqlens: Tensor | None,
    update: bool,
) -> bool:  # fmt: skip
    """Check layout and counts of sequences; True where the reference must run (ids are checked then too: native code checks its own)."""
    for name, tensor in (("C", C), ("n", n), ("m", m)):
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name}: strided, expected contiguous (it is written in place)")
    batch, tokens = sizes["B"], sizes["tokens"]
    if cu_seqlens is None and tokens != batch:
        raise ValueError(f"{op}: slot_ids: {batch} sequences, expected {tokens}, one a token (or cu_seqlens)")
    if cu_seqlens is not None and sizes["bounds"] != batch + 1:
        raise ValueError(f"{op}: cu_seqlens: shape [{sizes['bounds']}], expected [{batch + 1}]")
    if not _backend.use_reference(op, k):
        return False
    if cu_seqlens is not None:
        _check_bounds(op, cu_seqlens, batch, tokens)
    seen = set()
    for b, slot in enumerate(slot_ids.tolist()):
        check(-1 <= slot < sizes["slots"], f"{op}: slot_ids: {slot} at {b}, expected -1 (idle) or a slot below {sizes['slots']}")
        check(not update or slot < 0 or slot not in seen, f"{op}: slot_ids: {slot} at {b}, expected each slot once")
        seen.add(slot)
    if counts is not None:
        bounds = list(range(batch + 1)) if cu_seqlens is None else cu_seqlens.tolist()
        for b, count in enumerate(counts.tolist()):
            have = bounds[b + 1] - bounds[b]
            check(0 <= count <= have, f"{op}: counts: {count} at {b}, expected 0 to {have}")
    return True


def _check_bounds(op: str, cu_seqlens: Tensor, batch: int, tokens: int) -> None:
    bounds = cu_seqlens.tolist()
    check(bounds[0] == 0, f"{op}: cu_seqlens: {bounds[0]} at 0, expected 0")
    for b in range(batch):
        check(bounds[b + 1] >= bounds[b], f"{op}: cu_seqlens: {bounds[b + 1]} at {b + 1}, expected at least {bounds[b]}, the value before it")
    check(bounds[batch] == tokens, f"{op}: cu_seqlens: {bounds[batch]} at {batch}, expected {tokens}, the number of tokens")


def _inputs(make: Make, tokens: int, heads: int, dk: int, dv: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v, i, f with gates as a trained model has them: most input gates nearly shut, forget gates nearly open."""
    return (make.randn(tokens, heads, dk, dtype=dtype), make.randn(tokens, heads, dk, dtype=dtype), make.randn(tokens, heads, dv, dtype=dtype),
            (make.randn(tokens, heads) - 3).to(dtype), (make.randn(tokens, heads) + 4).to(dtype))  # fmt: skip


def _state(make: Make, batch: int, heads: int, dk: int, dv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Small m, as the nearly shut gates leave it: where |q n| and e^-m are both near 0, h is their noise."""
    return make.randn(batch, heads, dk, dv), make.randn(batch, heads, dk), make.randn(batch, heads) - 2


def _i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _mlstm_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for tokens, heads, dk, dv in [(1, 9, 1, 1), (3, 2, 16, 32), (65, 1, 17, 33), (130, 3, 24, 40), (7, 2, 8, 96)]:
            yield Case(f"{tokens}x{heads}x{dk}x{dv}-{dtype}", _inputs(make, tokens, heads, dk, dv, dtype), {"gate_cap": 15.0})
        yield Case(f"state-{dtype}", (*_inputs(make, 20, 2, 16, 24, dtype), *_state(make, 1, 2, 16, 24)))
        yield Case(f"sig-{dtype}", (*_inputs(make, 40, 2, 16, 24, dtype), *_state(make, 1, 2, 16, 24)), {"variant": "sig"})
        q, k, v, i, f = _inputs(make, 30, 2, 16, 24, dtype)
        yield Case(f"float-gates-{dtype}", (q, k, v, i.float(), f.float()), {"chunk": 7})
        yield Case(f"ragged-{dtype}", (q, k, v, i, f, *_state(make, 5, 2, 16, 24), _i32(0, 0, 1, 18, 30, 30)), {"chunk": 16})
        batch = tuple(x.unflatten(0, (3, 10)).transpose(1, 2) for x in (q, k, v, i, f))
        yield Case(f"batch-{dtype}", (*batch, *_state(make, 3, 2, 16, 24)), {"chunk": 4})
        wide = make.randn(12, 2, 64, dtype=dtype)
        yield Case(f"fused-projection-{dtype}", (wide[..., :16], wide[..., 16:32], wide[..., 32:56], wide[..., 56], wide[..., 57] + 3))
    yield Case("no-tokens", (*_inputs(make, 0, 2, 8, 16), *_state(make, 2, 2, 8, 16), _i32(0, 0, 0)))
    yield Case("no-sequences", (*_inputs(make, 0, 2, 8, 16), *_state(make, 0, 2, 8, 16), _i32(0)))
    yield Case("no-values", _inputs(make, 5, 2, 8, 0))
    yield Case("every-token-a-record", (*_inputs(make, 50, 1, 16, 16)[:3], torch.arange(50.0)[:, None] / 4, make.randn(50, 1)))
    q, k, v, i, f = _inputs(make, 20, 2, 8, 16)
    i[::3], f[5], f[11, 0] = -torch.inf, -torch.inf, torch.inf
    yield Case("closed-gates", (q, k, v, i, f))
    i = i.clone()
    i[9, 1] = torch.nan
    yield Case("nan-gate", (q, k, v, i, f))


def _bad_rows(op: str, args: Callable[..., tuple[Any, ...]], make: Make) -> Iterator[BadCase]:
    """What all three ops refuse; `args(**changes)` are legal arguments of two sequences with some replaced."""
    q, k, v, i, f = _inputs(make, 6, 2, 8, 16)
    yield BadCase("gate-rank", args(i=i[..., None]), f"{op}: i: shape [6, 2, 1]")
    yield BadCase("gate-type", args(i=i.half(), f=f.half()), f"{op}: i: float16, expected float32")
    yield BadCase("gates-differ", args(f=f.bfloat16()), f"{op}: f: bfloat16")
    yield BadCase("keys", args(k=k[..., :7]), f"{op}: ")
    yield BadCase("no-keys", args(q=q[..., :0], k=k[..., :0], C=make.randn(2, 2, 0, 16), n=make.randn(2, 2, 0)), f"{op}: k: width 0")
    yield BadCase("values", args(v=v[:5]), f"{op}: v: shape [5, 2, 16]")
    yield BadCase("half-state", args(C=make.randn(2, 2, 8, 16, dtype=torch.bfloat16)), f"{op}: C: bfloat16, expected float32")
    yield BadCase("state-batch", args(m=make.randn(3, 2)), f"{op}: m: shape [3, 2]")
    yield BadCase("state-width", args(n=make.randn(2, 2, 9)), f"{op}: n: shape [2, 2, 9]")
    yield BadCase("bounds-start", args(cu_seqlens=_i32(1, 3, 6)), f"{op}: cu_seqlens: 1 at 0, expected 0")
    yield BadCase("bounds-order", args(cu_seqlens=_i32(0, 7, 6)), f"{op}: cu_seqlens: 6 at 2, expected at least 7")
    yield BadCase("bounds-end", args(cu_seqlens=_i32(0, 3, 5)), f"{op}: cu_seqlens: 5 at 2, expected 6")
    yield BadCase("bounds-huge", args(cu_seqlens=_i32(0, 3, 2**31 - 1)), f"{op}: cu_seqlens: 2147483647 at 2")
    yield BadCase("bounds-negative", args(cu_seqlens=_i32(0, -(2**31), 6)), f"{op}: cu_seqlens: -2147483648 at 1")
    yield BadCase("bounds-type", args(cu_seqlens=_i32(0, 3, 6).long()), f"{op}: cu_seqlens: int64")
    yield BadCase("bounds-many", args(cu_seqlens=_i32(0, 3, 5, 6)), f"{op}: ")
    yield BadCase("cap", args(gate_cap=0.0), f"{op}: gate_cap: 0.0")
    yield BadCase("variant", args(variant="tanh"), f"{op}: variant: 'tanh', expected one of exp, sig")


def _mlstm_bad(make: Make) -> Iterator[BadCase]:
    names = ("q", "k", "v", "i", "f", "C", "n", "m", "cu_seqlens", "chunk", "eps", "gate_cap", "variant")
    legal: dict[str, Any] = dict(
        zip(names, (*_inputs(make, 6, 2, 8, 16), *_state(make, 2, 2, 8, 16), _i32(0, 3, 6), 64, 1e-6, None, "exp"), strict=True)
    )

    def args(**changes: Any) -> tuple[Any, ...]:
        return tuple(changes.get(name, value) for name, value in legal.items())

    yield from _bad_rows("mlstm", args, make)
    yield BadCase("chunk", args(chunk=0), "mlstm: chunk: 0, expected at least 1")
    yield BadCase("eps", args(eps=float("nan")), "mlstm: eps: nan")
    yield BadCase("query", args(q=legal["q"].half()), "mlstm: q: float16")
    yield BadCase("part-of-a-state", args(n=None), "mlstm: C, n, m: some of them")
    yield BadCase("no-bounds", args(cu_seqlens=_i32()), "mlstm: cu_seqlens: shape [0]")
    batch = {name: legal[name].unflatten(0, (2, 3)).transpose(1, 2) for name in names[:5]}
    yield BadCase("bounds-of-a-batch", args(**batch), "mlstm: cu_seqlens: given, expected None")
    yield BadCase("state-of-one", args(**batch, cu_seqlens=None, C=make.randn(1, 2, 8, 16)), "mlstm: C: shape [1, 2, 8, 16]")


def _step_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        for batch, slots, heads, dk, dv in [(1, 1, 9, 1, 1), (2, 3, 2, 17, 33), (3, 3, 2, 16, 40), (1, 2, 1, 64, 256)]:
            ids = torch.arange(slots, dtype=torch.int32).flip(0)[:batch]
            inputs = (*_inputs(make, batch, heads, dk, dv, dtype), *_state(make, slots, heads, dk, dv), ids)
            yield Case(f"{batch}x{heads}x{dk}x{dv}-{dtype}", inputs, {"gate_cap": 15.0})
        state = _state(make, 4, 2, 16, 24)
        rows = (*_inputs(make, 9, 2, 16, 24, dtype), *state, _i32(2, -1, 0), _i32(0, 4, 6, 9))
        yield Case(f"rows-{dtype}", rows)
        yield Case(f"sig-{dtype}", rows, {"variant": "sig"})
        yield Case(f"read-only-{dtype}", (*rows[:8], _i32(1, 1, 3), rows[9]), {"update": False})
    yield Case("many-rows", (*_inputs(make, 150, 1, 16, 40), *_state(make, 2, 1, 16, 40), _i32(1, 0), _i32(0, 140, 150)))
    yield Case("no-sequences", (*_inputs(make, 0, 2, 8, 16), *_state(make, 2, 2, 8, 16), _i32()))
    yield Case("empty-memory", (*_inputs(make, 1, 1, 8, 16), *_state(make, 1, 1, 8, 16)[:2], torch.full((1, 1), -torch.inf), _i32(0)))


def _step_bad(make: Make) -> Iterator[BadCase]:
    names = ("q", "k", "v", "i", "f", "C", "n", "m", "slot_ids", "cu_seqlens", "eps", "gate_cap", "variant")
    legal: dict[str, Any] = dict(
        zip(names, (*_inputs(make, 6, 2, 8, 16), *_state(make, 2, 2, 8, 16), _i32(1, 0), _i32(0, 3, 6), 1e-6, None, "exp"), strict=True)
    )

    def args(**changes: Any) -> tuple[Any, ...]:
        return tuple(changes.get(name, value) for name, value in legal.items())

    yield from _bad_rows("mlstm_step", args, make)
    yield from _bad_slots("mlstm_step", args, legal)
    yield BadCase("eps", args(eps=-1.0), "mlstm_step: eps: -1.0")


def _bad_slots(op: str, args: Callable[..., tuple[Any, ...]], legal: dict[str, Any]) -> Iterator[BadCase]:
    for bad in (-2, 2, -(2**31), 2**31 - 1):
        yield BadCase(f"slot{bad}", args(slot_ids=_i32(0, bad)), f"{op}: slot_ids: {bad} at 1, expected -1 (idle) or a slot below 2")
    yield BadCase("slot-twice", args(slot_ids=_i32(1, 1)), f"{op}: slot_ids: 1 at 1, expected each slot once")
    yield BadCase("slots", args(slot_ids=_i32(0, 1, -1)), f"{op}: ")
    yield BadCase("tokens", args(cu_seqlens=None), f"{op}: slot_ids: 2 sequences, expected 6")
    strided = legal["C"].transpose(2, 3).contiguous().transpose(2, 3)
    yield BadCase("strided-state", args(C=strided), f"{op}: C: strided, expected contiguous")


def _replay_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        _, k, v, i, f = _inputs(make, 9, 2, 17, 24, dtype)
        state = _state(make, 4, 2, 17, 24)
        yield Case(f"rows-{dtype}", (k, v, i, f, *state, _i32(2, -1, 0), _i32(3, 2, 0), _i32(0, 4, 6, 9)), {"gate_cap": 15.0})
        yield Case(f"one-each-{dtype}", (k[:3], v[:3], i[:3], f[:3], *state, _i32(2, 1, 0), _i32(1, 0, 1)))
        yield Case(f"sig-{dtype}", (k, v, i, f, *state, _i32(2, 3), _i32(4, 5), _i32(0, 4, 9)), {"variant": "sig"})
    _, k, v, i, f = _inputs(make, 150, 1, 16, 40)
    yield Case("many-rows", (k, v, i, f, *_state(make, 1, 1, 16, 40), _i32(0), _i32(141), _i32(0, 150)))


def _replay_bad(make: Make) -> Iterator[BadCase]:
    names = ("k", "v", "i", "f", "C", "n", "m", "slot_ids", "counts", "cu_seqlens", "gate_cap", "variant")
    values = (*_inputs(make, 6, 2, 8, 16)[1:], *_state(make, 2, 2, 8, 16), _i32(1, 0), _i32(3, 3), _i32(0, 3, 6), None, "exp")
    legal: dict[str, Any] = dict(zip(names, values, strict=True))

    def args(**changes: Any) -> tuple[Any, ...]:
        return tuple(changes.get(name, value) for name, value in legal.items())

    yield from _bad_rows("mlstm_replay", args, make)
    yield from _bad_slots("mlstm_replay", args, legal)
    for bad in (-1, 4, -(2**31), 2**31 - 1):
        yield BadCase(f"count{bad}", args(counts=_i32(0, bad)), f"mlstm_replay: counts: {bad} at 1, expected 0 to 3")
    yield BadCase("counts", args(counts=_i32(1)), "mlstm_replay: counts: shape [1]")


def _bench_rows(make: Make, tokens: int, heads: int, dk: int, dv: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, v, i, f = _inputs(make, tokens, heads, dk, dv)
    return tuple(x.to(dtype) for x in (q, k, v, i - 7, f))  # the input gate's bias starts at -10


def _mlstm_bench(make: Make) -> Iterator[Case]:
    for name, tokens, heads, dk, dv in [("1,024 tokens, 4 heads of 128/256", 1024, 4, 128, 256), ("xLSTM-7B, 2,048 tokens", 2048, 8, 256, 512)]:
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(f"{name}, {str(dtype).removeprefix('torch.')}", _bench_rows(make, tokens, heads, dk, dv, dtype), {"gate_cap": 15.0})


def _step_bench(make: Make) -> Iterator[Case]:
    for name, heads, dk, dv in [("4 heads of 128/256", 4, 128, 256), ("xLSTM-7B", 8, 256, 512)]:
        for batch in (1, 8):
            for dtype in (torch.float32, torch.bfloat16):
                rows = _bench_rows(make, batch, heads, dk, dv, dtype)
                inputs = (*rows, *_state(make, batch, heads, dk, dv), torch.arange(batch, dtype=torch.int32))
                yield Case(f"{name}, batch {batch}, {str(dtype).removeprefix('torch.')}", inputs, {"gate_cap": 15.0})


def _replay_bench(make: Make) -> Iterator[Case]:
    _, k, v, i, f = _bench_rows(make, 32, 8, 256, 512, torch.float32)
    inputs = (k, v, i, f, *_state(make, 8, 8, 256, 512), torch.arange(8, dtype=torch.int32), _i32(*[3] * 8), _i32(*range(0, 33, 4)))
    yield Case("xLSTM-7B, batch 8, 3 of 4 accepted", inputs, {"gate_cap": 15.0})


def _row_bytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def _mlstm_cost(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None,
    cu_seqlens: Tensor | None = None, chunk: int = 64, eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp",
) -> Cost:  # fmt: skip
    batch = k.shape[0] if k.dim() == 4 else 1 if cu_seqlens is None else len(cu_seqlens) - 1
    state = 4 * batch * k.shape[1] * (k.shape[-1] * (v.shape[-1] + 1) + 1)
    return Cost(_row_bytes(q, k, v, v, i, f) + (1 if C is None else 2) * state, flops=4 * k.numel() * v.shape[-1])


def _step_cost(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, cu_seqlens: Tensor | None = None,
    eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp", update: bool = True,
) -> Cost:  # fmt: skip
    used = int((slot_ids >= 0).sum())
    state = used * sum(t.nbytes // max(1, t.shape[0]) for t in (C, n, m))
    return Cost(_row_bytes(q, k, v, v, i, f) + (2 if update else 1) * state, flops=4 * k.numel() * v.shape[-1])


def _replay_cost(
    k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, counts: Tensor, cu_seqlens: Tensor | None = None,
    gate_cap: float | None = None, variant: str = "exp",
) -> Cost:  # fmt: skip
    used, tokens = int(((slot_ids >= 0) & (counts > 0)).sum()), int(counts.sum())
    state = used * sum(t.nbytes // max(1, t.shape[0]) for t in (C, n, m))
    rows = tokens * _row_bytes(k, v, i, f) // max(1, k.shape[0])
    return Cost(rows + 2 * state, flops=2 * tokens * k.shape[1] * k.shape[2] * v.shape[2])


def _mlstm_fake(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None,
    cu_seqlens: Tensor | None = None, chunk: int = 64, eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch = k.shape[0] if k.dim() == 4 else 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads, dk, dv = k.shape[1], k.shape[-1], v.shape[-1]
    h = torch.empty_like(v, memory_format=torch.contiguous_format)
    new = (k.new_empty(shape, dtype=torch.float32) for shape in ((batch, heads, dk, dv), (batch, heads, dk), (batch, heads)))
    return h, *new  # type: ignore[return-value]


register(
    "mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? C=None, Tensor? n=None, Tensor? m=None, Tensor? cu_seqlens=None, "
    "int chunk=64, float eps=1e-6, float? gate_cap=None, str variant='exp') -> (Tensor, Tensor, Tensor, Tensor)",
    _mlstm,
    function=mlstm,
    reference=ref.mlstm.mlstm,
    fake=_mlstm_fake,
    cases=_mlstm_cases,
    bad_cases=_mlstm_bad,
    bench_cases=_mlstm_bench,
    cost=_mlstm_cost,
    bound="compute",
    source="arXiv 2405.04517",
)
register(
    "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) C, Tensor(b!) n, Tensor(c!) m, Tensor slot_ids, "
    "Tensor? cu_seqlens=None, float eps=1e-6, float? gate_cap=None, str variant='exp', bool update=True) -> Tensor",
    _mlstm_step,
    function=mlstm_step,
    reference=ref.mlstm.mlstm_step,
    fake=lambda q, k, v, *rest, **named: torch.empty_like(v, memory_format=torch.contiguous_format),
    cases=_step_cases,
    bad_cases=_step_bad,
    bench_cases=_step_bench,
    cost=_step_cost,
    bound="memory",
    source="arXiv 2405.04517",
)
register(
    "mlstm_replay(Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) C, Tensor(b!) n, Tensor(c!) m, Tensor slot_ids, Tensor counts, "
    "Tensor? cu_seqlens=None, float? gate_cap=None, str variant='exp') -> ()",
    _mlstm_replay,
    function=mlstm_replay,
    reference=ref.mlstm.mlstm_replay,
    fake=lambda *args, **named: None,
    cases=_replay_cases,
    bad_cases=_replay_bad,
    bench_cases=_replay_bench,
    cost=_replay_cost,
    bound="memory",
    source="arXiv 2405.04517",
)
