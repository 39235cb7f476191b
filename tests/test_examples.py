"""Every example runs as it is shown: a reader copies it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from stretto.ops import _backend

from tests.subproc import PYTHON_DIR

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {"sparse_prefill": ["2048"]}  # its default is a size at which the gain shows, and takes half a minute
ELSEWHERE = {"demo"}  # `make demo`; its parts are tested in tests/cli and tests/engine


@pytest.mark.skipif(_backend._C is None, reason="the native module is not built")
@pytest.mark.parametrize("name", sorted({p.stem for p in EXAMPLES.glob("*.py")} - ELSEWHERE))
def test_example(name: str):
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(EXAMPLES / f"{name}.py"), *ARGUMENTS.get(name, [])],
        env={"PYTHONPATH": str(PYTHON_DIR), "OMP_WAIT_POLICY": "passive", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    assert "nan" not in done.stdout.lower().split()
