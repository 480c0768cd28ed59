"""Measure what a session in CI moves, with `castore ci` and with a cache of the whole folder, in bytes up and down.

python bench/handover.py [SESSIONS]      # 13 trained sessions, each on an empty machine, with a stand-in for GitHub's
                                         # cache; ten checkpoints are kept
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import castore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from actions_service import Service  # the stand-in that the tests use as well

SESSIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 13
OPTIONS = [
    "--n-layer", "2", "--n-embd", "128", "--connection-ratio", "1", "--batch-size", "4", "--eval-samples", "8",
    "--warmup-iters", "20", "--session-iters", "20", "--eval-every", "20", "--save-every", "20",
    "--min-improvement", "0", "--resume", "latest",
]  # fmt: skip
PROGRAM = str(Path(sys.executable).with_name("castore"))


def run(folder: Path, *command: str, **environment: str) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=os.environ | environment)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, service: Service, policy: list[str]) -> None:
    origin, plain = folder / "origin.git", folder / "plain"
    run(folder, "git", "init", "-q", "--bare", "-b", "main", str(origin))
    run(folder, "git", "clone", "-q", str(origin), str(plain))
    castore.Repo.init(plain)
    (plain / ".castore" / "config.toml").write_text("[store]\nfsync = false\n[retention]\nauto_gc = false\n")
    run(plain, "git", "add", ".")
    run(plain, "git", "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-qm", "a project")
    run(plain, "git", "push", "-q", "origin", "HEAD:main")
    for number in range(SESSIONS):
        machine = folder / f"machine-{number}"
        run(folder, "git", "clone", "-q", "--depth", "1", "-b", "main", f"file://{origin}", str(machine))
        job = service.environment()
        down, up = service.downloaded_bytes, service.uploaded_bytes
        before = castore.Repo.open(machine).checkpoints()
        run(machine, PROGRAM, "ci", "restore", "--resume", "latest", **job)
        down = service.downloaded_bytes - down
        run(machine, PROGRAM, "train", *OPTIONS)
        run(machine, PROGRAM, "ci", "save", "--commit", *policy, **job)
        up = service.uploaded_bytes - up
        # the plain route: the cache holds the whole folder, with the same checkpoints under the same policy
        plain_down = size(plain / ".castore" / "objects")
        run(plain, "git", "pull", "-q", "origin", "main")
        shutil.copytree(machine / ".castore" / "objects", plain / ".castore" / "objects", dirs_exist_ok=True)
        run(plain, PROGRAM, "gc", "--grace", "0", *policy)
        plain_up = size(plain / ".castore" / "objects")
        new = castore.Repo.open(machine).checkpoints()[0].manifest
        if number == SESSIONS - 1:
            made, match = (
                sum(part.stored_bytes for part in manifest.parts.values()) for manifest in (new, before[0].manifest)
            )
            print(f"{' '.join(policy)}: session {number + 1}")
            print(f"  castore ci      up {up:11,} B, {up / made:.2f} x the new checkpoint")
            print(f"                down {down:11,} B, {down / match:.2f} x the match")
            print(f"  actions/cache   up {plain_up:11,} B, {plain_up / up:.1f} x as much")
            print(f"                down {plain_down:11,} B, {plain_down / down:.1f} x as much")


def main() -> None:
    for policy in (["--keep", "10", "--keep-optimizer", "10"], ["--keep", "10", "--keep-optimizer", "2"]):
        with tempfile.TemporaryDirectory() as folder, Service() as service:
            measure(Path(folder), service, policy)


if __name__ == "__main__":
    main()
