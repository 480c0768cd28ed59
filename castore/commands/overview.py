"""What says where data is: `castore status` and `ls`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

import castore
from castore import errors
from castore.commands.console import JsonOption, plural, print_json, print_table, say, warn
from castore.commands.remotes import RemoteOption, open_source
from castore.text import format_number, format_size

if TYPE_CHECKING:
    from castore.format.manifest import Entry
    from castore.remotes.base import PublishingRemote

app = typer.Typer()


@app.command(epilog="Example: castore status")
def status(remote: RemoteOption = "", as_json: JsonOption = False) -> None:
    """Say what is here, what is in the remote, what is nowhere, and what isn't committed."""
    from castore.storage import git

    repo = castore.Repo.open()
    target = repo.remote(remote) if remote or repo.remotes else None
    listing = repo.catalog.listing()
    warn(*(f"{broken.path}: {broken.reason}" for broken in listing.broken))
    indexes = {part.index for entry in listing.entries for part in entry.manifest.parts.values()}
    here = {index_id for index_id in indexes if repo.store.has(index_id)}
    there = set()
    try:
        there = target.has(indexes) if target else set()
    except (errors.RemoteError, errors.StorageError) as error:
        warn(f"what is there isn't known: {error}")
        target = None
    changed = git.uncommitted(repo.root, ["manifests"]) or ()
    names = {path.rpartition(".castore/manifests/")[2] for path in changed}
    uncommitted = {entry.id for entry in listing.entries if entry.manifest.file_name(entry.id) in names}
    rows = [
        (entry, _parts_in(entry, here), _parts_in(entry, there), entry.id in uncommitted) for entry in listing.entries
    ]
    name = target.name if target else ""
    if as_json:
        print_json(
            {
                "remote": name or None,
                "checkpoints": [
                    {"id": entry.id, "here": local, "there": remote_parts, "committed": not is_new}
                    for entry, local, remote_parts, is_new in rows
                ],
            }
        )
        return
    say(*_describe_status(rows, name, repo))


_StatusRow = tuple["Entry", list[str], list[str], bool]


def _parts_in(entry: Entry, indexes: set[Any]) -> list[str]:
    return [name for name, part in entry.manifest.parts.items() if part.index in indexes]


def _describe_status(rows: Sequence[_StatusRow], remote: str, repo: castore.Repo) -> Iterator[str]:
    unpushed = [row for row in rows if remote and set(row[1]) - set(row[2])]
    absent = [row for row in rows if not row[1] and row[2]]
    nowhere = sum(not row[1] and not row[2] for row in rows)
    uncommitted = [row for row in rows if row[3]]
    location = repo.config.locations.get(remote, "")
    if remote:
        yield f"remote  {remote}: {location}"
    elif not repo.remotes:
        yield "remote  none: `castore remote add NAME URL` adds one"
    if unpushed:
        yield f"here, and not whole in {remote} (`castore push`):"
        yield from _status_lines(unpushed)
    if absent:
        yield f"in {remote} alone (`castore fetch ID`):"
        yield from _status_lines(absent)
    if uncommitted:
        yield "not committed (`git add .castore && git commit`):"
        yield from _status_lines(uncommitted)
    both = sum(bool(row[1]) and not set(row[1]) - set(row[2]) for row in rows)
    counts = [f"{both} here and there"] if remote else [f"{sum(bool(row[1]) for row in rows)} here"]
    yield f"in all  {plural(len(rows), 'manifest')}: {', '.join([*counts, f'{nowhere} whose data is nowhere'])}"


def _status_lines(rows: Sequence[_StatusRow]) -> Iterator[str]:
    for entry, here, there, _ in rows[:20]:
        places = f"here {' '.join(here) or '-'}, there {' '.join(there) or '-'}"
        yield f"  {entry.id[:12]}  step {entry.manifest.step:,} of {entry.manifest.run}: {places}"
    if len(rows) > 20:
        yield f"  and {len(rows) - 20:,} more"


@app.command(epilog="Example: castore ls bucket")
def ls(
    what: Annotated[
        str, typer.Argument(metavar="ID|REMOTE", help="A checkpoint or added files; or a remote's name or URL.")
    ],
    as_json: JsonOption = False,
) -> None:
    """List what a checkpoint consists of, or the checkpoints in a remote."""
    from castore.remotes.base import is_publishing

    if "/" not in what:
        repo = castore.Repo.open()
        if what not in repo.config.locations:
            _list_parts(repo, repo.find(what), as_json)
            return
    remote = open_source(what)
    if not is_publishing(remote):
        raise errors.UsageError(f"{what} is a website, which has no list: the manifests in git say what there is")
    _list_remote(remote, as_json)


def _list_remote(remote: PublishingRemote, as_json: bool) -> None:
    from castore.policy.order import newest_first
    from castore.transfer import read_manifests

    entries = newest_first(read_manifests(remote))
    indexes = {part.index for entry in entries for part in entry.manifest.parts.values()}
    there = remote.has(indexes)
    if as_json:
        print_json(
            [
                {
                    "id": entry.id,
                    "kind": entry.manifest.kind,
                    "run": entry.manifest.run,
                    "step": entry.manifest.step,
                    "score": castore.score(entry.manifest),
                    "parts": _parts_in(entry, there),
                }
                for entry in entries
            ]
        )
        return
    if not entries:
        say(f"nothing was pushed to {remote.name} yet")
        return
    print_table(
        ("id", "run", "step", "score", "size", "parts there"),
        [
            (
                entry.id[:12],
                entry.manifest.run,
                f"{entry.manifest.step:,}",
                format_number(castore.score(entry.manifest)),
                format_size(_bytes_of(entry, _parts_in(entry, there))),
                " ".join(_parts_in(entry, there)) or "none",
            )
            for entry in entries
        ],
    )


def _bytes_of(entry: Entry, names: Iterable[str]) -> int:
    return sum(entry.manifest.parts[name].stored_bytes for name in names)


def _list_parts(repo: castore.Repo, entry: Entry, as_json: bool) -> None:
    states = repo.part_states(entry)
    rows = [
        (name, format_size(part.bytes), format_size(part.stored_bytes), states[name].where)
        for name, part in entry.manifest.parts.items()
    ]
    if as_json:
        print_json(
            [
                {"part": name, "bytes": part.bytes, "stored_bytes": part.stored_bytes, "where": states[name].where}
                for name, part in entry.manifest.parts.items()
            ]
        )
        return
    print_table(("part", "size", "stored", "data"), rows)
