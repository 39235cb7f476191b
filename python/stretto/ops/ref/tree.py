"""References of the tree family: one node after the other, as the definitions read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stretto.ops.ref import sampling


def valid(parent: list[int], n: int) -> bool:
    """Whether the first n slots form a draft tree: parent[0] = -1, 0 <= parent[i] < i."""
    return 0 <= n <= len(parent) and (n == 0 or parent[0] == -1) and all(0 <= parent[i] < i for i in range(1, n))


def ancestor_mask(parent: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """(mask int64 [B, N, ceil(N/64)], depth int32 [B, N])."""
    batch, nodes = parent.shape
    ancestors = parent.new_zeros(batch, nodes, (nodes + 63) // 64 * 64, dtype=torch.bool)
    depth = parent.new_zeros(batch, nodes, dtype=torch.int32)
    for b, (row, count) in enumerate(zip(parent.tolist(), n.tolist(), strict=True)):
        if not valid(row, count):
            depth[b] = -1
            continue
        for i in range(count):
            if i:
                ancestors[b, i] = ancestors[b, row[i]]
                depth[b, i] = depth[b, row[i]] + 1
            ancestors[b, i, i] = True
    bits = ancestors.view(batch, nodes, (nodes + 63) // 64, 64).long() << torch.arange(64, device=parent.device)
    return bits.sum(-1), depth


def walk(next: Tensor, tokens: Tensor, parent: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(path int32 [B, N], accepted int32 [B], bonus int32 [B])."""
    path = torch.full_like(next, -1)
    accepted, bonus = torch.full_like(n, -1), torch.full_like(n, -1)
    for b, count in enumerate(n.tolist()):
        parents, token, wish = parent[b].tolist(), tokens[b].tolist(), next[b].tolist()
        if not valid(parents, count):
            continue
        accepted[b] = 0
        if count == 0:
            continue
        nodes = [0]
        while child := next_child(nodes[-1], wish[nodes[-1]], token, parents, count):
            nodes.append(child)
        path[b, : len(nodes)] = path.new_tensor(nodes)
        accepted[b], bonus[b] = len(nodes) - 1, max(wish[nodes[-1]], -1)
    return path, accepted, bonus


def next_child(node: int, token: int, tokens: list[int], parent: list[int], n: int) -> int:
    """The first child of node that carries token, or 0."""
    return next((i for i in range(node + 1, n) if parent[i] == node and tokens[i] == token and token >= 0), 0)


ROUNDING = 1e-12  # a residual of this mass or less is rounding


def verify(
    p: Tensor, q: Tensor, tokens: Tensor, parent: Tensor, n: Tensor, seed: Tensor, lineage: Tensor, pos: Tensor, replacement: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(path int32 [B, N], accepted int32 [B], bonus int32 [B])."""
    path = torch.full_like(tokens, -1)
    accepted, bonus = torch.full_like(n, -1), torch.full_like(n, -1)
    for b, count in enumerate(n.tolist()):
        if not valid(parent[b].tolist(), count):
            continue
        keys = (seed[b : b + 1], lineage[b : b + 1])

        def accept(depth: int, k: int, chance: float, b: int = b, keys: tuple[Tensor, Tensor] = keys) -> bool:
            return float(sampling.uniform(*keys, pos[b : b + 1] + depth, 1, k)) < chance

        def draw(depth: int, law: Tensor, b: int = b, keys: tuple[Tensor, Tensor] = keys) -> int:
            return int(sampling.draw(law[None], *keys, pos[b : b + 1] + depth))

        outcome = verify_one(p[b].double(), q[b].double(), tokens[b].tolist(), parent[b].tolist(), count, replacement, accept, draw)
        if outcome is not None:
            nodes, bonus[b] = outcome
            path[b, : len(nodes)] = path.new_tensor(nodes)
            accepted[b] = max(len(nodes) - 1, 0)
    return path, accepted, bonus


def verify_one(
    p: Tensor, q: Tensor, tokens: list[int], parent: list[int], n: int, replacement: bool,
    accept: Callable[[int, int, float], bool], draw: Callable[[int, Tensor], int],
) -> tuple[list[int], int] | None:  # fmt: skip
    """The rule itself: (accepted nodes from 0 on, bonus), or None where q gives a draft no weight. Its chances come from outside, so that tests
    can go through all of them: accept(depth, k, chance) is true with that chance, draw(depth, law) is a token of the law, -1 of none."""
    nodes = [0] if n else []
    while nodes:
        node, depth = nodes[-1], len(nodes) - 1
        if not (p[node].isfinite().all() and (p[node] >= 0).all() and p[node].sum() > 0):
            children = [i for i in range(node + 1, n) if parent[i] == node]
            return None if children and not q[node, tokens[children[0]]] > 0 else (nodes, -1)
        target = p[node] / p[node].sum()
        left, law = target, q[node]
        for k, i in enumerate(i for i in range(node + 1, n) if parent[i] == node):
            x = tokens[i]
            if not 0 <= x < len(law) or not law[x] > 0:
                return None
            law = law / law.sum()
            if accept(depth, k, float(left[x] / law[x])):
                nodes.append(i)
                break
            left = (left - law).clamp_min(0)
            left = left / left.sum() if left.sum() > ROUNDING else target
            if not replacement:
                law = law.scatter(0, torch.tensor(x, device=law.device), 0.0)
        else:
            return nodes, draw(depth, left)
    return nodes, -1


def select_top(scores: Tensor, parent: Tensor, keep: int) -> Tensor:
    """int32 [B, keep]: kept candidates rising, -1 behind."""
    out = torch.full((scores.shape[0], keep), -1, dtype=torch.int32, device=scores.device)
    for b, (score, parents) in enumerate(zip(scores.tolist(), parent.tolist(), strict=True)):
        count = len(parents)
        if count == 0 or parents[0] != -1 or any(not -1 <= parents[i] < i for i in range(1, count)):
            continue
        least = [float("inf")]
        for i in range(1, count):
            least.append(min(score[i], least[parents[i]]) if parents[i] >= 0 and score[i] == score[i] else float("-inf"))
        ranked = sorted((i for i in range(1, count) if least[i] > float("-inf")), key=lambda i: (-least[i], i))
        chosen = sorted([0, *ranked[: keep - 1]])
        out[b, : len(chosen)] = out.new_tensor(chosen)
    return out
