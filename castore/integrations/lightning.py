"""castore in Lightning: a CheckpointIO that leaves pointer files, and the random states that Lightning doesn't keep.

io = CastoreCheckpointIO(repo, run="mine")
trainer = Trainer(plugins=[io], callbacks=[ModelCheckpoint(monitor="val_loss"), RandomStates()])
trainer.fit(module, ckpt_path=io.latest())
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from castore.background import AsyncSaver
from castore.errors import PackageMissing, UsageError
from castore.format.ids import is_object_id
from castore.format.manifest import Experiment
from castore.format.manifest import decode as decode_manifest
from castore.ranks import ranks_of
from castore.restoring import random_state, set_random_state
from castore.storage import output_file
from castore.torch import experiment_of, finite, latest_of, with_metrics

try:
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
    Besides the path of such a file, ``ckpt_path`` may be ``castore:`` and a selector: ``castore:latest``.

    UsageError from strategies that would write past it: those that save each rank's part by themselves.
    """

    def __init__(self, repo: Repo, *, run: str = "main", experiment: Experiment | None = None) -> None:
        self.repo, self.run = repo, run
        self.parent: str | None = None
        self._experiment = experiment
        self._saver = AsyncSaver(repo, alone=True)  # Lightning has one rank save

    def latest(self, want: str = "latest") -> str | None:
        """Return what ``ckpt_path`` takes to go on with this run; None as long as it has no checkpoint."""
        found = latest_of(self.repo, want, self.run)
        return f"{SCHEME}{decode_manifest(found)[0]}" if found else None

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
        entry = self.repo.find(_selector_at(str(path)))
        loaded = self.repo.load(entry.id)
        if "trainer" not in loaded or "global_step" not in loaded["trainer"]:
            raise UsageError(f"checkpoint {entry.id[:12]} was not saved by CastoreCheckpointIO")
        self.parent = entry.id
        checkpoint = {"state_dict": loaded["model"], **loaded["trainer"]}
        return checkpoint | ({"optimizer_states": loaded["optimizer"]} if "optimizer" in loaded else {})

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file that names a checkpoint; its data stays for as long as the repository keeps it."""
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        self._saver.finish_pushing()


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
