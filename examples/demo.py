"""`make demo`: a real model edits a function, first plainly, then with lossless speculation, and both outputs are compared."""

from __future__ import annotations

import inspect
import textwrap

import stretto
from rich.console import Console
from rich.table import Table

MODEL = "smollm2-135m"
MAX_TOKENS = 160


def edit_prompt() -> list[dict[str, str]]:
    """A task whose answer repeats much of its question: that is where looking back pays."""
    source = inspect.getsource(textwrap.dedent)[:900]
    return [{"role": "user", "content": f"Repeat this Python function exactly, but rename `text` to `source`:\n\n```python\n{source}\n```"}]


def generate(model: stretto.LLM, messages: list[dict[str, str]], decode: str, console: Console) -> stretto.Result:
    """Generate with `decode`, printing tokens as they come."""
    console.rule(f"decode = {decode}")
    result = None
    for delta in model.generate(messages, max_tokens=MAX_TOKENS, decode=decode, stream=True):
        console.print(delta.text, end="", markup=False, highlight=False, soft_wrap=True)
        result = delta.result or result
    console.print()
    assert result is not None, "the last delta carries the result"
    return result


def main() -> None:
    console = Console()
    with console.status(f"loading {MODEL}"):
        model = stretto.load(MODEL)
        model.generate("Hello", max_tokens=4, decode="off")  # the first step is recorded; leave that out of the times
    messages = edit_prompt()
    methods = ["off", "trie"]
    results = {decode: generate(model, messages, decode, console) for decode in methods}

    plain = results["off"]
    table = Table(title=f"{MODEL}, {model.threads} threads, {len(plain.tokens)} new tokens")
    for column, justify in [
        ("decode", "left"),
        ("tokens/s", "right"),
        ("against plain", "right"),
        ("tokens per forward", "right"),
        ("identical", "left"),
    ]:
        table.add_column(column, justify=justify)
    for decode, result in results.items():
        stats = result.stats
        table.add_row(
            "plain" if decode == "off" else decode,
            f"{stats.tokens_per_second:.0f}",
            f"{stats.tokens_per_second / plain.stats.tokens_per_second:.2f}x",
            f"{stats.tokens_per_forward:.2f}",
            "yes" if result.tokens == plain.tokens else "NO",
        )
    console.print(table)
    if any(result.tokens != plain.tokens for result in results.values()):
        raise SystemExit("speculation changed the output: please report this with the output of `stretto doctor`")


if __name__ == "__main__":
    main()
