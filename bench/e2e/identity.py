"""The promise of identical tokens, put on record: every prompt with every method, against plain decoding of that prompt alone on one thread.

Greedy and sampled. Batch, page size, prompt chunk, threads and cost curve come in twelve combinations (SETTINGS) that rotate over groups of eight
prompts and over methods: each prompt meets each method in both modes, each method meets each value of each factor.

python -m bench.e2e.identity MODEL [--prompts 200] [--max-tokens 128] [--seconds 80] [--out FILE]     exit code 1 on any difference
About 20 minutes on two cores. With --seconds it stops after that time, exit code 1; the same command goes on, from what it left beside --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
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


def empty() -> dict[str, Any]:
    """A certificate before anything ran. `expected`: mode -> tokens of plain decoding; `done`: steps of `schedule` that have run."""
    return {
        "expected": {mode: [] for mode in MODES}, "done": 0, "generations": {field: {} for field in asdict(PLAIN)}, "differences": [],
        "runs": [{"mode": mode, "method": m, "prompts": 0, "tokens": 0, "forwards": 0, "drafted_steps": 0} for mode in MODES for m in METHODS],
    }  # fmt: skip


def schedule(count: int) -> list[tuple[Setting, str, str, range]]:
    """(setting, method, mode, prompts of a group): a group meets each method in both modes, under settings that rotate."""
    groups = [range(start, min(start + GROUP, count)) for start in range(0, count, GROUP)]
    pairs = [(method, mode) for method in METHODS for mode in MODES]
    steps = [((g + 5 * p) % len(SETTINGS), method, mode, group) for p, (method, mode) in enumerate(pairs) for g, group in enumerate(groups)]
    return [(SETTINGS[s], method, mode, group) for s, method, mode, group in sorted(steps, key=lambda step: step[0])]


def certify(
    state: dict[str, Any], build: Callable[[Setting], stretto.LLM], inputs: Sequence[list[int]], max_tokens: int, deadline: float = float("inf")
) -> bool:
    """Generate and compare until all is done (True) or time.monotonic() passes `deadline`; `state` starts as `empty()` and is carried on.

    build: the engine of a setting, with a draft model named "other".
    """
    limits: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True}
    built: tuple[Setting | None, stretto.LLM | None] = (None, None)

    def engine(setting: Setting) -> stretto.LLM:
        nonlocal built
        if built[0] != setting or built[1] is None:
            built = (None, None)  # the old cache goes before the new one comes
            built = (setting, build(setting))
        assert built[1] is not None
        return built[1]

    for mode, plain in state["expected"].items():
        while len(plain) < len(inputs):
            if time.monotonic() > deadline:
                return False
            plain.append(engine(PLAIN).generate(inputs[len(plain)], decode="off", **limits, **MODES[mode]).tokens)
    steps = schedule(len(inputs))
    while state["done"] < len(steps):
        if time.monotonic() > deadline:
            return False
        setting, method, mode, group = steps[state["done"]]
        llm = engine(setting)
        for start in range(group.start, group.stop, setting.batch):
            batch = range(start, min(start + setting.batch, group.stop))
            results = llm.generate([inputs[i] for i in batch], decode=method, **limits, **MODES[mode])
            found = first_differences(llm, [state["expected"][mode][i] for i in batch], [r.tokens for r in results])
            state["differences"] += [asdict(d) | {"prompt": batch[d.prompt], "decode": method, "mode": mode} | asdict(setting) for d in found]
            count(state, setting, method, mode, results)
        state["done"] += 1
    return True


def count(state: dict[str, Any], setting: Setting, method: str, mode: str, results: Sequence[Any]) -> None:
    """Note what was generated and under which values of the factors."""
    run = next(r for r in state["runs"] if (r["mode"], r["method"]) == (mode, method))
    run["prompts"] += len(results)
    run["tokens"] += sum(len(r.tokens) for r in results)
    run["forwards"] += sum(r.stats.forwards for r in results)
    run["drafted_steps"] += sum(n for r in results for width, n in r.stats.width_histogram.items() if width > 1)
    for name, value in asdict(setting).items():
        seen = state["generations"][name]
        seen[str(value)] = seen.get(str(value), 0) + len(results)


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
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time; the same command goes on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.monotonic()
    document: dict[str, Any] = {
        "kind": "identity", "model": options.model, "draft": "the same weights in Q4_0", "prompts": options.prompts, "max_tokens": options.max_tokens,
        "modes": MODES, "command": " ".join(["python -m bench.e2e.identity", *sys.argv[1:]]), "machine": machine.describe(),
    }  # fmt: skip
    part = options.out.with_suffix(".part") if options.out else None
    before = json.loads(part.read_text()) if part and part.exists() else {}
    same = all(before.get(field) == document[field] for field in ("model", "prompts", "max_tokens", "machine"))
    state = before["state"] if same and before else empty()
    model = stretto.load(options.model, context=CONTEXT)
    draft = stretto.load(options.model, context=CONTEXT, max_seqs=1, dtype="q4_0")  # coarser weights: it often errs
    inputs = prompts(model, options.prompts)
    done = certify(state, engines(model, draft), inputs, options.max_tokens, started + options.seconds)
    steps = len(schedule(len(inputs)))
    print(f"{state['done']} of {steps} steps, {len(state['differences'])} differences in {sum(run['prompts'] for run in state['runs'])} generations")
    if not done:
        if part:
            part.write_text(json.dumps(document | {"state": state}))
        return 1
    kept = {field: state[field] for field in ("runs", "generations", "differences")}
    document |= {"prompt_tokens": [min(map(len, inputs)), max(map(len, inputs))], "settings": [asdict(s) for s in SETTINGS]} | kept
    if options.out and part:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        part.unlink(missing_ok=True)
    return 1 if state["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
