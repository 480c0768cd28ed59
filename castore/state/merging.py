"""What each rank has of a part -> the part as one process would have it. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from castore.errors import UnsupportedValue
from castore.format.part_index import Object, TensorRef, join_key
from castore.state.boxes import Box, Holder, SpreadTensor, covers


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Stands in a rank's tree for a value that another rank gives."""


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A whole tensor's type and shape, and the boxes of it that a rank has: usually one."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Description:
    """A part as a rank has it: ``tree`` has a TensorRef(i) where ``tensors[i]`` belongs."""

    tree: Any
    tensors: Sequence[LocalTensor]


def merge(part: str, by_rank: Sequence[Description | None]) -> tuple[Any, list[SpreadTensor]]:
    """Return (tree, tensors) of the whole part; a rank's sources are numbered box by box, in order.

    Dicts are united, in the order of the lowest rank. What stands in one place on several ranks counts once: of plain
    values that differ the one of the lowest rank. Tensors are tied if they are so on the lowest rank with some of them.
    UnsupportedValue, naming the key, where ranks have different tensors, or not all of one between them.
    """
    merger = _Merger(part, by_rank)
    present = [(rank, described.tree) for rank, described in enumerate(by_rank) if described]
    tree = merger.merge(present, part)
    return tree, merger.finish()


class _Merger:
    def __init__(self, part: str, by_rank: Sequence[Description | None]) -> None:
        self._by_rank = by_rank
        self._part = part
        # rank -> the number of the first source of each of its tensors
        self._sources: list[list[int]] = []
        for described in by_rank:
            starts, count = [], 0
            for tensor in described.tensors if described else ():
                starts.append(count)
                count += len(tensor.boxes)
            self._sources.append(starts)
        self._numbers: dict[tuple[int, int], int] = {}  # (rank, its number of a tensor) -> that of the tensor
        self._keys: list[str] = []
        self._members: list[list[tuple[int, int]]] = []

    def merge(self, values: list[tuple[int, Any]], key: str) -> Any:
        values = [(rank, value) for rank, value in values if not isinstance(value, Elsewhere)]
        if not values:
            raise UnsupportedValue(key, "no rank has it")
        first = values[0][1]
        kind = type(first)
        if any(type(value) is TensorRef for _, value in values):
            return self._tensor(values, key)
        if kind in (dict, OrderedDict):
            dicts = [(rank, value) for rank, value in values if isinstance(value, dict)]
            names = dict.fromkeys(name for _, value in dicts for name in value)
            return kind(
                (name, self.merge([(rank, value[name]) for rank, value in dicts if name in value], join_key(key, name)))
                for name in names
            )
        if kind in (list, tuple):
            alike = [(rank, value) for rank, value in values if type(value) is kind and len(value) == len(first)]
            return kind(
                self.merge([(rank, value[i]) for rank, value in alike], f"{key}[{i}]") for i in range(len(first))
            )
        if kind is Object:
            same = [(rank, value) for rank, value in values if type(value) is Object and value.kind == first.kind]
            same = [(rank, value) for rank, value in same if value.items[:-1] == first.items[:-1] or value is first]
            held = self.merge([(rank, value.items[-1]) for rank, value in same], key)
            return Object(first.kind, (*first.items[:-1], held))
        return first

    def _tensor(self, values: list[tuple[int, Any]], key: str) -> TensorRef:
        members = []
        for rank, value in values:
            if type(value) is not TensorRef:
                raise UnsupportedValue(key, f"a tensor on one rank, but a {type(value).__name__} on rank {rank}")
            members.append((rank, value.number))
        # tensors without elements are never tied, so the lowest rank that has some of them tells
        telling = next((member for member in members if any(box.elements for box in self._local(*member).boxes)), None)
        number = self._numbers.get(telling) if telling else None
        if number is None:
            number = len(self._members)
            self._members.append([])
            self._keys.append(key)
        if telling:
            self._numbers[telling] = number
        known = self._members[number]
        known += [member for member in members if member not in known]
        return TensorRef(number)

    def finish(self) -> list[SpreadTensor]:
        return [self._spread(key, members) for key, members in zip(self._keys, self._members, strict=True)]

    def _spread(self, key: str, members: Sequence[tuple[int, int]]) -> SpreadTensor:
        (lowest, number), *others = members
        first = self._local(lowest, number)
        for rank, other in others:
            local = self._local(rank, other)
            if (local.dtype, local.shape) != (first.dtype, first.shape):
                mine, theirs = (f"{one.dtype} {list(one.shape)}" for one in (first, local))
                raise UnsupportedValue(key, f"rank {lowest} has {mine}, but rank {rank} has {theirs}")
        holders = tuple(
            Holder(rank, self._sources[rank][own] + i, box)
            for rank, own in members
            for i, box in enumerate(self._local(rank, own).boxes)
        )
        spread = SpreadTensor(first.dtype, first.shape, holders)
        if not covers(first.shape, list(spread.boxes())):
            raise UnsupportedValue(key, "the ranks don't have each of its elements once between them")
        return spread

    def _local(self, rank: int, number: int) -> LocalTensor:
        described = self._by_rank[rank]
        assert described is not None
        return described.tensors[number]
