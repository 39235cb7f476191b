"""transformers (float32, SDPA, dynamic cache) behind the verbs of `engines.Engine`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch


class TransformersEngine:
    """The dequantised model in float32: the fastest dtype of torch on a CPU without bf16 instructions."""

    def __init__(self, path: str, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        file = Path(path)
        folder, gguf = (str(file.parent), file.name) if file.is_file() else (path, None)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        self.model = model.eval()
        self.vocab_size = int(self.model.config.vocab_size)
        self.generator = torch.Generator().manual_seed(0)
        self.cache: Any = None
        self.cached = (0, 0)  # sequences and positions the cache holds

    def _ids(self, sequences: int, tokens: int) -> torch.Tensor:
        return torch.randint(10, self.vocab_size - 10, (sequences, tokens), generator=self.generator)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, cache: Any, keep: int) -> Any:
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).past_key_values

    def prefill(self, tokens: int) -> float:
        ids = self._ids(1, tokens)
        start = time.perf_counter()
        self._forward(ids, None, 1)
        return time.perf_counter() - start

    def decode(self, context: int, steps: int, sequences: int = 1, rows: int = 1) -> float:
        if self.cached != (sequences, context):
            self.cache = self._forward(self._ids(sequences, context), None, 1)
            self.cached = (sequences, context)
        total = 0.0
        for step in range(steps + 1):
            if rows > 1 or step == 0:
                self.cache.crop(context)
            ids = self._ids(sequences, rows)
            start = time.perf_counter()
            self.cache = self._forward(ids, self.cache, rows)
            total += time.perf_counter() - start if step else 0.0  # the first one warms up
        self.cache.crop(context)
        return total / steps

    def info(self) -> dict[str, Any]:
        return {"weight_bytes": sum(p.numel() * p.element_size() for p in self.model.parameters())}

    def close(self) -> None:
        self.cache = None
        del self.model
