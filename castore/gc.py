"""Delete what no kept checkpoint needs: plan, then apply.

Planning reads every root (see :func:`castore.catalog.roots`) and fails when one can't be read, so what isn't known to
be dispensable stays. Applying moves objects into trash/, while nobody else is at work, and then empties it; until an
object is gone for good, a save or a load that wants it takes it back.
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
from castore.storage.object_store import Stored

_LEFTOVER_AGE = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GCPlan:
    """What gc does, or would do. ``delete`` has the stored size of each object that goes; indexes come first.

    ``young`` counts objects that no manifest refers to and that are too new to go. Sizes are in stored bytes.
    """

    decisions: tuple[Decision, ...]
    delete: Mapping[ObjectId, int]
    kept_bytes: int
    young: int

    def goes(self, decision: Decision) -> tuple[str, ...]:
        """The parts of a manifest that were in the store and go."""
        parts = decision.entry.manifest.parts
        return tuple(name for name in parts if name not in decision.parts and parts[name].index in self.delete)

    @property
    def freed_bytes(self) -> int:
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
    """Apply ``policy`` (that of config.toml unless given) and return what was done.

    Objects that no manifest refers to stay until they are older than ``grace``. With ``dry_run`` nothing is touched.
    Towards ``max_size`` counts what is here, and with ``elsewhere`` what the remotes have of what isn't.
    Locked when others are at work, for longer than the configured time if ``wait``; RootsUnreadable, CorruptionError or
    StorageError when it can't be told what is needed: then nothing was deleted.
    """
    policy = policy or repo.policy
    grace = repo.config.retention.grace_period if grace is None else grace
    now = now or datetime.now(UTC)
    with repo.lock(exclusive=not dry_run, wait=wait):
        if not dry_run:
            repo.store.restore_trash()  # of a gc that was cut short: what is kept now must not be emptied with the rest
        found = plan_collection(repo, policy, grace=grace, in_use=in_use, now=now, elsewhere=elsewhere)
        if not dry_run:
            repo.store.discard(found.delete)
            repo.store.remove_leftovers((now - _LEFTOVER_AGE).timestamp())
    if not dry_run:
        repo.store.empty_trash()
    return found


def plan_collection(
    repo: Repo,
    policy: Policy,
    *,
    grace: timedelta,
    in_use: Collection[str],
    now: datetime,
    elsewhere: bool = False,
) -> GCPlan:
    """What :func:`collect` would do. The caller holds the lock."""
    roots = catalog.roots(repo.catalog)
    stored = repo.store.stored()
    if stored and not roots.own and not roots.others:
        raise RootsUnreadable(f"there are {len(stored)} objects, but not one manifest")
    contents = _Contents(repo, stored)
    every = {entry.id: entry for entries in (roots.own, *(found for _, found in roots.others)) for entry in entries}
    remote = _remote(repo, every.values(), stored)

    def sizes(entry: Entry, part: str) -> Mapping[ObjectId, int]:
        own = entry.manifest.parts[part]
        if elsewhere and own.index in remote:
            return {own.index: own.stored_bytes}  # which objects it shares with others isn't known from here
        return contents(entry, part)

    decisions = decide(
        Source("the work tree", roots.own),
        [Source(name, entries) for name, entries in roots.others],
        policy,
        sizes,
        now=now,
        pinned=roots.pins,
        pinned_elsewhere=roots.other_pins,
        in_use=frozenset(in_use),
        gone=_gone(repo, every.values(), stored.keys() | remote),
    )
    live: set[ObjectId] = set()
    for entry, part in kept_parts(decisions):
        contents.require(entry, part)
        live.update(contents(entry, part))
    dropped: set[ObjectId] = set()
    for decision in decisions:
        for part in decision.entry.manifest.parts:
            if part not in decision.parts:
                dropped.update(contents(decision.entry, part))
    oldest = now.timestamp() - grace.total_seconds()
    going = [own for own in stored if own not in live and (own in dropped or stored[own].modified <= oldest)]
    going.sort(key=lambda own: own not in contents.indexes)
    return GCPlan(
        decisions=decisions,
        delete={own: stored[own].size for own in going},
        kept_bytes=sum(stored[own].size for own in live),
        young=len(stored) - len(going) - len(live),
    )


def _remote(repo: Repo, entries: Iterable[Entry], stored: Collection[ObjectId]) -> set[ObjectId]:
    """The indexes that aren't here and that remotes say they have."""
    absent = {part.index for entry in entries for part in entry.manifest.parts.values()}.difference(stored)
    return fallback.available(repo.remotes, absent)


def _gone(repo: Repo, entries: Iterable[Entry], there: Collection[ObjectId]) -> set[ObjectId]:
    """The manifests of whose data nothing is here, not even damaged, and nothing can be fetched."""
    quarantined = repo.store.quarantined()
    return {
        entry.id
        for entry in entries
        if all(part.index not in there and part.index not in quarantined for part in entry.manifest.parts.values())
    }


class _Contents:
    """The objects of a part that are in the store; each index is read once."""

    def __init__(self, repo: Repo, stored: Mapping[ObjectId, Stored]) -> None:
        self._repo = repo
        self._stored = stored
        self._parts: dict[ObjectId, dict[ObjectId, int]] = {}
        self._damaged: dict[ObjectId, CorruptionError] = {}

    @property
    def indexes(self) -> Collection[ObjectId]:
        """The indexes that were asked about."""
        return self._parts.keys()

    def __call__(self, entry: Entry, part: str) -> Mapping[ObjectId, int]:
        own = entry.manifest.parts[part].index
        if own not in self._parts:
            self._parts[own] = self._read(own)
        return self._parts[own]

    def require(self, entry: Entry, part: str) -> None:
        """CorruptionError when the index of a part that is kept can't be read: what it needs isn't known then."""
        own = entry.manifest.parts[part].index
        self(entry, part)
        if own in self._damaged:
            raise self._damaged[own]
        if own not in self._stored and own in self._repo.store.quarantined():
            reason = "in quarantine, so it isn't known what it needs; nothing was deleted: `castore verify --repair` "
            raise CorruptObject(own, reason + "or `castore forget` helps", part, entry.id)

    def _read(self, own: ObjectId) -> dict[ObjectId, int]:
        if own not in self._stored:
            return {}  # dropped before, or never fetched
        found = {own: self._stored[own].size}
        try:
            chunks = part_index.decode_chunks(self._repo.store.read(own, mend=False))
        except CorruptionError as error:
            self._damaged[own] = error
            return found
        found.update((chunk.id, self._stored[chunk.id].size) for chunk in chunks if chunk.id in self._stored)
        return found
