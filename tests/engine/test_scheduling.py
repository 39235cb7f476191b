"""Many requests at once: who waits, who gives way, who comes later or leaves early; nobody's tokens may change."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from stretto.engine.llm import LLM
from stretto.engine.params import SamplingParams
from stretto.engine.request import Request
from stretto.errors import ContextTooLong, NonFiniteLogits
from stretto.models.loading.weights import RawWeight

from tests.engine.test_identity import OPTIONS, prompts
from tests.tiny import RandomWeights, tiny_llm

SAMPLED = OPTIONS["sampled"]
BAD_TOKEN = 40


class OneBadRow(RandomWeights):
    """The embedding of BAD_TOKEN is NaN: whoever reads it gets NaN logits."""

    def get(self, name: str) -> RawWeight:
        weight = super().get(name)
        if name == "embed":
            weight.data.view(np.float32).reshape(weight.shape)[BAD_TOKEN] = np.nan
        return weight


def alone(batch: list[list[int]], max_tokens: int = 24, **options) -> list[list[int]]:
    llm = tiny_llm(threads=1)
    return [llm.generate(p, max_tokens=max_tokens, ignore_eos=True, decode="off", **options).tokens for p in batch]


def submit(llm: LLM, prompt: list[int], decode: str = "trie", max_tokens: int = 24) -> Request:
    (request,) = llm._submit(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, decode=decode, **SAMPLED))
    return request


def finish(llm: LLM) -> None:
    for _ in range(2000):
        if not llm.engine.has_work():
            return
        llm.engine.step()
    raise AssertionError("the engine does not come to an end")


def empty(llm: LLM) -> bool:
    ledger = llm.cache.ledger()
    return ledger.used == 0 and ledger.free + ledger.published == ledger.total and not llm.engine.has_work()


def test_results_come_in_the_order_of_the_prompts():
    """Long and short prompts, more of them than fit into one step."""
    batch = [[1 + i] * n for i, n in enumerate((90, 1, 33, 2, 70, 5, 64, 17, 3, 48))]
    llm = tiny_llm(max_seqs=3, max_rows=20)
    got = llm.generate(batch, max_tokens=9, ignore_eos=True, decode="auto")
    assert [r.usage.prompt_tokens for r in got] == [len(p) for p in batch]
    assert [r.tokens for r in got] == alone(batch, 9)


def test_groups_of_siblings_come_in_order():
    llm = tiny_llm(max_seqs=4)
    batch = prompts(3)
    groups = llm.generate(batch, n=3, max_tokens=12, ignore_eos=True, temperature=1.0, seed=4)
    want = [[r.tokens for r in tiny_llm().generate(p, n=3, max_tokens=12, ignore_eos=True, temperature=1.0, seed=4, decode="off")] for p in batch]
    assert [[r.tokens for r in group] for group in groups] == want


@pytest.mark.parametrize("pages", [9, 11, 16, 40])
def test_too_few_pages_make_requests_wait(pages: int):
    """From pages for one request at a time to pages for most of them."""
    batch = prompts(8)
    llm = tiny_llm(pages=pages)
    got = llm.generate(batch, max_tokens=24, ignore_eos=True, decode="trie", **SAMPLED)
    assert [r.tokens for r in got] == alone(batch, **SAMPLED)
    assert empty(llm)


def test_measuring_the_cost_waits_for_pages(monkeypatch: pytest.MonkeyPatch):
    """A full cache must not be asked again and again for steps that measure half of the curve."""
    llm = tiny_llm(pages=8)
    calls: list[int] = []
    measure = llm.engine.chain_seconds
    monkeypatch.setattr(llm.engine, "chain_seconds", lambda sequences, rows: calls.append(rows) or measure(sequences, rows))
    prompt = [3, 4, 5] * 39  # its end lies 11 rows before the end of the cache
    result = llm.generate(prompt, max_tokens=8, ignore_eos=True, decode="ngram")
    assert result.tokens == alone([prompt], 8)[0]
    assert calls == []
    llm.generate([3, 4, 5] * 9, max_tokens=8, ignore_eos=True, decode="ngram")
    assert calls[:2] == [1, 1]
    assert max(calls) == 16


def test_two_requests_that_each_need_all_pages():
    batch = [[7] * 90, [9] * 90]
    llm = tiny_llm(pages=8)  # 128 rows
    got = llm.generate(batch, max_tokens=38, ignore_eos=True, decode="ngram")
    assert [r.tokens for r in got] == alone(batch, 38)
    assert empty(llm)


def test_a_request_that_can_never_fit_is_refused():
    llm = tiny_llm(pages=4)
    with pytest.raises(ContextTooLong, match="64 tokens, expected at most 63"):
        llm.generate([5] * 64)
    assert llm.generate([5] * 63, max_tokens=9, ignore_eos=True).finish_reason == "length"
    assert empty(llm)


def test_admission_into_a_running_batch():
    batch, want = prompts(5), alone(prompts(5), **SAMPLED)
    llm = tiny_llm(max_rows=16)
    requests = []
    for prompt in batch:
        requests.append(submit(llm, prompt))
        for _ in range(3):
            llm.engine.step()
    finish(llm)
    assert [r.new_tokens for r in requests] == want
    assert empty(llm)


@pytest.mark.parametrize("steps", range(0, 14, 2))
def test_cancelling_one_leaves_the_others_alone(steps: int):
    """While it waits, while its prompt is read, while it decodes."""
    batch, want = prompts(5), alone(prompts(5), **SAMPLED)
    llm = tiny_llm(max_rows=24, max_seqs=3)
    requests = [submit(llm, p) for p in batch]
    for _ in range(steps):
        llm.engine.step()
    for i in (1, 4):
        llm.engine.cancel(requests[i])
        llm.engine.cancel(requests[i])  # a second time changes nothing
    finish(llm)
    assert [requests[i].new_tokens for i in (0, 2, 3)] == [want[i] for i in (0, 2, 3)]
    for i in (1, 4):
        assert requests[i].new_tokens == want[i][: len(requests[i].new_tokens)]
    assert empty(llm)


def test_a_stream_that_is_dropped_frees_its_pages():
    llm = tiny_llm()
    for delta in llm.generate([1, 2, 3], max_tokens=400, ignore_eos=True, stream=True):
        if delta.tokens:
            break
    gc.collect()
    assert empty(llm)


@pytest.mark.parametrize("end", ["drop", "close", "with"])
def test_a_stream_that_is_never_started_keeps_nothing(end: str):
    llm = tiny_llm()
    stream = llm.generate([1, 2, 3], max_tokens=400, ignore_eos=True, stream=True)
    if end == "close":
        stream.close()
        assert list(stream) == []
    elif end == "with":
        with stream:
            pass
    del stream
    gc.collect()
    assert empty(llm)


def test_a_stream_dropped_while_the_engine_is_locked_goes_with_the_next_step():
    """A finalizer must not wait for the lock: it may run inside the very step that holds it."""
    llm = tiny_llm()
    stream = llm.generate([1, 2, 3], max_tokens=400, ignore_eos=True, stream=True)
    next(stream)
    with llm._lock:
        del stream
        gc.collect()
    assert llm.engine.has_work()
    assert llm.generate([1, 2, 3], max_tokens=2, ignore_eos=True).finish_reason == "length"
    assert empty(llm)


def test_interrupt_in_the_middle_of_a_stream(monkeypatch: pytest.MonkeyPatch):
    llm = tiny_llm()
    run, calls = llm.engine.runner.run, 0

    def interrupted(works):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        run(works)

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        seen += [t for d in llm.generate([3, 4, 5], max_tokens=100, ignore_eos=True, stream=True, decode="off") for t in d.tokens]
    assert empty(llm)
    assert llm.generate([3, 4, 5], max_tokens=12, ignore_eos=True).tokens == alone([[3, 4, 5]], 12)[0]


def test_threads_of_the_caller_share_steps():
    batch, want = prompts(6), alone(prompts(6), **SAMPLED)
    llm = tiny_llm()
    got: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        if i % 2:
            got[i] = llm.generate(batch[i], max_tokens=24, ignore_eos=True, **SAMPLED).tokens
        else:
            got[i] = [t for d in llm.generate(batch[i], max_tokens=24, ignore_eos=True, stream=True, **SAMPLED) for t in d.tokens]

    callers = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for c in callers:
        c.start()
    for c in callers:
        c.join()
    assert [got[i] for i in range(6)] == want
    assert empty(llm)


@pytest.mark.parametrize("decode", ["off", "trie", "auto"])
def test_non_finite_logits_end_only_their_request(decode: str):
    good = [p for p in prompts(6) if BAD_TOKEN not in p][:4]
    llm = tiny_llm(weights=OneBadRow, tie_word_embeddings=False)
    never = {BAD_TOKEN: -1e9}  # the good ones shall not choose it
    want = [llm.generate(p, max_tokens=16, ignore_eos=True, decode="off", logit_bias=never).tokens for p in good]
    params = SamplingParams(max_tokens=16, ignore_eos=True, decode=decode, logit_bias=never)
    batch = [good[0], [5, BAD_TOKEN, 6], good[1], good[2], [BAD_TOKEN], good[3]]
    requests = [llm._submit(p, params)[0] for p in batch]
    finish(llm)
    assert [isinstance(r.error, NonFiniteLogits) for r in requests] == [False, True, False, False, True, False]
    assert [r.new_tokens for r in requests if r.error is None] == want
    assert [r.new_tokens for r in requests if r.error is not None] == [[], []]
    assert empty(llm)
    with pytest.raises(NonFiniteLogits, match="NaN or infinite logits after 3 tokens"):
        llm.generate([good[0], [5, BAD_TOKEN, 6]], max_tokens=4, logit_bias=never)


def test_a_broken_guess_breaks_nothing():
    """A draft whose rows are NaN is refused like any wrong one: it was never part of the text."""
    from stretto.decoding.types import DraftTree

    class Guesses:
        name, max_nodes = "bad", 8

        def start(self, request, prompt): ...
        def propose(self, request, tokens, budget):
            return DraftTree.chain([tokens[-1], BAD_TOKEN, 3, 4][:budget])

        def observe(self, request, new_tokens): ...
        def finish(self, request): ...

    llm = tiny_llm(weights=OneBadRow, tie_word_embeddings=False)
    options = {"max_tokens": 20, "ignore_eos": True, "logit_bias": {BAD_TOKEN: -1e9}}
    want = llm.generate([1, 2, 3], decode="off", **options).tokens
    llm._drafts["bad"] = Guesses()
    result = llm.generate([1, 2, 3], decode="draft:bad", **options)
    assert result.tokens == want
    assert sum(n for width, n in result.stats.width_histogram.items() if width > 1) > 0
