"""What a model has seen: pages of keys and values shared between sequences, and a trie of the n-grams that went by."""

from stretto.cache.paged import CacheShape, Ledger, PagedCache, Sequence
from stretto.cache.trie import NgramTrie

__all__ = ["CacheShape", "Ledger", "NgramTrie", "PagedCache", "Sequence"]
