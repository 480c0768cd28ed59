"""`castore report`: the whole history on one page."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

import castore
from castore import errors
from castore.commands import completion
from castore.commands.console import Display, print_json, print_raw, say, warn
from castore.text import format_size

app = typer.Typer()


OutOption = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="File to write; - for standard output.",
        show_default="report.html; - for md and json",
    ),
]


@app.command(epilog="Example: castore report -o report.html")
def report(
    out: OutOption = None,
    run: Annotated[
        str | None, typer.Option(help="Only this run.", show_default=False, autocompletion=completion.runs)
    ] = None,
    form: Annotated[
        Literal["html", "md", "json"], typer.Option("--format", help="A page, text for a job's summary, or JSON.")
    ] = "html",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    is_served: Annotated[
        bool, typer.Option("--serve", help="Show the page to browsers on this machine; it follows a run.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve: 0 takes a free one.")] = 8765,
) -> None:
    """Report quality, lineage, sessions, and what is kept and stored.

    The page is one file that needs no network. An existing report is replaced.
    """
    from castore.format import manifest
    from castore.report import collect, html
    from castore.report.as_json import report_as_json
    from castore.report.markdown import report_as_markdown

    if is_served:
        if out or as_json or form != "html":
            raise errors.UsageError("--serve writes no file: leave out -o, --format and --json")
        _serve(run, port)
        return
    form = "json" if as_json else form
    out = out or ("report.html" if form == "html" else "-")
    repo = castore.Repo.open()
    if out != "-":
        collect.check_target(Path(out))
    with Display("making the report", "spinner"):
        collected = collect.collect_report(repo, datetime.now(UTC), run)
        text = (
            html.report_as_html(collected) if form == "html" else report_as_markdown(collected) if form == "md" else ""
        )
    warn(*(f"{damaged.path}: {damaged.reason}" for damaged in collected.broken))
    if out == "-":
        print_json(report_as_json(collected)) if form == "json" else print_raw(text)
        return
    data = text.encode() if text else manifest.canonical(report_as_json(collected))
    collect.write_report(Path(out), data)
    say(f"wrote   {out}: {len(collected.checkpoints):,} checkpoints, {format_size(len(data))}")
    if not collected.checkpoints:
        say(f"        no checkpoint{f' of run {run}' if run else ''} yet: `castore train` makes the first one")


def _serve(run: str | None, port: int) -> None:
    """Serve the page until Ctrl-C."""
    from castore.report import collect, html
    from castore.report.serve import Server, stamp

    repo = castore.Repo.open()

    def make(now: str) -> bytes:
        return html.report_as_html(collect.collect_report(repo, datetime.now(UTC), run), now).encode()

    with Server(port, lambda: stamp(repo), make) as server:
        say(f"serving {server.url}: Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
