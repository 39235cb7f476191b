"""What only a GPU shows: streams, graph capture, illegal values that must do no harm, CUDA against CPU. Skipped where there is none."""

from __future__ import annotations

import contextlib

import pytest
import stretto
import torch
from stretto import ops
from stretto.ops import _backend, norm, sampling
from stretto.ops.table import OPS, Case, Make, missing_on_cuda

from tests.ops.test_table import call, to_device
from tests.oracle import same_bits, tensors_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or bool(_backend.cuda_kernels()[1]), reason="no GPU, or no CUDA kernels in this build")

CUDA = torch.device("cuda")
READY = [op for op in OPS.values() if torch.cuda.is_available() and not missing_on_cuda(op)]


@pytest.mark.parametrize("op", READY, ids=lambda op: op.name)
def test_runs_are_equal_to_the_bit(op):
    case = list(op.cases(Make()))[-1]
    first, second = (call(op.function, case, lambda v: to_device(v, CUDA)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert same_bits(one.cpu(), other.cpu())


@pytest.mark.parametrize("op", READY, ids=lambda op: op.name)
def test_illegal_values_do_no_harm(op):
    """Checks that read values are left out on CUDA: a kernel meets them, and must neither fault nor touch what is not its own."""
    for bad in op.bad_cases(Make()):
        if all(t.numel() for t in tensors_of(Case("", bad.args, bad.kwargs))):
            with contextlib.suppress(bad.error):  # what needs no look at values is refused here too
                op.function(*to_device(bad.args, CUDA), **to_device(dict(bad.kwargs), CUDA))
            torch.cuda.synchronize()


def test_kernels_run_on_the_current_stream():
    x, w = torch.randn(64, 4096, device=CUDA), torch.ones(4096, device=CUDA)
    want = norm.rms_norm(x, w, 1e-5)
    side, late = torch.cuda.Stream(), torch.empty_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = norm.rms_norm(late, w, 1e-5)
    side.synchronize()
    assert same_bits(got.cpu(), want.cpu())


def test_a_step_is_captured_in_a_graph():
    x, w, rows = torch.randn(8, 512, device=CUDA), torch.ones(512, device=CUDA), torch.tensor([8], dtype=torch.int32, device=CUDA)
    normed, token = torch.empty_like(x), torch.empty(8, dtype=torch.int32, device=CUDA)

    def step() -> None:
        norm.rms_norm(x, w, 1e-5, out=normed, num_rows=rows)
        sampling.argmax(normed, out=token, num_rows=rows)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for count in (8, 3):
        x.copy_(torch.randn(8, 512))
        rows.fill_(count)
        token.fill_(-7)
        graph.replay()
        want = [*sampling.argmax(norm.rms_norm(x, w, 1e-5))[:count].tolist(), *[-7] * (8 - count)]
        assert token.tolist() == want


def test_an_op_without_a_kernel_says_so():
    missing = next((op for op in OPS.values() if missing_on_cuda(op)), None)
    if missing is None:
        pytest.skip("every op has a CUDA kernel")
    case = next(c for c in missing.cases(Make()) if all(t.numel() for t in tensors_of(c)))
    with ops.strict(), pytest.raises(stretto.FallbackRefused, match="no CUDA kernel"):
        missing.function(*to_device(case.args, CUDA), **to_device(dict(case.kwargs), CUDA))
