"""Measure the time from `castore train --resume best` to the end of its first step, on a machine that is prepared.

    python bench/start.py

Data is prepared and a checkpoint is there. Printed are medians, and what remains over `import torch` in the same round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROUNDS = 7
PROGRAM = str(Path(sys.executable).with_name("castore"))
TRAIN = [PROGRAM, "train", "--resume", "best", "--max-iters", "100000", "--log-every", "1"]


def first_step(command: list[str], folder: str | Path, environment: Mapping[str, str]) -> float:
    """Return the seconds until the first step is reported, which ends the process."""
    begun = time.perf_counter()
    settings = {**environment, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=settings) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                seconds = time.perf_counter() - begun
                process.kill()
                return seconds
    raise SystemExit("the session made no step")


def import_torch() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - begun


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
        subprocess.run([PROGRAM, "init"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*TRAIN, "--session-iters", "20"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        rounds = [(import_torch(), first_step(TRAIN, folder, os.environ)) for _ in range(ROUNDS)]
    torch, step = (statistics.median(column) for column in zip(*rounds, strict=True))
    over = [step - torch for torch, step in rounds]
    print(f"import torch {torch:.2f} s; first step after {step:.2f} s")
    print(f"over import torch {statistics.median(over):.2f} s ({min(over):.2f} to {max(over):.2f}), bar 1.5 s")


if __name__ == "__main__":
    main()
