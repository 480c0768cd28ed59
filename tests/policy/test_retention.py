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
    sources = [Source(f"branch {i}", one) for i, one in enumerate(others)]
    found = decide(Source("here", entries), sources, Policy(**options), sizes, now=NOW, **named)
    assert len(found) == len({one.id for many in (entries, *others) for one in many})
    return {one.entry.manifest.step: one for one in found}


def kept(decisions: dict[int, Decision]) -> dict[int, str]:
    """Step -> first letters of the parts that are kept."""
    return {step: "".join(part[0] for part in one.parts) for step, one in sorted(decisions.items()) if one.parts}


RUN = [checkpoint(step, loss) for step, loss in enumerate([5.0, 3.0, 1.0, 2.0, 4.0], start=1)]


def test_the_best_and_the_newest_stay_and_their_optimizers_for_fewer_still() -> None:
    found = decided(RUN, keep=3, keep_latest=1, keep_optimizer=1)
    assert kept(found) == {2: "m", 3: "mot", 4: "m", 5: "mot"}
    assert found[3].reasons == ("the best",)
    assert found[4].reasons == ("number 2",)
    assert found[5].reasons == ("the newest",)
    assert found[1].reasons == ("number 5 of its experiment, 3 are kept",)


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
    found = decided(RUN, keep=0, keep_latest=0, pinned={RUN[0].id}, in_use={RUN[1].id})
    assert kept(found) == {1: "mot", 2: "mot"}
    assert (found[1].reasons, found[2].reasons) == (("pinned",), ("in use",))


def test_each_line_has_its_own_best() -> None:
    other = [checkpoint(step + 10, 9.0 + step, experiment=Experiment(data="other")) for step in range(3)]
    assert kept(decided([*RUN, *other], keep=1, keep_latest=0)) == {3: "mot", 10: "mot"}


def test_the_best_is_never_let_go_for_size_however_small_it_must_be() -> None:
    found = decided(RUN, keep=5, keep_latest=1, keep_optimizer=1, max_size=0, pinned={RUN[0].id})
    assert kept(found) == {1: "mot", 3: "mot", 5: "mot"}
    assert found[4].reasons == ("evicted to fit max_size",)


def test_size_lets_go_worst_first_and_no_more_than_it_must() -> None:
    # 10 for each model, 40 for the rest of the best and the newest
    assert kept(decided(RUN, keep=5, keep_optimizer=1, max_size=130)) == {1: "m", 2: "m", 3: "mot", 4: "m", 5: "mot"}
    assert kept(decided(RUN, keep=5, keep_optimizer=1, max_size=129)) == {2: "m", 3: "mot", 4: "m", 5: "mot"}
    assert kept(decided(RUN, keep=5, keep_optimizer=1, max_size=119)) == {3: "mot", 4: "m", 5: "mot"}


def test_what_others_share_or_what_is_gone_already_is_not_let_go_for_size() -> None:
    def shared(one: Entry, _part: str) -> Mapping[ObjectId, int]:
        return {} if one.manifest.step == 1 else {ObjectId("ab" * 32): 1000}

    found = decide(Source("here", RUN), [], Policy(keep=5, max_size=10), shared, now=NOW)
    assert all(one.parts for one in found)


def test_worst_first_holds_for_checkpoints_that_share_all_they_have() -> None:
    def shared(one: Entry, part: str) -> Mapping[ObjectId, int]:
        return {hash_bytes(b"same" if one.manifest.step < 4 else one.id.encode()): 100} if part == "model" else {}

    entries = [checkpoint(step, loss) for step, loss in enumerate([9.0, 8.0, 7.0, 3.0, 2.0], start=1)]
    found = decide(Source("here", entries), [], Policy(keep=5, keep_latest=0, max_size=250), shared, now=NOW)
    assert sorted(one.entry.manifest.step for one in found if one.parts) == [4, 5]


def test_a_foreign_manifest_goes_before_any_of_the_work_tree() -> None:
    claims = [checkpoint(20, 0.1), checkpoint(21, 0.2), checkpoint(22, 0.3)]
    found = decided(RUN, claims, keep=5, keep_optimizer=0, max_size=0)
    assert kept(found) == {3: "mot", 5: "m"}
    found = decided(RUN, claims, keep=5, keep_optimizer=0, max_size=159)
    assert kept(found) == {1: "m", 2: "m", 3: "mot", 4: "m", 5: "m", 20: "mot", 21: "m"}


def dataset(step: int, hours: float) -> Entry:
    created = (NOW - timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return entry(step, kind="dataset", created=created)


def test_prepared_data_stays_until_it_is_too_old() -> None:
    found = decided([dataset(1, 1), dataset(2, 167), dataset(3, 169)])
    assert kept(found) == {1: "m", 2: "m"}
    assert found[1].reasons == ("prepared data, 1 h old of 168 h",)
    assert found[3].reasons == ("prepared data older than 168 h",)


def test_prepared_data_goes_for_size_before_a_checkpoint_does() -> None:
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


def made(found: list[tuple[int, float, str]]) -> list[Entry]:
    return list(
        {
            one.id: one for one in (checkpoint(*parts[:2], experiment=Experiment(data=parts[2])) for parts in found)
        }.values()
    )


@given(runs, st.lists(runs, max_size=3), policies)
def test_another_branch_never_makes_anything_go(
    own: list[tuple[int, float, str]], others: list[list[tuple[int, float, str]]], policy: dict[str, int]
) -> None:
    def parts(sources: list[list[Entry]]) -> dict[ObjectId, set[str]]:
        named = [Source(str(i), one) for i, one in enumerate(sources)]
        found = decide(named[0], named[1:], Policy(**policy), sizes, now=NOW)
        return {one.entry.id: set(one.parts) for one in found}

    sources = [made(own), *map(made, others)]
    for count in range(1, len(sources)):
        fewer, more = parts(sources[:count]), parts(sources[: count + 1])
        assert all(more[own_id] >= fewer[own_id] for own_id in fewer)


@given(runs, policies, st.integers(0, 300))
def test_a_plan_is_what_its_rules_say(own: list[tuple[int, float, str]], policy: dict[str, int], max_size: int) -> None:
    entries = made(own)
    free = decide(Source("", entries), [], Policy(**policy), sizes, now=NOW)
    tight = decide(Source("", entries), [], Policy(**policy, max_size=max_size), sizes, now=NOW)
    for experiment in {one.manifest.experiment.data for one in entries}:
        mine = [one for one in free if one.entry.manifest.experiment.data == experiment]
        held = [one for one in mine if one.parts]
        assert len(held) <= policy["keep"] + policy["keep_latest"]
        assert len([one for one in held if "optimizer" in one.parts]) <= policy["keep_optimizer"] + 1
        if policy["keep"]:
            best = max(score(one.entry.manifest) or 0 for one in mine)
            assert any(score(one.entry.manifest) == best and len(one.parts) == 3 for one in tight if one.parts)
    assert all(one.reasons and all(one.reasons) for one in (*free, *tight))
    assert {one.entry.id for one in tight if one.parts} <= {one.entry.id for one in free if one.parts}
