"""Begin with the weights of another checkpoint, as far as they fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from castore.errors import NotFound, UsageError
from castore.restoring import plain_name
from castore.state.tensors import is_sharded

if TYPE_CHECKING:
    from castore.repo import Repo


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


def warm_start(model: torch.nn.Module, repo: Repo, want: str, *, part: str = "model") -> WarmStarted:
    """Copy the tensors of a checkpoint that fit, by name and shape, into a model; say which these are.

    What wrappers add to names doesn't matter; another element type is converted. Optimizer and step are those of a
    fresh start. The errors of :meth:`castore.Repo.load`; UsageError, before anything is changed, when nothing fits, or
    for a sharded model.

        >>> import tempfile, castore
        >>> repo = castore.Repo.init(tempfile.mkdtemp())
        >>> saved = repo.save({"model": torch.nn.Embedding(4, 2).state_dict()}, run="small", step=1)
        >>> warm_start(torch.nn.Embedding(6, 2), repo, "small:latest").partly
        ('weight',)
    """
    entry = repo.find(want)
    state = repo.load(entry.id, [part])[part]
    if not isinstance(state, dict):
        raise NotFound(f"part {part} of checkpoint {entry.id[:12]} holds no state of a model")
    stored = {plain_name(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    if any(map(is_sharded, own.values())):
        raise UsageError("a sharded model can't be started from another checkpoint: do it before sharding")
    copies = {key: (value, stored[plain_name(key)]) for key, value in own.items() if plain_name(key) in stored}
    taken = [key for key, (value, found) in copies.items() if value.shape == found.shape]
    partly = [key for key, (value, found) in copies.items() if _has_grown(value, found)]
    if not taken and not partly:
        raise UsageError(f"no tensor of checkpoint {entry.id[:12]} fits the model, by name and shape")
    with torch.no_grad():
        for key in (*taken, *partly):
            value, found = copies[key]
            (value[: len(found)] if key in partly else value).copy_(found)
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
