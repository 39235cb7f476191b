"""A real model: SmolLM2-135M-Instruct in Q4_1 against transformers in float32 on the dequantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import stretto
from stretto.engine.request import ShownText
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


def test_streamed_text_has_no_broken_characters(llm):
    """Rare characters are several byte tokens: a delta never ends inside one, and all deltas together are the text."""
    question = [{"role": "user", "content": "Write 日本語, ελληνικά, हिन्दी and emoji 🙂🐈‍⬛ in one line, three times."}]
    for seed in range(3):
        for decode in ("off", "auto"):
            deltas = list(llm.generate(question, max_tokens=64, temperature=1.2, seed=seed, decode=decode, stream=True, ignore_eos=True))
            result = deltas[-1].result
            assert "".join(d.text for d in deltas) == result.text
            assert [t for d in deltas for t in d.tokens] == result.tokens
            if "\ufffd" not in result.text:
                assert result.text == llm.tokenizer.decode(result.tokens)
            assert all("\ufffd" not in d.text or "\ufffd" in llm.tokenizer.decode(result.tokens) for d in deltas)


@pytest.mark.parametrize("stops", [(), ("猫",), ("🙂",)])
def test_tokens_of_several_byte_characters_become_text(llm, stops):
    text = "naïve 日本 🐈‍⬛ é🙂 x猫y हिन्दी end"
    shown = ShownText(llm.tokenizer.stream(), stops)
    pieces = [shown.push(token) for token in llm.tokenizer.encode(text, add_special=False)]
    pieces.append(shown.flush())
    assert "".join(pieces) == shown.text == text[: min((text.index(s) for s in stops), default=len(text))]
    assert not any("\ufffd" in p for p in pieces)
