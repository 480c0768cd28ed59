"""Bundles for GitHub's cache: choose the objects of a new one, upload it, write its records, and drop old records.

The cache limits how many entries a job makes and reads, so a session uploads one entry, a bundle, with all the objects
that earlier bundles lack.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from castore.errors import CorruptionError, CorruptObject, ObjectMissing, UploadRefused
from castore.format import bundle, manifest, part_index
from castore.format import frame as frames
from castore.format.bundle import BundleLayout, Contents, Record
from castore.format.ids import ObjectId, hash_bytes
from castore.format.manifest import Entry
from castore.progress import Progress
from castore.remotes.github_cache import GitHubCache
from castore.repo import Repo
from castore.storage import fs
from castore.storage.object_store import ObjectStore

KeptParts = Sequence[tuple[Entry, Sequence[str]]]
"""Checkpoints, and the names of the parts of each that are kept."""

_STALE_AFTER = timedelta(days=14)  # GitHub evicts an entry that nobody read for seven days


@dataclass(frozen=True, slots=True)
class BundlePlan:
    """What a new bundle would hold, in order, and the bundles that each part then needs, by the part's index.

    None marks the new bundle. ``left_out`` lists checkpoints that can't be uploaded, as (id, reason). ``unconfirmed``
    are those with a part that is not here, and of which the bundles were not seen to have all.
    """

    objects: tuple[ObjectId, ...]
    bundles_of_parts: Mapping[ObjectId, tuple[ObjectId | None, ...]]
    left_out: tuple[tuple[ObjectId, str], ...]
    unconfirmed: tuple[ObjectId, ...] = ()


# -- planning --------------------------------------------------------------------------------------------------------


def plan_bundle(repo: Repo, remote: GitHubCache, kept: KeptParts) -> BundlePlan:
    """Plan a bundle of what another machine could not get of ``kept`` from the bundles in the cache.

    New objects are verified: damage is found here, not by the machine that fetches them. The caller holds the shared
    lock.
    """
    held = {
        bundle_id: remote.holds(bundle_id)
        for entry, parts in kept
        for name in parts
        for bundle_id in remote.bundles_of(entry.manifest.parts[name].index)
    }
    bundled: set[ObjectId] = set()
    bundles_of_parts: dict[ObjectId, tuple[ObjectId | None, ...]] = {}
    order: list[list[ObjectId]] = []
    left_out = []
    unconfirmed = []
    for entry, parts in kept:
        indexes = [entry.manifest.parts[name].index for name in parts]
        lacking = [index_id for index_id in indexes if not _is_in_bundles(repo.store, remote, index_id)]
        if not all(map(repo.store.has, lacking)):
            unconfirmed.append(entry.id)
        try:
            sizes_of_parts = {
                index_id: _stored_sizes(repo.store, index_id) for index_id in lacking if repo.store.has(index_id)
            }
        except (CorruptionError, ObjectMissing) as error:
            left_out.append((entry.id, str(error)))
            continue
        needed = {object_id: size for sizes in sizes_of_parts.values() for object_id, size in sizes.items()}
        relied, new = bundle.choose_bundles(needed, held)
        problem = _find_damage(repo.store, new - bundled)
        if problem:
            left_out.append((entry.id, problem))
            continue
        bundled |= new
        for index_id, sizes in sizes_of_parts.items():
            order.append(list(sizes))
            existing = [bundle_id for bundle_id in relied if held[bundle_id].keys() & sizes.keys()]
            bundles_of_parts[index_id] = (*existing, *([None] if new & sizes.keys() else []))
    objects = tuple(bundle.in_order(order, bundled))
    return BundlePlan(objects, bundles_of_parts, tuple(left_out), tuple(unconfirmed))


def _is_in_bundles(store: ObjectStore, remote: GitHubCache, index_id: ObjectId) -> bool:
    """Whether the bundles that some record names for a part hold all of it, as far as can be told here."""
    needed = {index_id}
    if store.has(index_id):
        with contextlib.suppress(CorruptionError):  # the bundles may have a good one
            needed |= {chunk.id for chunk in part_index.decode_chunks(store.read(index_id, mend=False))}
    return any(
        needed <= {object_id for bundle_id in record.parts[index_id] for object_id in remote.holds(bundle_id)}
        for record in remote.records
        if index_id in record.parts
    )


def _stored_sizes(store: ObjectStore, index_id: ObjectId) -> dict[ObjectId, int]:
    """Return the stored size in bytes of each object of a part, the index first. ObjectMissing, CorruptionError."""
    chunks = part_index.decode_chunks(store.read(index_id, mend=False))
    sizes = {}
    for object_id in (index_id, *(chunk.id for chunk in chunks)):
        size = store.stored_size(object_id)
        if size is None:
            raise ObjectMissing(object_id)
        sizes[object_id] = size
    return sizes


def _find_damage(store: ObjectStore, object_ids: Collection[ObjectId]) -> str:
    """Verify objects; return what is wrong with the first bad one, or an empty string."""
    scratch = bytearray()
    for object_id in sorted(object_ids):
        try:
            store.check(object_id, scratch)
        except (CorruptObject, ObjectMissing) as error:
            return str(error)
    return ""


# -- uploading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The records of a new bundle, none when no upload was needed; ``left_out``, ``unconfirmed``: see BundlePlan."""

    records: tuple[Record, ...]
    left_out: tuple[tuple[ObjectId, str], ...]
    unconfirmed: tuple[ObjectId, ...]


def upload_missing(
    repo: Repo,
    remote: GitHubCache,
    kept: KeptParts,
    files: Mapping[str, str],
    *,
    ref: str,
    progress: Progress,
    now: datetime,
) -> Uploaded:
    """Upload what the cache lacks of ``kept`` as one bundle, then write the records that name it to the repository.

    Records are written only once a look-up has confirmed the bundle. ``files`` are what the commit will add beside
    them, by paths in ``.castore/``: a copy travels in the bundle. ``ref`` is the git ref of the job. UploadRefused,
    RemoteUnavailable.
    """
    with repo.lock():
        plan = plan_bundle(repo, remote, kept)
        if not plan.bundles_of_parts:
            return Uploaded((), plan.left_out, plan.unconfirmed)
        if len(plan.objects) >= bundle.MAX_OBJECTS:
            reason = f"{len(plan.objects)} objects are more than a bundle holds: a larger chunk_size makes fewer"
            raise UploadRefused(remote.name, reason)
        parts = {index_id: list(bundle_ids) for index_id, bundle_ids in plan.bundles_of_parts.items()}
        contents = Contents(ref=ref, files=dict(files), parts=parts)
        if plan.objects:
            plain = bundle.encode_contents(contents)
            frame = frames.encode_frame(plain)
            sizes = {object_id: repo.store.stored_size(object_id) or 0 for object_id in plan.objects}
            layout = bundle.lay_out({**sizes, (contents_id := hash_bytes(plain)): len(frame)})
            key = remote.upload(layout, read_ranges(repo.store, layout, {contents_id: frame}), progress)
            bundle_id, size, count = layout.id, layout.size, len(layout.places)
        else:  # the cache has all the objects: only the records that say so are missing
            relied = {bundle_id for bundle_ids in plan.bundles_of_parts.values() for bundle_id in bundle_ids}
            basis = next(record for record in remote.records if record.bundle in relied)
            bundle_id, key, size, count = basis.bundle, basis.key, basis.bytes, basis.objects
        records = contents.records(bundle_id, key, size=size, objects=count, created=manifest.timestamp(now))
        for record in records:
            repo.catalog.add_record(record)
    return Uploaded(records if plan.objects else (), plan.left_out, plan.unconfirmed)


def read_ranges(
    store: ObjectStore, layout: BundleLayout, in_memory: Mapping[ObjectId, bytes]
) -> Callable[[int, int], bytes]:
    """Return a function that reads any range of a bundle from the objects' files: the whole is never copied.

    Frames that are ``in_memory`` have no file. ObjectMissing, raised by that function, when a file has changed its size
    since the layout was made; StorageError.
    """
    pieces: list[tuple[int, ObjectId | None]] = [
        (0, None),  # the header
        *((place.offset, object_id) for object_id, place in layout.places.items()),
    ]
    starts = [start for start, _ in pieces]
    tail_start = layout.size - len(layout.tail)

    def read(start: int, stop: int) -> bytes:
        data = bytearray()
        at = start
        while at < stop:
            if at >= tail_start:
                data += layout.tail[at - tail_start : stop - tail_start]
                break
            first, object_id = pieces[bisect.bisect_right(starts, at) - 1]
            if object_id is None:
                data += bundle.HEADER[at - first : stop - first]
            elif object_id in in_memory:
                data += in_memory[object_id][at - first : stop - first]
            else:
                length = layout.places[object_id].length
                if store.stored_size(object_id) != length:
                    raise ObjectMissing(object_id)  # replaced meanwhile by one that is encoded differently
                data += fs.read_range(store.path(object_id), at - first, min(length, stop - first))
            at = start + len(data)
        return bytes(data)

    return read


# -- old records -----------------------------------------------------------------------------------------------------


def remove_stale_records(
    repo: Repo, remote: GitHubCache, kept: KeptParts, *, ref: str, now: datetime
) -> tuple[str, ...]:
    """Remove old records of bundles that are gone or that nothing kept needs; return their paths in the repository.

    Every session would look them up. Only records of this ref are removed: jobs of other refs see other entries.
    """
    needed = {entry.manifest.parts[name].index for entry, parts in kept for name in parts}
    removed = []
    for record in remote.records:
        is_old = now - datetime.fromisoformat(record.created) > _STALE_AFTER
        is_useless = record.bundle in remote.missing() or not needed & record.parts.keys()
        if is_old and is_useless and record.ref == ref:
            path = repo.catalog.remove_record(record)
            removed.append(path.relative_to(repo.root).as_posix())
    return tuple(removed)
