"""castore in the Trainer of Hugging Face: a callback that saves, and a folder to resume from.

trainer = Trainer(...)
CastoreCallback(repo, run="mine").attach(trainer)
trainer.train(resume_from_checkpoint=materialize(repo, run="mine", output_dir=args.output_dir, model=model))
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from castore.background import AsyncSaver
from castore.convert import FILES, is_beside_weights
from castore.errors import PackageMissing, UsageError
from castore.format.manifest import Entry, Experiment
from castore.format.manifest import decode as decode_manifest
from castore.ranks import ranks_of
from castore.restoring import METADATA, RANDOM, RANKS, for_each_rank, metadata_of, random_state
from castore.torch import derive_experiment, finite, latest_of, repository, with_metrics

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise PackageMissing("castore.integrations.transformers", "transformers", "transformers") from error

if TYPE_CHECKING:
    from castore.repo import Repo

__all__ = ["CastoreCallback", "materialize"]

_STATE = "trainer_state"
_log = logging.getLogger(__name__)


class CastoreCallback(TrainerCallback):  # type: ignore[misc]
    """Saves into a castore repository whenever the Trainer saves, also when it does so for SIGTERM.

    Saved are the weights, the optimizer, the schedule, the scaler, the random states of each rank, the Trainer's own
    state, and what belongs to the model beside its weights: the files of its tokenizer or processor, for exports.
    ``repo`` may be a folder, as in :class:`castore.torch.Checkpointer`. ``eval_loss`` is recorded as ``val_loss``;
    ``metric_for_best_model`` is scored, too. Every rank makes one, and :meth:`attach` is what starts it. With
    ``background`` training goes on while a checkpoint is written.
    """

    def __init__(
        self,
        repo: Repo | str | os.PathLike[str],
        *,
        run: str = "main",
        experiment: Experiment | None = None,
        background: bool = True,
    ) -> None:
        self.repo, self.run = repository(repo), run
        self.parent: str | None = None
        self._experiment, self._background = experiment, background
        self._saver: AsyncSaver | None = None
        self._metrics: tuple[int, dict[str, float]] = (-1, {})
        self._replaces = False
        self._files: dict[str, torch.Tensor] = {}

    def attach(self, trainer: Trainer, *, replace_folders: bool = False) -> Self:
        """Save what this Trainer saves; with ``replace_folders`` instead of its own folders, else beside them."""
        original = trainer._save_checkpoint

        def save(model: Any, trial: Any) -> None:
            if replace_folders:
                _update_state(trainer, trial)
            else:
                original(model, trial)
            self._save(trainer)

        # all its ways of saving end here, and only here are the scaler and the Trainer at hand
        trainer._save_checkpoint = save
        self._replaces = replace_folders
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step:
            self.parent = _id_at(self.repo, self.run, state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:  # noqa: ARG002
        numbers = {name: float(value) for name, value in (metrics or {}).items() if isinstance(value, int | float)}
        if "eval_loss" in numbers:
            numbers["val_loss"] = numbers.pop("eval_loss")
        self._metrics = state.global_step, numbers

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        if self._saver:
            self._settle()
            self._saver.finish_pushing()
        best = state.best_global_step if self._replaces and args.load_best_model_at_end else None
        if best and (checkpoint_id := _id_at(self.repo, self.run, best)):
            self.repo.load_into(checkpoint_id, model)

    def _settle(self) -> None:
        saved = self._saver.wait() if self._saver else None
        self.parent = saved.id if saved else self.parent

    def _save(self, trainer: Trainer) -> None:
        state, model = trainer.state, trainer.model
        if self._saver is None:
            self._saver = AsyncSaver(self.repo)
            self._experiment = _scored(self._experiment or derive_experiment(model), trainer.args)
            self._files = _files_beside_weights(trainer)
        self._settle()
        weights = model.state_dict()
        states = {"scheduler": trainer.lr_scheduler.state_dict(), RANDOM: random_state()}
        scaler = getattr(trainer.accelerator, "scaler", None)
        if scaler is not None:
            states["scaler"] = scaler.state_dict()
        ranks = ranks_of()
        if ranks.may_shard:
            states = for_each_rank(states, ranks.rank)
        step, metrics = self._metrics
        self._saver.save(
            {
                "model": weights,
                "optimizer": trainer.optimizer.state_dict(),
                "trainer": {**states, METADATA: metadata_of(weights), _STATE: json.dumps(dataclasses.asdict(state))},
                **({FILES: self._files} if self._files else {}),
            },
            run=self.run,
            step=state.global_step,
            experiment=self._experiment,
            parent=self.parent,
            metrics=finite(metrics) if step == state.global_step else {},
            config=_recorded(model, trainer.args),
        )
        if not self._background:
            self._settle()


def _update_state(trainer: Trainer, trial: Any) -> None:
    """Do to the Trainer's state what saving a folder does."""
    state = trainer.state
    if trainer.hp_search_backend is None and trial is None:
        trainer.store_flos()
    for one in (*trainer.callback_handler.callbacks, trainer.control):
        if isinstance(one, ExportableState):
            state.stateful_callbacks[type(one).__name__] = one.state()
    state.best_model_checkpoint = None  # a folder of an earlier session: the callback knows the best by its step


def _scored(experiment: Experiment, args: Any) -> Experiment:
    name = args.metric_for_best_model
    if not name or name in ("loss", "eval_loss"):
        return experiment  # val_loss, which is scored anyway
    name = name if name.startswith("eval_") else f"eval_{name}"
    return with_metrics(experiment, {name: "max" if args.greater_is_better else "min"})


def _recorded(model: Any, args: Any) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    recorded = json.loads(config.to_json_string(use_diff=False)) if hasattr(config, "to_json_string") else {}
    names = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "seed")
    return {"model": recorded, "training": {name: getattr(args, name) for name in names}}


def _files_beside_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the bytes of the files that from_pretrained reads beside weights and configuration, by path.

    A tokenizer that can't be written is no reason to lose the weights: that is logged.
    """
    generation = getattr(trainer.model, "generation_config", None)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
        except Exception as error:  # whatever the code of a tokenizer raises
            _log.warning("checkpoints have no files of the tokenizer, which can't be saved: %s", error)
        if generation is not None:
            # not save_pretrained, which refuses settings that it thinks unwise
            generation.to_json_file(Path(folder) / "generation_config.json")
        files = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*"))}
        return {
            name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for name, path in files.items()
            if path.is_file() and path.stat().st_size and is_beside_weights(name)
        }


def _id_at(repo: Repo, run: str, step: int) -> str | None:
    """Return the newest checkpoint of a run at a step."""
    return next(
        (entry.id for entry in repo.checkpoints() if (entry.manifest.run, entry.manifest.step) == (run, step)), None
    )


# -- resuming ----------------------------------------------------------------------------------------------------------


def materialize(
    repo: Repo | str | os.PathLike[str],
    want: str = "latest",
    *,
    output_dir: str | os.PathLike[str],
    model: Any,
    run: str = "main",
) -> str | None:
    """Write a checkpoint as a folder for ``trainer.train(resume_from_checkpoint=...)``; return its path.

    None if the run has no checkpoint yet, so that the same line starts and resumes. ``want`` is ``latest`` or ``best``
    of the ``run``, or any selector; going on exactly takes ``latest``. The weights of the best one, which the Trainer
    may load at the end, are written, too. Every rank calls this. NothingAvailable; UsageError for a checkpoint that
    something else saved.
    """
    ranks, repo = ranks_of(), repository(repo)
    found = ranks.together(lambda: latest_of(repo, want, run) if ranks.rank == 0 else b"")[0]
    if not found:
        return None
    entry = Entry(*decode_manifest(found))
    folder = Path(output_dir) / f"checkpoint-{entry.manifest.step}"
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    ranks.together(lambda: _write(repo, entry, folder, model) if is_first else None)
    return str(folder)


def _write(repo: Repo, entry: Entry, folder: Path, model: Any) -> None:
    loaded = repo.load(entry.id)
    trainer = loaded.get("trainer")
    if not isinstance(trainer, dict) or _STATE not in trainer:
        raise UsageError(f"checkpoint {entry.id[:12]} was not saved by CastoreCallback: load its parts with Repo.load")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=loaded["model"])
    torch.save(loaded["optimizer"], folder / "optimizer.pt")
    torch.save(trainer["scheduler"], folder / "scheduler.pt")
    if "scaler" in trainer:
        torch.save(trainer["scaler"], folder / "scaler.pt")
    of_ranks = trainer.get(RANKS, {})
    torch.save(_random(trainer[RANDOM]), folder / ("rng_state_0.pth" if of_ranks else "rng_state.pth"))
    for rank, states in of_ranks.items():
        torch.save(_random(states[RANDOM]), folder / f"rng_state_{rank}.pth")
    state = json.loads(trainer[_STATE])
    state["best_model_checkpoint"] = _write_best(repo, entry, state.get("best_global_step"), folder, model)
    # last: a folder without it is none
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")


def _write_best(repo: Repo, entry: Entry, best: int | None, folder: Path, model: Any) -> str | None:
    if not best or best == entry.manifest.step:
        return str(folder) if best else None
    checkpoint_id = _id_at(repo, entry.manifest.run, best)
    if checkpoint_id is None:
        return None
    best_folder = folder.with_name(f"checkpoint-{best}")
    best_folder.mkdir(exist_ok=True)
    model.save_pretrained(best_folder, state_dict=repo.load(checkpoint_id, ["model"])["model"])
    return str(best_folder)


def _random(state: dict[str, Any]) -> dict[str, Any]:
    """Return random states as the Trainer reads them."""
    kind, keys, *rest = state["numpy"]
    written = {"python": state["python"], "numpy": (kind, keys.numpy(), *rest), "cpu": state["torch"]}
    if state["cuda"]:
        written["cuda"] = state["cuda"] if len(state["cuda"]) > 1 else state["cuda"][0]
    return written
