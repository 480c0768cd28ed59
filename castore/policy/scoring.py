"""The score of a checkpoint, and the order of checkpoints within one experiment. Pure.

score = weighted mean of ``1 / (1 + val_loss)`` (weight 0.7) and the mean of the declared metrics, each mapped into
[0, 1] (weight 0.3). A factor that was not measured drops out and the weights are renormalised. Tokens seen, speed and
time are recorded, never scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from castore.format.ids import ObjectId
from castore.format.manifest import Entry, Manifest, Metric
from castore.policy.order import newest_first

LOSS_WEIGHT = 0.7
METRICS_WEIGHT = 0.3


def score(manifest: Manifest) -> float | None:
    """Return the quality in [0, 1], higher is better; None if neither val_loss nor a declared metric was measured.

    >>> from castore.format.manifest import Experiment, Part
    >>> part = Part(index="ab" * 32, bytes=4096, stored_bytes=3500)
    >>> about = {"run": "ci", "step": 500, "created": "2026-01-02T03:04:05.000006Z", "parts": {"model": part}}
    >>> score(Manifest(metrics={"val_loss": 1.0}, **about))
    0.5
    >>> experiment = Experiment(metrics={"accuracy": Metric(low=0.0, high=1.0)})
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


def rank(entries: Iterable[Entry], tie_tolerance: float) -> Iterator[Entry]:
    """Yield the entries of one experiment, best first, then those without a score, newest first.

    Where scores are equal, as they are when rounding or a metric's range hides a difference, the losses and metrics
    themselves decide. Two are a tie only if every one of these differs by at most ``tie_tolerance`` of its size: of
    those that tie with the best not yet ranked the later step comes first, as training progress decides where quality
    does not. The order of ``entries`` does not matter.
    """
    unscored, keyed = [], []
    names: tuple[str, ...] | None = None
    for entry in entries:
        quality = score(entry.manifest)
        if quality is None:
            unscored.append(entry)
            continue
        names = names or ("val_loss", *sorted(entry.manifest.experiment.metrics))
        keyed.append((_best_first(entry, quality, names), entry))
    keyed.sort(key=lambda pair: pair[0])
    start = 0
    while start < len(keyed):
        stop = start + 1
        while stop < len(keyed) and _is_tie(keyed[start][1].manifest, keyed[stop][1].manifest, tie_tolerance):
            stop += 1
        # sorted() is stable: of one step the better one stays first
        yield from sorted((entry for _, entry in keyed[start:stop]), key=lambda entry: -entry.manifest.step)
        start = stop
    yield from newest_first(unscored)


def _factors(manifest: Manifest) -> dict[str, float]:
    """Return what was measured of what counts, each so that lower is better."""
    factors = {"val_loss": manifest.metrics["val_loss"]} if "val_loss" in manifest.metrics else {}
    for name, metric in sorted(manifest.experiment.metrics.items()):
        if name in manifest.metrics:
            factors[name] = manifest.metrics[name] if metric.direction == "min" else -manifest.metrics[name]
    return factors


def _best_first(entry: Entry, quality: float, names: Sequence[str]) -> tuple[float, list[float], ObjectId]:
    """Sort key: the score, then the factors of these names; what was not measured counts as the worst."""
    factors = _factors(entry.manifest)
    return -quality, [factors.get(name, math.inf) for name in names], entry.id


def _is_tie(one: Manifest, other: Manifest, tolerance: float) -> bool:
    first, second = _factors(one), _factors(other)
    return first.keys() == second.keys() and all(
        math.isclose(first[name], second[name], rel_tol=tolerance, abs_tol=0.0) for name in first
    )


def _normalise(value: float, metric: Metric) -> float:
    """Map a metric's value into [0, 1] so that 1 is the better end.

    With a range, linearly and clipped to it; without one, by ``(1 + x / (1 + |x|)) / 2``, which never clips.
    """
    if metric.low is None or metric.high is None:
        position = (1.0 + value / (1.0 + abs(value))) / 2.0
    else:
        position = min(1.0, max(0.0, (value - metric.low) / (metric.high - metric.low)))
    return position if metric.direction == "max" else 1.0 - position
