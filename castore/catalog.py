"""Manifests in the work tree, and what git says of it. The only module that calls git.

Resolving looks at the work tree alone: what is checked out is what was reviewed and merged. A manifest on some other
branch, a pull request's say, makes claims that nobody has agreed to.
"""

from __future__ import annotations

import difflib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from castore import fs, manifest
from castore.errors import AmbiguousId, CorruptManifest, StorageError, UnknownId, UnsupportedVersion
from castore.ids import ObjectId
from castore.manifest import Manifest
from castore.quality import Entry, newest_first

_GIT_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Broken:
    """A file among the manifests that isn't one."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The manifests found, newest first, and the files that could not be read as one."""

    entries: tuple[Entry, ...]
    broken: tuple[Broken, ...]


class Catalog:
    """The manifests below ``root``, one file each. Files are only ever added."""

    def __init__(self, root: Path, temporary: Path, *, durable: bool = True) -> None:
        self.root = root
        self._temporary = temporary
        self._durable = durable

    def listing(self) -> Listing:
        """Every manifest in the work tree. A damaged one is reported beside the others, never replaced."""
        entries = []
        paths, broken = self._files()
        for path in paths:
            try:
                entries.append(_read(path))
            except (CorruptManifest, UnsupportedVersion, StorageError) as error:
                broken.append(Broken(Path(path), str(error).removeprefix(f"{path}: ")))
            except FileNotFoundError:
                continue  # removed since it was listed
        return Listing(tuple(newest_first(entries)), tuple(broken))

    def add(self, new: Manifest) -> tuple[ObjectId, Path]:
        """Write a manifest, durably. Its appearance is the commit point of a save: its objects must be durable."""
        data = manifest.encode(new)
        own, _ = manifest.decode(data)
        path = self.root / new.file_name(own)
        fs.make_directory(path.parent)
        if self._durable:  # even if the folder was there: who made it may not have lived to sync it
            fs.sync_directory(self.root)
        if not fs.publish(path, data, self._temporary, durable=self._durable) and _bytes(path) != data:
            raise CorruptManifest(str(path), "another file has this manifest's name")
        return own, path

    def _files(self) -> tuple[list[str], list[Broken]]:
        """The files that should be manifests, and what stands where one should but can't be one.

        Links are not followed: one that came with a pull request could lead anywhere, to a terminal that is read from
        for ever.
        """
        runs = _scan(self.root)
        broken = [Broken(Path(run.path), "a symbolic link, which is not followed") for run in runs if run.is_symlink()]
        found = []
        for run in runs:
            if run.is_dir(follow_symlinks=False):
                for file in _scan(run.path):
                    if not file.name.endswith(".json"):
                        continue
                    if file.is_file(follow_symlinks=False):
                        found.append(file.path)
                    else:
                        broken.append(Broken(Path(file.path), "not a regular file"))
        return found, broken


def find(entries: Sequence[Entry], prefix: str) -> Entry:
    """The one entry whose id begins with ``prefix``. UnknownId with near matches, AmbiguousId."""
    # an empty prefix is a variable that was not set, not a wish for whatever there is
    matches = [entry for entry in entries if prefix and entry.id.startswith(prefix.lower())]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise AmbiguousId(prefix, [entry.id for entry in matches])
    width = max(len(prefix), 8)
    near = difflib.get_close_matches(prefix.lower(), [entry.id[:width] for entry in entries], n=3, cutoff=0.6)
    raise UnknownId(prefix, near)


def _scan(folder: Path | str) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing when it is gone."""
    try:
        with os.scandir(folder) as items:
            return list(items)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError("read", str(folder), error) from error


def _read(path: str) -> Entry:
    data = _bytes(Path(path))
    own, found = manifest.decode(data, path)
    if not path.endswith("/" + found.file_name(own)):
        raise CorruptManifest(path, f"its content belongs under {found.file_name(own)}: it was changed or moved")
    return Entry(own, found)


def _bytes(path: Path) -> bytes:
    return fs.read(path, manifest.MAX_BYTES)


# -- git -------------------------------------------------------------------------------------------------------------


def git_root(path: Path) -> Path | None:
    """The top of the git work tree that ``path`` lies in, if any."""
    top = _git(path, "rev-parse", "--show-toplevel")
    return Path(top) if top else None


def git_commit(path: Path) -> str | None:
    """The commit checked out at ``path``, with ``-dirty`` when tracked files differ from it."""
    head = _git(path, "rev-parse", "--verify", "--quiet", "HEAD")
    if not head:
        return None
    changed = _git(path, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed else head


def _git(path: Path, *arguments: str) -> str | None:
    """What git prints, without the last newline; None when it fails or isn't installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(path), *arguments],
            capture_output=True, timeout=_GIT_SECONDS, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return os.fsdecode(done.stdout).removesuffix("\n") if done.returncode == 0 else None
