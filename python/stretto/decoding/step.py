"""The captured model step and the small tensors that steer it: rows of any number of sequences in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from stretto.cache import PagedCache
from stretto.cache import Sequence as CacheSequence
from stretto.decoding.types import DraftTree
from stretto.models.batch import Batch
from stretto.models.text import TextModel
from stretto.ops import sampling
from stretto.ops.step import capture


@dataclass
class Rows:
    """One sequence's share of a step: a run of tokens behind its cached ones, or a draft tree whose root is the next token.

    `logit_count` of the rows, the last ones, get logits; `first_logit` says where they stand in the step's logits, once filled.
    """

    sequence: CacheSequence
    tokens: Sequence[int] | NDArray[np.int32]
    logit_count: int
    tree: DraftTree | None = None
    first_logit: int = 0

    @staticmethod
    def of_tree(sequence: CacheSequence, tree: DraftTree) -> Rows:
        return Rows(sequence, tree.tokens, len(tree.tokens), tree if len(tree.tokens) > 1 else None)


class StepRunner:
    """A model step recorded once and replayed for every batch of rows."""

    def __init__(self, model: TextModel, cache: PagedCache, *, max_rows: int, max_seqs: int, context: int, threads: int) -> None:
        """max_rows, max_seqs: of one step. context: positions of one sequence. Memory for rows is taken when they are first used."""
        pages = -(-context // cache.shape.page_size) + 1
        self.batch = b = Batch.empty(max_rows, max_seqs, pages)
        self.cache, self.threads, self.max_rows, self.max_seqs = cache, threads, max_rows, max_seqs
        work = model.workspace(max_rows)
        argmax = torch.zeros(max_rows, dtype=torch.int32)

        def step() -> None:
            hidden = model.forward(b, cache, work)
            logits = model.logits(hidden, b.logit_rows, b.num_logit_rows, work)
            sampling.argmax(logits, out=argmax, num_rows=b.num_logit_rows)

        self._captured = capture(step, record=model.records)  # with all counts zero: the calls are recorded and compute nothing
        self.logits = work.logits
        """[max_rows, vocab] float32, rows in the order of the works' logit rows."""
        self.argmax: NDArray[np.int32] = argmax.numpy()
        """Of each logit row; -1 where it holds NaN or infinity."""
        self._tokens, self._positions, self._slots = b.tokens.numpy(), b.positions.numpy(), b.slots.numpy()
        self._cu_q, self._cached, self._table = b.cu_q.numpy(), b.cached.numpy(), b.table.numpy()
        self._mask, self._mask_start, self._logit_rows = b.mask.numpy().view(np.uint64), b.mask_start.numpy(), b.logit_rows.numpy()
        self._counts = tuple(t.numpy() for t in (b.num_rows, b.num_seqs, b.num_logit_rows))

    def run(self, works: Sequence[Rows]) -> None:
        """One step. Room for the rows must have been reserved in the cache; committing them is the caller's."""
        self._fill(works)
        self._captured.run(self.threads)

    def run_timed(self, works: Sequence[Rows]) -> list[tuple[str, float]]:
        """As run, and (op, microseconds) of each kernel call."""
        self._fill(works)
        return self._captured.run_timed(self.threads)

    def _fill(self, works: Sequence[Rows]) -> None:
        row = logit = 0
        for i, work in enumerate(works):
            n, cached = len(work.tokens), work.sequence.length
            rows = slice(row, row + n)
            self._cu_q[i], self._cached[i] = row, cached
            self.cache.write_table(work.sequence, self._table[i])
            self._slots[rows] = self.cache.slots(work.sequence, n)
            self._tokens[rows] = work.tokens
            if work.tree is None:
                self._positions[rows] = np.arange(cached, cached + n, dtype=np.int32)
                self._mask_start[i] = -1
            else:
                self._positions[rows] = cached + fill_tree_mask(work.tree, self._mask[rows])
                self._mask_start[i] = row
            work.first_logit = logit
            self._logit_rows[logit : logit + work.logit_count] = np.arange(row + n - work.logit_count, row + n, dtype=np.int32)
            row, logit = row + n, logit + work.logit_count
        self._cu_q[len(works)] = row
        for count, value in zip(self._counts, (row, len(works), logit), strict=True):
            count[0] = value


def fill_tree_mask(tree: DraftTree, mask: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Write each node's ancestor bits (its own included) into mask [nodes, words]; returns the depths [nodes]."""
    depths = np.zeros(len(tree.tokens), dtype=np.int32)
    mask[:] = 0
    for i, parent in enumerate(tree.parent.tolist()):
        if parent >= 0:
            mask[i] = mask[parent]
            depths[i] = depths[parent] + 1
        mask[i, i // 64] |= np.uint64(1 << (i % 64))
    return depths
