"""Runs a piece of Python in a process of its own: for what may crash, what must happen before an import, and what is counted per process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import stretto

PYTHON_DIR = Path(stretto.__file__).parent.parent
"""Where the package under test lies: the source tree, a sanitized copy or an installed wheel."""


def python(source: str, *, path: Path | None = None, timeout: float = 120, **env: str) -> str:
    """Standard output of `source`; the assertion shows its errors where it fails or crashes. `path` replaces the folder of the package."""
    environment = {**os.environ, "PYTHONPATH": str(path or PYTHON_DIR), "PYTHONFAULTHANDLER": "1", **env}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout
