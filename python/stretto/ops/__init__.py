"""Public kernels. Each is a plain function with a documented contract; `ops.table.OPS` lists them all."""

from stretto.ops import attention, cache, dct, moe, norm, quant, rope, sampling, step, table, tree
from stretto.ops._backend import fallbacks, granted_threads, num_threads, set_num_threads, strict

__all__ = [
    "attention",
    "cache",
    "dct",
    "fallbacks",
    "granted_threads",
    "moe",
    "norm",
    "num_threads",
    "quant",
    "rope",
    "sampling",
    "set_num_threads",
    "step",
    "strict",
    "table",
    "tree",
]
