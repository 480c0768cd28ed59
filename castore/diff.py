"""What differs between two checkpoints: what their manifests say, and tensor by tensor.

Tensors in the same place of the same chunks are equal: the indexes alone show that. Only the others are loaded, a batch
at a time, and only then is torch needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from castore.errors import ObjectMissing
from castore.format import chunking, part_index
from castore.format.ids import ObjectId
from castore.format.manifest import Entry, Manifest
from castore.format.part_index import Index, Object, TensorRef, TensorSpec
from castore.policy.scoring import score
from castore.repo import Repo
from castore.state.parts import load_tensors, locate_errors, read_index

State = Literal["equal", "changed", "added", "removed"]

_BATCH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Absent:
    """Stands for the value of a key that one side doesn't have."""


ABSENT = Absent()


@dataclass(frozen=True, slots=True)
class Value:
    """A value, not a tensor, that differs; ABSENT on a side without it. For containers of other types, their types."""

    key: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Tensor:
    """``before`` and ``after`` are its element type and shape, such as ``float32 [3, 4]``; empty on a side without it.

    ``change``, if only the elements changed: the largest difference of two elements, relative to the largest magnitude
    in either tensor, from 0 to 2. None if that is meaningless: with NaN, infinity or packed bits.
    """

    key: str
    state: State
    before: str
    after: str
    change: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """``problem`` says why a part that both checkpoints have could not be compared; empty if it was."""

    name: str
    state: State | Literal["unknown"]
    tensors: tuple[Tensor, ...] = ()
    values: tuple[Value, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What differs. ``identity`` is run, step and the like. ``parts`` lists every part, equal ones too."""

    identity: tuple[Value, ...]
    config: tuple[Value, ...]
    experiment: tuple[Value, ...]
    metrics: tuple[Value, ...]
    parts: tuple[Part, ...]


def diff(repo: Repo, before: Entry, after: Entry, *, parts: Collection[str] | None = None) -> Difference:
    """Return how ``after`` differs from ``before``: in all parts, or in those of these names.

    Parts whose data was dropped are not compared, and say so.

    At most a batch of tensors is in memory. Raise ObjectMissing, CorruptObject or CorruptIndex for damaged data.

    >>> import tempfile, castore
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     repo = castore.Repo.init(folder)
    ...     for step in (1, 2):
    ...         _ = repo.save({"trainer": {"step": step, "seed": 7}}, run="main", step=step)
    ...     after, before = repo.checkpoints()
    ...     [part.values for part in diff(repo, before, after).parts]
    [(Value(key='step', before=1, after=2),)]
    """
    a, b = before.manifest, after.manifest
    with repo.lock():
        names = [name for name in {**a.parts, **b.parts} if parts is None or name in parts]
        compared = tuple(_diff_part(repo, name, before, after) for name in names)
    return Difference(
        identity=tuple(_differing(_identity(a), _identity(b))),
        config=tuple(_differing(a.config, b.config)),
        experiment=tuple(_differing(_experiment(a), _experiment(b))),
        metrics=tuple(_differing({"score": score(a), **a.metrics}, {"score": score(b), **b.metrics})),
        parts=compared,
    )


# -- manifests -------------------------------------------------------------------------------------------------------


def _identity(manifest: Manifest) -> dict[str, Any]:
    names = ("kind", "run", "step", "created", "parent", "note")
    return {name: getattr(manifest, name) for name in names} | {"tags": " ".join(manifest.tags)}


def _experiment(manifest: Manifest) -> dict[str, Any]:
    experiment = manifest.experiment
    return {
        "tokenizer": experiment.tokenizer,
        "data": experiment.data,
        "model": experiment.model,
        "evaluation": experiment.evaluation,
        "metrics": {
            name: metric.direction if metric.low is None else f"{metric.direction} of {metric.low:g} to {metric.high:g}"
            for name, metric in experiment.metrics.items()
        },
    }


def _differing(before: Any, after: Any) -> Iterator[Value]:
    """Yield the leaves that differ, by key, after containers whose types differ."""
    types_before, types_after = dict(_container_types(before, "")), dict(_container_types(after, ""))
    for key, before_type in types_before.items():
        if types_after.get(key, before_type) != before_type:
            yield Value(key, before_type, types_after[key])
    leaves_before, leaves_after = _leaves(before), _leaves(after)
    for key in {**leaves_before, **leaves_after}:
        value, other = leaves_before.get(key, ABSENT), leaves_after.get(key, ABSENT)
        if not _is_same(value, other):
            yield Value(key, value, other)


def _leaves(tree: Any) -> dict[str, Any]:
    """Return every leaf but tensors by its key. A container without items is a leaf too."""
    return {key: value for key, value in part_index.leaves(tree) if type(value) is not TensorRef}


def _container_types(value: Any, key: str) -> Iterator[tuple[str, type | str]]:
    """Yield the key and type of every container that isn't empty, and of every value of a further type."""
    items = part_index.items(value, key)
    if type(value) is Object:
        yield key, " ".join(map(str, (value.kind, *value.items[:-1])))
    elif items:
        yield key, type(value)
    for item_key, item in items:
        yield from _container_types(item, item_key)


def _is_same(value: Any, other: Any) -> bool:
    # by repr, NaN equals itself and zero differs from minus zero, as they do when they are stored
    by_text = isinstance(value, float | complex)
    return type(value) is type(other) and (repr(value) == repr(other) if by_text else bool(value == other))


# -- parts -----------------------------------------------------------------------------------------------------------


def _diff_part(repo: Repo, name: str, before: Entry, after: Entry) -> Part:
    part_before, part_after = before.manifest.parts.get(name), after.manifest.parts.get(name)
    if part_before is None or part_after is None:
        return Part(name, "added" if part_before is None else "removed")
    if part_before.index == part_after.index:
        return Part(name, "equal")
    sides = []
    for entry in (before, after):
        try:
            sides.append(_Side.open(repo, entry, name))
        except ObjectMissing:
            return Part(name, "unknown", problem=f"the data of {entry.id[:12]} is not in the store")
    side_before, side_after = sides
    tensors = tuple(_diff_tensors(side_before, side_after))
    values = tuple(_differing(side_before.index.tree, side_after.index.tree))
    changed = values or any(tensor.state != "equal" for tensor in tensors)
    return Part(name, "changed" if changed else "equal", tensors, values)


@dataclass(frozen=True, slots=True)
class _Side:
    """A part of one of the two checkpoints."""

    repo: Repo
    checkpoint_id: ObjectId
    part: str
    index: Index

    @classmethod
    def open(cls, repo: Repo, entry: Entry, part: str) -> _Side:
        index = read_index(repo.store, repo.remotes, entry.id, entry.manifest, part)
        return cls(repo, entry.id, part, index)

    def load(self, numbers: Iterable[int]) -> dict[int, Any]:
        """Return the tensors of these numbers in the index."""
        from castore.state import tensors

        repo = self.repo
        with locate_errors(self.part, self.checkpoint_id):
            return load_tensors(
                repo.store, self.index, numbers, tensors.allocate, tensors.bytes_of, repo.threads, repo.remotes
            )


def _diff_tensors(before: _Side, after: _Side) -> Iterator[Tensor]:
    """Yield every tensor of either side, in the order of the first, then of the second."""
    numbers_before, numbers_after = _tensor_numbers(before.index), _tensor_numbers(after.index)
    places_before, places_after = _places(before.index), _places(after.index)
    to_load: dict[str, tuple[int, int]] = {}
    tensors: dict[str, Tensor] = {}
    keys = {**numbers_before, **numbers_after}
    for key in keys:
        number, other_number = numbers_before.get(key), numbers_after.get(key)
        spec = before.index.tensors[number] if number is not None else None
        other_spec = after.index.tensors[other_number] if other_number is not None else None
        shown, other_shown = _shown(spec), _shown(other_spec)
        if number is None or other_number is None:
            tensors[key] = Tensor(key, "added" if number is None else "removed", shown, other_shown)
        elif shown != other_shown:
            tensors[key] = Tensor(key, "changed", shown, other_shown)
        elif places_before[number] == places_after[other_number]:
            tensors[key] = Tensor(key, "equal", shown, other_shown)
        else:
            to_load[key] = number, other_number
    for key, change, is_equal in _compare(before, after, to_load):
        shown = _shown(before.index.tensors[numbers_before[key]])
        tensors[key] = Tensor(key, "equal" if is_equal else "changed", shown, shown, None if is_equal else change)
    return (tensors[key] for key in keys)


def _tensor_numbers(index: Index) -> dict[str, int]:
    """Return the number of each tensor in the index, by its key."""
    return {key: value.number for key, value in part_index.leaves(index.tree) if type(value) is TensorRef}


def _places(index: Index) -> list[list[tuple[ObjectId, int, int]]]:
    """Return where each tensor's bytes are: (chunk, offset in it, length), in order. Equal places hold equal bytes."""
    extents = [(spec.offset, spec.nbytes) for spec in index.tensors]
    places: list[list[tuple[ObjectId, int, int]]] = [[] for _ in extents]
    covered = chunking.pieces_by_chunk(extents, [chunk.length for chunk in index.chunks])
    for chunk, pieces in zip(index.chunks, covered, strict=True):
        for piece in pieces:
            places[piece.tensor].append((chunk.id, piece.at, piece.stop - piece.start))
    return places


def _compare(
    before: _Side, after: _Side, pairs: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, float | None, bool]]:
    """Load both tensors of each pair of numbers; yield (key, largest relative change, whether all bits are equal)."""
    batch: dict[str, tuple[int, int]] = {}
    size = 0
    for key, pair in pairs.items():
        batch[key] = pair
        size += before.index.tensors[pair[0]].nbytes
        # small tensors share chunks: one by one, each would read the chunk of all again
        if size >= _BATCH_BYTES:
            yield from _compare_batch(before, after, batch)
            batch, size = {}, 0
    if batch:
        yield from _compare_batch(before, after, batch)


def _compare_batch(
    before: _Side, after: _Side, pairs: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, float | None, bool]]:
    from castore.state.tensors import equal_bits, relative_change

    tensors = before.load({number for number, _ in pairs.values()})
    others = after.load({number for _, number in pairs.values()})
    for key, (number, other_number) in pairs.items():
        tensor, other = tensors[number], others[other_number]
        is_equal = equal_bits(tensor, other)
        yield key, 0.0 if is_equal else relative_change(tensor, other), is_equal


def _shown(spec: TensorSpec | None) -> str:
    return "" if spec is None else f"{spec.dtype} {list(spec.shape)}"
