"""Manifests x policy -> what is kept of each, and why. Pure.

Retention looks at *sources*: the work tree (with the git index) and, one by one, every ref that holds manifests which
the work tree doesn't. What is kept is the union of what each source keeps for itself, so that a manifest on some
branch, a pull request's say, can retain objects but never cause the deletion of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timedelta

import msgspec

from castore.config import Config, parse_duration, parse_size
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.policy.scoring import newest_first, rank

RESUME_PARTS = frozenset({"optimizer", "trainer"})
"""Parts that serve to resume training alone: two thirds of a checkpoint, wanted of few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What to keep. Counts are per experiment; ``max_size`` is in stored bytes, over everything; None is no limit."""

    keep: int = 10
    keep_latest: int = 1
    keep_optimizer: int = 2
    max_size: int | None = None
    data_ttl: timedelta = timedelta(hours=168)
    tie_tolerance: float = 0.0


def policy_of(config: Config) -> Policy:
    """Return the policy that the settings ask for."""
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
    """Manifests that are judged together, such as those of a branch."""

    name: str
    entries: Sequence[Entry]


@dataclass(frozen=True, slots=True)
class Decision:
    """The parts of a manifest that are kept, none when it is dropped, and why."""

    entry: Entry
    parts: tuple[str, ...]
    reasons: tuple[str, ...]


Contents = Callable[[Entry, str], Mapping[ObjectId, int]]
"""The objects of a part that are in the store, with their stored sizes."""


def decide(
    own: Source,
    others: Sequence[Source],
    policy: Policy,
    contents: Contents,
    *,
    now: datetime,
    pinned: AbstractSet[ObjectId] = frozenset(),
    pinned_elsewhere: AbstractSet[ObjectId] = frozenset(),
    in_use: AbstractSet[str] = frozenset(),
    gone: AbstractSet[ObjectId] = frozenset(),
) -> tuple[Decision, ...]:
    """One decision for every manifest of every source, newest first.

    Of each experiment: the best ``keep`` by score and the newest ``keep_latest``; beside them what is pinned or in use.
    Their optimizer and trainer parts stay for the best one, the newest ``keep_optimizer`` of those kept, and those
    pinned or in use. ``max_size`` then lets go worst-first, but never of the best, the newest, the pinned or the used.
    Manifests in ``gone``, whose data can't be had any more, take nobody's place.
    What ``others`` keep, or pin, gets the room that is left: it can't make anything of ``own`` go.
    """
    mine = {entry.id: _Draft(entry) for entry in own.entries}
    _judge_source(own, policy, mine, now, "", gone)
    _hold(mine, pinned, "pinned")
    _hold(mine, in_use, "in use")
    theirs = {entry.id: _Draft(entry) for source in (own, *others) for entry in source.entries}
    for source in others:
        _judge_source(source, policy, theirs, now, f" on {source.name}", gone)
    _hold(theirs, pinned_elsewhere, "pinned elsewhere")
    if policy.max_size is not None:
        used = _shrink(list(mine.values()), policy.max_size, contents, {})
        _shrink(list(theirs.values()), policy.max_size, contents, used)
    ordered = newest_first(draft.entry for draft in theirs.values())
    return tuple(_decision(mine.get(entry.id), theirs[entry.id]) for entry in ordered)


def _hold(drafts: Mapping[ObjectId, _Draft], ids: AbstractSet[str], reason: str) -> None:
    for own_id in ids:
        if draft := drafts.get(ObjectId(own_id)):
            draft.hold(reason, every_part=True, protect=True)


def _decision(mine: _Draft | None, theirs: _Draft) -> Decision:
    kept = [draft for draft in (mine, theirs) if draft is not None and draft.kept]
    wanted = {part for draft in kept for part in draft.parts()}
    reasons = tuple(reason for draft in kept for reason in draft.reasons)
    why_not = (mine.why_not if mine else "") or theirs.why_not
    parts = tuple(part for part in theirs.entry.manifest.parts if part in wanted)
    return Decision(theirs.entry, parts, reasons if kept else (why_not,))


class _Draft:
    """A decision in the making."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.kept = False
        self.whole = False
        self.protected = False
        self.depth = 1 << 60
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
        return tuple(name for name in names if self.whole or name not in RESUME_PARTS)


def _judge_source(
    source: Source,
    policy: Policy,
    drafts: Mapping[ObjectId, _Draft],
    now: datetime,
    where: str,
    gone: AbstractSet[ObjectId],
) -> None:
    lines: dict[bytes, list[Entry]] = {}
    for entry in source.entries:
        if entry.id in gone:
            drafts[entry.id].why_not = "its data is gone"
        elif entry.manifest.kind == "checkpoint":
            lines.setdefault(msgspec.json.encode(entry.manifest.experiment, order="sorted"), []).append(entry)
        elif entry.manifest.kind == "dataset":
            _judge_dataset(drafts[entry.id], policy, now)
        else:
            drafts[entry.id].hold("added by hand: `castore forget` lets it go", every_part=True, protect=not where)
    for entries in lines.values():
        _judge_experiment(entries, policy, drafts, where)


def _judge_experiment(entries: Sequence[Entry], policy: Policy, drafts: Mapping[ObjectId, _Draft], where: str) -> None:
    ranked = rank(entries, policy.tie_tolerance)
    newest = newest_first(entries)
    kept_here = {entry.id for entry in [*ranked[: policy.keep], *newest[: policy.keep_latest]]}
    for place, entry in enumerate(ranked):
        draft = drafts[entry.id]
        draft.depth = min(draft.depth, place)
        draft.why_not = draft.why_not or f"number {place + 1} of its experiment, {policy.keep} are kept"
        if place < policy.keep:
            best = place == 0
            reason = "the best" if best else f"number {place + 1}"
            draft.hold(reason + where, every_part=best, protect=best and not where)
    for entry in newest[: policy.keep_latest]:
        drafts[entry.id].hold("the newest" + where, protect=not where)
    # of those that this source keeps by itself: else another source could change what it keeps
    for entry in [entry for entry in newest if entry.id in kept_here][: policy.keep_optimizer]:
        drafts[entry.id].whole = True


def _judge_dataset(draft: _Draft, policy: Policy, now: datetime) -> None:
    age = now - datetime.fromisoformat(draft.entry.manifest.created)
    hours, limit = age.total_seconds() / 3600, policy.data_ttl.total_seconds() / 3600
    if age < policy.data_ttl:
        draft.hold(f"prepared data, {max(0.0, hours):.0f} h old of {limit:.0f} h", every_part=True)
    draft.why_not = f"prepared data older than {limit:.0f} h"


def _shrink(
    drafts: Sequence[_Draft], max_size: int, contents: Contents, used: Mapping[ObjectId, int]
) -> dict[ObjectId, int]:
    """Let go of whole manifests, worst first, until what is left fits beside ``used``. Returns all that is used then.

    One that frees nothing, since its data is gone already or others that stay need all of it, stays too.
    """
    sizes = dict(used)
    holders: Counter[ObjectId] = Counter(used.keys())
    held: dict[ObjectId, Counter[ObjectId]] = {}
    for draft in drafts:
        parts = [contents(draft.entry, part) for part in draft.parts()]
        held[draft.entry.id] = Counter(own for objects in parts for own in objects)
        holders.update(held[draft.entry.id])
        for objects in parts:
            sizes.update(objects)
    total = sum(sizes.values())
    let_go = []
    for draft in sorted((one for one in drafts if one.kept and not one.protected), key=_eviction_order):
        if total <= max_size:
            break
        mine = held[draft.entry.id]
        holders.subtract(mine)
        total -= sum(sizes[own] for own in mine if not holders[own])
        let_go.append(draft)
    for draft in let_go:
        if all(holders[own] for own in held[draft.entry.id]):
            holders.update(held[draft.entry.id])
        else:
            draft.kept = False
            draft.why_not = "evicted to fit max_size"
    return {own: size for own, size in sizes.items() if holders[own] > 0}


def _eviction_order(draft: _Draft) -> tuple[bool, int, str, ObjectId]:
    """First what can be made again, then the worst, then the oldest."""
    manifest = draft.entry.manifest
    return manifest.kind != "dataset", -draft.depth, manifest.created, draft.entry.id


def kept_parts(decisions: Iterable[Decision]) -> list[tuple[Entry, str]]:
    """Every part that is kept, with its manifest."""
    return [(decision.entry, part) for decision in decisions for part in decision.parts]
