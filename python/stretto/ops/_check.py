"""Argument checks for public ops: symbolic shapes, so that one line names every size and every mismatch names its argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stretto.ops import _backend

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
F32 = (torch.float32,)
I32 = (torch.int32,)
I64 = (torch.int64,)


def check(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


def check_tensors(op: str, **tensors: tuple[Tensor | None, str, Sequence[torch.dtype]]) -> dict[str, int]:
    """Check tensors against symbolic shapes and return the sizes by name.

    Args:
        op: name for messages.
        tensors: name=(tensor, "rows width", dtypes). A word in the shape binds a size at its first use and must agree afterwards; a number
            must be equal; "_" is free. A tensor of None is skipped. Tensors must share one device.
    Raises: TypeError for what is no tensor, ValueError("op: argument: got, expected") for rank, size, dtype, device, freed storage
        (torch itself would read it) and lazily negated views, whose sign the native module cannot see.
    """
    sizes: dict[str, int] = {}
    device: torch.device | None = None
    for name, (tensor, shape, dtypes) in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name}: {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(f"{op}: {name}: {str(tensor.dtype).removeprefix('torch.')}, expected {expected}")
        if tensor.numel() and not tensor.untyped_storage().nbytes():
            raise ValueError(f"{op}: {name}: its storage was freed, expected {tensor.numel()} elements")
        if tensor.is_neg():
            raise ValueError(f"{op}: {name}: a lazily negated view, expected plain values (call resolve_neg)")
        words = shape.split()
        if tensor.dim() != len(words):
            raise ValueError(f"{op}: {name}: shape {list(tensor.shape)}, expected [{', '.join(words)}]")
        for word, size in zip(words, tensor.shape, strict=True):
            if word == "_":
                continue
            want = int(word) if word.isdigit() else sizes.setdefault(word, size)
            if size != want:
                label = word if word.isdigit() else f"{word} = {want}"
                raise ValueError(f"{op}: {name}: shape {list(tensor.shape)}, expected [{', '.join(words)}] with {label}")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{op}: {name}: on {tensor.device}, expected {device} as the other tensors")
    return sizes


if _backend._C is not None:  # the same function; correct calls are recognised in C++
    check_tensors = _backend._C.quick_check(check_tensors)


def dtype_as(t: object) -> tuple[torch.dtype, ...]:
    """The dtypes check_tensors may accept for a tensor that must be like `t`; none where `t`, which is checked first, is no tensor."""
    return (t.dtype,) if isinstance(t, Tensor) else ()


def rows_contiguous(t: Tensor) -> Tensor:
    """`t` itself where its last dimension is contiguous, else a contiguous copy."""
    return t if t.is_contiguous() or t.dim() == 0 or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()
