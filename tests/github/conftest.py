from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from actions_service import Service as Cache
from machines import World

import castore
from castore.remotes import github_service


@pytest.fixture
def cache() -> Iterator[Cache]:
    with Cache() as cache:
        yield cache


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    monkeypatch.setattr(github_service.time, "sleep", made.append)
    return made


@pytest.fixture
def world(tmp_path: Path, cache: Cache) -> World:
    return World(tmp_path, cache)


@pytest.fixture
def one(world: World) -> castore.SaveResult:
    """A first session has saved one checkpoint."""
    machine = world.machine()
    saved = machine.checkpoint(10, 3.0)
    assert machine.save().commit
    return saved
