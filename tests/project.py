"""A project with the installed program, as a user has it: a real git repository, and real processes or this one."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from warm import WarmProcess, at_start

PROGRAM = str(Path(sys.executable).with_name("castore"))

OPTIONS = """
    --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --eval-samples 4 --threads 1 --warmup-iters 2
    --session-iters 4 --eval-every 2 --save-every 2 --min-improvement 0 --log-every 1
"""
TINY = OPTIONS.split()

# they change what a process is left with: signal handlers, torch's settings
OWN_PROCESS = {"train", "demo", "ci"}


def read_terminal(ours: int) -> str:
    """What is written to a pseudo-terminal until nobody holds its other side. Closes ``ours``."""
    shown = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    return shown.decode()


class Project:
    """A git repository with some text, and the program run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.git("init", "-q")
        (root / "texts").mkdir()
        for i in range(6):
            (root / "texts" / f"{i}.txt").write_text("".join(f"{j} bottles of beer number {i}\n" for j in range(40)))
        self.environment = self.environment_of_tests()

    @staticmethod
    def environment_of_tests() -> dict[str, str]:
        """No colour and no width of whoever runs the tests, and nothing of a job that does."""
        return {
            name: value
            for name, value in os.environ.items()
            if name not in ("COLUMNS", "FORCE_COLOR", "CI") and not name.startswith(("GITHUB_", "ACTIONS_"))
        } | {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100"}

    def copy(self, root: Path) -> Project:
        """The same project in another folder."""
        shutil.copytree(self.root, root, symlinks=True)
        project = Project.__new__(Project)
        project.root, project.environment = root, self.environment
        return project

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=self.root, check=True, capture_output=True, text=True
        ).stdout

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        options = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "cwd": self.root,
            "env": self.environment,
        } | options
        # elsewhere a process with torch loaded is no safe one to fork
        is_warm = "train" in arguments and "--help" not in arguments and sys.platform == "linux"
        if is_warm and at_start(options["env"]) == at_start(os.environ) and options["stdout"] is not None:
            return WarmProcess([PROGRAM, *arguments], text=True, **options)
        return subprocess.Popen([PROGRAM, *arguments], text=True, **options)

    def run(self, *arguments: str, code: int = 0, **options: Any) -> str:
        """What the program prints on standard output, or on standard error when it is to fail. In a process."""
        process = self.start(*arguments, **options)
        out, err = process.communicate()
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        return err if code else out

    def call(self, *arguments: str, code: int = 0, cwd: Path | None = None) -> str:
        """What :meth:`run` returns, without a process: quick, for what a command prints."""
        from castore.__main__ import main

        assert "--help" in arguments or not OWN_PROCESS & set(arguments[:1])
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        thresholds = gc.get_threshold()
        with (
            contextlib.chdir(cwd or self.root),
            mock.patch.dict(os.environ, self.environment, clear=True),
            mock.patch.object(sys, "argv", ["castore", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main()
            except SystemExit as end:
                returned = end.code or 0
            finally:
                gc.set_threshold(*thresholds)
        texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
        assert returned == code, f"exit {returned}\n{texts[0]}\n{texts[1]}"
        return texts[1] if code else texts[0]

    def train(self, *arguments: str, code: int = 0) -> str:
        return self.run("train", "--data-dir", "texts", *TINY, *arguments, code=code)

    def json(self, *arguments: str, code: int = 0) -> Any:
        """What a command prints with --json."""
        start = self.run if OWN_PROCESS & set(arguments[:1]) else self.call
        return json.loads(start(*arguments, "--json", code=code))

    def training(self, *arguments: str) -> subprocess.Popen[str]:
        """A session far too long to end by itself, at a moment at which it has saved something."""
        process = self.start(
            "train", "--data-dir", "texts", *TINY, "--session-iters", "0", "--max-iters", "1000000", *arguments
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("saved"):
                return process
        raise AssertionError(process.communicate()[1])
