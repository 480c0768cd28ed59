"""How a part's tensors are laid out in one stream and cut into chunks. Pure.

A tensor of at least half a chunk is cut at multiples of the chunk size from its own start, so the same tensor gives
the same chunks wherever it stands. Smaller ones of the same element width share chunks, each at a 64-byte boundary:
equal widths keep the byte planes of :mod:`castore.codecs` aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes ``[start, stop)`` of one tensor, at ``at`` within a chunk."""

    tensor: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """``length`` bytes of the stream: ``pieces`` in order, zeros between them. ``itemsize`` is the number width."""

    length: int
    itemsize: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """``offsets[i]`` is where tensor i begins in the concatenation of ``chunks``; 0 for an empty tensor."""

    offsets: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(slots=True)
class _Shared:
    """A chunk that small tensors are still being added to."""

    length: int = 0
    pieces: list[Piece] = field(default_factory=list)


def plan_layout(sizes: Sequence[tuple[int, int]], chunk_size: int) -> Layout:
    """Lay out tensors given as (bytes, element width), in order. A function of its arguments alone."""
    chunks: list[Chunk] = []
    shared: dict[int, _Shared] = {}

    def flush(itemsize: int) -> None:
        full = shared.pop(itemsize)
        chunks.append(Chunk(full.length, itemsize, tuple(full.pieces)))

    for tensor, (size, itemsize) in enumerate(sizes):
        if size == 0:
            continue
        if 2 * size >= chunk_size:
            for start in range(0, size, chunk_size):
                stop = min(start + chunk_size, size)
                chunks.append(Chunk(stop - start, itemsize, (Piece(tensor, start, stop, 0),)))
            continue
        at = _aligned(shared[itemsize].length) if itemsize in shared else 0
        if at + size > chunk_size:
            flush(itemsize)
            at = 0
        current = shared.setdefault(itemsize, _Shared())
        current.pieces.append(Piece(tensor, 0, size, at))
        current.length = at + size
    for itemsize in list(shared):
        flush(itemsize)
    return Layout(_offsets(len(sizes), chunks), tuple(chunks))


def _offsets(count: int, chunks: Sequence[Chunk]) -> tuple[int, ...]:
    offsets = [0] * count
    start = 0
    for chunk in chunks:
        for piece in chunk.pieces:
            if piece.start == 0:
                offsets[piece.tensor] = start + piece.at
        start += chunk.length
    return tuple(offsets)


def cover(extents: Sequence[tuple[int, int]], lengths: Sequence[int]) -> list[list[Piece]]:
    """For each chunk of the given lengths, the pieces of the tensors that lie in it.

    ``extents`` are (offset, bytes) in the stream. The inverse of :func:`plan`, but for any layout that an index may
    describe.
    """
    order = sorted((offset, size, tensor) for tensor, (offset, size) in enumerate(extents) if size)
    covered: list[list[Piece]] = []
    start = 0
    first = 0
    for length in lengths:
        stop = start + length
        pieces = []
        i = first
        while i < len(order) and order[i][0] < stop:
            offset, size, tensor = order[i]
            low, high = max(offset, start), min(offset + size, stop)
            if low < high:
                pieces.append(Piece(tensor, low - offset, high - offset, low - start))
            i += 1
            if offset + size <= stop:
                first = i
        covered.append(pieces)
        start = stop
    return covered


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
