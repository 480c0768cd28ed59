"""Measure pushes to and fetches from a bucket in SeaweedFS, beside boto3's transfer manager and `dvc push`.

    python bench/remotes.py

All move the same state over loopback, in turn, to a new folder of the bucket each time; medians of the rounds. The
server shares the processors with whoever pushes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "peers"))

import states
from buckets import BUCKET, S3Server, seaweedfs
from start import first_step

import castore

PROGRAM = str(Path(sys.executable).with_name("castore"))
ROOT = Path(__file__).parents[1]
# runs a command and prints its seconds and the most memory (MB) that it had
MEASURE = """
import resource, subprocess, sys, time
begun = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000)
sys.exit(code)
"""


def run(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Return (seconds, MB of memory) of a command in a folder."""
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    if process.returncode:
        raise SystemExit(f"{command}: {process.stdout}{process.stderr}")
    seconds, memory = map(float, process.stdout.split())
    return seconds, memory


class Bench:
    """A project with one checkpoint, a server, and what others push of the same."""

    def __init__(self, folder: Path, server: S3Server, state: Any, dvc: Path) -> None:
        self.folder, self.server, self.dvc = folder, server, dvc
        self.environment = os.environ | server.environment() | {"DVC_NO_ANALYTICS": "true"}
        (folder / "project").mkdir()
        self.repo = castore.Repo.init(folder / "project")
        subprocess.run(["git", "init", "--quiet"], cwd=folder / "project", check=True)
        self.saved = self.repo.save(state, run="main", step=1, metrics={"val_loss": 2.0})
        self.stored = {object_id: found.size for object_id, found in self.repo.store.stored().items()}
        self.url = ""
        import torch

        (folder / "dvc").mkdir()
        for name, part in state.items():
            torch.save(part, folder / "dvc" / f"{name}.pt")

    @property
    def bytes(self) -> int:
        return sum(self.stored.values())

    def new_folder(self) -> None:
        self.url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        self.castore("remote", "add", "bucket", self.url, "--force")

    def castore(self, *arguments: str, folder: str = "project") -> tuple[float, float]:
        return run([PROGRAM, *arguments], self.folder / folder, self.environment)

    def push(self) -> tuple[float, float]:
        self.new_folder()
        return self.castore("push")

    def clone(self) -> None:
        """Another machine: what git has, and no data."""
        shutil.rmtree(self.folder / "clone", ignore_errors=True)
        ignored = shutil.ignore_patterns("objects", "tmp", "cache")
        shutil.copytree(self.repo.root, self.folder / "clone" / ".castore", ignore=ignored)
        for name in ("objects", "tmp"):
            (self.folder / "clone" / ".castore" / name).mkdir()

    def fetch(self, *arguments: str) -> tuple[float, float]:
        self.clone()
        return self.castore("fetch", "best", *arguments, folder="clone")

    def manager(self) -> Any:
        import boto3
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        client = boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], region_name="us-east-1")
        return create_transfer_manager(client, TransferConfig())

    def boto_push(self) -> float:
        """Upload castore's very objects by boto3's transfer manager, at its own settings."""
        prefix = uuid.uuid4().hex
        begun = time.perf_counter()
        with self.manager() as manager:
            for object_id in self.stored:
                manager.upload(str(self.repo.store.path(object_id)), BUCKET, f"{prefix}/{object_id}")
        return time.perf_counter() - begun

    def boto_fetch(self) -> float:
        """Download them into files, which are not synced, and not verified."""
        prefix = self.url.rpartition("/")[2]
        folder = self.folder / "boto"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        begun = time.perf_counter()
        with self.manager() as manager:
            for object_id in self.stored:
                manager.download(BUCKET, f"{prefix}/objects/{object_id[:2]}/{object_id}", str(folder / object_id))
        return time.perf_counter() - begun

    def dvc_push(self) -> float:
        """Push the state's files, as torch.save writes them, by DVC; adding them to its cache is not counted."""
        folder = self.folder / "dvc"
        for command in (["init", "--no-scm", "-q"], ["add", "-q", *(path.name for path in folder.glob("*.pt"))]):
            if command[0] != "init" or not (folder / ".dvc").exists():
                run([str(self.dvc), *command], folder, self.environment)
        url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        run([str(self.dvc), "remote", "add", "-f", "-d", "bucket", url], folder, self.environment)
        endpoint = self.environment["AWS_ENDPOINT_URL"]
        run([str(self.dvc), "remote", "modify", "bucket", "endpointurl", endpoint], folder, self.environment)
        return run([str(self.dvc), "push", "-q"], folder, self.environment)[0]


def ratio(others: list[float], ours: list[float]) -> str:
    paired = [other / own for other, own in zip(others, ours, strict=True)]
    return f"{statistics.median(paired):.2f} x ({min(paired):.2f} to {max(paired):.2f})"


def cold_start(server: S3Server, folder: Path, rounds: int) -> None:
    """Print how much longer a fresh machine takes to its first step than a download and a start one after the other."""
    environment = os.environ | server.environment()
    shape = ["--n-layer", "6", "--n-head", "6", "--n-embd", "384", "--batch-size", "2", "--block-size", "64"]
    train = [PROGRAM, "train", "--resume", "best", "--max-iters", "100000", "--log-every", "1", *shape]
    project = folder / "nanecho"
    project.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    run([PROGRAM, "init"], project, environment)
    run([PROGRAM, "remote", "add", "bucket", f"s3://{BUCKET}/{uuid.uuid4().hex}"], project, environment)
    run([*train, "--session-iters", "2"], project, environment)
    run([PROGRAM, "push", "--all"], project, environment)
    objects = project / ".castore" / "objects"
    found = []
    for _ in range(rounds):
        there = first_step(train, project, environment)
        shutil.rmtree(objects)
        objects.mkdir()
        fresh = first_step(train, project, environment)
        shutil.rmtree(objects)
        objects.mkdir()
        download = run([PROGRAM, "fetch", "best"], project, environment)[0]
        found.append((fresh, download, there))
    fresh, download, there = (statistics.median(column) for column in zip(*found, strict=True))
    over = statistics.median(fresh / (download + there) for fresh, download, there in found)
    print(f"first step on a fresh machine {fresh:.2f} s; fetch alone {download:.2f} s; data there {there:.2f} s")
    print(f"first step / (fetch + start)          {over:.2f}, bar 1.3")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the state, and one round")
    parser.add_argument("--programs", type=Path, default=ROOT / "build" / "peers" / "venv" / "bin")
    parser.add_argument("--dvc", type=Path, default=ROOT / "build" / "bench" / "venv" / "bin" / "dvc")
    options = parser.parse_args()
    rounds = 1 if options.quick else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "server").mkdir()
        server = seaweedfs(options.programs, folder / "server", volume_mb=1024)
        os.environ.update(server.environment())
        try:
            state = states.synthetic(states.gpt2(layers=2, vocabulary=10_000) if options.quick else states.gpt2())
            bench = Bench(folder, server, state, options.dvc)
            size = f"{len(bench.stored)} objects of {bench.bytes / 1e6:,.0f} MB"
            print(f"{states.nbytes(state) / 1e6:,.0f} MB of state, {size}")
            measure(bench, rounds)
            del state
            cold_start(server, folder, rounds)
        finally:
            server.close()


def measure(bench: Bench, rounds: int) -> None:
    columns: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {"push": [], "fetch": []}

    def note(name: str, seconds: float) -> None:
        columns.setdefault(name, []).append(seconds)

    steps: list[tuple[str, Callable[[], tuple[float, float] | float]]] = [
        ("boto3 push", bench.boto_push),
        ("push", bench.push),
        ("again", lambda: bench.castore("push")),
        ("boto3 fetch", bench.boto_fetch),
        ("fetch", bench.fetch),
    ]
    if bench.dvc.exists():
        steps.append(("dvc push", bench.dvc_push))
    for _ in range(rounds):
        for name, step in steps:
            result = step()
            note(name, result[0] if isinstance(result, tuple) else result)
            if isinstance(result, tuple) and name in memory:
                memory[name].append(result[1])
    for name, seconds in columns.items():
        rate = bench.bytes / 1e6 / statistics.median(seconds)
        print(f"{name:12} {statistics.median(seconds):7.2f} s {rate:7,.0f} MB/s")
    print(f"boto3 push / push      {ratio(columns['boto3 push'], columns['push'])}, bar 1")
    print(f"boto3 fetch / fetch    {ratio(columns['boto3 fetch'], columns['fetch'])}, bar 1")
    if "dvc push" in columns:
        print(f"dvc push / push        {ratio(columns['dvc push'], columns['push'])}, bar 2")
    print(f"second push            {statistics.median(columns['again']):.2f} s, bar 1 s for 400 objects")
    print(f"memory of the process  push {max(memory['push']):.0f} MB, fetch {max(memory['fetch']):.0f} MB, bar 256 MB")
    bench.clone()
    process = subprocess.run(
        [PROGRAM, "fetch", "best", "--parts", "model", "--json"],
        cwd=bench.folder / "clone", env=bench.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    clone = castore.Repo.open(bench.folder / "clone")
    moved = sum(found.size for found in clone.store.stored().values())
    wanted = bench.saved.manifest.parts["model"].stored_bytes
    objects = json.loads(process.stdout)[0]["objects"]
    print(f"bytes of the model fetched alone / that part's  {moved / wanted:.4f} ({objects} objects)")


if __name__ == "__main__":
    main()
