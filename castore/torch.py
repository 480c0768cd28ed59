"""Checkpoints for any training loop: :class:`Checkpointer`, and :class:`AsyncSaver` below it."""

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
    """Saves in the background: :meth:`save` returns as soon as the state is copied, and training goes on.

    There is one copy at most, whose memory is used again: a save that comes while another is under way waits for it.
    What went wrong in the background is raised by the next call of any method, once, and by the end of a ``with``
    block. Used by one thread.
    """

    def __init__(self, repo: Repo) -> None:
        self._repo = repo
        self._buffers: dict[str, list[torch.Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="castore-save")
        self._under_way: list[Future[SaveResult]] = []
        weakref.finalize(self, _last_words, self._thread, self._under_way)
        _wait_at_exit(self._under_way)

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except CastoreError as late:
            if error is None:
                raise
            error.add_note(f"beside that, a save in the background failed: {late}")

    def save(self, parts: Mapping[str, Any], **fields: Any) -> None:
        """Copy the state and begin to save it; ``fields`` are those of :meth:`castore.Repo.save`.

        UnsupportedValue for what can't be stored; the error of the save before, and then nothing was begun.
        """
        self.wait()
        flat = {name: flatten(state, name) for name, state in parts.items()}
        copied = {name: self._copied(name, one) for name, one in flat.items()}
        fields = {"created": datetime.now(UTC)} | fields
        self._under_way.append(self._thread.submit(self._repo.save, copied, **fields))

    def poll(self) -> SaveResult | None:
        """What was saved since the last call; None while a save is under way, or when there is nothing new."""
        return self.wait() if self._under_way and self._under_way[0].done() else None

    def wait(self) -> SaveResult | None:
        """Wait for the save that is under way, and return what it saved; None when there is nothing new."""
        if not self._under_way:
            return None
        try:
            saved = self._under_way[0].result()
        except KeyboardInterrupt:
            raise  # it goes on, and can still be waited for
        except BaseException:
            self._under_way.clear()
            raise
        self._under_way.clear()
        return saved

    def _copied(self, name: str, flat: Flat) -> Flat:
        sources: list[TensorSource] = list(flat.sources)  # type: ignore[arg-type]
        old = self._buffers.get(name, [])
        buffers = [source.buffer(old[i] if i < len(old) else None) for i, source in enumerate(sources)]
        for source, buffer in zip(sources, buffers, strict=True):
            source.copy_to(buffer)
        if any(source.is_cuda for source in sources):
            torch.cuda.synchronize()
        self._buffers[name] = buffers
        return Flat(flat.tree, [TensorSource(buffer) for buffer in buffers])


def _wait_at_exit(under_way: Sequence[Future[SaveResult]]) -> None:
    """Let a program that ends end its save first: once the interpreter shuts down, pools take no more work.

    Python has no public hook that comes early enough. Without this one the save fails, which is told.
    """
    register = getattr(threading, "_register_atexit", None)
    if register:
        register(lambda: [one.exception() for one in under_way])


def _last_words(thread: ThreadPoolExecutor, under_way: Sequence[Future[SaveResult]]) -> None:
    """An error that nobody asked for any more is told at least."""
    thread.shutdown(wait=True)
    for one in under_way:
        if (error := one.exception()) is not None:
            warnings.warn(f"castore: a save in the background failed: {error}", RuntimeWarning, stacklevel=2)


class Checkpointer:
    """Saves and resumes the state of any training loop, in the background unless told otherwise.

        with castore.torch.Checkpointer(repo, model, optimizer, run="mine", experiment=experiment) as checkpointer:
            for step in range(checkpointer.resume(), 10_000):
                ...
                if (step + 1) % 500 == 0:
                    checkpointer.save(step + 1, metrics={"val_loss": loss})

    ``others`` are whatever else has a state_dict and load_state_dict: a schedule, a scaler, a data loader. The states
    of the random generators of Python, NumPy and torch are saved too.
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

    def resume(self, want: str = "best", *, allow_fresh: bool = False) -> int:
        """Load the checkpoint that ``want`` resolves to, and return its step: how many were completed.

        0, and nothing is touched, when there is no checkpoint, or none can be used and ``allow_fresh`` or config.toml
        permits a fresh start; else NothingMatches, NothingAvailable.
        """
        found = self.repo.resolve(want, self._experiment)
        if found.match is None and self.repo.fresh_start(found, allow_fresh=allow_fresh):
            return 0
        match = found.require()
        state = self.repo.load(match.id, parts=["model"], into=self._model)
        state |= self.repo.load(match.id, parts=["trainer", *(["optimizer"] if self._optimizer else [])])
        if self._optimizer:
            self._optimizer.load_state_dict(state["optimizer"])
        for name, one in self._others.items():
            one.load_state_dict(state["trainer"][name])
        _set_random_state(state["trainer"]["random"])
        self.parent = match.id
        return match.step

    def save(self, step: int, metrics: Mapping[str, float] | None = None, **fields: Any) -> None:
        """Save the state after ``step`` completed steps; ``fields`` are those of :meth:`castore.Repo.save`.

        Returns when the state is copied. An error of a save in the background is raised by the next call.
        """
        before = self._saver.wait()
        self.parent = before.id if before else self.parent
        parts = {"model": self._model.state_dict()}
        if self._optimizer:
            parts["optimizer"] = self._optimizer.state_dict()
        states = {name: one.state_dict() for name, one in self._others.items()}
        parts["trainer"] = {**states, "random": _random_state()}
        own = {
            "run": self._run,
            "experiment": self._experiment,
            "parent": self.parent,
            "step": step,
            "metrics": metrics,
        }
        self._saver.save(parts, **(own | fields))
        if not self._background:
            self.wait()

    def wait(self) -> SaveResult | None:
        """Wait for the save that is under way, and return what it saved; None when there is nothing new."""
        saved = self._saver.wait()
        self.parent = saved.id if saved else self.parent
        return saved


def _random_state() -> dict[str, Any]:
    """The states of the generators that training draws from."""
    import numpy as np

    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpy = (str(kind), torch.from_numpy(keys), *rest)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: Mapping[str, Any]) -> None:
    import numpy as np

    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
