"""What passes between a proposer, the engine and an acceptance rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Law(Enum):
    """How siblings of a tree were chosen. A wrong law is the one way to lose exactness."""

    POINT = "point"  # a function of the prefix: retrieved, repeated, or the likeliest of a draft model
    IID = "iid"  # each drawn from q of its parent, independently
    WITHOUT_REPLACEMENT = "without_replacement"  # drawn one after another, each from what the earlier ones left of q


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Guesses to be verified in one step.

    tokens: [n] int32; node 0 is the last committed token, whose keys are not cached yet. parent: [n] int32, parent[0] = -1 and parent[i] < i;
    children of one node differ unless the law is IID. q: [n, vocab] float32, row i the law that the children of node i were drawn from;
    None for POINT. A chain is a tree of single children.
    """

    tokens: NDArray[np.int32]
    parent: NDArray[np.int32]
    law: Law = Law.POINT
    q: Tensor | None = None

    @staticmethod
    def root(token: int) -> DraftTree:
        """No guess."""
        return DraftTree.chain([token])

    @staticmethod
    def chain(tokens: Sequence[int]) -> DraftTree:
        """tokens[0] is the root, each further token the only child of the one before."""
        return DraftTree(np.asarray(tokens, dtype=np.int32), np.arange(-1, len(tokens) - 1, dtype=np.int32))

    def first(self, n: int) -> DraftTree:
        """The tree of the first n nodes; parents come before children, so it is one."""
        return self if n >= len(self.tokens) else DraftTree(self.tokens[:n], self.parent[:n], self.law, None if self.q is None else self.q[:n])

    @property
    def depths(self) -> list[int]:
        """Distance of each node from the root."""
        depths: list[int] = []
        for p in self.parent.tolist():
            depths.append(0 if p < 0 else depths[p] + 1)
        return depths

    @property
    def depth(self) -> int:
        return max(self.depths)

    def validate(self, vocab_size: int) -> None:
        """Raise ValueError("draft: field: got, expected") unless the contract holds."""
        n = len(self.tokens)
        if n < 1 or len(self.parent) != n:
            raise ValueError(f"draft: parent: {len(self.parent)} entries for {n} tokens, expected as many, at least 1")
        tokens, parents = self.tokens.tolist(), self.parent.tolist()
        for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            if not 0 <= token < vocab_size:
                raise ValueError(f"draft: tokens: {token} at node {i}, expected 0 to {vocab_size - 1}")
            if (parent != -1) if i == 0 else not 0 <= parent < i:
                raise ValueError(f"draft: parent: {parent} at node {i}, expected {'-1' if i == 0 else f'0 to {i - 1}'}")
        if self.law is not Law.IID and len(set(zip(parents, tokens, strict=True))) != n:
            raise ValueError("draft: tokens: two children of one node are equal, expected different ones unless the law is iid")
        if (self.q is None) != (self.law is Law.POINT):
            raise ValueError(f"draft: q: {'missing' if self.q is None else 'given'}, expected exactly with a sampled law, here {self.law.value}")
