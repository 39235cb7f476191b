"""Fixtures for every test, and what pytest is told about instruction sets, the CUDA shim and devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stretto.ops import _backend

SHIM = "cuda-shim"
"""CUDA kernels on the CPU, one more instruction set: docs/cuda.md."""

SHIM_LIBRARY = Path(__file__).parent.parent / "build" / "cuda_shim" / "_cuda_shim.so"


def _load_shim() -> frozenset[str]:
    """Names of the CUDA kernels that run here through the shim."""
    if _backend._C is None or not SHIM_LIBRARY.exists() or os.environ.get("STRETTO_TEST_SHIM") == "0":
        return frozenset()
    _, names = _backend._C.load_kernels(str(SHIM_LIBRARY))
    return frozenset(names)


SHIM_KERNELS = _load_shim()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda_kernels(*names): a test with the `isa` fixture runs on these CUDA kernels too, through the shim")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the op table's cases run: cpu or cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`isa`: each instruction set of this machine, and the CUDA shim for tests of the op table or marked with cuda_kernels."""
    if "isa" not in metafunc.fixturenames or any("isa" in m.args[0] for m in metafunc.definition.iter_markers("parametrize")):
        return
    if metafunc.config.getoption("--device") != "cpu":  # one way only: the kernels of that device
        metafunc.parametrize("isa", [metafunc.config.getoption("--device")], indirect=True)
        return
    isas = list(_backend._C.isas()) if _backend._C is not None else ["reference"]
    marker = metafunc.definition.get_closest_marker("cuda_kernels")
    if (marker and SHIM_KERNELS.issuperset(marker.args)) or (SHIM_KERNELS and "op" in metafunc.fixturenames):
        isas.append(SHIM)
    metafunc.parametrize("isa", isas, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The op table's tests run through the shim, or on a CUDA device, only for ops that have such kernels."""
    on_cuda = config.getoption("--device") == "cuda"
    kernels = {SHIM: SHIM_KERNELS, "cuda": _backend.cuda_kernels()[0] if on_cuda else frozenset()}

    def has_kernels(item: pytest.Item) -> bool:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        isa = params.get("isa")
        return isa not in kernels or "op" not in params or kernels[isa].issuperset(params["op"].kernels)

    items[:] = [item for item in items if has_kernels(item)]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set this machine has."""
    if _backend._C is None:
        yield "reference"
        return
    before = _backend._C.isa()
    if request.param == SHIM:
        _backend._C.route_to_shim(True)
    elif request.param != "cuda":
        _backend._C.set_isa(request.param)
    yield request.param
    _backend._C.route_to_shim(False)
    _backend._C.set_isa(before)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """What `--device` names: the op table's cases are moved there."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = _backend.num_threads()
    yield
    _backend.set_num_threads(before)
