"""From logits to tokens: argmax, penalties, warping, drawing, and the counter-based noise behind every draw."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, I32, I64, check, check_tensors, rows_contiguous
from stretto.ops.table import BadCase, Case, Cost, Make, register

F64 = (torch.float64,)


class Purpose(IntEnum):
    """What a number is drawn for: part of the noise counter, so that draws of one position do not share numbers."""

    TOKEN = 0
    ACCEPT = 1
    DRAFT = 2


class RowStatus(IntEnum):
    """What argmax and warp say of a row of logits."""

    FINITE = 0
    MASKED = 1  # holds -inf (forbidden tokens) and something finite: usable
    BROKEN = 2  # NaN, +inf, or nothing finite: no token comes out of it
    BAD_ARGUMENT = 3  # temperature, top_k, top_p or min_p of this row is out of range


def argmax(logits: Tensor, *, out: Tensor | None = None, status: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
    """The lowest id among the largest entries of each row.

    Args:
        logits: [rows, width] float32; a copy is made where the entries of a row are not adjacent.
        out: [rows] int32, written instead of a new tensor.
        status: [rows] int32, receives a RowStatus for each row.
        num_rows: [1] int32; only rows below it are computed, the rest is left alone. For captured steps.
    Returns: [rows] int32; -1 for a row with NaN or +inf or without a finite entry. -inf marks a forbidden token.
    Raises: ValueError naming the argument, what it is and what was expected.
    Reference: ops.ref.sampling.argmax. Bound by memory.
    """
    if out is None and status is None and num_rows is None and needs_dispatch(logits):
        result: Tensor = torch.ops.stretto.sampling_argmax(logits)
        return result
    return _argmax(logits, out=out, status=status, num_rows=num_rows)


def _argmax(logits: Tensor, *, out: Tensor | None = None, status: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
    sizes = check_tensors("sampling.argmax", logits=(logits, "rows width", F32), out=(out, "rows", I32), status=(status, "rows", I32),
                          num_rows=(num_rows, "1", I32))  # fmt: skip
    check(sizes["width"] > 0, "sampling.argmax: logits: no columns, expected at least one token")
    if out is None:
        out = torch.empty(sizes["rows"], dtype=torch.int32, device=logits.device)
    if _backend.use_reference("sampling.argmax", logits):
        _write(out, ref.sampling.argmax(logits), num_rows)
        _write(status, ref.sampling.row_status(logits), num_rows)
    else:
        _backend._C.argmax(rows_contiguous(logits), out, status, num_rows)  # type: ignore[union-attr]
    return out


def _write(out: Tensor | None, result: Tensor, num_rows: Tensor | None) -> None:
    """The rows that count of a reference's result, into the tensor given."""
    if out is not None:
        rows = out.shape[0] if num_rows is None else min(max(int(num_rows), 0), out.shape[0])
        out[:rows] = result[:rows]


def penalize(
    logits: Tensor, history: Tensor, cu_history: Tensor | None, repetition: Tensor, presence: Tensor, frequency: Tensor,
    bias_ids: Tensor | None = None, bias_values: Tensor | None = None, cu_bias: Tensor | None = None, *,
    num_rows: Tensor | None = None, checked: bool = False,
) -> Tensor:  # fmt: skip
    """Apply repetition, presence and frequency penalties and logit biases, in place.

    For each distinct token t of a row's history, seen c times: l(t) is divided by `repetition` if positive, multiplied if not; then
    presence + frequency * c is subtracted. Then each bias value is added to its id; -inf forbids a token.

    Args:
        logits: [rows, width] float32, entries of a row adjacent; changed.
        history: [rows, length] int32 padded with -1, or with cu_history [rows + 1] int32 the concatenation [total] of all rows' tokens.
            For a node of a draft tree: the prefix and the path to the node.
        repetition, presence, frequency: [rows] float32; 1, 0 and 0 change nothing. repetition > 0, all finite.
        bias_ids, bias_values, cu_bias: [entries] int32, [entries] float32, [rows + 1] int32, all or none; values not NaN or +inf.
        num_rows: [1] int32; only rows below it are changed. For captured steps.
        checked: the caller vouches for the values inside the tensors; ids out of range are then skipped, offsets clipped.
    Returns: logits.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: repetition rule of arXiv 1909.05858, section 4.1. Reference: ops.ref.sampling.penalize.
    """
    if num_rows is None and needs_dispatch(logits):
        torch.ops.stretto.sampling_penalize(logits, history, cu_history, repetition, presence, frequency, bias_ids, bias_values, cu_bias)
    else:
        _penalize(logits, history, cu_history, repetition, presence, frequency, bias_ids, bias_values, cu_bias, num_rows, checked)
    return logits


def _penalize(
    logits: Tensor, history: Tensor, cu_history: Tensor | None, repetition: Tensor, presence: Tensor, frequency: Tensor,
    bias_ids: Tensor | None = None, bias_values: Tensor | None = None, cu_bias: Tensor | None = None,
    num_rows: Tensor | None = None, checked: bool = False,
) -> None:  # fmt: skip
    op = "sampling.penalize"
    sizes = check_tensors(
        op, logits=(logits, "rows width", F32), history=(history, "rows length" if cu_history is None else "total", I32),
        repetition=(repetition, "rows", F32), presence=(presence, "rows", F32), frequency=(frequency, "rows", F32),
        cu_history=(cu_history, "offsets", I32), cu_bias=(cu_bias, "offsets", I32), bias_ids=(bias_ids, "entries", I32),
        bias_values=(bias_values, "entries", F32), num_rows=(num_rows, "1", I32),
    )  # fmt: skip
    rows, width = sizes["rows"], sizes["width"]
    check(sizes.get("offsets", rows + 1) == rows + 1, f"{op}: cu_history, cu_bias: {sizes.get('offsets')} offsets, expected rows + 1 = {rows + 1}")
    given = [t is not None for t in (bias_ids, bias_values, cu_bias)]
    check(all(given) or not any(given), f"{op}: bias_ids, bias_values, cu_bias: {sum(given)} of them, expected all or none")
    check(
        logits.shape[1] <= 1 or logits.stride(1) == 1,
        f"{op}: logits: strides {logits.stride()}, expected adjacent entries in a row (it is changed in place)",
    )
    if not checked:
        _check_ids(op, "history", history, -1, width)
        _check_range(op, "repetition", repetition, repetition > 0, "finite and above 0")
        _check_range(op, "presence", presence, presence == presence, "finite")
        _check_range(op, "frequency", frequency, frequency == frequency, "finite")
        _check_offsets(op, "cu_history", cu_history, history.numel())
        if bias_ids is not None and bias_values is not None:
            _check_ids(op, "bias_ids", bias_ids, 0, width)
            wrong = not bias_values.is_cuda and bool((bias_values.isnan() | (bias_values == torch.inf)).any())
            check(not wrong, f"{op}: bias_values: holds NaN or +inf, expected finite values, or -inf to forbid a token")
            _check_offsets(op, "cu_bias", cu_bias, bias_ids.numel())
    if _backend.use_reference(op, logits):
        before = logits.clone()
        ref.sampling.penalize(before, history, cu_history, repetition, presence, frequency, bias_ids, bias_values, cu_bias)
        _write(logits, before, num_rows)
        return
    dense = [t if t is None else t.contiguous() for t in (history, cu_history, repetition, presence, frequency, bias_ids, bias_values, cu_bias)]
    _backend._C.penalize(logits, *dense, num_rows)  # type: ignore[union-attr]


def _check_ids(op: str, name: str, ids: Tensor, low: int, width: int) -> None:
    if ids.numel() and not ids.is_cuda:  # there the kernels skip what is out of range: looking would wait for the device
        least, most = (int(v) for v in ids.aminmax())
        check(
            low <= least and most < width,
            f"{op}: {name}: {least if least < low else most}, expected token ids below {width}{' or -1' if low else ''}",
        )


def _check_range(op: str, name: str, values: Tensor, ok: Tensor, expected: str) -> None:
    if values.is_cuda:
        return
    ok = ok & values.isfinite()
    if not bool(ok.all()):
        row = int((~ok).int().argmax())
        raise ValueError(f"{op}: {name}: {values[row].item()} in row {row}, expected {expected}")


def _check_offsets(op: str, name: str, cu: Tensor | None, total: int) -> None:
    if cu is not None and not cu.is_cuda:
        ok = int(cu[0]) == 0 and int(cu[-1]) == total and bool((cu.diff() >= 0).all())
        check(ok, f"{op}: {name}: {cu.tolist() if cu.numel() <= 8 else 'offsets'}, expected to rise from 0 to {total}")


def warp(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *,
    out: Tensor | None = None, status: Tensor | None = None, num_rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The distribution that is sampled: temperature, then top-k, top-p, min-p.

    Tokens are ordered by falling logit, equal logits by rising id: at a boundary lower ids stay. top_k keeps the first k; top_p keeps the
    shortest run of that order whose mass reaches top_p of what top_k left, at least one token; min_p keeps tokens at least min_p times
    as likely as the likeliest. What is left is normalised.

    Args:
        logits: [rows, width] float32; -inf forbids a token.
        temperature: [rows] float32, finite, at least 0; 0 gives all probability to the lowest id among the largest.
        top_k: [rows] int32, at least 0; 0 keeps all.
        top_p: [rows] float32 in [0, 1]; 1 keeps all.
        min_p: [rows] float32 in [0, 1]; 0 keeps all.
        out: [rows, width] float32, written instead of a new tensor; overlaps no input; entries of a row adjacent.
        status: [rows] int32, receives a RowStatus for each row. With it a parameter out of range makes its row NaN instead of raising.
        num_rows: [1] int32; only rows below it are computed. For captured steps.
    Returns: [rows, width] float32; a row with NaN or +inf, or without a finite entry, is NaN. A row's bits depend on that row alone.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: top-p of arXiv 1904.09751, min-p of arXiv 2407.01082. Reference: ops.ref.sampling.warp. Bound by memory and exp.
    """
    if out is None and status is None and num_rows is None and needs_dispatch(logits):
        result: Tensor = torch.ops.stretto.sampling_warp(logits, temperature, top_k, top_p, min_p)
        return result
    return _warp(logits, temperature, top_k, top_p, min_p, out=out, status=status, num_rows=num_rows)


def _warp(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *,
    out: Tensor | None = None, status: Tensor | None = None, num_rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    op = "sampling.warp"
    sizes = check_tensors(op, logits=(logits, "rows width", F32), temperature=(temperature, "rows", F32), top_k=(top_k, "rows", I32),
                          top_p=(top_p, "rows", F32), min_p=(min_p, "rows", F32), out=(out, "rows width", F32), status=(status, "rows", I32),
                          num_rows=(num_rows, "1", I32))  # fmt: skip
    check(sizes["width"] > 0, f"{op}: logits: no columns, expected at least one token")
    if status is None:
        _check_range(op, "temperature", temperature, temperature >= 0, "finite and at least 0")
        _check_range(op, "top_k", top_k, top_k >= 0, "at least 0")
        _check_range(op, "top_p", top_p, (top_p >= 0) & (top_p <= 1), "in [0, 1]")
        _check_range(op, "min_p", min_p, (min_p >= 0) & (min_p <= 1), "in [0, 1]")
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    check(out.shape[1] <= 1 or out.stride(1) == 1, f"{op}: out: strides {out.stride()}, expected adjacent entries in a row")
    if _backend.use_reference(op, logits):
        bad = ~((temperature >= 0) & temperature.isfinite() & (top_k >= 0) & (top_p >= 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1))
        result = ref.sampling.warp(torch.where(bad[:, None], torch.nan, logits), temperature, top_k, top_p, min_p)
        _write(out, result, num_rows)
        _write(status, torch.where(bad, RowStatus.BAD_ARGUMENT, ref.sampling.row_status(logits)), num_rows)
        return out
    filters = (temperature.contiguous(), top_k.contiguous(), top_p.contiguous(), min_p.contiguous())
    _backend._C.warp(rows_contiguous(logits), *filters, out, status, num_rows)  # type: ignore[union-attr]
    return out


def draw(
    p: Tensor, seed: Tensor, lineage: Tensor, pos: Tensor, purpose: int = Purpose.TOKEN, method: str = "inverse", *,
    out: Tensor | None = None, num_rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One token per row, a pure function of the row and of (seed, lineage; pos, purpose).

    Args:
        p: [rows, width] float32 probabilities; weights that do not sum to 1 are read as proportions.
        seed, lineage: [rows] int64, any value: the request's seed, and which of its samples this is.
        pos: [rows] int32: the position that the drawn token will have in its sequence.
        purpose: Purpose.TOKEN for the target's tokens, Purpose.DRAFT for a drafter's.
        method: "inverse" (inverse distribution function, one uniform a row) or "gumbel" (argmax of log p + noise of each token, the same noise
            whatever p is: two distributions that are close mostly draw the same token).
        out: [rows] int32, written instead of a new tensor.
        num_rows: [1] int32; only rows below it are computed. For captured steps.
    Returns: [rows] int32; -1 for a row with NaN, infinity or a negative entry, or without mass. A token of probability 0 is never drawn.
    Raises: ValueError naming the argument, what it is and what was expected.
    Reference: ops.ref.sampling.draw. Bound by memory.
    """
    if out is None and num_rows is None and needs_dispatch(p):
        result: Tensor = torch.ops.stretto.sampling_draw(p, seed, lineage, pos, int(purpose), method)
        return result
    return _draw(p, seed, lineage, pos, purpose, method, out=out, num_rows=num_rows)


def _draw(
    p: Tensor, seed: Tensor, lineage: Tensor, pos: Tensor, purpose: int = 0, method: str = "inverse", *,
    out: Tensor | None = None, num_rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    op = "sampling.draw"
    sizes = check_tensors(op, p=(p, "rows width", F32), seed=(seed, "rows", I64), lineage=(lineage, "rows", I64), pos=(pos, "rows", I32),
                          out=(out, "rows", I32), num_rows=(num_rows, "1", I32))  # fmt: skip
    check(method in ("inverse", "gumbel"), f"{op}: method: {method!r}, expected 'inverse' or 'gumbel'")
    _check_purpose(op, purpose)
    if out is None:
        out = torch.empty(sizes["rows"], dtype=torch.int32, device=p.device)
    if _backend.use_reference(op, p):
        _write(out, ref.sampling.draw(p, seed, lineage, pos, int(purpose), method), num_rows)
        return out
    _backend._C.draw(rows_contiguous(p), seed.contiguous(), lineage.contiguous(), pos.contiguous(), int(purpose), method == "gumbel", out, num_rows)  # type: ignore[union-attr]
    return out


def _check_purpose(op: str, purpose: int) -> None:
    check(purpose in (0, 1, 2), f"{op}: purpose: {purpose}, expected 0 (token), 1 (accept) or 2 (draft)")


def uniform(seed: Tensor, lineage: Tensor, pos: Tensor, purpose: int = Purpose.TOKEN, index: int = 0) -> Tensor:
    """Philox uniforms in [0, 1), multiples of 2^-53.

    Args:
        seed, lineage: [rows] int64; pos: [rows] int32; purpose: a Purpose.
        index: which one of this position and purpose, 0 to 2^28 - 1.
    Returns: [rows] float64.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: Philox4x32-10, Salmon et al., SC 2011. Reference: ops.ref.sampling.uniform.
    """
    if needs_dispatch(seed, lineage, pos):
        result: Tensor = torch.ops.stretto.sampling_uniform(seed, lineage, pos, int(purpose), index)
        return result
    return _uniform(seed, lineage, pos, purpose, index)


def _uniform(seed: Tensor, lineage: Tensor, pos: Tensor, purpose: int = 0, index: int = 0) -> Tensor:
    op = "sampling.uniform"
    check_tensors(op, seed=(seed, "rows", I64), lineage=(lineage, "rows", I64), pos=(pos, "rows", I32))
    _check_purpose(op, purpose)
    check(0 <= index < 1 << 28, f"{op}: index: {index}, expected 0 to 2^28 - 1")
    if _backend.use_reference(op, seed):
        return ref.sampling.uniform(seed, lineage, pos, int(purpose), index)
    out = torch.empty_like(seed, dtype=torch.float64, memory_format=torch.contiguous_format)
    _backend._C.noise(seed.contiguous(), lineage.contiguous(), pos.contiguous(), int(purpose), index, out)  # type: ignore[union-attr]
    return out


def gumbel(seed: Tensor, lineage: Tensor, pos: Tensor, num_tokens: int, purpose: int = Purpose.TOKEN) -> Tensor:
    """The Gumbel noise g of each token that `draw(method="gumbel")` adds to log p: -log(-log u), u from 32 bits.

    Args:
        seed, lineage: [rows] int64; pos: [rows] int32; purpose: a Purpose.
        num_tokens: width of the result, 0 to 2^30 - 1.
    Returns: [rows, num_tokens] float64, finite.
    Raises: ValueError naming the argument, what it is and what was expected.
    Source: Philox4x32-10, Salmon et al., SC 2011. Reference: ops.ref.sampling.gumbel.
    """
    if needs_dispatch(seed, lineage, pos):
        result: Tensor = torch.ops.stretto.sampling_gumbel(seed, lineage, pos, num_tokens, int(purpose))
        return result
    return _gumbel(seed, lineage, pos, num_tokens, purpose)


def _gumbel(seed: Tensor, lineage: Tensor, pos: Tensor, num_tokens: int, purpose: int = 0) -> Tensor:
    op = "sampling.gumbel"
    check_tensors(op, seed=(seed, "rows", I64), lineage=(lineage, "rows", I64), pos=(pos, "rows", I32))
    _check_purpose(op, purpose)
    check(0 <= num_tokens < 1 << 30, f"{op}: num_tokens: {num_tokens}, expected 0 to 2^30 - 1")
    if _backend.use_reference(op, seed):
        return ref.sampling.gumbel(seed, lineage, pos, num_tokens, int(purpose))
    out = torch.empty(seed.shape[0], num_tokens, dtype=torch.float64, device=seed.device)
    _backend._C.noise(seed.contiguous(), lineage.contiguous(), pos.contiguous(), int(purpose), 0, out)  # type: ignore[union-attr]
    return out


def _rows_of(rows: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((rows,), value, dtype=dtype)


def _argmax_cases(make: Make) -> Iterator[Case]:
    for rows, width in [(0, 8), (1, 1), (3, 17), (5, 256), (2, 257), (2, 5003)]:
        yield Case(f"{rows}x{width}", (make.randn(rows, width),))
    yield Case("ties", (make.randint(0, 3, 7, 600).float(),))
    yield Case("equal", (make.randn(4, 1)[:, :1].expand(4, 700),))
    yield Case("strided", (make.randn(300, 6).t(),))
    yield Case("broken", (_broken_rows(make, 515),))


def _broken_rows(make: Make, width: int) -> Tensor:
    """Every kind of non-finite entry, early, late and behind the last whole chunk; then rows that are usable all the same."""
    x = make.randn(14, width)
    for row, (at, value) in enumerate((at, v) for v in (torch.nan, torch.inf, -torch.inf) for at in (0, 200, width - 1)):
        x[row, at] = value
    x[9] = -torch.inf
    x[10], x[10, 7] = -torch.inf, -3
    x[11] = -torch.inf
    x[11, width - 1] = 2
    x[12] = torch.finfo(torch.float32).max
    x[13] = -torch.finfo(torch.float32).max
    return x


def _argmax_bad(make: Make) -> Iterator[BadCase]:
    yield BadCase("rank", (make.randn(4),), "sampling.argmax: logits: shape [4]")
    yield BadCase("dtype", (make.randn(4, 4).double(),), "sampling.argmax: logits: float64")
    yield BadCase("empty", (make.randn(4, 0),), "sampling.argmax: logits: no columns")
    yield BadCase("out", (make.randn(4, 2),), "sampling.argmax: out: shape [3]", {"out": torch.empty(3, dtype=torch.int32)})


register(
    "sampling_argmax(Tensor logits) -> Tensor",
    _argmax,
    function=argmax,
    reference=ref.sampling.argmax,
    fake=lambda logits: logits.new_empty(logits.shape[0], dtype=torch.int32),
    cases=_argmax_cases,
    bad_cases=_argmax_bad,
    bench_cases=lambda make: (Case(f"{name} {rows} rows", (make.randn(rows, width),))
                              for name, width in [("SmolLM2-135M", 49152), ("Llama-3-8B", 128256)] for rows in (1, 16)),
    cost=lambda logits: Cost(bytes=logits.nbytes, flops=logits.numel()),
    bound="memory",
    peers={"torch": lambda logits: logits.argmax(-1)},
)  # fmt: skip


def _warp_args(make: Make, logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    return (logits, _rows_of(rows, temperature), _rows_of(rows, top_k, torch.int32), _rows_of(rows, top_p), _rows_of(rows, min_p))


_SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.8, 40, 0.95, 0.05),
    (0.0, 3, 0.5, 0.0),
    (1.0, 1, 0.0, 1.0),
]


def _warp_cases(make: Make) -> Iterator[Case]:
    for number, setting in enumerate(_SETTINGS):
        for rows, width in [(0, 8), (1, 1), (3, 17), (2, 257), (2, 5003)]:
            yield Case(f"{rows}x{width}-{number}", _warp_args(make, make.randn(rows, width, scale=3), *setting))
        yield Case(f"ties-{number}", _warp_args(make, make.randint(0, 3, 7, 600).float(), *setting))
        yield Case(f"broken-{number}", _warp_args(make, _broken_rows(make, 515), *setting))
    rows = 24
    yield Case("mixed", (make.randn(rows, 4099, scale=4), make.randint(0, 3, rows).float() * 0.6, make.randint(0, 3, rows) * 700,
                         1 - make.randint(0, 3, rows) * 0.125, make.randint(0, 3, rows) * 0.02))  # fmt: skip
    yield Case("strided", _warp_args(make, make.randn(300, 6).t(), 0.9, 11, 0.9, 0.01))


def _warp_bad(make: Make) -> Iterator[BadCase]:
    x = make.randn(2, 8)
    for name, at, value in [("nan-temperature", 1, torch.nan), ("negative-temperature", 1, -1.0), ("infinite-temperature", 1, torch.inf), ("top-p", 3, 1.5),
                            ("nan-top-p", 3, torch.nan), ("min-p", 4, -0.1), ("nan-min-p", 4, torch.nan), ("top-k", 2, -5)]:  # fmt: skip
        args = list(_warp_args(make, x, 1.0, 0, 1.0, 0.0))
        args[at] = args[at].clone()
        args[at][1] = value
        argument = ("", "temperature", "top_k", "top_p", "min_p")[at]
        yield BadCase(name, tuple(args), f"sampling.warp: {argument}: {args[at][1].item()} in row 1")
    yield BadCase("rank", (x[0], *_warp_args(make, x, 1.0, 0, 1.0, 0.0)[1:]), "sampling.warp: logits: shape [8]")
    yield BadCase("rows", (x, *_warp_args(make, x[:1], 1.0, 0, 1.0, 0.0)[1:]), "sampling.warp: temperature: shape [1]")
    yield BadCase("empty", _warp_args(make, make.randn(2, 0), 1.0, 0, 1.0, 0.0), "sampling.warp: logits: no columns")


register(
    "sampling_warp(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p) -> Tensor",
    _warp,
    function=warp,
    reference=ref.sampling.warp,
    fake=lambda logits, temperature, top_k, top_p, min_p: torch.empty_like(logits, memory_format=torch.contiguous_format),
    cases=_warp_cases,
    bad_cases=_warp_bad,
    bench_cases=lambda make: (Case(f"SmolLM2-135M {name}", _warp_args(make, make.randn(1, 49152, scale=2), *setting)) for name, setting in [
        ("temperature", (0.8, 0, 1.0, 0.0)), ("top-k 40", (0.8, 40, 1.0, 0.0)), ("top-p 0.95", (0.8, 0, 0.95, 0.0)), ("min-p 0.05", (0.8, 0, 1.0, 0.05))]),
    cost=lambda logits, temperature, top_k, top_p, min_p: Cost(bytes=2 * logits.nbytes, flops=20 * logits.numel()),
    bound="memory",
    peers={"torch sort": lambda logits, temperature, top_k, top_p, min_p: ref.sampling.warp(logits, temperature, top_k, top_p, min_p)},
    source="arXiv 1904.09751, arXiv 2407.01082",
)  # fmt: skip


def _keys(make: Make, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    extreme = torch.tensor([0, 1, -1, (1 << 63) - 1, -(1 << 63)])
    seed = torch.cat((extreme, make.randint(0, 1 << 62, rows, dtype=torch.int64)))[:rows]
    lineage = torch.cat((extreme.flip(0), make.randint(0, 1 << 62, rows, dtype=torch.int64)))[:rows]
    pos = torch.cat((torch.tensor([0, -1, (1 << 31) - 1], dtype=torch.int32), make.randint(0, 1 << 20, rows)))[:rows]
    return seed, lineage, pos


def _draw_cases(make: Make) -> Iterator[Case]:
    for method in ("inverse", "gumbel"):
        for rows, width in [(0, 8), (1, 1), (9, 17), (5, 511), (7, 513), (4, 5003)]:
            yield Case(f"{rows}x{width}-{method}", (make.randn(rows, width).softmax(-1), *_keys(make, rows), 0, method))
        sparse = make.randn(40, 700).softmax(-1) * (make.randint(0, 20, 40, 700) == 0)
        yield Case(f"sparse-{method}", (sparse, *_keys(make, 40), 2, method))
        yield Case(f"weights-{method}", (make.randn(6, 33).exp(), *_keys(make, 6), 0, method))
        yield Case(f"one-hot-{method}", (torch.eye(9, 1025).flip(-1), *_keys(make, 9), 0, method))
        broken = make.randn(7, 600).softmax(-1)
        broken[0, 5], broken[1, 599], broken[2, 3], broken[3], broken[4], broken[5, 599] = torch.nan, torch.inf, -0.5, 0, torch.nan, -1e-30
        yield Case(f"broken-{method}", (broken, *_keys(make, 7), 0, method))
        yield Case(f"strided-{method}", (make.randn(60, 5).exp().t(), *_keys(make, 5), 1, method))


def _draw_bad(make: Make) -> Iterator[BadCase]:
    p, keys = make.randn(2, 4).softmax(-1), _keys(make, 2)
    yield BadCase("method", (p, *keys, 0, "sort"), "sampling.draw: method: 'sort'")
    yield BadCase("purpose", (p, *keys, 3), "sampling.draw: purpose: 3")
    yield BadCase("seed", (p, keys[0].int(), keys[1], keys[2]), "sampling.draw: seed: int32")
    yield BadCase("rows", (p, keys[0], keys[1], keys[2][:1]), "sampling.draw: pos: shape [1]")


register(
    "sampling_draw(Tensor p, Tensor seed, Tensor lineage, Tensor pos, int purpose=0, str method='inverse') -> Tensor",
    _draw,
    function=draw,
    reference=ref.sampling.draw,
    fake=lambda p, seed, lineage, pos, purpose=0, method="inverse": p.new_empty(p.shape[0], dtype=torch.int32),
    cases=_draw_cases,
    bad_cases=_draw_bad,
    bench_cases=lambda make: (Case(f"SmolLM2-135M {method}", (make.randn(1, 49152, scale=2).softmax(-1), *_keys(make, 1), 0, method))
                              for method in ("inverse", "gumbel")),
    cost=lambda p, seed, lineage, pos, purpose=0, method="inverse": Cost(bytes=p.nbytes, flops=p.numel() * (1 if method == "inverse" else 30)),
    bound="memory",
    peers={"torch": lambda p, seed, lineage, pos, purpose=0, method="inverse": torch.multinomial(p, 1)},
    source="Philox4x32-10, Salmon et al., SC 2011",
)  # fmt: skip


def _uniform_bad(make: Make) -> Iterator[BadCase]:
    seed, lineage, pos = _keys(make, 2)
    yield BadCase("purpose", (seed, lineage, pos, -1), "sampling.uniform: purpose: -1")
    yield BadCase("index", (seed, lineage, pos, 0, 1 << 28), "sampling.uniform: index: 268435456")
    yield BadCase("pos", (seed, lineage, pos.long()), "sampling.uniform: pos: int64")


def _gumbel_bad(make: Make) -> Iterator[BadCase]:
    seed, lineage, pos = _keys(make, 2)
    yield BadCase("purpose", (seed, lineage, pos, 5, 9), "sampling.gumbel: purpose: 9")
    yield BadCase("width", (seed, lineage, pos, -1), "sampling.gumbel: num_tokens: -1")


register(
    "sampling_uniform(Tensor seed, Tensor lineage, Tensor pos, int purpose=0, int index=0) -> Tensor",
    _uniform,
    function=uniform,
    reference=ref.sampling.uniform,
    fake=lambda seed, lineage, pos, purpose=0, index=0: seed.new_empty(seed.shape, dtype=torch.float64),
    cases=lambda make: (Case(f"{rows}-{purpose}-{index}", (*_keys(make, rows), purpose, index))
                        for rows, purpose, index in [(0, 0, 0), (1, 0, 0), (50, 1, 3), (3, 2, (1 << 28) - 1)]),
    bad_cases=_uniform_bad,
    bench_cases=lambda make: iter([Case("1024", _keys(make, 1024))]),
    cost=lambda seed, lineage, pos, purpose=0, index=0: Cost(bytes=28 * seed.numel(), flops=80 * seed.numel()),
    bound="compute",
    kernels=("noise",),
    source="Philox4x32-10, Salmon et al., SC 2011",
)  # fmt: skip

register(
    "sampling_gumbel(Tensor seed, Tensor lineage, Tensor pos, int num_tokens, int purpose=0) -> Tensor",
    _gumbel,
    function=gumbel,
    reference=ref.sampling.gumbel,
    fake=lambda seed, lineage, pos, num_tokens, purpose=0: seed.new_empty(seed.shape[0], num_tokens, dtype=torch.float64),
    cases=lambda make: (Case(f"{rows}x{width}", (*_keys(make, rows), width, 0)) for rows, width in [(0, 4), (3, 0), (1, 1), (5, 4), (6, 1003)]),
    bad_cases=_gumbel_bad,
    bench_cases=lambda make: iter([Case("49152", (*_keys(make, 1), 49152))]),
    cost=lambda seed, lineage, pos, num_tokens, purpose=0: Cost(bytes=8 * seed.numel() * num_tokens, flops=60 * seed.numel() * num_tokens),
    bound="compute",
    kernels=("noise",),
    source="Philox4x32-10, Salmon et al., SC 2011",
)  # fmt: skip


def _penalize_args(make: Make, rows: int, width: int, length: int, ragged: bool, bias: int) -> tuple[Tensor | None, ...]:
    history = make.randint(-1, width, rows, length)
    cu = None
    if ragged:
        sizes = make.randint(0, length + 1, rows)
        cu = torch.cat((torch.zeros(1, dtype=torch.int32), sizes.cumsum(0).int()))
        history = make.randint(-1, width, int(cu[-1]))
    strengths = (1 + 0.25 * make.randint(0, 4, rows), 0.5 * make.randint(-1, 2, rows), 0.25 * make.randint(0, 3, rows))
    biases: tuple[Tensor | None, ...] = (None, None, None)
    if bias:
        values = make.randn(rows * bias)
        values[::5] = -torch.inf
        biases = (make.randint(0, width, rows * bias), values, torch.arange(0, rows * bias + 1, bias, dtype=torch.int32))
    return (make.randn(rows, width, scale=3), history, cu, *strengths, *biases)


def _penalize_bad(make: Make) -> Iterator[BadCase]:
    good = _penalize_args(make, 2, 8, 5, True, 2)

    def replaced(at: int, value: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*good[:at], value, *good[at + 1 :])

    for name, value in [("below", -2), ("past", 8), ("int-min", -(1 << 31)), ("int-max", (1 << 31) - 1)]:
        wrong = torch.full_like(good[1], value) if good[1].numel() else torch.full((1,), value, dtype=torch.int32)  # type: ignore[arg-type,union-attr]
        yield BadCase(f"history-{name}", replaced(1, wrong), f"sampling.penalize: history: {value}")
    yield BadCase("bias-id", replaced(6, torch.full_like(good[6], -1)), "sampling.penalize: bias_ids: -1")  # type: ignore[arg-type]
    yield BadCase("bias-nan", replaced(7, torch.full_like(good[7], torch.nan)), "sampling.penalize: bias_values: holds NaN")  # type: ignore[arg-type]
    yield BadCase("bias-half", replaced(8, None), "sampling.penalize: bias_ids, bias_values, cu_bias: 2 of them")
    yield BadCase("repetition", replaced(3, torch.tensor([1.0, 0.0])), "sampling.penalize: repetition: 0.0 in row 1")
    yield BadCase("presence", replaced(4, torch.tensor([torch.nan, 0.0])), "sampling.penalize: presence: nan in row 0")
    yield BadCase("offsets", replaced(8, torch.tensor([0, 3, 2], dtype=torch.int32)), "sampling.penalize: cu_bias: [0, 3, 2]")
    yield BadCase("offsets-size", replaced(2, torch.tensor([0, 0], dtype=torch.int32)), "sampling.penalize: cu_bias: shape [3]")
    yield BadCase("strided", replaced(0, make.randn(8, 2).t()), "sampling.penalize: logits: strides")


register(
    "sampling_penalize(Tensor(a!) logits, Tensor history, Tensor? cu_history, Tensor repetition, Tensor presence, Tensor frequency, "
    "Tensor? bias_ids=None, Tensor? bias_values=None, Tensor? cu_bias=None) -> ()",
    _penalize,
    function=penalize,
    reference=ref.sampling.penalize,
    fake=lambda *args: None,
    cases=lambda make: (Case(f"{rows}x{width}-{length}-{'ragged' if ragged else 'padded'}-{bias}", _penalize_args(make, rows, width, length, ragged, bias))
                        for rows, width, length, ragged, bias in [(1, 1, 1, False, 0), (3, 17, 40, True, 2), (3, 17, 40, False, 2), (5, 600, 0, False, 1),
                                                                  (0, 8, 3, False, 0), (4, 2049, 300, True, 0)]),
    bad_cases=_penalize_bad,
    bench_cases=lambda make: iter([Case("SmolLM2-135M 1000 tokens", _penalize_args(make, 1, 49152, 1000, False, 0))]),
    cost=lambda logits, history, *rest: Cost(bytes=12 * history.numel(), flops=4 * history.numel()),
    bound="latency",
    source="arXiv 1909.05858, section 4.1",
)  # fmt: skip
