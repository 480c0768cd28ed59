"""Examine a repository: report what may go wrong, and what to do about it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from castore.config import Config
from castore.errors import CastoreError, ConfigError, GitUnreadable, Locked, RootsUnreadable, StorageError
from castore.format.ids import ObjectId
from castore.gc import collect_garbage
from castore.remotes.folder import Folder
from castore.repo import FOLDER, Repo
from castore.stats import folder_usage
from castore.storage import fs, git
from castore.text import format_size

Level = Literal["ok", "warning", "problem"]

_SCARCE_BYTES = 1 << 30
_OVER_THE_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afs", "lustre", "ceph"})
_DATA = ("objects", "tmp", "trash", "quarantine", "lock")
_DATA_FOLDERS = ("objects", "trash", "quarantine")
_UNCHANGING = ("manifests", "pins", "bundles")
_HISTORY = ("config.toml", "manifests", "pins", "tags", "bundles", "sessions")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was examined: its state and, unless ``level`` is ``ok``, advice on what to do."""

    subject: str
    level: Level
    text: str
    advice: str = ""


def examine(now: datetime, path: str | os.PathLike[str] = ".") -> Iterator[Check]:
    """Check the repository at or above ``path``, one thing after another. Raise RepoNotFound.

    Creates a few small files in tmp/ and removes them again; everything else is left as it is.

    >>> import tempfile, castore
    >>> from datetime import UTC
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     repo = castore.Repo.init(folder)
    ...     checks = {check.subject: check for check in examine(datetime.now(UTC), folder)}
    >>> checks["lock"].text, checks["git"].text
    ('no other process is at work', 'this is not in a git repository')
    """
    try:
        repo = Repo.open(path)
        yield Check("settings", "ok", f"{repo.root / 'config.toml'} is valid")
    except ConfigError as error:
        yield Check("settings", "problem", str(error), "correct that line, or remove it to get the default")
        try:
            repo = Repo(Path(error.path).parent, Config())  # the other checks don't depend on the settings
        except ConfigError:
            return
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
        "tags": _tags(repo),
        "bundles": _bundles(repo),
        "gc": _gc(repo),
    }
    for subject, checks in sections.items():
        try:
            yield from checks
        except StorageError as error:
            yield Check(subject, "problem", str(error), "let this user read it, or repair the disk")
        except GitUnreadable as error:
            yield Check(subject, "problem", str(error), "until then gc deletes nothing")


# -- the machine -----------------------------------------------------------------------------------------------------


def _permissions(root: Path) -> Check:
    """Check that this user can write to every folder a save writes to."""
    for name in ("", "manifests", "objects", "tmp"):
        folder = root / name
        if os.path.lexists(folder) and not folder.is_dir():
            advice = "move it away: castore creates the folder again"
            return Check("permissions", "problem", f"{folder} is not a folder", advice)
        if folder.is_dir() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            advice = "let this user read and write there, or save elsewhere"
            return Check("permissions", "problem", f"this user can't write to {folder}", advice)
    return Check("permissions", "ok", f"this user can write to {root}")


def _file_system(repo: Repo, writable: bool) -> Iterator[Check]:
    kind = _file_system_kind(repo.root)
    if kind in _OVER_THE_NETWORK:
        advice = "let one machine at a time use it, or keep .castore on a local disk with this one as a remote"
        yield Check("file system", "warning", f"{kind}: locks may work on one machine only", advice)
    elif writable:
        yield Check("file system", "ok", kind or "its kind is unknown on this system")
    if writable:
        yield from _file_operations(repo.root / "tmp")
        yield _folders(repo)
    if repo.location.is_elsewhere:
        yield Check("data", "ok", f"in {repo.location.data}, as local.toml says")


def _file_operations(folder: Path) -> Iterator[Check]:
    """Try the operations that every save relies on."""
    created: list[Path] = []
    try:
        descriptor, path = fs.create_temporary(folder)
        created.append(path)
        fs.close(descriptor, path)
        linked = path.with_name(path.name + "-link")
        created.append(linked)
        try:
            os.link(path, linked)
        except OSError as error:
            advice = "castore creates manifests by hard links: keep .castore on another file system"
            yield Check("hard links", "problem", f"can't be created in {folder}: {error.strerror}", advice)
        else:
            yield Check("hard links", "ok", "work")
        created.append(fs.gate_of(path))
        with fs.lock(path, exclusive=True, timeout=0):
            try:
                with fs.lock(path, exclusive=True, timeout=0):
                    advice = "gc could delete what a save needs: keep .castore on a local disk"
                    yield Check("locks", "problem", "two processes can hold an exclusive lock at once", advice)
            except Locked:
                yield Check("locks", "ok", "exclude each other")
    except StorageError as error:
        yield Check("file system", "problem", str(error), "free space or repair the disk: no save can succeed")
    finally:
        for path in created:
            fs.unlink(path)


def _folders(repo: Repo) -> Check:
    """Try to move files to where saves and gc move them, and to make names durable there.

    Moving is tried and not concluded from device numbers: one file system can be mounted in two places.
    """
    data, root = repo.location.data, repo.root
    moves = [*((data / "tmp", data / name) for name in _DATA_FOLDERS), *((root / "tmp", root / n) for n in _UNCHANGING)]
    for source, target in moves:
        if target.is_dir():
            try:
                _move_between(source, target)
                if repo.config.store.fsync:
                    fs.sync_directory(target)
            except StorageError as error:
                advice = "keep .castore on one file system that can sync folders; local.toml's `data` moves all data"
                return Check("folders", "problem", _explain(error, source, target), advice)
    return Check("folders", "ok", "files can be moved between them, and their names are durable")


def _explain(error: StorageError, source: Path, target: Path) -> str:
    if error.errno == errno.EXDEV:
        return f"{target} is on another file system than {source}: what is written there can't be moved here"
    return f"{error}: names are not durable there" if error.action == "sync" else str(error)


def _move_between(source: Path, target: Path) -> None:
    descriptor, path = fs.create_temporary(source)
    moved = target / path.name
    try:
        fs.close(descriptor, path)
        fs.rename(path, moved)
    finally:
        for leftover in (path, moved):
            fs.discard(leftover)


def _file_system_kind(path: Path) -> str:
    """Return the kind of file system that ``path`` is on, such as ``ext4``; empty where the system doesn't say."""
    longest, kind = "", ""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        mount_point = fields.split(" ")[4].encode().decode("unicode_escape")
        if path.is_relative_to(mount_point) and len(mount_point) >= len(longest):
            longest, kind = mount_point, rest.split(" ")[0]
    return kind


def _space(repo: Repo) -> Iterator[Check]:
    """Check that the next checkpoints fit, if they are as large as the largest one so far."""
    free = shutil.disk_usage(repo.root).free
    manifests = [entry.manifest for entry in repo.checkpoints()]
    largest = max((sum(part.stored_bytes for part in manifest.parts.values()) for manifest in manifests), default=0)
    text = f"{format_size(free)} free, the largest checkpoint takes {format_size(largest)}"
    advice = "free some, or run `castore gc` with a lower --max-size"
    if free < largest:
        yield Check("space", "problem", text, advice)
    else:
        yield Check("space", "warning" if free < max(4 * largest, _SCARCE_BYTES) else "ok", text, advice)


def _lock(repo: Repo) -> Iterator[Check]:
    yield _lock_state(repo.root / "lock")


def _lock_state(path: Path) -> Check:
    """Try the exclusive lock, then a shared one: the first that succeeds says how others hold it."""
    states: tuple[tuple[bool, Level, str], ...] = (
        (True, "ok", "no other process is at work"),
        (False, "warning", "other processes save or load"),
    )
    if not path.exists():
        return Check("lock", "ok", "no other process is at work")
    for exclusive, level, text in states:
        try:
            with fs.lock(path, exclusive=exclusive, timeout=0):
                return Check("lock", level, text + _holders(path), "" if level == "ok" else _WAIT)
        except Locked:
            continue
        except StorageError as error:
            return Check("lock", "problem", str(error), "let this user write there")
    return Check("lock", "warning", "an exclusive lock is held, as by gc" + _holders(path), _WAIT)


_WAIT = "wait until they are done; a process that hangs can be ended without harm"


def _holders(path: Path) -> str:
    """Return the other processes that hold a lock on a file, in words; empty where the system doesn't say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        inode = str(path.stat().st_ino)
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        pids = sorted({lock[4] for lock in locks if lock[1] == "FLOCK" and lock[5].split(":")[-1] == inode})
        others = ", ".join(pid for pid in pids if pid != str(os.getpid()))
        return f": process {others}" if others else ""
    return ""


def _leftovers(repo: Repo) -> Iterator[Check]:
    advices = {
        "tmp": "left by saves that were interrupted: delete them while no castore process is running",
        "trash": "left by a gc that was interrupted: the next one deletes them",
        "quarantine": "damaged objects: inspect or delete them; `castore verify` says what needs them",
    }
    usages = {name: folder_usage(repo.location.data / name) for name in advices}
    for name, files in usages.items():
        if files.files:
            text = f"{_count(files.files, 'file')}, {format_size(files.bytes)}"
            yield Check(f"{name}/", "warning", text, advices[name])
    if not any(files.files for files in usages.values()):
        yield Check("leftovers", "ok", "none in tmp/, trash/ and quarantine/")


# -- what the repository holds ---------------------------------------------------------------------------------------


def _git(root: Path) -> Iterator[Check]:
    if not git.is_inside(root):
        advice = "run `git init` and commit .castore: then the manifests outlive this machine"
        yield Check("git", "warning", "this is not in a git repository", advice)
        return
    uncommitted, tracked_data = git.uncommitted(root, _HISTORY), git.tracked(root, _DATA)
    committed = git.tracked(root, _HISTORY)
    if uncommitted is None or tracked_data is None or committed is None:
        advice = "see what `git status` says here: until it works, gc deletes nothing"
        yield Check("git", "problem", "git fails here, or isn't installed", advice)
        return
    if git.is_ignored(root / "config.toml") or git.is_ignored(root / "manifests" / "any.json"):
        advice = f"remove it from the ignore file: {FOLDER}/.gitignore already leaves out the data"
        yield Check("git", "problem", f"{root.name} is ignored: no manifest is ever committed", advice)
    elif uncommitted:
        advice = f"run `git add {FOLDER} && git commit`: what isn't committed is lost with this machine"
        text = f"{_count(len(uncommitted), 'file')} of {FOLDER} not committed, such as {uncommitted[0]}"
        yield Check("git", "warning", text, advice)
    else:
        yield Check("git", "ok", f"{_count(len(committed), 'file')} of {FOLDER} committed")
    if altered := git.altered(root, _UNCHANGING):
        advice = f"remove the filter, or restore {FOLDER}/.gitattributes, and `git add` them again"
        text = f"git has other bytes of {_count(len(altered), 'file')} than were written, such as {altered[0]}"
        yield Check("git", "problem", text, advice)
    if tracked_data:
        advice = f"run `git rm -r --cached --ignore-unmatch {' '.join(f'{FOLDER}/{name}' for name in _DATA)}`"
        text = f"git tracks {_count(len(tracked_data), 'data file')}, such as {tracked_data[0]}"
        yield Check("git", "problem", text, advice)


def _remotes(repo: Repo) -> Iterator[Check]:
    for remote in repo.remotes:
        if isinstance(remote, Folder) and not (remote.path / "objects").is_dir():
            advice = "mount it, or correct [remotes] in config.toml: until then it counts as empty"
            yield Check(f"remote {remote.name}", "warning", f"{remote.path} has no folder objects/", advice)
            continue
        try:
            remote.has([ObjectId("0" * 64)])
        except CastoreError as error:
            advice = "correct that, or [remotes] in config.toml: until then nothing is fetched from it"
            yield Check(f"remote {remote.name}", "warning", str(error), advice)
        else:
            yield Check(f"remote {remote.name}", "ok", "is there")
    if not repo.remotes:
        yield Check("remotes", "ok", "none are set: what is lost here can't be fetched again")


def _manifests(repo: Repo, now: datetime) -> Iterator[Check]:
    listing = repo.catalog.listing(cached=False)
    for broken in listing.broken:
        advice = "restore it from git, or remove it: until then gc deletes nothing"
        yield Check("manifests", "problem", f"{broken.path}: {broken.reason}", advice)
    if not listing.broken:
        yield Check("manifests", "ok", f"{len(listing.entries)}, all of them valid")

    future = [entry for entry in listing.entries if datetime.fromisoformat(entry.manifest.created) > now + _AHEAD]
    if future:
        advice = "correct the clock that is wrong; until that time these count as the newest"
        text = f"{_count(len(future), 'manifest')} created more than a day from now, such as {future[0].id[:12]}"
        yield Check("clock", "warning", text, advice)


_AHEAD = timedelta(days=1)


def _gc(repo: Repo) -> Iterator[Check]:
    """Ask gc itself what it would do: it must be able to read everything it has to know of, here and in git."""
    try:
        plan = collect_garbage(repo, dry_run=True, verify=False, wait=False)
    except Locked:
        yield Check("gc", "warning", "can't be asked while an exclusive lock is held", _WAIT)
    except CastoreError as error:
        reason = error.reason if isinstance(error, RootsUnreadable) else error
        advice = "repair that, in the work tree or the branch, tag or stash it is in: until then gc deletes nothing"
        yield Check("gc", "problem", f"gc would refuse: {reason}", advice)
    else:
        yield Check("gc", "ok", f"knows what is needed and would free {format_size(plan.freed_bytes)}")


def _tags(repo: Repo) -> Iterator[Check]:
    tags, broken = repo.catalog.tags()
    for file in broken:
        yield Check("tags", "problem", f"{file.path}: {file.reason}", "until then gc deletes nothing")
    known = {entry.id for entry in repo.catalog.listing().entries}
    dangling = [name for name, tagged in tags.items() if tagged not in known]
    if dangling:
        advice = f"restore that manifest from git's history, or run `castore untag {dangling[0]}`"
        yield Check("tags", "warning", f"{dangling[0]} names {tags[dangling[0]][:12]}, which isn't here", advice)
    elif tags and not broken:
        yield Check("tags", "ok", f"{_count(len(tags), 'tag')}, all of checkpoints that are here")


def _bundles(repo: Repo) -> Iterator[Check]:
    records, broken = repo.catalog.records()
    for record in broken:
        advice = "restore it from git's history, or remove it: without it, that bundle's data can't be fetched"
        yield Check("bundles", "problem", f"{record.path}: {record.reason}", advice)
    if records and not broken:
        yield Check("bundles", "ok", f"{_count(len(records), 'record')} of bundles in GitHub's cache")


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
