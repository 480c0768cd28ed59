"""Repositories as an attacker would have them cloned, some of them: ``make torture`` tries every thing everywhere."""

from __future__ import annotations

import random
from pathlib import Path

import hostile_clones
import pytest
from hostile_clones import COMMANDS, PLACES, THINGS


@pytest.mark.parametrize("place", PLACES)
def test_whatever_stands_there_no_command_hangs_crashes_or_follows_it(place: str) -> None:
    rng = random.Random(place)
    things = rng.sample(sorted(THINGS), 2)
    assert list(hostile_clones.try_place(place, things, rng.sample(COMMANDS, 5))) == []


def test_no_text_of_a_manifest_reaches_a_terminal_a_page_or_a_shell_as_more_than_text() -> None:
    assert list(hostile_clones.try_texts(0, 1, COMMANDS)) == []
    accepted = list(map(hostile_clones.is_accepted, hostile_clones.hostile_manifests()))
    assert 40 < sum(accepted) < len(accepted)  # both kinds are there: those that are shown, and those that are refused


def test_a_repository_in_the_repository_runs_nothing() -> None:
    assert list(hostile_clones.try_repositories(COMMANDS)) == []


def test_what_should_not_happen_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile_clones._load_all()
    work = hostile_clones.make(tmp_path)
    ran = {"code": 0, "printed": "fine\n"}
    monkeypatch.setattr(hostile_clones, "run", lambda *_: (ran["code"], ran["printed"]))
    assert hostile_clones.what_is_wrong(work, ["log"]) == ""
    for code, printed in ((-14, ""), (99, "KeyError"), (2, ""), (0, hostile_clones.SECRET), (0, "\x1b[2J")):
        ran = {"code": code, "printed": printed}
        assert hostile_clones.what_is_wrong(work, ["log"]) != ""
