from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import parts, tree
from project import Project

from castore import Repo
from castore.doctor import Check, examine
from castore.errors import RepoNotFound, StorageError
from castore.storage import fs

NOW = datetime.now(UTC)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def found(repo: Repo) -> dict[str, Check]:
    """The checks by subject, of which there is one each."""
    checks = list(examine(NOW, repo.root.parent))
    assert len({check.subject for check in checks}) == len(checks)
    assert all(check.advice for check in checks if check.level != "ok")
    return {check.subject: check for check in checks}


@pytest.fixture
def committed(repo: Repo) -> Repo:
    """A repository with a checkpoint, all of it committed."""
    git(repo.root.parent, "init", "-q")
    repo.save(parts(1), run="ci", step=1)
    git(repo.root.parent, "add", ".castore")
    git(repo.root.parent, "commit", "-q", "-m", "x")
    return repo


def test_a_healthy_repository_is_ok_in_every_respect_and_left_as_it_is(committed: Repo) -> None:
    before = tree(committed.root)
    checks = found(committed)
    # the disk of whoever runs the tests may be full or far away
    assert {one.subject for one in checks.values() if one.level != "ok"} <= {"space", "file system"}
    assert {"settings", "permissions", "hard links", "locks", "space", "lock", "leftovers", "git", "remotes"} <= set(
        checks
    )
    assert checks["git"].text.startswith("3 files of .castore")
    assert tree(committed.root) == before


def test_no_repository_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RepoNotFound):
        list(examine(NOW, tmp_path))


def test_wrong_settings_are_a_problem_and_the_rest_is_still_checked(committed: Repo) -> None:
    (committed.root / "config.toml").write_text("[store]\nthreads = -1\n")
    checks = found(committed)
    assert checks["settings"].level == "problem"
    assert "threads" in checks["settings"].text
    assert checks["manifests"].level == "ok"


@pytest.mark.parametrize("name", ["objects", "tmp", "manifests"])
def test_a_folder_that_is_none_is_a_problem(repo: Repo, name: str) -> None:
    for file in (repo.root / name).iterdir():
        file.unlink()
    (repo.root / name).rmdir()
    (repo.root / name).write_text("")
    check = found(repo)["permissions"]
    assert (check.level, str(repo.root / name) in check.text) == ("problem", True)


def hold(root: str, exclusive: bool, ready: Any, done: Any) -> None:
    with fs.lock(Path(root, "lock"), exclusive=exclusive, timeout=1):
        ready.set()
        done.wait(60)


@pytest.mark.parametrize(
    ("exclusive", "says"), [(True, "an exclusive lock is held, as by gc"), (False, "other processes save or load")]
)
def test_who_holds_the_lock_is_told(repo: Repo, start: Callable[..., Any], exclusive: bool, says: str) -> None:
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    ready, done = context.Event(), context.Event()
    process = start(hold, str(repo.root), exclusive, ready, done)
    ready.wait(60)
    check = found(repo)["lock"]
    done.set()
    assert check.level == "warning"
    assert says in check.text
    if os.path.exists("/proc/locks"):
        assert check.text.endswith(f"process {process.pid}")
    process.join()
    assert found(repo)["lock"].level == "ok"


@pytest.mark.parametrize("name", ["tmp", "trash", "quarantine"])
def test_leftovers_are_told_with_their_size(repo: Repo, name: str) -> None:
    (repo.root / name).mkdir(exist_ok=True)
    (repo.root / name / "x").write_bytes(bytes(2_000_000))
    check = found(repo)[f"{name}/"]
    assert (check.level, check.text) == ("warning", "1 file, 2.0 MB")


def test_outside_of_git_is_a_warning(repo: Repo) -> None:
    assert (found(repo)["git"].level, "git init" in found(repo)["git"].advice) == ("warning", True)


def test_uncommitted_manifests_are_a_warning(committed: Repo) -> None:
    committed.save(parts(2), run="ci", step=2)
    check = found(committed)["git"]
    assert check.level == "warning"
    assert "1 file of .castore not committed, such as .castore/manifests/ci/000000002-" in check.text


def test_an_ignored_repository_is_a_problem(repo: Repo) -> None:
    git(repo.root.parent, "init", "-q")
    (repo.root.parent / ".gitignore").write_text(".castore/\n")
    check = found(repo)["git"]
    assert check.level == "problem"
    assert "is ignored" in check.text


def test_tracked_data_is_a_problem(committed: Repo) -> None:
    git(committed.root.parent, "add", "-f", ".castore/objects")
    checks = [one for one in examine(NOW, committed.root) if one.subject == "git"]
    assert [one.level for one in checks] == ["ok", "problem"]
    assert "git rm -r --cached" in checks[1].advice


def test_git_that_fails_is_a_problem(committed: Repo) -> None:
    (committed.root.parent / ".git" / "HEAD").write_text("nonsense")
    assert found(committed)["git"].level == "problem"


def test_a_remote_that_is_not_there_is_a_warning(repo: Repo) -> None:
    (repo.root / "config.toml").write_text('[remotes]\nnear = "near"\nfar = "/nowhere/at/all"\n')
    (repo.root.parent / "near" / "objects").mkdir(parents=True)
    checks = found(repo)
    assert (checks["remote near"].level, checks["remote far"].level) == ("ok", "warning")


def test_a_damaged_manifest_is_a_problem(committed: Repo) -> None:
    (path,) = committed.catalog.root.glob("*/*.json")
    path.write_text("{}")
    check = found(committed)["manifests"]
    assert (check.level, str(path) in check.text) == ("problem", True)


def test_what_gc_could_not_read_on_another_branch_is_a_problem(committed: Repo) -> None:
    assert found(committed)["gc"].level == "ok"
    top = committed.root.parent
    git(top, "checkout", "-q", "-b", "other")
    broken = committed.catalog.root / "ci" / "000000009-0123456789ab.json"
    broken.write_text("{}")
    git(top, "add", ".castore")
    git(top, "commit", "-q", "-m", "x")
    git(top, "checkout", "-q", "-")
    checks = found(committed)
    assert checks["manifests"].level == "ok"
    assert checks["gc"].level == "problem"
    assert checks["gc"].text.startswith("gc would refuse: ")


def test_a_git_that_fails_is_why_gc_would_refuse(committed: Repo) -> None:
    (committed.root.parent / ".git" / "HEAD").write_text("nonsense")
    assert found(committed)["gc"].text.startswith("gc would refuse: git ")


def test_gc_is_asked_itself_what_it_would_do(committed: Repo) -> None:
    """Objects without one manifest: everything can be read, and gc refuses nevertheless."""
    for path in committed.catalog.root.rglob("*.json"):
        path.unlink()
    shutil.rmtree(committed.root.parent / ".git")
    assert (
        found(committed)["gc"].text
        == f"gc would refuse: there are {len(committed.store.stored())} objects, but not one manifest"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
@pytest.mark.parametrize("name", ["objects", "tmp", "trash", "manifests"])
@pytest.mark.parametrize("source", ["another", "the same"])
def test_folders_that_files_cannot_be_moved_between_are_a_problem(repo: Repo, name: str, source: str) -> None:
    folder = repo.root / name
    call = ["mount", "--bind", folder, folder] if source == "the same" else ["mount", "-t", "tmpfs", "none", folder]
    subprocess.run(call, check=True)
    try:
        check = found(repo)["folders"]
    finally:
        subprocess.run(["umount", folder], check=True)
    assert check.level == "problem"
    assert str(folder) in check.text
    assert "is on another file system than" in check.text
    assert found(repo)["folders"].level == "ok"


def test_a_file_system_whose_names_cannot_be_made_durable_is_a_problem(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some that are reached over FUSE."""

    def refuse(path: Path) -> None:
        raise StorageError("sync", str(path), OSError(errno.EINVAL, os.strerror(errno.EINVAL)))

    (repo.root / "config.toml").write_text("")  # the defaults: with fsync
    monkeypatch.setattr(fs, "sync_directory", refuse)
    check = found(repo)["folders"]
    assert check.level == "problem"
    assert check.text.endswith("objects: Invalid argument: names are not durable there")


def test_manifests_from_the_future_are_a_warning(committed: Repo) -> None:
    (entry,) = committed.checkpoints()
    created = datetime.fromisoformat(entry.manifest.created)
    top = committed.root.parent
    assert "clock" not in {one.subject for one in examine(created - timedelta(hours=23), top)}
    (check,) = [one for one in examine(created - timedelta(hours=25), top) if one.subject == "clock"]
    assert check.level == "warning"
    assert entry.id[:12] in check.text


def test_the_advice_on_tracked_data_works(committed: Repo) -> None:
    git(committed.root.parent, "add", "-f", ".castore/objects")
    (advice,) = [one.advice for one in examine(NOW, committed.root) if one.text.startswith("git tracks")]
    git(committed.root.parent, *advice.split("`")[1].split()[1:])
    assert "git tracks" not in "".join(one.text for one in examine(NOW, committed.root))


def test_what_a_filter_changed_on_its_way_into_git_is_told(tmp_path: Path) -> None:
    """A clone would find manifests whose bytes are not what their names say."""
    project = Project(tmp_path)
    Repo.init(tmp_path).save({"model": {"x": 1}}, run="r", step=1)
    project.git("add", ".castore")
    project.git("commit", "-qm", "one")
    assert "other bytes" not in project.run("doctor")
    project.git("config", "filter.upper.clean", "tr a-z A-Z")
    (tmp_path / ".gitattributes").write_text("*.json filter=upper\n")
    Repo.open(tmp_path).save({"model": {"x": 2}}, run="r", step=2)
    project.git("add", ".castore")
    assert "other bytes" not in project.run("doctor")  # castore's own attributes keep filters off its files
    (tmp_path / ".castore" / ".gitattributes").unlink()
    Repo.open(tmp_path).save({"model": {"x": 3}}, run="r", step=3)
    project.git("add", ".castore")
    out = project.start("doctor").communicate()[0]
    assert re.search(r"problem git: git has other bytes of \d files? than were written, such as manifests/r/", out)
    assert "restore .castore/.gitattributes" in out
