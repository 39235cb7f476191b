"""linear, embedding and pack: formats against the gguf package, rows alone, epilogues, rows left alone, broken rows."""

from __future__ import annotations

import numpy as np
import pytest
import stretto.ops as ops
import torch
from stretto.ops import _backend, quant
from stretto.ops.ref.quant import FORMATS
from stretto.ops.step import capture
from stretto.ops.table import Make
from torch import Tensor

from tests.ops.fuzzing import Arena
from tests.oracle import same_bits

pytestmark = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")

NAN = float("nan")
EXACT = ("F32", "F16", "BF16")


def count(n: int) -> Tensor:
    return torch.tensor([n], dtype=torch.int32)


def raw_matrix(format: str, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """File bytes [n, row_bytes] of a random matrix, and the values that the gguf package reads from them, float64."""
    gguf = pytest.importorskip("gguf")
    generator = np.random.default_rng(seed)
    f = FORMATS[format]
    if f.float_dtype is not None:
        values = torch.from_numpy(generator.standard_normal((n, k))).to(f.float_dtype)
        return values.view(torch.uint8).reshape(n, -1), values.double()
    raw = generator.integers(0, 256, (n, k // f.block, f.raw_bytes), dtype=np.uint8)  # any bits are legal, but for the half floats
    for at in {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0]}.get(format, [0, 2]):
        raw[..., at : at + 2] = (generator.standard_normal((n, k // f.block, 1)) / 50).astype(np.float16).view(np.uint8)
    raw = raw.reshape(n, -1)
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[format])
    return torch.from_numpy(raw), torch.from_numpy(values.astype(np.float64)).reshape(n, k)


def int8_rows(x: Tensor) -> Tensor:
    """What a product with block weights sees of x: int8 with one scale for each 32 values."""
    blocks = x.double().unflatten(1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.where(scale > 0, blocks / scale, 0).round() * scale).flatten(1)


def product(x: Tensor, values: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """x W^T in float64, and how far a float32 result may be off."""
    seen = x.double() if format in EXACT else int8_rows(x)
    size = seen.abs() @ values.abs().t()
    one_step = (
        0 if format in EXACT else (x.abs().amax(-1, keepdim=True).double() / 127) @ values.abs().amax(-1, keepdim=True).t()
    )  # a tie rounded otherwise
    return seen @ values.t(), 2e-6 * size + one_step + 1e-6


@pytest.mark.parametrize("format", FORMATS)
def test_values_are_those_of_the_gguf_package(format, isa):
    n, k = 37, 2 * max(FORMATS[format].block, 32)
    raw, values = raw_matrix(format, n, k)
    w = quant.pack(raw, format, k)
    torch.testing.assert_close(quant.unpack(w).double(), values, rtol=3e-7, atol=1e-9)
    ids = torch.tensor([36, 0, 15, 16, 36], dtype=torch.int32)
    assert same_bits(quant.embedding(ids, w), quant.unpack(w)[ids.long()])


@pytest.mark.parametrize("format", FORMATS)
def test_products_against_the_gguf_package(format, isa):
    for m, n, blocks in ((1, 16, 1), (5, 40, 2), (33, 33, 3)):
        k = blocks * max(FORMATS[format].block, 32)
        raw, values = raw_matrix(format, n, k, seed=m)
        x = Make(m).randn(m, k)
        want, allowed = product(x, values, format)
        assert ((quant.linear(x, quant.pack(raw, format, k)).double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_does_not_depend_on_the_number_of_rows_or_threads(format, isa):
    k = 2 * max(FORMATS[format].block, 32)
    w = quant.random_packed(Make(), format, 80, k)
    x = Make(1).randn(150, k)
    ops.set_num_threads(1)
    want = torch.cat([quant.linear(x[i : i + 1], w) for i in range(150)])
    for threads in (1, 2):
        ops.set_num_threads(threads)
        for begin, end in ((0, 150), *((7, 7 + m) for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 31, 33, 64, 65, 129))):
            assert same_bits(quant.linear(x[begin:end], w), want[begin:end]), (begin, end)


@pytest.mark.parametrize("format", FORMATS)
def test_a_column_does_not_depend_on_the_others(format, isa):
    """Matrices that are packed as one give each its own result: fused query, key and value projections."""
    k = max(FORMATS[format].block, 32)
    raws = [raw_matrix(format, n, k, seed=n)[0] for n in (48, 16, 5)]
    x = Make(3).randn(9, k)
    apart = torch.cat([quant.linear(x, quant.pack(raw, format, k)) for raw in raws], 1)
    assert same_bits(quant.linear(x, quant.pack(raws, format, k)), apart)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gates_against_torch(format, gate, isa):
    k = max(FORMATS[format].block, 32)
    (gate_raw, _), (up_raw, _) = raw_matrix(format, 48, k, 1), raw_matrix(format, 48, k, 2)
    x = 3 * Make(4).randn(11, k)
    a, b = (quant.linear(x, quant.pack(raw, format, k)).double() for raw in (gate_raw, up_raw))
    act = torch.nn.functional.silu(a) if gate == "silu" else torch.nn.functional.gelu(a, approximate="tanh")
    got = quant.linear(x, quant.pack([gate_raw, up_raw], format, k, interleave=True), gate=gate)
    torch.testing.assert_close(got.double(), act * b, rtol=2e-6, atol=2e-5)


def test_gates_of_large_values(isa):
    """Far out, silu and gelu are 0 on one side and the identity on the other; nothing overflows on the way."""
    values = torch.tensor([-1e30, -1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, 1e30])
    eye = torch.zeros(16, 32)
    eye[0, 0] = 1
    raws = [eye.view(torch.uint8), torch.roll(eye, 1, 1).view(torch.uint8)]
    x = torch.zeros(9, 32)
    x[:, 0], x[:, 1] = values, 1
    w = quant.pack(raws, "F32", 32, interleave=True)
    torch.testing.assert_close(quant.linear(x, w, gate="silu")[:, 0], torch.nn.functional.silu(values), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(quant.linear(x, w, gate="gelu_tanh")[:, 0], torch.nn.functional.gelu(values, approximate="tanh"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", ["F32", "F16", "Q8_0", "Q4_1", "Q6_K"])
def test_epilogues_strides_and_rows_left_alone(format, isa):
    k = max(FORMATS[format].block, 32)
    w, make = quant.random_packed(Make(), format, 40, k), Make(5)
    x, bias, residual = make.randn(9, k), make.randn(40), make.randn(9, 40)
    plain = quant.linear(x, w)
    want = quant.linear(x, w, bias=bias, residual=residual)
    torch.testing.assert_close(want, plain + bias + residual, rtol=1e-5, atol=1e-5)
    wide = torch.full((9, k + 50), NAN)
    wide[:, 7 : 7 + k] = x
    frame = torch.full((9, 100), NAN)
    frame[:, 20:60] = residual  # the residual stream is updated in place
    broken = wide[:, 7 : 7 + k]
    broken[6:] = NAN
    got = quant.linear(broken, w, bias=bias, residual=frame[:, 20:60], out=frame[:, 20:60], num_rows=count(6))
    assert same_bits(got[:6], want[:6])
    assert same_bits(frame[6:, 20:60], residual[6:])
    assert frame[:, :20].isnan().all()
    assert frame[:, 60:].isnan().all()
    assert same_bits(quant.linear(x.t().contiguous().t(), w), plain)
    assert same_bits(quant.linear(x.repeat_interleave(2, 1)[:, ::2], w), plain)
    for rows in (0, -1, -(2**31), 10, 2**31 - 1):
        out = torch.full((9, 40), NAN)
        quant.linear(x, w, out=out, num_rows=count(rows))
        assert int((~out.isnan()).all(-1).sum()) == (9 if rows > 9 else 0)


@pytest.mark.parametrize("format", FORMATS)
def test_a_broken_row_breaks_itself_only(format, isa):
    k = 2 * max(FORMATS[format].block, 32)
    w, x = quant.random_packed(Make(), format, 33, k), Make(6).randn(20, k)
    clean = quant.linear(x, w)
    for value in (NAN, torch.inf, -torch.inf):
        for row, at in ((0, 0), (7, k - 1), (19, k // 2)):
            broken = x.clone()
            broken[row, at] = value
            got = quant.linear(broken, w)
            others = torch.arange(20) != row
            assert same_bits(got[others], clean[others])
            assert not got[row].isfinite().any()


@pytest.mark.parametrize("format", FORMATS)
def test_zero_denormal_and_large_rows(format, isa):
    k = max(FORMATS[format].block, 32)
    raw, values = raw_matrix(format, 20, k)
    w = quant.pack(raw, format, k)
    assert not quant.linear(torch.zeros(3, k), w).any()
    for size in (1e-42, 1e-38, 1e-20, 1e20, 1e30):
        x = Make(7).randn(5, k, scale=size)
        want, allowed = product(x, values, format)
        got = quant.linear(x, w).double()
        if size >= 1e-20:
            assert ((got - want).abs() <= allowed + 1e-5 * want.abs()).all(), size
        else:  # scales of denormal rows have few digits
            assert (got.abs() <= 2 * size * k * values.abs().amax()).all(), size


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in EXACT])
def test_sums_of_the_largest_values_do_not_overflow(format, isa):
    """Largest activations of one sign against the largest weights: what the integer sums on the way must have room for."""
    f, k = FORMATS[format], 2 * max(FORMATS[format].block, 32)
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        raw = torch.full((16, k // f.block, f.raw_bytes), fill, dtype=torch.uint8)
        for at in {"Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}.get(format, (0, 2)):
            raw[..., at : at + 2] = torch.tensor([1.0]).half().view(torch.uint8)
        w = quant.pack(raw.flatten(1), format, k)
        for sign in (1, -1):
            x = torch.full((5, k), 127.0 * sign)
            x[:, 1::7] = 3
            want = x.double() @ quant.unpack(w).double().t()
            torch.testing.assert_close(quant.linear(x, w).double(), want, rtol=1e-5, atol=0)


def test_embedding_rows(isa):
    w = quant.random_packed(Make(), "Q4_K", 50, 256)
    whole = quant.unpack(w)
    ids = torch.tensor([49, 0, 17, -1, 50, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = torch.full((7, 300), NAN)
    quant.embedding(ids, w, scale=3.0, out=out[:, 10:266], num_rows=count(6))  # in a captured step ids out of range give zeros
    torch.testing.assert_close(out[:3, 10:266], 3 * whole[[49, 0, 17]], rtol=1e-6, atol=1e-7)
    assert not out[3:6, 10:266].any()
    assert out[6].isnan().all()
    assert out[:, :10].isnan().all()
    assert out[:, 266:].isnan().all()


def test_padding_rows_of_a_packed_matrix_are_not_results(isa):
    """n = 5 of 16: outputs end with the fifth column."""
    for format in FORMATS:
        k = max(FORMATS[format].block, 32)
        w, x = quant.random_packed(Make(), format, 5, k), Make(8).randn(3, k)
        frame = torch.full((3, 16), NAN)
        quant.linear(x, w, out=frame[:, :5])
        assert same_bits(frame[:, :5], quant.linear(x, w))
        assert frame[:, 5:].isnan().all()


def test_memory_beside_the_tensors_is_not_touched(isa):
    for format in FORMATS:
        k = max(FORMATS[format].block, 32)
        w = quant.random_packed(Make(), format, 21, k)
        packed = quant.PackedWeight(Arena(4096 * (w.data.numel() // 4096 + 1)).place(w.data, True), format, 21, k)
        for m in (1, 3, 9):
            x, out = Arena().place(Make(m).randn(m, k), True), Arena().place(torch.zeros(m, 21), True)
            assert same_bits(quant.linear(x, packed, out=out), quant.linear(x, w))
            ids = Arena().place(torch.tensor([20, 0, 5], dtype=torch.int32), True)
            assert same_bits(quant.embedding(ids, packed), quant.embedding(ids, w))


def test_a_replayed_step_takes_any_row_count(isa):
    w, x, rows = quant.random_packed(Make(), "Q4_1", 40, 64), Make(9).randn(9, 64), count(9)
    out = torch.full((9, 40), NAN)
    step = capture(lambda: quant.linear(x, w, out=out, num_rows=rows))
    want = out.clone()
    for n in (0, 1, 5, 9, 10, -1, 2**31 - 1):
        out.fill_(NAN)
        rows.fill_(n)
        step.run(2)
        used = min(max(n, 0), 9)
        assert same_bits(out[:used], want[:used])
        assert out[used:].isnan().all()
