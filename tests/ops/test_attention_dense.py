"""Attention over plain tensors: what the op table's cases cannot see. Bits against paged attention and neighbours, poison, other oracles."""

from __future__ import annotations

import math

import pytest
import torch
from stretto.ops import attention, ref
from stretto.ops.table import Make

from tests.oracle import same_bits

NAN = float("nan")


def qkv(rows: int = 70, keys: int = 300, heads: int = 6, kv_heads: int = 2, head_dim: int = 64, batch: int = 1, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = ((batch, rows, heads, head_dim), (batch, keys, kv_heads, head_dim), (batch, keys, kv_heads, head_dim))
    return [torch.randn(*s, generator=g).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (50, None), (None, 7.0)])
def test_rows_have_the_bits_of_paged_attention(isa, dtype, window, softcap):
    q, k_pages, v_pages, table, cu_q, cached, scale = attention.make_paged(
        Make(), [(0, 130), (237, 71), (5, 1)], heads=6, kv_heads=2, dtype=dtype, page_size=16
    )
    q = q.to(dtype).float()
    want = attention.paged(q, k_pages, v_pages, table, cu_q, cached, scale, window, softcap)
    for r in range(3):
        rows = slice(int(cu_q[r]), int(cu_q[r + 1]))
        positions = torch.arange(int(cached[r]) + rows.stop - rows.start)
        page = table[r, positions // 16].long()
        k, v = k_pages[page, :, :, positions % 16], v_pages[page, :, positions % 16]
        out, _ = attention.dense(q[None, rows].to(dtype), k[None], v[None], scale, True, window, softcap)
        assert same_bits(out[0], want[rows].to(dtype))


def test_a_row_does_not_depend_on_batch_or_other_rows(isa):
    q, k, v = qkv(rows=200, keys=530, batch=3)
    out, lse = attention.dense(q, k, v, causal=True)
    for b, first, count in [(0, 0, 1), (1, 96, 7), (2, 199, 1), (1, 0, 200)]:
        keys = 530 - 200 + first + count
        one, one_lse = attention.dense(q[b : b + 1, first : first + count], k[b : b + 1, :keys], v[b : b + 1, :keys], causal=True)
        assert same_bits(one[0], out[b, first : first + count])
        assert same_bits(one_lse[0], lse[b, first : first + count])


def test_packed_sequences_have_the_bits_of_single_ones(isa):
    q, k, v = qkv(rows=60, keys=400)
    cu_q, cu_k = torch.tensor([0, 7, 7, 57], dtype=torch.int32), torch.tensor([3, 13, 20, 390], dtype=torch.int32)
    out, lse = attention.dense(q, k, v, causal=True, cu_q=cu_q, cu_k=cu_k)
    for s in range(3):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        one, one_lse = attention.dense(q[:, rows], k[:, keys], v[:, keys], causal=True)
        assert same_bits(one, out[:, rows])
        assert same_bits(one_lse, lse[:, rows])
    assert (out[:, 57:] == 0).all()
    assert (lse[:, 57:] == -math.inf).all()


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_what_a_row_does_not_see_does_not_reach_it(isa, value, dtype, head_dim):
    q, k, v = qkv(rows=40, keys=40, head_dim=head_dim, dtype=dtype)
    want, want_lse = attention.dense(q, k, v, causal=True)
    for poisoned in (k, v):
        poisoned[:, 23, 1] = value
    got, lse = attention.dense(q, k, v, causal=True)
    assert same_bits(got[:, :23], want[:, :23])
    assert same_bits(lse[:, :23], want_lse[:, :23])
    assert same_bits(got[:, :, :3], want[:, :, :3])  # heads of the other kv head
    assert not got[:, 23:, 3:].isfinite().all(-1).any()


def test_equals_torch():
    q, k, v = qkv(rows=150, keys=150)
    want = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention.dense(q, k, v, causal=True)[0].double(), want.transpose(1, 2), atol=3e-6, rtol=0)


def test_result_has_the_order_of_strides_of_q():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    out, _ = attention.dense(q, k, v)
    assert out.stride() == q.stride()
    assert same_bits(out, attention.dense(*(x.contiguous() for x in (q, k, v)))[0])


def test_large_scores_do_not_overflow():
    q, k, v = qkv(rows=3, keys=70)
    out, lse = attention.dense(100 * q, 100 * k, v)
    assert out.isfinite().all()
    want, want_lse = ref.attention.dense(100 * q.double(), 100 * k.double(), v.double())
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), want, atol=5e-3, rtol=0)


def test_gradient_is_that_of_the_reference():
    leaves = [x.double().float().requires_grad_() for x in qkv(rows=5, keys=9, head_dim=16)]
    copies = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = attention.dense(*leaves, causal=True)
    (out.square().sum() + lse.sum()).backward()
    q, k, v = (x.transpose(1, 2) for x in copies)
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    scores = (16**-0.5 * q @ k.mT).masked_fill(~ref.attention.dense_sees(5, 9, True, None), -math.inf)
    ((scores.softmax(-1) @ v).square().sum() + scores.logsumexp(-1).sum()).backward()
    for got, want in zip(leaves, copies, strict=True):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-4)


class TestMergeStates:
    def test_joining_parts_gives_the_whole(self, isa):
        q, k, v = qkv(rows=20, keys=300)
        want, want_lse = attention.dense(q, k, v)
        parts = [attention.dense(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 100), (100, 100), (100, 300))]
        out, lse = parts[0][0][0], parts[0][1][0]
        for other, other_lse in parts[1:]:
            out, lse = attention.merge_states(out, lse, other[0], other_lse[0])
        torch.testing.assert_close(out, want[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(lse, want_lse[0], atol=1e-5, rtol=0)

    @pytest.mark.cuda_kernels("merge_states")
    def test_an_empty_side_changes_no_bit(self, isa):
        a, lse = torch.randn(3, 2, 24), torch.randn(3, 2)
        empty, minus = torch.full_like(a, NAN), torch.full_like(lse, -math.inf)
        for got in (attention.merge_states(a, lse, empty, minus), attention.merge_states(empty, minus, a, lse)):
            assert same_bits(got[0], a)
            assert same_bits(got[1], lse)
        both = attention.merge_states(empty, minus, empty, minus)
        assert (both[0] == 0).all()
        assert (both[1] == -math.inf).all()

    @pytest.mark.cuda_kernels("merge_states")
    def test_nan_stays_in_its_row(self, isa):
        a, b, lse_a, lse_b = torch.randn(3, 2, 24), torch.randn(3, 2, 24), torch.randn(3, 2), torch.randn(3, 2)
        lse_b[1, 0] = NAN
        out, lse = attention.merge_states(a, lse_a, b, lse_b)
        assert out[1, 0].isnan().all()
        assert lse.isnan().sum() == 1
        assert out.isnan().sum() == 24


class TestSums:
    def test_columns_and_diagonals_equal_the_matrix(self, isa):
        q, k, v = qkv(rows=100, keys=330, batch=2)
        _, lse = attention.dense(q, k, v, causal=True)
        columns, diagonals = attention.sums(q, k, lse, causal=True, diagonals=True)
        scores = q.double().transpose(1, 2) @ k.double().repeat_interleave(3, 2).permute(0, 2, 3, 1) / 8
        a = scores.masked_fill(~ref.attention.dense_sees(100, 330, True, None), -math.inf).softmax(-1)
        torch.testing.assert_close(columns.double(), a.sum(2), atol=1e-5, rtol=0)
        for distance in (0, 1, 64, 229, 230, 329):
            want = a.diagonal(330 - 100 - distance, 2, 3).sum(-1)
            torch.testing.assert_close(diagonals[..., 329 - distance].double(), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(columns.sum(-1), torch.full((2, 6), 100.0), atol=1e-3, rtol=0)
        assert (diagonals[..., 330:] == 0).all()  # the future

    def test_an_entry_does_not_depend_on_the_batch(self, isa):
        q, k, v = qkv(rows=30, keys=40, batch=3)
        _, lse = attention.dense(q, k, v)
        whole = attention.sums(q, k, lse)[0]
        assert same_bits(attention.sums(q[1:2], k[1:2], lse[1:2])[0], whole[1:2])

    def test_segment_mass_of_the_last_query_chooses_a_prompt(self):
        q, k, v = qkv(rows=1, keys=90)
        k[:, 30:60] += 3 * q.reshape(1, 1, 2, 3, 64).mean(3)
        _, lse = attention.dense(q, k, v)
        mass = attention.sums(q, k, lse)[0].mean(1).unflatten(1, (3, 30)).sum(2)
        assert int(mass.argmax()) == 1
        torch.testing.assert_close(mass.sum(1), torch.ones(1))


class TestProbs:
    def test_output_has_the_bits_of_dense_and_rows_sum_to_one(self, isa):
        q, k, v = qkv(rows=100, keys=330)
        out, lse, probs = attention.with_probs(q, k, v, causal=True)
        want, want_lse = attention.dense(q, k, v, causal=True)
        assert same_bits(out, want)
        assert same_bits(lse, want_lse)
        torch.testing.assert_close(probs.sum(-1), torch.ones(1, 6, 100))
        assert (probs[0, :, torch.arange(99), torch.arange(231, 330)] == 0).all()  # the key behind each query

    def test_applied_to_its_own_values_they_give_the_output(self, isa):
        q, k, v = qkv(rows=40, keys=330)
        out, _, probs = attention.with_probs(q, k, v, causal=True)
        torch.testing.assert_close(attention.apply_probs(probs, v), out, atol=1e-6, rtol=0)

    def test_a_row_does_not_depend_on_others_and_unweighted_values_are_not_read(self, isa):
        probs, v = torch.randn(2, 6, 90, 300).relu(), torch.randn(2, 300, 2, 40)
        want = attention.apply_probs(probs, v)
        assert same_bits(attention.apply_probs(probs[1:, :, 17:18], v[1:])[0, 0], want[1, 17])
        probs[..., 70] = 0
        want = attention.apply_probs(probs, v)
        v[:, 70] = float("nan")
        assert same_bits(attention.apply_probs(probs, v), want)
