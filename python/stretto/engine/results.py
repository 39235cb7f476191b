"""What a generation returns, its cost named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values were found in the cache."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of an emitted token under the model (temperature 1, nothing filtered), and the likeliest alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Stats:
    """How a generation ran. Milliseconds of shared steps are shared evenly among their rows' requests."""

    decode: str
    reason: str
    lossless: bool
    """Whether the tokens are those of plain decoding to the last one; False for models whose rows depend on the batch (wrapped transformers
    models), where speculation is exact in law only."""
    forwards: int
    tokens_per_forward: float
    acceptance_by_depth: Mapping[int, float]
    proposer_hit_rate: float
    width_histogram: Mapping[int, int]
    prefill_ms: float
    decode_ms: float
    draft_ms: float
    preemptions: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second after the prompt was read."""
        return 1000 * self.forwards * self.tokens_per_forward / self.decode_ms if self.decode_ms else 0.0


@dataclass(frozen=True)
class Result:
    text: str
    tokens: list[int]
    finish_reason: str  # "stop" (end of sequence or a stop text), "length", "cancelled"
    usage: Usage
    stats: Stats
    logprobs: list[TokenLogprob] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = asdict(self)
        data["stats"]["tokens_per_second"] = self.stats.tokens_per_second
        return data


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed generation; `result` stands on the last one."""

    text: str
    tokens: list[int]
    finish_reason: str | None = None
    result: Result | None = None
