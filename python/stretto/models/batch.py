"""The ragged batch: prefill, chunk, decode, tree verification and search siblings are the same call on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK_WORDS = 4  # 64 bits each: trees of at most 256 nodes


@dataclass(frozen=True)
class Batch:
    """Small integer tensors that say what the rows of a step are. All are filled in place before each step; `rows`, `seqs` and
    `logit_rows` in use are read by the kernels from the three counts.

    Rows of one sequence stand together: sequence r owns rows cu_q[r] .. cu_q[r + 1]. A causal sequence's row i has position cached + i;
    a tree's node i stands in slot cached + i of its sequence and has position cached + depth.
    """

    tokens: Tensor  # int32 [rows]
    positions: Tensor  # int32 [rows]
    slots: Tensor  # int32 [rows], page * page_size + offset
    cu_q: Tensor  # int32 [seqs + 1]
    cached: Tensor  # int32 [seqs]
    table: Tensor  # int32 [seqs, pages]
    mask: Tensor  # int64 [rows, MASK_WORDS], bits of the ancestors (itself included) of tree rows
    mask_start: Tensor  # int32 [seqs], the sequence's first row in mask, or -1: causal
    logit_rows: Tensor  # int32 [rows], rows whose logits are wanted
    num_rows: Tensor  # int32 [1]
    num_seqs: Tensor  # int32 [1]
    num_logit_rows: Tensor  # int32 [1]

    @staticmethod
    def empty(rows: int, seqs: int, pages_per_seq: int) -> Batch:
        """Room for `rows` rows of at most `seqs` sequences, each with at most `pages_per_seq` pages."""

        def ints(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32)

        return Batch(
            ints(rows), ints(rows), ints(rows), ints(seqs + 1), ints(seqs), ints(seqs, pages_per_seq),
            torch.zeros(rows, MASK_WORDS, dtype=torch.int64), ints(seqs), ints(rows), ints(1), ints(1), ints(1),
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return self.tokens.shape[0]
