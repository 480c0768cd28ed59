"""Everything at once, with random kills: nothing that was acknowledged and is kept may be lost, nothing be damaged.

    python bench/soak.py [--minutes 1] [--writers 4] [--no-kills]

Writers save and load, readers load whatever there is, files are added and checked out, checkpoints are pinned, pushed
and fetched into another repository, gc and verify run again and again, and one of these processes is killed every half
second or so and started again. At the end every save that returned has its manifest, what the policy keeps loads as it
was saved, verify and doctor find nothing, the remote holds what it says, gc leaves no temporary file a day later, and
the lock is free.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import castore
from castore import doctor
from castore.errors import DataMissing, NotFound
from castore.policy.retention import Policy
from castore.remote_verify import verify_remote
from castore.remotes.folder import Folder
from castore.transfer import read_manifests
from castore.trees.add import add_tree
from castore.trees.checkout import check_out
from castore.verify import verify

CONFIG = '[store]\nchunk_size = "64KiB"\nthreads = 1\nfsync = false\n[retention]\nauto_gc = false\n'


def policy(writers: int) -> Policy:
    """Return a policy that keeps every writer's newest checkpoint: one is being saved at a time."""
    return Policy(keep=2, keep_latest=20 * writers, keep_optimizer=20 * writers)


def state(run: str, step: int) -> dict[str, object]:
    # some chunks belong to one save, some come back after gc has deleted them, some are shared by all
    return {"model": {"own": f"{run}/{step}" * 5000, "turn": f"{step % 7}" * 90_000, "shared": "x" * 90_000}}


class Role:
    """What a process does again and again, and where it notes what it has done: a kill takes nothing of that away."""

    def __init__(self, folder: Path, name: str, writers: int) -> None:
        self.folder, self.name, self.writers = folder, name, writers
        self.repo = castore.Repo.open(folder)
        self.rng = random.Random(f"{name} {time.time()}")

    def note(self, text: str) -> None:
        with open(self.folder / "notes" / self.name, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def notes(self) -> list[str]:
        path = self.folder / "notes" / self.name
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def write(self) -> None:
        step = 1 + max((int(line.split()[1]) for line in self.notes()), default=0)
        saved = self.repo.save(state(self.name, step), run=self.name, step=step, metrics={"val_loss": 1 / step})
        self.note(f"{saved.id} {step}")
        assert self.repo.load(saved.id) == state(self.name, step), f"{saved.id} loads as something else"

    def read(self) -> None:
        entry = self.any()
        with contextlib.suppress(DataMissing):
            loaded = self.repo.load(entry.id)
            assert loaded == state(entry.manifest.run, entry.manifest.step), f"{entry.id} loads as something else"
            self.note("1")

    def collect(self) -> None:
        begun = time.monotonic()
        castore.collect_garbage(self.repo, policy(self.writers), grace=timedelta())
        self.note(f"{time.monotonic() - begun:.3f}")
        time.sleep(0.5)  # alone it would hold the lock all the time

    def verify(self) -> None:
        wrong = [finding for finding in verify(self.repo) if not finding.is_harmless]
        assert not wrong, f"verify found {wrong}"
        self.note("1")

    def files(self) -> None:
        tree = self.folder / "tree"
        tree.mkdir(exist_ok=True)
        (tree / str(self.rng.randrange(20))).write_bytes(self.rng.randbytes(self.rng.randrange(200_000)))
        added = add_tree(self.repo, tree)
        out = self.folder / "out"
        check_out(self.repo, added.id, out, force=True, delete=True)
        there = {path.name: path.read_bytes() for path in (out / "tree").iterdir()}
        assert there == {path.name: path.read_bytes() for path in tree.iterdir()}, "checked out something else"
        self.note("1")

    def pin(self) -> None:
        entry = self.any()
        with contextlib.suppress(DataMissing):
            self.repo.pin(entry)
            loaded = self.repo.load(entry.id, parts=["model"])
            assert loaded == state(entry.manifest.run, entry.manifest.step), f"{entry.id} was pinned and is gone"
            self.note("1")
        self.repo.unpin(entry.id)

    def push(self) -> None:
        entry = self.any()
        self.repo.push([entry], Folder("shelf", self.folder / "shelf"))
        self.note("1")

    def fetch(self) -> None:
        """Into a repository of its own, as another machine would have it, which gc empties now and then."""
        entries = read_manifests(Folder("shelf", self.folder / "shelf"))
        if not entries:
            raise NotFound("nothing yet")
        entry = self.rng.choice(entries)
        (self.folder / "other").mkdir(exist_ok=True)
        other = castore.Repo.init(self.folder / "other")
        (other.root / "config.toml").write_text(CONFIG)
        other = castore.Repo.open(self.folder / "other")
        other.catalog.add(entry.manifest)
        with contextlib.suppress(DataMissing):  # a part that gc took before it was pushed
            other.fetch(entry, remotes=[Folder("shelf", self.folder / "shelf")])
            loaded = other.load(entry.id)
            assert loaded == state(entry.manifest.run, entry.manifest.step), f"{entry.id} was fetched as something else"
            self.note("1")
        if self.rng.random() < 0.1:
            castore.collect_garbage(other, Policy(keep=1, keep_latest=1, keep_optimizer=1), grace=timedelta())

    def any(self) -> castore.Entry:
        entries = self.repo.checkpoints()[: 20 * self.writers]
        if not entries:
            raise NotFound("nothing yet")
        return self.rng.choice(entries)


def act(folder: Path, kind: str, name: str, writers: int, deadline: float) -> None:
    """Play a role until the end."""
    role = Role(folder, name, writers)
    deed: Callable[[], None] = getattr(role, kind)
    while time.time() < deadline:
        try:
            deed()
        except NotFound:
            time.sleep(0.05)


def soak(folder: Path, seconds: float, writers: int, kills: bool) -> Iterator[str]:
    """Play all roles, kill now and then, and say what was done. AssertionError for anything that is wrong."""
    (folder / "notes").mkdir()
    (folder / "shelf").mkdir()
    castore.Repo.init(folder)
    (folder / ".castore" / "config.toml").write_text(CONFIG)
    importlib.import_module("castore.torch")  # here once, not in each process that is forked
    context = multiprocessing.get_context("fork")
    kinds = {f"run{number}": "write" for number in range(writers)}
    kinds |= {"reader": "read", "other-reader": "read", "gc": "collect", "verify": "verify", "files": "files"}
    kinds |= {"pin": "pin", "push": "push", "fetch": "fetch"}
    deadline = time.time() + seconds
    running: dict[str, multiprocessing.process.BaseProcess] = {}
    killed: Counter[str] = Counter()
    rng = random.Random()
    told = time.time()
    try:
        while time.time() < deadline:
            if time.time() - told > 60:
                told = time.time()
                yield f"{(deadline - told) / 60:.0f} min to go, {sum(killed.values())} kills so far"
            for name, kind in kinds.items():
                process = running.get(name)
                if process is None or not process.is_alive():
                    assert process is None or process.exitcode in (0, -9), f"{name} ended with {process.exitcode}"
                    running[name] = context.Process(target=act, args=(folder, kind, name, writers, deadline))
                    running[name].start()
            time.sleep(rng.uniform(0.2, 0.8))
            victim = rng.choice(list(kinds))
            if kills and time.time() < deadline - 1:
                running[victim].kill()
                running[victim].join()
                killed[kinds[victim]] += 1
        for name, process in running.items():
            process.join(120)
            assert process.exitcode in (0, -9), f"{name} ended with {process.exitcode}"
    finally:
        for process in running.values():
            process.kill()
    count = sum(killed.values())
    yield f"{seconds / 60:g} min, {writers} writers among {len(kinds)} processes; {count} kills: {dict(killed)}"
    yield from _check(folder, writers, [name for name, kind in kinds.items() if kind == "write"])


def _check(folder: Path, writers: int, runs: list[str]) -> Iterator[str]:
    repo = castore.Repo.open(folder)
    plan = castore.collect_garbage(repo, policy(writers), grace=timedelta())
    known = {entry.id for entry in repo.catalog.listing().entries}
    saved = [line.split()[0] for run in runs for line in Role(folder, run, writers).notes()]
    assert set(saved) <= known, f"lost: {set(saved) - known}"
    kept = [decision for decision in plan.decisions if decision.parts and decision.entry.manifest.kind == "checkpoint"]
    for decision in kept:
        manifest = decision.entry.manifest
        loaded = repo.load(decision.entry.id, parts=decision.parts)
        assert loaded == state(manifest.run, manifest.step), f"{decision.entry.id} loads as something else"
    newest = [Role(folder, run, writers).notes()[-1].split()[0] for run in runs]
    assert set(newest) <= {decision.entry.id for decision in kept}, "an acknowledged newest checkpoint is not kept"
    yield f"{len(saved):,} saves were acknowledged, {len(kept)} checkpoints are kept, and all of those load"
    wrong = [finding for finding in verify(repo) if not finding.is_harmless]
    assert not wrong, f"verify found {wrong}"
    if (folder / "other").exists():
        wrong = [finding for finding in verify(castore.Repo.open(folder / "other")) if not finding.is_harmless]
        assert not wrong, f"verify found {wrong} in the repository that fetched"
    there = list(verify_remote(repo, Folder("shelf", folder / "shelf"), None))
    assert not there, f"the remote has {there}"
    told = [check for check in doctor.examine(datetime.now(UTC), folder) if check.level == "problem"]
    assert not told, f"doctor found {told}"
    # what the dead left may be the work of the living for as long as that
    castore.collect_garbage(repo, policy(writers), now=datetime.now(UTC) + timedelta(days=2))
    left = [path for path in (folder / ".castore" / "tmp").rglob("*") if path.is_file() and path.stat().st_size]
    assert not left, f"left over: {left}"
    with repo.lock(exclusive=True):
        pass
    turns = [float(line) for line in Role(folder, "gc", writers).notes()]
    done = {
        name: len(Role(folder, name, writers).notes()) for name in ("reader", "verify", "files", "pin", "push", "fetch")
    }
    yield f"gc ran {len(turns)} times, the longest took {max(turns, default=0):.1f} s; {done}"
    yield "verify, doctor and the remote find nothing; no file is left over; the lock is free"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--no-kills", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="castore-soak-"))
    for line in soak(folder, 60 * given.minutes, given.writers, not given.no_kills):
        print(line, flush=True)
    shutil.rmtree(folder)  # after an error it stays to be looked at


if __name__ == "__main__":
    main()
