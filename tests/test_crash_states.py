"""Power cuts and kills in everything that changes a store, for a moment: ``make torture`` tries many more.

What is checked after each is in crash_states, and what a power cut may leave in power_cuts.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import crash_states
import pytest
import torch
from crash_states import SCENARIOS
from power_cuts import FOLDER, Cut, State, cuts, digest, recording, states

from castore.storage import fs, object_store


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A forked child must not wait for threads of torch that only its parent has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[0, 1 << 30], ids=["direct", "buffered"])
def direct_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """From how many bytes on files are written past the page cache."""
    monkeypatch.setattr(object_store, "_DIRECT_BYTES", request.param)


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_or_wrong_after_a_power_cut(tmp_path: Path, name: str) -> None:
    world = crash_states.play(tmp_path, name)
    rng = random.Random(name)
    every = list(crash_states.every_state(world, rng, samples=1))
    assert len(every) > (2 if name in ("forget", "unpin", "untag") else 10)  # those remove a name, and that is all
    for done, state in rng.sample(every, min(len(every), 30)):
        assert crash_states.check_state(state, world.promises, done) == ""


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_or_wrong_after_two_power_cuts(tmp_path: Path, name: str) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    world = crash_states.play(tmp_path / "first", name)
    rng = random.Random(name)
    twice = list(crash_states.states_after_two(name, world, rng, tmp_path / "second"))
    assert twice
    for again, done, state in rng.sample(twice, min(len(twice), 10)):
        assert crash_states.check_state(state, again.promises, done) == ""


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_lost_or_wrong_after_a_kill(name: str) -> None:
    killed_after = [0, *sorted(random.Random(name).sample(range(1, 19), 4))]
    outcomes = [crash_states.check_kill(name, nth) for nth in killed_after]
    outcomes.append(crash_states.check_kill(name, None, 0.02))
    assert [wrong for _, wrong in outcomes if wrong] == []
    assert outcomes[0][0]


@pytest.mark.slow
@pytest.mark.usefixtures("direct_bytes")
def test_a_save_may_be_killed_after_any_operation() -> None:
    name, kills = crash_states.survey_kills("first save", 0, 1)
    assert name == "first save"
    assert kills > 40


def test_every_sync_matters(tmp_path: Path) -> None:
    """A mutant without one of them would lose something: each function that asks for one is left out in turn."""
    asked: set[tuple[str, str]] = set()
    needed: set[tuple[str, str]] = set()
    for name in SCENARIOS:
        (tmp_path / name).mkdir()
        world = crash_states.play(tmp_path / name, name)
        for site, numbers in crash_states.sites(world).items():
            asked.add(site)
            if site not in needed and crash_states.matters(world, numbers):
                needed.add(site)
    assert asked - needed == set()
    assert len(asked) > 15


# -- the simulator itself ----------------------------------------------------------------------------------------------


def left_behind(root: Path, done: int = -1) -> list[State]:
    """Return the states that a power cut may leave after what ``act`` does, by default all of it."""
    with recording(root) as record:
        act(root)
    cut: Cut = list(cuts(record))[done]
    return list(states(cut, random.Random(0), samples=50, dull="nothing is dull"))


def act(root: Path) -> None:
    descriptor, temporary = fs.create_temporary(root)
    fs.write(descriptor, temporary, [b"new text"])
    if (root / "sync").exists():
        fs.sync(descriptor, temporary)
    fs.close(descriptor, temporary)
    fs.rename(temporary, root / "file")
    if (root / "sync").exists():
        fs.sync_directory(root)


def test_what_is_not_synced_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    found = {state.get("file") for state in left_behind(tmp_path)}
    assert found == {b"old", b"new text", b"", bytes(8), b"new "}


def test_what_is_synced_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "sync").touch()
    assert [state["file"] for state in left_behind(tmp_path)] == [b"new text"]


def test_a_file_in_a_folder_whose_name_is_not_sure_may_be_gone(tmp_path: Path) -> None:
    with recording(tmp_path) as record:
        fs.make_directory(tmp_path / "folder")
        descriptor, path = fs.create_temporary(tmp_path / "folder")
        fs.close(descriptor, path)
        fs.sync_directory(tmp_path / "folder")
    *_, last = cuts(record)
    found = {tuple(sorted(state)) for state in states(last, random.Random(0), samples=9)}
    assert found == {(), ("folder", f"folder/{path.name}")}


def test_a_rename_is_never_half_done(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").mkdir()
    with recording(tmp_path) as record:
        fs.rename(tmp_path / "a", tmp_path / "b" / "c")
    *_, last = cuts(record)
    found = {tuple(sorted(state)) for state in states(last, random.Random(0), samples=9)}
    assert found == {("a", "b"), ("b", "b/c")}


def test_an_operation_that_is_not_recorded_is_refused(tmp_path: Path) -> None:
    with recording(tmp_path), pytest.raises(AssertionError, match="truncate is not recorded"):
        os.truncate(tmp_path / "file", 0)
    os.rename(tmp_path, tmp_path.with_name("elsewhere"))  # afterwards all is as before


def test_states_with_the_same_names_differ_by_content() -> None:
    assert len({digest(state) for state in ({"a": b"1"}, {"a": b"2"}, {"a": FOLDER}, {"b": b"1"})}) == 4
