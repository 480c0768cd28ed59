"""What looks at checkpoints and changes nothing: `castore show`, `resolve`, `diff` and `stats`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

import castore
from castore import errors
from castore.commands import completion
from castore.commands.console import JsonOption, Selector, outline, plural, print_json, print_table, say, warn
from castore.commands.log import Tags, entry_json
from castore.text import format_number, format_size

if TYPE_CHECKING:
    from castore.format.manifest import Entry
    from castore.stats import Stats, Usage

app = typer.Typer()

# -- show and resolve ------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore show 3f2a91")
def show(
    selector: Selector,
    show_all: Annotated[bool, typer.Option("--all", help="Everything: also settings and what the run noted.")] = False,
    config: Annotated[bool, typer.Option("--config", help="Only the settings that it was trained with.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint is: metrics, data, experiment; everything with --all."""
    repo = castore.Repo.open()
    entry = repo.find(selector)
    manifest = entry.manifest
    sections = {
        "experiment": msgspec.to_builtins(manifest.experiment),
        "config": manifest.config,
        "info": manifest.info,
    }
    if as_json:
        print_json({**entry_json(entry, repo.part_states(entry), Tags(repo)), **sections})
        return
    if config:
        say(*outline(manifest.config, indent=""))
        return
    say(*_describe_entry(repo, entry))
    if manifest.kind == "files":
        say("info", *outline(manifest.info), f"what is in it: `castore ls {entry.id[:12]}`")
        return
    if not show_all:
        counts = [
            plural(sum(1 for _ in outline(sections[name])), "line") + f" of {name}" for name in ("config", "info")
        ]
        say("experiment", *outline(sections["experiment"]), f"and {' and '.join(counts)}: --all shows them")
        return
    for name, section in sections.items():
        say(name, *outline(section))


def _describe_entry(repo: castore.Repo, entry: Entry) -> Iterator[str]:
    manifest = entry.manifest
    yield f"{manifest.kind:10} {entry.id}"
    if manifest.kind == "checkpoint":
        score = castore.score(manifest)
        yield f"run        {manifest.run}, step {manifest.step:,}, {manifest.created}"
        yield f"parent     {(manifest.parent or 'none')[:12]}"
        yield f"score      {'none' if score is None else format_number(score)}"
    else:
        yield f"name       {manifest.run}, {manifest.created}"
    for name, value in manifest.metrics.items():
        yield f"           {name} {format_number(value)}"
    tags = Tags(repo).of(entry)
    if tags or manifest.note:
        yield f"tags       {' '.join(tags)}  {manifest.note}"
    states = repo.part_states(entry)
    for name, part in manifest.parts.items():
        state = states[name]
        where = state.where if state.where != "missing" else f"missing: {state.reason}"
        size = format_size(part.bytes) if part.bytes else "no tensors" if manifest.kind == "checkpoint" else "empty"
        yield f"part       {name}: {size}, {format_size(part.stored_bytes)} stored, {where}"


@app.command(epilog="Example: castore resolve best --json")
def resolve(
    selector: Annotated[
        str,
        typer.Argument(metavar="[ID]", help="best, latest, run:best or an id.", autocompletion=completion.checkpoints),
    ] = "best",
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
    before: Annotated[
        str,
        typer.Argument(
            metavar="A", help="An id or name, as `castore show` takes it.", autocompletion=completion.checkpoints
        ),
    ],
    after: Annotated[str, typer.Argument(metavar="B", help="Another one.", autocompletion=completion.checkpoints)],
    show_all: Annotated[bool, typer.Option("--all", help="Every tensor and value that differs.")] = False,
    part: Annotated[
        list[str] | None, typer.Option(help="Only this part, with all that differs; may be repeated.")
    ] = None,
    config: Annotated[bool, typer.Option("--config", help="Only settings and metrics; reads no data.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two checkpoints: settings, metrics, and of each part the five tensors that moved most.

    The change of a tensor is the largest difference between two elements, relative to the largest magnitude in either.
    Tensors in equal chunks are equal without reading them. Parts whose data was deleted can't be compared; that is
    said.
    """
    from castore.commands import differences
    from castore.diff import diff

    repo = castore.Repo.open()
    if config and part:
        raise errors.UsageError("--config and --part say different things: choose one")
    entries = [repo.find(before), repo.find(after)]
    known = {name for entry in entries for name in entry.manifest.parts}
    if unknown := set(part or ()) - known:
        raise errors.NotFound(f"neither has a part {min(unknown)!r}; parts: {', '.join(sorted(known))}")
    difference = diff(repo, *entries, parts=[] if config else part or None)
    if as_json:
        print_json(differences.as_json(difference))
    elif not (lines := list(differences.describe(difference, most=None if show_all or part else differences.MOST))):
        say("nothing differs")
    else:
        say(*lines)


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
