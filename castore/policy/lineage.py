"""Checkpoints and their parents, drawn as text. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from castore.format.ids import ObjectId
from castore.format.manifest import Entry


def draw(entries: Sequence[Entry]) -> Iterator[tuple[str, Entry | None]]:
    """(graph, checkpoint on this line or None), children above their parents as in ``git log --graph``.

    ``entries`` come newest first, and the tree with the newest one is drawn first. Where a parent has several
    children, the branch with most checkpoints comes first: so the drawing is at most log2(n) + 1 columns wide,
    whatever was resumed from what.
    """
    known = {entry.id: entry for entry in entries}
    children: dict[ObjectId | None, list[Entry]] = {}
    for entry in entries:
        parent = entry.manifest.parent
        children.setdefault(parent if parent in known else None, []).append(entry)
    awaited: list[ObjectId] = []
    for entry in _ordered(children, _weights(children)):
        if awaited[-1:] == [entry.id]:
            awaited.pop()
        yield "| " * len(awaited) + "*", entry
        parent = entry.manifest.parent
        if parent in known:
            if awaited[-1:] == [parent]:
                yield "| " * (len(awaited) - 1) + "|/", None
            else:
                awaited.append(parent)


def _weights(children: dict[ObjectId | None, list[Entry]]) -> dict[ObjectId, int]:
    """How many checkpoints descend from each, itself included."""
    downwards = list(children.get(None, ()))
    for entry in downwards:  # grows while it is walked
        downwards += children.get(entry.id, ())
    weights: dict[ObjectId, int] = {}
    for entry in reversed(downwards):
        weights[entry.id] = 1 + sum(weights[child.id] for child in children.get(entry.id, ()))
    return weights


def _ordered(children: dict[ObjectId | None, list[Entry]], weights: dict[ObjectId, int]) -> Iterator[Entry]:
    """Every checkpoint after its children."""
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
    """The roots, that of the newest checkpoint first."""

    def newest(root: Entry) -> str:
        below = [root]
        for entry in below:  # grows while it is walked
            below += children.get(entry.id, ())
        return max(entry.manifest.created for entry in below)

    return sorted(children.get(None, ()), key=newest, reverse=True)


def furthest(entries: Sequence[Entry], own: ObjectId, config: Mapping[str, Any]) -> Entry | None:
    """The checkpoint with most steps among those that descend from ``own`` by sessions with exactly these settings."""
    reached = {own}
    found = []
    for entry in sorted(entries, key=lambda entry: (entry.manifest.created, entry.manifest.step)):
        if entry.manifest.parent in reached and entry.manifest.config == config:
            reached.add(entry.id)
            found.append(entry)
    # of several at the same step the newest: its data is the likeliest to be there
    return max(found, key=lambda entry: (entry.manifest.step, entry.manifest.created), default=None)
