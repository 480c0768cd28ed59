"""Checkpoints for any training loop: :class:`Checkpointer`, and :class:`AsyncSaver` below it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack

import msgspec
import torch

from castore import sharding
from castore.background import AsyncSaver
from castore.config import parse_duration
from castore.errors import ConfigError, NotFound, NothingMatches, RepoNotFound, UsageError, printable
from castore.format.manifest import Entry, Experiment, Metric
from castore.format.manifest import decode as decode_manifest
from castore.format.manifest import encode as encode_manifest
from castore.ranks import connect
from castore.repo import FOLDER, Repo
from castore.restoring import (
    METADATA,
    RANDOM,
    RESERVED,
    can_be_filled,
    fills_in_place,
    for_each_rank,
    has_types_of,
    metadata_of,
    model_targets,
    optimizer_targets,
    plain_name,
    random_state,
    restore_all,
)
from castore.state.tensors import allocate, restore
from castore.state.tensors import outline as outline_of
from castore.stopping import StopRequest, stop_signals
from castore.weights import WarmStarted, load_model, warm_start

if TYPE_CHECKING:
    from datetime import datetime

    from castore.policy.resolution import Resolution
    from castore.repo import SaveResult

__all__ = ["AsyncSaver", "Cadence", "Checkpointer", "Resumed", "WarmStarted", "load_model", "warm_start"]

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


@dataclass(frozen=True, slots=True)
class Cadence:
    """When to save: ``never`` by itself, after so many ``steps`` or ``seconds``, or ``continuous``.

    >>> Cadence.parse("10 min"), Cadence.parse("500 steps").is_due(1000, 0.0, is_idle=False)
    (Cadence(kind='seconds', count=600.0), True)
    """

    kind: Literal["never", "steps", "seconds", "continuous"]
    count: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Cadence:
        """Return what ``500 steps``, ``10 min``, ``continuous`` or nothing says. UsageError."""
        if text in ("", "continuous"):
            return cls("continuous" if text else "never")
        number, _, unit = text.partition(" ")
        if unit in ("step", "steps") and number.replace("_", "").isdecimal() and int(number) > 0:
            return cls("steps", int(number))
        try:
            seconds = parse_duration(text).total_seconds()
        except ValueError:
            seconds = 0.0
        if seconds <= 0:
            raise UsageError(f"every={text!r}: write '500 steps', '10 min' or 'continuous'")
        return cls("seconds", seconds)

    @property
    def depends_on_time(self) -> bool:
        """Whether two ranks may come to different answers."""
        return self.kind in ("seconds", "continuous")

    def is_due(self, step: int, seconds: float, *, is_idle: bool) -> bool:
        """Whether to save after ``step`` steps, ``seconds`` after the save before; ``is_idle``: none is under way."""
        if self.kind == "steps":
            return step % int(self.count) == 0
        return is_idle and (self.kind == "continuous" or (self.kind == "seconds" and seconds >= self.count))


class Checkpointer:
    """Saves and resumes the state of any training loop; saves are made in the background unless told otherwise.

    ``others`` are whatever else has a state_dict and a load_state_dict: a schedule, a scaler, a data loader. The states
    of the random generators of Python, NumPy and torch are saved, too.

    ``repo`` may be a folder: its repository is used or, as git does, the nearest above it; without one, one is made.

    Under torch.distributed every rank makes one and calls it alike; the repository then has what one process would
    save, which any number of ranks resume: see :mod:`castore.dcp`. What DTensors hold is saved from where it is, and
    the random generators, and other components with small states, of each rank.

    ``run`` and ``experiment`` say whose checkpoints these are: :meth:`resume` looks at no others. Without an
    ``experiment`` it is what the names, shapes and element types of the model's tensors make it. ``maximize`` and
    ``minimize`` name metrics that are scored beside ``val_loss``. With ``stop_signals`` the first SIGTERM, SIGINT or
    SIGHUP makes :meth:`steps` end after the step, save, and exit with 128 and its number.

        >>> import tempfile, castore
        >>> repo, model = castore.Repo.init(tempfile.mkdtemp()), torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Checkpointer(repo, model, optimizer, run="mine") as checkpointer:
        ...     for step in checkpointer.steps(10, every="5 steps"):
        ...         loss = 1 / (step + 1)  # a step of training goes here
        ...         checkpointer.log(val_loss=loss)
        >>> Checkpointer(repo, model, optimizer, run="mine").resume()
        10
    """

    def __init__(
        self,
        repo: Repo | str | os.PathLike[str],
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
        others = _with_states(others)
        self.repo = repository(repo)
        self.parent: str | None = None
        self._model, self._optimizer, self._others = model, optimizer, others
        self._run, self._background = run, background
        scored = dict.fromkeys(_names(maximize), "max") | dict.fromkeys(_names(minimize), "min")
        self._experiment = with_metrics(experiment or derive_experiment(model), scored)
        self._saver = AsyncSaver(self.repo)
        self._ranks = connect()  # beside the saver's, which are busy while a save is under way
        self._stop = StopRequest()
        self._logged: dict[str, float] = {}
        self._saved_at: int | None = None
        self._signals = contextlib.ExitStack()
        self._has_signals = stop_signals

    def __repr__(self) -> str:
        saved = "nothing saved yet" if self._saved_at is None else f"last saved at step {self._saved_at:,}"
        model = type(self._model).__name__
        return printable(f"<Checkpointer of {model} in {self.repo.root}, run {self._run}: {saved}>")

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

    def steps(self, stop: int, *, every: str = "") -> Iterator[int]:
        """Yield the steps from where :meth:`resume` leads up to ``stop``; save in time, and when asked to end.

        ``every`` is ``500 steps``, ``10 min`` or ``continuous``, which begins a save when the last has ended; with any
        of them the last step is saved, too. Without it, :meth:`save` is called by the loop. What :meth:`log` was given
        is recorded. After a stop signal the state is saved, and SystemExit raised with 128 and the signal's number. One
        line on standard error says where the steps begin, and why.
        """
        cadence = Cadence.parse(every)
        resumed = self.resume()
        if self._ranks.rank == 0:
            origin = f" from {resumed.id[:12]}" if resumed.id else ""
            sys.stderr.write(f"castore: run {self._run} at step {int(resumed):,}{origin}: {resumed.why}\n")
        since = time.monotonic()
        for step in range(resumed, stop):
            yield step
            number, is_due = self._ask(cadence, step + 1, since)
            is_due = is_due or number > 0 or (cadence.kind != "never" and step + 1 == stop)
            if is_due and self._saved_at != step + 1:
                self.save(step + 1)
                since = time.monotonic()
            if number:
                self.wait()
                raise SystemExit(128 + number)

    def log(self, **metrics: float) -> None:
        """Take note of metrics for the next checkpoint; the newest value of each counts."""
        self._logged |= metrics

    def _ask(self, cadence: Cadence, step: int, since: float) -> tuple[int, bool]:
        """Return the number of the signal that asks for the end, 0 without one, and whether it is time to save.

        Every rank gets the same answer: a signal may have come to one of them alone, and clocks differ.
        """
        is_due = cadence.is_due(step, time.monotonic() - since, is_idle=not self._saver.is_saving)
        if self._ranks.size == 1 or not (self._has_signals or cadence.depends_on_time):
            return self._stop.number, is_due
        answers = self._ranks.together(lambda: (self._stop.number, is_due))
        return max(number for number, _ in answers), answers[0][1]

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
        found, why, others = self._ranks.together(
            lambda: self._choose(selector, allow_fresh) if self._ranks.rank == 0 else (b"", "", 0)
        )[0]
        if not found:
            _log.info("starting at step 0: %s%s", why, f" ({others} of other experiments)" if others else "")
            return Resumed(0, why=why)
        entry = Entry(*decode_manifest(found))
        parts = ["model", "trainer", *(["optimizer"] if self._optimizer else [])]
        names = [name for name in entry.manifest.parts if name in parts or name == "optimizer"]
        load = self._load_together if self._ranks.may_shard else self._load_alone
        load(entry, names, strict)
        self.parent = entry.id
        step, run = entry.manifest.step, entry.manifest.run
        _log.info("resuming from %s, step %d of run %s: %s", entry.id[:12], step, run, why)
        return Resumed(step, checkpoint_id=entry.id, run=run, why=why)

    def _choose(self, selector: str, allow_fresh: bool) -> tuple[bytes, str, int]:
        """Return the manifest to resume, empty at a fresh start, why, and how many are of other experiments."""
        resolution = self._resolve(selector)
        others = len(resolution.rejected) if resolution else 0
        if resolution is None or (resolution.match is None and not self._must_exist(resolution)):
            return b"", f"run {self._run} has no checkpoint of this experiment yet", others
        if resolution.match is None and (why := self.repo.fresh_start(resolution, allow_fresh=allow_fresh)):
            return b"", why, others
        match = resolution.require()
        why = f"the furthest step of run {match.run}" if selector == "furthest" else f"{selector} of run {match.run}"
        return encode_manifest(self.repo.find(match.id).manifest), why, others

    def _load_alone(self, entry: Entry, names: Sequence[str], strict: bool) -> None:
        outline = self.repo.outline(entry.id, ["model"])["model"] if can_be_filled(self._model) else None
        if outline is None or not has_types_of(outline, self._model):
            states, fill = self.repo.load(entry.id, names), None
        else:
            states = {**self.repo.load(entry.id, [name for name in names if name != "model"]), "model": outline}
            fill = functools.partial(self._fill, entry.id)
        restore_all(
            states, self._model, self._optimizer, self._others, strict=strict, checkpoint=entry.id[:12], fill=fill
        )

    def _load_together(self, entry: Entry, names: Sequence[str], strict: bool) -> None:
        """Load what this rank has of the model and the optimizer; nothing is changed unless all ranks can go on."""
        ranks, checkpoint = self._ranks, entry.id[:12]

        def targets() -> dict[str, Any]:
            indexes = sharding.read_indexes(self.repo, entry, names)
            found = {
                name: restore(index.tree, list(map(allocate, index.tensors)))
                for name, index in indexes.items()
                if name == "trainer"
            }
            if self._optimizer and "optimizer" in indexes:
                found["optimizer"] = optimizer_targets(indexes["optimizer"], self._optimizer)
            return {**found, "model": model_targets(outline_of(indexes["model"]), self._model, checkpoint)}

        target = ranks.locally(targets)
        model = {"model": target.pop("model")}
        rest = sharding.load(self.repo, entry, target, ranks)
        rest.finish()
        staged = sharding.load(self.repo, entry, model, ranks, staged=True)
        is_filled = fills_in_place(self._model)
        if not is_filled:
            staged.finish()

        def fill(_: dict[str, torch.Tensor]) -> None:
            ranks.agree()
            staged.finish()

        ranks.locally(
            lambda: restore_all(
                {**rest.states, "model": staged.states["model"]},
                self._model,
                self._optimizer,
                self._others,
                strict=strict,
                checkpoint=checkpoint,
                fill=fill if is_filled else None,
                rank=ranks.rank,
            )
        )
        ranks.agree()

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
        selector = f"{self._run}:{word}"
        resolution = self.repo.resolve(selector, self._experiment)
        if resolution.match and "trainer" not in self.repo.find(resolution.match.id).manifest.parts:
            # the mean of checkpoints, or an import: there is nothing in it to go on with
            parts = ["model", "trainer", *(["optimizer"] if self._optimizer else [])]
            resolution = self.repo.resolve(selector, self._experiment, parts=parts)
        return resolution

    def _must_exist(self, resolution: Resolution) -> bool:
        """Whether there is a checkpoint that should be resumed: damaged, or of this experiment and without its data."""
        return bool(resolution.damaged or resolution.unavailable)

    def save(self, step: int, metrics: Mapping[str, float] | None = None, **fields: Unpack[CheckpointFields]) -> None:
        """Save the state after ``step`` completed steps; ``fields`` are further ones of :meth:`castore.Repo.save`.

        ``metrics`` come on top of what :meth:`log` was given since the save before.

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
        states[RANDOM] = random_state()
        if self._ranks.size > 1:
            states = for_each_rank(states, self._ranks.rank)
        parts["trainer"] = {**states, METADATA: metadata_of(model)}
        known: dict[str, Any] = {
            "run": self._run,
            "experiment": self._experiment,
            "parent": self.parent,
            "step": step,
            "metrics": finite({**self._logged, **(metrics or {})}),
        }
        self._saver.save(parts, **(known | dict(fields)))
        self._saved_at = step
        self._logged = {}
        if not self._background:
            self.wait()

    def wait(self) -> SaveResult | None:
        """Wait for the save in progress and return its result; None if there is no save whose result is new."""
        saved = self._saver.wait()
        self.parent = saved.id if saved else self.parent
        return saved


def _with_states(others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the components that have a state. UsageError for one without, but for a DataLoader, which is told once."""
    kept = {}
    for name, component in others.items():
        if hasattr(component, "state_dict") and hasattr(component, "load_state_dict"):
            kept[name] = component
        elif isinstance(component, torch.utils.data.DataLoader):
            _log.warning(
                "%s is a plain DataLoader, which can't tell where it is: a resumed run is exact from the start of an "
                "epoch, not within one; torchdata.stateful_dataloader.StatefulDataLoader is exact there, too",
                name,
            )
        else:
            kind = type(component).__name__
            raise UsageError(f"{name} is a {kind}, which has no state_dict and load_state_dict: leave it out")
    return kept


_stop_signals = stop_signals  # the parameter of that name would hide it


def derive_experiment(model: torch.nn.Module) -> Experiment:
    """Return an experiment that is equal for models whose tensors have equal names, shapes and element types."""
    return experiment_of(model.state_dict())


def experiment_of(state: Mapping[str, Any]) -> Experiment:
    """Return :func:`derive_experiment` of the model that a state dict is of."""
    text = "\n".join(
        f"{plain_name(key)} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        for key, value in sorted(state.items())
        if isinstance(value, torch.Tensor)
    )
    return Experiment(model={"tensors": hashlib.sha256(text.encode()).hexdigest()})


def repository(given: Repo | str | os.PathLike[str]) -> Repo:
    """Return a repository, or the one in a folder or above it; one is made in the folder if there is none."""
    if isinstance(given, Repo):
        return given
    try:
        return Repo.open(given)
    except RepoNotFound:
        return Repo.init(given)
    except ConfigError:
        if not (Path(given) / FOLDER).is_dir():
            raise
        return Repo.init(given)  # another rank may be making it


def latest_of(repo: Repo, want: str, run: str) -> bytes:
    """Return the manifest that ``latest`` or ``best`` of a run, or any selector, names; empty if the run has none."""
    selector = f"{run}:{want}" if want in ("latest", "best") else want
    try:
        return encode_manifest(repo.find(selector).manifest)
    except (NothingMatches, NotFound):
        if selector != want and not any(entry.manifest.run == run for entry in repo.checkpoints()):
            return b""
        raise


def _names(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def with_metrics(experiment: Experiment, scored: Mapping[str, str]) -> Experiment:
    """Return an experiment that scores further metrics, given with ``max`` or ``min``."""
    added = {name: Metric(direction="max" if direction == "max" else "min") for name, direction in scored.items()}
    return msgspec.structs.replace(experiment, metrics={**experiment.metrics, **added}) if added else experiment


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out what is not finite: of a loss that is an error, of anything beside it no reason to lose the weights."""
    kept = {}
    for name, value in metrics.items():
        if name != "val_loss" and isinstance(value, float) and not math.isfinite(value):
            _log.warning("metric %s is %s and was left out", name, value)
        else:
            kept[name] = value
    return kept
