"""The `castore` command: parse, call, render, exit code.

The one place that knows both packages, and where environment, clock and current directory enter. Torch is imported by
`train` alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from gc import set_threshold as set_gc_threshold
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO

import msgspec
import typer
from typer.core import TyperCommand

import castore
from castore import errors
from castore.text import format_age, format_number, format_size, printable
from nanecho import config as configs

if TYPE_CHECKING:
    from castore import diff, gc, stats, verify
    from castore.format.ids import ObjectId
    from castore.format.manifest import Entry
    from castore.github import sessions
    from castore.policy import retention
    from castore.remotes.github_cache import GitHubCache
    from castore.report.curves import Curve
    from castore.trees import checkout as checkouts
    from castore.trees.add import Added
    from nanecho import events

EXIT_CODES: tuple[tuple[type[castore.CastoreError], int], ...] = (
    (errors.UsageError, 2),
    (errors.NotFound, 3),
    (errors.DataMissing, 4),
    (errors.CorruptionError, 5),
    (errors.Locked, 6),
    (errors.NothingToDo, 7),
)


class GroupedHelp(TyperCommand):
    """Help in which options stand in the groups that they were given."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


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

WantedId = Annotated[
    str, typer.Argument(metavar="ID", help="First digits of an id, or best, latest, run:best or run:latest.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
_Kind = Literal["checkpoint", "dataset", "files", "all"]


def main() -> None:
    """Entry point of the installed program."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever called
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that can't show a character still shows the rest
    set_gc_threshold(100_000)  # a long history is many objects, none of them garbage: looking took 7 %
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


def fail(reason: str, code: int) -> NoReturn:
    """Say what is wrong and leave with the exit code."""
    say(*f"castore: {reason}".split("\n"), out=sys.stderr)
    sys.exit(code)


def say(*lines: str, out: TextIO | None = None) -> None:
    """Print lines for people. Whatever they quote, none of it reaches the terminal as anything but text."""
    if lines:
        print(*map(printable, lines), sep="\n", file=out, flush=True)


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
    """Make .castore/ with its settings.

    One that is there keeps all it has.
    """
    repo = castore.Repo.init(path)
    if as_json:
        _print_json({"root": str(repo.root)})
    else:
        say(f"{repo.root} is ready: commit it. It holds settings and, later, manifests; git ignores the data.")


# -- train -----------------------------------------------------------------------------------------------------------


def train(
    ctx: typer.Context,
    file: Annotated[
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
    """Train a session from the best checkpoint on, and save.

    What is trained is nanecho, a small GPT. A session that is stopped saves first.
    """
    given = {name: value for name, value in options.items() if _is_given(ctx, name)}
    config = configs.make({**(configs.read_toml(_text(file), str(file)) if file else {}), **given})
    for text in (note, *(tag or ())):
        if not text.isprintable():
            raise errors.UsageError(f"tags and notes are one line of text, unlike {printable(text)}")
    from castore.format import manifest

    out = sys.stderr if as_json else sys.stdout
    repo = _open_or_init(out)
    now = datetime.now(UTC)
    with _stop_signals() as received:
        from nanecho.train import train as run_session  # torch takes seconds: after what can go wrong without it

        session = run_session(
            repo, config, started=manifest.timestamp(now), stop=lambda: received.name, tags=tag or (), note=note
        )
        for summary in _follow(session, out, received):
            path = repo.add_session(config.run.run, now, msgspec.to_builtins(summary))
            if as_json:
                _print_json({**msgspec.to_builtins(summary), "path": str(path)})
    if received.number:
        sys.exit(128 + received.number)


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with an option for each of nanecho's in place of its ``**options``."""
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    added = []
    for option in configs.options():
        flag = "--" + option.name.replace("_", "-")
        names = f"{flag}/--no-{flag[2:]}" if option.type is bool else flag
        info = typer.Option(names, help=option.help, rich_help_panel=option.group)
        keyword = inspect.Parameter.KEYWORD_ONLY
        kind: Any = option.type
        added.append(inspect.Parameter(option.name, keyword, default=option.default, annotation=Annotated[kind, info]))
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in [*own, *added]} | {"return": None}
    return command


_EXAMPLE = "Example: castore train --resume best --data-dir books --session-iters 1000"
app.command(epilog=_EXAMPLE, cls=GroupedHelp)(_with_options(train))


class _Received:
    """The signal that asked the session to end, if any."""

    number = 0

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else ""


@contextmanager
def _stop_signals() -> Iterator[_Received]:
    """Turn the first signal to end into a request, honoured after the step; a second one ends at once."""
    received = _Received()

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if received.number:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
            os._exit(128 + number)  # not waiting for a save in the background: what it has not finished is not visible
        received.number = number
        # not say(): the signal may have come in the middle of one
        os.write(2, f"castore: {received.name}: finishing the step and saving; once more ends at once\n".encode())

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_or_init(out: TextIO) -> castore.Repo:
    try:
        repo = castore.Repo.open()
    except errors.RepoNotFound:
        from castore.storage import git

        repo = castore.Repo.init(git.root(Path.cwd()) or Path.cwd())
        say(f"made    {repo.root}: commit it now and then, git ignores the data", out=out)
    else:
        say(f"store   {repo.root}", out=out)
    return repo


def _follow(session: Iterator[events.Event], out: TextIO, received: _Received) -> Iterator[events.Summary]:
    """Show a session's events and yield its summary: with a progress bar on a terminal, as plain lines elsewhere."""
    from nanecho import events, report

    bar = _Bar(out) if out.isatty() else None
    try:
        for event in session:
            if isinstance(event, events.Finished | events.Failed):
                yield event.summary
                lines = report.describe_summary(event.summary) if isinstance(event, events.Finished) else []
            else:
                lines = report.describe(event)
            try:
                if bar:
                    bar.show(event, lines)
                else:
                    say(*lines, out=out)
            except BrokenPipeError:
                # nobody reads on (`castore train | head`): save what was trained and end
                received.number = signal.SIGPIPE
                bar, out = None, open(os.devnull, "w")  # noqa: SIM115
    finally:
        if bar:
            bar.stop()


class _Bar:
    """A progress bar below the lines that a session prints."""

    def __init__(self, out: TextIO) -> None:
        from rich import console, progress

        self._progress = progress.Progress(
            progress.TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
            progress.BarColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=console.Console(file=out, highlight=False),
        )
        self._task = progress.TaskID(0)

    def show(self, event: events.Event, lines: Sequence[str]) -> None:
        from nanecho import events

        if isinstance(event, events.Stepped):
            text = f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s"
            self._progress.update(self._task, completed=event.step, text=text)
            return
        if isinstance(event, events.Finished):
            self.stop()
        for line in lines:
            self._progress.console.print(printable(line), markup=False, emoji=False, soft_wrap=True)
        if isinstance(event, events.Began) and event.last > event.step:
            self._progress.start()
            self._task = self._progress.add_task("", total=event.last, completed=event.step, text="")

    def stop(self) -> None:
        self._progress.stop()


@app.command(epilog="Example: castore demo --quick")
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds and three short sessions.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the curves there, .svg or .png.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what going on from the best is worth.

    Trains a small model in sessions of their own processes on emptied machines, with a folder as the remote between
    them; beside that with a fresh start every session, and without a break. It says whatever comes out, and leaves
    nothing behind. A few minutes on two processors.
    """
    import tempfile

    from nanecho import demo as demonstration

    if picture is not None and not picture.absolute().parent.is_dir():
        raise errors.UsageError(f"--picture {picture}: there is no such folder")
    size = demonstration.QUICK if quick else demonstration.FULL
    program = [sys.executable, str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory(prefix="castore-demo-") as folder, _count("sessions") as counter:
        for one in demonstration.run(Path(folder).resolve(), program, size, castore.processors()):
            if isinstance(one, demonstration.Progress):
                counter(one.done, one.total)
            else:
                result = one
    names = zip(demonstration.LIVES, ("resumed", "fresh start", "never stopped"), strict=True)
    curves = [_life_curve(name, demonstration.curve(result.of(life))) for life, name in names]
    if picture is not None:
        from castore.report import curves as drawing

        drawing.picture(curves, picture, x_label="steps of compute", y_label="validation loss")
    if as_json:
        _print_json(result)
        return
    say(*demonstration.describe(result))
    try:
        _say_curves(curves, "steps of compute", "validation loss")
    except errors.PackageMissing as error:
        say(f"no curves: {error}")


def _life_curve(name: str, points: Sequence[tuple[int, float, float]]) -> Curve:
    from castore.report.curves import Curve

    return Curve(
        name, [step for step, _, _ in points], [mean for _, mean, _ in points], [half for _, _, half in points]
    )


@contextmanager
def _count(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how many of how many are done: a bar on a terminal, and elsewhere a line for each on standard error."""
    if not sys.stderr.isatty():
        yield lambda done, total: say(f"{done} of {total} {what}", out=sys.stderr)
        return
    from rich import console, progress

    columns = (progress.TextColumn(what), progress.BarColumn(), progress.MofNCompleteColumn())
    with progress.Progress(*columns, progress.TimeElapsedColumn(), console=console.Console(file=sys.stderr)) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


# -- looking ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore log --run main -n 5")
def log(
    run: Annotated[str | None, typer.Option(help="Only this run.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option("-n", "--limit", min=1, help="At most so many.")] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Draw which was resumed from which.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the validation loss of each run.")] = False,
    kind: Annotated[_Kind, typer.Option(help="Prepared data and added files are listed on request.")] = "checkpoint",
    as_json: Json = False,
) -> None:
    """List the checkpoints, newest first.

    With --graph, children stand above what they were resumed from.
    """
    if graph and plot:
        raise errors.UsageError("--graph and --plot are two drawings: choose one")
    repo = castore.Repo.open()
    listing = repo.catalog.listing()
    for broken in listing.broken:
        say(f"castore: {broken.path}: {broken.reason}", out=sys.stderr)
    entries = [
        entry for entry in listing.entries if run in (None, entry.manifest.run) and kind in ("all", entry.manifest.kind)
    ][:limit]
    if as_json:
        _print_json([_entry_json(repo, entry) for entry in entries])
    elif not entries and kind != "checkpoint":
        say(f"no manifest of kind {kind}{f' of run {run}' if run else ''} yet")
    elif not entries:
        say(f"no checkpoint of run {run}" if run else "no checkpoint yet: `castore train` makes the first one")
    elif graph:
        from castore.policy import lineage

        known = {entry.id for entry in entries}
        for lines, entry in lineage.draw(entries):
            say(f"{lines} {_graph_text(repo, entry, known)}" if entry else lines)
    elif plot:
        _say_curves(_loss_curves(entries), "step", "validation loss")
    else:
        now = datetime.now(UTC)
        heads = ("id", "run", "step", "score", "val loss", "data", "size", "age", "tags")
        _print_table(heads, [_log_row(repo, entry, now) for entry in entries])


def _loss_curves(entries: Sequence[Entry]) -> list[Curve]:
    """The validation loss of each run, the one with the newest checkpoint first."""
    from castore.report.curves import Curve

    runs: dict[str, dict[int, float]] = {}
    for entry in entries:
        if "val_loss" in entry.manifest.metrics:
            # of several at one step the newest counts
            runs.setdefault(entry.manifest.run, {}).setdefault(entry.manifest.step, entry.manifest.metrics["val_loss"])
    if not runs:
        raise errors.NotFound("no checkpoint here has a validation loss")
    return [Curve(run, sorted(points), [points[step] for step in sorted(points)]) for run, points in runs.items()]


def _say_curves(curves: Sequence[Curve], x_label: str, y_label: str) -> None:
    from castore.report import curves as drawing

    terminal = shutil.get_terminal_size()
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    lines = drawing.draw(
        curves,
        width=max(40, min(terminal.columns, 110)),
        height=max(12, min(terminal.lines - 4, 24)),
        x_label=x_label,
        y_label=y_label,
        colour=colour,
    )
    print(*lines, sep="\n", flush=True)


def _log_row(repo: castore.Repo, entry: Entry, now: datetime) -> tuple[str, ...]:
    from castore.policy.resolution import availability

    found = entry.manifest
    score = castore.score(found)
    loss = found.metrics.get("val_loss")
    return (
        entry.id[:12],
        found.run,
        f"{found.step:,}",
        format_number(score),
        format_number(loss),
        availability(repo.part_states(entry)),
        format_size(sum(part.stored_bytes for part in found.parts.values())),
        format_age(now - datetime.fromisoformat(found.created)),
        " ".join(found.tags),
    )


def _graph_text(repo: castore.Repo, entry: Entry, known: Container[str]) -> str:
    from castore.policy.resolution import availability

    found = entry.manifest
    parent = "" if found.parent is None or found.parent in known else f"from {found.parent[:12]}, which isn't listed"
    loss = f"val loss {format_number(found.metrics['val_loss'])}" if "val_loss" in found.metrics else ""
    state = availability(repo.part_states(entry))
    told = (f"{found.run}, step {found.step:,}", loss, state, " ".join(found.tags), parent)
    return "  ".join((entry.id[:12], *filter(None, told)))


def _entry_json(repo: castore.Repo, entry: Entry) -> dict[str, Any]:
    from castore.policy.resolution import availability

    states = repo.part_states(entry)
    return {
        "id": entry.id,
        "kind": entry.manifest.kind,
        "run": entry.manifest.run,
        "step": entry.manifest.step,
        "created": entry.manifest.created,
        "parent": entry.manifest.parent,
        "score": castore.score(entry.manifest),
        "metrics": entry.manifest.metrics,
        "availability": availability(states),
        "tags": entry.manifest.tags,
        "note": entry.manifest.note,
        "parts": {
            name: {**msgspec.to_builtins(part), "where": states[name].where}
            for name, part in entry.manifest.parts.items()
        },
    }


@app.command(epilog="Example: castore show 3f2a91")
def show(
    wanted: WantedId,
    as_json: Json = False,
) -> None:
    """Show all that is known of a checkpoint."""
    repo = castore.Repo.open()
    entry = repo.find(wanted)
    found = entry.manifest
    rest = {"experiment": msgspec.to_builtins(found.experiment), "config": found.config, "info": found.info}
    if as_json:
        _print_json({**_entry_json(repo, entry), **rest})
        return
    states = repo.part_states(entry)
    score = castore.score(found)
    say(f"{found.kind:10} {entry.id}")
    say(f"run        {found.run}, step {found.step:,}, {found.created}")
    say(f"parent     {found.parent or 'none'}")
    say(f"score      {'none' if score is None else f'{score:.6f}'}")
    for name, value in found.metrics.items():
        say(f"           {name} {value:.6g}")
    if found.tags or found.note:
        say(f"tags       {' '.join(found.tags)}  {found.note}")
    for name, part in found.parts.items():
        state = states[name]
        where = state.where if state.where != "missing" else f"missing: {state.reason}"
        say(f"part       {name}: {format_size(part.bytes)}, {format_size(part.stored_bytes)} stored, {where}")
    for name, section in rest.items():
        say(name, *_outline(section))


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

    found = castore.Repo.open().resolve(want, parts=parts or None, weights_only=not parts)
    if as_json:
        _print_json(dataclasses.asdict(found))
    for damaged in found.damaged:
        say(f"castore: {damaged.path}: {damaged.reason}", out=sys.stderr)
    match = found.require()
    for text in () if as_json else found.explain_rejections():
        say(f"no      {text}")
    if not as_json:
        score = "no score" if match.score is None else f"score {match.score:.4f}"
        say(f"match   {match.id[:12]}, step {match.step:,} of run {match.run}, {score}, {match.availability}")
        for text in match.differences:
            say(f"differs {text}")


# -- keeping the store small ------------------------------------------------------------------------------------------


@app.command("gc", epilog="Example: castore gc --keep 10 --dry-run")
def gc_command(
    keep: Annotated[
        int | None, typer.Option(min=0, help="Of each experiment, the best so many.", show_default=False)
    ] = None,
    keep_latest: Annotated[
        int | None, typer.Option(min=0, help="The newest so many beside them.", show_default=False)
    ] = None,
    keep_optimizer: Annotated[
        int | None, typer.Option(min=0, help="The newest so many with all that resuming needs.", show_default=False)
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Then the worst go until 20GB, say, is enough.", show_default=False),
    ] = None,
    grace: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="What no manifest needs stays for 1d, say.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Delete the data that no kept checkpoint needs. Manifests stay.

    What isn't given is as in config.toml. Checkpoints are kept by score in their experiment; all of the work tree, the
    git index, every branch, tag and stash, linked worktrees and pins count. When one of those can't be read, nothing
    goes.
    """
    from castore import config as settings
    from castore import gc

    repo = castore.Repo.open()
    given = {"keep": keep, "keep_latest": keep_latest, "keep_optimizer": keep_optimizer}
    policy = _policy(repo, given, max_size)
    try:
        period = settings.parse_duration(grace) if grace is not None else None
    except ValueError as error:
        raise errors.UsageError(str(error)) from error
    found = gc.collect_garbage(repo, policy, grace=period, dry_run=dry_run)
    if as_json:
        _print_json(_gc_json(found, dry_run))
        return
    for decision in found.decisions:
        goes = " and ".join(found.goes(decision))
        if decision.parts:
            say(f"keep    {_describe_decision(decision)}{f'; its {goes} part goes' if goes else ''}")
        elif goes:
            say(f"drop    {_describe_decision(decision)}")
    history = sum(not decision.parts and not found.goes(decision) for decision in found.decisions)
    if history:
        say(f"history {history} more, whose data had gone before")
    if found.young:
        say(f"wait    {found.young} objects that no manifest refers to, too new to go")
    verb = "would go" if dry_run else "deleted"
    freed, kept = format_size(found.freed_bytes), format_size(found.kept_bytes)
    say(f"gc      {len(found.delete)} objects, {freed} {verb}; {kept} kept")


def _policy(repo: castore.Repo, given: Mapping[str, int | None], max_size: str | None) -> retention.Policy:
    """That of config.toml, with what was given in its place."""
    from castore import config as settings

    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        if max_size is not None:
            changes["max_size"] = settings.parse_size(max_size) or None
    except ValueError as error:
        raise errors.UsageError(str(error)) from error
    return dataclasses.replace(repo.policy, **changes)


def _describe_decision(decision: retention.Decision) -> str:
    found = decision.entry.manifest
    parts = f", {' '.join(decision.parts)}" if decision.parts else ""
    return f"{decision.entry.id[:12]}, step {found.step:,} of {found.run}{parts}: {', '.join(decision.reasons)}"


def _gc_json(found: gc.GCPlan, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "deleted": sorted(found.delete),
        "freed_bytes": found.freed_bytes,
        "kept_bytes": found.kept_bytes,
        "young": found.young,
        "checkpoints": [
            {
                "id": decision.entry.id,
                "kind": decision.entry.manifest.kind,
                "run": decision.entry.manifest.run,
                "step": decision.entry.manifest.step,
                "keep": list(decision.parts),
                "reasons": list(decision.reasons),
            }
            for decision in found.decisions
        ],
    }


@app.command(epilog="Example: castore pin best")
def pin(wanted: WantedId, as_json: Json = False) -> None:
    """Keep a checkpoint, whole, whatever the policy says. Commit the pin: in any branch it counts."""
    repo = castore.Repo.open()
    entry = repo.find(wanted)
    path = repo.catalog.pin(entry.id)
    _print_json({"id": entry.id, "path": str(path)}) if as_json else say(f"pinned {entry.id[:12]}: commit {path}")


@app.command(epilog="Example: castore unpin 3f2a91")
def unpin(wanted: WantedId, as_json: Json = False) -> None:
    """Take a pin back. A pin in another branch still counts."""
    repo = castore.Repo.open()
    own = _pin_or_id(repo, wanted)
    if not repo.catalog.unpin(own):
        raise errors.NotFound(f"{own[:12]} isn't pinned in the work tree")
    _print_json({"id": own}) if as_json else say(f"unpinned {own[:12]}")


def _pin_or_id(repo: castore.Repo, wanted: str) -> ObjectId:
    """What ``wanted`` names among the manifests, or else among the pins: one may outlive its manifest."""
    try:
        return repo.find(wanted).id
    except (errors.UnknownId, errors.CorruptionError):
        pins = sorted(own for own in repo.catalog.pins() if wanted and own.startswith(wanted.lower()))
        if not pins:
            raise
        if len(pins) > 1:
            raise errors.AmbiguousId(wanted, pins) from None
        return pins[0]


@app.command(epilog="Example: castore forget 3f2a91")
def forget(
    wanted: WantedId,
    force: Annotated[bool, typer.Option("--force", help="Even if it was never committed, and is lost then.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a manifest, so that gc may delete its data.

    In git it is history: commit the removal. Until then the index and every branch that has it still count.
    """
    from castore.storage import git

    repo = castore.Repo.open()
    entry = repo.find(wanted)
    if entry.id in repo.catalog.pins():
        raise errors.UsageError(f"{entry.id[:12]} is pinned: `castore unpin {entry.id[:12]}` first")
    if not force and not git.is_committed(repo.catalog.root / entry.manifest.file_name(entry.id)):
        raise errors.UsageError(f"{entry.id[:12]} isn't in git's last commit: commit it, or lose it with --force")
    path = repo.catalog.forget(entry)
    _print_json({"path": str(path)}) if as_json else say(
        f"removed {path}: commit that, and `castore gc` deletes its data"
    )


# -- checking --------------------------------------------------------------------------------------------------------


@app.command("verify", epilog="Example: castore verify --repair")
def verify_command(
    wanted: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Only what these need, all of it.", show_default="everything"),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Quarantine what is damaged and fetch it again from a remote.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read all that is stored again, and check it.

    Exits with 5 when something is wrong that wasn't repaired. Files that merely lie among the objects are told too,
    but they harm nothing: they don't count. Without --repair nothing is moved or changed.
    """
    from castore import verify

    repo = castore.Repo.open()
    with _meter("verify") as meter:
        findings = list(verify.verify(repo, wanted, repair=repair, progress=meter.show))
    wrong = sum(not one.is_harmless for one in findings)
    if as_json:
        _print_json({"ok": not wrong, "bytes": meter.done, "findings": [_finding_json(one) for one in findings]})
    else:
        for one in findings:
            say(*_describe_finding(one))
        told = (
            f"{len(findings)} finding{'' if len(findings) == 1 else 's'}, {wrong} to be mended"
            if findings
            else "all is well"
        )
        say(f"verify  {format_size(meter.done)} read: {told}")
    if wrong:
        sys.exit(5)


def _finding_json(one: verify.Finding) -> dict[str, Any]:
    found = dataclasses.asdict(one)
    return {**found, "path": str(one.path), "harmless": one.is_harmless}


def _describe_finding(one: verify.Finding) -> Iterator[str]:
    what = f"object {one.object_id[:12]}" if one.object_id else str(one.path)
    yield f"{one.kind:7} {what}: {one.reason}"
    if one.needed_by:
        shown = ", ".join(f"{need.part} of {need.manifest[:12]}" for need in one.needed_by[:4])
        more = len(one.needed_by) - 4
        yield f"        needed by {shown}{f' and {more} more' if more > 0 else ''}"
    if one.repaired_from:
        yield f"        repaired: a good copy came from {one.repaired_from}"


class _Meter:
    """Shows how far a task is, in bytes: on standard error, if that is a terminal and the task takes long."""

    def __init__(self, text: str) -> None:
        self.done = 0
        self._text = text
        self._began = time.monotonic()
        self._bar: Any = None

    def show(self, done: int, total: int) -> None:
        self.done = done
        if self._bar is None and sys.stderr.isatty() and time.monotonic() - self._began > 2:
            self._start(total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _start(self, total: int) -> None:
        from rich import console, progress

        self._bar = progress.Progress(
            progress.TextColumn(self._text),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            console=console.Console(file=sys.stderr),
            redirect_stdout=False,  # what is printed may go to a file
            redirect_stderr=False,
        )
        self._bar.add_task("", total=total)
        self._bar.start()


@contextmanager
def _meter(text: str) -> Iterator[_Meter]:
    meter = _Meter(text)
    try:
        yield meter
    finally:
        meter.stop()


@app.command("stats", epilog="Example: castore stats --json")
def stats_command(as_json: Json = False) -> None:
    """Say what is stored, what it takes, and what gc would free.

    Raw is what plain copies would take. What several parts or runs share counts in each of them.
    """
    from castore import stats

    found = stats.stats(castore.Repo.open(), datetime.now(UTC))
    if as_json:
        _print_json(_stats_json(found))
        return
    total = found.total
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.manifests.items())) or "none"
    states = ", ".join(f"{count} {state}" for state, count in sorted(found.availability.items()))
    say(f"manifests   {kinds}{f'; checkpoints: {states}' if states else ''}")
    say(f"raw         {format_size(total.raw)} in {total.parts} parts")
    say(f"sharing     saves {format_size(total.saved_by_sharing)}")
    say(f"compression saves {format_size(total.saved_by_compression)}")
    say(f"stored      {format_size(total.stored)}, and {format_size(found.unneeded)} that no manifest here needs")
    gc = found.gc
    freed = gc.problem or f"would delete {gc.objects} objects, {format_size(gc.bytes)}"
    say(f"gc          {freed}")
    for name, folder in found.folders.items():
        say(f"{name + '/':11} {folder.files} files, {format_size(folder.bytes)}")
    for head, groups in (("part", found.by_part), ("run", found.by_run)):
        if groups:
            say("")
            _print_table((head, "count", "raw", "stored", "sharing", "compression"), [
                (name, str(one.parts), *map(format_size, (one.raw, one.stored, one.saved_by_sharing,
                 one.saved_by_compression)))
                for name, one in sorted(groups.items())
            ])  # fmt: skip


def _stats_json(found: stats.Stats) -> dict[str, Any]:
    groups: dict[str, Any] = {
        name: {group: _usage_json(one) for group, one in getattr(found, name).items()} for name in ("by_part", "by_run")
    }
    return {
        **dataclasses.asdict(found),
        **groups,
        "total": _usage_json(found.total),
        "unneeded": found.unneeded,
    }


def _usage_json(one: stats.Usage) -> dict[str, int]:
    saved = {"saved_by_sharing": one.saved_by_sharing, "saved_by_compression": one.saved_by_compression}
    return {**dataclasses.asdict(one), **saved}


@app.command("diff", epilog="Example: castore diff main:best main:latest")
def diff_command(
    before: Annotated[str, typer.Argument(metavar="A", help="An id, as `castore show` takes it.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    as_json: Json = False,
) -> None:
    """Compare two checkpoints: settings, metrics, tensors.

    The change of a tensor is the largest difference of two elements, relative to the largest magnitude in either.
    Parts whose data was dropped can't be compared, which is said. Tensors in equal chunks are equal without reading.
    """
    from castore import diff

    repo = castore.Repo.open()
    found = diff.diff(repo, repo.find(before), repo.find(after))
    if as_json:
        _print_json(_diff_json(found))
        return
    for section in ("identity", "config", "experiment", "metrics"):
        prefix = "" if section == "identity" else f"{section}."
        say(*(prefix + _describe_value(one) for one in getattr(found, section)))
    for part in found.parts:
        say(*_describe_part(part))


def _describe_part(part: diff.Part) -> Iterator[str]:
    if part.problem:
        yield f"{part.name}: can't be compared: {part.problem}"
        return
    counts = [(state, sum(one.state == state for one in part.tensors)) for state in ("equal", "changed", "added")]
    counts.append(("removed", sum(one.state == "removed" for one in part.tensors)))
    told = ", ".join(f"{count} {state}" for state, count in counts if count)
    yield f"{part.name}: {part.state}{f' (tensors: {told})' if told else ''}"
    for one in part.tensors:
        if one.state == "changed" and one.before == one.after:
            yield f"  changed {one.key}  {one.before}  {_describe_change(one.change)}"
        elif one.state != "equal":
            yield f"  {one.state:7} {one.key}  {' -> '.join(filter(None, (one.before, one.after)))}"
    for value in part.values:
        yield f"  {_describe_value(value)}"


def _describe_change(change: float | None) -> str:
    if change is None:
        return "not finite, or no numbers"
    return f"by at most {change:.3g}" if change else "by nothing that counts, such as the sign of a zero"


def _describe_value(one: diff.Value) -> str:
    before, after = (_shortened(value, 80) for value in (one.before, one.after))
    return f"{one.key or 'the whole'}: {before} -> {after}"


def _shortened(value: Any, limit: int) -> str:
    from castore import diff

    if isinstance(value, diff.Absent):
        return "absent"
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, str | bytes):
        value = value[: limit + 1]
    elif isinstance(value, int) and value.bit_length() > 4096:  # Python refuses to print it
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _diff_json(found: diff.Difference) -> dict[str, Any]:
    sections: dict[str, Any] = {
        name: [_value_json(one) for one in getattr(found, name)]
        for name in ("identity", "config", "experiment", "metrics")
    }
    parts = {
        part.name: {
            "state": part.state,
            "problem": part.problem,
            "tensors": [dataclasses.asdict(one) for one in part.tensors],
            "values": [_value_json(one) for one in part.values],
        }
        for part in found.parts
    }
    return {**sections, "parts": parts}


def _value_json(one: diff.Value) -> dict[str, Any]:
    """JSON's own values as they are, others as Python writes them; a side that has none is left out."""
    from castore import diff

    found: dict[str, Any] = {"key": one.key}
    for side, value in (("before", one.before), ("after", one.after)):
        is_json = value is None or isinstance(value, str | bool) or (type(value) is int and abs(value) < 2**63)
        is_json = is_json or (isinstance(value, float) and math.isfinite(value))
        if not isinstance(value, diff.Absent):
            found[side] = value if is_json else _shortened(value, 1000)
    return found


@app.command("doctor", epilog="Example: castore doctor")
def doctor_command(as_json: Json = False) -> None:
    """Look the repository over, and say what to do.

    Says what to do about whatever isn't ok. Exits with 1 when there is a problem; warnings alone are none.
    """
    from castore import doctor

    checks = list(doctor.examine(datetime.now(UTC)))
    problems = sum(check.level == "problem" for check in checks)
    if as_json:
        _print_json({"ok": not problems, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        for check in checks:
            say(f"{check.level:8}{check.subject}: {check.text}")
            if check.level != "ok":
                say(f"        {check.advice}")
    if problems:
        sys.exit(1)


# -- in GitHub Actions -------------------------------------------------------------------------------------------------

ci_app = typer.Typer(
    help="Hand progress on from one job of GitHub Actions to the next, by way of its cache.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(ci_app, name="ci")


@ci_app.command("restore", epilog="Example: castore ci restore --resume best")
def ci_restore(
    resume: Annotated[
        str, typer.Option(metavar="WHAT", help="best, latest, an id, RUN:best, RUN:latest or none.")
    ] = "best",
    allow_fresh: Annotated[
        bool, typer.Option("--allow-fresh", help="No error when there are checkpoints and none can be had.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch what the next session begins with.

    It runs inside an action, as GitHub gives access to the cache to no other step: `uses: OWNER/castore@v1` with
    `mode: restore`. What it did is also told in the job's summary.
    """

    with _job("restore") as (repo, remote, sessions), _meter("restore") as meter:
        found = sessions.restore(repo, remote, resume, allow_fresh=allow_fresh, progress=meter.show)
    match = found.match
    from castore.github import summary

    _append("GITHUB_STEP_SUMMARY", summary.restored_markdown(found))
    _append_outputs(
        {
            "match": match.id if match else "",
            "run": match.run if match else "",
            "step": match.step if match else 0,
            "fresh": json.dumps(match is None),
            "downloaded-bytes": found.traffic.downloaded,
        }
    )
    if as_json:
        _print_json({**_fields(found), "further": [entry.id for entry in found.further]})
        return
    for damaged in found.resolution.damaged if found.resolution else ():
        say(f"castore: {damaged.path}: {damaged.reason}", out=sys.stderr)
    for text in found.resolution.explain_rejections() if found.resolution else ():
        say(f"no      {text}")
    if match:
        score = "no score" if match.score is None else f"score {match.score:.4f}"
        say(f"match   {match.id[:12]}, step {match.step:,} of run {match.run}, {score}, {match.availability}")
    else:
        say(f"fresh   {found.fresh}")
    for further in found.further:
        step = further.manifest.step
        say(f"also    {further.id[:12]}, step {step:,}: a session from the match was trained to there before")
    for name, error in found.remote_errors.items():
        say(f"WARNING remote {name} was passed over: {error}")
    say(f"moved   {_describe_traffic(found.traffic)}")


@ci_app.command("save", epilog="Example: castore ci save --keep 10 --commit")
def ci_save(
    keep: Annotated[int | None, typer.Option(min=0, help="As in `castore gc`.", show_default=False)] = None,
    keep_optimizer: Annotated[int | None, typer.Option(min=0, help="As in `castore gc`.", show_default=False)] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="As in `castore gc`.", show_default=False)
    ] = None,
    commit: Annotated[bool, typer.Option("--commit", help="Commit what is staged, and push the branch.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.", show_default="run, step and loss")] = "",
    as_json: Json = False,
) -> None:
    """Upload what the next session needs, and tell git of it.

    Collects garbage, uploads what the cache lacks of the checkpoints that are kept as one bundle, and stages manifests
    and the record of the bundle once a look-up has confirmed it.
    """
    with _job("save") as (repo, remote, sessions), _meter("save") as meter:
        given = {"keep": keep, "keep_optimizer": keep_optimizer}
        policy = _policy(repo, given, max_size)
        ref = os.environ.get("GITHUB_REF", "")
        found = sessions.save(repo, remote, policy, commit=commit, message=message, ref=ref, progress=meter.show)
    from castore.github import summary

    _append("GITHUB_STEP_SUMMARY", summary.saved_markdown(found))
    _append_outputs(
        {
            "bundle": found.records[0].bundle if found.records else "",
            "uploaded-bytes": found.traffic.uploaded,
            "commit": found.commit or "",
        }
    )
    if as_json:
        _print_json({name: value for name, value in _fields(found).items() if name != "plan"})
    elif found.skipped:
        say(f"skipped {found.skipped}: nothing was saved")
    else:
        _say_handed_on(found)
    if found.left_out:
        sys.exit(5)


def _say_handed_on(found: sessions.SavedSession) -> None:
    if session := found.session:
        steps = f"step {session.start_step:,} -> {session.final_step:,}"
        losses = f"{format_number(session.start_loss)} -> {format_number(session.final_loss)}"
        say(f"session {session.run}: {steps}, validation loss {losses}, {session.checkpoints} checkpoints")
    if found.records:
        record = found.records[0]
        say(f"bundle  {record.bundle[:12]}: {record.objects} objects, {format_size(record.bytes)}; confirmed")
    else:
        say("bundle  none: the cache has all that is kept")
    for own, reason in found.left_out:
        say(f"WARNING {own[:12]} was left out: {reason}")
    if found.not_collected:
        say(f"WARNING no garbage was collected: {found.not_collected}")
    told = f"pushed as {found.commit[:12]}" if found.commit else "staged"
    say(f"git     {len(found.files)} files, {told}")
    say(f"moved   {_describe_traffic(found.traffic)}")


def _describe_traffic(traffic: sessions.Traffic) -> str:
    up, down = format_size(traffic.uploaded), format_size(traffic.downloaded)
    return f"{up} up, {down} down, {traffic.requests} requests to the cache"


@contextmanager
def _job(what: str) -> Iterator[tuple[castore.Repo, GitHubCache, Any]]:
    """The repository, with the cache of this job; an error is told in the job's summary, too."""
    from castore.github import sessions, summary
    from castore.remotes.github_service import CacheService

    service = CacheService.of_job(os.environ)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once, without waiting for the network: the store survives it
    try:
        repo = castore.Repo.open()
        remote, broken = sessions.connect(repo, service)
        for one in broken:
            say(f"castore: {one.path}: {one.reason}", out=sys.stderr)
        yield repo, remote, sessions
    except castore.CastoreError as error:
        _append("GITHUB_STEP_SUMMARY", summary.failed_markdown(f"{what}: {error}"))
        raise


def _append(variable: str, text: str) -> None:
    """Add to the file that a variable of the job names. It is only told of what was done: no reason to fail."""
    path = os.environ.get(variable)
    if path:
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            say(f"castore: can't write {variable}: {error.strerror}", out=sys.stderr)


def _append_outputs(values: Mapping[str, object]) -> None:
    _append("GITHUB_OUTPUT", "".join(f"{name}={value}\n" for name, value in values.items()))


# -- exchange with other programs ------------------------------------------------------------------------------------


@app.command(epilog="Example: castore export best model.safetensors")
def export(
    wanted: WantedId,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new file: .safetensors, or .pt for torch.load.")],
    part: Annotated[str, typer.Option(help="Which part of the checkpoint.")] = "model",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint's weights to a file for other programs."""
    from castore import convert

    repo = castore.Repo.open()
    with _busy("exporting"):
        found = convert.export(repo, wanted, out, part=part, force=force)
    if as_json:
        _print_json({**dataclasses.asdict(found), "path": str(found.path)})
    else:
        say(f"wrote {found.path}: {found.tensors} tensors, {format_size(found.bytes)}, of checkpoint {found.id[:12]}")


@app.command("import", epilog="Example: castore import model.safetensors --run imported --metric val_loss=2.3")
def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors, or a .pt or .pth of weights alone.")],
    run: Annotated[str | None, typer.Option(help="Its run.", show_default="imported")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Training steps behind it.", show_default="0")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="What was measured; may be repeated.")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Take experiment, settings, run and step of this one.", show_default=False),
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Tag; may be repeated.")] = None,
    note: Annotated[str, typer.Option(help="Note.", show_default=False)] = "",
    as_json: Json = False,
) -> None:
    """Store a file's tensors as a new checkpoint. No code in the file is run.

    With --like it can be compared with that checkpoint, and resumed in its place: say so only if it is so.
    """
    from castore import convert

    repo = castore.Repo.open()
    metrics = dict(_metric(text) for text in metric or ())
    _check_line(note, *(tag or ()))
    with _busy("importing"):
        saved = convert.import_file(
            repo, file, run=run, step=step, metrics=metrics, like=like, tags=tag or (), note=note
        )
    if as_json:
        _print_json({"id": saved.id, "path": str(saved.path), "new_bytes": saved.new_bytes})
    else:
        new = format_size(saved.new_bytes)
        say(f"saved {saved.id}: step {saved.manifest.step:,} of run {saved.manifest.run}, {new} new")


def _metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        if name:
            return name, float(value)
    except ValueError:
        pass
    raise errors.UsageError(f"--metric {text} is not NAME=VALUE, such as val_loss=2.3")


@app.command(epilog="Example: castore add data/books --name books")
def add(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file, or a folder with all that is in it.")],
    name: Annotated[str | None, typer.Option(help="Name to list it under.", show_default="that of the path")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Tag; may be repeated.")] = None,
    note: Annotated[str, typer.Option(help="Note.", show_default=False)] = "",
    as_json: Json = False,
) -> None:
    """Store any file or folder. What is stored already takes no room: an edit costs a chunk or two.

    Names, permissions, links and empty folders are kept. Folders called .git and .castore are passed over.
    """
    from castore.trees.add import add_tree

    repo = castore.Repo.open()
    _check_line(note, *(tag or ()))
    with _meter("add") as meter:
        found = add_tree(repo, path, name=name, tags=tag or (), note=note, progress=meter.show)
    if as_json:
        shown = {name: value for name, value in _fields(found).items() if name != "manifest"}
        _print_json({**shown, "path": str(found.path), "name": found.manifest.run})
        return
    for one in found.skipped:
        say(f"passed  {one}, which is never checked out")
    say(f"added   {found.id[:12]}, {found.manifest.run}: {_contents(found)}, {format_size(found.new_bytes)} new")


@app.command(epilog="Example: castore checkout books:latest data")
def checkout(
    wanted: Annotated[
        str, typer.Argument(metavar="ID", help="First digits of the id of what was added, or latest, or NAME:latest.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to put it.", show_default="here")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Write added files back, every byte verified."""
    from castore.trees import checkout as checkouts

    repo = castore.Repo.open()
    with _meter("checkout") as meter:
        found = checkouts.check_out(repo, wanted, folder, force=force, progress=meter.show)
    if as_json:
        _print_json({**_fields(found), "paths": [str(one) for one in found.paths]})
    else:
        paths = ", ".join(map(str, found.paths)) or "nothing, as the tree is empty"
        say(f"wrote   {paths}: {_contents(found)}, of {found.id[:12]}")


def _contents(found: Added | checkouts.CheckedOut) -> str:
    counts = {"file": found.files, "folder": found.folders, "link": found.links}
    shown = [f"{count:,} {what}{'' if count == 1 else 's'}" for what, count in counts.items() if count]
    return ", ".join([*shown, format_size(found.bytes)])


def _fields(found: Any) -> dict[str, Any]:
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}


def _check_line(*texts: str) -> None:
    for text in texts:
        if not text.isprintable():
            raise errors.UsageError(f"tags and notes are one line of text, unlike {printable(text)}")


@contextmanager
def _busy(text: str) -> Iterator[None]:
    """A terminal on standard error shows that something is under way of which it isn't known how far it is."""
    if not sys.stderr.isatty():
        yield
        return
    from rich import console

    with console.Console(stderr=True).status(text):
        yield


# -- the report ------------------------------------------------------------------------------------------------------


@app.command("report", epilog="Example: castore report -o report.html")
def report_command(
    out: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Where it goes; - prints it.", show_default="report.html, others -"
        ),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Only this run.", show_default=False)] = None,
    form: Annotated[
        Literal["html", "md", "json"], typer.Option("--format", help="A page, text for a job's summary, or JSON.")
    ] = "html",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Make a report of quality, lineage, sessions, and what is kept and stored.

    The page is one file that needs no network. A report that is there is replaced.
    """
    from castore.format import manifest
    from castore.report import collect, html

    form = "json" if as_json else form
    out = out or ("report.html" if form == "html" else "-")
    repo = castore.Repo.open()
    if out != "-":
        collect.check_target(Path(out))
    if form == "html":
        html.charts_script()  # what can go wrong before anything is read
    with _busy("making the report"):
        found = collect.collect_report(repo, datetime.now(UTC), run)
        text = html.page(found) if form == "html" else collect.as_markdown(found) if form == "md" else ""
    for one in found.broken:
        say(f"castore: {one.path}: {one.reason}", out=sys.stderr)
    if out == "-":
        _print_json(collect.as_json(found)) if form == "json" else print(text, end="")
        return
    data = text.encode() if text else manifest.canonical(collect.as_json(found))
    collect.write_report(Path(out), data)
    say(f"wrote   {out}: {len(found.checkpoints):,} checkpoints, {format_size(len(data))}")
    if not found.checkpoints:
        say(f"        no checkpoint{f' of run {run}' if run else ''} yet: `castore train` makes the first one")


# -- words -----------------------------------------------------------------------------------------------------------


def _print_json(value: Any) -> None:
    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:  # a path that is not UTF-8
        text = json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False)
    print("\n".join(line if line.isprintable() else _escaped(line) for line in text.split("\n")))


def _escaped(text: str) -> str:
    """JSON that says the same without what could steer a terminal or disguise other text."""
    return "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    texts = (map(str.ljust, row, widths) for row in [heads, *rows])
    say(*("  ".join(row).rstrip() for row in texts))


def _outline(value: Any, indent: str = "  ") -> Iterator[str]:
    """JSON as indented lines, for people."""
    for key, item in value.items() if isinstance(value, Mapping) else (("-", one) for one in value):
        name = key if key == "-" else f"{key}:"
        if isinstance(item, Mapping | list) and item:
            yield f"{indent}{name}"
            yield from _outline(item, indent + "  ")
        else:
            yield f"{indent}{name} {item if isinstance(item, str) else json.dumps(item)}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise errors.UsageError(f"can't read {path}: {reason}") from error


if __name__ == "__main__":
    main()
