"""What the table knows of the mLSTM ops: legal and illegal calls, shapes to time, costs and peers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stretto.ops._check import FLOATS
from stretto.ops.table import BadCase, Case, Cost, Make


def _inputs(make: Make, tokens: int, heads: int, dk: int, dv: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v, i, f with gates as a trained model has them: most input gates nearly shut, forget gates nearly open."""
    return (make.randn(tokens, heads, dk, dtype=dtype), make.randn(tokens, heads, dk, dtype=dtype), make.randn(tokens, heads, dv, dtype=dtype),
            (make.randn(tokens, heads) - 3).to(dtype), (make.randn(tokens, heads) + 4).to(dtype))  # fmt: skip


def _state(make: Make, batch: int, heads: int, dk: int, dv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Small m, as the nearly shut gates leave it: where |q n| and e^-m are both near 0, h is their noise."""
    return make.randn(batch, heads, dk, dv), make.randn(batch, heads, dk), make.randn(batch, heads) - 2


def _i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def mlstm_cases(make: Make) -> Iterator[Case]:
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


def mlstm_bad(make: Make) -> Iterator[BadCase]:
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


def step_cases(make: Make) -> Iterator[Case]:
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


def step_bad(make: Make) -> Iterator[BadCase]:
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


def replay_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        _, k, v, i, f = _inputs(make, 9, 2, 17, 24, dtype)
        state = _state(make, 4, 2, 17, 24)
        yield Case(f"rows-{dtype}", (k, v, i, f, *state, _i32(2, -1, 0), _i32(3, 2, 0), _i32(0, 4, 6, 9)), {"gate_cap": 15.0})
        yield Case(f"one-each-{dtype}", (k[:3], v[:3], i[:3], f[:3], *state, _i32(2, 1, 0), _i32(1, 0, 1)))
        yield Case(f"sig-{dtype}", (k, v, i, f, *state, _i32(2, 3), _i32(4, 5), _i32(0, 4, 9)), {"variant": "sig"})
    _, k, v, i, f = _inputs(make, 150, 1, 16, 40)
    yield Case("many-rows", (k, v, i, f, *_state(make, 1, 1, 16, 40), _i32(0), _i32(141), _i32(0, 150)))


def replay_bad(make: Make) -> Iterator[BadCase]:
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


def mlstm_bench(make: Make) -> Iterator[Case]:
    for name, tokens, heads, dk, dv in [("1,024 tokens, 4 heads of 128/256", 1024, 4, 128, 256), ("xLSTM-7B, 2,048 tokens", 2048, 8, 256, 512)]:
        for dtype in (torch.float32, torch.bfloat16):
            rows = _bench_rows(make, tokens, heads, dk, dv, dtype)
            batch = tuple(x[None].transpose(1, 2).contiguous() for x in rows)  # the peers' own layout
            yield Case(f"{name}, {str(dtype).removeprefix('torch.')}", batch, {"gate_cap": 15.0})


def step_bench(make: Make) -> Iterator[Case]:
    for name, heads, dk, dv in [("4 heads of 128/256", 4, 128, 256), ("xLSTM-7B", 8, 256, 512)]:
        for batch in (1, 8):
            for dtype in (torch.float32, torch.bfloat16):
                rows = _bench_rows(make, batch, heads, dk, dv, dtype)
                inputs = (*rows, *_state(make, batch, heads, dk, dv), torch.arange(batch, dtype=torch.int32))
                yield Case(f"{name}, batch {batch}, {str(dtype).removeprefix('torch.')}", inputs, {"gate_cap": 15.0})


def replay_bench(make: Make) -> Iterator[Case]:
    _, k, v, i, f = _bench_rows(make, 32, 8, 256, 512, torch.float32)
    inputs = (k, v, i, f, *_state(make, 8, 8, 256, 512), torch.arange(8, dtype=torch.int32), _i32(*[3] * 8), _i32(*range(0, 33, 4)))
    yield Case("xLSTM-7B, batch 8, 3 of 4 accepted", inputs, {"gate_cap": 15.0})


def _row_bytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def mlstm_cost(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None,
    cu_seqlens: Tensor | None = None, chunk: int = 64, eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp",
) -> Cost:  # fmt: skip
    batch = k.shape[0] if k.dim() == 4 else 1 if cu_seqlens is None else len(cu_seqlens) - 1
    state = 4 * batch * k.shape[1] * (k.shape[-1] * (v.shape[-1] + 1) + 1)
    return Cost(_row_bytes(q, k, v, v, i, f) + (1 if C is None else 2) * state, flops=4 * k.numel() * v.shape[-1])


def step_cost(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, cu_seqlens: Tensor | None = None,
    eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp", update: bool = True,
) -> Cost:  # fmt: skip
    used = int((slot_ids >= 0).sum())
    state = used * sum(t.nbytes // max(1, t.shape[0]) for t in (C, n, m))
    return Cost(_row_bytes(q, k, v, v, i, f) + (2 if update else 1) * state, flops=4 * k.numel() * v.shape[-1])


def replay_cost(
    k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, counts: Tensor, cu_seqlens: Tensor | None = None,
    gate_cap: float | None = None, variant: str = "exp",
) -> Cost:  # fmt: skip
    used, tokens = int(((slot_ids >= 0) & (counts > 0)).sum()), int(counts.sum())
    state = used * sum(t.nbytes // max(1, t.shape[0]) for t in (C, n, m))
    rows = tokens * _row_bytes(k, v, i, f) // max(1, k.shape[0])
    return Cost(rows + 2 * state, flops=2 * tokens * k.shape[1] * k.shape[2] * v.shape[2])


def _soft_cap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


@functools.cache
def _compiled(name: str) -> Callable[..., Any]:
    return torch.compile(getattr(_mlstm_kernels(), name), dynamic=False)


@functools.cache
def _mlstm_kernels() -> Any:
    """The functions of mlstm-kernels that run on a CPU, with gates capped. Raises NotImplementedError where it is not installed."""
    try:
        chunkwise = importlib.import_module("mlstm_kernels.torch.chunkwise").mlstm_chunkwise__native_custbw
        one_step = importlib.import_module("mlstm_kernels.torch.recurrent").mlstm_recurrent_step__native
    except ImportError:
        raise NotImplementedError("mlstm-kernels is not installed") from None

    class Functions:
        @staticmethod
        def sequence(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, size: int, eps: float, cap: float | None) -> Any:
            return chunkwise(q, k, v, _soft_cap(i, cap), _soft_cap(f, cap), return_last_states=True, chunk_size=size, eps=eps)

        @staticmethod
        def step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, eps: float, cap: float | None) -> Any:
            return one_step(q, k, v, _soft_cap(i, cap)[..., None], _soft_cap(f, cap)[..., None], C, n, m[..., None], eps=eps)

    return Functions


def sequence_peer(size: int, compiled: bool) -> Callable[..., Any]:
    """mlstm-kernels' chunkwise form with its best layout, [batch, heads, tokens, width]; from zero states."""

    def peer(
        q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor | None = None, n: Tensor | None = None, m: Tensor | None = None,
        cu_seqlens: Tensor | None = None, chunk: int = 64, eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp",
    ) -> Any:  # fmt: skip
        if k.dim() != 4 or C is not None or variant != "exp":
            raise NotImplementedError("a batch of equal lengths from zero states only")
        return (_compiled("sequence") if compiled else _mlstm_kernels().sequence)(q, k, v, i, f, size, eps, gate_cap)

    return peer


def step_peer(compiled: bool) -> Callable[..., Any]:
    """mlstm-kernels' step: one token a sequence, slots in order; returns new states instead of writing them."""

    def peer(
        q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, slot_ids: Tensor, cu_seqlens: Tensor | None = None,
        eps: float = 1e-6, gate_cap: float | None = None, variant: str = "exp", update: bool = True,
    ) -> Any:  # fmt: skip
        if cu_seqlens is not None or variant != "exp":
            raise NotImplementedError("one token a sequence only")
        return (_compiled("step") if compiled else _mlstm_kernels().step)(q, k, v, i, f, C, n, m, eps, gate_cap)

    return peer
