"""The certificate of identical tokens, scaled down; and that it would see a difference."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
import stretto
from stretto.engine.llm import LLM

from bench.e2e import identity
from tests.engine.test_identity import prompts
from tests.tiny import tiny_llm


def build(setting: identity.Setting, seed: int = 0) -> LLM:
    pages = 8 * 512 // setting.page_size
    llm = tiny_llm(page_size=setting.page_size, pages=pages, max_rows=setting.chunk, threads=setting.threads, seed=seed)
    llm.add_draft("other", tiny_llm(seed=1, max_seqs=1))
    curve = identity.CURVES[setting.cost]
    if curve is not None:
        llm.engine.cost.assume(curve)
    return llm


def run(inputs: list[list[int]], builder: Any, **options: Any) -> dict[str, Any]:
    state = identity.empty()
    assert identity.certify(state, builder, inputs, 12, **options)
    return state


def test_the_schedule_covers_what_it_says():
    """Each prompt with each method in both modes, exactly once; each method under each value of each factor."""
    steps = identity.schedule(200)
    assert Counter((method, mode, i) for _, method, mode, group in steps for i in group) == Counter(
        (method, mode, i) for method in identity.METHODS for mode in identity.MODES for i in range(200)
    )
    for field in ("batch", "page_size", "chunk", "threads", "cost"):
        values = {getattr(s, field) for s in identity.SETTINGS}
        for method in identity.METHODS:
            assert {getattr(s, field) for s, m, _, _ in steps if m == method} == values


def test_a_tiny_model_keeps_the_promise():
    state = run(prompts(16), build)
    assert state["differences"] == []
    assert all(r["prompts"] == 16 and r["tokens"] == 16 * 12 for r in state["runs"])
    drafted = Counter[str]()
    for r in state["runs"]:
        drafted[r["method"]] += r["drafted_steps"]
    assert [m for m in identity.METHODS if drafted[m] == 0] == ["off"]


def test_a_difference_is_found_and_named():
    """Engines of two threads get another model's weights: every generation of theirs must be reported, and no other."""
    state = run(prompts(16), lambda setting: build(setting, seed=1 if setting.threads == 2 else 0))
    assert state["differences"]
    assert {d["threads"] for d in state["differences"]} == {2}
    first = state["differences"][0]
    assert first["off"] != first["method"]
    assert first["decode"] in identity.METHODS
    assert 0 <= first["prompt"] < 16


def test_a_run_that_was_stopped_goes_on():
    inputs, state, pieces = prompts(8), identity.empty(), 0
    while not identity.certify(state, build, inputs, 12, time.monotonic() + 0.01):
        pieces += 1
    assert pieces > 0
    whole = run(inputs, build)
    forwards_aside = [[{k: v for k, v in r.items() if k in ("mode", "method", "prompts", "tokens")} for r in s["runs"]] for s in (state, whole)]
    assert forwards_aside[0] == forwards_aside[1]
    assert state["differences"] == whole["differences"] == []


@pytest.mark.slow
def test_the_real_model_scaled_down():
    model, draft = (stretto.load("smollm2-135m", context=identity.CONTEXT, dtype=d) for d in (None, "q4_0"))
    state = identity.empty()
    assert identity.certify(state, identity.engines(model, draft), identity.prompts(model, 8), 16)
    assert state["differences"] == []
