"""What looks at checkpoints and changes nothing: `castore log`, `show`, `resolve`, `diff` and `stats`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

import castore
from castore import errors
from castore.commands.console import (
    JsonOption,
    Selector,
    outline,
    print_curves,
    print_json,
    print_table,
    say,
    warn,
)
from castore.text import format_age, format_number, format_size

if TYPE_CHECKING:
    from castore.format.ids import ObjectId
    from castore.format.manifest import Entry
    from castore.policy.resolution import PartState
    from castore.report.curves import Curve
    from castore.stats import Stats, Usage

app = typer.Typer()

_ROWS = 100

Kind = Literal["checkpoint", "dataset", "files", "all"]

# -- log -------------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore log --run main -n 5")
def log(
    run: Annotated[str | None, typer.Option(help="Only this run.", show_default=False)] = None,
    tag: Annotated[str | None, typer.Option(help="Only what has this tag.", show_default=False)] = None,
    limit: Annotated[
        int | None,
        typer.Option("-n", "--limit", min=0, help="At most this many, 0 for all.", show_default="100, or all as JSON"),
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Draw which checkpoint was resumed from which.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the validation loss of each run.")] = False,
    kind: Annotated[Kind, typer.Option(help="dataset is prepared data; files are what `castore add` added.")] = (
        "checkpoint"
    ),
    as_json: JsonOption = False,
) -> None:
    """List checkpoints, newest first.

    With --graph, children stand above what they were resumed from.
    """
    if graph and plot:
        raise errors.UsageError("--graph and --plot are two drawings: choose one")
    repo = castore.Repo.open()
    listing = repo.catalog.listing()
    warn(*(f"{broken.path}: {broken.reason}" for broken in listing.broken))
    tags = _Tags(repo)
    entries = [
        entry
        for entry in listing.entries
        if run in (None, entry.manifest.run)
        and kind in ("all", entry.manifest.kind)
        and (tag is None or tag in tags.of(entry))
    ]
    most = (0 if as_json or plot else _ROWS) if limit is None else limit
    older = max(0, len(entries) - most) if most else 0
    entries = entries[: len(entries) - older]
    if as_json:
        states = repo.part_states_of(entries)
        print_json([_entry_json(entry, states[entry.id], tags) for entry in entries])
    elif not entries:
        say(_describe_absence(run, kind, tag))
    elif graph:
        say(*_graph_lines(repo, entries, tags))
    elif plot:
        print_curves(_loss_curves(entries), x_label="step", y_label="validation loss")
    else:
        now = datetime.now(UTC)
        states = repo.part_states_of(entries)
        heads = ("id", "run", "step", "score", "val loss", "data", "size", "age", "tags")
        print_table(heads, [_log_row(entry, states[entry.id], tags, now) for entry in entries])
    if older and limit is None:
        say(f"and {older:,} older: `castore log -n 0` lists all")


class _Tags:
    """What checkpoints are called: the tags that name them now, and those that they were saved with."""

    def __init__(self, repo: castore.Repo) -> None:
        named, broken = repo.catalog.tags()
        warn(*(f"{file.path}: {file.reason}" for file in broken))
        self._names: dict[str, list[str]] = {}
        for name, checkpoint_id in named.items():
            self._names.setdefault(checkpoint_id, []).append(name)

    def of(self, entry: Entry) -> list[str]:
        return list(dict.fromkeys([*self._names.get(entry.id, ()), *entry.manifest.tags]))


def _describe_absence(run: str | None, kind: Kind, tag: str | None) -> str:
    if tag is not None:
        return f"nothing here has the tag {tag}: `castore tag` lists those that name something"
    if kind != "checkpoint":
        return f"no manifest of kind {kind}{f' of run {run}' if run else ''} yet"
    return f"no checkpoint of run {run}" if run else "no checkpoint yet: `castore train` makes the first one"


def _log_row(entry: Entry, states: Mapping[str, PartState], tags: _Tags, now: datetime) -> tuple[str, ...]:
    from castore.policy.resolution import availability

    manifest = entry.manifest
    return (
        entry.id[:12],
        manifest.run,
        f"{manifest.step:,}",
        format_number(castore.score(manifest)),
        format_number(manifest.metrics.get("val_loss")),
        availability(states),
        format_size(sum(part.stored_bytes for part in manifest.parts.values())),
        format_age(now - datetime.fromisoformat(manifest.created)),
        " ".join(tags.of(entry)),
    )


def _graph_lines(repo: castore.Repo, entries: Sequence[Entry], tags: _Tags) -> Iterator[str]:
    from castore.policy import lineage

    states = repo.part_states_of(entries)
    for lines, entry in lineage.draw(entries):
        yield f"{lines} {_graph_text(entry, states, tags)}" if entry else lines


def _graph_text(entry: Entry, listed: Mapping[ObjectId, Mapping[str, PartState]], tags: _Tags) -> str:
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
    """Return the validation loss of each run; the run with the newest checkpoint comes first."""
    from castore.report.curves import Curve

    runs: dict[str, dict[int, float]] = {}
    for entry in entries:
        manifest = entry.manifest
        if "val_loss" in manifest.metrics:
            # entries are newest first, and of several at one step the newest counts
            runs.setdefault(manifest.run, {}).setdefault(manifest.step, manifest.metrics["val_loss"])
    if not runs:
        raise errors.NotFound("no checkpoint here has a validation loss")
    return [Curve(run, sorted(points), [points[step] for step in sorted(points)]) for run, points in runs.items()]


def _entry_json(entry: Entry, states: Mapping[str, PartState], tags: _Tags) -> dict[str, Any]:
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


# -- show and resolve ------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore show 3f2a91")
def show(selector: Selector, as_json: JsonOption = False) -> None:
    """Show everything that is known about a checkpoint."""
    repo = castore.Repo.open()
    entry = repo.find(selector)
    manifest = entry.manifest
    sections = {
        "experiment": msgspec.to_builtins(manifest.experiment),
        "config": manifest.config,
        "info": manifest.info,
    }
    if as_json:
        print_json({**_entry_json(entry, repo.part_states(entry), _Tags(repo)), **sections})
        return
    say(*_describe_entry(repo, entry))
    for name, section in sections.items():
        say(name, *outline(section))


def _describe_entry(repo: castore.Repo, entry: Entry) -> Iterator[str]:
    manifest = entry.manifest
    score = castore.score(manifest)
    yield f"{manifest.kind:10} {entry.id}"
    yield f"run        {manifest.run}, step {manifest.step:,}, {manifest.created}"
    yield f"parent     {manifest.parent or 'none'}"
    yield f"score      {'none' if score is None else f'{score:.6f}'}"
    for name, value in manifest.metrics.items():
        yield f"           {name} {value:.6g}"
    tags = _Tags(repo).of(entry)
    if tags or manifest.note:
        yield f"tags       {' '.join(tags)}  {manifest.note}"
    states = repo.part_states(entry)
    for name, part in manifest.parts.items():
        state = states[name]
        where = state.where if state.where != "missing" else f"missing: {state.reason}"
        yield f"part       {name}: {format_size(part.bytes)}, {format_size(part.stored_bytes)} stored, {where}"


@app.command(epilog="Example: castore resolve best --json")
def resolve(
    selector: Annotated[str, typer.Argument(metavar="[ID]", help="best, latest, run:best or an id.")] = "best",
    parts: Annotated[
        list[str] | None, typer.Option("--part", help="Only this part must be available; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say which checkpoint would be used, and why no other.

    Candidates are compared with what the newest checkpoint was trained on; `castore train` compares them with its own
    options and data.
    """
    resolution = castore.Repo.open().resolve(selector, parts=parts or None, weights_only=not parts)
    if as_json:
        print_json(dataclasses.asdict(resolution))
    warn(*(f"{damaged.path}: {damaged.reason}" for damaged in resolution.damaged))
    match = resolution.require()
    if not as_json:
        say(*(f"no      {reason}" for reason in resolution.explain_rejections()))
        say(describe_match(match))
        say(*(f"note    {text}" for text in filter(None, [resolution.note])))
        say(*(f"differs {difference}" for difference in match.differences))


def describe_match(match: castore.Match) -> str:
    """Return the line that names the checkpoint which was chosen."""
    score = "no score" if match.score is None else f"score {match.score:.4f}"
    return f"match   {match.id[:12]}, step {match.step:,} of run {match.run}, {score}, {match.availability}"


# -- diff ------------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore diff main:best main:latest")
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="An id or name, as `castore show` takes it.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two checkpoints: settings, metrics, tensors.

    The change of a tensor is the largest difference between two elements, relative to the largest magnitude in either.
    Tensors in equal chunks are equal without reading them. Parts whose data was deleted can't be compared; that is
    said.
    """
    from castore.commands import differences
    from castore.diff import diff

    repo = castore.Repo.open()
    difference = diff(repo, repo.find(before), repo.find(after))
    if as_json:
        print_json(differences.as_json(difference))
    else:
        say(*differences.describe(difference))


# -- stats -----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore stats --json")
def stats(as_json: JsonOption = False) -> None:
    """Say what is stored, how much space it takes, and what gc would free.

    Raw is what plain copies would take. Data shared by several parts or runs counts in each of them.
    """
    from castore.stats import stats, stats_as_json

    totals = stats(castore.Repo.open(), datetime.now(UTC))
    if as_json:
        print_json(stats_as_json(totals))
        return
    say(*_describe_stats(totals))
    heads = ("count", "raw", "stored", "sharing", "compression")
    for head, groups in (("part", totals.by_part), ("run", totals.by_run)):
        if groups:
            say("")
            print_table((head, *heads), [_usage_row(name, usage) for name, usage in sorted(groups.items())])


def _describe_stats(totals: Stats) -> Iterator[str]:
    total = totals.total
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(totals.manifests.items())) or "none"
    states = ", ".join(f"{count} {state}" for state, count in sorted(totals.availability.items()))
    yield f"manifests   {kinds}{f'; checkpoints: {states}' if states else ''}"
    yield f"raw         {format_size(total.raw)} in {total.parts} parts"
    yield f"sharing     saves {format_size(total.saved_by_sharing)}"
    yield f"compression saves {format_size(total.saved_by_compression)}"
    yield f"stored      {format_size(total.stored)}, and {format_size(totals.unneeded)} that no manifest here needs"
    freed = totals.gc.problem or f"would delete {totals.gc.objects} objects, {format_size(totals.gc.bytes)}"
    yield f"gc          {freed}"
    for name, folder in totals.folders.items():
        yield f"{name + '/':11} {folder.files} files, {format_size(folder.bytes)}"


def _usage_row(name: str, usage: Usage) -> tuple[str, ...]:
    sizes = (usage.raw, usage.stored, usage.saved_by_sharing, usage.saved_by_compression)
    return (name, str(usage.parts), *map(format_size, sizes))
