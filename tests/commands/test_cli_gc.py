"""gc, pins and names of checkpoints through the installed program."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from project import Project

from castore import Repo


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Six checkpoints of run a, better and better, and two of run b; no torch needed."""
    project = Project(tmp_path)
    project.run("init")
    repo = Repo.open(tmp_path)
    for run, count in (("a", 6), ("b", 2)):
        for step in range(1, count + 1):
            data = f"{run}{step}" * 1000
            parts = {"model": {"data": data}, "optimizer": {"data": data + "o"}, "trainer": {"data": data + "t"}}
            repo.save(parts, run=run, step=step, metrics={"val_loss": 10.0 - step - (run == "b") * 0.5})
    return project


def availability(project: Project) -> dict[str, str]:
    return {f"{entry['run']}{entry['step']}": entry["availability"] for entry in project.json("log")}


def stored(project: Project) -> set[str]:
    return {path.name for path in (project.root / ".castore" / "objects").glob("*/*")}


def test_gc_says_what_goes_what_stays_and_why_and_does_it(project: Project) -> None:
    planned = project.run("gc", "--keep", "3", "--keep-optimizer", "1", "--dry-run")
    assert "would go" in planned
    assert set(availability(project).values()) == {"full"}
    out = project.run("gc", "--keep", "3", "--keep-optimizer", "1")
    assert out == planned.replace("would go", "deleted")
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert sorted(kind for kind, _ in lines) == ["drop"] * 4 + ["gc"] + ["keep"] * 4
    assert "step 6 of a, model optimizer trainer: the best" in out
    assert "step 4 of a, model: number 3; its optimizer and trainer part goes" in out
    assert "step 1 of a: number 8 of its experiment, 3 are kept" in out
    found = availability(project)
    assert {name for name, state in found.items() if state == "full"} == {"a6", "b2"}
    assert {name for name, state in found.items() if state == "weights-only"} == {"a5", "a4"}
    assert list(found.values()).count("history") == 4


def test_gc_json_has_every_decision(project: Project) -> None:
    plan = project.json("gc", "--keep", "1", "--keep-latest", "0")
    assert len(plan["deleted"]) == 21
    assert plan["freed_bytes"] > 0
    assert plan["kept_bytes"] > 0
    assert (plan["dry_run"], plan["young"]) == (False, 0)
    kept = [one for one in plan["checkpoints"] if one["keep"]]
    assert [(one["run"], one["step"], one["reasons"]) for one in kept] == [("a", 6, ["the best"])]
    assert len(plan["checkpoints"]) == 8


def test_gc_follows_the_settings_unless_told_otherwise(project: Project) -> None:
    config = project.root / ".castore" / "config.toml"
    config.write_text("[retention]\nkeep = 2\nkeep_latest = 0\n")
    assert len(project.json("gc", "--keep", "8", "--dry-run")["deleted"]) == 10
    project.run("gc")
    assert sorted(name for name, state in availability(project).items() if state == "full") == ["a5", "a6"]


def test_max_size_lets_the_worst_go(project: Project) -> None:
    project.run("gc", "--max-size", "1B")
    assert [name for name, state in availability(project).items() if state != "history"] == ["b2", "a6"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "-1"], "--keep"),
        (["--max-size", "much"], "'much' is not a size"),
        (["--grace", "soon"], "'soon' is not a duration"),
        (["--keep", "many"], "--keep"),
    ],
)
def test_a_wrong_gc_deletes_nothing(project: Project, arguments: list[str], says: str) -> None:
    before = stored(project)
    assert says in project.run("gc", *arguments, code=2)
    assert stored(project) == before


def test_a_broken_manifest_stops_gc_with_exit_5(project: Project) -> None:
    broken = project.root / ".castore" / "manifests" / "a" / "000000009-0123456789ab.json"
    broken.write_text("<<<<<<< HEAD\n{}\n")
    before = stored(project)
    err = project.run("gc", "--keep", "1", code=5)
    assert str(broken) in err
    assert "merge conflict markers" in err
    assert "nothing was deleted" in err
    assert stored(project) == before


def test_a_git_that_fails_stops_gc_with_exit_4(project: Project) -> None:
    (project.root / ".git" / "HEAD").write_text("nonsense")
    before = stored(project)
    assert "nothing was deleted" in project.run("gc", "--keep", "1", code=4)
    assert stored(project) == before


def test_manifests_that_are_all_gone_stop_gc(project: Project) -> None:
    shutil.rmtree(project.root / ".castore" / "manifests")
    assert "not one manifest" in project.run("gc", "--grace", "0", code=4)


def test_a_lock_held_by_others_stops_gc_with_exit_6(project: Project) -> None:
    config = project.root / ".castore" / "config.toml"
    config.write_text("[store]\nlock_timeout = 0.1\n")
    with Repo.open(project.root).lock():
        assert "is held by another castore process" in project.run("gc", code=6)
        project.run("log")


def test_a_pin_keeps_a_checkpoint_until_it_is_taken_back(project: Project) -> None:
    worst = next(entry for entry in project.json("log") if entry["run"] == "a" and entry["step"] == 1)["id"]
    assert f"pinned {worst[:12]}: commit" in project.run("pin", worst[:8])
    project.run("pin", worst)  # again, which changes nothing
    assert ".castore/pins/" in project.git("status", "--porcelain", "--untracked-files=all")
    project.run("gc", "--keep", "1", "--keep-latest", "0")
    assert availability(project)["a1"] == "full"
    project.run("unpin", worst)
    assert "isn't pinned" in project.run("unpin", worst, code=3)
    project.run("gc", "--keep", "1", "--keep-latest", "0")
    assert availability(project)["a1"] == "history"


def test_forget_removes_a_manifest_and_its_data_goes_in_time(project: Project) -> None:
    best = project.json("resolve")["match"]["id"]
    assert "isn't in git's last commit" in project.run("forget", "best", code=2)
    commit(project)
    path = project.json("forget", "best")["path"]
    assert not Path(path).exists()
    commit(project)
    assert "no checkpoint" in project.run("show", best, code=3)
    everything = ["--keep", "99", "--keep-optimizer", "99"]
    assert project.json("gc", *everything)["young"] == 3  # another branch may still bring the manifest
    assert len(project.json("gc", *everything, "--grace", "0")["deleted"]) == 3
    assert set(availability(project).values()) == {"full"}


def commit(project: Project) -> None:
    project.git("add", ".castore")
    project.git("commit", "-q", "-m", "x")


def test_forget_takes_force_where_there_is_no_other_copy(project: Project) -> None:
    shutil.rmtree(project.root / ".git")
    assert "lose it with --force" in project.run("forget", "best", code=2)
    assert not Path(project.json("forget", "best", "--force")["path"]).exists()


def test_a_pinned_checkpoint_is_not_forgotten(project: Project) -> None:
    commit(project)
    own = project.json("pin", "best")["id"]
    assert f"`castore unpin {own[:12]}` first" in project.run("forget", own, "--force", code=2)
    project.run("unpin", own)
    project.run("forget", own)


def test_a_pin_is_taken_back_when_its_manifest_is_gone(project: Project) -> None:
    own = project.json("pin", "best")["id"]
    pins = project.root / ".castore" / "pins"
    twin = own[:20] + ("0" if own[20] != "0" else "1") + own[21:]
    (pins / twin).touch()
    next((project.root / ".castore" / "manifests" / "a").glob(f"*-{own[:12]}.json")).unlink()
    assert "give more digits" in project.run("unpin", own[:12], code=3)
    project.run("unpin", twin)
    assert project.json("unpin", own[:12]) == {"id": own}
    assert list(pins.iterdir()) == []
    assert "no checkpoint" in project.run("unpin", own[:12], code=3)


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"), [("best", "a6"), ("latest", "b2"), ("a:best", "a6"), ("a:latest", "a6"), ("b:best", "b2")]
)
@pytest.mark.parametrize("command", ["show", "pin", "resolve"])
def test_names_work_wherever_an_id_does(project: Project, command: str, name: str, expected: str) -> None:
    ids = {f"{entry['run']}{entry['step']}": entry["id"] for entry in project.json("log")}
    found = project.json(command, name)
    assert (found["match"]["id"] if command == "resolve" else found["id"]) == ids[expected]


def test_best_is_the_best_that_is_there(project: Project) -> None:
    best = project.json("show", "best")
    for part in best["parts"].values():
        (project.root / ".castore" / "objects" / part["index"][:2] / part["index"]).unlink()
    assert project.json("show", "best")["step"] == 5
    assert project.json("show", best["id"])["step"] == 6


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("0000", "no checkpoint '0000'"),
        ("", "no checkpoint ''"),
        ("c:best", "no checkpoint of run 'c'; runs: a, b"),
        ("bset", "bset"),
    ],
)
def test_a_name_of_nothing_exits_3(project: Project, wanted: str, says: str) -> None:
    assert says in project.run("show", wanted, code=3)


def test_a_near_miss_and_an_ambiguous_name_are_told_what_fits(project: Project) -> None:
    own = project.json("log")[0]["id"]
    wrong = own[:7] + ("0" if own[7] != "0" else "1")
    assert f"did you mean {own[:8]}" in project.run("show", wrong, code=3)
    ids = [entry["id"] for entry in project.json("log")]
    shared = next((digit for digit in "0123456789abcdef" if sum(one.startswith(digit) for one in ids) > 1), None)
    if shared:  # eight ids of sixteen digits nearly always share one
        assert "give more digits" in project.run("show", shared, code=3)
