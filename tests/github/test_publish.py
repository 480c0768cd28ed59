"""When a push is tried again, and when it isn't: decided by what git reports to programs, whatever its words are."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from castore.errors import NotPushed
from castore.github import publish
from castore.storage import git_commits


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    path = tmp_path / "origin.git"
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(path)], check=True)
    return path


@pytest.fixture
def clone(tmp_path: Path, origin: Path) -> Path:
    return cloned(tmp_path / "clone", origin, "pushed")


def cloned(path: Path, origin: Path, name: str) -> Path:
    subprocess.run(["git", "clone", "-q", str(origin), str(path)], check=True, capture_output=True)
    git(path, "checkout", "-q", "-B", "main")
    (path / "x").mkdir(exist_ok=True)
    (path / "x" / name).write_text(name)
    return path


def hook(origin: Path, body: str) -> None:
    path = origin / "hooks" / "pre-receive"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def published(clone: Path, pause: Callable[[float], None] = lambda _: None, name: str = "pushed") -> str:
    return publish.publish(clone, [f"x/{name}"], [], "a message", pause)


def test_a_push_that_works_needs_no_second_one(clone: Path, origin: Path) -> None:
    pauses: list[float] = []
    commit_id = published(clone, pauses.append)
    assert pauses == []
    assert git(origin, "rev-parse", "main") == git(clone, "rev-parse", "HEAD") == commit_id
    assert published(clone) == commit_id  # nothing is new


def test_git_tells_who_decided(clone: Path, origin: Path, tmp_path: Path) -> None:
    commit_id = git_commits.make_commit(clone, "HEAD", ["x/pushed"], [], "a message")

    def outcome() -> str:
        return git_commits.push(clone, "origin", "main", commit_id).outcome

    hook(origin, "exit 1")
    assert outcome() == "refused"
    (origin / "hooks" / "pre-receive").unlink()
    other = cloned(tmp_path / "other", origin, "theirs")
    published(other, name="theirs")
    assert outcome() == "outdated"
    git(clone, "remote", "set-url", "origin", str(tmp_path / "nowhere"))
    result = git_commits.push(clone, "origin", "main", commit_id)
    assert result.outcome == "failed"
    assert "nowhere" in result.reason


@pytest.mark.parametrize(
    "words", ["denied", "Authentication failed", "[rejected]", "cannot lock ref", "\u00fcberf\u00fcllt"]
)
def test_the_words_of_a_server_decide_nothing(clone: Path, origin: Path, words: str) -> None:
    hook(origin, f"echo '{words}' >&2; exit 1")
    pauses: list[float] = []
    with pytest.raises(NotPushed, match="remote rejected") as caught:
        published(clone, pauses.append)
    assert len(pauses) == 1  # refused twice, and nobody else had pushed
    assert "tries" not in str(caught.value)


def test_a_refusal_while_others_push_is_tried_again(clone: Path, origin: Path, tmp_path: Path) -> None:
    """A server that was updating the branch for somebody else refuses as one that forbids it."""
    published(cloned(tmp_path / "first", origin, "first"), name="first")
    hook(origin, "exit 1")
    rivals = [cloned(tmp_path / name, origin, name) for name in ("second", "third")]

    def pause(_: float) -> None:
        (origin / "hooks" / "pre-receive").unlink(missing_ok=True)
        if rivals:
            rival = rivals.pop()
            published(rival, name=rival.name)
            hook(origin, "exit 1")

    commit_id = published(clone, pause)
    assert git(origin, "rev-parse", "main") == commit_id
    names = git(origin, "ls-tree", "-r", "--name-only", "main").split()
    assert names == ["x/first", "x/pushed", "x/second", "x/third"]


def test_a_network_that_is_down_for_a_moment_is_waited_for(clone: Path, origin: Path, tmp_path: Path) -> None:
    origin.rename(tmp_path / "away")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            (tmp_path / "away").rename(origin)

    assert published(clone, pause)
    assert len(pauses) == 3


def test_a_branch_that_is_pushed_to_all_the_time_ends_it(clone: Path, origin: Path, tmp_path: Path) -> None:
    rival = cloned(tmp_path / "rival", origin, "0")
    published(rival, name="0")
    hook(origin, "test -e $GIT_DIR/open || exit 1")
    count = 0

    def pause(_: float) -> None:
        nonlocal count
        count += 1
        (origin / "open").touch()
        (rival / "x" / str(count)).write_text("")
        published(rival, name=str(count))
        (origin / "open").unlink()

    with pytest.raises(NotPushed, match="6 tries"):
        published(clone, pause)
    assert count == 5


def test_a_language_changes_nothing(clone: Path, origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LANG", "LC_ALL", "LC_MESSAGES", "LANGUAGE"):
        monkeypatch.setenv(name, "de_DE.UTF-8")
    hook(origin, "exit 1")
    with pytest.raises(NotPushed, match="remote rejected"):
        published(clone)
