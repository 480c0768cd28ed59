"""What keeps the store small and whole: `castore gc`, `pin`, `unpin`, `tag`, `untag` and `forget`."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

import castore
from castore import errors
from castore.commands import completion
from castore.commands.console import Display, JsonOption, Selector, plural, print_json, print_table, say, warn
from castore.text import format_size

if TYPE_CHECKING:
    from castore.format.ids import ObjectId
    from castore.policy import retention
    from castore.policy.resolution import PartState

app = typer.Typer()


KeepOption = Annotated[
    int | None, typer.Option(min=0, help="How many of the best to keep in each experiment.", show_default=False)
]
KeepLatestOption = Annotated[
    int | None, typer.Option(min=0, help="How many of the newest to keep beside them.", show_default=False)
]
KeepOptimizerOption = Annotated[
    int | None,
    typer.Option(min=0, help="How many of the newest to keep with all that resuming needs.", show_default=False),
]
MaxSizeOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Then delete the worst until the rest fits, such as 20GB.", show_default=False),
]
GraceOption = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="Keep objects younger than this although unneeded, such as 1d.", show_default=False
    ),
]


@app.command(epilog="Example: castore gc --keep 10 --dry-run")
def gc(
    keep: KeepOption = None,
    keep_latest: KeepLatestOption = None,
    keep_optimizer: KeepOptimizerOption = None,
    max_size: MaxSizeOption = None,
    grace: GraceOption = None,
    remote: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In this remote, and nothing here.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete data that no kept checkpoint needs. Manifests stay.

    Options that are not given are read from config.toml. Checkpoints are kept by their score within an experiment; the
    work tree, the git index, every branch, tag and stash, linked worktrees and pins all count. If one of them can't be
    read, nothing is deleted.

    With --remote, only the machine that config.toml names as the collector may delete. The first pass marks what is of
    no use; one that comes later than the grace period deletes what still isn't. There is no limit on the size unless
    --max-size gives one.
    """
    from castore import config
    from castore.gc import collect_garbage

    repo = castore.Repo.open()
    policy = with_changes(
        repo.policy, {"keep": keep, "keep_latest": keep_latest, "keep_optimizer": keep_optimizer}, max_size
    )
    try:
        period = config.parse_duration(grace) if grace is not None else None
    except ValueError as error:
        raise errors.UsageError(str(error)) from error
    if remote is not None:
        limit = policy if max_size is not None else dataclasses.replace(policy, max_size=None)
        _collect_remote(
            repo, remote, limit, repo.config.retention.grace_period if period is None else period, dry_run, as_json
        )
        return
    with Display("verifying what is kept", "count") as display:
        plan = collect_garbage(repo, policy, grace=period, dry_run=dry_run, progress=display)
    if as_json:
        print_json(_plan_json(plan, dry_run))
    else:
        say(*_describe_plan(plan, dry_run))


def _collect_remote(
    repo: castore.Repo, name: str, policy: retention.Policy, grace: timedelta, dry_run: bool, as_json: bool
) -> None:
    from castore.remote_gc import collect_remote

    machine = os.environ.get("CASTORE_COLLECTOR") or socket.gethostname()
    remote = repo.publishing_remote(name)
    with Display(f"gc in {remote.name}", "spinner"):
        plan = collect_remote(repo, remote, policy, machine=machine, grace=grace, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "deleted": list(plan.delete),
                "freed_bytes": plan.freed_bytes,
                "marked": list(plan.mark),
                "waiting": list(plan.waiting),
                "kept_bytes": plan.kept_bytes,
            }
        )
        return
    for decision in plan.decisions:
        if decision.parts:
            say(f"keep    {_describe_decision(decision)}")
    would = "would be " if dry_run else ""
    if plan.mark:
        marked = f"{plural(len(plan.mark), 'file')}, {format_size(sum(plan.mark.values()))}"
        say(f"mark    {marked} {would}marked: a pass after the grace period deletes them if they are still of no use")
    if plan.waiting:
        say(f"wait    {plural(len(plan.waiting), 'file')} of no use, too new to delete")
    freed, kept = format_size(plan.freed_bytes), format_size(plan.kept_bytes)
    say(f"gc      {plural(len(plan.delete), 'file')}, {freed} {would}deleted in {remote.name}; {kept} kept")


def with_changes(policy: retention.Policy, counts: Mapping[str, int | None], max_size: str | None) -> retention.Policy:
    """Return the policy of config.toml with what was given on the command line in its place. UsageError."""
    from castore import config

    changes: dict[str, Any] = {name: count for name, count in counts.items() if count is not None}
    try:
        if max_size is not None:
            changes["max_size"] = config.parse_size(max_size) or None
    except ValueError as error:
        raise errors.UsageError(str(error)) from error
    return dataclasses.replace(policy, **changes)


def _describe_plan(plan: castore.GCPlan, dry_run: bool) -> Iterator[str]:
    for decision in plan.decisions:
        deleted = " and ".join(plan.deleted_parts(decision))
        if decision.parts:
            yield f"keep    {_describe_decision(decision)}{f'; without its {deleted}' if deleted else ''}"
        elif deleted:
            yield f"drop    {_describe_decision(decision)}"
    history = sum(not decision.parts and not plan.deleted_parts(decision) for decision in plan.decisions)
    if history:
        yield f"history {history} more, whose data was deleted before"
    if plan.young:
        yield f"wait    {plan.young} objects that no manifest refers to, too new to delete"
    verb = "would be deleted" if dry_run else "deleted"
    freed, kept = format_size(plan.freed_bytes), format_size(plan.kept_bytes)
    yield f"gc      {len(plan.delete)} objects, {freed} {verb}; {kept} kept"


def _describe_decision(decision: retention.Decision) -> str:
    manifest = decision.entry.manifest
    parts = f", {' '.join(decision.parts)}" if decision.parts else ""
    return f"{decision.entry.id[:12]}, step {manifest.step:,} of {manifest.run}{parts}: {', '.join(decision.reasons)}"


def _plan_json(plan: castore.GCPlan, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "deleted": sorted(plan.delete),
        "freed_bytes": plan.freed_bytes,
        "kept_bytes": plan.kept_bytes,
        "young": plan.young,
        "checkpoints": [
            {
                "id": decision.entry.id,
                "kind": decision.entry.manifest.kind,
                "run": decision.entry.manifest.run,
                "step": decision.entry.manifest.step,
                "keep": list(decision.parts),
                "reasons": list(decision.reasons),
            }
            for decision in plan.decisions
        ],
    }


@app.command(epilog="Example: castore pin best")
def pin(selector: Selector, as_json: JsonOption = False) -> None:
    """Keep all of a checkpoint, whatever the policy says.

    The pin is a file: commit it, and it counts in any branch.
    """
    repo = castore.Repo.open()
    entry = repo.find(selector)
    path, states = repo.pin(entry)
    _warn_of_missing(entry.id, states)
    if as_json:
        print_json({"id": entry.id, "path": str(path)})
    else:
        say(f"pinned {entry.id[:12]}: commit {path}")


@app.command(epilog="Example: castore unpin 3f2a91")
def unpin(selector: Selector, as_json: JsonOption = False) -> None:
    """Remove a pin. A pin in another branch still counts."""
    repo = castore.Repo.open()
    checkpoint_id = _find_pinned(repo, selector)
    if not repo.unpin(checkpoint_id):
        raise errors.NotFound(f"{checkpoint_id[:12]} isn't pinned in the work tree")
    if as_json:
        print_json({"id": checkpoint_id})
    else:
        say(f"unpinned {checkpoint_id[:12]}")


def _find_pinned(repo: castore.Repo, selector: str) -> ObjectId:
    """Return the id that ``selector`` names among the manifests, or among the pins: a pin may outlive its manifest."""
    try:
        return repo.find(selector).id
    except (errors.UnknownId, errors.CorruptionError):
        pins = sorted(pin for pin in repo.catalog.pins() if selector and pin.startswith(selector.lower()))
        if not pins:
            raise
        if len(pins) > 1:
            raise errors.AmbiguousId(selector, pins) from None
        return pins[0]


def _warn_of_missing(checkpoint_id: ObjectId, states: Mapping[str, PartState]) -> None:
    for name, state in states.items():
        if state.where == "missing":
            warn(f"part {name} of {checkpoint_id[:12]} is not kept by that: {state.reason}")


@app.command(epilog="Example: castore tag best release")
def tag(
    selector: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]", help="What to tag; without it, tags are listed.", autocompletion=completion.checkpoints
        ),
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="What to call it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Move a tag that names another checkpoint.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Give a checkpoint a name, or list the names there are.

    The name can be used wherever an id can, and what has one is kept whole, as with a pin. A tag is a file: commit it,
    and it counts in any branch.
    """
    repo = castore.Repo.open()
    if selector is None:
        _list_tags(repo, as_json)
        return
    if name is None:
        raise errors.UsageError(
            f"what shall it be called? `castore tag {selector} NAME`; `castore log --tag NAME` finds it"
        )
    entry = repo.find(selector)
    path, states = repo.tag(entry, name, move=force)
    _warn_of_missing(entry.id, states)
    if as_json:
        print_json({"name": name, "id": entry.id, "path": str(path)})
    else:
        say(f"tagged {entry.id[:12]} as {name}: commit {path}")


def _list_tags(repo: castore.Repo, as_json: bool) -> None:
    tags, broken = repo.catalog.tags()
    warn(*(f"{file.path}: {file.reason}" for file in broken))
    entries = {entry.id: entry.manifest for entry in repo.catalog.listing().entries}
    if as_json:
        print_json([{"name": name, "id": tagged, "known": tagged in entries} for name, tagged in tags.items()])
    elif not tags:
        say("no tag yet: `castore tag best NAME` gives the best checkpoint one")
    else:
        print_table(
            ("tag", "id", "run", "step"),
            [
                (name, tagged[:12], entries[tagged].run, f"{entries[tagged].step:,}")
                if tagged in entries
                else (name, tagged[:12], "its manifest isn't here", "")
                for name, tagged in tags.items()
            ],
        )


@app.command(epilog="Example: castore untag release")
def untag(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The tag to remove.", autocompletion=completion.tags)],
    as_json: JsonOption = False,
) -> None:
    """Remove a tag; the checkpoint stays for as long as the policy keeps it. A tag in another branch still counts."""
    castore.Repo.open().untag(name)
    if as_json:
        print_json({"name": name})
    else:
        say(f"removed the tag {name}")


@app.command(epilog="Example: castore forget 3f2a91")
def forget(
    selector: Selector,
    force: Annotated[
        bool, typer.Option("--force", help="Even if it was never committed, so that no other copy exists.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove a manifest, so that gc may delete its data.

    Commit the removal; git's history keeps the manifest. Until then the index and every branch that has it count.
    """
    from castore.storage import git

    repo = castore.Repo.open()
    entry = repo.find(selector)
    short = entry.id[:12]
    if entry.id in repo.catalog.pins():
        raise errors.UsageError(f"{short} is pinned: `castore unpin {short}` first")
    if names := [name for name, tagged in repo.catalog.tags()[0].items() if tagged == entry.id]:
        raise errors.UsageError(f"{short} is tagged: `castore untag {names[0]}` first")
    if not force and not git.is_committed(repo.catalog.root / entry.manifest.file_name(entry.id)):
        raise errors.UsageError(f"{short} isn't in git's last commit: commit it, or lose it with --force")
    path = repo.forget(entry)
    if as_json:
        print_json({"path": str(path)})
    else:
        say(f"removed {path}: commit that, and `castore gc` deletes its data")
