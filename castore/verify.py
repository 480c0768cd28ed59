"""Re-read, decode and re-hash what is stored, and tell what is wrong with it.

Nothing is moved or changed unless a repair is asked for. The store's shared lock is held meanwhile: others save and
load, gc waits.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from castore.errors import CorruptIndex, CorruptObject, ObjectMissing, StorageError, UnsupportedVersion
from castore.format import part_index
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import Entry
from castore.format.part_index import ChunkRef
from castore.policy.retention import RESUME_PARTS
from castore.remotes import fallback
from castore.repo import Repo
from castore.storage.catalog import Listing

Kind = Literal["damaged", "missing", "inconsistent", "unreadable", "manifest", "stray"]
"""``damaged``: the bytes are not what the id names. ``missing``: a part needs it. ``inconsistent``: whole objects that
don't fit together. ``unreadable``: the disk fails, or a newer castore wrote it. ``manifest``: a file that should be one
and isn't. ``stray``: a file among the objects that isn't one; it harms nothing, and nothing reads it."""

Progress = Callable[[int, int], None]
"""Told how many stored bytes of how many have been read."""


@dataclass(frozen=True, slots=True)
class Need:
    """A part of a manifest."""

    manifest: ObjectId
    part: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong. ``needed_by`` are the parts that can't be had for it; ``repaired_from`` is the remote
    that a good copy was fetched from, empty when it wasn't repaired."""

    kind: Kind
    reason: str
    path: Path
    object_id: ObjectId | None = None
    needed_by: tuple[Need, ...] = ()
    repaired_from: str = ""

    @property
    def is_harmless(self) -> bool:
        """Whether no data is affected, or none any more."""
        return self.kind == "stray" or bool(self.repaired_from)


def verify(
    repo: Repo, ids: Sequence[str] | None = None, *, repair: bool = False, progress: Progress | None = None
) -> Iterator[Finding]:
    """Check what the checkpoints ``ids`` need (named as in :meth:`Repo.find`), or everything in the store.

    Of checkpoints that are named all must be there. Otherwise a part whose index isn't here was dropped, which is no
    finding; an index that is here needs every chunk. With ``repair`` damaged objects are moved to quarantine, and they
    and the missing ones fetched from the first remote that has a good copy. One object a thread is in memory at a time.
    Raises UnknownId and so on for ``ids``, Locked, and StorageError when a repair can't write.
    """
    entries = {entry.id: entry for entry in map(repo.find, ids)}.values() if ids else None
    with repo.lock():
        yield from _Verification(repo, repair, progress or _ignore).run(entries)


def _ignore(done: int, total: int) -> None:
    pass


@dataclass(slots=True)
class _Needs:
    """Who needs an object, and the plain lengths that their indexes give it."""

    by: list[Need] = field(default_factory=list)
    lengths: set[int] = field(default_factory=set)


class _Verification:
    def __init__(self, repo: Repo, repair: bool, progress: Progress) -> None:
        self._repo = repo
        self._store = repo.store
        self._repair = repair
        self._progress = progress
        self._scratch = threading.local()
        self._needs: dict[ObjectId, _Needs] = {}
        self._sizes: dict[ObjectId, int] = {}
        # objects in whose place something stands that is no regular file
        self._displaced: set[ObjectId] = set()
        folder = repo.store.quarantine
        self._quarantined = {name[:64] for name in os.listdir(folder)} if folder.is_dir() else set()
        # indexes that can be mended, until it is known whether their chunks can be had
        self._mendable: dict[ObjectId, tuple[Finding, tuple[ChunkRef, ...]]] = {}

    def run(self, chosen: Collection[Entry] | None) -> Iterator[Finding]:
        if chosen is not None:
            indexes = self._indexes(chosen)
            self._look_for(indexes)
        else:
            # manifests first: what a save that ends meanwhile refers to is found among the objects, which come after
            listing = self._repo.catalog.listing()
            yield from self._look_around(listing)
            indexes = self._indexes(listing.entries)
            yield from self._inconsistent(listing.entries)
            # what damage took away was not dropped
            indexes = [own for own in indexes if self._is_here(own) or own in self._quarantined]
        yield from self._check_indexes(indexes)
        if chosen is None:  # a save would take even those that nobody needs for stored
            yield from map(self._missing, sorted(self._displaced - self._needs.keys()))
        done = set(indexes)
        yield from self._check_chunks([own for own in self._sizes if own not in done], done)
        yield from self._mend_indexes()

    def _look_around(self, listing: Listing) -> Iterator[Finding]:
        """See everything that is in the store; tell what is neither a manifest nor an object."""
        for broken in listing.broken:
            yield Finding(kind="manifest", reason=broken.reason, path=broken.path)
        self._sizes = {own: found.size for own, found in self._store.stored().items()}
        for path in self._store.strays():
            if is_object_id(path.name) and path == self._store.path(ObjectId(path.name)):
                self._displaced.add(ObjectId(path.name))
            else:
                yield Finding(kind="stray", reason="not an object, and never read", path=path)

    def _look_for(self, wanted: Iterable[ObjectId]) -> None:
        """See what is in the place of some objects: for a few, looking around would take longer than reading them."""
        for own in wanted:
            try:
                size = self._store.stored_size(own)
            except StorageError:
                size = 0  # reading it tells what is wrong
            if size is not None:
                self._sizes[own] = size
            elif os.path.lexists(self._store.path(own)):
                self._displaced.add(own)

    # -- indexes -----------------------------------------------------------------------------------------------------

    def _indexes(self, entries: Iterable[Entry]) -> list[ObjectId]:
        """The index of every part, once each."""
        for entry in entries:
            for name, part in entry.manifest.parts.items():
                self._needs.setdefault(part.index, _Needs()).by.append(Need(entry.id, name))
        return list(self._needs)

    def _check_indexes(self, wanted: Sequence[ObjectId]) -> Iterator[Finding]:
        for own, result in _parallel(self._read_index, wanted, self._repo.threads):
            if isinstance(result, Finding):
                yield result
                continue
            for chunk in result:
                self._needs.setdefault(chunk.id, _Needs()).lengths.add(chunk.length)
            for chunk_id in {chunk.id for chunk in result}:
                self._needs[chunk_id].by += self._needs[own].by
        chunks = [own for own, needs in self._needs.items() if needs.lengths]
        self._look_for(own for own in chunks if own not in self._sizes)
        missing = [own for own in chunks if own not in self._sizes]
        for _, found in _parallel(self._missing, missing, self._repo.threads):
            yield found

    def _read_index(self, own: ObjectId) -> tuple[ChunkRef, ...] | Finding:
        try:
            if own not in self._sizes:
                raise ObjectMissing(own)
            data = self._store.read(own, mend=False)
            return part_index.decode(data).chunks
        except CorruptIndex as error:
            return self._finding("damaged", own, str(error))
        except (ObjectMissing, CorruptObject) as error:
            return self._elsewhere(own, error) if self._repair else self._describe(own, error)
        except (UnsupportedVersion, StorageError) as error:
            return self._finding("unreadable", own, str(error))

    def _elsewhere(self, own: ObjectId, error: ObjectMissing | CorruptObject) -> tuple[ChunkRef, ...] | Finding:
        """The chunks of an index that is missing or damaged here, if the trash or a remote has it."""
        finding = self._describe(own, error)
        self._store.set_aside(own)
        try:
            # moves what is damaged to quarantine, takes it back from the trash, or looks at the remotes
            chunks = part_index.decode(fallback.read(self._store, self._repo.remotes, own)[0]).chunks
        except (ObjectMissing, CorruptObject, CorruptIndex, UnsupportedVersion):
            return finding
        self._mendable[own] = finding, chunks
        return chunks

    def _mend_indexes(self) -> Iterator[Finding]:
        """Store indexes whose chunks are all here by now: without them, one would be taken for damage."""
        for own, (finding, chunks) in self._mendable.items():
            lost = sum(not self._store.has(chunk.id) for chunk in chunks)
            if lost:
                yield replace(finding, reason=f"{finding.reason}; it could be mended, but {lost} of its chunks can't")
            else:
                yield replace(finding, repaired_from=self._mend(own))

    def _inconsistent(self, entries: Iterable[Entry]) -> Iterator[Finding]:
        """Checkpoints whose model is gone while a part that is worth nothing without it is still here."""
        dropped = []
        held: set[ObjectId] = set()
        for entry in entries:
            parts = entry.manifest.parts
            if "model" in parts and not self._is_here(parts["model"].index):
                dropped.append(entry)
            else:
                held.update(part.index for part in parts.values())
        for entry in dropped:
            parts = entry.manifest.parts
            model = parts["model"].index
            # equal parts of other checkpoints have the same index: theirs is no sign of this one
            left = [
                name
                for name in parts
                if name in RESUME_PARTS and parts[name].index in self._sizes and parts[name].index not in held
            ]
            if left and not fallback.available(self._repo.remotes, [model]):
                reason = f"the model is gone but its {' and '.join(left)} is here: `castore gc` removes the rest"
                yield Finding(
                    kind="inconsistent", reason=reason, path=self._store.path(model), object_id=model,
                    needed_by=(Need(entry.id, "model"),),
                )  # fmt: skip

    def _is_here(self, own: ObjectId) -> bool:
        """Whether it is in the store, or something in its place."""
        return own in self._sizes or own in self._displaced

    # -- objects -----------------------------------------------------------------------------------------------------

    def _check_chunks(self, wanted: Sequence[ObjectId], done: Iterable[ObjectId]) -> Iterator[Finding]:
        read = sum(self._sizes.get(own, 0) for own in done)
        total = read + sum(self._sizes[own] for own in wanted)
        if read:
            self._progress(read, total)  # there may be nothing but indexes
        for own, result in _parallel(self._check, wanted, self._repo.threads):
            read += self._sizes[own]
            self._progress(read, total)
            if result is not None:
                yield result

    def _check(self, own: ObjectId) -> Finding | None:
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = bytearray()
        try:
            length = self._store.check(own, self._scratch.buffer)
        except (CorruptObject, ObjectMissing) as error:
            return self._lost(own, error)
        except (UnsupportedVersion, StorageError) as error:
            return self._finding("unreadable", own, str(error))
        expected = self._needs[own].lengths - {length} if own in self._needs else set()
        if expected:
            return self._finding("inconsistent", own, f"holds {length} bytes where an index says {expected.pop()}")
        return None

    def _missing(self, own: ObjectId) -> Finding:
        return self._lost(own, ObjectMissing(own))

    def _lost(self, own: ObjectId, error: ObjectMissing | CorruptObject) -> Finding:
        """What to report of an object that is missing or damaged, after trying to mend it when that was asked for."""
        found = self._describe(own, error)
        return replace(found, repaired_from=self._mend(own)) if self._repair else found

    def _describe(self, own: ObjectId, error: ObjectMissing | CorruptObject) -> Finding:
        if own in self._displaced:
            return self._finding("damaged", own, "what is in its place is no regular file")
        if isinstance(error, CorruptObject):
            return self._finding("damaged", own, error.reason)
        where = "it was moved to quarantine/ as damaged" if own in self._quarantined else "not in the store"
        return self._finding("missing", own, where)

    def _mend(self, own: ObjectId) -> str:
        """Where a good copy came from that is in the store now; empty when there is none."""
        self._store.set_aside(own)
        try:
            self._store.read(own)  # moves it to quarantine, or takes it back from the trash
        except (ObjectMissing, CorruptObject):
            return fallback.fetch(self._store, self._repo.remotes, own) or ""
        return "trash/"

    def _finding(self, kind: Kind, own: ObjectId, reason: str) -> Finding:
        needed_by = tuple(self._needs[own].by) if own in self._needs else ()
        return Finding(kind=kind, reason=reason, path=self._store.path(own), object_id=own, needed_by=needed_by)


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def _parallel(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int
) -> Iterator[tuple[_Item, _Result]]:
    """(item, its result) in order, from ``threads`` threads that are never far ahead of whoever takes the results."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="castore-verify")
    pending: deque[tuple[_Item, Future[_Result]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) >= 4 * threads:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
