"""The one loop: admit, prefill in chunks, draft, verify, commit, finish, for any mix of requests, one captured model step at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stretto.cache import PagedCache
from stretto.cache import Sequence as CacheSequence
from stretto.decoding.cost import WIDTHS, CostCurve, CostMeter
from stretto.decoding.proposer import Proposer
from stretto.decoding.speculator import MAX_NODES, Speculator
from stretto.decoding.step import Rows, StepRunner
from stretto.decoding.types import DraftTree
from stretto.engine.params import SamplingParams
from stretto.engine.request import Request, text_stream
from stretto.engine.sampler import SampleRows, choose_tokens
from stretto.errors import ContextTooLong, NonFiniteLogits, OutOfPages
from stretto.models.loading.tokenizer import Tokenizer
from stretto.models.text import TextModel

MAX_PREEMPTIONS = 4
"""A request preempted this often is not chosen again, so that two requests cannot evict each other for ever."""


@dataclass(frozen=True)
class EngineConfig:
    """max_rows: rows of one step (prompt chunks and draft nodes together). max_seqs: requests in one step. context: positions of one request."""

    max_rows: int = 512
    max_seqs: int = 32
    context: int = 8192


@dataclass
class Work:
    """One request's share of a step; `rows.tree` or a single row means decoding, more rows a piece of the prompt."""

    request: Request
    rows: Rows
    tree: DraftTree | None  # what is verified, its root alone included; None while the prompt is read


class Engine:
    """Runs requests to their end. Not thread-safe: one caller at a time steps it (llm.py holds the lock)."""

    def __init__(self, model: TextModel, cache: PagedCache, tokenizer: Tokenizer, config: EngineConfig, threads: int, eos_ids: Sequence[int]) -> None:
        self.model, self.cache, self.tokenizer, self.config = model, cache, tokenizer, config
        self.eos_ids = frozenset(eos_ids)
        self.runner = StepRunner(model, cache, max_rows=config.max_rows, max_seqs=config.max_seqs, context=config.context, threads=threads)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.cost = CostMeter()
        self._next_id = 0

    # -- requests ---------------------------------------------------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int], params: SamplingParams, proposers: Callable[[], Sequence[Proposer]]) -> list[Request]:
        """Queue a generation; returns its `params.n` siblings, which share the prompt's pages.

        Raises: ValueError for an empty prompt or ids outside the vocabulary; ContextTooLong where prompt and one new token do not fit.
        """
        vocab = self.model.config.vocab_size
        if not prompt:
            raise ValueError("generate: prompt: empty, expected at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(t for t in prompt if not 0 <= t < vocab)
            raise ValueError(f"generate: prompt: token id {bad}, expected 0 to {vocab - 1}")
        if any(t >= vocab for t in params.logit_bias):
            raise ValueError(f"generate: logit_bias: token id {max(params.logit_bias)}, expected 0 to {vocab - 1}")
        room = min(self.config.context, self.cache.ledger().total * self.cache.shape.page_size)
        if len(prompt) + 1 > room:
            raise ContextTooLong(f"generate: prompt: {len(prompt)} tokens, expected at most {room - 1} (context and cache hold {room})")
        if len(prompt) + params.max_tokens > room:
            params = replace(params, max_tokens=room - len(prompt))
        siblings: list[Request] = []
        for lineage in range(params.n):
            self._next_id += 1
            speculator = Speculator(self._next_id, proposers(), prompt, vocab)
            stream = text_stream(self.tokenizer, params.stop)
            request = Request(self._next_id, list(prompt), len(prompt), params, lineage, speculator, stream, self.eos_ids, self.model.row_exact)
            request.waiting_for = siblings[0] if siblings else None
            siblings.append(request)
        self.waiting.extend(siblings)
        return siblings

    def cancel(self, request: Request) -> None:
        """End a request now and free its pages. Does nothing to one that has ended."""
        if request.finished:
            return
        request.finish_reason = "cancelled"
        self._leave(request)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # -- the loop ---------------------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One model step for as many requests as fit."""
        start = time.perf_counter()
        works = self._plan()
        if not works:
            return
        ran = time.perf_counter()
        self.runner.run([w.rows for w in works])
        if all(w.tree is not None for w in works):
            self.cost.observe(sum(len(w.rows.tokens) for w in works), time.perf_counter() - ran)
        self._accept(works, start)

    def _plan(self) -> list[Work]:
        budget = self.config.max_rows
        works: list[Work] = []
        decoding = [r for r in self.running if r.uncached == 1]
        for request in decoding:
            if request.sequence is None:
                continue  # preempted below, by an earlier request of this loop
            others = len(decoding) - 1
            room = min(request.tokens_left, self.config.context - len(request.tokens) + 1, budget - others, MAX_NODES)
            tree = DraftTree.root(request.tokens[-1])
            if request.speculator.arms:
                tree = request.speculator.propose(request.tokens, self._step_cost(request.sequence, others), others, room)
            if not self._reserve(request, len(tree.tokens)):
                tree = tree.first(1)
                if not self._reserve_or_preempt(request, works):
                    continue
            works.append(Work(request, Rows.of_tree(request.sequence, tree), tree))
            budget -= len(tree.tokens)
        for request in [r for r in self.running if r.uncached > 1]:
            if budget > 0 and len(works) < self.config.max_seqs:
                budget -= self._plan_prefill(request, works, budget)
        while self.waiting and budget > 0 and len(self.running) < self.config.max_seqs:
            request = self.waiting[0]
            if not self._admit(request):
                break
            self.waiting.popleft()
            self.running.append(request)
            budget -= self._plan_prefill(request, works, budget)
        if not works and self.running:
            self._preempt(max(self.running, key=lambda r: r.id))  # nobody can move: give back the youngest's pages
        return works

    def _admit(self, request: Request) -> bool:
        """Give a waiting request its sequence: the pages of a sibling's prompt, or the longest published prefix."""
        first = request.waiting_for
        if first is not None and not first.finished and len(first.new_tokens) == 0:
            return False
        request.waiting_for = None
        request.sequence = self.cache.alloc(request.tokens)
        request.cached_tokens = max(request.cached_tokens, min(request.sequence.length, request.prompt_length))
        if self.running and not self._reserve(request, min(request.uncached, self.config.max_rows)):
            self.cache.free(request.sequence)
            request.sequence = None
            return False
        return True

    def _plan_prefill(self, request: Request, works: list[Work], budget: int) -> int:
        rows = min(request.uncached, budget)
        if not self._reserve_or_preempt(request, works, rows):
            return 0
        sequence = request.sequence
        assert sequence is not None
        tokens = request.tokens[sequence.length : sequence.length + rows]
        works.append(Work(request, Rows(sequence, tokens, logit_count=int(rows == request.uncached)), None))
        return rows

    def _reserve(self, request: Request, rows: int) -> bool:
        assert request.sequence is not None
        try:
            self.cache.reserve(request.sequence, rows)
        except OutOfPages:
            return False
        return True

    def _reserve_or_preempt(self, request: Request, works: Sequence[Work], rows: int = 1) -> bool:
        """Reserve, taking pages from the youngest requests that are not yet part of this step; False: this one must wait."""
        planned = {w.request.id for w in works}
        while not self._reserve(request, rows):
            victims = [r for r in self.running if r.id > request.id and r.id not in planned and r.preemptions < MAX_PREEMPTIONS]
            if not victims:
                return False
            self._preempt(max(victims, key=lambda r: r.id))
        return True

    def _preempt(self, request: Request) -> None:
        """Take a request's pages; it waits at the head of the queue and reads its tokens again later."""
        assert request.sequence is not None
        self.cache.publish(request.sequence, request.tokens[: request.sequence.length])
        self.cache.free(request.sequence)
        request.sequence = None
        request.preemptions += 1
        self.running.remove(request)
        self.waiting.appendleft(request)

    def _accept(self, works: Sequence[Work], start: float) -> None:
        """Choose the next tokens, commit what the drafts got right, and end what is over. `start`: when planning the step began."""
        rows = [
            SampleRows(w.request.params, w.request.lineage, w.rows.first_logit, w.tree, w.request.tokens)
            for w in works if w.rows.logit_count
        ]  # fmt: skip
        verdicts = iter(choose_tokens(self.runner.logits, self.runner.argmax, rows))
        seconds = (time.perf_counter() - start) / len(works)
        for work in works:
            request = work.request
            assert request.sequence is not None
            count = len(work.rows.tokens)
            request.forwards += work.rows.logit_count > 0
            if work.tree is None:
                request.prefill_seconds += seconds
            else:
                request.decode_seconds += seconds
            if not work.rows.logit_count:
                self.cache.commit(request.sequence, count)
                continue
            verdict = next(verdicts)
            if verdict is None:
                request.error = NonFiniteLogits(f"generate: the model produced NaN or infinite logits after {len(request.tokens)} tokens")
                self._leave(request)
                continue
            self.cache.commit(request.sequence, count if work.tree is None else verdict.path)
            before = len(request.tokens)
            request.extend(verdict.tokens, verdict.logprobs)
            request.speculator.observe(verdict.accepted, request.tokens[before:])
            if work.tree is None:
                self.cache.publish(request.sequence, request.tokens[: request.sequence.length])
            if request.finished:
                self._leave(request)

    def _leave(self, request: Request) -> None:
        """Free what a finished request holds. Pages of a failed one are not published: nobody shall continue from them."""
        request.speculator.finish()
        if request.sequence is not None:
            if request.error is None:
                # The end may have come inside an accepted run: what was committed behind it is not part of the text.
                self.cache.truncate(request.sequence, min(request.sequence.length, len(request.tokens)))
                self.cache.publish(request.sequence, request.tokens[: request.sequence.length])
            self.cache.free(request.sequence)
            request.sequence = None
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.close()

    # -- cost of a step ---------------------------------------------------------------------------------------------------------------

    def _step_cost(self, sequence: CacheSequence, others: int) -> CostCurve:
        """The cost curve. While it is the only one to decode, `sequence` lends its context to the measuring steps."""
        if self.cost.due and (self.cost.curve is None or others == 0):
            limit = min(self.config.max_rows, self.config.context - sequence.length, WIDTHS[-1])
            with suppress(OutOfPages):  # the cache is full of running requests: measured when there is room
                self.cache.reserve(sequence, limit)  # all of it first, so that no measurement ends half-way
                self.cost.refresh(lambda rows: self.chain_seconds([sequence], rows), limit)
        return self.cost.curve or CostCurve((1,), (1.0,))

    def chain_seconds(self, sequences: Sequence[CacheSequence], rows: int) -> float:
        """Seconds of one step in which each sequence verifies a chain of `rows` nodes; nothing is committed."""
        for sequence in sequences:
            self.cache.reserve(sequence, rows)
        works = [Rows.of_tree(sequence, DraftTree.chain([0] * rows)) for sequence in sequences]
        start = time.perf_counter()
        self.runner.run(works)
        return time.perf_counter() - start

    # -- looking inside ---------------------------------------------------------------------------------------------------------------

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [n, vocab] float32 of every position of `ids`, in a sequence of its own."""
        vocab = self.model.config.vocab_size
        if not ids or min(ids) < 0 or max(ids) >= vocab:
            raise ValueError(
                f"logits: ids: {len(ids)} of {min(ids, default=0)} to {max(ids, default=0)}, expected at least one, each 0 to {vocab - 1}"
            )
        if len(ids) > self.config.context:
            raise ContextTooLong(f"logits: ids: {len(ids)}, expected at most the context of {self.config.context}")
        out = torch.empty(len(ids), vocab)
        sequence = self.cache.alloc()
        try:
            while (start := sequence.length) < len(ids):
                chunk = ids[start : start + self.config.max_rows]
                self.cache.reserve(sequence, len(chunk))
                self.runner.run([Rows(sequence, chunk, logit_count=len(chunk))])
                out[start : start + len(chunk)] = self.runner.logits[: len(chunk)]
                self.cache.commit(sequence, len(chunk))
        finally:
            self.cache.free(sequence)
        return out

    def profile(self, context: int, rows: int) -> list[tuple[str, float]]:
        """(op, microseconds) of each kernel call of a step of `rows` rows behind `context` positions, whatever they hold."""
        sequence = self.cache.alloc()
        try:
            while sequence.length < context:
                chunk = min(context - sequence.length, self.config.max_rows)
                self.cache.reserve(sequence, chunk)
                self.runner.run([Rows(sequence, [0] * chunk, logit_count=0)])
                self.cache.commit(sequence, chunk)
            self.cache.reserve(sequence, rows)
            work = Rows(sequence, [0] * rows, logit_count=1)
            self.runner.run([work])
            return self.runner.run_timed([work])
        finally:
            self.cache.free(sequence)
