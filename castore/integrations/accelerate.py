"""castore in a loop of Accelerate: the state of everything that was prepared, saved and loaded as one checkpoint.

save_state(accelerator, repo, run="mine", step=step, metrics={"val_loss": loss})
resumed = load_state(accelerator, repo, run="mine")  # the step, 0 at a fresh start
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from castore import sharding
from castore.errors import PackageMissing, UsageError
from castore.format.manifest import Entry
from castore.format.manifest import decode as decode_manifest
from castore.ranks import ranks_of
from castore.restoring import RANDOM, for_each_rank, of_rank, random_state, set_random_state
from castore.state import shards, tensors
from castore.torch import Resumed, experiment_of, finite, latest_of, repository

try:
    from accelerate.data_loader import SeedableRandomSampler
except ImportError as error:
    raise PackageMissing("castore.integrations.accelerate", "accelerate", "accelerate") from error

if TYPE_CHECKING:
    from accelerate import Accelerator

    from castore.repo import Repo, SaveResult

__all__ = ["load_state", "save_state"]


def save_state(
    accelerator: Accelerator,
    repo: Repo | str | os.PathLike[str],
    *,
    run: str = "main",
    step: int,
    metrics: Mapping[str, float] | None = None,
    **fields: Any,
) -> SaveResult:
    """Save all that was prepared or registered, and the random states of each rank; every rank calls this.

    ``repo`` may be a folder, as in :class:`castore.torch.Checkpointer`. ``fields`` are further ones of
    :meth:`castore.Repo.save`, whose errors these are. A plain DataLoader's position is not in it: use one with
    ``use_stateful_dataloader``, or ``accelerator.skip_first_batches``.
    """
    ranks, repo = ranks_of(), repository(repo)
    state = ranks.locally(lambda: _state(accelerator, ranks.may_shard, ranks.rank))
    fields = {"experiment": experiment_of(_flat(state["model"]))} | fields
    flat = ranks.locally(lambda: {name: shards.flatten(part, name) for name, part in state.items()})
    return sharding.save(repo, flat, ranks, run=run, step=step, metrics=finite(metrics or {}), **fields)


def load_state(
    accelerator: Accelerator, repo: Repo | str | os.PathLike[str], want: str = "latest", *, run: str = "main"
) -> Resumed:
    """Load a checkpoint into what was prepared, on every rank; return its step, 0 without a change if there is none.

    ``want`` is ``latest`` or ``best`` of the ``run``, or any selector. The random states are restored before the first
    forward pass, when the first batch has been drawn. The errors of :meth:`castore.Repo.load`, and UsageError for what
    doesn't fit.
    """
    ranks, repo = ranks_of(), repository(repo)
    found = ranks.together(lambda: latest_of(repo, want, run) if ranks.rank == 0 else b"")[0]
    if not found:
        return Resumed(0, why=f"run {run} has no checkpoint yet")
    entry = Entry(*decode_manifest(found))

    def target() -> dict[str, Any]:
        indexes = sharding.read_indexes(repo, entry, ["model", "optimizer", "trainer"])
        loaders = {name: [tensors.allocate(spec) for spec in index.tensors] for name, index in indexes.items()}
        state = {name: tensors.restore(index.tree, loaders[name]) for name, index in indexes.items()}
        return {**state, "model": _models(accelerator)}

    loaded = sharding.load(repo, entry, ranks.locally(target), ranks, staged=True)
    trainer = of_rank(loaded.states["trainer"], ranks.rank)
    ranks.together(lambda: _check(accelerator, loaded.states["optimizer"], trainer))
    loaded.finish()
    ranks.locally(lambda: _restore(accelerator, loaded.states["optimizer"], trainer))
    why = f"{want} of run {entry.manifest.run}"
    return Resumed(entry.manifest.step, checkpoint_id=entry.id, run=entry.manifest.run, why=why)


def _models(accelerator: Accelerator) -> dict[str, Any]:
    """Return the state of the one model, or of each by its number."""
    states = [accelerator.unwrap_model(model).state_dict() for model in accelerator._models]
    if not states:
        raise UsageError("no model was prepared: call accelerator.prepare before this")
    return states[0] if len(states) == 1 else {str(number): state for number, state in enumerate(states)}


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{key}.{name}" if isinstance(value, Mapping) else key: item
        for key, value in state.items()
        for name, item in (value.items() if isinstance(value, Mapping) else [("", value)])
    }


def _state(accelerator: Accelerator, may_shard: bool, rank: int) -> dict[str, Any]:
    states: dict[str, Any] = {
        "schedulers": [scheduler.state_dict() for scheduler in accelerator._schedulers],
        "loaders": [_loader_state(loader) for loader in accelerator._dataloaders],
        "custom": [component.state_dict() for component in accelerator._custom_objects],
        RANDOM: random_state(),
    }
    if accelerator.scaler is not None:
        states["scaler"] = accelerator.scaler.state_dict()
    trainer = for_each_rank(states, rank) if may_shard else states
    return {
        "model": _models(accelerator),
        "optimizer": {str(i): optimizer.state_dict() for i, optimizer in enumerate(accelerator._optimizers)},
        "trainer": {**trainer, "step": accelerator.step},
    }


def _loader_state(loader: Any) -> dict[str, Any]:
    """Return where a loader stands, as far as it knows: its own state, or the epoch of its sampler."""
    if getattr(loader, "use_stateful_dataloader", False):
        return {"state": loader.state_dict()}
    sampler = _sampler(loader)
    return {"epoch": sampler.epoch, "seed": sampler.initial_seed} if sampler is not None else {}


def _sampler(loader: Any) -> Any:
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    return sampler if isinstance(sampler, SeedableRandomSampler) else None


def _components(
    accelerator: Accelerator, optimizers: Mapping[str, Any], trainer: Mapping[str, Any]
) -> dict[str, tuple[Sequence[Any], Sequence[Any]]]:
    """Return what was prepared or registered, and the states of it, by kind."""
    return {
        "optimizers": (accelerator._optimizers, list(optimizers.values())),
        "schedulers": (accelerator._schedulers, trainer["schedulers"]),
        "custom objects": (accelerator._custom_objects, trainer["custom"]),
    }


def _check(accelerator: Accelerator, optimizers: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Raise UsageError for what doesn't fit, before anything is changed."""
    for name, (own, saved) in _components(accelerator, optimizers, trainer).items():
        if len(own) != len(saved):
            raise UsageError(f"the checkpoint has {len(saved)} {name}, and {len(own)} were prepared or registered")
    if any(map(tensors.is_sharded, _flat(_models(accelerator)).values())):
        raise UsageError("a sharded model is loaded with castore.dcp.load, and saved with castore.dcp.save")


def _restore(accelerator: Accelerator, optimizers: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    for own, saved in _components(accelerator, optimizers, trainer).values():
        for component, state in zip(own, saved, strict=True):
            component.load_state_dict(state)
    for loader, state in zip(accelerator._dataloaders, trainer["loaders"], strict=False):
        if "state" in state:
            loader.load_state_dict(state["state"])
        elif state and (sampler := _sampler(loader)) is not None:
            sampler.epoch, sampler.initial_seed = state["epoch"], state["seed"]
    if accelerator.scaler is not None and "scaler" in trainer:
        accelerator.scaler.load_state_dict(trainer["scaler"])
    accelerator.step = trainer["step"]
    if RANDOM in trainer:
        _restore_random_before_first_pass(accelerator._models[0], trainer[RANDOM])


def _restore_random_before_first_pass(model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Restore random states once the first batch was drawn, for which the loader draws numbers that it drew before."""

    def restore(*_: Any) -> None:
        handle.remove()
        set_random_state(state)

    handle = model.register_forward_pre_hook(restore)
