"""What every op of the table must do: equal its reference, refuse bad input by name, leave inputs alone, and not depend on threads."""

from __future__ import annotations

import itertools

import pytest
import stretto.ops as ops
import torch
from stretto.ops import _backend
from stretto.ops.table import OPS, Case, Make
from torch import Tensor

from tests.oracle import assert_close_to_oracle, copies, same_bits, tensors_of, to_double

LEGAL = [pytest.param(op, case, id=f"{op.name}-{case.id}") for op in OPS.values() for case in op.cases(Make())]
ILLEGAL = [pytest.param(op, bad, id=f"{op.name}-{bad.id}") for op in OPS.values() for bad in op.bad_cases(Make())]


def call(function, case: Case, convert=lambda values: values):
    """Results of a call on copies of the case's tensors, followed by those copies: what an op changes is compared like what it returns."""
    args, kwargs = convert(copies(case.args)), convert(copies(dict(case.kwargs)))
    result = function(*args, **kwargs)
    results = result if isinstance(result, tuple | list) else (result,)
    return [r for r in results if isinstance(r, Tensor)] + list(tensors_of(Case("", args, kwargs)))


def to_device(values, device: torch.device):
    """The same arguments with every tensor on the device, strides kept."""
    if isinstance(values, Tensor):
        return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=device).copy_(values)
    if isinstance(values, tuple | list):
        return type(values)(to_device(v, device) for v in values)
    return {k: to_device(v, device) for k, v in values.items()} if isinstance(values, dict) else values


@pytest.mark.parametrize(("op", "case"), LEGAL)
def test_matches_reference(op, case: Case, isa, device):
    oracle = call(op.reference, case, to_double)
    got = call(op.function, case) if device.type == "cpu" else [t.cpu() for t in call(op.function, case, lambda v: to_device(v, device))]
    assert_close_to_oracle(got, oracle, call(op.reference, case), times=op.tolerance)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_reference_makes_tensors_where_its_inputs_are(op, monkeypatch):
    """With meta as the default device, a tensor made without `device=` has no data: the call fails, or its results are not those of the CPU."""
    monkeypatch.setattr(_backend, "use_reference", lambda *_: True)
    small = [case for case in op.cases(Make()) if sum(t.numel() for t in tensors_of(case)) < 30_000]
    assert small
    for case, function in itertools.product(small, (op.reference, op.function)):
        expected = call(function, case)
        with torch.device("meta"):
            got = call(function, case)
        assert all(one.is_cpu and same_bits(one, other) for one, other in zip(got, expected, strict=True)), case.id


@pytest.mark.parametrize(("op", "case"), LEGAL)
def test_threads_do_not_change_bits(op, case: Case):
    runs = []
    for threads in (1, 2):
        ops.set_num_threads(threads)
        runs.append(call(op.function, case))
    for one, two in zip(*runs, strict=True):
        assert same_bits(one, two)


@pytest.mark.parametrize(("op", "bad"), ILLEGAL)
def test_refuses_bad_input(op, bad):
    with pytest.raises(bad.error) as caught:
        op.function(*bad.args, **bad.kwargs)
    assert bad.message in str(caught.value)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_opcheck(op):
    case = next(c for c in op.cases(Make()) if all(t.numel() for t in tensors_of(c)))
    torch.library.opcheck(getattr(torch.ops.stretto, op.name).default, case.args, dict(case.kwargs))
