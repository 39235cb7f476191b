"""Any transformers causal language model under our contract: its own modules, our paged attention and cache.

Slower than the Llama shape (its linear layers run in PyTorch, row count and all), but any architecture whose attention goes through
transformers' attention interface works, draft trees included. PyTorch's matrix products choose their summation by the number of rows, so
speculation is exact in law here but not token-identical to the last bit: `row_exact` is False and results say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.cache import PagedCache
from stretto.models.batch import Batch
from stretto.ops import attention

ATTENTION_NAME = "stretto_paged"


@dataclass(frozen=True)
class Workspace:
    logits: Tensor  # [rows, vocab] float32


class _Step:
    """What the attention function needs of the step in progress; one at a time."""

    batch: Batch
    cache: PagedCache
    rows: int
    seqs: int


class TransformersModel:
    """A loaded transformers model as the engine sees it."""

    records = False
    """Its step is PyTorch and cannot be recorded: it runs again each time."""
    row_exact = False

    def __init__(self, model: Any, eos_ids: Sequence[int] = ()) -> None:
        """model: a transformers causal LM in eval mode on the CPU; its attention implementation is switched to ours.

        Raises: NotImplementedError where the model's attention does not go through transformers' attention interface, or keeps a state of its
            own (recurrent models).
        """
        text = model.config.get_text_config()
        for field in ("num_attention_heads", "num_hidden_layers", "vocab_size"):
            if not hasattr(text, field):
                raise NotImplementedError(f"{type(model).__name__}: config has no {field}; only attention-based causal models can be wrapped")
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION_NAME, self._attend)
        model.set_attn_implementation(ATTENTION_NAME)
        self._model = model
        self.config = WrappedConfig.of(model, tuple(eos_ids))
        self._step = _Step()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters but the input embedding, unless it is the head too."""
        embedding: Tensor = self._model.get_input_embeddings().weight
        tied = self._model.get_output_embeddings().weight is embedding
        parameters: list[Tensor] = list(self._model.parameters())
        return sum(p.nbytes for p in parameters) - (0 if tied else embedding.nbytes)

    def workspace(self, rows: int) -> Workspace:
        return Workspace(torch.empty(rows, self.config.vocab_size))

    def forward(self, batch: Batch, cache: PagedCache, work: Workspace) -> Tensor:
        """Run the rows of `batch`; returns hidden states [rows in use, hidden]."""
        step = self._step
        step.batch, step.cache, step.rows, step.seqs = batch, cache, int(batch.num_rows[0]), int(batch.num_seqs[0])
        if step.rows == 0:
            return torch.empty(0, self.config.hidden_size)
        with torch.inference_mode():
            out = self._model.base_model(
                input_ids=batch.tokens[: step.rows].long()[None], position_ids=batch.positions[: step.rows].long()[None], use_cache=False
            )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor, rows: Tensor, num_rows: Tensor, work: Workspace) -> Tensor:
        count = int(num_rows[0])
        if count:
            with torch.inference_mode():
                logits = self._model.get_output_embeddings()(hidden[rows[:count].long()])
                cap = self.config.logit_softcap
                work.logits[:count] = logits if cap is None else cap * torch.tanh(logits / cap)
        return work.logits

    def _attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
                sliding_window: int | None = None, softcap: float | None = None, **_: Any) -> tuple[Tensor, None]:  # fmt: skip
        """transformers' attention interface: q [1, heads, rows, head_dim], k and v [1, kv_heads, rows, head_dim] -> [1, rows, heads, head_dim].

        The keyword arguments it passes beside these (dropout, position ids and others) do not change inference.
        """
        step, layer = self._step, module.layer_idx
        page, offset = (part.long() for part in _split(step.batch.slots[: step.rows], step.cache.shape.page_size))
        dtype = step.cache.shape.dtype
        step.cache.k_pages[layer][page, :, :, offset] = k[0].transpose(0, 1).to(dtype)
        step.cache.v_pages[layer][page, :, offset, :] = v[0].transpose(0, 1).to(dtype)
        b = step.batch
        out = attention.paged(
            q[0].transpose(0, 1).float(), step.cache.k_pages[layer], step.cache.v_pages[layer], b.table[: step.seqs], b.cu_q[: step.seqs + 1],
            b.cached[: step.seqs], scale=q.shape[-1] ** -0.5 if scaling is None else scaling, window=sliding_window, softcap=softcap, mask=b.mask,
            mask_start=b.mask_start[: step.seqs],
        )  # fmt: skip
        return out.to(q.dtype)[None], None


@dataclass(frozen=True)
class WrappedConfig:
    """The part of a text config that engine and cache read."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    logit_softcap: float | None
    eos_ids: tuple[int, ...]

    @staticmethod
    def of(model: Any, eos_ids: tuple[int, ...]) -> WrappedConfig:
        c = model.config.get_text_config()
        heads = c.num_attention_heads
        own = model.generation_config.eos_token_id if eos_ids == () else list(eos_ids)
        own = [] if own is None else [own] if isinstance(own, int) else own
        return WrappedConfig(
            type(model).__name__, c.vocab_size, c.hidden_size, c.num_hidden_layers, heads, getattr(c, "num_key_value_heads", None) or heads,
            getattr(c, "head_dim", None) or c.hidden_size // heads, getattr(c, "max_position_embeddings", 8192),
            getattr(c, "final_logit_softcapping", None), tuple(own),
        )  # fmt: skip


def _split(slots: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    return slots // page_size, slots % page_size
