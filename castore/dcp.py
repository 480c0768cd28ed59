"""Checkpoints of many ranks: DTensors of FSDP2, HSDP and tensor parallelism, and what DDP has on every rank.

:func:`save`, :func:`async_save` and :func:`load` are called by all ranks with what each has. What is stored is what one
process would store, whatever the number of ranks: :meth:`castore.Repo.load` reads it, and so does any other number of
ranks. ``CastoreWriter`` and ``CastoreReader`` are for programs that call torch.distributed.checkpoint themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from castore import sharding
from castore.background import AsyncSaver
from castore.format.manifest import Entry
from castore.ranks import TIMEOUT, Ranks, is_distributed, ranks_of
from castore.repo import Repo, SaveResult
from castore.sharding import find
from castore.state import shards

if TYPE_CHECKING:
    from castore.dcp_storage import CastoreReader, CastoreWriter

__all__ = ["CastoreReader", "CastoreWriter", "PendingSave", "Ranks", "async_save", "find", "load", "ranks_of", "save"]


def __getattr__(name: str) -> Any:
    if name not in ("CastoreReader", "CastoreWriter"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from castore import dcp_storage  # torch.distributed.checkpoint takes a second or two to import

    return getattr(dcp_storage, name)


def save(
    repo: Repo,
    state: Mapping[str, Any],
    *,
    run: str,
    step: int,
    process_group: dist.ProcessGroup | None = None,
    timeout: float = TIMEOUT,
    **fields: Any,
) -> SaveResult:
    """Save what all ranks have as one checkpoint; every rank calls this, with a dict from parts to states.

    DTensors are stored whole. A plain tensor is stored once and must be equal on all ranks; of other values that differ
    the lowest rank's is stored, and dicts are united. ``fields`` are those of :meth:`castore.Repo.save`. On return the
    checkpoint is durable, on every rank.

    The errors of :meth:`castore.Repo.save`, and RankFailed when another rank had one, died, or did not answer within
    ``timeout`` seconds. After an error there is no new checkpoint, and no lock is held.

        >>> import tempfile, torch
        >>> repo = Repo.init(tempfile.mkdtemp())
        >>> saved = save(repo, {"model": {"weight": torch.ones(2)}}, run="main", step=1)  # by any number of ranks
        >>> repo.load(saved.id)
        {'model': {'weight': tensor([1., 1.])}}
    """
    ranks = ranks_of(process_group, timeout=timeout)
    parts = ranks.locally(lambda: {name: shards.flatten(part, name) for name, part in state.items()})
    return sharding.save(repo, parts, ranks, run=run, step=step, **fields)


class PendingSave:
    """A save in the background, as :func:`async_save` returns it.

    >>> import tempfile, torch
    >>> repo = Repo.init(tempfile.mkdtemp())
    >>> pending = async_save(repo, {"model": {"weight": torch.ones(2)}}, run="main", step=1)
    >>> pending.result().manifest.step, pending.done()
    (1, True)
    """

    def __init__(self, saver: AsyncSaver, future: Future[SaveResult]) -> None:
        self._saver, self._future = saver, future

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._future.done()

    def result(self) -> SaveResult:
        """Wait until the checkpoint is durable, and return it. The errors of :func:`save`."""
        return self._saver.take(self._future)


_savers: dict[tuple[str, str, float], tuple[Any, AsyncSaver]] = {}  # with the default process group that there was then


def async_save(
    repo: Repo,
    state: Mapping[str, Any],
    *,
    run: str,
    step: int,
    process_group: dist.ProcessGroup | None = None,
    timeout: float = TIMEOUT,
    **fields: Any,
) -> PendingSave:
    """Begin to :func:`save`, and return as soon as the state is copied, so that training can go on.

    One save is under way at a time: the next one waits for it, and raises its error if nobody has asked for it. The
    ranks talk on connections of their own, so training's collectives are not disturbed.

        >>> import tempfile, torch
        >>> weight = torch.ones(2)
        >>> repo = Repo.init(tempfile.mkdtemp())
        >>> pending = async_save(repo, {"model": {"weight": weight}}, run="main", step=1)
        >>> _ = weight.zero_()  # training goes on
        >>> repo.load(pending.result().id)
        {'model': {'weight': tensor([1., 1.])}}
    """
    key = str(repo.root), (process_group.group_name if process_group else ""), timeout
    world = dist.group.WORLD if is_distributed() else None
    made_for, saver = _savers.get(key, (None, None))
    if saver is None or made_for is not world:
        saver = AsyncSaver(repo, process_group=process_group, timeout=timeout)
        _savers[key] = world, saver
    return PendingSave(saver, saver.begin(state, run=run, step=step, **fields))


def load(
    repo: Repo,
    state: dict[str, Any],
    want: str = "best",
    *,
    process_group: dist.ProcessGroup | None = None,
    timeout: float = TIMEOUT,
) -> Entry:
    """Load a checkpoint into ``state``, a dict from parts to states; every rank calls this, and it may be any number.

    Tensors are filled where they are, DTensors with what this rank has of them; each part of ``state`` is then replaced
    by the stored one, made of those tensors. ``want`` is a selector as in :meth:`castore.Repo.find`, resolved by the
    lowest rank. Returns the manifest. The errors of :meth:`castore.Repo.load_into`, and RankFailed.

        >>> import tempfile, torch
        >>> repo = Repo.init(tempfile.mkdtemp())
        >>> _ = repo.save({"model": {"weight": torch.ones(2)}, "trainer": {"order": [2, 0, 1]}}, run="main", step=5)
        >>> state = {"model": {"weight": torch.zeros(2)}, "trainer": {}}
        >>> load(repo, state).manifest.step, state
        (5, {'model': {'weight': tensor([1., 1.])}, 'trainer': {'order': [2, 0, 1]}})
    """
    ranks = ranks_of(process_group, timeout=timeout)
    entry = find(repo, want, ranks)
    loaded = sharding.load(repo, entry, state, ranks)
    loaded.finish()
    state.update(loaded.states)
    return entry
