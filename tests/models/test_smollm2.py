"""A real model: SmolLM2-135M-Instruct in Q4_1 against transformers in float32 on the dequantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import stretto
from stretto.models.loading import find

from bench.e2e import divergence
from bench.e2e.texts import documentation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llm():
    return stretto.load("smollm2-135m", threads=2)


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("transformers")
    return divergence.oracle(Path(find.resolve("smollm2-135m")))


def test_divergence_from_the_dequantised_model(llm, oracle):
    """Packed weights: the distribution stays. Weights in float32: rounding is all that differs."""
    exact = stretto.load("smollm2-135m", dtype="f32", kv_dtype="f32")
    found = divergence.compare(llm, exact, oracle, llm.tokenizer.encode(documentation()[:20000])[:1000])
    assert found["kl"] <= 0.01
    assert found["same_argmax"] >= 0.95
    assert found["relative_error"] <= 1e-3


QUESTIONS = [
    "Write one sentence about the sea.",
    "Repeat this list twice, one item a line: apple, pear, plum, cherry, grape.",
    "Rewrite in upper case: the quick brown fox jumps over the lazy dog.",
    "What is the capital of France?",
]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.95, "seed": 3}], ids=["greedy", "sampled"])
def test_identity_with_every_proposer(llm, options):
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
    plain = [llm.generate(c, max_tokens=48, decode="off", **options).tokens for c in chats]
    for decode in ("ngram", "trie", "auto"):
        assert [r.tokens for r in llm.generate(chats, max_tokens=48, decode=decode, **options)] == plain


def test_answers(llm):
    assert "Paris" in llm.generate([{"role": "user", "content": "What is the capital of France?"}], max_tokens=24).text
