"""`stretto chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stretto.cli.common import Debug, Decode, Json, KvDtype, Model, Threads, print_json, write
from stretto.cli.generate import summary

if TYPE_CHECKING:
    from rich.console import Console

    from stretto.engine.llm import LLM

HELP = "/clear forgets the conversation, /stats shows how fast the last reply was, /quit leaves; Ctrl-C stops a reply."


def chat(
    model: Model,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens of one reply at most.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this probability.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same conversation.")] = 0,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    decode: Decode = "auto",
    threads: Threads = None,
    kv_dtype: KvDtype = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk with a model. With --json each line of standard input is a message; the conversation is printed at its end."""
    from rich.console import Console

    from stretto.engine.params import SamplingParams

    options: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "decode": decode,
    }  # fmt: skip
    SamplingParams(**options)
    import stretto

    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        llm = stretto.load(model, threads=threads, kv_dtype=kv_dtype)
    if not llm.tokenizer.has_chat_template:
        raise ValueError(f"chat: model: {model} has no chat template; `stretto generate` continues plain text")
    opening = [{"role": "system", "content": system}] if system is not None else []
    if json:
        print_json(recite(llm, opening, [line.strip() for line in sys.stdin if line.strip()], options))
        return
    console.print(f"[bold]{model}[/bold], {llm.threads} threads. {HELP}", highlight=False)
    converse(llm, console, opening, options)


def recite(llm: LLM, opening: list[dict[str, str]], lines: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """A conversation whose one side is known beforehand: all messages, and the result of each reply."""
    messages, replies = list(opening), []
    for line in lines:
        messages.append({"role": "user", "content": line})
        result = llm.generate(messages, **options)
        messages.append({"role": "assistant", "content": result.text})
        replies.append(result.to_dict())
    return {"messages": messages, "replies": replies}


def converse(llm: LLM, console: Console, opening: list[dict[str, str]], options: dict[str, Any]) -> None:
    """Read, answer, remember, until /quit or the end of input."""
    messages, stats = list(opening), "no reply yet"
    while (line := _read(console)) is not None:
        if line in ("/quit", "/exit"):
            return
        if line == "/clear":
            messages = list(opening)
        elif line == "/stats":
            console.print(stats, highlight=False)
        elif line.startswith("/"):
            console.print(HELP, highlight=False)
        elif line:
            reply, stats = _answer(llm, console, [*messages, {"role": "user", "content": line}], options)
            if reply is not None:
                messages += [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]


def _read(console: Console) -> str | None:
    """One line; None at the end of input or at Ctrl-C on an empty prompt."""
    try:
        return console.input("[bold cyan]> [/bold cyan]").strip() if sys.stdin.isatty() else input().strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _answer(llm: LLM, console: Console, messages: list[dict[str, str]], options: dict[str, Any]) -> tuple[str | None, str]:
    """Stream a reply. Returns its text (None: it failed, forget the question) and a line about its speed."""
    from stretto.errors import StrettoError

    parts: list[str] = []
    stats = "stopped"
    try:
        deltas = llm.generate(messages, stream=True, **options)
        try:
            for delta in deltas:
                parts.append(delta.text)
                write(delta.text)
                if delta.result is not None:
                    stats = summary(delta.result)
        finally:
            deltas.close()
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]")
        return "".join(parts), stats
    except StrettoError as error:  # the conversation outgrew the context, or the model broke down: say so and go on
        console.print(f"[red]{error}[/red] Try /clear.", highlight=False)
        return None, stats
    write("\n")
    return "".join(parts), stats
