"""The `castore` command: castore's commands and nanecho's put together, and errors turned into exit codes.

The outermost file: it knows both packages, and nothing but `cli.py` imports it. Environment, clock and current
directory enter here and in the commands.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import Annotated

import typer

import castore
import nanecho.commands
from castore import errors
from castore.commands import check, exchange, github, init, inspect, keep, log, overview, remotes, report
from castore.commands.console import fail, say, show_log

EXIT_CODES: tuple[tuple[type[castore.CastoreError], int], ...] = (
    (errors.UsageError, 2),
    (errors.NotFound, 3),
    (errors.DataMissing, 4),
    (errors.CorruptionError, 5),
    (errors.Locked, 6),
    (errors.NothingToDo, 7),
)

app = typer.Typer(
    name="castore",
    help="Training checkpoints that outlive the machine: stored once, verified always, resumed from the best.",
    epilog="Exit codes: 0 done, 1 unexpected, 2 usage, 3 nothing matches, 4 data missing, 5 corruption found, "
    "6 locked, 7 nothing to do.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: the other kind takes 120 ms more to print
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (init, nanecho.commands, log, inspect, keep, remotes, overview, check, exchange, report):
    app.add_typer(group.app)
app.add_typer(github.app, name="ci")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        say(f"castore {castore.__version__}")
        raise typer.Exit


@app.callback()
def _before_every_command(
    directory: Annotated[
        str | None, typer.Option("-C", metavar="DIR", help="Run as if started in DIR.", show_default=False)
    ] = None,
    verbose: Annotated[
        int,
        typer.Option("-v", "--verbose", count=True, help="Log what is done; twice for details.", show_default=False),
    ] = 0,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if verbose:
        show_log(verbose)
    if directory is not None:
        try:
            os.chdir(directory)
        except OSError as error:
            raise errors.UsageError(f"-C {directory}: {error.strerror}") from error


def main() -> None:
    """Run the program and exit with its code."""
    _prepare_output()
    gc.set_threshold(100_000)  # a long history is many objects, none of them garbage: looking took 7 %
    atexit.register(gc.freeze)  # nor is what the interpreter's end would look through: with torch that took 0.6 s
    try:
        app()
    except castore.CastoreError as error:
        fail(str(error), next((code for group, code in EXIT_CODES if isinstance(error, group)), 1))
    except MemoryError:
        fail("out of memory: a smaller model, --batch-size or --block-size takes less", 1)
    except OSError as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _prepare_output() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that can't show a character still shows the rest


if __name__ == "__main__":
    main()
