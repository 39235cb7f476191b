"""`stretto version`."""

from __future__ import annotations

from importlib import metadata

from stretto.cli.common import Debug, Json, print_json


def version(json: Json = False, debug: Debug = False) -> None:
    """Print the version."""
    import platform

    import stretto

    if json:
        print_json({"stretto": stretto.__version__, "python": platform.python_version(), "torch": metadata.version("torch")})
    else:
        print(f"stretto {stretto.__version__}")
