"""What verbs share: option types, one way to print JSON, one way to fail."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, a Hugging Face directory, or a known name such as smollm2-135m.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads to compute with. Default: what this process may use.")]
Decode = Annotated[str, typer.Option("--decode", help="How to speculate: auto, off, ngram, trie or draft:MODEL. The text is the same for each.")]
KvDtype = Annotated[str | None, typer.Option("--kv-dtype", help="Element type of the cache: f16 (default), f32, bf16 or int8.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_debug = False


@contextlib.contextmanager
def debugging(on: bool) -> Iterator[None]:
    """Within the context errors are printed with their traceback."""
    global _debug
    before, _debug = _debug, on
    try:
        yield
    finally:
        _debug = before


def complain(error: BaseException | str, code: int) -> int:
    """Print an error as one line on stderr and return the exit code."""
    if _debug and isinstance(error, BaseException):
        traceback.print_exception(error, file=sys.stderr)
    note(" ".join(str(error).split()) or type(error).__name__)
    return code


def note(text: str) -> None:
    """A line for the person at the terminal: stderr, so that stdout holds results only."""
    print(f"stretto: {text}", file=sys.stderr, flush=True)


def short_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """Warnings as one line, like errors."""
    note(f"warning: {message}")


def plain(value: Any) -> Any:
    """The same data for strict JSON: numbers that JSON lacks (NaN, infinities) become null, keys become text, paths become text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def print_json(value: Any) -> None:
    """The one document of `--json`."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=True, allow_nan=False, indent=None) + "\n")
    sys.stdout.flush()


def write(text: str) -> None:
    """A piece of generated text: shown at once; what the terminal cannot encode is replaced instead of ending the run."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def integers(text: str, option: str, low: int = 1) -> list[int]:
    """Parse "1,2,4". Raises ValueError naming the option."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: {text!r}, expected integers separated by commas") from None
    if any(v < low for v in values):
        raise ValueError(f"{option}: {text!r}, expected integers of at least {low}")
    return list(dict.fromkeys(values))
