"""Perplexity of a GGUF file under stretto and under llama.cpp, same tokens, same windows.

llama.cpp reads the file itself and its own Q4_0 form of it, the format its fastest kernels want.
python -m bench.e2e.perplexity MODEL [--tokens 20000] [--window 512] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from stretto.cli.bench import machine
from stretto.cli.bench.engine_llama import quantize_q4_0
from stretto.cli.bench.engines import Spec
from stretto.cli.bench.remote import Worker
from stretto.models.loading.find import resolve

from bench.e2e.texts import documentation


def ours(path: str, ids: list[int], window: int, dtype: str | None, kv_dtype: str | None) -> float:
    """exp of the mean negative log-likelihood; each window starts from an empty cache."""
    import stretto

    llm = stretto.load(path, dtype=dtype, kv_dtype=kv_dtype)
    total, count = 0.0, 0
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        targets = torch.tensor(ids[start + 1 : start + 1 + len(part)])
        logits = llm.logits(part)[: len(targets)].double()
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=resolve, help="path or known name")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", help="convert our weights, as stretto.load does")
    parser.add_argument("--kv-dtype")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        files = {"llama.cpp": options.model, "llama.cpp Q4_0": quantize_q4_0(options.model, Path(scratch) / "q4_0.gguf")}
        peers = {}
        for name, file in files.items():
            with Worker(Spec(name, "llama-cpp", str(file), options.threads, options.window, flash_attn=False)) as worker:
                ids = worker.ask("tokenize", text=documentation()[: 8 * options.tokens])[: options.tokens]
                peers[name], count = worker.ask("perplexity", ids=ids, window=options.window)
    result = {
        "kind": "perplexity", "model": options.model.name, "tokens": len(ids), "predictions": count, "window": options.window,
        "dtype": options.dtype, "kv_dtype": options.kv_dtype, "peers": peers,
        "stretto": ours(str(options.model), ids, options.window, options.dtype, options.kv_dtype),
    }  # fmt: skip
    result |= {"machine": machine.describe(), "command": " ".join(["python -m bench.e2e.perplexity", *sys.argv[1:]])}
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
