"""`castore demo` and the curves: the sessions are real, and what is printed is what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from project import Project

from castore.errors import PackageMissing
from castore.report import curves
from castore.report.curves import Curve
from nanecho import demo

SMALL = """
from castore.__main__ import main
from nanecho import demo
demo.QUICK = demo.Size(seeds=1, sessions=2, iters=4, points=2)
main()
"""
REPLAY = """
import sys
import msgspec
from castore.__main__ import main
from nanecho import demo
result = msgspec.json.decode(sys.argv.pop(), type=demo.Result)
demo.run = lambda *_: iter([result])
main()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """The text and the JSON of a very small demo, and the folder that it ran in and left its picture in.

    The sessions are trained once, for the JSON and the picture; the text is told of the result that the JSON gives.
    """
    folder = tmp_path_factory.mktemp("demo")

    def printed(script: str, *arguments: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", script, "demo", "--quick", *arguments],
            cwd=folder,
            env=Project.environment_of_tests() | {"TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout, done.stderr

    result, progress = printed(SMALL, "--json", "--picture", "demo.svg")
    assert "5 of 5 sessions" in progress
    text, _ = printed(REPLAY, result)
    return text, json.loads(result), folder


@pytest.mark.slow
def test_each_session_goes_on_where_the_one_before_ended(told: tuple[str, dict[str, Any], Path]) -> None:
    lives = {life["life"]: life for life in told[1]["lives"]}
    steps = {
        life: [(session["start_step"], session["final_step"]) for session in measured["sessions"]]
        for life, measured in lives.items()
    }
    assert steps == {"resumed": [(0, 4), (4, 8)], "fresh": [(0, 4), (0, 4)], "unbroken": [(0, 8)]}


@pytest.mark.slow
def test_going_on_is_the_same_as_never_stopping(told: tuple[str, dict[str, Any], Path]) -> None:
    lives = {life["life"]: life for life in told[1]["lives"]}
    assert lives["resumed"]["points"] == lives["unbroken"]["points"]
    assert [point["step"] for point in lives["fresh"]["points"]] == [2, 4, 6, 8]


@pytest.mark.slow
def test_what_was_moved_and_stored_is_counted(told: tuple[str, dict[str, Any], Path]) -> None:
    lives = {life["life"]: life for life in told[1]["lives"]}
    first, second = lives["resumed"]["sessions"]
    assert first["down"] == 0
    assert 0 < second["down"] < lives["resumed"]["stored"]
    assert first["up"] + second["up"] == lives["resumed"]["stored"]
    assert lives["fresh"]["sessions"][1]["down"] == 0


@pytest.mark.slow
def test_it_is_told_drawn_and_nothing_is_left(told: tuple[str, dict[str, Any], Path]) -> None:
    text, result, folder = told
    final = next(life for life in result["lives"] if life["life"] == "resumed")["sessions"][-1]["final_loss"]
    assert f"{final:.4f} ± 0.0000" in text
    for words in (
        "the best of fresh starts",
        "stored in the remote at the end",
        "steps of compute",
        "never stopped",
    ):
        assert words in text
    assert [path.name for path in folder.iterdir() if "torch" not in path.name] == ["demo.svg"]  # torch has a cache
    picture = (folder / "demo.svg").read_text()
    assert picture.count("resumed") == 1
    assert "validation loss" in picture


def measured(life: demo.Life, seed: int, *losses: float) -> demo.MeasuredLife:
    points = [demo.Point(10 * i, loss) for i, loss in enumerate(losses, 1)]
    session = demo.MeasuredSession(start_step=0, final_step=10, final_loss=losses[-1], down=0, up=0)
    return demo.MeasuredLife(life=life, seed=seed, sessions=[session], points=points, stored=1)


def test_a_loss_that_is_never_reached_is_told_so() -> None:
    size = demo.Size(seeds=2, sessions=1, iters=20)
    lives = [measured("resumed", 0, 3.0, 2.0), measured("resumed", 1, 3.0, 2.9)]
    lives += [
        measured("fresh", 0, 2.5, 2.4),
        measured("fresh", 1, 2.6, 2.6),
        measured("unbroken", 0, 2.5),
        measured("unbroken", 1, 2.4),
    ]
    result = demo.Result(size=size, lives=lives)
    assert demo.target(result) == pytest.approx(2.5)
    text = "\n".join(demo.describe(result))
    assert "1 of 2 never" in text
    assert demo.curve(result.of("resumed")) == [(10, 3.0, 0.0), (20, pytest.approx(2.45), pytest.approx(0.45))]


def test_a_session_that_fails_ends_the_demo_with_what_it_said(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import sys; sys.exit('no luck today')"]
    with pytest.raises(demo.SessionFailed, match="no luck today"):
        list(demo.run(tmp_path, program, demo.Size(seeds=1, sessions=1, iters=2), 2))


# -- curves ----------------------------------------------------------------------------------------------------------

EXPERIMENTS = [Curve("one", [1, 2, 3], [3.0, 2.0, 1.5]), Curve("two", [1, 2, 3], [3.0, 2.5, 2.4], [0.1, 0.1, 0.2])]


@pytest.mark.parametrize("colour", [True, False])
def test_curves_are_drawn_in_the_terminal(colour: bool) -> None:
    lines = curves.draw(EXPERIMENTS, width=60, height=15, x_label="step", y_label="loss", colour=colour)
    assert 14 <= len(lines) <= 16
    text = "\n".join(lines)
    assert ("\x1b[" in text) == colour
    assert all(word in text for word in ("one", "two", "step", "loss"))


def test_a_picture_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        curves.picture(EXPERIMENTS, tmp_path / name, x_label="step", y_label="loss")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    curves.picture(EXPERIMENTS, tmp_path / "c.png", x_label="step", y_label="loss")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotext", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PackageMissing, match=r"castore\[plot\]"):
        curves.draw(EXPERIMENTS, width=60, height=15, x_label="", y_label="", colour=False)
    with pytest.raises(PackageMissing, match="matplotlib"):
        curves.picture(EXPERIMENTS, tmp_path / "a.svg", x_label="", y_label="")


def test_log_draws_the_loss_of_each_run(tmp_path: Path) -> None:
    from castore import Repo

    project = Project(tmp_path)
    project.run("init")
    assert "no checkpoint yet" in project.run("log", "--plot")
    repo = Repo.open(tmp_path)
    repo.save({"model": {"a": 1}}, run="unmeasured", step=1)
    assert "has a validation loss" in project.run("log", "--plot", code=3)
    for run, start in (("first", 3.0), ("second", 2.8)):
        for step in range(1, 6):
            repo.save({"model": {"a": step}}, run=run, step=step, metrics={"val_loss": start / step})
    text = project.run("log", "--plot")
    assert all(word in text for word in ("first", "second", "validation loss", "step"))
    assert "second" not in project.run("log", "--plot", "--run", "first")
    assert "choose one" in project.run("log", "--plot", "--graph", code=2)
