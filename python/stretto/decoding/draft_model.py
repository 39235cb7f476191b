"""A smaller model of the same vocabulary guesses, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.cache import PagedCache
from stretto.cache import Sequence as CacheSequence
from stretto.decoding.step import Rows, StepRunner
from stretto.decoding.types import DraftTree
from stretto.errors import OutOfPages


class DraftModelProposer:
    """Greedy continuation by another model, as a chain.

    The draft is a function of the prefix (law Point), so every lossless acceptance stays exact whatever the draft model is. Its cache follows
    the request: what the target refused is cut off, what it added is read before the next guess.
    """

    max_nodes = 5
    """The root and four guesses: each guess costs a step of the draft model, and acceptance falls with depth."""

    def __init__(self, name: str, runner: StepRunner, cache: PagedCache) -> None:
        """runner, cache: of the draft model, used by this proposer's requests only."""
        self.name = name
        self._runner, self._cache = runner, cache
        self._sequences: dict[int, tuple[CacheSequence, list[int]]] = {}  # request -> its sequence and the tokens that stand in it

    def start(self, request: int, prompt: Sequence[int]) -> None:
        self._sequences[request] = (self._cache.alloc(), [])

    def propose(self, request: int, tokens: Sequence[int], budget: int) -> DraftTree:
        """A chain of at most `budget` nodes; the root alone where the draft model's cache is full."""
        sequence, held = self._sequences[request]
        common = next((i for i, (a, b) in enumerate(zip(held, tokens, strict=False)) if a != b), min(len(held), len(tokens)))
        common = min(common, len(tokens) - 1)  # the root is always read anew: its logits are wanted
        self._cache.truncate(sequence, common)
        del held[common:]
        chain, unread = [tokens[-1]], list(tokens[common:])
        try:
            while len(chain) < budget:
                chunk = unread[: self._runner.max_rows]
                del unread[: len(chunk)]
                self._cache.reserve(sequence, len(chunk))
                self._runner.run([Rows(sequence, chunk, logit_count=0 if unread else 1)])
                self._cache.commit(sequence, len(chunk))
                held += chunk
                if unread:
                    continue
                guess = int(self._runner.argmax[0])
                if guess < 0:  # not finite: no idea
                    break
                chain.append(guess)
                unread = [guess]
        except OutOfPages:
            return DraftTree.root(tokens[-1])
        return DraftTree.chain(chain)

    def observe(self, request: int, new_tokens: Sequence[int]) -> None:
        """Nothing to learn: the next propose compares tokens itself."""

    def finish(self, request: int) -> None:
        sequence, _ = self._sequences.pop(request)
        self._cache.free(sequence)
