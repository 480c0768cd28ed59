"""What a training session reports while it runs, and its summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

import castore

if TYPE_CHECKING:
    from castore.torch import WarmStarted
    from nanecho.data import Corpus


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data and model are ready. ``parameters`` counts the weights, tied ones once.

    ``reused`` is the id of the prepared data that came from the store; if None, ``reason`` says why none did.
    """

    corpus: Corpus
    parameters: int
    device: str
    reused: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Began:
    """The session starts at ``step`` and is to end at ``last``.

    It resumes ``match``, or starts from scratch for the reason ``fresh``. ``weights_only``: without the optimizer's
    state. ``val_loss`` is the match's, if it belongs to the same experiment. ``later_step`` was reached by a checkpoint
    of the experiment with a worse score. ``instead_of`` is the best checkpoint, if the match is its descendant because
    this session had already been trained from there. ``fetched`` are the bytes that came from remotes, and ``warm`` is
    what a fresh start took from another checkpoint.
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
    fetched: int = 0
    warm: WarmStarted | None = None


@dataclass(frozen=True, slots=True)
class Grew:
    """Connections became active after ``step`` steps; ``density`` is the share of all that are active now."""

    step: int
    density: float


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step was made: its training loss, and the speed of training so far."""

    step: int
    loss: float
    learning_rate: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The model was evaluated after ``step`` steps: nats per token, and the share of tokens predicted right."""

    step: int
    val_loss: float
    val_accuracy: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is durable; ``reasons`` say why it was made."""

    step: int
    saved: castore.SaveResult
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Skipped:
    """An evaluation led to no checkpoint, for this reason."""

    step: int
    reason: str


class TrainLosses(msgspec.Struct, frozen=True):
    """The training loss: ``means`` over spans of ``every`` steps from step ``first`` on, with spaces between."""

    first: int
    every: int
    means: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a session did, as written to its JSON file.

    Losses are validation losses but for ``train_losses``; seconds count training alone.
    """

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
    train_losses: TrainLosses
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
    """Garbage could not be collected, which harms nothing: the store is locked, or a root can't be read."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The session ended as it should."""

    summary: Summary


@dataclass(frozen=True, slots=True)
class Failed:
    """The session ends with an error, which is raised next; the summary has what was done before."""

    summary: Summary


@dataclass(frozen=True, slots=True)
class Pushing:
    """The session has ended, and waits until its last checkpoints are in the remote."""

    checkpoints: int


Event = (
    Prepared | Began | Grew | Stepped | Evaluated | Saved | Skipped | Collected | NotCollected | Finished | Failed
    | Pushing
)  # fmt: skip
