"""The layer rule: a package imports only from those below it, and only a few may touch the native module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "python" / "stretto"
LAYERS = [
    {"ops"}, {"cache"}, {"models"}, {"parallel"}, {"decoding", "denoise"}, {"engine"}, {"scaling"}, {"adapt", "plan"}, {"serve"}, {"cli"},
]  # fmt: skip
RANK = {package: rank for rank, layer in enumerate(LAYERS) for package in layer}
FOR_ALL = {"errors"}  # imports nothing of ours
NATIVE_ALLOWED = {"ops", "cache", "decoding"}  # decoding: host structures such as the trie
NATIVE_FILES = {"cli/doctor.py", "cli/bench/machine.py"}  # they report what the binary is


def imported(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module or name) of everything a file imports, inside functions too."""
    package = ["stretto", *Path(file).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def violations(source: str, file: str) -> list[str]:
    """What breaks the rule in `file` (its path below the package)."""
    tree = ast.parse(source, file)
    owner = Path(file).parts[0] if len(Path(file).parts) > 1 else ""
    found = []
    if owner and owner not in RANK:
        return [f"{file}: package {owner} has no place in the layer order"]
    for line, name in imported(tree, file):
        parts = name.split(".")
        if parts[0] != "stretto":
            continue
        target = parts[1] if len(parts) > 1 else ""
        if owner == "cli" and len(parts) <= 2 and target not in RANK and target != "_C":
            continue  # the command line uses stretto as its users do
        if target == "_C" or target in FOR_ALL or (owner and target == owner) or not owner:
            continue  # `_C` is checked below; stretto/*.py re-export from anywhere
        if target not in RANK:
            found.append(f"{file}:{line}: {owner} imports {name}, which is no package below it")
        elif RANK[target] >= RANK[owner]:
            found.append(f"{file}:{line}: {owner} imports {name}, which is not below it")
    if file == "errors.py" and any(name.startswith("stretto") for _, name in imported(tree, file)):
        found.append("errors.py imports from stretto")
    if owner not in NATIVE_ALLOWED and file not in NATIVE_FILES:
        found += [f"{file}:{line}: touches the native module" for line in native_uses(tree, file)]
    return found


def native_uses(tree: ast.AST, file: str) -> Iterator[int]:
    """Lines that import stretto._C, reach it through another module's attribute, or name it in a string."""
    for line, name in imported(tree, file):
        if name.split(".")[:2] == ["stretto", "_C"]:
            yield line
    for node in ast.walk(tree):
        is_torchs = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
        if (isinstance(node, ast.Attribute) and node.attr == "_C" and not is_torchs) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip() in {"stretto._C", "_C"}
        ):
            yield node.lineno


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layer_rule(path: Path):
    assert violations(path.read_text(), str(path.relative_to(PACKAGE))) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/x.py", "from stretto.cache import pages"),
        ("ops/x.py", "def f():\n    import stretto.engine"),
        ("models/text/x.py", "from stretto import engine"),
        ("models/text/x.py", "from ...decoding import trie"),
        ("decoding/x.py", "from stretto.denoise import loop"),
        ("cache/x.py", "from stretto import load"),
        ("engine/x.py", "from stretto import _C"),
        ("engine/x.py", "from stretto.ops import _backend\n_backend._C.isa()"),
        ("serve/x.py", "importlib.import_module('stretto._C')"),
        ("helpers/x.py", "pass"),
    ],
)
def test_rule_sees_violations(file: str, source: str):
    assert violations(source, file)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models/text/x.py", "from stretto.ops import norm\nfrom stretto.cache.pages import Pages\nfrom . import y"),
        ("engine/x.py", "import torch\ntorch._C._get_tracing_state()\nfrom stretto.errors import OutOfPages"),
        ("cli/doctor.py", "from stretto.ops import _backend\n_backend._C.isas()"),
        ("__init__.py", "from stretto.engine import load"),
        ("cli/x.py", "import stretto\nstretto.load"),
    ],
)
def test_rule_allows_what_it_should(file: str, source: str):
    assert violations(source, file) == []
