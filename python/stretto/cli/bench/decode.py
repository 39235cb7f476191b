"""The schedule of `stretto bench decode`: which measurements, in which order, and what is made of the samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from stretto.cli.bench.ceilings import Ceilings
from stretto.cli.bench.engines import Spec
from stretto.cli.bench.ratios import paired_ratio, rotated
from stretto.cli.bench.remote import Worker

SETTLE_SECONDS = 0.02  # between two measurements: idle pools stop spinning within a few milliseconds
OURS = "stretto"


@dataclass(frozen=True)
class Measurement:
    """One figure to take of every engine. `tokens` made by one timed call give tokens a second."""

    what: str  # "prefill", "decode", "batch", "step_cost"
    tokens: int
    context: int  # cached positions of each sequence; 0 for prefill
    sequences: int = 1
    rows: int = 1

    def run(self, worker: Worker, steps: int) -> float:
        if self.what == "prefill":
            return float(worker.ask("prefill", tokens=self.tokens))
        return float(worker.ask("decode", context=self.context, steps=steps, sequences=self.sequences, rows=self.rows))


@dataclass(frozen=True)
class Plan:
    """What to measure. `comparisons` maps a name ("A") to the labels of the peers among which the fastest is compared."""

    contexts: Sequence[int]
    prefills: Sequence[int]
    sequences: Sequence[int]
    batch_contexts: Sequence[int]
    rows: Sequence[int]
    rounds: int
    steps: int
    comparisons: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def measurements(self) -> Iterator[Measurement]:
        """Decode contexts first and upwards: a peer's cache is filled once and only ever grows until the batches."""
        for context in sorted(self.contexts):
            yield Measurement("decode", 1, context)
            if context == min(self.contexts):
                for rows in sorted(self.rows):
                    yield Measurement("step_cost", rows, context, rows=rows)
        for tokens in sorted(self.prefills):
            yield Measurement("prefill", tokens, 0)
        for sequences in sorted(self.sequences):
            for context in sorted(self.batch_contexts):
                yield Measurement("batch", sequences, context, sequences=sequences)


def run(specs: Sequence[Spec], plan: Plan, ceilings: Ceilings, say: Callable[[str], None]) -> dict[str, Any]:
    """All measurements at one number of threads: `specs` are engines of that number, ours among them. Returns plain data for the result file."""
    workers: dict[str, Worker] = {}
    try:
        for spec in specs:
            say(f"starting {spec.label}")
            workers[spec.label] = Worker(spec)
        facts = {label: worker.ask("info") for label, worker in workers.items()}
        results = []
        for measurement in plan.measurements():
            samples = take(measurement, workers, plan)
            results.append(evaluate(measurement, samples, plan.comparisons, facts[OURS], ceilings))
            say(line(results[-1]))
    finally:
        for worker in workers.values():
            worker.close()
    return {"threads": ceilings.threads, "ceilings": ceilings.to_dict(), "engines": facts, "measurements": results, "step_cost": step_costs(results)}


def take(measurement: Measurement, workers: Mapping[str, Worker], plan: Plan) -> dict[str, list[float]]:
    """Seconds of each round by engine. Every round asks every engine once, in rotating order; a first call of each is not counted."""
    names = list(workers)
    for name in names:  # fills caches, plans graphs
        measurement.run(workers[name], 1)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(plan.rounds):
        for name in rotated(names, turn):
            time.sleep(SETTLE_SECONDS)
            samples[name].append(measurement.run(workers[name], plan.steps))
    return samples


def evaluate(
    measurement: Measurement,
    samples: Mapping[str, Sequence[float]],
    comparisons: Mapping[str, Sequence[str]],
    ours: Mapping[str, Any],
    ceilings: Ceilings,
) -> dict[str, Any]:
    """Speeds, ratios against the fastest peer of each comparison, and how close ours is to the machine's limits."""
    engines = {
        name: {"seconds": list(seconds), "tokens_per_second": measurement.tokens / median(seconds), "best": measurement.tokens / min(seconds)}
        for name, seconds in samples.items()
    }
    ratios = {}
    for comparison, peers in comparisons.items():
        present = [p for p in peers if p in samples]
        if present:
            peer = min(present, key=lambda name: median(samples[name]))
            ratios[comparison] = {"peer": peer, **paired_ratio(samples[OURS], samples[peer]).to_dict()}
    return {
        "what": measurement.what,
        "tokens": measurement.tokens,
        "context": measurement.context,
        "sequences": measurement.sequences,
        "rows": measurement.rows,
        "engines": engines,
        "ratios": ratios,
        "roofline": roofline(measurement, median(samples[OURS]), ours, ceilings),
    }


def roofline(measurement: Measurement, seconds: float, ours: Mapping[str, Any], ceilings: Ceilings) -> dict[str, float | None]:
    """Bytes that must be read and operations that must be done for one call, and their share of what the machine can do.

    Weights are read once a call (once a 512-row chunk of a prefill, which the caches hide: counted once); keys and values of the
    context once a sequence.
    """
    m = measurement
    new_rows = m.tokens
    read = ours["weight_bytes"] + m.sequences * m.context * ours["kv_bytes_per_token"]
    positions = new_rows * (m.context + (m.tokens / 2 if m.what == "prefill" else 0))
    operations = new_rows * ours["ops_per_token"] + positions * ours["attention_ops_per_position"]
    peak = ceilings.int8_gops or ceilings.f32_gflops
    return {
        "bytes": read,
        "operations": operations,
        "gb_per_s": read / seconds / 1e9,
        "gops": operations / seconds / 1e9,
        "share_of_bandwidth": read / seconds / 1e9 / ceilings.read_gb_per_s,
        "share_of_peak": operations / seconds / 1e9 / peak,
        "bound_seconds": max(read / ceilings.read_gb_per_s, operations / peak) / 1e9,
    }


def step_costs(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """c(N) of each engine: seconds of a step over N rows over those of one row, medians."""
    costs: dict[str, dict[str, float]] = {}
    ones: dict[str, float] = {}
    for result in (r for r in results if r["what"] == "step_cost"):
        for name, engine in result["engines"].items():
            seconds = median(engine["seconds"])
            ones.setdefault(name, seconds if result["rows"] == 1 else float("nan"))
            costs.setdefault(name, {})[str(result["rows"])] = seconds / ones[name]
    return costs


def line(result: Mapping[str, Any]) -> str:
    """One measurement for the person who waits."""
    where = f"{result['what']} {result['tokens']} tokens at {result['context']}"
    speeds = ", ".join(f"{name} {engine['tokens_per_second']:.1f}" for name, engine in result["engines"].items())
    ratios = ", ".join(f"{name} {r['median']:.2f}x ({r['low']:.2f} to {r['high']:.2f})" for name, r in result["ratios"].items())
    return f"{where}: {speeds} tokens/s" + (f"; {ratios}" if ratios else "")
