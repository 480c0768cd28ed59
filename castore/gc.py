"""Delete what no kept checkpoint needs: plan, then apply.

Planning reads every root (see :func:`castore.storage.catalog.read_roots`) and fails if one can't be read: what may
still be needed stays. Applying moves objects into trash/ while no other process is at work, and then empties it; until
an object is gone for good, a save or a load that wants it takes it back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from castore.errors import CorruptionError, CorruptObject, ObjectMissing, RootsUnreadable, StorageError
from castore.format import part_index
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.parallel import map_ahead
from castore.policy.retention import (
    Decision,
    Policy,
    Source,
    Usability,
    decide,
    deletion_rank,
    kept_parts,
)
from castore.progress import Progress, ignore_progress
from castore.remotes import fallback
from castore.remotes.base import PublishingRemote, Remote
from castore.repo import Repo
from castore.storage import catalog
from castore.storage.catalog import Roots
from castore.storage.object_store import StoredObject

_LEFTOVER_AGE = timedelta(hours=1)
_MAX_YOUNG_INDEX = 1 << 20  # stored bytes: one of a part of 100 GB takes as many, and a chunk of 4 MiB mostly more


@dataclass(frozen=True, slots=True, kw_only=True)
class GCPlan:
    """What gc deletes, or would delete. ``delete`` maps each object to its stored bytes.

    ``decisions`` say for every manifest which parts are kept and why, newest first. ``kept_bytes`` is what all kept
    objects take. ``young`` counts the objects that no manifest refers to and that are too new to delete, and what the
    indexes among them list.

    >>> plan = GCPlan(decisions=(), delete={ObjectId("0" * 64): 100, ObjectId("1" * 64): 20}, kept_bytes=500, young=0)
    >>> plan.freed_bytes
    120
    """

    decisions: tuple[Decision, ...]
    delete: Mapping[ObjectId, int]
    kept_bytes: int
    young: int

    def deleted_parts(self, decision: Decision) -> tuple[str, ...]:
        """Return the parts of a manifest that are in the store and that this plan deletes."""
        parts = decision.entry.manifest.parts
        return tuple(name for name in parts if name not in decision.parts and parts[name].index in self.delete)

    @property
    def freed_bytes(self) -> int:
        """Stored bytes of all objects that are deleted."""
        return sum(self.delete.values())


def collect_garbage(
    repo: Repo,
    policy: Policy | None = None,
    *,
    grace: timedelta | None = None,
    in_use: Collection[str] = (),
    dry_run: bool = False,
    wait: bool = True,
    now: datetime | None = None,
    elsewhere: bool = False,
    verify: bool = True,
    progress: Progress = ignore_progress,
) -> GCPlan:
    """Delete what ``policy``, by default that of config.toml, does not keep, and return the plan that was applied.

    Objects that no manifest refers to stay until they are older than ``grace``, the indexes of parts with all their
    chunks. Checkpoints whose ids are in ``in_use`` are kept whole. With ``dry_run`` nothing is touched. ``max_size``
    counts what is here and, with ``elsewhere``, what remotes have of the rest. Raise Locked if others are at work (with
    ``wait``, for longer than the configured time), and RootsUnreadable, CorruptionError or StorageError if it can't be
    told what is needed: then nothing was deleted.

    Before the data of a checkpoint is deleted, what stays in its place is read and verified, unless this process has
    done that before; ``progress`` counts those objects. Without ``verify``, for an estimate, it is not read.

    >>> import tempfile, castore
    >>> from castore.policy.retention import Policy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     repo = castore.Repo.init(folder)
    ...     for step in (1, 2, 3):
    ...         _ = repo.save({"model": {"step": step}}, run="main", step=step, metrics={"val_loss": 4.0 - step})
    ...     plan = castore.collect_garbage(repo, Policy(keep=2))
    ...     [(decision.entry.manifest.step, decision.parts) for decision in plan.decisions]
    [(3, ('model',)), (2, ('model',)), (1, ())]
    """
    request = _Request(
        policy=policy or repo.policy,
        grace=repo.config.retention.grace_period if grace is None else grace,
        in_use=frozenset(in_use),
        now=now or datetime.now(UTC),
        elsewhere=elsewhere,
    )
    damaged: set[ObjectId] = set()
    while True:
        with repo.lock(exclusive=not dry_run, wait=wait):
            plan, unverified = _plan(repo, request, damaged, restore=not dry_run)
            if not (unverified and verify):
                if not dry_run:
                    rank = deletion_rank(decision.entry for decision in plan.decisions)
                    repo.store.discard(plan.delete, rank)
                    repo.store.remove_leftovers((request.now - _LEFTOVER_AGE).timestamp())
                    trash = repo.store.list_trash(rank)
                break
        # data is to go because better data stays: that is read first, while others may work
        with repo.lock(wait=wait):
            damaged |= _find_damage(repo, unverified, progress, mend=not dry_run)
    if not dry_run:
        repo.store.empty_trash(trash)
    return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What a collection was asked for."""

    policy: Policy
    grace: timedelta
    in_use: frozenset[str]
    now: datetime
    elsewhere: bool


def _plan(
    repo: Repo, request: _Request, damaged: Collection[ObjectId], *, restore: bool
) -> tuple[GCPlan, set[ObjectId]]:
    """Return (the plan, the objects to verify before it may be applied). The caller holds the lock."""
    roots = catalog.read_roots(repo.catalog)
    entries = _entries(roots)
    if restore:
        # a gc that was cut short left it: what is kept by now must not be emptied with the rest
        repo.store.restore_trash(deletion_rank(entries.values()))
    plan = plan_garbage(repo, request, roots, damaged)
    if not any(plan.deleted_parts(decision) for decision in plan.decisions):
        return plan, set()
    kept = {object_id for entry, part in kept_parts(plan.decisions) for object_id in _objects_here(repo, entry, part)}
    return plan, {object_id for object_id in kept if not repo.store.is_verified(object_id)} - set(damaged)


def _objects_here(repo: Repo, entry: Entry, part: str) -> set[ObjectId]:
    """Return the objects of a part that are in the store, its index among them."""
    index_id = entry.manifest.parts[part].index
    if not repo.store.has(index_id):
        return set()
    chunks = part_index.decode_chunks(repo.store.read(index_id, mend=False))
    return {index_id, *(chunk.id for chunk in chunks if repo.store.has(chunk.id))}


def _find_damage(repo: Repo, object_ids: Collection[ObjectId], progress: Progress, *, mend: bool) -> set[ObjectId]:
    """Read objects and return those that are damaged; with ``mend`` they are moved to quarantine."""
    scratch = threading.local()

    def check(object_id: ObjectId) -> ObjectId | None:
        if not hasattr(scratch, "buffer"):
            scratch.buffer = bytearray()
        try:
            repo.store.check(object_id, scratch.buffer, mend=mend)
        except (CorruptObject, ObjectMissing):
            return object_id
        return None

    damaged = set()
    for done, result in enumerate(map_ahead(check, sorted(object_ids), repo.threads, name="castore-gc"), 1):
        damaged |= {result} if result else set()
        progress(done, len(object_ids))
    return damaged


def _entries(roots: Roots) -> dict[ObjectId, Entry]:
    """Return every manifest that counts, by id."""
    sources = (roots.here, *(entries for _, entries in roots.elsewhere))
    return {entry.id: entry for entries in sources for entry in entries}


def plan_garbage(repo: Repo, request: _Request, roots: Roots, damaged: Collection[ObjectId] = ()) -> GCPlan:
    """Return what :func:`collect_garbage` would delete, and raise what it raises. The caller holds the lock.

    The objects in ``damaged`` are known to be bad where they lie.
    """
    stored = repo.store.stored()
    if stored and not roots.here and not roots.elsewhere:
        raise RootsUnreadable(f"there are {len(stored)} objects, but not one manifest")
    contents = _Contents(repo, stored)
    decisions = _decide(repo, request, roots, contents, frozenset(damaged))
    live = _live_objects(decisions, contents)
    dropped = _dropped_objects(decisions, contents)
    oldest_kept = request.now.timestamp() - request.grace.total_seconds()
    unneeded = {object_id: stored[object_id] for object_id in stored if object_id not in live}
    young = {id_ for id_, one in unneeded.items() if id_ not in dropped and one.modified > oldest_kept}
    if len(young) < len(unneeded):
        # a manifest that comes back from git while its index waits needs what that shares with others, too
        young |= contents.chunks_of_orphans(young)
    delete = [object_id for object_id in unneeded if object_id not in young]
    return GCPlan(
        decisions=decisions,
        delete={object_id: stored[object_id].size for object_id in delete},
        kept_bytes=sum(stored[object_id].size for object_id in live),
        young=len(stored) - len(delete) - len(live),
    )


def _decide(
    repo: Repo, request: _Request, roots: Roots, contents: _Contents, damaged: frozenset[ObjectId]
) -> tuple[Decision, ...]:
    sources = [Source("the work tree", roots.here), *(Source(name, entries) for name, entries in roots.elsewhere)]
    entries = _entries(roots)
    indexes = {part.index for entry in entries.values() for part in entry.manifest.parts.values()}
    # what this process saw there long ago may be gone
    remotes = [one.fresh() if isinstance(one, PublishingRemote) else one for one in repo.remotes]
    remote = fallback.may_have(remotes, indexes - contents.stored.keys())
    confirmed: set[ObjectId] = set()

    def sizes(entry: Entry, part: str) -> Mapping[ObjectId, int]:
        described = entry.manifest.parts[part]
        if request.elsewhere and described.index in remote:
            # which objects it shares with others isn't known from here
            return {described.index: described.stored_bytes}
        return contents.of_part(entry, part)

    def judge() -> tuple[Decision, ...]:
        return decide(
            sources[0],
            sources[1:],
            request.policy,
            sizes,
            now=request.now,
            pinned=roots.pins,
            pinned_elsewhere=roots.pins_elsewhere,
            tagged=roots.tags,
            tagged_elsewhere=roots.tags_elsewhere,
            in_use=request.in_use,
            usable=_usability(repo, remotes, entries.values(), contents, remote, damaged),
        )

    while True:
        decisions = judge()
        # remotes are asked for what would be kept alone: of a long history that is little
        kept = {entry.manifest.parts[part].index for entry, part in kept_parts(decisions)}
        asked = (kept & remote) - confirmed
        if not asked:
            return decisions
        confirmed |= fallback.available(remotes, asked)
        remote -= asked - confirmed


_PartState = Literal["usable", "damaged", "gone"]


def _usability(
    repo: Repo,
    remotes: Sequence[Remote],
    entries: Iterable[Entry],
    contents: _Contents,
    remote: Collection[ObjectId],
    damaged: frozenset[ObjectId],
) -> Usability:
    """Tell which manifests can't be loaded: what is here counts, and what remotes have."""
    quarantined = repo.store.quarantined()
    absent = contents.absent_chunks(entries) | damaged
    absent -= fallback.available(remotes, absent)

    def state_of(entry: Entry, part: str) -> _PartState:
        index_id = entry.manifest.parts[part].index
        if index_id not in contents.stored:
            # what an index in quarantine lists isn't known: it counts, and if it is kept gc refuses
            return "usable" if index_id in remote or index_id in quarantined else "gone"
        is_bad = index_id in absent or not absent.isdisjoint(contents.chunks_of(index_id))
        return "damaged" if is_bad else "usable"

    gone, incomplete, weights_only = set(), set(), set()
    for entry in entries:
        states = {part: state_of(entry, part) for part in entry.manifest.parts}
        if all(state == "gone" for state in states.values()):
            gone.add(entry.id)
        elif entry.manifest.kind != "checkpoint":
            continue
        elif "model" not in states:
            if any(state != "usable" for state in states.values()):
                incomplete.add(entry.id)
        elif states["model"] != "usable":
            (gone if states["model"] == "gone" else incomplete).add(entry.id)
        elif any(state != "usable" for state in states.values()):
            weights_only.add(entry.id)
    return Usability(frozenset(gone), frozenset(incomplete), frozenset(weights_only))


def _live_objects(decisions: Iterable[Decision], contents: _Contents) -> set[ObjectId]:
    """Return the objects of all parts that are kept. Raise CorruptionError if it can't be told what one needs."""
    live: set[ObjectId] = set()
    for entry, part in kept_parts(decisions):
        contents.require(entry, part)
        live.update(contents.of_part(entry, part))
    return live


def _dropped_objects(decisions: Iterable[Decision], contents: _Contents) -> set[ObjectId]:
    """Return the objects of all parts that are not kept; parts that are kept may need them too."""
    dropped: set[ObjectId] = set()
    for decision in decisions:
        for part in decision.entry.manifest.parts:
            if part not in decision.parts:
                dropped.update(contents.of_part(decision.entry, part))
    return dropped


class _Contents:
    """The objects of each part that are in the store; each index is read once."""

    def __init__(self, repo: Repo, stored: Mapping[ObjectId, StoredObject]) -> None:
        self.stored = stored
        self._repo = repo
        self._objects: dict[ObjectId, dict[ObjectId, int]] = {}
        self._chunks: dict[ObjectId, frozenset[ObjectId]] = {}
        self._damaged: dict[ObjectId, CorruptionError] = {}

    def of_part(self, entry: Entry, part: str) -> Mapping[ObjectId, int]:
        """Return the stored bytes of a part's objects, its index among them, as far as they are in the store."""
        index_id = entry.manifest.parts[part].index
        if index_id not in self._objects:
            self._objects[index_id] = self._read(index_id)
        return self._objects[index_id]

    def chunks_of(self, index_id: ObjectId) -> frozenset[ObjectId]:
        """Return the chunks that an index lists, as far as it is in the store and can be read."""
        if index_id not in self._objects:
            self._objects[index_id] = self._read(index_id)
        return self._chunks.get(index_id, frozenset())

    def chunks_of_orphans(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return the chunks that those of the objects list which are indexes; large objects are not looked into."""
        chunk_ids: set[ObjectId] = set()
        for object_id in object_ids:
            if self.stored[object_id].size <= _MAX_YOUNG_INDEX:
                with contextlib.suppress(CorruptionError, ObjectMissing, StorageError):
                    chunks = part_index.decode_chunks(self._repo.store.read(object_id, mend=False))
                    chunk_ids.update(chunk.id for chunk in chunks)
        return chunk_ids

    def absent_chunks(self, entries: Iterable[Entry]) -> set[ObjectId]:
        """Return the chunks that the indexes here list and that are not in the store."""
        index_ids = {part.index for entry in entries for part in entry.manifest.parts.values()}
        chunk_ids = {chunk_id for index_id in index_ids for chunk_id in self.chunks_of(index_id)}
        return chunk_ids.difference(self.stored)

    def require(self, entry: Entry, part: str) -> None:
        """Raise CorruptionError if the index of a part that is kept can't be read: what it needs isn't known then."""
        index_id = entry.manifest.parts[part].index
        self.of_part(entry, part)
        if index_id in self._damaged:
            raise self._damaged[index_id]
        if index_id not in self.stored and index_id in self._repo.store.quarantined():
            reason = "in quarantine, so it isn't known what it needs; nothing was deleted: `castore verify --repair` "
            raise CorruptObject(index_id, reason + "or `castore forget` helps", part, entry.id)

    def _read(self, index_id: ObjectId) -> dict[ObjectId, int]:
        if index_id not in self.stored:
            return {}  # dropped before, or never fetched
        sizes = {index_id: self.stored[index_id].size}
        try:
            chunks = part_index.decode_chunks(self._repo.store.read(index_id, mend=False))
        except CorruptionError as error:
            self._damaged[index_id] = error
            return sizes
        self._chunks[index_id] = frozenset(chunk.id for chunk in chunks)
        sizes.update((chunk.id, self.stored[chunk.id].size) for chunk in chunks if chunk.id in self.stored)
        return sizes
