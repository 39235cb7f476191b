"""Files and requests are hostile: no call in the package can turn data into code, and the repository names no machine of ours."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "stretto"

CODE_FROM_DATA = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
NETWORK = {"socket", "urllib.request", "http.client", "requests", "httpx", "aiohttp", "huggingface_hub", "ftplib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec",
    "os.system", "os.popen", "torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "runpy.run_path", "code.interact",
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle"}


def dotted(node: ast.AST) -> str:
    """a.b.c of an expression, or "" where it is something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def dangers(source: str, file: str) -> list[str]:
    """Imports and calls that may not appear in `file` (its path below the package)."""
    tree = ast.parse(source, file)
    names: dict[str, str] = {}  # local name -> what it stands for
    found = []
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for module in modules:
            if module.split(".")[0] in CODE_FROM_DATA:
                found.append(f"{file}:{node.lineno}: imports {module}, which runs code from data")
            if module in NETWORK and not file.startswith("serve/"):
                found.append(f"{file}:{node.lineno}: imports {module}; only serve/ speaks to a network")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        head, _, rest = name.partition(".")
        name = names.get(head, head) + (f".{rest}" if rest else "")
        if name in FORBIDDEN_CALLS:
            found.append(f"{file}:{node.lineno}: calls {name}")
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in FORBIDDEN_ARGUMENTS and not is_false:
                found.append(f"{file}:{node.lineno}: passes {keyword.arg}=")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_code_from_data(path: Path):
    assert dangers(path.read_text(), str(path.relative_to(PACKAGE))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "eval('1')",
        "import torch\ntorch.load('x')",
        "from torch import load as read\nread('x')",
        "import torch as t\nt.load('x')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=wish)",
        "import yaml\nyaml.load(text)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import requests",
        "from urllib import request",
    ],
)
def test_gate_sees_danger(source: str):
    assert dangers(source, "models/x.py")


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "import re\nre.compile('x')", "import subprocess\nsubprocess.run(['ls'], shell=False)", "import numpy as np\nnp.load(p)"],
)
def test_gate_lets_pass(source: str):
    assert dangers(source, "models/x.py") == []


def tracked_texts() -> list[tuple[str, str]]:
    """Name and content of every text file in version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    texts = []
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and b"\0" not in path.read_bytes()[:4096]:
            texts.append((name, path.read_text(errors="replace")))
    return texts


# Folders that exist on one machine only, package indexes other than the public ones, and addresses of private networks.
MACHINE = re.compile(r"(?<![.\w~/])/(?:work|farm|root|opt/(?:wheels|pypi)|home/\w+|mnt/\w+)(?:/|\b)")
INDEX = re.compile(r"(?:index-url|INDEX_URL|find-links|FIND_LINKS)[\s=\"']+(\S+)")
PRIVATE = re.compile(r"\b(?:10\.\d+\.\d+\.\d+|192\.168\.\d+\.\d+|172\.(?:1[6-9]|2\d|3[01])\.\d+\.\d+)\b")
PUBLIC_INDEXES = ("https://download.pytorch.org/whl/", "https://pypi.org/simple")


def leaks(text: str) -> list[str]:
    """Machine paths, private addresses and private indexes in a text."""
    found = [m.group() for m in MACHINE.finditer(text)] + [m.group() for m in PRIVATE.finditer(text)]
    return found + [m.group(1) for m in INDEX.finditer(text) if "://" in m.group(1) and not m.group(1).startswith(PUBLIC_INDEXES)]


def test_names_no_machine():
    assert {name: found for name, text in tracked_texts() if name != "tests/test_safety.py" and (found := leaks(text))} == {}


@pytest.mark.parametrize("text", ["see /" + "work/notes", "--index-url http://mirror/simple", "host 10." + "1.2.3", "cd /" + "home/me/x"])
def test_leak_gate_sees(text: str):
    assert leaks(text)


def test_no_large_files():
    listed = [(name, len(text)) for name, text in tracked_texts()]
    assert [entry for entry in listed if entry[1] > 2_000_000] == []
