"""How good a checkpoint is, and in what order checkpoints of one experiment come. Pure.

score = weighted mean of ``1 / (1 + val_loss)`` (weight 0.7) and the mean of the declared metrics, each mapped into
[0, 1] (weight 0.3). A factor that was not measured drops out and the weights are renormalised. Nothing else counts:
tokens seen, speed and time are recorded, never scored.
"""

from __future__ import annotations

from collections.abc import Iterable

from castore.format.manifest import Entry, Manifest, Metric

LOSS_WEIGHT = 0.7
METRICS_WEIGHT = 0.3


def score(manifest: Manifest) -> float | None:
    """Quality in [0, 1], higher is better; None when nothing that counts was measured."""
    factors = []
    if "val_loss" in manifest.metrics:
        factors.append((LOSS_WEIGHT, 1.0 / (1.0 + manifest.metrics["val_loss"])))
    scored = [
        _unit(manifest.metrics[name], metric)
        for name, metric in manifest.experiment.metrics.items()
        if name in manifest.metrics
    ]
    if scored:
        factors.append((METRICS_WEIGHT, sum(scored) / len(scored)))
    if not factors:
        return None
    return sum(weight * value for weight, value in factors) / sum(weight for weight, _ in factors)


def rank(entries: Iterable[Entry], tie_tolerance: float) -> list[Entry]:
    """Entries of one experiment, best first; those without a score last, newest first.

    Scores within ``tie_tolerance`` of the best one left are a tie, which the later step wins: training progress
    decides where quality doesn't. The order depends on the entries alone, not on how they were given.
    """
    scored = [(score(entry.manifest), entry) for entry in entries]
    unscored = newest_first(entry for value, entry in scored if value is None)
    left = sorted(
        ((value, entry) for value, entry in scored if value is not None),
        key=lambda pair: (pair[0], pair[1].id),
        reverse=True,
    )
    ranked: list[Entry] = []
    start = 0
    while start < len(left):
        stop = start
        while stop < len(left) and left[stop][0] >= left[start][0] - tie_tolerance:
            stop += 1
        tied = left[start:stop]
        tied.sort(key=lambda pair: (pair[1].manifest.step, pair[0], pair[1].id), reverse=True)
        ranked.extend(entry for _, entry in tied)
        start = stop
    return ranked + unscored


def newest_first(entries: Iterable[Entry]) -> list[Entry]:
    """By time of creation, then step, then id."""
    return sorted(entries, key=lambda entry: (entry.manifest.created, entry.manifest.step, entry.id), reverse=True)


def _unit(value: float, metric: Metric) -> float:
    position = min(1.0, max(0.0, (value - metric.low) / (metric.high - metric.low)))
    return position if metric.direction == "max" else 1.0 - position
