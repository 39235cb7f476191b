"""The scan of Mamba-2: one rate a head, states of many columns; a sequence in chunks of matrix products, or row by row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check_tensors, dtype_as
from stretto.ops.scan import packing
from stretto.ops.scan.backward import scan_gradients
from stretto.ops.scan.cases import ring_rows, ssd_bad, ssd_bench, ssd_case, ssd_cases
from stretto.ops.scan.peers import chunked_ssd, compiled_ssd_step, transformers_ssd
from stretto.ops.table import BadCase, Case, Cost, Make, register


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan sequences: H = exp(delta A) H + delta x B^T; y = (H C + D x) silu(z), with delta = dt + dt_bias, through softplus where it is set.

    Args:
        x: [tokens, heads, dim] packed, or [batch, length, heads, dim]; float32 / float16 / bfloat16, any strides.
        dt: [tokens, heads] of x's dtype. A: [heads] float32; negative in a trained model.
        B, C: [tokens, groups, states] (or [batch, length, groups, states]) of x's dtype; consecutive heads share a group.
        D, dt_bias: [heads] float32. z: like x.
        h0: [batch, heads, dim, states] float32, the states before each sequence; None: zeros.
        cu_seqlens: [batch + 1] int32, where packed sequences begin and end; None: one sequence, or the batch.
        chunk: rows that are joined in products of matrices, counted from each sequence's first row; at least 1.
    Returns: (y, h_last): y like x; h_last [batch, heads, dim, states] float32. Float sums. A sequence cut at multiples of `chunk` gives the same
        bits; other cuts and ssd_step round differently. Where a sequence may be cut anywhere, and must equal stepping, use ssd_step, which takes
        any number of rows. NaN stays in its head (its group's heads, from B or C), from its row on.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2405.21060. Reference: ops.ref.scan.ssd. Bound by multiply-adds.
    """
    if needs_dispatch(x, dt, A, B, C, D, z, dt_bias, h0):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.ssd(x, dt, A, B, C, D, z, dt_bias, softplus, h0, cu_seqlens, chunk)
        return result
    return _ssd(x, dt, A, B, C, D, z, dt_bias, softplus, h0, cu_seqlens, chunk)


def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "ssd"
    lead = packing.lead_of(x, 3, cu_seqlens)
    x, dt, B, C, z = (packing.packed(t, lead) for t in (x, dt, B, C, z))
    own = dtype_as(x)
    sizes = check_tensors(op, x=(x, "tokens heads dim", FLOATS), dt=(dt, "tokens heads", own), A=(A, "heads", F32),
                          B=(B, "tokens groups states", own), C=(C, "tokens groups states", own), D=(D, "heads", F32),
                          z=(z, "tokens heads dim", own), dt_bias=(dt_bias, "heads", F32), h0=(h0, "batch heads dim states", F32),
                          cu_seqlens=(cu_seqlens, "bounds", I32))  # fmt: skip
    packing.check_groups(op, "heads", sizes["heads"], sizes["groups"], sizes["states"])
    if chunk < 1:
        raise ValueError(f"{op}: chunk: {chunk}, expected at least 1")
    cu_seqlens = packing.bounds(op, cu_seqlens, lead, sizes["tokens"], x.device)
    shape = (cu_seqlens.shape[0] - 1, sizes["heads"], sizes["dim"], sizes["states"])
    if h0 is not None and h0.shape[0] != shape[0]:
        raise ValueError(f"{op}: h0: shape {list(h0.shape)}, expected {list(shape)}")
    if _backend.use_reference(op, x):
        y, last = ref.scan.ssd(x, dt, A, B, C, D, z, dt_bias, softplus, h0, cu_seqlens, chunk)
        return packing.unpacked(y, lead), last
    y, last = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty(shape)
    rows, dense = packing.dense_rows, packing.dense
    _backend._C.ssd(  # type: ignore[union-attr]
        rows(x), rows(dt), A.contiguous(), rows(B), rows(C), dense(D), rows(z), dense(dt_bias), softplus, h0, cu_seqlens, chunk, y, last
    )
    return packing.unpacked(y, lead), last


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = False, slots: Tensor | None = None, cu_seqlens: Tensor | None = None, parent: Tensor | None = None,
    update: bool = True, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Continue sequences by one row each, or by several: decoding, drafts to verify, a tree of drafts, or a prompt that may be cut anywhere.

    Args:
        state: [slots, heads, dim, states] float32, any strides (states side by side are fastest). Written in place where `update` is set.
        x, dt, A, B, C, D, z, dt_bias, softplus: as in ssd, packed.
        slots, cu_seqlens, parent, update: as in causal_conv1d_step. out: contiguous; see there too.
    Returns: [tokens, heads, dim] of x's dtype. m rows in one call give the bits of m calls of one row.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2405.21060. Reference: ops.ref.scan.ssd_step. Single rows are bound by memory.
    """
    if out is None and needs_dispatch(state, x, dt, A, B, C, D, z, dt_bias):
        result: Tensor = torch.ops.stretto.ssd_step(state, x, dt, A, B, C, D, z, dt_bias, softplus, slots, cu_seqlens, parent, update)
        return result
    return _ssd_step(state, x, dt, A, B, C, D, z, dt_bias, softplus, slots, cu_seqlens, parent, update, out=out)


def _ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = False, slots: Tensor | None = None, cu_seqlens: Tensor | None = None, parent: Tensor | None = None,
    update: bool = True, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    op, own = "ssd_step", dtype_as(x)
    sizes = check_tensors(op, x=(x, "tokens heads dim", FLOATS), dt=(dt, "tokens heads", own), A=(A, "heads", F32),
                          state=(state, "num_slots heads dim states", F32), B=(B, "tokens groups states", own), C=(C, "tokens groups states", own),
                          D=(D, "heads", F32), z=(z, "tokens heads dim", own), dt_bias=(dt_bias, "heads", F32), slots=(slots, "batch", I32),
                          cu_seqlens=(cu_seqlens, "bounds", I32), parent=(parent, "tokens", I32), out=(out, "tokens heads dim", own))  # fmt: skip
    packing.check_groups(op, "heads", sizes["heads"], sizes["groups"], sizes["states"])
    packing.check_batch(op, slots, cu_seqlens, sizes["tokens"])
    if out is None:
        packing.check_step(op, slots, cu_seqlens, parent, update, sizes["tokens"], sizes["num_slots"])
    if _backend.use_reference(op, x):
        y = ref.scan.ssd_step(state, x, dt, A, B, C, D, z, dt_bias, softplus, slots, cu_seqlens, parent, update)
        return y if out is None else out.copy_(y)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, dense = packing.dense_rows, packing.dense
    _backend._C.ssd_step(  # type: ignore[union-attr]
        state, rows(x), rows(dt), A.contiguous(), rows(B), rows(C), dense(D), rows(z), dense(dt_bias), softplus, dense(slots), dense(cu_seqlens),
        dense(parent), update, out,
    )  # fmt: skip
    return out


def ssd_replay(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, rows: Tensor, n: Tensor, dt_bias: Tensor | None = None, softplus: bool = False,
    slots: Tensor | None = None,
) -> None:  # fmt: skip
    """Advance states by inputs that were kept, as if these had been stepped through: what a cache does when drafts are accepted.

    Args:
        state: [slots, heads, dim, states] float32, any strides; in place.
        x: [inputs, heads, dim], dt: [inputs, heads], B: [inputs, groups, states]: the inputs kept (a ring, or the rows of the verifying step).
        A, dt_bias, softplus: as in ssd. rows, n, slots: as in selective_scan_replay.
    Raises: ValueError naming the argument, what it is and what was expected. Reference: ops.ref.scan.ssd_replay.
    """
    if needs_dispatch(state, x, dt, A, B, dt_bias):
        torch.ops.stretto.ssd_replay(state, x, dt, A, B, rows, n, dt_bias, softplus, slots)
    else:
        _ssd_replay(state, x, dt, A, B, rows, n, dt_bias, softplus, slots)


def _ssd_replay(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, rows: Tensor, n: Tensor, dt_bias: Tensor | None = None, softplus: bool = False,
    slots: Tensor | None = None,
) -> None:  # fmt: skip
    op, own = "ssd_replay", dtype_as(x)
    sizes = check_tensors(op, x=(x, "inputs heads dim", FLOATS), dt=(dt, "inputs heads", own), A=(A, "heads", F32),
                          state=(state, "num_slots heads dim states", F32), B=(B, "inputs groups states", own), rows=(rows, "batch m", I32),
                          n=(n, "batch", I32), dt_bias=(dt_bias, "heads", F32), slots=(slots, "batch", I32))  # fmt: skip
    packing.check_groups(op, "heads", sizes["heads"], sizes["groups"], sizes["states"])
    packing.check_replay(op, rows, n, slots, sizes["inputs"], sizes["num_slots"])
    if _backend.use_reference(op, state):
        ref.scan.ssd_replay(state, x, dt, A, B, rows, n, dt_bias, softplus, slots)
        return
    dense_rows, dense = packing.dense_rows, packing.dense
    _backend._C.ssd_replay(  # type: ignore[union-attr]
        state, dense_rows(x), dense_rows(dt), A.contiguous(), dense_rows(B), rows.contiguous(), n.contiguous(), dense(dt_bias), softplus, dense(slots)
    )


def _cost(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk: int = 64,
) -> Cost:  # fmt: skip
    states = B.shape[-1]
    return Cost((2 if z is None else 3) * x.nbytes + 2 * B.nbytes, flops=x.numel() * (4 * states + chunk) + B.numel() * chunk)


register(
    "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, bool softplus=False, "
    "Tensor? h0=None, Tensor? cu_seqlens=None, int chunk=64) -> (Tensor, Tensor)",
    _ssd,
    function=ssd,
    reference=ref.scan.ssd,
    fake=lambda x, dt, A, B, C, D=None, z=None, dt_bias=None, softplus=False, h0=None, cu_seqlens=None, chunk=64: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        A.new_empty(packing.batch_of(x, 3, cu_seqlens), *x.shape[-2:], B.shape[-1]),
    ),
    cases=ssd_cases,
    bad_cases=ssd_bad,
    bench_cases=ssd_bench,
    cost=_cost,
    bound="compute",
    peers={"torch chunks": chunked_ssd, "transformers": transformers_ssd},
    source="arXiv 2405.21060",
    backward=lambda inputs, *grads: scan_gradients(torch.ops.stretto.ssd_backward, 3, inputs, grads),
)


def _step_cases(make: Make) -> Iterator[Case]:
    i32 = torch.int32
    for dtype in FLOATS:

        def case(name: str, tokens: int, slots: int, *rest: object, sizes: tuple[int, ...] = (4, 6, 16, 2), dtype: torch.dtype = dtype) -> Case:
            heads, dim, states, groups = sizes
            return Case(
                f"{name}-{dtype}", (make.randn(slots, heads, dim, states), *ssd_case(make, tokens, heads, dim, states, groups, dtype), True, *rest)
            )

        yield case("rows", 3, 3)
        yield case("slots", 3, 5, torch.tensor([4, -1, 0], dtype=i32))
        yield case("several", 9, 3, None, ring_rows.cu(1, 6, 2))
        yield case("verify", 9, 4, torch.tensor([2, 0, 1], dtype=i32), ring_rows.cu(6, 0, 3), None, False)
        yield case("tree", 9, 2, None, ring_rows.cu(6, 3), torch.tensor([-1, 0, 0, 1, 3, 2, -1, 0, 1], dtype=i32), False)
        yield case("odd", 2, 2, sizes=(3, 5, 7, 1))
        yield case("wide", 70, 1, None, ring_rows.cu(70), sizes=(2, 17, 150, 2))
        yield case("nothing", 0, 2)
        turned = case("strided", 2, 2)
        yield Case(turned.id, (turned.args[0].mT.contiguous().mT, *turned.args[1:]))


def _step_bad(make: Make) -> Iterator[BadCase]:
    op, i32 = "ssd_step", torch.int32
    inputs, state = ssd_case(make, 3, 4, 5, 6, 2, torch.float32), make.randn(4, 4, 5, 6)
    yield BadCase("state-dtype", (state.bfloat16(), *inputs), f"{op}: state: bfloat16")
    yield BadCase("state-shape", (state[:, :, :3], *inputs), f"{op}: state: shape [4, 4, 3, 6]")
    yield BadCase("few-slots", (state[:2], *inputs), f"{op}: state: 2 slots")
    for slot in (4, 5, 2**31 - 1):
        yield BadCase(f"slot{slot}", (state, *inputs, True, torch.tensor([0, slot, 1], dtype=i32)), f"{op}: slots: {slot} at 1")
    yield BadCase("twice", (state, *inputs, True, torch.tensor([0, 1, 0], dtype=i32)), f"{op}: slots: 0 at 2 a second time")
    yield BadCase(
        "tree-update", (state, *inputs, True, None, ring_rows.cu(3), torch.tensor([-1, 0, 1], dtype=i32)), f"{op}: update: True with parent"
    )


def _step_bench(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, heads in [("Mamba2-130M", 24), ("Mamba2-2.7B", 80)]:
            for batch in (1, 8):
                inputs = ssd_case(make, batch, heads, 64, 128, 1, dtype)
                yield Case(f"{name} batch {batch} {dtype}", (make.randn(batch, heads, 64, 128), *inputs, True))


register(
    "ssd_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, "
    "bool softplus=False, Tensor? slots=None, Tensor? cu_seqlens=None, Tensor? parent=None, bool update=True) -> Tensor",
    _ssd_step,
    function=ssd_step,
    reference=ref.scan.ssd_step,
    fake=lambda state, x, *rest, **kwargs: torch.empty_like(x, memory_format=torch.contiguous_format),
    cases=_step_cases,
    bad_cases=_step_bad,
    bench_cases=_step_bench,
    cost=lambda state, x, dt, A, B, *rest: Cost(3 * x.nbytes + 2 * B.nbytes + 2 * state.nbytes, flops=5 * x.numel() * B.shape[2]),
    bound="memory",
    peers={"compiled torch": compiled_ssd_step},
    source="arXiv 2405.21060",
)


def _replay_cases(make: Make) -> Iterator[Case]:
    rows, n = ring_rows.ragged()
    for dtype in FLOATS:
        x, dt, A, B, _, _, _, bias = ssd_case(make, 8, 4, 6, 16, 2, dtype)
        yield Case(f"ragged-{dtype}", (make.randn(3, 4, 6, 16), x, dt, A, B, rows, n, bias, True))
        slots = torch.tensor([3, -1, 0], dtype=torch.int32)
        yield Case(f"slots-{dtype}", (make.randn(4, 4, 16, 6).mT, x, dt, A, B, rows, n, None, True, slots))


def _replay_bad(make: Make) -> Iterator[BadCase]:
    op = "ssd_replay"
    x, dt, A, B, *_ = ssd_case(make, 4, 4, 5, 6, 2, torch.float32)
    for bad, rows, n in ring_rows.bad(inputs=4):
        yield BadCase(bad, (make.randn(2, 4, 5, 6), x, dt, A, B, rows, n), f"{op}: {bad}")
    rows, n = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    yield BadCase("twice", (make.randn(2, 4, 5, 6), x, dt, A, B, rows, n, None, False, n), f"{op}: slots: 1 at 1 a second time")


def _replay_bench(make: Make) -> Iterator[Case]:
    x, dt, A, B, _, _, _, bias = ssd_case(make, 64, 24, 64, 128, 1, torch.float32)
    yield Case("Mamba2-130M batch 8, 1 to 8 of 8", (make.randn(8, 24, 64, 128), x, dt, A, B, *ring_rows.bench(), bias, True))


register(
    "ssd_replay(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor rows, Tensor n, Tensor? dt_bias=None, bool softplus=False, "
    "Tensor? slots=None) -> ()",
    _ssd_replay,
    function=ssd_replay,
    reference=ref.scan.ssd_replay,
    fake=lambda *args, **kwargs: None,
    cases=_replay_cases,
    bad_cases=_replay_bad,
    bench_cases=_replay_bench,
    cost=lambda state, x, dt, A, B, rows, n, *rest: Cost(2 * rows.shape[0] * state[0].nbytes, flops=3 * int(n.sum()) * state[0].numel()),
    bound="compute",
)
