"""rms_norm, add_rms_norm and layer_norm: rows alone, outputs in place, rows left alone, extremes; against torch in float64."""

from __future__ import annotations

import pytest
import stretto.ops as ops
import torch
from stretto.ops import _backend
from stretto.ops._check import FLOATS
from stretto.ops.norm import add_rms_norm, gather_rows, layer_norm, rms_norm
from torch import Tensor

from tests.oracle import same_bits

pytestmark = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")

NAN = float("nan")
WIDTHS = (1, 15, 16, 17, 63, 64, 65, 576, 2049)


def count(n: int) -> Tensor:
    return torch.tensor([n], dtype=torch.int32)


def data(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual of dtype, weight and bias."""
    g = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(rows, width, generator=g).to(dtype) for _ in range(2))
    return x, residual, torch.randn(width, generator=g), torch.randn(width, generator=g)


CALLS = {
    "rms": lambda x, residual, w, b, **out: (rms_norm(x, w, 1e-5, **out),),
    "rms+residual": lambda x, residual, w, b, **out: (rms_norm(x, w, 1e-5, residual, **out),),
    "add_rms": lambda x, residual, w, b, **out: add_rms_norm(x, residual, w, 1e-5, **out),
    "layer": lambda x, residual, w, b, **out: (layer_norm(x, w, b, 1e-5, **out),),
    "layer-no-bias": lambda x, residual, w, b, **out: (layer_norm(x, w, None, 1e-5, **out),),
}


def outputs(name: str, like: Tensor) -> dict[str, Tensor]:
    return {key: torch.full_like(like, NAN) for key in (("out", "sum") if name == "add_rms" else ("out",))}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_rows_stand_alone(name, dtype, isa):
    for width in WIDTHS:
        x, residual, w, b = data(77, width, dtype)
        want = [torch.cat(parts) for parts in zip(*(CALLS[name](x[i : i + 1], residual[i : i + 1], w, b) for i in range(77)), strict=True)]
        for threads in (1, 2):
            ops.set_num_threads(threads)
            for begin, end in ((0, 77), (5, 6), (3, 50)):
                got = CALLS[name](x[begin:end], residual[begin:end], w, b)
                assert all(same_bits(g, v[begin:end]) for g, v in zip(got, want, strict=True)), (width, begin, end)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_rows_beyond_num_rows_are_left_alone(name, dtype, isa):
    x, residual, w, b = data(9, 70, dtype)
    want = CALLS[name](x, residual, w, b)
    x[6:], residual[6:] = NAN, NAN
    given = outputs(name, x)
    got = CALLS[name](x, residual, w, b, num_rows=count(6), **given)
    for g, v, out in zip(got, want, given.values(), strict=True):
        assert g is out
        assert same_bits(out[:6], v[:6])
        assert out[6:].isnan().all()
    for rows, filled in ((0, 0), (-1, 0), (-(2**31), 0), (99, 6), (2**31 - 1, 6)):
        given = outputs(name, x)
        for out in CALLS[name](x, residual, w, b, num_rows=count(rows), **given):
            assert int((~out.isnan()).all(-1).sum()) == filled


@pytest.mark.parametrize("name", CALLS)
def test_strided_inputs_and_outputs(name, isa):
    x, residual, w, b = data(9, 40)
    want = CALLS[name](x, residual, w, b)
    wide = torch.full((9, 100), NAN)
    wide[:, 3:43], wide[:, 50:90] = x, residual
    views = [(wide[:, 3:43], wide[:, 50:90]), (x.t().contiguous().t(), residual.repeat_interleave(3, 1)[:, ::3])]
    for a, r in views:
        assert all(same_bits(g, v) for g, v in zip(CALLS[name](a, r, w.repeat_interleave(2)[::2], b), want, strict=True))
    frames = {key: torch.full((9, 60), NAN) for key in outputs(name, x)}
    got = CALLS[name](x, residual, w, b, **{key: frame[:, 7:47] for key, frame in frames.items()})
    for g, v, frame in zip(got, want, frames.values(), strict=True):
        assert same_bits(g, v)
        assert frame[:, :7].isnan().all()
        assert frame[:, 47:].isnan().all()


def test_results_may_take_the_place_of_inputs(isa):
    for dtype in FLOATS:
        x, residual, w, b = data(33, 577, dtype)
        assert same_bits(rms_norm(a := x.clone(), w, 1e-5, out=a), rms_norm(x, w, 1e-5))
        assert same_bits(rms_norm(x, w, 1e-5, a := residual.clone(), out=a), rms_norm(x, w, 1e-5, residual))
        assert same_bits(layer_norm(a := x.clone(), w, b, 1e-5, out=a), layer_norm(x, w, b, 1e-5))
        out, total = add_rms_norm(x, residual, w, 1e-5)
        for in_place in ({"sum": 1}, {"out": 0}, {"out": 0, "sum": 1}, {"out": 1, "sum": 0}, {"out": 1}, {"sum": 0}):
            inputs = [x.clone(), residual.clone()]
            got = add_rms_norm(*inputs, w, 1e-5, **{key: inputs[i] for key, i in in_place.items()})
            assert same_bits(got[0], out), in_place
            assert same_bits(got[1], total), in_place


def test_add_rms_norm_is_the_two_ops_it_joins(isa):
    for dtype in FLOATS:
        for width in WIDTHS:
            x, residual, w, _ = data(7, width, dtype)
            out, total = add_rms_norm(x, residual, w, 1e-5)
            assert same_bits(total, x + residual)
            assert same_bits(out, rms_norm(x + residual, w, 1e-5))


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e6])
def test_layer_norm_of_a_mean_far_from_zero(shift, isa):
    """Against torch in float64; one pass over sums of squares would lose every digit at a million."""
    x, _, w, b = data(5, 1000)
    x = x + shift
    want = torch.nn.functional.layer_norm(x.double(), (1000,), w.double(), b.double(), 1e-5)
    error = (layer_norm(x, w, b, 1e-5).double() - want).abs().max().item()
    plain = (torch.nn.functional.layer_norm(x, (1000,), w, b, 1e-5).double() - want).abs().max().item()
    assert error <= 2 * plain + 1e-6


@pytest.mark.parametrize("name", CALLS)
def test_extremes(name, isa):
    for value in (NAN, torch.inf, -torch.inf):
        x, residual, w, b = data(5, 100)
        clean = CALLS[name](x, residual, w, b)[0]
        for at in (0, 37, 99):
            broken = x.clone()
            broken[2, at] = value
            got = CALLS[name](broken, residual, w, b)[0]
            assert same_bits(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
            assert got[2].isnan().any()
            if value != value or name.startswith("layer"):
                assert got[2].isnan().all()
    x, residual, w, b = data(5, 100)
    zero = torch.zeros_like(x)
    got = CALLS[name](zero, zero, w, b)[0]
    assert same_bits(got, b.expand(5, 100) if name == "layer" else zero * w)
    tiny = CALLS[name](x * 1e-42, residual * 1e-42, w, b)[0]
    assert tiny.isfinite().all()


def test_a_row_of_equal_values_becomes_the_bias(isa):
    for width in WIDTHS:
        w, b = torch.randn(width), torch.randn(width)
        torch.testing.assert_close(layer_norm(torch.full((3, width), 0.7), w, b, 1e-5), b.expand(3, width), rtol=0, atol=1e-3)


def test_gather_rows_copies_bits(isa):
    x = torch.randn(50, 70)
    x[3, 4], x[3, 5] = NAN, torch.inf
    wide = torch.full((50, 100), NAN)
    wide[:, 9:79] = x
    rows = torch.tensor([3, 3, 49, 0], dtype=torch.int32)
    assert same_bits(gather_rows(wide[:, 9:79], rows), x[rows.long()])
    out = torch.full((4, 70), NAN)
    unused = torch.tensor([7, 8, -5, 2**31 - 1], dtype=torch.int32)  # ids behind num_rows are not followed
    gather_rows(x, unused, out=out, num_rows=count(2))
    assert same_bits(out[:2], x[7:9])
    assert out[2:].isnan().all()
