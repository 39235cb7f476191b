"""Matrix products and embedding rows with weights as a file stores them: float, or in blocks of 4 to 8 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stretto.ops import _backend, memory, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, I32, check, check_tensors, rows_contiguous
from stretto.ops.ref.quant import FORMATS, Format
from stretto.ops.table import BadCase, Case, Cost, Make, register

U8 = (torch.uint8,)
_GATES = {"none": 0, "silu": 1, "gelu_tanh": 2}


@dataclass(frozen=True)
class PackedWeight:
    """A matrix [n, k] in one format, packed for the kernels: groups of 16 rows, the blocks of a group side by side (csrc/kernels/quant/formats.h).

    The layout is the same on every machine. Made by `pack`.
    """

    data: Tensor
    format: str
    n: int
    k: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def _format(op: str, name: str) -> Format:
    if name not in FORMATS:
        raise NotImplementedError(f"{op}: format: {name!r}, expected one of {', '.join(FORMATS)}; re-quantise the file to the nearest of these")
    return FORMATS[name]


def packed_nbytes(format: str, n: int, k: int) -> int:
    """Bytes of a packed [n, k] matrix: n padded to 16 rows."""
    f = _format("packed_nbytes", format)
    return (n + 15) // 16 * (k // f.block) * f.packed_bytes


def pack(raw: Tensor | Sequence[Tensor], format: str, k: int, *, interleave: bool = False) -> PackedWeight:
    """Pack rows of a file for `linear` and `embedding`; once, at load.

    Args:
        raw: uint8 [n_i, row_bytes] (bytes of a GGUF tensor's rows, or of rows of float32 / float16 / bfloat16), or several such, stacked along n.
        format: a key of FORMATS, named as in GGUF.
        k: values in a row; a multiple of the format's block.
        interleave: two matrices of equal height, a multiple of 16, alternate in groups of 16 rows: what `linear(gate=...)` expects of (gate, up).
    Returns: PackedWeight. Bytes as in the file, but 148 for each 144 of Q4_K and 180 for each 176 of Q5_K, and rows padded to 16.
    Raises: ValueError naming the argument; NotImplementedError for an unknown format.
    """
    f = _format("pack", format)
    raws = [raw] if isinstance(raw, Tensor) else list(raw)
    check(len(raws) > 0, "pack: raw: no matrix, expected at least one")
    check(k > 0 and k % f.block == 0, f"pack: k: {k}, expected a positive multiple of {f.block}, the block of {format}")
    for r in raws:
        check_tensors("pack", raw=(r, f"rows {k // f.block * f.raw_bytes}", U8))
    if interleave:
        check(len(raws) == 2, f"pack: raw: {len(raws)} matrices, expected 2 to interleave")
        check(raws[0].shape[0] == raws[1].shape[0] and raws[0].shape[0] % 16 == 0,
              f"pack: raw: {raws[0].shape[0]} and {raws[1].shape[0]} rows, expected equal multiples of 16 to interleave")  # fmt: skip
    n = sum(r.shape[0] for r in raws)
    if _backend.use_reference("pack", *raws):
        return PackedWeight(ref.quant.pack(raws, format, interleave), format, n, k)
    slabs, nbytes = _slabs.get(), packed_nbytes(format, n, k)
    data = slabs.take(nbytes) if slabs else torch.empty(nbytes, dtype=torch.uint8)
    _backend._C.pack([r.contiguous() for r in raws], format, k, interleave, data)  # type: ignore[union-attr]
    return PackedWeight(data, format, n, k)


class _Slabs:
    """Large pieces of memory in huge pages, handed out from front to back."""

    SLAB, LINE = 32 << 20, 64

    def __init__(self) -> None:
        self.free = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        if nbytes > self.free.numel():
            self.free = memory.empty(max(self.SLAB, nbytes), dtype=torch.uint8)
        taken = self.free[:nbytes]
        self.free = self.free[(nbytes + self.LINE - 1) // self.LINE * self.LINE :]
        return taken


_slabs: ContextVar[_Slabs | None] = ContextVar("stretto_pack_slabs", default=None)


@contextlib.contextmanager
def side_by_side() -> Iterator[None]:
    """Within the context `pack` places its results one behind the other in huge pages: a model's weights are then one run of memory, which is
    read a tenth to a fifth faster than one allocation each. Their memory is released when the last of them is."""
    token = _slabs.set(_Slabs())
    try:
        yield
    finally:
        _slabs.reset(token)


def unpack(w: PackedWeight) -> Tensor:
    """The whole matrix, float32 [n, k], in packed order of rows. For tests and tools: takes 4 n k bytes."""
    return embedding(torch.arange(w.n, dtype=torch.int32, device=w.data.device), w)


def linear(
    x: Tensor,
    w: PackedWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Literal["silu", "gelu_tanh"] | None = None,
    out: Tensor | None = None,
    num_rows: Tensor | None = None,
) -> Tensor:
    """x times the transposed weight, and what usually follows it.

    Args:
        x: [m, k] float32; any strides (a copy is made when elements of a row are not adjacent).
        w: from `pack`. Quantised formats multiply int8 activations (one scale for each 32 values of a row) in exact integers.
        bias: [n] float32, in packed order, added first.
        residual: [m, columns] float32, rows strided; added last; may be `out`.
        gate: w holds (gate, up) interleaved, n a multiple of 32; the result is act(gate) * up with n / 2 columns.
        out: written instead of a new tensor; rows may be strided (a column slice of a wider buffer). Must not overlap x for float formats.
        num_rows: [1] int32; only rows below it are computed, the rest of `out` is left alone. For captured steps.
    Returns: [m, n] float32, [m, n / 2] with a gate. A row's bits depend on that row alone: not on m, threads, or its neighbours.
        A row with NaN or infinity gives NaN or infinity in that row only.
    Raises: ValueError naming the argument, what it is and what was expected.
    Reference: ops.ref.quant.linear. Bound by memory for few rows, by arithmetic for many.
    """
    if out is None and num_rows is None and needs_dispatch(x, w.data, bias, residual):
        result: Tensor = torch.ops.stretto.linear(x, w.data, w.format, w.n, bias, residual, gate or "none")
        return result
    check(x.dim() != 2 or x.shape[1] == w.k, f"linear: x: shape {list(x.shape)}, expected [m, k] with k = {w.k}")
    return _linear(x, w.data, w.format, w.n, bias, residual, gate or "none", out=out, num_rows=num_rows)


def linear_packed(x: Tensor, packed: Tensor, format: str, n: int, bias: Tensor | None, residual: Tensor | None, gate: str) -> Tensor:
    """`linear` on plain values, as torch.ops.stretto.linear takes them; gate is "none", "silu" or "gelu_tanh"."""
    if needs_dispatch(x, packed, bias, residual):
        result: Tensor = torch.ops.stretto.linear(x, packed, format, n, bias, residual, gate)
        return result
    return _linear(x, packed, format, n, bias, residual, gate)


def _check_packed(op: str, packed: Tensor, format: str, n: int, k: int) -> None:
    f = _format(op, format)
    check(k > 0 and k % f.block == 0, f"{op}: k: {k}, expected a positive multiple of {f.block}, the block of {format}")
    check(n >= 0 and packed.numel() == (n + 15) // 16 * (k // f.block) * f.packed_bytes,
          f"{op}: packed: {packed.numel()} bytes, expected {packed_nbytes(format, n, k)} for {format} [{n}, {k}]")  # fmt: skip


def _linear(
    x: Tensor, packed: Tensor, format: str, n: int, bias: Tensor | None, residual: Tensor | None, gate: str, *,
    out: Tensor | None = None, num_rows: Tensor | None = None
) -> Tensor:  # fmt: skip
    check(gate in _GATES, f"linear: gate: {gate!r}, expected one of {', '.join(_GATES)}")
    check(gate == "none" or n % 32 == 0, f"linear: n: {n}, expected a multiple of 32 with a gate")
    columns = n if gate == "none" else n // 2
    sizes = check_tensors("linear", x=(x, "m k", F32), packed=(packed, "_", U8), bias=(bias, f"{n}", F32), residual=(residual, f"m {columns}", F32),
                          out=(out, f"m {columns}", F32), num_rows=(num_rows, "1", I32))  # fmt: skip
    _check_packed("linear", packed, format, n, sizes["k"])
    if _backend.use_reference("linear", x, packed):
        result = ref.quant.linear(x, packed, format, n, bias, residual, gate)
        if out is None:
            return result
        rows = sizes["m"] if num_rows is None else int(num_rows)
        out[:rows].copy_(result[:rows])
        return out
    if out is None:
        out = x.new_empty(sizes["m"], columns)
    else:
        check(columns <= 1 or out.stride(1) == 1, f"linear: out: strides {out.stride()}, expected adjacent elements in a row")
    if residual is not None:
        residual = rows_contiguous(residual)
    _backend._C.linear(rows_contiguous(x), packed, format, n, None if bias is None else bias.contiguous(), residual, _GATES[gate], out, num_rows)  # type: ignore[union-attr]
    return out


def embedding(ids: Tensor, w: PackedWeight, *, scale: float = 1.0, out: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
    """Rows of a packed matrix, dequantised as the file's format defines.

    Args:
        ids: [m] int32, in [0, n). Out of range is refused here, and gives zeros inside a captured step or with num_rows.
        scale: multiplies every value.
        out: [m, k] float32 written instead of a new tensor; rows may be strided.
        num_rows: [1] int32; only rows below it are computed, the rest of `out` is left alone. For captured steps.
    Returns: [m, k] float32. Reference: ops.ref.quant.embedding. Bound by memory.
    Raises: ValueError naming the argument, what it is and what was expected.
    """
    if out is None and num_rows is None:
        return embedding_packed(ids, w.data, w.format, w.n, w.k, scale)
    return _embedding(ids, w.data, w.format, w.n, w.k, scale, out=out, num_rows=num_rows)


def embedding_packed(ids: Tensor, packed: Tensor, format: str, n: int, k: int, scale: float) -> Tensor:
    """`embedding` on plain values, as torch.ops.stretto.embedding takes them."""
    if needs_dispatch(ids, packed):
        result: Tensor = torch.ops.stretto.embedding(ids, packed, format, n, k, scale)
        return result
    return _embedding(ids, packed, format, n, k, scale)


def _embedding(
    ids: Tensor, packed: Tensor, format: str, n: int, k: int, scale: float, *, out: Tensor | None = None, num_rows: Tensor | None = None
) -> Tensor:  # fmt: skip
    sizes = check_tensors("embedding", ids=(ids, "m", I32), packed=(packed, "_", U8), out=(out, f"m {k}", F32), num_rows=(num_rows, "1", I32))
    _check_packed("embedding", packed, format, n, k)
    if out is None and num_rows is None and sizes["m"] > 0 and not ids.is_cuda:
        low, high = (int(v) for v in ids.aminmax())
        check(low >= 0 and high < n, f"embedding: ids: {low if low < 0 else high}, expected at least 0 and less than {n}")
    if _backend.use_reference("embedding", ids, packed):
        result = ref.quant.embedding(ids, packed, format, n, k, scale)
        if out is None:
            return result
        rows = sizes["m"] if num_rows is None else int(num_rows)
        out[:rows].copy_(result[:rows])
        return out
    if out is None:
        out = torch.empty(sizes["m"], k, device=ids.device)
    else:
        check(k <= 1 or out.stride(1) == 1, f"embedding: out: strides {out.stride()}, expected adjacent elements in a row")
    _backend._C.embedding(ids.contiguous(), packed, format, n, scale, out, num_rows)  # type: ignore[union-attr]
    return out


def random_packed(make: Make, format: str, n: int, k: int, *, interleave: bool = False) -> PackedWeight:
    """A legal random matrix of this format: any bits for the integers, scales of moderate size. For tests and benches."""
    f = _format("random_packed", format)
    if f.float_dtype is not None:
        raw = make.randn(n, k, dtype=f.float_dtype).view(torch.uint8)
    else:
        raw = make.randint(0, 256, n, k // f.block, f.raw_bytes, dtype=torch.uint8)
        halves = [208] if format == "Q6_K" else [0] if format in ("Q8_0", "Q4_0", "Q5_0") else [0, 2]
        for at in halves:
            raw[..., at : at + 2] = make.randn(n, k // f.block, 1, scale=0.01).half().view(torch.uint8)
        raw = raw.flatten(1)
    return pack(list(raw.chunk(2)) if interleave else raw, format, k, interleave=interleave)


def _linear_cases(make: Make) -> Iterator[Case]:
    def case(m: int, format: str, n: int, k: int, *, bias: bool = False, residual: bool = False, gate: str = "none") -> Case:
        w = random_packed(make, format, n, k, interleave=gate != "none")
        extra = (make.randn(n) if bias else None, make.randn(m, n if gate == "none" else n // 2) if residual else None, gate)
        name = f"{format}-{m}x{n}x{k}{'-bias' * bias}{'-residual' * residual}-{gate}"
        return Case(name, (make.randn(m, k), w.data, format, n, *extra))

    for format, f in FORMATS.items():
        yield case(3, format, 40, 2 * max(f.block, 32), bias=True, residual=True)
        yield case(9, format, 64, 3 * max(f.block, 32), gate="silu")
    for m, n, k in [(0, 16, 64), (1, 1, 32), (2, 17, 96), (17, 48, 576), (33, 96, 1536)]:
        yield case(m, "Q4_1", n, k)
        yield case(m, "F32", n, k)
    yield case(5, "Q8_0", 32, 64, bias=True, residual=True, gate="gelu_tanh")


def _linear_bad(make: Make) -> Iterator[BadCase]:
    x, w = make.randn(2, 64), random_packed(make, "Q4_1", 32, 64)
    args = (w.data, "Q4_1", 32, None, None, "none")
    yield BadCase("rank", (x[0], *args), "linear: x: shape [64]")
    yield BadCase("dtype", (x.double(), *args), "linear: x: float64")
    yield BadCase("k", (make.randn(2, 40), *args), "linear: k: 40")
    yield BadCase("bytes", (make.randn(2, 96), *args), "linear: packed: 1280 bytes, expected 1920")
    yield BadCase("bias", (x, w.data, "Q4_1", 32, make.randn(31), None, "none"), "linear: bias: shape [31]")
    yield BadCase("residual", (x, w.data, "Q4_1", 32, None, make.randn(1, 32), "none"), "linear: residual: shape [1, 32]")
    yield BadCase("gate", (x, w.data, "Q4_1", 32, None, None, "relu"), "linear: gate: 'relu'")
    yield BadCase("gate-n", (x, w.data, "Q4_1", 20, None, None, "silu"), "linear: n: 20")
    yield BadCase("format", (x, w.data, "Q2_K", 32, None, None, "none"), "linear: format: 'Q2_K'", error=NotImplementedError)


def _embedding_cases(make: Make) -> Iterator[Case]:
    for format, f in FORMATS.items():
        n, k = 40, 2 * max(f.block, 32)
        yield Case(format, (make.randint(0, n, 5), random_packed(make, format, n, k).data, format, n, k, 1.0))
    yield Case("scaled", (make.randint(0, 7, 3), random_packed(make, "Q8_0", 7, 32).data, "Q8_0", 7, 32, 24.0))
    yield Case("none", (make.randint(0, 7, 0), random_packed(make, "Q8_0", 7, 32).data, "Q8_0", 7, 32, 1.0))


def _embedding_bad(make: Make) -> Iterator[BadCase]:
    data = random_packed(make, "Q8_0", 7, 32).data
    ids = make.randint(0, 7, 3)
    yield BadCase("high", (ids * 0 + 7, data, "Q8_0", 7, 32, 1.0), "embedding: ids: 7, expected")
    yield BadCase("low", (ids * 0 - 1, data, "Q8_0", 7, 32, 1.0), "embedding: ids: -1, expected")
    yield BadCase("dtype", (ids.long(), data, "Q8_0", 7, 32, 1.0), "embedding: ids: int64")
    yield BadCase("bytes", (ids, data, "Q8_0", 17, 32, 1.0), "embedding: packed: 544 bytes, expected 1088")


_BENCH = [("SmolLM2-135M gate+up", "Q4_1", 3072, 576), ("SmolLM2-135M down", "Q4_1", 576, 1536), ("Gemma3-270M gate+up", "Q5_0", 4096, 640)]

register(
    "linear(Tensor x, Tensor packed, str format, int n, Tensor? bias, Tensor? residual, str gate) -> Tensor",
    _linear,
    function=linear_packed,
    reference=ref.quant.linear,
    fake=lambda x, packed, format, n, bias, residual, gate: x.new_empty(x.shape[0], n if gate == "none" else n // 2),
    cases=_linear_cases,
    bad_cases=_linear_bad,
    bench_cases=lambda make: (Case(f"{name} {format} {m} rows", (make.randn(m, k), random_packed(make, format, n, k).data, format, n, None, None, "none"))
                              for name, format, n, k in _BENCH for m in (1, 8, 512)),
    cost=lambda x, packed, format, n, bias, residual, gate: Cost(
        bytes=packed.nbytes + x.nbytes + 4 * x.shape[0] * (n if gate == "none" else n // 2), flops=2 * x.numel() * n),
    bound="memory",
    source="ggml-common.h of ggml-org/ggml for the formats",
)  # fmt: skip

register(
    "embedding(Tensor ids, Tensor packed, str format, int n, int k, float scale) -> Tensor",
    _embedding,
    function=embedding_packed,
    reference=ref.quant.embedding,
    fake=lambda ids, packed, format, n, k, scale: packed.new_empty(ids.shape[0], k, dtype=torch.float32),
    cases=_embedding_cases,
    bad_cases=_embedding_bad,
    bench_cases=lambda make: (Case(f"SmolLM2-135M {m} rows", (make.randint(0, 49152, m), random_packed(make, "Q8_0", 49152, 576).data, "Q8_0", 49152, 576, 1.0))
                              for m in (1, 512)),
    cost=lambda ids, packed, format, n, k, scale: Cost(bytes=ids.numel() * (packed.nbytes // max(n, 1) + 4 * k), flops=2 * ids.numel() * k),
    bound="memory",
)  # fmt: skip
