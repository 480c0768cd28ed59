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

from castore.ids import ObjectId
from castore.quality import Entry, newest_first, rank

RESUME_PARTS = frozenset({"optimizer", "trainer"})
"""Parts that serve to resume training alone: two thirds of a checkpoint, wanted of few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What to keep. Numbers count per line; ``max_size`` is in stored bytes, over everything; None is no limit."""

    keep: int = 10
    keep_latest: int = 1
    keep_optimizer: int = 2
    max_size: int | None = None
    data_ttl: timedelta = timedelta(hours=168)
    tie_tolerance: float = 0.0


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
    in_use: AbstractSet[str] = frozenset(),
) -> tuple[Decision, ...]:
    """One decision for every manifest of every source, newest first.

    Of each line: the best ``keep`` by score and the newest ``keep_latest``; beside them whatever is pinned or in use.
    Their optimizer and trainer parts stay for the best one, the newest ``keep_optimizer`` of those kept, and those
    pinned or in use. ``max_size`` then lets go worst-first, but never of the best, the newest, the pinned or the used;
    what only ``others`` have goes first, or else they could make something go after all.
    """
    drafts: dict[ObjectId, _Draft] = {}
    for source in (own, *others):
        for entry in source.entries:
            if entry.id not in drafts:
                drafts[entry.id] = _Draft(entry, foreign=source is not own)
        _judge_source(source, policy, drafts, now, f" on {source.name}" if source is not own else "")
    for ids, reason in ((pinned, "pinned"), (in_use, "in use")):
        for own_id in ids:
            if draft := drafts.get(ObjectId(own_id)):
                draft.hold(reason, every_part=True, protect=True)
    if policy.max_size is not None:
        _shrink(list(drafts.values()), policy.max_size, contents)
    ordered = newest_first(draft.entry for draft in drafts.values())
    return tuple(drafts[entry.id].decision() for entry in ordered)


class _Draft:
    """A decision in the making."""

    def __init__(self, entry: Entry, *, foreign: bool) -> None:
        self.entry = entry
        self.foreign = foreign
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

    def decision(self) -> Decision:
        return Decision(self.entry, self.parts(), tuple(self.reasons) if self.kept else (self.why_not,))


def _judge_source(source: Source, policy: Policy, drafts: Mapping[ObjectId, _Draft], now: datetime, where: str) -> None:
    lines: dict[bytes, list[Entry]] = {}
    for entry in source.entries:
        if entry.manifest.kind == "checkpoint":
            lines.setdefault(msgspec.json.encode(entry.manifest.line, order="sorted"), []).append(entry)
        elif entry.manifest.kind == "dataset":
            _judge_dataset(drafts[entry.id], policy, now)
        else:
            drafts[entry.id].hold("added by hand: `castore forget` lets it go", every_part=True, protect=True)
    for entries in lines.values():
        _judge_line(entries, policy, drafts, where)


def _judge_line(entries: Sequence[Entry], policy: Policy, drafts: Mapping[ObjectId, _Draft], where: str) -> None:
    ranked = rank(entries, policy.tie_tolerance)
    newest = newest_first(entries)
    kept_here = {entry.id for entry in [*ranked[: policy.keep], *newest[: policy.keep_latest]]}
    for place, entry in enumerate(ranked):
        draft = drafts[entry.id]
        draft.depth = min(draft.depth, place)
        draft.why_not = draft.why_not or f"number {place + 1} of its line, {policy.keep} are kept"
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


def _shrink(drafts: Sequence[_Draft], max_size: int, contents: Contents) -> None:
    """Let go of whole manifests until what is left fits."""
    held = {id(draft): [contents(draft.entry, part) for part in draft.parts()] for draft in drafts}
    holders: Counter[ObjectId] = Counter()
    sizes: dict[ObjectId, int] = {}
    for parts in held.values():
        for objects in parts:
            holders.update(objects.keys())
            sizes.update(objects)
    total = sum(sizes.values())
    for draft in sorted((one for one in drafts if one.kept and not one.protected), key=_eviction_order):
        if total <= max_size:
            return
        mine = Counter(own for objects in held[id(draft)] for own in objects)
        freed = sum(sizes[own] for own, count in mine.items() if holders[own] == count)
        if not freed:
            continue  # its data is gone already, or others need all of it
        holders.subtract(mine)
        total -= freed
        draft.kept = False
        draft.why_not = "evicted to fit max_size"


def _eviction_order(draft: _Draft) -> tuple[bool, bool, int, str, ObjectId]:
    """First what no manifest of the work tree claims, then what can be made again, then the worst, then the oldest."""
    manifest = draft.entry.manifest
    return not draft.foreign, manifest.kind != "dataset", -draft.depth, manifest.created, draft.entry.id


def kept_parts(decisions: Iterable[Decision]) -> list[tuple[Entry, str]]:
    """Every part that is kept, with its manifest."""
    return [(decision.entry, part) for decision in decisions for part in decision.parts]
