"""Speculation against our own plain decoding: copy-heavy prompts and open ones, every method in turn, tokens compared.

Plain decoding is measured twice in each turn, as "off" and as "off again": how far the two lie apart is the noise that any other ratio holds too.
Other programs only ever add time, so that of the repeats of a method the shortest counts.

python -m bench.e2e.speculation MODEL [--threads 2] [--prompts 34] [--max-tokens 64] [--repeats 5] [--seconds 80] [--out FILE]
With --seconds it stops after that time; the same command goes on where --out ended.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import stretto
from stretto.cache import NgramTrie
from stretto.cli.bench import machine
from stretto.engine.llm import TRIE_BYTES

from bench.e2e.texts import functions, passages

METHODS = ("off", "trie", "off again", "ngram", "auto")
SAME_RUN = ("model", "threads", "max_tokens", "repeats", "machine")  # fields of a result file that must agree for its samples to be kept
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


def measure(model: stretto.LLM, prompt: str, max_tokens: int, repeats: int, turn: int) -> dict[str, Any]:
    """Least milliseconds by method, all but reading the prompt, the methods' order rotated; and whether all tokens are those of `off`."""
    milliseconds: dict[str, list[float]] = {m: [] for m in METHODS}
    results: dict[str, Any] = {}
    identical = True
    for repeat in range(repeats):
        shift = (turn + repeat) % len(METHODS)
        for method in METHODS[shift:] + METHODS[:shift]:
            # What one method said must not serve the next: each starts with an empty trie.
            model.trie = NgramTrie(vocab_size=model.config.vocab_size, max_bytes=TRIE_BYTES, fingerprint=model.tokenizer.fingerprint)
            start = time.perf_counter()
            result = model.generate(
                [{"role": "user", "content": prompt}], max_tokens=max_tokens, ignore_eos=True, decode=method.removesuffix(" again")
            )
            milliseconds[method].append(1000 * (time.perf_counter() - start) - result.stats.prefill_ms)
            identical &= result.tokens == results.setdefault(method, result).tokens == results[next(iter(results))].tokens
    return {
        "milliseconds": {m: round(min(milliseconds[m]), 2) for m in METHODS},
        "tokens_per_forward": {m: round(results[m].stats.tokens_per_forward, 3) for m in METHODS},
        "widths_of_auto": results["auto"].stats.width_histogram,
        "identical": identical,
    }


def summary(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Speed against `off`: median, least and largest over the prompts, and of all prompts together."""
    found: dict[str, Any] = {"prompts": len(samples), "different": sum(not s["identical"] for s in samples)}
    for method in METHODS[1:]:
        ratios = [s["milliseconds"]["off"] / s["milliseconds"][method] for s in samples]
        total = sum(s["milliseconds"]["off"] for s in samples) / sum(s["milliseconds"][method] for s in samples)
        per_forward = median(s["tokens_per_forward"][method] for s in samples)
        found[method] = {"median": median(ratios), "low": min(ratios), "high": max(ratios), "total": total, "tokens_per_forward": per_forward}
    return found


def summaries(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By kind of prompt, of all, and the prompts on which `auto` did worst."""
    kinds = {kind: summary([s for s in samples if s["kind"] == kind]) for kind in dict.fromkeys(s["kind"] for s in samples)}
    worst = sorted(samples, key=lambda s: s["milliseconds"]["off"] / s["milliseconds"]["auto"])[:5]
    return {"kinds": kinds, "all": summary(samples), "worst_of_auto": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompts", type=int, default=34, help="of each of the three kinds")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    model = stretto.load(options.model, threads=options.threads)
    document: dict[str, Any] = {
        "kind": "speculation", "model": options.model, "threads": model.threads, "max_tokens": options.max_tokens, "repeats": options.repeats,
        "command": " ".join(["python -m bench.e2e.speculation", *sys.argv[1:]]), "machine": machine.describe(), "samples": [],
    }  # fmt: skip
    if options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        if all(before.get(field) == document[field] for field in SAME_RUN):
            document["samples"] = before["samples"]
    samples, wanted = document["samples"], list(prompts(options.prompts))
    model.generate("Hello Hello Hello", max_tokens=8)  # the first steps are recorded and the cost curve is measured
    while len(samples) < len(wanted) and time.monotonic() - started < options.seconds:
        kind, prompt = wanted[len(samples)]
        samples.append({"kind": kind, "prompt": len(samples)} | measure(model, prompt, options.max_tokens, options.repeats, len(samples)))
        print(f"{len(samples)} of {len(wanted)}", end="\r", file=sys.stderr)
    document |= {"complete": len(samples) == len(wanted)} | summaries(samples)
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(json.dumps({k: document[k] for k in ("complete", "kinds", "all", "worst_of_auto")}, indent=1))


if __name__ == "__main__":
    main()
