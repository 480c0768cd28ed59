"""examples/spot_instance: instances that are killed one after another end where an uninterrupted one does."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from bucket_service import BucketService
from project import PROGRAM, TINY, Project

JOB = Path(__file__).parents[1] / "examples" / "spot_instance" / "job.sh"
STEPS = ["--data-dir", "texts", *TINY, "--session-iters", "0", "--max-iters", "60", "--save-every", "4"]


def instance(project: Project, folder: Path) -> subprocess.Popen[str]:
    """A machine that boots: an empty disk, and the job in a process group of its own."""
    folder.mkdir()
    path = f"{Path(PROGRAM).parent}:{os.environ['PATH']}"
    environment = project.environment | {"REPOSITORY": str(project.root), "PATH": path, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [str(JOB), *STEPS], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def end_of(project: Project) -> tuple[int, dict[str, str]]:
    """The last step in a project, and the index of each part there."""
    newest = project.json("log")[0]
    return newest["step"], {name: part["index"] for name, part in newest["parts"].items()}


def test_killed_instances_end_as_one_that_was_never_stopped(tmp_path: Path, s3: BucketService) -> None:
    (tmp_path / "origin").mkdir()
    project = Project(tmp_path / "origin")
    project.environment = project.environment | s3.environment()
    project.call("init")
    project.call("remote", "add", "bucket", s3.url(), "--push", "auto")
    project.git("add", "-A")
    project.git("commit", "-qm", "a project")

    reached = []
    for number in range(2):
        process = instance(project, tmp_path / f"killed{number}")
        assert process.stdout is not None
        shown = []
        for line in process.stdout:
            shown.append(line)
            begun = len(reached) and any(text.startswith("resume ") for text in shown)
            there = project.json("ls", "bucket") if line.startswith("saved") else []
            if there and (begun or not reached) and there[0]["step"] > (reached[-1] if reached else 0):
                reached.append(there[0]["step"])
                break
        os.killpg(process.pid, signal.SIGKILL)
        rest, _ = process.communicate()
        assert len(reached) == number + 1, "".join(shown) + rest
    assert 0 < reached[0] < reached[1] < 60

    process = instance(project, tmp_path / "last")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "resume " in out
    last = project.copy(tmp_path / "unused")
    last.root = tmp_path / "last" / "project"

    (tmp_path / "whole").mkdir()
    whole = Project(tmp_path / "whole")
    whole.run("train", *STEPS, "--resume", "latest")
    step, parts = end_of(last)
    assert (step, parts["model"], parts["optimizer"]) == (
        60,
        *(end_of(whole)[1][name] for name in ("model", "optimizer")),
    )
