from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from builders import entry
from hypothesis import given
from hypothesis import strategies as st

from castore.format.ids import ObjectId, hash_bytes
from castore.format.manifest import Entry, Experiment, Part
from castore.policy.retention import Decision, Policy, Source, decide
from castore.policy.scoring import score

NOW = datetime(2026, 1, 2, 4, tzinfo=UTC)
PARTS = {
    name: Part(index=ObjectId(name[0].encode().hex() * 32), bytes=1, stored_bytes=1)
    for name in ("model", "optimizer", "trainer")
}


def checkpoint(step: int, loss: float, **fields: Any) -> Entry:
    return entry(step, metrics={"val_loss": loss}, **{"parts": PARTS, **fields})


def sizes(entry: Entry, part: str) -> Mapping[ObjectId, int]:
    """Ten bytes for a model, twenty for the rest, none of them shared."""
    return {hash_bytes(f"{entry.id}{part}".encode()): 10 if part == "model" else 20}


def decided(entries: list[Entry], *others: list[Entry], **options: Any) -> dict[int, Decision]:
    """The decisions by step."""
    named = {name: options.pop(name) for name in ("pinned", "in_use") if name in options}
    sources = [Source(f"branch {i}", foreign) for i, foreign in enumerate(others)]
    decisions = decide(Source("here", entries), sources, Policy(**options), sizes, now=NOW, **named)
    assert len(decisions) == len({candidate.id for source in (entries, *others) for candidate in source})
    return {decision.entry.manifest.step: decision for decision in decisions}


def kept(decisions: dict[int, Decision]) -> dict[int, str]:
    """Step -> first letters of the parts that are kept."""
    return {
        step: "".join(part[0] for part in decision.parts)
        for step, decision in sorted(decisions.items())
        if decision.parts
    }


RUN = [checkpoint(step, loss) for step, loss in enumerate([5.0, 3.0, 1.0, 2.0, 4.0], start=1)]


def test_the_best_and_the_newest_stay_and_their_optimizers_for_fewer_still() -> None:
    decisions = decided(RUN, keep=3, keep_latest=1, keep_optimizer=1)
    assert kept(decisions) == {2: "m", 3: "mot", 4: "m", 5: "mot"}
    assert decisions[3].reasons == ("the best",)
    assert decisions[4].reasons == ("number 2 by score",)
    assert decisions[5].reasons == ("the newest",)
    assert decisions[1].reasons == ("number 5 by score in its experiment, of which 3 are kept",)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"keep": 1, "keep_latest": 0}, {3: "mot"}, id="the best alone"),
        pytest.param({"keep": 0, "keep_latest": 1}, {5: "mot"}, id="the newest alone"),
        pytest.param({"keep": 0, "keep_latest": 0}, {}, id="nothing"),
        pytest.param({"keep": 1, "keep_latest": 2, "keep_optimizer": 0}, {3: "mot", 4: "m", 5: "m"}, id="no optimizer"),
        pytest.param({"keep": 99, "keep_optimizer": 99}, dict.fromkeys(range(1, 6), "mot"), id="all"),
        pytest.param({"keep": 2, "keep_optimizer": 2}, {3: "mot", 4: "mot", 5: "mot"}, id="two of those kept"),
    ],
)
def test_each_number_means_what_it_says(options: dict[str, int], expected: dict[int, str]) -> None:
    assert kept(decided(RUN, **options)) == expected


def test_pinned_ones_and_those_in_use_stay_whole() -> None:
    decisions = decided(RUN, keep=0, keep_latest=0, pinned={RUN[0].id}, in_use={RUN[1].id})
    assert kept(decisions) == {1: "mot", 2: "mot"}
    assert (decisions[1].reasons, decisions[2].reasons) == (("pinned",), ("in use",))


def test_each_experiment_has_its_own_best() -> None:
    other = [checkpoint(step + 10, 9.0 + step, experiment=Experiment(data="other")) for step in range(3)]
    assert kept(decided([*RUN, *other], keep=1, keep_latest=0)) == {3: "mot", 10: "mot"}


def test_the_best_is_never_evicted_however_small_max_size_is() -> None:
    decisions = decided(RUN, keep=5, keep_latest=1, keep_optimizer=1, max_size=0, pinned={RUN[0].id})
    assert kept(decisions) == {1: "mot", 3: "mot", 5: "mot"}
    assert decisions[4].reasons == ("evicted to fit max_size",)


def test_max_size_evicts_the_worst_first_and_no_more_than_needed() -> None:
    # 10 for each model, 40 for the rest of the best and the newest
    assert kept(decided(RUN, keep=5, keep_optimizer=1, max_size=130)) == {1: "m", 2: "m", 3: "mot", 4: "m", 5: "mot"}
    assert kept(decided(RUN, keep=5, keep_optimizer=1, max_size=129)) == {2: "m", 3: "mot", 4: "m", 5: "mot"}
    assert kept(decided(RUN, keep=5, keep_optimizer=1, max_size=119)) == {3: "mot", 4: "m", 5: "mot"}


def test_a_checkpoint_whose_eviction_frees_nothing_is_not_evicted() -> None:
    def shared(entry: Entry, _part: str) -> Mapping[ObjectId, int]:
        return {} if entry.manifest.step == 1 else {ObjectId("ab" * 32): 1000}

    decisions = decide(Source("here", RUN), [], Policy(keep=5, max_size=10), shared, now=NOW)
    assert all(decision.parts for decision in decisions)


def test_worst_first_holds_for_checkpoints_that_share_all_they_have() -> None:
    def shared(entry: Entry, part: str) -> Mapping[ObjectId, int]:
        return {hash_bytes(b"same" if entry.manifest.step < 4 else entry.id.encode()): 100} if part == "model" else {}

    entries = [checkpoint(step, loss) for step, loss in enumerate([9.0, 8.0, 7.0, 3.0, 2.0], start=1)]
    decisions = decide(Source("here", entries), [], Policy(keep=5, keep_latest=0, max_size=250), shared, now=NOW)
    assert sorted(decision.entry.manifest.step for decision in decisions if decision.parts) == [4, 5]


def test_manifests_of_other_branches_are_evicted_before_any_of_the_work_tree() -> None:
    claims = [checkpoint(20, 0.1), checkpoint(21, 0.2), checkpoint(22, 0.3)]
    decisions = decided(RUN, claims, keep=5, keep_optimizer=0, max_size=0)
    assert kept(decisions) == {3: "mot", 5: "m"}
    decisions = decided(RUN, claims, keep=5, keep_optimizer=0, max_size=159)
    assert kept(decisions) == {1: "m", 2: "m", 3: "mot", 4: "m", 5: "m", 20: "mot", 21: "m"}


def dataset(step: int, hours: float) -> Entry:
    created = (NOW - timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return entry(step, kind="dataset", created=created)


def test_prepared_data_stays_until_it_is_too_old() -> None:
    decisions = decided([dataset(1, 1), dataset(2, 167), dataset(3, 169)])
    assert kept(decisions) == {1: "m", 2: "m"}
    assert decisions[1].reasons == ("prepared data, 1 h old of 168 h",)
    assert decisions[3].reasons == ("prepared data older than 168 h",)


def test_prepared_data_is_evicted_before_any_checkpoint() -> None:
    assert kept(decided([*RUN, dataset(9, 1)], keep=5, keep_optimizer=0, max_size=90)) == dict.fromkeys(
        (1, 2, 4, 5), "m"
    ) | {3: "mot"}


def test_added_files_stay_until_they_are_forgotten() -> None:
    assert kept(decided([entry(1, kind="files")], keep=0, max_size=0)) == {1: "m"}


runs = st.lists(
    st.tuples(st.integers(1, 60), st.sampled_from([0.5, 1.0, 1.5, 2.0]), st.sampled_from("ab")), max_size=14
)
policies = st.fixed_dictionaries(
    {"keep": st.integers(0, 5), "keep_latest": st.integers(0, 3), "keep_optimizer": st.integers(0, 4)}
)


def checkpoints(described: list[tuple[int, float, str]]) -> list[Entry]:
    """A checkpoint for each distinct (step, loss, data)."""
    entries = [checkpoint(step, loss, experiment=Experiment(data=data)) for step, loss, data in described]
    return list({entry.id: entry for entry in entries}.values())


@given(runs, st.lists(runs, max_size=3), policies)
def test_another_branch_never_causes_an_eviction(
    own_runs: list[tuple[int, float, str]], other_runs: list[list[tuple[int, float, str]]], policy: dict[str, int]
) -> None:
    def parts(sources: list[list[Entry]]) -> dict[ObjectId, set[str]]:
        named_sources = [Source(str(i), entries) for i, entries in enumerate(sources)]
        decisions = decide(named_sources[0], named_sources[1:], Policy(**policy), sizes, now=NOW)
        return {decision.entry.id: set(decision.parts) for decision in decisions}

    sources = [checkpoints(own_runs), *map(checkpoints, other_runs)]
    for count in range(1, len(sources)):
        fewer, more = parts(sources[:count]), parts(sources[: count + 1])
        assert all(more[checkpoint_id] >= fewer[checkpoint_id] for checkpoint_id in fewer)


@given(runs, policies, st.integers(0, 300))
def test_a_plan_is_what_its_rules_say(
    own_runs: list[tuple[int, float, str]], policy: dict[str, int], max_size: int
) -> None:
    entries = checkpoints(own_runs)
    free = decide(Source("", entries), [], Policy(**policy), sizes, now=NOW)
    tight = decide(Source("", entries), [], Policy(**policy, max_size=max_size), sizes, now=NOW)
    for experiment in {candidate.manifest.experiment.data for candidate in entries}:
        comparable = [decision for decision in free if decision.entry.manifest.experiment.data == experiment]
        held = [decision for decision in comparable if decision.parts]
        assert len(held) <= policy["keep"] + policy["keep_latest"]
        assert len([decision for decision in held if "optimizer" in decision.parts]) <= policy["keep_optimizer"] + 1
        if policy["keep"]:
            best = max(score(decision.entry.manifest) or 0 for decision in comparable)
            assert any(
                score(decision.entry.manifest) == best and len(decision.parts) == 3
                for decision in tight
                if decision.parts
            )
    assert all(decision.reasons and all(decision.reasons) for decision in (*free, *tight))
    assert {decision.entry.id for decision in tight if decision.parts} <= {
        decision.entry.id for decision in free if decision.parts
    }
