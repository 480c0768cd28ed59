"""Read again what a remote holds, and check it: every byte is fetched, none is kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from castore.errors import CorruptionError
from castore.format import part_index
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import Entry
from castore.parallel import map_ahead
from castore.progress import Progress, ignore_progress
from castore.remotes import fallback
from castore.remotes.base import PublishingRemote
from castore.repo import Repo
from castore.transfer import read_manifests
from castore.verify import Finding, Need


def verify_remote(
    repo: Repo,
    remote: PublishingRemote,
    selectors: Sequence[str] | None = None,
    *,
    progress: Progress = ignore_progress,
) -> Iterator[Finding]:
    """Check in a remote what the checkpoints that ``selectors`` name need, or all that was pushed and all objects.

    A part whose index isn't there was not pushed, or was deleted: that is no finding. ``progress`` counts objects.
    RemoteError or StorageError when the remote can't be read.
    """
    entries = list(map(repo.find, selectors)) if selectors else read_manifests(remote)
    needs, indexes = _needs(entries)
    there = remote.has(indexes)
    checked: set[ObjectId] = set()
    for index_id in sorted(there):
        checked.add(index_id)
        data = fallback.plain(remote, index_id)
        if data is None:
            yield _finding(remote, "damaged", index_id, remote.explain_missing(index_id), needs)
            continue
        try:
            for chunk in part_index.decode_chunks(bytes(data)):
                needs.setdefault(chunk.id, []).extend(needs[index_id])
        except CorruptionError as error:
            yield _finding(remote, "damaged", index_id, str(error), needs)
    chunks = needs.keys() - indexes
    present = remote.has(chunks)
    for object_id in sorted(chunks - present):
        yield _finding(remote, "missing", object_id, remote.explain_missing(object_id), needs)
    others = set() if selectors else _listed(remote) - indexes
    yield from _check_all(remote, sorted((present | others) - checked), needs, progress)


def _needs(entries: Collection[Entry]) -> tuple[dict[ObjectId, list[Need]], set[ObjectId]]:
    needs: dict[ObjectId, list[Need]] = {}
    for entry in entries:
        for name, part in entry.manifest.parts.items():
            needs.setdefault(part.index, []).append(Need(entry.id, name))
    return needs, set(needs)


def _listed(remote: PublishingRemote) -> set[ObjectId]:
    names = (file.name.rpartition("/")[2] for file in remote.files("objects"))
    return {ObjectId(name) for name in names if is_object_id(name)}


def _check_all(
    remote: PublishingRemote, object_ids: Sequence[ObjectId], needs: dict[ObjectId, list[Need]], progress: Progress
) -> Iterator[Finding]:
    remote.expect(object_ids)

    def check(object_id: ObjectId) -> tuple[ObjectId, str | None]:
        return object_id, fallback.check(remote, object_id)

    for done, (object_id, reason) in enumerate(map_ahead(check, object_ids, fallback.ASKERS, name="castore-verify"), 1):
        progress(done, len(object_ids))
        if reason is not None:
            yield _finding(remote, "damaged", object_id, reason, needs)


def _finding(
    remote: PublishingRemote, kind: str, object_id: ObjectId, reason: str, needs: dict[ObjectId, list[Need]]
) -> Finding:
    return Finding(
        kind="missing" if kind == "missing" else "damaged",
        reason=reason,
        path=Path(remote.name, "objects", object_id[:2], object_id),
        object_id=object_id,
        needed_by=tuple(needs.get(object_id, ())),
    )
