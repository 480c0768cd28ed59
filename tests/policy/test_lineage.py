from __future__ import annotations

import itertools
import math
import random

import pytest
from builders import entry
from hypothesis import given
from hypothesis import strategies as st

from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.policy.lineage import ancestors, branches, draw, lanes
from castore.policy.order import newest_first


def drawn(entries: list[Entry]) -> list[str]:
    return [f"{graph} {entry.manifest.step}" if entry else graph for graph, entry in draw(newest_first(entries))]


def grown(parents: list[int | None]) -> list[Entry]:
    """Checkpoint i, of step i, was resumed from checkpoint ``parents[i]``, one before it."""
    entries: list[Entry] = []
    for step, parent in enumerate(parents):
        entries.append(entry(step, parent=None if parent is None else entries[parent].id))
    return entries


def steps(entries: list[Entry]) -> list[list[int]]:
    return [[entry.manifest.step for entry in path] for path in branches(newest_first(entries))]


def test_a_run_that_went_back_has_a_path_for_each_branch() -> None:
    first = [entry(step, created=f"2026-01-0{step}T00:00:00.000000Z") for step in (1,)]
    for step, back, day in ((2, 0, 2), (3, 1, 3), (2, 0, 4), (3, 3, 5)):
        first.append(entry(step, parent=first[back].id, created=f"2026-01-0{day}T00:00:00.000000Z"))
    assert steps(first) == [[1, 2, 3], [1, 2, 3]]
    assert branches(newest_first(first))[0][1:] == first[3:]


def test_entries_without_a_parent_follow_each_other_until_a_fresh_start() -> None:
    days = [entry(step, created=f"2026-01-0{day}T00:00:00.000000Z") for day, step in enumerate((1, 2, 3, 1, 2), 1)]
    assert steps(days) == [[1, 2, 3], [1, 2]]


@given(st.lists(st.integers(0, 8), min_size=1, max_size=25))
def test_every_entry_is_on_one_path_and_steps_rise(choices: list[int]) -> None:
    entries = grown([None, *(min(choice, i) for i, choice in enumerate(choices))])
    paths = branches(newest_first(entries))
    assert all(a.manifest.step < b.manifest.step for path in paths for a, b in itertools.pairwise(path))
    own = [entry.id for number, path in enumerate(paths) for entry in (path if not number else path[1:])]
    assert sorted(own) == sorted(entry.id for entry in entries)


def test_a_chain_is_one_column() -> None:
    assert drawn(grown([None, 0, 1])) == ["* 2", "* 1", "* 0"]


def test_branches_meet_at_their_parent_with_the_longest_first() -> None:
    assert drawn(grown([None, 0, 1, 2, 0, 1])) == [
        "* 3",
        "* 2",
        "| * 5",
        "|/",
        "* 1",
        "| * 4",
        "|/",
        "* 0",
    ]


def test_a_branch_on_a_branch() -> None:
    assert drawn(grown([None, 0, 1, 2, 3, 0, 5, 5])) == [
        "* 4",
        "* 3",
        "* 2",
        "* 1",
        "| * 7",
        "| | * 6",
        "| |/",
        "| * 5",
        "|/",
        "* 0",
    ]


def test_a_checkpoint_without_a_known_parent_is_a_root_newest_first() -> None:
    entries = grown([None, 0, None, 2])
    assert drawn(entries) == ["* 3", "* 2", "* 1", "* 0"]
    assert drawn([entries[1], entries[3]]) == ["* 3", "* 1"]
    assert drawn([]) == []


@given(st.lists(st.integers(-1, 1000), max_size=40))
def test_every_checkpoint_comes_once_and_below_its_children(choices: list[int]) -> None:
    entries = grown([None if choice < 0 or i == 0 else choice % i for i, choice in enumerate(choices)])
    shown = [each for _, each in draw(newest_first(entries)) if each]
    assert sorted(each.id for each in shown) == sorted(each.id for each in entries)
    place = {each.id: i for i, each in enumerate(shown)}
    assert all(place[each.id] < place[each.manifest.parent] for each in entries if each.manifest.parent)


@pytest.mark.parametrize("shape", ["line", "star", "comb", "random", "binary"])
def test_thousands_stay_narrow(shape: str, rng: random.Random) -> None:
    count = 3000
    parents: dict[str, list[int | None]] = {
        "line": [None, *range(count - 1)],
        "star": [None, *[0] * (count - 1)],
        "comb": [None, *[i - 1 if i % 2 else i - 2 for i in range(1, count)]],
        "random": [None, *[rng.randrange(i) for i in range(1, count)]],
        "binary": [None, *[(i - 1) // 2 for i in range(1, count)]],
    }
    graphs = [graph for graph, _ in draw(newest_first(grown(parents[shape])))]
    width = max((len(graph) + 1) // 2 for graph in graphs)
    assert width <= math.log2(count) + 1
    assert width <= {"line": 1, "star": 2, "comb": 2}.get(shape, 12)


# -- lanes -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=40), st.integers(0, 39))
def test_no_two_branches_overlap(shape: list[tuple[int, int]], best: int) -> None:
    entries = []
    for i, (parent, step) in enumerate(shape):
        parent_id = entries[parent].id if parent < i else None
        entries.append(entry(step, parent=parent_id, note=str(i), created=f"2026-01-02T03:04:05.{i:06d}Z"))
    known = {member.id: member for member in entries}
    path = frozenset(ancestors(entries, entries[best % len(entries)].id))
    lane_of = lanes(entries, path)
    assert lane_of.keys() == known.keys()
    assert {lane_of[checkpoint_id] for checkpoint_id in path} == {0}
    spans = _branches(entries, lane_of)
    for row, first, last, names in spans:
        for other_row, other_first, other_last, others in spans:
            if row == other_row and names != others:
                assert last < other_first or other_last < first


def _branches(entries: list[Entry], lane_of: dict[ObjectId, int]) -> list[tuple[int, int, int, frozenset[ObjectId]]]:
    """(row, first step, last step, ids) of each branch, with the place where it left its parent."""
    known = {member.id: member for member in entries}
    branches: dict[ObjectId, list[ObjectId]] = {}
    head: dict[ObjectId, ObjectId] = {}
    taken: set[ObjectId] = set()
    for member in entries:  # parents come first
        parent = member.manifest.parent
        goes_on = parent is not None and lane_of[parent] == lane_of[member.id] and parent not in taken
        if goes_on:
            taken.add(parent)
        head[member.id] = head[parent] if goes_on else member.id
        branches.setdefault(head[member.id], []).append(member.id)
    made = []
    for start, ids in branches.items():
        steps = [known[checkpoint_id].manifest.step for checkpoint_id in ids]
        parent = known[start].manifest.parent
        if parent in known:
            steps.append(known[parent].manifest.step)
        made.append((lane_of[start], min(steps), max(steps), frozenset(ids)))
    return made
