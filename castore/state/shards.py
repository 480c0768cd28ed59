"""Tensors that are spread over ranks, such as DTensors: taken apart for saving, and filled in loading."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from castore.errors import UnsupportedValue
from castore.format import chunking, codecs, part_index
from castore.format.ids import Buffer
from castore.format.part_index import ChunkRef, Index, TensorRef, TensorSpec, join_key
from castore.parallel import map_all
from castore.remotes import fallback
from castore.remotes.base import Remote
from castore.state import boxes, objects
from castore.state.boxes import Box, SpreadTensor
from castore.state.merging import LocalTensor
from castore.state.parts import read_ahead, readers
from castore.state.tensors import (
    Flattener,
    TensorSource,
    allocate,
    as_target,
    bytes_of,
    can_be_filled,
    check_fits,
    check_keys,
    is_sharded,
)
from castore.storage.object_store import ObjectStore

# as plain integers: not every element type can be copied as itself
_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


# -- saving ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShardedFlat:
    """The state of a part as a rank has it, taken apart.

    ``tree`` has a TensorRef(i) where ``tensors[i]`` belongs; ``sources`` are the boxes of all of them, in order.
    """

    tree: Any
    tensors: Sequence[LocalTensor]
    sources: Sequence[TensorSource]


def flatten(state: Any, name: str) -> ShardedFlat:
    """Take apart what this rank has of the part ``name``. A plain tensor counts as whole, and equal on every rank.

    Nothing is copied. UnsupportedValue, naming the key, for a value that can't be stored exactly.
    """
    flattener = _ShardFlattener()
    tree = objects.take_apart(state, name, flattener.replace)
    tensors, sources = [], []
    for source, spread in zip(flattener.sources, flattener.spread, strict=True):
        shards = [(Box.whole(source.shape), source)] if spread is None else spread.shards
        shape = source.shape if spread is None else spread.shape
        tensors.append(LocalTensor(source.dtype, shape, tuple(box for box, _ in shards)))
        sources += [held for _, held in shards]
    return ShardedFlat(tree, tensors, sources)


@dataclass(frozen=True, slots=True)
class _Spread:
    shape: tuple[int, ...]
    shards: list[tuple[Box, TensorSource]]


class _ShardFlattener(Flattener):
    def __init__(self) -> None:
        super().__init__()
        self.spread: list[_Spread | None] = []  # of each source: None for one that is a whole tensor

    def number(self, tensor: torch.Tensor, key: str) -> TensorRef:
        shards = local_shards(tensor, key) if is_sharded(tensor) else []
        # ties are told by the first shard
        ref = super().number(_first_of(shards, tensor) if is_sharded(tensor) else tensor, key)
        if ref.number == len(self.spread):
            sources = [(box, TensorSource(local)) for box, local in shards]
            self.spread.append(_Spread(tuple(tensor.shape), sources) if is_sharded(tensor) else None)
        return ref


def _first_of(shards: Sequence[tuple[Box, torch.Tensor]], tensor: torch.Tensor) -> torch.Tensor:
    return shards[0][1] if shards else torch.empty(0, dtype=tensor.dtype)


def local_shards(tensor: torch.Tensor, key: str) -> list[tuple[Box, torch.Tensor]]:
    """Return the boxes of a sharded tensor that this rank has, each with its memory; those without elements are not.

    By the protocol of :mod:`torch.distributed.checkpoint` for tensors of any type. UnsupportedValue for one whose
    elements are still to be added up over ranks.
    """
    from torch.distributed.checkpoint.metadata import MetadataIndex  # takes a second, and not all who save need it

    tensor = tensor.detach()
    spread: Any = tensor
    try:
        chunks = spread.__create_chunk_list__()
    except ValueError as error:
        raise UnsupportedValue(key, f"its values are on no rank yet: {error}") from error
    found = []
    for chunk in chunks:
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        if len(box.sizes) == tensor.dim() and box.elements:
            found.append((box, spread.__get_tensor_shard__(MetadataIndex("", chunk.offsets)).detach()))
    return found


def assemble(job: boxes.Job, shares: Sequence[Buffer], tensors: Sequence[SpreadTensor]) -> Buffer:
    """Return the bytes of a chunk from those of its shares, in their order; without a copy if it has but one."""
    if len(shares) == 1 and len(shares[0]) == job.chunk.length:
        return shares[0]
    out = bytearray(job.chunk.length)
    view = memoryview(out)
    for share, data in zip(job.shares, shares, strict=True):
        piece, tensor = share.piece, tensors[share.piece.tensor]
        place = Place(share.holder.box, tensor.shape, part_index.DTYPES[tensor.dtype][0])
        place.put(data, share.start, view[piece.at : piece.at + piece.stop - piece.start], piece.start)
    return out


# -- moving bytes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a box lies in a tensor of this shape, whose elements take ``itemsize`` bytes."""

    box: Box
    shape: tuple[int, ...]
    itemsize: int

    def put(self, data: Buffer, at: int, out: memoryview, start: int) -> None:
        """Copy ``data``, the box's bytes from its byte ``at`` on, to where they belong in ``out``.

        That is the tensor's bytes from its byte ``start`` on.
        """
        if self.is_run:
            first = self._first_byte + at - start
            codecs.copy(data, out[first : first + len(data)])
            return
        flat, elements = (torch.frombuffer(buffer, dtype=_UNITS[self.itemsize]) for buffer in (out, data))
        for window, run in self._windows(flat, start, elements):
            window.copy_(run)

    def take(self, source: memoryview, start: int, out: memoryview, at: int) -> None:
        """Fill ``out``, the box's bytes from its byte ``at`` on, from the tensor's bytes from ``start`` on."""
        if self.is_run:
            first = self._first_byte + at - start
            codecs.copy(source[first : first + len(out)], out)
            return
        flat, elements = (torch.frombuffer(buffer, dtype=_UNITS[self.itemsize]) for buffer in (source, out))
        for window, run in self._windows(flat, start, elements):
            run.copy_(window)

    @property
    def is_run(self) -> bool:
        """Whether the box's bytes stand side by side in the tensor."""
        return self.box.is_run(self.shape)

    @property
    def _first_byte(self) -> int:
        return self.box.first(self.shape) * self.itemsize

    def range_in(self, start: int, stop: int) -> tuple[int, int]:
        """Return which bytes of the box lie among the tensor's bytes [start, stop)."""
        low, high = (self.box.before(self.shape, byte // self.itemsize) for byte in (start, stop))
        return low * self.itemsize, high * self.itemsize

    def _windows(
        self, flat: torch.Tensor, start: int, elements: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        done = 0
        for window in _windows(flat, start // self.itemsize, self.box.offsets, self.box.sizes, self.shape):
            yield window, elements[done : done + window.numel()].view(window.shape)
            done += window.numel()


def _windows(
    flat: torch.Tensor, start: int, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Yield views of the elements of a box, in order. ``flat`` has those of the tensor from number ``start`` on."""
    stop, row = start + len(flat), math.prod(shape[1:])
    low, high = offsets[0], offsets[0] + sizes[0]
    at = start
    while at < stop:
        index = at // row
        if at == index * row and stop - at >= row:  # whole rows, in one view
            end = at + (stop - at) // row * row
            first, last = max(index, low), min(end // row, high)
            if first < last:
                rows = flat[first * row - start : last * row - start].view(last - first, *shape[1:])
                for dimension in range(1, len(shape)):
                    rows = rows.narrow(dimension, offsets[dimension], sizes[dimension])
                yield rows
        else:
            end = min(stop, (index + 1) * row)
            if low <= index < high:
                yield from _windows(flat[at - start : end - start], at - index * row, offsets[1:], sizes[1:], shape[1:])
        at = end


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Region:
    """A box of a stored tensor, and the dense tensor in main memory that it is read into."""

    box: Box
    buffer: torch.Tensor


class ShardedTarget:
    """States, by part, whose tensors are filled by a load, in the memory that this rank has of them.

    When ``staged`` nothing is before :meth:`finish`, and tensors may have another element type than what is stored.
    """

    def __init__(self, parts: Mapping[str, Any], *, staged: bool = False) -> None:
        self.parts, self._staged = parts, staged
        self._late: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor to fill, the tensor to fill it from)

    def place(self, part: str, index: Index) -> tuple[list[torch.Tensor], dict[int, list[Region]]]:
        """Return the target's tensors in the order of the index, and what of each has to be read.

        UsageError, before anything is filled, when the target has other keys, element types or shapes.
        """
        leaves = ((key, as_target(leaf, key)) for key, leaf in part_index.leaves(self.parts[part]))
        targets = {key: target for key, target in leaves if target is not None}
        numbers = {key: leaf.number for key, leaf in part_index.leaves(index.tree) if type(leaf) is TensorRef}
        check_keys(part, stored=numbers.keys(), targets=targets.keys())
        placed: dict[int, torch.Tensor] = {}
        regions: dict[int, list[Region]] = {}
        for key, number in numbers.items():
            target, spec = targets[key], index.tensors[number]
            check_fits(join_key(part, key), spec, target, any_dtype=self._staged)
            first = placed.setdefault(number, target)
            if number not in regions or not _is_same_memory(first, target):
                regions.setdefault(number, []).extend(self._regions(target, key, spec))
        return [placed[i] if i in placed else allocate(spec) for i, spec in enumerate(index.tensors)], regions

    def _regions(self, target: torch.Tensor, key: str, spec: TensorSpec) -> Iterator[Region]:
        for box, local in local_shards(target, key) if is_sharded(target) else [(Box.whole(target.shape), target)]:
            if can_be_filled(local) and not self._staged:
                yield Region(box, local)
            else:
                buffer = allocate(TensorSpec(spec.dtype, box.sizes, 0))
                self._late.append((local, buffer))
                yield Region(box, buffer)

    def finish(self) -> None:
        """Fill the tensors that could not be read into. Call it when all is loaded, thus verified."""
        with torch.no_grad():
            for target, source in self._late:
                target.copy_(source)


def _is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if is_sharded(one) != is_sharded(other):
        return False
    first, second = (
        [tensor] if not is_sharded(one) else [s for _, s in local_shards(tensor, "")] for tensor in (one, other)
    )
    return [t.data_ptr() for t in first] == [t.data_ptr() for t in second]


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes ``[start, stop)`` of the box at ``place``, which lie in a piece of a chunk."""

    piece: chunking.Piece
    place: Place
    start: int
    stop: int

    def take(self, chunk: memoryview, out: memoryview) -> None:
        """Copy these bytes from a chunk."""
        piece = self.piece
        self.place.take(chunk[piece.at : piece.at + piece.stop - piece.start], piece.start, out, self.start)


@dataclass(frozen=True, slots=True)
class Read:
    """A chunk of a part to be read, what of it is used, and the tensors that this goes into."""

    number: int
    chunk: ChunkRef
    uses: tuple[Use, ...]
    buffers: tuple[torch.Tensor, ...]

    def take(self, chunk: memoryview) -> None:
        """Copy what is used of the chunk's bytes to where it belongs."""
        for use, out in zip(self.uses, self.targets(), strict=True):
            use.take(chunk, out)

    def targets(self) -> Iterator[memoryview]:
        """Yield the memory that each use goes into."""
        for use, buffer in zip(self.uses, self.buffers, strict=True):
            yield bytes_of(buffer)[use.start : use.stop]


def plan_reads(index: Index, regions: Mapping[int, Sequence[Region]]) -> list[Read]:
    """Return which chunks of a part have to be read to fill these regions, each once."""
    places = {
        number: [
            (Place(region.box, spec.shape, part_index.DTYPES[spec.dtype][0]), region.buffer)
            for region in regions[number]
        ]
        for number in regions
        for spec in [index.tensors[number]]
    }
    extents = ((spec.offset, spec.nbytes) for spec in index.tensors)
    covered = chunking.pieces_by_chunk(extents, [chunk.length for chunk in index.chunks])
    reads = []
    for number, (chunk, pieces) in enumerate(zip(index.chunks, covered, strict=True)):
        uses = [
            (Use(piece, place, start, stop), buffer)
            for piece in pieces
            for place, buffer in places.get(piece.tensor, ())
            for start, stop in [place.range_in(piece.start, piece.stop)]
            if start < stop
        ]
        if uses:
            reads.append(Read(number, chunk, *zip(*uses, strict=True)))
    return reads


class ChunkReader:
    """Reads chunks, verified, into the tensors that they belong to. ObjectMissing, CorruptObject."""

    def __init__(self, store: ObjectStore, remotes: Sequence[Remote], threads: int) -> None:
        self._store, self._remotes, self._threads = store, remotes, threads
        self._scratch = codecs.Scratch()

    def fill(self, reads: Sequence[Read]) -> None:
        """Read these chunks, in parallel."""
        workers = readers(self._store, self._remotes, [read.chunk for read in reads], self._threads)
        map_all(self._read, read_ahead(self._store, reads, lambda read: read.chunk), workers)

    def _read(self, read: Read) -> None:
        first = read.uses[0]
        if len(read.uses) == 1 and first.stop - first.start == read.chunk.length and first.place.is_run:
            self.read_into(read, next(read.targets()))
        else:
            data = self._scratch.take(read.chunk.length)
            self.read_into(read, data)
            read.take(data)

    def read_into(self, read: Read, out: memoryview) -> None:
        """Read a chunk into memory that is as long."""
        fallback.read_into(self._store, self._remotes, read.chunk.id, out)
