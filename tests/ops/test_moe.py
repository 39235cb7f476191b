"""Routing, sorting and dispatch beyond the table: models' own routers, round trips, bits, and solvers against brute force and SciPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from stretto.ops import _backend, moe, quant
from stretto.ops.table import Make

from tests.oracle import same_bits

needs_native = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(tokens: int, experts: int, k: int, seed: int = 0) -> torch.Tensor:
    return moe.topk_route(randn(tokens, experts, seed=seed), k)[1]


def test_router_of_mixtral(isa):
    transformers = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = transformers.MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2)
    router = transformers.MixtralTopKRouter(config)
    router.weight.data.copy_(randn(8, 16))
    x = randn(50, 16, seed=1)
    with torch.no_grad():
        _, want_weights, want_experts = router(x)
        weights, experts = moe.topk_route(x @ router.weight.t(), 2)
    assert torch.equal(experts.long(), want_experts)
    torch.testing.assert_close(weights, want_weights)


def test_router_of_deepseek_v3(isa):
    transformers = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = transformers.DeepseekV3Config(
        hidden_size=16, n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=4, moe_intermediate_size=8
    )
    router = transformers.DeepseekV3TopkRouter(config)
    x, bias = randn(50, 16), 0.1 * randn(64, seed=1)
    router.weight.data.copy_(randn(64, 16, seed=2))
    router.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
        _, want_weights, want_experts = router(x)
        weights, experts = moe.topk_route(x @ router.weight.t(), 6, "sigmoid", True, bias, 8, 4, 2, config.routed_scaling_factor)
    order, want_order = experts.argsort(1), want_experts.argsort(1)  # the model does not sort its choice
    assert torch.equal(experts.gather(1, order).long(), want_experts.gather(1, want_order))
    torch.testing.assert_close(weights.gather(1, order), want_weights.gather(1, want_order))


def test_rows_of_a_routing_do_not_depend_on_each_other(isa):
    logits = randn(300, 40)
    whole = moe.topk_route(logits, 4)
    for row in (0, 17, 299):
        for one, all_rows in zip(moe.topk_route(logits[row : row + 1], 4), whole, strict=True):
            assert same_bits(one[0], all_rows[row])
    with_nan = logits.clone()
    with_nan[5] = torch.nan
    other = moe.topk_route(with_nan, 4)
    assert other[0][5].isnan().all()
    assert other[1][5].tolist() == [0, 1, 2, 3]
    keep = torch.arange(300) != 5
    assert same_bits(other[0][keep], whole[0][keep])
    assert torch.equal(other[1][keep], whole[1][keep])


def test_route_into_given_rows():
    weights, experts = torch.full((5, 2), -7.0), torch.full((5, 2), -7, dtype=torch.int32)
    logits = randn(5, 8)
    moe.topk_route(logits, 2, out=(weights, experts), num_rows=torch.tensor([3], dtype=torch.int32))
    want = moe.topk_route(logits[:3], 2)
    assert torch.equal(experts[:3], want[1])
    assert torch.equal(weights[:3], want[0])
    assert (experts[3:] == -7).all()
    assert (weights[3:] == -7).all()


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_there_and_back(multiple: int, isa):
    """permute then unpermute with weights that sum to one gives x again; padding rows are zeros."""
    x, experts = randn(200, 37), routed(200, 8, 4)
    found = moe.sort_by_expert(experts, 8, multiple)
    rows = moe.permute(x, found.pairs, 4)
    for e in range(8):
        first, last = int(found.offsets[e]), int(found.offsets[e + 1])
        count = int(found.counts[e])
        assert first % multiple == 0
        assert last - first == -(-count // multiple) * multiple
        assert (experts.flatten()[found.pairs[first : first + count].long()] == e).all()
        assert (found.pairs[first : first + count].diff() > 0).all()
        assert (rows[first + count : last] == 0).all()
    assert torch.equal(moe.unpermute(rows, found.rows, torch.full((200, 4), 0.25)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unpermute_skips_what_is_nowhere(dtype: torch.dtype, isa):
    y = torch.full((4, 70), torch.nan, dtype=dtype)
    y[1] = 2.0
    out = moe.unpermute(y, torch.tensor([[1, -1], [-1, -1]], dtype=torch.int32), torch.tensor([[0.5, torch.nan], [torch.nan, torch.nan]]))
    assert (out[0] == 1).all()
    assert (out[1] == 0).all()


def test_many_tokens_sort_like_numpy():
    """Several chunks: the stable order of NumPy's sort."""
    experts = routed(20000, 16, 2)
    found = moe.sort_by_expert(experts, 16)
    assert np.array_equal(found.pairs.numpy(), np.argsort(experts.numpy().ravel(), kind="stable"))


@pytest.mark.parametrize("capacity", [None, 5])
def test_dispatch_moves_every_row_that_has_room(capacity: int | None):
    """Simulated ranks: what arrives, computed and added up, is what one device would compute."""
    tokens, experts, k, devices = 64, 16, 4, 4
    x, chosen = randn(tokens, 6), routed(tokens, experts, k)
    device_of = torch.arange(experts, dtype=torch.int32) // 4
    source_of = torch.arange(tokens, dtype=torch.int32) // 16
    plan = moe.plan_dispatch(chosen, device_of, devices, source_of, devices, capacity)
    sent = moe.permute(x, plan.tokens, 1)
    assert torch.equal(plan.recv_offsets[:, -1], plan.counts.sum(0))
    received = [
        torch.cat([sent[int(plan.offsets[s * devices + d]) : int(plan.offsets[s * devices + d + 1])] for s in range(devices)]) for d in range(devices)
    ]
    for d in range(devices):
        for s in range(devices):
            first, count = int(plan.recv_offsets[d, s]), int(plan.counts[s, d])
            begin = int(plan.offsets[s * devices + d])
            assert torch.equal(received[d][first : first + count], sent[begin : begin + count])
            of_pair = plan.tokens[begin : begin + count]
            assert (source_of[of_pair.long()] == s).all()
            assert (of_pair.diff() > 0).all()
            assert capacity is None or count <= capacity
    for t in range(tokens):
        for j in range(k):
            slot = int(plan.slots[t, j])
            if slot >= 0:
                key = int(torch.searchsorted(plan.offsets, slot, right=True)) - 1
                assert int(plan.tokens[slot]) == t
                assert key == int(source_of[t]) * devices + int(device_of[chosen[t, j]])
    assert capacity is not None or (plan.slots >= 0).all()


def test_coactivation_counts():
    experts = routed(100, 8, 3)
    counts = moe.coactivation(experts, 8)
    for a, b in itertools.product(range(8), repeat=2):
        assert counts[a, b] == sum(a in row and b in row for row in experts.tolist())


@needs_native
@pytest.mark.parametrize("format", ["F32", "BF16", "Q8_0", "Q4_1"])
def test_grouped_rows_have_the_bits_of_linear(format: str, isa):
    make = Make()
    weights = [quant.random_packed(make, format, 64, 96) for _ in range(5)]
    x = randn(40, 96)
    counts = torch.tensor([0, 1, 0, 17, 9, 3], dtype=torch.int32)
    offsets = counts.cumsum(0).int()
    got = moe.grouped_linear(x, offsets, moe.pack_experts(weights))
    for e, w in enumerate(weights):
        for r in range(int(offsets[e]), int(offsets[e + 1])):
            assert same_bits(got[r : r + 1], quant.linear(x[r : r + 1], w))
    assert (got[30:] == 0).all()


@needs_native
def test_expert_mlp(isa):
    make = Make()
    gate, up, down = (make.randn(3, 64, 32), make.randn(3, 64, 32), make.randn(3, 32, 64))
    packed = moe.pack_experts(
        [quant.pack([g.view(torch.uint8), u.view(torch.uint8)], "F32", 32, interleave=True) for g, u in zip(gate, up, strict=True)]
    )
    last = moe.pack_experts([quant.pack(d.contiguous().view(torch.uint8), "F32", 64) for d in down])
    x, offsets = randn(10, 32), torch.tensor([0, 4, 4, 10], dtype=torch.int32)
    got = moe.expert_mlp(x, offsets, packed, last)
    for e, rows in ((0, slice(0, 4)), (2, slice(4, 10))):
        want = (torch.nn.functional.silu(x[rows] @ gate[e].t()) * (x[rows] @ up[e].t())) @ down[e].t()
        torch.testing.assert_close(got[rows], want, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="at 1, expected F32"):
        moe.pack_experts([quant.random_packed(make, "F32", 16, 32), quant.random_packed(make, "F32", 16, 64)])


@needs_native
@pytest.mark.parametrize(("items", "devices"), [(1, 1), (4, 4), (6, 2), (8, 4), (24, 3), (64, 8)])
def test_assignment_is_scipys(items: int, devices: int):
    for seed in range(20):
        score = randn(items, devices, seed=seed).double()
        got = moe.balanced_assignment(score)
        assert torch.equal(got.bincount(minlength=devices), torch.full((devices,), items // devices))
        places = score.repeat_interleave(items // devices, 1).numpy()
        best = places[linear_sum_assignment(places, maximize=True)].sum()
        assert abs(float(score.gather(1, got[:, None].long()).sum()) - best) < 1e-9


def balanced(experts: int, devices: int):
    """Every placement with equally many experts on each device."""
    return (p for p in itertools.product(range(devices), repeat=experts) if all(p.count(d) == experts // devices for d in range(devices)))


@needs_native
@pytest.mark.parametrize(("experts", "devices"), [(4, 2), (6, 3), (8, 2), (8, 4)])
def test_groups_are_those_of_brute_force(experts: int, devices: int):
    found = 0
    for seed in range(40):
        affinity = randn(experts, experts, seed=seed).abs()
        affinity = (affinity + affinity.t()).fill_diagonal_(0)

        def inside(groups, affinity=affinity):
            groups = torch.as_tensor(groups)
            return float(affinity[groups[:, None] == groups[None]].sum())

        best = max(inside(p) for p in balanced(experts, devices))
        got = moe.group_experts(affinity, devices)
        assert torch.equal(got.bincount(minlength=devices), torch.full((devices,), experts // devices))
        found += inside(got) >= best * (1 - 1e-6)
    assert found >= 38  # of 40; local search with restarts


@needs_native
def test_placement_against_brute_force_and_planted_clusters():
    found = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 20, (12, 6), generator=generator, dtype=torch.int32)
        got = moe.place_experts(counts, 2, slack=1.0, starts=8)  # a slack of 1 caps nothing on two devices
        best = max(
            torch.stack([counts[:, torch.tensor(p) == d].sum(1) for d in range(2)]).max(0).values.sum() for p in balanced(6, 2)
        ) / counts.sum()  # fmt: skip
        assert got.local <= float(best) + 1e-6
        found += got.local >= float(best) * 0.99
    assert found >= 57
    home = torch.arange(400) % 4
    planted = torch.zeros(400, 16, dtype=torch.int32)
    expert_home = torch.randperm(16, generator=torch.Generator().manual_seed(0)) % 4
    planted[home[:, None] == expert_home] = 3
    exact = moe.place_experts(planted, 4)
    assert exact.local == 1.0
    assert exact.imbalance <= 1.05
    again = moe.place_experts(planted, 4)
    assert torch.equal(exact.expert_device, again.expert_device)
    assert torch.equal(exact.token_device, again.token_device)


@needs_native
def test_token_cap_holds_when_all_want_one_device():
    counts = torch.zeros(100, 8, dtype=torch.int32)
    counts[:, 0] = 5
    got = moe.place_experts(counts, 4)
    assert got.imbalance <= 1.06
    unseen = torch.cat([counts, torch.zeros(3, 8, dtype=torch.int32)])
    assert (moe.place_experts(unseen, 4).token_device[100:] == -1).all()


@needs_native
def test_shuffle_keeps_slices_equal():
    wanted = torch.tensor([1, 1, 1, 1, -1, 0, 1], dtype=torch.int32)
    confidence = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.5, 0.5, 0.3])
    order, inverse, moved = moe.shuffle_rows(wanted, 2, confidence)
    assert order.tolist() == [1, 3, 4, 5, 0, 2, 6]
    assert moved == 2
    assert torch.equal(order[inverse.long()], torch.arange(7, dtype=torch.int32))
    assert moe.shuffle_rows(torch.zeros(0, dtype=torch.int32), 3)[2] == 0
    calm = torch.arange(8, dtype=torch.int32).remainder(4)
    assert moe.shuffle_rows(calm, 4)[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moe.balanced_assignment(torch.zeros(5, 2)), "devices: 2, expected a divisor of 5"),
        (lambda: moe.balanced_assignment(torch.full((4, 2), torch.nan)), "score: NaN"),
        (lambda: moe.group_experts(torch.zeros(4, 3), 2), "affinity: shape"),
        (lambda: moe.group_experts(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), 2), "symmetric"),
        (lambda: moe.place_experts(torch.zeros(4, 4, dtype=torch.int32), 2), "at least one positive"),
        (lambda: moe.place_experts(torch.ones(4, 4, dtype=torch.int32), 3), "devices: 3, expected a divisor of 4"),
        (lambda: moe.place_experts(torch.ones(4, 4, dtype=torch.int32), 2, slack=float("nan")), "slack: nan"),
        (lambda: moe.shuffle_rows(torch.zeros(4, dtype=torch.int32), 0), "devices: 0"),
        (lambda: moe.shuffle_rows(torch.zeros(4, dtype=torch.int32), 2, torch.full((4,), torch.nan)), "confidence: NaN"),
        pytest.param(lambda: moe.shuffle_rows(torch.full((4,), 7, dtype=torch.int32), 2), "wanted: 7 at 0, expected -1..1", marks=needs_native),
    ],
)
def test_solvers_refuse_by_name(call, message: str):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
