from __future__ import annotations

import math
import random
from typing import Any

import pytest
from builders import entry, manifest
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import InvalidManifest
from castore.format.manifest import Experiment, Metric, encode
from castore.policy.order import newest_first
from castore.policy.scoring import rank, score

UNIT = Metric(low=0.0, high=1.0)
ACCURACY = Experiment(metrics={"acc": UNIT})
finite = st.floats(allow_nan=False, allow_infinity=False)
losses = st.floats(0, 1e300)
experiments = st.builds(
    lambda direction, low, width: Experiment(metrics={"acc": Metric(direction, low, low + width)}),
    st.sampled_from(["max", "min"]),
    st.floats(-100, 100),
    st.floats(0.01, 100),
)


@pytest.mark.parametrize(
    ("metrics", "experiment", "expected"),
    [
        pytest.param({"val_loss": 1.0}, Experiment(), 0.5, id="the loss alone"),
        pytest.param({"val_loss": 0.0}, Experiment(), 1.0, id="a loss of zero"),
        pytest.param({"acc": 0.25}, ACCURACY, 0.25, id="a metric alone"),
        pytest.param({"val_loss": 3.0, "acc": 0.5}, ACCURACY, 0.7 * 0.25 + 0.3 * 0.5, id="both"),
        pytest.param({"val_loss": 3.0}, ACCURACY, 0.25, id="a declared metric that was not measured"),
        pytest.param({"val_loss": 3.0, "acc": 0.5}, Experiment(), 0.25, id="a metric that was not declared"),
        pytest.param({"ppl": 40.0}, Experiment(metrics={"ppl": Metric("min", 0, 100)}), 0.6, id="less is better"),
        pytest.param({"ppl": 900.0}, Experiment(metrics={"ppl": Metric("min", 0, 100)}), 0.0, id="beyond its range"),
        pytest.param({"acc": -9.0}, ACCURACY, 0.0, id="below its range"),
        pytest.param(
            {"a": 1.0, "b": 0.0},
            Experiment(metrics={"a": UNIT, "b": UNIT, "c": UNIT}),
            0.5,
            id="mean of metrics",
        ),
        pytest.param({"bleu": 3.0}, Experiment(metrics={"bleu": Metric()}), 0.875, id="without a range"),
        pytest.param(
            {"ppl": 3.0}, Experiment(metrics={"ppl": Metric("min")}), 0.125, id="without a range, less is better"
        ),
        pytest.param({}, ACCURACY, None, id="nothing measured"),
        pytest.param({"tokens_processed": 1e9}, Experiment(), None, id="nothing that counts"),
    ],
)
def test_the_score_is_the_weighted_mean_of_what_was_measured(
    metrics: dict[str, float], experiment: Experiment, expected: float | None
) -> None:
    assert score(manifest(metrics=metrics, experiment=experiment)) == pytest.approx(expected, abs=1e-15)


@given(losses, losses, finite, experiments)
def test_a_higher_loss_never_raises_the_score(
    first: float, second: float, accuracy: float, experiment: Experiment
) -> None:
    low, high = sorted((first, second))
    for metrics in ({}, {"acc": accuracy}):
        better = score(manifest(metrics={"val_loss": low, **metrics}, experiment=experiment))
        worse = score(manifest(metrics={"val_loss": high, **metrics}, experiment=experiment))
        assert better is not None
        assert worse is not None
        assert 0.0 <= worse <= better <= 1.0


@given(losses, st.dictionaries(st.sampled_from(["tokens_processed", "tokens_per_s", "train_loss", "epoch"]), finite))
def test_tokens_speed_and_progress_never_count(loss: float, others: dict[str, float]) -> None:
    plain = manifest(1, metrics={"val_loss": loss})
    decorated = manifest(999, metrics={"val_loss": loss, **others}, info=others, config=others)
    assert score(decorated) == score(plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["val_loss", "acc"])
def test_numbers_that_are_not_finite_are_refused_before_they_can_be_scored(name: str, value: float) -> None:
    with pytest.raises(InvalidManifest, match=name):
        encode(manifest(metrics={name: value}, experiment=ACCURACY))


def scored(step: int, value: float) -> Any:
    return entry(step, metrics={"acc": value}, experiment=ACCURACY)


def test_the_best_comes_first_and_a_near_tie_goes_to_the_later_step() -> None:
    entries = [scored(100, 0.5), scored(200, 0.9), scored(300, 0.8999), scored(400, 0.89), scored(50, 0.9)]
    assert [ranked_entry.manifest.step for ranked_entry in rank(entries, 0.001)] == [300, 200, 50, 400, 100]
    assert [ranked_entry.manifest.step for ranked_entry in rank(entries, 0.0)] == [200, 50, 300, 400, 100]


def test_near_ties_do_not_add_up_to_a_chain() -> None:
    entries = [scored(step, 0.9 - step * 0.0009) for step in range(5)]
    assert [ranked_entry.manifest.step for ranked_entry in rank(entries, 0.00101)] == [1, 0, 3, 2, 4]


def test_what_has_no_score_comes_last_and_newest_first() -> None:
    entries = [entry(7), entry(9), scored(1, 0.0), entry(8)]
    assert [ranked_entry.manifest.step for ranked_entry in rank(entries, 0.0)] == [1, 9, 8, 7]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, 0.1, 0.5, 0.5001, 0.5002, 0.9])), max_size=8),
    st.sampled_from([0.0, 0.00015, 0.5]),
    st.randoms(use_true_random=False),
)
def test_the_order_depends_on_the_entries_alone(
    steps_and_values: list[tuple[int, float | None]], tolerance: float, rng: random.Random
) -> None:
    entries = [entry(step) if value is None else scored(step, value) for step, value in steps_and_values]
    shuffled = rng.sample(entries, len(entries))
    assert list(rank(entries, tolerance)) == list(rank(shuffled, tolerance))
    assert newest_first(entries) == newest_first(shuffled)


# -- the order is exact whatever the scale -----------------------------------------------------------------------------


def best(*metrics: dict[str, float], experiment: Experiment = Experiment(), tolerance: float = 1e-4) -> int:  # noqa: B008
    """The place of the best of checkpoints with these metrics, the later ones of which have trained less."""
    entries = [entry(100 - i, metrics=values, experiment=experiment) for i, values in enumerate(metrics)]
    return 100 - next(rank(entries, tolerance)).manifest.step


def test_the_best_loss_wins_whatever_its_scale() -> None:
    assert best({"val_loss": 9e-5}, {"val_loss": 1e-5}) == 1
    assert best({"val_loss": 1e6}, {"val_loss": 1e4}) == 1
    assert best({"val_loss": 1e-17}, {"val_loss": 1e-18}) == 1  # whose scores are equal: both 1
    assert best({"val_loss": 1e300}, {"val_loss": 1e299}) == 1
    assert best({"val_loss": 2.0}, {"val_loss": 1.9999}) == 0  # a true near-tie, which training progress decides
    assert best({"val_loss": 2.0}, {"val_loss": 1.9997}) == 1


def test_a_metric_without_a_range_is_ranked_and_not_clipped() -> None:
    ppl = Experiment(metrics={"ppl": Metric("min")})
    assert best({"ppl": 300.0}, {"ppl": 12.0}, experiment=ppl) == 1
    assert best({"ppl": 1e15}, {"ppl": 1e12}, experiment=ppl) == 1
    bleu = Experiment(metrics={"bleu": "max"})  # type: ignore[dict-item]
    assert best({"bleu": 20.0}, {"bleu": 40.0}, experiment=bleu) == 1
    assert best({"bleu": -3.0}, {"bleu": -2.0}, experiment=bleu) == 1


def test_beyond_a_range_the_metric_itself_decides() -> None:
    ranged = Experiment(metrics={"ppl": Metric("min", 1.0, 10.0)})
    assert best({"ppl": 300.0}, {"ppl": 12.0}, experiment=ranged) == 1


def test_a_difference_in_one_factor_alone_is_no_tie() -> None:
    assert best({"val_loss": 2.0, "acc": 0.5}, {"val_loss": 2.0, "acc": 0.6}, experiment=ACCURACY) == 1
    assert best({"val_loss": 2.0, "acc": 0.5}, {"val_loss": 2.0, "acc": 0.500001}, experiment=ACCURACY) == 0


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=9), st.floats(1e-5, 1e5))
def test_ranking_by_the_loss_alone_is_exact_and_knows_no_scale(losses: list[float], factor: float) -> None:
    scaled = [loss * factor for loss in losses]
    for values in (losses, scaled):
        ranked = list(rank([entry(i, metrics={"val_loss": value}) for i, value in enumerate(values)], 0.0))
        assert [found.manifest.metrics["val_loss"] for found in ranked] == sorted(values)


@given(st.lists(st.tuples(losses, st.none() | finite), min_size=2, max_size=8), st.sampled_from(["max", "min"]))
def test_what_is_better_in_every_factor_is_never_ranked_lower(pairs: list[Any], direction: Any) -> None:
    experiment = Experiment(metrics={"m": Metric(direction)})
    entries = [
        entry(i, metrics={"val_loss": loss, **({} if value is None else {"m": value})}, experiment=experiment)
        for i, (loss, value) in enumerate(pairs)
    ]
    ranked = [found.manifest for found in rank(entries, 0.0)]
    sign = 1 if direction == "min" else -1
    for i, better in enumerate(ranked):
        for worse in ranked[i + 1 :]:
            if "m" in better.metrics and "m" in worse.metrics:
                is_worse = [
                    better.metrics["val_loss"] > worse.metrics["val_loss"],
                    sign * better.metrics["m"] > sign * worse.metrics["m"],
                ]
                assert not all(is_worse)
