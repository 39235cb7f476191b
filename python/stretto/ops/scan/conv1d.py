"""The short depthwise convolution before a scan."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, FLOATS, I32, check_tensors, dtype_as
from stretto.ops.scan import packing
from stretto.ops.scan.backward import conv_gradients
from stretto.ops.table import BadCase, Case, Cost, Make, register


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Convolve each channel with its own short filter over the inputs up to now.

    Args:
        x: [tokens, channels] packed, or [batch, length, channels]; float32 / float16 / bfloat16, any strides.
        weight: [channels, K] float32, K 2 to 8, any strides; weight[:, K - 1] meets the current input. bias: [channels] float32.
        activation: "silu" or None.
        initial: [batch, channels, K - 1] float32, the inputs before each sequence, oldest first; None: zeros.
        cu_seqlens: [batch + 1] int32, where packed sequences begin and end; None: one sequence, or the batch.
    Returns: (y, final): y like x; final [batch, channels, K - 1] float32, the last inputs of each sequence, which continue it as `initial` or
        as the state of `causal_conv1d_step`. Float sums; any split of a sequence, and stepping, give the same bits.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: arXiv 2312.00752. Reference: ops.ref.scan.causal_conv1d. Bound by memory.
    """
    if needs_dispatch(x, weight, bias, initial):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.causal_conv1d(x, weight, bias, activation, initial, cu_seqlens)
        return result
    return _causal_conv1d(x, weight, bias, activation, initial, cu_seqlens)


def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "causal_conv1d"
    lead = packing.lead_of(x, 2, cu_seqlens)
    x = packing.packed(x, lead)
    sizes = check_tensors(op, x=(x, "tokens channels", FLOATS), weight=(weight, "channels K", F32), bias=(bias, "channels", F32),
                          initial=(initial, "batch channels _", F32), cu_seqlens=(cu_seqlens, "bounds", I32))  # fmt: skip
    _check_filter(op, sizes["K"], activation)
    cu_seqlens = packing.bounds(op, cu_seqlens, lead, x.shape[0], x.device)
    shape = (cu_seqlens.shape[0] - 1, sizes["channels"], sizes["K"] - 1)
    if initial is not None and initial.shape != shape:
        raise ValueError(f"{op}: initial: shape {list(initial.shape)}, expected {list(shape)}")
    if _backend.use_reference(op, x):
        y, final = ref.scan.causal_conv1d(x, weight, bias, activation, initial, cu_seqlens)
        return packing.unpacked(y, lead), final
    y, final = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty(shape)
    _backend._C.causal_conv1d(  # type: ignore[union-attr]
        packing.dense_rows(x), weight, packing.dense(bias), activation == "silu", initial, cu_seqlens, y, final
    )
    return packing.unpacked(y, lead), final


def _check_filter(op: str, width: int, activation: str | None) -> None:
    if not 2 <= width <= 8:
        raise ValueError(f"{op}: weight: K = {width}, expected 2 to 8")
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation: {activation!r}, expected 'silu' or None")


def causal_conv1d_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None, parent: Tensor | None = None, update: bool = True, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Continue sequences by one row each, or by several: decoding, drafts to verify, or a tree of drafts.

    Args:
        x: [tokens, channels], float32 / float16 / bfloat16, any strides.
        state: [slots, channels, K - 1] float32, any strides; the last inputs of each sequence. Written in place where `update` is set.
        weight, bias, activation: as in causal_conv1d.
        slots: [batch] int32, the state of each sequence; negative: idle, its rows become 0. None: sequence b has slot b.
        cu_seqlens: [batch + 1] int32, the rows of each sequence; None: one row each.
        parent: [tokens] int32, for a tree of drafts: the row that a row follows, counted from the sequence's first row; -1: the state. None: the
            row before. Only with update=False.
        update: whether the state becomes that after the sequence's last row.
        out: written instead of a new tensor; like x. With it integers are not checked: ids out of range make a sequence idle or end it, and rows
            outside all sequences are left alone. For captured steps.
    Returns: [tokens, channels] of x's dtype. m rows in one call give the bits of m calls of one row, and of causal_conv1d.
    Raises: ValueError naming the argument, what it is and what was expected.
    Reference: ops.ref.scan.causal_conv1d_step. Bound by memory.
    """
    if out is None and needs_dispatch(x, state, weight, bias):
        result: Tensor = torch.ops.stretto.causal_conv1d_step(x, state, weight, bias, activation, slots, cu_seqlens, parent, update)
        return result
    return _causal_conv1d_step(x, state, weight, bias, activation, slots, cu_seqlens, parent, update, out=out)


def _causal_conv1d_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None, parent: Tensor | None = None, update: bool = True, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    op = "causal_conv1d_step"
    sizes = check_tensors(op, x=(x, "tokens channels", FLOATS), weight=(weight, "channels K", F32), state=(state, "num_slots channels _", F32),
                          bias=(bias, "channels", F32), slots=(slots, "batch", I32), cu_seqlens=(cu_seqlens, "bounds", I32),
                          parent=(parent, "tokens", I32), out=(out, "tokens channels", dtype_as(x)))  # fmt: skip
    _check_filter(op, sizes["K"], activation)
    if state.shape[2] != sizes["K"] - 1:
        raise ValueError(f"{op}: state: shape {list(state.shape)}, expected [slots, channels, K - 1] with K = {sizes['K']}")
    packing.check_batch(op, slots, cu_seqlens, sizes["tokens"])
    if out is None:
        packing.check_step(op, slots, cu_seqlens, parent, update, sizes["tokens"], sizes["num_slots"])
    if _backend.use_reference(op, x):
        y = ref.scan.causal_conv1d_step(x, state, weight, bias, activation, slots, cu_seqlens, parent, update)
        return y if out is None else out.copy_(y)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _backend._C.causal_conv1d_step(  # type: ignore[union-attr]
        packing.dense_rows(x), state, weight, packing.dense(bias), activation == "silu", packing.dense(slots),
        packing.dense(cu_seqlens), packing.dense(parent), update, out,
    )  # fmt: skip
    return out


def causal_conv1d_replay(state: Tensor, x: Tensor, rows: Tensor, n: Tensor, slots: Tensor | None = None) -> None:
    """Advance states by inputs that were kept, as if these had been stepped through: what a cache does when drafts are accepted.

    Args:
        state: [slots, channels, K - 1] float32, any strides; in place.
        x: [inputs, channels], the inputs kept (a ring, or the rows of the step that verified the drafts); float32 / float16 / bfloat16.
        rows: [batch, m] int32, which of them each sequence takes, in order. n: [batch] int32, how many of these; the rest is not read.
        slots: [batch] int32, the state of each sequence; negative: none. None: sequence b has slot b.
    Raises: ValueError naming the argument, what it is and what was expected. Reference: ops.ref.scan.causal_conv1d_replay.
    """
    if needs_dispatch(state, x):
        torch.ops.stretto.causal_conv1d_replay(state, x, rows, n, slots)
    else:
        _causal_conv1d_replay(state, x, rows, n, slots)


def _causal_conv1d_replay(state: Tensor, x: Tensor, rows: Tensor, n: Tensor, slots: Tensor | None = None) -> None:
    op = "causal_conv1d_replay"
    sizes = check_tensors(op, state=(state, "num_slots channels before", F32), x=(x, "inputs channels", FLOATS), rows=(rows, "batch m", I32),
                          n=(n, "batch", I32), slots=(slots, "batch", I32))  # fmt: skip
    if not 1 <= sizes["before"] <= 7:
        raise ValueError(f"{op}: state: shape {list(state.shape)}, expected [slots, channels, K - 1] with K 2 to 8")
    packing.check_replay(op, rows, n, slots, sizes["inputs"], sizes["num_slots"])
    if _backend.use_reference(op, state):
        ref.scan.causal_conv1d_replay(state, x, rows, n, slots)
    else:
        _backend._C.causal_conv1d_replay(state, packing.dense_rows(x), rows.contiguous(), n.contiguous(), packing.dense(slots))  # type: ignore[union-attr]


def _cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:

        def x(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return make.randn(*shape, dtype=dtype)

        yield Case(f"ragged-{dtype}", (x(9, 17), make.randn(17, 4), make.randn(17), "silu", make.randn(3, 17, 3), _cu(5, 1, 3)))
        yield Case(f"long-{dtype}", (x(300, 300), make.randn(300, 4), None, "silu", None, _cu(129, 171)))
        yield Case(f"empty-sequences-{dtype}", (x(4, 16), make.randn(16, 3), make.randn(16), None, make.randn(4, 16, 2), _cu(0, 4, 0, 0)))
        yield Case(f"nothing-{dtype}", (x(0, 5), make.randn(5, 2), None, None, make.randn(2, 5, 1), _cu(0, 0)))
        yield Case(f"batch-{dtype}", (x(2, 7, 33), make.randn(33, 8), make.randn(33), "silu", make.randn(2, 33, 7)))
        yield Case(f"one-{dtype}", (x(6, 3), make.randn(3, 5), make.randn(3)))
        yield Case(f"strided-{dtype}", (x(24, 10).t(), make.randn(24, 4), make.randn(24), "silu", make.randn(2, 3, 24).transpose(1, 2), _cu(2, 8)))


def _bad(make: Make) -> Iterator[BadCase]:
    x, w = make.randn(6, 8), make.randn(8, 4)
    yield BadCase("rank", (x[0], w), "causal_conv1d: x: shape [8]")
    yield BadCase("dtype", (x.double(), w), "causal_conv1d: x: float64")
    yield BadCase("channels", (x, make.randn(7, 4)), "causal_conv1d: weight: shape [7, 4]")
    yield BadCase("weight-dtype", (x, w.bfloat16()), "causal_conv1d: weight: bfloat16")
    yield BadCase("taps", (x, make.randn(8, 9)), "causal_conv1d: weight: K = 9")
    yield BadCase("one-tap", (x, make.randn(8, 1)), "causal_conv1d: weight: K = 1")
    yield BadCase("activation", (x, w, None, "relu"), "causal_conv1d: activation: 'relu'")
    yield BadCase("initial", (x, w, None, None, make.randn(2, 8, 3)), "causal_conv1d: initial: shape [2, 8, 3]")
    yield BadCase("initial-dtype", (x, w, None, None, make.randn(1, 8, 3, dtype=torch.bfloat16)), "causal_conv1d: initial: bfloat16")
    yield BadCase("decreasing", (x, w, None, None, None, torch.tensor([0, 4, 3, 6], dtype=torch.int32)), "causal_conv1d: cu_seqlens: 3 after 4 at 2")
    yield BadCase("first", (x, w, None, None, None, torch.tensor([1, 6], dtype=torch.int32)), "causal_conv1d: cu_seqlens: 1 at 0")
    for last in (-1, 5, 7, -(2**31), 2**31 - 1):
        cu = torch.tensor([0, last], dtype=torch.int32)
        yield BadCase(f"last{last}", (x, w, None, None, None, cu), f"causal_conv1d: cu_seqlens: {last}")
    yield BadCase("no-bounds", (x, w, None, None, None, torch.zeros(0, dtype=torch.int32)), "causal_conv1d: cu_seqlens: no elements")


def _bench(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, channels in [("Mamba-130M", 1536), ("Mamba-2.8B", 5120)]:
            yield Case(
                f"{name} 1 x 1024 {dtype}", (make.randn(1, 1024, channels, dtype=dtype), make.randn(channels, 4), make.randn(channels), "silu")
            )


def _torch_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    if x.dim() != 3 or initial is not None:
        raise NotImplementedError("a batch without initial state only")
    width = weight.shape[1]
    y = torch.nn.functional.conv1d(
        x.mT, weight[:, None].to(x.dtype), None if bias is None else bias.to(x.dtype), padding=width - 1, groups=x.shape[2]
    )
    return ref.scan.activated(y[..., : x.shape[1]], activation).mT


register(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, str? activation=None, Tensor? initial=None, Tensor? cu_seqlens=None) -> (Tensor, Tensor)",
    _causal_conv1d,
    function=causal_conv1d,
    reference=ref.scan.causal_conv1d,
    fake=lambda x, weight, bias=None, activation=None, initial=None, cu_seqlens=None: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        weight.new_empty(packing.batch_of(x, 2, cu_seqlens), weight.shape[0], weight.shape[1] - 1),
    ),
    cases=_cases,
    bad_cases=_bad,
    bench_cases=_bench,
    cost=lambda x, weight, *rest: Cost(2 * x.nbytes + weight.nbytes, flops=(2 * weight.shape[1] + 4) * x.numel()),
    bound="memory",
    peers={"torch conv1d": _torch_conv},
    source="arXiv 2312.00752",
    backward=conv_gradients,
)


def _step_cases(make: Make) -> Iterator[Case]:
    i32 = torch.int32
    for dtype in FLOATS:
        x, w, bias = make.randn(9, 33, dtype=dtype), make.randn(33, 4), make.randn(33)
        yield Case(f"rows-{dtype}", (x, make.randn(9, 33, 3), w, bias, "silu"))
        yield Case(f"slots-{dtype}", (x[:3], make.randn(5, 33, 3), w, None, None, torch.tensor([4, -1, 0], dtype=i32)))
        yield Case(f"verify-{dtype}", (x, make.randn(4, 33, 3), w, bias, "silu", torch.tensor([2, 0, 1], dtype=i32), _cu(6, 0, 3), None, False))
        yield Case(f"several-{dtype}", (x, make.randn(3, 33, 3), w, bias, "silu", None, _cu(1, 6, 2)))
        parent = torch.tensor([-1, 0, 0, 1, 3, 2, -1, 0, 1], dtype=i32)
        yield Case(f"tree-{dtype}", (x, make.randn(2, 33, 3), w, bias, "silu", None, _cu(6, 3), parent, False))
        yield Case(f"strided-{dtype}", (make.randn(40, 9, dtype=dtype).t(), make.randn(9, 2, 40).transpose(1, 2), make.randn(40, 3), None, "silu"))
        yield Case(f"nothing-{dtype}", (x[:0], make.randn(2, 33, 3), w))


def _step_bad(make: Make) -> Iterator[BadCase]:
    x, state, w, i32 = make.randn(3, 8), make.randn(4, 8, 3), make.randn(8, 4), torch.int32
    op = "causal_conv1d_step"
    yield BadCase("state-dtype", (x, state.bfloat16(), w), f"{op}: state: bfloat16")
    yield BadCase("state-width", (x, state[..., :2], w), f"{op}: state: shape [4, 8, 2]")
    yield BadCase("few-slots", (x, state[:2], w), f"{op}: state: 2 slots")
    for slot in (4, 5, 2**31 - 1):
        yield BadCase(f"slot{slot}", (x, state, w, None, None, torch.tensor([0, slot, 1], dtype=i32)), f"{op}: slots: {slot} at 1")
    yield BadCase("twice", (x, state, w, None, None, torch.tensor([0, 1, 0], dtype=i32)), f"{op}: slots: 0 at 2 a second time")
    yield BadCase("slots", (x, state, w, None, None, torch.tensor([0, 1], dtype=i32)), f"{op}: slots: 2 sequences, expected 3")
    yield BadCase("decreasing", (x, state, w, None, None, None, torch.tensor([0, 2, 1, 3], dtype=i32)), f"{op}: cu_seqlens: 1 after 2")
    tree = torch.tensor([-1, 0, 1], dtype=i32)
    yield BadCase("tree-update", (x, state, w, None, None, None, _cu(3), tree), f"{op}: update: True with parent")
    for parent in (2, 3, 2**31 - 1):
        bad = torch.tensor([-1, 0, parent], dtype=i32)
        yield BadCase(f"parent{parent}", (x, state, w, None, None, None, _cu(3), bad, False), f"{op}: parent: {parent} at 2")


def _step_bench(make: Make) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, channels in [("Mamba-130M", 1536), ("Mamba-2.8B", 5120)]:
            for batch in (1, 16):
                args = (
                    make.randn(batch, channels, dtype=dtype),
                    make.randn(batch, channels, 3),
                    make.randn(channels, 4),
                    make.randn(channels),
                    "silu",
                )
                yield Case(f"{name} batch {batch} {dtype}", args)


def _torch_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    window = torch.cat([state, x[..., None].to(state.dtype)], 2)
    state.copy_(window[..., 1:])
    return ref.scan.activated((window * weight).sum(2) + bias, activation).to(x.dtype)


register(
    "causal_conv1d_step(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias=None, str? activation=None, Tensor? slots=None, "
    "Tensor? cu_seqlens=None, Tensor? parent=None, bool update=True) -> Tensor",
    _causal_conv1d_step,
    function=causal_conv1d_step,
    reference=ref.scan.causal_conv1d_step,
    fake=lambda x, *rest, **kwargs: torch.empty_like(x, memory_format=torch.contiguous_format),
    cases=_step_cases,
    bad_cases=_step_bad,
    bench_cases=_step_bench,
    cost=lambda x, state, weight, *rest: Cost(
        2 * x.nbytes + weight.nbytes + 2 * 4 * x.numel() * state.shape[2], flops=(2 * weight.shape[1] + 4) * x.numel()
    ),
    bound="latency",
    peers={"torch": _torch_step},
    source="arXiv 2312.00752",
)


def _replay_cases(make: Make) -> Iterator[Case]:
    rows = torch.tensor([[5, 0, 3, 2, 6], [1, 4, -7, 99, 8], [7, 7, 7, 7, 7]], dtype=torch.int32)
    n = torch.tensor([5, 2, 0], dtype=torch.int32)
    for dtype in FLOATS:
        yield Case(f"ragged-{dtype}", (make.randn(3, 33, 3), make.randn(8, 33, dtype=dtype), rows, n))
        slots = torch.tensor([3, -1, 0], dtype=torch.int32)
        yield Case(f"slots-{dtype}", (make.randn(4, 3, 300).transpose(1, 2), make.randn(300, 8, dtype=dtype).t(), rows, n, slots))


def _replay_bad(make: Make) -> Iterator[BadCase]:
    state, x, op = make.randn(2, 8, 3), make.randn(4, 8), "causal_conv1d_replay"
    n = torch.tensor([1, 2], dtype=torch.int32)
    for row in (-1, 4, 2**31 - 1, -(2**31)):
        yield BadCase(f"row{row}", (state, x, torch.tensor([[0, 1], [0, row]], dtype=torch.int32), n), f"{op}: rows: {row} at 1, 1")
    rows = torch.zeros(2, 2, dtype=torch.int32)
    for count in (-1, 3, 2**31 - 1):
        yield BadCase(f"n{count}", (state, x, rows, torch.tensor([0, count], dtype=torch.int32)), f"{op}: n: {count} at 1")
    yield BadCase("twice", (state, x, rows, n, torch.tensor([1, 1], dtype=torch.int32)), f"{op}: slots: 1 at 1 a second time")
    yield BadCase("state-dtype", (state.half(), x, rows, n), f"{op}: state: float16")


def _replay_bench(make: Make) -> Iterator[Case]:
    rows = torch.arange(8 * 8, dtype=torch.int32).view(8, 8)
    yield Case("Mamba-130M batch 8, 1 to 8 of 8", (make.randn(8, 1536, 3), make.randn(64, 1536), rows, torch.arange(1, 9, dtype=torch.int32)))


register(
    "causal_conv1d_replay(Tensor(a!) state, Tensor x, Tensor rows, Tensor n, Tensor? slots=None) -> ()",
    _causal_conv1d_replay,
    function=causal_conv1d_replay,
    reference=ref.scan.causal_conv1d_replay,
    fake=lambda state, x, rows, n, slots=None: None,
    cases=_replay_cases,
    bad_cases=_replay_bad,
    bench_cases=_replay_bench,
    cost=lambda state, x, rows, n, slots=None: Cost(3 * rows.shape[0] * state[0].nbytes, 0),
    bound="latency",
)
