"""What the commands share: options, text and JSON on standard output, progress and logs on standard error.

Everything that is printed passes through here, so that text from a manifest, a path or a remote reaches the terminal
as text alone: nothing in it can move the cursor or disguise other text.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Self, TextIO

import msgspec
import typer

import castore
from castore import errors
from castore.commands import completion
from castore.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar
    from rich.progress import ProgressColumn

    from castore.report.curves import Curve

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Selector = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="First digits of an id, a tag, or best, latest, run:best or run:latest.",
        autocompletion=completion.checkpoints,
    ),
]
TagsOption = Annotated[list[str] | None, typer.Option("--tag", help="Tag; may be repeated.")]
NoteOption = Annotated[str, typer.Option(help="Note.", show_default=False)]

_LAST_COLUMN = 12  # characters of the last column of a table that are wanted at least
DELAY = 2.0  # seconds of work before progress is shown: what is shorter needs none

# -- text ------------------------------------------------------------------------------------------------------------


def say(*lines: str, out: TextIO | None = None) -> None:
    """Print lines for people, on standard output by default, with control characters escaped."""
    if lines:
        print(*map(printable, lines), sep="\n", file=out, flush=True)


def warn(*lines: str) -> None:
    """Print lines that begin with ``castore:`` on standard error, where they don't mix with what a program reads."""
    say(*(f"castore: {line}" for line in lines), out=sys.stderr)


def fail(reason: str, code: int) -> NoReturn:
    """Print the reason on standard error and exit with ``code``."""
    first, *more = reason.split("\n")
    say(f"castore: {first}", *more, out=sys.stderr)
    sys.exit(code)


def print_raw(text: str) -> None:
    """Print text that is safe as it is and ends its own lines: drawings with colours, Markdown that is escaped."""
    print(text, end="", flush=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. Those with the least ``need`` are left out where a terminal is too narrow for all."""

    head: str
    right: bool = False  # as numbers are aligned
    need: int = 9


class _Coloured(str):
    code = ""


_CODES = {"dim": "2", "bold": "1", "red": "31", "green": "32", "yellow": "33"}


def coloured(text: str, colour: str) -> str:
    """Return a cell for :func:`print_table` that has a colour on a terminal that shows any."""
    cell = _Coloured(text)
    cell.code = _CODES[colour]
    return cell


def has_colour() -> bool:
    """Whether standard output is a terminal whose user wants colour: see no-color.org."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_table(heads: Sequence[str | Column], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns as wide as their widest cell; on a terminal those that fit into its width."""
    columns = [head if isinstance(head, Column) else Column(head) for head in heads]
    cells = [[printable(cell) for cell in row] for row in ([column.head for column in columns], *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    shown = _columns_that_fit(columns, widths, room)
    codes = [["1"] * len(columns), *([getattr(cell, "code", "") for cell in row] for row in rows)]
    is_coloured = has_colour()
    for row, row_codes in zip(cells, codes, strict=True):
        line = ""
        left = room
        for i in shown:
            text = row[i].rjust(widths[i]) if columns[i].right else row[i].ljust(widths[i])
            if left is not None and len(text) > left:
                text = text[: max(0, left - 1)] + "…" if text[left:].strip() else text[:left]
            left = left - len(text) - 2 if left is not None else None
            text = text.rstrip() if i == shown[-1] else text
            line += f"\x1b[{row_codes[i]}m{text}\x1b[0m" if is_coloured and row_codes[i] and text.strip() else text
            line += "" if i == shown[-1] else "  "
        print_raw(f"{line.rstrip()}\n")


def _columns_that_fit(columns: Sequence[Column], widths: Sequence[int], room: int | None) -> list[int]:
    """Return the numbers of the columns to show; the last one may be cut."""
    shown = list(range(len(columns)))
    while room is not None and len(shown) > 1:
        needed = sum(widths[i] + 2 for i in shown[:-1]) + min(widths[shown[-1]], _LAST_COLUMN)
        if needed <= room:
            break
        shown.remove(min(shown, key=lambda i: columns[i].need))
    return shown


def outline(value: Any, indent: str = "  ") -> Iterator[str]:
    """Yield a value of JSON as indented lines, for people.

    >>> list(outline({"lr": 0.1, "layers": [1, 2]}))
    ['  lr: 0.1', '  layers:', '    - 1', '    - 2']
    """
    for key, item in value.items() if isinstance(value, Mapping) else (("-", item) for item in value):
        name = key if key == "-" else f"{key}:"
        if isinstance(item, Mapping | list) and item:
            yield f"{indent}{name}"
            yield from outline(item, indent + "  ")
        else:
            yield f"{indent}{name} {item if isinstance(item, str) else json.dumps(item)}"


def plural(count: int, noun: str) -> str:
    """Return the count with its noun.

    >>> plural(1, "file"), plural(2000, "file")
    ('1 file', '2,000 files')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def print_curves(curves: Sequence[Curve], *, x_label: str, y_label: str) -> None:
    """Draw curves as text, as large as the terminal allows. PackageMissing without plotext."""
    from castore.report import curves as drawing

    terminal = shutil.get_terminal_size()
    lines = drawing.draw(
        curves,
        width=max(40, min(terminal.columns, 110)),
        height=max(12, min(terminal.lines - 4, 24)),
        x_label=x_label,
        y_label=y_label,
        colour=has_colour(),
    )
    print_raw("".join(f"{line}\n" for line in lines))


# -- JSON ------------------------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """Print a value as indented JSON, with characters that a terminal would not show as text written as escapes."""
    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:  # a path that is not UTF-8
        text = json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False)
    print("\n".join(line if line.isprintable() else _escape_json(line) for line in text.split("\n")), flush=True)


def _escape_json(text: str) -> str:
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def fields_of(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, their values as they are (``dataclasses.asdict`` converts those too)."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


# -- input -----------------------------------------------------------------------------------------------------------


def check_one_line(*texts: str) -> None:
    """Raise UsageError for a tag or note with a line break or another character that can't be printed."""
    for text in texts:
        if not text.isprintable():
            raise errors.UsageError(f"tags and notes are one line of text, unlike {printable(text)}")


def read_text(path: Path) -> str:
    """Return what a text file holds. UsageError if it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise errors.UsageError(f"can't read {path}: {reason}") from error


def open_or_init(out: TextIO) -> castore.Repo:
    """Open the repository here, or make one at the git root, and print on ``out`` which it is."""
    try:
        repo = castore.Repo.open()
    except errors.RepoNotFound:
        from castore.storage import git

        repo = castore.Repo.init(git.root(Path.cwd()) or Path.cwd())
        say(f"made    {repo.root}: commit it now and then, git ignores the data", out=out)
    else:
        say(f"store   {repo.root}", out=out)
    return repo


def timestamp(moment: datetime) -> str:
    """Return a moment as manifests write it."""
    from castore.format import manifest

    return manifest.timestamp(moment)


# -- progress --------------------------------------------------------------------------------------------------------


class Display:
    """Progress on standard error, shown only on a terminal and only when the work takes longer than ``DELAY``.

    A context manager, and a :class:`castore.progress.Progress` to be called with what is done and the total. ``kind``
    says what is counted; of a ``"spinner"`` nothing is known but that it is under way.

        with Display("verify", "bytes") as display:
            findings = list(verify(repo, progress=display))
    """

    def __init__(self, text: str, kind: Literal["bytes", "count", "spinner"]) -> None:
        self.done = 0
        self._text, self._kind = text, kind
        self._total: int | None = None
        self._bar: ProgressBar | None = None
        self._is_over = False
        self._lock = threading.Lock()  # the bar appears in the timer's thread
        self._timer = threading.Timer(DELAY, self._appear)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._is_over = True
            if self._bar is not None:
                self._bar.stop()

    def __call__(self, done: int, total: int, /) -> None:
        self.done, self._total = done, total
        if (bar := self._bar) is not None:
            bar.update(bar.task_ids[0], completed=done, total=total)

    def _appear(self) -> None:
        from rich import console, progress

        with self._lock:
            if self._is_over:
                return
            bar = progress.Progress(
                *self._columns(),
                console=console.Console(file=sys.stderr),
                redirect_stdout=False,  # what is printed may go to a file
            )
            bar.add_task(self._text, total=self._total, completed=self.done)
            bar.start()
            self._bar = bar

    def _columns(self) -> tuple[ProgressColumn, ...]:
        from rich import progress

        text = progress.TextColumn("{task.description}")
        match self._kind:
            case "bytes":
                return (text, progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
            case "count":
                return (text, progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
            case "spinner":
                return (progress.SpinnerColumn(), text, progress.TimeElapsedColumn())


# -- logs ------------------------------------------------------------------------------------------------------------


def show_log(verbosity: int) -> None:
    """Show what castore logs on standard error: from level INFO for 1, from DEBUG for 2 and more."""
    import logging

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            # sys.stderr as it is then: a progress bar replaces it to print above itself
            say(*f"{record.name}: {self.format(record)}".split("\n"), out=sys.stderr)

    logger = logging.getLogger("castore")
    logger.addHandler(Handler())
    logger.setLevel(logging.INFO if verbosity == 1 else logging.DEBUG)
