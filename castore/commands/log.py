"""What lists checkpoints: `castore log`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

import castore
from castore import errors
from castore.commands import completion
from castore.commands.console import Column, JsonOption, coloured, print_curves, print_json, print_table, say, warn
from castore.text import format_age, format_number, format_size

if TYPE_CHECKING:
    from castore.format.ids import ObjectId
    from castore.format.manifest import Entry
    from castore.policy.fields import Facts, Filter
    from castore.policy.resolution import PartState
    from castore.report.curves import Curve

app = typer.Typer()

_ROWS = 100
_COLUMNS = "id,run,step,score,val_loss,data,size,age,tags"

Kind = Literal["checkpoint", "dataset", "files", "all"]


@app.command(epilog="Example: castore log --filter 'run=ci and val_loss<2' --sort val_loss")
def log(
    run: Annotated[
        str | None, typer.Option(help="Only this run.", show_default=False, autocompletion=completion.runs)
    ] = None,
    tag: Annotated[
        str | None, typer.Option(help="Only what has this tag.", show_default=False, autocompletion=completion.tags)
    ] = None,
    filter_text: Annotated[
        str,
        typer.Option(
            "--filter",
            metavar="TEXT",
            help="Only those for which this holds: 'val_loss<2 and run=ci*'.",
            show_default=False,
        ),
    ] = "",
    sort: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="In the order of a column, -NAME for the largest first.", show_default="newest first"
        ),
    ] = "",
    columns: Annotated[
        str, typer.Option(metavar="NAMES", help="What to show: also parent, note, created, any metric, any setting.")
    ] = _COLUMNS,
    limit: Annotated[
        int | None,
        typer.Option("-n", "--limit", min=0, help="At most this many, 0 for all.", show_default="100, or all as JSON"),
    ] = None,
    history: Annotated[bool, typer.Option("--history", help="Also those whose data is not available.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Draw which checkpoint was resumed from which.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the validation loss of each run.")] = False,
    kind: Annotated[Kind, typer.Option(help="dataset is prepared data; files are what `castore add` added.")] = (
        "checkpoint"
    ),
    as_json: JsonOption = False,
) -> None:
    """List checkpoints, newest first; those whose data is gone are counted in one line.

    With --graph, children stand above what they were resumed from. Columns, filters and orders take the name of any
    metric, and of any setting of the run, such as learning_rate.
    """
    from castore.policy.fields import Filter

    if graph and plot:
        raise errors.UsageError("--graph and --plot are two drawings: choose one")
    repo = castore.Repo.open()
    listing = repo.catalog.listing()
    warn(*(f"{broken.path}: {broken.reason}" for broken in listing.broken))
    tags = Tags(repo)
    entries = [
        entry
        for entry in listing.entries
        if run in (None, entry.manifest.run)
        and kind in ("all", entry.manifest.kind)
        and (tag is None or tag in tags.of(entry))
    ]
    now = datetime.now(UTC)
    is_table = not (as_json or graph or plot)
    if filter_text or sort:
        wanted = Filter.parse(filter_text) if filter_text else None
        history = history or (wanted is not None and "data" in wanted.names)  # a filter for it asks for it
        entries = _arranged(repo, entries, tags, wanted, sort, now)
    most = (0 if as_json or plot else _ROWS) if limit is None else limit
    folded: list[Entry] = []
    if is_table and not history and kind == "checkpoint":
        chosen, folded = _without_history(repo, entries, most)
    else:
        chosen = entries[:most] if most else entries
    older = len(entries) - len(chosen) - len(folded)
    if as_json:
        states = repo.part_states_of(chosen)
        print_json([entry_json(entry, states[entry.id], tags) for entry in chosen])
    elif not entries:
        say(_describe_absence(run, kind, tag, filter_text))
    elif graph:
        say(*_graph_lines(repo, chosen, tags))
    elif plot:
        print_curves(_loss_curves(chosen), x_label="step", y_label="validation loss")
    else:
        if chosen:
            facts = _facts(repo, chosen, tags, now)
            names = _column_names(columns, facts)
            _print_rows(facts, names, _marks(repo, listing.entries) if "tags" in names else {})
        say(*_describe_folded(folded))
    if older and limit is None:
        say(f"and {older:,} {'more' if sort else 'older'}: `castore log -n 0` lists all")


def _facts(repo: castore.Repo, entries: Sequence[Entry], tags: Tags, now: datetime) -> list[Facts]:
    from castore.policy.fields import Facts
    from castore.policy.resolution import availability

    states = repo.part_states_of(entries)
    return [
        Facts(entry=entry, data=availability(states[entry.id]), now=now, tags=tuple(tags.of(entry)))
        for entry in entries
    ]


def _arranged(
    repo: castore.Repo, entries: Sequence[Entry], tags: Tags, wanted: Filter | None, sort: str, now: datetime
) -> list[Entry]:
    from castore.policy.fields import sort_by

    facts = _facts(repo, entries, tags, now)
    if wanted:
        facts = wanted.choose(facts)
    return [one.entry for one in (sort_by(facts, sort) if sort else facts)]


def _without_history(repo: castore.Repo, entries: Sequence[Entry], most: int) -> tuple[list[Entry], list[Entry]]:
    """Return up to ``most`` checkpoints whose data is available, 0 for all, and those that stand between them."""
    from castore.policy.resolution import availability

    available: list[Entry] = []
    gone: list[Entry] = []
    at_once = max(most, _ROWS) if most else len(entries) or 1  # a repository may have very many
    for begin in range(0, len(entries), at_once):
        batch = entries[begin : begin + at_once]
        states = repo.part_states_of(batch)
        for entry in batch:
            if most and len(available) == most:
                return available, gone
            (gone if availability(states[entry.id]) == "history" else available).append(entry)
    return available, gone


def _describe_folded(folded: Sequence[Entry]) -> Iterator[str]:
    if folded:
        losses = [entry.manifest.metrics["val_loss"] for entry in folded if "val_loss" in entry.manifest.metrics]
        best = f", best val loss {format_number(min(losses))}" if losses else ""
        count = f"{len(folded):,} checkpoint{'' if len(folded) == 1 else 's'}"
        runs = sorted({entry.manifest.run for entry in folded})
        of = f"run {runs[0]}" if len(runs) == 1 else f"{len(runs):,} runs"
        yield f"history  {count} of {of} whose data isn't available{best}: `castore log --history` lists them"


# how much is lost without a column on a narrow terminal: those with least go first
_HEADS = {
    "id": Column("id", need=9),
    "step": Column("step", right=True, need=8),
    "val_loss": Column("val loss", right=True, need=7),
    "tags": Column("tags", need=6),
    "age": Column("age", right=True, need=5),
    "data": Column("data", need=4),
    "run": Column("run", need=3),
    "score": Column("score", right=True, need=2),
    "size": Column("size", right=True, need=1),
}


def _column_names(columns: str, facts: Sequence[Facts]) -> list[str]:
    """Return the columns that the user asked for, each of which means something here; by default those that do."""
    from castore.policy.fields import check_name

    names = [name.strip() for name in columns.split(",")]
    if columns == _COLUMNS:
        return [name for name in names if name != "val_loss" or any(one.value(name) is not None for one in facts)]
    for name in names:
        check_name(name, facts)
    return names


def _print_rows(facts: Sequence[Facts], names: Sequence[str], marks: Mapping[ObjectId, Sequence[str]]) -> None:
    heads = [_HEADS.get(name) or Column(name, right=_is_number(name, facts), need=4) for name in names]
    print_table(heads, [[_cell(one, name, marks.get(one.entry.id, ())) for name in names] for one in facts])


def _is_number(name: str, facts: Sequence[Facts]) -> bool:
    return any(isinstance(one.value(name), int | float) for one in facts)


def _marks(repo: castore.Repo, entries: Sequence[Entry]) -> dict[ObjectId, tuple[str, ...]]:
    """Return what checkpoints are beside their tags: the one that best names, and pinned ones."""
    from castore.policy import resolution

    marks: dict[ObjectId, tuple[str, ...]] = dict.fromkeys(repo.catalog.pins(), ("pinned",))
    candidates = [entry for entry in entries if entry.manifest.kind == "checkpoint"]
    if candidates:
        best = resolution.Requirement(
            selector="best",
            experiment=candidates[0].manifest.experiment,
            weights_only=True,
            tie_tolerance=repo.config.resume.tie_tolerance,
        )
        with repo.lock():
            match = resolution.resolve(best, candidates, repo.part_states).match
        if match:
            marks[match.id] = ("best", *marks.get(match.id, ()))
    return marks


_DATA = {"full": "green", "weights-only": "yellow", "history": "dim"}


def _cell(facts: Facts, name: str, marks: Sequence[str]) -> str:
    value = facts.value(name)
    match name:
        case "id":
            return coloured(facts.entry.id[:12], "green" if "best" in marks else "yellow")
        case "tags":
            return " ".join([*([f"({', '.join(marks)})"] if marks else []), *facts.tags])
        case "size":
            return format_size(value)  # type: ignore[arg-type]
        case "age":
            return coloured(format_age(timedelta(seconds=value)), "dim")  # type: ignore[arg-type]
        case "data":
            return coloured(facts.data, _DATA[facts.data])
        case "parent":
            return facts.entry.manifest.parent[:12] if facts.entry.manifest.parent else "-"
    if isinstance(value, int):
        return f"{value:,}"
    return format_number(value) if isinstance(value, float) or value is None else str(value)


class Tags:
    """What checkpoints are called: the tags that name them now, and those that they were saved with."""

    def __init__(self, repo: castore.Repo) -> None:
        named, broken = repo.catalog.tags()
        warn(*(f"{file.path}: {file.reason}" for file in broken))
        self._names: dict[str, list[str]] = {}
        for name, checkpoint_id in named.items():
            self._names.setdefault(checkpoint_id, []).append(name)

    def of(self, entry: Entry) -> list[str]:
        return list(dict.fromkeys([*self._names.get(entry.id, ()), *entry.manifest.tags]))


def _describe_absence(run: str | None, kind: Kind, tag: str | None, filter_text: str) -> str:
    if filter_text:
        return f"nothing for which {filter_text} holds"
    if tag is not None:
        return f"nothing here has the tag {tag}: `castore tag` lists those that name something"
    if kind != "checkpoint":
        return f"no manifest of kind {kind}{f' of run {run}' if run else ''} yet"
    return f"no checkpoint of run {run}" if run else "no checkpoint yet: `castore train` makes the first one"


def _graph_lines(repo: castore.Repo, entries: Sequence[Entry], tags: Tags) -> Iterator[str]:
    from castore.policy import lineage

    states = repo.part_states_of(entries)
    for lines, entry in lineage.draw(entries):
        yield f"{lines} {_graph_text(entry, states, tags)}" if entry else lines


def _graph_text(entry: Entry, listed: Mapping[ObjectId, Mapping[str, PartState]], tags: Tags) -> str:
    from castore.policy.resolution import availability

    manifest = entry.manifest
    loss = f"val loss {format_number(manifest.metrics['val_loss'])}" if "val_loss" in manifest.metrics else ""
    is_parent_shown = manifest.parent is None or manifest.parent in listed
    parent = "" if is_parent_shown else f"from {manifest.parent[:12]}, which isn't listed"  # type: ignore[index]
    columns = (
        f"{manifest.run}, step {manifest.step:,}",
        loss,
        availability(listed[entry.id]),
        " ".join(tags.of(entry)),
        parent,
    )
    return "  ".join((entry.id[:12], *filter(None, columns)))


def _loss_curves(entries: Sequence[Entry]) -> list[Curve]:
    """Return the validation loss of each run; the run with the newest checkpoint comes first.

    A run that went back to an earlier checkpoint has a curve for each branch, the newest one first.
    """
    from castore.policy.lineage import branches
    from castore.report.curves import Curve

    runs: dict[str, list[Entry]] = {}
    for entry in entries:
        runs.setdefault(entry.manifest.run, []).append(entry)
    curves = []
    for run, its in runs.items():
        measured = [[entry for entry in branch if "val_loss" in entry.manifest.metrics] for branch in branches(its)]
        for number, branch in enumerate(filter(None, measured)):
            name = f"{run}, branch {number + 1}" if number else run
            losses = [entry.manifest.metrics["val_loss"] for entry in branch]
            curves.append(Curve(name, [entry.manifest.step for entry in branch], losses))
    if not curves:
        raise errors.NotFound("no checkpoint here has a validation loss")
    return curves


def entry_json(entry: Entry, states: Mapping[str, PartState], tags: Tags) -> dict[str, Any]:
    from castore.policy.resolution import availability

    manifest = entry.manifest
    return {
        "id": entry.id,
        "kind": manifest.kind,
        "run": manifest.run,
        "step": manifest.step,
        "created": manifest.created,
        "parent": manifest.parent,
        "score": castore.score(manifest),
        "metrics": manifest.metrics,
        "availability": availability(states),
        "tags": tags.of(entry),
        "note": manifest.note,
        "parts": {
            name: {**msgspec.to_builtins(part), "where": states[name].where} for name, part in manifest.parts.items()
        },
    }
