"""`make gpu` without a GPU: a part that fails loses none of the others, and everything that happened is written down."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench import gpu


def fake(results: dict[str, object]):
    """Runs nothing: the outcome of a command whose words contain a key; all others succeed."""
    commands: list[list[str]] = []

    def run(command, limit):
        commands.append(list(command))
        for word, result in results.items():
            if word in command:
                if isinstance(result, BaseException):
                    raise result
                return result
        return (0, "NVIDIA H200|9|0\n") if "torch.cuda.get_device_name" in " ".join(command) else (0, "fine")

    return run, commands


def test_parts_that_fail_lose_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, commands = fake(
        {"--build": (1, "error: no"), "bench": subprocess.TimeoutExpired("bench", 120, b"half"), "compute-sanitizer": OSError("no such file")}
    )
    assert gpu.main(["--part", "norm", "--results", str(tmp_path)], run) == 1
    document = json.loads((tmp_path / "nvidia-h200" / "gpu-norm.json").read_text())
    statuses = {p["part"]: p["status"] for p in document["parts"]}
    assert statuses == {"gpu": "ok", "configure": "ok", "build": "failed", "tests": "ok", "bench": "timeout", "page": "ok", "memcheck": "skipped",
                        "racecheck": "skipped", "synccheck": "skipped"}  # fmt: skip
    assert "half" in next(p["output"] for p in document["parts"] if p["part"] == "bench")
    assert "error: no" in capsys.readouterr().out
    assert any("-DCMAKE_CUDA_ARCHITECTURES=90a-real" in c for c in commands)
    assert all("norm" in c for c in commands if "pytest" in c)


def test_all_well(tmp_path: Path):
    run, commands = fake({})
    assert gpu.main(["--results", str(tmp_path)], run) == 0
    assert any("--out" in c and str(tmp_path / "nvidia-h200" / "ops.json") in c for c in commands)
    assert sum(limit for *_, limit in gpu.parts("python", "80-real", None, tmp_path, tmp_path / "x", "")) <= 600


def test_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(command, limit):
        return 1, "RuntimeError: no NVIDIA driver"

    assert gpu.main(["--results", str(tmp_path)], run) == 1
    assert "no NVIDIA driver" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_names():
    assert gpu.architecture((8, 0)) == "80-real"
    assert gpu.architecture((9, 0)) == "90a-real"
    assert gpu.slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"


def test_a_folder_without_wheels_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit):
        gpu.main(["--peers", str(tmp_path)])
