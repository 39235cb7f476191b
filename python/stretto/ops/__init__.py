"""Public kernels. Each is a plain function with a documented contract; `ops.table.OPS` lists them all."""

from stretto.ops import attention, cache, dct, memory, mlstm, moe, norm, quant, rope, sampling, scan, slstm, step, table, tree
from stretto.ops._backend import fallbacks, granted_threads, num_threads, set_num_threads, strict

__all__ = [
    "attention",
    "cache",
    "dct",
    "fallbacks",
    "granted_threads",
    "memory",
    "mlstm",
    "moe",
    "norm",
    "num_threads",
    "quant",
    "rope",
    "sampling",
    "scan",
    "set_num_threads",
    "slstm",
    "step",
    "strict",
    "table",
    "tree",
]
