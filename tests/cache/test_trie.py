"""The n-gram trie against counters and full sorts."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stretto.cache import NgramTrie
from stretto.ops.table import native_available

from tests.cache.ngram_model import Draft, ngrams, squeeze

pytestmark = pytest.mark.skipif(not native_available(), reason="the trie is native code")

UNPRUNED = 2**31 - 1


def text(seed: int, n: int = 200, alphabet: int = 4) -> list[int]:
    return random.Random(seed).choices(range(alphabet), k=n)


def assert_counts(trie: NgramTrie, outputs: Counter, inputs: Counter, request: int | None = None) -> None:
    assert trie.stats()["nodes"] == len(outputs)
    for g in outputs.keys() | inputs.keys():
        assert trie.count(g, request) == (inputs[g], outputs[g]), g
        absent = (*g[:-1], 4)
        assert trie.count(absent, request) == (inputs[absent], outputs[absent])


@pytest.mark.parametrize("branch_length", [1, 3, 12])
@pytest.mark.parametrize("max_query_length", [1, 2, 4])
def test_counts_equal_a_counter(branch_length, max_query_length):
    trie = NgramTrie(branch_length, vocab_size=5, max_query_length=max_query_length, max_tree_nodes=UNPRUNED)
    depth = branch_length + max_query_length - 1
    outputs: Counter = Counter()
    for seed in range(3):
        trie.insert(text(seed))
        outputs += ngrams(text(seed), depth)
    trie.insert(text(10), "input", request=7)
    trie.insert(np.array(text(11)), "input", request=8)
    assert_counts(trie, outputs, ngrams(text(10)[1:], depth), 7)
    assert_counts(trie, outputs, ngrams(text(11)[1:], depth), 8)
    assert trie.count((0,) * (depth + 2)) == (0, 0), "longer than the trie is deep"
    trie.release(7)
    assert_counts(trie, outputs, Counter(), 7)
    assert_counts(trie, outputs, ngrams(text(11)[1:], depth), 8)
    trie.release(8)
    assert trie.stats()["requests"] == 0


def test_two_prompts_of_a_request_add_up():
    trie = NgramTrie(3, vocab_size=5, max_tree_nodes=UNPRUNED)
    trie.insert(text(1), "input", 1)
    trie.insert(text(2), "input", 1)
    assert_counts(trie, Counter(), ngrams(text(1)[1:], 4) + ngrams(text(2)[1:], 4), 1)


@pytest.mark.parametrize("piece", [1, 2, 7, 200])
def test_streamed_outputs_count_like_whole_ones(piece):
    """And at once: nothing waits for the end of the request."""
    trie = NgramTrie(5, vocab_size=6, max_tree_nodes=UNPRUNED, stop_tokens=[2])
    other, tokens = text(1), text(0)
    for i in range(0, 200, piece):
        trie.insert(tokens[i : i + piece], "output", request=1)
        trie.insert(other[i : i + piece], "output", request=2)
        if i < 20:
            assert_counts(trie, ngrams(tokens[: i + piece], 6, [2]) + ngrams(other[: i + piece], 6, [2]), Counter())
    trie.release(1)
    trie.release(2)
    assert_counts(trie, ngrams(tokens, 6, [2]) + ngrams(other, 6, [2]), Counter())


def test_an_output_ends_at_its_first_eos():
    trie = NgramTrie(3, vocab_size=10, eos=[8, 9])
    trie.insert([1, 2, 3, 8, 4, 5])
    trie.insert([1, 2], "output", 1)
    trie.insert([3, 9, 4], "output", 1)
    trie.insert([5, 6], "output", 1)
    assert_counts(trie, ngrams([1, 2, 3], 4) + ngrams([1, 2, 3], 4), Counter())
    trie.insert([0, 1, 8, 2, 3], "input", 1)
    assert trie.count([1, 8, 2, 3], 1) == (1, 0), "a prompt goes on: in chats it is full of them"


tokens_of = st.lists(st.integers(0, 3), max_size=60)


@settings(max_examples=300, deadline=None)
@given(
    outputs=st.lists(tokens_of, max_size=4),
    prompt=tokens_of,
    suffix=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    budget=st.integers(1, 40),
    branch_length=st.integers(1, 6),
    max_depth=st.integers(0, 7),
    max_query_length=st.integers(1, 3),
    mode=st.sampled_from(["mix", "input", "output"]),
    shape=st.sampled_from(["tree", "one"]),
    stop=st.sets(st.integers(0, 3), max_size=1),
)
def test_query_equals_brute_force(outputs, prompt, suffix, budget, branch_length, max_depth, max_query_length, mode, shape, stop):
    trie = NgramTrie(branch_length, vocab_size=4, max_query_length=max_query_length, max_tree_nodes=UNPRUNED, stop_tokens=stop)
    depth = branch_length + max_query_length - 1
    for tokens in outputs:
        trie.insert(tokens)
    trie.insert(prompt, "input", 3)
    model = Draft(
        ngrams(prompt[1:], depth), sum((ngrams(o, depth, stop) for o in outputs), Counter()),
        branch_length=branch_length, stop=stop, mode=mode,
    )  # fmt: skip
    want = model.query(suffix, budget, max_depth, max_query_length, shape)
    tokens, parent = trie.query(suffix, budget, max_depth, mode, 3, shape)
    assert (tokens.tolist(), parent.tolist()) == want
    assert tokens.dtype == parent.dtype == np.int32


@pytest.mark.parametrize("mode", ["mix", "input", "output"])
def test_wide_trees_equal_brute_force(mode):
    """Hundreds of siblings: more than can be chosen, so most are set aside early."""
    rng = random.Random(0)
    trie = NgramTrie(4, vocab_size=300, max_tree_nodes=UNPRUNED)
    outputs, prompt = [1], [1]
    for _ in range(1500):
        outputs += [1, min(int(rng.expovariate(0.02)), 299)]
        prompt += [1, min(int(rng.expovariate(0.01)), 299)]
    trie.insert(outputs)
    trie.insert([0, *prompt], "input", 1)
    model = Draft(ngrams(prompt, 5), ngrams(outputs, 5), branch_length=4, mode=mode)
    for budget in (1, 2, 5, 17, 64):
        for suffix in ([1], [7, 1], [1, 3]):
            tokens, parent = trie.query(suffix, budget, None, mode, 1)
            assert (tokens.tolist(), parent.tolist()) == model.query(suffix, budget, 4, 2)


def test_empty_trie_and_unknown_tokens_give_the_root():
    trie = NgramTrie(vocab_size=10)
    for request in (None, 5):
        tokens, parent = trie.query([3, 4], request=request)
        assert (tokens.tolist(), parent.tolist()) == ([4], [-1])
    trie.insert([1])
    trie.insert([])
    trie.insert([1], "input", 5)
    assert trie.query([1])[0].tolist() == [1]
    trie.release(99)
    assert trie.stats()["hits"] == 0
    assert trie.stats()["queries"] == 3


def test_large_trees_are_squeezed():
    trie = NgramTrie(3, vocab_size=6, max_tree_nodes=30)
    model: Counter = Counter()
    for seed in range(12):
        tokens = text(seed, 40, 6)
        trie.insert(tokens)
        model += ngrams(tokens, 4)
        squeeze(model, 30)
        assert_counts(trie, model, Counter())
    assert trie.stats()["squeezed_trees"] > 0


def test_squeezing_waits_for_the_end_of_a_request_and_keeps_prompts():
    trie = NgramTrie(3, vocab_size=6, max_tree_nodes=5)
    trie.insert(text(1), "input", 1)
    trie.insert(text(2), "output", 2)
    assert_counts(trie, ngrams(text(2), 4), ngrams(text(1)[1:], 4), 1)
    trie.insert(text(3), "input", 3)
    trie.release(3)
    kept = ngrams(text(2), 4)
    squeeze(kept, 5)
    assert_counts(trie, kept, ngrams(text(1)[1:], 4), 1)
    trie.insert(text(4), "output", 2)  # its branches were closed by the squeeze; what follows is counted on its own
    assert_counts(trie, kept + ngrams(text(4), 4), ngrams(text(1)[1:], 4), 1)


def test_byte_limit_evicts_the_least_recently_used_roots():
    trie = NgramTrie(vocab_size=100_000, max_bytes=1 << 16)
    rng = random.Random(0)
    trie.insert([5, 6, 7, 8])
    for i in range(300):
        trie.insert([rng.randrange(1000, 100_000) for _ in range(40)])
        assert trie.stats()["bytes"] <= 1 << 16
        if i % 3 == 0:
            assert trie.query([5, 6])[0].tolist() == [6, 7, 8], "a root in use stays"
    assert trie.stats()["evicted_trees"] > 1000
    assert trie.count([7, 8]) == (0, 0), "the others go"


def test_prompts_count_against_the_limit_and_are_cut_to_it():
    trie = NgramTrie(vocab_size=100_000, max_bytes=1 << 16)
    prompt = list(range(20_000))
    trie.insert(prompt, "input", 1)
    assert trie.stats()["bytes"] <= 1 << 16
    assert trie.count([19_998, 19_999], 1) == (1, 0), "the end of the prompt is kept"
    assert trie.count([1, 2], 1) == (0, 0)
    trie.insert(prompt, "input", 2)
    trie.insert(prompt, "output", 2)
    assert trie.stats()["bytes"] <= 1 << 16
    trie.release(1)
    trie.insert(prompt, "input", 2)
    assert trie.count([19_998, 19_999], 2) == (1, 0)
    trie.release(2)
    trie.insert(text(0), "output")
    assert trie.stats()["nodes"] > 0


def test_long_prompts_cost_eight_bytes_a_token():
    trie = NgramTrie(vocab_size=50_000)
    trie.insert(text(0, 50_000, 50_000), "input", 1)
    assert trie.stats()["bytes"] < 8 * 50_000 + 1000


def test_fast_enough():
    """8,000 tokens of a prompt in 20 ms, a query for 64 nodes in 0.1 ms; best of several, as the machine may be busy."""
    rng = random.Random(0)
    words = [rng.choices(range(3000), k=rng.randrange(2, 9)) for _ in range(400)]
    tokens = [t for w in rng.choices(words, k=3000) for t in w][:8000]
    trie = NgramTrie(vocab_size=3000)
    trie.insert(tokens)

    def best(function, rounds: int) -> float:
        spent = []
        for i in range(rounds):
            start = time.perf_counter()
            function(i)
            spent.append(time.perf_counter() - start)
        return min(spent)

    assert best(lambda i: trie.insert(tokens, "input", i), 10) < 20e-3
    for place in range(100, 8000, 500):
        assert best(lambda i, p=place: trie.query(tokens[p : p + 2], 64, request=3), 20) < 1e-4


def test_many_threads():
    trie = NgramTrie(6, vocab_size=5, max_tree_nodes=UNPRUNED)
    failures: list[BaseException] = []

    def work(me: int) -> None:
        try:
            for round_ in range(30):
                request = me * 1000 + round_
                prompt, answer = text(request), text(request + 500)
                trie.insert(prompt, "input", request)
                for i in range(0, 200, 20):
                    trie.insert(answer[i : i + 20], "output", request)
                    tokens, parent = trie.query(answer[i : i + 20], 32, request=request)
                    assert all(parent[1:] < np.arange(1, len(tokens)))
                trie.release(request)
                trie.stats()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    expected = sum((ngrams(text(me * 1000 + r + 500), 7) for me in range(4) for r in range(30)), Counter())
    assert_counts(trie, expected, Counter())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: NgramTrie(0), "NgramTrie: branch_length: 0, expected an integer of 1 to 128"),
        (lambda t: NgramTrie(129), "branch_length: 129"),
        (lambda t: NgramTrie(2.0), "branch_length: 2.0"),
        (lambda t: NgramTrie(max_bytes=0), "max_bytes: 0"),
        (lambda t: NgramTrie(max_bytes=2**70), "max_bytes: "),
        (lambda t: NgramTrie(vocab_size=0), "vocab_size: 0"),
        (lambda t: NgramTrie(vocab_size=2**31), "vocab_size: 2147483648"),
        (lambda t: NgramTrie(max_query_length=0), "max_query_length: 0"),
        (lambda t: NgramTrie(max_tree_nodes=0), "max_tree_nodes: 0"),
        (lambda t: NgramTrie(vocab_size=5, eos=[5]), "eos: 5, expected an integer of 0 to 4"),
        (lambda t: NgramTrie(vocab_size=5, stop_tokens=[-1]), "stop_tokens: -1"),
        (lambda t: t.insert([1, 10]), "insert: tokens: 10, expected 0 to 9"),
        (lambda t: t.insert([1, -1]), "insert: tokens: -1"),
        (lambda t: t.insert([2**40]), "insert: tokens: 1099511627776"),
        (lambda t: t.insert([2**70]), "insert: tokens: object"),
        (lambda t: t.insert([1.0]), "insert: tokens: float64 [1]"),
        (lambda t: t.insert([[1]]), "insert: tokens: int64 [1, 1]"),
        (lambda t: t.insert(["a"]), "insert: tokens: <U1"),
        (lambda t: t.insert([1], "both"), "insert: kind: 'both', expected 'input' or 'output'"),
        (lambda t: t.insert([1], "input"), "insert: request: None"),
        (lambda t: t.query([]), "suffix: empty"),
        (lambda t: t.query([10]), "suffix: token 10, expected 0 to 9"),
        (lambda t: t.query([-1]), "suffix: token -1"),
        (lambda t: t.query([1], 0), "query: budget: 0, expected at least 1"),
        (lambda t: t.query([1], max_depth=-1), "query: max_depth: -1"),
        (lambda t: t.query([1], mode="both"), "query: mode: 'both', expected one of mix, input, output"),
        (lambda t: t.query([1], shape="par"), "query: shape: 'par', expected one of tree, one"),
        (lambda t: t.count([1]), "count: ngram: 1 tokens"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    trie = NgramTrie(vocab_size=10)
    with pytest.raises(ValueError) as caught:
        call(trie)
    assert message in str(caught.value)
    assert trie.stats()["nodes"] == 0
