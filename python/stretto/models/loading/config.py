"""The numbers that define a text model, read from GGUF keys or from a Hugging Face ``config.json``.

A configuration is data: only architectures named here are built, nothing it names is ever imported. Every field is checked
against a range wide enough for any model that exists and narrow enough that sizes computed from it cannot explode.
Sources: key list in ggml-org/ggml docs/gguf.md; configuration classes of transformers; arXiv 2309.00071 (YaRN).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np

from stretto.errors import ModelFileError, UnknownModel
from stretto.models.loading._files import fail, parse_json_object, read_bytes, shown
from stretto.models.loading.gguf import GgufFile, StringArray

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
MAX_CONFIG_BYTES = 4 << 20  # the largest known, with id-to-label maps, is below 1 MiB

MAX_VOCAB, MAX_HIDDEN, MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM = 1 << 22, 1 << 16, 1024, 1024, 1024
MAX_INTERMEDIATE, MAX_CONTEXT = 1 << 20, 1 << 26
MIN_THETA, MAX_THETA = 2.0, 1e12  # 1 has no wavelengths, and YaRN divides by its logarithm
# Tokens that end a turn whatever the key eos_token_id says: chat files often name only one of two.
_END_TOKENS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "</s>", "<eos>"})
_CONTROL = 3  # token type "control" in tokenizer.ggml.token_type


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. ``attn_factor`` multiplies cos and sin (1 unless ``type`` is "yarn")."""

    type: str  # "linear", "ntk", "yarn", "llama3"
    factor: float
    original_context: int
    low_freq_factor: float = 1.0  # llama3 only, as high_freq_factor
    high_freq_factor: float = 4.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0  # yarn only, as beta_slow
    beta_slow: float = 1.0


@dataclass(frozen=True)
class TextConfig:
    """A decoder-only text model.

    ``rope_order`` says how a head's dimensions pair up: "half" is (i, i + head_dim/2), "interleaved" is (2i, 2i + 1).
    ``norm_offset`` is added to norm weights as stored. ``rope_scaling`` applies to layers that do not slide; sliding layers of a
    model with ``rope_theta_local`` use that base, unscaled. A sliding layer sees the last ``sliding_window`` positions, its own
    included.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    norm_offset: float
    rope_theta: float
    rope_theta_local: float | None
    rope_order: str
    rope_scaling: RopeScaling | None
    context_length: int
    sliding_window: int | None
    sliding_layers: tuple[bool, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    activation: str  # "silu" or "gelu_tanh"
    embedding_scale: float
    post_norms: bool
    attention_scale: float
    attn_softcap: float | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    name: str


def _is_number(value: Any) -> TypeGuard[int | float]:
    return type(value) in (int, float)


@dataclass(frozen=True)
class _Fields:
    """Checked access to the keys of one object of a file. A missing key takes the default; without one it is an error."""

    path: Path
    label: str  # what stands before the key in messages
    values: Mapping[str, Any]

    def fail(self, name: str, value: object, expected: str) -> NoReturn:
        fail(self.path, self.label + name, value, expected)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(name)
        if isinstance(value, np.ndarray):  # GGUF may write a count once per layer
            if value.dtype.kind not in "iu" or value.size == 0 or (value != value[0]).any():
                self.fail(name, "an array of unequal values", "one integer for all layers")
            value = int(value[0])
        if value is None:
            value = default
        if type(value) is not int or not low <= value <= high:
            self.fail(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None:
            value = default
        if not _is_number(value) or not low <= value <= high:  # NaN fails every comparison
            self.fail(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return None if self.values.get(name) is None else self.integer(name, low, high)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        return None if self.values.get(name) is None else self.number(name, low, high)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            self.fail(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.fail(name, value, "a string")
        return value

    def section(self, name: str) -> _Fields | None:
        """A nested object, or None where the key is missing or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(name, value, "an object")
        return _Fields(self.path, f"{self.label}{name}.", value)

    def must_be(self, name: str, expected: object, reason: str) -> None:
        value = self.values.get(name)
        if value is not None and (type(value), value) != (type(expected), expected):
            self.fail(name, value, f"{expected!r} ({reason})")


def _check_whole(path: Path, config: TextConfig) -> TextConfig:
    """What no single field can show, and the sizes the kernels take."""
    if config.num_heads % config.num_kv_heads:
        fail(path, "key-value heads", config.num_kv_heads, f"a divisor of the {config.num_heads} heads")
    if config.head_dim % 16:
        fail(path, "head size", config.head_dim, "a multiple of 16 (attention over other sizes is not built here)")
    if config.intermediate_size % 16:
        fail(path, "feed-forward size", config.intermediate_size, "a multiple of 16 (gate and up are packed in groups of 16 rows)")
    if any(config.sliding_layers) and config.sliding_window is None:
        fail(path, "sliding window", None, "a size, because some layers slide")
    for token in (*config.eos_ids, *(() if config.bos_id is None else (config.bos_id,))):
        if not 0 <= token < config.vocab_size:
            fail(path, "begin or end token", token, f"an id below the vocabulary size {config.vocab_size}")
    return config


def _unknown(path: Path, field: str, architecture: str) -> UnknownModel | ModelFileError:
    if not architecture:
        return ModelFileError(f"{path}: {field}: missing, expected one of {', '.join(ARCHITECTURES)}")
    return UnknownModel(f"{path}: {field}: architecture {shown(architecture)} is not known; known are {', '.join(ARCHITECTURES)}")


def _yarn_factor(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


# ---- GGUF ----


def gguf_eos_ids(file: GgufFile) -> tuple[int, ...]:
    """Ids that end a generation: those the keys name, and control tokens whose text is a known end of turn."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    found = [file.metadata[key] for key in keys if key in file.metadata]
    for key, value in zip(keys, found, strict=False):
        if type(value) is not int or not 0 <= value < MAX_VOCAB:
            fail(file.path, key, value, "a token id")
    tokens, kinds = file.metadata.get("tokenizer.ggml.tokens"), file.metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, StringArray) and isinstance(kinds, np.ndarray) and len(tokens) == len(kinds):
        ends = {token.encode() for token in _END_TOKENS}
        found += [int(index) for index in np.flatnonzero(kinds == _CONTROL) if tokens.raw[index] in ends]
    return tuple(dict.fromkeys(found))


def _llama3_from_factors(file: GgufFile, theta: float, head_dim: int) -> RopeScaling | None:
    """Llama 3.1 files hold the divisor of each frequency as a tensor instead of keys: find the rule that gives it."""
    info = file.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    if info.dtype != "F32" or info.shape != (head_dim // 2,):
        fail(file.path, "tensor 'rope_freqs.weight'", f"{info.dtype} {info.shape}", f"F32 ({head_dim // 2},)")
    stored = file.raw("rope_freqs.weight").view("<f4").astype(np.float64)
    scaling = RopeScaling("llama3", float(np.clip(np.nan_to_num(stored).max(), 1.0, 1e6)), 8192)
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_context * frequency / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    divisor = 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
    if not np.allclose(stored, divisor, rtol=1e-3):
        fail(file.path, "tensor 'rope_freqs.weight'", stored[:4].tolist(), "the Llama 3 rule with original context 8192")
    return scaling


def _gguf_rope_scaling(file: GgufFile, keys: _Fields, theta: float, head_dim: int, context: int) -> RopeScaling | None:
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none" and "rope.scale_linear" in keys.values:  # the key of old files
        kind, keys = "linear", _Fields(keys.path, keys.label, {"rope.scaling.factor": keys.values["rope.scale_linear"]})
    if kind == "none":
        return _llama3_from_factors(file, theta, head_dim)
    if kind not in ("linear", "yarn"):
        keys.fail("rope.scaling.type", kind, "none, linear or yarn")
    if "rope_freqs.weight" in file.tensors:
        keys.fail("rope.scaling.type", kind, "none, because the file also holds rope_freqs.weight")
    factor = keys.number("rope.scaling.factor", 1.0, 1e6)
    original = keys.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, default=context)
    if kind == "linear":
        return RopeScaling("linear", factor, original)
    attn = keys.number("rope.scaling.attn_factor", 0.0, 100.0, default=1.0) * _yarn_factor(factor)
    fast = keys.number("rope.scaling.yarn_beta_fast", 1e-3, 1e6, default=32.0)
    slow = keys.number("rope.scaling.yarn_beta_slow", 1e-3, 1e6, default=1.0)
    return RopeScaling("yarn", factor, original, attn_factor=attn, beta_fast=fast, beta_slow=slow)


def _gguf_sliding(keys: _Fields, architecture: str, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    window = keys.integer("attention.sliding_window", 0, MAX_CONTEXT, default=0) or None
    if architecture == "gemma3":  # every sixth layer sees everything, unless the file says otherwise
        pattern = keys.values.get("attention.sliding_window_pattern", 6)
        if isinstance(pattern, np.ndarray) and pattern.dtype == np.bool_ and len(pattern) == num_layers:
            return window, tuple(bool(slides) for slides in pattern)
        if type(pattern) is not int or not 1 <= pattern <= MAX_LAYERS:
            keys.fail("attention.sliding_window_pattern", pattern, f"a period, or {num_layers} booleans")
        return window, tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    if architecture != "llama":  # the window of Qwen files is for a mode that is off
        window = None
    return window, (window is not None,) * num_layers


def config_from_gguf(file: GgufFile) -> TextConfig:
    """Configuration of a GGUF file. Raises: UnknownModel for an architecture not built here, ModelFileError for a bad field."""
    metadata = file.metadata
    general = _Fields(file.path, "", metadata)
    architecture = general.text("general.architecture", "")
    if architecture not in ARCHITECTURES or architecture == "mistral":  # Mistral files call themselves llama
        raise _unknown(file.path, "general.architecture", architecture)
    prefix = architecture + "."
    keys = _Fields(file.path, prefix, {key[len(prefix) :]: metadata[key] for key in metadata if key.startswith(prefix)})
    keys.must_be("expert_count", 0, "mixtures of experts are not built here")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        keys.must_be(name, None, "none of these architectures caps its logits")
    gemma = architecture == "gemma3"
    hidden = keys.integer("embedding_length", 1, MAX_HIDDEN)
    num_layers = keys.integer("block_count", 1, MAX_LAYERS)
    num_heads = keys.integer("attention.head_count", 1, MAX_HEADS)
    head_dim = keys.integer("attention.key_length", 1, MAX_HEAD_DIM, default=max(1, hidden // num_heads))
    keys.must_be("attention.value_length", head_dim, "values as long as keys")
    keys.must_be("rope.dimension_count", head_dim, "rotary embedding of whole heads")
    theta = keys.number("rope.freq_base", MIN_THETA, MAX_THETA, default=1e6 if gemma else 1e4)
    context = keys.integer("context_length", 2, MAX_CONTEXT)
    window, sliding = _gguf_sliding(keys, architecture, num_layers)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, StringArray) or not len(tokens):
        fail(file.path, "tokenizer.ggml.tokens", "missing" if tokens is None else tokens, "an array of strings, at least one")
    vocab_size = keys.integer("vocab_size", 1, MAX_VOCAB, default=len(tokens))
    if len(tokens) > vocab_size:
        fail(file.path, "tokenizer.ggml.tokens", len(tokens), f"at most {prefix}vocab_size {vocab_size}")
    # Gemma 3 27B (62 layers) alone scales queries by its model width per head; files do not say so.
    query_width = hidden / num_heads if gemma and num_layers == 62 else head_dim
    return _check_whole(file.path, TextConfig(
        architecture=architecture, vocab_size=vocab_size, hidden_size=hidden, num_layers=num_layers, num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", 1, MAX_HEADS, default=num_heads), head_dim=head_dim,
        intermediate_size=keys.integer("feed_forward_length", 1, MAX_INTERMEDIATE),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", 0.0, 0.1), norm_offset=0.0, rope_theta=theta,
        rope_theta_local=keys.number("rope.freq_base_swa", MIN_THETA, MAX_THETA, default=1e4) if gemma else None,
        rope_order="interleaved" if architecture == "llama" else "half",
        rope_scaling=_gguf_rope_scaling(file, keys, theta, head_dim, context), context_length=context,
        sliding_window=window, sliding_layers=sliding, tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors, qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        activation="gelu_tanh" if gemma else "silu", embedding_scale=math.sqrt(hidden) if gemma else 1.0, post_norms=gemma,
        attention_scale=query_width**-0.5, attn_softcap=None,
        bos_id=general.optional_integer("tokenizer.ggml.bos_token_id", 0, MAX_VOCAB), eos_ids=gguf_eos_ids(file),
        name=general.text("general.name", file.path.stem),
    ))  # fmt: skip


# ---- Hugging Face ----


def _hf_rope(keys: _Fields, scaled: _Fields | None, theta: float, context: int) -> RopeScaling | None:
    """``scaled`` is rope_scaling, or an entry of rope_parameters."""
    if scaled is None:
        return None
    kind = scaled.text("rope_type", scaled.text("type", "default"))
    # "dynamic" stretches only beyond max_position_embeddings, where this library refuses to go.
    if kind in ("default", "dynamic"):
        return None
    if kind not in ("linear", "ntk", "yarn", "llama3"):
        scaled.fail("rope_type", kind, "default, linear, ntk, dynamic, yarn or llama3")
    factor = scaled.number("factor", 1.0, 1e6)
    original = scaled.integer("original_max_position_embeddings", 1, MAX_CONTEXT, default=context)
    if kind in ("linear", "ntk"):
        return RopeScaling(kind, factor, original)
    if kind == "llama3":
        low = scaled.number("low_freq_factor", 1e-3, 1e6)
        high = scaled.number("high_freq_factor", 1e-3, 1e6)
        if high <= low:
            scaled.fail("high_freq_factor", high, f"more than low_freq_factor {low}")
        return RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    scaled.must_be("truncate", True, "YaRN bounds are whole dimensions")
    scaled.must_be("mscale", None, "it belongs to models not built here")
    attn = scaled.number("attention_factor", 0.0, 100.0, default=_yarn_factor(factor))
    fast = scaled.number("beta_fast", 1e-3, 1e6, default=32.0)
    slow = scaled.number("beta_slow", 1e-3, 1e6, default=1.0)
    return RopeScaling("yarn", factor, original, attn_factor=attn, beta_fast=fast, beta_slow=slow)


def _hf_sliding(keys: _Fields, architecture: str, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    if architecture == "llama":
        return None, (False,) * num_layers
    window = keys.optional_integer("sliding_window", 1, MAX_CONTEXT)
    if "sliding_window" not in keys.values:
        window = 4096  # what the classes of these architectures take where the file is silent
    if architecture == "mistral":
        return window, (window is not None,) * num_layers
    if architecture != "gemma3" and not keys.flag("use_sliding_window", False):
        window = None
    kinds = keys.values.get("layer_types")
    if kinds is None:
        if architecture == "gemma3":
            period = keys.integer("sliding_window_pattern", 1, MAX_LAYERS, default=6)
            sliding = tuple((layer + 1) % period != 0 for layer in range(num_layers))
        else:
            first = keys.integer("max_window_layers", 0, MAX_LAYERS, default=28)
            sliding = tuple(window is not None and layer >= first for layer in range(num_layers))
        return window, sliding
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in allowed for kind in kinds):
        keys.fail("layer_types", kinds, f"{num_layers} times {' or '.join(allowed)}")
    return window, tuple(kind == "sliding_attention" for kind in kinds)


def _hf_token_ids(keys: _Fields, name: str) -> tuple[int, ...]:
    value = keys.values.get(name)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if len(ids) > 64 or any(type(token) is not int or not 0 <= token < MAX_VOCAB for token in ids):
        keys.fail(name, value, "a token id or a list of at most 64")
    return tuple(ids)


def _hf_unsupported(keys: _Fields) -> None:
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        keys.must_be(name, False, "this form of the architecture is not built here")
    keys.must_be("partial_rotary_factor", 1.0, "rotary embedding of whole heads")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        keys.must_be(name, None, "none of these architectures caps its logits")
    keys.must_be("quantization_config", None, "only f32, f16 and bf16 weights are read; quantised ones from GGUF")


def config_from_hf(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None, *, path: str | os.PathLike[str] = CONFIG_NAME
) -> TextConfig:
    """Configuration of a Hugging Face model directory.

    Args:
        config: the parsed config.json. ``auto_map`` is ignored: code it names is never imported.
        generation: the parsed generation_config.json, whose end tokens are added.
        path: named in messages.
    Raises: UnknownModel for an architecture not built here, ModelFileError for a bad field.
    """
    path = Path(path)
    keys = _Fields(path, "", config)
    kind = keys.text("model_type", "")
    if kind == "gemma3":  # picture and text: the text part
        outer, nested = keys, keys.section("text_config")
        if nested is None:
            keys.fail("text_config", None, "an object")
        keys = nested
        _hf_unsupported(outer)
    architecture = {"gemma3_text": "gemma3"}.get(kind, kind)
    if architecture not in ARCHITECTURES:
        raise _unknown(path, keys.label + "model_type", kind)
    gemma = architecture == "gemma3"
    _hf_unsupported(keys)
    keys.must_be("hidden_activation" if gemma else "hidden_act", "gelu_pytorch_tanh" if gemma else "silu", architecture)
    vocab_size = keys.integer("vocab_size", 1, MAX_VOCAB, default=262_208 if gemma else None)
    hidden = keys.integer("hidden_size", 1, MAX_HIDDEN)
    num_layers = keys.integer("num_hidden_layers", 1, MAX_LAYERS)
    num_heads = keys.integer("num_attention_heads", 1, MAX_HEADS, default=8 if gemma else None)
    num_kv_heads = keys.integer("num_key_value_heads", 1, MAX_HEADS, default=4 if gemma else num_heads)
    default_dim = {"gemma3": 256, "qwen3": 128}.get(architecture, max(1, hidden // num_heads))
    head_dim = keys.integer("head_dim", 1, MAX_HEAD_DIM, default=default_dim)
    context = keys.integer("max_position_embeddings", 2, MAX_CONTEXT, default=131_072 if gemma else None)
    rope = keys.section("rope_parameters") or keys.section("rope_scaling")
    local = None
    if gemma:
        nested_rope = keys.section("rope_parameters")
        local_rope = nested_rope.section("sliding_attention") if nested_rope is not None else None
        default_local = keys.number("rope_local_base_freq", MIN_THETA, MAX_THETA, default=1e4)
        local = default_local if local_rope is None else local_rope.number("rope_theta", MIN_THETA, MAX_THETA, default=default_local)
        if local_rope is not None:
            local_rope.must_be("rope_type", "default", "sliding layers are not scaled")
        if nested_rope is not None:
            rope = nested_rope.section("full_attention")
    theta = keys.number("rope_theta", MIN_THETA, MAX_THETA, default=1e6 if gemma else 1e4)
    if rope is not None:
        rope.must_be("partial_rotary_factor", 1.0, "rotary embedding of whole heads")
        theta = rope.number("rope_theta", MIN_THETA, MAX_THETA, default=theta)
    scaling = _hf_rope(keys, rope, theta, context)
    if scaling is not None and scaling.type == "yarn":  # files name the length before or after stretching
        context = max(context, min(MAX_CONTEXT, int(scaling.factor * scaling.original_context)))
    window, sliding = _hf_sliding(keys, architecture, num_layers)
    ends = [*_hf_token_ids(keys, "eos_token_id"), *_hf_token_ids(_Fields(path, "generation ", generation or {}), "eos_token_id")]
    bos = _hf_token_ids(keys, "bos_token_id")
    query_width = keys.number("query_pre_attn_scalar", 1e-3, 1e6, default=256.0) if gemma else float(head_dim)
    return _check_whole(path, TextConfig(
        architecture=architecture, vocab_size=vocab_size, hidden_size=hidden, num_layers=num_layers, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, intermediate_size=keys.integer("intermediate_size", 1, MAX_INTERMEDIATE),
        norm_eps=keys.number("rms_norm_eps", 0.0, 0.1, default=1e-6), norm_offset=1.0 if gemma else 0.0, rope_theta=theta,
        rope_theta_local=local, rope_order="half", rope_scaling=scaling, context_length=context, sliding_window=window,
        sliding_layers=sliding, tie_word_embeddings=keys.flag("tie_word_embeddings", gemma), qkv_bias=architecture == "qwen2",
        qk_norm=architecture in ("qwen3", "gemma3"), activation="gelu_tanh" if gemma else "silu",
        embedding_scale=math.sqrt(hidden) if gemma else 1.0, post_norms=gemma, attention_scale=query_width**-0.5,
        attn_softcap=None,
        bos_id=bos[0] if bos else None, eos_ids=tuple(dict.fromkeys(ends)), name=keys.text("_name_or_path", ""),
    ))  # fmt: skip


def read_json(directory: Path, name: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object beside the model; an empty one where the file does not exist."""
    path = directory / name
    return parse_json_object(read_bytes(path, limit), path, name, max_items=limit // 4) if path.exists() else {}


def read_hf_config(directory: str | os.PathLike[str]) -> TextConfig:
    """Configuration of a model directory: config.json, and the end tokens of generation_config.json where there is one."""
    directory = Path(directory)
    config = read_json(directory, CONFIG_NAME)
    if not config:
        raise ModelFileError(f"{directory / CONFIG_NAME}: missing or empty; a model directory needs it")
    return config_from_hf(config, read_json(directory, GENERATION_NAME), path=directory / CONFIG_NAME)
