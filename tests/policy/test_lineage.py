from __future__ import annotations

import math
import random

import pytest
from builders import entry
from hypothesis import given
from hypothesis import strategies as st

from castore.format.manifest import Entry
from castore.policy.lineage import draw
from castore.policy.scoring import newest_first


def drawn(entries: list[Entry]) -> list[str]:
    return [f"{graph} {one.manifest.step}" if one else graph for graph, one in draw(newest_first(entries))]


def grown(parents: list[int | None]) -> list[Entry]:
    """Checkpoint i, of step i, was resumed from checkpoint ``parents[i]``, one before it."""
    made: list[Entry] = []
    for step, parent in enumerate(parents):
        made.append(entry(step, parent=None if parent is None else made[parent].id))
    return made


def test_a_line_is_one_column() -> None:
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


def test_what_has_no_parent_here_begins_anew_newest_first() -> None:
    made = grown([None, 0, None, 2])
    assert drawn(made) == ["* 3", "* 2", "* 1", "* 0"]
    assert drawn([made[1], made[3]]) == ["* 3", "* 1"]
    assert drawn([]) == []


@given(st.lists(st.integers(-1, 1000), max_size=40))
def test_every_checkpoint_comes_once_and_below_its_children(choices: list[int]) -> None:
    made = grown([None if one < 0 or i == 0 else one % i for i, one in enumerate(choices)])
    shown = [one for _, one in draw(newest_first(made)) if one]
    assert sorted(one.id for one in shown) == sorted(one.id for one in made)
    place = {one.id: i for i, one in enumerate(shown)}
    assert all(place[one.id] < place[one.manifest.parent] for one in made if one.manifest.parent)


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
    lines = [graph for graph, _ in draw(newest_first(grown(parents[shape])))]
    width = max((len(experiment) + 1) // 2 for experiment in lines)
    assert width <= math.log2(count) + 1
    assert width <= {"line": 1, "star": 2, "comb": 2}.get(shape, 12)
