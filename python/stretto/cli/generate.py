"""`stretto generate`: continue one prompt."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stretto.cli.common import INTERRUPTED, Debug, Decode, Json, KvDtype, Model, Threads, note, print_json, write

if TYPE_CHECKING:
    from stretto.engine.llm import LLM
    from stretto.engine.results import Result


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text; '-' reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep this many tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option("--min-p", help="Keep tokens at least this likely relative to the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="Above 1 makes seen tokens less likely.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End at this text; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the model's end token.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message of the chat template.")] = None,
    chat_template: Annotated[bool, typer.Option(help="Use the model's chat template where it has one, or take the prompt as it is.")] = True,
    decode: Decode = "auto",
    threads: Threads = None,
    kv_dtype: KvDtype = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt. The text appears as it is made; how fast it was goes to stderr."""
    from stretto.engine.params import SamplingParams

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("generate: prompt: empty, expected text")
    options: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "stop": tuple(stop or ()), "ignore_eos": ignore_eos, "decode": decode,
    }  # fmt: skip
    SamplingParams(**options)  # refuses a bad option before a model is loaded for nothing
    import stretto

    llm = stretto.load(model, threads=threads, kv_dtype=kv_dtype)
    conversation = as_messages(llm, text, system) if chat_template else text
    if json:
        print_json(llm.generate(conversation, **options).to_dict())
        return
    result = _show(llm, conversation, options)
    note(summary(result))


def as_messages(llm: LLM, text: str, system: str | None = None) -> str | list[dict[str, str]]:
    """The prompt as chat messages, or as it is where the model has no chat template."""
    if not llm.tokenizer.has_chat_template:
        if system is not None:
            raise ValueError("generate: system: given, but this model has no chat template to put it in")
        return text
    messages = [{"role": "system", "content": system}] if system is not None else []
    return [*messages, {"role": "user", "content": text}]


def _show(llm: LLM, conversation: str | list[dict[str, str]], options: Mapping[str, Any]) -> Result:
    """Print the text as it comes. Ctrl-C ends the generation, frees its pages and exits."""
    result: Result | None = None
    deltas = llm.generate(conversation, stream=True, **options)
    try:
        for delta in deltas:
            write(delta.text)
            result = delta.result or result
    except KeyboardInterrupt:
        write("\n")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        deltas.close()
    write("\n")
    if result is None:
        raise RuntimeError("generate: the stream ended without a result")
    return result


def summary(result: Result) -> str:
    """One line: how many tokens, how fast, how."""
    usage, stats = result.usage, result.stats
    speculation = f", {stats.tokens_per_forward:.2f} tokens a step" if stats.tokens_per_forward > 1 else ""
    return (
        f"{usage.prompt_tokens} prompt tokens in {stats.prefill_ms:.0f} ms, {usage.completion_tokens} new at "
        f"{stats.tokens_per_second:.1f} tokens/s ({stats.decode}{speculation}), ended by {result.finish_reason}"
    )
