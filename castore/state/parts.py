"""Parts <-> chunks and an index: save and load in parallel, with bounded memory.

Tensors are read through :class:`Source` and written into buffers that the caller allocates, so this module needs
neither torch nor NumPy. Beside the state itself, about one chunk per thread is in memory, whatever the state's size.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from castore.errors import (
    CorruptIndex,
    CorruptionError,
    CorruptObject,
    NotFound,
    ObjectMissing,
    StateChanged,
    StorageError,
    UnsupportedVersion,
)
from castore.format import chunking, codecs, part_index
from castore.format.ids import Buffer, ObjectId
from castore.format.manifest import Manifest, Part
from castore.format.part_index import ChunkRef, Index, TensorRef, TensorSpec
from castore.parallel import map_all
from castore.policy.resolution import PartState
from castore.remotes import fallback
from castore.remotes.base import Remote
from castore.storage.object_store import ObjectStore, Writer

_Job = TypeVar("_Job")

_READ_AHEAD = 8  # chunks that the disk is asked for before they are read


class Source(Protocol):
    """A tensor to be saved."""

    @property
    def dtype(self) -> str:
        """Its element type, by the names of :data:`castore.format.part_index.DTYPES`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def is_shared(self) -> bool:
        """Whether :meth:`read` returns memory that others may write to while it is saved."""
        ...

    def read(self, start: int, stop: int) -> Buffer:
        """Return bytes [start, stop) of the dense, row-major, little-endian tensor; without a copy where possible."""
        ...


@dataclass(frozen=True, slots=True)
class Flat:
    """The state of a part taken apart: ``tree`` has a TensorRef(i) where ``sources[i]`` belongs."""

    tree: Any
    sources: Sequence[Source]


AllocateTensor = Callable[[TensorSpec], Any]
"""Returns an uninitialised tensor."""

BytesOf = Callable[[Any], memoryview]
"""Returns a writable view of a tensor's bytes, when it is filled: many views take more memory than small tensors."""


class PlaceTensors(Protocol):
    """Decides where the tensors of a part go: into new memory, or into tensors that exist already."""

    def __call__(self, part: str, index: Index, /) -> Sequence[tuple[Any, Any]]:
        """Return a (tensor, tensor to fill) pair for each tensor of the index."""
        ...


# -- save ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SavedParts:
    """The parts as a manifest lists them, and what they added to the store."""

    parts: dict[str, Part]
    new_objects: int
    new_bytes: int


def save_parts(store: ObjectStore, parts: Mapping[str, Flat], chunk_size: int, threads: int) -> SavedParts:
    """Store every part. All their objects are durable on return. The caller holds the shared lock."""
    with store.writer() as writer:
        stored = {name: _save_part(writer, name, flat, chunk_size, threads) for name, flat in parts.items()}
        written = writer.commit()
    described = {
        name: Part(
            index=part.index_id,
            bytes=part.plain_bytes,
            stored_bytes=sum(store.stored_size(object_id) or 0 for object_id in {part.index_id, *part.chunk_ids}),
        )
        for name, part in stored.items()
    }
    return SavedParts(described, written.objects, written.bytes)


@dataclass(frozen=True, slots=True)
class _StoredPart:
    """The objects that a part was stored as; ``plain_bytes`` are those of its tensors."""

    index_id: ObjectId
    plain_bytes: int
    chunk_ids: list[ObjectId]


def _save_part(writer: Writer, name: str, flat: Flat, chunk_size: int, threads: int) -> _StoredPart:
    sizes = (
        (part_index.nbytes(source.dtype, source.shape), part_index.DTYPES[source.dtype][1]) for source in flat.sources
    )
    offsets, layout = chunking.plan_layout(sizes, chunk_size)

    def store_chunk(chunk: chunking.Chunk) -> ObjectId:
        first = chunk.pieces[0].tensor
        # several pieces were gathered into memory of their own
        is_shared = len(chunk.pieces) == 1 and flat.sources[first].is_shared
        try:
            return writer.put(_gather(chunk, flat.sources), chunk.itemsize, is_shared=is_shared)
        except StateChanged:
            keys = (key for key, leaf in part_index.leaves(flat.tree, name) if leaf == TensorRef(first))
            raise StateChanged(next(keys, name)) from None

    chunk_ids = map_all(store_chunk, layout, threads)
    chunks = tuple(ChunkRef(chunk_id, chunk.length) for chunk_id, chunk in zip(chunk_ids, layout, strict=True))
    del layout  # of many small tensors, it takes more memory than their data
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # few, and each in memory once
    tensors = tuple(
        TensorSpec(source.dtype, shapes.setdefault(shape := source.shape, shape), offset)
        for source, offset in zip(flat.sources, offsets, strict=True)
    )
    index_id = writer.put(part_index.encode(Index(chunks, tensors, flat.tree), name))
    return _StoredPart(index_id, sum(spec.nbytes for spec in tensors), chunk_ids)


def _gather(chunk: chunking.Chunk, sources: Sequence[Source]) -> Buffer:
    """Return the plain bytes of a chunk, without a copy if they are those of a single tensor."""
    first = chunk.pieces[0]
    if len(chunk.pieces) == 1:
        return sources[first.tensor].read(first.start, first.stop)
    data = bytearray(chunk.length)
    view = memoryview(data)
    for piece in chunk.pieces:
        length = piece.stop - piece.start
        codecs.copy(sources[piece.tensor].read(piece.start, piece.stop), view[piece.at : piece.at + length])
    return data


# -- load ------------------------------------------------------------------------------------------------------------


def load_parts(
    store: ObjectStore,
    checkpoint_id: ObjectId,
    manifest: Manifest,
    names: Sequence[str],
    place: PlaceTensors,
    bytes_of: BytesOf,
    threads: int,
    remotes: Sequence[Remote] = (),
) -> dict[str, tuple[Any, list[Any]]]:
    """Return (tree, tensors) of each named part, every byte verified. The caller holds the shared lock.

    An object that is missing or damaged is fetched from the first of ``remotes`` that has a good copy, and stored.
    ObjectMissing, CorruptObject and CorruptIndex name the object, the part and the manifest.
    """
    loaded = {}
    for name in names:
        with _open_part(store, remotes, checkpoint_id, manifest, name) as index:
            tensors = place(name, index)
            _read_chunks(store, remotes, index, dict(enumerate(target for _, target in tensors)), bytes_of, threads)
        loaded[name] = (index.tree, [tensor for tensor, _ in tensors])
    return loaded


def check_parts(
    store: ObjectStore,
    checkpoint_id: ObjectId,
    manifest: Manifest,
    names: Sequence[str],
    threads: int,
    remotes: Sequence[Remote] = (),
) -> dict[str, Index]:
    """Read and verify every byte of these parts, keep none, and return their indexes; see :func:`load_parts`."""
    scratch = codecs.Scratch()

    def check(chunk: ChunkRef) -> None:
        fallback.read_into(store, remotes, chunk.id, scratch.take(chunk.length))

    checked = {}
    for name in names:
        with _open_part(store, remotes, checkpoint_id, manifest, name) as index:
            workers = readers(store, remotes, index.chunks, threads)
            map_all(check, read_ahead(store, index.chunks, lambda chunk: chunk), workers)
        checked[name] = index
    return checked


@contextlib.contextmanager
def _open_part(
    store: ObjectStore, remotes: Sequence[Remote], checkpoint_id: ObjectId, manifest: Manifest, name: str
) -> Iterator[Index]:
    """Read a part's index for a block that reads all its chunks; errors of the block name part and checkpoint, too."""
    index_id = manifest.parts[name].index
    with locate_errors(name, checkpoint_id):
        data, frame = fallback.read(store, remotes, index_id)
        yield part_index.decode(data)
    # after its chunks: an index without them would be taken for damage
    if frame is not None:
        store.adopt_index(index_id, frame, len(data))


def read_index(
    store: ObjectStore, remotes: Sequence[Remote], checkpoint_id: ObjectId, manifest: Manifest, name: str
) -> Index:
    """Return the index of a part, from the store or a remote, and none of its data. ObjectMissing, CorruptObject."""
    with locate_errors(name, checkpoint_id):
        return part_index.decode(fallback.read(store, remotes, manifest.parts[name].index)[0])


def load_tensors(
    store: ObjectStore,
    index: Index,
    numbers: Iterable[int],
    allocate: AllocateTensor,
    bytes_of: BytesOf,
    threads: int,
    remotes: Sequence[Remote] = (),
) -> dict[int, Any]:
    """Return the tensors of a part that have these numbers in its index; no chunks but theirs are read.

    The caller holds the shared lock. ObjectMissing, CorruptObject.
    """
    allocated = {number: allocate(index.tensors[number]) for number in numbers}
    _read_chunks(store, remotes, index, allocated, bytes_of, threads)
    return allocated


def load_matching(
    store: ObjectStore,
    checkpoint_id: ObjectId,
    manifest: Manifest,
    names: Sequence[str],
    patterns: Sequence[str],
    allocate: AllocateTensor,
    bytes_of: BytesOf,
    threads: int,
    remotes: Sequence[Remote] = (),
) -> dict[str, tuple[dict[str, int], dict[int, Any]]]:
    """Return (number by key, tensor by number) of each named part, for the keys that match one of ``patterns``.

    Tied keys have one number. A pattern is a key or as in :mod:`fnmatch`; NotFound for one that matches nothing. The
    caller holds the shared lock. Errors are those of :func:`load_parts`.
    """
    loaded = {}
    unmatched = set(patterns)
    hint = "no part was asked for"
    for name in names:
        with locate_errors(name, checkpoint_id):
            data, _ = fallback.read(store, remotes, manifest.parts[name].index)
            index = part_index.decode(data)
            keys = {key: leaf.number for key, leaf in part_index.leaves(index.tree) if type(leaf) is TensorRef}
            numbers: dict[str, int] = {}
            for pattern in patterns:
                matches = [key for key in keys if key == pattern or fnmatch.fnmatchcase(key, pattern)]
                numbers.update((key, keys[key]) for key in matches)
                unmatched -= {pattern} if matches else set()
            hint = f"part {name} has {min(keys)}, for example" if keys else f"part {name} has none at all"
            chosen = sorted(set(numbers.values()))
            loaded[name] = (numbers, load_tensors(store, index, chosen, allocate, bytes_of, threads, remotes))
    if unmatched:
        raise NotFound(f"checkpoint {checkpoint_id[:12]} has no tensor {min(unmatched)}: {hint}")
    return loaded


def _read_chunks(
    store: ObjectStore,
    remotes: Sequence[Remote],
    index: Index,
    targets: Mapping[int, Any],
    bytes_of: BytesOf,
    threads: int,
) -> None:
    """Fill tensors, given by number.

    A chunk without a byte of any of them is read only if they are all the tensors of the part: so every chunk that the
    index lists is verified, even one that no tensor lies in.
    """
    scratch = codecs.Scratch()

    def fill(job: tuple[ChunkRef, Sequence[chunking.Piece]]) -> None:
        chunk, pieces = job
        if len(pieces) == 1 and pieces[0].stop - pieces[0].start == chunk.length:
            piece = pieces[0]
            fallback.read_into(store, remotes, chunk.id, bytes_of(targets[piece.tensor])[piece.start : piece.stop])
            return
        data = scratch.take(chunk.length)
        fallback.read_into(store, remotes, chunk.id, data)
        for piece in pieces:
            length = piece.stop - piece.start
            codecs.copy(data[piece.at : piece.at + length], bytes_of(targets[piece.tensor])[piece.start : piece.stop])

    is_whole = len(targets) == len(index.tensors)
    extents = ((spec.offset, spec.nbytes) for spec in index.tensors)
    covered = chunking.pieces_by_chunk(extents, [chunk.length for chunk in index.chunks])
    needed = [[piece for piece in pieces if piece.tensor in targets] for pieces in covered]
    jobs = [(chunk, pieces) for chunk, pieces in zip(index.chunks, needed, strict=True) if pieces or is_whole]
    workers = readers(store, remotes, [chunk for chunk, _ in jobs], threads)
    map_all(fill, read_ahead(store, jobs, lambda job: job[0]), workers)


def readers(store: ObjectStore, remotes: Sequence[Remote], chunks: Sequence[ChunkRef], threads: int) -> int:
    """Return how many threads read chunks: more than ``threads`` where some have to be fetched."""
    missing = {chunk.id: chunk.length for chunk in chunks if not store.has(chunk.id)} if remotes else {}
    return max(threads, fallback.prepare(remotes, missing)) if missing else threads


def read_ahead(store: ObjectStore, jobs: Sequence[_Job], chunk_of: Callable[[_Job], ChunkRef]) -> Iterator[_Job]:
    """Yield the jobs, and have the disk begin to read what comes soon."""
    for number, job in enumerate(jobs):
        # the first time for all up to there, then for one more each time
        for later in jobs[number + _READ_AHEAD if number else 0 : number + _READ_AHEAD + 1]:
            store.will_read(chunk_of(later).id)
        yield job


# -- availability ----------------------------------------------------------------------------------------------------


_GONE = PartState("missing", "its data is not in the store")


def part_states(store: ObjectStore, manifest: Manifest, remotes: Sequence[Remote] = ()) -> dict[str, PartState]:
    """Return where the data of each part is, by its index and by which chunks exist; their bytes are not read.

    A part is ``remote`` if ``remotes`` have what is missing in the store. Nothing is fetched into the store.
    """
    parts = manifest.parts
    if not remotes or all(store.has(part.index) for part in parts.values()):
        return {name: _part_state(store, part, remotes) for name, part in parts.items()}

    def ask(part: Part) -> PartState:
        return _part_state(store, part, remotes)

    states = map_all(ask, parts.values(), fallback.ASKERS, name="castore-ask")
    return dict(zip(parts, states, strict=True))


def part_states_of(
    store: ObjectStore, manifests: Mapping[ObjectId, Manifest], remotes: Sequence[Remote] = ()
) -> dict[ObjectId, dict[str, PartState]]:
    """Return :func:`part_states` of each; remotes are asked for indexes alone, and for all at once."""
    indexes = {part.index for manifest in manifests.values() for part in manifest.parts.values()}
    absent = {index_id for index_id in indexes if not store.has(index_id)}
    there = fallback.available(remotes, absent) if remotes else set()

    def state_of(part: Part) -> PartState:
        if part.index in there:
            return PartState("remote")
        if part.index in absent:
            reason = fallback.explain_missing(remotes, part.index)
            return PartState("missing", f"its data is not in the store{reason}") if remotes else _GONE
        return _part_state(store, part, remotes)

    return {
        manifest_id: {name: state_of(part) for name, part in manifest.parts.items()}
        for manifest_id, manifest in manifests.items()
    }


def _part_state(store: ObjectStore, part: Part, remotes: Sequence[Remote]) -> PartState:
    if not remotes and not store.has(part.index):
        return _GONE  # the common case in a long history, and the cheapest to tell
    try:
        data, frame = fallback.read(store, remotes, part.index, mend=False)
        chunk_ids = {chunk.id for chunk in part_index.decode_chunks(data)}
        absent = {chunk_id for chunk_id in chunk_ids if not store.has(chunk_id)}
    except ObjectMissing:
        return PartState("missing", f"its data is not in the store{fallback.explain_missing(remotes, part.index)}")
    except (CorruptionError, StorageError) as error:
        return PartState("missing", str(error))
    if frame is None and not absent:
        return PartState("local")
    nowhere = sorted(absent - fallback.available(remotes, absent))
    if not nowhere:
        return PartState("remote")
    reason = f"{len(nowhere)} of its {len(chunk_ids)} objects are missing"
    return PartState("missing", f"{reason}{fallback.explain_missing(remotes, nowhere[0])}")


# -- errors ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locate_errors(part: str, checkpoint_id: ObjectId) -> Iterator[None]:
    """Add the part and the checkpoint to an error about an object of theirs."""
    try:
        yield
    except ObjectMissing as error:
        raise ObjectMissing(error.object_id, part, checkpoint_id, error.elsewhere) from error
    except CorruptObject as error:
        raise CorruptObject(error.object_id, error.reason, part, checkpoint_id, error.elsewhere) from error
    except CorruptIndex as error:
        raise CorruptIndex(f"{error} (part {part!r} of checkpoint {checkpoint_id[:12]})") from error
    except UnsupportedVersion as error:
        raise UnsupportedVersion(
            f"{error.what} (part {part!r} of checkpoint {checkpoint_id[:12]})", error.version
        ) from error
