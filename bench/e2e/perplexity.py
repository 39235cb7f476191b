"""Perplexity of a GGUF file under stretto and under llama.cpp, same tokens, same windows.

python -m bench.e2e.perplexity MODEL [--peer-file OTHER.gguf] [--tokens 20000] [--window 512] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from stretto.cli.bench import machine
from stretto.cli.bench.engines import Spec
from stretto.cli.bench.remote import Worker

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
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer-file", type=Path, help="what llama.cpp reads instead of MODEL; 'q4_0' re-quantises MODEL")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", help="convert our weights, as stretto.load does")
    parser.add_argument("--kv-dtype")
    parser.add_argument("--only-peer", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    peer_file = options.peer_file or options.model
    spec = Spec("llama.cpp", "llama-cpp", str(peer_file), options.threads, options.window, flash_attn=False)
    with Worker(spec) as worker:
        ids = worker.ask("tokenize", text=documentation()[: 8 * options.tokens])[: options.tokens]
        peer, count = worker.ask("perplexity", ids=ids, window=options.window)
    result = {
        "kind": "perplexity", "model": options.model.name, "peer_file": peer_file.name, "tokens": len(ids), "predictions": count,
        "window": options.window, "dtype": options.dtype, "kv_dtype": options.kv_dtype, "llama.cpp": peer,
    }  # fmt: skip
    if not options.only_peer:
        mine = ours(str(options.model), ids, options.window, options.dtype, options.kv_dtype)
        result |= {"stretto": mine, "relative_difference": mine / peer - 1}
    result |= {"machine": machine.describe(), "command": " ".join(["python -m bench.e2e.perplexity", *sys.argv[1:]])}
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
