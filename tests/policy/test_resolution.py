from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import pytest
from builders import entry

from castore.errors import NothingAvailable, NothingMatches
from castore.format.manifest import Entry, Experiment, Metric, Part
from castore.policy.resolution import PartState, Requirement, Resolution, availability, resolve

EXPERIMENT = Experiment(
    model={"n_layer": 4, "n_embd": 128}, tokenizer="t" * 8, data="d" * 64, evaluation={"samples": 100}
)
LOCAL, GONE = PartState("local"), PartState("missing", "its data is not in the store")
BOTH = {name: Part(index="ab" * 32, bytes=1, stored_bytes=1) for name in ("model", "optimizer")}


def checkpoint(step: int, loss: float | None = None, experiment: Experiment = EXPERIMENT, **fields: Any) -> Entry:
    metrics = {} if loss is None else {"val_loss": loss}
    return entry(step, **{"experiment": experiment, "parts": BOTH, "metrics": metrics, **fields})


def changed(**fields: Any) -> Experiment:
    return msgspec.structs.replace(EXPERIMENT, **fields)


class Asked:
    """Answers that every part is local except those of the given steps, and remembers the questions."""

    def __init__(self, gone: Mapping[int, Iterable[str]] | None = None) -> None:
        self.gone = gone or {}
        self.steps: list[int] = []

    def __call__(self, asked: Entry) -> dict[str, PartState]:
        step = asked.manifest.step
        self.steps.append(step)
        return {name: GONE if name in self.gone.get(step, ()) else LOCAL for name in asked.manifest.parts}


def resolved(*entries: Entry, gone: Mapping[int, Iterable[str]] | None = None, **fields: Any) -> Resolution:
    return resolve(Requirement(**{"experiment": EXPERIMENT, **fields}), entries, Asked(gone))


def step_of(resolution: Resolution) -> int:
    return resolution.require().step


def test_best_goes_by_score_latest_by_time_and_an_id_by_itself() -> None:
    entries = [checkpoint(1, 2.0), checkpoint(2, 1.0), checkpoint(3, 3.0)]
    assert step_of(resolved(*entries)) == 2
    assert step_of(resolved(*entries, selector="latest")) == 3
    assert step_of(resolved(*entries, selector=entries[0].id)) == 1


@pytest.mark.parametrize(
    ("experiment", "reason"),
    [
        (changed(model={"n_layer": 6, "n_embd": 128}), "model n_layer is 6 there, 4 here"),
        (changed(model={"n_layer": 4}), "model n_embd is absent there, 128 here"),
        (changed(model={**EXPERIMENT.model, "bias": True}), "model bias is True there, absent here"),
        (changed(tokenizer="other"), "tokenizer is other there, tttttttt here"),
        (changed(data="e" * 64), "data is eeeeeeeeeeee there, dddddddddddd here"),
    ],
)
def test_a_rejection_names_the_parameter_and_both_values(experiment: Experiment, reason: str) -> None:
    resolution = resolved(checkpoint(1, 1.0, experiment))
    (rejected,) = resolution.rejected
    assert rejected.reasons == (reason,)
    assert not rejected.unavailable
    with pytest.raises(NothingMatches) as caught:
        resolution.require()
    assert reason in str(caught.value)


def test_every_parameter_that_differs_is_named() -> None:
    (rejected,) = resolved(checkpoint(1, 1.0, Experiment(model={"n_layer": 6}, tokenizer="x", data="y"))).rejected
    assert [reason.split(" is ")[0] for reason in rejected.reasons] == ["model n_embd", "model n_layer", "tokenizer",
                                                                        "data"]  # fmt: skip


def test_data_is_told_apart_by_content_not_by_name() -> None:
    moved = checkpoint(1, 1.0, config={"data_dir": "/elsewhere", "batch_size": 4})
    resolution = resolved(moved, config={"data_dir": "/here", "batch_size": 4})
    assert resolution.require().differences == ("data_dir is /elsewhere there, /here here",)
    changed_in_place = checkpoint(1, 1.0, changed(data="e" * 64), config={"data_dir": "/here"})
    assert resolved(changed_in_place, config={"data_dir": "/here"}).match is None


def test_allowing_a_data_change_turns_it_into_a_difference() -> None:
    other = checkpoint(1, 1.0, changed(data="e" * 64))
    match = resolved(other, allow_data_change=True).require()
    assert match.differences == ("data is eeeeeeeeeeee there, dddddddddddd here",)
    with pytest.raises(NothingMatches):
        resolved(checkpoint(1, 1.0, changed(data="e" * 64, tokenizer="x")), allow_data_change=True).require()


def test_what_may_differ_is_listed_with_both_values() -> None:
    there = {"batch_size": 32, "lr": 0.001, "seed": 1, "only_there": None}
    here = {"batch_size": 64, "lr": 0.002, "seed": 1, "only_here": 5}
    experiment = changed(evaluation={"samples": 50}, metrics={"acc": Metric()})
    assert resolved(checkpoint(1, 1.0, experiment, config=there), config=here).require().differences == (
        "batch_size is 32 there, 64 here",
        "lr is 0.001 there, 0.002 here",
        "only_here is absent there, 5 here",
        "only_there is None there, absent here",
        "evaluation samples is 50 there, 100 here",
        "other metrics are declared",
    )


def test_scores_of_another_evaluation_do_not_compete() -> None:
    flattered = checkpoint(9, 0.1, changed(evaluation={"samples": 1}))
    assert step_of(resolved(flattered, checkpoint(1, 3.0))) == 1
    assert step_of(resolved(flattered, checkpoint(1))) == 1  # not even with one that has no score
    assert step_of(resolved(flattered, checkpoint(1, 3.0), gone={1: ["model"]})) == 9


def test_candidates_without_data_are_passed_over_with_the_reason() -> None:
    entries = [checkpoint(1, 1.0), checkpoint(2, 2.0), checkpoint(3, 3.0)]
    resolution = resolved(*entries, gone={1: ["model", "optimizer"], 2: ["optimizer"]})
    assert step_of(resolution) == 3
    assert [(rejected.step, rejected.unavailable, rejected.reasons) for rejected in resolution.rejected] == [
        (1, True, ("its data is not in the store",)),
        (2, True, ("optimizer: its data is not in the store",)),
    ]


def test_only_the_parts_that_are_needed_must_be_there() -> None:
    candidate = checkpoint(1, 1.0)
    match = resolved(candidate, parts=("model",), gone={1: ["optimizer"]}).require()
    assert (match.step, match.availability) == (1, "weights-only")
    assert resolved(candidate, parts=(), gone={1: ["model", "optimizer"]}).require().availability == "history"
    (rejected,) = resolved(candidate, parts=("model", "ema")).rejected
    assert rejected.reasons == ("ema: this checkpoint has no such part",)


@pytest.mark.parametrize("selector", ["best", "latest"])
def test_nothing_is_asked_about_incompatible_candidates_or_beyond_the_match(selector: str) -> None:
    asked = Asked({3: ["model"]})
    entries = [checkpoint(1, 3.0), checkpoint(2, 2.0), checkpoint(3, 1.0), checkpoint(4, 0.5, changed(tokenizer="x"))]
    assert step_of(resolve(Requirement(selector=selector, experiment=EXPERIMENT), entries, asked)) == 2
    assert asked.steps == [3, 2]


def test_no_checkpoint_at_all_says_how_to_make_one() -> None:
    with pytest.raises(NothingMatches, match="no checkpoint yet: `castore train`"):
        resolved().require()


def test_compatible_checkpoints_without_data_are_another_error_than_none() -> None:
    other = checkpoint(5, 1.0, changed(tokenizer="x"))
    with pytest.raises(NothingMatches, match="none of 1 checkpoint"):
        resolved(other).require()
    with pytest.raises(NothingAvailable, match=r"1 compatible checkpoint.*\n.*step 1.*its data is not in the store"):
        resolved(other, checkpoint(1, 1.0), gone={1: ["model"]}).require()


def test_a_long_list_of_rejections_is_cut() -> None:
    with pytest.raises(NothingMatches) as caught:
        resolved(*(checkpoint(step, 1.0, Experiment()) for step in range(25))).require()
    assert str(caught.value).count("\n") == 11
    assert "and 15 more" in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"model": LOCAL, "optimizer": PartState("remote")}, "full"),
        ({"model": PartState("remote"), "optimizer": GONE}, "weights-only"),
        ({"model": GONE, "optimizer": LOCAL}, "history"),
        ({"optimizer": GONE}, "history"),
    ],
)
def test_availability_is_everything_or_the_weights_or_history(parts: dict[str, PartState], expected: str) -> None:
    assert availability(parts) == expected
