from __future__ import annotations

import contextlib
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hostile_clones import plant_repository
from project import Project

from castore import Repo
from castore.doctor import examine
from castore.storage import git_process
from castore.storage.git import commit, root


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["plain", "with space and \n newline \n", os.fsdecode(b"not-utf8-\xff")])
def test_git_says_where_its_tree_is_and_which_commit_is_checked_out(tmp_path: Path, name: str) -> None:
    top = tmp_path / name
    (top / "a" / "b").mkdir(parents=True)
    assert root(top / "a") is None
    assert commit(top) is None
    git(top, "init", "--quiet")
    assert root(top / "a" / "b") == top.resolve()
    assert commit(top) is None  # nothing is committed yet
    (top / "file").write_text("1")
    git(top, "add", "file")
    git(top, "commit", "--quiet", "-m", "x")
    head = git(top, "rev-parse", "HEAD")
    assert commit(top / "a") == head
    (top / "untracked").write_text("1")
    assert commit(top) == head
    (top / "file").write_text("2")
    assert commit(top) == head + "-dirty"


def test_without_git_there_is_no_root_and_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "--quiet")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert root(tmp_path) is None
    assert commit(tmp_path) is None


@pytest.mark.parametrize("count", ["two", "-1", "1e3", "99999999999", "1.5"])
def test_a_broken_count_of_settings_is_a_usage_error(tmp_path: Path, count: str) -> None:
    project = Project(tmp_path)
    project.run("init")
    project.environment = project.environment | {"GIT_CONFIG_COUNT": count}
    err = project.run("gc", "--dry-run", code=2)
    assert err.startswith(f"castore: GIT_CONFIG_COUNT is '{count}', which git does not take")


def test_settings_without_their_keys_are_told_by_git(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.run("init")
    project.environment = project.environment | {"GIT_CONFIG_COUNT": "2"}
    assert "nothing was deleted" in project.run("gc", "--dry-run", code=4)


def test_settings_of_the_repository_run_no_program(tmp_path: Path) -> None:
    """core.fsmonitor is run by `git status`, and a signature is shown by running gpg."""
    project = Project(tmp_path)
    project.run("init")
    project.git("add", "-A")
    project.git("commit", "-qm", "one")
    (tmp_path / "more").write_text("x")
    project.git("add", "more")
    project.git("stash")
    spy = tmp_path / "spy"
    spy.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    spy.chmod(0o755)
    for name, value in (("core.fsmonitor", str(spy)), ("log.showSignature", "true"), ("gpg.program", str(spy))):
        project.git("config", name, value)
    (tmp_path / "ran").unlink(missing_ok=True)
    project.run("doctor")
    project.run("gc", "--dry-run")
    project.run("stats")
    assert not (tmp_path / "ran").exists()


def clone_with_a_repository_in_it(tmp_path: Path, place: str) -> Project:
    """A clone of a project in sub/ that has a git repository committed in a place: what it runs makes tmp_path/ran."""
    (tmp_path / "origin").mkdir()
    origin = Project(tmp_path / "origin")
    (origin.root / "sub").mkdir()
    Repo.init(origin.root / "sub").save({"model": {"w": 1}}, run="main", step=1)
    plant_repository(origin.root / place, f"touch {tmp_path}/ran")
    origin.git("add", "-A", "-f", ".")
    origin.git("commit", "-qm", "one")
    origin.git("clone", "-q", ".", str(tmp_path / "clone"))
    (tmp_path / "ran").unlink(missing_ok=True)
    origin.root = tmp_path / "clone" / "sub"
    return origin


@pytest.mark.parametrize("place", ["sub", "sub/.castore"])
@pytest.mark.parametrize("left_out", ["nothing", "what git is told", "the look at the folders"])
def test_a_repository_in_the_work_tree_run_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, left_out: str
) -> None:
    clone = clone_with_a_repository_in_it(tmp_path, place)
    if left_out == "what git is told":  # which git before 2.38 doesn't know
        monkeypatch.setattr(git_process, "_SETTINGS_OF_OURS", ())
    elif left_out == "the look at the folders":
        monkeypatch.setattr(git_process, "refuse_bare", lambda _: None)
    for command in (("status",), ("doctor",), ("verify", "--signed"), ("gc",), ("stats",)):
        with contextlib.suppress(AssertionError):  # whatever it exits with
            clone.call(*command)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["sub", "sub/.castore"])
def test_a_repository_in_the_work_tree_is_told_and_keeps_gc_from_deleting(tmp_path: Path, place: str) -> None:
    clone = clone_with_a_repository_in_it(tmp_path, place)
    told = f"{tmp_path / 'clone' / place} looks like a git repository of its own"
    assert told in clone.call("status", code=4)
    assert told in clone.call("verify", "--signed", code=4)
    assert "nothing was deleted" in (err := clone.call("gc", code=4))
    assert told in err
    problems = {check.subject: check.text for check in examine(datetime.now(UTC), clone.root) if check.level != "ok"}
    assert told in problems["git"]
    assert told in problems["gc"]
    (clone.root.parent / place / "HEAD").unlink()
    clone.call("status")


def test_a_repository_among_the_manifests_does_not_say_what_is_committed(tmp_path: Path) -> None:
    clone = clone_with_a_repository_in_it(tmp_path, "sub/.castore/manifests/main")
    assert "looks like a git repository of its own" in clone.call("forget", "latest", code=4)


def test_a_repository_in_the_work_tree_is_told_wherever_its_objects_are(tmp_path: Path) -> None:
    """git follows the file ``commondir`` to the folder that has objects, refs and the settings."""
    clone = clone_with_a_repository_in_it(tmp_path, "sub/.castore")
    folder = clone.root / ".castore"
    (folder / "inner").mkdir()
    for name in ("objects", "refs", "config"):
        (folder / name).rename(folder / "inner" / name)
    (folder / "commondir").write_text("inner")
    assert "looks like a git repository of its own" in clone.call("status", code=4)
