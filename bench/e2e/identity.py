"""The promise of identical tokens, put on record: every prompt with every method, against plain decoding of that prompt alone on one thread.

Greedy and sampled. Batch, page size, prompt chunk, threads and cost curve come in twelve combinations (SETTINGS) that rotate over groups of eight
prompts and over methods: each prompt meets each method in both modes, each method meets each value of each factor.

python -m bench.e2e.identity MODEL [--prompts 200] [--max-tokens 128] [--out FILE]     exit code 1 on any difference
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import stretto
from stretto.cache import CacheShape, PagedCache
from stretto.cli.bench import machine
from stretto.cli.verify import first_differences
from stretto.decoding.cost import CostCurve
from stretto.engine.engine import EngineConfig

from bench.e2e.speculation import prompts as chats
from bench.e2e.texts import documentation

METHODS = ("off", "ngram", "trie", "draft:other", "auto")
MODES: Mapping[str, Mapping[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 11}}
GROUP, CONTEXT = 8, 2048
CURVES = {
    "rows are free": CostCurve((1, 32), (1.0, 1.0)),  # whatever is guessed is verified, up to the widest tree
    "rows cost": CostCurve((1, 4, 16), (1.0, 1.2, 3.0)),  # the shape that CPUs show; the same widths in every run
    "measured": None,
}


@dataclass(frozen=True)
class Setting:
    """How an engine is built and used: `chunk` is the most rows of a step, `cost` one of CURVES."""

    batch: int
    page_size: int
    chunk: int
    threads: int
    cost: str


PLAIN = Setting(1, 64, 512, 1, "measured")
SETTINGS = (
    Setting(1, 16, 512, 2, "rows cost"), Setting(4, 64, 48, 1, "rows cost"), Setting(8, 5, 200, 2, "measured"), Setting(1, 64, 200, 1, "rows cost"),
    Setting(4, 256, 512, 2, "rows are free"), Setting(8, 16, 48, 1, "rows cost"), Setting(1, 5, 48, 2, "measured"), Setting(4, 16, 200, 2, "rows cost"),
    Setting(8, 64, 512, 2, "rows cost"), Setting(1, 256, 48, 1, "rows are free"), Setting(4, 5, 512, 1, "rows cost"), Setting(8, 256, 200, 2, "measured"),
)  # fmt: skip


def prompts(llm: stretto.LLM, count: int) -> list[list[int]]:
    """Token ids: chats that ask to edit, repeat and tell, in turns with pieces of documentation of 1 to 300 tokens."""
    ids = llm.encode(documentation()[:400_000])
    asked = [llm.encode([{"role": "user", "content": text}]) for _, text in chats(34)]
    stride = max(1, 2 * len(asked) // count)  # all kinds of chats, also where only a few prompts are wanted
    return [ids[997 * i % (len(ids) - 300) :][: 1 + 137 * i % 300] if i % 2 else asked[i // 2 * stride % len(asked)] for i in range(count)]


def certify(build: Callable[[Setting], stretto.LLM], inputs: Sequence[Sequence[int]], max_tokens: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Generate everything and compare. `build` makes the engine of a setting, the draft model "other" included."""
    llm = build(PLAIN)
    expected = {
        mode: [llm.generate(list(p), max_tokens=max_tokens, ignore_eos=True, decode="off", **options).tokens for p in inputs]
        for mode, options in MODES.items()
    }
    runs = {(mode, method): {"prompts": 0, "tokens": 0, "forwards": 0, "drafted_steps": 0} for mode in MODES for method in METHODS}
    covered: dict[str, Counter[str]] = {field: Counter() for field in asdict(PLAIN)}
    differences: list[dict[str, Any]] = []
    groups = [range(start, min(start + GROUP, len(inputs))) for start in range(0, len(inputs), GROUP)]
    for turn, setting in enumerate(SETTINGS):
        llm = build(setting)
        for m, (method, (mode, options)) in enumerate((method, item) for method in METHODS for item in MODES.items()):
            for group in (g for i, g in enumerate(groups) if (i + 5 * m) % len(SETTINGS) == turn):
                for start in range(group.start, group.stop, setting.batch):
                    batch = range(start, min(start + setting.batch, group.stop))
                    results = llm.generate([list(inputs[i]) for i in batch], max_tokens=max_tokens, ignore_eos=True, decode=method, **options)
                    found = first_differences(llm, [expected[mode][i] for i in batch], [r.tokens for r in results])
                    differences += [asdict(d) | {"prompt": batch[d.prompt], "method": method, "mode": mode} | asdict(setting) for d in found]
                    run = runs[mode, method]
                    run["prompts"] += len(batch)
                    run["tokens"] += sum(len(r.tokens) for r in results)
                    run["forwards"] += sum(r.stats.forwards for r in results)
                    run["drafted_steps"] += sum(n for r in results for width, n in r.stats.width_histogram.items() if width > 1)
                    for name, value in asdict(setting).items():
                        covered[name][str(value)] += len(batch)
        say(f"setting {turn + 1} of {len(SETTINGS)}: {len(differences)} differences so far")
    return {
        "prompts": len(inputs), "prompt_tokens": [min(map(len, inputs)), max(map(len, inputs))], "max_tokens": max_tokens, "modes": MODES,
        "runs": [{"mode": mode, "method": method} | run for (mode, method), run in runs.items()], "generations": covered,
        "settings": [asdict(s) for s in SETTINGS], "differences": differences,
    }  # fmt: skip


def engines(model: stretto.LLM, draft: stretto.LLM) -> Callable[[Setting], stretto.LLM]:
    """Engines of any setting over the weights of one model."""

    def build(setting: Setting) -> stretto.LLM:
        old = model.cache.shape
        shape = CacheShape(old.num_layers, old.num_kv_heads, old.head_dim, setting.page_size, old.dtype)
        cache = PagedCache(shape, -(-GROUP * CONTEXT // setting.page_size))
        llm = stretto.LLM(model.model, model.tokenizer, cache, EngineConfig(setting.chunk, GROUP, CONTEXT), setting.threads)
        llm.add_draft("other", draft)
        curve = CURVES[setting.cost]
        if curve is not None:
            llm.engine.cost.assume(curve)
        return llm

    return build


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    model = stretto.load(options.model, context=CONTEXT)
    draft = stretto.load(options.model, context=CONTEXT, max_seqs=1, dtype="q4_0")  # coarser weights: it often errs
    found = certify(engines(model, draft), prompts(model, options.prompts), options.max_tokens, lambda text: print(text, file=sys.stderr))
    document = {
        "kind": "identity", "model": options.model, "draft": "the same weights in Q4_0", "command": " ".join(["python -m bench.e2e.identity", *sys.argv[1:]]),
        "machine": machine.describe(), "minutes": round((time.monotonic() - started) / 60, 1),
    } | found  # fmt: skip
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(f"{len(found['differences'])} differences in {sum(run['prompts'] for run in found['runs'])} generations")
    return 1 if found["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
