"""llama.cpp behind the verbs of `engines.Engine`, through the low-level API of llama-cpp-python: no sampling, no Python per token but one call."""

from __future__ import annotations

import ctypes
import math
import random
import time
from pathlib import Path
from typing import Any

from stretto.cli.bench.engines import CONTEXT_MARGIN

# llama.cpp logs through one callback; ctypes must keep it alive as long as the library may call it.
_quiet: list[Any] = []


def _library() -> Any:
    import llama_cpp

    if not _quiet:
        callback = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _quiet.append(callback)
    return llama_cpp


def quantize_q4_0(source: Path, target: Path) -> Path:
    """Write `source` re-quantised to Q4_0 (llama.cpp's own rules for the embedding) at `target`, unless it is there already."""
    if target.exists():
        return target
    library = _library()
    params = library.llama_model_quantize_default_params()
    params.ftype = library.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")  # a cut run leaves no half file under the final name
    code = library.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params))
    if code != 0:
        raise RuntimeError(f"llama_model_quantize: {source}: returned {code}, expected 0")
    partial.rename(target)
    return target


class LlamaEngine:
    """One model file; a context is made for each number of sequences and kept, its cache filled once for each measured context.

    Args:
        path: GGUF file.
        threads: for single steps and for batches.
        flash_attn: llama.cpp's flash attention, on or off.
        max_context: longest context that will be measured.
    """

    def __init__(self, path: str, threads: int, flash_attn: bool, max_context: int) -> None:
        self.library = _library()
        self.threads, self.flash_attn, self.max_context = threads, flash_attn, max_context
        self.model = self.library.llama_model_load_from_file(path.encode(), self.library.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp: cannot load {path}")
        self.vocab = self.library.llama_model_get_vocab(self.model)
        self.vocab_size = self.library.llama_vocab_n_tokens(self.vocab)
        self.random = random.Random(0)
        self.sequences = self.capacity = 0
        self.filled = 0  # positions of each sequence that hold the measured context
        self.context: Any = None
        self.batch: Any = None

    def _open(self, sequences: int, positions: int) -> None:
        if self.sequences == sequences and self.capacity >= positions:
            return
        self.close_context()
        library, params = self.library, self.library.llama_context_default_params()
        self.capacity = positions
        params.n_ctx = sequences * (positions + -positions % 256)  # llama.cpp gives each sequence an equal, padded share
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.flash_attn else library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        self.context = library.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp: no context of {params.n_ctx} positions")
        self.batch = library.llama_batch_init(512, 0, 1)
        self.sequences, self.filled = sequences, 0

    def close_context(self) -> None:
        if self.context:
            self.library.llama_batch_free(self.batch)
            self.library.llama_free(self.context)
        self.context, self.sequences, self.capacity = None, 0, 0

    def close(self) -> None:
        self.close_context()
        self.library.llama_model_free(self.model)

    def _decode(self, rows: list[tuple[int, int, bool]], tokens: list[int]) -> None:
        """One call: rows of (sequence, position, wants logits)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (sequence, position, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = tokens[i], position, 1, wanted
            batch.seq_id[i][0] = sequence
        code = self.library.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode: {len(rows)} rows at position {rows[0][1]}: returned {code}, expected 0")
        self.library.llama_synchronize(self.context)

    def _ids(self, n: int) -> list[int]:
        return [self.random.randrange(10, self.vocab_size - 10) for _ in range(n)]

    def _truncate(self, length: int) -> None:
        memory = self.library.llama_get_memory(self.context)
        for sequence in range(self.sequences):
            self.library.llama_memory_seq_rm(memory, sequence, length, -1)
        self.filled = min(self.filled, length)

    def _fill(self, context: int) -> None:
        self._truncate(context)
        for sequence in range(self.sequences):
            for start in range(self.filled, context, 512):
                rows = [(sequence, p, False) for p in range(start, min(start + 512, context))]
                rows[-1] = (sequence, rows[-1][1], True)
                self._decode(rows, self._ids(len(rows)))
        self.filled = context

    def prefill(self, tokens: int) -> float:
        """Seconds to read `tokens` tokens into an empty cache, logits for the last one only."""
        self._open(1, max(tokens, self.max_context) + CONTEXT_MARGIN)
        self._truncate(0)
        ids = self._ids(tokens)
        rows = [(0, p, p == tokens - 1) for p in range(tokens)]
        start = time.perf_counter()
        for at in range(0, tokens, 512):
            self._decode(rows[at : at + 512], ids[at : at + 512])
        seconds = time.perf_counter() - start
        self._truncate(0)
        return seconds

    def decode(self, context: int, steps: int, sequences: int = 1, rows: int = 1) -> float:
        """Seconds of one step, a mean over `steps`; the cache is filled once and taken back to `context` afterwards."""
        longest = self.max_context if sequences == 1 else context
        self._open(sequences, longest + CONTEXT_MARGIN)
        self._fill(context)
        total, at = 0.0, context
        for step in range(steps + 1):
            if rows > 1 or at + rows > context + CONTEXT_MARGIN:
                self._truncate(context)  # a guess is always checked behind the same context
                at = context
            batch = [(s, at + r, True) for s in range(sequences) for r in range(rows)]
            ids = self._ids(len(batch))
            start = time.perf_counter()
            self._decode(batch, ids)
            total += time.perf_counter() - start if step else 0.0  # the first one plans its graph
            at += rows
        self._truncate(context)
        return total / steps

    def info(self) -> dict[str, Any]:
        return {"weight_bytes": int(self.library.llama_model_size(self.model)), "system": self.library.llama_print_system_info().decode().strip()}

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text: no special tokens added or parsed."""
        data = text.encode()
        out = (self.library.llama_token * (len(data) + 8))()
        n = self.library.llama_tokenize(self.vocab, data, len(data), out, len(out), False, False)
        if n < 0:
            raise RuntimeError(f"llama_tokenize: {len(data)} bytes: needs {-n} slots")
        return list(out[:n])

    def perplexity(self, ids: list[int], window: int) -> tuple[float, int]:
        """exp(mean negative log-likelihood) and the number of predictions, over windows of `window` tokens read from an empty cache."""
        import numpy as np

        self._open(1, max(window, self.max_context) + CONTEXT_MARGIN)
        total, count = 0.0, 0
        for start in range(0, len(ids) - 1, window):
            part = ids[start : start + window]
            self._truncate(0)
            for at in range(0, len(part), 512):
                chunk = part[at : at + 512]
                self._decode([(0, at + i, True) for i in range(len(chunk))], chunk)
                flat = self.library.llama_get_logits(self.context)
                logits = np.ctypeslib.as_array(flat, shape=(len(chunk), self.vocab_size))
                targets = part[at + 1 : at + 1 + len(chunk)]
                used = logits[: len(targets)].astype(np.float64)
                top = used.max(-1)
                log_sum = np.log(np.exp(used - top[:, None]).sum(-1)) + top
                total += float((log_sum - used[np.arange(len(targets)), targets]).sum())
                count += len(targets)
        return math.exp(total / count), count
