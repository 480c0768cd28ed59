"""Delete in a remote what no kept checkpoint needs, in two passes.

The first marks what is of no use; a later one, when the marks are older than the grace period, deletes what is marked,
is still of no use, and was not written again since. A push writes again what is marked, and looks whether a pass is at
work (see :mod:`castore.remotes.marks`). So whoever pushes for less than the grace period loses nothing, though no lock
is held in common.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from castore.errors import (
    CorruptBundle,
    CorruptionError,
    CorruptObject,
    RemoteError,
    RootsUnreadable,
    StorageError,
    UsageError,
)
from castore.format import part_index
from castore.format.frame import decode_frame, plain_length
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import Entry
from castore.policy.retention import Decision, Policy, Source, Usability, decide, deletion_rank, kept_parts
from castore.remotes import marks, packs
from castore.remotes.base import PublishingRemote, RemoteFile
from castore.remotes.marks import Marks, Pass
from castore.repo import Repo
from castore.storage import catalog
from castore.transfer import read_manifests

_AT_ONCE = 1000  # files that are deleted after a sign of life
_MAX_CONFIG = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteGCPlan:
    """What a pass deletes, or would delete, and what it marks: names of files, with their bytes.

    ``decisions`` say for every manifest which parts are kept and why. ``waiting`` are of no use, but they or their
    marks are younger than the grace period.
    """

    decisions: tuple[Decision, ...]
    delete: Mapping[str, int]
    mark: Mapping[str, int]
    waiting: Mapping[str, int]
    kept_bytes: int

    @property
    def freed_bytes(self) -> int:
        """Bytes of all files that are deleted."""
        return sum(self.delete.values())


def collect_remote(
    repo: Repo,
    remote: PublishingRemote,
    policy: Policy,
    *,
    machine: str,
    grace: timedelta,
    dry_run: bool = False,
    now: datetime | None = None,
) -> RemoteGCPlan:
    """Make one pass over a remote, and return what it did.

    Manifests in git, in any branch, and in the remote count. ``now`` is, when None, what the remote's clock says, which
    the times of its files are by; in a dry run, what this machine's says. UsageError unless config.toml names this
    ``machine`` as the collector (a dry run needs no permission), and for the folder of a repository, whose pins and
    branches aren't known here. RootsUnreadable, CorruptionError, RemoteError or StorageError if it can't be told what
    is needed: then nothing was deleted. CollectionStopped if another pass began.
    """
    collector = repo.config.collector
    if not dry_run and machine != collector:
        named = f"is {collector}" if collector else "is not named in config.toml"
        raise UsageError(
            f"only one machine may delete in {remote.name}: the collector {named}, and this machine is {machine}; "
            f'write collector = "{machine}" in [remotes], or set CASTORE_COLLECTOR'
        )
    if remote.read_file("config.toml", _MAX_CONFIG) is not None:
        raise UsageError(f"{remote.name} is the folder of a repository: run `castore gc` there")

    def make_plan(now: datetime) -> RemoteGCPlan:
        with repo.lock():
            return _plan(repo, _Shelf(repo, remote.fresh()), policy, grace, now)

    if dry_run:
        return make_plan(now or datetime.now(UTC))
    at_work = Pass(remote)
    try:
        at_work.begin()
        plan = make_plan(now or datetime.fromtimestamp(at_work.began, UTC))
        _apply(remote, plan, at_work)
    except BaseException:
        with contextlib.suppress(RemoteError, StorageError):
            at_work.end(marks_changed=False)
        raise
    at_work.end(marks_changed=bool(plan.mark or plan.delete))
    return plan


class _Shelf:
    """What lies in a remote."""

    def __init__(self, repo: Repo, remote: PublishingRemote) -> None:
        self.remote = remote
        # marks first: what is written after them is younger than they are
        self.marks = marks.read(remote)
        self.marked_at = marks.written_at(remote)
        self.objects: dict[ObjectId, RemoteFile] = {}
        for file in remote.files("objects"):
            name = file.name.rpartition("/")[2]
            if is_object_id(name):
                self.objects[ObjectId(name)] = file
        self.packs = {file.name: file for file in remote.files("packs")}
        self.pointers = {
            ObjectId(name): file
            for file in self.packs.values()
            if is_object_id(name := file.name.removeprefix(f"{packs.PARTS}/"))
        }
        self._repo = repo
        self._chunks: dict[ObjectId, frozenset[ObjectId]] = {}
        self._frames: dict[ObjectId, bytes | None] = {}

    def has_part(self, index_id: ObjectId) -> bool:
        """Whether a part is there. What names its packs is written before they hold its index."""
        return index_id in self.objects or (index_id in self.pointers and self._frame(index_id) is not None)

    def chunks_of(self, index_id: ObjectId) -> frozenset[ObjectId]:
        """Return the chunks of a part that is there. CorruptionError, RemoteError, StorageError."""
        if index_id not in self._chunks:
            if self._repo.store.has(index_id):
                data = self._repo.store.read(index_id, mend=False)
            else:
                frame = self._frame(index_id)
                if frame is None:
                    raise CorruptObject(index_id, f"{self.remote.explain_missing(index_id)}, though it was listed")
                plain = bytearray(plain_length(index_id, memoryview(frame)))
                decode_frame(index_id, memoryview(frame), memoryview(plain))
                data = bytes(plain)
            self._chunks[index_id] = frozenset(chunk.id for chunk in part_index.decode_chunks(data))
        return self._chunks[index_id]

    def _frame(self, index_id: ObjectId) -> bytes | None:
        """Return the remote's frame of an index. Its errors pass: a remote that fails has not lost anything."""
        if index_id not in self._frames:
            self._frames[index_id] = self.remote.get(index_id)
        return self._frames[index_id]

    def sizes(self, index_id: ObjectId) -> dict[ObjectId, int]:
        """Return the bytes of each object of a part that lies there by itself."""
        if not self.has_part(index_id):
            return {}
        ids = (index_id, *self.chunks_of(index_id))
        return {object_id: self.objects[object_id].size for object_id in ids if object_id in self.objects}

    def packs_of(self, index_id: ObjectId) -> set[str]:
        """Return the names of the packs of a part, and of the file that names them. CorruptionError if that is bad."""
        pointer = self.pointers.get(index_id)
        if pointer is None:
            return set()
        named = packs.read_pointer(self.remote.read_file(pointer.name, packs.MAX_POINTER_BYTES) or b"")
        if not named:
            reason = "it names no packs: `castore push --repair` mends it"
            raise CorruptBundle(f"{self.remote.name}: {pointer.name}: {reason}")
        return {pointer.name, *(packs.name_of(pack) for pack in named)}


def _plan(repo: Repo, shelf: _Shelf, policy: Policy, grace: timedelta, now: datetime) -> RemoteGCPlan:
    roots = catalog.read_roots(repo.catalog)
    sources = [Source("the work tree", roots.here), *(Source(name, entries) for name, entries in roots.elsewhere)]
    known = {entry.id for source in sources for entry in source.entries}
    pushed = read_manifests(shelf.remote)
    sources.append(Source(shelf.remote.name, tuple(entry for entry in pushed if entry.id not in known)))
    entries = {entry.id: entry for source in sources for entry in source.entries}
    if shelf.objects and not entries:
        raise RootsUnreadable(f"there are {len(shelf.objects)} objects in {shelf.remote.name}, but not one manifest")

    def sizes(entry: Entry, part: str) -> Mapping[ObjectId, int]:
        return shelf.sizes(entry.manifest.parts[part].index)

    decisions = decide(
        sources[0],
        sources[1:],
        policy,
        sizes,
        now=now,
        pinned=roots.pins,
        pinned_elsewhere=roots.pins_elsewhere,
        tagged=roots.tags,
        tagged_elsewhere=roots.tags_elsewhere,
        usable=_usability(shelf, entries.values()),
    )
    live: set[ObjectId] = {entry.id for entry in entries.values()}
    live_files: set[str] = set()
    for entry, part in kept_parts(decisions):
        index_id = entry.manifest.parts[part].index
        if shelf.has_part(index_id):
            live |= {index_id, *shelf.chunks_of(index_id)}
            live_files |= shelf.packs_of(index_id)
    useless = {file.name: file for object_id, file in shelf.objects.items() if object_id not in live}
    useless |= {name: file for name, file in shelf.packs.items() if name not in live_files}
    kept_bytes = sum(file.size for file in (*shelf.objects.values(), *shelf.packs.values()))
    kept_bytes -= sum(file.size for file in useless.values())
    useless |= {file.name: file for file in shelf.remote.files("tmp")}  # of pushes that were killed
    oldest = now.timestamp() - grace.total_seconds()
    old = {name: file for name, file in useless.items() if file.modified <= oldest}
    is_ripe = 0 < shelf.marked_at <= oldest
    marked = {name for name in old if _is_marked(shelf.marks, name) and old[name].modified <= shelf.marked_at}
    delete = _without_needed(shelf, entries.values(), marked) if is_ripe else set()
    mark = set(old) - delete if is_ripe or not shelf.marked_at else set()
    return RemoteGCPlan(
        decisions=decisions,
        delete={name: old[name].size for name in sorted(delete)},
        mark={name: old[name].size for name in sorted(mark)},
        waiting={name: useless[name].size for name in sorted(useless.keys() - delete - mark)},
        kept_bytes=kept_bytes,
    )


def _without_needed(shelf: _Shelf, entries: Iterable[Entry], delete: set[str]) -> set[str]:
    """Return the names in ``delete`` less the chunks and packs of parts whose index stays for now.

    An index may be younger than the chunks it shares with others, and whoever finds it takes its part for whole.
    """
    needed: set[str] = set()
    for index_id in {part.index for entry in entries for part in entry.manifest.parts.values()}:
        own = {file.name for files in (shelf.objects, shelf.pointers) if (file := files.get(index_id))}
        if not own or own <= delete or not shelf.has_part(index_id):
            continue
        with contextlib.suppress(CorruptionError):  # nobody can use it, and it goes when it is old enough
            needed |= shelf.packs_of(index_id)
            chunks = (shelf.objects.get(chunk_id) for chunk_id in shelf.chunks_of(index_id))
            needed |= {file.name for file in chunks if file}
    return delete - needed


def _is_marked(marked: Marks, name: str) -> bool:
    return name in marked.files or name.rpartition("/")[2] in marked.objects


def _usability(shelf: _Shelf, entries: Iterable[Entry]) -> Usability:
    """Tell which manifests have nothing in the remote, or not all."""
    gone, weights_only = set(), set()
    for entry in entries:
        there = {name for name, part in entry.manifest.parts.items() if shelf.has_part(part.index)}
        if not there or ("model" in entry.manifest.parts and "model" not in there):
            gone.add(entry.id)
        elif there != entry.manifest.parts.keys():
            weights_only.add(entry.id)
    return Usability(frozenset(gone), frozenset(), frozenset(weights_only))


def _apply(remote: PublishingRemote, plan: RemoteGCPlan, at_work: Pass) -> None:
    """Delete, and then write new marks: a pass that is cut short deletes the rest the next time."""
    rank_of_object = deletion_rank(decision.entry for decision in plan.decisions)

    def rank(name: str) -> int:  # what names packs goes before their indexes do
        return -1 if name.startswith(packs.PARTS) else rank_of_object(ObjectId(name.rpartition("/")[2]))

    # no call for two ranks: a bucket deletes the files of one in any order, and a disk may after a power cut
    for _, group in itertools.groupby(sorted(plan.delete, key=rank), key=rank):
        names = list(group)
        for start in range(0, len(names), _AT_ONCE):
            at_work.go_on()
            remote.remove(names[start : start + _AT_ONCE])
    if plan.mark:
        marks.write(remote, Marks.of(plan.mark))
    elif plan.delete:
        marks.clear(remote)
