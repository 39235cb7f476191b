"""The generated page: goals are marked as they are, and the committed page belongs to the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import performance


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
