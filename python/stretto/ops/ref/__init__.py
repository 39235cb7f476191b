"""Plain PyTorch references: the meaning of each op. Slow, short, and right."""

from stretto.ops.ref import attention, cache, dct, moe, norm, quant, rope, sampling, tree

__all__ = ["attention", "cache", "dct", "moe", "norm", "quant", "rope", "sampling", "tree"]
