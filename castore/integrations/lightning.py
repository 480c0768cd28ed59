"""castore in Lightning: a CheckpointIO that leaves pointer files, and the random states that Lightning doesn't keep.

trainer = Trainer(
    plugins=[CastoreCheckpointIO(repo, run="mine")], callbacks=[ModelCheckpoint(monitor="val_loss"), RandomStates()]
)
trainer.fit(module, ckpt_path="castore:latest")  # also where there is none yet
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from castore.background import AsyncSaver
from castore.errors import NotFound, PackageMissing, UsageError
from castore.format.ids import is_object_id
from castore.format.manifest import Entry, Experiment
from castore.format.manifest import decode as decode_manifest
from castore.ranks import ranks_of
from castore.restoring import random_state, set_random_state
from castore.storage import output_file
from castore.torch import experiment_of, finite, latest_of, repository, with_metrics

try:
    from lightning import __version__ as version
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise PackageMissing("castore.integrations.lightning", "lightning", "lightning") from error

if TYPE_CHECKING:
    from castore.repo import Repo

__all__ = ["CastoreCheckpointIO", "RandomStates"]

SCHEME = "castore:"
_RANDOM = "castore_random"
_MID_EPOCH = "castore_mid_epoch"


class CastoreCheckpointIO(CheckpointIO):  # type: ignore[misc]
    """Stores Lightning's checkpoints in a repository, and a small file at each path that says which it is.

    So ModelCheckpoint's top-k, ``last`` and deletion work as they do; what a deleted file named, `castore gc` decides.
    Besides the path of such a file, ``ckpt_path`` may be ``castore:`` and a selector; ``castore:latest`` and
    ``castore:best`` are those of the ``run``. As long as it has none, a fit with RandomStates among its callbacks
    starts afresh. ``repo`` may be a folder, as in :class:`castore.torch.Checkpointer`.

    UsageError from strategies that would write past it: those that save each rank's part by themselves.
    """

    def __init__(
        self, repo: Repo | str | os.PathLike[str], *, run: str = "main", experiment: Experiment | None = None
    ) -> None:
        self.repo, self.run = repository(repo), run
        self.parent: str | None = None
        self.may_start_afresh = False
        self._experiment = experiment
        self._saver = AsyncSaver(self.repo, alone=True)  # Lightning has one rank save

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        """Store a checkpoint durably, then write the file that names it."""
        rest = dict(checkpoint)
        parts = {"model": rest.pop("state_dict")}
        if "optimizer_states" in rest:
            parts["optimizer"] = rest.pop("optimizer_states")
        metrics, directions = _monitored(rest.get("callbacks", {}))
        parts["trainer"] = rest
        experiment = with_metrics(self._experiment or experiment_of(parts["model"]), directions)
        self._saver.save(
            parts,
            run=self.run,
            step=int(checkpoint.get("global_step", 0)),
            experiment=experiment,
            parent=self.parent,
            metrics=finite(metrics),
        )
        saved = self._saver.wait()  # the file must not name what is not durable yet
        assert saved is not None
        self.parent = saved.id
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # whole or not at all: a killed process must leave no file that names nothing
        output_file.write(Path(path), json.dumps({"castore": saved.id}).encode() + b"\n", replace=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Load what a file of :meth:`save_checkpoint` names, or a selector after ``castore:``; all bytes verified."""
        found = latest_of(self.repo, _selector_at(str(path)), self.run)
        if not found:
            return self._start_afresh()
        entry = Entry(*decode_manifest(found))
        loaded = self.repo.load(entry.id)
        if "trainer" not in loaded or "global_step" not in loaded["trainer"]:
            raise UsageError(f"checkpoint {entry.id[:12]} was not saved by CastoreCheckpointIO")
        self.parent = entry.id
        checkpoint = {"state_dict": loaded["model"], **loaded["trainer"]}
        return checkpoint | ({"optimizer_states": loaded["optimizer"]} if "optimizer" in loaded else {})

    def _start_afresh(self) -> dict[str, Any]:
        if not self.may_start_afresh:
            raise NotFound(f"run {self.run} has no checkpoint yet; to train, put RandomStates() among the callbacks")
        sys.stderr.write(f"castore: run {self.run} at step 0: it has no checkpoint yet\n")
        return _Nothing({"pytorch-lightning_version": version})

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file that names a checkpoint; its data stays for as long as the repository keeps it."""
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        self._saver.finish_pushing()


class _Nothing(dict[str, Any]):
    """What Lightning takes for no checkpoint: it asks for the version, and then whether there is anything."""

    def __bool__(self) -> bool:
        return False


def _selector_at(path: str) -> str:
    # Lightning may have made a path of it
    _, scheme, selector = path.rpartition(SCHEME)
    if scheme:
        return selector
    try:
        named = json.loads(Path(path).read_text(encoding="utf-8"))["castore"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} names no checkpoint of castore: give such a file, or castore:latest") from error
    if not isinstance(named, str) or not is_object_id(named):
        raise UsageError(f"{path} names no checkpoint of castore")
    return named


def _monitored(callbacks: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Return the metrics that ModelCheckpoints watch, and those of them that are scored."""
    metrics, directions = {}, {}
    for state in callbacks.values():
        name = state.get("monitor") if isinstance(state, dict) else None
        if name and state.get("current_score") is not None:
            metrics[str(name)] = float(state["current_score"])
            if name != "val_loss":
                directions[str(name)] = "max" if state.get("mode") == "max" else "min"
    return metrics, directions


class RandomStates(Callback):  # type: ignore[misc]
    """Saves the states of each rank's random generators with a checkpoint, and restores them where training goes on.

    What was saved at the end of an epoch is restored before the next one is set up, for its order of data; what was
    saved within one before the first batch, as a StatefulDataLoader has the order. It also refuses strategies that
    would write past a :class:`CastoreCheckpointIO`.
    """

    def __init__(self) -> None:
        self._due: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        _check_strategy(trainer)
        checkpoint_io = trainer.strategy.checkpoint_io
        if hasattr(checkpoint_io, "checkpoint_io"):
            kind = type(checkpoint_io).__name__
            raise UsageError(f"Lightning lets no {kind} wrap another CheckpointIO: give CastoreCheckpointIO alone")
        if isinstance(checkpoint_io, CastoreCheckpointIO):
            checkpoint_io.may_start_afresh = stage == "fit"  # to evaluate what was never trained would be a mistake

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        # by every rank, of which one saves
        packed = ranks_of().together(lambda: _packed(random_state()))
        checkpoint[_RANDOM] = {rank: _unpacked(data) for rank, data in enumerate(packed)}
        checkpoint[_MID_EPOCH] = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        state = checkpoint.get(_RANDOM, {}).get(trainer.global_rank)
        if state is not None and checkpoint.get(_MID_EPOCH):
            self._due = state
        elif state is not None:
            set_random_state(state)

    def on_train_batch_start(self, *_: Any) -> None:
        if self._due is not None:
            set_random_state(self._due)
            self._due = None


def _packed(state: Any) -> bytes:
    """Return random states as bytes to be sent: pickle knows no tensors of some of their types."""
    written = io.BytesIO()
    torch.save(state, written)
    return written.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _check_strategy(trainer: Any) -> None:
    """Raise UsageError for a strategy that saves each rank's part itself, without asking a CheckpointIO."""
    name = type(trainer.strategy).__name__
    if name in ("ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy"):
        raise UsageError(f"{name} writes its checkpoints past castore: save in a callback with castore.dcp.save")
