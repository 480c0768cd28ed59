"""Checkpoints between a store and remotes, whatever their kind: push, fetch, and the manifests there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from castore.errors import (
    AmbiguousId,
    CorruptionError,
    CorruptManifest,
    CorruptObject,
    NotFound,
    ObjectMissing,
    UploadRefused,
    UsageError,
)
from castore.format import frame, manifest, part_index
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import Entry, Experiment
from castore.format.part_index import ChunkRef
from castore.parallel import map_ahead, map_all
from castore.policy.resolution import PartState, Requirement, resolve
from castore.policy.selector import Selector, check_digits
from castore.progress import Progress, ignore_progress
from castore.remotes import fallback, marks
from castore.remotes.base import PublishingRemote, Remote, is_publishing
from castore.remotes.bucket import Bucket
from castore.remotes.fallback import ErrorRecorder
from castore.remotes.marks import Marks
from castore.remotes.packs import MAX_BYTES, PACK_ABOVE
from castore.state.parts import locate_errors
from castore.storage.object_store import ObjectStore

Lock = Callable[[], AbstractContextManager[None]]
"""Returns a context in which the repository's shared lock is held."""

MANIFESTS = "manifests"
"""The folder of a remote with the manifests of what was pushed."""

# -- fetch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull brought: the number of objects, and their plain bytes.

    ``remote_errors`` maps the name of each remote that was passed over to its first error: what it lacked came from
    another one.
    """

    objects: int
    bytes: int
    remote_errors: Mapping[str, str] = field(default_factory=dict)


def pull(
    store: ObjectStore,
    lock: Lock,
    remotes: Sequence[Remote],
    entry: Entry,
    parts: Iterable[str],
    progress: Progress = ignore_progress,
) -> Pulled:
    """Fetch the objects that the store lacks of these parts of a checkpoint, each verified before it is stored.

    ``lock`` holds the repository's shared lock. ObjectMissing when no remote has a good copy of one; what was fetched
    until then stays. ``progress`` counts plain bytes.
    """
    recorders = [ErrorRecorder(remote) for remote in remotes]
    indexes: dict[ObjectId, tuple[bytes, bytes]] = {}
    missing: dict[ObjectId, int] = {}
    with lock():

        def read_index(name: str) -> tuple[ObjectId, bytes, bytes | None, tuple[ChunkRef, ...]]:
            index_id = entry.manifest.parts[name].index
            with locate_errors(name, entry.id):
                data, frame = fallback.read(store, recorders, index_id)
                return index_id, data, frame, part_index.decode_chunks(data)

        for index_id, data, frame, chunks in map_all(read_index, parts, fallback.ASKERS, name="castore-fetch"):
            if frame is not None:
                indexes[index_id] = data, frame
            missing.update((chunk.id, chunk.length) for chunk in chunks if not store.has(chunk.id))
        fetch_objects(store, recorders, missing, progress)
        # last: an index without its chunks would be taken for damage
        for index_id, (data, frame) in indexes.items():
            store.adopt_index(index_id, frame, len(data))
    plain_bytes = sum(missing.values()) + sum(len(data) for data, _ in indexes.values())
    errors = {recorder.name: recorder.error for recorder in recorders if recorder.error}
    return Pulled(len(missing) + len(indexes), plain_bytes, errors)


def fetch_objects(
    store: ObjectStore,
    remotes: Sequence[Remote],
    lengths: Mapping[ObjectId, int],
    progress: Progress = ignore_progress,
) -> None:
    """Fetch objects, given with their plain lengths, in parallel. ObjectMissing."""
    done, total = 0, sum(lengths.values())

    def fetch(object_id: ObjectId) -> ObjectId:
        if fallback.fetch(store, remotes, object_id) is None:
            raise ObjectMissing(object_id, elsewhere=fallback.explain_missing(remotes, object_id))
        return object_id

    for object_id in map_ahead(fetch, lengths, fallback.prepare(remotes, lengths), name="castore-fetch"):
        done += lengths[object_id]
        progress(done, total)


def find_manifest(remote: Remote, selector: str) -> Entry:
    """Return the manifest in a remote whose id begins with ``selector``; its bytes are those that the id names.

    So many digits as were given vouch for it. UsageError, NotFound, AmbiguousId or CorruptManifest; RemoteError or
    StorageError.
    """
    wanted = selector.lower()
    if is_object_id(wanted):
        return _read_manifest(remote, ObjectId(wanted))
    if not is_publishing(remote):
        raise UsageError(f"{remote.name} has no list of its checkpoints: give all 64 digits of an id, not {selector!r}")
    if not wanted or not set(wanted) <= set("0123456789abcdef"):
        raise UsageError(f"{selector!r} is not an id: `castore ls {remote.name}` lists those in the remote")
    check_digits(wanted)
    matches = [name_id for name_id in _listed_ids(remote) if name_id.startswith(wanted[:12])]
    entries = [entry for entry in read_manifests(remote, matches) if entry.id.startswith(wanted)]
    if len({entry.id for entry in entries}) > 1:
        raise AmbiguousId(selector, sorted(entry.id for entry in entries))
    if not entries:
        raise NotFound(f"{remote.name} has no checkpoint {selector!r}: `castore ls {remote.name}` lists what it has")
    return entries[0]


def choose_manifest(remote: PublishingRemote, selector: str) -> Entry:
    """Return the best or the latest checkpoint, by what its manifests say, that is in a remote with all its parts.

    Nothing but the remote vouches for them. NothingMatches, NothingAvailable, CorruptManifest; RemoteError or
    StorageError.
    """
    parsed = Selector.parse(selector, "checkpoint")
    entries = parsed.candidates(read_manifests(remote))
    there = remote.has(part.index for entry in entries for part in entry.manifest.parts.values())

    def parts_of(entry: Entry) -> dict[str, PartState]:
        absent = PartState("missing", f"not in {remote.name}")
        return {
            name: PartState("remote") if part.index in there else absent for name, part in entry.manifest.parts.items()
        }

    experiment = entries[0].manifest.experiment if entries else Experiment()
    resolution = resolve(Requirement(selector=parsed.name, experiment=experiment), entries, parts_of)
    match = resolution.require()
    return next(entry for entry in entries if entry.id == match.id)


def _read_manifest(remote: Remote, checkpoint_id: ObjectId) -> Entry:
    """A manifest lies among the objects, too: its id is its hash, so any remote can be asked for it."""
    data = fallback.plain(remote, checkpoint_id)
    if data is None:
        raise NotFound(f"{remote.name} has no checkpoint {checkpoint_id[:12]}: {remote.explain_missing(checkpoint_id)}")
    return Entry(*manifest.decode(bytes(data), f"{remote.name}: {checkpoint_id[:12]}"))


def _listed_ids(remote: PublishingRemote) -> dict[str, str]:
    """Return the first digits of the id of each manifest in a remote, and the names of their files."""
    found = {}
    for file in remote.files(MANIFESTS):
        digits = file.name.rpartition("-")[2].removesuffix(".json")
        if len(digits) == 12 and file.name.endswith(".json"):
            found[digits] = file.name
    return found


def read_manifests(remote: PublishingRemote, digits: Iterable[str] | None = None) -> list[Entry]:
    """Return the manifests in a remote, or those with these first twelve digits, in any order.

    CorruptManifest for one that is not what its name says.
    """
    listed = _listed_ids(remote)
    names = [listed[known] for known in (listed if digits is None else digits)]

    def read(name: str) -> Entry | None:
        data = remote.read_file(name, manifest.MAX_BYTES)
        if data is None:
            return None  # removed meanwhile
        entry = Entry(*manifest.decode(data, f"{remote.name}: {name}"))
        if name != f"{MANIFESTS}/{entry.manifest.file_name(entry.id)}":
            raise CorruptManifest(f"{remote.name}: {name}", "its content belongs under another name")
        return entry

    return [entry for entry in map_all(read, names, fallback.ASKERS, name="castore-fetch") if entry]


_THREADS = "castore-push"

# -- push ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push moved: ``objects`` and their stored ``bytes``; ``checkpoints`` are complete there now, or were.

    ``left_out`` maps a checkpoint and a part of it to the reason that the part was not pushed.
    """

    objects: int
    bytes: int
    checkpoints: tuple[ObjectId, ...]
    left_out: Mapping[tuple[ObjectId, str], str]


def push(
    store: ObjectStore,
    lock: Lock,
    entries: Sequence[Entry],
    remote: PublishingRemote,
    *,
    repair: bool = False,
    renewed: Collection[ObjectId] = (),
    progress: Progress = ignore_progress,
) -> Pushed:
    """Copy what a remote lacks of these checkpoints: chunks, then indexes, then manifests, each verified before.

    Whoever reads there finds a part whole or not at all. What is interrupted goes on where it stopped. Without
    ``repair``, a part whose index is there counts as whole, and its copies there are not read; with it they are, and
    bad ones replaced. ``renewed`` are objects that others wrote there a moment ago, though they had been marked.
    ``progress`` counts stored bytes. UploadRefused, RemoteUnavailable or StorageError: then what was pushed until then
    stays.
    """
    if not remote.writable:
        raise UploadRefused(remote.name, "it is for reading alone")
    objects = stored_bytes = 0
    pushed, is_first = None, True
    while pushed is None:
        push = _Push(store, lock, remote, repair, progress, renewed=renewed, is_first=is_first)
        pushed, is_first = push.run(entries), False
        objects, stored_bytes = objects + push.objects, stored_bytes + push.bytes
    return replace(pushed, objects=objects, bytes=stored_bytes)


def push_objects(store: ObjectStore, remote: PublishingRemote, object_ids: Collection[ObjectId]) -> None:
    """Copy what a remote lacks of these objects, or is about to delete. Nobody finds them before they are pushed.

    Errors are those of :func:`push`, and ObjectMissing or CorruptObject.
    """
    remote = remote.fresh()
    marked = marks.read(remote)
    missing = set(object_ids) - remote.has(object_ids)
    missing |= _find_marked(remote, object_ids, marked)

    def put(object_id: ObjectId) -> None:
        remote.put(object_id, store.frame(object_id), renew=object_id in marked.objects)

    map_all(put, missing, fallback.ASKERS, name=_THREADS)


def _find_marked(remote: PublishingRemote, object_ids: Collection[ObjectId], marked: Marks) -> set[ObjectId]:
    """Return those that gc is about to delete, by themselves or with the packs that are known to hold them."""
    found = marked.objects & set(object_ids)
    if isinstance(remote, Bucket):
        found |= {name for name, pack in remote.packed(object_ids).items() if pack in marked.files}
    return set(found)


class _Push:
    """One run of :func:`push`."""

    def __init__(
        self,
        store: ObjectStore,
        lock: Lock,
        remote: PublishingRemote,
        repair: bool,
        progress: Progress,
        *,
        renewed: Collection[ObjectId],
        is_first: bool,
    ) -> None:
        self._store, self._lock, self._remote = store, lock, remote.fresh()
        self._repair, self._progress = repair, progress
        self._trusting = is_first and not repair
        """Whether a part whose index is there counts as whole."""
        self._activity = marks.Activity.of(remote)
        # gc there is about to delete these: writing one again tells it that it is needed
        self._marked = marks.read(remote)
        self._renewed = frozenset(renewed)
        self._needs_marked = not self._marked.objects.isdisjoint(renewed)
        """Whether anything that is pushed was marked: then it may be deleted as soon as it was written again."""
        self.objects = self.bytes = self._total = 0
        self._left_out: dict[tuple[ObjectId, str], str] = {}

    def run(self, entries: Sequence[Entry]) -> Pushed | None:
        """Push; None if something was deleted meanwhile, and all must be looked for again."""
        parts = {part.index: (entry, name) for entry in entries for name, part in entry.manifest.parts.items()}
        there = set() if self._repair else self._there(parts)
        whole = {index_id for index_id in there if self._trusting or not self._store.has(index_id)}
        chunks = {
            index_id: found
            for index_id, (entry, name) in parts.items()
            if index_id not in whole and (found := self._chunks(entry, name, index_id)) is not None
        }
        missing = self._missing({chunk_id for listed in chunks.values() for chunk_id in listed})
        self._total = sum(self._store.stored_size(object_id) or 0 for object_id in (*missing, *chunks))
        for index_id, listed in chunks.items():
            entry, name = parts[index_id]
            wanted = [chunk_id for chunk_id in dict.fromkeys(listed) if chunk_id in missing]
            try:
                # for each part alone, so that gc gets its turn: what it deletes meanwhile is left out, and told
                with self._lock(), locate_errors(name, entry.id):
                    self._push_chunks(wanted)
                    index_frame = self._store.frame(index_id)
            except (ObjectMissing, CorruptObject) as error:
                self._left_out[entry.id, name] = str(error)
                continue
            if not self._stands():
                return None
            self._push_index(index_id, index_frame, listed)
            missing.difference_update(wanted)
            whole.add(index_id)
        done = [entry for entry in entries if any(part.index in whole for part in entry.manifest.parts.values())]
        self._push_manifests(done)
        if not self._stands():
            return None
        return Pushed(
            objects=self.objects,
            bytes=self.bytes,
            checkpoints=tuple(entry.id for entry in done),
            left_out=self._left_out,
        )

    def _chunks(self, entry: Entry, name: str, index_id: ObjectId) -> list[ObjectId] | None:
        """Return the chunks of a part, or None, with the reason noted, if its index isn't here in good order."""
        if not self._store.has(index_id):
            self._left_out[entry.id, name] = "its data isn't here"
            return None
        try:
            return [chunk.id for chunk in part_index.decode_chunks(self._store.read(index_id))]
        except (ObjectMissing, CorruptionError) as error:  # missing: gc has its turn between any two parts
            self._left_out[entry.id, name] = str(error)
            return None

    def _missing(self, chunk_ids: set[ObjectId]) -> set[ObjectId]:
        """Return those that the remote lacks, or is about to delete; with ``repair``, those that are bad there, too."""
        there = self._there(chunk_ids)
        if self._repair:
            good = map_all(self._is_good, sorted(there), fallback.ASKERS, name=_THREADS)
            there = {object_id for object_id, is_good in zip(sorted(there), good, strict=True) if is_good}
        return chunk_ids - there

    def _there(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return those that the remote has, and that are not marked there."""
        asked = set(object_ids)
        there = self._remote.has(asked)
        marked = _find_marked(self._remote, asked, self._marked) - self._renewed
        self._needs_marked |= bool(marked)
        return there - marked

    def _is_good(self, object_id: ObjectId) -> bool:
        return fallback.check(self._remote, object_id) is None

    def _stands(self) -> bool:
        """Whether nothing that was pushed was deleted meanwhile, or will be."""
        return not self._needs_marked or marks.nothing_deleted_since(self._remote, self._activity)

    def _push_chunks(self, wanted: Sequence[ObjectId]) -> None:
        if isinstance(self._remote, Bucket) and len(wanted) > PACK_ABOVE and not self._repair:
            for size in map_ahead(self._put_packed, self._batches(wanted), 4, ahead=4, name=_THREADS):
                self._count(size)
            return
        for size in map_ahead(self._put, wanted, fallback.ASKERS, name=_THREADS):
            self._count(size)

    def _push_index(self, index_id: ObjectId, data: bytes, listed: Sequence[ObjectId]) -> None:
        """Write the index of a part whose chunks are all there: from now on the part is whole."""
        is_there = not self._trusting and index_id in self._there([index_id])
        if self._repair:
            is_there = is_there and self._is_good(index_id)
        if isinstance(self._remote, Bucket) and self._remote.packed(listed):
            # gc must know which packs this part needs, those of other parts, too, and a reader where they are. The
            # index has one of its own: a pack that another part needs must not keep it beyond its chunks
            if not is_there:
                self._count(self._write_pack([(index_id, data)]))
            self._remote.finish_packs(index_id, [*listed, index_id])
        elif not is_there:
            self._count(self._write(index_id, data))

    def _batches(self, object_ids: Iterable[ObjectId]) -> Iterator[list[ObjectId]]:
        """Yield objects as they go into packs."""
        batch: list[ObjectId] = []
        size = 0
        for object_id in object_ids:
            length = self._store.stored_size(object_id) or 0
            if batch and size + length > MAX_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(object_id)
            size += length
        yield batch

    def _put_packed(self, object_ids: Sequence[ObjectId]) -> list[int]:
        """Return the stored bytes of each object that was moved."""
        return self._write_pack([(object_id, self._store.frame(object_id)) for object_id in object_ids])

    def _write_pack(self, frames: Sequence[tuple[ObjectId, bytes]]) -> list[int]:
        assert isinstance(self._remote, Bucket)
        name = self._remote.put_packed(frames, renew=bool(self._marked.files))
        self._needs_marked |= name in self._marked.files
        return [len(data) for _, data in frames]

    def _put(self, object_id: ObjectId) -> list[int]:
        """Return the stored bytes of each object that was moved."""
        return self._write(object_id, self._store.frame(object_id))

    def _write(self, object_id: ObjectId, data: bytes) -> list[int]:
        return [len(data)] if self._remote.put(object_id, data, renew=object_id in self._marked.objects) else []

    def _count(self, sizes: Sequence[int]) -> None:
        self.objects += len(sizes)
        self.bytes += sum(sizes)
        self._progress(self.bytes, self._total)

    def _push_manifests(self, entries: Sequence[Entry]) -> None:
        """Write each manifest for those who list, then as an object: one that is there was written both ways."""
        there = self._there(entry.id for entry in entries)

        def put(entry: Entry) -> None:
            data = manifest.encode(entry.manifest)
            self._remote.write_file(f"{MANIFESTS}/{entry.manifest.file_name(entry.id)}", data, replace=True)
            if entry.id not in there or not self._is_good(entry.id):
                self._remote.put(entry.id, frame.encode_frame(data), renew=entry.id in self._marked.objects)

        wanted = [entry for entry in entries if self._repair or entry.id not in there]
        map_all(put, wanted, fallback.ASKERS, name=_THREADS)
