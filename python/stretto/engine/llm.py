"""What `stretto.load` returns: a model with its tokenizer, cache and engine, and the calls a user types."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stretto import ops
from stretto.cache import CacheShape, NgramTrie, PagedCache
from stretto.decoding.draft_model import DraftModelProposer
from stretto.decoding.ngram import NgramProposer
from stretto.decoding.proposer import Proposer
from stretto.decoding.trie import TrieProposer
from stretto.engine.engine import Engine, EngineConfig
from stretto.engine.params import SamplingParams
from stretto.engine.request import Request
from stretto.engine.results import Result
from stretto.engine.stream import Stream
from stretto.models.loading import find
from stretto.models.loading.open import open_model
from stretto.models.loading.tokenizer import Tokenizer
from stretto.models.text import ModelConfig, TextModel
from stretto.models.text.llama import LlamaModel

KV_DTYPES = {None: torch.float16, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
TRIE_BYTES = 64 << 20


class LLM:
    """A loaded model. Calls from several threads are safe and share steps."""

    def __init__(self, model: TextModel, tokenizer: Tokenizer, cache: PagedCache, engine_config: EngineConfig, threads: int) -> None:
        self.model, self.tokenizer, self.threads = model, tokenizer, threads
        self.config: ModelConfig = model.config
        self.cache = cache
        eos = tuple(dict.fromkeys((*model.config.eos_ids, *tokenizer.eos_ids)))
        self.engine = Engine(model, cache, tokenizer, engine_config, threads, eos)
        self.trie = NgramTrie(vocab_size=model.config.vocab_size, max_bytes=TRIE_BYTES, fingerprint=tokenizer.fingerprint)
        self._drafts: dict[str, Proposer] = {}
        self._lock = threading.Lock()
        self._dropped: deque[Request] = deque()

    # -- generation -------------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Any,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        n: int = 1,
        logprobs: int = 0,
        decode: str = "auto",
        stream: bool = False,
    ) -> Any:
        """Continue a prompt, or several at once.

        Args:
            prompt: a text (used as it is), chat messages ([{"role", "content"}, ...], through the model's template), token ids, or a list of these.
            decode: "auto", "off", "ngram", "trie" or "draft:MODEL": how to speculate. The tokens are the same for each; only the speed differs.
            stream: return a Stream, an iterator of Delta, instead; one prompt and n = 1 only.
            others: see SamplingParams.
        Returns: a Result; for n > 1 a list of n; for a list of prompts a list in the same order.
        Raises: ValueError naming the argument; ContextTooLong; NonFiniteLogits (in a list of prompts, after the others have ended).
        """
        params = SamplingParams(
            max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, dict(logit_bias or {}), seed,
            (stop,) if isinstance(stop, str) else tuple(stop), ignore_eos, n, logprobs, decode,
        )  # fmt: skip
        several = isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple)
        ids = [self.encode(p) for p in prompt] if several else [self.encode(prompt)]
        if stream:
            if several or n > 1:
                raise ValueError("generate: stream: True with several continuations, expected one prompt and n = 1")
            return self._stream(ids[0], params)
        results = self._run(ids, params)
        grouped = [r if n > 1 else r[0] for r in results]
        return grouped if several else grouped[0]

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a text, of chat messages, or the ids themselves."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, list | tuple) and prompt and all(isinstance(m, Mapping) for m in prompt):
            return self.tokenizer.encode(self.tokenizer.apply_chat_template(list(prompt)), add_special=False)
        if isinstance(prompt, list | tuple) and all(isinstance(t, int) for t in prompt):
            return list(prompt)
        if isinstance(prompt, Tensor) and prompt.dim() == 1 and not prompt.is_floating_point():
            return [int(t) for t in prompt.tolist()]
        raise ValueError(f"generate: prompt: {type(prompt).__name__}, expected a text, chat messages, token ids, or a list of these")

    def _proposers(self, method: str) -> Callable[[], list[Proposer]]:
        if method.startswith("draft:"):
            draft = self._draft(method.removeprefix("draft:"))
            return lambda: [draft]
        made: dict[str, Callable[[], list[Proposer]]] = {
            "off": list,
            "ngram": lambda: [NgramProposer()],
            "trie": lambda: [TrieProposer(self.trie)],
            "auto": lambda: [TrieProposer(self.trie), NgramProposer()],
        }
        return made[method]

    def _draft(self, name: str) -> Proposer:
        """The proposer on another model, loaded at its first use."""
        if name not in self._drafts:
            self.add_draft(name, load(name, threads=self.threads, context=self.engine.config.context, max_seqs=1))
        return self._drafts[name]

    def add_draft(self, name: str, other: LLM) -> None:
        """Let a loaded model of the same vocabulary guess under decode="draft:name". It serves this model only from then on.

        Raises: ValueError for another vocabulary.
        """
        if other.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise ValueError(f"generate: decode: draft model {name} has another vocabulary, expected that of {self.config.name}")
        self._drafts[name] = DraftModelProposer(f"draft:{name}", other.engine.runner, other.cache)

    def _submit(self, ids: Sequence[int], params: SamplingParams) -> list[Request]:
        with self._lock:
            return self.engine.submit(ids, params, self._proposers(params.decode))

    def _step(self) -> None:
        """One step of the engine, the lock held; what was dropped meanwhile takes no part in it."""
        while self._dropped:
            self.engine.cancel(self._dropped.popleft())
        self.engine.step()

    def _advance(self, request: Request) -> None:
        """Step the engine unless the request has something to deliver already (another thread's step may have done it)."""
        with self._lock:
            if not request.finished and not request.deltas:
                self._step()

    def _cancel(self, *requests: Request) -> None:
        with self._lock:
            for r in requests:
                self.engine.cancel(r)

    def _drop(self, request: Request) -> None:
        """Cancel from a finalizer, which may run at any moment, in the middle of this thread's own step too: where the lock is taken, later."""
        self._dropped.append(request)
        if self._lock.acquire(blocking=False):
            try:
                while self._dropped:
                    self.engine.cancel(self._dropped.popleft())
            finally:
                self._lock.release()

    def _run(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[Result]]:
        groups: list[list[Request]] = []
        try:
            for ids in prompts:
                groups.append(self._submit(ids, params))
            for request in (r for group in groups for r in group):
                while not request.finished:
                    with self._lock:
                        if not request.finished:
                            self._step()
        finally:  # on an error or Ctrl-C nothing keeps running
            self._cancel(*(r for group in groups for r in group))
        for request in (r for group in groups for r in group):
            if request.error is not None:
                raise request.error
        return [[r.result() for r in group] for group in groups]

    def _stream(self, ids: Sequence[int], params: SamplingParams) -> Stream:
        (request,) = self._submit(ids, params)
        return Stream(request, self._advance, self._cancel, self._drop)

    # -- looking inside ---------------------------------------------------------------------------------------------------------------

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits of every position. ids: [n] token ids, n at least 1. Returns: [n, vocab] float32, row i predicts ids[i + 1]."""
        with self._lock:
            return self.engine.logits(self.encode(list(ids)))

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights that decoding one token reads."""
        return self.model.weight_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one position holds in all layers."""
        c, shape = self.config, self.cache.shape
        scales = 8 if shape.dtype == torch.int8 else 0
        return c.num_layers * c.num_kv_heads * (2 * c.head_dim * shape.dtype.itemsize + scales)

    # -- measuring --------------------------------------------------------------------------------------------------------------------

    def bench_prefill(self, tokens: int) -> float:
        """Seconds to read a prompt of `tokens` pseudo-random ids, nothing cached, to its first new token."""
        with self._lock:
            request = self._bench_request(tokens, 1)
            start = time.perf_counter()
            while not request.finished:
                self.engine.step()
            return time.perf_counter() - start

    def bench_decode(self, context: int, steps: int, sequences: int = 1, rows: int = 1) -> float:
        """Seconds of one decoding step of `sequences` requests whose context is `context`, each with `rows` rows (rows > 1: a draft that fails)."""
        with self._lock:
            requests = [self._bench_request(context, 1 << 30) for _ in range(sequences)]
            while any(r.uncached != 1 or r.sequence is None for r in requests):
                self.engine.step()
            try:
                if rows > 1:
                    live = [r.sequence for r in requests if r.sequence is not None]
                    return sum(self.engine.chain_seconds(live, rows) for _ in range(steps)) / steps
                start = time.perf_counter()
                for _ in range(steps):
                    self.engine.step()
                return (time.perf_counter() - start) / steps
            finally:
                for r in requests:
                    self.engine.cancel(r)

    def step_profile(self, context: int, rows: int = 1) -> list[tuple[str, float]]:
        """(op, microseconds) of each kernel call of one step: `rows` prompt rows behind `context` cached positions."""
        with self._lock:
            return self.engine.profile(context, rows)

    def _bench_request(self, tokens: int, max_tokens: int) -> Request:
        generator = torch.Generator().manual_seed(time.perf_counter_ns() % 2**31)  # new ids each time: no prefix is found in the cache
        ids = torch.randint(0, self.config.vocab_size, (tokens,), generator=generator).tolist()
        (request,) = self.engine.submit(ids, SamplingParams(max_tokens=max_tokens, ignore_eos=True, decode="off"), list)
        return request


def load(
    path_or_name: str | Path,
    *,
    threads: int | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    context: int | None = None,
    max_seqs: int = 32,
    device: str = "cpu",
) -> LLM:
    """Load a language model.

    Args:
        path_or_name: a GGUF file, a Hugging Face directory (config.json, safetensors, tokenizer.json), or a known name ("smollm2-135m", "gemma3-270m").
        threads: for this model; None: what the process uses. More than the machine grants is cut with a warning.
        dtype: None keeps the file's formats; "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1" converts the matrices (a lossy choice for the latter).
        kv_dtype: of the cache: "f16" (default), "f32", "bf16" or "int8".
        context: positions of one request; None: what the model was made for, at most 8,192.
        max_seqs: requests in one step.
        device: "cpu".
    Raises: UnknownModel, ModelFileError, FileNotFoundError; ValueError for arguments; NotImplementedError for devices without a model path.
    """
    if device != "cpu":
        raise NotImplementedError(f"load: device: {device!r}; models run on 'cpu' in this version")
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"load: kv_dtype: {kv_dtype!r}, expected one of {', '.join(str(k) for k in KV_DTYPES if k)}")
    if threads is not None and threads < 1:
        raise ValueError(f"load: threads: {threads}, expected at least 1")
    config, source, tokenizer = open_model(find.resolve(path_or_name), dtype)
    context = min(config.context_length, 8192) if context is None else context
    if not 2 <= context <= config.context_length:
        raise ValueError(f"load: context: {context}, expected 2 to {config.context_length}, which the model was made for")
    granted = ops.num_threads() if threads is None else ops.granted_threads(threads)
    model = LlamaModel(config, source, context)
    shape = CacheShape(config.num_layers, config.num_kv_heads, config.head_dim, dtype=KV_DTYPES[kv_dtype])
    pages = -(-max(context, 32768) // shape.page_size)
    return LLM(model, tokenizer, PagedCache(shape, pages), EngineConfig(context=context, max_seqs=max_seqs), granted)
