"""Manifests and pins in the work tree, the git index and git refs.

Resolving looks at the work tree alone: what is checked out is what was reviewed and merged. A manifest on some other
branch, a pull request's say, makes claims that nobody has agreed to. Before anything is deleted, all of them count.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from castore.errors import AmbiguousId, CorruptBundle, CorruptManifest, StorageError, UnknownId, UnsupportedVersion
from castore.format import manifest
from castore.format.bundle import MAX_RECORD_BYTES, Record, decode_record, encode_record
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import Entry, Manifest
from castore.policy.scoring import newest_first
from castore.storage import fs, git

_ID_DIGITS = 12  # of an id in the name of a manifest's file


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
    """What git keeps of a repository ``folder``, a file each: manifests, pins (empty files), records of bundles."""

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.root = folder / "manifests"
        self._pins = folder / "pins"
        self._bundles = folder / "bundles"
        self._temporary = folder / "tmp"
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

    def find(self, prefix: str) -> Entry:
        """The one manifest whose id begins with ``prefix``. UnknownId, AmbiguousId, CorruptManifest."""
        wanted = prefix.lower()
        # a file's name ends with the first digits of its id, so no other file has to be read
        paths = {path: path[-_ID_DIGITS - 5 : -5] for path in self._files()[0]}
        likely = [path for path, start in paths.items() if start.startswith(wanted[:_ID_DIGITS])]
        matches, damaged = [], []
        # an empty prefix is a variable that was not set, not a wish for whatever there is
        for path in likely if wanted else ():
            try:
                matches.append(_read(path))
            except (CorruptManifest, UnsupportedVersion, StorageError) as error:
                damaged.append(error)
            except FileNotFoundError:
                continue
        matches = [entry for entry in matches if entry.id.startswith(wanted)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise AmbiguousId(prefix, sorted(entry.id for entry in matches))
        if damaged:
            raise damaged[0]
        starts = [start[: max(len(wanted), 8)] for start in paths.values()]
        raise UnknownId(prefix, difflib.get_close_matches(wanted, starts, n=3, cutoff=0.6))

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

    def forget(self, entry: Entry) -> Path:
        """Remove a manifest from the work tree. Git's history keeps it, and so does every other branch that has it."""
        path = self.root / entry.manifest.file_name(entry.id)
        fs.unlink(path)
        if self._durable:
            fs.sync_directory(path.parent)
        return path

    def pins(self) -> frozenset[ObjectId]:
        """The ids of manifests that are to be kept whatever the policy says."""
        return frozenset(ObjectId(file.name) for file in _scan(self._pins) if is_object_id(file.name))

    def pin(self, own: ObjectId) -> Path:
        """Pin a manifest. A pin is a file, so that branches never conflict over it and one in any of them counts."""
        fs.make_directory(self._pins)
        fs.publish(self._pins / own, b"", self._temporary, durable=self._durable)
        return self._pins / own

    def unpin(self, own: ObjectId) -> bool:
        """Whether there was a pin in the work tree, which is removed."""
        pinned = own in self.pins()
        fs.unlink(self._pins / own)
        return pinned

    def records(self) -> tuple[list[Record], list[Broken]]:
        """The records of bundles, newest first, and the files that could not be read as one."""
        found, broken = [], []
        for file in _scan(self._bundles):
            if file.name.endswith(".json"):
                try:
                    record = self._record(Path(file.path))
                    found.append(record)
                except (CorruptBundle, UnsupportedVersion, StorageError) as error:
                    broken.append(Broken(Path(file.path), str(error)))
                except FileNotFoundError:
                    continue
        return sorted(found, key=lambda one: (one.created, one.bundle), reverse=True), broken

    def _record(self, path: Path) -> Record:
        if path.is_symlink():
            raise CorruptBundle("a symbolic link, which is not followed")
        record = decode_record(fs.read(path, MAX_RECORD_BYTES))
        if record.file_name != path.name:
            raise CorruptBundle(f"its content belongs under {record.file_name}")
        return record

    def add_record(self, record: Record) -> Path:
        """Write the record of a bundle that is known to be there."""
        path = self._bundles / record.file_name
        fs.make_directory(self._bundles)
        fs.publish(path, encode_record(record), self._temporary, durable=self._durable)
        return path

    def remove_record(self, record: Record) -> Path:
        """Remove the record of a bundle that is gone for good."""
        path = self._bundles / record.file_name
        fs.unlink(path)
        return path

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
    data = _bytes(path)
    own, found = manifest.decode(data, path)
    if not path.endswith("/" + found.file_name(own)):
        raise CorruptManifest(path, f"its content belongs under {found.file_name(own)}: it was changed or moved")
    return Entry(own, found)


def _bytes(path: Path | str) -> bytes:
    return fs.read(path, manifest.MAX_BYTES)


# -- everything that anybody may still need ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Roots:
    """``own``: manifests of the work tree and the index; ``others``: those of each ref that holds further ones.

    ``pins`` are those of the work tree and the index, ``other_pins`` those of everything else.
    """

    own: tuple[Entry, ...]
    others: tuple[tuple[str, tuple[Entry, ...]], ...]
    pins: frozenset[ObjectId]
    other_pins: frozenset[ObjectId] = frozenset()


def roots(catalog: Catalog) -> Roots:
    """The manifests and pins of the work tree, the index, the tip of every ref, stashes and linked worktrees.

    CorruptManifest, UnsupportedVersion, StorageError or RootsUnreadable when any of it can't be read: then nothing may
    be deleted.
    """
    own = {entry.id: entry for entry in _whole(catalog)}
    pins, other_pins = set(catalog.pins()), set[ObjectId]()
    others: dict[str, dict[ObjectId, Entry]] = {}
    folder = catalog.root.parent
    if git.is_inside(folder):
        inside, (top, *linked) = git.worktrees(folder)
        for path in linked:
            beside = Catalog(path / inside, durable=False)
            others[f"worktree {path}"] = {entry.id: entry for entry in _whole(beside)}
            other_pins.update(beside.pins())
        mine = git.index(top, inside, ROOTS)
        snapshots = [mine, *(git.index(path, inside, ROOTS) for path in linked), *git.tips(folder, ROOTS)]
        read = _from_git(folder, snapshots)
        for one in snapshots:
            entries = {read[blob].id: read[blob] for path, blob in one.files.items() if _is_manifest(path)}
            (own if one is mine else others.setdefault(one.name, {})).update(entries)
            (pins if one is mine else other_pins).update(_pinned(one))
    # the same manifests on many branches count once, and not at all when the work tree has them too
    further = {frozenset(entries): (name, tuple(entries.values())) for name, entries in others.items()}
    return Roots(
        tuple(own.values()),
        tuple(source for ids, source in further.items() if not ids <= own.keys()),
        frozenset(pins),
        frozenset(other_pins),
    )


def _from_git(folder: Path, snapshots: Sequence[git.Snapshot]) -> dict[str, Entry]:
    """The manifest in each blob."""
    places = {blob: f"{one.name}:{path}" for one in snapshots for path, blob in one.files.items() if _is_manifest(path)}
    blobs = git.blobs(folder, places, manifest.MAX_BYTES)
    return {blob: Entry(*manifest.decode(data, places[blob])) for blob, data in blobs.items()}


def _pinned(snapshot: git.Snapshot) -> set[ObjectId]:
    names = (path.removeprefix("pins/").partition("?")[0] for path in snapshot.files if path.startswith("pins/"))
    return {ObjectId(name) for name in names if is_object_id(name)}


ROOTS = ("manifests", "pins")


def _whole(catalog: Catalog) -> tuple[Entry, ...]:
    listing = catalog.listing()
    for broken in listing.broken:
        raise CorruptManifest(str(broken.path), f"{broken.reason}; nothing was deleted")
    return listing.entries


def _is_manifest(path: str) -> bool:
    return path.startswith("manifests/") and path.partition("?")[0].endswith(".json")
