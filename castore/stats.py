"""What the store holds, by checkpoint, part and run, and what sharing and compression save. Counting is pure."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from castore import gc
from castore.errors import CastoreError, CorruptionError, StorageError
from castore.format import part_index
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.policy.resolution import availability
from castore.repo import Repo

Plain = Mapping[ObjectId, int]
"""The objects of a part, its index among them, with their plain lengths."""


@dataclass(frozen=True, slots=True)
class Usage:
    """``raw``: what plain copies of ``parts`` parts would take. ``distinct``: with each object once. ``stored``: those
    objects' files. What several groups share counts in each of them."""

    parts: int = 0
    raw: int = 0
    distinct: int = 0
    stored: int = 0

    @property
    def saved_by_sharing(self) -> int:
        return self.raw - self.distinct

    @property
    def saved_by_compression(self) -> int:
        return self.distinct - self.stored


@dataclass(frozen=True, slots=True)
class Collectable:
    """What gc would free by the policy of config.toml, or why it would delete nothing."""

    objects: int = 0
    bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Heap:
    """Files in a folder and their bytes."""

    files: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """``objects`` is everything in objects/; ``total`` is what manifests of the work tree need of it."""

    manifests: Mapping[str, int]
    availability: Mapping[str, int]
    objects: Heap
    total: Usage
    by_part: Mapping[str, Usage]
    by_run: Mapping[str, Usage]
    gc: Collectable
    folders: Mapping[str, Heap]

    @property
    def unneeded(self) -> int:
        """Stored bytes that no manifest of the work tree needs; another branch may."""
        return self.objects.bytes - self.total.stored


@dataclass(slots=True)
class _Group:
    parts: int = 0
    raw: int = 0
    objects: dict[ObjectId, int] = field(default_factory=dict)


def count(parts: Iterable[tuple[str, Plain]], sizes: Mapping[ObjectId, int]) -> dict[str, Usage]:
    """The usage of each group, given (group, a part's objects) and the stored size of every object that is here.

    Pure. What isn't here takes no space and counts nowhere.
    """
    groups: dict[str, _Group] = {}
    for name, plain in parts:
        here = {own: length for own, length in plain.items() if own in sizes}
        if here:
            group = groups.setdefault(name, _Group())
            group.parts += 1
            group.raw += sum(here.values())
            group.objects |= here
    return {
        name: Usage(
            group.parts, group.raw, sum(group.objects.values()), sum(sizes[own] for own in group.objects)
        )
        for name, group in groups.items()
    }  # fmt: skip


def stats(repo: Repo, now: datetime) -> Stats:
    """Look at everything and count; nothing is changed. Locked, StorageError."""
    with repo.lock():
        entries = repo.catalog.listing().entries
        sizes = {own: found.size for own, found in repo.store.stored().items()}
        plain = {own: _plain(repo, own) for own in _indexes(entries) if own in sizes}
        states: Counter[str] = Counter(
            availability(repo.part_states(entry)) for entry in entries if entry.manifest.kind == "checkpoint"
        )
    held = [
        (entry, name, plain[part.index])
        for entry in entries
        for name, part in entry.manifest.parts.items()
        if part.index in plain
    ]
    return Stats(
        manifests=dict(Counter(str(entry.manifest.kind) for entry in entries)),
        availability=dict(states),
        objects=Heap(len(sizes), sum(sizes.values())),
        total=count((("", objects) for _, _, objects in held), sizes).get("", Usage()),
        by_part=count(((name, objects) for _, name, objects in held), sizes),
        by_run=count(((entry.manifest.run, objects) for entry, _, objects in held), sizes),
        gc=_collectable(repo, now),
        folders={name: heap(repo.root / name) for name in ("tmp", "trash", "quarantine")},
    )


def heap(folder: Path) -> Heap:
    """The regular files directly in a folder; none when it isn't there. StorageError."""
    try:
        with os.scandir(folder) as items:
            found = [file.stat().st_size for file in items if file.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return Heap(0, 0)
    except OSError as error:
        raise StorageError("read", str(folder), error) from error
    return Heap(len(found), sum(found))


def _indexes(entries: Iterable[Entry]) -> set[ObjectId]:
    return {part.index for entry in entries for part in entry.manifest.parts.values()}


def _plain(repo: Repo, own: ObjectId) -> Plain:
    """What an index lists and itself; nothing of one that is damaged, which is for verify to tell."""
    try:
        data = repo.store.read(own, mend=False)
        return {chunk.id: chunk.length for chunk in part_index.decode_chunks(data)} | {own: len(data)}
    except (CorruptionError, StorageError):
        return {}


def _collectable(repo: Repo, now: datetime) -> Collectable:
    try:
        plan = gc.collect_garbage(repo, dry_run=True, now=now)
    except CastoreError as error:
        return Collectable(problem=str(error))
    return Collectable(len(plan.delete), plan.freed_bytes)
