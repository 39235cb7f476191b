"""How much to guess: the measured cost of a step by its rows, the observed acceptance by depth, and the width that pays best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stretto.decoding.types import DraftTree

WIDTHS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a step by its number of rows, measured on this machine with this model."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @staticmethod
    def measure(step: Callable[[int], float], max_rows: int, repeats: int = 3) -> CostCurve:
        """Time `step(rows) -> seconds` at a few widths up to max_rows; the smallest of `repeats` counts, since noise only adds."""
        seconds: list[float] = []
        widths = tuple(w for w in WIDTHS if w <= max_rows)
        for rows in widths:
            best = min(step(rows) for _ in range(repeats))
            seconds.append(max(best, seconds[-1] if seconds else 0.0))  # a step never gets cheaper by adding rows
        return CostCurve(widths, tuple(seconds))

    def __call__(self, rows: int) -> float:
        """Seconds of a step over `rows` rows: between measured points on a line, beyond them along the last one."""
        if rows <= self.rows[0] or len(self.rows) == 1:
            return self.seconds[0] * max(rows, 1)
        i = next((i for i in range(1, len(self.rows)) if rows <= self.rows[i]), len(self.rows) - 1)
        share = (rows - self.rows[i - 1]) / (self.rows[i] - self.rows[i - 1])
        return self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1])

    def relative(self) -> dict[int, float]:
        """c(N) = t(N rows) / t(1 row) at the measured widths."""
        return {r: s / self.seconds[0] for r, s in zip(self.rows, self.seconds, strict=True)}


@dataclass
class DepthAcceptance:
    """Chance that a draft at depth d is accepted given that its parent was, with exponential forgetting."""

    decay: float = 0.9
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
        gain = (others + 1 + acceptance.expected(depths[nodes - 1])) / (cost(others + nodes) + draft_seconds) / plain
        if gain > best_gain:
            best, best_gain = nodes, gain
    return best, best_gain
