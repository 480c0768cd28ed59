"""Layout of a part: its tensors in one stream of bytes, and the stream cut into chunks. Pure.

A tensor of at least half a chunk is cut at multiples of the chunk size from its own start, so equal tensors give
equal chunks whatever else the part holds. Smaller tensors of equal element width share chunks, each starting at a
64-byte boundary: equal widths keep the byte planes of :mod:`castore.format.codecs` aligned.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes ``[start, stop)`` of tensor number ``tensor``, which begin at byte ``at`` of a chunk."""

    tensor: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """``length`` bytes of the stream: ``pieces`` in order, zeros between them. ``itemsize`` is their element width."""

    length: int
    itemsize: int
    pieces: tuple[Piece, ...]


@dataclass(slots=True)
class _OpenChunk:
    """A shared chunk to which small tensors are still being added."""

    length: int = 0
    pieces: list[Piece] = field(default_factory=list)


def plan_layout(sizes: Iterable[tuple[int, int]], chunk_size: int) -> tuple[Sequence[int], list[Chunk]]:
    """Return (offsets, chunks) of tensors given as (bytes, element width), in order. Deterministic.

    ``offsets[i]`` is where tensor i begins in the stream, the concatenation of ``chunks``; 0 if it is empty.
    """
    chunks: list[Chunk] = []
    open_chunks: dict[int, _OpenChunk] = {}  # by element width

    def close(itemsize: int) -> None:
        closed = open_chunks.pop(itemsize)
        chunks.append(Chunk(closed.length, itemsize, tuple(closed.pieces)))

    tensor = -1
    for tensor, (size, itemsize) in enumerate(sizes):
        if size == 0:
            continue
        if 2 * size >= chunk_size:
            chunks.extend(_cut(tensor, size, itemsize, chunk_size))
            continue
        at = _aligned(open_chunks[itemsize].length) if itemsize in open_chunks else 0
        if at + size > chunk_size:
            close(itemsize)
            at = 0
        chunk = open_chunks.setdefault(itemsize, _OpenChunk())
        chunk.pieces.append(Piece(tensor, 0, size, at))
        chunk.length = at + size
    for itemsize in list(open_chunks):
        close(itemsize)
    return _offsets(tensor + 1, chunks), chunks


def _cut(tensor: int, size: int, itemsize: int, chunk_size: int) -> Iterator[Chunk]:
    for start in range(0, size, chunk_size):
        stop = min(start + chunk_size, size)
        yield Chunk(stop - start, itemsize, (Piece(tensor, start, stop, 0),))


def _offsets(count: int, chunks: Sequence[Chunk]) -> Sequence[int]:
    offsets = array("q", bytes(8 * count))
    start = 0
    for chunk in chunks:
        for piece in chunk.pieces:
            if piece.start == 0:
                offsets[piece.tensor] = start + piece.at
        start += chunk.length
    return offsets


def pieces_by_chunk(extents: Iterable[tuple[int, int]], lengths: Sequence[int]) -> list[list[Piece]]:
    """Return, for each chunk of the given lengths, the pieces of tensors that lie in it.

    ``extents`` are (offset, bytes) in the stream. Inverts :func:`plan_layout`, and accepts any other layout that an
    index may describe.
    """
    # there may be 200,000 small tensors: lists of tuples take ten times as much
    offsets, sizes = array("q"), array("q")
    for offset, size in extents:
        offsets.append(offset)
        sizes.append(size)
    order = sorted((tensor for tensor, size in enumerate(sizes) if size), key=offsets.__getitem__)
    by_chunk: list[list[Piece]] = []
    start = 0
    first = 0
    for length in lengths:
        stop = start + length
        pieces = []
        i = first
        while i < len(order) and offsets[order[i]] < stop:
            tensor = order[i]
            offset, end = offsets[tensor], offsets[tensor] + sizes[tensor]
            low, high = max(offset, start), min(end, stop)
            if low < high:
                pieces.append(Piece(tensor, low - offset, high - offset, low - start))
            i += 1
            if end <= stop:
                first = i
        by_chunk.append(pieces)
        start = stop
    return by_chunk


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
