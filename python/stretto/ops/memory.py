"""Large memory that is read from end to end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stretto.ops import _backend

HUGE_PAGE = 2 << 20


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor that begins at a huge page of the system, in huge pages where the system has them to give.

    For kernels that read it once from end to end: the processor looks up an address every 2 MiB instead of every 4 KiB. Memory is taken when it is
    first written, but 2 MiB at a time: what is used together should lie together.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    memory = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % HUGE_PAGE :][:nbytes]
    if _backend._C is not None:
        _backend._C.prefer_huge_pages(memory)
    return memory.view(dtype).view(shape)
