"""The weights of a checkpoint in a model of any origin: all of them, or those that fit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from castore import sharding
from castore.errors import NotFound, UsageError
from castore.format.manifest import Entry
from castore.ranks import ranks_of
from castore.repo import Repo
from castore.restoring import (
    METADATA,
    can_be_filled,
    fills_in_place,
    fit_model,
    has_types_of,
    model_targets,
    plain_name,
)
from castore.state import tensors
from castore.state.boxes import Box
from castore.state.shards import local_shards
from castore.state.tensors import is_sharded

Where = Repo | str | os.PathLike[str]
"""A repository, or a folder in one."""


def _opened(repo: Where) -> Repo:
    return repo if isinstance(repo, Repo) else Repo.open(repo)


def load_model(model: torch.nn.Module, repo: Where, want: str = "best", *, part: str = "model") -> Entry:
    """Load the weights of a checkpoint into a model, whatever saved it; return which checkpoint it was.

    ``repo`` may be a folder in a repository. Names, but for what wrappers add to them, and shapes have to be the
    model's; other element types are converted.
    Every byte is verified before the model changes. Of a sharded model each rank reads what it has, and all ranks call
    this. The errors of :meth:`castore.Repo.load`; UsageError, before anything is changed, for what doesn't fit.

        >>> import tempfile, castore
        >>> repo = castore.Repo.init(tempfile.mkdtemp())
        >>> saved = repo.save({"model": torch.nn.Linear(2, 1).state_dict()}, run="mine", step=1)
        >>> load_model(torch.nn.Linear(2, 1), repo, "mine:latest").manifest.step
        1
    """
    repo, ranks = _opened(repo), ranks_of()
    entry = sharding.find(repo, want, ranks)
    checkpoint = entry.id[:12]
    if any(map(is_sharded, model.state_dict().values())):
        index = ranks.locally(lambda: sharding.read_indexes(repo, entry, [part])[part])
        targets = ranks.locally(lambda: model_targets(tensors.outline(index), model, checkpoint))
        loaded = sharding.load(repo, entry, {part: targets}, ranks, staged=True)
        loaded.finish()
        if not fills_in_place(model):
            model.load_state_dict(fit_model(loaded.states[part], None, model, checkpoint))
        return entry
    outline = repo.outline(entry.id, [part])[part]
    targets = model_targets(outline, model, checkpoint)
    if can_be_filled(model) and has_types_of(outline, model):
        repo.load_into(entry.id, {part: targets})
    else:
        trainer = repo.load(entry.id, ["trainer"])["trainer"] if "trainer" in entry.manifest.parts else {}
        metadata = trainer.get(METADATA) if isinstance(trainer, dict) else None
        model.load_state_dict(fit_model(repo.load(entry.id, [part])[part], metadata, model, checkpoint))
    return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStarted:
    """What of a checkpoint went into a model, by the model's names.

    ``partly`` are tensors that have more rows than were stored, such as embeddings and positions: the first ones were
    taken. ``fresh`` has the model alone, or in another shape; ``unused`` the checkpoint alone.

        >>> WarmStarted(id="3f2a", taken=("body",), partly=(), fresh=("head",), unused=()).summary
        {'id': '3f2a', 'taken': 1, 'partly': [], 'fresh': ['head'], 'unused': []}
    """

    id: str
    taken: tuple[str, ...]
    partly: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def summary(self) -> dict[str, Any]:
        """What a manifest records of it."""
        return {"id": self.id, "taken": len(self.taken), **{name: list(getattr(self, name)) for name in _LISTED}}


_LISTED = ("partly", "fresh", "unused")


def warm_start(model: torch.nn.Module, repo: Where, want: str, *, part: str = "model") -> WarmStarted:
    """Copy the tensors of a checkpoint that fit, by name and shape, into a model; say which these are.

    ``repo`` may be a folder in a repository. What wrappers add to names doesn't matter; another element type is
    converted. Optimizer and step are those of a
    fresh start. Each rank of a sharded model reads the whole part, and takes what is its own. The errors of
    :meth:`castore.Repo.load`; UsageError, before anything is changed, when nothing fits.

        >>> import tempfile, castore
        >>> repo = castore.Repo.init(tempfile.mkdtemp())
        >>> saved = repo.save({"model": torch.nn.Embedding(4, 2).state_dict()}, run="small", step=1)
        >>> warm_start(torch.nn.Embedding(6, 2), repo, "small:latest").partly
        ('weight',)
    """
    repo = _opened(repo)
    entry = repo.find(want)
    state = repo.load(entry.id, [part])[part]
    if not isinstance(state, dict):
        raise NotFound(f"part {part} of checkpoint {entry.id[:12]} holds no state of a model")
    stored = {plain_name(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    copies = {key: (value, stored[plain_name(key)]) for key, value in own.items() if plain_name(key) in stored}
    taken = [key for key, (value, found) in copies.items() if value.shape == found.shape]
    partly = [key for key, (value, found) in copies.items() if _has_grown(value, found)]
    if not taken and not partly:
        raise UsageError(f"no tensor of checkpoint {entry.id[:12]} fits the model, by name and shape")
    with torch.no_grad():
        for key in (*taken, *partly):
            _copy(*copies[key], key)
    used = {plain_name(key) for key in (*taken, *partly)}
    return WarmStarted(
        id=entry.id,
        taken=tuple(taken),
        partly=tuple(partly),
        fresh=tuple(key for key in own if plain_name(key) not in used),
        unused=tuple(sorted(stored.keys() - used)),
    )


def _has_grown(own: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a tensor has the rows that are stored, and more."""
    return own.dim() > 1 and own.shape[1:] == stored.shape[1:] and len(own) > len(stored)


def _copy(own: torch.Tensor, stored: torch.Tensor, key: str) -> None:
    """Copy what is stored into the rows that there are, or into what this rank has of them."""
    held = local_shards(own, key) if is_sharded(own) else [(Box.whole(tuple(own.shape)), own)]
    for box, local in held:
        found = stored[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))]
        (local[: len(found)] if found.dim() else local).copy_(found)
