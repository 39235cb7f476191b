"""Prompt lookup: what followed the last time the same few tokens stood in this request."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.decoding.types import DraftTree


class NgramProposer:
    """Drafts a chain from the latest earlier occurrence of the longest matching suffix, of max_ngram down to min_ngram tokens.

    An index from n-gram to the place behind its latest occurrence grows with the request: a question costs a few dictionary lookups however
    long the text is. Law Point.
    """

    name = "ngram"
    max_nodes = 16

    def __init__(self, max_ngram: int = 4, min_ngram: int = 2) -> None:
        """Raises: ValueError unless 1 <= min_ngram <= max_ngram."""
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"NgramProposer: min_ngram: {min_ngram}, expected 1 to max_ngram = {max_ngram}")
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._tokens: dict[int, list[int]] = {}
        self._after: dict[int, dict[tuple[int, ...], int]] = {}

    def start(self, request: int, prompt: Sequence[int]) -> None:
        self._tokens[request], self._after[request] = [], {}
        self.observe(request, prompt)

    def propose(self, request: int, tokens: Sequence[int], budget: int) -> DraftTree:
        """A chain of at most `budget` nodes."""
        known, after = self._tokens[request], self._after[request]
        for size in self._sizes:
            place = after.get(tuple(known[-size:])) if len(known) > size else None
            if place is not None:
                return DraftTree.chain([tokens[-1], *known[place : place + budget - 1]])
        return DraftTree.root(tokens[-1])

    def observe(self, request: int, new_tokens: Sequence[int]) -> None:
        """An n-gram enters the index once a token follows it, so that the end of the text never finds itself."""
        known, after = self._tokens[request], self._after[request]
        for token in new_tokens:
            for size in self._sizes:
                if len(known) >= size:
                    after[tuple(known[-size:])] = len(known)
            known.append(token)

    def finish(self, request: int) -> None:
        del self._tokens[request], self._after[request]
