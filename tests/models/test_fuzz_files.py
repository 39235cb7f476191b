"""20,000 hostile model files and directories: see fuzz_files.py, which also repeats and extends a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.subproc import PYTHON_DIR

ROOT = Path(__file__).parents[2]


@pytest.mark.fuzz
@pytest.mark.timeout(600)
def test_twenty_thousand_cases():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PYTHON_DIR), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.fuzz_files", "--cases", "20000"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["cases"] == 20_000
    assert seen["failures"] == 0
    assert seen["grown_mib"] < 256
    assert seen["ends"]["generates"] > 1000, "the changes are so rough that little is reached"
    assert seen["ends"]["not finite"] > 20
    assert seen["ends"]["ModelFileError"] > 5000
