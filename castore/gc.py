"""Delete what no kept checkpoint needs: plan, then apply.

Planning reads every root (see :func:`castore.storage.catalog.read_roots`) and fails if one can't be read: what may
still be needed stays. Applying moves objects into trash/ while no other process is at work, and then empties it; until
an object is gone for good, a save or a load that wants it takes it back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from castore.errors import CorruptionError, CorruptObject, RootsUnreadable
from castore.format import part_index
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.policy.retention import Decision, Policy, Source, decide, kept_parts
from castore.remotes import fallback
from castore.repo import Repo
from castore.storage import catalog
from castore.storage.catalog import Roots
from castore.storage.object_store import StoredObject

_LEFTOVER_AGE = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GCPlan:
    """What gc deletes, or would delete. ``delete`` maps each object to its stored bytes; indexes come first.

    ``decisions`` say for every manifest which parts are kept and why, newest first. ``kept_bytes`` is what all kept
    objects take. ``young`` counts the objects that no manifest refers to and that are too new to delete.

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
) -> GCPlan:
    """Delete what ``policy``, by default that of config.toml, does not keep, and return the plan that was applied.

    Objects that no manifest refers to stay until they are older than ``grace``. Checkpoints whose ids are in
    ``in_use`` are kept whole. With ``dry_run`` nothing is touched. ``max_size`` counts what is here and, with
    ``elsewhere``, what remotes have of the rest. Raise Locked if others are at work (with ``wait``, for longer than the
    configured time), and RootsUnreadable, CorruptionError or StorageError if it can't be told what is needed: then
    nothing was deleted.

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
    policy = policy or repo.policy
    grace = repo.config.retention.grace_period if grace is None else grace
    now = now or datetime.now(UTC)
    with repo.lock(exclusive=not dry_run, wait=wait):
        if not dry_run:
            # a gc that was cut short left it: what is kept by now must not be emptied with the rest
            repo.store.restore_trash()
        plan = plan_garbage(repo, policy, grace=grace, in_use=in_use, now=now, elsewhere=elsewhere)
        if not dry_run:
            repo.store.discard(plan.delete)
            repo.store.remove_leftovers((now - _LEFTOVER_AGE).timestamp())
    if not dry_run:
        repo.store.empty_trash()
    return plan


def plan_garbage(
    repo: Repo,
    policy: Policy,
    *,
    grace: timedelta,
    in_use: Collection[str],
    now: datetime,
    elsewhere: bool = False,
) -> GCPlan:
    """Return what :func:`collect_garbage` would delete, and raise what it raises. The caller holds the lock."""
    roots = catalog.read_roots(repo.catalog)
    stored = repo.store.stored()
    if stored and not roots.here and not roots.elsewhere:
        raise RootsUnreadable(f"there are {len(stored)} objects, but not one manifest")
    contents = _Contents(repo, stored)
    decisions = _decide(repo, policy, roots, contents, in_use=in_use, now=now, elsewhere=elsewhere)
    live = _live_objects(decisions, contents)
    dropped = _dropped_objects(decisions, contents)
    oldest_kept = now.timestamp() - grace.total_seconds()
    delete = [
        object_id
        for object_id in stored
        if object_id not in live and (object_id in dropped or stored[object_id].modified <= oldest_kept)
    ]
    # a gc that is cut short must not leave an index without its chunks
    delete.sort(key=lambda object_id: object_id not in contents.indexes)
    return GCPlan(
        decisions=decisions,
        delete={object_id: stored[object_id].size for object_id in delete},
        kept_bytes=sum(stored[object_id].size for object_id in live),
        young=len(stored) - len(delete) - len(live),
    )


def _decide(
    repo: Repo,
    policy: Policy,
    roots: Roots,
    contents: _Contents,
    *,
    in_use: Collection[str],
    now: datetime,
    elsewhere: bool,
) -> tuple[Decision, ...]:
    sources = [Source("the work tree", roots.here), *(Source(name, entries) for name, entries in roots.elsewhere)]
    entries = {entry.id: entry for source in sources for entry in source.entries}
    remote = _remote_indexes(repo, entries.values(), contents.stored)

    def sizes(entry: Entry, part: str) -> Mapping[ObjectId, int]:
        described = entry.manifest.parts[part]
        if elsewhere and described.index in remote:
            # which objects it shares with others isn't known from here
            return {described.index: described.stored_bytes}
        return contents.of_part(entry, part)

    return decide(
        sources[0],
        sources[1:],
        policy,
        sizes,
        now=now,
        pinned=roots.pins,
        pinned_elsewhere=roots.pins_elsewhere,
        in_use=frozenset(in_use),
        gone=_without_data(repo, entries.values(), contents.stored.keys() | remote),
    )


def _remote_indexes(repo: Repo, entries: Iterable[Entry], stored: Collection[ObjectId]) -> set[ObjectId]:
    """Return the indexes that aren't here and that remotes say they have."""
    absent = {part.index for entry in entries for part in entry.manifest.parts.values()}.difference(stored)
    return fallback.available(repo.remotes, absent)


def _without_data(repo: Repo, entries: Iterable[Entry], available: Collection[ObjectId]) -> set[ObjectId]:
    """Return the ids of manifests of which nothing is here, not even damaged, and nothing can be fetched."""
    traces = repo.store.quarantined().union(available)
    return {entry.id for entry in entries if all(part.index not in traces for part in entry.manifest.parts.values())}


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
        self._damaged: dict[ObjectId, CorruptionError] = {}

    @property
    def indexes(self) -> Collection[ObjectId]:
        """The indexes of the parts that were asked about."""
        return self._objects.keys()

    def of_part(self, entry: Entry, part: str) -> Mapping[ObjectId, int]:
        """Return the stored bytes of a part's objects, its index among them, as far as they are in the store."""
        index_id = entry.manifest.parts[part].index
        if index_id not in self._objects:
            self._objects[index_id] = self._read(index_id)
        return self._objects[index_id]

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
        sizes.update((chunk.id, self.stored[chunk.id].size) for chunk in chunks if chunk.id in self.stored)
        return sizes
