"""Language models assembled from ops, and the contract they share."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from stretto.cache import PagedCache
from stretto.models.batch import Batch


class ModelConfig(Protocol):
    """What engine and cache need to know of a text model."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...


class TextModel(Protocol):
    """A text model: no cache and no per-request state of its own.

    `records`: its step consists of ops with given outputs and can be captured. `row_exact`: a row's bits do not depend on the other rows.
    """

    records: bool
    row_exact: bool

    @property
    def config(self) -> ModelConfig: ...
    @property
    def weight_bytes(self) -> int: ...
    def workspace(self, rows: int) -> Any:
        """Buffers for steps of at most `rows` rows; has .logits [rows, vocab] float32."""

    def forward(self, batch: Batch, cache: PagedCache, work: Any) -> Tensor:
        """Hidden states [rows, hidden] of the batch's rows, whose keys and values are written to the cache's pages."""

    def logits(self, hidden: Tensor, rows: Tensor, num_rows: Tensor, work: Any) -> Tensor:
        """work.logits, filled for the rows named, in their order."""
