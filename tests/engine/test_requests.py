"""Ends, limits, streams, cancellation, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from stretto.errors import ContextTooLong, NonFiniteLogits

from tests.tiny import VOCAB, tiny_llm


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


PROMPT = [3, 14, 15, 92, 6, 5, 35, 8, 9, 7]


def test_length_limit_inside_an_accepted_run(llm):
    full = llm.generate(PROMPT * 3, max_tokens=20, ignore_eos=True, decode="off").tokens
    for n in range(1, 20):
        result = llm.generate(PROMPT * 3, max_tokens=n, ignore_eos=True, decode="trie")
        assert result.tokens == full[:n]
        assert result.finish_reason == "length"


def test_eos_ends_and_ignore_eos_goes_on(llm):
    bias = {VOCAB - 1: 3.0}
    results = [llm.generate(PROMPT, max_tokens=60, temperature=1.0, seed=s, logit_bias=bias, decode=d) for s in range(6) for d in ("off", "trie")]
    stopped = [r for r in results if r.finish_reason == "stop"]
    assert stopped
    assert all(r.tokens[-1] == VOCAB - 1 and VOCAB - 1 not in r.tokens[:-1] for r in stopped)
    assert [r.tokens for r in results[::2]] == [r.tokens for r in results[1::2]]
    assert all(chr(32 + VOCAB - 1) not in r.text for r in stopped)


def test_stop_text_across_tokens(llm):
    text = llm.generate(PROMPT, max_tokens=40, ignore_eos=True, decode="off").text
    for start in (0, 5, 17):
        stop = text[start : start + 3]
        at = text.index(stop)
        for decode in ("off", "trie"):
            result = llm.generate(PROMPT, max_tokens=40, ignore_eos=True, stop=stop, decode=decode)
            assert result.text == text[:at]
            assert result.finish_reason == "stop"


def test_stream_equals_result(llm):
    whole = llm.generate(PROMPT, max_tokens=30, ignore_eos=True, decode="off")
    stop = whole.text[20:22]
    for options in ({}, {"stop": stop}):
        deltas = list(llm.generate(PROMPT, max_tokens=30, ignore_eos=True, stream=True, decode="auto", **options))
        result = deltas[-1].result
        assert "".join(d.text for d in deltas) == result.text
        assert [t for d in deltas for t in d.tokens] == result.tokens
        assert all(d.result is None for d in deltas[:-1])
        assert result.tokens == whole.tokens[: len(result.tokens)]


def test_leaving_a_stream_frees_its_pages(llm):
    stream = llm.generate(PROMPT, max_tokens=400, ignore_eos=True, stream=True)
    next(stream)
    assert llm.cache.ledger().used > 0
    stream.close()
    assert llm.cache.ledger().used == 0
    assert not llm.engine.has_work()


def test_interrupt_frees_everything(llm, monkeypatch):
    calls = 0
    step = llm.engine.step

    def interrupted():
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT, PROMPT[::-1]], max_tokens=100, ignore_eos=True)
    assert llm.cache.ledger().used == 0
    assert not llm.engine.has_work()


def test_logprobs(llm):
    result = llm.generate(PROMPT, max_tokens=6, logprobs=3, ignore_eos=True, decode="trie")
    logits = llm.logits(PROMPT + result.tokens)
    for i, entry in enumerate(result.logprobs):
        row = torch.log_softmax(logits[len(PROMPT) - 1 + i], -1)
        assert entry.token == result.tokens[i]
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-5)
        assert len(entry.top) == 3
        assert entry.top[0][1] == pytest.approx(row.max().item(), abs=1e-5)


def test_logits_do_not_depend_on_chunks():
    ids = [(7 * i) % VOCAB for i in range(150)]
    assert torch.equal(tiny_llm(max_rows=64).logits(ids), tiny_llm(max_rows=7, page_size=3, pages=400).logits(ids))


def test_non_finite_logits_end_only_their_request():
    llm = tiny_llm()
    # the embedding of one token is made infinite
    poisoned = 40
    good = llm.generate([1, 2, 3], max_tokens=8, ignore_eos=True, logit_bias={poisoned: -1e9}).tokens
    broken = tiny_llm(seed=0)
    weights = broken.model.layers[0].attn_norm
    weights[:] = float("nan")
    with pytest.raises(NonFiniteLogits):
        broken.generate([1, 2, 3], max_tokens=4)
    assert broken.cache.ledger().used == 0
    assert broken.cache.ledger().published == 0
    assert good == llm.generate([1, 2, 3], max_tokens=8, ignore_eos=True, logit_bias={poisoned: -1e9}).tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"max_tokens": -3}, "max_tokens: -3"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"top_k": -1}, "top_k: -1"),
        ({"min_p": 2.0}, "min_p: 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0"),
        ({"decode": "magic"}, "decode: 'magic'"),
        ({"n": 0}, "n: 0"),
        ({"n": 10**9}, "n: 1000000000"),
        ({"seed": 2**64}, "seed: "),
        ({"logprobs": 21}, "logprobs: 21"),
        ({"stop": ""}, "stop: "),
        ({"stop": ["x"] * 17}, "stop: "),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias: token id"),
        ({"logit_bias": {1: math.nan}}, "logit_bias: "),
        ({"stream": True, "n": 2}, "stream: True"),
    ],
)
def test_bad_options(llm, options, message):
    with pytest.raises(ValueError) as caught:
        llm.generate(PROMPT, **options)
    assert f"generate: {message}" in str(caught.value)
    assert not llm.engine.has_work()


@pytest.mark.parametrize(("prompt", "message"), [([], "empty"), ("", "empty"), ([VOCAB], f"token id {VOCAB}"), ([-1], "token id -1"), (3.5, "float")])
def test_bad_prompts(llm, prompt, message):
    with pytest.raises(ValueError) as caught:
        llm.generate(prompt)
    assert message in str(caught.value)


def test_prompt_longer_than_the_context(llm):
    with pytest.raises(ContextTooLong) as caught:
        llm.generate([1] * 512)
    assert "512 tokens, expected at most 511" in str(caught.value)
    assert llm.generate([1] * 511, max_tokens=50, ignore_eos=True).usage.completion_tokens == 1


def test_a_proposer_that_lies_is_dropped(llm, monkeypatch):
    from stretto.decoding.trie import TrieProposer
    from stretto.decoding.types import DraftTree

    want = llm.generate(PROMPT, max_tokens=20, ignore_eos=True, decode="off").tokens
    for lie in (lambda *_: DraftTree.chain([1, 2, 3]), lambda *_: DraftTree.chain([PROMPT[-1], VOCAB + 5]), lambda *_: 1 / 0):
        monkeypatch.setattr(TrieProposer, "propose", lie)
        assert llm.generate(PROMPT, max_tokens=20, ignore_eos=True, decode="trie").tokens == want
