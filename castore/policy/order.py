"""Which checkpoints are newer than which: lineage first, then the step within a run, then time. Pure.

Clocks of machines that come and go are wrong now and then. A descendant is newer than its ancestor whatever they said;
of two that don't descend from each other in one run the later step is newer; `created` decides between runs. There an
entry counts as no newer than its descendants, so that a clock that was ahead once leads nobody, and as no older than
earlier steps of its run.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from castore.format.ids import ObjectId
from castore.format.manifest import Entry

_Run = tuple[str, str]


def newest_first(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries, the newest first. Their order does not depend on the one in which they are given."""
    by_time = sorted(entries, key=lambda entry: (entry.manifest.created, entry.manifest.step, entry.id), reverse=True)
    return by_time if _is_in_order(by_time) else _by_lineage(by_time)


def _is_in_order(newest: Sequence[Entry]) -> bool:
    """Whether lineage and steps agree with time: the usual case, which needs nothing more."""
    seen: set[ObjectId | None] = set()
    steps: dict[_Run, int] = {}
    for entry in newest:
        manifest = entry.manifest
        run = (manifest.kind, manifest.run)
        seen.add(entry.id)
        if manifest.parent in seen or manifest.step > steps.get(run, manifest.step):
            return False
        steps[run] = manifest.step
    return True


def _by_lineage(entries: Sequence[Entry]) -> list[Entry]:
    """Return the newest of those all of whose descendants were returned, again and again."""
    ages = _ages(entries, _leaves_first(entries, {entry.id: age for age, entry in enumerate(entries)}))
    return _leaves_first(entries, ages)


def _leaves_first(entries: Sequence[Entry], ages: Mapping[ObjectId, int]) -> list[Entry]:
    """Return every entry after its descendants, and the youngest first where that leaves a choice."""
    known = {entry.id: entry for entry in entries}
    waiting = Counter(entry.manifest.parent for entry in entries)
    ready = [(ages[entry.id], entry.id) for entry in entries if not waiting[entry.id]]
    heapq.heapify(ready)
    ordered = []
    while ready:
        entry = known[heapq.heappop(ready)[1]]
        ordered.append(entry)
        parent = entry.manifest.parent
        waiting[parent] -= 1
        if parent is not None and parent in known and not waiting[parent]:
            heapq.heappush(ready, (ages[parent], parent))
    return ordered


def _ages(entries: Sequence[Entry], leaves_first: Sequence[Entry]) -> dict[ObjectId, int]:
    """Return the place of each entry, 0 for the newest, by the step within each run and by time between runs."""
    times: dict[ObjectId | None, str] = {}
    for entry in leaves_first:  # no newer than its descendants
        parent, created = entry.manifest.parent, entry.manifest.created
        times[entry.id] = min(times.get(entry.id, created), created)
        times[parent] = min(times.get(parent, times[entry.id]), times[entry.id])
    keys: list[tuple[str, _Run, int, ObjectId]] = []
    latest: dict[_Run, str] = {}
    by_step = sorted(entries, key=lambda entry: (entry.manifest.step, entry.manifest.created, entry.id))
    for place, entry in enumerate(by_step):  # no older than earlier steps of its run
        run = (entry.manifest.kind, entry.manifest.run)
        latest[run] = max(latest.get(run, ""), times[entry.id])
        keys.append((latest[run], run, place, entry.id))
    keys.sort(reverse=True)
    return {checkpoint_id: age for age, (*_, checkpoint_id) in enumerate(keys)}
