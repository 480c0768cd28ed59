"""Saving while training goes on: :class:`AsyncSaver`."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from castore import sharding
from castore.errors import CastoreError, describe
from castore.format.manifest import Entry
from castore.pushing import BackgroundPusher, pusher_of
from castore.ranks import TIMEOUT, Ranks, connect
from castore.state import shards
from castore.state.parts import Flat
from castore.state.shards import ShardedFlat
from castore.state.tensors import TensorSource, flatten

_Flat = TypeVar("_Flat", Flat, ShardedFlat)

if TYPE_CHECKING:
    from castore.repo import Repo, SaveResult


class AsyncSaver:
    """Saves in the background: :meth:`save` returns as soon as the state is copied, so that training can go on.

    At most one save is in progress: the next one waits for it, and reuses the memory of its copy. An error of a save in
    the background is raised once, by the next call of any method or at the end of the ``with`` block. If config.toml
    says so, each checkpoint is then pushed, and the end of the block waits for that, too. For use by a single thread.

    Under torch.distributed all ranks of ``process_group`` make one and call it alike, and what they have is one
    checkpoint: see :mod:`castore.dcp`, also for ``timeout``. With ``alone`` this rank saves by itself.

        >>> import tempfile, castore
        >>> repo = castore.Repo.init(tempfile.mkdtemp())
        >>> with AsyncSaver(repo) as saver:
        ...     saver.save({"model": {"weight": torch.ones(3)}}, run="main", step=1)
        >>> repo.load("latest")
        {'model': {'weight': tensor([1., 1., 1.])}}
    """

    def __init__(
        self,
        repo: Repo,
        *,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = TIMEOUT,
        alone: bool = False,
    ) -> None:
        self._repo = repo
        # connections of its own: what the thread says must not come between what another one does
        self._ranks = Ranks(alone=True) if alone else connect(process_group, timeout=timeout)
        self._pusher = pusher_of(repo) if self._ranks.rank == 0 else None
        if self._pusher:
            _pushers.append(self._pusher)
        self._buffers: dict[str, list[torch.Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="castore-save")
        self._pending: list[Future[SaveResult]] = []
        _unfinished[id(self._pending)] = self._thread, self._pending
        weakref.finalize(self, _finish_late, self._thread, self._pending, os.getpid()).atexit = False
        _wait_at_exit(self._pending, self._pusher, os.getpid())

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except Exception as save_error:
            if error is None:
                raise
            error.add_note(f"a save in the background failed, too: {describe(save_error)}")
        finally:
            try:
                self.finish_pushing()
            except CastoreError as push_error:
                if error is None:
                    raise
                error.add_note(str(push_error))

    @property
    def unpushed(self) -> tuple[str, ...]:
        """The ids of checkpoints that are still to be pushed: garbage collection must leave them."""
        return tuple(entry.id for entry in self._pusher.pending) if self._pusher else ()

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return any(not future.done() for future in self._pending)

    @property
    def is_pushing(self) -> bool:
        """Whether a push is under way."""
        return self._pusher is not None and self._pusher.is_pushing

    def finish_pushing(self) -> None:
        """Wait until every checkpoint is pushed; no save may come after that. PushIncomplete, once."""
        if self._pusher:
            self._pusher.finish()

    def save(self, parts: Mapping[str, Any], **fields: Any) -> None:
        """Copy the state and start to save it; ``fields`` are the keyword arguments of :meth:`castore.Repo.save`.

        What can't be recorded or stored is an error of this call, as is one of the previous save. Then nothing is
        copied, and no save is started.
        """
        self.begin(parts, **fields)

    def begin(self, parts: Mapping[str, Any], **fields: Any) -> Future[SaveResult]:
        """Start a :meth:`save` and return its future, whose result is for :meth:`take`."""
        self.wait()
        try:
            # what a pool could start no thread for stays in its queue, for a time when the buffers hold something else
            self._thread.submit(_start_thread)
            self._repo.check_save(parts, **fields)
            take_apart: Callable[[Any, str], Any] = shards.flatten if self._ranks.may_shard else flatten
            flat = {name: take_apart(state, name) for name, state in parts.items()}
        except Exception as error:
            self._thread.submit(self._ranks.fail, error)
            raise
        copied = {name: self._copy(name, part) for name, part in flat.items()}
        fields = {"created": datetime.now(UTC)} | fields
        future = self._thread.submit(self._save, copied, fields)
        self._pending.append(future)
        return future

    def _save(self, copied: Mapping[str, Any], fields: Mapping[str, Any]) -> SaveResult:
        if self._ranks.may_shard:
            saved = sharding.save(self._repo, copied, self._ranks, **fields)
        else:
            saved = self._repo.save(copied, **fields)
        if self._pusher:
            self._pusher.add(Entry(saved.id, saved.manifest))
        return saved

    def poll(self) -> SaveResult | None:
        """Return the result of a save that has finished since the last call; None if there is none. Never waits."""
        return self.wait() if self._pending and self._pending[0].done() else None

    def wait(self) -> SaveResult | None:
        """Wait for the save in progress and return its result; None if there is no save whose result is new."""
        if not self._pending:
            return None
        try:
            saved = self._pending[0].result()
        except KeyboardInterrupt:
            raise  # the save goes on, and can still be waited for
        except BaseException:
            self._pending.clear()
            raise
        self._pending.clear()
        return saved

    def take(self, future: Future[SaveResult]) -> SaveResult:
        """Wait for a save and return its result; its error is then raised here alone."""
        if future in self._pending:
            self.wait()
        return future.result()

    def _copy(self, name: str, flat: _Flat) -> _Flat:
        """Copy the tensors of a part into the buffers of the previous save, where they fit, or into new ones."""
        sources: list[TensorSource] = list(flat.sources)  # type: ignore[arg-type]
        previous = self._buffers.get(name, [])
        buffers = [source.buffer(previous[i] if i < len(previous) else None) for i, source in enumerate(sources)]
        for source, buffer in zip(sources, buffers, strict=True):
            source.copy_to(buffer)
        if any(source.is_cuda for source in sources):
            torch.cuda.synchronize()
        self._buffers[name] = buffers
        return dataclasses.replace(flat, sources=[TensorSource(buffer, is_shared=False) for buffer in buffers])


def _start_thread() -> None:
    """Do nothing, in a thread that exists then."""


def _wait_at_exit(pending: Sequence[Future[SaveResult]], pusher: BackgroundPusher | None, process: int) -> None:
    """Have the interpreter finish save and push before it exits: while it shuts down, pools accept no more work.

    Python has no public hook that runs early enough. Where this private one is missing the save fails, and the program
    ends with an error. A forked child has nothing to wait for: the thread that saves is its parent's.
    """
    register = getattr(threading, "_register_atexit", None)
    if register:
        register(lambda: _wait_for(pending, pusher) if os.getpid() == process else None)


def _wait_for(pending: Sequence[Future[SaveResult]], pusher: BackgroundPusher | None) -> None:
    for future in list(pending):
        future.exception()
    if pusher:
        pusher.wait()


# the savers that live, or died with an error that nobody has asked for
_unfinished: dict[int, tuple[ThreadPoolExecutor, list[Future[SaveResult]]]] = {}


# what pushes, or did, in this program
_pushers: list[BackgroundPusher] = []


def _finish_late(thread: ThreadPoolExecutor, pending: list[Future[SaveResult]], process: int) -> None:
    """Tell of an error that no call has raised, as its saver is gone. At its end the program fails for it, too."""
    if os.getpid() != process:
        return
    # a save holds its saver, so there is none to wait for; and its thread may be the one that lets go of it last
    thread.shutdown(wait=False)
    if not _errors_of(pending):
        del _unfinished[id(pending)]
    for error in _errors_of(pending):
        warnings.warn(f"castore: a save in the background failed: {describe(error)}", RuntimeWarning, stacklevel=2)


def _errors_of(pending: Sequence[Future[SaveResult]]) -> list[BaseException]:
    return [error for future in pending if (error := future.exception()) is not None]


def _fail_at_exit(process: int) -> None:
    """Exit with code 1 if a save or a push failed that nothing has asked for: it must not look as if all went well."""
    if os.getpid() != process:
        return
    errors = [error for _, pending in list(_unfinished.values()) for error in _errors_of(pending)]
    for error in errors:
        sys.stderr.write(f"castore: a save in the background failed: {describe(error)}\n")
    unpushed = [failure for pusher in _pushers if (failure := pusher.failure())]
    for push_error in unpushed:
        sys.stderr.write(f"castore: {push_error}\n")
    if errors or unpushed:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(1)


atexit.register(_fail_at_exit, os.getpid())
