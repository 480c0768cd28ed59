"""Manifests, pins, tags and records of bundles: in the work tree, the git index and git refs.

Resolving looks at the work tree alone: what is checked out is what was reviewed and merged. A manifest on another
branch, that of a pull request for example, makes claims that nobody has agreed to. Before anything is deleted, the
manifests, pins and tags of all of them count: :func:`read_roots`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from castore.errors import (
    ConfigError,
    CorruptBundle,
    CorruptManifest,
    CorruptTag,
    GitUnreadable,
    InvalidManifest,
    ManifestsHidden,
    RootsUnreadable,
    StorageError,
    UnsupportedVersion,
    UsageError,
    printable,
)
from castore.format import manifest, tag
from castore.format.bundle import MAX_RECORD_BYTES, Record, decode_record, encode_record
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import Entry, Manifest
from castore.policy.order import newest_first
from castore.storage import fs, git, git_process, manifest_cache, safe_paths
from castore.storage.manifest_cache import ManifestCache

_SESSION = re.compile(r"sessions/(?P<run>[^/]+)/(?P<name>\d{8}T\d{6}\.\d{6}Z\.json)", re.ASCII)
_ID_DIGITS = 12  # how many digits of a manifest's id stand in the name of its file


@dataclass(frozen=True, slots=True)
class BrokenFile:
    """A file that stands where a manifest or a record should be and can't be read as one."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The manifests of the work tree, newest first, and the files among them that can't be read as one."""

    entries: tuple[Entry, ...]
    broken: tuple[BrokenFile, ...]


class Catalog:
    """What ``.castore`` keeps in git, one file each: manifests, pins (empty), tags, sessions and records of bundles."""

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.root = folder / "manifests"
        self._pins = folder / "pins"
        self._tags = folder / "tags"
        self._bundles = folder / "bundles"
        self._sessions = folder / "sessions"
        self._cache = folder / "cache" / "manifests"
        self._temporary = folder / "tmp"
        self._durable = durable

    # -- manifests ---------------------------------------------------------------------------------------------------

    def listing(self, *, cached: bool = True) -> Listing:
        """Return every manifest of the work tree. A damaged one is reported beside the others, never replaced.

        Unless ``cached``, every file is read, also one that has not changed since it was read and verified before.
        ManifestsHidden if there is none here, and git has some.
        """
        files, broken = self._manifest_files()
        cache = manifest_cache.read(self._cache) if cached else ManifestCache()
        stamps = _stamps(files)
        if stamps and len(cache.paths) == len(stamps) and [stamps.get(path) for path in cache.paths] == cache.stamps:
            return Listing(tuple(cache.entries), tuple(broken))  # in their order, too
        before = dict(zip(cache.paths, zip(cache.stamps, cache.entries, strict=True), strict=True))
        known = {path: before[path] for path, stamp in stamps.items() if path in before and before[path][0] == stamp}
        read, unreadable = _read_manifests({path: files[path].path for path in stamps if path not in known})
        known |= {path: (stamps[path], entry) for path, entry in read.items()}
        broken += unreadable
        if not known and not broken:
            self._refuse_sparse()
        newest = newest_first(entry for _, entry in known.values())
        if cached and manifest_cache.is_worth_writing(read_again=len(read), entries=len(known)):
            paths = (entry.manifest.file_name(entry.id) for entry in newest)
            manifest_cache.write(self._cache, {path: known[path] for path in paths}, self._temporary)
        return Listing(tuple(newest), tuple(broken))

    def listing_beside(self, known: Iterable[Entry]) -> Listing:
        """Return the manifests of the work tree that are not among ``known``; every file of one is read."""
        files, broken = self._manifest_files()
        for entry in known:
            files.pop(entry.manifest.file_name(entry.id), None)
        read, unreadable = _read_manifests({path: file.path for path, file in files.items()})
        return Listing(tuple(newest_first(read.values())), (*broken, *unreadable))

    def _refuse_sparse(self) -> None:
        """Raise ManifestsHidden if git has manifests and the work tree has none."""
        names = git.tracked(self.root.parent, [self.root.name]) if git.is_inside(self.root.parent) else []
        hidden = [name for name in names or () if name.endswith(".json")]
        if hidden:
            raise ManifestsHidden(len(hidden), str(self.root))

    def matching(self, id_prefix: str) -> list[Entry]:
        """Return the manifests whose id begins with ``id_prefix``, in either case; none for an empty prefix.

        CorruptManifest, UnsupportedVersion or StorageError when there is none but for one that can't be read.
        """
        prefix = id_prefix.lower()
        if not prefix:  # a variable that was not set, not a wish for whatever is there
            return []
        entries, errors = [], []
        for path in self._manifest_paths():
            # the file's name holds the first digits of the id, so no other file has to be read
            if not _digits_in(path).startswith(prefix[:_ID_DIGITS]):
                continue
            try:
                entries.append(_read_manifest(path))
            except (CorruptManifest, UnsupportedVersion, StorageError) as error:
                errors.append(error)
            except FileNotFoundError:
                continue
        matches = [entry for entry in entries if entry.id.startswith(prefix)]
        if errors and not matches:
            raise errors[0]
        return matches

    def known_ids(self) -> Iterator[str]:
        """Yield the first 12 digits of every manifest's id, from the names of the files alone."""
        yield from map(_digits_in, self._manifest_paths())

    def check_run(self, run: str) -> None:
        """Raise InvalidManifest if a run of the same name in other case is here: on some disks they are one folder."""
        for folder in fs.scan(self.root):
            if folder.name != run and safe_paths.collision_key(folder.name) == safe_paths.collision_key(run):
                raise InvalidManifest(f"run {run} differs from run {folder.name} in case alone: use another name")

    def add(self, new: Manifest) -> tuple[ObjectId, Path]:
        """Write a manifest durably; return its id and path. This is the commit point of a save.

        The objects that it refers to must be durable already. CorruptManifest when a file of that name holds something
        else.
        """
        self.check_run(new.run)
        data = manifest.encode(new)
        checkpoint_id, _ = manifest.decode(data)
        path = self.root / new.file_name(checkpoint_id)
        is_first = not self.root.is_dir()
        fs.make_directory(path.parent)
        if self._durable and is_first:  # git keeps no empty folder
            fs.sync_directory(self.root.parent)
        if self._durable:  # even if the folder exists: the process that made it may have died before syncing it
            fs.sync_directory(self.root)
        if not fs.publish(path, data, self._temporary, durable=self._durable) and _read_bytes(path) != data:
            raise CorruptManifest(str(path), "another file has this manifest's name")
        return checkpoint_id, path

    def forget(self, entry: Entry) -> Path:
        """Remove a manifest from the work tree; return its path. Git's history and other branches still have it."""
        path = self.root / entry.manifest.file_name(entry.id)
        self._remove(path)
        return path

    # -- pins --------------------------------------------------------------------------------------------------------

    def pins(self) -> frozenset[ObjectId]:
        """Return the ids of the manifests whose data is kept whatever the policy says."""
        return frozenset(ObjectId(file.name) for file in fs.scan(self._pins) if is_object_id(file.name))

    def pin(self, checkpoint_id: ObjectId) -> Path:
        """Write a pin and return its path. Pins are files, so branches never conflict over one and each counts."""
        self._make_folder(self._pins)
        fs.publish(self._pins / checkpoint_id, b"", self._temporary, durable=self._durable)
        return self._pins / checkpoint_id

    def _make_folder(self, folder: Path) -> None:
        """Create a folder of the repository, and make its name durable: who created it may have died before that."""
        fs.make_directory(folder)
        if self._durable:
            fs.sync_directory(folder.parent)

    def _remove(self, path: Path) -> None:
        """Remove a file of the repository, durably; it is no error if it isn't there."""
        fs.unlink(path)
        if self._durable and path.parent.is_dir():
            fs.sync_directory(path.parent)

    def unpin(self, checkpoint_id: ObjectId) -> bool:
        """Remove a pin from the work tree; return False if there is none."""
        is_pinned = checkpoint_id in self.pins()
        self._remove(self._pins / checkpoint_id)
        return is_pinned

    # -- tags --------------------------------------------------------------------------------------------------------

    def tags(self) -> tuple[dict[str, ObjectId], list[BrokenFile]]:
        """Return the id that each tag names, by the tag's name in order, and the files that can't be read as a tag."""
        tags: dict[str, ObjectId] = {}
        broken = []
        for file in sorted(fs.scan(self._tags), key=lambda file: file.name):
            if tag.is_tag_name(file.name):
                try:
                    if tagged := self.tagged(file.name):
                        tags[file.name] = tagged
                except (CorruptTag, StorageError) as error:
                    broken.append(BrokenFile(Path(file.path), str(error).removeprefix(f"{file.path}: ")))
        return tags, broken

    def tagged(self, name: str) -> ObjectId | None:
        """Return the id that a tag names, or None where there is no such tag. CorruptTag, StorageError."""
        path = self._tags / name
        if not tag.is_tag_name(name):
            return None
        if path.is_symlink():
            raise CorruptTag(str(path), "a symbolic link, which is not followed")
        try:
            return tag.decode(fs.read(path, tag.MAX_BYTES), str(path))
        except FileNotFoundError:
            return None

    def add_tag(self, name: str, checkpoint_id: ObjectId, *, move: bool = False) -> Path:
        """Let ``name`` name a manifest, durably; return the path. UsageError if it names another and not ``move``.

        Also for a name that no tag may have, or that differs from another tag's in case alone.
        """
        path = self._tags / tag.check_name(name)
        for file in fs.scan(self._tags):
            if file.name != name and safe_paths.collision_key(file.name) == safe_paths.collision_key(name):
                raise UsageError(f"tag {name} differs from tag {file.name} in case alone: use another name")
        self._make_folder(self._tags)
        data = tag.encode(checkpoint_id)
        if fs.publish(path, data, self._temporary, durable=self._durable, replace=move):
            return path
        if (tagged := self.tagged(name)) != checkpoint_id:
            of = f"names {tagged[:12]}" if tagged else "is in use"
            raise UsageError(f"tag {name} {of}: --force moves it, or choose another name")
        return path

    def remove_tag(self, name: str) -> bool:
        """Remove a tag from the work tree; return False if there is none."""
        is_there = tag.is_tag_name(name) and safe_paths.status(self._tags / name) is not None
        if is_there:
            self._remove(self._tags / name)
        return is_there

    # -- records of bundles ------------------------------------------------------------------------------------------

    def records(self) -> tuple[list[Record], list[BrokenFile]]:
        """Return the records of bundles, newest first, and the files that can't be read as one."""
        records, broken = [], []
        for file in fs.scan(self._bundles):
            if file.name.endswith(".json"):
                try:
                    record = self._read_record(Path(file.path))
                    records.append(record)
                except (CorruptBundle, UnsupportedVersion, StorageError) as error:
                    broken.append(BrokenFile(Path(file.path), str(error)))
                except FileNotFoundError:
                    continue
        return sorted(records, key=lambda record: (record.created, record.bundle), reverse=True), broken

    def _read_record(self, path: Path) -> Record:
        if path.is_symlink():
            raise CorruptBundle("a symbolic link, which is not followed")
        record = decode_record(fs.read(path, MAX_RECORD_BYTES))
        if record.file_name != path.name:
            raise CorruptBundle(f"its content belongs under {record.file_name}")
        return record

    def add_record(self, record: Record) -> Path:
        """Write the record of a bundle that a remote is known to hold; return its path."""
        path = self._bundles / record.file_name
        self._make_folder(self._bundles)
        fs.publish(path, encode_record(record), self._temporary, durable=self._durable)
        return path

    def remove_record(self, record: Record) -> Path:
        """Remove the record of a bundle that no remote holds any more; return its path."""
        path = self._bundles / record.file_name
        self._remove(path)
        return path

    # -- sessions ----------------------------------------------------------------------------------------------------

    def add_session(self, run: str, name: str, data: bytes) -> Path:
        """Write the summary of a session under the ``name`` that its start gives it; return the path of the file.

        InvalidManifest for a ``run`` that can't be the name of one; ConfigError when a link stands in its place.
        """
        if not manifest.RUN.fullmatch(run):
            raise InvalidManifest(f"run {run[:80]!r} is not 1 to 64 letters, digits, '.', '_' or '-'")
        folder = self._sessions / run
        if folder.is_symlink():
            raise ConfigError(str(folder), "is a symbolic link, which could lead castore anywhere: remove it")
        self._make_folder(self._sessions)
        self._make_folder(folder)
        fs.publish(folder / name, data, self._temporary, durable=self._durable)
        return folder / name

    # -- what other machines made ------------------------------------------------------------------------------------

    def adopt(self, path: str, data: bytes) -> bool:
        """Add a file of another commit, by its path in ``.castore``; return False if that is none of this class's.

        It must be a manifest, record, pin, tag or session that belongs under that path: CorruptionError.
        """
        folder, _, name = path.partition("/")
        if folder == "manifests" and name.endswith(".json"):
            checkpoint_id, decoded = manifest.decode(data, path)
            if decoded.file_name(checkpoint_id) != name:
                raise CorruptManifest(path, f"its content belongs under {decoded.file_name(checkpoint_id)}")
            self.add(decoded)
        elif folder == "bundles" and name.endswith(".json"):
            record = decode_record(data)
            if record.file_name != name:
                raise CorruptBundle(f"its content belongs under {record.file_name}")
            self.add_record(record)
        elif folder == "pins" and is_object_id(name) and not data:
            self.pin(ObjectId(name))
        elif folder == "tags" and tag.is_tag_name(name):
            self.add_tag(name, tag.decode(data, path))
        elif (session := _SESSION.fullmatch(path)) and _is_json(data):
            self.add_session(session["run"], session["name"], data)
        else:
            return False
        return True

    def _manifest_paths(self) -> list[str]:
        return [file.path for file in self._manifest_files()[0].values()]

    def _manifest_files(self) -> tuple[dict[str, os.DirEntry[str]], list[BrokenFile]]:
        """Return the files that should be manifests, by their path below ``manifests/``, and what can't be one.

        Links are not followed: one that came with a pull request could lead anywhere, to a terminal whose end is never
        reached for example.
        """
        runs = fs.scan(self.root)
        is_link = "a symbolic link, which is not followed"
        broken = [BrokenFile(Path(run.path), is_link) for run in runs if run.is_symlink()]
        files = {}
        for run in runs:
            if run.is_dir(follow_symlinks=False):
                for file in fs.scan(run.path):
                    if not file.name.endswith(".json"):
                        continue
                    if file.is_file(follow_symlinks=False):
                        files[f"{run.name}/{file.name}"] = file
                    else:
                        broken.append(BrokenFile(Path(file.path), "not a regular file"))
        return files, broken


def _stamps(files: Mapping[str, os.DirEntry[str]]) -> dict[str, manifest_cache.Stamp]:
    """Return the stamps of files by path, less those that were removed since they were listed."""
    stamps = {}
    for path, file in files.items():
        try:
            stamps[path] = manifest_cache.stamp_of(file.stat(follow_symlinks=False))
        except FileNotFoundError:
            continue
    return stamps


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=dict)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return False
    return True


def _digits_in(path: str) -> str:
    """Return the digits of the id that stand in the path of a manifest."""
    return path[-_ID_DIGITS - len(".json") : -len(".json")]


def _read_manifests(files: Mapping[str, str]) -> tuple[dict[str, Entry], list[BrokenFile]]:
    """Return the manifests in files, by the keys of these, and those that can't be read; less what is gone by now."""
    read, broken = {}, []
    for key, path in files.items():
        try:
            read[key] = _read_manifest(path)
        except (CorruptManifest, UnsupportedVersion, StorageError) as error:
            broken.append(BrokenFile(Path(path), str(error).removeprefix(f"{path}: ")))
        except FileNotFoundError:
            continue
    return read, broken


def _read_manifest(path: str) -> Entry:
    data = _read_bytes(path)
    checkpoint_id, decoded = manifest.decode(data, path)
    file_name = decoded.file_name(checkpoint_id)
    if not path.endswith("/" + file_name):
        raise CorruptManifest(path, f"its content belongs under {file_name}: it was changed or moved")
    return Entry(checkpoint_id, decoded)


def _read_bytes(path: Path | str) -> bytes:
    return fs.read(path, manifest.MAX_BYTES)


# -- roots: every manifest, pin and tag that may still be needed -----------------------------------------------------

ROOT_FOLDERS = ("manifests", "pins", "tags")
"""The folders of ``.castore`` that garbage collection reads of every ref."""


@dataclass(frozen=True, slots=True)
class Roots:
    """Everything that keeps data from being deleted.

    ``here`` are the manifests of the work tree and the git index, ``pins`` their pins, and ``tags`` their tags: the
    names of each manifest that has some. ``elsewhere`` are the manifests of each ref, stash or linked worktree that
    holds further ones, with its name; ``pins_elsewhere`` and ``tags_elsewhere`` all their pins and tags.
    """

    here: tuple[Entry, ...]
    elsewhere: tuple[tuple[str, tuple[Entry, ...]], ...]
    pins: frozenset[ObjectId]
    pins_elsewhere: frozenset[ObjectId] = frozenset()
    tags: Mapping[ObjectId, tuple[str, ...]] = field(default_factory=dict)
    tags_elsewhere: Mapping[ObjectId, tuple[str, ...]] = field(default_factory=dict)


@contextlib.contextmanager
def _needing_git() -> Iterator[None]:
    """Raise RootsUnreadable when the block can't read what git has."""
    try:
        yield
    except GitUnreadable as error:
        raise RootsUnreadable(error.reason) from error


@_needing_git()
def read_roots(catalog: Catalog) -> Roots:
    """Read the manifests, pins and tags of the work tree, the index, every ref's tip, stashes and linked worktrees.

    CorruptManifest, CorruptTag, UnsupportedVersion, StorageError or RootsUnreadable when any of it can't be read: then
    nothing may be deleted. What git moves meanwhile, from a stash into a work tree for example, counts.
    """
    own = _WorkTree(catalog)
    own.read()
    here, pins, tags = own.entries, own.pins, own.tags
    pins_elsewhere, tags_elsewhere = set[ObjectId](), set[_Tag]()
    sources: dict[str, dict[ObjectId, Entry]] = {}
    folder = catalog.root.parent
    git_process.refuse_bare(catalog.root)  # elsewhere git is asked from there
    if git.is_inside(folder):
        inside, (top, *linked) = git.worktrees(folder)
        linked_trees = {path: _WorkTree(Catalog(path / inside, durable=False)) for path in linked}
        for tree in linked_trees.values():
            tree.read()
        index, *linked_indexes = (git.index(path, inside, ROOT_FOLDERS, empty=["pins"]) for path in (top, *linked))
        snapshots = [index, *linked_indexes, *git.tips(folder, ROOT_FOLDERS)]
        # again: what has left git since the first time, as by `git stash pop`, is there by now
        for tree in (own, *linked_trees.values()):
            tree.read()
        for path, tree in linked_trees.items():
            sources[printable(f"worktree {path}")] = tree.entries
            pins_elsewhere |= tree.pins
            tags_elsewhere |= tree.tags
        by_blob = _read_blobs(folder, snapshots)
        for snapshot in snapshots:
            blobs = [blob for path, blob in snapshot.files.items() if _is_manifest(path)]
            entries = {by_blob[blob].id: by_blob[blob] for blob in blobs}
            (here if snapshot is index else sources.setdefault(snapshot.name, {})).update(entries)
            (pins if snapshot is index else pins_elsewhere).update(_pins_in(snapshot))
        for snapshot, found in zip(snapshots, _read_tags(folder, snapshots), strict=True):
            (tags if snapshot is index else tags_elsewhere).update(found)
    # the same manifests on many branches count once, and not at all when the work tree has them too
    further = {frozenset(entries): (name, tuple(entries.values())) for name, entries in sources.items()}
    return Roots(
        tuple(here.values()),
        tuple(source for ids, source in further.items() if not ids <= here.keys()),
        frozenset(pins),
        frozenset(pins_elsewhere),
        _names_by_id(tags),
        _names_by_id(tags_elsewhere),
    )


_Tag = tuple[str, ObjectId]


class _WorkTree:
    """The manifests, pins and tags that a work tree had any of the times that it was read."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.entries: dict[ObjectId, Entry] = {}
        self.pins: set[ObjectId] = set()
        self.tags: set[_Tag] = set()

    def read(self) -> None:
        """Add what is there now; a manifest that is known is not read again. Errors: :func:`read_roots`."""
        known = self.entries.values()
        listing = self._catalog.listing_beside(known) if known else self._catalog.listing(cached=False)
        for broken in listing.broken:
            raise CorruptManifest(str(broken.path), f"{broken.reason}; nothing was deleted")
        self.entries.update((entry.id, entry) for entry in listing.entries)
        self.pins |= self._catalog.pins()
        self.tags.update(_all_tags(self._catalog))


def _all_tags(catalog: Catalog) -> Iterable[_Tag]:
    tags, broken = catalog.tags()
    for file in broken:
        raise CorruptTag(str(file.path), f"{file.reason}; nothing was deleted")
    return tags.items()


def _read_tags(folder: Path, snapshots: Sequence[git.Snapshot]) -> Iterator[list[_Tag]]:
    """Yield the tags of each snapshot. CorruptTag, GitUnreadable."""
    places = {
        blob: f"{snapshot.name}:{path}"
        for snapshot in snapshots
        for path, blob in snapshot.files.items()
        if _tag_name(path)
    }
    blobs = git.blobs(folder, places, tag.MAX_BYTES)
    ids = {blob: tag.decode(data, places[blob]) for blob, data in blobs.items()}
    for snapshot in snapshots:
        yield [(_tag_name(path), ids[blob]) for path, blob in snapshot.files.items() if _tag_name(path)]


def _tag_name(path: str) -> str:
    """Return the name of the tag whose file has this path; empty if it is none."""
    name = path.removeprefix("tags/").partition("?")[0]
    return name if path.startswith("tags/") and tag.is_tag_name(name) else ""


def _names_by_id(tags: Iterable[_Tag]) -> dict[ObjectId, tuple[str, ...]]:
    names: dict[ObjectId, tuple[str, ...]] = {}
    for name, checkpoint_id in sorted(tags):
        names[checkpoint_id] = (*names.get(checkpoint_id, ()), name)
    return names


def _read_blobs(folder: Path, snapshots: Sequence[git.Snapshot]) -> dict[str, Entry]:
    """Return the manifest in each blob of the snapshots that should be one."""
    places = {
        blob: f"{snapshot.name}:{path}"
        for snapshot in snapshots
        for path, blob in snapshot.files.items()
        if _is_manifest(path)
    }
    blobs = git.blobs(folder, places, manifest.MAX_BYTES)
    return {blob: Entry(*manifest.decode(data, places[blob])) for blob, data in blobs.items()}


def _pins_in(snapshot: git.Snapshot) -> set[ObjectId]:
    names = (path.removeprefix("pins/").partition("?")[0] for path in snapshot.files if path.startswith("pins/"))
    return {ObjectId(name) for name in names if is_object_id(name)}


def _is_manifest(path: str) -> bool:
    return path.startswith("manifests/") and path.partition("?")[0].endswith(".json")
