"""Whether an op still gives what its reference gives: asked before anything is timed, and by `stretto doctor`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.cli.bench.device import moved
from stretto.ops.table import Case, Op


@dataclass(frozen=True)
class Agreement:
    """`error` and `allowed` are largest absolute differences from the reference in float64; `problem` says what else is wrong, or "".

    Allowed: the op's tolerance times the error that the reference makes in the case's own dtype, and two roundings of that dtype.
    """

    ok: bool
    error: float
    allowed: float
    problem: str = ""


def agree(op: Op, case: Case, device: str = "cpu") -> Agreement:
    """Run op, on `device`, and reference, on the CPU, on copies of the case; compare what they return and what they wrote into their arguments."""
    got = [t.cpu() for t in outcome(op.function, Case(case.id, *moved((case.args, dict(case.kwargs)), device)))]
    plain = outcome(op.reference, case)
    exact = outcome(op.reference, Case(case.id, _double(case.args), _double(dict(case.kwargs))))
    if len(got) != len(exact):
        return Agreement(False, 0.0, 0.0, f"{len(got)} tensors, expected {len(exact)}")
    worst = Agreement(True, 0.0, 0.0)
    for g, p, e in zip(got, plain, exact, strict=True):
        one = _compare(g, p, e, op.tolerance)
        if not one.ok:
            return one
        worst = max(worst, one, key=lambda a: a.error)
    return worst


def _compare(got: Tensor, plain: Tensor, exact: Tensor, tolerance: float) -> Agreement:
    if got.shape != exact.shape:
        return Agreement(False, 0.0, 0.0, f"shape {list(got.shape)}, expected {list(exact.shape)}")
    if not got.is_floating_point():
        same = torch.equal(got, exact.to(got.dtype))
        return Agreement(same, 0.0, 0.0, "" if same else "integers differ")
    finite = exact.isfinite()
    if not torch.equal(got[~finite].double().nan_to_num(), exact[~finite].double().nan_to_num()) or not bool(got[finite].isfinite().all()):
        return Agreement(False, 0.0, 0.0, "infinities or NaN in other places")
    if not bool(finite.any()):
        return Agreement(True, 0.0, 0.0)
    e = exact[finite].double()
    error, own = (float((t[finite].double() - e).abs().max()) for t in (got, plain))
    allowed = tolerance * own + 2 * torch.finfo(got.dtype).eps * float(e.abs().max())
    return Agreement(error <= allowed, error, allowed)


def outcome(function: Callable[..., Any], case: Case) -> list[Tensor]:
    """Tensors a call returns, then the tensors it was given: an op that writes into its arguments is compared by them."""
    args, kwargs = copy.deepcopy((case.args, dict(case.kwargs)))
    result = function(*args, **kwargs)
    returned = result if isinstance(result, tuple | list) else (result,)
    return [t for t in (*returned, *args, *kwargs.values()) if isinstance(t, Tensor)]


def _double(values: Any) -> Any:
    """Floating tensors in float64, everything else as it is."""
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, tuple | list):
        return type(values)(_double(v) for v in values)
    if isinstance(values, dict):
        return {k: _double(v) for k, v in values.items()}
    return values


def has_elements(case: Case) -> bool:
    """Whether every tensor of the case has elements: empty cases test contracts, not arithmetic."""
    return all(v.numel() > 0 for v in (*case.args, *case.kwargs.values()) if isinstance(v, Tensor))
