"""Real text that every Python installation carries: the language reference behind `help()`, and the standard library's sources."""

from __future__ import annotations

import ast
import importlib
import inspect
import pydoc_data.topics
import textwrap

MODULES = (
    "bisect", "calendar", "cmd", "collections", "contextlib", "copy", "csv", "difflib", "fnmatch", "fractions", "functools", "glob", "gzip",
    "heapq", "inspect", "json.decoder", "linecache", "mimetypes", "numbers", "pprint", "queue", "random", "sched", "shlex", "shutil", "statistics",
    "string", "tempfile", "textwrap", "tokenize", "traceback", "types", "weakref", "zipfile",
)  # fmt: skip


def documentation() -> str:
    """The Python language reference as shipped for `help()`, topics in alphabetical order; about 700 KB."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def functions(least: int, most: int) -> list[str]:
    """Sources of top-level functions of MODULES with `least` to `most` lines, unindented, in a fixed order."""
    found = []
    for name in MODULES:
        source = inspect.getsource(importlib.import_module(name))
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno and least <= node.end_lineno - node.lineno + 1 <= most:
                found.append(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
    return found


def passages(least: int, most: int) -> list[str]:
    """Paragraphs of the documentation with `least` to `most` characters, in a fixed order."""
    paragraphs = (" ".join(p.split()) for p in documentation().split("\n\n"))
    return [p for p in paragraphs if least <= len(p) <= most and p[0].isalpha()]
