"""The command line with a real model: one JSON document and nothing else on stdout, bad input in words and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

MODEL = "smollm2-135m"
COMMAND = [sys.executable, "-c", "import sys; from stretto.cli import main; sys.exit(main())"]
PACKAGE = str(Path(__file__).parents[2] / "python")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([PACKAGE, os.environ.get("PYTHONPATH", "")])}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)


def document(*arguments: str) -> Any:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_generate():
    question = "What is the capital of France?"
    result = document("generate", MODEL, question, "--max-tokens", "16", "--temperature", "0")
    assert set(result) >= {"text", "tokens", "finish_reason", "usage", "stats"}
    assert "Paris" in result["text"]
    assert result["finish_reason"] == "stop"
    assert run("generate", MODEL, question, "--max-tokens", "16").stdout.strip() == result["text"].strip()


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_verify_finds_no_difference(tmp_path: Path, temperature: str):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Repeat: a b c d e f g a b c d e f g\nName three rivers.\n")
    arguments = ("--decode", "trie", "--prompts", str(prompts), "--max-tokens", "24", "--temperature", temperature)
    result = document("verify", MODEL, *arguments)
    assert result["differences"] == []
    assert result["identical"] == result["prompts"] == 2


def test_doctor():
    started = time.monotonic()
    result = document("doctor")
    assert time.monotonic() - started < 60  # 20 s on a machine of its own
    assert result["versions"]["stretto"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "no/such.gguf", "hi"), "no/such.gguf: no such file"),
        (("generate", MODEL, ""), "prompt: empty"),
        (("generate", MODEL, "hi", "--max-tokens", "0"), "max_tokens: 0"),
        (("generate", MODEL, "hi", "--max-tokens", "-4"), "max_tokens: -4"),
        (("generate", MODEL, "hi", "--temperature", "nan"), "temperature: nan"),
        (("generate", MODEL, "hi", "--temperature", "-1"), "temperature: -1"),
        (("generate", MODEL, "hi", "--decode", "magic"), "decode: 'magic'"),
        (("generate", MODEL, "hi", "--threads", "0"), "threads: 0"),
        (("generate", MODEL, "word " * 9000), "context"),
        (("verify", MODEL, "--prompts", "no/such/file"), "no/such/file"),
        (("generate",), "Missing argument"),
    ],
    ids=lambda value: " ".join(v[:20] for v in value) if isinstance(value, tuple) else None,
)
def test_bad_input(arguments: tuple[str, ...], message: str):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_damaged_file(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 60)
    done = run("generate", str(path), "hi")
    assert done.returncode == 2
    assert "version" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupt_ends_cleanly():
    process = subprocess.Popen(
        [*COMMAND, "generate", MODEL, "Count up to a million.", "--max-tokens", "6000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
