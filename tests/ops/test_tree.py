"""ancestor_mask, walk, select_top and verify: plain Python oracles, trees of up to 300 nodes, laws by frequency, rows alone, malformed trees."""

from __future__ import annotations

import random

import numpy as np
import pytest
import stretto.ops as ops
import torch
from scipy import stats
from stretto.ops import _backend
from stretto.ops.tree import ancestor_mask, select_top, verify, walk
from torch import Tensor

from tests.ops.fuzzing import Arena
from tests.oracle import same_bits

pytestmark = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")

NAN, INF = float("nan"), float("inf")
KINDS = ("chain", "star", "binary", "random", "deep")
POISON = (2**31 - 1, -(2**31), -7)  # behind the nodes in use


def parents(kind: str, n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    make = {"chain": lambda i: i - 1, "star": lambda i: 0, "binary": lambda i: (i - 1) // 2, "random": lambda i: rng.randrange(i),
            "deep": lambda i: max(0, i - rng.randint(1, 3))}[kind]  # fmt: skip
    return [-1, *(make(i) for i in range(1, n))][:n]


def batch(sizes: list[int], slots: int, kind: str, vocab: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, parent, n) of trees with these sizes; unused slots hold nonsense."""
    rng = random.Random(slots)
    parent = torch.tensor([[rng.choice(POISON) for _ in range(slots)] for _ in sizes], dtype=torch.int32)
    tokens = torch.tensor([[rng.choice(POISON) for _ in range(slots)] for _ in sizes], dtype=torch.int32)
    for b, n in enumerate(sizes):
        parent[b, :n] = torch.tensor(parents(kind, n, seed=b), dtype=torch.int32)
        tokens[b, :n] = torch.tensor([rng.randrange(vocab) for _ in range(n)], dtype=torch.int32)
    return tokens, parent, torch.tensor(sizes, dtype=torch.int32)


def path_to(parent: list[int], node: int) -> list[int]:
    path = [node]
    while parent[path[0]] >= 0:
        path.insert(0, parent[path[0]])
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 2, 63, 64, 65, 128, 129, 256, 300])
def test_masks_name_the_ancestors(kind, slots, isa):
    sizes = sorted({0, 1, slots // 2, slots - 1, slots})
    _, parent, n = batch(sizes, slots, kind)
    words = -(-slots // 64)
    given = torch.full((len(sizes), slots, words), -1, dtype=torch.int64), torch.full((len(sizes), slots), -9, dtype=torch.int32)
    mask, depth = ancestor_mask(parent, n, mask=given[0], depth=given[1])
    for b, size in enumerate(sizes):
        for i in range(slots):
            bits = sum((int(w) & (2**64 - 1)) << (64 * k) for k, w in enumerate(mask[b, i]))
            path = path_to(parent[b].tolist(), i) if i < size else []
            assert bits == sum(1 << node for node in path), (b, i)
            assert depth[b, i] == max(len(path) - 1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_walk_follows_the_target(kind, isa):
    for slots, vocab in ((1, 2), (9, 2), (64, 3), (200, 2)):
        sizes = [0, 1, slots // 2, slots, slots, slots]
        tokens, parent, n = batch(sizes, slots, kind, vocab)
        wish = torch.randint(-1, vocab, (6, slots), generator=torch.Generator().manual_seed(slots)).int()
        path, accepted, bonus = walk(wish, tokens, parent, n)
        for b, size in enumerate(sizes):
            want = [0] if size else []
            while want:
                node = want[-1]
                child = next((i for i in range(size) if parent[b, i] == node and tokens[b, i] == wish[b, node] >= 0), None)
                if child is None:
                    break
                want.append(child)
            assert path[b].tolist() == want + [-1] * (slots - len(want))
            assert accepted[b] == max(len(want) - 1, 0)
            assert bonus[b] == (int(wish[b, want[-1]]) if want else -1)


def best_tree(scores: list[float], parent: list[int], keep: int) -> list[int]:
    """Add the candidate with the best least score on its path, one after the other."""
    least = [min((scores[i] for i in path_to(parent, c)[1:]), default=INF) if 0 in path_to(parent, c) else -INF for c in range(len(parent))]
    least = [-INF if any(scores[i] != scores[i] for i in path_to(parent, c)[1:]) else s for c, s in enumerate(least)]
    order = sorted(range(1, len(parent)), key=lambda c: (-least[c], c))
    return sorted([0, *(c for c in order if least[c] > -INF)][:keep])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", ["different", "ties", "infinite", "huge", "tiny"])
def test_select_top_keeps_the_best_tree(kind, values, isa):
    """Among them scores with which the search for the cut must not run in circles: +inf beside finite ones, both ends of the range of float."""
    rng = random.Random(1)
    make = {
        "different": rng.random, "ties": lambda: float(rng.randrange(3)), "infinite": lambda: rng.choice([INF, -INF, NAN, 1.0, 2.0, rng.random()]),
        "huge": lambda: rng.choice([3.4e38, -3.4e38, INF, 1e30 * rng.random()]), "tiny": lambda: 1e-45 * rng.randrange(5),
    }[values]  # fmt: skip
    for count in (1, 2, 40, 49, 70, 700):
        scores, parent = torch.tensor([make() for _ in range(count)]).tolist(), parents(kind, count, seed=count)
        for keep in sorted({1, 2, count // 2 + 1, count, count + 9}):
            got = select_top(torch.tensor([scores]), torch.tensor([parent], dtype=torch.int32), keep)[0].tolist()
            want = best_tree(scores, parent, keep)
            assert got == want + [-1] * (keep - len(want)), (count, keep)


def test_a_tree_of_equal_infinite_scores(isa):
    for value in (INF, 3.4028234663852886e38, -3.4028234663852886e38):
        got = select_top(torch.full((1, 500), value), torch.zeros(1, 500, dtype=torch.int32).index_fill(1, torch.tensor([0]), -1), 100)
        assert got[0].tolist() == list(range(100))


def laws(b: int, nodes: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(nodes, vocab, generator=g)
    return p.softmax(-1).expand(b, -1, -1), (p + torch.randn(nodes, vocab, generator=g)).softmax(-1).expand(b, -1, -1)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("parent", [[-1], [-1, 0], [-1, 0, 0, 0], [-1, 0, 1, 0]], ids=str)
def test_verified_tokens_follow_the_target(parent, replacement, isa):
    """Chi-square over 20,000 seeds: drafts drawn from q, first and second token follow p, whatever was accepted."""
    n, vocab, nodes = 20000, 6, len(parent)
    p, q = laws(n, nodes, vocab, seed=nodes)
    q = q.contiguous()
    generator = np.random.default_rng(0)
    tokens = np.zeros((n, nodes), dtype=np.int32)
    siblings: dict[int, list[int]] = {}
    for i, above in enumerate(parent[1:], 1):
        law = np.repeat(q[0, above].double().numpy()[None], n, 0)
        if not replacement:
            for other in siblings.get(above, []):
                law[np.arange(n), tokens[:, other]] = 0
        law = law.cumsum(1)
        tokens[:, i] = (law <= (generator.random(n) * law[:, -1])[:, None]).sum(1)
        siblings.setdefault(above, []).append(i)
    keys = torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.full((n,), 9, dtype=torch.int32)
    tree = torch.tensor(parent, dtype=torch.int32).expand(n, -1), torch.full((n,), nodes, dtype=torch.int32)
    path, accepted, bonus = verify(p, q, torch.from_numpy(tokens), *tree, *keys, replacement)
    at = path.clamp_min(0).long()
    out = torch.cat([torch.from_numpy(tokens).gather(1, at), torch.full((n, 1), -1)], 1)  # column 0 is the root
    out = out.scatter(1, (accepted + 1).long()[:, None], bonus[:, None].long().to(out.dtype))
    first, second, after = out[:, 1].long(), out[:, 2 if nodes > 1 else 1].long(), path[:, 1] if nodes > 1 else None
    assert stats.chisquare(np.bincount(first, minlength=vocab), n * p[0, 0].double().numpy() / p[0, 0].double().sum().item()).pvalue > 1e-4
    if after is not None:
        for node in range(1, nodes):
            here = second[(after == node) & (accepted >= 1)]
            if len(here) > 500:
                expected = len(here) * p[0, node].double().numpy() / p[0, node].double().sum().item()
                assert stats.chisquare(np.bincount(here, minlength=vocab), expected).pvalue > 1e-4


def test_equal_laws_accept_everything(isa):
    """q = p: the first child is always taken, down to the leaf, and the bonus comes from p."""
    n, nodes = 500, 9
    p, _ = laws(n, nodes, 50, seed=1)
    tokens = torch.cat([torch.zeros(n, 1), torch.multinomial(p.reshape(-1, 50), 1).view(n, nodes)[:, :-1]], 1).int()
    chain = torch.arange(-1, nodes - 1, dtype=torch.int32).expand(n, -1)
    keys = torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int32)
    path, accepted, bonus = verify(p, p, tokens, chain, torch.full((n,), nodes, dtype=torch.int32), *keys)
    assert (accepted == nodes - 1).all()
    assert same_bits(path, torch.arange(nodes, dtype=torch.int32).expand(n, -1).contiguous())
    assert (bonus >= 0).all()


def test_disjoint_laws_accept_nothing(isa):
    n = 300
    p, q = torch.zeros(n, 3, 8), torch.zeros(n, 3, 8)
    p[..., :4], q[..., 4:] = 0.25, 0.25
    tokens = torch.tensor([0, 5, 6], dtype=torch.int32).expand(n, -1)
    keys = torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int32)
    _, accepted, bonus = verify(p, q, tokens, torch.tensor([-1, 0, 0], dtype=torch.int32).expand(n, -1), torch.full((n,), 3).int(), *keys)
    assert not accepted.any()
    assert set(bonus.tolist()) == {0, 1, 2, 3}


def test_results_do_not_depend_on_batch_mates_or_threads(isa):
    sizes = [70, 0, 1, 33, 70, 12] * 4
    tokens, parent, n = batch(sizes, 70, "random", vocab=5)
    p, q = (x.contiguous() for x in laws(len(sizes), 70, 5, seed=2))
    wish = torch.randint(-1, 5, (len(sizes), 70)).int()
    keys = torch.arange(len(sizes)), torch.arange(len(sizes)) * 7, torch.arange(len(sizes)).int()
    calls = [lambda s: ancestor_mask(parent[s], n[s]), lambda s: walk(wish[s], tokens[s], parent[s], n[s]),
             lambda s: verify(p[s], q[s], tokens[s], parent[s], n[s], *(k[s] for k in keys))]  # fmt: skip
    for call in calls:
        ops.set_num_threads(1)
        alone = [torch.cat(parts) for parts in zip(*(call(slice(b, b + 1)) for b in range(len(sizes))), strict=True)]
        for threads in (1, 2):
            ops.set_num_threads(threads)
            for s in (slice(0, None), slice(3, 11)):
                assert all(same_bits(got, want[s]) for got, want in zip(call(s), alone, strict=True))


def test_malformed_trees_in_captured_steps_say_so_and_leave_others_alone(isa):
    """With outputs given nothing is raised: the sequence is marked, its neighbours are right."""
    _, good, n = batch([5, 5, 5], 5, "binary")
    tokens = torch.zeros(3, 5, dtype=torch.int32)
    want = ancestor_mask(good, n)
    for value in (-(2**31), -2, -1, 2, 3, 4, 5, 2**31 - 1):
        for node in range(5):
            parent = good.clone()
            parent[1, node] = value
            if value < node and (value >= 0) == (node > 0) and value >= -1:
                continue
            mask, depth = torch.full((3, 5, 1), -1, dtype=torch.int64), torch.full((3, 5), -9, dtype=torch.int32)
            ancestor_mask(parent, n, mask=mask, depth=depth)
            assert not mask[1].any()
            assert (depth[1] == -1).all()
            assert same_bits(mask[::2], want[0][::2])
            out = torch.full((3, 5), -9, dtype=torch.int32), torch.full((3,), -9, dtype=torch.int32), torch.full((3,), -9, dtype=torch.int32)
            walk(tokens, tokens, parent, n, path=out[0], accepted=out[1], bonus=out[2])
            assert out[1].tolist() == [2, -1, 2]
            assert (out[0][1] == -1).all()


def test_memory_beside_the_trees_is_not_touched(isa):
    """Sizes, parents and tokens of any value, in memory that ends at guard pages; outputs given, so that nothing is raised."""
    tokens, parent, n = (Arena().place(t, True) for t in batch([66, 3, 66], 66, "random"))
    mask, depth = Arena().place(torch.zeros(3, 66, 2, dtype=torch.int64), True), Arena().place(torch.zeros(3, 66, dtype=torch.int32), True)
    out = [Arena().place(torch.zeros(shape, dtype=torch.int32), True) for shape in ((3, 66), (3,), (3,))]
    rng = random.Random(0)
    before = [t.clone() for t in (tokens, parent, n)]
    for _ in range(2000):
        for t in (tokens, parent, n):
            t.view(-1)[rng.randrange(t.numel())] = rng.choice((-(2**31), -2, -1, 0, 1, 64, 65, 66, 67, 2**31 - 1))
        ancestor_mask(parent, n, mask=mask, depth=depth)
        walk(tokens, tokens, parent, n, path=out[0], accepted=out[1], bonus=out[2])
        for t, old in zip((tokens, parent, n), before, strict=True):
            t.copy_(old)
