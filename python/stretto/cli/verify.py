"""`stretto verify`: the tokens of a decoding method against plain decoding."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stretto.cli.common import FAILED, Debug, Json, KvDtype, Model, Threads, note, print_json
from stretto.cli.generate import as_messages

if TYPE_CHECKING:
    from stretto.engine.llm import LLM


@dataclass(frozen=True)
class Difference:
    """First place where two token lists part; a token is None where its list had ended."""

    prompt: int
    position: int
    off: int | None
    method: int | None
    text_before: str


def verify(
    model: Model,
    prompts: Annotated[Path, typer.Option("--prompts", help="One prompt a line, JSON lines, or a JSON list of texts.")],
    decode: Annotated[str, typer.Option("--decode", help="The method to check against plain decoding.")] = "auto",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="New tokens for each prompt.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0: greedy; above: sampled with the seed.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampled runs.")] = 0,
    batch: Annotated[int, typer.Option("--batch", help="Prompts generated together with the method; plain decoding runs one by one.")] = 1,
    chat_template: Annotated[bool, typer.Option(help="Use the model's chat template where it has one, or take prompts as they are.")] = True,
    threads: Threads = None,
    kv_dtype: KvDtype = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a decoding method gives the tokens of plain decoding. Exit code 1 on any difference."""
    from stretto.engine.params import SamplingParams

    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    SamplingParams(**options, decode=decode)
    if batch < 1:
        raise ValueError(f"verify: batch: {batch}, expected at least 1")
    texts = read_prompts(prompts)
    import stretto

    llm = stretto.load(model, threads=threads, kv_dtype=kv_dtype)
    inputs = [as_messages(llm, text) if chat_template else text for text in texts]
    report = compare(llm, inputs, decode, batch, options)
    if json:
        print_json(report)
    else:
        _show(report)
    if report["differences"]:
        raise typer.Exit(FAILED)


def compare(llm: LLM, inputs: Sequence[str | list[dict[str, str]]], method: str, batch: int, options: dict[str, Any]) -> dict[str, Any]:
    """Generate all inputs plainly and with `method`, and list the first difference of each."""
    plain = [llm.generate(prompt, decode="off", **options) for prompt in inputs]
    fast = [r for start in range(0, len(inputs), batch) for r in llm.generate(list(inputs[start : start + batch]), decode=method, **options)]
    differences = first_differences(llm, [r.tokens for r in plain], [r.tokens for r in fast])
    tokens = sum(r.usage.completion_tokens for r in plain)
    forwards = sum(r.stats.forwards for r in fast)
    plain_ms, fast_ms = (sum(r.stats.decode_ms for r in results) for results in (plain, fast))
    return {
        "method": method,
        "lossless": all(r.stats.lossless for r in fast),
        "prompts": len(inputs),
        "tokens": tokens,
        "identical": len(inputs) - len(differences),
        "differences": [asdict(d) for d in differences],
        "tokens_per_forward": tokens / forwards if forwards else 0.0,
        "speed_ratio": plain_ms / fast_ms if fast_ms else 0.0,
        "batch": batch,
        "threads": llm.threads,
        **options,
    }


def first_differences(llm: LLM, off: Sequence[Sequence[int]], method: Sequence[Sequence[int]]) -> list[Difference]:
    """Where token lists part, for each prompt of which they do."""
    found = []
    for prompt, (a, b) in enumerate(zip(off, method, strict=True)):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            before = llm.tokenizer.decode(list(a[max(0, at - 8) : at]))
            found.append(Difference(prompt, at, a[at] if at < len(a) else None, b[at] if at < len(b) else None, before))
    return found


def read_prompts(path: Path) -> list[str]:
    """Texts of a file: a JSON list, JSON lines (texts, or objects with "prompt"), or one prompt a line; empty lines are skipped.

    Raises: OSError; ValueError naming the file and line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path}: not UTF-8 at byte {error.start}, expected text") from None
    lines = [line for line in content.splitlines() if line.strip()]
    as_json = path.suffix in (".json", ".jsonl")
    try:
        values: list[Any] = json_module.loads(content) if path.suffix == ".json" else [json_module.loads(x) if as_json else x for x in lines]
    except json_module.JSONDecodeError as error:
        raise ValueError(f"prompts: {path}: {error}, expected JSON") from None
    if not isinstance(values, list) or not values:
        raise ValueError(f"prompts: {path}: no prompts in it, expected at least one")
    texts: list[str] = []
    for number, value in enumerate(values):
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str) or not text:
            raise ValueError(f"prompts: {path}: entry {number} is {text!r}, expected a text that is not empty")
        texts.append(text)
    return texts


def _show(report: dict[str, Any]) -> None:
    print(
        f"{report['method']}: {report['identical']} of {report['prompts']} prompts identical to plain decoding "
        f"({report['tokens']} tokens, {report['tokens_per_forward']:.2f} a step, {report['speed_ratio']:.2f}x its speed)"
    )
    if report["differences"]:
        d = report["differences"][0]
        note(f"prompt {d['prompt']} differs at token {d['position']}: plain {d['off']}, {report['method']} {d['method']}, after {d['text_before']!r}")
