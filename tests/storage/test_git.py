from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

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
