from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from project import Project

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
