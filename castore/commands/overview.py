"""What says where data is: `castore status`, `ls` and `find`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

import castore
from castore import errors
from castore.commands import completion
from castore.commands.console import Column, JsonOption, fields_of, plural, print_json, print_table, say, warn
from castore.commands.remotes import RemoteOption, open_source
from castore.text import format_number, format_size

if TYPE_CHECKING:
    from castore.format.manifest import Entry
    from castore.remotes.base import PublishingRemote
    from castore.trees.listing import Node

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
        yield from _status_lines(unpushed, has_remote=True)
    if absent:
        yield f"in {remote} alone (`castore fetch ID`):"
        yield from _status_lines(absent, has_remote=True)
    if uncommitted:
        yield "not committed (`git add .castore && git commit`):"
        yield from _status_lines(uncommitted, has_remote=bool(remote))
    both = sum(bool(row[1]) and not set(row[1]) - set(row[2]) for row in rows)
    counts = [f"{both} here and there"] if remote else [f"{sum(bool(row[1]) for row in rows)} here"]
    yield f"in all  {plural(len(rows), 'manifest')}: {', '.join([*counts, f'{nowhere} whose data is nowhere'])}"


def _status_lines(rows: Sequence[_StatusRow], has_remote: bool) -> Iterator[str]:
    for entry, here, there, _ in rows[:20]:
        places = f"here {' '.join(here) or '-'}"
        if has_remote:
            places += f", there {' '.join(there) or '-'}"
        yield f"  {entry.id[:12]}  step {entry.manifest.step:,} of {entry.manifest.run}: {places}"
    if len(rows) > 20:
        yield f"  and {len(rows) - 20:,} more"


# -- ls and find -----------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore ls books:latest books/poems")
def ls(
    what: Annotated[
        str,
        typer.Argument(
            metavar="ID|REMOTE",
            help="A checkpoint or added files; or a remote's name or URL.",
            autocompletion=completion.anything,
        ),
    ],
    path: Annotated[
        str,
        typer.Argument(metavar="[PATH]", help="A path in the files; PART or PART/TENSOR*.", show_default=False),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """List what a checkpoint or added files consist of, or the checkpoints in a remote."""
    from castore.remotes.base import is_publishing

    if "/" not in what:
        repo = castore.Repo.open()
        if what not in repo.config.locations:
            _list_entry(repo, repo.find(what), path, as_json)
            return
    if path:
        raise errors.UsageError(f"a path is looked up in a checkpoint or added files, and {what} is a remote")
    remote = open_source(what)
    if not is_publishing(remote):
        raise errors.UsageError(f"{what} is a website, which has no list: the manifests in git say what there is")
    _list_remote(remote, as_json)


def _list_entry(repo: castore.Repo, entry: Entry, path: str, as_json: bool) -> None:
    if entry.manifest.kind == "files":
        _list_files(repo, entry, path, as_json)
    elif path:
        _list_tensors(repo, entry, path, as_json)
    else:
        _list_parts(repo, entry, as_json)


def _list_files(repo: castore.Repo, entry: Entry, path: str, as_json: bool) -> None:
    from castore.trees.listing import list_tree, open_tree

    nodes = list_tree(open_tree(repo, entry), path)
    if as_json:
        print_json([fields_of(node) for node in nodes])
        return
    print_table(("path", Column("size", right=True)), [(_describe_node(node), _size_of(node)) for node in nodes])


def _describe_node(node: Node) -> str:
    match node.kind:
        case "folder":
            return f"{node.path}/"
        case "link":
            return f"{node.path} -> {node.target}"
        case "file":
            return node.path


def _size_of(node: Node) -> str:
    return "-" if node.kind == "link" else format_size(node.bytes)


def _list_tensors(repo: castore.Repo, entry: Entry, path: str, as_json: bool) -> None:
    from castore.format import part_index
    from castore.state.parts import read_index

    part, _, pattern = path.partition("/")
    if part not in entry.manifest.parts:
        known = ", ".join(entry.manifest.parts)
        raise errors.NotFound(f"{entry.id[:12]} has no part {part!r}; parts: {known}")
    index = read_index(repo.store, repo.remotes, entry.id, entry.manifest, part)
    tensors = {
        name: index.tensors[value.number]
        for name, value in part_index.leaves(index.tree)
        if type(value) is part_index.TensorRef and fnmatch.fnmatchcase(name, pattern or "*")
    }
    if pattern and not tensors:
        raise errors.NotFound(f"part {part} has no tensor {pattern!r}; `castore ls {entry.id[:12]} {part}` lists them")
    if as_json:
        print_json(
            [
                {"tensor": name, "dtype": spec.dtype, "shape": list(spec.shape), "bytes": spec.nbytes}
                for name, spec in tensors.items()
            ]
        )
        return
    print_table(
        ("tensor", "dtype", "shape", Column("size", right=True)),
        [
            (name, spec.dtype, " x ".join(map(str, spec.shape)) or "scalar", format_size(spec.nbytes))
            for name, spec in tensors.items()
        ],
    )


@app.command(epilog="Example: castore find '*.txt'")
def find(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="A name, or a path if it has a /; * and ? match as in a shell.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Say which added files hold a path, and in which versions. Exits with 3 if none does."""
    from castore.trees.listing import find as search

    found = search(castore.Repo.open(), pattern)
    warn(*(f"{entry_id[:12]} was not looked into: {reason}" for entry_id, reason in found.unread.items()))
    if not found.found:
        raise errors.NotFound(f"no added files hold {pattern!r}; `castore log --kind files` lists what was added")
    if as_json:
        print_json([{**fields_of(hit.node), "versions": [entry.id for entry in hit.versions]} for hit in found.found])
        return
    print_table(
        ("path", Column("size", right=True), "newest", "of", Column("versions", right=True)),
        [
            (
                _describe_node(hit.node),
                _size_of(hit.node),
                hit.versions[0].id[:12],
                hit.versions[0].manifest.run,
                str(len(hit.versions)),
            )
            for hit in found.found
        ],
    )


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
    print_table(("part", Column("size", right=True), Column("stored", right=True), "data"), rows)
