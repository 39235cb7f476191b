"""What to guess: the interface every speculative system implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stretto.decoding.types import DraftTree


class Proposer(Protocol):
    """Guesses continuations of a request. It never touches the target's cache.

    A wrong guess costs time and nothing else; a wrong `law` in the tree (see DraftTree) would cost exactness.
    """

    name: str
    max_nodes: int
    """Largest tree worth asking for."""

    def start(self, request: int, prompt: Sequence[int]) -> None:
        """A request begins; `prompt` is all of its tokens so far."""

    def propose(self, request: int, tokens: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most `budget` nodes whose root is tokens[-1], in depth-first order with the likelier child first, so that any prefix of
        its nodes is a tree too. The root alone means: no idea."""

    def observe(self, request: int, new_tokens: Sequence[int]) -> None:
        """Tokens that the target has added to the request."""

    def finish(self, request: int) -> None:
        """The request is over, for whatever reason; what belongs to it alone is dropped."""
