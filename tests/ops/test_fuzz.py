"""Every op, with thousands of illegal calls in memory that ends at pages nobody may touch: a result, or an error that names op and argument."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from stretto.ops import _backend
from stretto.ops.table import OPS

from tests.subproc import PYTHON_DIR

pytestmark = [pytest.mark.fuzz, pytest.mark.skipif(_backend._C is None, reason="the native module is not built")]
CASES = int(os.environ.get("STRETTO_FUZZ_CASES", "20000"))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What came of each op that this run asks for; one process imports torch and forks one for each op."""
    names = [i.callspec.params["name"] for i in request.session.items if getattr(i, "module", None) is request.module and hasattr(i, "callspec")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.fuzzing", *names, "--cases", str(CASES)], env={**os.environ, "PYTHONPATH": str(PYTHON_DIR)},
        cwd=request.config.rootpath, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", OPS)
def test_illegal_calls_are_refused_by_name_and_harmless(name: str, outcomes: dict[str, Any]):
    outcome = outcomes[name]
    repeat = f"repeat one with: python -m tests.ops.fuzzing {name} --only NUMBER"
    assert not outcome["problems"], "\n".join([*outcome["problems"][:20], repeat])
    assert outcome["returned"] + outcome["refused"] == CASES
    assert outcome["refused"] > CASES // 10  # else the mutations miss what the op checks
