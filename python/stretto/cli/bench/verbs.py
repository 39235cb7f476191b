"""`stretto bench decode` and `stretto bench ops`."""

from __future__ import annotations

import json as json_module
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stretto.cli.common import FAILED, Debug, Json, KvDtype, Model, integers, note, plain, print_json

if TYPE_CHECKING:
    from stretto.cli.bench.engines import Spec

app = typer.Typer(help="Measure: a model against other engines, kernels against references, all against the machine's limits.", no_args_is_help=True)

PEERS = ("llama-cpp", "transformers")
MAX_ROWS = 64

ThreadList = Annotated[str | None, typer.Option("--threads", help="Numbers of threads, such as 1,2. Default: what this process may use.")]
Out = Annotated[Path | None, typer.Option("--out", help="Also write the JSON document to this file.")]
Rounds = Annotated[int, typer.Option("--rounds", help="Times each engine is measured, in turn.")]


@app.command("decode")
def decode(
    model: Model,
    threads: ThreadList = None,
    contexts: Annotated[str, typer.Option("--contexts", help="Cached tokens at which decoding is measured.")] = "128,1024,4096",
    prefills: Annotated[str, typer.Option("--prefills", help="Prompt lengths that are read.")] = "512,2048",
    sequences: Annotated[str, typer.Option("--sequences", help="Sequences decoded at once.")] = "8",
    batch_contexts: Annotated[str, typer.Option("--batch-contexts", help="Cached tokens of each of these sequences.")] = "128,512,1024",
    rows: Annotated[str, typer.Option("--rows", help="Rows of a step, for its cost curve c(N).")] = "1,2,4,8,16,32",
    peers: Annotated[str, typer.Option("--peers", help="llama-cpp, transformers, or both; '' for none.")] = "llama-cpp",
    rounds: Rounds = 5,
    steps: Annotated[int, typer.Option("--steps", help="Steps of one sample.")] = 16,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Convert our weights, as stretto.load does.")] = None,
    kv_dtype: KvDtype = None,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a roofline picture (PNG).")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Speed of a model beside other engines on the same file and threads, measured in turn.

    Comparison A is llama.cpp on the same file, B llama.cpp on the file re-quantised to Q4_0; flash attention on or off, whichever is faster.
    """
    from stretto.cli.bench import ceilings, machine
    from stretto.cli.bench.decode import Plan, run
    from stretto.models.loading import find

    counts = _thread_counts(threads)
    chosen = [p for p in peers.split(",") if p]
    if unknown := [p for p in chosen if p not in PEERS]:
        raise ValueError(f"bench decode: peers: {unknown[0]!r}, expected of {', '.join(PEERS)}")
    for name, value in (("rounds", rounds), ("steps", steps)):
        if value < 1:
            raise ValueError(f"bench decode: {name}: {value}, expected at least 1")
    row_counts = [1, *integers(rows, "bench decode: rows")]
    if max(row_counts) > MAX_ROWS:
        raise ValueError(f"bench decode: rows: {max(row_counts)}, expected at most {MAX_ROWS}")
    plan = Plan(
        contexts=integers(contexts, "bench decode: contexts"),
        prefills=integers(prefills, "bench decode: prefills"),
        sequences=integers(sequences, "bench decode: sequences"),
        batch_contexts=integers(batch_contexts, "bench decode: batch_contexts"),
        rows=sorted(set(row_counts)),
        rounds=rounds,
        steps=steps,
    )
    path = Path(find.resolve(model))
    _writable(out, plot)
    say, runs = _speaker(json), []
    with tempfile.TemporaryDirectory() as scratch:
        for count in counts:
            limits = ceilings.measure(count)
            say(
                f"{count} thread(s): reads {limits.read_gb_per_s:.1f} GB/s, f32 {limits.f32_gflops:.0f} GFLOP/s, int8 {limits.int8_gops or 0:.0f} Gop/s"
            )
            specs, comparisons = _specs(path, chosen, count, max(*plan.contexts, *plan.prefills), dtype, kv_dtype, Path(scratch))
            runs.append(run(specs, replace(plan, comparisons=comparisons), limits, say))
    document = {
        "kind": "decode", "model": path.name, "command": _command(), "machine": machine.describe(), "dtype": dtype, "kv_dtype": kv_dtype,
        "rounds": rounds, "steps": steps, "runs": runs,
    }  # fmt: skip
    _deliver(document, out, json)
    if plot is not None:
        from stretto.cli.bench.plot import draw

        draw(document, plot)


@app.command("ops")
def ops(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Ops or families; all by default.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Only cases of this type: float32, float16, bfloat16.")] = None,
    peers: Annotated[
        str | None, typer.Option("--peers", help="Names of what runs beside ours, 'reference' included; '' for none. Default: all there are.")
    ] = None,
    threads: ThreadList = None,
    rounds: Rounds = 7,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a roofline picture (PNG).")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Speed of the kernels beside their references and other libraries, outputs checked first. Exit code 1 where an output is wrong."""
    import torch

    from stretto.cli.bench import ceilings, machine
    from stretto.cli.bench import device as gpu
    from stretto.cli.bench.ops import Choice, chosen, run
    from stretto.ops.table import cuda_missing_reason

    selected = chosen(names or [])
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench ops: device: {device!r}, expected cpu or cuda")
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"bench ops: dtype: {dtype!r}, expected float32, float16 or bfloat16")
    if rounds < 1:
        raise ValueError(f"bench ops: rounds: {rounds}, expected at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench ops: device: cuda, but torch finds no GPU")
    if device == "cuda" and (reason := cuda_missing_reason()):
        raise ValueError(f"bench ops: device: cuda, but {reason}")
    choice = Choice(getattr(torch, dtype) if dtype else None, None if peers is None else tuple(p for p in peers.split(",") if p), rounds)
    _writable(out, plot)
    limits = [gpu.ceilings()] if device == "cuda" else [ceilings.measure(count) for count in _thread_counts(threads)]
    entries = [entry for limit in limits for entry in run(selected, choice, limit, _speaker(json))]
    document = {
        "kind": "ops", "command": _command(), "machine": machine.describe() | (gpu.describe() if device == "cuda" else {}), "rounds": rounds,
        "ceilings": [c.to_dict() for c in limits], "entries": entries,
    }  # fmt: skip
    _deliver(document, out, json)
    if plot is not None:
        from stretto.cli.bench.plot import draw_ops

        draw_ops(document, plot)
    if not all(e["check"]["ok"] for e in entries):
        raise typer.Exit(FAILED)


def _thread_counts(threads: str | None) -> list[int]:
    from stretto.ops import num_threads

    return integers(threads, "bench: threads") if threads is not None else [num_threads()]


def _specs(
    path: Path, peers: list[str], threads: int, longest: int, dtype: str | None, kv_dtype: str | None, scratch: Path
) -> tuple[list[Spec], dict[str, list[str]]]:
    """Engines to start, and which of them each comparison chooses its peer from."""
    from stretto.cli.bench.engines import Spec

    specs = [Spec("stretto", "stretto", str(path), threads, longest, dtype=dtype, kv_dtype=kv_dtype)]
    comparisons: dict[str, list[str]] = {}
    if "llama-cpp" in peers:
        from stretto.cli.bench.engine_llama import quantize_q4_0

        if not path.is_file():
            raise NotImplementedError(f"bench decode: peers: llama-cpp reads GGUF files, {path} is a directory; use --peers transformers")
        files = {"A": ("llama.cpp", path), "B": ("llama.cpp Q4_0", quantize_q4_0(path, scratch / f"{path.stem}-q4_0.gguf"))}
        for comparison, (label, file) in files.items():
            labels = {flash: f"{label} fa={int(flash)}" for flash in (False, True)}
            specs += [Spec(name, "llama-cpp", str(file), threads, longest, flash_attn=flash) for flash, name in labels.items()]
            comparisons[comparison] = list(labels.values())
    if "transformers" in peers:
        specs.append(Spec("transformers f32", "transformers", str(path), threads, longest))
        comparisons["transformers"] = ["transformers f32"]
    return specs, comparisons


def _speaker(json: bool) -> Callable[[str], None]:
    """Where a finished measurement is said: stdout for a person, stderr where stdout is for the document."""
    return note if json else lambda text: print(text, flush=True)


def _command() -> str:
    """How to repeat this run."""
    return shlex.join(["stretto", *sys.argv[1:]])


def _writable(*targets: Path | None) -> None:
    """Refuse a target that cannot be written before minutes are spent on measuring. Raises OSError or ValueError."""
    for target in targets:
        if target is not None and not target.absolute().parent.is_dir():
            raise FileNotFoundError(f"bench: {target}: its folder does not exist")


def _deliver(document: dict[str, Any], out: Path | None, json: bool) -> None:
    if out is not None:
        out.write_text(json_module.dumps(plain(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        note(f"written: {out}")
    if json:
        print_json(document)
