"""The generated page: goals are marked as they are, and the committed page belongs to the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stretto.ops.table import OPS

from bench import ops_page, performance


def document(speedup: float, cost: float) -> dict[str, Any]:
    entry = {
        "what": "decode", "tokens": 1, "context": 128, "sequences": 1, "rows": 1,
        "engines": {"stretto": {"tokens_per_second": 100.0}, "peer": {"tokens_per_second": 100 / speedup}},
        "ratios": {"A": {"peer": "peer", "median": speedup, "low": speedup, "high": speedup}},
        "roofline": {"bound_seconds": 0.005},
    }  # fmt: skip
    run = {
        "threads": 2, "ceilings": {"read_gb_per_s": 30.0, "f32_gflops": 100.0, "int8_gops": None}, "engines": {"stretto": {}, "peer": {}},
        "measurements": [entry], "step_cost": {"stretto": {"1": 1.0, "8": cost}, "peer": {"1": 1.0, "8": 6.0}},
    }  # fmt: skip
    return {"kind": "decode", "model": "m", "machine": {"cpu": "c"}, "command": "stretto bench decode m", "rounds": 3, "runs": [run]}


@pytest.mark.parametrize(("speedup", "cost", "verdicts"), [(1.6, 2.0, ["reached", "reached"]), (1.4, 3.0, ["**missed**", "**missed**"])])
def test_goals_are_marked(tmp_path: Path, speedup: float, cost: float, verdicts: list[str]):
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "a.json").write_text(json.dumps(document(speedup, cost)))
    text = performance.page(results)
    assert f"goal 1.5×: {verdicts[0]}" in text
    assert f"goal 2.5: {verdicts[1]}" in text
    assert "| 50% |" in text


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median, "high": median}


@pytest.mark.parametrize(("factor", "word"), [(0.9, "reached"), (1.1, "**missed**")])
def test_goals_of_start_and_correctness_are_marked(factor: float, word: str):
    fields = {"import_seconds": 0.3, "load_seconds": 1.0, "first_token_seconds": 1.5, "base_bytes": 0.0, "peak_bytes": 2e8}
    common = {"model": "m", "command": "c"}
    start = {"threads": 2, "file_bytes": 10**8, "rounds": 5, "fields": {f: spread(factor * v) for f, v in fields.items()}}
    logits = {"positions": 9, "kl": 0.01 * factor, "same_argmax": 1.0, "relative_error": 1e-3 * factor}
    texts = {"tokens": 9, "window": 5, "stretto": 10 * (1 + 0.005 * factor), "peers": {"llama.cpp": 10.0, "llama.cpp Q4_0": 12.0}}
    for section, found, goals in (
        (performance.startup_section, start, 3),
        (performance.divergence_section, logits, 2),
        (performance.perplexity_section, texts, 1),
    ):
        text = "\n".join(section(common | found, "f"))
        assert text.count(word) == text.count("goal") == goals


def test_unknown_results_are_refused(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"kind": "dance"}')
    with pytest.raises(ValueError, match=r"a\.json: kind: 'dance'"):
        performance.page(tmp_path)


def test_the_page_is_up_to_date():
    assert performance.PAGE.read_text() == performance.page(performance.RESULTS)


def test_kernels_have_their_section(tmp_path: Path):
    entry = {"op": "rms_norm", "case": "1 row", "dtype": "bfloat16", "us": 3.2, "roof_share": 0.5, "ratio": 1.25, "peers": {"torch": 4.0, "other": 5.0},
             "check": {"ok": True}}  # fmt: skip
    document = {"kind": "ops", "command": "stretto bench ops", "rounds": 7, "machine": {"device": "NVIDIA X", "commit": "abc"},
                "ceilings": [{"device": "NVIDIA X", "copy_gb_per_s": 4000.0}], "entries": [entry, entry | {"peers": {}, "ratio": None}]}  # fmt: skip
    folder = tmp_path / "bench" / "results" / "nvidia-x"
    folder.mkdir(parents=True)
    (folder / "ops.json").write_text(json.dumps(document))
    (folder / "gpu.json").write_text(json.dumps({"kind": "gpu", "device": "NVIDIA X", "parts": [{"part": "build", "status": "ok", "seconds": 9}]}))
    text = performance.page(tmp_path / "bench" / "results")
    assert "| rms_norm | 1 row | bfloat16 | 3.2 | 50% | 1.25× | torch | yes |" in text
    assert "| rms_norm | 1 row | bfloat16 | 3.2 | 50% | – | – | yes |" in text
    assert "build ok (9 s)" in text


def test_the_page_of_ops_is_up_to_date():
    assert ops_page.PAGE.read_text() == ops_page.page(ops_page.measured(ops_page.RESULTS)), "python -m bench.ops_page writes it"


def test_every_op_has_its_contract_on_the_page(tmp_path: Path):
    text = ops_page.page({"rms_norm": [{
        "case": "c", "dtype": "float32", "threads": 2, "us": 1.0, "gb_per_s": 2.0, "gflops": 3.0, "roof_share": 0.5, "peers": {"slow": 3.0, "fast": 0.5},
        "ratio": 0.5, "machine": "m", "file": "f",
    }]})  # fmt: skip
    assert "| c | float32 | 2 | 1.0 | 2.0 | 3.0 | 50% | fast | 0.50× |" in text
    for op in OPS.values():
        assert f"### {op.name}\n" in text
        assert op.schema in text
