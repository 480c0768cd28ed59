"""What moves checkpoints between machines: `castore remote`, `push`, `fetch` and `pull`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import castore
from castore import errors
from castore.commands import completion
from castore.commands.console import (
    Display,
    JsonOption,
    open_or_init,
    plural,
    print_json,
    print_table,
    say,
    warn,
)
from castore.text import format_size

if TYPE_CHECKING:
    from castore.format.manifest import Entry
    from castore.remotes.base import Remote
    from castore.transfer import Pulled

app = typer.Typer()
remote_app = typer.Typer(help="Name the places that checkpoints are pushed to and fetched from.", no_args_is_help=True)
app.add_typer(remote_app, name="remote")

RemoteOption = Annotated[
    str,
    typer.Option(
        "--remote",
        metavar="NAME",
        help="Which remote.",
        show_default="the default one",
        autocompletion=completion.remotes,
    ),
]

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Which remote.", autocompletion=completion.remotes)]

# -- remote ----------------------------------------------------------------------------------------------------------


@remote_app.command(epilog="Example: castore remote add bucket s3://my-bucket/gpt --push auto")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it.")],
    url: Annotated[
        str, typer.Argument(metavar="URL", help="s3://, gs://, az://, https:// (for reading) or the path of a folder.")
    ],
    push: Annotated[
        str | None,
        typer.Option(metavar="auto|manual", help="Whether each save is pushed to the default.", show_default=False),
    ] = None,
    default: Annotated[bool, typer.Option("--default", help="Make it the default remote.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a remote of that name.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add a remote to config.toml, which is committed: it holds no credentials.

    These come from the environment, or from the provider's own files: AWS_ACCESS_KEY_ID and so on, or ~/.aws; for gs://
    GOOGLE_APPLICATION_CREDENTIALS; for az:// AZURE_STORAGE_ACCOUNT_NAME and its key. An S3 service of another provider
    is named by AWS_ENDPOINT_URL.
    """
    from castore import config
    from castore.remotes.registry import open_remote

    repo = castore.Repo.open()
    if name in repo.config.locations and not force:
        raise errors.UsageError(f"there is a remote {name} already: --force replaces it")
    try:
        config.check_remote_name(name)
        open_remote(name, url, repo.root.parent)
    except ValueError as error:
        raise errors.UsageError(str(error)) from None
    changes = {name: url}
    if push is not None:
        changes["push"] = push
    if default or (push == "auto" and repo.config.locations and not repo.config.remotes.get("default")):
        changes["default"] = name
    _change(repo, changes)
    if as_json:
        print_json({"name": name, "url": url})
    else:
        say(f"remote  {name}: {url}; commit {repo.root / 'config.toml'}")


@remote_app.command("list", epilog="Example: castore remote list")
def list_remotes(as_json: JsonOption = False) -> None:
    """List the remotes, the default one marked."""
    config = castore.Repo.open().config
    if as_json:
        print_json(
            [
                {"name": name, "url": url, "default": name == config.default_remote}
                for name, url in config.locations.items()
            ]
        )
        return
    if not config.locations:
        say("no remote yet: `castore remote add NAME URL` adds one")
        return
    rows = [(name, url, "default" if name == config.default_remote else "") for name, url in config.locations.items()]
    print_table(("name", "url", ""), rows)
    if config.pushes:
        say(f'each checkpoint is pushed to {config.default_remote} after it was saved (push = "auto")')


@remote_app.command(epilog="Example: castore remote remove bucket")
def remove(name: NameArgument, as_json: JsonOption = False) -> None:
    """Forget a remote. Nothing is deleted there."""
    repo = castore.Repo.open()
    repo.remote(name)
    is_default = repo.config.remotes.get("default") == name
    is_last = len(repo.config.locations) == 1
    _change(repo, dict.fromkeys([name, *(["default"] if is_default else []), *(["push"] if is_last else [])]))
    if as_json:
        print_json({"name": name})
    else:
        say(f"removed {name} from {repo.root / 'config.toml'}; what it holds is still there")


@remote_app.command("set-default", epilog="Example: castore remote set-default bucket")
def set_default(name: NameArgument, as_json: JsonOption = False) -> None:
    """Choose the remote that commands use unless told otherwise."""
    repo = castore.Repo.open()
    repo.remote(name)
    _change(repo, {"default": name})
    if as_json:
        print_json({"name": name})
    else:
        say(f"default {name}")


def _change(repo: castore.Repo, changes: Mapping[str, str | None]) -> None:
    """Set keys of [remotes] in config.toml, or remove those with None, and keep all else as it is."""
    import tomlkit

    from castore import config
    from castore.storage import fs

    path = repo.root / "config.toml"
    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    table: Any = document.setdefault("remotes", tomlkit.table())
    for key, value in changes.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
    text = tomlkit.dumps(document)
    config.parse(text, str(path))
    fs.publish(path, text.encode(), repo.root / "tmp", replace=True)


# -- push ------------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore push best")
def push(
    selectors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]...",
            help="What to push.",
            show_default="all checkpoints with data here",
            autocompletion=completion.anything,
        ),
    ] = None,
    remote: RemoteOption = "",
    everything: Annotated[bool, typer.Option("--all", help="Prepared data and added files, too.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read the copies there, and replace bad ones; takes as long as a fetch.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy checkpoints to a remote, as far as it lacks them.

    A push that was cut short goes on where it stopped. Exits with 4 if something that was named could not be pushed.
    """
    repo = castore.Repo.open()
    target = repo.publishing_remote(remote)
    entries = _named(repo, selectors) if selectors else _with_data(repo, everything)
    if not entries:
        raise errors.NothingToDo("nothing to push: no checkpoint has data here")
    with Display(f"push to {target.name}", "bytes") as display:
        pushed = repo.push(entries, target, repair=repair, progress=display)
    if as_json:
        print_json(
            {
                "remote": target.name,
                "objects": pushed.objects,
                "bytes": pushed.bytes,
                "checkpoints": list(pushed.checkpoints),
                "left_out": [{"id": key[0], "part": key[1], "reason": why} for key, why in pushed.left_out.items()],
            }
        )
    else:
        for (checkpoint_id, part), reason in pushed.left_out.items():
            warn(f"part {part} of {checkpoint_id[:12]} was not pushed: {reason}")
        moved = f"{plural(pushed.objects, 'object')}, {format_size(pushed.bytes)} moved"
        done = plural(len(pushed.checkpoints), "checkpoint")
        say(f"pushed  {done} to {target.name}: {moved if pushed.objects else 'all there already'}")
    if selectors and len(pushed.checkpoints) < len(entries):
        raise errors.DataMissing("not all could be pushed: their data isn't here, or is damaged")


def _named(repo: castore.Repo, selectors: Sequence[str]) -> list[Entry]:
    return list({entry.id: entry for entry in map(repo.find, selectors)}.values())


def _with_data(repo: castore.Repo, everything: bool) -> list[Entry]:
    entries = repo.catalog.listing().entries if everything else repo.checkpoints()
    has = repo.store.has
    return [entry for entry in entries if any(has(part.index) for part in entry.manifest.parts.values())]


# -- fetch -----------------------------------------------------------------------------------------------------------

PartsOption = Annotated[
    str | None,
    typer.Option(metavar="PART,...", help="Only these parts, such as model.", show_default="all that are there"),
]


@app.command(epilog="Example: castore fetch best --parts model")
def fetch(
    selectors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]...", help="What to fetch.", show_default="best", autocompletion=completion.anything
        ),
    ] = None,
    parts: PartsOption = None,
    remote: RemoteOption = "",
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="URL|NAME", help="From there, with its manifest.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch the data of checkpoints into the store, every byte verified.

    With --from, the manifest comes from the remote as well, and no clone is needed. What vouches for it is the id that
    you give: all 64 digits of one that you trust make sure that you get exactly that checkpoint, from whoever keeps it.
    best and latest are what the remote says of itself.
    """
    wanted = [part.strip() for part in parts.split(",")] if parts else None
    if source is not None:
        repo, entries, remotes = _fetch_manifests(source, selectors or [])
    else:
        repo = castore.Repo.open()
        remotes = _remotes(repo, remote)
        entries = _named(repo, selectors or ["best"])
    _fetch(repo, entries, wanted, remotes, as_json)


@app.command(epilog="Example: castore pull")
def pull(remote: RemoteOption = "", as_json: JsonOption = False) -> None:
    """Fetch the data that is wanted here: of the best, the newest, and all that is pinned or tagged.

    Manifests come with `git pull`.
    """
    repo = castore.Repo.open()
    remotes = _remotes(repo, remote)
    ids = {*repo.catalog.pins(), *repo.catalog.tags()[0].values()}
    entries = {entry.id: entry for entry in repo.catalog.listing().entries if entry.id in ids}
    for selector in ("best", "latest"):
        try:
            entry = repo.find(selector)
            entries[entry.id] = entry
        except errors.NotFound:
            continue
    if not entries:
        raise errors.NothingToDo("nothing to fetch: there is no checkpoint; `git pull` brings manifests")
    _fetch(repo, list(entries.values()), None, remotes, as_json)


def _remotes(repo: castore.Repo, name: str) -> list[Remote]:
    """Return the remotes to fetch from: the one named, or all. UsageError if there is none: it says how to add one."""
    return [repo.remote(name)] if name or not repo.remotes else repo.remotes


def _fetch_manifests(source: str, selectors: Sequence[str]) -> tuple[castore.Repo, list[Entry], list[Remote]]:
    """Return the repository here, made if there is none, with the manifests of what was named in ``source``."""
    remote = open_source(source)
    if not selectors:
        raise errors.UsageError(f"which one? `castore ls {source}` lists what is there; name an id that you trust")
    found = [_find_there(remote, selector) for selector in selectors]
    repo = open_or_init(sys.stderr)
    for entry, vouches in found:
        if vouches:
            warn(f"{entry.id}: {vouches}")
        repo.catalog.add(entry.manifest)
    return repo, [entry for entry, _ in found], [remote]


def open_source(source: str) -> Remote:
    """Open a remote by its name in the repository here, or by its URL."""
    from castore.remotes.registry import open_remote

    try:
        repo = castore.Repo.open()
        if source in repo.config.locations:
            return repo.remote(source)
    except errors.RepoNotFound:
        pass
    try:
        return open_remote(source, source, Path.cwd())
    except ValueError as error:
        raise errors.UsageError(str(error)) from None


def _find_there(remote: Remote, selector: str) -> tuple[Entry, str]:
    """Return what a selector names in a remote, and, if that is not an id in full, what vouches for it."""
    from castore.remotes.base import is_publishing
    from castore.transfer import choose_manifest, find_manifest

    is_word = selector.rpartition(":")[2] in ("best", "latest")
    if is_word and is_publishing(remote):
        return choose_manifest(remote, selector), f"{selector} by what {remote.name} says; nothing else vouches for it"
    entry = find_manifest(remote, selector)
    digits = f"only the {len(selector)} digits that were given vouch for it: compare the id with one that you trust"
    return entry, "" if len(selector) == 64 else digits


def _fetch(
    repo: castore.Repo, entries: Sequence[Entry], wanted: Sequence[str] | None, remotes: Sequence[Remote], as_json: bool
) -> None:
    """Fetch what can be fetched, and say what was. Then DataMissing if something could not."""
    fetched = []
    failures: list[errors.DataMissing] = []
    with Display("fetch", "bytes") as display:
        for entry in entries:
            try:
                names = _choose_parts(repo, entry, wanted, remotes)
                fetched.append((entry, names, repo.fetch(entry, names, remotes=remotes, progress=display)))
            except errors.DataMissing as error:
                failures.append(error)
    _say_fetched(fetched, as_json)
    warn(*(str(error) for error in failures[1:]))
    if failures:
        raise failures[0]


def _say_fetched(fetched: Sequence[tuple[Entry, Sequence[str], Pulled]], as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {"id": entry.id, "parts": list(names), "objects": pulled.objects, "bytes": pulled.bytes}
                for entry, names, pulled in fetched
            ]
        )
        return
    for entry, names, pulled in fetched:
        _warn_of_errors(pulled)
        had = f"{plural(pulled.objects, 'object')}, {format_size(pulled.bytes)}" if pulled.objects else "all here"
        what = f"{entry.id[:12]}, step {entry.manifest.step:,} of {entry.manifest.run}"
        say(f"fetched {what} ({', '.join(names)}): {had}")


def _choose_parts(
    repo: castore.Repo, entry: Entry, wanted: Sequence[str] | None, remotes: Sequence[Remote]
) -> list[str]:
    """Return the parts to fetch: those wanted, or all that are here or in a remote. NotFound, NothingAvailable."""
    from castore.remotes import fallback

    parts = entry.manifest.parts
    if wanted is not None:
        for name in wanted:
            if name not in parts:
                raise errors.NotFound(f"checkpoint {entry.id[:12]} has no part {name!r}: it has {', '.join(parts)}")
        return list(dict.fromkeys(wanted))
    absent = {part.index for part in parts.values() if not repo.store.has(part.index)}
    gone = absent - fallback.available(remotes, absent)
    names = [name for name, part in parts.items() if part.index not in gone]
    if not names:
        reason = fallback.explain_missing(remotes, next(iter(gone)))
        raise errors.NothingAvailable(f"no data of {entry.id[:12]} is here or in a remote{reason}")
    for name, part in parts.items():
        if part.index in gone:
            warn(f"part {name} of {entry.id[:12]} is nowhere: it was dropped, or never pushed")
    return names


def _warn_of_errors(pulled: Pulled) -> None:
    warn(*(f"remote {name} was passed over: {error}" for name, error in pulled.remote_errors.items()))
