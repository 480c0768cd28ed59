"""Checkpointer under torch.distributed: five lines stay five lines, and a resumed run equals one that never stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Start, run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from castore import Repo
from castore.torch import Checkpointer


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    """The bytes of all weights and moments, gathered, and of this rank's random state."""
    moments = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    held = [*model.state_dict().values(), *moments]
    plain = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in held]
    return [tensor.detach().numpy().tobytes() for tensor in (*plain, torch.get_rng_state())]


def train(rank: int, root: Path, layout: str, stop: int, signalled: int = 0, **options: Any) -> Any:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(200, 300), nn.Dropout(0.1), nn.Linear(300, 200))
    if layout == "fsdp":
        fully_shard(model)
    forward = nn.parallel.DistributedDataParallel(model) if layout == "ddp" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    torch.manual_seed(rank + 10)  # every rank draws its own data and dropout
    given = {"run": "mine", "schedule": schedule, **options}
    with Checkpointer(Repo.open(root), forward, optimizer, **given) as checkpointer:
        begun = None
        for step in checkpointer.steps(stop):
            checkpointer.log(val_loss=1.0)
            begun = step if begun is None else begun
            forward(torch.randn(8, 200)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if (step + 1) % 4 == 0:
                checkpointer.save(step + 1, {"val_loss": 1 / (step + 1)})
            if step + 1 == signalled and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
    return begun, schedule.last_epoch, digest(model, optimizer)


def train_until_stopped(rank: int, root: Path, layout: str) -> Any:
    try:
        train(rank, root, layout, 1000, signalled=5, stop_signals=True)
    except SystemExit as error:
        return error.code
    return "it went on"


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_a_resumed_run_equals_one_that_was_never_stopped(repo: Repo, tmp_path: Path, start: Start, layout: str) -> None:
    other = tmp_path / "never stopped"
    other.mkdir()
    Repo.init(other)
    never_stopped = run(start, tmp_path, 2, train, other, layout, 8)
    run(start, tmp_path, 2, train, repo.root.parent, layout, 4)
    resumed = run(start, tmp_path, 2, train, repo.root.parent, layout, 8)
    assert [begun for begun, *_ in never_stopped] == [0, 0]
    assert [begun for begun, *_ in resumed] == [4, 4]
    assert [rest for _, *rest in resumed] == [rest for _, *rest in never_stopped]
    assert resumed[0][2][-1] != resumed[1][2][-1]  # each rank has a random state of its own


def test_other_numbers_of_ranks_resume_and_so_does_one_process(repo: Repo, tmp_path: Path, start: Start) -> None:
    run(start, tmp_path, 2, train, repo.root.parent, "fsdp", 4)
    saved = repo.load("mine:latest")
    (first, *_) = run(start, tmp_path, 3, train, repo.root.parent, "fsdp", 5)
    assert first[0] == 4
    for layout in ("plain", "fsdp"):
        (alone,) = run(start, tmp_path, 1, train, repo.root.parent, layout, 4)
        weights = [tensor.numpy().tobytes() for tensor in saved["model"].values()]
        assert alone[2][: len(weights)] == weights


def test_a_signal_to_one_rank_stops_all_after_the_same_step(repo: Repo, tmp_path: Path, start: Start) -> None:
    codes = run(start, tmp_path, 2, train_until_stopped, repo.root.parent, "ddp")
    assert codes == [128 + signal.SIGTERM] * 2
    newest = repo.checkpoints()[0].manifest
    assert newest.step >= 5
    assert newest.metrics == {"val_loss": 1.0}
    ranks = repo.load("mine:latest")["trainer"]["ranks"]
    assert list(ranks) == [1]


def resume_what_does_not_fit(rank: int, root: Path) -> list[str]:
    """What happens when one rank has a component more than was saved: an error of all, and nothing is changed."""
    torch.manual_seed(0)
    model = nn.Linear(20, 30)
    with Checkpointer(Repo.open(root), model, run="x") as checkpointer:
        checkpointer.save(1)
    other = nn.Linear(20, 30)
    before = other.weight.detach().clone()
    others = {"schedule": torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(other.parameters()), float)} if rank else {}
    checkpointer = Checkpointer(Repo.open(root), other, run="x", **others)
    messages = []
    try:
        checkpointer.resume("x:latest")
    except Exception as error:
        messages.append(f"{type(error).__name__}: {error}")
    dist.barrier()
    return [*messages, "unchanged" if torch.equal(before, other.weight) else "changed"]


def test_what_does_not_fit_one_rank_changes_none(repo: Repo, tmp_path: Path, start: Start) -> None:
    first, second = run(start, tmp_path, 2, resume_what_does_not_fit, repo.root.parent)
    assert first[0].startswith("RankFailed: rank 1 failed")
    assert "has no state of 'schedule'" in second[0]
    assert (first[1], second[1]) == ("unchanged", "unchanged")
