"""What a training session reports while it runs, and its summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

import castore
from nanecho.data import Corpus


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data and model are there. ``parameters`` counts weights; tied ones once."""

    corpus: Corpus
    parameters: int
    device: str


@dataclass(frozen=True, slots=True)
class Began:
    """Where the session begins, at ``step``, and the step at which it is to end.

    It resumes from ``match``, or starts anew because of ``fresh``. ``weights_only``: without the optimizer's state.
    ``later_step`` is that of the furthest comparable checkpoint, when it isn't the match.
    """

    step: int
    last: int
    resolution: castore.Resolution | None
    match: castore.Match | None
    val_loss: float | None
    fresh: str
    weights_only: bool
    later_step: int | None


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
    saved: castore.Saved
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
class Finished:
    summary: Summary


Event = Prepared | Began | Grew | Stepped | Evaluated | Saved | Skipped | Finished
