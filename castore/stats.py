"""Count what the store holds, by checkpoint, part and run, and what sharing and compression save."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from castore import gc
from castore.errors import CastoreError, CorruptionError, StorageError
from castore.format import part_index
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.policy.resolution import availability
from castore.repo import Repo

PlainLengths = Mapping[ObjectId, int]
"""The objects of a part, its index included, with their plain lengths in bytes."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes that a group of parts takes, counting only objects that are in the store.

    ``raw``: plain copies of all ``parts`` parts. ``distinct``: plain bytes with each object counted once. ``stored``:
    the files of those objects. An object that several groups share counts in each of them.
    """

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
    """What gc would free under the policy of config.toml; ``problem`` is the reason it would delete nothing."""

    objects: int = 0
    bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class FolderUsage:
    """The number of files in a folder and their bytes."""

    files: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """``objects`` is everything in objects/; ``total`` is the share of it that manifests of the work tree need."""

    manifests: Mapping[str, int]
    availability: Mapping[str, int]
    objects: FolderUsage
    total: Usage
    by_part: Mapping[str, Usage]
    by_run: Mapping[str, Usage]
    gc: Collectable
    folders: Mapping[str, FolderUsage]

    @property
    def unneeded(self) -> int:
        """Stored bytes that no manifest of the work tree needs; another branch may need them."""
        return self.objects.bytes - self.total.stored


@dataclass(slots=True)
class _Group:
    parts: int = 0
    raw: int = 0
    lengths: dict[ObjectId, int] = field(default_factory=dict)


def count(parts: Iterable[tuple[str, PlainLengths]], sizes: Mapping[ObjectId, int]) -> dict[str, Usage]:
    """Return the usage of each group, given (group, objects of a part) pairs and the stored size of every object.

    Pure. Objects without a size are not in the store and count nowhere.

    >>> count([("a", {"x": 10}), ("a", {"x": 10, "y": 5})], {"x": 4, "y": 5})
    {'a': Usage(parts=2, raw=25, distinct=15, stored=9)}
    """
    groups: dict[str, _Group] = {}
    for name, lengths in parts:
        present = {object_id: length for object_id, length in lengths.items() if object_id in sizes}
        if present:
            group = groups.setdefault(name, _Group())
            group.parts += 1
            group.raw += sum(present.values())
            group.lengths |= present
    return {
        name: Usage(
            parts=group.parts,
            raw=group.raw,
            distinct=sum(group.lengths.values()),
            stored=sum(sizes[object_id] for object_id in group.lengths),
        )
        for name, group in groups.items()
    }


def plan_gc(repo: Repo, now: datetime) -> gc.GCPlan | CastoreError:
    """Return the plan of a collection under the policy of config.toml, or the error that explains why there is none."""
    try:
        return gc.collect_garbage(repo, dry_run=True, verify=False, now=now)
    except CastoreError as error:
        return error


def stats(repo: Repo, now: datetime, plan: gc.GCPlan | CastoreError | None = None) -> Stats:
    """Count everything that ``repo`` holds. Only reads. Raise Locked or StorageError.

    ``plan``: what :func:`plan_gc` returned, if the caller has it already; None plans here.
    """
    with repo.lock():
        entries = repo.catalog.listing().entries
        sizes = {object_id: stored.size for object_id, stored in repo.store.stored().items()}
        lengths = {index_id: _plain_lengths(repo, index_id) for index_id in _index_ids(entries) if index_id in sizes}
        states: Counter[str] = Counter(
            availability(found)
            for found in repo.part_states_of(entry for entry in entries if entry.manifest.kind == "checkpoint").values()
        )
    held = [
        (entry, name, lengths[part.index])
        for entry in entries
        for name, part in entry.manifest.parts.items()
        if part.index in lengths
    ]
    return Stats(
        manifests=dict(Counter(str(entry.manifest.kind) for entry in entries)),
        availability=dict(states),
        objects=FolderUsage(len(sizes), sum(sizes.values())),
        total=count((("", objects) for _, _, objects in held), sizes).get("", Usage()),
        by_part=count(((name, objects) for _, name, objects in held), sizes),
        by_run=count(((entry.manifest.run, objects) for entry, _, objects in held), sizes),
        gc=_collectable(plan or plan_gc(repo, now)),
        folders={name: folder_usage(repo.location.data / name) for name in ("tmp", "trash", "quarantine")},
    )


def stats_as_json(counted: Stats) -> dict[str, Any]:
    """Return the statistics as JSON values, with what is derived from them."""
    return {
        **asdict(counted),
        "total": _usage_as_json(counted.total),
        "by_part": {name: _usage_as_json(usage) for name, usage in sorted(counted.by_part.items())},
        "by_run": {name: _usage_as_json(usage) for name, usage in sorted(counted.by_run.items())},
        "unneeded": counted.unneeded,
    }


def _usage_as_json(usage: Usage) -> dict[str, int]:
    saved = {"saved_by_sharing": usage.saved_by_sharing, "saved_by_compression": usage.saved_by_compression}
    return {**asdict(usage), **saved}


def folder_usage(folder: Path) -> FolderUsage:
    """Count the regular files directly in ``folder``; zero if it does not exist. Raise StorageError."""
    try:
        with os.scandir(folder) as items:
            sizes = [file.stat().st_size for file in items if file.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return FolderUsage(0, 0)
    except OSError as error:
        raise StorageError("read", str(folder), error) from error
    return FolderUsage(len(sizes), sum(sizes))


def _index_ids(entries: Iterable[Entry]) -> set[ObjectId]:
    return {part.index for entry in entries for part in entry.manifest.parts.values()}


def _plain_lengths(repo: Repo, index_id: ObjectId) -> PlainLengths:
    """Return the index and the chunks it lists; nothing if the index is damaged, which is for verify to report."""
    try:
        data = repo.store.read(index_id, mend=False)
        return {chunk.id: chunk.length for chunk in part_index.decode_chunks(data)} | {index_id: len(data)}
    except (CorruptionError, StorageError):
        return {}


def _collectable(plan: gc.GCPlan | CastoreError) -> Collectable:
    if isinstance(plan, CastoreError):
        return Collectable(problem=str(plan))
    return Collectable(len(plan.delete), plan.freed_bytes)
