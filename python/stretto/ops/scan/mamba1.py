"""The selective scan of Mamba-1: a diagonal recurrence of a few states a channel, whose rates depend on the input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check_tensors, dtype_as
from stretto.ops.scan import packing
from stretto.ops.scan.backward import scan_gradients
from stretto.ops.scan.cases import ring_rows, selective_bad, selective_bench, selective_case, selective_cases
from stretto.ops.scan.peers import (
    compiled_selective_scan,
    compiled_selective_step,
    mambapy_selective_scan,
    transformers_selective_scan,
    transformers_selective_step,
)
from stretto.ops.table import BadCase, Case, Cost, Make, register


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan sequences: h = exp(delta A) h + delta u B; y = (C h + D u) silu(z), with delta = dt + dt_bias, through softplus where it is set.

    Args:
        u, dt: [tokens, channels] packed, or [batch, length, channels]; float32 / float16 / bfloat16, any strides.
        A: [channels, states] float32, any strides; negative in a trained model.
        B, C: [tokens, groups, states] (or [batch, length, groups, states]) of u's dtype; consecutive channels share a group.
        D, dt_bias: [channels] float32. z: like u.
        h0: [batch, channels, states] float32, the states before each sequence; None: zeros.
        cu_seqlens: [batch + 1] int32, where packed sequences begin and end; None: one sequence, or the batch.
    Returns: (y, h_last): y like u; h_last [batch, channels, states] float32. Float arithmetic; any split of a sequence, stepping and replay
        give the same bits. Factors exp(delta A) below 1e-38 are 0. NaN stays in its channel (in its group, from B or C), from its row on.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2312.00752. Reference: ops.ref.scan.selective_scan. Bound by the exponentials.
    """
    if needs_dispatch(u, dt, A, B, C, D, z, dt_bias, h0):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.selective_scan(u, dt, A, B, C, D, z, dt_bias, softplus, h0, cu_seqlens)
        return result
    return _selective_scan(u, dt, A, B, C, D, z, dt_bias, softplus, h0, cu_seqlens)


def _selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "selective_scan"
    lead = packing.lead_of(u, 2, cu_seqlens)
    u, dt, B, C, z = (packing.packed(t, lead) for t in (u, dt, B, C, z))
    own = dtype_as(u)
    sizes = check_tensors(op, u=(u, "tokens channels", FLOATS), dt=(dt, "tokens channels", own), A=(A, "channels states", F32),
                          B=(B, "tokens groups states", own), C=(C, "tokens groups states", own), D=(D, "channels", F32),
                          z=(z, "tokens channels", own), dt_bias=(dt_bias, "channels", F32), h0=(h0, "batch channels states", F32),
                          cu_seqlens=(cu_seqlens, "bounds", I32))  # fmt: skip
    packing.check_groups(op, "channels", sizes["channels"], sizes["groups"], sizes["states"])
    cu_seqlens = packing.bounds(op, cu_seqlens, lead, sizes["tokens"], u.device)
    shape = (cu_seqlens.shape[0] - 1, sizes["channels"], sizes["states"])
    if h0 is not None and h0.shape[0] != shape[0]:
        raise ValueError(f"{op}: h0: shape {list(h0.shape)}, expected {list(shape)}")
    if _backend.use_reference(op, u):
        y, last = ref.scan.selective_scan(u, dt, A, B, C, D, z, dt_bias, softplus, h0, cu_seqlens)
        return packing.unpacked(y, lead), last
    y, last = torch.empty_like(u, memory_format=torch.contiguous_format), torch.empty(shape)
    rows = packing.dense_rows
    _backend._C.selective_scan(  # type: ignore[union-attr]
        rows(u), rows(dt), A, rows(B), rows(C), packing.dense(D), rows(z), packing.dense(dt_bias), softplus, h0, cu_seqlens, y, last
    )
    return packing.unpacked(y, lead), last


def selective_scan_step(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = False, slots: Tensor | None = None, cu_seqlens: Tensor | None = None, parent: Tensor | None = None,
    update: bool = True, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Continue sequences by one row each, or by several: decoding, drafts to verify, or a tree of drafts.

    Args:
        state: [slots, channels, states] float32, any strides (channels side by side are fastest). Written in place where `update` is set.
        u, dt, A, B, C, D, z, dt_bias, softplus: as in selective_scan, packed.
        slots, cu_seqlens, parent, update, out: as in causal_conv1d_step.
    Returns: [tokens, channels] of u's dtype. m rows in one call give the bits of m calls of one row, and of selective_scan.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2312.00752. Reference: ops.ref.scan.selective_scan_step.
    """
    if out is None and needs_dispatch(state, u, dt, A, B, C, D, z, dt_bias):
        result: Tensor = torch.ops.stretto.selective_scan_step(
            state, u, dt, A, B, C, D, z, dt_bias, softplus, slots, cu_seqlens, parent, update
        )  # fmt: skip
        return result
    return _selective_scan_step(state, u, dt, A, B, C, D, z, dt_bias, softplus, slots, cu_seqlens, parent, update, out=out)


def _selective_scan_step(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = False, slots: Tensor | None = None, cu_seqlens: Tensor | None = None, parent: Tensor | None = None,
    update: bool = True, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    op, own = "selective_scan_step", dtype_as(u)
    sizes = check_tensors(op, u=(u, "tokens channels", FLOATS), dt=(dt, "tokens channels", own), A=(A, "channels states", F32),
                          state=(state, "num_slots channels states", F32), B=(B, "tokens groups states", own), C=(C, "tokens groups states", own),
                          D=(D, "channels", F32), z=(z, "tokens channels", own), dt_bias=(dt_bias, "channels", F32), slots=(slots, "batch", I32),
                          cu_seqlens=(cu_seqlens, "bounds", I32), parent=(parent, "tokens", I32), out=(out, "tokens channels", own))  # fmt: skip
    packing.check_groups(op, "channels", sizes["channels"], sizes["groups"], sizes["states"])
    packing.check_batch(op, slots, cu_seqlens, sizes["tokens"])
    if out is None:
        packing.check_step(op, slots, cu_seqlens, parent, update, sizes["tokens"], sizes["num_slots"])
    if _backend.use_reference(op, u):
        y = ref.scan.selective_scan_step(state, u, dt, A, B, C, D, z, dt_bias, softplus, slots, cu_seqlens, parent, update)
        return y if out is None else out.copy_(y)
    if out is None:
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
    rows, dense = packing.dense_rows, packing.dense
    _backend._C.selective_scan_step(  # type: ignore[union-attr]
        state, rows(u), rows(dt), A, rows(B), rows(C), dense(D), rows(z), dense(dt_bias), softplus, dense(slots), dense(cu_seqlens), dense(parent),
        update, out,
    )  # fmt: skip
    return out


def selective_scan_replay(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, rows: Tensor, n: Tensor, dt_bias: Tensor | None = None, softplus: bool = False,
    slots: Tensor | None = None,
) -> None:  # fmt: skip
    """Advance states by inputs that were kept, as if these had been stepped through: what a cache does when drafts are accepted.

    Args:
        state: [slots, channels, states] float32, any strides; in place.
        u, dt: [inputs, channels], B: [inputs, groups, states]: the inputs kept (a ring, or the rows of the step that verified the drafts).
        A, dt_bias, softplus: as in selective_scan.
        rows: [batch, m] int32, which inputs each sequence takes, in order. n: [batch] int32, how many of these; the rest is not read.
        slots: [batch] int32, the state of each sequence; negative: none. None: sequence b has slot b.
    Raises: ValueError naming the argument, what it is and what was expected. Reference: ops.ref.scan.selective_scan_replay.
    """
    if needs_dispatch(state, u, dt, A, B, dt_bias):
        torch.ops.stretto.selective_scan_replay(state, u, dt, A, B, rows, n, dt_bias, softplus, slots)
    else:
        _selective_scan_replay(state, u, dt, A, B, rows, n, dt_bias, softplus, slots)


def _selective_scan_replay(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, rows: Tensor, n: Tensor, dt_bias: Tensor | None = None, softplus: bool = False,
    slots: Tensor | None = None,
) -> None:  # fmt: skip
    op, own = "selective_scan_replay", dtype_as(u)
    sizes = check_tensors(op, u=(u, "inputs channels", FLOATS), dt=(dt, "inputs channels", own), A=(A, "channels states", F32),
                          state=(state, "num_slots channels states", F32), B=(B, "inputs groups states", own), rows=(rows, "batch m", I32),
                          n=(n, "batch", I32), dt_bias=(dt_bias, "channels", F32), slots=(slots, "batch", I32))  # fmt: skip
    packing.check_groups(op, "channels", sizes["channels"], sizes["groups"], sizes["states"])
    packing.check_replay(op, rows, n, slots, sizes["inputs"], sizes["num_slots"])
    if _backend.use_reference(op, state):
        ref.scan.selective_scan_replay(state, u, dt, A, B, rows, n, dt_bias, softplus, slots)
        return
    dense_rows, dense = packing.dense_rows, packing.dense
    _backend._C.selective_scan_replay(  # type: ignore[union-attr]
        state, dense_rows(u), dense_rows(dt), A, dense_rows(B), rows.contiguous(), n.contiguous(), dense(dt_bias), softplus, dense(slots)
    )


register(
    "selective_scan(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, bool softplus=False, "
    "Tensor? h0=None, Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
    _selective_scan,
    function=selective_scan,
    reference=ref.scan.selective_scan,
    fake=lambda u, dt, A, B, C, D=None, z=None, dt_bias=None, softplus=False, h0=None, cu_seqlens=None: (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        A.new_empty(packing.batch_of(u, 2, cu_seqlens), *A.shape),
    ),
    cases=selective_cases,
    bad_cases=selective_bad,
    bench_cases=selective_bench,
    cost=lambda u, dt, A, B, C, D=None, z=None, dt_bias=None, softplus=False, h0=None, cu_seqlens=None: Cost(
        (3 if z is None else 4) * u.nbytes + 2 * B.nbytes + 2 * A.nbytes,
        flops=19 * u.numel() * A.shape[1],  # 13 of them the exponential
    ),
    bound="compute",
    peers={"compiled torch loop": compiled_selective_scan, "transformers": transformers_selective_scan, "mambapy": mambapy_selective_scan},
    source="arXiv 2312.00752",
    backward=lambda inputs, *grads: scan_gradients(torch.ops.stretto.selective_scan_backward, 2, inputs, grads),
)


def _step_cases(make: Make) -> Iterator[Case]:
    i32 = torch.int32
    for dtype in FLOATS:

        def case(
            name: str, tokens: int, slots: int, *rest: object, channels: int = 34, groups: int = 2, states: int = 16, dtype: torch.dtype = dtype
        ) -> Case:
            inputs = selective_case(make, tokens, channels, states, groups, dtype)
            return Case(f"{name}-{dtype}", (make.randn(slots, channels, states), *inputs, True, *rest))

        yield case("rows", 3, 3)
        yield case("slots", 3, 5, torch.tensor([4, -1, 0], dtype=i32))
        yield case("several", 9, 3, None, ring_rows.cu(1, 6, 2))
        yield case("verify", 9, 4, torch.tensor([2, 0, 1], dtype=i32), ring_rows.cu(6, 0, 3), None, False)
        yield case("tree", 9, 2, None, ring_rows.cu(6, 3), torch.tensor([-1, 0, 0, 1, 3, 2, -1, 0, 1], dtype=i32), False)
        yield case("odd", 2, 2, channels=5, groups=5, states=3)
        yield case("wide", 2, 2, channels=130, groups=1, states=37)
        yield case("nothing", 0, 2)
        wide = case("columns", 2, 2, channels=48, groups=1)
        yield Case(wide.id, (wide.args[0].mT.contiguous().mT, *wide.args[1:]))


def _step_bad(make: Make) -> Iterator[BadCase]:
    op = "selective_scan_step"
    inputs = selective_case(make, 3, 8, 4, 2, torch.float32)
    state, i32 = make.randn(4, 8, 4), torch.int32
    yield BadCase("state-dtype", (state.bfloat16(), *inputs), f"{op}: state: bfloat16")
    yield BadCase("state-shape", (state[:, :, :3], *inputs), f"{op}: state: shape [4, 8, 3]")
    yield BadCase("few-slots", (state[:2], *inputs), f"{op}: state: 2 slots")
    for slot in (4, 5, 2**31 - 1):
        yield BadCase(f"slot{slot}", (state, *inputs, True, torch.tensor([0, slot, 1], dtype=i32)), f"{op}: slots: {slot} at 1")
    yield BadCase("twice", (state, *inputs, True, torch.tensor([0, 1, 0], dtype=i32)), f"{op}: slots: 0 at 2 a second time")
    yield BadCase(
        "tree-update", (state, *inputs, True, None, ring_rows.cu(3), torch.tensor([-1, 0, 1], dtype=i32)), f"{op}: update: True with parent"
    )
    yield BadCase("groups", (state, inputs[0], inputs[1], inputs[2], *(make.randn(3, 3, 4) for _ in range(2))), f"{op}: B: 3 groups")


def _step_bench(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, channels in [("Mamba-130M", 1536), ("Mamba-2.8B", 5120)]:
            for batch in (1, 16):
                inputs = selective_case(make, batch, channels, 16, 1, dtype)
                yield Case(f"{name} batch {batch} {dtype}", (make.randn(batch, channels, 16), *inputs, True))


register(
    "selective_scan_step(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, "
    "bool softplus=False, Tensor? slots=None, Tensor? cu_seqlens=None, Tensor? parent=None, bool update=True) -> Tensor",
    _selective_scan_step,
    function=selective_scan_step,
    reference=ref.scan.selective_scan_step,
    fake=lambda state, u, *rest, **kwargs: torch.empty_like(u, memory_format=torch.contiguous_format),
    cases=_step_cases,
    bad_cases=_step_bad,
    bench_cases=_step_bench,
    cost=lambda state, u, dt, A, B, *rest: Cost(4 * u.nbytes + 2 * B.nbytes + A.nbytes + 2 * state.nbytes, flops=19 * u.numel() * A.shape[1]),
    bound="memory",
    peers={"compiled torch": compiled_selective_step, "transformers": transformers_selective_step},
    source="arXiv 2312.00752",
)


def _replay_cases(make: Make) -> Iterator[Case]:
    rows, n = ring_rows.ragged()
    for dtype in FLOATS:
        u, dt, A, B, _, _, _, bias = selective_case(make, 8, 34, 16, 2, dtype)
        yield Case(f"ragged-{dtype}", (make.randn(3, 34, 16), u, dt, A, B, rows, n, bias, True))
        slots = torch.tensor([3, -1, 0], dtype=torch.int32)
        yield Case(f"slots-{dtype}", (make.randn(4, 16, 34).mT, u, dt, A, B, rows, n, None, True, slots))


def _replay_bad(make: Make) -> Iterator[BadCase]:
    op = "selective_scan_replay"
    u, dt, A, B, *_ = selective_case(make, 4, 8, 4, 2, torch.float32)
    for bad, rows, n in ring_rows.bad(inputs=4):
        yield BadCase(bad, (make.randn(2, 8, 4), u, dt, A, B, rows, n), f"{op}: {bad}")
    rows, n = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    yield BadCase("twice", (make.randn(2, 8, 4), u, dt, A, B, rows, n, None, False, n), f"{op}: slots: 1 at 1 a second time")


def _replay_bench(make: Make) -> Iterator[Case]:
    u, dt, A, B, _, _, _, bias = selective_case(make, 64, 1536, 16, 1, torch.float32)
    yield Case("Mamba-130M batch 8, 1 to 8 of 8", (make.randn(8, 1536, 16), u, dt, A, B, *ring_rows.bench(), bias, True))


register(
    "selective_scan_replay(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor rows, Tensor n, Tensor? dt_bias=None, "
    "bool softplus=False, Tensor? slots=None) -> ()",
    _selective_scan_replay,
    function=selective_scan_replay,
    reference=ref.scan.selective_scan_replay,
    fake=lambda *args, **kwargs: None,
    cases=_replay_cases,
    bad_cases=_replay_bad,
    bench_cases=_replay_bench,
    cost=lambda state, u, dt, A, B, rows, n, *rest: Cost(
        2 * rows.shape[0] * state[0].nbytes + A.nbytes, flops=17 * int(n.sum()) * u.shape[1] * A.shape[1]
    ),
    bound="compute",
)
