"""Draft trees: which nodes see which, which candidates are worth a node, and how far the target agrees."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stretto.ops import _backend, ref
from stretto.ops._backend import needs_dispatch
from stretto.ops._check import F32, I32, I64, check, check_tensors
from stretto.ops.table import BadCase, Case, Cost, Make, register


def ancestor_mask(parent: Tensor, n: Tensor, *, mask: Tensor | None = None, depth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bit masks of each node's ancestors, itself included, and its depth.

    Args:
        parent: [B, N] int32: parent[b, 0] = -1 and 0 <= parent[b, i] < i for i < n[b]; slots from n[b] on are not read.
        n: [B] int32: nodes in use, 0 to N; 0 is an idle slot.
        mask, depth: written instead of new tensors (contiguous; int64 [B, N, ceil(N / 64)] and int32 [B, N]), both or none. With them a
            malformed tree does not raise: its mask is 0 and its depth -1 throughout. For captured steps.
    Returns: (mask, depth): bit j of mask[b, i] (64 bits a word, read as unsigned) is set where j is i or its ancestor; unused slots are 0.
    Raises: ValueError naming the argument, what it is and what was expected.
    Reference: ops.ref.tree.ancestor_mask.
    """
    if mask is None and depth is None and needs_dispatch(parent, n):
        result: tuple[Tensor, Tensor] = torch.ops.stretto.tree_ancestor_mask(parent, n)
        return result
    return _ancestor_mask(parent, n, mask=mask, depth=depth)


def _ancestor_mask(parent: Tensor, n: Tensor, *, mask: Tensor | None = None, depth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    op = "tree.ancestor_mask"
    sizes = check_tensors(op, parent=(parent, "B N", I32), n=(n, "B", I32), depth=(depth, "B N", I32), mask=(mask, "B N words", (torch.int64,)))
    words = (sizes["N"] + 63) // 64
    check((mask is None) == (depth is None), f"{op}: mask, depth: one of them, expected both or none")
    check(mask is None or sizes["words"] == words, f"{op}: mask: {sizes.get('words')} words, expected {words} for {sizes['N']} nodes")
    given = mask is not None
    if mask is None or depth is None:
        mask = torch.empty(sizes["B"], sizes["N"], words, dtype=torch.int64, device=parent.device)
        depth = torch.empty_like(parent, memory_format=torch.contiguous_format)
    if _backend.use_reference(op, parent):
        for out, value in zip((mask, depth), ref.tree.ancestor_mask(parent, n), strict=True):
            out.copy_(value)
    else:
        _backend._C.ancestor_mask(parent.contiguous(), n.contiguous(), mask, depth)  # type: ignore[union-attr]
    if not given and sizes["N"] and not depth.is_cuda and bool((depth[:, 0] < 0).any()):
        _refuse(op, parent, n)
    return mask, depth


def _refuse(op: str, parent: Tensor, n: Tensor) -> None:
    """Raise for the first malformed tree."""
    slots = parent.shape[1]
    for b, (row, count) in enumerate(zip(parent.tolist(), n.tolist(), strict=True)):
        check(0 <= count <= slots, f"{op}: n: {count} in sequence {b}, expected 0 to {slots}")
        for i in range(count):
            ok = row[i] == -1 if i == 0 else 0 <= row[i] < i
            check(ok, f"{op}: parent: {row[i]} at node {i} of sequence {b}, expected {'-1' if i == 0 else f'0 to {i - 1}'}")


def walk(
    next: Tensor, tokens: Tensor, parent: Tensor, n: Tensor, *,
    path: Tensor | None = None, accepted: Tensor | None = None, bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Greedy, Point and Coupled acceptance: follow the target's own tokens through the tree as far as it carries them.

    Args:
        next: [B, N] int32: the target's token after each node (argmax, or the draw keyed by the node's position); negative: none.
        tokens, parent: [B, N] int32; n: [B] int32, as in ancestor_mask. Tokens of unused slots are not read; negative ones match nothing.
        path, accepted, bonus: written instead of new tensors, all or none. With them a malformed tree does not raise: accepted is -1.
    Returns: path [B, N] (nodes from 0 on, -1 behind), accepted [B] (nodes on the path without the root), bonus [B] (next at the last node
        of the path; -1 where the target had no token, or the slot is idle), all int32. Of equal siblings the first is taken.
    Raises: ValueError naming the argument, what it is and what was expected.
    Reference: ops.ref.tree.walk.
    """
    if path is None and needs_dispatch(next, tokens, parent, n):
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.stretto.tree_walk(next, tokens, parent, n)
        return result
    return _walk(next, tokens, parent, n, path=path, accepted=accepted, bonus=bonus)


def _walk(
    next: Tensor, tokens: Tensor, parent: Tensor, n: Tensor, *,
    path: Tensor | None = None, accepted: Tensor | None = None, bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "tree.walk"
    check_tensors(op, next=(next, "B N", I32), tokens=(tokens, "B N", I32), parent=(parent, "B N", I32), n=(n, "B", I32), path=(path, "B N", I32),
                  accepted=(accepted, "B", I32), bonus=(bonus, "B", I32))  # fmt: skip
    given = path is not None and accepted is not None and bonus is not None
    check(given or (path is None and accepted is None and bonus is None), f"{op}: path, accepted, bonus: some of them, expected all or none")
    if path is None or accepted is None or bonus is None:
        path, accepted, bonus = torch.empty_like(next, memory_format=torch.contiguous_format), torch.empty_like(n), torch.empty_like(n)
    if _backend.use_reference(op, next):
        for out, value in zip((path, accepted, bonus), ref.tree.walk(next, tokens, parent, n), strict=True):
            out.copy_(value)
    else:
        _backend._C.walk(next.contiguous(), tokens.contiguous(), parent.contiguous(), n.contiguous(), path, accepted, bonus)  # type: ignore[union-attr]
    if not given and not accepted.is_cuda and bool((accepted < 0).any()):
        _refuse(op, parent, n)
    return path, accepted, bonus


def verify(
    p: Tensor, q: Tensor, tokens: Tensor, parent: Tensor, n: Tensor, seed: Tensor, lineage: Tensor, pos: Tensor, replacement: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact acceptance of drafts that were drawn from q: the tokens that come out follow p, whatever q is.

    At a node a child x is accepted with chance min(1, r(x) / q(x)), where r begins as p; each refusal leaves r = norm(max(0, r - q)). Where no
    child is accepted the bonus is drawn from r. A chain is a tree of single children.

    Args:
        p, q: [B, N, vocab] float32 weights, not necessarily normalised. p[b, i]: the target's law after node i, warped and penalised. q[b, i]: the
            law from which the children of node i were really drawn; not read where there are none.
        tokens, parent: [B, N] int32; n: [B] int32, as in ancestor_mask.
        seed, lineage: [B] int64; pos: [B] int32, the position that a child of the root fills. A refusal of child k and the bonus use the noise
            of their position, so they do not depend on batch mates.
        replacement: siblings were drawn independently of each other; False: one after the other, each from what the earlier ones left of q.
    Returns: path [B, N] (nodes from 0 on, -1 behind), accepted [B] (nodes on the path without the root), bonus [B] (-1 where the target has no
        law, or the slot is idle), all int32.
    Raises: ValueError naming the argument; also where q gives a draft no weight.
    Source: arXiv 2211.17192, 2302.01318, 2305.09781. Reference: ops.ref.tree.verify. Bound by memory.
    """
    if needs_dispatch(p, q, tokens, parent, n, seed, lineage, pos):
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.stretto.tree_verify(p, q, tokens, parent, n, seed, lineage, pos, replacement)
        return result
    return _verify(p, q, tokens, parent, n, seed, lineage, pos, replacement)


def _verify(
    p: Tensor, q: Tensor, tokens: Tensor, parent: Tensor, n: Tensor, seed: Tensor, lineage: Tensor, pos: Tensor, replacement: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    op = "tree.verify"
    sizes = check_tensors(op, p=(p, "B N vocab", F32), q=(q, "B N vocab", F32), tokens=(tokens, "B N", I32), parent=(parent, "B N", I32), n=(n, "B", I32),
                          seed=(seed, "B", I64), lineage=(lineage, "B", I64), pos=(pos, "B", I32))  # fmt: skip
    check(sizes["vocab"] > 0, f"{op}: p: no tokens, expected at least one")
    if _backend.use_reference(op, p):
        path, accepted, bonus = ref.tree.verify(p, q, tokens, parent, n, seed, lineage, pos, replacement)
    else:
        path, accepted, bonus = torch.empty_like(tokens, memory_format=torch.contiguous_format), torch.empty_like(n), torch.empty_like(n)
        given = (t.contiguous() for t in (p, q, tokens, parent, n, seed, lineage, pos))
        _backend._C.verify(*given, replacement, path, accepted, bonus)  # type: ignore[union-attr]
    if not accepted.is_cuda and bool((accepted < 0).any()):
        _refuse(op, parent, n)
        b = int((accepted < 0).nonzero()[0])
        raise ValueError(f"{op}: q: no weight for a draft of sequence {b}, expected the law from which the children were drawn")
    return path, accepted, bonus


def select_top(scores: Tensor, parent: Tensor, keep: int) -> Tensor:
    """Choose the tree of at most `keep` nodes, root included, with the best scores.

    A candidate counts with the least score on its path, so that a node is never kept without its parent; ties go to the lower index. Where
    scores fall along every path (sums of log-probabilities), that is the plain best keep - 1.

    Args:
        scores: [B, C] float32; NaN and -inf are never kept. The root's score is not read.
        parent: [B, C] int32: candidate 0 is the root, parent[b, 0] = -1; parent[b, i] < i; -1 behind 0 marks an unused candidate.
        keep: at least 1.
    Returns: [B, keep] int32: indices of kept candidates, rising, -1 behind.
    Raises: ValueError naming the argument, what it is and what was expected.
    Reference: ops.ref.tree.select_top.
    """
    if needs_dispatch(scores, parent):
        result: Tensor = torch.ops.stretto.tree_select_top(scores, parent, keep)
        return result
    return _select_top(scores, parent, keep)


def _select_top(scores: Tensor, parent: Tensor, keep: int) -> Tensor:
    op = "tree.select_top"
    sizes = check_tensors(op, scores=(scores, "B C", F32), parent=(parent, "B C", I32))
    check(1 <= keep < 1 << 30, f"{op}: keep: {keep}, expected at least 1")
    check(sizes["C"] >= 1, f"{op}: scores: no candidates, expected at least the root")
    if _backend.use_reference(op, scores):
        out = ref.tree.select_top(scores, parent, keep)
    else:
        out = parent.new_empty(sizes["B"], keep)
        _backend._C.select_top(scores.contiguous(), parent.contiguous(), out)  # type: ignore[union-attr]
    if not out.is_cuda and bool((out[:, 0] < 0).any()):
        for b, row in enumerate(parent.tolist()):
            check(row[0] == -1, f"{op}: parent: {row[0]} at candidate 0 of sequence {b}, expected -1")
            for i, above in enumerate(row):
                check(-1 <= above < i or i == 0, f"{op}: parent: {above} at candidate {i} of sequence {b}, expected -1 (unused) to {i - 1}")
    return out


def random_trees(make: Make, batch: int, nodes: int, vocabulary: int, kind: str = "random") -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, parent, n) for tests and benches: kind is chain, star, binary or random; unused slots hold ids far out of range."""
    parent = torch.full((batch, nodes), -(1 << 31), dtype=torch.int32)
    tokens = torch.full((batch, nodes), (1 << 31) - 1, dtype=torch.int32)
    n = make.randint(0, nodes + 1, batch)
    if batch:
        n[0] = nodes
    for b in range(batch):
        for i in range(int(n[b])):
            above = {"chain": i - 1, "star": min(i - 1, 0), "binary": (i - 1) // 2, "random": int(make.randint(0, max(i, 1), 1)) if i else -1}[kind]
            parent[b, i], tokens[b, i] = above, int(make.randint(0, vocabulary, 1))
    return tokens, parent, n


_SHAPES = [
    ("chain", 3, 9),
    ("star", 2, 7),
    ("binary", 4, 15),
    ("random", 5, 24),
    ("random", 2, 64),
    ("random", 2, 65),
    ("chain", 1, 130),
    ("random", 3, 1),
    ("star", 0, 4),
]


def _mask_cases(make: Make) -> Iterator[Case]:
    for kind, batch, nodes in _SHAPES:
        _, parent, n = random_trees(make, batch, nodes, 5, kind)
        yield Case(f"{kind}-{batch}x{nodes}", (parent, n))


def _malformed(make: Make) -> Iterator[tuple[str, Tensor, Tensor, str]]:
    """(name, parent, n, fragment of the message): each index out of range in each place, cycles, and wrong counts."""
    low, high = -(1 << 31), (1 << 31) - 1
    for i in range(4):
        for value in sorted({-1 if i else 0, i, i + 1, low, high, 4, -2}):
            parent = torch.tensor([[-1, 0, 1, 0], [-1, 0, 0, 2]], dtype=torch.int32)
            parent[1, i] = value
            yield f"parent-{i}-{value}", parent, torch.tensor([4, 4], dtype=torch.int32), f"parent: {value} at node {i} of sequence 1"
    for count in (-1, 5, low, high):
        yield (
            f"n-{count}",
            torch.tensor([[-1, 0, 1, 0]] * 2, dtype=torch.int32),
            torch.tensor([4, count], dtype=torch.int32),
            f"n: {count} in sequence 1",
        )


def _mask_bad(make: Make) -> Iterator[BadCase]:
    for name, parent, n, message in _malformed(make):
        yield BadCase(name, (parent, n), f"tree.ancestor_mask: {message}")
    yield BadCase("dtype", (parent.long(), n), "tree.ancestor_mask: parent: int64")
    yield BadCase("batch", (parent, n[:1]), "tree.ancestor_mask: n: shape [1]")


register(
    "tree_ancestor_mask(Tensor parent, Tensor n) -> (Tensor, Tensor)",
    _ancestor_mask,
    function=ancestor_mask,
    reference=ref.tree.ancestor_mask,
    fake=lambda parent, n: (parent.new_empty(*parent.shape, (parent.shape[1] + 63) // 64, dtype=torch.int64),
                            torch.empty_like(parent, memory_format=torch.contiguous_format)),
    cases=_mask_cases,
    bad_cases=_mask_bad,
    bench_cases=lambda make: (Case(f"{batch}x{nodes}", random_trees(make, batch, nodes, 5)[1:]) for batch, nodes in [(1, 16), (1, 64), (8, 256)]),
    cost=lambda parent, n: Cost(bytes=8 * parent.numel() * (2 + parent.shape[1] // 64), flops=parent.numel()),
    bound="latency",
)  # fmt: skip


def _walk_cases(make: Make) -> Iterator[Case]:
    for kind, batch, nodes in _SHAPES:
        tokens, parent, n = random_trees(make, batch, nodes, 3, kind)
        yield Case(f"{kind}-{batch}x{nodes}", (make.randint(0, 3, batch, nodes), tokens, parent, n))
    tokens, parent, n = random_trees(make, 6, 12, 2)
    yield Case("no-target", (make.randint(-2, 2, 6, 12), tokens, parent, n))
    yield Case("illegal-tokens", (make.randint(-2, 2, 6, 12), make.randint(-2, 2, 6, 12), parent, n))


def _walk_bad(make: Make) -> Iterator[BadCase]:
    for name, parent, n, message in _malformed(make):
        yield BadCase(name, (make.randint(0, 3, 2, 4), make.randint(0, 3, 2, 4), parent, n), f"tree.walk: {message}")
    yield BadCase("shape", (make.randint(0, 3, 2, 3), make.randint(0, 3, 2, 4), parent, n), "tree.walk: tokens: shape [2, 4]")


register(
    "tree_walk(Tensor next, Tensor tokens, Tensor parent, Tensor n) -> (Tensor, Tensor, Tensor)",
    _walk,
    function=walk,
    reference=ref.tree.walk,
    fake=lambda next, tokens, parent, n: (torch.empty_like(next, memory_format=torch.contiguous_format), torch.empty_like(n), torch.empty_like(n)),
    cases=_walk_cases,
    bad_cases=_walk_bad,
    bench_cases=lambda make: (Case(f"{batch}x{nodes}", (make.randint(0, 3, batch, nodes), *random_trees(make, batch, nodes, 3)))
                              for batch, nodes in [(1, 16), (1, 64), (8, 256)]),
    cost=lambda next, tokens, parent, n: Cost(bytes=16 * next.numel(), flops=next.numel()),
    bound="latency",
)  # fmt: skip


def _verify_arguments(make: Make, batch: int, nodes: int, vocab: int, kind: str, distance: float, replacement: bool) -> tuple[object, ...]:
    """p and q `distance` apart; children drawn from q, without replacement distinct where the vocabulary allows."""
    p = make.randn(batch, nodes, vocab, scale=2)
    q = (p + distance * make.randn(batch, nodes, vocab)).softmax(-1)
    tokens, parent, n = random_trees(make, batch, nodes, vocab, kind)
    for b in range(batch):
        left = q[b].clone()
        for i in range(1, int(n[b])):
            law = left[int(parent[b, i])]
            if not replacement or law.sum() <= 0:
                law = q[b, int(parent[b, i])]
            tokens[b, i] = int(torch.multinomial(law, 1, generator=make.generator))
            left[int(parent[b, i]), int(tokens[b, i])] = 0
    if not replacement:  # more children than tokens cannot be drawn
        for b in range(batch):
            seen: set[tuple[int, int]] = set()
            for i in range(1, int(n[b])):
                if (pair := (int(parent[b, i]), int(tokens[b, i]))) in seen:
                    n[b] = i
                    break
                seen.add(pair)
    seed, lineage = make.randint(0, 1 << 62, batch, dtype=torch.int64), make.randint(0, 1 << 62, batch, dtype=torch.int64)
    return p.softmax(-1), q, tokens, parent, n, seed, lineage, make.randint(0, 1 << 20, batch), replacement


def _verify_cases(make: Make) -> Iterator[Case]:
    for replacement in (True, False):
        for kind, batch, nodes, vocab, distance in [("chain", 40, 6, 9, 0.5), ("star", 40, 7, 17, 2.0), ("random", 40, 12, 33, 1.0),
                                                    ("random", 6, 65, 700, 0.3), ("random", 3, 1, 5, 1.0), ("star", 0, 4, 4, 1.0)]:  # fmt: skip
            arguments = _verify_arguments(make, batch, nodes, vocab, kind, distance, replacement)
            yield Case(f"{kind}-{batch}x{nodes}x{vocab}-{'with' if replacement else 'without'}", arguments)
    p, *rest = _verify_arguments(make, 5, 8, 12, "random", 1.0, True)
    assert isinstance(p, Tensor)
    p[0, 0, 3], p[1, 0] = torch.nan, 0
    yield Case("no-target", (p, *rest))


def _verify_bad(make: Make) -> Iterator[BadCase]:
    p = q = make.randn(2, 4, 3).softmax(-1)
    keys = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    tokens = torch.zeros(2, 4, dtype=torch.int32)
    for name, parent, n, message in _malformed(make):
        yield BadCase(name, (p, q, tokens, parent, n, *keys), f"tree.verify: {message}")
    chain, four = torch.tensor([[-1, 0, 1, 2]] * 2, dtype=torch.int32), torch.full((2,), 4, dtype=torch.int32)
    yield BadCase(
        "weightless draft", (p, torch.tensor([0.0, 0.5, 0.5]).expand(2, 4, 3), tokens, chain, four, *keys), "tree.verify: q: no weight for a draft"
    )
    yield BadCase("token", (p, q, tokens + 3, chain, four, *keys), "tree.verify: q: no weight for a draft")
    yield BadCase("vocab", (p, q[..., :2], tokens, chain, four, *keys), "tree.verify: q: shape [2, 4, 2]")
    yield BadCase("seed", (p, q, tokens, chain, four, keys[0].int(), *keys[1:]), "tree.verify: seed: int32")


register(
    "tree_verify(Tensor p, Tensor q, Tensor tokens, Tensor parent, Tensor n, Tensor seed, Tensor lineage, Tensor pos, bool replacement=True)"
    " -> (Tensor, Tensor, Tensor)",
    _verify,
    function=verify,
    reference=ref.tree.verify,
    fake=lambda p, q, tokens, parent, n, seed, lineage, pos, replacement=True: (
        torch.empty_like(tokens, memory_format=torch.contiguous_format), torch.empty_like(n), torch.empty_like(n)),
    cases=_verify_cases,
    bad_cases=_verify_bad,
    bench_cases=lambda make: (Case(f"chain of {nodes}", _verify_arguments(make, 1, nodes, 49152, "chain", 0.3, True)) for nodes in (4, 8)),
    cost=lambda p, q, tokens, parent, n, seed, lineage, pos, replacement=True: Cost(bytes=p.nbytes + q.nbytes, flops=4 * p.numel()),
    bound="memory",
    source="arXiv 2211.17192, 2302.01318, 2305.09781",
)  # fmt: skip


def _select_cases(make: Make) -> Iterator[Case]:
    for batch, count, keep in [(2, 1, 1), (3, 9, 4), (2, 40, 40), (2, 33, 64), (4, 500, 17), (1, 3000, 256), (0, 5, 2)]:
        _, parent, n = random_trees(make, batch, count, 5)
        parent = torch.where(torch.arange(count) < n[:, None], parent, -1)
        if batch:
            parent[:, 0] = -1
        scores = make.randn(batch, count)
        yield Case(f"{batch}x{count}-{keep}", (scores, parent, keep))
        yield Case(f"ties-{batch}x{count}-{keep}", ((scores * 2).round(), parent, keep))
    scores = make.randn(6, 60)
    scores[:, ::7], scores[:, 3::11], scores[:, 5::13] = torch.nan, -torch.inf, torch.inf
    yield Case("non-finite", (scores, torch.cat((torch.full((6, 1), -1), make.randint(0, 1, 6, 59).long()), 1).int(), 30))


def _select_bad(make: Make) -> Iterator[BadCase]:
    scores, parent = make.randn(2, 4), torch.tensor([[-1, 0, 1, 0]] * 2, dtype=torch.int32)
    for at, value in [(0, 0), (1, 1), (2, 2), (2, 3), (3, -2), (3, (1 << 31) - 1), (1, -(1 << 31))]:
        wrong = parent.clone()
        wrong[1, at] = value
        yield BadCase(f"parent-{at}-{value}", (scores, wrong, 3), f"tree.select_top: parent: {value} at candidate {at} of sequence 1")
    yield BadCase("keep", (scores, parent, 0), "tree.select_top: keep: 0")
    yield BadCase("empty", (scores[:, :0], parent[:, :0], 2), "tree.select_top: scores: no candidates")


register(
    "tree_select_top(Tensor scores, Tensor parent, int keep) -> Tensor",
    _select_top,
    function=select_top,
    reference=ref.tree.select_top,
    fake=lambda scores, parent, keep: parent.new_empty(parent.shape[0], keep),
    cases=_select_cases,
    bad_cases=_select_bad,
    bench_cases=lambda make: (Case(f"{count} candidates", (make.randn(1, count), random_trees(make, 1, count, 5)[1], 64)) for count in (256, 4096)),
    cost=lambda scores, parent, keep: Cost(bytes=8 * scores.numel(), flops=scores.numel()),
    bound="latency",
)  # fmt: skip
