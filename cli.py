"""The `castore` command: parse, call, render, exit code.

The one place that knows both packages, and where environment, clock and current directory enter. Torch is imported by
`train` alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import msgspec
import typer

import castore
from castore import catalog, errors, manifest, resolve
from castore.quality import Entry
from nanecho import config as configs

if TYPE_CHECKING:
    from nanecho import events

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
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def main() -> None:
    """Entry point of the installed program."""
    try:
        app()
    except castore.CastoreError as error:
        fail(error)


def fail(error: castore.CastoreError) -> NoReturn:
    """Say what is wrong and leave with the code of the error's group."""
    print(f"castore: {error}", file=sys.stderr)
    sys.exit(next((code for group, code in EXIT_CODES if isinstance(error, group)), 1))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"castore {castore.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    directory: Annotated[
        str | None, typer.Option("-C", metavar="DIR", help="Run as if started in DIR.", show_default=False)
    ] = None,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if directory is not None:
        try:
            os.chdir(directory)
        except OSError as error:
            raise errors.UsageError(f"-C {directory}: {error.strerror}") from error


# -- init ------------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore init && git add .castore")
def init(
    path: Annotated[Path, typer.Argument(help="Where the project lives.", show_default="here")] = Path(),
    as_json: Json = False,
) -> None:
    """Make .castore/ with its settings; one that is there keeps all it has."""
    repo = castore.Repo.init(path)
    if as_json:
        _print_json({"root": str(repo.root)})
    else:
        print(f"{repo.root} is ready: commit it. It holds settings and, later, manifests; git ignores the data.")


# -- train -----------------------------------------------------------------------------------------------------------


def train(
    settings: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="TOML file with these options, such as n_layer = 4."),
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Tag for the checkpoints; may be repeated.")] = None,
    note: Annotated[str, typer.Option(help="Note for the checkpoints.", show_default=False)] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the session's summary as JSON; progress goes to standard error.")
    ] = False,
    **options: configs.Scalar,
) -> None:
    """Train nanecho for a session: resume from the best checkpoint, learn, save."""
    given = {name: value for name, value in options.items() if value is not None}
    from_file = configs.read_toml(_text(settings), str(settings)) if settings else {}
    config = configs.make({**from_file, **given})
    out = sys.stderr if as_json else sys.stdout
    repo = _open_or_init(lambda text: print(text, file=out, flush=True))
    now = datetime.now(UTC)
    with _stop_signals() as received:
        from nanecho.train import train as run_session  # torch takes seconds: after what can go wrong without it

        session = run_session(
            repo, config, started=manifest.timestamp(now), stop=lambda: received.name, tags=tag or (), note=note
        )
        summary = _follow(session, out)
    path = repo.add_session(config.run.run, now, msgspec.to_builtins(summary))
    if as_json:
        _print_json({**msgspec.to_builtins(summary), "path": str(path)})
    if received.name:
        sys.exit(128 + received.number)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with an option for each of nanecho's in place of its ``**options``."""
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    added = []
    for option in configs.options():
        flag = "--" + option.name.replace("_", "-")
        names = f"{flag}/--no-{flag[2:]}" if option.type is bool else flag
        shown = False if option.default is None else str(option.default).lower()
        info = typer.Option(names, help=option.help, rich_help_panel=option.group, show_default=shown)
        kind = option.type if configs.is_optional(option.type) else option.type | None
        added.append(
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info]
            )
        )
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in [*own, *added]} | {"return": None}
    return command


app.command(epilog="Example: castore train --resume best --data-dir books --session-iters 1000")(_with_options(train))


class _Received:
    """The signal that asked the session to end, if any."""

    number = 0

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else ""


@contextmanager
def _stop_signals() -> Iterator[_Received]:
    """Turn the first SIGTERM or SIGINT into a request, honoured after the step; a second one ends it."""
    received = _Received()

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if received.number:
            raise KeyboardInterrupt
        received.number = number
        # not print(): the signal may have come in the middle of one
        os.write(2, f"castore: {received.name}: finishing the step and saving; once more ends at once\n".encode())

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_or_init(say: Callable[[str], None]) -> castore.Repo:
    try:
        return castore.Repo.open()
    except errors.RepoNotFound:
        repo = castore.Repo.init(catalog.git_root(Path.cwd()) or Path.cwd())
        say(f"made {repo.root}: commit it now and then, git ignores the data")
        return repo


def _follow(session: Iterator[events.Event], out: Any) -> events.Summary:
    """Show a session's events until its summary: with a progress bar on a terminal, as plain lines elsewhere."""
    from nanecho import events

    bar = _Bar(out) if out.isatty() else None
    try:
        for event in session:
            match event:
                case events.Finished(summary):
                    break
                case events.Stepped() if bar:
                    bar.advance(event)
                    continue
                case events.Began() if bar:
                    bar.start(event.step, event.last)
            for text in describe(event):
                bar.print(text) if bar else print(text, file=out, flush=True)
    finally:
        if bar:
            bar.stop()
    for text in _describe_summary(summary):
        print(text, file=out, flush=True)
    return summary


class _Bar:
    def __init__(self, out: Any) -> None:
        from rich import console, progress

        self._progress = progress.Progress(
            progress.TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
            progress.BarColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=console.Console(file=out, highlight=False),
        )
        self._task = progress.TaskID(0)

    def start(self, step: int, last: int) -> None:
        if last > step:
            self._progress.start()
            self._task = self._progress.add_task("", total=last, completed=step, text="")

    def advance(self, event: events.Stepped) -> None:
        text = f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=event.step, text=text)

    def print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def stop(self) -> None:
        self._progress.stop()


def describe(event: events.Event) -> list[str]:
    """An event in words, as lines."""
    from nanecho import events

    match event:
        case events.Prepared(corpus, parameters, device):
            return [
                f"data    {corpus.name}: {_size(corpus.bytes)} in {sum(corpus.files)} files, "
                f"{corpus.files[1]} of them for validation; {corpus.tokenizer.name} tokenizer",
                f"model   {parameters:,} parameters on {device}",
            ]
        case events.Began():
            return _describe_begin(event)
        case events.Grew(step, density):
            return [f"grow    {density:.1%} of the connections are active after step {step:,}"]
        case events.Stepped(step, loss, rate, speed):
            return [f"step    {step:,}  loss {loss:.4f}  learning rate {rate:.2e}  {speed:,.0f} tokens/s"]
        case events.Evaluated(step, loss, accuracy):
            return [f"eval    {step:,}  validation loss {loss:.4f}  {accuracy:.1%} of tokens right"]
        case events.Saved(_, saved, reasons):
            return [f"saved   {saved.id[:12]}  {_size(saved.new_bytes)} new  ({', '.join(reasons)})"]
        case events.Skipped(step, reason):
            return [f"skipped a checkpoint at step {step:,}: {reason}"]
    return []


def _describe_begin(event: events.Began) -> list[str]:
    rejected = event.resolution.rejected if event.resolution else ()
    lines = [f"passed  {_describe_rejected(one)}" for one in rejected[:10]]
    if len(rejected) > 10:
        lines.append(f"passed  and {len(rejected) - 10} more: `castore resolve` lists them")
    if not event.match:
        return [*lines, f"fresh   starting at step 0: {event.fresh}"]
    loss = "" if event.val_loss is None else f", validation loss {event.val_loss:.4f}"
    want = event.resolution.want if event.resolution else ""
    lines.append(f"resume  {event.match.id[:12]}, step {event.step:,} of run {event.match.run}{loss} ({want[:12]})")
    lines += [f"differs {text}" for text in event.match.differences]
    if event.weights_only:
        lines.append("WARNING only the weights can be had: the optimizer starts anew, so the loss may jump")
    if event.later_step:
        lines.append(
            f"note    step {event.later_step:,} was reached, with a worse result: --resume latest goes on there"
        )
    return lines


def _describe_summary(summary: events.Summary) -> list[str]:
    was = "" if summary.start_loss is None else f"{summary.start_loss:.4f} -> "
    loss = "" if summary.final_loss is None else f"; validation loss {was}{summary.final_loss:.4f}"
    steps = f"step {summary.start_step:,} -> {summary.final_step:,} in {summary.seconds:.0f} s"
    speed = f"{summary.tokens_per_second:,.0f} tokens/s"
    lines = [f"done    {steps}{loss}; {speed}; {summary.connection_density:.1%} connected; {summary.stopped}"]
    if summary.stopped == "session-iters":
        lines.append("        run the same command again to go on from the best checkpoint")
    return lines


# -- looking ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore log --run main -n 5")
def log(
    run: Annotated[str | None, typer.Option(help="Only this run.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option("-n", "--limit", min=1, help="At most so many.")] = None,
    as_json: Json = False,
) -> None:
    """List the checkpoints, newest first."""
    repo = castore.Repo.open()
    listing = repo.catalog.listing()
    for broken in listing.broken:
        print(f"castore: {broken.path}: {broken.reason}", file=sys.stderr)
    entries = [entry for entry in listing.entries if run in (None, entry.manifest.run)][:limit]
    if as_json:
        _print_json([_entry_json(repo, entry) for entry in entries])
    elif not entries:
        print(f"no checkpoint of run {run}" if run else "no checkpoint yet: `castore train` makes the first one")
    else:
        now = datetime.now(UTC)
        heads = ("id", "run", "step", "score", "val loss", "data", "size", "age", "tags")
        _print_table(heads, [_log_row(repo, entry, now) for entry in entries])


def _log_row(repo: castore.Repo, entry: Entry, now: datetime) -> tuple[str, ...]:
    found = entry.manifest
    score = castore.score(found)
    loss = found.metrics.get("val_loss")
    return (
        entry.id[:12],
        found.run,
        f"{found.step:,}",
        "-" if score is None else f"{score:.4f}",
        "-" if loss is None else f"{loss:.4f}",
        resolve.availability(repo.part_states(entry)),
        _size(sum(part.stored_bytes for part in found.parts.values())),
        _age(now - datetime.fromisoformat(found.created)),
        " ".join(found.tags),
    )


def _entry_json(repo: castore.Repo, entry: Entry) -> dict[str, Any]:
    states = repo.part_states(entry)
    return {
        "id": entry.id,
        "run": entry.manifest.run,
        "step": entry.manifest.step,
        "created": entry.manifest.created,
        "parent": entry.manifest.parent,
        "score": castore.score(entry.manifest),
        "metrics": entry.manifest.metrics,
        "availability": resolve.availability(states),
        "tags": entry.manifest.tags,
        "note": entry.manifest.note,
        "parts": {
            name: {**msgspec.to_builtins(part), "where": states[name].where}
            for name, part in entry.manifest.parts.items()
        },
    }


@app.command(epilog="Example: castore show 3f2a91")
def show(
    wanted: Annotated[str, typer.Argument(metavar="ID", help="An id, or enough of its first digits.")],
    as_json: Json = False,
) -> None:
    """Show all that a checkpoint's manifest says, and where its data is."""
    repo = castore.Repo.open()
    entry = repo.find(wanted)
    found = entry.manifest
    rest = {"line": msgspec.to_builtins(found.line), "config": found.config, "info": found.info}
    if as_json:
        _print_json({**_entry_json(repo, entry), **rest})
        return
    states = repo.part_states(entry)
    score = castore.score(found)
    print(f"checkpoint {entry.id}")
    print(f"run        {found.run}, step {found.step:,}, {found.created}")
    print(f"parent     {found.parent or 'none'}")
    print(f"score      {'none' if score is None else f'{score:.6f}'}")
    for name, value in found.metrics.items():
        print(f"           {name} {value:.6g}")
    if found.tags or found.note:
        print(f"tags       {' '.join(found.tags)}  {found.note}")
    for name, part in found.parts.items():
        state = states[name]
        where = state.where if state.where != "missing" else f"missing: {state.reason}"
        print(f"part       {name}: {_size(part.bytes)}, {_size(part.stored_bytes)} stored, {where}")
    for name, section in rest.items():
        print(f"{name}\n{_indented(section)}")


@app.command("resolve", epilog="Example: castore resolve best --json")
def resolve_command(
    want: Annotated[str, typer.Argument(help="best, latest, or an id.")] = "best",
    parts: Annotated[
        list[str] | None, typer.Option("--part", help="Only this part must be there; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which checkpoint would be used, and why no other.

    Compared with what the newest checkpoint was trained on. `castore train` compares with its own options and data.
    """
    found = castore.Repo.open().resolve(want, parts=parts or None)
    if as_json:
        _print_json(dataclasses.asdict(found))
    for one in () if as_json else found.rejected:
        print(f"passed  {_describe_rejected(one)}")
    match = found.require()
    if not as_json:
        score = "no score" if match.score is None else f"score {match.score:.4f}"
        print(f"match   {match.id[:12]}, step {match.step:,} of run {match.run}, {score}, {match.availability}")
        for text in match.differences:
            print(f"differs {text}")


# -- words -----------------------------------------------------------------------------------------------------------


def _describe_rejected(one: castore.Rejected) -> str:
    return f"{one.id[:12]}, step {one.step:,} of run {one.run}: {'; '.join(one.reasons)}"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _indented(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "\n".join("  " + line.replace('"', "").rstrip(",") for line in text.splitlines()[1:-1])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _age(span: Any) -> str:
    seconds = max(0.0, span.total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UsageError(f"can't read {path}: {error}") from error


if __name__ == "__main__":
    main()
