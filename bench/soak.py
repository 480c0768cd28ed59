"""Run eight writers that save and load beside a gc that never stops: nothing that is kept may be lost.

python bench/soak.py [--seconds 60] [--writers 8]
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import castore
from castore.policy.retention import Policy

CONFIG = '[store]\nchunk_size = "64KiB"\nthreads = 1\nfsync = false\n[retention]\nauto_gc = false\n'


def policy(writers: int) -> Policy:
    """Return a policy that keeps every writer's newest checkpoint: one is being saved at a time."""
    return Policy(keep=2, keep_latest=20 * writers, keep_optimizer=20 * writers)


def state(run: int, step: int) -> dict[str, object]:
    # some chunks belong to one save, some come back after gc has deleted them, some are shared by all
    return {"model": {"own": f"{run}/{step}" * 5000, "turn": f"{step % 7}" * 90_000, "shared": "x" * 90_000}}


def write(folder: str, run: int, seconds: float, saves: multiprocessing.Queue[int]) -> None:
    repo = castore.Repo.open(folder)
    deadline = time.monotonic() + seconds
    step = 0
    while time.monotonic() < deadline:
        step += 1
        saved = repo.save(state(run, step), run=f"run{run}", step=step, metrics={"val_loss": 1 / step})
        if repo.load(saved.id) != state(run, step):
            raise SystemExit(f"run {run} step {step}: loaded something else")
    saves.put(step)


def collect(folder: str, writers: int, seconds: float, collections: multiprocessing.Queue[int]) -> None:
    repo = castore.Repo.open(folder)
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline:
        castore.collect_garbage(repo, policy(writers), grace=timedelta())
        count += 1
    collections.put(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--writers", type=int, default=8)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    saves, collections = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        repo = castore.Repo.init(folder)
        Path(folder, ".castore", "config.toml").write_text(CONFIG)
        running = [context.Process(target=write, args=(folder, i, given.seconds, saves)) for i in range(given.writers)]
        running.append(context.Process(target=collect, args=(folder, given.writers, given.seconds, collections)))
        for process in running:
            process.start()
        for process in running:
            process.join()
        failed = [process.exitcode for process in running if process.exitcode]
        repo = castore.Repo.open(folder)
        plan = castore.collect_garbage(repo, policy(given.writers), grace=timedelta())
        kept = [decision for decision in plan.decisions if decision.parts]
        for decision in kept:
            run, step = int(decision.entry.manifest.run[3:]), decision.entry.manifest.step
            if repo.load(decision.entry.id, parts=decision.parts) != state(run, step):
                raise SystemExit(f"{decision.entry.id}: loaded something else")
        total = sum(saves.get() for _ in range(given.writers - len(failed)))
        count = collections.get() if not failed else "?"
        print(f"{given.writers} writers, {given.seconds:g} s: {total} saves, each loaded at once; {count} collections")
        print(f"{len(kept)} checkpoints kept at the end, all load; processes that failed: {len(failed)}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
