"""The mean of the weights of several checkpoints, as a checkpoint of its own.

Uniform means of the best or latest of a run are known as model soups (Wortsman et al. 2022) and latest weight averaging
(Kaddour 2022); a mean that weighs later ones more, as an exponential moving average (Polyak averaging).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from castore.errors import NothingAvailable, UsageError
from castore.format.manifest import Entry
from castore.format.part_index import leaves
from castore.policy.scoring import rank

if TYPE_CHECKING:
    from castore.repo import Repo, SaveResult


@dataclass(frozen=True, slots=True)
class Averaged:
    """A mean that was saved, the checkpoints it is of, and the share that each has of it."""

    saved: SaveResult
    of: tuple[Entry, ...]
    shares: tuple[float, ...]


def choose(repo: Repo, selector: str, count: int) -> list[Entry]:
    """Return the ``count`` checkpoints whose mean ``best:5`` and the like ask for: the selector's own, and those next.

    ``selector`` is ``best``, ``latest``, ``run:best`` or ``run:latest``. All are of one experiment, and their weights
    are here or in a remote. The errors of :meth:`castore.Repo.find`; NothingAvailable if there are fewer.
    """
    first = repo.find(selector, kind="checkpoint")
    run, _, word = selector.rpartition(":")
    same = [
        entry
        for entry in repo.checkpoints()
        if entry.manifest.experiment == first.manifest.experiment and (not run or entry.manifest.run == run)
    ]
    states = repo.part_states_of(same)
    there = [entry for entry in same if "model" in states[entry.id] and states[entry.id]["model"].where != "missing"]
    # a mean is not averaged again with what it is of
    there = [entry for entry in there if "average" not in entry.manifest.info]
    ordered = list(rank(there, repo.config.resume.tie_tolerance)) if word == "best" else there
    if len(ordered) < count:
        raise NothingAvailable(f"{selector} has {len(ordered)} checkpoints with their weights, and not {count}")
    return ordered[:count]


def average(repo: Repo, entries: Sequence[Entry], *, run: str, decay: float | None = None, note: str = "") -> Averaged:
    """Save the mean of the models of checkpoints as the newest one of a run, and return it.

    It is computed in float64 and stored in the type of the first. With ``decay`` it is the exponential moving average
    over the steps: each counts ``decay`` times as much as the one after it, and the oldest has what is left of the
    whole. Integers are those of the first. The checkpoint has no optimizer, and no score until it is evaluated; its
    parent is the first one. UsageError unless all have equal names, shapes and types, and for fewer than two.
    """
    if len(entries) < 2:
        raise UsageError("a mean is of two checkpoints or more")
    if decay is not None and not 0 < decay < 1:
        raise UsageError(f"the decay of a moving average is between 0 and 1, not {decay:g}")
    shares = _shares(entries, decay)
    first = entries[0]
    state = repo.load(first.id, ["model"])["model"]
    means = {key: _weighed(tensor, shares[0]) for key, tensor in _tensors(state).items() if _is_averaged(tensor)}
    for entry, share in zip(entries[1:], shares[1:], strict=True):
        other = _tensors(repo.load(entry.id, ["model"])["model"])
        _check_alike(first, _tensors(state), entry, other)
        for key, mean in means.items():
            mean += _weighed(other[key], share)
    with torch.no_grad():
        for key, tensor in _tensors(state).items():
            if key in means:
                tensor.copy_(means[key])
    saved = repo.save(
        {"model": state},
        run=run,
        step=max(entry.manifest.step for entry in entries),
        experiment=first.manifest.experiment,
        config=first.manifest.config,
        parent=first.id,
        note=note,
        info={"average": {"of": [entry.id for entry in entries], "shares": shares, "decay": decay}},
    )
    return Averaged(saved, tuple(entries), tuple(shares))


def _shares(entries: Sequence[Entry], decay: float | None) -> list[float]:
    if decay is None:
        return [1 / len(entries)] * len(entries)
    oldest_first = sorted(range(len(entries)), key=lambda i: (entries[i].manifest.step, entries[i].manifest.created))
    shares = [0.0] * len(entries)
    for age, i in enumerate(reversed(oldest_first)):
        is_oldest = age == len(entries) - 1
        shares[i] = decay**age * (1.0 if is_oldest else 1.0 - decay)
    return shares


def _tensors(state: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a state by key, a tied one once."""
    by_identity: dict[int, tuple[str, torch.Tensor]] = {}
    for key, value in leaves(state):
        if isinstance(value, torch.Tensor):
            by_identity.setdefault(id(value), (key, value))
    return dict(by_identity.values())


def _is_averaged(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _weighed(tensor: torch.Tensor, share: float) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) * share


def _check_alike(first: Entry, one: dict[str, torch.Tensor], second: Entry, other: dict[str, torch.Tensor]) -> None:
    for key in one.keys() | other.keys():
        shapes = [
            (str(tensor.dtype), list(tensor.shape)) if tensor is not None else None
            for tensor in (one.get(key), other.get(key))
        ]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"{first.id[:12]} and {second.id[:12]} can't be averaged: {key} is {shapes[0]} and {shapes[1]}"
            )
