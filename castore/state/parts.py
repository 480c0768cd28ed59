"""Parts <-> chunks and an index: save and load in parallel, with bounded memory.

Tensors come as *sources* and go to *targets*, so that this module needs neither torch nor NumPy. At most one chunk a
thread is in memory beside the state itself, whatever its size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from castore.errors import CorruptIndex, CorruptionError, CorruptObject, ObjectMissing, StorageError, UnsupportedVersion
from castore.format import chunking, codecs, part_index
from castore.format.ids import Buffer, ObjectId
from castore.format.manifest import Manifest, Part
from castore.format.part_index import ChunkRef, Index, TensorSpec
from castore.policy.resolution import PartState
from castore.remotes import fallback
from castore.remotes.base import Remote
from castore.storage import fs
from castore.storage.object_store import ObjectStore, Writer


class Source(Protocol):
    """One tensor to be saved."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int) -> Buffer:
        """Bytes [start, stop) of the dense, row-major, little-endian tensor; without a copy where possible."""
        ...


@dataclass(frozen=True, slots=True)
class Flat:
    """A part's state taken apart: ``tree`` has a TensorRef(i) where ``sources[i]`` belongs."""

    tree: Any
    sources: Sequence[Source]


Allocate = Callable[[TensorSpec], tuple[Any, memoryview]]
"""Makes an uninitialised tensor; returns it and its writable bytes."""

Make = Callable[[str, Index], Sequence[tuple[Any, memoryview]]]
"""Makes, or finds, where the tensors of a part go: each with its writable bytes."""


# -- save ------------------------------------------------------------------------------------------------------------


def save_parts(store: ObjectStore, parts: Mapping[str, Flat], chunk_size: int, threads: int) -> SavedParts:
    """Store every part; when this returns, all their objects are durable. The caller holds the shared lock."""
    with store.writer() as writer:
        with _pool(threads) as pool:
            encoded = {name: _save_part(writer, pool, name, flat, chunk_size) for name, flat in parts.items()}
        written = writer.commit()
    found = {
        name: Part(index=own, bytes=plain, stored_bytes=sum(store.stored_size(one) or 0 for one in {own, *chunks}))
        for name, (own, plain, chunks) in encoded.items()
    }
    return SavedParts(found, written.objects, written.bytes)


@dataclass(frozen=True, slots=True)
class SavedParts:
    """The parts as a manifest lists them, and what they added to the store."""

    parts: dict[str, Part]
    new_objects: int
    new_bytes: int


def _save_part(
    writer: Writer, pool: ThreadPoolExecutor, name: str, flat: Flat, chunk_size: int
) -> tuple[ObjectId, int, list[ObjectId]]:
    """(index id, plain bytes of the tensors, chunk ids)."""
    sizes = [
        (part_index.nbytes(source.dtype, source.shape), part_index.DTYPES[source.dtype][1]) for source in flat.sources
    ]
    layout = chunking.plan_layout(sizes, chunk_size)
    tensors = tuple(
        TensorSpec(source.dtype, source.shape, offset)
        for source, offset in zip(flat.sources, layout.offsets, strict=True)
    )

    def store(chunk: chunking.Chunk) -> ObjectId:
        return writer.put(_gather(chunk, flat.sources), chunk.itemsize)

    chunks = _all([pool.submit(store, chunk) for chunk in layout.chunks])
    refs = tuple(ChunkRef(own, chunk.length) for own, chunk in zip(chunks, layout.chunks, strict=True))
    data = part_index.encode(Index(refs, tensors, flat.tree), name)
    return writer.put(data), sum(size for size, _ in sizes), chunks


def _gather(chunk: chunking.Chunk, sources: Sequence[Source]) -> Buffer:
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
    own_id: ObjectId,
    manifest: Manifest,
    names: Sequence[str],
    make: Make,
    threads: int,
    sources: Sequence[Remote] = (),
) -> dict[str, tuple[Any, list[Any]]]:
    """For each named part (tree, tensors), every byte verified. The caller holds the shared lock.

    What is missing or damaged is fetched from the first of the remotes ``sources`` that has it, and stored.
    ObjectMissing, CorruptObject and CorruptIndex name the object, the part and the manifest.
    """
    loaded = {}
    with _pool(threads) as pool:
        for name in names:
            own = manifest.parts[name].index
            with locate_errors(name, own_id):
                data, frame = fallback.read(store, sources, own)
                found = part_index.decode(data)
                tensors = make(name, found)
                _all(_read_chunks(store, sources, pool, found, dict(enumerate(view for _, view in tensors))))
            # last: an index without its chunks would be taken for damage
            if frame is not None:
                store.adopt(own, frame, memoryview(bytearray(len(data))))
            loaded[name] = (found.tree, [tensor for tensor, _ in tensors])
    return loaded


def load_tensors(
    store: ObjectStore,
    found: Index,
    numbers: Iterable[int],
    allocate: Allocate,
    threads: int,
    sources: Sequence[Remote] = (),
) -> dict[int, Any]:
    """The chosen tensors of a part by number; no other chunks than theirs are read.

    The caller holds the shared lock. ObjectMissing, CorruptObject.
    """
    made = {number: allocate(found.tensors[number]) for number in numbers}
    with _pool(threads) as pool:
        _all(_read_chunks(store, sources, pool, found, {number: view for number, (_, view) in made.items()}))
    return {number: tensor for number, (tensor, _) in made.items()}


def _read_chunks(
    store: ObjectStore,
    sources: Sequence[Remote],
    pool: ThreadPoolExecutor,
    found: Index,
    views: Mapping[int, memoryview],
) -> list[Future[None]]:
    """Fill the views of the tensors numbered so. A chunk that has no piece of any is read only if all are wanted."""
    scratch = fs.Scratch()

    def fill(chunk: ChunkRef, pieces: Sequence[chunking.Piece]) -> None:
        if len(pieces) == 1 and pieces[0].stop - pieces[0].start == chunk.length:
            piece = pieces[0]
            fallback.read_into(store, sources, chunk.id, views[piece.tensor][piece.start : piece.stop])
            return
        data = scratch.take(chunk.length)
        fallback.read_into(store, sources, chunk.id, data)
        for piece in pieces:
            length = piece.stop - piece.start
            codecs.copy(data[piece.at : piece.at + length], views[piece.tensor][piece.start : piece.stop])

    every = len(views) == len(found.tensors)
    extents = [(spec.offset, spec.nbytes) for spec in found.tensors]
    covered = chunking.cover(extents, [chunk.length for chunk in found.chunks])
    wanted = [[piece for piece in pieces if piece.tensor in views] for pieces in covered]
    return [
        pool.submit(fill, chunk, pieces) for chunk, pieces in zip(found.chunks, wanted, strict=True) if pieces or every
    ]


# -- availability ----------------------------------------------------------------------------------------------------


_GONE = PartState("missing", "its data is not in the store")


def part_states(store: ObjectStore, manifest: Manifest, sources: Sequence[Remote] = ()) -> dict[str, PartState]:
    """Where the data of each part is. Looks at the index and at which chunks exist, not at their bytes.

    A part is ``remote`` when the remotes ``sources`` have what is missing here. Nothing is fetched into the store.
    """
    return {name: _part_state(store, part, sources) for name, part in manifest.parts.items()}


def _part_state(store: ObjectStore, part: Part, sources: Sequence[Remote]) -> PartState:
    if not sources and not store.has(part.index):
        return _GONE  # what most of a long history is
    try:
        data, frame = fallback.read(store, sources, part.index, mend=False)
        chunks = part_index.decode_chunks(data)
        lost = {chunk.id for chunk in chunks if not store.has(chunk.id)}
    except ObjectMissing:
        return PartState("missing", f"its data is not in the store{fallback.explain_missing(sources, part.index)}")
    except (CorruptionError, StorageError) as error:
        return PartState("missing", str(error))
    if frame is None and not lost:
        return PartState("local")
    nowhere = sorted(lost - fallback.available(sources, lost))
    if not nowhere:
        return PartState("remote")
    told = f"{len(nowhere)} of its {len({chunk.id for chunk in chunks})} objects are missing"
    return PartState("missing", f"{told}{fallback.explain_missing(sources, nowhere[0])}")


# -- threads ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose pending work is dropped when the block fails, so that an error or Ctrl-C ends it soon."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="castore")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _all(futures: Sequence[Future[Any]]) -> list[Any]:
    return [future.result() for future in futures]


@contextlib.contextmanager
def locate_errors(part: str, manifest: ObjectId) -> Iterator[None]:
    """Add to an object's error where the object belongs."""
    try:
        yield
    except ObjectMissing as error:
        raise ObjectMissing(error.object_id, part, manifest) from error
    except CorruptObject as error:
        raise CorruptObject(error.object_id, error.reason, part, manifest) from error
    except CorruptIndex as error:
        raise CorruptIndex(f"{error} (part {part!r} of checkpoint {manifest[:12]})") from error
    except UnsupportedVersion as error:
        raise UnsupportedVersion(
            f"{error.what} (part {part!r} of checkpoint {manifest[:12]})", error.version
        ) from error
