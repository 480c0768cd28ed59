"""Checkpoints for any training loop: :class:`Checkpointer`, and :class:`AsyncSaver` below it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack

import msgspec
import torch

from castore.background import AsyncSaver
from castore.errors import UsageError
from castore.format.manifest import Experiment, Metric
from castore.restoring import (
    METADATA,
    RANDOM,
    RESERVED,
    can_be_filled,
    has_types_of,
    metadata_of,
    plain_name,
    random_state,
    restore_all,
)
from castore.stopping import StopRequest, stop_signals

if TYPE_CHECKING:
    from datetime import datetime

    from castore.policy.resolution import Resolution
    from castore.repo import Repo, SaveResult

__all__ = ["AsyncSaver", "Checkpointer", "Resumed"]

_log = logging.getLogger(__name__)


class CheckpointFields(TypedDict, total=False):
    """What may be recorded of a checkpoint beside what a :class:`Checkpointer` knows: see :meth:`castore.Repo.save`."""

    parent: str | None
    tags: list[str]
    note: str
    config: Mapping[str, Any]
    info: Mapping[str, Any]
    created: datetime | None


class Resumed(int):
    """The step to go on from, an int, with where it came from: ``id`` and ``run``, both empty at a fresh start.

    ``why`` says in words why there.

    >>> resumed = Resumed(500, checkpoint_id="3f2a91", run="main", why="the furthest step of run main")
    >>> list(range(resumed, 502)), resumed.run
    ([500, 501], 'main')
    """

    id: str
    run: str
    why: str

    def __new__(cls, step: int, *, checkpoint_id: str = "", run: str = "", why: str = "") -> Self:
        resumed = super().__new__(cls, step)
        resumed.id, resumed.run, resumed.why = checkpoint_id, run, why
        return resumed


class Checkpointer:
    """Saves and resumes the state of any training loop; saves are made in the background unless told otherwise.

    ``others`` are whatever else has a state_dict and a load_state_dict: a schedule, a scaler, a data loader. The states
    of the random generators of Python, NumPy and torch are saved, too.

    ``run`` and ``experiment`` say whose checkpoints these are: :meth:`resume` looks at no others. Without an
    ``experiment`` it is what the names, shapes and element types of the model's tensors make it. ``maximize`` and
    ``minimize`` name metrics that are scored beside ``val_loss``. With ``stop_signals`` the first SIGTERM, SIGINT or
    SIGHUP makes :meth:`steps` end after the step, save, and exit with 128 and its number.

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
        maximize: str | tuple[str, ...] = (),
        minimize: str | tuple[str, ...] = (),
        background: bool = True,
        stop_signals: bool = False,
        **others: Any,
    ) -> None:
        if reserved := RESERVED & others.keys():
            raise UsageError(f"{min(reserved)!r} is castore's own name in a checkpoint: call that component otherwise")
        self.repo = repo
        self.parent: str | None = None
        self._model, self._optimizer, self._others = model, optimizer, others
        self._run, self._background = run, background
        scored = dict.fromkeys(_names(maximize), "max") | dict.fromkeys(_names(minimize), "min")
        self._experiment = _with_metrics(experiment or derive_experiment(model), scored)
        self._saver = AsyncSaver(repo)
        self._stop = StopRequest()
        self._signals = contextlib.ExitStack()
        self._has_signals = stop_signals

    def __enter__(self) -> Self:
        if self._has_signals:
            self._stop = self._signals.enter_context(_stop_signals())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._signals:
            self._saver.__exit__(kind, error, trace)

    @property
    def stopping(self) -> str:
        """The name of the signal that asked for the end, such as ``SIGTERM``; empty until one came."""
        return self._stop.name

    def steps(self, stop: int, **metrics: float) -> Iterator[int]:
        """Yield the steps from where :meth:`resume` leads up to ``stop``, and save when the loop is asked to end.

        After a stop signal the state is saved, and SystemExit raised with 128 and the signal's number.
        """
        for step in range(self.resume(), stop):
            yield step
            if self._stop.number:
                self.save(step + 1, metrics)
                self.wait()
                raise SystemExit(self._stop.exit_code)

    def resume(
        self, selector: str | Literal["furthest"] = "furthest", *, allow_fresh: bool = False, strict: bool = True
    ) -> Resumed:
        """Load a checkpoint of this run and experiment; return its step, which is how many were completed.

        ``furthest`` is where the run got furthest, ``best`` its best; ``OTHER:best`` or an id is taken from wherever it
        is. Everything is read, verified and checked for fit first: after an error, all is as it was. A plain model in
        main memory is then read again, straight into its tensors, and never in memory twice. UsageError for
        what doesn't fit; with ``strict=False`` components that only one side has are left alone.

        Returns 0 and changes nothing when this run has no checkpoint of this experiment, or when the data of none is
        available and ``allow_fresh`` or config.toml permits a fresh start; without that, NothingAvailable.
        """
        resolution = self._resolve(selector)
        if resolution is None or (resolution.match is None and not self._must_exist(resolution)):
            return self._start_fresh(resolution, f"run {self._run} has no checkpoint of this experiment yet")
        if resolution.match is None and (why := self.repo.fresh_start(resolution, allow_fresh=allow_fresh)):
            return self._start_fresh(resolution, why)
        match = resolution.require()
        parts = ["model", "trainer", *(["optimizer"] if self._optimizer else [])]
        manifest = self.repo.find(match.id).manifest
        names = [name for name in manifest.parts if name in parts or name == "optimizer"]
        outline = self.repo.outline(match.id, ["model"])["model"] if can_be_filled(self._model) else None
        if outline is None or not has_types_of(outline, self._model):
            states, fill = self.repo.load(match.id, names), None
        else:
            states = {**self.repo.load(match.id, [name for name in names if name != "model"]), "model": outline}
            fill = functools.partial(self._fill, match.id)
        restore_all(
            states, self._model, self._optimizer, self._others, strict=strict, checkpoint=match.id[:12], fill=fill
        )
        self.parent = match.id
        why = f"the furthest step of run {match.run}" if selector == "furthest" else f"{selector} of run {match.run}"
        _log.info("resuming from %s, step %d of run %s: %s", match.id[:12], match.step, match.run, why)
        return Resumed(match.step, checkpoint_id=match.id, run=match.run, why=why)

    def _fill(self, checkpoint_id: str, model: dict[str, torch.Tensor]) -> None:
        """Read a checkpoint's model into these tensors."""
        self.repo.load_into(checkpoint_id, {"model": model})

    def _resolve(self, selector: str) -> Resolution | None:
        """Look at this run for a word of no run; None when it has no checkpoint at all."""
        word = {"furthest": "latest", "latest": "latest", "best": "best"}.get(selector)
        if word is None:
            return self.repo.resolve(selector, self._experiment)
        listing = self.repo.catalog.listing()
        if not any(
            entry.manifest.kind == "checkpoint" and entry.manifest.run == self._run for entry in listing.entries
        ):
            if listing.broken:  # which may be of this run
                return self.repo.resolve(word, self._experiment)
            return None
        return self.repo.resolve(f"{self._run}:{word}", self._experiment)

    def _must_exist(self, resolution: Resolution) -> bool:
        """Whether there is a checkpoint that should be resumed: damaged, or of this experiment and without its data."""
        return bool(resolution.damaged or resolution.unavailable)

    def _start_fresh(self, resolution: Resolution | None, why: str) -> Resumed:
        others = len(resolution.rejected) if resolution else 0
        _log.info("starting at step 0: %s%s", why, f" ({others} of other experiments)" if others else "")
        return Resumed(0, why=why)

    def save(self, step: int, metrics: Mapping[str, float] | None = None, **fields: Unpack[CheckpointFields]) -> None:
        """Save the state after ``step`` completed steps; ``fields`` are further ones of :meth:`castore.Repo.save`.

        What can't be recorded is an error of this call, before anything is copied. A metric other than ``val_loss``
        that is not finite is left out, with a warning. Returns when the state is copied. An error of a save in the
        background is raised by the next call.
        """
        self.wait()
        model = self._model.state_dict()
        parts: dict[str, Any] = {"model": model}
        if self._optimizer:
            parts["optimizer"] = self._optimizer.state_dict()
        states = {name: component.state_dict() for name, component in self._others.items()}
        parts["trainer"] = {**states, RANDOM: random_state(), METADATA: metadata_of(model)}
        known: dict[str, Any] = {
            "run": self._run,
            "experiment": self._experiment,
            "parent": self.parent,
            "step": step,
            "metrics": _finite(metrics or {}),
        }
        self._saver.save(parts, **(known | dict(fields)))
        if not self._background:
            self.wait()

    def wait(self) -> SaveResult | None:
        """Wait for the save in progress and return its result; None if there is no save whose result is new."""
        saved = self._saver.wait()
        self.parent = saved.id if saved else self.parent
        return saved


_stop_signals = stop_signals  # the parameter of that name would hide it


def derive_experiment(model: torch.nn.Module) -> Experiment:
    """Return an experiment that is equal for models whose tensors have equal names, shapes and element types."""
    text = "\n".join(
        f"{plain_name(key)} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        for key, value in sorted(model.state_dict().items())
        if isinstance(value, torch.Tensor)
    )
    return Experiment(model={"tensors": hashlib.sha256(text.encode()).hexdigest()})


def _names(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _with_metrics(experiment: Experiment, scored: Mapping[str, str]) -> Experiment:
    added = {name: Metric(direction="max" if direction == "max" else "min") for name, direction in scored.items()}
    return msgspec.structs.replace(experiment, metrics={**experiment.metrics, **added}) if added else experiment


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out what is not finite: of a loss that is an error, of anything beside it no reason to lose the weights."""
    kept = {}
    for name, value in metrics.items():
        if name != "val_loss" and isinstance(value, float) and not math.isfinite(value):
            _log.warning("metric %s is %s and was left out", name, value)
        else:
            kept[name] = value
    return kept
