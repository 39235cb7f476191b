"""What the n-gram trie means, in a few lines: counters and full sorts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

Ngrams = Counter[tuple[int, ...]]


def ngrams(tokens: Sequence[int], depth: int, stop: Iterable[int] = ()) -> Ngrams:
    """Every run of 2 to depth + 1 tokens that does not start with a stop token."""
    text = tuple(tokens)
    return Counter(text[i : i + n] for i in range(len(text)) if text[i] not in stop for n in range(2, min(depth + 1, len(text) - i) + 1))


def squeeze(counts: Ngrams, max_tree_nodes: int) -> None:
    """Halve the counts of every root with more n-grams than that, and drop what was seen once."""
    sizes = Counter(g[0] for g in counts)
    for g in [g for g in counts if sizes[g[0]] > max_tree_nodes]:
        if counts[g] > 1:
            counts[g] //= 2
        else:
            del counts[g]


class Draft:
    """The draft for `suffix`: selection by sorting all that matches."""

    def __init__(self, inputs: Ngrams, outputs: Ngrams, *, branch_length: int = 12, stop: Iterable[int] = (), mode: str = "mix"):
        self.inputs = inputs if mode != "output" else Counter()
        self.outputs = outputs if mode != "input" else Counter()
        self.branch_length, self.stop, self.mode = branch_length, set(stop), mode

    def score(self, g: tuple[int, ...]) -> int:
        return 9999 * self.inputs[g] + self.outputs[g] if self.mode == "mix" else self.inputs[g] + self.outputs[g]

    def query(self, suffix: Sequence[int], budget: int, max_depth: int, max_query_length: int, shape: str = "tree"):
        best: tuple[list[int], list[int]] = ([suffix[-1]], [-1])
        for length in range(min(max_query_length, len(suffix)), 0, -1):
            key = tuple(suffix[-length:])
            if length == 1 and key[0] in self.stop:
                break
            if length > 1 and not self.score(key):
                continue
            found = self.below(key, budget, min(max_depth, self.branch_length), shape)
            best = max(best, found, key=lambda d: len(d[0]))
            if len(best[0]) >= self.branch_length:
                break
        return best

    def below(self, key: tuple[int, ...], budget: int, max_depth: int, shape: str):
        n = len(key)
        everything = {g for c in (self.inputs, self.outputs) for g in c if g[:n] == key and n < len(g) <= n + max_depth}
        if shape == "one":
            chosen: set[tuple[int, ...]] = set()
            at = key
            while len(chosen) < budget - 1 and (kids := [g for g in everything if g[:-1] == at]):
                at = min(kids, key=lambda g: (-self.score(g), g))
                chosen.add(at)
        else:
            half = (budget - 1) // 2 if self.mode == "mix" else 0
            by_output = sorted((g for g in everything if self.outputs[g]), key=lambda g: (-self.outputs[g], len(g), g[-1], g))
            chosen = set(by_output[:half])
            by_score = sorted(everything - chosen, key=lambda g: (-self.score(g), len(g), g[-1], g))
            chosen |= set(by_score[: budget - 1 - len(chosen)])
            assert all(len(g) == n + 1 or g[:-1] in chosen for g in chosen), "closed under parents"
        tokens, parent = [], []

        def emit(g: tuple[int, ...], above: int) -> None:
            tokens.append(g[-1])
            parent.append(above)
            place = len(tokens) - 1
            for kid in sorted((k for k in chosen if k[:-1] == g), key=lambda k: (-self.score(k), k)):
                emit(kid, place)

        emit(key, -1)
        return tokens, parent
