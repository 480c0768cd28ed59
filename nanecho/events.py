"""What a training session reports while it runs, and its summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

import castore

if TYPE_CHECKING:
    from nanecho.data import Corpus


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data and model are there. ``parameters`` counts weights; tied ones once.

    ``reused`` is the id of the prepared data that was taken from the store; if None, ``reason`` says why none was.
    """

    corpus: Corpus
    parameters: int
    device: str
    reused: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Began:
    """Where the session begins, at ``step``, and the step at which it is to end.

    It resumes from ``match``, or starts anew because of ``fresh``. ``weights_only``: without the optimizer's state.
    ``val_loss`` is the match's, if it was measured in the same way. ``later_step`` was reached by a comparable
    checkpoint with a worse result. ``instead_of``: the best one, from which all that this session would do was done.
    """

    step: int
    last: int
    resolution: castore.Resolution | None
    match: castore.Match | None
    val_loss: float | None
    fresh: str
    weights_only: bool
    later_step: int | None
    instead_of: castore.Match | None


@dataclass(frozen=True, slots=True)
class Grew:
    """Connections became active after ``step`` steps; ``density`` is the counted share of those that are."""

    step: int
    density: float


@dataclass(frozen=True, slots=True)
class Stepped:
    step: int
    loss: float
    learning_rate: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    step: int
    val_loss: float
    val_accuracy: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is durable, and why it was made."""

    step: int
    saved: castore.SaveResult
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Skipped:
    """An evaluation that led to no checkpoint, and why."""

    step: int
    reason: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a session did, as written to its JSON file. Losses are of validation; seconds are of training alone."""

    run: str
    started: str
    stopped: str
    start_step: int
    final_step: int
    steps: int
    resumed_from: str | None
    fresh: str
    weights_only: bool
    resolution: dict[str, Any] | None
    start_loss: float | None
    final_loss: float | None
    best_loss: float | None
    checkpoints: list[str]
    skipped: list[str]
    tokens: int
    seconds: float
    tokens_per_second: float
    connection_density: float
    environment: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Collected:
    """Garbage was collected after a save."""

    plan: castore.GCPlan


@dataclass(frozen=True, slots=True)
class NotCollected:
    """Garbage could not be collected, which harms nothing: others are at work, or a root can't be read."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    summary: Summary


@dataclass(frozen=True, slots=True)
class Failed:
    """The error comes next; the summary has what was done until then."""

    summary: Summary


Event = Prepared | Began | Grew | Stepped | Evaluated | Saved | Skipped | Collected | NotCollected | Finished | Failed
