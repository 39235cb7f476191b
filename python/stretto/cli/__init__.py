"""The command line: one module a verb. Verbs import what they need when they run, so that `stretto --help` and `stretto version` stay quick."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import cast

import typer

from stretto.cli import chat, doctor, generate, verify, version
from stretto.cli.bench import verbs as bench
from stretto.cli.common import BAD_INPUT, FAILED, INTERRUPTED, complain, debugging, short_warning

app = typer.Typer(
    name="stretto",
    help="Makes trained models generate faster, and keeps only what the model would have said anyway.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.add_typer(bench.app, name="bench")
app.command("verify")(verify.verify)
app.command("doctor")(doctor.doctor)
app.command("version")(version.version)

# Typer raises what its option parser (click, or its own copy of it) raises; both derive from the class of BadParameter two steps up.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check failed or the run broke, 2 bad input, 130 interrupted.

    An error is one line on stderr; `--debug` shows the traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with debugging("--debug" in arguments), warnings.catch_warnings():
        warnings.showwarning = short_warning
        sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    from stretto.errors import StrettoError

    try:
        result = app(args=arguments, prog_name="stretto", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except _UsageError as error:
        return complain(error.format_message(), BAD_INPUT)
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) has left: nothing more to say
        sys.stdout = None  # no second failure when the interpreter flushes
        return FAILED
    except (ValueError, NotImplementedError, OSError) as error:  # most of StrettoError are ValueErrors
        return complain(error, BAD_INPUT)
    except (StrettoError, ImportError, RuntimeError) as error:
        return complain(error, FAILED)
    except Exception as error:  # a defect: say what it was, keep the details for --debug
        return complain(f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)", FAILED)
