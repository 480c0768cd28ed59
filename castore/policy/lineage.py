"""Checkpoints and their parents: graphs and their layout, ancestors, and the furthest descendant. Pure."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.policy.order import newest_first


def draw(entries: Sequence[Entry]) -> Iterator[tuple[str, Entry | None]]:
    """Yield (graph, entry on this line or None), children above their parents as in ``git log --graph``.

    ``entries`` are given newest first, and the tree of the newest is drawn first. Where a parent has several children,
    the branch with the most checkpoints is drawn first, which keeps the graph of n checkpoints within log2(n) + 1
    columns.
    """
    known = {entry.id: entry for entry in entries}
    children: dict[ObjectId | None, list[Entry]] = {}
    for entry in entries:
        parent = entry.manifest.parent
        children.setdefault(parent if parent in known else None, []).append(entry)
    open_parents: list[ObjectId] = []
    for entry in _ordered(children, _weights(children)):
        if open_parents[-1:] == [entry.id]:
            open_parents.pop()
        yield "| " * len(open_parents) + "*", entry
        parent = entry.manifest.parent
        if parent in known:
            if open_parents[-1:] == [parent]:
                yield "| " * (len(open_parents) - 1) + "|/", None
            else:
                open_parents.append(parent)


def branches(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Return paths from parent to child, oldest first, that hold each entry of a run, that of the newest entry first.

    ``entries`` are given newest first. A path that leaves another one begins with the entry where it leaves it. An
    entry without a parent follows the one saved before it if its step is later: a loop may save without saying what
    follows what.
    """
    known = {entry.id: entry for entry in entries}
    by_time = sorted(entries, key=lambda entry: (entry.manifest.created, entry.manifest.step, entry.id), reverse=True)
    before = dict(itertools.pairwise(entry.id for entry in by_time))
    seen: set[ObjectId] = set()
    paths = []
    for entry in entries:
        path: list[Entry] = []
        following: Entry | None = entry
        while following is not None and following.id not in seen:
            seen.add(following.id)
            path.append(following)
            following = known.get(following.manifest.parent or before.get(following.id, following.id))
            if following is not None and following.manifest.step >= path[-1].manifest.step:
                following = None
        if path:
            paths.append([*([following] if following is not None else []), *path[::-1]])
    return paths


def _weights(children: dict[ObjectId | None, list[Entry]]) -> dict[ObjectId, int]:
    """Return the number of descendants of each checkpoint, itself included."""
    downwards = list(children.get(None, ()))
    for entry in downwards:  # grows while it is walked
        downwards += children.get(entry.id, ())
    weights: dict[ObjectId, int] = {}
    for entry in reversed(downwards):
        weights[entry.id] = 1 + sum(weights[child.id] for child in children.get(entry.id, ()))
    return weights


def _ordered(children: dict[ObjectId | None, list[Entry]], weights: dict[ObjectId, int]) -> Iterator[Entry]:
    """Yield every checkpoint after its children."""
    pending: list[tuple[Entry, bool]] = []
    for root in _by_newest(children):
        pending.append((root, False))
        while pending:
            entry, has_children_drawn = pending.pop()
            if has_children_drawn:
                yield entry
                continue
            pending.append((entry, True))
            heaviest_first = sorted(children.get(entry.id, ()), key=lambda child: -weights[child.id])
            pending += [(child, False) for child in reversed(heaviest_first)]


def _by_newest(children: dict[ObjectId | None, list[Entry]]) -> list[Entry]:
    """Return the roots, the one with the newest descendant first."""

    age = {
        entry.id: place for place, entry in enumerate(newest_first(itertools.chain.from_iterable(children.values())))
    }

    def age_of_newest(root: Entry) -> int:
        descendants = [root]
        for entry in descendants:  # grows while it is walked
            descendants += children.get(entry.id, ())
        return min(age[entry.id] for entry in descendants)

    return sorted(children.get(None, ()), key=age_of_newest)


def furthest(entries: Sequence[Entry], ancestor_id: ObjectId, config: Mapping[str, Any]) -> Entry | None:
    """Return the descendant of ``ancestor_id`` with the most steps trained with exactly this config, or None.

    Every checkpoint on the way to it must have been trained with this config, too.
    """
    reached = {ancestor_id}
    descendants = []
    oldest_first = newest_first(entries)[::-1]
    for entry in oldest_first:
        if entry.manifest.parent in reached and entry.manifest.config == config:
            reached.add(entry.id)
            descendants.append(entry)
    # of several at the same step the newest: its data is the most likely to be available
    return max(reversed(descendants), key=lambda entry: entry.manifest.step, default=None)


def ancestors(entries: Iterable[Entry], checkpoint_id: ObjectId) -> list[ObjectId]:
    """Return a checkpoint, its parent, that one's parent and so on, as far as they are among ``entries``."""
    parents = {entry.id: entry.manifest.parent for entry in entries}
    path: list[ObjectId] = []
    current: ObjectId | None = checkpoint_id
    while current in parents:
        path.append(current)
        current = parents[current]
    return path


def lanes(entries: Iterable[Entry], best_path: frozenset[ObjectId]) -> dict[ObjectId, int]:
    """Return the row of each checkpoint in a drawing with steps from left to right, where no two branches overlap.

    A branch stays in its parent's row along ``best_path``, or else with the heaviest child; the best path is in row 0.
    """
    known = {entry.id: entry for entry in entries}
    children: dict[ObjectId | None, list[Entry]] = {}
    for entry in newest_first(known.values())[::-1]:
        parent = entry.manifest.parent
        children.setdefault(parent if parent in known else None, []).append(entry)
    weights = _weights(children)

    def worth(entry: Entry) -> tuple[bool, int]:
        return entry.id in best_path, weights[entry.id]

    row_of: dict[ObjectId, int] = {}
    spans_of: list[list[tuple[int, int]]] = []  # of each row, the (first, last) steps of the branches in it
    starts = sorted(children.get(None, ()), key=worth, reverse=True)
    for start in starts:  # grows while it is walked
        branch = [start]
        while next_ones := sorted(children.get(branch[-1].id, ()), key=worth, reverse=True):
            branch.append(next_ones[0])
            starts += next_ones[1:]
        steps = [entry.manifest.step for entry in branch]
        if start.manifest.parent in known:
            steps.append(known[start.manifest.parent].manifest.step)
        row = _free_row(spans_of, min(steps), max(steps))
        row_of |= dict.fromkeys((entry.id for entry in branch), row)
    return row_of


def _free_row(spans_of: list[list[tuple[int, int]]], first: int, last: int) -> int:
    """Take the steps ``first`` to ``last`` in the first row where they overlap with nothing; return the row."""
    for row, spans in enumerate(spans_of):
        at = bisect.bisect(spans, (first, last))  # a row's spans are in order, so only neighbours can overlap
        if (at == 0 or spans[at - 1][1] < first) and (at == len(spans) or last < spans[at][0]):
            spans.insert(at, (first, last))
            return row
    spans_of.append([(first, last)])
    return len(spans_of) - 1
