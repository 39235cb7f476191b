"""Plain PyTorch references: the meaning of each op. Slow, short, and right."""

from stretto.ops.ref import attention, cache, dct, mlstm, moe, norm, quant, rope, sampling, scan, tree

__all__ = ["attention", "cache", "dct", "mlstm", "moe", "norm", "quant", "rope", "sampling", "scan", "tree"]
