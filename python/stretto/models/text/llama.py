"""The Llama shape: Llama, SmolLM2, Mistral, Qwen2/2.5/3 and Gemma 3 differ only in what their config says."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stretto.cache import PagedCache
from stretto.models.batch import Batch
from stretto.models.loading._files import forget
from stretto.models.loading.config import TextConfig
from stretto.models.loading.weights import RawWeight, Weights, dequantize
from stretto.ops import attention, norm, quant, rope
from stretto.ops.quant import PackedWeight


@dataclass(frozen=True)
class Projection:
    """A linear map whose weight may come in several formats: each part fills its own columns of the output."""

    parts: tuple[PackedWeight, ...]
    bias: Tensor | None

    @property
    def width(self) -> int:
        return sum(p.n for p in self.parts)

    def __call__(self, x: Tensor, out: Tensor, num_rows: Tensor, residual: Tensor | None = None) -> None:
        column = 0
        for part in self.parts:
            columns = slice(column, column + part.n)
            quant.linear(
                x, part, bias=None if self.bias is None else self.bias[columns], residual=None if residual is None else residual[:, columns],
                out=out[:, columns], num_rows=num_rows,
            )  # fmt: skip
            column += part.n


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Projection
    post_attn_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: PackedWeight
    down: Projection
    post_mlp_norm: Tensor | None
    window: int | None
    cos_sin: Tensor


@dataclass(frozen=True)
class Workspace:
    """Intermediate rows of one step, reused by every layer; float32."""

    x: Tensor  # [rows, hidden], the residual stream
    h: Tensor  # [rows, hidden]
    qkv: Tensor  # [rows, (heads + 2 kv_heads) * head_dim]
    attended: Tensor  # [rows, heads * head_dim]
    mlp: Tensor  # [rows, intermediate]
    selected: Tensor  # [rows, hidden], rows whose logits are wanted
    logits: Tensor  # [rows, vocab]


class LlamaModel:
    """Weights and the forward pass. It holds no cache and no per-request state."""

    records = True
    row_exact = True

    def __init__(self, config: TextConfig, source: Weights, context: int) -> None:
        """Pack all weights, tensor by tensor.

        Args:
            config, source: from a model file; the source has been checked against the config.
            context: positions to prepare rotary tables for.
        """
        self.config = config
        with quant.side_by_side():
            self._load(source, context)

    def _load(self, source: Weights, context: int) -> None:
        config = self.config
        self.embed = _pack(source.get("embed"))
        self.head = _pack(source.get("head")) if source.has("head") else self.embed
        self.final_norm = _norm(source, "final_norm", config)
        positions = torch.arange(context)
        tables = {
            sliding: rope.table(positions, config.head_dim, config.rope_theta_local if sliding and config.rope_theta_local else config.rope_theta,
                                None if sliding and config.rope_theta_local else config.rope_scaling)
            for sliding in {bool(s) for s in config.sliding_layers}
        }  # fmt: skip
        self.layers = [self._layer(source, i, tables) for i in range(config.num_layers)]

    def _layer(self, source: Weights, index: int, tables: dict[bool, Tensor]) -> Layer:
        config, name = self.config, f"layers.{index}."

        def optional_norm(key: str) -> Tensor | None:
            return _norm(source, name + key, config) if source.has(name + key) else None

        sliding = bool(config.sliding_layers[index])
        return Layer(
            attn_norm=_norm(source, name + "attn_norm", config),
            qkv=_projection(source, [name + key for key in "qkv"], biased=config.qkv_bias),
            q_norm=optional_norm("q_norm"),
            k_norm=optional_norm("k_norm"),
            o=_projection(source, [name + "o"]),
            post_attn_norm=optional_norm("post_attn_norm"),
            mlp_norm=_norm(source, name + "mlp_norm", config),
            gate_up=_gated(source.get(name + "gate"), source.get(name + "up")),
            down=_projection(source, [name + "down"]),
            post_mlp_norm=optional_norm("post_mlp_norm"),
            window=config.sliding_window if sliding else None,
            cos_sin=tables[sliding],
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights that one token reads (the head once, the embedding only where it is the head)."""
        total = self.head.nbytes
        for layer in self.layers:
            total += sum(p.nbytes for p in (*layer.qkv.parts, *layer.o.parts, layer.gate_up, *layer.down.parts))
        return total

    def workspace(self, rows: int) -> Workspace:
        """Buffers for steps of at most `rows` rows; memory is taken when first written."""
        c = self.config

        def rows_of(width: int) -> Tensor:
            return torch.empty(rows, width, dtype=torch.float32)

        return Workspace(
            x=rows_of(c.hidden_size), h=rows_of(c.hidden_size), qkv=rows_of((c.num_heads + 2 * c.num_kv_heads) * c.head_dim),
            attended=rows_of(c.num_heads * c.head_dim), mlp=rows_of(c.intermediate_size), selected=rows_of(c.hidden_size), logits=rows_of(c.vocab_size),
        )  # fmt: skip

    def forward(self, batch: Batch, cache: PagedCache, work: Workspace) -> Tensor:
        """Run the rows of `batch`, writing their keys and values into the cache's pages.

        Returns: work.x, the residual stream after the last layer, [rows, hidden] float32 (rows beyond num_rows untouched).
        """
        c, n = self.config, batch.num_rows
        heads, kv_heads, head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        queries = work.qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))
        attended = work.attended.unflatten(1, (heads, head_dim))
        gates: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_tanh": "gelu_tanh"}
        gate = gates[c.activation]
        quant.embedding(batch.tokens, self.embed, scale=c.embedding_scale, out=work.x, num_rows=n)
        for i, layer in enumerate(self.layers):
            norm.rms_norm(work.x, layer.attn_norm, c.norm_eps, out=work.h, num_rows=n)
            layer.qkv(work.h, work.qkv, n)
            rope.append(
                work.qkv, batch.positions, batch.slots, layer.cos_sin, cache.k_pages[i], cache.v_pages[i], num_heads=heads, num_kv_heads=kv_heads,
                order=c.rope_order, q_norm=layer.q_norm, k_norm=layer.k_norm, norm_eps=c.norm_eps, k_scales=cache.k_scales[i],
                v_scales=cache.v_scales[i], num_rows=n,
            )  # fmt: skip
            attention.paged(
                queries, cache.k_pages[i], cache.v_pages[i], batch.table, batch.cu_q, batch.cached, scale=c.attention_scale, window=layer.window,
                softcap=c.attn_softcap, mask=batch.mask, mask_start=batch.mask_start, k_scales=cache.k_scales[i], v_scales=cache.v_scales[i],
                out=attended, num_seqs=batch.num_seqs,
            )  # fmt: skip
            self._residual(layer.o, work.attended, layer.post_attn_norm, work, n)
            norm.rms_norm(work.x, layer.mlp_norm, c.norm_eps, out=work.h, num_rows=n)
            quant.linear(work.h, layer.gate_up, gate=gate, out=work.mlp, num_rows=n)
            self._residual(layer.down, work.mlp, layer.post_mlp_norm, work, n)
        return work.x

    def _residual(self, projection: Projection, x: Tensor, post_norm: Tensor | None, work: Workspace, num_rows: Tensor) -> None:
        """work.x += projection(x), through a norm of its own where the architecture has one (Gemma)."""
        if post_norm is None:
            projection(x, work.x, num_rows, residual=work.x)
        else:
            projection(x, work.h, num_rows)
            norm.rms_norm(work.h, post_norm, self.config.norm_eps, residual=work.x, out=work.x, num_rows=num_rows)

    def logits(self, hidden: Tensor, rows: Tensor, num_rows: Tensor, work: Workspace) -> Tensor:
        """Logits [rows, vocab] float32 of the rows named by `rows`, in their order."""
        norm.gather_rows(hidden, rows, out=work.selected, num_rows=num_rows)
        norm.rms_norm(work.selected, self.final_norm, self.config.norm_eps, out=work.selected, num_rows=num_rows)
        quant.linear(work.selected, self.head, out=work.logits, num_rows=num_rows)
        return work.logits


def _float(weight: RawWeight) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(dequantize(weight), dtype=np.float32))


def _norm(source: Weights, name: str, config: TextConfig) -> Tensor:
    return _float(source.get(name)).flatten() + config.norm_offset


def _raw(weight: RawWeight) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the mapped file is read-only, and packing only reads it
        return torch.from_numpy(weight.data.reshape(weight.shape[0], -1))


def _pack(*weights: RawWeight, interleave: bool = False) -> PackedWeight:
    first = weights[0]
    packed = quant.pack([_raw(w) for w in weights], first.dtype, first.shape[1], interleave=interleave)
    for weight in weights:
        forget(weight.data)
    return packed


def _gated(gate: RawWeight, up: RawWeight) -> PackedWeight:
    if gate.dtype != up.dtype:
        raise NotImplementedError(f"gate and up projections in different formats ({gate.dtype}, {up.dtype}); quantise both alike")
    return _pack(gate, up, interleave=True)


def _projection(source: Weights, names: Sequence[str], biased: bool = False) -> Projection:
    """Neighbouring matrices of one format become one."""
    groups: list[list[RawWeight]] = []
    for name in names:
        weight = source.get(name)
        if groups and groups[-1][0].dtype == weight.dtype:
            groups[-1].append(weight)
        else:
            groups.append([weight])
    biases = [_float(source.get(name + "_bias")).flatten() for name in names] if biased else []
    return Projection(tuple(_pack(*group) for group in groups), torch.cat(biases) if biases else None)
