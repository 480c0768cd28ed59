"""Checkpoints for any training loop: :class:`Checkpointer`, and :class:`AsyncSaver` on which it is built."""

from __future__ import annotations

import random
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from castore.errors import CastoreError
from castore.state.parts import Flat
from castore.state.tensors import TensorSource, flatten

if TYPE_CHECKING:
    from castore.format.manifest import Experiment
    from castore.repo import Repo, SaveResult


class AsyncSaver:
    """Saves in the background: :meth:`save` returns as soon as the state is copied, so that training can go on.

    At most one save is in progress: the next one waits for it, and reuses the memory of its copy. An error of a save in
    the background is raised once, by the next call of any method or at the end of the ``with`` block. For use by a
    single thread.

        >>> import tempfile, castore
        >>> repo = castore.Repo.init(tempfile.mkdtemp())
        >>> with AsyncSaver(repo) as saver:
        ...     saver.save({"model": {"weight": torch.ones(3)}}, run="main", step=1)
        >>> repo.load("latest")
        {'model': {'weight': tensor([1., 1., 1.])}}
    """

    def __init__(self, repo: Repo) -> None:
        self._repo = repo
        self._buffers: dict[str, list[torch.Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="castore-save")
        self._pending: list[Future[SaveResult]] = []
        weakref.finalize(self, _warn_of_lost_error, self._thread, self._pending)
        _wait_at_exit(self._pending)

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except CastoreError as save_error:
            if error is None:
                raise
            error.add_note(f"a save in the background failed, too: {save_error}")

    def save(self, parts: Mapping[str, Any], **fields: Any) -> None:
        """Copy the state and start to save it; ``fields`` are the keyword arguments of :meth:`castore.Repo.save`.

        UnsupportedValue for a value that can't be stored; the error of the previous save. Then no save is started.
        """
        self.wait()
        flat = {name: flatten(state, name) for name, state in parts.items()}
        copied = {name: self._copy(name, part) for name, part in flat.items()}
        fields = {"created": datetime.now(UTC)} | fields
        self._pending.append(self._thread.submit(self._repo.save, copied, **fields))

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

    def _copy(self, name: str, flat: Flat) -> Flat:
        """Copy the tensors of a part into the buffers of the previous save, where they fit, or into new ones."""
        sources: list[TensorSource] = list(flat.sources)  # type: ignore[arg-type]
        previous = self._buffers.get(name, [])
        buffers = [source.buffer(previous[i] if i < len(previous) else None) for i, source in enumerate(sources)]
        for source, buffer in zip(sources, buffers, strict=True):
            source.copy_to(buffer)
        if any(source.is_cuda for source in sources):
            torch.cuda.synchronize()
        self._buffers[name] = buffers
        return Flat(flat.tree, [TensorSource(buffer) for buffer in buffers])


def _wait_at_exit(pending: Sequence[Future[SaveResult]]) -> None:
    """Have the interpreter finish the save before it exits: while it shuts down, pools accept no more work.

    Python has no public hook that runs early enough. Where this private one is missing the save fails, with a warning.
    """
    register = getattr(threading, "_register_atexit", None)
    if register:
        register(lambda: [future.exception() for future in pending])


def _warn_of_lost_error(thread: ThreadPoolExecutor, pending: Sequence[Future[SaveResult]]) -> None:
    """Warn of an error that no call raised before its saver was garbage collected."""
    thread.shutdown(wait=True)
    for future in pending:
        if (error := future.exception()) is not None:
            warnings.warn(f"castore: a save in the background failed: {error}", RuntimeWarning, stacklevel=2)


class Checkpointer:
    """Saves and resumes the state of any training loop; saves are made in the background unless told otherwise.

    ``others`` are whatever else has a state_dict and a load_state_dict: a schedule, a scaler, a data loader. The states
    of the random generators of Python, NumPy and torch are saved, too.

        >>> import tempfile, castore
        >>> repo, model = castore.Repo.init(tempfile.mkdtemp()), torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Checkpointer(repo, model, optimizer, run="mine") as checkpointer:
        ...     for step in range(checkpointer.resume(), 10):
        ...         loss = 1 / (step + 1)  # a step of training goes here
        ...         if (step + 1) % 5 == 0:
        ...             checkpointer.save(step + 1, metrics={"val_loss": loss})
        >>> Checkpointer(repo, model, optimizer, run="mine").resume()
        10
    """

    def __init__(
        self,
        repo: Repo,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        run: str = "main",
        experiment: Experiment | None = None,
        background: bool = True,
        **others: Any,
    ) -> None:
        self.repo = repo
        self.parent: str | None = None
        self._model, self._optimizer, self._others = model, optimizer, others
        self._run, self._experiment, self._background = run, experiment, background
        self._saver = AsyncSaver(repo)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._saver.__exit__(kind, error, trace)

    def resume(self, selector: str = "best", *, allow_fresh: bool = False) -> int:
        """Load the checkpoint that ``selector`` resolves to; return its step, which is how many were completed.

        Returns 0 and changes nothing when there is no checkpoint, or when none can be used and ``allow_fresh`` or
        config.toml permits a fresh start; without that permission NothingMatches or NothingAvailable.
        """
        resolution = self.repo.resolve(selector, self._experiment)
        if resolution.match is None and self.repo.fresh_start(resolution, allow_fresh=allow_fresh):
            return 0
        match = resolution.require()
        self.repo.load_into(match.id, self._model)
        states = self.repo.load(match.id, ["trainer", *(["optimizer"] if self._optimizer else [])])
        if self._optimizer:
            self._optimizer.load_state_dict(states["optimizer"])
        for name, component in self._others.items():
            component.load_state_dict(states["trainer"][name])
        _set_random_state(states["trainer"]["random"])
        self.parent = match.id
        return match.step

    def save(self, step: int, metrics: Mapping[str, float] | None = None, **fields: Any) -> None:
        """Save the state after ``step`` completed steps; ``fields`` are further ones of :meth:`castore.Repo.save`.

        Returns when the state is copied. An error of a save in the background is raised by the next call.
        """
        self.wait()
        parts = {"model": self._model.state_dict()}
        if self._optimizer:
            parts["optimizer"] = self._optimizer.state_dict()
        states = {name: component.state_dict() for name, component in self._others.items()}
        parts["trainer"] = {**states, "random": _random_state()}
        defaults = {
            "run": self._run,
            "experiment": self._experiment,
            "parent": self.parent,
            "step": step,
            "metrics": metrics,
        }
        self._saver.save(parts, **(defaults | fields))
        if not self._background:
            self.wait()

    def wait(self) -> SaveResult | None:
        """Wait for the save in progress and return its result; None if there is no save whose result is new."""
        saved = self._saver.wait()
        self.parent = saved.id if saved else self.parent
        return saved


def _random_state() -> dict[str, Any]:
    """Return the states of the random generators that training draws from."""
    import numpy as np

    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpy = (str(kind), torch.from_numpy(keys), *rest)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`_random_state` returned; that of the GPUs only if there are as many as then."""
    import numpy as np

    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
