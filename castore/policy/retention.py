"""Retention: which parts of each manifest are kept under a policy, and why. Pure.

Retention judges *sources*: the work tree (with the git index) and, one by one, every ref that holds manifests which
the work tree does not. What is kept is the union of what each source keeps by itself, so a manifest on another branch,
such as that of a pull request, can retain objects but never cause the deletion of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType

import msgspec

from castore.config import Config, parse_duration, parse_size
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.policy.order import newest_first
from castore.policy.scoring import rank

RESUME_PARTS = frozenset({"optimizer", "trainer"})
"""Parts needed only to resume training exactly: two thirds of a checkpoint's bytes, so kept for few checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What to keep. Counts are per experiment; ``max_size`` limits the stored bytes of everything; None is no limit."""

    keep: int = 10
    keep_latest: int = 1
    keep_optimizer: int = 2
    max_size: int | None = None
    data_ttl: timedelta = timedelta(hours=168)
    tie_tolerance: float = 0.0


def policy_of(config: Config) -> Policy:
    """Return the retention policy of the settings."""
    retention = config.retention
    return Policy(
        keep=retention.keep,
        keep_latest=retention.keep_latest,
        keep_optimizer=retention.keep_optimizer,
        max_size=parse_size(retention.max_size) or None,
        data_ttl=parse_duration(retention.data_ttl),
        tie_tolerance=config.resume.tie_tolerance,
    )


@dataclass(frozen=True, slots=True)
class Source:
    """Manifests that are judged together: those of the work tree, or of one ref."""

    name: str
    entries: Sequence[Entry]


@dataclass(frozen=True, slots=True)
class Decision:
    """The parts of a manifest that are kept (none if it is dropped), and the reasons."""

    entry: Entry
    parts: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Usability:
    """What of the manifests can't be loaded as it should be; all others can.

    ``gone``: nothing is left that would be worth keeping. ``damaged``: objects are missing or bad, the rest is there.
    ``weights_only``: the model can be loaded, but not all that resuming takes.
    """

    gone: AbstractSet[ObjectId] = frozenset()
    damaged: AbstractSet[ObjectId] = frozenset()
    weights_only: AbstractSet[ObjectId] = frozenset()


Contents = Callable[[Entry, str], Mapping[ObjectId, int]]
"""Return the objects of a part that are in the store, with their stored sizes in bytes."""


def decide(
    work_tree: Source,
    others: Sequence[Source],
    policy: Policy,
    contents: Contents,
    *,
    now: datetime,
    pinned: AbstractSet[ObjectId] = frozenset(),
    pinned_elsewhere: AbstractSet[ObjectId] = frozenset(),
    tagged: Mapping[ObjectId, Sequence[str]] = MappingProxyType({}),
    tagged_elsewhere: Mapping[ObjectId, Sequence[str]] = MappingProxyType({}),
    in_use: AbstractSet[str] = frozenset(),
    usable: Usability | None = None,
) -> tuple[Decision, ...]:
    """Return one decision for every manifest of every source, newest first.

    Keep, of each experiment, the best ``keep`` by score and the newest ``keep_latest``; and everything pinned,
    tagged or in use. Keep the resume parts (optimizer, trainer) of the best, of the newest ``keep_optimizer`` of those
    kept, and of those pinned, tagged or in use. If the total exceeds ``max_size``, evict the worst checkpoints first,
    but never the best, the newest, those pinned, tagged or in use.
    What can't be loaded counts towards none of these numbers, by ``usable``; where something may be left to repair,
    it is kept beside them.
    What ``others`` keep, pin or tag gets the space that the work tree leaves: it evicts nothing of the work tree.
    """
    own_drafts = {entry.id: _Draft(entry) for entry in work_tree.entries}
    usable = usable or Usability()
    _judge_source(work_tree, policy, own_drafts, now, "", usable)
    _hold(own_drafts, dict.fromkeys(pinned, "pinned"))
    _hold(own_drafts, {tagged_id: f"tagged {' '.join(names)}" for tagged_id, names in tagged.items()})
    _hold(own_drafts, {ObjectId(checkpoint_id): "in use" for checkpoint_id in in_use})
    other_drafts = {entry.id: _Draft(entry) for source in (work_tree, *others) for entry in source.entries}
    for source in others:
        _judge_source(source, policy, other_drafts, now, f" on {source.name}", usable)
    _hold(other_drafts, dict.fromkeys(pinned_elsewhere, "pinned elsewhere"))
    _hold(other_drafts, {id_: f"tagged {' '.join(names)} elsewhere" for id_, names in tagged_elsewhere.items()})
    if policy.max_size is not None:
        used = _evict(list(own_drafts.values()), policy.max_size, contents, {})
        _evict(list(other_drafts.values()), policy.max_size, contents, used)
    ordered = newest_first(draft.entry for draft in other_drafts.values())
    return tuple(_decision(own_drafts.get(entry.id), other_drafts[entry.id]) for entry in ordered)


def _hold(drafts: Mapping[ObjectId, _Draft], reasons: Mapping[ObjectId, str]) -> None:
    for checkpoint_id, reason in reasons.items():
        if draft := drafts.get(checkpoint_id):
            draft.hold(reason, every_part=True, protect=True)


def _decision(own: _Draft | None, other: _Draft) -> Decision:
    """Return the union of what the work tree and the other sources keep of a manifest."""
    kept = [draft for draft in (own, other) if draft is not None and draft.kept]
    names = {part for draft in kept for part in draft.parts()}
    reasons = tuple(reason for draft in kept for reason in draft.reasons)
    why_not = (own.why_not if own else "") or other.why_not
    parts = tuple(part for part in other.entry.manifest.parts if part in names)
    return Decision(other.entry, parts, reasons if kept else (why_not,))


class _Draft:
    """A decision in the making. ``place``: the best rank in any experiment; a ``protected`` one is never evicted."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.kept = False
        self.whole = False
        self.protected = False
        self.place = 1 << 60
        self.reasons: list[str] = []
        self.why_not = ""

    def hold(self, reason: str, *, every_part: bool = False, protect: bool = False) -> None:
        self.kept = True
        self.whole = self.whole or every_part
        self.protected = self.protected or protect
        self.reasons.append(reason)

    def parts(self) -> tuple[str, ...]:
        names = self.entry.manifest.parts
        if not self.kept:
            return ()
        # without a part that is called model it isn't known what would be of use without the rest
        every = self.whole or "model" not in names
        return tuple(name for name in names if every or name not in RESUME_PARTS)


def _judge_source(
    source: Source,
    policy: Policy,
    drafts: Mapping[ObjectId, _Draft],
    now: datetime,
    where: str,
    usable: Usability,
) -> None:
    experiments: dict[bytes, list[Entry]] = {}
    for entry in source.entries:
        if entry.id in usable.gone:
            drafts[entry.id].why_not = "its data is gone"
        elif entry.manifest.kind == "checkpoint":
            key = msgspec.json.encode(entry.manifest.experiment, order="sorted")
            experiments.setdefault(key, []).append(entry)
        elif entry.manifest.kind == "dataset":
            _judge_dataset(drafts[entry.id], policy, now)
        else:
            drafts[entry.id].hold("added by hand: `castore forget` removes it", every_part=True, protect=not where)
    for entries in experiments.values():
        loadable = [entry for entry in entries if entry.id not in usable.damaged]
        _judge_experiment(loadable, policy, drafts, where, usable)
        if len(loadable) < len(entries):
            _judge_damaged(entries, policy, drafts, usable)


def _judge_damaged(
    entries: Sequence[Entry], policy: Policy, drafts: Mapping[ObjectId, _Draft], usable: Usability
) -> None:
    """Keep what is left of a damaged checkpoint that would be kept if it were whole: a good copy may turn up."""
    ranked = list(rank(entries, policy.tie_tolerance))
    wanted = {entry.id for entry in [*ranked[: policy.keep], *newest_first(entries)[: policy.keep_latest]]}
    for entry in entries:
        if entry.id in usable.damaged:
            drafts[entry.id].why_not = "it can't be loaded, as objects of it are missing"
            if entry.id in wanted:
                drafts[entry.id].hold("damaged, kept for `castore verify --repair`, in nobody's place", every_part=True)


def _judge_experiment(
    entries: Sequence[Entry], policy: Policy, drafts: Mapping[ObjectId, _Draft], where: str, usable: Usability
) -> None:
    ranked = list(rank(entries, policy.tie_tolerance))
    newest = newest_first(entries)
    kept_ids = {entry.id for entry in [*ranked[: policy.keep], *newest[: policy.keep_latest]]}
    for place, entry in enumerate(ranked):
        draft = drafts[entry.id]
        draft.place = min(draft.place, place)
        draft.why_not = (
            draft.why_not or f"number {place + 1} by score in its experiment, of which {policy.keep} are kept"
        )
        if place < policy.keep:
            best = place == 0
            reason = "the best" if best else f"number {place + 1} by score"
            draft.hold(reason + where, every_part=best, protect=best and not where)
    for entry in newest[: policy.keep_latest]:
        drafts[entry.id].hold("the newest" + where, protect=not where)
    # only of those that this source keeps by itself: otherwise another source could change what this one keeps
    exact = [entry for entry in newest if entry.id in kept_ids and entry.id not in usable.weights_only]
    for entry in exact[: policy.keep_optimizer]:
        drafts[entry.id].whole = True


def _judge_dataset(draft: _Draft, policy: Policy, now: datetime) -> None:
    age = now - datetime.fromisoformat(draft.entry.manifest.created)
    hours, limit = age.total_seconds() / 3600, policy.data_ttl.total_seconds() / 3600
    if age < policy.data_ttl:
        draft.hold(f"prepared data, {max(0.0, hours):.0f} h old of {limit:.0f} h", every_part=True)
    draft.why_not = f"prepared data older than {limit:.0f} h"


def _evict(
    drafts: Sequence[_Draft], max_size: int, contents: Contents, used: Mapping[ObjectId, int]
) -> dict[ObjectId, int]:
    """Evict whole manifests, worst first, until the rest fits into ``max_size`` together with ``used``.

    Return all objects used then, with their sizes. A manifest whose eviction frees nothing, since its data is gone or
    shared with manifests that stay, is not evicted.
    """
    sizes = dict(used)
    holders: Counter[ObjectId] = Counter(used.keys())
    held: dict[ObjectId, Counter[ObjectId]] = {}
    for draft in drafts:
        parts = [contents(draft.entry, part) for part in draft.parts()]
        held[draft.entry.id] = Counter(object_id for objects in parts for object_id in objects)
        holders.update(held[draft.entry.id])
        for objects in parts:
            sizes.update(objects)
    total = sum(sizes.values())
    candidates = []
    for draft in sorted((draft for draft in drafts if draft.kept and not draft.protected), key=_eviction_order):
        if total <= max_size:
            break
        objects_held = held[draft.entry.id]
        holders.subtract(objects_held)
        total -= sum(sizes[object_id] for object_id in objects_held if not holders[object_id])
        candidates.append(draft)
    for draft in candidates:
        if all(holders[object_id] for object_id in held[draft.entry.id]):
            holders.update(held[draft.entry.id])
        else:
            draft.kept = False
            draft.why_not = "evicted to fit max_size"
    return {object_id: size for object_id, size in sizes.items() if holders[object_id] > 0}


def _eviction_order(draft: _Draft) -> tuple[bool, int, str, ObjectId]:
    """Sort key: first prepared data, which can be prepared again, then the worst, then the oldest."""
    manifest = draft.entry.manifest
    return manifest.kind != "dataset", -draft.place, manifest.created, draft.entry.id


def kept_parts(decisions: Iterable[Decision]) -> list[tuple[Entry, str]]:
    """Return every (entry, part name) that is kept."""
    return [(decision.entry, part) for decision in decisions for part in decision.parts]


def deletion_rank(entries: Iterable[Entry]) -> Callable[[ObjectId], int]:
    """Return in which order objects go, so that what is left of a checkpoint at any moment makes sense.

    First the indexes of parts that only serve to resume, then those of models, then chunks. They come back in reverse.
    """
    ranks: dict[ObjectId, int] = {}
    for entry in entries:
        for name, part in entry.manifest.parts.items():
            ranks[part.index] = max(ranks.get(part.index, 0), 0 if name in RESUME_PARTS else 1)
    return lambda object_id: ranks.get(object_id, 2)
