"""The promise: the same tokens whatever the proposer, the batch, the chunk, the page and the number of threads."""

from __future__ import annotations

import random

import pytest

from tests.tiny import VOCAB, tiny_llm

OPTIONS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    "filtered": {"temperature": 1.3, "top_k": 12, "min_p": 0.02, "seed": 8},
    "penalised": {
        "temperature": 0.8,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.1,
        "logit_bias": {5: 1.5},
        "seed": 9,
    },
    "greedy-penalised": {"repetition_penalty": 1.3},
}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of mixed lengths in which passages come back, so that lookups find something."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        passage = [rng.randrange(VOCAB - 1) for _ in range(rng.randint(3, 12))]
        made.append((passage * 8)[: rng.randint(1, 70)])
    return made


def tokens(llm, batch, **options):
    return [r.tokens for r in llm.generate(batch, max_tokens=24, ignore_eos=True, **options)]


@pytest.fixture(scope="module")
def plain():
    """Each prompt alone, one thread, plain decoding: what everything else must equal."""
    llm = tiny_llm(threads=1)
    return {name: [tokens(llm, [p], decode="off", **options)[0] for p in prompts(8)] for name, options in OPTIONS.items()}


def test_plain_text_varies(plain):
    assert len({tuple(t) for t in plain["sampled"]}) > 4
    assert any(len(set(t)) > 4 for t in plain["greedy"])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("decode", ["off", "ngram", "trie", "auto"])
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_proposers_and_batches(plain, name, decode, batch):
    llm = tiny_llm()
    got = [t for i in range(0, 8, batch) for t in tokens(llm, prompts(8)[i : i + batch], decode=decode, **OPTIONS[name])]
    assert got == plain[name]


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("max_rows", [8, 17, 64])
def test_pages_and_chunks(plain, page_size, max_rows):
    llm = tiny_llm(page_size=page_size, pages=4096 // page_size, max_rows=max_rows, max_seqs=4)
    assert tokens(llm, prompts(8), decode="trie", **OPTIONS["sampled"]) == plain["sampled"]


def test_same_prompts_again_from_the_prefix_cache(plain):
    llm = tiny_llm()
    for _ in range(2):
        results = llm.generate(prompts(8), max_tokens=24, ignore_eos=True, decode="trie", **OPTIONS["sampled"])
        assert [r.tokens for r in results] == plain["sampled"]
    assert any(r.usage.cached_tokens for r in results)


def test_preemption_changes_nothing(plain):
    """Pages for about two of the eight requests: they take turns."""
    llm = tiny_llm(pages=12)
    results = llm.generate(prompts(8), max_tokens=24, ignore_eos=True, decode="trie", **OPTIONS["sampled"])
    assert [r.tokens for r in results] == plain["sampled"]
    assert sum(r.stats.preemptions for r in results) > 0


def test_draft_model(plain):
    """Another model of the same vocabulary guesses: a twin (nearly all accepted) and a stranger (nearly none)."""
    from stretto.decoding.cost import CostCurve

    for seed, good in ((0, True), (1, False)):
        llm, draft = tiny_llm(), tiny_llm(seed=seed, max_seqs=1)
        llm.engine.cost.assume(CostCurve((1, 32), (1.0, 1.0)))  # rows cost nothing: drafts are always verified
        llm.add_draft("d", draft)
        results = llm.generate(prompts(8), max_tokens=24, ignore_eos=True, decode="draft:d")
        assert [r.tokens for r in results] == plain["greedy"]
        assert draft.cache.ledger().used == 0
        if good:
            assert any(r.stats.acceptance_by_depth.get(1, 0) == 1.0 for r in results)


def test_siblings_differ_and_do_not_depend_on_n():
    llm = tiny_llm()
    three = llm.generate(prompts(1)[0], n=3, max_tokens=24, temperature=1.0, ignore_eos=True, decode="trie")
    five = llm.generate(prompts(1)[0], n=5, max_tokens=24, temperature=1.0, ignore_eos=True, decode="off")
    assert [r.tokens for r in three] == [r.tokens for r in five[:3]]
    assert len({tuple(r.tokens) for r in five}) == 5


def test_ledger_is_back_where_it_was():
    llm = tiny_llm()
    llm.generate(prompts(8), max_tokens=16, decode="auto")
    ledger = llm.cache.ledger()
    assert ledger.used == 0
    assert ledger.free + ledger.published == ledger.total
