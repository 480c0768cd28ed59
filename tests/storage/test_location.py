"""Links that came with a clone are refused before anything is followed; data on another disk is a local setting."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from builders import exact, parts
from project import Project

from castore import Repo
from castore.errors import ConfigError
from castore.gc import collect_garbage
from castore.storage.location import NEVER_LINKS

COMMANDS = ["log", "gc", "verify", "doctor", "stats", "pin latest", "init", "report --format md"]


@pytest.mark.parametrize("name", NEVER_LINKS)
def test_a_link_in_a_clone_is_refused_and_nothing_behind_it_is_touched(tmp_path: Path, name: str) -> None:
    project = Project(tmp_path)
    repo = Repo.init(tmp_path)
    repo.save(parts(1), run="r", step=1, metrics={"val_loss": 1.0})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ("ab" * 32)).write_text("mine")
    (elsewhere / "old").write_text("mine")
    os.utime(elsewhere / "old", (0, 0))
    path = repo.root / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    before = sorted(file.name for file in elsewhere.iterdir())
    for command in COMMANDS:
        code = 1 if command == "doctor" else 2
        process = project.start(*command.split())
        out, err = process.communicate()
        assert process.returncode == code, (command, out, err)
        assert f"{name} is a symbolic link" in out + err or f"{name}: is a symbolic link" in out + err
    assert sorted(file.name for file in elsewhere.iterdir()) == before


def test_links_deeper_down_are_refused_too(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (repo.root / "objects" / "ab").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="objects/ab: is a symbolic link"):
        Repo.open(tmp_path)
    (repo.root / "objects" / "ab").unlink()
    (repo.root / "sessions").mkdir()
    (repo.root / "sessions" / "main").symlink_to(tmp_path / "elsewhere")
    from datetime import UTC, datetime

    with pytest.raises(ConfigError, match="sessions/main: is a symbolic link"):
        Repo.open(tmp_path).add_session("main", datetime.now(UTC), {})
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_data_on_another_disk_is_a_setting_of_this_machine(tmp_path: Path) -> None:
    disk, here = tmp_path / "disk", tmp_path / "here"
    here.mkdir()
    project = Project(here)
    project.run("init")
    project.git("add", "-A")
    project.git("commit", "-qm", "one")
    (here / ".castore" / "local.toml").write_text(f'data = "{disk}"\n')
    assert f"{disk} holds no objects/: mount that disk" in project.run("log", code=2)
    project.run("init")
    repo = Repo.open(here)
    saved = repo.save(parts(1), run="r", step=1, metrics={"val_loss": 1.0})
    assert len(list((disk / "objects").glob("*/*"))) > 3
    assert not list((here / ".castore" / "objects").glob("*/*"))
    assert exact(Repo.open(here).load(saved.id)) == exact(parts(1))
    assert project.run("verify").endswith("all is well\n")
    assert f"in {disk}, as local.toml says" in project.run("doctor")
    assert "local.toml" not in project.git("status", "--porcelain", "--untracked-files=all")


def test_a_local_setting_that_came_with_a_clone_is_refused(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.run("init")
    (tmp_path / ".castore" / "local.toml").write_text(f'data = "{tmp_path}/elsewhere"\n')
    project.git("add", "-f", ".castore/local.toml")
    assert "local.toml: is known to git" in project.run("log", code=2)
    project.git("rm", "-q", "--cached", ".castore/local.toml")
    (tmp_path / ".castore" / "local.toml").write_text('data = "relative"\n')
    assert "is not an absolute path" in project.run("log", code=2)
    (tmp_path / ".castore" / "local.toml").write_text("date = 3\n")
    assert "local.toml: " in project.run("log", code=2)


def test_a_linked_repository_has_to_be_allowed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    Repo.init(real)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / ".castore").symlink_to(real / ".castore")
    with pytest.raises(ConfigError, match="is a symbolic link: if it is yours"):
        Repo.open(tmp_path / "here")
    (real / ".castore" / "local.toml").write_text("allow_link = true\n")
    saved = Repo.open(tmp_path / "here").save(parts(1), run="r", step=1)
    assert exact(Repo.open(real).load(saved.id)) == exact(parts(1))


def test_data_belongs_to_one_repository(tmp_path: Path) -> None:
    """A second one would take the first one's objects for garbage."""
    disk, first, second = tmp_path / "disk", tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / ".castore").mkdir(parents=True)
        (folder / ".castore" / "local.toml").write_text(f'data = "{disk}"\n')
    saved = Repo.init(first).save(parts(1), run="r", step=1)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"{disk} holds the data of {first}/.castore: two repositories"):
            Repo.init(second)
    shutil.copytree(first, tmp_path / "copy")
    with pytest.raises(ConfigError, match="two repositories"):
        Repo.open(tmp_path / "copy")
    first.rename(tmp_path / "moved")
    (disk / "repository").unlink()
    assert exact(Repo.init(tmp_path / "moved").load(saved.id)) == exact(parts(1))
    with pytest.raises(ConfigError, match="two repositories"):
        Repo.open(tmp_path / "copy")


def owned(folder: Path) -> dict[str, int]:
    """The permissions of everything in a repository but what git made."""
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode)
        for path in (folder, *folder.rglob("*"))
        if not path.is_symlink()
    }


def test_a_shared_repository_is_its_groups_whatever_the_umask(tmp_path: Path) -> None:
    project = Project(tmp_path)
    before = os.umask(0o077)
    try:
        Repo.init(tmp_path).save(parts(1), run="r", step=1)
        (tmp_path / ".castore" / "local.toml").write_text('shared = "group"\n')
        project.run("log")
        project.train("--allow-fresh")
        project.run("pin", "latest")
        project.run("gc", "--keep", "1")
        project.run("verify")
    finally:
        os.umask(before)
    for path, mode in owned(tmp_path / ".castore").items():
        wanted = 0o2070 if (tmp_path / ".castore" / path).is_dir() else 0o060
        assert mode & wanted == wanted, path
        assert not mode & 0o002, path


def test_without_that_a_repository_is_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        Repo.init(tmp_path).save(parts(1), run="r", step=1)
    finally:
        os.umask(before)
    assert not any(mode & 0o022 for mode in owned(tmp_path / ".castore").values())


def test_what_a_group_shares_is_no_setting_of_a_clone(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    (repo.root / "config.toml").write_text('[store]\nshared = "group"\n')
    with pytest.raises(ConfigError, match=r"unknown field `shared`.*in local.toml beside this file"):
        Repo.open(tmp_path)


def save_as(user: int, group: int, folder: Path, step: int) -> None:
    """Save, pin, unpin, forget and collect garbage as another user, whom the umask lets share nothing."""
    os.umask(0o077)
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    repo = Repo.init(folder) if step == 1 else Repo.open(folder)
    repo.save({"model": {"x": step, "big": bytes(200_000) + bytes([step])}}, run="r", step=step)
    latest = repo.find("latest")
    repo.pin(latest)
    repo.unpin(latest.id)
    if step == 3:
        repo.forget(latest)
    collect_garbage(repo)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two other users")
def test_two_users_of_a_group_share_a_store(start: Callable[..., BaseProcess]) -> None:
    group = 54321
    with tempfile.TemporaryDirectory() as name:  # where others can get to
        home = Path(name)
        os.chown(home, 54001, group)
        home.chmod(0o2775)
        for step, user in enumerate((54001, 54002, 54001, 54003), start=1):
            process = start(save_as, user, group, home, step)
            process.join()
            assert process.exitcode == 0
            if step == 1:
                (home / ".castore" / "local.toml").write_text('shared = "group"\n')
        assert [entry.manifest.step for entry in Repo.open(home).checkpoints()] == [4, 2, 1]
        stranger = start(save_as, 54004, 54004, home, 5)
        stranger.join()
        assert stranger.exitcode == 1
