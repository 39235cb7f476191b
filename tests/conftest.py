"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stretto.ops import _backend


def _isas() -> list[str]:
    return list(_backend._C.isas()) if _backend._C is not None else ["reference"]


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set this machine has."""
    if _backend._C is None:
        yield "reference"
        return
    before = _backend._C.isa()
    _backend._C.set_isa(request.param)
    yield request.param
    _backend._C.set_isa(before)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = _backend.num_threads()
    yield
    _backend.set_num_threads(before)
