"""What differs between two checkpoints: what their manifests say, and tensor by tensor.

Tensors that lie in the same chunks at the same place are equal, which the indexes alone tell. Only the others are
loaded, a batch at a time, and only then is torch needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from castore.errors import ObjectMissing
from castore.format import chunking, part_index
from castore.format.ids import ObjectId
from castore.format.manifest import Entry, Manifest
from castore.format.part_index import Index, TensorRef, TensorSpec
from castore.policy.scoring import score
from castore.remotes import fallback
from castore.repo import Repo
from castore.state.parts import load_tensors, locate_errors

State = Literal["equal", "changed", "added", "removed"]

_BATCH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Absent:
    """Stands for the value of a key that one side doesn't have."""


ABSENT = Absent()


@dataclass(frozen=True, slots=True)
class Value:
    """A value, not a tensor, that differs; ABSENT where there is none. Of containers of different types, the types."""

    key: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Tensor:
    """``before`` and ``after`` are its element type and shape, such as ``float32 [3, 4]``; empty where it isn't.

    ``change``, of one that is changed but not in type or shape: the largest difference of two elements, relative to
    the largest magnitude in either tensor: 0 to 2. None when that means nothing: NaN, infinity, packed bits.
    """

    key: str
    state: State
    before: str
    after: str
    change: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """``problem`` says why tensors and values of a part that both have were not compared; empty when they were."""

    name: str
    state: State | Literal["unknown"]
    tensors: tuple[Tensor, ...] = ()
    values: tuple[Value, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """``identity``: run, step and the like; only what differs is listed. Each part is listed, equal ones too."""

    identity: tuple[Value, ...]
    config: tuple[Value, ...]
    experiment: tuple[Value, ...]
    metrics: tuple[Value, ...]
    parts: tuple[Part, ...]


def diff(repo: Repo, before: Entry, after: Entry) -> Difference:
    """How ``after`` differs from ``before``. Parts whose data was dropped are not compared, and say so.

    At most a batch of tensors is in memory. ObjectMissing, CorruptObject or CorruptIndex for data that is damaged.
    """
    a, b = before.manifest, after.manifest
    with repo.lock():
        parts = tuple(_diff_part(repo, name, before, after) for name in {**a.parts, **b.parts})
    return Difference(
        identity=tuple(_values(_identity(a), _identity(b))),
        config=tuple(_values(a.config, b.config)),
        experiment=tuple(_values(_experiment(a), _experiment(b))),
        metrics=tuple(_values({"score": score(a), **a.metrics}, {"score": score(b), **b.metrics})),
        parts=parts,
    )


# -- manifests -------------------------------------------------------------------------------------------------------


def _identity(manifest: Manifest) -> dict[str, Any]:
    names = ("kind", "run", "step", "created", "parent", "note")
    return {name: getattr(manifest, name) for name in names} | {"tags": " ".join(manifest.tags)}


def _experiment(manifest: Manifest) -> dict[str, Any]:
    experiment = manifest.experiment
    metrics = {name: f"{one.direction} of {one.low:g} to {one.high:g}" for name, one in experiment.metrics.items()}
    named = {"model": experiment.model, "evaluation": experiment.evaluation, "metrics": metrics}
    return {"tokenizer": experiment.tokenizer, "data": experiment.data, **named}


def _values(before: Any, after: Any) -> Iterator[Value]:
    """The leaves that differ, by key."""
    kinds, others = dict(_containers(before, "")), dict(_containers(after, ""))
    for key in kinds:
        if others.get(key, kinds[key]) is not kinds[key]:
            yield Value(key, kinds[key], others[key])
    a, b = _flat(before), _flat(after)
    for key in {**a, **b}:
        one, other = a.get(key, ABSENT), b.get(key, ABSENT)
        if not _same(one, other):
            yield Value(key, one, other)


def _flat(tree: Any) -> dict[str, Any]:
    """Every leaf that is no tensor by its path; containers without items are leaves too."""
    return {key: value for key, value in part_index.leaves(tree) if type(value) is not TensorRef}


def _containers(value: Any, key: str) -> Iterator[tuple[str, type]]:
    """The type of every container that isn't empty."""
    found = part_index.items(value, key)
    if found:
        yield key, type(value)
    for name, item in found:
        yield from _containers(item, name)


def _same(one: Any, other: Any) -> bool:
    # by repr, NaN equals itself and zero differs from minus zero, as they do when they are stored
    by_text = isinstance(one, float | complex)
    return type(one) is type(other) and (repr(one) == repr(other) if by_text else bool(one == other))


# -- parts -----------------------------------------------------------------------------------------------------------


def _diff_part(repo: Repo, name: str, before: Entry, after: Entry) -> Part:
    a, b = before.manifest.parts.get(name), after.manifest.parts.get(name)
    if a is None or b is None:
        return Part(name, "added" if a is None else "removed")
    if a.index == b.index:
        return Part(name, "equal")
    sides = []
    for entry, own in ((before, a.index), (after, b.index)):
        try:
            sides.append(_Side.open(repo, entry.id, name, own))
        except ObjectMissing:
            return Part(name, "unknown", problem=f"the data of {entry.id[:12]} is not in the store")
    tensors = tuple(_tensors(*sides))
    one, other = (side.index for side in sides)
    values = tuple(_values(one.tree, other.tree))
    changed = values or any(tensor.state != "equal" for tensor in tensors)
    return Part(name, "changed" if changed else "equal", tensors, values)


@dataclass(frozen=True, slots=True)
class _Side:
    """A part of one of the two checkpoints."""

    repo: Repo
    manifest: ObjectId
    part: str
    index: Index

    @classmethod
    def open(cls, repo: Repo, manifest: ObjectId, part: str, own: ObjectId) -> _Side:
        with locate_errors(part, manifest):
            data, _ = fallback.read(repo.store, repo.remotes, own)
            return cls(repo, manifest, part, part_index.decode(data))

    def load(self, numbers: Iterable[int]) -> dict[int, Any]:
        import castore.state.tensors

        repo = self.repo
        with locate_errors(self.part, self.manifest):
            return load_tensors(
                repo.store, self.index, numbers, castore.state.tensors.allocate, repo.threads, repo.remotes
            )


def _tensors(one_side: _Side, other_side: _Side) -> Iterator[Tensor]:
    """Every tensor of either, in the order of the first, then of the second."""
    a, b = one_side.index, other_side.index
    before, after = _references(a), _references(b)
    places = _places(a), _places(b)
    pending: dict[str, tuple[int, int]] = {}
    settled: dict[str, Tensor] = {}
    for key in {**before, **after}:
        one = a.tensors[before[key]] if key in before else None
        other = b.tensors[after[key]] if key in after else None
        if one is None or other is None:
            settled[key] = Tensor(key, "added" if one is None else "removed", _shown(one), _shown(other))
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            settled[key] = Tensor(key, "changed", _shown(one), _shown(other))
        elif places[0][before[key]] == places[1][after[key]]:
            settled[key] = Tensor(key, "equal", _shown(one), _shown(other))
        else:
            pending[key] = before[key], after[key]
    for key, change, is_equal in _compare(one_side, other_side, pending):
        shown = _shown(a.tensors[before[key]])
        settled[key] = Tensor(key, "equal" if is_equal else "changed", shown, shown, None if is_equal else change)
    return (settled[key] for key in {**before, **after})


def _references(found: Index) -> dict[str, int]:
    return {key: value.number for key, value in part_index.leaves(found.tree) if type(value) is TensorRef}


def _places(found: Index) -> list[list[tuple[ObjectId, int, int]]]:
    """Where the bytes of each tensor are: (chunk, offset in it, length), in order. Equal places hold equal bytes."""
    extents = [(spec.offset, spec.nbytes) for spec in found.tensors]
    places: list[list[tuple[ObjectId, int, int]]] = [[] for _ in extents]
    covered = chunking.pieces_by_chunk(extents, [chunk.length for chunk in found.chunks])
    for chunk, pieces in zip(found.chunks, covered, strict=True):
        for piece in pieces:
            places[piece.tensor].append((chunk.id, piece.at, piece.stop - piece.start))
    return places


def _compare(
    one: _Side, other: _Side, pairs: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, float | None, bool]]:
    """(key, largest relative change, whether every bit is equal), by loading both tensors of each pair."""
    batch: dict[str, tuple[int, int]] = {}
    size = 0
    for key, pair in pairs.items():
        batch[key] = pair
        size += one.index.tensors[pair[0]].nbytes
        # small tensors share chunks: one by one, each would read the chunk of all again
        if size >= _BATCH_BYTES:
            yield from _compare_batch(one, other, batch)
            batch, size = {}, 0
    if batch:
        yield from _compare_batch(one, other, batch)


def _compare_batch(
    one: _Side, other: _Side, pairs: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, float | None, bool]]:
    import castore.state.tensors

    before = one.load({number for number, _ in pairs.values()})
    after = other.load({number for _, number in pairs.values()})
    for key, (a, b) in pairs.items():
        is_equal = castore.state.tensors.equal_bits(before[a], after[b])
        yield key, 0.0 if is_equal else castore.state.tensors.relative_change(before[a], after[b]), is_equal


def _shown(spec: TensorSpec | None) -> str:
    return "" if spec is None else f"{spec.dtype} {list(spec.shape)}"
