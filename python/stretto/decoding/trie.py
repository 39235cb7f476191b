"""Lookahead: drafts from a trie of n-grams of the prompt and of everything said before (arXiv 2312.12728)."""

from __future__ import annotations

from collections.abc import Sequence

from stretto.cache import NgramTrie
from stretto.decoding.types import DraftTree


class TrieProposer:
    """Retrieves a tree of continuations; law Point, so every lossless acceptance stays exact.

    The trie is shared: outputs of all requests stay in it, a prompt serves its own request only.
    """

    name = "trie"
    max_nodes = 64

    def __init__(self, trie: NgramTrie) -> None:
        self.trie = trie

    def start(self, request: int, prompt: Sequence[int]) -> None:
        self.trie.insert(list(prompt), "input", request)

    def propose(self, request: int, tokens: Sequence[int], budget: int) -> DraftTree:
        """The retrieved tree of at most `budget` nodes; the root alone where nothing matches."""
        return DraftTree(*self.trie.query(list(tokens[-self.trie.max_query_length :]), budget, request=request))

    def observe(self, request: int, new_tokens: Sequence[int]) -> None:
        self.trie.insert(list(new_tokens), "output", request)

    def finish(self, request: int) -> None:
        self.trie.release(request)
