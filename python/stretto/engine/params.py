"""What a caller may ask of one generation, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

DECODE_METHODS = ("auto", "off", "ngram", "trie")
MAX_SIBLINGS = 64
MAX_STOPS = 16


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one generation.

    max_tokens: new tokens at most. temperature: 0 is greedy and ignores the three filters. top_p, top_k (0: off), min_p: filters, in that
    library's order: temperature, top_k, top_p, min_p. repetition_penalty: 1 is off. logit_bias: token id -> added to its logit. seed: of
    the counter-based noise; the same seed gives the same tokens for any batch, width or proposer. stop: texts that end the generation
    and are cut off. ignore_eos: go on to max_tokens. n: independent continuations. logprobs: alternatives reported for each token.
    decode: how to speculate; every choice gives the same tokens.
    Raises: ValueError("generate: name: got, expected").
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int = 0
    decode: str = "auto"

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"generate: {name}: {getattr(self, name)!r}, expected {expected}")

        for name in ("max_tokens", "top_k", "seed", "n", "logprobs"):
            need(isinstance(getattr(self, name), int) and not isinstance(getattr(self, name), bool), name, "an integer")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            need(isinstance(value, int | float) and math.isfinite(value), name, "a finite number")
        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(self.temperature >= 0, "temperature", "at least 0")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(self.top_k >= 0, "top_k", "at least 0 (0: off)")
        need(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        need(self.repetition_penalty > 0, "repetition_penalty", "above 0 (1: off)")
        need(-(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        need(1 <= self.n <= MAX_SIBLINGS, "n", f"between 1 and {MAX_SIBLINGS}")
        need(0 <= self.logprobs <= 20, "logprobs", "between 0 and 20")
        need(len(self.stop) <= MAX_STOPS and all(isinstance(s, str) and s for s in self.stop), "stop", f"at most {MAX_STOPS} texts, none empty")
        need(all(isinstance(t, int) and t >= 0 and math.isfinite(b) for t, b in self.logit_bias.items()), "logit_bias", "token ids to finite numbers")
        need(self.decode in DECODE_METHODS or self.decode.startswith("draft:"), "decode", f"one of {', '.join(DECODE_METHODS)} or draft:MODEL")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def processed(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0 or bool(self.logit_bias)
