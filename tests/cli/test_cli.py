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


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=text, capture_output=True, text=True, timeout=240, env=ENVIRONMENT, check=False)


def document(*arguments: str, text: str = "") -> Any:
    """What `--json` prints: one document in one line, strict JSON, and nothing else."""
    done = run(*arguments, "--json", text=text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(done.stdout, parse_constant=refuse)


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


def test_chat_reads_lines_and_prints_the_conversation():
    result = document("chat", MODEL, "--max-tokens", "8", "--system", "Be brief.", text="Name a river.\n\nAnother one.\n")
    assert [m["role"] for m in result["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [r["text"] for r in result["replies"]] == [m["content"] for m in result["messages"][2::2]]
    shown = run("chat", MODEL, "--max-tokens", "8", "--system", "Be brief.", text="Name a river.\n/stats\n/nonsense\n/clear\n/quit\n")
    assert shown.returncode == 0
    assert shown.stdout.strip() == result["replies"][0]["text"].strip()
    assert "tokens/s" in shown.stderr


def test_version():
    assert set(document("version")) == {"stretto", "python", "torch"}


def test_bench_decode(tmp_path: Path):
    few = ("--threads", "1", "--contexts", "16", "--prefills", "16", "--batch-contexts", "16", "--sequences", "2", "--rows", "2")
    result = document("bench", "decode", MODEL, "--peers", "", "--rounds", "1", "--steps", "1", *few, "--out", str(tmp_path / "a.json"))
    assert result["kind"] == "decode"
    assert json.loads((tmp_path / "a.json").read_text()) == result


def test_bench_ops():
    assert document("bench", "ops", "sampling_argmax", "--rounds", "1", "--threads", "1")["kind"] == "ops"


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
        (("generate", "no-such-model", "hi"), "no-such-model"),
        (("generate", MODEL, "hi", "--temperature", "inf"), "temperature: inf"),
        (("generate", MODEL, "hi", "--max-tokens", "many"), "max-tokens"),
        (("generate", MODEL, "hi", "--top-p", "0"), "top_p: 0"),
        (("generate", MODEL, "hi", "--stop", ""), "stop: "),
        (("generate", MODEL, "hi", "--seed", str(2**64)), "seed: "),
        (("generate", MODEL, "hi", "--kv-dtype", "f8"), "kv_dtype: 'f8'"),
        (("generate", MODEL, "hi", "--decode", "draft:no-such-model"), "no-such-model"),
        (("generate", MODEL, "hi", "--nonsense"), "nonsense"),
        (("generate", MODEL, "hi", "--max-tokens", "0", "--json"), "max_tokens: 0"),
        (("chat", MODEL, "--max-tokens", "0"), "max_tokens: 0"),
        (("chat", "no/such.gguf"), "no/such.gguf"),
        (("verify", MODEL, "--prompts", __file__, "--batch", "0"), "batch: 0"),
        (("verify", MODEL, "--prompts", __file__, "--max-tokens", "-1"), "max_tokens: -1"),
        (("verify", MODEL, "--prompts", __file__, "--decode", "magic"), "decode: 'magic'"),
        (("verify", MODEL, "--prompts", os.devnull), "no prompts"),
        (("bench", "decode", MODEL, "--peers", "magic"), "peers: 'magic'"),
        (("bench", "decode", MODEL, "--contexts", "a,b"), "contexts"),
        (("bench", "decode", MODEL, "--rounds", "0"), "rounds: 0"),
        (("bench", "decode", MODEL, "--threads", "0"), "threads"),
        (("bench", "decode", MODEL, "--out", "no/such/folder/a.json"), "no/such/folder"),
        (("bench", "ops", "magic"), "magic"),
        (("bench", "ops", "--rounds", "0"), "rounds: 0"),
        (("dance",), "dance"),
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
