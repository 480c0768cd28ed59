"""Look a repository over and say what may go wrong, and what to do about it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from castore.config import Config
from castore.errors import ConfigError, CorruptionError, Locked, RootsUnreadable, StorageError
from castore.remotes.folder import Folder
from castore.repo import FOLDER, Repo
from castore.stats import heap
from castore.storage import catalog, fs, git

Level = Literal["ok", "warning", "problem"]

_SCARCE_BYTES = 1 << 30
_OVER_THE_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afs", "lustre", "ceph"})
_DATA = ("objects", "tmp", "trash", "quarantine", "lock")
_HISTORY = ("config.toml", "manifests", "pins", "bundles", "sessions")


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it is, and, unless it is ok, what to do."""

    subject: str
    level: Level
    text: str
    advice: str = ""


def examine(now: datetime, path: str | os.PathLike[str] = ".") -> Iterator[Check]:
    """Check the repository at or above ``path``, one thing after another. RepoNotFound.

    Makes a few small files in tmp/ and removes them again; everything else is left as it is.
    """
    try:
        repo = Repo.open(path)
        yield Check("settings", "ok", f"{repo.root / 'config.toml'} is valid")
    except ConfigError as error:
        yield Check("settings", "problem", str(error), "correct that line, or remove it for the default")
        repo = Repo(Path(error.path).parent, Config())  # the rest doesn't depend on it
    writable = _permissions(repo.root)
    yield writable
    sections = {
        "file system": _file_system(repo, writable.level == "ok"),
        "space": _space(repo),
        "lock": _lock(repo),
        "leftovers": _leftovers(repo),
        "git": _git(repo.root),
        "remotes": _remotes(repo),
        "manifests": _manifests(repo, now),
        "bundles": _bundles(repo),
        "gc": _gc(repo),
    }
    for subject, checks in sections.items():
        try:
            yield from checks
        except StorageError as error:
            yield Check(subject, "problem", str(error), "let this user read it, or mend the disk")


# -- the machine -----------------------------------------------------------------------------------------------------


def _permissions(root: Path) -> Check:
    """Whether everything that a save writes to can be written to."""
    for name in ("", "manifests", "objects", "tmp"):
        folder = root / name
        if os.path.lexists(folder) and not folder.is_dir():
            return Check("permissions", "problem", f"{folder} is not a folder", "move it away: castore makes it anew")
        if folder.is_dir() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            advice = "give this user the right to read and write there, or save elsewhere"
            return Check("permissions", "problem", f"this user can't write to {folder}", advice)
    return Check("permissions", "ok", f"this user can write to {root}")


def _file_system(repo: Repo, writable: bool) -> Iterator[Check]:
    kind = _kind(repo.root)
    if kind in _OVER_THE_NETWORK:
        advice = "let one machine at a time use it, or keep .castore on a local disk with this one as a remote"
        yield Check("file system", "warning", f"{kind}: locks may hold on one machine only", advice)
    elif writable:
        yield Check("file system", "ok", kind or "of a kind that can't be told")
    if writable:
        yield from _abilities(repo.root / "tmp")


def _abilities(folder: Path) -> Iterator[Check]:
    """Try what every save relies on."""
    made: list[Path] = []
    try:
        descriptor, path = fs.create_temporary(folder)
        made.append(path)
        fs.close(descriptor, path)
        linked = path.with_name(path.name + "-link")
        made.append(linked)
        try:
            os.link(path, linked)
        except OSError as error:
            advice = "a manifest gets its name by a hard link: keep .castore on another file system"
            yield Check("hard links", "problem", f"can't be made in {folder}: {error.strerror}", advice)
        else:
            yield Check("hard links", "ok", "can be made")
        with fs.lock(path, exclusive=True, timeout=0):
            try:
                with fs.lock(path, exclusive=True, timeout=0):
                    advice = "nothing would keep gc from deleting what a save needs: keep .castore on a local disk"
                    yield Check("locks", "problem", "two can hold an exclusive lock at once", advice)
            except Locked:
                yield Check("locks", "ok", "exclude each other")
    except StorageError as error:
        yield Check("file system", "problem", str(error), "free space or mend the disk: no save can succeed")
    finally:
        for path in made:
            fs.unlink(path)


def _kind(path: Path) -> str:
    """The kind of file system that a path is on; empty where that can't be told."""
    best, kind = "", ""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        place = fields.split(" ")[4].encode().decode("unicode_escape")
        if path.is_relative_to(place) and len(place) >= len(best):
            best, kind = place, rest.split(" ")[0]
    return kind


def _space(repo: Repo) -> Iterator[Check]:
    """Whether the next checkpoints fit, if they are as large as the largest one so far."""
    free = shutil.disk_usage(repo.root).free
    manifests = [entry.manifest for entry in repo.checkpoints()]
    largest = max((sum(part.stored_bytes for part in one.parts.values()) for one in manifests), default=0)
    text = f"{_megabytes(free)} free, the largest checkpoint takes {_megabytes(largest)}"
    advice = "free some, or collect garbage with a lower --max-size: `castore gc --help`"
    if free < largest:
        yield Check("space", "problem", text, advice)
    else:
        yield Check("space", "warning" if free < max(4 * largest, _SCARCE_BYTES) else "ok", text, advice)


def _lock(repo: Repo) -> Iterator[Check]:
    yield _lock_state(repo.root / "lock")


def _lock_state(path: Path) -> Check:
    states: tuple[tuple[bool, Level, str], ...] = (
        (True, "ok", "nobody is at work"),
        (False, "warning", "others save or load"),
    )
    if not path.exists():
        return Check("lock", "ok", "nobody is at work")
    for exclusive, level, text in states:
        try:
            with fs.lock(path, exclusive=exclusive, timeout=0):
                return Check("lock", level, text + _holders(path), "" if level == "ok" else _WAIT)
        except Locked:
            continue
        except StorageError as error:
            return Check("lock", "problem", str(error), "give this user the right to write there")
    return Check("lock", "warning", "somebody holds it alone, as gc does" + _holders(path), _WAIT)


_WAIT = "wait until they are done; one that hangs can be ended without harm"


def _holders(path: Path) -> str:
    """The other processes that hold a lock on a file, where the system tells."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = str(path.stat().st_ino)
        fields = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        pids = sorted({one[4] for one in fields if one[1] == "FLOCK" and one[5].split(":")[-1] == inode})
        others = ", ".join(pid for pid in pids if pid != str(os.getpid()))
        return f": process {others}" if others else ""
    return ""


def _leftovers(repo: Repo) -> Iterator[Check]:
    advices = {
        "tmp": "of saves that were cut short: delete them while no castore is at work",
        "trash": "a gc was cut short: the next one deletes them",
        "quarantine": "damaged objects: look at them or delete them; `castore verify` says what needs them",
    }
    found = {name: heap(repo.root / name) for name in advices}
    for name, files in found.items():
        if files.files:
            yield Check(f"{name}/", "warning", f"{files.files} files, {_megabytes(files.bytes)}", advices[name])
    if not any(files.files for files in found.values()):
        yield Check("leftovers", "ok", "none in tmp/, trash/ and quarantine/")


# -- what belongs to it ----------------------------------------------------------------------------------------------


def _git(root: Path) -> Iterator[Check]:
    if not git.is_inside(root):
        advice = "run `git init` and commit .castore: manifests are what outlives this machine"
        yield Check("git", "warning", "this is not in a git repository", advice)
        return
    missing, tracked = git.uncommitted(root, _HISTORY), git.tracked(root, _DATA)
    known = git.tracked(root, _HISTORY)
    if missing is None or tracked is None or known is None:
        advice = "see what `git status` says here: until it works, gc deletes nothing"
        yield Check("git", "problem", "git fails here, or isn't installed", advice)
        return
    if git.is_ignored(root / "config.toml") or git.is_ignored(root / "manifests" / "any.json"):
        advice = f"take it out of the ignore file: {FOLDER}/.gitignore already leaves out the data"
        yield Check("git", "problem", f"{root.name} is ignored: no manifest is ever committed", advice)
    elif missing:
        advice = f"run `git add {FOLDER} && git commit`: what isn't committed is lost with this machine"
        yield Check("git", "warning", f"{len(missing)} files of {FOLDER} are not committed, {missing[0]} say", advice)
    else:
        yield Check("git", "ok", f"{len(known)} files of {FOLDER} are committed")
    if tracked:
        advice = f"run `git rm -r --cached --ignore-unmatch {' '.join(f'{FOLDER}/{name}' for name in _DATA)}`"
        yield Check("git", "problem", f"git tracks {len(tracked)} files of data, {tracked[0]} say", advice)


def _remotes(repo: Repo) -> Iterator[Check]:
    for remote in repo.remotes:
        if isinstance(remote, Folder) and not (remote.path / "objects").is_dir():
            advice = "mount it, or correct [remotes] in config.toml: until then it counts as empty"
            yield Check(f"remote {remote.name}", "warning", f"{remote.path} has no folder objects/", advice)
        else:
            yield Check(f"remote {remote.name}", "ok", "is there")
    if not repo.remotes:
        yield Check("remotes", "ok", "none are set: what is lost here can't be fetched again")


def _manifests(repo: Repo, now: datetime) -> Iterator[Check]:
    listing = repo.catalog.listing()
    for broken in listing.broken:
        advice = "restore it from git, or remove it: until then gc deletes nothing"
        yield Check("manifests", "problem", f"{broken.path}: {broken.reason}", advice)
    if not listing.broken:
        yield Check("manifests", "ok", f"{len(listing.entries)}, all of them valid")

    future = [one for one in listing.entries if datetime.fromisoformat(one.manifest.created) > now + _AHEAD]
    if future:
        advice = "set the clock that is wrong; until then these count as the newest"
        text = f"{len(future)} manifests were created more than a day from now, {future[0].id[:12]} say"
        yield Check("clock", "warning", text, advice)


_AHEAD = timedelta(days=1)


def _gc(repo: Repo) -> Iterator[Check]:
    """Whether all can be read that gc must know of, in the work tree and in git."""
    try:
        catalog.read_roots(repo.catalog)
    except (RootsUnreadable, CorruptionError) as error:
        reason = error.reason if isinstance(error, RootsUnreadable) else error
        advice = "mend that, in the work tree or in whatever branch, tag or stash it is: until then no data goes"
        yield Check("gc", "problem", f"gc would refuse: {reason}", advice)
    else:
        yield Check("gc", "ok", "can tell what is still needed")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _bundles(repo: Repo) -> Iterator[Check]:
    records, broken = repo.catalog.records()
    for one in broken:
        advice = "take it from git's history, or remove it: without it, what that bundle holds can't be had"
        yield Check("bundles", "problem", f"{one.path}: {one.reason}", advice)
    if records and not broken:
        yield Check("bundles", "ok", f"{len(records)} records of what was handed on to GitHub's cache")
