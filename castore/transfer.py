"""Objects between the store and remotes: fetch what a checkpoint needs, and hand on what others don't have yet."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from castore.errors import CorruptionError, CorruptObject, ObjectMissing
from castore.format import bundle, part_index
from castore.format.bundle import BundleLayout
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.remotes import fallback
from castore.remotes.github_cache import GitHubCache
from castore.repo import Repo
from castore.state.parts import locate_errors
from castore.storage import fs
from castore.storage.object_store import ObjectStore

_AT_ONCE = 8  # a request waits for the network, not for a processor
_IN_MEMORY = 128 << 20

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes in all."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull brought: objects, and their plain bytes."""

    objects: int
    bytes: int


def pull(repo: Repo, entry: Entry, parts: Iterable[str], progress: Progress) -> Pulled:
    """Fetch what is missing of these parts of a checkpoint, every byte verified before it is stored.

    ObjectMissing when no remote has a good copy of something; what was fetched until then stays. Bytes are plain bytes.
    """
    indexes: dict[ObjectId, tuple[bytes, bytes]] = {}
    lost: dict[ObjectId, int] = {}
    with repo.lock():
        for name in parts:
            own = entry.manifest.parts[name].index
            with locate_errors(name, entry.id):
                data, frame = fallback.read(repo.store, repo.remotes, own)
                chunks = part_index.decode_chunks(data)
            if frame is not None:
                indexes[own] = data, frame
            lost.update((chunk.id, chunk.length) for chunk in chunks if not repo.store.has(chunk.id))
        _fetch_all(repo, lost, progress)
        # last: an index without its chunks would be taken for damage
        for own, (data, frame) in indexes.items():
            repo.store.adopt(own, frame, memoryview(bytearray(len(data))))
    return Pulled(len(lost) + len(indexes), sum(lost.values()) + sum(len(data) for data, _ in indexes.values()))


def _fetch_all(repo: Repo, lost: Mapping[ObjectId, int], progress: Progress) -> None:
    done, total = 0, sum(lost.values())
    # each thread holds a frame and what it decodes to
    at_once = max(1, min(_AT_ONCE, _IN_MEMORY // (2 * max(lost.values(), default=1))))
    with ThreadPoolExecutor(at_once, thread_name_prefix="castore-fetch") as pool:
        futures = {own: pool.submit(fallback.fetch, repo.store, repo.remotes, own) for own in lost}
        try:
            for own, future in futures.items():
                if future.result() is None:
                    raise ObjectMissing(own)
                done += lost[own]
                progress(done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# -- handing on ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Handover:
    """What a new bundle is to hold, in order, and which bundles each part then needs; ``""`` stands for the new one.

    ``left_out`` says of checkpoints why they can't be handed on, as (id, reason).
    """

    objects: tuple[ObjectId, ...]
    parts: Mapping[ObjectId, tuple[str, ...]]
    left_out: tuple[tuple[ObjectId, str], ...]


def plan_upload(repo: Repo, remote: GitHubCache, kept: Sequence[tuple[Entry, Sequence[str]]]) -> Handover:
    """What the next session could not get of ``kept`` (checkpoints, and the parts of each that are kept).

    Damaged objects are found here rather than by whoever fetches them. The caller holds the shared lock.
    """
    bundles = {
        own: remote.holds(own)
        for entry, parts in kept
        for name in parts
        for own in remote.bundles_of(entry.manifest.parts[name].index)
    }
    wanted: set[ObjectId] = set()
    needs: dict[ObjectId, tuple[str, ...]] = {}
    order: list[list[ObjectId]] = []
    left_out = []
    for entry, parts in kept:
        local = [name for name in parts if not _is_remote(repo, remote, entry, name)]
        local = [name for name in local if repo.store.has(entry.manifest.parts[name].index)]
        try:
            found = {name: _objects(repo.store, entry.manifest.parts[name].index) for name in local}
        except (CorruptionError, ObjectMissing) as error:
            left_out.append((entry.id, str(error)))
            continue
        needed = {own: size for sizes in found.values() for own, size in sizes.items()}
        chosen, new = bundle.choose_bundles(needed, bundles)
        problem = _damaged(repo.store, new - wanted)
        if problem:
            left_out.append((entry.id, problem))
            continue
        wanted |= new
        for name, sizes in found.items():
            order.append(list(sizes))
            relied = [own for own in chosen if bundles[own].keys() & sizes.keys()]
            needs[entry.manifest.parts[name].index] = (*relied, *([""] if new & sizes.keys() else []))
    return Handover(tuple(bundle.in_order(order, wanted)), needs, tuple(left_out))


def _is_remote(repo: Repo, remote: GitHubCache, entry: Entry, part: str) -> bool:
    """Whether the bundles that some record names for a part hold all of it, as far as this can be told from here."""
    own = entry.manifest.parts[part].index
    needed = {own}
    if repo.store.has(own):
        with contextlib.suppress(CorruptionError):  # the bundles may have a good one
            needed |= {chunk.id for chunk in part_index.decode_chunks(repo.store.read(own, mend=False))}
    return any(
        needed <= {one for bundle_id in record.parts[own] for one in remote.holds(bundle_id)}
        for record in remote.records
        if own in record.parts
    )


def _objects(store: ObjectStore, own: ObjectId) -> dict[ObjectId, int]:
    """The objects of a part and their stored sizes, the index first. ObjectMissing when one isn't here."""
    ids = [own, *(chunk.id for chunk in part_index.decode_chunks(store.read(own, mend=False)))]
    sizes = {}
    for one in ids:
        size = store.stored_size(one)
        if size is None:
            raise ObjectMissing(one)
        sizes[one] = size
    return sizes


def _damaged(store: ObjectStore, wanted: Collection[ObjectId]) -> str:
    """What is wrong with one of these objects; empty when all are good."""
    scratch = bytearray()
    for own in sorted(wanted):
        try:
            store.check(own, scratch)
        except (CorruptObject, ObjectMissing) as error:
            return str(error)
    return ""


def reader(store: ObjectStore, layout: BundleLayout) -> Callable[[int, int], bytes]:
    """Gives any range of a bundle, read from the objects' files as they lie: no copy of the whole is ever made."""
    pieces: list[tuple[int, ObjectId | None]] = [
        (0, None),
        *((place.offset, own) for own, place in layout.places.items()),
    ]
    starts = [start for start, _ in pieces]
    end = layout.size - len(layout.tail)

    def read(start: int, stop: int) -> bytes:
        data = bytearray()
        at = start
        while at < stop:
            if at >= end:
                data += layout.tail[at - end : stop - end]
                break
            first, own = pieces[bisect.bisect_right(starts, at) - 1]
            if own is None:
                data += bundle.HEADER[at - first : stop - first]
            else:
                length = layout.places[own].length
                if store.stored_size(own) != length:
                    raise ObjectMissing(own)  # replaced meanwhile by one that is encoded differently
                data += fs.read_range(store.path(own), at - first, min(length, stop - first))
            at = start + len(data)
        return bytes(data)

    return read
