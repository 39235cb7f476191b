"""A request on its way through the engine: its tokens, its cache, its text, and when it ends."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from stretto.cache import Sequence as CacheSequence
from stretto.decoding.speculator import Speculator
from stretto.engine.params import SamplingParams
from stretto.engine.results import Delta, Result, Stats, TokenLogprob, Usage
from stretto.models.loading.tokenizer import TextStream, Tokenizer


class ShownText:
    """Token ids to text, as far as it can be shown: no half characters, nothing that may still become a stop text."""

    def __init__(self, stream: TextStream, stops: tuple[str, ...]) -> None:
        self._stream = stream
        self._stops = stops
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that became certain with this token."""
        return self._take(self._stream.push(token), final=False)

    def flush(self) -> str:
        """The rest, at the end of the generation."""
        return self._take(self._stream.flush(), final=True)

    def _take(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += piece
        cut = min((at for at in (self._held.find(s) for s in self._stops) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            out, self._held = self._held[:cut], ""
        elif final or not self._stops:
            out, self._held = self._held, ""
        else:
            keep = max(_overlap(self._held, s) for s in self._stops)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Request:
    """State of one generation. `tokens` is prompt and output; all but the uncached end of it stands in `sequence`."""

    id: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    lineage: int
    speculator: Speculator
    stream: ShownText
    eos_ids: frozenset[int]
    row_exact: bool = True
    sequence: CacheSequence | None = None
    waiting_for: Request | None = None
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: Exception | None = None
    deltas: deque[Delta] = field(default_factory=deque)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    forwards: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    preemptions: int = 0
    _unsent: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def uncached(self) -> int:
        """Tokens whose keys and values are not in the cache yet; 1 while decoding."""
        return len(self.tokens) - (self.sequence.length if self.sequence is not None else 0)

    @property
    def tokens_left(self) -> int:
        """New tokens the length limit still allows."""
        return self.params.max_tokens - (len(self.tokens) - self.prompt_length)

    def extend(self, tokens: list[int], logprobs: list[TokenLogprob]) -> None:
        """Take tokens that the model has produced, up to the first that ends the generation."""
        text, taken = "", 0
        for token in tokens:
            taken += 1
            self.tokens.append(token)
            self._unsent.append(token)
            if token in self.eos_ids and not self.params.ignore_eos:
                self.finish_reason = "stop"
                break
            text += self.stream.push(token)
            if self.stream.stopped:
                self.finish_reason = "stop"
                break
            if self.tokens_left == 0:
                self.finish_reason = "length"
                break
        self.logprobs += logprobs[:taken]
        if self.finish_reason is not None:
            text += self.stream.flush()
        if self.finish_reason is None and (text or not self.params.stop):
            self.deltas.append(Delta(text, self._unsent))
            self._unsent = []
        elif self.finish_reason is not None:
            self._last_text = text

    _last_text: str = ""

    def close(self) -> None:
        """Publish the last delta with the result; called once, when the request has left the engine."""
        if self.error is None:
            self.deltas.append(Delta(self._last_text, self._unsent, self.finish_reason, self.result()))

    def result(self) -> Result:
        spec = self.speculator
        new = len(self.tokens) - self.prompt_length
        return Result(
            text=self.stream.text,
            tokens=self.new_tokens,
            finish_reason=self.finish_reason or "cancelled",
            usage=Usage(self.prompt_length, new, self.cached_tokens),
            logprobs=self.logprobs if self.params.logprobs else None,
            stats=Stats(
                decode=self.params.decode,
                reason=spec.reason(),
                lossless=self.row_exact,
                forwards=self.forwards,
                tokens_per_forward=new / self.forwards if self.forwards else 0.0,
                acceptance_by_depth={d: spec.accepted_by_depth[d] / n for d, n in sorted(spec.drafted_by_depth.items())},
                proposer_hit_rate=spec.hit_rate,
                width_histogram=dict(sorted(spec.width_histogram.items())),
                prefill_ms=1000 * self.prefill_seconds,
                decode_ms=1000 * self.decode_seconds,
                draft_ms=1000 * spec.draft_seconds,
                preemptions=self.preemptions,
            ),
        )


def text_stream(tokenizer: Tokenizer, stops: tuple[str, ...]) -> ShownText:
    """A fresh text stream of this tokenizer."""
    return ShownText(tokenizer.stream(), stops)
