"""A rank that fails, hangs or is killed at any step: the others get an error, no lock stays, and old data stands."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Died, Start, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import castore
from castore import Repo, dcp, errors
from castore.ranks import Ranks
from castore.state.shards import ChunkReader
from castore.storage.catalog import Catalog
from castore.storage.object_store import ObjectStore

# what a rank does between two points at which all of them meet: see castore.sharding.save
STEPS = ["lock", "describe", "draft", "collect", "exchange", "place", "write", "commit", "add", "adopt"]
MEETINGS = {"lock": 0, "describe": 1, "draft": 2, "collect": 3, "write": 4, "commit": 5, "adopt": 6}


def state_with(value: float) -> dict[str, DTensor]:
    """Tensors of several chunks, of which one lies on both ranks."""
    mesh = init_device_mesh("cpu", (2,))
    tensor = torch.randn(300, 301, generator=torch.Generator().manual_seed(1)) + value
    return {"w": distribute_tensor(tensor, mesh, [Shard(0)]), "c": distribute_tensor(tensor.T, mesh, [Shard(1)])}


def before(step: str, act: Callable[[], None]) -> None:
    """Have ``act`` called when this process comes to a step of a save, once."""
    names: dict[str, tuple[type, str]] = {
        "exchange": (Ranks, "exchange"),
        "place": (ObjectStore, "_place"),
        "add": (Catalog, "add"),
        "read": (ChunkReader, "read_into"),
    }
    kind, name = names.get(step, (Ranks, "_share"))
    original = getattr(kind, name)
    calls = []

    def stepped(*arguments: Any, **keywords: Any) -> Any:
        calls.append(step)
        if len(calls) == MEETINGS.get(step, 0) + 1:
            act()
        return original(*arguments, **keywords)

    setattr(kind, name, stepped)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(28, "No space left on device")


def hang() -> None:
    time.sleep(60)


def save_with_harm(rank: int, root: Path, victim: int, step: str, harm: Callable[[], None]) -> Any:
    """Save once as it should be and once with harm done to a rank; return the error's name and the seconds it took."""
    repo = Repo.open(root)
    dcp.save(repo, {"model": state_with(0.0)}, run="main", step=1, timeout=4)
    later = state_with(1.0)
    if rank == victim:
        before(step, harm)
    begun = time.monotonic()
    try:
        dcp.save(repo, {"model": later}, run="main", step=2, timeout=4)
    except castore.CastoreError as error:
        return type(error).__name__, time.monotonic() - begun
    return "saved", time.monotonic() - begun


def check_repo(repo: Repo, *, may_have_second: bool) -> None:
    """Nothing holds the lock, the first checkpoint is whole, and a second one is too if it is there."""
    with repo.lock(exclusive=True, wait=False):
        pass
    entries = repo.checkpoints()
    assert [entry.manifest.step for entry in entries] in ([[1], [2, 1]] if may_have_second else [[1]])
    expected = torch.randn(300, 301, generator=torch.Generator().manual_seed(1))
    for entry in entries:
        loaded = repo.load(entry.id)["model"]
        assert torch.equal(loaded["w"], expected + (entry.manifest.step - 1))
        assert torch.equal(loaded["c"], expected.T + (entry.manifest.step - 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "victim"), [(step, victim) for step in STEPS for victim in (0, 1) if step != "add" or victim == 0]
)
def test_a_rank_that_is_killed_is_an_error_of_the_other(
    repo: Repo, tmp_path: Path, start: Start, step: str, victim: int
) -> None:
    results = run(start, tmp_path, 2, save_with_harm, repo.root.parent, victim, step, kill)
    assert results[victim] == Died(-signal.SIGKILL)
    name, seconds = results[1 - victim]
    assert name == "RankFailed"
    assert seconds < 4
    # once the manifest is there the checkpoint is, whoever dies before all have heard of it
    check_repo(repo, may_have_second=step == "adopt" or (step, victim) in {("commit", 0), ("commit", 1)})


@pytest.mark.parametrize("step", ["describe", "exchange", "write"])
def test_a_rank_that_hangs_is_an_error_of_the_other_in_time(
    repo: Repo, tmp_path: Path, start: Start, step: str
) -> None:
    results = run(start, tmp_path, 2, save_with_harm, repo.root.parent, 1, step, hang, awaited=[0])
    assert results[1] == Died(None)
    name, seconds = results[0]
    assert name == "RankFailed"
    assert 3 < seconds < 9
    check_repo(repo, may_have_second=False)


def fail_at_each_step(rank: int, root: Path) -> list[str]:
    """What was not as it should be when a rank failed and went on: the other one must understand it all the time."""
    repo, wrong = Repo.open(root), []
    dcp.save(repo, {"model": state_with(0.0)}, run="main", step=1)
    original = {(kind, name): getattr(kind, name) for kind, name in ((ObjectStore, "_place"), (Catalog, "add"))}
    for number, (victim, step) in enumerate([(0, "place"), (1, "place"), (0, "add")]):
        if rank == victim:
            before(step, fail)
        try:
            dcp.save(repo, {"model": state_with(2.0 + number)}, run="main", step=2)
            wrong.append(f"{step}: saved")
        except OSError:
            wrong += [] if rank == victim else [f"{step}: OSError"]
        except errors.RankFailed as error:
            is_told = error.rank == victim and "No space left" in error.reason
            wrong += [] if rank != victim and is_told else [f"{step}: {error}"]
        for (kind, name), method in original.items():
            setattr(kind, name, method)
    if rank == 0:
        with repo.lock(exclusive=True, wait=False):
            pass
    return wrong


def test_a_rank_that_fails_tells_the_others_and_they_can_go_on(repo: Repo, tmp_path: Path, start: Start) -> None:
    assert run(start, tmp_path, 2, fail_at_each_step, repo.root.parent) == [[], []]
    check_repo(repo, may_have_second=False)


def save_alone(rank: int, root: Path) -> str:
    if rank == 0:
        try:
            dcp.save(Repo.open(root), {"model": {"x": 1}}, run="main", step=1, timeout=2)
        except castore.CastoreError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_save_by_one_rank_alone_says_that_all_have_to(repo: Repo, tmp_path: Path, start: Start) -> None:
    first, _ = run(start, tmp_path, 2, save_alone, repo.root.parent)
    assert first.startswith("RankFailed: another rank failed, so all of them stop: not every rank came here within 2 s")


def load_with_harm(rank: int, root: Path) -> Any:
    repo, state = Repo.open(root), state_with(0.0)
    saved = dcp.save(repo, {"model": state}, run="main", step=1)
    if rank == 1:
        before("read", kill)
    try:
        dcp.load(repo, {"model": state}, saved.id, timeout=4)
    except castore.CastoreError as error:
        return type(error).__name__
    return "loaded"


def test_a_rank_that_is_killed_in_a_load_is_an_error_of_the_other(repo: Repo, tmp_path: Path, start: Start) -> None:
    assert run(start, tmp_path, 2, load_with_harm, repo.root.parent) == ["RankFailed", Died(-signal.SIGKILL)]
    check_repo(repo, may_have_second=False)


def load_damaged(rank: int, root: Path) -> Any:
    repo = Repo.open(root)
    state = state_with(0.0)
    saved = dcp.save(repo, {"model": state}, run="main", step=1)
    Ranks.agree(dcp.ranks_of())
    if rank == 0:
        largest = max(repo.store.stored().items(), key=lambda item: item[1].size)[0]
        data = bytearray(repo.store.path(largest).read_bytes())
        data[-1] ^= 1
        repo.store.path(largest).write_bytes(data)
    dcp.ranks_of().agree()
    try:
        dcp.load(Repo.open(root), {"model": state}, saved.id)
    except castore.CastoreError as error:
        return type(error).__name__
    return "loaded"


def test_damage_that_one_rank_finds_is_an_error_of_all(repo: Repo, tmp_path: Path, start: Start) -> None:
    found = run(start, tmp_path, 2, load_damaged, repo.root.parent)
    assert set(found) <= {"CorruptObject", "ObjectMissing", "RankFailed"}
    assert "CorruptObject" in found
    with repo.lock(exclusive=True, wait=False):
        pass
