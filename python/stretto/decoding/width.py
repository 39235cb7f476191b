"""How much to guess: the observed acceptance by depth, and the width that pays best at the measured cost of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stretto.decoding.cost import CostCurve
from stretto.decoding.types import DraftTree


@dataclass
class DepthAcceptance:
    """Chance that a draft at depth d is accepted given that its parent was, with exponential forgetting."""

    decay: float = 0.95
    """The last twenty tries count. With the prior, a proposer that is never right is believed right in 1 of 22: it can cost 5 % at most."""

    hits: list[float] = field(default_factory=list)
    tries: list[float] = field(default_factory=list)

    # What is believed before anything was seen: worth trying, given up after a few misses.
    PRIOR_HITS = 1.0
    PRIOR_TRIES = 2.0

    def chance(self, depth: int) -> float:
        """For depth 1, 2, ...; unseen depths borrow from the deepest seen one above."""
        i = min(depth, len(self.tries)) - 1
        hits, tries = (self.hits[i], self.tries[i]) if i >= 0 else (0.0, 0.0)
        return (hits + self.PRIOR_HITS) / (tries + self.PRIOR_TRIES)

    def expected(self, depth: int) -> float:
        """Expected number of accepted tokens of a chain of `depth` drafts."""
        total, alive = 0.0, 1.0
        for d in range(1, depth + 1):
            alive *= self.chance(d)
            total += alive
        return total

    def update(self, accepted: int, depth: int) -> None:
        """A chain of `depth` drafts of which the first `accepted` were accepted."""
        for d in range(min(accepted + 1, depth)):
            if d == len(self.tries):
                self.hits.append(0.0)
                self.tries.append(0.0)
            self.tries[d] = self.decay * self.tries[d] + 1
            self.hits[d] = self.decay * self.hits[d] + (d < accepted)


def leading_depths(tree: DraftTree) -> list[int]:
    """depths[n - 1]: how deep the likeliest path (always the first child) goes within the first n nodes."""
    depths, tip, depth = [0], 0, 0
    for i in range(1, len(tree.tokens)):
        if tree.parent[i] == tip:
            tip, depth = i, depth + 1
        depths.append(depth)
    return depths


def best_width(depths: Sequence[int], acceptance: DepthAcceptance, cost: CostCurve, others: int, draft_seconds: float) -> tuple[int, float]:
    """The number of nodes that yields most tokens a second, and its gain over the plain step.

    Args:
        depths: of the proposed tree, see leading_depths.
        others: rows that the rest of the batch puts into the step anyway, each good for one token.
        draft_seconds: what the proposal itself cost.
    Returns: (nodes including the root, tokens a second relative to a plain step); (1, ...) means: do not speculate.
    """
    plain = (others + 1) / cost(others + 1)
    best, best_gain = 1, 1.0
    for nodes in range(2, len(depths) + 1):
        seconds = max(cost(others + nodes), cost(others + 1)) + draft_seconds  # a learned curve may be out of order for a few steps
        gain = (others + 1 + acceptance.expected(depths[nodes - 1])) / seconds / plain
        if gain > best_gain:
            best, best_gain = nodes, gain
    return best, best_gain
