"""Projects to run the program in, from an empty folder to a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import parts
from project import Project
from stores import SETTINGS

from castore import Experiment, Repo
from castore.format.ids import ObjectId


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A git repository with some text, without .castore/."""
    return Project(tmp_path)


@pytest.fixture
def empty(tmp_path: Path) -> Project:
    """A project after `castore init`."""
    project = Project(tmp_path)
    Repo.init(project.root)
    return project


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after one session; tests only look at it."""
    project = Project(tmp_path_factory.mktemp("trained"))
    project.train("--tag", "nice", "--note", "a first try")
    return project


@pytest.fixture
def trained_copy(trained: Project, tmp_path: Path) -> Project:
    """A copy of a trained project, to be changed."""
    return trained.copy(tmp_path / "copy")


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with four checkpoints: three in a row, and one resumed from the first; tests only look at it."""
    project = Project(tmp_path_factory.mktemp("history"))
    repo = Repo.init(project.root)
    (project.root / ".castore" / "config.toml").write_text(SETTINGS)
    repo = Repo.open(project.root)
    ids: list[ObjectId] = []
    for step, run, parent in ((1, "main", None), (2, "main", 0), (3, "main", 1), (4, "side", 0)):
        saved = repo.save(
            {**parts(step), "optimizer": {"m": parts(step + 100)["model"]["big"]}},
            run=run, step=step, parent=None if parent is None else ids[parent], metrics={"val_loss": 4.0 / step},
            tags=["nice"] if step == 3 else [], config={"rate": 0.1 * step}, experiment=Experiment(data="d"),
        )  # fmt: skip
        ids.append(saved.id)
    project.git("add", "-A")
    project.git("commit", "-q", "-m", "x")
    return project


@pytest.fixture
def history_copy(history: Project, tmp_path: Path) -> Project:
    """A copy of the four checkpoints, to be changed."""
    return history.copy(tmp_path / "copy")


@pytest.fixture
def eight(empty: Project) -> Project:
    """Six checkpoints of run a, better and better, and two of run b; no torch needed."""
    repo = Repo.open(empty.root)
    for run, count in (("a", 6), ("b", 2)):
        for step in range(1, count + 1):
            data = f"{run}{step}" * 1000
            saved = {"model": {"data": data}, "optimizer": {"data": data + "o"}, "trainer": {"data": data + "t"}}
            repo.save(saved, run=run, step=step, metrics={"val_loss": 10.0 - step - (run == "b") * 0.5})
    return empty


@pytest.fixture
def weights(empty: Project) -> Project:
    """Two checkpoints with a model and values."""
    (empty.root / ".castore" / "config.toml").write_text('[store]\nchunk_size = "64KiB"\nlock_timeout = 5.0\n')
    repo = Repo.open(empty.root)
    for step in (1, 2):
        model = parts(step)["model"]
        repo.save({"model": model, "trainer": {"seed": step}}, run="main", step=step,
                  experiment=Experiment(model={"n": 1}, data="d"), config={"lr": 0.1},
                  metrics={"val_loss": 5.0 - step})  # fmt: skip
    return empty
