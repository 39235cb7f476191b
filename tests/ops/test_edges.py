"""Tensors that are not what they seem: each gives the right result or a clear exception, never a crash and never a wrong number.

Every case runs in a process of its own, several ops to a process; a crash shows which op and tensor it was.
"""

from __future__ import annotations

import pytest
import torch
from stretto.ops import _backend, norm
from stretto.ops.table import OPS

from tests.oracle import same_bits
from tests.subproc import python

pytestmark = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")

# Replaces each tensor argument of one case of each op by `disguise(tensor)`, one at a time, and calls the op.
HARNESS = """
import sys, warnings, torch
from stretto.ops.table import OPS, Make
from tests.oracle import copies, tensors_of
warnings.simplefilter("ignore")

class Sub(torch.Tensor):
    pass

def disguise(t):
    {disguise}

def may_return(op, result):
    {may_return}

for op in OPS.values():
    case = next((c for c in op.cases(Make()) if all(t.numel() for t in tensors_of(c))), None)
    for i, tensor in enumerate(case.args if case else ()):
        if not isinstance(tensor, torch.Tensor):
            continue
        print("calling", op.name, "argument", i, file=sys.stderr, flush=True)
        args = copies(case.args)
        try:
            args = (*args[:i], disguise(args[i]), *args[i + 1:])
        except (RuntimeError, NotImplementedError, TypeError):
            continue  # this tensor has no such form
        try:
            result = op.function(*args, **copies(dict(case.kwargs)))
        except (TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            # torch itself asserts that fake and real tensors are not mixed
            assert str(error), (op.name, i)
            continue
        assert may_return(op, result), (op.name, i, "returned")
print("done")
"""

DISGUISES = {
    # name: (body of disguise(t), body of may_return(op, result))
    "numpy": ("return t.float().numpy()", "return False"),
    "list": ("return t.tolist()", "return False"),
    "string": ("return 'x'", "return False"),
    "meta": (
        "return t.to('meta')",
        "return all(r.is_meta for r in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(r, torch.Tensor))",
    ),
    "sparse": ("return t.to_sparse()", "return False"),
    "complex": ("return t.to(torch.complex64)", "return False"),
    "float64": ("return t.double() if t.is_floating_point() else t.to(torch.int16)", "return False"),
    "nine-dims": ("return t.reshape((1,) * (9 - t.dim()) + tuple(t.shape))", "return False"),
    "zero-dims": ("return t.reshape(-1)[0]", "return True"),
    "freed": ("t.untyped_storage().resize_(0); return t", "return False"),
    "fake": (
        "from torch._subclasses.fake_tensor import FakeTensorMode; return FakeTensorMode().from_tensor(t)",
        "return all(type(r).__name__ == 'FakeTensor' for r in (result if isinstance(result, (tuple, list)) else (result,))"
        " if isinstance(r, torch.Tensor))",
    ),
    "subclass": ("return t.as_subclass(Sub)", "return True"),
    "strided": ("return t.repeat_interleave(2, -1)[..., ::2]", "return True"),
    "expanded": ("return t[:1].expand(t.shape)", "return True"),
    "grad": ("return t.requires_grad_()", "return True"),
    "shorter": ("return t[..., :-1]", "return True"),
    "empty": ("return t[:0]", "return True"),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_disguised_tensors(disguise: str):
    body, may_return = DISGUISES[disguise]
    source = HARNESS.replace("{disguise}", body).replace("{may_return}", may_return)
    assert python(source).endswith("done\n")


def test_every_op_has_a_case_to_disguise():
    assert OPS


def test_strided_views_give_the_same_bits():
    x, w = torch.randn(6, 40), torch.randn(40)
    want = norm.rms_norm(x, w, 1e-5)
    for view in (x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2], torch.cat([x, x], 1)[:, :40]):
        assert same_bits(norm.rms_norm(view, w, 1e-5), want)


def test_a_lazily_negated_view_keeps_its_sign_or_is_refused():
    x = torch.randn(3, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    with pytest.raises(ValueError, match="x: a lazily negated view"):
        norm.rms_norm(x, torch.ones(8), 1e-5)
    through_dispatcher = torch.ops.stretto.rms_norm(x, torch.ones(8), 1e-5, None)
    assert same_bits(through_dispatcher, norm.rms_norm(x.resolve_neg(), torch.ones(8), 1e-5))


def test_parameter_and_subclass_and_compile():
    class Sub(torch.Tensor):
        pass

    x, w = torch.randn(3, 8), torch.randn(8)
    want = norm.rms_norm(x, w, 1e-5)
    with torch.no_grad():
        assert same_bits(norm.rms_norm(x, torch.nn.Parameter(w), 1e-5), want)
    assert same_bits(norm.rms_norm(x.as_subclass(Sub), w, 1e-5).as_subclass(torch.Tensor), want)
    compiled = torch.compile(lambda a, b: norm.rms_norm(a, b, 1e-5) * 2, backend="eager", fullgraph=True)
    assert same_bits(compiled(x, w), want * 2)


def test_gradient_is_that_of_the_reference():
    x, w = torch.randn(3, 8, dtype=torch.float32, requires_grad=True), torch.randn(8, requires_grad=True)
    got = torch.autograd.grad(norm.rms_norm(x, w, 1e-5).square().sum(), (x, w))
    want = torch.autograd.grad(torch.nn.functional.rms_norm(x, (8,), w, 1e-5).square().sum(), (x, w))
    torch.testing.assert_close(got, want)


def test_torch_func_is_refused():
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        torch.func.vmap(lambda row: norm.rms_norm(row[None], torch.ones(8), 1e-5))(torch.randn(4, 8))


def test_checks_in_python_and_in_cpp_agree():
    """The quick check accepts exactly what the Python function accepts: same sizes, or the same error."""
    from stretto.ops import _check

    slow = _check.check_tensors.__self__
    f32, i32 = (torch.float32,), (torch.int32,)
    x, y, i = torch.randn(2, 3), torch.randn(3, 4), torch.zeros(2, dtype=torch.int32)
    calls = [
        {"a": (x, "rows width", f32), "b": (y, "width out", f32), "i": (i, "rows", i32)},
        {"a": (x, "rows width", f32), "b": (y, "rows out", f32)},
        {"a": (x, "2 _", f32)},
        {"a": (x, "3 _", f32)},
        {"a": (x, "rows", f32)},
        {"a": (x, "", f32)},
        {"a": (torch.tensor(1.0), "", f32)},
        {"a": (x, "n n", f32)},
        {"a": (x, "rows width", i32)},
        {"a": (None, "rows", f32), "i": (i, "n", i32)},
        {"a": (x.numpy(), "rows width", f32)},
        {"a": (x.to("meta"), "rows width", f32), "i": (i, "rows", i32)},
        {"a": (torch.nn.Parameter(x), "rows width", f32)},
        {"a": (x[:0], "rows width", f32)},
        {"a": (x, "rows width", [torch.float32])},
        {},
    ]
    for tensors in calls:
        outcomes = []
        for function in (slow, _check.check_tensors):
            try:
                outcomes.append(function("op", **tensors))
            except (TypeError, ValueError) as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1], tensors
