"""Re-read, decode and re-hash what is stored, and report what is wrong with it.

Nothing is moved or changed unless a repair is asked for. The store's shared lock is held meanwhile: others can save and
load, gc waits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from castore.errors import CorruptIndex, CorruptObject, ObjectMissing, StorageError, UnsupportedVersion
from castore.format import part_index
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import Entry
from castore.format.part_index import ChunkRef
from castore.parallel import map_ahead
from castore.policy.retention import RESUME_PARTS
from castore.progress import Progress, ignore_progress
from castore.remotes import fallback
from castore.repo import Repo
from castore.storage.catalog import Listing

_THREADS = "castore-verify"

Kind = Literal["damaged", "missing", "inconsistent", "unreadable", "manifest", "stray"]
"""``damaged``: the bytes are not what the id names. ``missing``: a part needs an object that is not there.
``inconsistent``: objects that are intact but don't fit together. ``unreadable``: the disk fails, or a newer castore
wrote it. ``manifest``: a file among the manifests that is not a valid one. ``stray``: a file among the objects that is
not an object; it does no harm, and nothing reads it."""


@dataclass(frozen=True, slots=True)
class Need:
    """A part of a checkpoint that needs the object of a finding."""

    checkpoint_id: ObjectId
    part: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong. ``needed_by`` are the parts that can't be loaded because of it.

    ``repaired_from`` is the remote that a good copy came from, or ``trash/``; empty if it was not repaired.
    """

    kind: Kind
    reason: str
    path: Path
    object_id: ObjectId | None = None
    needed_by: tuple[Need, ...] = ()
    repaired_from: str = ""

    @property
    def is_harmless(self) -> bool:
        """Whether no data is affected, or no longer is."""
        return self.kind == "stray" or bool(self.repaired_from)


def verify(
    repo: Repo,
    selectors: Sequence[str] | None = None,
    *,
    repair: bool = False,
    progress: Progress = ignore_progress,
) -> Iterator[Finding]:
    """Check what the checkpoints that ``selectors`` name need (see :meth:`Repo.find`), or everything in the store.

    Of checkpoints that are named, everything must be there. Otherwise a part whose index isn't here was dropped, which
    is not a finding, while an index that is here needs all its chunks. With ``repair``, damaged objects are moved to
    quarantine, and they and the missing ones fetched from the first remote with a good copy. ``progress`` counts stored
    bytes. Each thread has one object in memory at a time. Raise UnknownId and so on for ``selectors``, Locked, and
    StorageError if a repair can't write.

    >>> import tempfile, castore
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     repo = castore.Repo.init(folder)
    ...     saved = repo.save({"trainer": {"seed": 1}}, run="main", step=1)
    ...     _ = repo.store.path(saved.manifest.parts["trainer"].index).write_bytes(b"not what was saved")
    ...     [finding.kind for finding in verify(repo)]
    ['damaged']
    """
    entries = {entry.id: entry for entry in map(repo.find, selectors)}.values() if selectors else None
    with repo.lock():
        verification = _Verification(repo, repair, progress)
        yield from verification.check_everything() if entries is None else verification.check(entries)


@dataclass(slots=True)
class _Needs:
    """The parts that need an object, and the plain lengths in bytes that their indexes give it."""

    parts: list[Need] = field(default_factory=list)
    lengths: set[int] = field(default_factory=set)


class _Verification:
    """One run of :func:`verify`: see what is there, then check the indexes, then all other objects."""

    def __init__(self, repo: Repo, repair: bool, progress: Progress) -> None:
        self._repo = repo
        self._store = repo.store
        self._repair = repair
        self._progress = progress
        self._scratch = threading.local()
        self._needs: dict[ObjectId, _Needs] = {}
        # stored bytes of every object that was seen
        self._sizes: dict[ObjectId, int] = {}
        # objects in whose place there is something other than a regular file
        self._displaced: set[ObjectId] = set()
        folder = repo.store.quarantine
        self._quarantined = {name[:64] for name in os.listdir(folder)} if folder.is_dir() else set()
        # indexes that a remote has, with the finding about each and its chunks, until all those are here
        self._repairable: dict[ObjectId, tuple[Finding, tuple[ChunkRef, ...]]] = {}

    def check(self, entries: Collection[Entry]) -> Iterator[Finding]:
        """Check what some checkpoints need: all of it must be there."""
        index_ids = self._collect_indexes(entries)
        self._look_for(index_ids)
        yield from self._check_indexes(index_ids)
        yield from self._check_objects(checked=index_ids)
        yield from self._repair_indexes()

    def check_everything(self) -> Iterator[Finding]:
        """Check all manifests and everything in the store."""
        # manifests first: what a save that ends meanwhile refers to is then among the objects, which come after
        listing = self._repo.catalog.listing(cached=False)
        yield from self._look_around(listing)
        index_ids = self._collect_indexes(listing.entries)
        yield from self._find_inconsistent(listing.entries)
        # an index that damage took away was not dropped
        expected = [index_id for index_id in index_ids if self._is_here(index_id) or index_id in self._quarantined]
        yield from self._check_indexes(expected)
        # even those that nobody needs: a save would take them for stored
        yield from map(self._report_missing, sorted(self._displaced - self._needs.keys()))
        yield from self._check_objects(checked=expected)
        yield from self._repair_indexes()

    # -- what is there -----------------------------------------------------------------------------------------------

    def _look_around(self, listing: Listing) -> Iterator[Finding]:
        """See everything that is in the store, and report what is neither a manifest nor an object."""
        for broken in listing.broken:
            yield Finding(kind="manifest", reason=broken.reason, path=broken.path)
        self._sizes = {object_id: stored.size for object_id, stored in self._store.stored().items()}
        for path in self._store.strays():
            if is_object_id(path.name) and path == self._store.path(ObjectId(path.name)):
                self._displaced.add(ObjectId(path.name))
            else:
                yield Finding(kind="stray", reason="not an object, and never read", path=path)

    def _look_for(self, object_ids: Iterable[ObjectId]) -> None:
        """See whether some objects are there: for a few, looking around would take longer than reading them."""
        for object_id in object_ids:
            try:
                size = self._store.stored_size(object_id)
            except StorageError:
                size = 0  # reading it will say what is wrong
            if size is not None:
                self._sizes[object_id] = size
            elif os.path.lexists(self._store.path(object_id)):
                self._displaced.add(object_id)

    def _is_here(self, object_id: ObjectId) -> bool:
        """Return whether the object, or something in its place, is in the store."""
        return object_id in self._sizes or object_id in self._displaced

    def _find_inconsistent(self, entries: Iterable[Entry]) -> Iterator[Finding]:
        """Report checkpoints whose model is gone while a part that is useless without it is still here."""
        without_model = []
        needed: set[ObjectId] = set()
        for entry in entries:
            parts = entry.manifest.parts
            if "model" in parts and not self._is_here(parts["model"].index):
                without_model.append(entry)
            else:
                needed.update(part.index for part in parts.values())
        for entry in without_model:
            parts = entry.manifest.parts
            model_id = parts["model"].index
            # equal parts of other checkpoints have the same index: their presence says nothing about this one
            remaining = [
                name
                for name in parts
                if name in RESUME_PARTS and parts[name].index in self._sizes and parts[name].index not in needed
            ]
            if remaining and not fallback.available(self._repo.remotes, [model_id]):
                names = " and ".join(remaining)
                yield Finding(
                    kind="inconsistent",
                    reason=f"the model is gone but its {names} is here: `castore gc` removes the rest",
                    path=self._store.path(model_id),
                    object_id=model_id,
                    needed_by=(Need(entry.id, "model"),),
                )

    # -- indexes -----------------------------------------------------------------------------------------------------

    def _collect_indexes(self, entries: Iterable[Entry]) -> list[ObjectId]:
        """Return the index of every part, once each, and note which parts need it."""
        for entry in entries:
            for name, part in entry.manifest.parts.items():
                self._needs.setdefault(part.index, _Needs()).parts.append(Need(entry.id, name))
        return list(self._needs)

    def _check_indexes(self, index_ids: Sequence[ObjectId]) -> Iterator[Finding]:
        """Read indexes, note what they need, and report those that fail and the chunks that are missing."""
        results = map_ahead(self._read_index, index_ids, self._repo.threads, name=_THREADS)
        for index_id, result in zip(index_ids, results, strict=True):
            if isinstance(result, Finding):
                yield result
                continue
            for chunk in result:
                self._needs.setdefault(chunk.id, _Needs()).lengths.add(chunk.length)
            for chunk_id in {chunk.id for chunk in result}:
                self._needs[chunk_id].parts += self._needs[index_id].parts
        chunk_ids = [object_id for object_id, needs in self._needs.items() if needs.lengths]
        self._look_for(chunk_id for chunk_id in chunk_ids if chunk_id not in self._sizes)
        missing = [chunk_id for chunk_id in chunk_ids if chunk_id not in self._sizes]
        yield from map_ahead(self._report_missing, missing, self._repo.threads, name=_THREADS)

    def _read_index(self, index_id: ObjectId) -> tuple[ChunkRef, ...] | Finding:
        """Return the chunks that an index lists, or what is wrong with it."""
        try:
            if index_id not in self._sizes:
                raise ObjectMissing(index_id)
            data = self._store.read(index_id, mend=False)
            return part_index.decode(data).chunks
        except CorruptIndex as error:
            return self._finding("damaged", index_id, str(error))
        except (ObjectMissing, CorruptObject) as error:
            return self._read_elsewhere(index_id, error) if self._repair else self._describe(index_id, error)
        except (UnsupportedVersion, StorageError) as error:
            return self._finding("unreadable", index_id, str(error))

    def _read_elsewhere(
        self, index_id: ObjectId, error: ObjectMissing | CorruptObject
    ) -> tuple[ChunkRef, ...] | Finding:
        """Return the chunks of an index that is missing or damaged here, if the trash or a remote has it."""
        finding = self._describe(index_id, error)
        self._store.set_aside(index_id)
        try:
            # moves a damaged one to quarantine, takes one back from the trash, or asks the remotes
            chunks = part_index.decode(fallback.read(self._store, self._repo.remotes, index_id)[0]).chunks
        except (ObjectMissing, CorruptObject, CorruptIndex, UnsupportedVersion):
            return finding
        self._repairable[index_id] = finding, chunks
        return chunks

    def _repair_indexes(self) -> Iterator[Finding]:
        """Store the indexes whose chunks are all here by now: an index without them would be taken for damage."""
        for index_id, (finding, chunks) in self._repairable.items():
            lost = sum(not self._store.has(chunk.id) for chunk in chunks)
            if lost:
                reason = f"{finding.reason}; a remote has it, but {lost} of its chunks can't be repaired"
                yield replace(finding, reason=reason)
            else:
                yield replace(finding, repaired_from=self._repair_object(index_id))

    # -- other objects -----------------------------------------------------------------------------------------------

    def _check_objects(self, *, checked: Collection[ObjectId]) -> Iterator[Finding]:
        """Read every object that was seen, but for those that were ``checked`` before."""
        skipped = set(checked)
        object_ids = [object_id for object_id in self._sizes if object_id not in skipped]
        done = sum(self._sizes.get(object_id, 0) for object_id in skipped)
        total = done + sum(self._sizes[object_id] for object_id in object_ids)
        if done:
            self._progress(done, total)  # there may be nothing but indexes
        results = map_ahead(self._check_object, object_ids, self._repo.threads, name=_THREADS)
        for object_id, finding in zip(object_ids, results, strict=True):
            done += self._sizes[object_id]
            self._progress(done, total)
            if finding is not None:
                yield finding

    def _check_object(self, object_id: ObjectId) -> Finding | None:
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = bytearray()
        try:
            length = self._store.check(object_id, self._scratch.buffer)
        except (CorruptObject, ObjectMissing) as error:
            return self._report(object_id, error)
        except (UnsupportedVersion, StorageError) as error:
            return self._finding("unreadable", object_id, str(error))
        claimed = self._needs[object_id].lengths - {length} if object_id in self._needs else set()
        if claimed:
            return self._finding("inconsistent", object_id, f"holds {length} bytes where an index says {claimed.pop()}")
        return None

    # -- findings ----------------------------------------------------------------------------------------------------

    def _report_missing(self, object_id: ObjectId) -> Finding:
        return self._report(object_id, ObjectMissing(object_id))

    def _report(self, object_id: ObjectId, error: ObjectMissing | CorruptObject) -> Finding:
        """Return the finding about an object that is missing or damaged, repaired if that was asked for."""
        finding = self._describe(object_id, error)
        return replace(finding, repaired_from=self._repair_object(object_id)) if self._repair else finding

    def _describe(self, object_id: ObjectId, error: ObjectMissing | CorruptObject) -> Finding:
        if object_id in self._displaced:
            return self._finding("damaged", object_id, "there is something other than a regular file in its place")
        if isinstance(error, CorruptObject):
            return self._finding("damaged", object_id, error.reason)
        was_damaged = object_id in self._quarantined
        reason = "it was moved to quarantine/ because it was damaged" if was_damaged else "not in the store"
        return self._finding("missing", object_id, reason)

    def _repair_object(self, object_id: ObjectId) -> str:
        """Put a good copy into the store and return where it came from, or an empty string if there is none."""
        self._store.set_aside(object_id)
        try:
            self._store.read(object_id)  # moves a damaged one to quarantine, or takes one back from the trash
        except (ObjectMissing, CorruptObject):
            return fallback.fetch(self._store, self._repo.remotes, object_id) or ""
        return "trash/"

    def _finding(self, kind: Kind, object_id: ObjectId, reason: str) -> Finding:
        needed_by = tuple(self._needs[object_id].parts) if object_id in self._needs else ()
        path = self._store.path(object_id)
        return Finding(kind=kind, reason=reason, path=path, object_id=object_id, needed_by=needed_by)
