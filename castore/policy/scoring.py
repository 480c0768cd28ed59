"""The score of a checkpoint, and the order of checkpoints within one experiment. Pure.

score = weighted mean of ``1 / (1 + val_loss)`` (weight 0.7) and the mean of the declared metrics, each mapped into
[0, 1] (weight 0.3). A factor that was not measured drops out and the weights are renormalised. Tokens seen, speed and
time are recorded, never scored.
"""

from __future__ import annotations

from collections.abc import Iterable

from castore.format.manifest import Entry, Manifest, Metric

LOSS_WEIGHT = 0.7
METRICS_WEIGHT = 0.3


def score(manifest: Manifest) -> float | None:
    """Return the quality in [0, 1], higher is better; None if neither val_loss nor a declared metric was measured.

    >>> from castore.format.manifest import Experiment, Part
    >>> part = Part(index="ab" * 32, bytes=4096, stored_bytes=3500)
    >>> about = {"run": "ci", "step": 500, "created": "2026-01-02T03:04:05.000006Z", "parts": {"model": part}}
    >>> score(Manifest(metrics={"val_loss": 1.0}, **about))
    0.5
    >>> experiment = Experiment(metrics={"accuracy": Metric()})
    >>> round(score(Manifest(metrics={"val_loss": 1.0, "accuracy": 0.9}, experiment=experiment, **about)), 3)
    0.62
    >>> score(Manifest(**about)) is None
    True
    """
    factors = []
    if "val_loss" in manifest.metrics:
        factors.append((LOSS_WEIGHT, 1.0 / (1.0 + manifest.metrics["val_loss"])))
    scored = [
        _normalise(manifest.metrics[name], metric)
        for name, metric in manifest.experiment.metrics.items()
        if name in manifest.metrics
    ]
    if scored:
        factors.append((METRICS_WEIGHT, sum(scored) / len(scored)))
    if not factors:
        return None
    return sum(weight * value for weight, value in factors) / sum(weight for weight, _ in factors)


def rank(entries: Iterable[Entry], tie_tolerance: float) -> list[Entry]:
    """Return the entries of one experiment, best first, then those without a score, newest first.

    Scores within ``tie_tolerance`` of the highest not yet ranked are a tie, which the later step wins: training
    progress decides where quality does not. The order of ``entries`` does not matter.
    """
    scored = [(score(entry.manifest), entry) for entry in entries]
    unscored = newest_first(entry for value, entry in scored if value is None)
    by_score = sorted(
        ((value, entry) for value, entry in scored if value is not None),
        key=lambda pair: (pair[0], pair[1].id),
        reverse=True,
    )
    ranked: list[Entry] = []
    start = 0
    while start < len(by_score):
        stop = start
        while stop < len(by_score) and by_score[stop][0] >= by_score[start][0] - tie_tolerance:
            stop += 1
        tied = by_score[start:stop]
        tied.sort(key=lambda pair: (pair[1].manifest.step, pair[0], pair[1].id), reverse=True)
        ranked.extend(entry for _, entry in tied)
        start = stop
    return ranked + unscored


def newest_first(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries by descending time of creation, then step, then id."""
    return sorted(entries, key=lambda entry: (entry.manifest.created, entry.manifest.step, entry.id), reverse=True)


def _normalise(value: float, metric: Metric) -> float:
    """Map a metric's value into [0, 1], clipped to its range, so that 1 is the better end."""
    position = min(1.0, max(0.0, (value - metric.low) / (metric.high - metric.low)))
    return position if metric.direction == "max" else 1.0 - position
