"""nanecho's commands of the `castore` program: `castore train` and `demo`. Torch is imported by a session alone."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import msgspec
import typer
from typer.core import TyperCommand

import castore
from castore import errors
from castore.commands import console
from castore.stopping import StopRequest, stop_signals
from castore.text import printable
from nanecho import config as configs

if TYPE_CHECKING:
    from castore.report.curves import Curve
    from nanecho import events
    from nanecho.demo import Result

app = typer.Typer()


class GroupedHelp(TyperCommand):
    """A command whose help lists options under the headings of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


# -- train -----------------------------------------------------------------------------------------------------------


def train(
    ctx: typer.Context,
    file: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="TOML file with these options, such as n_layer = 4."),
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Tag for the checkpoints; may be repeated.")] = None,
    note: Annotated[str, typer.Option(help="Note for the checkpoints.", show_default=False)] = "",
    evaluate: Annotated[
        str,
        typer.Option(metavar="ID", help="Train nothing: measure this checkpoint, and save it with what was measured."),
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the session's summary as JSON; progress goes to standard error.")
    ] = False,
    **options: configs.Scalar,
) -> None:
    """Train for one session, starting from the best checkpoint.

    Trains nanecho, a small GPT. A session that is stopped by a signal saves first.
    """
    given = {name: value for name, value in options.items() if _is_given(ctx, name)}
    from_file = configs.read_toml(console.read_text(file), str(file)) if file else {}
    console.check_one_line(note, *(tag or ()))
    if evaluate:
        _evaluate(evaluate, {**from_file, **given}, as_json)
        return
    config = configs.make({**from_file, **given})
    out = sys.stderr if as_json else sys.stdout
    repo = console.open_or_init(out) if not _is_launched() else None
    now = datetime.now(UTC)
    fetching = _Fetching()
    with stop_signals() as received, fetching:
        from nanecho.ranks import first_then_others, joined  # torch takes seconds: after what can go wrong without it
        from nanecho.train import train as run_session

        with joined() as ranks:
            if ranks.rank:
                out = open(os.devnull, "w")  # noqa: SIM115 - one rank speaks for all
            repo = repo or first_then_others(ranks, lambda: console.open_or_init(out))
            session = run_session(
                repo,
                config,
                started=console.timestamp(now),
                stop=lambda: received.name,
                tags=tag or (),
                note=note,
                fetching=fetching,
                ranks=ranks,
            )
            for ending in _follow(session, out, received):
                if ranks.rank == 0:
                    _record_ending(repo, config.run.run, now, ending, as_json)
    if received.number:
        sys.exit(received.exit_code)


def _evaluate(selector: str, given: dict[str, configs.Scalar], as_json: bool) -> None:
    """Measure a checkpoint and say how good it is."""
    from nanecho import events, report
    from nanecho.evaluation import config_of, evaluate_checkpoint

    repo = castore.Repo.open()
    config = config_of(repo, selector, given)
    done = evaluate_checkpoint(repo, config, selector, console.timestamp(datetime.now(UTC)))
    if not as_json:
        console.say(*(line for event in done for line in report.describe(event)))
        return
    (saved,) = [event.saved for event in done if isinstance(event, events.Saved)]
    console.print_json({"id": saved.id, "path": str(saved.path), "metrics": saved.manifest.metrics})


def _is_launched() -> bool:
    """Whether torchrun started this process, perhaps beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _record_ending(
    repo: castore.Repo, run: str, started: datetime, ending: events.Finished | events.Failed, as_json: bool
) -> None:
    """Write the session's summary into the repository, and print it as JSON if asked to.

    An error of the session comes after this, so one of writing its summary is only told then.
    """
    from nanecho import events

    summary = msgspec.to_builtins(ending.summary)
    path: Path | None = None
    try:
        path = repo.add_session(run, started, summary)
    except errors.CastoreError as error:
        if isinstance(ending, events.Finished):
            raise
        console.warn(f"the session's summary was not written: {error}")
    if as_json:
        console.print_json({**summary, "path": str(path) if path else None})


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` with an option for each of nanecho's in place of its ``**options``."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    for option in configs.options():
        flag = "--" + option.name.replace("_", "-")
        names = f"{flag}/--no-{flag[2:]}" if option.type is bool else flag
        info = typer.Option(names, help=option.help, rich_help_panel=option.group)
        bare: Any = option.type
        annotation = Annotated[bare, info]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(option.name, keyword, default=option.default, annotation=annotation))
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters} | {"return": None}
    return command


_EXAMPLE = "Example: castore train --resume best --data-dir books --session-iters 1000"
app.command(epilog=_EXAMPLE, cls=GroupedHelp)(_with_options(train))


def _follow(
    session: Iterator[events.Event], out: TextIO, received: StopRequest
) -> Iterator[events.Finished | events.Failed]:
    """Show a session's events and yield how it ended: with a progress bar on a terminal, as plain lines elsewhere."""
    from nanecho import events, report

    bar = _SessionBar(out) if out.isatty() else None
    try:
        for event in session:
            if isinstance(event, events.Finished | events.Failed):
                yield event
                lines = report.describe_summary(event.summary) if isinstance(event, events.Finished) else []
            else:
                lines = report.describe(event)
            try:
                if bar:
                    bar.show(event, lines)
                else:
                    console.say(*lines, out=out)
            except BrokenPipeError:
                # nobody reads on (`castore train | head`): save what was trained and end
                received.number = signal.SIGPIPE
                bar, out = None, open(os.devnull, "w")  # noqa: SIM115
    finally:
        if bar:
            bar.stop()


class _Fetching:
    """A progress bar for what is fetched before the session's own appears."""

    def __init__(self) -> None:
        self._display: console.Display | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._display:
            self._display.__exit__(None, None, None)
            self._display = None

    def __call__(self, done: int, total: int, /) -> None:
        if self._display is None and done < total:
            self._display = console.Display("fetching", "bytes").__enter__()
        if self._display:
            self._display(done, total)
        if done >= total:
            self.__exit__()


class _SessionBar:
    """A progress bar below the lines that a session prints, on the same terminal."""

    def __init__(self, out: TextIO) -> None:
        from rich import console, progress

        self._progress = progress.Progress(
            progress.TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
            progress.BarColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=console.Console(file=out, highlight=False),
            redirect_stdout=False,  # it may be a file that is to hold the JSON of the summary
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


# -- demo ------------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore demo --quick")
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds and three short sessions.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the curves into this file, .svg or .png.", show_default=False),
    ] = None,
    as_json: console.JsonOption = False,
) -> None:
    """Measure what it is worth to resume from the best checkpoint.

    Trains a small model in sessions, each a process of its own on an emptied machine, with a folder as the remote
    between them. Compares that with a fresh start in every session, and with training that never stops. Reports
    whatever comes out and leaves nothing behind. Takes a few minutes on two processors.
    """
    if picture is not None and not picture.absolute().parent.is_dir():
        raise errors.UsageError(f"--picture {picture}: there is no such folder")
    from nanecho import demo as demonstration

    result = _run_demo(demonstration.QUICK if quick else demonstration.FULL)
    curves = _demo_curves(result)
    if picture is not None:
        from castore.report import curves as drawing

        drawing.picture(curves, picture, x_label="steps of compute", y_label="validation loss")
    if as_json:
        console.print_json(result)
        return
    console.say(*demonstration.describe(result))
    try:
        console.print_curves(curves, x_label="steps of compute", y_label="validation loss")
    except errors.PackageMissing as error:
        console.say(f"no curves: {error}")


def _run_demo(size: Any) -> Result:
    """Run all sessions, with a bar on a terminal and a line for each session elsewhere."""
    import tempfile

    from nanecho import demo as demonstration

    with tempfile.TemporaryDirectory(prefix="castore-demo-") as folder, console.Display("sessions", "count") as display:
        for event in demonstration.run(Path(folder).resolve(), _program(), size, castore.processors()):
            if not isinstance(event, demonstration.SessionsDone):
                return event
            display(event.done, event.total)
            if not sys.stderr.isatty():
                console.say(f"{event.done} of {event.total} sessions", out=sys.stderr)
    raise AssertionError("the demo ended without a result")


def _program() -> list[str]:
    """Return the command that runs this very castore in another folder, whether it is installed or a checkout."""
    root = str(Path(castore.__file__).resolve().parent.parent)
    script = f"import sys; sys.path.insert(0, {root!r}); from castore.__main__ import main; main()"
    return [sys.executable, "-c", script]


def _demo_curves(result: Result) -> list[Curve]:
    from castore.report.curves import Curve
    from nanecho import demo as demonstration

    curves = []
    for life, name in zip(demonstration.LIVES, ("resumed", "fresh start", "never stopped"), strict=True):
        points = demonstration.curve(result.of(life))
        steps, means, spreads = zip(*points, strict=True) if points else ((), (), ())
        curves.append(Curve(name, steps, means, spreads))
    return curves
