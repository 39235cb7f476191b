"""Gradients of the scan family, as ops of their own: training and tracing call them through the forward ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._check import F32, FLOATS, I32, check_tensors, dtype_as
from stretto.ops.scan import packing
from stretto.ops.scan.cases import ring_rows, selective_case, ssd_case
from stretto.ops.table import BadCase, Case, Cost, Make, no_second_derivative, register


def _or_none(given: Tensor | None, grad: Tensor) -> Tensor | None:
    return None if given is None else grad


def _some(grad: Tensor | None, like: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(like, dtype=dtype, device=device) if grad is None else grad.contiguous()


def causal_conv1d_backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of causal_conv1d.

    Args:
        dy: like x. dfinal: [batch, channels, K - 1] float32. The rest: as in causal_conv1d.
    Returns: (dx, dweight, dbias, dinitial), shaped as what they belong to; without elements where that was not given. Float sums over rows in
        one order, whatever the threads.
    Reference: ops.ref.scan.causal_conv1d_backward.
    """
    op = "causal_conv1d_backward"
    lead = packing.lead_of(x, 2, cu_seqlens)
    x, dy = packing.packed(x, lead), packing.packed(dy, lead)
    sizes = check_tensors(op, x=(x, "tokens channels", FLOATS), dy=(dy, "tokens channels", dtype_as(x)), weight=(weight, "channels K", F32),
                          dfinal=(dfinal, "batch channels before", F32), bias=(bias, "channels", F32), initial=(initial, "batch channels before", F32),
                          cu_seqlens=(cu_seqlens, "bounds", I32))  # fmt: skip
    cu_seqlens = packing.bounds(op, cu_seqlens, lead, sizes["tokens"], x.device)
    if dfinal.shape != (cu_seqlens.shape[0] - 1, sizes["channels"], sizes["K"] - 1):
        raise ValueError(f"{op}: dfinal: shape {list(dfinal.shape)}, expected {[cu_seqlens.shape[0] - 1, sizes['channels'], sizes['K'] - 1]}")
    if _backend.use_reference(op, x):
        dx, *rest = ref.scan.causal_conv1d_backward(dy, dfinal, x, weight, bias, activation, initial, cu_seqlens)
        return packing.unpacked(dx, lead), rest[0], rest[1], rest[2]
    dx, dweight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty(weight.shape)
    dbias, dinitial = torch.empty(weight.shape[0]), torch.empty(dfinal.shape)
    rows, dense = packing.dense_rows, packing.dense
    _backend._C.causal_conv1d_backward(  # type: ignore[union-attr]
        rows(dy), dfinal.contiguous(), rows(x), weight, dense(bias), activation == "silu", initial, cu_seqlens, dx, dweight, dbias, dinitial
    )
    none = torch.empty(0)
    return packing.unpacked(dx, lead), dweight, none if bias is None else dbias, none if initial is None else dinitial


def conv_gradients(inputs: tuple[Any, ...], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The `backward` of causal_conv1d in the op table."""
    x, weight, bias, activation, initial, cu_seqlens = inputs
    final = (packing.batch_of(x, 2, cu_seqlens), weight.shape[0], weight.shape[1] - 1)
    dy, dfinal = _some(grads[0], x.shape, x.dtype, x.device), _some(grads[1], final, weight.dtype, x.device)
    dx, dweight, dbias, dinitial = torch.ops.stretto.causal_conv1d_backward(dy, dfinal, x, weight, bias, activation, initial, cu_seqlens)
    return dx, dweight, _or_none(bias, dbias), None, _or_none(initial, dinitial), None


def selective_scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of selective_scan, whose states are computed anew from one every 32 rows.

    Args:
        dy: like u. dlast: [batch, channels, states] float32. The rest: as in selective_scan.
    Returns: (du, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0), shaped and typed as what they belong to; without elements where that was not given.
        Float sums in one order, whatever the threads.
    Reference: ops.ref.scan.selective_scan_backward. Bound by the exponentials.
    """
    op = "selective_scan_backward"
    lead = packing.lead_of(u, 2, cu_seqlens)
    dy, u, dt, B, C, z = (packing.packed(t, lead) for t in (dy, u, dt, B, C, z))
    own = dtype_as(u)
    sizes = check_tensors(op, u=(u, "tokens channels", FLOATS), dy=(dy, "tokens channels", own), dt=(dt, "tokens channels", own),
                          A=(A, "channels states", F32), B=(B, "tokens groups states", own), C=(C, "tokens groups states", own),
                          D=(D, "channels", F32), z=(z, "tokens channels", own), dt_bias=(dt_bias, "channels", F32),
                          dlast=(dlast, "batch channels states", F32), h0=(h0, "batch channels states", F32),
                          cu_seqlens=(cu_seqlens, "bounds", I32))  # fmt: skip
    packing.check_groups(op, "channels", sizes["channels"], sizes["groups"], sizes["states"])
    cu_seqlens = packing.bounds(op, cu_seqlens, lead, sizes["tokens"], u.device)
    if dlast.shape[0] != cu_seqlens.shape[0] - 1:
        raise ValueError(f"{op}: dlast: {dlast.shape[0]} sequences, expected {cu_seqlens.shape[0] - 1}")
    if _backend.use_reference(op, u):
        found = list(ref.scan.selective_scan_backward(dy, dlast, u, dt, A, B, C, D, z, dt_bias, softplus, h0, cu_seqlens))
    else:
        du, ddt, dz = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in range(3))
        parts = _backend._C.scan_parts(sizes["channels"], sizes["groups"])  # type: ignore[union-attr]
        db, dc = torch.empty(parts, *B.shape), torch.empty(parts, *B.shape)
        da, dd, dbias, dh0 = torch.empty(A.shape), torch.empty(A.shape[0]), torch.empty(A.shape[0]), torch.empty(dlast.shape)
        rows, dense = packing.dense_rows, packing.dense
        _backend._C.selective_scan_backward(  # type: ignore[union-attr]
            rows(dy), dlast.contiguous(), rows(u), rows(dt), A, rows(B), rows(C), dense(D), rows(z), dense(dt_bias), softplus, h0, cu_seqlens,
            du, ddt, da, db, dc, dd, None if z is None else dz, dbias, dh0,
        )  # fmt: skip
        for i in range(1, parts):  # one order
            db[0] += db[i]
            dc[0] += dc[i]
        none = torch.empty(0)
        found = [du, ddt, da, db[0].to(B.dtype), dc[0].to(C.dtype), none if D is None else dd, none if z is None else dz,
                 none if dt_bias is None else dbias, none if h0 is None else dh0]  # fmt: skip
    for i in (0, 1, 3, 4, 6):
        found[i] = found[i] if found[i].dim() == 1 else packing.unpacked(found[i], lead)
    return tuple(found)


def scan_gradients(op: Any, rank: int, inputs: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The `backward` of selective_scan and ssd in the op table: `op` is the op of their gradients."""
    u, _, A, B = inputs[:4]
    state = A.shape if rank == 2 else (*u.shape[-2:], B.shape[-1])
    last = (packing.batch_of(u, rank, inputs[10]), *state)
    found = op(_some(grads[0], u.shape, u.dtype, u.device), _some(grads[1], last, A.dtype, u.device), *inputs)
    (du, ddt, da, db, dc, dd, dz, dbias, dh0), (D, z, dt_bias, h0) = found, (*inputs[5:8], inputs[9])
    return du, ddt, da, db, dc, _or_none(D, dd), _or_none(z, dz), _or_none(dt_bias, dbias), None, _or_none(h0, dh0), None, None


def ssd_backward(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, softplus: bool = False, h0: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk: int = 64,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of ssd, chunk by chunk on torch's matrix products: memory for the state before each chunk, and for one chunk.

    Args:
        dy: like x. dlast: [batch, heads, dim, states] float32. The rest: as in ssd.
    Returns: (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0), shaped and typed as what they belong to; without elements where that was not given.
    Reference: ops.ref.scan.ssd_backward.
    """
    op = "ssd_backward"
    lead = packing.lead_of(x, 3, cu_seqlens)
    dy, x, dt, B, C, z = (packing.packed(t, lead) for t in (dy, x, dt, B, C, z))
    own = dtype_as(x)
    sizes = check_tensors(op, x=(x, "tokens heads dim", FLOATS), dy=(dy, "tokens heads dim", own), dt=(dt, "tokens heads", own), A=(A, "heads", F32),
                          B=(B, "tokens groups states", own), C=(C, "tokens groups states", own), D=(D, "heads", F32),
                          z=(z, "tokens heads dim", own), dt_bias=(dt_bias, "heads", F32), dlast=(dlast, "batch heads dim states", F32),
                          h0=(h0, "batch heads dim states", F32), cu_seqlens=(cu_seqlens, "bounds", I32))  # fmt: skip
    packing.check_groups(op, "heads", sizes["heads"], sizes["groups"], sizes["states"])
    if chunk < 1:
        raise ValueError(f"{op}: chunk: {chunk}, expected at least 1")
    cu_seqlens = packing.bounds(op, cu_seqlens, lead, sizes["tokens"], x.device)
    if dlast.shape[0] != cu_seqlens.shape[0] - 1:
        raise ValueError(f"{op}: dlast: {dlast.shape[0]} sequences, expected {cu_seqlens.shape[0] - 1}")
    found = _chunked_gradients(dy, dlast, x, dt, A, B, C, D, z, dt_bias, softplus, h0, cu_seqlens, chunk)
    dx, ddt, db, dc = (packing.unpacked(found[i], lead) for i in (0, 1, 3, 4))
    none = A.new_empty(0)
    return (dx, ddt, found[2], db, dc, none if D is None else found[5], none if z is None else packing.unpacked(found[6], lead),
            none if dt_bias is None else found[7], none if h0 is None else found[8])  # fmt: skip


def _chunked_gradients(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, h0: Tensor | None, cu_seqlens: Tensor, chunk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All nine gradients, packed."""
    heads, groups = x.shape[1], B.shape[1]
    da, dd, dbias = (torch.zeros_like(A) for _ in range(3))
    dx, ddt, db, dc, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C, x))
    dh = dlast.contiguous().clone()
    for s, (i, j) in enumerate(ref.scan.spans(cu_seqlens, len(x))):
        cuts = [slice(k, min(k + chunk, j)) for k in range(i, j, chunk)]
        h = A.new_zeros(dlast.shape[1:]) if h0 is None else h0[s]
        before = []
        for rows in cuts:
            before.append(h)
            h = _Chunk(x[rows], dt[rows], A, B[rows], C[rows], dt_bias, softplus).state_after(h)
        for rows, h in zip(reversed(cuts), reversed(before), strict=True):
            k = _Chunk(x[rows], dt[rows], A, B[rows], C[rows], dt_bias, softplus)
            gy, v = dy[rows].to(A.dtype), x[rows].to(A.dtype)
            if z is not None:
                gate = z[rows].to(A.dtype)
                slope, y = torch.sigmoid(gate), k.output(h).transpose(0, 1)
                dz[rows] = gy * (y if D is None else y + D[:, None] * v) * slope * (1 + gate * (1 - slope))
                gy = gy * gate * slope
            dv, ddelta, drate, db_heads, dc_heads, dh[s] = k.gradients(h, gy.transpose(0, 1), dh[s])
            dx[rows] = dv if D is None else dv + D[:, None] * gy
            dd += (gy * v).sum((0, 2))
            da += drate
            if softplus:
                ddelta = ddelta * torch.sigmoid(dt[rows].to(A.dtype) if dt_bias is None else dt[rows].to(A.dtype) + dt_bias)
            ddt[rows] = ddelta
            dbias += ddelta.sum(0)
            for out, of_heads in ((db, db_heads), (dc, dc_heads)):
                out[rows] = of_heads.view(groups, heads // groups, *of_heads.shape[1:]).sum(1).transpose(0, 1)
    return dx, ddt, da, db, dc, dd, dz, dbias, dh


class _Chunk:
    """One chunk of ssd in products of matrices, heads first: y = (S * L) v + e C h, S = C B^T, L[i, j] = exp(cs_i - cs_j), v = delta x."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, softplus: bool) -> None:
        delta = ref.scan.step_size(dt, dt_bias, softplus, A.dtype)
        self.rates, self.delta, self.x = A, delta.t(), x.to(A.dtype).transpose(0, 1)
        self.b, self.c = (ref.scan.per_channel(t.to(A.dtype), x.shape[1]).transpose(0, 1) for t in (B, C))
        self.v = self.delta[..., None] * self.x
        cs = (delta * A).t().cumsum(1)
        self.start, self.left, self.all = torch.exp(cs)[..., None], torch.exp(cs[:, -1:] - cs)[..., None], torch.exp(cs[:, -1])[:, None, None]
        lower = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril()
        self.decay = torch.exp((cs[:, :, None] - cs[:, None]).masked_fill(~lower, -torch.inf))

    def state_after(self, h: Tensor) -> Tensor:
        return self.all * h + (self.left * self.v).mT @ self.b

    def output(self, h: Tensor) -> Tensor:
        return (self.c @ self.b.mT * self.decay) @ self.v + self.start * (self.c @ h.mT)

    def gradients(self, h: Tensor, gy: Tensor, gh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(dx [q, heads, dim], ddelta [q, heads], dA [heads], dB and dC [heads, q, states], dh), from the gradients of output and state."""
        mixed, gs = self.c @ self.b.mT * self.decay, gy @ self.v.mT
        started, kept = self.start * gy, self.left * (self.b @ gh.mT)  # [heads, q, dim]
        dv = mixed.mT @ gy + kept
        dc = (gs * self.decay) @ self.b + started @ h
        db = (gs * self.decay).mT @ self.c + (self.left * self.v) @ gh
        dh = started.mT @ self.c + self.all * gh
        of_decay, of_state = gs * mixed, (self.v * kept).sum(-1)
        dcs = of_decay.sum(2) - of_decay.sum(1) + (started * (self.c @ h.mT)).sum(-1) - of_state
        dcs[:, -1] += of_state.sum(1) + (self.all * h * gh).sum((1, 2))
        drate = dcs.flip(1).cumsum(1).flip(1)  # cs_i holds every delta_j A up to i
        ddelta = drate * self.rates[:, None] + (dv * self.x).sum(-1)
        return (self.delta[..., None] * dv).transpose(0, 1), ddelta.t(), (drate * self.delta).sum(1), db, dc, dh


def _conv_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        x, w, bias = make.randn(30, 19, dtype=dtype), make.randn(19, 4), make.randn(19)
        dy = make.randn(30, 19, dtype=dtype)
        yield Case(f"ragged-{dtype}", (dy, make.randn(4, 19, 3), x, w, bias, "silu", make.randn(4, 19, 3), ring_rows.cu(2, 27, 0, 1)))
        yield Case(f"bare-{dtype}", (dy, make.randn(1, 19, 3), x, w))
        long = make.randn(2, 150, 33, dtype=dtype)
        yield Case(f"batch-{dtype}", (long * 0.5, make.randn(2, 33, 7), long, make.randn(33, 8), None, "silu"))
        yield Case(f"nothing-{dtype}", (dy[:0], make.randn(1, 19, 3), x[:0], w, bias, None, make.randn(1, 19, 3)))


def _conv_bad(make: Make) -> Iterator[BadCase]:
    x, w = make.randn(6, 8), make.randn(8, 4)
    yield BadCase("dy", (x[:5], make.randn(1, 8, 3), x, w), "causal_conv1d_backward: dy: shape [5, 8]")
    yield BadCase("dfinal", (x, make.randn(2, 8, 3), x, w), "causal_conv1d_backward: dfinal: shape [2, 8, 3]")


def _like(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(torch.empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


register(
    "causal_conv1d_backward(Tensor dy, Tensor dfinal, Tensor x, Tensor weight, Tensor? bias=None, str? activation=None, Tensor? initial=None, "
    "Tensor? cu_seqlens=None) -> (Tensor, Tensor, Tensor, Tensor)",
    causal_conv1d_backward,
    function=causal_conv1d_backward,
    reference=ref.scan.causal_conv1d_backward,
    fake=lambda dy, dfinal, x, weight, bias=None, activation=None, initial=None, cu_seqlens=None: _like(x, weight, bias, initial),
    cases=_conv_cases,
    bad_cases=_conv_bad,
    bench_cases=lambda make: (Case("Mamba-130M 1 x 1024", (x, make.randn(1, 1536, 3), x, make.randn(1536, 4), make.randn(1536), "silu"))
                              for x in (make.randn(1, 1024, 1536),)),
    cost=lambda dy, dfinal, x, weight, *rest: Cost(3 * x.nbytes + 2 * weight.nbytes, flops=(6 * weight.shape[1] + 10) * x.numel()),
    bound="memory",
    backward=no_second_derivative,
)  # fmt: skip


def _scan_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        inputs = selective_case(make, 80, 34, 16, 2, dtype)
        dy = make.randn(80, 34, dtype=dtype)
        yield Case(f"ragged-{dtype}", (dy, make.randn(3, 34, 16), *inputs, True, make.randn(3, 34, 16), ring_rows.cu(70, 0, 10)))
        yield Case(f"bare-{dtype}", (dy, make.randn(1, 34, 16), inputs[0], inputs[1].abs() * 0.1, *inputs[2:5]))
        u, dt, a, b, c, d, z, bias = selective_case(make, 2 * 20, 300, 5, 1, dtype)
        lead = [t.view(2, 20, *t.shape[1:]) for t in (u, dt, b, c, z)]
        yield Case(f"batch-{dtype}", (lead[0] * 0.5, make.randn(2, 300, 5), lead[0], lead[1], a, lead[2], lead[3], d, lead[4], bias, True))
        yield Case(f"nothing-{dtype}", (dy[:0], make.randn(1, 34, 16), *(t[:0] if t.shape[0] == 80 else t for t in inputs), True))


def _scan_bad(make: Make) -> Iterator[BadCase]:
    inputs = selective_case(make, 6, 8, 4, 2, torch.float32)
    yield BadCase("dy", (make.randn(5, 8), make.randn(1, 8, 4), *inputs), "selective_scan_backward: dy: shape [5, 8]")
    yield BadCase("dlast", (make.randn(6, 8), make.randn(2, 8, 4), *inputs), "selective_scan_backward: dlast: 2 sequences")


_SCAN_ARGS = (
    "Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, bool softplus=False, Tensor? h0=None, "
    "Tensor? cu_seqlens=None"
)
_NINE = "(" + ", ".join(["Tensor"] * 9) + ")"

register(
    f"selective_scan_backward(Tensor dy, Tensor dlast, Tensor u, {_SCAN_ARGS}) -> {_NINE}",
    selective_scan_backward,
    function=selective_scan_backward,
    reference=ref.scan.selective_scan_backward,
    fake=lambda dy, dlast, u, dt, A, B, C, D=None, z=None, dt_bias=None, softplus=False, h0=None, cu_seqlens=None: _like(
        u, dt, A, B, C, D, z, dt_bias, h0
    ),
    cases=_scan_cases,
    bad_cases=_scan_bad,
    bench_cases=lambda make: (Case("Mamba-130M 512", (inputs[0], make.randn(1, 1536, 16), *inputs, True))
                              for inputs in (selective_case(make, 512, 1536, 16, 1, torch.float32),)),
    cost=lambda dy, dlast, u, dt, A, B, *rest: Cost(7 * u.nbytes + 4 * B.nbytes + 2 * A.nbytes, flops=52 * u.numel() * A.shape[1]),
    bound="compute",
    backward=no_second_derivative,
    tolerance=4.0,  # A's gradient is a sum over rows, in order; the reference adds in pairs
)  # fmt: skip


def _ssd_cases(make: Make) -> Iterator[Case]:
    for dtype in FLOATS:
        inputs = ssd_case(make, 45, 4, 6, 8, 2, dtype)
        dy = make.randn(45, 4, 6, dtype=dtype)
        yield Case(f"ragged-{dtype}", (dy, make.randn(3, 4, 6, 8), *inputs, True, make.randn(3, 4, 6, 8), ring_rows.cu(35, 0, 10), 16))
        yield Case(f"bare-{dtype}", (dy, make.randn(1, 4, 6, 8), inputs[0], inputs[1].abs() * 0.1, *inputs[2:5]))


def _ssd_bad(make: Make) -> Iterator[BadCase]:
    inputs = ssd_case(make, 6, 4, 5, 6, 2, torch.float32)
    yield BadCase("chunk", (inputs[0], make.randn(1, 4, 5, 6), *inputs, True, None, None, 0), "ssd_backward: chunk: 0")
    yield BadCase("dlast", (inputs[0], make.randn(2, 4, 5, 6), *inputs), "ssd_backward: dlast: 2 sequences")


register(
    f"ssd_backward(Tensor dy, Tensor dlast, Tensor x, {_SCAN_ARGS}, int chunk=64) -> {_NINE}",
    ssd_backward,
    function=ssd_backward,
    reference=ref.scan.ssd_backward,
    fake=lambda dy, dlast, x, dt, A, B, C, D=None, z=None, dt_bias=None, softplus=False, h0=None, cu_seqlens=None, chunk=64: _like(
        x, dt, A, B, C, D, z, dt_bias, h0
    ),
    cases=_ssd_cases,
    bad_cases=_ssd_bad,
    bench_cases=lambda make: (Case("Mamba2-130M 256", (inputs[0], make.randn(1, 24, 64, 128), *inputs, True))
                              for inputs in (ssd_case(make, 256, 24, 64, 128, 1, torch.float32),)),
    cost=lambda dy, dlast, x, dt, A, B, *rest: Cost(5 * x.nbytes + 4 * B.nbytes, flops=3 * x.numel() * (4 * B.shape[-1] + 64)),
    bound="compute",
    backward=no_second_derivative,
    tolerance=8.0,  # products of matrices in chunks against a reference that goes row by row
)  # fmt: skip
