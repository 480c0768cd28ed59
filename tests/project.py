"""A project with the installed program, as a user has it: real processes in a real git repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = str(Path(sys.executable).with_name("castore"))

OPTIONS = """
    --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 2 --eval-samples 4 --threads 1 --warmup-iters 2
    --session-iters 4 --eval-every 2 --save-every 2 --min-improvement 0 --log-every 1
"""
TINY = OPTIONS.split()


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

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=self.root, check=True, capture_output=True, text=True
        ).stdout

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": self.root} | options
        return subprocess.Popen([PROGRAM, *arguments], text=True, env=self.environment, **options)

    def run(self, *arguments: str, code: int = 0, **options: Any) -> str:
        """What the program prints on standard output, or on standard error when it is to fail."""
        process = self.start(*arguments, **options)
        out, err = process.communicate()
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        return err if code else out

    def train(self, *arguments: str, code: int = 0) -> str:
        return self.run("train", "--data-dir", "texts", *TINY, *arguments, code=code)

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code))

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
