"""mLSTM: independent oracles, cuts that change no bit, guesses and replay, extreme gates, memory that must not be touched."""

from __future__ import annotations

import math

import pytest
import stretto.ops as ops
import torch
from stretto.ops import mlstm as M
from stretto.ops import ref
from stretto.ops.table import Make
from torch import Tensor

from tests.oracle import same_bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(tokens: int, heads: int = 2, dk: int = 24, dv: int = 40, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    make = Make(seed)
    rows = [make.randn(tokens, heads, width, dtype=dtype) for width in (dk, dk, dv)]
    return [*rows, (make.randn(tokens, heads) - 2).to(dtype), (make.randn(tokens, heads) + 3).to(dtype)]


def states(slots: int, heads: int = 2, dk: int = 24, dv: int = 40, seed: int = 1) -> list[Tensor]:
    make = Make(seed)
    return [make.randn(slots, heads, dk, dv), make.randn(slots, heads, dk), make.randn(slots, heads) - 2]


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def by_hand(q, k, v, i, f, C, n, m, eps=1e-6, cap=None, variant="exp"):
    """The cell as the paper writes it, one number at a time in Python floats; for one head."""
    C, n, m, hs = C.double().clone(), n.double().clone(), float(m), []
    for q_, k_, v_, i_, f_ in zip(q.double(), k.double(), v.double(), i.tolist(), f.tolist(), strict=True):
        if cap:
            i_, f_ = cap * math.tanh(i_ / cap), cap * math.tanh(f_ / cap)
        keep, add = 1 / (1 + math.exp(-f_)), 1 / (1 + math.exp(-i_))
        if variant == "exp":
            log_keep = -math.log1p(math.exp(-f_)) if f_ > -30 else f_
            new = max(log_keep + m, i_)
            keep, add, m = math.exp(log_keep + m - new), math.exp(i_ - new), new
        C = keep * C + add * torch.outer(k_, v_)
        n = keep * n + add * k_ if variant == "exp" else n
        scaled = q_ / math.sqrt(len(q_))
        hs.append(scaled @ C / ((max(abs(float(scaled @ n)), math.exp(-m)) + eps) if variant == "exp" else 1.0))
    return torch.stack(hs), C, n, m


@pytest.mark.parametrize("variant", M.VARIANTS)
@pytest.mark.parametrize("cap", [None, 15.0])
def test_op_and_reference_equal_the_cell_written_by_hand(cap, variant, isa):
    rows, state = inputs(33), states(1)
    got = M.mlstm(*rows, *state, gate_cap=cap, variant=variant)
    double = [x.double() for x in (*rows, *state)]
    reference = ref.mlstm.mlstm(*double, None, 8, 1e-6, cap, variant)
    for head in range(2):
        want = by_hand(*(x[:, head] for x in rows), *(x[0, head] for x in state), cap=cap, variant=variant)
        for ours, chunked, exact in zip((got[0][:, head], got[1][0, head]), (reference[0][:, head], reference[1][0, head]), want, strict=False):
            torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(chunked, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 8, 64, 1000])
@pytest.mark.parametrize("variant", M.VARIANTS)
def test_chunkwise_reference_does_not_depend_on_its_chunk(chunk, variant):
    rows, state = [x.double() for x in inputs(70)], [x.double() for x in states(2)]
    cu = bounds(61, 9)
    want, copy = ref.mlstm.mlstm(*rows, *state, cu, 70, 1e-6, None, variant), [x.clone() for x in state]
    for one, other in zip(ref.mlstm.mlstm(*rows, *state, cu, chunk, 1e-6, None, variant), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    h = ref.mlstm.mlstm_step(*rows, *copy, i32(0, 1), cu, 1e-6, None, variant)
    for recurrent, other in zip((h, *copy), want, strict=True):
        torch.testing.assert_close(recurrent, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("variant", M.VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [[1] * 45, [44, 1], [16, 16, 13], [7, 30, 8], [1, 33, 11]], ids=str)
def test_where_a_sequence_is_cut_changes_no_bit(cuts, dtype, variant, isa):
    rows, state = inputs(45, dv=72, dtype=dtype), states(1, dv=72)
    whole = M.mlstm(*rows, *state, gate_cap=15.0, variant=variant)
    assert all(same_bits(a, b) for a, b in zip(whole, M.mlstm(*rows, *state, None, 5, 1e-6, 15.0, variant), strict=True))
    stepped, parts, at = [x.clone() for x in state], [], 0
    for length in cuts:
        part = [x[at : at + length] for x in rows]
        if at % 2:  # the ops mix
            parts.append(M.mlstm_step(*part, *stepped, i32(0), bounds(length), 1e-6, 15.0, variant))
        else:
            h, *stepped = M.mlstm(*part, *stepped, gate_cap=15.0, variant=variant)
            parts.append(h)
        at += length
    for one, other in zip((torch.cat(parts), *stepped), whole, strict=True):
        assert same_bits(one, other)


def test_packed_sequences_equal_separate_ones_and_ignore_their_neighbours(isa):
    lengths = (5, 0, 70, 1, 19)
    rows, state = inputs(sum(lengths)), states(len(lengths))
    packed = M.mlstm(*rows, *state, bounds(*lengths))
    at = 0
    for b, length in enumerate(lengths):
        alone = M.mlstm(*(x[at : at + length] for x in rows), *(x[b : b + 1] for x in state))
        assert same_bits(packed[0][at : at + length], alone[0])
        assert all(same_bits(p[b : b + 1], a) for p, a in zip(packed[1:], alone[1:], strict=True))
        at += length
    assert all(same_bits(p[1], given[1]) for p, given in zip(packed[1:], state, strict=True))  # no tokens: the state given


def test_batch_layout_and_strides_give_the_same_bits(isa):
    rows = inputs(24)
    packed = M.mlstm(*rows, cu_seqlens=bounds(8, 8, 8))
    batch = [x.unflatten(0, (3, 8)).transpose(1, 2) for x in rows]
    for views in (batch, [x.contiguous() for x in batch]):
        h, *state = M.mlstm(*views)
        assert h.is_contiguous()
        assert same_bits(h.transpose(1, 2).flatten(0, 1), packed[0])
        assert all(same_bits(a, b) for a, b in zip(state, packed[1:], strict=True))
    wide = torch.cat([x if x.dim() == 3 else x[..., None] for x in rows], -1)  # a fused projection
    views = [*wide[..., :-2].split([24, 24, 40], -1), wide[..., -2], wide[..., -1]]
    assert same_bits(M.mlstm(*views)[0], M.mlstm(*rows)[0])
    spread = [x.repeat_interleave(2, -1)[..., ::2] for x in rows]
    assert same_bits(M.mlstm(*spread)[0], M.mlstm(*rows)[0])


@pytest.mark.parametrize("variant", M.VARIANTS)
def test_guesses_are_checked_without_touching_the_state_and_replay_keeps_the_accepted(variant, isa):
    rows, state = inputs(12), states(3)
    cu, slots = bounds(5, 4, 3), i32(2, 0, 1)
    kept = [x.clone() for x in state]
    guessed = M.mlstm_step(*rows, *state, slots, cu, 1e-6, None, variant, False)
    assert all(same_bits(a, b) for a, b in zip(state, kept, strict=True))
    for counts in ((5, 4, 3), (0, 1, 2), (3, 0, 0)):
        replayed, stepped = [x.clone() for x in kept], [x.clone() for x in kept]
        M.mlstm_replay(*rows[1:], *replayed, slots, i32(*counts), cu, None, variant)
        for b, count in enumerate(counts):
            for t in range(count):
                at = int(cu[b]) + t
                h = M.mlstm_step(*(x[at : at + 1] for x in rows), *stepped, slots[b : b + 1], None, 1e-6, None, variant)
                assert same_bits(h, guessed[at : at + 1])
        assert all(same_bits(a, b) for a, b in zip(replayed, stepped, strict=True))


def test_continuations_may_share_one_state_that_is_only_read(isa):
    rows, state = inputs(6), states(2)
    shared = M.mlstm_step(*rows, *state, i32(1, 1), bounds(3, 3), update=False)
    for b in range(2):
        alone = M.mlstm_step(*(x[3 * b : 3 * b + 3] for x in rows), *state, i32(1), bounds(3), update=False)
        assert same_bits(shared[3 * b : 3 * b + 3], alone)


def test_idle_sequences_and_other_slots_are_not_touched(isa):
    rows, state = inputs(5), states(4)
    for x in rows:
        x[2:4] = torch.nan  # the idle sequence's rows
    for x in state:
        x[0], x[3] = torch.nan, 7.0
    kept = [x.clone() for x in state]
    out = torch.full_like(rows[2], torch.nan)
    assert M.mlstm_step(*rows, *state, i32(2, -1, 1), bounds(2, 2, 1), out=out) is out
    assert torch.equal(out[2:4], torch.zeros_like(out[2:4]))
    assert out.isfinite().all()
    for x, before in zip(state, kept, strict=True):
        assert same_bits(x[[0, 3]], before[[0, 3]])
        assert not same_bits(x[[1, 2]], before[[1, 2]])


def test_replay_does_not_read_what_was_not_accepted(isa):
    rows, state = inputs(8), states(2)
    clean = [x.clone() for x in state]
    M.mlstm_replay(*rows[1:], *clean, i32(0, 1), i32(2, 0), bounds(4, 4))
    for x in rows:
        x[2:] = torch.nan
    M.mlstm_replay(*rows[1:], *state, i32(0, 1), i32(2, 0), bounds(4, 4))
    assert all(same_bits(a, b) for a, b in zip(state, clean, strict=True))


@pytest.mark.parametrize("start", [0.0, 5.0, -20.0, -1e30, -torch.inf])
def test_the_start_of_m_does_not_matter_to_an_empty_memory(start, isa):
    rows = inputs(40)
    zeros = [torch.zeros_like(x) for x in states(1)]
    want = M.mlstm(*rows, *zeros, eps=0.0)
    got = M.mlstm(*rows, zeros[0], zeros[1], torch.full((1, 2), start), eps=0.0)
    torch.testing.assert_close(got[0], want[0], rtol=2e-4, atol=2e-5)
    for x, y in zip(got[1:3], want[1:3], strict=True):
        scale = [torch.exp(m).reshape(1, 2, *[1] * (x.dim() - 2)) for m in (got[3], want[3])]
        torch.testing.assert_close(scale[0] * x, scale[1] * y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 15.0])
@pytest.mark.parametrize("low_f", [-80.0, -15.0, 15.0, 80.0])
@pytest.mark.parametrize("low_i", [-80.0, -15.0, 15.0, 80.0])
def test_extreme_gates_stay_finite(low_i, low_f, cap, isa):
    q, k, v, i, f = inputs(50)
    i[10:40], f[10:40] = low_i, low_f
    got = M.mlstm(q, k, v, i, f, gate_cap=cap)
    want = ref.mlstm.mlstm(*(x.double() for x in (q, k, v, i, f)), gate_cap=cap)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gate", [3, 4])
def test_nan_stays_in_its_sequence_and_head(gate, isa):
    rows, state = inputs(20), states(2)
    clean = M.mlstm(*rows, *state, bounds(12, 8))
    rows[gate][5, 1] = torch.nan
    h, *after = M.mlstm(*rows, *state, bounds(12, 8))
    assert h[5:12, 1].isnan().all()
    h[5:12, 1] = clean[0][5:12, 1]
    assert same_bits(h, clean[0])
    for x, y in zip(after, clean[1:], strict=True):
        assert x[0, 1].isnan().all()
        x[0, 1] = y[0, 1]
        assert same_bits(x, y)


def test_padding_with_closed_gates_changes_nothing(isa):
    rows, state = inputs(9), states(1)
    for x in rows[:3]:
        x[4:] = 3.0
    rows[3][4:], rows[4][4:] = -torch.inf, torch.inf
    _, *padded = M.mlstm(*rows, *state)
    _, *short = M.mlstm(*(x[:4] for x in rows), *state)
    assert all(same_bits(a, b) for a, b in zip(padded, short, strict=True))


def test_given_states_are_left_alone_and_results_do_not_alias_them():
    rows, state = inputs(0), states(1)
    kept = [x.clone() for x in state]
    _, *after = M.mlstm(*rows, *state)
    for x in after:
        x += 1
    assert all(same_bits(a, b) for a, b in zip(state, kept, strict=True))


def test_no_tile_reads_or_writes_past_its_tensor(isa):
    rows, state = inputs(21, dk=19, dv=37), states(1, dk=19, dv=37)
    want = M.mlstm(*rows, *state)

    def framed(x: Tensor) -> tuple[Tensor, Tensor]:
        frame = torch.full((x.numel() + 128,), torch.nan, dtype=x.dtype)
        frame[64:-64] = x.flatten()
        return frame, frame[64:-64].view(x.shape)

    frames, views = zip(*(framed(x) for x in (*rows, *state, torch.zeros_like(rows[2]))), strict=True)
    M.mlstm_step(*views[:8], i32(0), bounds(21), out=views[8])
    for got, x in zip((views[8], *views[5:8]), want, strict=True):
        assert same_bits(got, x)
    assert all(x[:64].isnan().all() and x[-64:].isnan().all() for x in frames)


def test_one_or_many_threads_and_instruction_sets_of_one_rounding_give_the_same_bits():
    native = ops._backend._C
    if native is None or not {"avx2", "avx512"} <= set(native.isas()):
        pytest.skip("needs AVX2 and AVX-512")
    rows, state, before, runs = inputs(100, dk=33, dv=150), states(1, dk=33, dv=150), native.isa(), []
    for name in ("avx2", "avx512"):
        native.set_isa(name)
        for threads in (1, 2):
            ops.set_num_threads(threads)
            runs.append(M.mlstm(*rows, *state, gate_cap=15.0))
    native.set_isa(before)
    for other in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("variant", M.VARIANTS)
def test_gradcheck(variant):
    rows = [x.double().requires_grad_() for x in inputs(7, 1, 3, 4)]
    state = [x.double().requires_grad_() for x in states(2, 1, 3, 4)]
    cu = bounds(5, 2)
    torch.autograd.gradcheck(lambda *x: ref.mlstm.mlstm(*x, cu, 3, 1e-6, 15.0, variant)[: 4 if variant == "exp" else 2], (*rows, *state))


def test_training_through_the_op_uses_the_gradient_of_the_reference():
    rows, state = [x.requires_grad_() for x in inputs(30)], [x.requires_grad_() for x in states(1)]
    leaves = [*rows, *state]

    def loss(result: tuple[Tensor, ...]) -> Tensor:
        return sum((x * torch.linspace(0, 1, x.numel()).view(x.shape)).sum() for x in result)

    got = torch.autograd.grad(loss(M.mlstm(*rows, *state, chunk=8)), leaves)
    want = torch.autograd.grad(loss(ref.mlstm.mlstm(*rows, *state, chunk=8)), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_captured_steps_read_lengths_slots_and_counts_anew():
    if ops._backend._C is None:
        pytest.skip("needs the native module")
    rows, state = inputs(6), states(3)
    cu, slots, out = bounds(2, 4), i32(0, 1), torch.empty_like(rows[2])
    working = [x.clone() for x in state]
    step = ops.step.capture(lambda: M.mlstm_step(*rows, *working, slots, cu, out=out))
    cu.copy_(bounds(5, 1))
    slots.copy_(i32(2, -1))
    for x, y in zip(working, state, strict=True):
        x.copy_(y)
    step.run(2)
    want = [x.clone() for x in state]
    assert same_bits(out, M.mlstm_step(*rows, *want, slots, cu))
    assert all(same_bits(a, b) for a, b in zip(working, want, strict=True))
    cu.copy_(i32(-5, 2**31 - 1, -(2**31)))  # nonsense is harmless
    slots.copy_(i32(2**31 - 1, 7))
    step.run(2)
    assert all(same_bits(a, b) for a, b in zip(working, want, strict=True))


def test_equals_mlstm_kernels():
    pytest.importorskip("mlstm_kernels", reason="mlstm-kernels is not installed")
    from mlstm_kernels.torch.chunkwise import mlstm_chunkwise__native_custbw
    from mlstm_kernels.torch.parallel import mlstm_parallel__native_custbw, mlstm_siging_parallel__native_custbw
    from mlstm_kernels.torch.recurrent import mlstm_recurrent_step__native

    batch = [x.unflatten(0, (2, 64)).transpose(1, 2).contiguous() for x in inputs(128, dk=32, dv=64)]
    h, C, n, m = M.mlstm(*batch)
    theirs, (c_, n_, m_) = mlstm_chunkwise__native_custbw(*batch, return_last_states=True, chunk_size=16, eps=1e-6)
    torch.testing.assert_close(h, theirs, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(torch.exp(m)[..., None, None] * C, torch.exp(m_.reshape(m.shape))[..., None, None] * c_, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.exp(m)[..., None] * n, torch.exp(m_.reshape(m.shape))[..., None] * n_, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h, mlstm_parallel__native_custbw(*batch, eps=1e-6), rtol=2e-4, atol=2e-4)
    sig = mlstm_siging_parallel__native_custbw(*batch, normalize=False)
    torch.testing.assert_close(M.mlstm(*batch, variant="sig")[0], sig, rtol=2e-4, atol=2e-4)
    rows, state = inputs(3), states(3)
    theirs, (c_, n_, m_) = mlstm_recurrent_step__native(*rows[:3], rows[3][..., None], rows[4][..., None], state[0], state[1], state[2][..., None])
    h = M.mlstm_step(*rows, *state, i32(0, 1, 2))
    for ours, other in zip((h, *state), (theirs, c_, n_, m_[..., 0]), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [7, 40])
def test_equals_the_xlstm_of_transformers(tokens):
    xlstm = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if xlstm.external_xlstm:
        pytest.skip("transformers uses the xlstm package instead of its own functions")
    batch = [x.unflatten(0, (2, tokens)).transpose(1, 2).contiguous() for x in inputs(2 * tokens, dk=16, dv=32)]
    theirs, (c_, n_, m_) = xlstm.mlstm_recurrent_sequence_native(*batch, return_last_states=True, eps=1e-6)
    h, C, n, m = M.mlstm(*batch)
    for ours, other in zip((h, C, n, m), (theirs, c_, n_, m_.reshape(m.shape)), strict=True):
        torch.testing.assert_close(ours, other, rtol=2e-4, atol=2e-4)
