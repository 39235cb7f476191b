"""Attention: over pages of a cache, over plain tensors, over lists of keys, over grids of video tokens; and what is read off beside it."""

from stretto.ops.attention.grid import attention3d, make_grid, rope3d_table
from stretto.ops.attention.lists import KeyLists, key_lists, lines_to_lists, sparse_prefill, vertical_slash_index
from stretto.ops.attention.pages import PAGES, make_paged, paged
from stretto.ops.attention.prefill import dense
from stretto.ops.attention.probs import apply_probs, with_probs
from stretto.ops.attention.states import merge_states
from stretto.ops.attention.weights import sums

__all__ = [
    "PAGES",
    "KeyLists",
    "apply_probs",
    "attention3d",
    "dense",
    "key_lists",
    "lines_to_lists",
    "make_grid",
    "make_paged",
    "merge_states",
    "paged",
    "rope3d_table",
    "sparse_prefill",
    "sums",
    "vertical_slash_index",
    "with_probs",
]
