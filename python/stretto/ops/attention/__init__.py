"""Attention: over pages of a cache, over plain tensors, over lists of keys, over grids of video tokens; and what is joined or read off beside it."""

from stretto.ops.attention.pages import PAGES, make_paged, paged
from stretto.ops.attention.prefill import dense
from stretto.ops.attention.states import merge_states

__all__ = ["PAGES", "dense", "make_paged", "merge_states", "paged"]
