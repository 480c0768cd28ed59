"""Tensors that are spread over ranks: which bytes of the chunks that one process would write lie on which rank. Pure.

A rank holds boxes of tensors. The elements of a box have the same order, row-major, as in the whole tensor. So whatever
range of the tensor a chunk covers, what a box has of it is one range of the box's own elements, also where these lie
apart in the chunk.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from castore.format import part_index
from castore.format.chunking import Chunk, Piece

MAX_ROUND = 64 << 20  # bytes that a rank sends or receives before what it has received is written


@dataclass(frozen=True, slots=True)
class Box:
    """A region of a tensor: where it begins and how far it extends in each dimension, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    def is_run(self, shape: Sequence[int]) -> bool:
        """Whether the box's elements stand side by side in a tensor of this shape."""
        leading = 0
        while leading < len(shape) and self.sizes[leading] == 1:
            leading += 1
        return self.sizes[leading + 1 :] == tuple(shape[leading + 1 :])

    def first(self, shape: Sequence[int]) -> int:
        """Return the number in the tensor, in row-major order, of the box's first element."""
        number = 0
        for offset, extent in zip(self.offsets, shape, strict=True):
            number = number * extent + offset
        return number

    def before(self, shape: Sequence[int], number: int) -> int:
        """Return how many of the box's elements come before element ``number`` of the tensor.

        >>> Box((0, 2), (3, 2)).before((3, 4), 7)  # two in the first row, and the first one in the second
        3
        """
        if number >= math.prod(shape):
            return self.elements
        count, inner, outer = 0, self.elements, math.prod(shape)
        for offset, size, extent in zip(self.offsets, self.sizes, shape, strict=True):
            outer //= extent
            index, number = divmod(number, outer)
            if not size:
                return 0
            inner //= size
            count += min(max(index - offset, 0), size) * inner
            if not offset <= index < offset + size:
                return count
        return count


def covers(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether every element of a tensor lies in exactly one of ``boxes``."""
    if any(
        len(box.sizes) != len(shape)
        or any(offset + size > extent for offset, size, extent in zip(box.offsets, box.sizes, shape, strict=True))
        for box in boxes
    ):
        return False
    if sum(box.elements for box in boxes) != math.prod(shape):
        return False
    if all(box.is_run(shape) for box in boxes):
        ends = sorted((box.first(shape), box.elements) for box in boxes)
        return all(first + count == after for (first, count), (after, _) in pairwise(ends))
    return not any(_overlap(one, other) for i, one in enumerate(boxes) for other in boxes[:i])


def _overlap(one: Box, other: Box) -> bool:
    extents = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < d + e and d < a + b for a, b, d, e in extents)


@dataclass(frozen=True, slots=True)
class Holder:
    """A rank that has a box of a tensor, as number ``source`` of what it holds."""

    rank: int
    source: int
    box: Box


@dataclass(frozen=True, slots=True)
class SpreadTensor:
    """A whole tensor and who holds what of it. Holders of equal boxes have equal bytes."""

    dtype: str
    shape: tuple[int, ...]
    holders: tuple[Holder, ...]

    def boxes(self) -> dict[Box, list[Holder]]:
        """Return the boxes that are not empty, each with its holders."""
        found: dict[Box, list[Holder]] = {}
        for holder in self.holders:
            if holder.box.elements:
                found.setdefault(holder.box, []).append(holder)
        return found


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes ``[start, stop)`` of what a holder has, which belong into a piece of a chunk."""

    piece: Piece
    holder: Holder
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Job:
    """A chunk that rank ``owner`` stores. What others have of it is sent in round ``round``; 0 if they have nothing."""

    part: int
    number: int
    chunk: Chunk
    owner: int
    shares: tuple[Share, ...]
    round: int


def plan_jobs(parts: Sequence[tuple[Sequence[SpreadTensor], Sequence[Chunk]]], ranks: int) -> list[Job]:
    """Return who stores which chunk of parts given as (tensors, chunks). Deterministic.

    Whoever holds most of a chunk stores it, of several the one that has least to store so far. Every tensor is covered
    by what is held of it.
    """
    jobs = []
    load = [0] * ranks
    rounds = _Rounds()
    for part, (tensors, chunks) in enumerate(parts):
        shards = [_Shards(tensor) for tensor in tensors]
        for number, chunk in enumerate(chunks):
            found = [(piece, *share) for piece in chunk.pieces for share in shards[piece.tensor].within(piece)]
            held: Counter[int] = Counter()
            for _, holders, start, stop in found:
                held.update({holder.rank: stop - start for holder in holders})
            owner = min(held, key=lambda rank: (-held[rank], load[rank], rank))
            load[owner] += chunk.length
            shares = tuple(
                Share(piece, _sender(holders, owner, load), start, stop) for piece, holders, start, stop in found
            )
            jobs.append(Job(part, number, chunk, owner, shares, rounds.place(owner, shares)))
    return jobs


def _sender(holders: Sequence[Holder], owner: int, load: Sequence[int]) -> Holder:
    return min(holders, key=lambda holder: (holder.rank != owner, load[holder.rank], holder.rank))


class _Shards:
    """The boxes of a tensor, looked up by the range of its bytes."""

    def __init__(self, tensor: SpreadTensor) -> None:
        self._shape, self._size = tensor.shape, part_index.DTYPES[tensor.dtype][0]
        self._boxes = sorted(tensor.boxes().items(), key=lambda item: item[0].first(tensor.shape))
        self._firsts = [box.first(tensor.shape) for box, _ in self._boxes]
        self._are_runs = all(box.is_run(tensor.shape) for box, _ in self._boxes)

    def within(self, piece: Piece) -> Iterator[tuple[list[Holder], int, int]]:
        """Yield (holders, start, stop) of each box with elements in a piece: bytes of the box."""
        low, high = piece.start // self._size, piece.stop // self._size
        # those after the piece begin after it, and runs before it have ended unless they are the last to begin
        nearby = range(max(0, bisect_right(self._firsts, low) - 1) if self._are_runs else 0, len(self._boxes))
        for i in nearby:
            if self._firsts[i] >= high:
                break
            box, holders = self._boxes[i]
            start, stop = box.before(self._shape, low), box.before(self._shape, high)
            if start < stop:
                yield holders, start * self._size, stop * self._size


class _Rounds:
    """Gives each chunk the round in which its shares travel, so that none moves much more than MAX_ROUND bytes."""

    def __init__(self) -> None:
        self._round = 1
        self._moved: defaultdict[int, int] = defaultdict(int)

    def place(self, owner: int, shares: Sequence[Share]) -> int:
        sent = [(share.holder.rank, share.stop - share.start) for share in shares if share.holder.rank != owner]
        if not sent:
            return 0
        if max(self._moved.values(), default=0) >= MAX_ROUND:
            self._round += 1
            self._moved.clear()
        for rank, size in sent:
            self._moved[rank] += size
            self._moved[owner] += size
        return self._round
