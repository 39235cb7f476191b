"""rope.append and rope.table: what the op table cannot see; frequencies against transformers, layouts, int8 pages, memory that stays as it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import stretto.ops as ops
import torch
from stretto.ops import _backend, rope
from stretto.ops.attention import PAGES
from stretto.ops.step import capture
from torch import Tensor

from tests.ops.fuzzing import Arena
from tests.oracle import same_bits

pytestmark = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")

NAN = float("nan")


@dataclass(frozen=True)
class Scaling:
    type: str
    factor: float = 4.0
    original_context: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def frequencies(dim: int, theta: float, scaling: Scaling | None) -> Tensor:
    """Angles per position, from the table."""
    table = rope.table(torch.tensor([1]), dim, theta, scaling).double()
    return torch.atan2(table[0, dim // 2 :], table[0, : dim // 2])


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3", "dynamic"])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_are_those_of_transformers(kind, dim, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {"rope_type": kind, "rope_theta": theta, "factor": 4.0, "original_max_position_embeddings": 2048}
    if kind == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=settings)
    if kind == "default":
        want, factor = theta ** -(torch.arange(0, dim, 2).double() / dim), 1.0
    elif kind == "dynamic":  # at 7/4 of the original context it stretches by 4 * 7/4 - 3 = 4, as the fixed "ntk" does everywhere
        want, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=2048 * 7 // 4)
    else:
        want, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    ours = {"default": None, "dynamic": Scaling("ntk")}.get(kind, Scaling(kind, attn_factor=factor))
    torch.testing.assert_close(frequencies(dim, theta, ours), want.double(), rtol=3e-6, atol=1e-12)
    table = rope.table(torch.arange(5), dim, theta, ours)
    torch.testing.assert_close(table[:, : dim // 2].square() + table[:, dim // 2 :].square(), torch.full((5, dim // 2), factor**2), rtol=1e-6, atol=0)


def test_far_positions_keep_their_digits():
    """Angles are formed in float64: at a million, float32 would be off by 0.06."""
    table = rope.table(torch.tensor([1_000_003]), 64, 10000.0)
    exact = 1_000_003 * 10000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    assert same_bits(table[0], torch.cat([exact.cos(), exact.sin()]).float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((63, 1e4), "rope.table: rotary_dim: 63"),
        ((0, 1e4), "rope.table: rotary_dim: 0"),
        ((64, 0.0), "rope.table: theta: 0.0"),
        ((64, NAN), "rope.table: theta: nan"),
        ((64, 1e4, Scaling("ntk", factor=0.0)), "rope.table: scaling: factor 0.0"),
        ((64, 1e4, Scaling("linear", factor=NAN)), "rope.table: scaling: factor nan"),
        ((2, 1e4, Scaling("ntk")), "rope.table: rotary_dim: 2"),
        ((64, 1.0, Scaling("yarn")), "rope.table: theta: 1.0"),
        ((64, 1e4, Scaling("longrope")), "rope.table: scaling: 'longrope'"),
    ],
)
def test_table_refuses(arguments, message):
    with pytest.raises(ValueError) as caught:
        rope.table(torch.arange(3), *arguments)
    assert message in str(caught.value)


@dataclass(frozen=True)
class Setup:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 64
    page_size: int = 16
    pages: int = 9
    dtype: torch.dtype = torch.float32
    order: str = "half"

    def pools(self) -> dict[str, Tensor | None]:
        poison = 77 if self.dtype == torch.int8 else NAN
        plane = (self.pages, self.kv_heads)
        scales = [torch.full((*plane, self.page_size), NAN) for _ in range(2)] if self.dtype == torch.int8 else [None, None]
        return {
            "k_pages": torch.full((*plane, self.head_dim, self.page_size), poison, dtype=self.dtype),
            "v_pages": torch.full((*plane, self.page_size, self.head_dim), poison, dtype=self.dtype), "k_scales": scales[0], "v_scales": scales[1],
        }  # fmt: skip

    def rows(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        qkv = torch.randn(n, (self.heads + 2 * self.kv_heads) * self.head_dim, generator=g)
        return qkv, torch.randint(0, 500, (n,), generator=g).int(), torch.randperm(self.pages * self.page_size, generator=g)[:n].int()

    def append(self, qkv: Tensor, positions: Tensor, slots: Tensor, pools: dict[str, Tensor | None], **more) -> None:
        rope.append(qkv, positions, slots, rope.table(torch.arange(500), self.rotary_dim, 1e4), **pools, num_heads=self.heads,
                    num_kv_heads=self.kv_heads, order=self.order, **more)  # fmt: skip

    def at(self, pools: dict[str, Tensor | None], slots: Tensor) -> list[Tensor]:
        """Keys, values and scales of the slots, [rows, kv_heads, ...]."""
        page, offset = slots.long() // self.page_size, slots.long() % self.page_size
        found = [pools["k_pages"][page, :, :, offset], pools["v_pages"][page, :, offset, :]]
        return found + [pools[n][page, :, offset] for n in ("k_scales", "v_scales") if pools[n] is not None]


def hf_rotate(x: Tensor, positions: Tensor, dim: int) -> Tensor:
    """transformers' rotation (halves), in float64, of x [rows, heads, head_dim]."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = positions.double()[:, None] * 1e4 ** -(torch.arange(0, dim, 2).double() / dim)
    angles = torch.cat([angles, angles], 1)
    part = x[..., :dim].transpose(0, 1)[None].double()
    turned = apply_rotary_pos_emb(part, part, angles.cos()[None], angles.sin()[None])[0][0].transpose(0, 1)
    return torch.cat([turned, x[..., dim:].double()], -1)


@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_both_orders_against_transformers(rotary_dim, isa):
    """GGUF files of Llama hold rows so permuted that neighbours form a pair; with that permutation both orders are the same rotation."""
    pytest.importorskip("transformers")
    half = Setup(rotary_dim=rotary_dim)
    qkv, positions, slots = half.rows(40)
    heads = qkv.unflatten(1, (8, 64))
    order = torch.arange(rotary_dim).view(2, -1).t().flatten()  # 0, half, 1, half + 1, ...
    order = torch.cat([order, torch.arange(rotary_dim, 64)])
    for setup, given, back in (
        (half, heads, torch.arange(64)),
        (Setup(rotary_dim=rotary_dim, order="interleaved"), heads[..., order], order.argsort()),
    ):
        mine, pools = given.clone().flatten(1), setup.pools()
        setup.append(mine, positions, slots, pools)
        k, v = setup.at(pools, slots)
        torch.testing.assert_close(
            mine.unflatten(1, (8, 64))[:, :4][..., back].double(), hf_rotate(heads[:, :4], positions, rotary_dim), rtol=0, atol=2e-6
        )
        torch.testing.assert_close(k[..., back].double(), hf_rotate(heads[:, 4:6], positions, rotary_dim), rtol=0, atol=2e-6)
        assert same_bits(v, given[:, 6:])
        assert same_bits(mine.unflatten(1, (8, 64))[:, 4:], given[:, 4:])  # keys and values of qkv stay


@pytest.mark.parametrize("dtype", PAGES, ids=str)
@pytest.mark.parametrize("order", rope.ORDERS)
def test_a_row_does_not_depend_on_others_pages_or_threads(order, dtype, isa):
    norms = {"q_norm": torch.rand(80) + 0.5, "k_norm": torch.rand(80) + 0.5}
    base = Setup(3, 1, 80, 80, 16, dtype=dtype, order=order)
    qkv, positions, slots = base.rows(90)
    want_q, want_pools = qkv.clone(), base.pools()
    ops.set_num_threads(1)
    for i in range(90):
        base.append(want_q[i : i + 1], positions[i : i + 1], slots[i : i + 1], want_pools, **norms)
    want = base.at(want_pools, slots)
    for threads in (1, 2):
        ops.set_num_threads(threads)
        for page_size in (1, 7, 16, 64, 256):
            setup = Setup(3, 1, 80, 80, page_size, pages=-(-90 // page_size) + 2, dtype=dtype, order=order)
            got, pools = qkv.clone(), setup.pools()
            at = torch.randperm(setup.pages * page_size, generator=torch.Generator().manual_seed(page_size))[:90].int()
            setup.append(got, positions, at, pools, **norms)
            assert same_bits(got, want_q)
            assert all(same_bits(a, b) for a, b in zip(setup.at(pools, at), want, strict=True)), page_size


@pytest.mark.parametrize("dtype", PAGES, ids=str)
def test_only_the_named_slots_are_written(dtype, isa):
    setup = Setup(dtype=dtype, page_size=7)
    qkv, positions, slots = setup.rows(20)
    slots[::4] = -1
    pools = setup.pools()
    setup.append(qkv, positions, slots, pools, num_rows=torch.tensor([13], dtype=torch.int32))
    written = torch.zeros(setup.pages * 7, dtype=torch.bool)
    written[slots[:13][slots[:13] >= 0].long()] = True
    fresh, everywhere = setup.pools(), torch.arange(setup.pages * 7)
    for now, before in zip(setup.at(pools, everywhere), setup.at(fresh, everywhere), strict=True):
        assert same_bits(now[~written], before[~written])
        assert not (now[written] != now[written]).any()
    untouched = setup.rows(20)[0]
    assert same_bits(qkv[13:], untouched[13:])
    assert not same_bits(qkv[:13], untouched[:13])


def test_int8_rows_keep_their_values_to_half_a_step(isa):
    setup = Setup(dtype=torch.int8)
    qkv, positions, slots = setup.rows(50)
    qkv *= torch.logspace(-30, 30, 50)[:, None]
    exact = Setup()
    exact_pools, pools = exact.pools(), setup.pools()
    exact.append(qkv.clone(), positions, slots, exact_pools)
    setup.append(qkv, positions, slots, pools)
    k, v, k_scale, v_scale = setup.at(pools, slots)
    for stored, scale, want in ((k, k_scale, exact.at(exact_pools, slots)[0]), (v, v_scale, exact.at(exact_pools, slots)[1])):
        assert same_bits(scale, want.abs().amax(-1) / 127)
        assert (stored.abs().amax(-1) == 127).all()  # the largest value takes the whole range
        assert ((stored.double() * scale[..., None] - want.double()).abs() <= 0.5001 * scale.double()[..., None]).all()


def test_int8_of_zero_denormal_and_broken_rows(isa):
    setup = Setup(1, 1, dtype=torch.int8, order="interleaved")
    qkv, _, slots = setup.rows(6)
    qkv[0, 128:] = 0
    qkv[1, 128:], qkv[1, 130] = 0, -1e-44
    qkv[2, 140] = NAN
    qkv[3, 140] = torch.inf
    qkv[4, 128:] = 3e38
    pools = setup.pools()
    setup.append(qkv, torch.zeros(6, dtype=torch.int32), slots, pools)
    _, v, _, v_scale = setup.at(pools, slots)
    assert v_scale[0] == 0
    assert not v[0].any()
    assert (v[1].float() * v_scale[1]).abs().max() <= 1.1e-44
    assert v_scale[2:4].isnan().all()  # the row says that it is broken, wherever it is read
    assert same_bits(v[4].float() * v_scale[4], torch.full((1, 64), 127 * (torch.tensor(3e38) / 127)))
    assert v_scale[5].isfinite()


def test_per_head_norm_against_torch(isa):
    setup = Setup(rotary_dim=64)
    qkv, positions, slots = setup.rows(30)
    qkv[3] *= 1e18
    qkv[4] *= 1e-18
    w = [torch.rand(64) + 0.5 for _ in range(2)]
    heads, pools = qkv.clone().unflatten(1, (8, 64)).double(), setup.pools()
    setup.append(qkv, positions, slots, pools, q_norm=w[0], k_norm=w[1], norm_eps=1e-5)
    q = torch.nn.functional.rms_norm(heads[:, :4], (64,), w[0].double(), 1e-5)
    k = torch.nn.functional.rms_norm(heads[:, 4:6], (64,), w[1].double(), 1e-5)
    torch.testing.assert_close(qkv.unflatten(1, (8, 64))[:, :4].double(), hf_rotate(q, positions, 64), rtol=0, atol=1e-5)
    torch.testing.assert_close(setup.at(pools, slots)[0].double(), hf_rotate(k, positions, 64), rtol=0, atol=1e-5)


def test_strided_rows(isa):
    setup = Setup()
    qkv, positions, slots = setup.rows(11)
    wide, pools, want_pools = torch.full((11, 600), NAN), setup.pools(), setup.pools()
    wide[:, 20:532] = qkv
    setup.append(wide[:, 20:532], positions, slots, pools)
    setup.append(qkv, positions, slots, want_pools)
    assert same_bits(wide[:, 20:532], qkv)
    assert wide[:, :20].isnan().all()
    assert wide[:, 532:].isnan().all()
    assert all(same_bits(a, b) for a, b in zip(setup.at(pools, slots), setup.at(want_pools, slots), strict=True))


def test_a_replayed_step_survives_any_numbers(isa):
    """Positions and slots were checked when the step was recorded; at replay they may be anything. The memory ends at guard pages."""
    setup = Setup(dtype=torch.float16, pages=2)
    pools = {k: None if v is None else Arena().place(v, True) for k, v in setup.pools().items()}
    qkv, positions, slots = (Arena().place(t, True) for t in setup.rows(7))
    count = torch.tensor([7], dtype=torch.int32)
    step = capture(lambda: setup.append(qkv, positions, slots, pools, num_rows=count))
    for number in (-(2**31), -1, 0, 31, 32, 499, 500, 2**31 - 1):
        for value in (positions, slots, count):
            before = value.clone()
            value.fill_(number)
            step.run(1)
            value.copy_(before)
