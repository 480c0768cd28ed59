"""Lineage first, then the step within a run, then time."""

from __future__ import annotations

import random
from typing import Any

from builders import entry
from hypothesis import given
from hypothesis import strategies as st

from castore.format.manifest import Entry
from castore.policy.order import newest_first


def at(hour: int, minute: int = 0) -> str:
    return f"2026-01-{hour // 24 + 1:02}T{hour % 24:02}:{minute:02}:00.000000Z"


def steps(entries: list[Entry]) -> list[int]:
    return [found.manifest.step for found in newest_first(entries)]


def test_a_descendant_is_newer_than_its_ancestor_whatever_clocks_said() -> None:
    first = entry(100, created=at(23))  # a clock that was ahead
    second = entry(200, created=at(1), parent=first.id)
    third = entry(300, created=at(2), parent=second.id)
    assert steps([first, second, third]) == [300, 200, 100]


def test_a_clock_that_went_back_changes_nothing() -> None:
    first = entry(100, created=at(5))
    second = entry(200, created=at(4), parent=first.id)
    assert steps([second, first]) == [200, 100]


def test_a_descendant_in_another_run_with_fewer_steps_is_newer_too() -> None:
    first = entry(500, created=at(9), run="a")
    second = entry(10, created=at(1), run="b", parent=first.id)
    assert steps([first, second]) == [10, 500]


def test_an_ancestor_ahead_of_time_leads_nobody_of_another_run() -> None:
    first = entry(100, created="2099-01-01T00:00:00.000000Z", run="a")
    second = entry(200, created=at(2), run="a", parent=first.id)
    other = entry(300, created=at(3), run="b")
    assert steps([first, second, other]) == [300, 200, 100]


def test_of_one_run_the_later_step_is_newer_and_between_runs_the_later_time() -> None:
    early, late = entry(100, created=at(9), run="a"), entry(200, created=at(8), run="a")
    assert steps([early, late]) == [200, 100]
    assert steps([entry(5, created=at(2), run="b"), entry(900, created=at(1), run="a")]) == [5, 900]


def test_other_kinds_of_the_same_name_are_other_runs() -> None:
    data = entry(0, created=at(5), kind="files", run="a")
    assert steps([data, entry(7, created=at(4), run="a")]) == [0, 7]


Node = tuple[int, int, int, int]  # parent (an earlier one, or none), run, step, hour


@given(
    st.lists(st.tuples(st.integers(-1, 20), st.integers(0, 2), st.integers(0, 5), st.integers(0, 40)), max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_history_has_one_order_in_which_children_come_before_parents(nodes: list[Node], rng: Any) -> None:
    entries: list[Entry] = []
    for number, (parent, run, step, hour) in enumerate(nodes):
        known = entries[parent].id if 0 <= parent < number else None
        entries.append(entry(step, created=at(hour, number), run="abc"[run], parent=known))
    entries = list({found.id: found for found in entries}.values())
    ordered = newest_first(entries)
    assert sorted(found.id for found in ordered) == sorted(found.id for found in entries)
    place = {found.id: i for i, found in enumerate(ordered)}
    assert all(place[found.id] < place.get(found.manifest.parent, len(place)) for found in entries)
    assert newest_first(rng.sample(entries, len(entries))) == ordered


def test_without_lineage_steps_of_a_run_are_in_order_whatever_the_clocks() -> None:
    rng = random.Random(3)
    entries = [entry(step, created=at(rng.randrange(48), step % 60), run="ab"[step % 2]) for step in range(60)]
    for run in "ab":
        found = [one.manifest.step for one in newest_first(entries) if one.manifest.run == run]
        assert found == sorted(found, reverse=True)
