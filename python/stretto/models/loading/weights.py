"""Weights by one set of names, whatever file they come from, and the check that a file holds what its configuration promises.

Canonical names: "embed", "head" (absent if tied), "final_norm", and "layers.{i}." followed by attn_norm q k v q_bias k_bias v_bias
o q_norm k_norm post_attn_norm mlp_norm gate up down post_mlp_norm. Matrices are [outputs, inputs].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stretto.errors import ModelFileError
from stretto.models.loading._files import fail, shown
from stretto.models.loading.blocks import BLOCKS, DEQUANTIZERS, Floats, quantize_rows
from stretto.models.loading.config import TextConfig
from stretto.models.loading.gguf import Bytes, GgufFile, TensorInfo
from stretto.models.loading.safetensors import SafetensorsFiles

_GGUF_TOP = {"embed": "token_embd.weight", "head": "output.weight", "final_norm": "output_norm.weight"}
_GGUF_LAYER = {
    "attn_norm": "attn_norm.weight", "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight", "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias", "v_bias": "attn_v.bias", "o": "attn_output.weight", "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight", "post_attn_norm": "post_attention_norm.weight", "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight", "up": "ffn_up.weight", "down": "ffn_down.weight", "post_mlp_norm": "post_ffw_norm.weight",
}  # fmt: skip
_HF_TOP = {"embed": "embed_tokens.weight", "final_norm": "norm.weight"}
_HF_LAYER = {
    "attn_norm": "input_layernorm.weight", "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias", "o": "self_attn.o_proj.weight", "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight", "mlp_norm": "post_attention_layernorm.weight", "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
}  # fmt: skip
_HF_GEMMA_LAYER = {
    "post_attn_norm": "post_attention_layernorm.weight", "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}  # fmt: skip
# Tensors that repeat what the configuration says, or belong to parts that are not text.
_IGNORED = re.compile(r"rope_freqs\.weight|.*rotary_emb\.inv_freq|(.*\.)?(vision_tower|multi_modal_projector)\..*")
_LAYER_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([a-z_]+)")


@dataclass(frozen=True)
class RawWeight:
    """A tensor as it lies in the file: ``data`` is uint8 [nbytes], read-only, of format ``dtype`` (see BLOCKS)."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes


class Weights(Protocol):
    """Where a model takes its tensors from."""

    def has(self, name: str) -> bool: ...
    def get(self, name: str) -> RawWeight: ...


@dataclass(frozen=True)
class WeightSource:
    """Tensors of one model under canonical names. Nothing is copied: ``get`` gives views of the mapped files."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    raw: Callable[[str], Bytes]
    top: Mapping[str, str]  # canonical name -> name in the file
    layer: Mapping[str, str]  # canonical name within a layer -> name in the file within a layer
    layer_prefix: str  # "blk." or "model.layers."

    @classmethod
    def from_gguf(cls, file: GgufFile) -> WeightSource:
        return cls(file.path, file.tensors, file.raw, _GGUF_TOP, _GGUF_LAYER, "blk.")

    @classmethod
    def from_safetensors(cls, files: SafetensorsFiles) -> WeightSource:
        """Names as transformers saves them, with or without a prefix such as "model." or "model.language_model."."""
        ends = sorted(name for name in files.tensors if name.endswith(_HF_TOP["embed"]))
        if len(ends) != 1:
            fail(files.path, "embed_tokens.weight", ends, "exactly one tensor of that name")
        prefix = ends[0].removesuffix(_HF_TOP["embed"])
        top = {name: prefix + suffix for name, suffix in _HF_TOP.items()}
        top["head"] = prefix.removesuffix("model.") + "lm_head.weight"
        if top["head"] not in files.tensors:
            top["head"] = "lm_head.weight"
        gemma = any(name.endswith(_HF_GEMMA_LAYER["mlp_norm"]) for name in files.tensors)
        layer = _HF_LAYER | _HF_GEMMA_LAYER if gemma else _HF_LAYER
        return cls(files.path, files.tensors, files.raw, top, layer, prefix + "layers.")

    def file_name(self, name: str) -> str | None:
        """Name in the file of canonical ``name``, or None if this kind of file has no such tensor. ValueError if not canonical."""
        if name in ("embed", "head", "final_norm"):
            return self.top.get(name)
        match = _LAYER_NAME.fullmatch(name)
        if match is None or match[2] not in _GGUF_LAYER:
            raise ValueError(f"weights: name: {name!r}, expected embed, head, final_norm or layers.NUMBER.PART")
        suffix = self.layer.get(match[2])
        return None if suffix is None else f"{self.layer_prefix}{match[1]}.{suffix}"

    def has(self, name: str) -> bool:
        return self.file_name(name) in self.tensors

    def get(self, name: str) -> RawWeight:
        """Raises: ModelFileError if the file has no such tensor, ValueError if ``name`` is not canonical."""
        stored = self.file_name(name)
        if stored is None or stored not in self.tensors:
            raise ModelFileError(f"{self.path}: tensor {stored or name}: missing")
        info = self.tensors[stored]
        return RawWeight(info.dtype, info.shape, self.raw(stored))

    def check(self, config: TextConfig) -> None:
        """Check that the file holds every tensor of ``config``, each in its shape and a format that is read, and no other.

        A tensor nobody reads means that the network in the file is not the one that would run.
        Raises: ModelFileError naming the tensor.
        """
        used: set[str] = set()
        shapes = dict(expected_shapes(config))
        if self.has("head"):  # it is used where it is there, whatever the configuration says about tying (so does transformers)
            shapes["head"] = shapes["embed"]
        for name, shape in shapes.items():
            stored = self.file_name(name)
            if stored is None or stored not in self.tensors:
                raise ModelFileError(f"{self.path}: tensor {stored or name}: missing, expected shape {shape}")
            used.add(stored)
            self._check_tensor(self.tensors[stored], shape)
        for stored in self.tensors:
            if stored not in used and not _IGNORED.fullmatch(stored):
                raise ModelFileError(f"{self.path}: tensor {shown(stored)}: not part of a {config.architecture} model")

    def _check_tensor(self, info: TensorInfo, shape: tuple[int, ...]) -> None:
        field = f"tensor {info.name}"
        if info.shape != shape:
            fail(self.path, field + " shape", info.shape, str(shape))
        if info.dtype not in DEQUANTIZERS:
            fail(self.path, field + " type", info.dtype, "one of " + ", ".join(DEQUANTIZERS))
        values, _ = BLOCKS[info.dtype]
        if len(shape) == 1 and values > 1:
            fail(self.path, field + " type", info.dtype, "F32, F16 or BF16 for a vector")
        if shape[-1] % values:
            fail(self.path, field + " row", shape[-1], f"a multiple of {values}, the block of {info.dtype}")


def expected_shapes(config: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical name and shape of every tensor a model of ``config`` needs."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "embed", (config.vocab_size, hidden)
    yield "final_norm", (hidden,)
    if not config.tie_word_embeddings:
        yield "head", (config.vocab_size, hidden)
    parts: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,), "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
        "mlp_norm": (hidden,), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    if config.qkv_bias:
        parts |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    if config.qk_norm:
        parts |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.post_norms:
        parts |= {"post_attn_norm": (hidden,), "post_mlp_norm": (hidden,)}
    for layer in range(config.num_layers):
        for part, shape in parts.items():
            yield f"layers.{layer}.{part}", shape


def dequantize(weight: RawWeight) -> Floats:
    """The values of ``weight``: float32 of its shape, bit-equal to the reference dequantiser of its format.

    Raises: NotImplementedError for a format not read here, ValueError if the bytes do not fit the shape.
    """
    if weight.dtype not in DEQUANTIZERS:
        raise NotImplementedError(f"dequantize: dtype: {weight.dtype!r}, can be {', '.join(DEQUANTIZERS)}")
    values, nbytes = BLOCKS[weight.dtype]
    count = int(np.prod(weight.shape, dtype=np.int64))
    if not weight.shape or weight.shape[-1] % values or weight.data.size * values != count * nbytes:
        raise ValueError(f"dequantize: weight: {weight.data.size} bytes, expected shape {weight.shape} of {weight.dtype}")
    with np.errstate(invalid="ignore"):  # a scale in the file may be infinite: 0 * inf is NaN, as in the reference
        return DEQUANTIZERS[weight.dtype](weight.data.reshape(-1, nbytes)).reshape(weight.shape)


def quantize(array: npt.NDArray[Any], fmt: str) -> RawWeight:
    """Quantise the rows of ``array`` to "Q8_0", "Q4_0" or "Q4_1"; errors as for ``blocks.quantize_rows``."""
    return RawWeight(fmt, tuple(array.shape), quantize_rows(array, fmt).reshape(-1))
