"""castore as the storage of torch.distributed.checkpoint: see :mod:`castore.dcp`, which most programs should use."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from castore import sharding
from castore.errors import UsageError
from castore.format import manifest
from castore.format.manifest import Entry
from castore.format.part_index import Index, TensorRef, TensorSpec
from castore.ranks import TIMEOUT, Ranks, ranks_of
from castore.repo import Repo, SaveResult
from castore.state import objects, tensors
from castore.state.boxes import Box
from castore.state.merging import Elsewhere, LocalTensor
from castore.state.shards import Region, ShardedFlat
from castore.state.tensors import TensorSource

__all__ = ["CastoreReader", "CastoreWriter"]

_T = TypeVar("_T")


class CastoreWriter(StorageWriter):
    """Saves what ``torch.distributed.checkpoint.save`` or ``async_save`` is given; ``saved`` is the result.

    ``fields`` are those of :meth:`castore.Repo.save`. Without ``step`` it is the number at the end of the
    ``checkpoint_id``, such as ``step-500``. Each key of the state is a part if all hold dicts, else the whole is the
    part ``state``. What DCP does to a state before it gets here is lost: empty dicts vanish, int keys become strings,
    and tied tensors are two. Every rank makes one.

        >>> import tempfile
        >>> import torch.distributed.checkpoint as dcp
        >>> repo = Repo.init(tempfile.mkdtemp())
        >>> writer = CastoreWriter(repo, run="main", no_dist=True)
        >>> _ = dcp.save({"model": {"weight": torch.ones(2)}}, storage_writer=writer, checkpoint_id="step-500")
        >>> repo.load(writer.saved.id), writer.saved.manifest.step
        ({'model': {'weight': tensor([1., 1.])}}, 500)
    """

    def __init__(
        self,
        repo: Repo,
        *,
        run: str = "main",
        step: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        timeout: float = TIMEOUT,
        **fields: Any,
    ) -> None:
        self.saved: SaveResult | None = None
        self._repo, self._step, self._fields = repo, step, {"run": run, **fields}
        self._group, self._no_dist, self._timeout = process_group, no_dist, timeout
        self._paths: dict[str, tuple[Any, ...]] = {}
        self._ranks()  # here, where nothing else is under way

    def _ranks(self) -> Ranks:
        return Ranks() if self._no_dist else ranks_of(self._group, timeout=self._timeout)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None, "saved": None}  # another process has groups of its own

    def reset(self, checkpoint_id: Any = None) -> None:
        self.saved = None
        if checkpoint_id is not None and (digits := re.search(r"\d+$", str(checkpoint_id))):
            self._fields["step"] = int(digits[0])

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        step = self._step if self._step is not None else self._fields.get("step")
        if step is None:
            raise UsageError("give CastoreWriter the step, or a checkpoint_id that ends with it, such as step-500")
        self._fields["step"] = step

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if plan.items:  # a planner that caches plans sends an empty one for a state like the one before
            named = plan.planner_data if isinstance(plan.planner_data, dict) else {}
            self._paths = {item.index.fqn: tuple(named.get(item.index.fqn, (item.index.fqn,))) for item in plan.items}
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Save all that the ranks were given. The manifest is written here: then every rank's objects are durable."""
        ranks = self._ranks()
        parts = ranks.locally(lambda: self._parts(plan, planner))
        self.saved = sharding.save(self._repo, parts, ranks, **self._fields)
        return _done([WriteResult(item.index, 0, None) for item in plan.items])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002
        assert self.saved is not None
        metadata.storage_data = self.saved.id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        return False  # no path of a file is one

    def _parts(self, plan: SavePlan, planner: SavePlanner) -> dict[str, ShardedFlat]:
        given: dict[str, list[WriteItem]] = {key: [] for key in self._paths}
        for item in plan.items:
            given.setdefault(item.index.fqn, []).append(item)
        paths = {key: self._paths.get(key, (key,)) for key in given}
        tops = dict.fromkeys(path[0] for path in paths.values())
        are_parts = all(len(path) > 1 for path in paths.values()) and all(
            isinstance(top, str) and manifest.PART.fullmatch(top) for top in tops
        )
        states: dict[str, _Planned] = {}
        for key, items in given.items():
            name, path = (paths[key][0], paths[key][1:]) if are_parts else ("state", paths[key])
            states.setdefault(name, _Planned()).add(path, key, items, planner)
        return {name: state.flat() for name, state in states.items()}


def _done(value: _T) -> TorchFuture[_T]:
    future: TorchFuture[_T] = TorchFuture()
    future.set_result(value)
    return future


class _Planned:
    """A part as the items of a plan say it is."""

    def __init__(self) -> None:
        self._tree: dict[Any, Any] = {}
        self._tensors: list[LocalTensor] = []
        self._sources: list[TensorSource] = []

    def add(self, path: Sequence[Any], key: str, items: Sequence[WriteItem], planner: SavePlanner) -> None:
        """Add what is at a path; without items another rank has it."""
        if not items:
            value: Any = Elsewhere()
        elif items[0].type == WriteItemType.BYTE_IO:
            # the value itself: what DCP would write is a pickle
            lookup: Any = planner
            value = objects.take_apart(lookup.lookup_object(items[0].index), key)
        else:
            value = self._tensor(key, items, planner)
        _put(self._tree, path, value)

    def _tensor(self, key: str, items: Sequence[WriteItem], planner: SavePlanner) -> Any:
        flattener = tensors.Flattener()
        boxes = []
        shape: tuple[int, ...] = ()
        for item in items:
            assert item.tensor_data is not None
            chunk, shape = item.tensor_data.chunk, tuple(item.tensor_data.size)
            held: Any = planner.resolve_data(item)
            flattener.number(held.detach(), key)
            boxes.append(Box(tuple(chunk.offsets), tuple(chunk.sizes)))
        self._tensors.append(LocalTensor(flattener.sources[0].dtype, shape, tuple(boxes)))
        self._sources += flattener.sources
        return TensorRef(len(self._tensors) - 1)

    def flat(self) -> ShardedFlat:
        return ShardedFlat(self._tree, self._tensors, self._sources)


def _put(tree: Any, path: Sequence[Any], value: Any) -> None:
    """Set what is at a path, and make the dicts and lists that lead there."""
    for here, below in pairwise(path):
        tree = _step(tree, here, [] if isinstance(below, int) else {})
    _step(tree, path[-1], value)


def _step(tree: Any, key: Any, value: Any) -> Any:
    if isinstance(tree, list):
        tree.extend([Elsewhere()] * (key + 1 - len(tree)))
        if isinstance(tree[key], Elsewhere):
            tree[key] = value
        return tree[key]
    return tree.setdefault(key, value)


class CastoreReader(StorageReader):
    """Loads a checkpoint for ``torch.distributed.checkpoint.load``; every rank makes one.

    ``want``, or the ``checkpoint_id``, is a selector as in :meth:`castore.Repo.find`, resolved by the lowest rank;
    ``entry`` is then what was found. The keys are those that DCP makes of the parts' states.

        >>> import tempfile
        >>> import torch.distributed.checkpoint as dcp
        >>> repo = Repo.init(tempfile.mkdtemp())
        >>> saved = repo.save({"model": {"weight": torch.ones(2)}}, run="main", step=1)
        >>> state = {"model": {"weight": torch.zeros(2)}}
        >>> dcp.load(state, storage_reader=CastoreReader(repo, saved.id, no_dist=True))
        >>> state
        {'model': {'weight': tensor([1., 1.])}}
    """

    def __init__(
        self,
        repo: Repo,
        want: str = "latest",
        *,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        self.entry: Entry | None = None
        self._repo, self._want = repo, want
        self._ranks = Ranks() if no_dist else ranks_of(process_group, timeout=timeout)
        self._indexes: dict[str, Index] = {}
        self._places: dict[str, tuple[str, int]] = {}  # key -> part, number of the tensor
        self._values: dict[str, Any] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        if checkpoint_id is not None:
            self._want = str(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002
        entry = self.entry = sharding.find(self._repo, self._want, self._ranks)
        self._indexes = self._ranks.locally(lambda: sharding.read_indexes(self._repo, entry, entry.manifest.parts))
        state: dict[str, Any] = {}
        for name, index in self._indexes.items():
            held = tensors.outline_tensors(index)
            part = tensors.restore(index.tree, held)
            at = {id(tensor): number for number, tensor in enumerate(held)}
            above = part if name == "state" else {name: part}
            state |= above
            flat, _ = flatten_state_dict(above)
            for key, value in flat.items():
                if isinstance(value, torch.Tensor):
                    self._places[key] = name, at[id(value)]
        flat, mapping = flatten_state_dict(state)
        described: dict[str, Any] = {}
        for key, value in flat.items():
            if key in self._places:  # one chunk, the whole: what is stored has no shards
                whole = ChunkStorageMetadata(torch.Size([0] * value.dim()), value.size())
                described[key] = TensorStorageMetadata(TensorProperties(value.dtype), value.size(), [whole])
            else:
                described[key], self._values[key] = BytesStorageMetadata(), value
        return Metadata(state_dict_metadata=described, planner_data=mapping)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        assert self.entry is not None
        regions: dict[str, dict[int, list[Region]]] = {name: {} for name in self._indexes}
        filled = []
        for item in plan.items:
            key = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                written = io.BytesIO()  # in memory alone: DCP takes values as pickles
                torch.save(self._values[key], written)
                written.seek(0)
                planner.load_bytes(item, written)
                continue
            name, number = self._places[key]
            target = planner.resolve_tensor(item).detach()
            box = Box(tuple(item.storage_offsets), tuple(item.lengths))
            stored = TensorSpec(self._indexes[name].tensors[number].dtype, box.sizes, 0)
            buffer = target if tensors.can_be_filled(target) else tensors.allocate(stored)
            regions[name].setdefault(number, []).append(Region(box, buffer))
            filled.append((item, target, buffer))
        sharding.fill_regions(self._repo, self.entry, self._indexes, regions, self._ranks)
        for item, target, buffer in filled:
            if buffer is not target:
                target.copy_(buffer)
            planner.commit_tensor(item, target)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ARG003
        return False
