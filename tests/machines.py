"""Machines of CI jobs: fresh clones with stores of their own, a git server, and the cache service."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from actions_service import Service as Cache
from builders import parts as plain_parts
from project import Project

import castore
from castore import Repo
from castore.github import sessions
from castore.progress import ignore_progress
from castore.remotes.github_service import CacheService

MAIN = "refs/heads/main"


def parts(seed: int) -> dict[str, Any]:
    made = plain_parts(seed)
    return {"model": made["model"], "optimizer": plain_parts(seed + 1000)["model"], "trainer": made["trainer"]}


class World:
    """A git server and the cache; every machine is a fresh clone with nothing stored."""

    def __init__(self, folder: Path, cache: Cache) -> None:
        self.folder, self.cache = folder, cache
        self.origin = folder / "origin.git"
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(self.origin)], check=True)
        (folder / "first").mkdir()
        first = Project(folder / "first")
        first.git("checkout", "-q", "-b", "main")
        first.git("remote", "add", "origin", f"file://{self.origin}")
        Repo.init(first.root)
        self.configure(first, "[store]\nfsync = false\nchunk_size = '64KiB'\n")
        first.git("add", ".")
        first.git("commit", "-qm", "a project")
        first.git("push", "-q", "origin", "main")
        self.count = 0

    @staticmethod
    def configure(project: Project, text: str) -> None:
        (project.root / ".castore" / "config.toml").write_text(text)

    def machine(self, ref: str = MAIN, mode: str | None = None, branch: str = "main") -> Machine:
        self.count += 1
        root = self.folder / f"machine-{self.count}"
        subprocess.run(
            ["git", "clone", "-q", "--depth", "1", "-b", branch, f"file://{self.origin}", str(root)], check=True
        )
        return Machine(root, self.cache, ref, mode)


class Machine(Project):
    """A job on a machine of its own."""

    def __init__(self, root: Path, cache: Cache, ref: str, mode: str | None) -> None:
        self.root = root
        self.job = cache.environment(ref, mode)
        self.summary, self.outputs = root / ".git" / "summary.md", root / ".git" / "outputs"
        plain = Project.environment_of_tests()
        self.environment = plain | self.job | {
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_OUTPUT": str(self.outputs),
        }  # fmt: skip

    @property
    def repo(self) -> Repo:
        return Repo.open(self.root)

    def restore(self, want: str = "best", allow_fresh: bool = False) -> sessions.RestoredSession:
        repo = self.repo
        remote, _ = sessions.connect(repo, CacheService.of_job(self.job))
        return sessions.restore(repo, remote, want, allow_fresh=allow_fresh, progress=ignore_progress)

    def save(self, **options: Any) -> sessions.SavedSession:
        repo = self.repo
        remote, _ = sessions.connect(repo, CacheService.of_job(self.job))
        usual = {"commit": True, "ref": self.job["GITHUB_REF"], "progress": ignore_progress, "pause": lambda _: None}
        return sessions.save(repo, remote, **(usual | options))

    def checkpoint(
        self, step: int, loss: float, *, seed: int | None = None, parent: str | None = None
    ) -> castore.SaveResult:
        state = parts(step if seed is None else seed)
        return self.repo.save(state, run="a", step=step, metrics={"val_loss": loss}, parent=parent)

    def told(self) -> dict[str, str]:
        lines = self.outputs.read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def stored(self) -> int:
        return len(self.repo.store.stored())
