"""From logits to tokens: one draw a row, keyed by position, and the walk through the draft that the draws confirm."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stretto.decoding.types import DraftTree
from stretto.engine.params import SamplingParams
from stretto.engine.results import TokenLogprob
from stretto.ops import sampling


@dataclass(frozen=True)
class SampleRows:
    """Logit rows of one request: one for a prompt's last row (tree None), one a node for a draft tree."""

    params: SamplingParams
    lineage: int
    first: int  # row in the step's logits
    tree: DraftTree | None
    tokens: Sequence[int]  # all tokens so far; the last one is the root

    @property
    def count(self) -> int:
        return 1 if self.tree is None else len(self.tree.tokens)

    def path_to(self, node: int) -> list[int]:
        """Tokens of the drafts from the root (excluded) to `node`."""
        path: list[int] = []
        while self.tree is not None and node > 0:
            path.append(int(self.tree.tokens[node]))
            node = int(self.tree.parent[node])
        return path[::-1]


@dataclass(frozen=True)
class Verdict:
    """path: nodes confirmed, the root first. tokens: what the request gains, accepted drafts and one more."""

    path: list[int]
    tokens: list[int]
    accepted: int
    logprobs: list[TokenLogprob]


def choose_tokens(logits: Tensor, argmax: NDArray[np.int32], requests: Sequence[SampleRows]) -> list[Verdict | None]:
    """Choose the tokens of all requests of a step at once.

    The target's own next token is taken at every node: the argmax, or one draw from the warped law with noise keyed by (seed, lineage,
    position). The walk follows children that carry it. So tokens do not depend on the draft, which only decides how far one step goes
    (Point and Coupled acceptance; arXiv 2312.12728 for the greedy case).

    Args:
        logits: [rows, vocab] float32. argmax: [rows], -1 where a row holds NaN or infinity.
    Returns: one verdict a request, None where a row that counts was not finite.
    """
    following = argmax.copy()
    drawn = [r for r in requests if not r.params.greedy or r.params.processed]
    if drawn:
        _draw(logits, argmax, drawn, following)
    return [_walk(r, following[r.first : r.first + r.count].tolist(), logits) for r in requests]


def _draw(logits: Tensor, argmax: NDArray[np.int32], drawn: Sequence[SampleRows], following: NDArray[np.int32]) -> None:
    """Replace the argmax by a draw for these requests."""
    rows = np.concatenate([np.arange(r.first, r.first + r.count) for r in drawn])
    chosen = logits[torch.from_numpy(rows)]
    if any(r.params.processed for r in drawn):
        _penalize(chosen, drawn)
    p = sampling.warp(
        chosen, _per_row(drawn, "temperature"), _per_row(drawn, "top_k", torch.int32), _per_row(drawn, "top_p"), _per_row(drawn, "min_p")
    )
    lineage = torch.tensor([r.lineage for r in drawn for _ in range(r.count)], dtype=torch.int64)
    position = torch.tensor([len(r.tokens) + len(r.path_to(i)) for r in drawn for i in range(r.count)], dtype=torch.int32)
    ids = sampling.draw(p, _per_row(drawn, "seed", torch.int64), lineage, position)
    following[rows] = np.where(argmax[rows] >= 0, ids.numpy(), -1)


def _per_row(drawn: Sequence[SampleRows], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([getattr(r.params, name) for r in drawn for _ in range(r.count)], dtype=dtype)


def _penalize(chosen: Tensor, drawn: Sequence[SampleRows]) -> None:
    """Apply penalties and biases, each row's history being prompt, output and its own path through the draft."""
    histories = [[*r.tokens, *r.path_to(node)] for r in drawn for node in range(r.count)]
    biases = [r.params.logit_bias for r in drawn for _ in range(r.count)]

    def offsets(parts: Sequence[Collection[int]]) -> Tensor:
        return torch.tensor(np.cumsum([0, *map(len, parts)]), dtype=torch.int32)

    sampling.penalize(
        chosen, torch.tensor([t for h in histories for t in h], dtype=torch.int32), offsets(histories), _per_row(drawn, "repetition_penalty"),
        _per_row(drawn, "presence_penalty"), _per_row(drawn, "frequency_penalty"), torch.tensor([t for b in biases for t in b], dtype=torch.int32),
        torch.tensor([v for b in biases for v in b.values()], dtype=torch.float32), offsets(biases),
    )  # fmt: skip


def _walk(r: SampleRows, following: list[int], logits: Tensor) -> Verdict | None:
    node, path, tokens = 0, [0], [following[0]]
    children = {} if r.tree is None else {(p, t): i for i, (p, t) in enumerate(zip(r.tree.parent.tolist(), r.tree.tokens.tolist(), strict=True))}
    while (child := children.get((node, following[node]))) is not None:
        node = child
        path.append(node)
        tokens.append(following[node])
    if min(tokens) < 0:  # of the rows that count; a draft nobody confirmed may be as broken as it likes
        return None
    reports = [_report(logits[r.first + n], t, r.params.logprobs) for n, t in zip(path, tokens, strict=True)] if r.params.logprobs else []
    return Verdict(path, tokens, len(path) - 1, reports)


def _report(logits: Tensor, token: int, count: int) -> TokenLogprob:
    row = torch.log_softmax(logits, dim=-1)
    top = torch.topk(row, count)
    return TokenLogprob(token, row[token].item(), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
