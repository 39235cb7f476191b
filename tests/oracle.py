"""How close is close enough: results are held against a float64 oracle, and against the error PyTorch makes in the same dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def tensors_of(case: Any) -> Iterator[Tensor]:
    """The tensors among a case's arguments."""
    for value in (*case.args, *case.kwargs.values()):
        if isinstance(value, Tensor):
            yield value


def copies(values: Any) -> Any:
    """The same arguments with every tensor cloned, strides kept."""
    if isinstance(values, Tensor):
        return values.clone(memory_format=torch.preserve_format)
    if isinstance(values, tuple | list):
        return type(values)(copies(v) for v in values)
    if isinstance(values, dict):
        return {k: copies(v) for k, v in values.items()}
    return values


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN equal to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def to_double(values: Any) -> Any:
    """The same arguments with floating tensors in float64."""
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, tuple | list):
        return type(values)(to_double(v) for v in values)
    if isinstance(values, dict):
        return {k: to_double(v) for k, v in values.items()}
    return values


def assert_close_to_oracle(got: Any, oracle: Any, plain: Any, times: float = 2.0) -> None:
    """Each tensor of `got` errs against `oracle` (float64) by at most `times` the largest error of `plain`, plus two roundings of its dtype.

    Infinities and NaN must stand in the same places; integer tensors must be equal.
    """
    if not isinstance(got, tuple | list):
        got, oracle, plain = (got,), (oracle,), (plain,)
    for g, o, p in zip(got, oracle, plain, strict=True):
        assert g.shape == o.shape
        if not g.is_floating_point():
            assert torch.equal(g, o.to(g.dtype))
            continue
        finite = o.isfinite()
        assert torch.equal(g.isnan(), o.isnan())
        assert torch.equal(g[~finite & ~o.isnan()].double(), o[~finite & ~o.isnan()].double())
        if not finite.any():
            continue
        o, g, p = o[finite].double(), g[finite], p[finite].double()
        allowed = times * (p - o).abs().max().item() + 2 * torch.finfo(g.dtype).eps * o.abs().max().item()
        error = (g.double() - o).abs().max().item()
        assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g}"
