"""What is measured: each engine offers the same verbs, so that one schedule serves all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from stretto.models.loading.config import TextConfig

CONTEXT_MARGIN = 128  # positions behind the longest measured context: timed steps write there


@dataclass(frozen=True)
class Spec:
    """Enough to build an engine in another process."""

    label: str  # how results name it: "stretto", "llama.cpp Q4_0 fa=1"
    kind: str  # "stretto", "llama-cpp", "transformers"
    path: str
    threads: int
    max_context: int
    flash_attn: bool = False  # llama-cpp only
    dtype: str | None = None  # stretto only, as kv_dtype
    kv_dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Engine(Protocol):
    """An engine under test. Prompts are pseudo-random ids: nothing is found in a prefix cache, and dense arithmetic does not care."""

    def prefill(self, tokens: int) -> float:
        """Seconds to read `tokens` tokens into an empty cache, up to the logits of the last one."""

    def decode(self, context: int, steps: int, sequences: int = 1, rows: int = 1) -> float:
        """Seconds of one step, a mean over `steps`: `rows` new rows of each of `sequences` sequences behind `context` cached positions, with logits for
        every row (rows > 1: what checking a guess costs)."""

    def info(self) -> dict[str, Any]:
        """Facts for the result file, such as bytes of weights."""

    def close(self) -> None:
        """Free everything."""


class StrettoEngine:
    """Ours. A decode step includes sampling and bookkeeping of the engine, which peers' steps do not."""

    def __init__(self, path: str, threads: int, max_context: int, dtype: str | None, kv_dtype: str | None) -> None:
        import stretto

        context = max_context + CONTEXT_MARGIN
        self.llm = stretto.load(path, threads=threads, dtype=dtype, kv_dtype=kv_dtype, context=context)

    def prefill(self, tokens: int) -> float:
        return self.llm.bench_prefill(tokens)

    def decode(self, context: int, steps: int, sequences: int = 1, rows: int = 1) -> float:
        return self.llm.bench_decode(context, steps, sequences, rows)

    def info(self) -> dict[str, Any]:
        llm, config = self.llm, self.llm.config
        if not isinstance(config, TextConfig):
            raise NotImplementedError(f"bench: {config.name}: a wrapped model's operations are not counted; give a model of a native family")
        return {
            "weight_bytes": llm.weight_bytes,
            "kv_bytes_per_token": llm.kv_bytes_per_token,
            "threads": llm.threads,
            "ops_per_token": matmul_ops(config),
            "attention_ops_per_position": 4 * config.num_layers * config.num_heads * config.head_dim,
        }

    def close(self) -> None:
        del self.llm


def matmul_ops(config: TextConfig) -> int:
    """Multiplications and additions of one token's matrix products, head included."""
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return 2 * (c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + c.hidden_size * c.vocab_size)


def build(spec: Spec) -> Engine:
    """The engine of a spec. Raises ImportError where the peer is not installed."""
    if spec.kind == "stretto":
        return StrettoEngine(spec.path, spec.threads, spec.max_context, spec.dtype, spec.kv_dtype)
    if spec.kind == "llama-cpp":
        from stretto.cli.bench.engine_llama import LlamaEngine

        return LlamaEngine(spec.path, spec.threads, spec.flash_attn, spec.max_context)
    if spec.kind == "transformers":
        from stretto.cli.bench.engine_transformers import TransformersEngine

        return TransformersEngine(spec.path, spec.threads)
    raise ValueError(f"bench: kind: {spec.kind!r}, expected stretto, llama-cpp or transformers")
