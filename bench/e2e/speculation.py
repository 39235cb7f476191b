"""Speculation against our own plain decoding: copy-heavy prompts and open ones, every method in turn, tokens compared.

python -m bench.e2e.speculation MODEL [--threads 2] [--prompts 34] [--max-tokens 64] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import stretto
from stretto.cache import NgramTrie
from stretto.cli.bench import machine
from stretto.engine.llm import TRIE_BYTES

from bench.e2e.texts import functions, passages

METHODS = ("off", "trie", "ngram", "auto")
SUBJECTS = (
    "rivers", "bread", "winter", "a lighthouse", "the moon", "trains", "a lost key", "honey bees", "mountains", "an old clock", "the sea", "chess",
    "a library", "gardens", "maps", "rain", "a violin", "volcanoes", "coffee", "a bridge", "stars", "cats", "a market", "islands", "letters",
    "forests", "a kite", "deserts", "salt", "a ship", "mirrors", "shadows", "paper", "glass",
)  # fmt: skip


def prompts(count: int) -> Iterator[tuple[str, str]]:
    """(kind, prompt): `count` edits of functions, `count` repetitions of passages and lists, `count` open questions."""
    for source in functions(8, 25)[:count]:
        yield "edit", f"Repeat this Python function exactly, but rename its first argument to `value`:\n\n```python\n{source}\n```"
    shuffled = random.Random(0)
    for i, passage in enumerate(passages(250, 600)[:count]):
        if i % 2:
            yield "repeat", f"Read this passage and then write it down again, word by word:\n\n{passage}"
        else:
            items = shuffled.sample(SUBJECTS, 12)
            yield "repeat", "Rewrite this list with one item a line and numbers in front:\n\n" + "\n".join(f"- {item}" for item in items)
    for subject in SUBJECTS[:count]:
        yield "open", f"Tell me something surprising about {subject}."


def measure(model: stretto.LLM, prompt: str, max_tokens: int, turn: int) -> dict[str, Any]:
    """Milliseconds of decoding by method, the methods' order rotated by `turn`, and whether all tokens are those of `off`."""
    results: dict[str, Any] = {}
    order = METHODS[turn % len(METHODS) :] + METHODS[: turn % len(METHODS)]
    for method in order:
        # What one method said must not serve the next: each starts with an empty trie.
        model.trie = NgramTrie(vocab_size=model.config.vocab_size, max_bytes=TRIE_BYTES, fingerprint=model.tokenizer.fingerprint)
        results[method] = model.generate([{"role": "user", "content": prompt}], max_tokens=max_tokens, ignore_eos=True, decode=method)
    return {
        "milliseconds": {m: results[m].stats.decode_ms for m in METHODS},
        "tokens_per_forward": {m: results[m].stats.tokens_per_forward for m in METHODS},
        "identical": all(results[m].tokens == results["off"].tokens for m in METHODS),
    }


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed against `off`: median, least and largest over the prompts, and of all prompts together."""
    found: dict[str, Any] = {"prompts": len(samples), "different": sum(not s["identical"] for s in samples)}
    for method in METHODS[1:]:
        ratios = [s["milliseconds"]["off"] / s["milliseconds"][method] for s in samples]
        total = sum(s["milliseconds"]["off"] for s in samples) / sum(s["milliseconds"][method] for s in samples)
        per_forward = median(s["tokens_per_forward"][method] for s in samples)
        found[method] = {"median": median(ratios), "low": min(ratios), "high": max(ratios), "total": total, "tokens_per_forward": per_forward}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=int, default=34, help="of each of the three kinds")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = stretto.load(options.model, threads=options.threads)
    model.generate("Hello", max_tokens=8)  # the first steps are recorded and the cost curve is measured
    samples: dict[str, list[dict[str, Any]]] = {}
    for turn, (kind, prompt) in enumerate(prompts(options.prompts)):
        samples.setdefault(kind, []).append(measure(model, prompt, options.max_tokens, turn))
        print(f"{kind} {len(samples[kind])}", end="\r", file=sys.stderr)
    document = {
        "kind": "speculation", "model": options.model, "threads": model.threads, "max_tokens": options.max_tokens,
        "command": " ".join(["python -m bench.e2e.speculation", *sys.argv[1:]]), "machine": machine.describe(),
        "kinds": {kind: summary(found) for kind, found in samples.items()}, "all": summary([s for found in samples.values() for s in found]),
    }  # fmt: skip
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
