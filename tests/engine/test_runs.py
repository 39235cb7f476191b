"""What ends inside an accepted run of drafts, and text that does not end where tokens do.

A proposer that knows the answer makes every step accept as many drafts as fit: ends then fall inside the run, not behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from stretto.decoding.cost import CostCurve
from stretto.decoding.types import DraftTree
from stretto.engine.llm import LLM
from stretto.engine.request import ShownText

from tests.tiny import VOCAB, tiny_llm

PROMPT = [3, 14, 15, 92, 6, 5, 35, 8, 9, 7]
EOS = VOCAB - 1


class Prophet:
    """Proposes what it was told would come, `max_nodes` - 1 tokens at a time."""

    name = "prophet"

    def __init__(self, answer: Sequence[int], max_nodes: int) -> None:
        self.answer, self.max_nodes = list(answer), max_nodes

    def start(self, request: int, prompt: Sequence[int]) -> None: ...

    def propose(self, request: int, tokens: Sequence[int], budget: int) -> DraftTree:
        at = len(tokens) - len(PROMPT)
        return DraftTree.chain([tokens[-1], *self.answer[at : at + budget - 1]])

    def observe(self, request: int, new_tokens: Sequence[int]) -> None: ...

    def finish(self, request: int) -> None: ...


def told(answer: Sequence[int], max_nodes: int = 8) -> LLM:
    llm = tiny_llm()
    llm.engine.cost.assume(CostCurve((1, 32), (1.0, 1.0)))
    llm._drafts["prophet"] = Prophet(answer, max_nodes)
    return llm


def both(answer_options: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """The result of plain decoding, and of a prophet that knows the text of `answer_options` (which may go on longer)."""
    plain = tiny_llm()
    answer = plain.generate(PROMPT, decode="off", **answer_options).tokens
    result = told(answer).generate(PROMPT, decode="draft:prophet", **options)
    return plain.generate(PROMPT, decode="off", **options), result


def same(plain: Any, fast: Any) -> bool:
    return (plain.tokens, plain.text, plain.finish_reason, plain.logprobs) == (fast.tokens, fast.text, fast.finish_reason, fast.logprobs)


def test_the_prophet_is_believed():
    plain, fast = both({"max_tokens": 40, "ignore_eos": True}, max_tokens=40, ignore_eos=True)
    assert same(plain, fast)
    assert fast.stats.tokens_per_forward > 5
    assert fast.stats.acceptance_by_depth[7] == 1.0


@pytest.mark.parametrize("limit", range(1, 19))
def test_length_limit(limit: int):
    plain, fast = both({"max_tokens": 40, "ignore_eos": True}, max_tokens=limit, ignore_eos=True)
    assert same(plain, fast)
    assert fast.finish_reason == "length"
    assert len(fast.tokens) == limit


@pytest.mark.parametrize("seed", range(12))
def test_eos(seed: int):
    """The prophet knows the text beyond the end: drafts behind it are confirmed and must not appear."""
    options = {"max_tokens": 60, "temperature": 1.0, "seed": seed, "logit_bias": {EOS: 3.5}}
    plain, fast = both(options | {"ignore_eos": True}, **options)
    assert same(plain, fast)
    assert EOS not in fast.tokens[:-1]
    if fast.finish_reason == "stop":
        assert fast.tokens[-1] == EOS
        assert fast.usage.completion_tokens == len(fast.tokens)


def test_eos_does_fall_inside_runs():
    """Runs are eight tokens long: over some seeds the end is found at several places of a run."""
    llm = tiny_llm()
    options = {"max_tokens": 60, "temperature": 1.0, "logit_bias": {EOS: 3.5}, "decode": "off"}
    results = [llm.generate(PROMPT, seed=s, **options) for s in range(12)]
    assert len({len(r.tokens) % 8 for r in results if r.finish_reason == "stop"}) > 2


@pytest.mark.parametrize("width", [1, 2, 3, 7])
@pytest.mark.parametrize("start", [0, 3, 6, 7, 8, 9, 14, 30])
def test_stop_text(start: int, width: int):
    """Inside a run, across two runs, at the first token; the tokens end with the one that completed the stop text."""
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
    text = tiny_llm().generate(PROMPT, decode="off", **options).text
    stop = text[start : start + width]
    plain, fast = both(options, stop=[stop, "\x00never"], **options)
    assert same(plain, fast)
    assert fast.text == text[: text.index(stop)]
    assert fast.finish_reason == "stop"
    assert len(fast.tokens) == text.index(stop) + width


def test_the_earliest_stop_text_wins_and_half_a_stop_text_is_shown_at_the_end():
    options: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
    text = tiny_llm().generate(PROMPT, decode="off", **options).text
    plain, fast = both(options, stop=[text[8:10], text[3:5]], **options)
    assert same(plain, fast)
    assert fast.text == text[: min(text.index(text[8:10]), text.index(text[3:5]))]
    plain, fast = both(options, stop=text[-2:] + "\x00", **options)
    assert same(plain, fast)
    assert fast.text == text


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.3}], ids=["greedy", "sampled", "penalised"]
)
def test_logprobs(options: dict[str, Any]):
    """Of accepted drafts as of plain tokens, to the bit, and cut where the text ends."""
    options = options | {"max_tokens": 21, "ignore_eos": True, "logprobs": 4}
    plain, fast = both(options, **options)
    assert same(plain, fast)
    assert [entry.token for entry in fast.logprobs] == fast.tokens
    assert fast.stats.tokens_per_forward > 3
    stop = plain.text[9:11]
    plain, fast = both(options, **options, stop=stop)
    assert same(plain, fast)
    assert len(fast.logprobs) == len(fast.tokens)


@pytest.mark.parametrize("stop", [(), "at", "\x00"])
def test_deltas_are_the_result(stop: Any):
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
    answer = tiny_llm().generate(PROMPT, decode="off", **options).tokens
    deltas = list(told(answer).generate(PROMPT, decode="draft:prophet", stream=True, stop=stop, **options))
    result = deltas[-1].result
    assert "".join(d.text for d in deltas) == result.text
    assert [t for d in deltas for t in d.tokens] == result.tokens
    assert len(deltas) <= 8  # a run is one delta


def test_context_ends_inside_a_run():
    llm = tiny_llm(context_length=64)
    prompt = (PROMPT * 7)[:50]
    plain = llm.generate(prompt, max_tokens=100, ignore_eos=True, decode="off")
    for decode in ("ngram", "trie", "auto"):
        assert same(plain, llm.generate(prompt, max_tokens=100, ignore_eos=True, decode=decode))
    assert plain.usage.prompt_tokens + plain.usage.completion_tokens == 64
    assert plain.finish_reason == "length"


class Bytes:
    """A text stream whose tokens are single UTF-8 bytes, as byte-level vocabularies have them for rare characters."""

    def __init__(self) -> None:
        self._held = b""

    def push(self, token: int) -> str:
        self._held += bytes([token])
        for n in range(len(self._held), 0, -1):
            try:
                text = self._held[:n].decode()
            except UnicodeDecodeError:
                continue
            self._held = self._held[n:]
            return text
        return ""

    def flush(self) -> str:
        return self._held.decode(errors="replace")


@pytest.mark.parametrize("stops", [(), ("猫",), ("é🙂",), ("x猫y", "猫y")])
def test_stop_texts_of_several_bytes(stops: tuple[str, ...]):
    text = "aé🙂 x猫y日本 é🙂 end"
    shown, pieces = ShownText(Bytes(), stops), []
    for byte in text.encode():
        pieces.append(shown.push(byte))
        if shown.stopped:
            break
    pieces.append(shown.flush())
    want = text[: min((text.index(s) for s in stops), default=len(text))]
    assert "".join(pieces) == shown.text == want
    assert not any("\ufffd" in p for p in pieces)
