"""Acceptance rules by enumeration: every draft, every chance, every outcome; the law of the first tokens must be the target's to 1e-12.

What is enumerated is the reference; the kernels are held to it, decision by decision, by tests/ops/test_table.py. Rules with a planted mistake
must be found out by the same cases.
"""

from __future__ import annotations

import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from stretto.ops import ref, tree
from torch import Tensor

LENGTH = 3  # tokens whose joint law is compared
Prefix = tuple[int, ...]
Law = dict[Prefix, float]
Rule = Callable[..., Any]

SHAPES = {
    "root": [-1],
    "chain": [-1, 0, 1],
    "siblings": [-1, 0, 0],
    "three siblings": [-1, 0, 0, 0],
    "tree": [-1, 0, 0, 1, 1],
    "interleaved": [-1, 0, 0, 1, 2, 1],
}


class Table:
    """A law for every prefix, some with forbidden tokens; where two tables are asked for, they have nothing in common."""

    def __init__(self, vocab: int, seed: int, zeros: bool) -> None:
        self.vocab, self.seed, self.zeros = vocab, seed, zeros
        self.known: dict[Prefix, Tensor] = {}

    def __call__(self, prefix: Prefix) -> Tensor:
        if prefix not in self.known:
            generator = torch.Generator().manual_seed(hash((self.seed, *prefix)) % 2**31)
            weights = torch.rand(self.vocab, generator=generator, dtype=torch.float64) + 0.02
            if self.zeros and len(prefix) % 2 == 0:
                weights[int(torch.randint(0, self.vocab, (1,), generator=generator))] = 0
            self.known[prefix] = weights / weights.sum()
        return self.known[prefix]


def branches(run: Callable[[Callable[[list[tuple[Any, float]]], Any]], Any]) -> Iterator[tuple[Any, float]]:
    """(result, probability) for every way through `run`, which asks choose([(value, chance), ...]) where it leaves something to chance."""
    waiting: list[list[int]] = [[]]
    while waiting:
        script, probability, asked = waiting.pop(), 1.0, 0

        def choose(options: list[tuple[Any, float]]) -> Any:
            nonlocal probability, asked
            if asked == len(script):  # noqa: B023
                waiting.extend([*script, other] for other in range(1, len(options)))  # noqa: B023
                script.append(0)  # noqa: B023
            value, chance = options[script[asked]]  # noqa: B023
            asked += 1
            probability *= chance
            return value

        result = run(choose)
        if probability > 0:
            yield result, probability


def prefixes(tokens: list[int], parent: list[int]) -> list[Prefix]:
    found: list[Prefix] = [()]
    for token, above in zip(tokens[1:], parent[1:], strict=True):
        found.append((*found[above], token))
    return found


def drafts(q: Table, parent: list[int], replacement: bool) -> Iterator[tuple[list[int], float]]:
    """Every filling of the tree with its probability."""

    def run(choose: Callable[[list[tuple[Any, float]]], Any]) -> list[int]:
        tokens: list[int] = [0]
        for i, above in enumerate(parent[1:], 1):
            law = q(prefixes(tokens, parent[:i])[above]).clone()
            if not replacement:
                for other in range(1, i):
                    if parent[other] == above:
                        law[tokens[other]] = 0
            law = law / law.sum()
            tokens.append(choose([(x, float(law[x])) for x in range(q.vocab) if law[x] > 0]))
        return tokens

    return branches(run)


def add_outcome(total: Law, tokens: Prefix, probability: float, p: Table) -> None:
    """Tokens that a step brings, continued plainly to LENGTH."""
    if len(tokens) >= LENGTH:
        total[tokens[:LENGTH]] += probability
        return
    for x in range(p.vocab):
        add_outcome(total, (*tokens, x), probability * float(p(tokens)[x]), p)


def law_of_verify(rule: Rule, p: Table, q: Table, parent: list[int], replacement: bool) -> Law:
    total: Law = defaultdict(float)
    for tokens, chance_of_draft in drafts(q, parent, replacement):
        where = prefixes(tokens, parent)
        target, draft = torch.stack([p(w) for w in where]), torch.stack([q(w) for w in where])

        def run(
            choose: Callable[[list[tuple[Any, float]]], Any], tokens: list[int] = tokens, target: Tensor = target, draft: Tensor = draft
        ) -> Prefix | None:
            def accept(depth: int, k: int, chance: float) -> bool:
                chance = min(max(chance, 0.0), 1.0)
                return bool(choose([(True, chance), (False, 1 - chance)]))

            def draw(depth: int, law: Tensor) -> int:
                law = law / law.sum()
                return int(choose([(x, float(law[x])) for x in range(p.vocab)]))

            outcome = rule(target, draft, tokens, parent, len(parent), replacement, accept, draw)
            if outcome is None:  # a legal draft was refused: its probability will be missing
                return None
            nodes, bonus = outcome
            return (*(tokens[i] for i in nodes[1:]), bonus)

        for result, chance in branches(run):
            if result is not None:
                add_outcome(total, result, chance_of_draft * chance, p)
    return total


def law_of_walk(rule: Rule, p: Table, parent: list[int], tokens: list[int]) -> Law:
    """Point drafts: the target's token is drawn at every node, then the walk decides."""
    where, n = prefixes(tokens, parent), len(parent)
    draws = list(itertools.product(range(p.vocab), repeat=n))
    rows = (torch.tensor([tokens] * len(draws), dtype=torch.int32), torch.tensor([parent] * len(draws), dtype=torch.int32))
    path, accepted, bonus = rule(torch.tensor(draws, dtype=torch.int32), *rows, torch.full((len(draws),), n, dtype=torch.int32))
    total: Law = defaultdict(float)
    for drawn, nodes, count, last in zip(draws, path.tolist(), accepted.tolist(), bonus.tolist(), strict=True):
        chance = 1.0
        for node, x in enumerate(drawn):
            chance *= float(p(where[node])[x])
        add_outcome(total, (*(tokens[i] for i in nodes[1 : count + 1]), last), chance, p)
    return total


def variation(law: Law, p: Table) -> float:
    """Total variation distance from the target's own law of LENGTH tokens."""
    plain: Law = defaultdict(float)
    add_outcome(plain, (), 1.0, p)
    return sum(abs(law[k] - plain[k]) for k in law.keys() | plain.keys()) / 2


def tables(vocab: int, seed: int, replacement: bool) -> tuple[Table, Table]:
    return Table(vocab, 2 * seed, zeros=True), Table(vocab, 2 * seed + 1, zeros=replacement)


@pytest.mark.parametrize("replacement", [True, False], ids=["iid", "without-replacement"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab", [3, 4])
def test_sampled_drafts_keep_the_law(shape: str, vocab: int, replacement: bool):
    if vocab == 4 and len(SHAPES[shape]) > 5:
        vocab = 3  # the same rule at sixteen times the cases
    p, q = tables(vocab, len(shape), replacement)
    assert variation(law_of_verify(ref.tree.verify_one, p, q, SHAPES[shape], replacement), p) <= 1e-12


@pytest.mark.parametrize("walk", [tree.walk, ref.tree.walk], ids=["kernel", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_point_drafts_keep_the_law(shape: str, walk: Rule):
    parent, p = SHAPES[shape], Table(4, 7, zeros=True)
    tokens = [0]
    for i, above in enumerate(parent[1:], 1):
        tokens.append(sum(other == above for other in parent[1:i]))  # children 0, 1, 2 of each node
    assert variation(law_of_walk(walk, p, parent, tokens), p) <= 1e-12


def planted(functions: list[Rule], old: str, new: str) -> Rule:
    """The first function, with `old` replaced in its source or that of a function it calls."""
    source = "\n".join(inspect.getsource(f) for f in functions)
    assert old in source, f"{old!r} is not there any more"
    scope = dict(vars(ref.tree))
    exec(source.replace(old, new), scope)
    rule: Rule = scope[functions[0].__name__]
    return rule


VERIFY_MISTAKES = {
    "the inverse ratio": ("left[x] / law[x]", "law[x] / left[x]"),
    "acceptance made easier": ("float(left[x] / law[x])", "float(left[x] / law[x]) ** 0.5"),
    "always accept": ("float(left[x] / law[x])", "1.0"),
    "the residual is p": ("(left - law).clamp_min(0)", "target"),
    "the residual is |p - q|": (".clamp_min(0)", ".abs()"),
    "earlier refusals are forgotten": ("(left - law)", "(target - law)"),
    "the residual is not normalised": ("left / left.sum() if left.sum() > ROUNDING else target", "left"),
    "q keeps refused siblings": ("if not replacement", "if False"),
    "q loses siblings drawn with replacement": ("if not replacement", "if True"),
    "q is not renormalised": ("law = law / law.sum()", "law = law"),
    "the bonus comes from p": ("draw(depth, left)", "draw(depth, target)"),
    "the bonus comes from q": ("draw(depth, left)", "draw(depth, q[node])"),
    "q of the root everywhere": ("law = target, q[node]", "law = target, q[0]"),
    "p of the root everywhere": ("target = p[node] / p[node].sum()", "target = p[0] / p[0].sum()"),
}


@pytest.mark.parametrize("mistake", VERIFY_MISTAKES)
def test_mistakes_in_verify_are_found(mistake: str):
    rule = planted([ref.tree.verify_one], *VERIFY_MISTAKES[mistake])
    worst = 0.0
    for shape, replacement, seed in itertools.product(("chain", "siblings", "three siblings"), (True, False), range(3)):
        p, q = tables(4, seed, replacement)
        worst = max(worst, variation(law_of_verify(rule, p, q, SHAPES[shape], replacement), p))
    assert worst > 1e-3


WALK_MISTAKES = {
    "the first child, whatever it carries": ("tokens[i] == token and", ""),
    "the root's draw decides everywhere": ("next_child(nodes[-1], wish[nodes[-1]]", "next_child(nodes[-1], wish[0]"),
    "the root's draw is the bonus": ("max(wish[nodes[-1]], -1)", "max(wish[0], -1)"),
    "one node short": ("len(nodes) - 1, max(wish[nodes[-1]], -1)", "max(len(nodes) - 2, 0), max(wish[nodes[-1]], -1)"),
}


@pytest.mark.parametrize("mistake", WALK_MISTAKES)
def test_mistakes_in_walk_are_found(mistake: str):
    old, new = WALK_MISTAKES[mistake]
    rule = planted([ref.tree.walk, ref.tree.next_child], old, new)
    p = Table(3, 11, zeros=False)
    assert variation(law_of_walk(rule, p, SHAPES["tree"], [0, 0, 1, 0, 1]), p) > 1e-3
