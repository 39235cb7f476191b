"""Sparse prefill, lists of keys, and grids: equal to dense attention over the same keys, bit for bit where that is promised."""

from __future__ import annotations

import math

import pytest
import torch
from stretto.ops import attention, ref
from stretto.ops.table import Make

from tests.ops.test_attention_dense import qkv
from tests.oracle import same_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_keys_have_the_bits_of_dense(isa, dtype):
    q, k, v = qkv(rows=150, keys=400, dtype=dtype)
    lists = attention.key_lists(torch.ones(1, 1, 3, 400, dtype=torch.bool), 64)
    assert lists.intervals.tolist() == [[0, 400]] * 3
    for causal in (False, True):
        for got, want in zip(attention.sparse_prefill(q, k, v, *lists, causal=causal), attention.dense(q, k, v, causal=causal), strict=True):
            assert same_bits(got, want)


def test_a_block_has_the_bits_of_dense_over_its_gathered_keys(isa):
    q, k, v = qkv(rows=100, keys=700, heads=4, kv_heads=2)
    g = torch.Generator().manual_seed(1)
    sees = torch.rand(1, 4, 4, 700, generator=g) < 0.5
    sees[..., 300:500] = True
    lists = attention.key_lists(sees, 32)
    out, lse = attention.sparse_prefill(q, k, v, *lists, causal=False)
    for h in range(4):
        for b in range(4):
            rows, keys = slice(32 * b, 32 * b + 32), sees[0, h, b].nonzero()[:, 0]
            one, one_lse = attention.dense(q[:, rows, h : h + 1], k[:, keys, h // 2 : h // 2 + 1], v[:, keys, h // 2 : h // 2 + 1])
            assert same_bits(out[:, rows, h : h + 1], one)
            assert same_bits(lse[:, rows, h : h + 1], one_lse)


@pytest.mark.parametrize("heads", [1, 4])
def test_equals_masked_sdpa(isa, heads):
    q, k, v = qkv(rows=200, keys=260, heads=4, kv_heads=2)
    g = torch.Generator().manual_seed(2)
    sees = torch.rand(1, heads, 7, 260, generator=g) < 0.2
    lists = attention.key_lists(sees, 30)
    mask = sees.repeat_interleave(30, 2)[:, :, :200] & ref.attention.dense_sees(200, 260, True, None)
    assert torch.equal(ref.attention.lists_sees(*lists, 200, 260, True), mask)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    out, lse = attention.sparse_prefill(q, k, v, *lists)
    torch.testing.assert_close(out.double(), want.nan_to_num(), atol=3e-6, rtol=0)
    assert torch.equal((lse == -math.inf).transpose(1, 2), (~mask.any(-1)).expand(1, 4, 200))


def test_keys_of_other_blocks_are_not_read(isa):
    q, k, v = qkv(rows=64, keys=64)
    sees = torch.zeros(1, 1, 2, 64, dtype=torch.bool)
    sees[..., 0, :20], sees[..., 1, 20:50] = True, True
    lists = attention.key_lists(sees, 32)
    want, _ = attention.sparse_prefill(q, k, v, *lists, causal=False)
    k[:, 20:], v[:, 20:] = float("nan"), float("nan")
    got, _ = attention.sparse_prefill(q, k, v, *lists, causal=False)
    assert same_bits(got[:, :32], want[:, :32])
    assert got[:, 32:].isnan().all()


def test_mass_kept_is_read_off_the_lse():
    q, k, v = qkv(rows=64, keys=64)
    lists = attention.vertical_slash_index(q, k, 5, 9, sinks=2, local=4, block=16)
    kept = (attention.sparse_prefill(q, k, v, *lists)[1] - attention.dense(q, k, v, causal=True)[1]).exp()
    sees = ref.attention.lists_sees(*lists, 64, 64, True)
    a = (
        (q.transpose(1, 2) @ k.repeat_interleave(3, 2).permute(0, 2, 3, 1) / 8)
        .masked_fill(~ref.attention.dense_sees(64, 64, True, None), -math.inf)
        .softmax(-1)
    )
    torch.testing.assert_close(kept.transpose(1, 2), (a * sees).sum(-1), atol=1e-5, rtol=0)


class TestLines:
    @pytest.mark.parametrize(("rows", "keys", "block"), [(64, 64, 16), (50, 130, 16), (1, 40, 64), (33, 33, 1), (0, 9, 8)])
    def test_lists_equal_a_set_built_by_hand(self, rows, keys, block):
        g = torch.Generator().manual_seed(3)
        for verticals, slashes in [(5, 7), (0, 3), (4, 0), (keys, keys)]:
            lines = [
                torch.stack([torch.randperm(keys, generator=g)[:n].sort().values for _ in range(6)]).reshape(2, 3, n).int()
                for n in (verticals, slashes)
            ]
            lists = attention.lines_to_lists(*lines, rows, keys, block)
            got = ref.attention.lists_sees(*lists, rows, keys, False)
            want = ref.attention.lines_seen(*lines, rows, keys, block).repeat_interleave(block, 2)[:, :, :rows]
            assert torch.equal(got, want)
            q, k, v = qkv(rows=rows, keys=keys, heads=3, kv_heads=1, batch=2, head_dim=16)
            attention.sparse_prefill(q, k, v, *lists)  # disjoint and growing, or it would refuse them

    def test_refuses_lines_out_of_order(self):
        good, bad = torch.tensor([[[1, 3]]], dtype=torch.int32), torch.tensor([[[3, 3]]], dtype=torch.int32)
        for verticals, slashes, name in (
            (bad, good, "verticals"),
            (good, bad, "slashes"),
            (good + 7, good, "verticals"),
            (good, good - 2, "slashes"),
        ):
            with pytest.raises(ValueError, match=f"lines_to_lists: {name}"):
                attention.lines_to_lists(verticals, slashes, 8, 8)

    def test_index_finds_planted_lines(self):
        q, k, _ = qkv(rows=256, keys=256, heads=2, kv_heads=1, head_dim=64)
        q[:] = 0.1 * q
        q[..., 0] = 4.0
        k[:, 77, :, 0] += 12.0  # every query looks at key 77
        lists = attention.vertical_slash_index(q, k, 3, 2, sinks=1, local=1, block=32)
        sees = ref.attention.lists_sees(*lists, 256, 256, True)
        assert sees[0, :, 77:, 77].all()
        assert sees[0, :, :, 0].all()
        assert sees.diagonal(0, 2, 3).all()

    def test_full_budget_is_dense(self):
        q, k, v = qkv(rows=70, keys=120)
        lists = attention.vertical_slash_index(q, k, 1000, 1000)
        assert same_bits(attention.sparse_prefill(q, k, v, *lists)[0], attention.dense(q, k, v, causal=True)[0])

    @pytest.mark.parametrize(("change", "message"), [({"num_slash": 0}, "num_slash: 0"), ({"last": 0}, "last: 0"), ({"block": -1}, "block: -1")])
    def test_refuses(self, change, message):
        q, k, _ = qkv(rows=8, keys=8)
        with pytest.raises(ValueError, match=f"vertical_slash_index: {message}"):
            attention.vertical_slash_index(q, k, **{"num_vertical": 2, "num_slash": 2} | change)


class TestGrid:
    def test_full_has_the_bits_of_dense(self, isa):
        q, k, v, grid = attention.make_grid(Make(), 2, (3, 10, 12), 4, 2, 64)
        for got, want in zip(attention.attention3d(q, k, v, grid), attention.dense(q, k, v), strict=True):
            assert same_bits(got, want)

    def test_every_small_grid_window_and_stride(self):
        gen = torch.Generator().manual_seed(5)
        for n in range(60):
            grid = [int(x) for x in torch.randint(1, 8, (3,), generator=gen)]
            window = [int(torch.randint(0, g + 1, (1,), generator=gen)) for g in grid]
            stride = [int(torch.randint(1, (w or 1) + 1, (1,), generator=gen)) for w in window]
            more = int(torch.randint(0, 3, (1,), generator=gen))
            q, k, v, _ = attention.make_grid(Make(n), 1, tuple(grid), 2, 1, 16, key_frames=grid[0] + more)
            for causal in (False, True):
                got, lse = attention.attention3d(q, k, v, grid, window, stride, causal)
                want, want_lse = ref.attention.attention3d(q, k, v, grid, window, stride, causal)
                torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
                torch.testing.assert_close(lse, want_lse, atol=2e-6, rtol=1e-6)

    def test_every_query_sees_exactly_the_window(self):
        for n in range(1, 9):
            for w in range(1, n + 1):
                for s in range(1, w + 1):
                    assert (ref.attention.seen_along(n, n, w, s, False).sum(1) == w).all()

    def test_neighbours_outside_the_window_do_not_reach_a_row(self, isa):
        q, k, v, grid = attention.make_grid(Make(), 1, (3, 6, 18), 2, 2, 64)
        want, _ = attention.attention3d(q, k, v, grid, [1, 3, 3])
        k.unflatten(1, grid)[0, 1, 3, 9] = float("nan")
        v.unflatten(1, grid)[0, 1, 3, 9] = float("inf")
        got, _ = attention.attention3d(q, k, v, grid, [1, 3, 3])
        flat = ref.attention.grid_sees(grid, 3, [1, 3, 3], [1, 1, 1], False)[:, (1 * 6 + 3) * 18 + 9]
        assert 9 <= flat.sum() < 20
        assert not got[0, flat].isfinite().any()
        assert same_bits(got[0, ~flat], want[0, ~flat])

    def test_a_ring_of_frames_gives_the_bits_of_frames_in_order(self, isa):
        q, k, v, grid = attention.make_grid(Make(), 2, (2, 4, 4), 2, 2, 72, key_frames=5)
        want = attention.attention3d(q, k, v, grid, [0, 1, 1], causal=True)
        order = torch.tensor([[7, 2, 9, 0, 4], [1, 3, 8, 5, 6]], dtype=torch.int32)
        pools = [torch.full((1, 10, 16, 2, 72), float("nan")) for _ in range(2)]
        for pool, x in zip(pools, (k, v), strict=True):
            pool[0, order.long()] = x.unflatten(1, (5, 16))
        got = attention.attention3d(q, *(p.flatten(1, 2) for p in pools), grid, [0, 1, 1], causal=True, frames=order)
        for g, w in zip(got, want, strict=True):
            assert same_bits(g, w)

    def test_a_cache_of_frames_gives_the_bits_of_the_whole(self, isa):
        q, k, v, grid = attention.make_grid(Make(), 1, (6, 3, 5), 2, 1, 32)
        rope = attention.rope3d_table(grid, (16, 8, 8))
        whole, _ = attention.attention3d(q, k, v, grid, causal=True, rope=rope)
        for first, count in ((0, 2), (2, 3), (5, 1)):
            keys = (first + count) * 15
            part, _ = attention.attention3d(q[:, first * 15 : keys], k[:, :keys], v[:, :keys], [count, 3, 5], causal=True, rope=rope[:keys])
            assert same_bits(part, whole[:, first * 15 : keys])

    def test_a_later_frame_changes_no_earlier_one(self, isa):
        q, k, v, grid = attention.make_grid(Make(), 1, (4, 3, 5), 2, 1, 32)
        want, _ = attention.attention3d(q, k, v, grid, causal=True)
        k[:, 45:], v[:, 45:] = float("nan"), float("nan")
        assert same_bits(attention.attention3d(q, k, v, grid, causal=True)[0][:, :45], want[:, :45])

    def test_rotation_keeps_relative_places(self):
        q, k, v, grid = attention.make_grid(Make(), 1, (3, 4, 4), 1, 1, 24)
        a, b = (attention.rope3d_table(grid, (8, 8, 8), first_frame=f) for f in (0, 11))
        torch.testing.assert_close(
            attention.attention3d(q, k, v, grid, rope=a)[0], attention.attention3d(q, k, v, grid, rope=b)[0], atol=2e-6, rtol=0
        )
