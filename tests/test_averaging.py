"""Means of checkpoints: what they are of, how they are computed, and what stands in the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from project import Project

from castore import Experiment, Repo
from castore.averaging import average, choose
from castore.errors import NothingAvailable, UsageError

EXPERIMENT = Experiment(model={"width": 3})


def fill(repo: Repo, losses: list[float], run: str = "main", width: int = 3) -> list[str]:
    """Checkpoints with these losses; that of step n has weights n, a tie, and an integer."""
    ids = []
    for step, loss in enumerate(losses, 1):
        weight = torch.full((2, width), float(step), dtype=torch.bfloat16)
        state = {"w": weight, "tied": weight, "count": torch.tensor(step), "name": "net"}
        parts = {"model": state, "optimizer": {"step": step}}
        saved = repo.save(parts, run=run, step=step, metrics={"val_loss": loss}, experiment=EXPERIMENT)
        ids.append(saved.id)
    return ids


def test_the_best_are_averaged_in_double_precision(repo: Repo) -> None:
    ids = fill(repo, [3.0, 1.0, 2.0, 9.0])
    chosen = choose(repo, "main:best", 3)
    assert [entry.id for entry in chosen] == [ids[1], ids[2], ids[0]]
    averaged = average(repo, chosen, run="soup", note="three")
    manifest = averaged.saved.manifest
    assert (manifest.run, manifest.step, manifest.parent, list(manifest.parts)) == ("soup", 3, ids[1], ["model"])
    assert manifest.info["average"]["of"] == [ids[1], ids[2], ids[0]]
    model = repo.load(averaged.saved.id)["model"]
    assert model["w"] is model["tied"]
    assert torch.equal(model["w"], torch.full((2, 3), 2.0, dtype=torch.bfloat16))
    assert (model["count"].item(), model["name"]) == (2, "net")
    # without a score it is not the best, and it is no part of the next mean
    assert repo.find("best").id == ids[1]
    assert averaged.saved.id not in [entry.id for entry in choose(repo, "latest", 4)]


def test_a_moving_average_goes_by_the_steps(repo: Repo) -> None:
    ids = fill(repo, [1.0, 1.0, 1.0])
    averaged = average(repo, [repo.find(one) for one in (ids[2], ids[0], ids[1])], run="ema", decay=0.5)
    assert averaged.shares == (0.5, 0.25, 0.25)  # of steps 3, 1 and 2
    assert repo.load(averaged.saved.id)["model"]["w"][0, 0].item() == 0.5 * 3 + 0.25 * 1 + 0.25 * 2


def test_a_mean_of_floats_is_rounded_once(repo: Repo) -> None:
    values = [1.0, 2**-24, 2**-24]  # added one by one in float32, nothing would be left of the small ones
    entries = []
    for step, value in enumerate(values, 1):
        state = {"model": {"w": torch.tensor([value * 3])}}
        entries.append(repo.find(repo.save(state, run="x", step=step).id))
    mean = repo.load(average(repo, entries, run="mean").saved.id)["model"]["w"]
    assert torch.equal(mean, torch.tensor([1.0 + 2**-23]))


def test_what_can_not_be_averaged_says_why(repo: Repo) -> None:
    first = fill(repo, [1.0, 2.0])
    other = fill(repo, [1.0], run="wide", width=4)
    with pytest.raises(UsageError, match="can't be averaged"):
        average(repo, [repo.find(first[0]), repo.find(other[0])], run="soup")
    with pytest.raises(UsageError, match="two checkpoints or more"):
        average(repo, [repo.find(first[0])], run="soup")
    with pytest.raises(UsageError, match="between 0 and 1"):
        average(repo, [repo.find(one) for one in first], run="soup", decay=1.5)
    with pytest.raises(NothingAvailable, match="has 2 checkpoints with their weights, and not 5"):
        choose(repo, "main:best", 5)


def test_train_evaluates_a_mean_which_is_then_scored(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.train("--session-iters", "8", "--save-every", "4", "--min-improvement", "1000")
    trained = project.json("log")
    mean = project.json("average", "best:2", "-o", "soup")
    measured = project.json("train", "--data-dir", "texts", "--evaluate", "soup:latest")
    assert measured["id"] != mean["id"]
    repo = Repo.open(project.root)
    scored, plain = repo.find(measured["id"]).manifest, repo.find(mean["id"]).manifest
    assert scored.parts == plain.parts
    assert scored.metrics == measured["metrics"]
    assert scored.experiment == repo.find(trained[0]["id"]).manifest.experiment
    losses = [one["metrics"]["val_loss"] for one in trained]
    assert min(losses) - 1 < scored.metrics["val_loss"] < max(losses) + 1
    # evaluating what was trained gives what its session measured
    again = project.json("train", "--data-dir", "texts", "--threads", "1", "--evaluate", trained[0]["id"])
    assert again["metrics"]["val_loss"] == trained[0]["metrics"]["val_loss"]
    assert "is of another shape" in project.run(
        "train", "--data-dir", "texts", "--evaluate", "soup:latest", "--n-embd", "48", "--n-head", "2", code=3
    )


def test_the_command_says_what_it_averaged(tmp_path: Path) -> None:
    project = Project(tmp_path)
    repo = Repo.init(project.root)
    ids = fill(repo, [3.0, 1.0, 2.0])
    out = project.call("average", "best:2", "-o", "soup")
    assert out.splitlines()[0] == f" 50.0%  {ids[1][:12]}  step 2 of run main"
    assert out.splitlines()[-1].startswith(f"saved   {repo.find('soup:latest').id[:12]}, their mean, in run soup: ")
    shown = project.json("average", ids[0], ids[2], "-o", "soup", "--ema", "0.9")
    assert shown["of"] == {ids[0]: pytest.approx(0.9), ids[2]: pytest.approx(0.1)}
    assert "is one checkpoint: give two" in project.call("average", "best", "-o", "soup", code=2)
