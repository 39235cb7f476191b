"""The scan family beyond its table rows: what must agree to the bit, what must not be read, where NaN may go, and independent oracles."""

from __future__ import annotations

import pytest
import torch
from stretto.ops import _backend, ref, scan
from stretto.ops._check import FLOATS
from stretto.ops.scan.cases import ring_rows, selective_case, ssd_case
from stretto.ops.step import capture
from stretto.ops.table import Make
from torch import Tensor

from tests.oracle import same_bits

native = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def conv_inputs(tokens: int, dtype: torch.dtype = torch.float32, channels: int = 37):
    make = Make()
    return make.randn(tokens, channels, dtype=dtype), make.randn(channels, 4), make.randn(channels)


class Conv:
    """The three ops behind one face: rows in, outputs and states out."""

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.x, self.w, self.b = conv_inputs(tokens, dtype)
        self.state = Make(1).randn(1, 37, 3)
        self.rows = (self.x,)

    def sequence(self, state: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
        return scan.causal_conv1d(self.x[i:j], self.w, self.b, "silu", state)

    def step(self, state: Tensor, rows: Tensor, **kwargs) -> Tensor:
        return scan.causal_conv1d_step(self.x[rows], state, self.w, self.b, "silu", **kwargs)

    def replay(self, state: Tensor, rows: Tensor, n: Tensor) -> None:
        scan.causal_conv1d_replay(state, self.x, rows, n)


class Selective:
    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.inputs = selective_case(Make(), tokens, 36, 16, 2, dtype)
        self.state = Make(1).randn(1, 36, 16)

    def at(self, rows: Tensor) -> tuple[Tensor, ...]:
        u, dt, a, b, c, d, z, bias = self.inputs
        return u[rows], dt[rows], a, b[rows], c[rows], d, z[rows], bias, True

    def sequence(self, state: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
        return scan.selective_scan(*self.at(torch.arange(i, j)), state)

    def step(self, state: Tensor, rows: Tensor, **kwargs) -> Tensor:
        return scan.selective_scan_step(state, *self.at(rows), **kwargs)

    def replay(self, state: Tensor, rows: Tensor, n: Tensor) -> None:
        u, dt, a, b, _, _, _, bias = self.inputs
        scan.selective_scan_replay(state, u, dt, a, b, rows, n, bias, True)


class Ssd(Selective):
    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.inputs = ssd_case(Make(), tokens, 4, 18, 40, 2, dtype)
        self.state = Make(1).randn(1, 4, 18, 40)

    def sequence(self, state: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:  # the form that may be cut anywhere
        after = state.clone()
        return self.step(after, torch.arange(i, j), cu_seqlens=ring_rows.cu(j - i)), after

    def step(self, state: Tensor, rows: Tensor, **kwargs) -> Tensor:
        return scan.ssd_step(state, *self.at(rows), **kwargs)

    def replay(self, state: Tensor, rows: Tensor, n: Tensor) -> None:
        x, dt, a, b, _, _, _, bias = self.inputs
        scan.ssd_replay(state, x, dt, a, b, rows, n, bias, True)


families = pytest.mark.parametrize("family", [Conv, Selective, Ssd])


@families
@dtypes
@pytest.mark.parametrize("cuts", [[1], [64], [3, 4, 70], [65, 130], list(range(1, 140))], ids=lambda c: f"{len(c)}-{c[0]}")
def test_any_split_and_stepping_give_the_same_bits(family, dtype, cuts, isa):
    f = family(140, dtype)
    whole, last = f.sequence(f.state, 0, 140)
    state, parts = f.state, []
    for i, j in zip([0, *cuts], [*cuts, 140], strict=True):
        y, state = f.sequence(state, i, j)
        parts.append(y)
    assert same_bits(torch.cat(parts), whole)
    assert same_bits(state, last)
    state = f.state.clone()
    steps = [f.step(state, torch.tensor([t])) for t in range(140)]
    assert same_bits(torch.cat(steps), whole)
    assert same_bits(state, last)


@families
@dtypes
@pytest.mark.parametrize("accepted", [0, 1, 3, 5])
def test_verify_then_replay_equals_never_having_drafted(family, dtype, accepted, isa):
    f = family(12, dtype)
    plain = f.state.clone()
    want = torch.cat([f.step(plain, torch.tensor([t])) for t in range(accepted)]) if accepted else None
    state = f.state.clone()
    got = f.step(state, torch.arange(5), cu_seqlens=ring_rows.cu(5), update=False)
    assert same_bits(state, f.state)
    f.replay(state, torch.arange(6, dtype=torch.int32)[None], torch.tensor([accepted], dtype=torch.int32))
    assert same_bits(state, plain)
    if want is not None:
        assert same_bits(got[:accepted], want)
    assert same_bits(f.step(state, torch.tensor([7])), f.step(plain, torch.tensor([7])))


@families
@dtypes
def test_a_path_through_a_tree_is_a_chain(family, dtype, isa):
    f = family(12, dtype)
    parent = torch.tensor([-1, 0, 0, 1, 2, 4, -1, 3], dtype=torch.int32)
    tree = f.step(f.state.clone(), torch.arange(8), cu_seqlens=ring_rows.cu(8), parent=parent, update=False)
    for path in ([0, 1, 3, 7], [0, 2, 4, 5], [6]):
        chain = f.step(f.state.clone(), torch.tensor(path), cu_seqlens=ring_rows.cu(len(path)))
        assert same_bits(tree[path], chain)


@families
def test_rows_do_not_depend_on_neighbours(family, isa):
    f = family(12, torch.float32)
    rows, slots = torch.arange(12), torch.tensor([4, 0, 2], dtype=torch.int32)
    states = torch.cat([f.state * s for s in range(5)])
    together = states.clone()
    y = f.step(together, rows, slots=slots, cu_seqlens=ring_rows.cu(7, 0, 5))
    alone = states.clone()
    assert same_bits(f.step(alone, rows[:7], slots=slots[:1], cu_seqlens=ring_rows.cu(7)), y[:7])
    assert same_bits(f.step(alone, rows[7:], slots=slots[2:], cu_seqlens=ring_rows.cu(5)), y[7:])
    assert same_bits(together, alone)
    assert same_bits(together[[0, 1, 3]], states[[0, 1, 3]])


def test_packed_sequences_equal_separate_ones(isa):
    u, dt, a, b, c, d, z, bias = selective_case(Make(), 90, 36, 16, 2, torch.float32)
    h0 = Make(1).randn(4, 36, 16)
    y, last = scan.selective_scan(u, dt, a, b, c, d, z, bias, True, h0, ring_rows.cu(5, 70, 0, 15))
    for s, (i, j) in enumerate([(0, 5), (5, 75), (75, 75), (75, 90)]):
        one, state = scan.selective_scan(u[i:j], dt[i:j], a, b[i:j], c[i:j], d, z[i:j], bias, True, h0[s : s + 1])
        assert same_bits(one, y[i:j])
        assert same_bits(state[0], last[s])
    assert same_bits(last[2], h0[2])
    x, dt, a, b, c, d, z, bias = ssd_case(Make(), 90, 4, 18, 40, 2, torch.float32)
    y, last = scan.ssd(x, dt, a, b, c, d, z, bias, True, None, ring_rows.cu(5, 70, 15), 16)
    for s, (i, j) in enumerate([(0, 5), (5, 75), (75, 90)]):
        one, state = scan.ssd(x[i:j], dt[i:j], a, b[i:j], c[i:j], d, z[i:j], bias, True, None, None, 16)
        assert same_bits(one, y[i:j])
        assert same_bits(state[0], last[s])


@pytest.mark.parametrize("chunk", [1, 16, 64, 256])
def test_ssd_chunks(chunk, isa):
    """Every chunk size means the same; a cut at a multiple of the chunk changes no bit."""
    x, dt, a, b, c, d, z, bias = ssd_case(Make(), 300, 4, 18, 40, 2, torch.float32)
    y, last = scan.ssd(x, dt, a, b, c, d, z, bias, True, None, None, chunk)
    exact, exact_last = ref.scan.ssd(*(t.double() for t in (x, dt, a, b, c, d, z, bias)), True)
    assert (y - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (last - exact_last).abs().max() < 1e-5 * exact_last.abs().max()
    cut = 256 if chunk == 256 else 3 * chunk
    head, state = scan.ssd(x[:cut], dt[:cut], a, b[:cut], c[:cut], d, z[:cut], bias, True, None, None, chunk)
    tail, state = scan.ssd(x[cut:], dt[cut:], a, b[cut:], c[cut:], d, z[cut:], bias, True, state, None, chunk)
    assert same_bits(torch.cat([head, tail]), y)
    assert same_bits(state, last)


def test_ssd_keeps_its_precision_where_decay_is_strong(isa):
    """Differences of the running sum are taken of integers and fractions apart: a plain float sum of -6000 would err by 2^-11."""
    x, dt, a, b, c, *_ = ssd_case(Make(), 256, 2, 16, 16, 1, torch.float32)
    dt = 1.5 + dt.abs()
    exact, _ = ref.scan.ssd(*(t.double() for t in (x, dt, a, b, c)))
    y, _ = scan.ssd(x, dt, a, b, c, chunk=256)
    assert (y - exact).abs().max() < 2e-6 * exact.abs().max()


def test_nan_stays_in_its_place(isa):
    u, dt, a, b, c, d, z, bias = selective_case(Make(), 100, 36, 16, 2, torch.float32)
    bounds = ring_rows.cu(40, 60)
    clean, _ = scan.selective_scan(u, dt, a, b, c, d, z, bias, True, None, bounds)
    u[50, 3], b[60, 1, 2] = torch.nan, torch.nan
    y, last = scan.selective_scan(u, dt, a, b, c, d, z, bias, True, None, bounds)
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[50:, 3], hit[60:, 18:] = True, True
    assert torch.equal(y.isnan(), hit)
    assert same_bits(y[~hit], clean[~hit])
    assert not last[0].isnan().any()
    x, dt, a, b, c, d, z, bias = ssd_case(Make(), 100, 4, 18, 40, 2, torch.float32)
    clean, _ = scan.ssd(x, dt, a, b, c, d, z, bias, True, None, bounds, 16)
    x[53, 1, 5], b[60, 1, 2], dt[70, 0], c[45, 0, 0] = torch.nan, torch.nan, torch.inf, torch.nan
    y, _ = scan.ssd(x, dt, a, b, c, d, z, bias, True, None, bounds, 16)
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[53:, 1, 5], hit[60:, 2:], hit[70:, 0], hit[45, :2] = True, True, True, True
    assert not y[~hit].isnan().any()
    assert same_bits(y[~hit], clean[~hit])
    assert y[hit].isnan().all()


def test_conv_nan_reaches_its_window(isa):
    x, w, bias = conv_inputs(300, channels=300)
    x[130, 7] = torch.nan
    y, _ = scan.causal_conv1d(x, w, bias, "silu", None, ring_rows.cu(132, 168))
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[130:132, 7] = True  # the sequence ends before the window does
    assert torch.equal(y.isnan(), hit)


@families
def test_states_in_any_layout_give_the_same_bits(family, isa):
    f = family(6, torch.float32)
    plain = f.state.clone()
    want = f.step(plain, torch.arange(6), cu_seqlens=ring_rows.cu(6))
    turned = f.state.mT.contiguous().mT
    spread = torch.full((*f.state.shape[:-1], 2 * f.state.shape[-1]), torch.nan)[..., ::2].copy_(f.state)
    for state in (turned, spread):
        assert same_bits(f.step(state, torch.arange(6), cu_seqlens=ring_rows.cu(6)), want)
        assert same_bits(state, plain)


@native
@families
def test_captured_steps_read_their_integers_anew_and_survive_nonsense(family):
    f = family(6, torch.float32)
    rows = f.at(torch.arange(6)) if family is not Conv else None
    slots, bounds = torch.tensor([0, -1], dtype=torch.int32), ring_rows.cu(1, 0)
    states = torch.cat([f.state, 2 * f.state])
    out = torch.full_like(f.step(f.state.clone(), torch.arange(6), cu_seqlens=ring_rows.cu(6)), 7.0)

    def run() -> None:
        if rows is None:
            scan.causal_conv1d_step(f.x, states, f.w, f.b, "silu", slots, bounds, out=out)
        else:
            (scan.ssd_step if family is Ssd else scan.selective_scan_step)(states, *rows, slots, bounds, out=out)

    step = capture(run)
    fresh = torch.cat([f.state, 2 * f.state])
    states.copy_(fresh)
    slots.copy_(torch.tensor([1, 0]))
    bounds.copy_(torch.tensor([0, 2, 5]))
    step.run(2)
    want = f.step(fresh, torch.arange(5), slots=slots.clone(), cu_seqlens=ring_rows.cu(2, 3))
    assert same_bits(out[:5], want)
    assert same_bits(states, fresh)
    assert bool((out[5] == 7).all())  # no sequence has it
    extremes = [-(2**31), -1, 0, 2, 3, 2**31 - 1]
    for slot in extremes:
        for first in extremes:
            for last in extremes:
                slots.copy_(torch.tensor([slot, 1]))
                bounds.copy_(torch.tensor([0, first, last]))
                step.run(1)


@native
def test_what_is_not_named_is_not_read():
    f = Selective(8, torch.float32)
    rows = torch.tensor([[2, 5, 6, 6]], dtype=torch.int32)
    state, clean = f.state.clone(), f.state.clone()
    f.replay(clean, rows, torch.tensor([2], dtype=torch.int32))
    for t in f.inputs[:2]:
        t[[0, 1, 3, 4, 6, 7]] = torch.nan
    f.replay(state, rows, torch.tensor([2], dtype=torch.int32))
    assert same_bits(state, clean)


# Oracles that share no code with ours: the plain PyTorch forms of transformers and mambapy.


def test_mamba1_against_transformers_and_mambapy(isa):
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    u, dt, a, b, c, d, z, bias = (t.double() for t in selective_case(Make(), 2 * 50, 48, 16, 1, torch.float32))
    rows = [t.unflatten(0, (2, 50)) for t in (u, dt, b[:, 0], c[:, 0], z)]
    turned = [t.mT for t in rows]
    args = (turned[0], turned[1], a, turned[2], turned[3], d, turned[4], bias)
    single = [t.float() for t in (rows[0], rows[1], a, rows[2][:, :, None], rows[3][:, :, None], d, rows[4], bias)]
    y, last = scan.selective_scan(*single, True)
    wants = [mamba.mamba_selective_scan(*args, delta_softplus=True, return_last_state=True)]
    if mamba.is_mambapy_available():
        wants.append(mamba.mamba_selective_scan(*args, delta_softplus=True, return_last_state=True, use_mambapy=True))
    for want, want_last in wants:
        torch.testing.assert_close(y.double(), want.mT, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last.double(), want_last, rtol=1e-5, atol=1e-5)
    state, next_state = last.clone(), last.double()
    got = scan.selective_scan_step(state, *(t[:, 0] if t.dim() > 2 else t for t in single), True)
    want = mamba.mamba_selective_state_update(next_state, rows[0][:, 0], rows[1][:, 0], a, rows[2][:, 0], rows[3][:, 0], d, bias, True, rows[4][:, 0])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), next_state, rtol=1e-5, atol=1e-5)


def test_mamba2_against_transformers(isa):
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    x, dt, a, b, c, d, _, bias = (t.unflatten(0, (2, 45)) if t.dim() > 1 else t for t in ssd_case(Make(), 90, 4, 18, 40, 2, torch.float32))
    h0 = Make(1).randn(2, 4, 18, 40)
    y, last = scan.ssd(x, dt, a, b, c, d, None, bias, True, h0, None, 16)
    want, want_last = mamba2.mamba2_chunk_scan(x, dt, a, b, c, 16, d, bias, h0, True, return_final_states=True)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)  # the oracle computes in float32 too
    torch.testing.assert_close(last, want_last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_a_whole_mixer_of_transformers_prefill_then_steps(version):
    """A layer with random weights, its convolution and scan replaced by ours: the prompt in one go, then token by token."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if version == 1:
        config = transformers.MambaConfig(hidden_size=24, num_hidden_layers=1, vocab_size=32, state_size=16)
        model = transformers.MambaForCausalLM(config).eval()
    else:
        config = transformers.Mamba2Config(
            hidden_size=32, num_hidden_layers=1, vocab_size=32, state_size=16, num_heads=4, head_dim=16, expand=2, n_groups=2, chunk_size=8
        )
        model = transformers.Mamba2ForCausalLM(config).eval()
    layer = model.backbone.layers[0].mixer
    x = torch.randn(1, 21, config.hidden_size)
    with torch.no_grad():
        want = layer(x)
        got = mixer1(layer, x[0], 13) if version == 1 else mixer2(layer, x[0], 13)
    torch.testing.assert_close(got, want[0], rtol=1e-4, atol=1e-5)


def mixer1(m, x: Tensor, prompt: int) -> Tensor:
    inner, rank, states = m.intermediate_size, m.time_step_rank, m.ssm_state_size
    u, z = m.in_proj(x).split(inner, -1)
    weight, a = m.conv1d.weight[:, 0], -m.A_log.exp()

    def rates(v: Tensor):
        dt, b, c = m.x_proj(v).split([rank, states, states], -1)
        return dt @ m.dt_proj.weight.T, b[:, None], c[:, None]

    v, window = scan.causal_conv1d(u[:prompt], weight, m.conv1d.bias, "silu")
    dt, b, c = rates(v)
    y, state = scan.selective_scan(v, dt, a, b, c, m.D, z[:prompt], m.dt_proj.bias, True)
    out = [y]
    for t in range(prompt, len(x)):
        v = scan.causal_conv1d_step(u[t : t + 1], window, weight, m.conv1d.bias, "silu")
        dt, b, c = rates(v)
        out.append(scan.selective_scan_step(state, v, dt, a, b, c, m.D, z[t : t + 1], m.dt_proj.bias, True))
    return m.out_proj(torch.cat(out))


def mixer2(m, x: Tensor, prompt: int) -> Tensor:
    inner, groups, states, heads = m.intermediate_size, m.n_groups, m.ssm_state_size, m.num_heads
    z, xbc, dt = m.in_proj(x).split([inner, inner + 2 * groups * states, heads], -1)
    weight, a = m.conv1d.weight[:, 0], -m.A_log.exp()

    def parts(v: Tensor):
        v, b, c = v.split([inner, groups * states, groups * states], -1)
        return v.unflatten(1, (heads, -1)), b.unflatten(1, (groups, -1)), c.unflatten(1, (groups, -1))

    v, window = scan.causal_conv1d(xbc[:prompt], weight, m.conv1d.bias, "silu")
    v, b, c = parts(v)
    y, state = scan.ssd(v, dt[:prompt], a, b, c, m.D, None, m.dt_bias, True, chunk=8)
    out = [y]
    for t in range(prompt, len(x)):
        v, b, c = parts(scan.causal_conv1d_step(xbc[t : t + 1], window, weight, m.conv1d.bias, "silu"))
        out.append(scan.ssd_step(state, v, dt[t : t + 1], a, b, c, m.D, None, m.dt_bias, True))
    return m.out_proj(m.norm(torch.cat(out).flatten(1), z))


# Gradients: the reference is right (gradcheck), and the kernels' gradients are the reference's.


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.detach().clone().requires_grad_() for t in tensors]


def test_gradcheck_of_the_references():
    bounds = ring_rows.cu(3, 0, 2)
    make = Make()
    conv = leaves(make.randn(5, 3).double(), make.randn(3, 4).double(), make.randn(3).double(), make.randn(3, 3, 3).double())
    assert torch.autograd.gradcheck(lambda x, w, b, i: ref.scan.causal_conv1d(x, w, b, "silu", i, bounds), conv)
    one = leaves(*(t.double() for t in selective_case(make, 5, 4, 3, 2, torch.float32)), make.randn(3, 4, 3).double())
    assert torch.autograd.gradcheck(lambda *t: ref.scan.selective_scan(*t[:8], True, t[8], bounds), one)
    two = leaves(*(t.double() for t in ssd_case(make, 5, 2, 3, 4, 1, torch.float32)), make.randn(3, 2, 3, 4).double())
    assert torch.autograd.gradcheck(lambda *t: ref.scan.ssd(*t[:8], True, t[8], bounds), two)


def test_training_through_the_ops_follows_the_references(isa):
    make, bounds = Make(), ring_rows.cu(40, 0, 30)
    calls = [
        (scan.causal_conv1d, ref.scan.causal_conv1d, [*conv_inputs(70), make.randn(3, 37, 3)], lambda f, t: f(*t[:3], "silu", t[3], bounds)),
        (scan.selective_scan, ref.scan.selective_scan, [*selective_case(make, 70, 36, 16, 2, torch.float32), make.randn(3, 36, 16)],
         lambda f, t: f(*t[:8], True, t[8], bounds)),
        (scan.ssd, ref.scan.ssd, [*ssd_case(make, 70, 4, 18, 20, 2, torch.float32), make.randn(3, 4, 18, 20)],
         lambda f, t: f(*t[:8], True, t[8], bounds, *([16] if t[0].dim() == 3 else []))),
    ]  # fmt: skip
    for ours, reference, tensors, call in calls:
        grads = []
        for function, inputs in ((ours, leaves(*tensors)), (reference, leaves(*(t.double() for t in tensors)))):
            y, last = call(function, inputs)
            grads.append(torch.autograd.grad((y.sin().sum() + last.cos().sum()), inputs))
        for got, want in zip(*grads, strict=True):
            assert (got - want).abs().max() <= 2e-5 * max(1.0, want.abs().max().item())


def test_gradients_of_some_inputs_of_one_result_and_of_a_batch(isa):
    u, dt, a, b, c, *_ = selective_case(Make(), 12, 20, 4, 1, torch.float32)
    batch = [t.unflatten(0, (2, 6)) for t in (u, dt, b, c)]
    u, a = leaves(batch[0], a)
    y, _ = scan.selective_scan(u, batch[1], a, batch[2], batch[3])
    got = torch.autograd.grad(y.square().sum(), (u, a))
    y, _ = ref.scan.selective_scan(u, batch[1], a, batch[2], batch[3])
    want = torch.autograd.grad(y.square().sum(), (u, a))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_refused():
    x, w, _ = conv_inputs(5)
    (x,) = leaves(x)
    y, _ = scan.causal_conv1d(x, w)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(g.sum(), x)


def test_compiled_training_step_runs_on_the_kernels():
    x, w, bias = conv_inputs(20)
    w, bias = leaves(w, bias)

    def loss(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return scan.causal_conv1d(x, w, bias, "silu")[0].square().sum()

    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x, w, bias), (w, bias))
    torch.testing.assert_close(got, torch.autograd.grad(loss(x, w, bias), (w, bias)))
