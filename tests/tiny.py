"""A Llama of a few thousand weights and a tokenizer of letters: the whole engine in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from stretto.cache import CacheShape, PagedCache
from stretto.engine.engine import EngineConfig
from stretto.engine.llm import LLM
from stretto.models.loading.config import TextConfig
from stretto.models.loading.weights import RawWeight, expected_shapes
from stretto.models.text.llama import LlamaModel

VOCAB = 96


class LetterTokenizer:
    """Token i is the character chr(32 + i)."""

    vocab_size = VOCAB
    eos_ids: tuple[int, ...] = (VOCAB - 1,)
    fingerprint = "0" * 64

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return [min(max(ord(c) - 32, 0), VOCAB - 1) for c in text]

    def decode(self, ids: Any, skip_special: bool = True) -> str:
        return "".join(chr(32 + i) for i in ids)

    def stream(self) -> LetterStream:
        return LetterStream()


class LetterStream:
    def push(self, token: int) -> str:
        return chr(32 + token)

    def flush(self) -> str:
        return ""


@dataclass(frozen=True)
class RandomWeights:
    """Weights drawn from a seed; matrices scaled so that logits spread over a few units and greedy text is not constant."""

    config: TextConfig
    seed: int = 0
    dtype: str = "F32"

    def has(self, name: str) -> bool:
        return name in dict(expected_shapes(self.config))

    def get(self, name: str) -> RawWeight:
        shape = dict(expected_shapes(self.config))[name]
        rng = np.random.default_rng([self.seed, *name.encode()])
        if len(shape) == 1:
            values = 1 + 0.1 * rng.standard_normal(shape)
        else:
            values = rng.standard_normal(shape) * (1.0 if name == "embed" else 2.0 / np.sqrt(shape[-1]))
        return RawWeight("F32", shape, values.astype(np.float32).view(np.uint8).reshape(-1))


def tiny_config(**changes: Any) -> TextConfig:
    fields: dict[str, Any] = dict(  # noqa: C408
        architecture="llama", vocab_size=VOCAB, hidden_size=64, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=64, intermediate_size=96,
        norm_eps=1e-5, norm_offset=0.0, rope_theta=10000.0, rope_theta_local=None, rope_order="half", rope_scaling=None, context_length=512,
        sliding_window=None, sliding_layers=(False, False), tie_word_embeddings=True, qkv_bias=False, qk_norm=False, activation="silu",
        embedding_scale=1.0, post_norms=False, attention_scale=64**-0.5, attn_softcap=None, bos_id=None, eos_ids=(VOCAB - 1,),
        name="tiny",
    )  # fmt: skip
    return TextConfig(**(fields | changes))


def tiny_llm(*, page_size: int = 16, pages: int = 256, max_rows: int = 64, max_seqs: int = 8, threads: int = 2, kv: torch.dtype = torch.float16,
             seed: int = 0, weights: type[RandomWeights] = RandomWeights, **config: Any) -> LLM:  # fmt: skip
    c = tiny_config(**config)
    model = LlamaModel(c, weights(c, seed), c.context_length)
    shape = CacheShape(c.num_layers, c.num_kv_heads, c.head_dim, page_size, kv)
    return LLM(model, LetterTokenizer(), PagedCache(shape, pages), EngineConfig(max_rows, max_seqs, c.context_length), threads)  # type: ignore[arg-type]
