"""nanecho by many ranks: the same losses by any number of them, and exact by the same number."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from project import TINY as TINY_OPTIONS
from project import Project
from ranks import Raised, Start, run

from castore import Repo
from castore.dcp import ranks_of
from nanecho import config as configs
from nanecho import events
from nanecho import train as trainer

OPTIONS = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 12, "grad_accum": 2, "eval_samples": 10,
    "warmup_iters": 5, "connection_every": 15, "session_iters": 50, "eval_every": 10, "save_every": 25,
    "min_improvement": 1e9, "log_every": 1, "threads": 1,
}  # fmt: skip


def session(_rank: int, root: Path, options: dict[str, Any]) -> list[tuple[str, int, float]]:
    """Losses and growth of a session, as this rank reports them."""
    ranks = ranks_of() if dist.is_initialized() else None
    config = configs.make({**OPTIONS, **options})
    found = []
    for event in trainer.train(Repo.open(root), config, started="2026-01-01T00:00:00.000000Z", ranks=ranks):
        if isinstance(event, events.Stepped):
            found.append(("train", event.step, event.loss))
        elif isinstance(event, events.Evaluated):
            found.append(("validate", event.step, event.val_loss))
        elif isinstance(event, events.Grew):
            found.append(("grow", event.step, event.density))
    return found


@pytest.mark.parametrize(("size", "shard"), [(2, False), (2, True), (3, True)])
def test_losses_are_the_same_by_any_number_of_ranks(
    repo: Repo, texts: Path, tmp_path: Path, start: Start, size: int, shard: bool
) -> None:
    options = {"data_dir": str(texts), "resume": "none", "shard": shard}
    alone = session(0, repo.root.parent, {**options, "shard": False})
    (first, *others) = run(start, tmp_path, size, session, repo.root.parent, {**options, "run": "ranks"})
    assert all(other == first for other in others)
    assert [(kind, step) for kind, step, _ in first] == [(kind, step) for kind, step, _ in alone]
    assert len({density for kind, _, density in first if kind == "grow"}) == 3
    assert max(abs(one - other) for (_, _, one), (_, _, other) in zip(first, alone, strict=True)) < 1e-5
    # what was saved is one checkpoint, as one process would save it
    saved, expected = (repo.load(f"{name}:latest", ["model"])["model"] for name in ("ranks", "main"))
    assert {key: value.shape for key, value in saved.items()} == {key: value.shape for key, value in expected.items()}


def losses(*sessions: list[tuple[str, int, float]]) -> list[tuple[int, float]]:
    return [(step, loss) for found in sessions for kind, step, loss in found if kind == "train"]


@pytest.mark.parametrize("shard", [False, True])
def test_a_session_of_three_ranks_resumes_exactly(
    repo: Repo, texts: Path, tmp_path: Path, start: Start, shard: bool
) -> None:
    options = {"data_dir": str(texts), "shard": shard, "save_every": 10, "resume": "latest"}
    never_stopped = tmp_path / "never"
    never_stopped.mkdir()
    Repo.init(never_stopped)
    shutil.copy(repo.root / "config.toml", never_stopped / ".castore")
    (whole, *_) = run(start, tmp_path, 3, session, never_stopped, {**options, "session_iters": 20})
    halves = [run(start, tmp_path, 3, session, repo.root.parent, {**options, "session_iters": 10})[0] for _ in range(2)]
    assert losses(*halves) == losses(whole)
    parts = [Repo.open(root).find("main:latest").manifest.parts for root in (never_stopped, repo.root.parent)]
    assert parts[0]["model"].index == parts[1]["model"].index
    assert parts[0]["optimizer"].index == parts[1]["optimizer"].index
    # and by another number of ranks it goes on from there, to nearly the same
    options |= {"shard": not shard, "session_iters": 5}
    (other, *_) = run(start, tmp_path, 2, session, repo.root.parent, options)
    assert [step for step, _ in losses(other)] == [21, 22, 23, 24, 25]


def test_a_batch_that_can_not_be_shared_out_is_a_usage_error(
    repo: Repo, texts: Path, tmp_path: Path, start: Start
) -> None:
    results = run(start, tmp_path, 2, session, repo.root.parent, {"data_dir": str(texts), "batch_size": 3})
    message = "--batch-size 3 can't be shared out evenly to 2 ranks"
    assert results == [Raised("UsageError", message)] * 2


@pytest.mark.slow
def test_torchrun_starts_ranks_of_which_one_speaks(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "nanecho", "--"]
    options = ["--data-dir", "texts", *TINY_OPTIONS, "--json", "--shard"]
    done = subprocess.run(
        [*command, *options], cwd=project.root, env=project.environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done    step") == 1
    summary = json.loads(done.stdout)
    assert summary["environment"]["ranks"] == 2
    assert summary["final_step"] > 0
    assert project.json("verify")["findings"] == []
