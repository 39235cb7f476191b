"""What the CUDA shim sees: each planted mistake is an error or a difference between orders, and a right kernel is neither."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest
import stretto.ops  # noqa: F401  fills the table
import torch
from stretto.ops import _backend
from stretto.ops.table import OPS, Case, Make
from torch import Tensor

from tests.conftest import SHIM_KERNELS, SHIM_LIBRARY
from tests.ops.test_table import call
from tests.oracle import same_bits

pytestmark = pytest.mark.skipif(not SHIM_KERNELS, reason="the shim is not built")

ORDERS = (0, 1, 2, 3)  # forward, backward, two shuffles; copies arrive late in even ones, at once in odd ones
THREADS = 64


class Entry(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("params_bytes", ctypes.c_size_t),
        ("launch", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)),
    ]


class Table(ctypes.Structure):
    _fields_ = [("abi", ctypes.c_uint32), ("count", ctypes.c_uint32), ("entries", ctypes.POINTER(Entry)), ("target", ctypes.c_char_p)]


class Planted(ctypes.Structure):
    _fields_ = [("out", ctypes.c_void_p), ("input", ctypes.c_void_p), ("threads", ctypes.c_int64)]


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(SHIM_LIBRARY.with_name(name)))


@pytest.fixture(scope="module")
def planted() -> dict[str, Callable[[Tensor, Tensor, int], None]]:
    """name -> run(out, input, order), raising RuntimeError with the shim's message."""
    library = _library("_cuda_planted.so")
    library.stretto_kernel_table.restype = ctypes.POINTER(Table)
    table = library.stretto_kernel_table().contents

    def runner(entry: Entry) -> Callable[[Tensor, Tensor, int], None]:
        def run(out: Tensor, values: Tensor, order: int) -> None:
            assert entry.params_bytes == ctypes.sizeof(Planted)
            params, message = Planted(out.data_ptr(), values.data_ptr(), THREADS), ctypes.create_string_buffer(512)
            library.stretto_shim_set_order(order)
            if entry.launch(ctypes.byref(params), 0, None, message, len(message)):
                raise RuntimeError(message.value.decode())

        return run

    return {e.name.decode(): runner(e) for e in table.entries[: table.count]}


@pytest.fixture
def set_order() -> Iterator[Callable[[int], None]]:
    library = _library("_cuda_shim.so")
    yield library.stretto_shim_set_order
    library.stretto_shim_set_order(0)


def results(run: Callable[[Tensor, Tensor, int], None]) -> list[Tensor]:
    values, outs = torch.randn(THREADS, generator=torch.Generator().manual_seed(0)), []
    for order in ORDERS:
        outs.append(torch.full((THREADS,), torch.nan))
        run(outs[-1], values, order)
    return outs


def test_a_right_kernel_is_right_in_every_order(planted):
    values = torch.randn(THREADS, generator=torch.Generator().manual_seed(0))
    for out in results(planted["right"]):
        assert same_bits(out, values.roll(-1))


@pytest.mark.parametrize("order", ORDERS)
def test_tensor_core_instructions_multiply(planted, order: int):
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=gen).bfloat16().float() for shape in ((16, 16), (16, 8)))
    out = torch.full((16, 8), torch.nan)
    planted["product"](out, torch.cat((a.flatten(), b.t().flatten())), order)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["missing_barrier", "race", "block_race", "copy_not_awaited"])
def test_what_depends_on_the_order_is_seen(planted, name: str):
    first, *others = results(planted[name])
    assert not all(same_bits(first, other) for other in others)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("past_shared", "past_shared_kernel: block (0, 0, 0): thread (63, 0, 0) accesses shared memory at byte 256 of 256"),
        ("early_return", "thread (3, 0, 0) returns while thread (0, 0, 0) waits at __syncthreads"),
        ("parted_barrier", "meets __syncthreads in line"),
        ("parted_warp", "all threads wait: thread (0, 0, 0) at __shfl_xor_sync"),
        ("absent_lane", "__shfl_sync reads lane 20, which takes no part"),
    ],
)
def test_what_must_not_happen_is_an_error(planted, name: str, message: str):
    with pytest.raises(RuntimeError) as caught:
        planted[name](torch.empty(THREADS), torch.randn(THREADS), 0)
    assert message in str(caught.value)
    planted["right"](torch.empty(THREADS), torch.randn(THREADS), 0)  # a failed launch leaves nothing behind


def test_reading_past_an_input_is_an_error(planted):
    with pytest.raises(RuntimeError, match=r"thread \(63, 0, 0\) accesses address"):
        planted["past_input"](torch.empty(THREADS), fenced(torch.randn(THREADS)), 0)


_fences: list[mmap.mmap] = []  # a mapping must outlive the tensor on it


def fenced(t: Tensor, before: bool = False) -> Tensor:
    """A copy of a contiguous tensor whose last byte (or first, `before`) lies against a page that must not be touched."""
    page = mmap.PAGESIZE
    size = -(-max(t.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    _fences.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for fence in (base, base + page + size):
        assert libc.mprotect(ctypes.c_void_p(fence), page, 0) == 0
    offset = page if before else page + size - t.nbytes
    if t.numel() == 0:
        return t.clone()
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
    return copy.copy_(t)


CASES = [pytest.param(op, case, id=f"{op.name}-{case.id}") for op in OPS.values() if SHIM_KERNELS.issuperset(op.kernels) for case in op.cases(Make())]


@pytest.fixture
def shim() -> Iterator[None]:
    _backend._C.route_to_shim(True)
    yield
    _backend._C.route_to_shim(False)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_no_kernel_depends_on_the_order_of_threads(op, case: Case, shim, set_order):
    runs = []
    for order in ORDERS:
        set_order(order)
        runs.append(call(op.function, case))
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("before", [False, True], ids=["end", "start"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_no_kernel_leaves_its_tensors(op, case: Case, before: bool, shim):
    def fence(values):
        if isinstance(values, Tensor):
            return fenced(values, before) if values.is_contiguous() and type(values) is Tensor else values
        if isinstance(values, tuple | list):
            return type(values)(fence(v) for v in values)
        return {k: fence(v) for k, v in values.items()} if isinstance(values, dict) else values

    want = call(op.function, case)
    got = call(op.function, Case(case.id, case.args, case.kwargs), lambda values: fence(values))
    for one, other in zip(got, want, strict=True):
        assert same_bits(one, other)
