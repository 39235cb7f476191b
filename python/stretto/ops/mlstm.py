"""mLSTM: matrix memory with exponential gates, the recurrent layer of xLSTM. Sequences, steps in place, and replay of accepted inputs.

The three ops compute one token after another with the same bits, so a prompt may be cut anywhere, and guesses checked in one call
give what single steps would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stretto.ops import _backend, _mlstm_rows, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check, check_tensors, dtype_as, rows_contiguous
from stretto.ops.table import register

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
            check_bounds("mlstm", cu_seqlens, batch, sizes["tokens"])
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
        check_bounds(op, cu_seqlens, batch, tokens)
    check_slots(op, slot_ids, sizes["slots"], update)
    if counts is not None:
        bounds = list(range(batch + 1)) if cu_seqlens is None else cu_seqlens.tolist()
        for b, count in enumerate(counts.tolist()):
            have = bounds[b + 1] - bounds[b]
            check(0 <= count <= have, f"{op}: counts: {count} at {b}, expected 0 to {have}")
    return True


def check_slots(op: str, slot_ids: Tensor, slots: int, update: bool) -> None:
    """Slots in range, and each once where states are written: what native code checks itself."""
    seen: set[int] = set()
    for b, slot in enumerate(slot_ids.tolist()):
        check(-1 <= slot < slots, f"{op}: slot_ids: {slot} at {b}, expected -1 (idle) or a slot below {slots}")
        check(not update or slot < 0 or slot not in seen, f"{op}: slot_ids: {slot} at {b}, expected each slot once")
        seen.add(slot)


def check_bounds(op: str, cu_seqlens: Tensor, batch: int, tokens: int) -> None:
    """From 0 to the number of tokens, never decreasing: what native code checks itself."""
    bounds = cu_seqlens.tolist()
    check(bounds[0] == 0, f"{op}: cu_seqlens: {bounds[0]} at 0, expected 0")
    for b in range(batch):
        check(bounds[b + 1] >= bounds[b], f"{op}: cu_seqlens: {bounds[b + 1]} at {b + 1}, expected at least {bounds[b]}, the value before it")
    check(bounds[batch] == tokens, f"{op}: cu_seqlens: {bounds[batch]} at {batch}, expected {tokens}, the number of tokens")


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
    cases=_mlstm_rows.mlstm_cases,
    bad_cases=_mlstm_rows.mlstm_bad,
    bench_cases=_mlstm_rows.mlstm_bench,
    cost=_mlstm_rows.mlstm_cost,
    bound="compute",
    tolerance=4.0,  # m is rounded once a token, as in any recurrent form; the chunkwise reference rounds it once a chunk
    peers={
        f"mlstm-kernels chunk {size}{', compiled' if compiled else ''}": _mlstm_rows.sequence_peer(size, compiled)
        for size, compiled in ((64, False), (128, False), (64, True), (128, True))
    },
    source="arXiv 2405.04517",
)
register(
    "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) C, Tensor(b!) n, Tensor(c!) m, Tensor slot_ids, "
    "Tensor? cu_seqlens=None, float eps=1e-6, float? gate_cap=None, str variant='exp', bool update=True) -> Tensor",
    _mlstm_step,
    function=mlstm_step,
    reference=ref.mlstm.mlstm_step,
    fake=lambda q, k, v, *rest, **named: torch.empty_like(v, memory_format=torch.contiguous_format),
    cases=_mlstm_rows.step_cases,
    bad_cases=_mlstm_rows.step_bad,
    bench_cases=_mlstm_rows.step_bench,
    cost=_mlstm_rows.step_cost,
    bound="memory",
    peers={"mlstm-kernels": _mlstm_rows.step_peer(False), "mlstm-kernels compiled": _mlstm_rows.step_peer(True)},
    source="arXiv 2405.04517",
)
register(
    "mlstm_replay(Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) C, Tensor(b!) n, Tensor(c!) m, Tensor slot_ids, Tensor counts, "
    "Tensor? cu_seqlens=None, float? gate_cap=None, str variant='exp') -> ()",
    _mlstm_replay,
    function=mlstm_replay,
    reference=ref.mlstm.mlstm_replay,
    fake=lambda *args, **named: None,
    cases=_mlstm_rows.replay_cases,
    bad_cases=_mlstm_rows.replay_bad,
    bench_cases=_mlstm_rows.replay_bench,
    cost=_mlstm_rows.replay_cost,
    bound="memory",
    source="arXiv 2405.04517",
)
