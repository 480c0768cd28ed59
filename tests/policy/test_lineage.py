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
    return [f"{graph} {entry.manifest.step}" if entry else graph for graph, entry in draw(newest_first(entries))]


def grown(parents: list[int | None]) -> list[Entry]:
    """Checkpoint i, of step i, was resumed from checkpoint ``parents[i]``, one before it."""
    entries: list[Entry] = []
    for step, parent in enumerate(parents):
        entries.append(entry(step, parent=None if parent is None else entries[parent].id))
    return entries


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
