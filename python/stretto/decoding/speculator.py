"""One request's speculation: which proposer to ask, how much of its tree to verify, and when to leave it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from stretto.decoding.cost import CostCurve
from stretto.decoding.proposer import Proposer
from stretto.decoding.types import DraftTree
from stretto.decoding.width import DepthAcceptance, best_width, leading_depths

MAX_NODES = 32
"""Largest tree asked for. Beyond it a step on a CPU costs more than any acceptance seen pays back; the cost curve ends there too."""

PROBE_TOKENS = 64
"""A proposer that does not pay is asked again after this many tokens, for a single guess."""

FAULTS_ALLOWED = 3
"""A proposer that raises or returns garbage is dropped for this request after this many faults; the output stays right either way."""


@dataclass
class Arm:
    """A proposer as one request knows it."""

    proposer: Proposer
    acceptance: DepthAcceptance = field(default_factory=DepthAcceptance)
    draft_seconds: float = 0.0
    asked: int = 0
    answered: int = 0
    faults: int = 0
    next_probe: int = 0
    gain: float = 1.0
    deepest: int = 0
    """Most drafts accepted in one step so far."""

    @property
    def reach(self) -> int:
        """Nodes that may be verified: two until a draft was right, then twice what was right. Text that never repeats pays for narrow steps only."""
        return 2 * (self.deepest + 1)


class Speculator:
    """Chooses each step's draft tree for one request among its proposers; none of them is plain decoding."""

    def __init__(self, request: int, proposers: Sequence[Proposer], prompt: Sequence[int], vocab_size: int) -> None:
        self.request = request
        self.arms = [Arm(p) for p in proposers]
        self.vocab_size = vocab_size
        self.draft_seconds = 0.0
        self.width_histogram: Counter[int] = Counter()
        self.accepted_by_depth: Counter[int] = Counter()
        self.drafted_by_depth: Counter[int] = Counter()
        self._used: tuple[Arm, DraftTree] | None = None
        for arm in self.arms:
            arm.proposer.start(request, prompt)

    def propose(self, tokens: Sequence[int], cost: CostCurve, others: int, room: int) -> DraftTree:
        """The tree to verify next; its root alone when nothing pays.

        Args:
            tokens: all tokens of the request; the last one is the root.
            others: rows of the rest of the batch.
            room: most nodes allowed, by the length limit, the context and the row budget.
        """
        self._used = None
        for arm in sorted(self.arms, key=lambda a: -a.gain):
            if arm.faults >= FAULTS_ALLOWED or room < 2:
                continue
            probing = arm.gain <= 1.0 and arm.asked > 0
            if probing and len(tokens) < arm.next_probe:
                continue
            start = time.perf_counter()
            tree = self._ask(arm, tokens, min(room, arm.proposer.max_nodes, MAX_NODES))
            spent = time.perf_counter() - start
            self.draft_seconds += spent
            arm.asked += 1
            arm.draft_seconds = spent if arm.asked == 1 else 0.9 * arm.draft_seconds + 0.1 * spent
            if tree is None or len(tree.tokens) < 2:
                continue
            arm.answered += 1
            nodes, arm.gain = best_width(leading_depths(tree)[: arm.reach], arm.acceptance, cost, others, arm.draft_seconds)
            if nodes == 1:
                if not probing:
                    arm.next_probe = len(tokens) + PROBE_TOKENS
                    continue
                nodes = 2
            if probing:
                arm.next_probe = len(tokens) + PROBE_TOKENS
            tree = tree.first(nodes)
            self._used = (arm, tree)
            self.width_histogram[nodes] += 1
            return tree
        self.width_histogram[1] += 1
        return DraftTree.root(tokens[-1])

    def _ask(self, arm: Arm, tokens: Sequence[int], budget: int) -> DraftTree | None:
        """A proposer's fault is its own: the step goes on without a draft."""
        try:
            tree = arm.proposer.propose(self.request, tokens, budget)
            tree.validate(self.vocab_size)
            if tree.tokens[0] != tokens[-1] or len(tree.tokens) > budget:
                raise ValueError(
                    f"{arm.proposer.name}: tree: root {tree.tokens[0]} of {len(tree.tokens)} nodes, expected {tokens[-1]} of at most {budget}"
                )
        except (ValueError, IndexError, RuntimeError, ArithmeticError):
            arm.faults += 1
            return None
        return tree

    def observe(self, accepted: int, new_tokens: Sequence[int]) -> None:
        """The outcome of the step: how many drafts were accepted, and all tokens it added."""
        if self._used is not None:
            arm, tree = self._used
            depth = leading_depths(tree)[-1]
            arm.acceptance.update(accepted, max(depth, accepted))
            arm.deepest = max(arm.deepest, accepted)
            for d in range(1, tree.depth + 1):
                self.drafted_by_depth[d] += 1
                self.accepted_by_depth[d] += d <= accepted
        for arm in self.arms:
            arm.proposer.observe(self.request, new_tokens)

    def finish(self) -> None:
        for arm in self.arms:
            arm.proposer.finish(self.request)

    @property
    def hit_rate(self) -> float:
        """Share of questions that a proposer had an answer to."""
        asked = sum(a.asked for a in self.arms)
        return sum(a.answered for a in self.arms) / asked if asked else 0.0

    def reason(self) -> str:
        """In words, why the request ran as it did."""
        if not self.arms:
            return "plain decoding was asked for"
        steps = sum(self.width_histogram.values())
        drafted = steps - self.width_histogram[1]
        parts = [f"{a.proposer.name}: last expected gain {a.gain:.2f}x, answered {a.answered} of {a.asked}" for a in self.arms]
        return f"speculated in {drafted} of {steps} steps; " + "; ".join(parts)
