"""sLSTM: cuts and neighbours that change no bit, states that are only read, NaN, and the vanilla cell of the xlstm package."""

from __future__ import annotations

import importlib

import pytest
import torch
from stretto.ops import ref
from stretto.ops import slstm as S
from stretto.ops.table import Make
from torch import Tensor

from tests.oracle import same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(tokens: int, heads: int = 2, dim: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    make = Make()
    return make.randn(tokens, 4, heads, dim, dtype=dtype), make.randn(heads, dim, 4, dim, dtype=dtype, scale=dim**-0.5), make.randn(4, heads, dim)


def states(slots: int, heads: int = 2, dim: int = 24) -> Tensor:
    state = Make(1).randn(slots, 4, heads, dim)
    state[:, 2] = state[:, 2].abs() + 1
    return state


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 17, 24, 80])
def test_where_a_sequence_is_cut_changes_no_bit(dim, dtype, isa):
    (Wx, R, b), state = inputs(13, dim=dim, dtype=dtype), states(3, dim=dim)
    whole, after = S.slstm(Wx, R, b, state[1:2])
    stepped = state.clone()
    parts = [S.slstm_step(Wx[:5], R, b, stepped, i32(1), i32(0, 5)), *(S.slstm_step(Wx[t : t + 1], R, b, stepped, i32(1)) for t in range(5, 9))]
    y, end = S.slstm(Wx[9:], R, b, stepped[1:2])
    assert same_bits(torch.cat([*parts, y]), whole)
    assert same_bits(end, after)
    assert same_bits(stepped[[0, 2]], state[[0, 2]])


def test_rows_do_not_depend_on_the_sequences_beside_them(isa):
    lengths, at = (3, 0, 7, 1, 5, 2), 0
    (Wx, R, b), state = inputs(18), states(6)
    y, after = S.slstm(Wx, R, b, state, i32(0, 3, 3, 10, 11, 16, 18))
    for s, length in enumerate(lengths):
        alone, end = S.slstm(Wx[at : at + length], R, b, state[s : s + 1])
        assert same_bits(y[at : at + length], alone)
        assert same_bits(after[s : s + 1], end)
        at += length


def test_reading_leaves_states_alone_and_idle_sequences_give_zeros(isa):
    (Wx, R, b), state = inputs(6), states(3)
    kept = state.clone()
    Wx[2:4] = torch.nan
    y = S.slstm_step(Wx, R, b, state, i32(1, -1, 1), i32(0, 2, 4, 6), update=False)
    assert same_bits(state, kept)
    assert torch.equal(y[2:4], torch.zeros_like(y[2:4]))
    assert same_bits(y[4:], S.slstm_step(Wx[4:], R, b, state, i32(1), i32(0, 2)))


def test_nan_stays_in_its_sequence_and_head(isa):
    (Wx, R, b), state = inputs(10), states(2)
    clean, _ = S.slstm(Wx, R, b, state, i32(0, 6, 10))
    for gate in range(4):
        dirty = Wx.clone()
        dirty[2, gate, 1, 5] = torch.nan
        y, _ = S.slstm(dirty, R, b, state, i32(0, 6, 10))
        assert y[2, 1, 5].isnan()
        assert y[3:6, 1].isnan().all()
        assert same_bits(y[6:], clean[6:])
        assert same_bits(y[:, 0], clean[:, 0])


@pytest.mark.parametrize("level", [-80.0, -15.0, 15.0, 80.0])
def test_extreme_gates_stay_finite(level, isa):
    (Wx, R, b), state = inputs(30), states(1)
    Wx[5:20, :2] = level
    y, after = S.slstm(Wx, R, b, state)
    want, _ = ref.mlstm.slstm(Wx.double(), R.double(), b.double(), state.double())
    assert after.isfinite().all()
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    Wx, R, b = (x.double().requires_grad_() for x in inputs(4, 1, 3))
    state = states(1, 1, 3).double().requires_grad_()
    torch.autograd.gradcheck(lambda *x: ref.mlstm.slstm(*x), (Wx, R, b, state))


def test_equals_the_vanilla_cell_of_xlstm():
    try:
        vanilla = importlib.import_module("xlstm.blocks.slstm.src.vanilla")
    except ImportError as error:
        pytest.skip(f"the xlstm package is not installed: {error}")
    heads, dim, tokens = 2, 16, 12
    Wx, R, b = inputs(tokens, heads, dim)
    packed = R.permute(0, 2, 3, 1).reshape(heads, 4 * dim, dim)  # [heads, gate and output, input]
    states_all, _, _ = vanilla.slstm_forward(
        Wx.reshape(tokens, 1, 4 * heads * dim),
        torch.zeros(4, 1, heads * dim),
        packed,
        b.flatten(),
        vanilla.slstm_pointwise_function_registry["slstm"],
    )
    y, after = S.slstm(Wx, R, b)
    torch.testing.assert_close(y.flatten(1), states_all[0, 1:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[0].flatten(1), states_all[:, -1, 0], rtol=1e-5, atol=1e-5)
