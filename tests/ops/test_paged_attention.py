"""attention.paged: what the op table cannot see. A row's bits depend on its query and the keys it sees, and on nothing else."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import stretto.ops as ops
import torch
from stretto.ops import _backend, attention
from stretto.ops.attention import PAGES
from stretto.ops.step import capture
from torch import Tensor

from tests.ops.fuzzing import Arena
from tests.ops.paging import NAN, Seq, arguments, attend, make_seq
from tests.oracle import same_bits

pytestmark = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")

PAGE_SIZES = (1, 7, 16, 64, 256)
HEADS = [(2, 2, 64), (3, 1, 96), (8, 2, 80), (8, 1, 128), (1, 1, 256)]  # groups of 1, 3, 4, 8


def dense(s: Seq, window: int | None = None, softcap: float | None = None) -> Tensor:
    """torch's attention in float64 with the mask written out, for a causal sequence."""
    k, v = s.k.double(), s.v.double()
    if s.k_scale is not None and s.v_scale is not None:
        k, v = k * s.k_scale.double()[..., None], v * s.v_scale.double()[..., None]
    position, key = torch.arange(s.cached, len(k))[:, None], torch.arange(len(k))
    sees = (key <= position) & (key > position - (window or len(k) + 1))
    q, k, v = (t.transpose(0, 1) for t in (s.q.double(), k, v))
    group = q.shape[0] // k.shape[0]
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=sees, enable_gqa=True)[0].transpose(0, 1)
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * q.shape[-1] ** -0.5
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ v.repeat_interleave(group, 0)).transpose(0, 1)


def one_by_one(s: Seq, **options) -> Tensor:
    """Every row as a decode step of its own."""
    return torch.cat([attend([s.rows(i, i + 1)], **options)[0] for i in range(s.cached, s.cached + len(s.q))])


@pytest.mark.parametrize("dtype", PAGES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_against_torch(heads, kv_heads, head_dim, dtype, isa):
    for seed, (cached, new) in enumerate([(0, 1), (0, 70), (255, 2), (256, 1), (300, 40), (513, 1)]):
        s = make_seq(seed, cached, new, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        for window, softcap in ((None, None), (1, None), (33, None), (None, 5.0), (260, 30.0)):
            torch.testing.assert_close(attend([s], window=window, softcap=softcap)[0].double(), dense(s, window, softcap), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", PAGES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_rows_do_not_depend_on_chunks_pages_mates_or_threads(heads, kv_heads, head_dim, dtype, isa):
    whole = make_seq(1, 0, 291, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    mates = [make_seq(s, c, n, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype) for s, c, n in [(2, 700, 1), (3, 0, 100), (4, 5, 0)]]
    ops.set_num_threads(1)
    want = one_by_one(whole)
    for threads in (1, 2):
        ops.set_num_threads(threads)
        for page_size in PAGE_SIZES:
            assert same_bits(attend([whole], page_size, seed=page_size)[0], want), page_size
        for cuts in ([0, 1, 2, 9, 64, 191, 291], [0, 96, 192, 288, 291], [0, 255, 256, 257, 291]):
            for place in (0, 2):
                for begin, end in pairwise(cuts):
                    batch = [*mates[:place], whole.rows(begin, end), *mates[place:]]
                    assert same_bits(attend(batch, 16)[place], want[begin:end]), (begin, end, place)


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (5, None), (255, 9.0), (256, None), (257, None), (None, 2.5)])
def test_rows_with_a_window_or_softcap_do_not_depend_on_chunks(window, softcap, isa):
    whole = make_seq(5, 0, 530, heads=3, kv_heads=1, dtype=torch.float16)
    options = {"window": window, "softcap": softcap}
    want = one_by_one(whole, **options)
    for threads in (1, 2):
        ops.set_num_threads(threads)
        for page_size in (7, 64):
            assert same_bits(attend([whole], page_size, **options)[0], want)
            for begin, end in pairwise([0, 100, 256, 300, 530]):
                assert same_bits(attend([whole.rows(begin, end)], page_size, **options)[0], want[begin:end])


def parents(kind: str, n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    make = {"chain": lambda i: i - 1, "star": lambda i: 0, "binary": lambda i: (i - 1) // 2, "random": lambda i: rng.randrange(i),
            "deep": lambda i: max(0, i - rng.randint(1, 3))}[kind]  # fmt: skip
    return [-1, *(make(i) for i in range(1, n))]


def leaves(parent: list[int]) -> list[int]:
    return sorted(set(range(len(parent))) - set(parent))


TREES = [("chain", 1), ("chain", 40), ("star", 9), ("star", 256), ("binary", 31), ("binary", 63), ("random", 64), ("random", 65), ("deep", 130),
         ("random", 200), ("chain", 256), ("deep", 256)]  # fmt: skip


@pytest.mark.parametrize(("kind", "nodes"), TREES)
def test_tree_nodes_have_the_bits_of_plain_decoding(kind, nodes, isa):
    """Each path from the root to a leaf, decoded as a plain sequence: the same bits at each of its nodes."""
    parent = parents(kind, nodes, seed=nodes)
    for case, (cached, page_size, dtype, window) in enumerate([(0, 16, torch.float32, None), (37, 7, torch.float16, None), (250, 64, torch.int8, None),
                                                              (300, 1, torch.bfloat16, 20), (256, 256, torch.float16, 300)]):  # fmt: skip
        heads, kv_heads, head_dim = HEADS[case]
        tree = make_seq(nodes + case, cached, nodes, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, parent=parent)
        mate = make_seq(9, 20, 3, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        for threads in (1, 2):
            ops.set_num_threads(threads)
            got = attend([mate, tree], page_size, seed=case, window=window)[1]
            paths = [tree.path(leaf) for leaf in leaves(parent)[:64]]
            for (path, _), want in zip(paths, attend([plain for _, plain in paths], 16, window=window), strict=True):
                assert same_bits(got[path], want), path


def test_tree_softcap_and_two_trees_in_a_batch(isa):
    trees = [make_seq(s, c, n, dtype=torch.float16, parent=parents(kind, n, s)) for s, c, n, kind in [(1, 19, 70, "random"), (2, 270, 12, "binary")]]
    for tree, got in zip(trees, attend([trees[0], make_seq(3, 8, 2, dtype=torch.float16), trees[1]], 16, softcap=3.0)[::2], strict=True):
        assert tree.parent is not None
        for leaf in leaves(list(tree.parent)):
            path, plain = tree.path(leaf)
            assert same_bits(got[path], attend([plain], 64, softcap=3.0)[0])


def test_bits_of_a_mask_that_are_no_ancestors_mean_nothing():
    """Bits at and behind the next node: a mask may be wider than its tree and hold anything there."""
    tree = make_seq(1, 21, 6, dtype=torch.float16, parent=parents("binary", 6))
    args = arguments([tree])
    want = attention.paged(**args)
    wide = torch.full((6, 4), -1, dtype=torch.int64)
    for i in range(6):
        wide[i, 0] = args["mask"][i, 0] | -(1 << (i + 1))
    assert same_bits(attention.paged(**{**args, "mask": wide}), want)


def test_a_window_of_one_gives_the_row_its_own_value(isa):
    s = make_seq(1, 300, 20, heads=4, kv_heads=2)
    assert same_bits(attend([s], window=1)[0], s.v[300:].repeat_interleave(2, 1))


def test_a_window_at_least_as_long_as_the_sequence_changes_nothing(isa):
    s = make_seq(1, 290, 20)
    for window in (310, 311, 10**6, 2**31 - 1, 2**63 - 1):
        assert same_bits(attend([s], window=window)[0], attend([s])[0])


@pytest.mark.parametrize("dtype", PAGES[:3], ids=str)
def test_nan_and_infinity_reach_the_rows_that_see_them(dtype, isa):
    s = make_seq(1, 0, 80, dtype=dtype)
    clean = attend([s])[0]
    for at, value in ((40, NAN), (0, torch.inf), (79, -torch.inf)):
        for name in ("k", "v"):
            broken = getattr(s, name).clone()
            broken[at, 1] = value  # kv head 1: heads 2 and 3
            got = attend([Seq(**{**s.__dict__, name: broken})])[0]
            assert same_bits(got[:at], clean[:at])
            assert same_bits(got[:, :2], clean[:, :2])
            if name == "v" or value != value:
                assert not got[at:, 2:].isfinite().any()
    hidden = Seq(**{**s.__dict__, "k": s.k.clone(), "v": s.v.clone()})
    hidden.k[:20], hidden.v[:20] = NAN, NAN
    assert same_bits(attend([hidden], window=5)[0][24:], attend([s], window=5)[0][24:])


def test_large_scores_and_denormals(isa):
    """A key far ahead takes all the weight; keys far behind add exactly nothing; denormal values come through."""
    s = make_seq(1, 0, 300, heads=2, kv_heads=1)
    s.q[:] = 1e4
    s.k[:], s.k[123] = 0, 1e4
    got = attend([s])[0]
    assert same_bits(got[123:], s.v[123].expand(177, 2, 64))
    tiny = Seq(torch.zeros(1, 2, 64), torch.zeros(1, 1, 64), torch.full((1, 1, 64), 1e-41), 0)
    assert same_bits(attend([tiny])[0], torch.full((1, 2, 64), 1e-41))
    torch.testing.assert_close(attend([make_seq(1, 200, 9, scale=50)])[0].double(), dense(make_seq(1, 200, 9, scale=50)), rtol=1e-3, atol=1e-3)


def test_strided_queries_and_outputs(isa):
    seqs = [make_seq(1, 30, 5), make_seq(2, 0, 9)]
    want = torch.cat(attend(seqs))
    args = arguments(seqs)
    q = args.pop("q")
    qkv = torch.full((14, 8 * 64 + 64), NAN)
    qkv[:, 64 : 5 * 64] = q.flatten(1)
    view = qkv[:, 64 : 5 * 64].unflatten(1, (4, 64))
    assert same_bits(attention.paged(view, **args), want)
    assert same_bits(attention.paged(q.transpose(0, 1).contiguous().transpose(0, 1), **args), want)  # heads outermost
    assert same_bits(attention.paged(q.repeat_interleave(2, 2)[..., ::2], **args), want)
    wide = torch.full((14, 300), NAN)
    attention.paged(q, **args, out=wide[:, 10:266].unflatten(1, (4, 64)))
    assert same_bits(wide[:, 10:266].unflatten(1, (4, 64)), want)
    assert wide[:, :10].isnan().all()
    assert wide[:, 266:].isnan().all()


@pytest.mark.parametrize("path", ["native", "reference"])
def test_rows_of_no_sequence_are_left_alone(path, isa, monkeypatch):
    if path == "reference":
        monkeypatch.setattr(_backend, "use_reference", lambda *_: True)
    seqs = [make_seq(1, 30, 5), make_seq(2, 0, 9)]
    args = arguments(seqs)
    args["q"] = torch.cat([args["q"], torch.randn(3, 4, 64)])
    want, out = torch.cat(attend(seqs)), torch.full((17, 4, 64), NAN)
    attention.paged(**args, out=out)
    assert same_bits(out[:14], want)
    assert out[14:].isnan().all()
    out.fill_(NAN)
    args["cu_q"][2], args["table"][1] = -7, -9  # of sequences that are not in use
    attention.paged(**args, out=out, num_seqs=torch.tensor([1], dtype=torch.int32))
    assert same_bits(out[:5], want[:5])
    assert out[5:].isnan().all()


def test_a_replayed_step_reads_its_numbers_anew_and_survives_any(isa):
    """Values that were checked when the step was recorded may be anything when it is replayed; the memory ends at guard pages."""
    seqs = [make_seq(1, 30, 5, dtype=torch.float16), make_seq(2, 9, 6, dtype=torch.float16, parent=parents("binary", 6))]
    args = {k: Arena().place(v, True) if isinstance(v, Tensor) else v for k, v in arguments(seqs).items()}
    num_seqs, out = torch.tensor([2], dtype=torch.int32), Arena().place(torch.full((11, 4, 64), NAN), True)
    step = capture(lambda: attention.paged(**args, out=out, num_seqs=num_seqs))
    want = torch.cat(attend(seqs))
    assert same_bits(out, want)
    num_seqs.fill_(1)
    out.fill_(NAN)
    step.run(1)
    assert same_bits(out[:5], want[:5])
    assert out[5:].isnan().all()
    num_seqs.fill_(2)
    rng = random.Random(0)
    originals = {n: args[n].clone() for n in ("table", "cu_q", "cached", "mask_start", "mask")}
    for _ in range(3000):
        name = rng.choice(list(originals))
        low, high = (-(2**31), 2**31 - 1) if name != "mask" else (-(2**63), 2**63 - 1)
        args[name].view(-1)[rng.randrange(args[name].numel())] = rng.choice((low, -1, 0, 1, 3, 12, 64, 1000, high))
        num_seqs.fill_(rng.choice((2, 2, 2, low if name != "mask" else -1, -1, 0, 3, 2**31 - 1)))
        step.run(2)
        if rng.random() < 0.3:
            for n, value in originals.items():
                args[n].copy_(value)
    for n, value in originals.items():
        args[n].copy_(value)
    num_seqs.fill_(2)
    step.run(2)
    assert same_bits(out, want)
