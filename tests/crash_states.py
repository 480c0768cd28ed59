"""Power cuts in everything that changes a store: each state that one may leave is opened, verified, loaded and used.

    python tests/crash_states.py                       # each state of the systematic ones, some by chance
    python tests/crash_states.py --states 100000 gc    # at least as many states, of this scenario alone

A scenario prepares a repository, and then does one thing that is recorded (see power_cuts). While it is at it, it says
what a user may rely on from then on. Every state is then checked: nothing that was promised is lost, nothing loads as
something else, verify finds nothing, and saving and collecting go on. Of some states the same is done again from there,
and cut again.
"""

# ruff: noqa: T201 - a program, too

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import itertools
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact
from power_cuts import Cut, Operation, Recording, State, cuts, digest, read_state, recording, states, write_state
from safetensors.torch import load_file

from castore import Repo, collect_garbage, config, convert, dcp
from castore.errors import CastoreError, ConfigError, DataMissing, RepoNotFound, StorageError
from castore.format.bundle import Record
from castore.format.ids import ObjectId
from castore.policy.retention import Policy
from castore.remote_gc import collect_remote
from castore.remote_verify import verify_remote
from castore.remotes import marks
from castore.remotes.folder import Folder
from castore.storage import fs
from castore.transfer import read_manifests
from castore.trees.add import add_tree
from castore.trees.checkout import check_out
from castore.verify import verify

CONFIG = '[store]\nchunk_size = "64KiB"\nthreads = 2\nlock_timeout = 1.0\n[retention]\nauto_gc = false\n'
SHELF = '[remotes]\nshelf = "../shelf"\n'
CREATED = "2026-01-01T00:00:00.000000Z"
ONE_THREAD = CONFIG.replace("threads = 2", "threads = 1")
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where states are written: no disk is needed to look at them."""
KEEP_ALL = Policy(keep=100, keep_latest=100, keep_optimizer=100)
TREE = {"a.bin": bytes(range(256)) * 300, "deep/b.txt": b"text\n" * 20_000}


def content(step: int) -> dict[str, Any]:
    """Return the parts of a checkpoint: chunks of its own, one that all share, and plain values."""
    model = {
        "own": torch.arange(20_000, dtype=torch.float32) + step,
        "shared": torch.arange(17_000, dtype=torch.float32),
        "small": torch.full((3,), step),
    }
    return {"model": model, "trainer": {"step": step, "order": [1, (2, None)], 7: b"\0"}}


@dataclass
class Promise:
    """From how many operations on something holds, and which."""

    since: int
    what: str
    about: str


@dataclass
class World:
    """A repository, a shelf to push to, and what was promised."""

    root: Path
    promises: list[Promise] = field(default_factory=list)
    record: Recording | None = None
    notes: Path | None = None
    """Where promises are written as they are made, for whoever outlives this process."""

    @functools.cached_property
    def repo(self) -> Repo:
        return self.new_repo()

    def new_repo(self) -> Repo:
        """Return the repository as a process that begins sees it."""
        return Repo.open(self.root / "work")

    @property
    def shelf(self) -> Folder:
        return Folder("shelf", self.root / "shelf")

    def promise(self, what: str, about: str) -> None:
        self.promises.append(Promise(len(self.record.log) if self.record else 0, what, about))
        if self.notes is not None:
            with open(self.notes, "a", encoding="utf-8") as file:
                file.write(f"{what}\t{about}\n")

    def take_back(self, what: str, about: str) -> None:
        """From now on this is not promised any more, nor has it to be gone."""
        self.promise(f"not {what}", about)

    def promise_nothing(self) -> None:
        """Take all back that was promised."""
        self.promises.clear()
        if self.notes is not None:
            self.notes.write_text("")

    def save(self, step: int, **fields: Any) -> str:
        saved = self.new_repo().save(content(step), run=fields.pop("run", "main"), step=step, **fields)
        self.promise("kept", saved.id)
        return saved.id


Act = Callable[[World], None]


def _import(world: World) -> None:
    saved = convert.import_file(world.new_repo(), world.root / "weights.pt", run="main", step=1)
    world.promise("kept", saved.id)


def _add(world: World) -> None:
    added = add_tree(world.new_repo(), world.root / "tree")
    world.promise("kept", added.id)


def _pin(world: World) -> None:
    repo = world.new_repo()
    entry = repo.find("latest")
    repo.pin(entry)
    world.promise("pinned", entry.id)


def _tag(world: World) -> None:
    repo = world.new_repo()
    entry = repo.find("latest")
    repo.tag(entry, "good")
    world.promise("tagged", entry.id)


def _unpin(world: World) -> None:
    repo = world.new_repo()
    for entry in repo.checkpoints():
        world.take_back("pinned", entry.id)
        repo.unpin(entry.id)
        world.promise("unpinned", entry.id)


def _untag(world: World) -> None:
    repo = world.new_repo()
    world.take_back("tagged", repo.find("latest").id)
    repo.untag("good")
    world.promise("untagged", "good")


def _gc(world: World) -> None:
    # the newest and what is pinned stay; the rest may be there, in part or not at all, but never as something else
    repo = world.new_repo()
    kept = {repo.find("latest").id, *repo.catalog.pins()}
    for entry in repo.checkpoints():
        if entry.id not in kept:
            world.take_back("kept", entry.id)
    collect_garbage(repo, Policy(keep=1, keep_latest=1, keep_optimizer=1), grace=timedelta())


def _gc_on_a_full_disk(world: World) -> None:
    rename, moved = fs.rename, []

    def rename_three(source: Path, target: Path) -> None:
        if target.parent.name == "trash":
            moved.append(target)
            if len(moved) > 3:
                raise StorageError("rename to", str(target), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "rename", rename_three)
        _gc(world)


def _cut_gc(world: World) -> None:
    """Three checkpoints; a gc that died has moved half of the first's own objects to the trash, and it was pinned."""
    first, second = world.save(1), world.save(2)
    world.save(3)
    repo = world.repo
    needed = [set(repo.store.stored())]
    for kept in (second, world.repo.find("latest").id):
        plan = collect_garbage(repo, Policy(keep=1, keep_latest=1), in_use=[kept], grace=timedelta(), dry_run=True)
        needed.append(set(plan.delete))
    own = sorted(set.intersection(*needed))
    assert len(own) >= 2
    repo.store.discard(own[: len(own) // 2])
    repo.catalog.pin(ObjectId(first))


@contextlib.contextmanager
def _impatience() -> Iterator[None]:
    """A pass over a shelf that was cut gives no sign of life any more: nobody waits for it for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks, "PATIENCE", 0.02)
        yield


def _push(world: World, repair: bool = False) -> None:
    repo = world.new_repo()
    entries = list(repo.checkpoints())
    with _impatience():
        repo.push(entries, world.shelf, repair=repair)
    for entry in entries:
        world.promise("on the shelf", entry.id)


def _pull(world: World) -> None:
    repo = world.new_repo()
    for entry in read_manifests(world.shelf):
        repo.catalog.add(entry.manifest)
        world.promise("listed", entry.id)
        repo.fetch(entry, remotes=[world.shelf])


def _load(world: World) -> None:
    repo = world.new_repo()
    for entry in read_manifests(world.shelf):
        repo.catalog.add(entry.manifest)
        repo.load(entry.id)


def _dcp(world: World) -> None:
    saved = dcp.save(world.new_repo(), content(1), run="main", step=1)
    world.promise("kept", saved.id)


def _record(world: World) -> None:
    repo = world.new_repo()
    entry = repo.find("latest")
    parts = {entry.manifest.parts["model"].index: [entry.id]}
    repo.catalog.add_record(Record(bundle=entry.id, key="k", created=CREATED, bytes=1000, objects=1, parts=parts))
    world.promise("recorded", entry.id)
    repo.catalog.add_session("main", "1.json", b'{"run": "main"}')
    world.promise("session", "")


def _init(world: World) -> None:
    Repo.init(world.root / "work")
    world.promise("repository", "")


def _check_out(world: World) -> None:
    repo = world.new_repo()
    (added,) = [entry for entry in repo.catalog.listing().entries if entry.manifest.kind == "files"]
    check_out(repo, added.id, world.root / "out")
    world.promise("written", "")


def _forget(world: World) -> None:
    repo = world.new_repo()
    entry = repo.checkpoints()[-1]
    world.take_back("kept", entry.id)
    repo.forget(entry)
    world.promise("forgotten", entry.id)


def _export(world: World) -> None:
    convert.export(world.new_repo(), "latest", world.root / "out" / "weights.safetensors")
    world.promise("exported", "")


def _damaged_shelf(world: World) -> None:
    """What was pushed, with one object that was damaged since."""
    _both(_saved(1), _push)(world)
    for entry in world.repo.checkpoints():
        world.take_back("on the shelf", entry.id)
    world.promise("damaged shelf", "")
    path = max((world.root / "shelf" / "objects").glob("*/*"), key=lambda path: (path.stat().st_size, path))
    path.write_bytes(path.read_bytes()[:-1])


def _useless_on_the_shelf(world: World) -> None:
    """Three checkpoints on the shelf; two are of no use there any more, and a first pass has marked their files."""
    _both(_saved(1, 2, 3), _push)(world)
    _remote_gc(world, day=1)


def _remote_gc(world: World, day: int = 2) -> None:
    repo = world.new_repo()
    for entry in repo.checkpoints()[1:]:
        world.take_back("on the shelf", entry.id)
    now = datetime.now(UTC) + timedelta(days=day)
    policy = Policy(keep=1, keep_latest=1, keep_optimizer=1)
    repo.config.remotes["collector"] = "m"
    with _impatience():
        collect_remote(repo, world.shelf, policy, machine="m", grace=timedelta(), now=now)


def _nothing(_: World) -> None: ...


def _saved(*steps: int) -> Act:
    def prepare(world: World) -> None:
        for step in steps:
            world.save(step, metrics={"val_loss": 4.0 - step / 10})

    return prepare


def _both(*acts: Act) -> Act:
    def act(world: World) -> None:
        for one in acts:
            one(world)

    return act


def _only_on_the_shelf(world: World) -> None:
    _both(_saved(1, 2), _push)(world)
    world.promise_nothing()
    for entry in world.repo.checkpoints():
        world.promise("on the shelf", entry.id)
    for folder in ("objects", "manifests", "trash", "tmp"):
        shutil.rmtree(world.root / "work" / ".castore" / folder, ignore_errors=True)
    (world.root / "work" / ".castore" / "config.toml").write_text(CONFIG + SHELF)


def _give_up(world: World) -> None:
    world.promise("given up", world.repo.checkpoints()[-1].id)


class _Died(BaseException):
    """In the place of a signal that kills."""


def _die(_: Path) -> None:
    raise _Died


def _again_elsewhere(world: World) -> None:
    # a save that dies before it syncs a folder, and the same data by another process, which finds it all there
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_Died):
        patch.setattr(fs, "sync_directory", _die)
        world.save(1, run="died")
    world.save(1)


SCENARIOS: dict[str, tuple[Act, Act]] = {
    "init": (_nothing, _init),
    "save": (_saved(1), _saved(2)),
    "first save": (_nothing, _saved(1)),
    "deduplicated": (_nothing, _again_elsewhere),
    "gc": (_saved(1, 2, 3), _gc),
    "gc after a cut gc": (_cut_gc, _gc),
    "gc on a full disk": (_saved(1, 2, 3), _gc_on_a_full_disk),
    "save after gc": (_both(_saved(1, 2), _gc, _give_up), _saved(1)),
    "add": (_nothing, _add),
    "checkout": (_add, _check_out),
    "import": (_nothing, _import),
    "pin": (_saved(1), _pin),
    "tag": (_saved(1), _tag),
    "unpin": (_both(_saved(1), _pin), _unpin),
    "untag": (_both(_saved(1), _tag), _untag),
    "forget": (_saved(1, 2), _forget),
    "record": (_saved(1), _record),
    "export": (_saved(1), _export),
    "push": (_saved(1), _push),
    "remote gc": (_useless_on_the_shelf, _remote_gc),
    "repair": (_damaged_shelf, functools.partial(_push, repair=True)),
    "pull": (_only_on_the_shelf, _pull),
    "load": (_only_on_the_shelf, _load),
    "dcp": (_nothing, _dcp),
}
"""By name: what is there and sure before, and what is cut."""


def prepare(root: Path, name: str, notes: Path | None = None) -> World:
    """Set a scenario up in an empty folder."""
    for folder in ("work", "shelf", "tree/deep", "out"):
        (root / folder).mkdir(parents=True)
    for path, data in TREE.items():
        (root / "tree" / path).write_bytes(data)
    torch.save(content(1)["model"], root / "weights.pt")
    if name != "init":
        Repo.init(root / "work")
        (root / "work" / ".castore" / "config.toml").write_text(CONFIG)
    world = World(root, notes=notes)
    SCENARIOS[name][0](world)
    return world


def play(root: Path, name: str) -> World:
    """Set a scenario up, do what is recorded, and return it with the recording."""
    world = prepare(root, name)
    with recording(root) as world.record:
        SCENARIOS[name][1](world)
    return world


# -- checking ----------------------------------------------------------------------------------------------------------


def held(promises: Sequence[Promise], done: int) -> dict[str, set[str]]:
    """Return what holds after ``done`` operations, by kind."""
    holding: dict[str, set[str]] = {}
    for promise in promises:
        if promise.what.startswith("not "):  # the gc that is under way may have taken it already
            holding.get(promise.what.removeprefix("not "), set()).discard(promise.about)
        elif promise.since <= done:
            holding.setdefault(promise.what, set()).add(promise.about)
    return holding


def flat(holding: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Yield what holds as pairs of its kind and what it is about."""
    for what, abouts in holding.items():
        for about in sorted(abouts):
            yield what, about


class Wrong(Exception):
    """A state breaks a promise."""


def _require(truth: bool, text: str) -> None:
    if not truth:
        raise Wrong(text)


def check(root: Path, promises: Sequence[Promise], done: int) -> None:
    """Look at a state as its users would. Wrong says what is lost, or not what it should be."""
    holding = held(promises, done)
    try:
        repo = Repo.open(root / "work")
    except (RepoNotFound, ConfigError):  # `castore init` died before it said that it was done
        _require("repository" not in holding and not holding.get("kept"), "the repository is gone")
        repo = Repo.init(root / "work")
    _check_settings(root / "work" / ".castore")
    listing = repo.catalog.listing()
    _require(not listing.broken, f"broken: {listing.broken}")
    kept = holding.get("kept", set())
    names = {entry.id for entry in listing.entries}
    _require(names >= kept | holding.get("listed", set()), "a checkpoint is gone")
    _check_verify(repo, kept, holding.get("given up", set()))
    _check_loads(repo, root, kept)
    _require(repo.catalog.pins() >= holding.get("pinned", set()), "a pin is gone")
    _require(not repo.catalog.pins() & holding.get("unpinned", set()), "a pin is back")
    _require(not holding.get("untagged") or repo.catalog.tagged("good") is None, "a tag is back")
    if holding.get("tagged"):
        _require({repo.catalog.tagged("good")} == holding["tagged"], "a tag is gone")
    records, broken = repo.catalog.records()
    _require(not broken and {record.bundle for record in records} >= holding.get("recorded", set()), "a record is gone")
    sessions = [path.read_bytes() for path in (root / "work" / ".castore" / "sessions").glob("*/*.json")]
    _require(all(sessions) and len(sessions) >= ("session" in holding), "a session is gone")
    _require(not names & holding.get("forgotten", set()), "a checkpoint that was forgotten is back")
    _check_export(root / "out" / "weights.safetensors", must_be_there="exported" in holding)
    if "written" in holding:
        _require(_files(root / "out" / "tree") == TREE, "a file that was checked out is gone")
    _check_shelf(root, holding.get("on the shelf", set()), may_be_damaged="damaged shelf" in holding)
    if read_manifests(Folder("shelf", root / "shelf")) and "damaged shelf" not in holding:
        _check_push(repo, root, kept)
    again = repo.save(content(1), run="later", step=1)
    collect_garbage(repo, KEEP_ALL, grace=timedelta())
    _require(exact(repo.load(again.id)) == exact(content(1)), "what is saved afterwards loads as something else")
    for entry in repo.catalog.listing().entries:
        is_whole = all(part.where != "missing" for part in repo.part_states(entry).values())
        _require(is_whole or entry.id not in kept, f"gc has deleted what {entry.id[:12]} needs")


def _check_settings(folder: Path) -> None:
    """A folder with a configuration is a repository: all that init writes is there, and is what it wrote."""
    written = {
        "config.toml": (config.TEMPLATE, CONFIG, CONFIG + SHELF, ONE_THREAD),
        ".gitignore": (config.GITIGNORE,),
        ".gitattributes": (config.GITATTRIBUTES,),
    }
    for name, texts in written.items():
        path = folder / name
        _require(path.exists() and path.read_text() in texts, f"{name} is not what was written")


def _check_verify(repo: Repo, kept: set[str], given_up: set[str]) -> None:
    for finding in verify(repo):
        about = {need.checkpoint_id for need in finding.needed_by}
        # a save that is cut short may have brought back some of the data that gc took away
        is_expected = finding.kind in ("missing", "inconsistent") and about and about <= given_up - kept
        _require(finding.is_harmless or is_expected, f"verify finds {finding}")


def _check_export(path: Path, *, must_be_there: bool) -> None:
    _require(path.exists() or not must_be_there, "an exported file is gone")
    if not path.exists():
        return
    is_right = exact(sorted(load_file(path).items())) == exact(sorted(content(1)["model"].items()))
    _require(is_right, "an exported file is not what was written")


def _check_loads(repo: Repo, root: Path, kept: set[str]) -> None:
    for entry in repo.catalog.listing().entries:
        try:
            if entry.manifest.kind == "files":
                out = Path(tempfile.mkdtemp(dir=root))
                check_out(repo, entry.id, out)
                is_right = _files(out / "tree") == TREE
            else:
                loaded = repo.load(entry.id)
                expected = content(entry.manifest.step)
                is_right = exact(loaded) == exact({name: expected[name] for name in loaded})
        except DataMissing:
            _require(entry.id not in kept, f"{entry.id[:12]} of {entry.manifest.run} can't be loaded")
        else:
            _require(is_right, f"{entry.id[:12]} loads as something else")


_good_shelves: set[str] = set()
"""The content of folders that were read to the end and found good: most states have one that another has, too."""


def _check_shelf(root: Path, pushed: set[str], *, may_be_damaged: bool) -> None:
    shelf = Folder("shelf", root / "shelf")
    listed = read_manifests(shelf)
    _require({entry.id for entry in listed} >= pushed, "the shelf has lost a manifest")
    content_of_all = digest(read_state(root / "shelf"))
    if not listed or (may_be_damaged and not pushed) or content_of_all in _good_shelves:
        return
    (root / "fresh").mkdir()
    fresh = Repo.init(root / "fresh")
    findings = [finding for finding in verify_remote(fresh, shelf) if not finding.is_harmless]
    _require(not findings, f"on the shelf, verify finds {findings}")
    for entry in listed:
        fresh.catalog.add(entry.manifest)
        try:
            fresh.fetch(entry, remotes=[shelf])
        except DataMissing:
            _require(entry.id not in pushed, f"{entry.id[:12]} is gone from the shelf")
            continue
        _require(exact(fresh.load(entry.id)) == exact(content(entry.manifest.step)), "the shelf has something else")
    _good_shelves.add(content_of_all)


def _check_push(repo: Repo, root: Path, kept: set[str]) -> None:
    """A push makes all that is here whole on a shelf where something was under way."""
    entries = [entry for entry in repo.checkpoints() if entry.id in kept]
    if entries:
        with _impatience():
            repo.push(entries, Folder("shelf", root / "shelf"))
        shutil.rmtree(root / "fresh", ignore_errors=True)
        _check_shelf(root, {entry.id for entry in entries}, may_be_damaged=False)


def _files(folder: Path) -> dict[str, bytes]:
    """Return what is in a folder, but for what the next checkout there cleans up."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("castore-tmp-")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def check_state(state: State, promises: Sequence[Promise], done: int) -> str:
    """Write a state to a disk in memory and check it; return what is wrong, or nothing."""
    wrong = _checked_in_memory(state, lambda root: check(root, promises, done))
    if not wrong and any("/trash/" in path for path in state):
        wrong = _checked_in_memory(state, lambda root: _check_trash(root, held(promises, done)))
    return wrong


def _checked_in_memory(state: State, look: Callable[[Path], None]) -> str:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        write_state(state, Path(folder))
        if state.get("work/.castore/config.toml") in (CONFIG.encode(), (CONFIG + SHELF).encode()):
            (Path(folder) / "work/.castore/config.toml").write_text(ONE_THREAD)
        try:
            look(Path(folder))
        except Wrong as error:
            return str(error)
        except CastoreError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def _check_trash(root: Path, holding: Mapping[str, set[str]]) -> None:
    """What the next gc begins with is no fault either, should it be cut there: all that is in the trash is back."""
    repo = Repo.open(root / "work")
    with repo.lock(exclusive=True):
        repo.store.restore_trash()
    _check_verify(repo, holding.get("kept", set()), holding.get("given up", set()))
    _check_loads(repo, root, holding.get("kept", set()))


def every_state(world: World, rng: random.Random, samples: int) -> Iterator[tuple[int, State]]:
    """Yield each state that a cut at any operation may leave, with how many operations were done."""
    assert world.record is not None
    for done, cut in enumerate(cuts(world.record)):
        for state in states(cut, rng, samples):
            yield done, state


def states_after_two(name: str, world: World, rng: random.Random, folder: Path) -> Iterator[tuple[World, int, State]]:
    """Yield states that a second cut may leave, while what one has cut short is done again in an empty folder."""
    done, state = rng.choice(list(every_state(world, rng, 1)))
    write_state(state, folder)
    again = World(folder, [Promise(0, *promise) for promise in flat(held(world.promises, done))])
    with recording(folder) as again.record, contextlib.suppress(CastoreError):  # what is there already may be refused
        SCENARIOS[name][1](again)
    for number, worse in every_state(again, rng, 1):
        yield again, number, worse


# -- syncs that matter -------------------------------------------------------------------------------------------------


def sites(world: World) -> dict[tuple[str, str], set[int]]:
    """Return which functions asked for syncs, and where in the log: without the line in the source all of these go."""
    assert world.record is not None
    found: dict[tuple[str, str], set[int]] = {}
    for number, operation in enumerate(world.record.log):
        if operation.kind.startswith("sync"):
            found.setdefault((operation.kind, operation.site), set()).add(number)
    return found


def states_without(world: World, left_out: Collection[int]) -> Iterator[tuple[int, State]]:
    """Yield states that can come about because syncs are missing: what they alone made sure is not there, or torn."""
    assert world.record is not None
    nothing = Operation("left out", "")  # so that the numbers stay
    log = [nothing if number in left_out else operation for number, operation in enumerate(world.record.log)]
    pairs = list(enumerate(zip(cuts(world.record), cuts(world.record, log), strict=True)))
    # the end first: by then most has been promised
    for done, (cut, worse) in [pairs[-1], *pairs[min(left_out) + 1 : -1]]:
        for state in _differing(cut, worse):
            yield done, state


def matters(world: World, left_out: Collection[int]) -> str:
    """Return what goes wrong without these syncs, or nothing."""
    wrong = (check_state(state, world.promises, done) for done, state in states_without(world, left_out))
    return next(filter(None, wrong), "")


def _differing(cut: Cut, worse: Cut) -> Iterator[State]:
    sure_before = {number for number, _ in cut.pending}
    fresh = [number for number, operation in worse.pending if number not in sure_before and operation.names]
    if fresh:
        yield worse.state(lambda number: number not in fresh, lambda _: "whole")
        for one in fresh:
            yield worse.state(lambda number, one=one: number != one, lambda _: "whole")  # type: ignore[misc]
    files = set(worse.unsynced()) - set(cut.unsynced())
    if files:
        for damage in ("old", "zeros", "torn"):
            yield worse.state(lambda _: True, lambda file, damage=damage: damage if file in files else "whole")  # type: ignore[misc]


# -- kills -------------------------------------------------------------------------------------------------------------


def play_and_die(root: Path, name: str, notes: Path, nth: int | None) -> None:
    """Play a scenario in this process, which is killed after ``nth`` operations, if there are so many."""

    def kill(count: int) -> None:
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    world = prepare(root, name, notes)
    with open(notes, "a", encoding="utf-8") as file:
        file.write("begun\t\n")
    kill(0)
    with recording(root, kill) as world.record:
        SCENARIOS[name][1](world)


def check_kill(name: str, nth: int | None, seconds: float = 0.0) -> tuple[bool, str]:
    """Play a scenario in a child that is killed, and return whether it was, and what is wrong then.

    It is killed after ``nth`` operations, or that many ``seconds`` after what is recorded begins.
    """
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root, notes = Path(folder, "root"), Path(folder, "notes")
        root.mkdir()
        notes.touch()
        child = os.fork()
        if child == 0:
            try:
                play_and_die(root, name, notes, nth)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if nth is None:
            while "begun\t\n" not in notes.read_text(encoding="utf-8"):
                time.sleep(0.001)
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
            return False, f"it ended with {os.waitstatus_to_exitcode(status)} by itself"
        promises = [Promise(0, *line.split("\t")) for line in notes.read_text(encoding="utf-8").splitlines()]
        try:
            check(root, promises, 0)
        except (Wrong, CastoreError) as error:
            return os.WIFSIGNALED(status), f"{type(error).__name__}: {error}"
    return os.WIFSIGNALED(status), ""


def survey_kills(name: str, seed: int, least: int) -> tuple[str, int]:
    """Kill a scenario after each of its operations, then at random until there were so many kills."""
    torch.set_num_threads(1)  # a forked child must not wait for threads that only its parent has
    count = 0
    for nth in itertools.count():
        was_killed, wrong = check_kill(name, nth)
        if wrong:
            raise AssertionError(f"{name}, killed after {nth} operations: {wrong}")
        if not was_killed:
            break
        count += 1
        _count()
    with tempfile.TemporaryDirectory() as folder:
        world = prepare(Path(folder), name)
        begun = time.monotonic()
        SCENARIOS[name][1](world)
        lasts = time.monotonic() - begun
    rng = random.Random(f"{seed} {name}")
    while count < least:
        seconds = rng.uniform(0.0, 1.5 * lasts)  # recording takes longer
        was_killed, wrong = check_kill(name, None, seconds)
        if wrong:
            raise AssertionError(f"{name}, killed after {seconds} s: {wrong}")
        if was_killed:
            count += 1
            _count()
    return name, count


# -- a program -------------------------------------------------------------------------------------------------------

_checked: Any = None
"""How many states or kills all processes have checked."""


def _share(checked: Any) -> None:
    global _checked
    _checked = checked


def _count() -> None:
    if _checked is not None:
        with _checked.get_lock():
            _checked.value += 1


def _first(jobs: Collection[AsyncResult[Any]], checked: Any, what: str) -> tuple[AsyncResult[Any], Any]:
    """Wait for a job to end, and say every half minute how far all are; return it with its result."""
    told = time.monotonic()
    while True:
        for job in jobs:
            if job.ready():
                return job, job.get()
        if time.monotonic() - told > 30:
            print(f"{checked.value:,} {what} so far", flush=True)
            told = time.monotonic()
        next(iter(jobs)).wait(0.2)


def count_states(name: str) -> int:
    """Return how many systematic states a scenario has."""
    with tempfile.TemporaryDirectory() as folder:
        world = play(Path(folder), name)
        return len(
            {f"{held(world.promises, done)} {digest(state)}" for done, state in every_state(world, random.Random(0), 0)}
        )


def _round(name: str, world: World, rng: random.Random, number: int) -> Iterator[tuple[World, int, State]]:
    """Yield states to check: in the first round the systematic ones, then by turns after two cuts and after one."""
    if number % 2:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            twice = list(states_after_two(name, world, rng, Path(folder)))
        yield from rng.sample(twice, min(len(twice), 100))
    else:
        for done, state in every_state(world, rng, 20 if number else 2):
            yield world, done, state


def survey(name: str, seed: int, least: int) -> tuple[str, int, int, float]:
    """Check the states of a scenario, at least so many; return its name, the operations, the states, and seconds."""
    torch.set_num_threads(1)  # of several processes
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        world = play(Path(folder), name)
        assert world.record is not None
        seen: set[str] = set()
        rng = random.Random(f"{seed} {name}")
        barren = 0  # rounds in a row without a new state
        for number in itertools.count():
            before = len(seen)
            for at, done, state in _round(name, world, rng, number):
                if (told := f"{held(at.promises, done)} {digest(state)}") in seen:
                    continue
                seen.add(told)
                if wrong := check_state(state, at.promises, done):
                    raise AssertionError(f"{name}, round {number}, cut after {done} operations: {wrong}")
                _count()
                if number and len(seen) >= least:
                    break
            barren = barren + 1 if len(seen) == before else 0
            if len(seen) >= least or barren == 4:
                break
    return name, len(world.record.log), len(seen), time.monotonic() - begun


def main() -> None:
    """Check as many states as were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--states", type=int, default=0, help="at least so many, in all")
    parser.add_argument(
        "--kills", type=int, default=0, help="at least so many, in all; without it one for each operation"
    )
    parser.add_argument("--no-kills", action="store_true", help="power cuts alone")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    given = parser.parse_args()
    names = given.names or list(SCENARIOS)
    chosen = list(names)
    print(f"seed {given.seed}", flush=True)
    total = 0
    context = multiprocessing.get_context("forkserver")
    checked = context.Value("q", 0)
    workers = len(os.sched_getaffinity(0))
    with context.Pool(workers, initializer=_share, initargs=(checked,)) as pool:
        counts = dict(zip(chosen, pool.map(count_states, chosen, chunksize=1), strict=True))
        # small scenarios first, in proportion to their systematic states: what they lack, larger ones make up for
        chosen.sort(key=lambda name: counts[name])
        left = 1.02 * given.states
        running: dict[AsyncResult[Any], int] = {}
        while chosen or running:
            while chosen and len(running) < workers:
                share = math.ceil(left * counts[chosen[0]] / sum(counts[name] for name in chosen))
                left -= share
                running[pool.apply_async(survey, (chosen.pop(0), given.seed, share))] = share
            job, (name, operations, count, seconds) = _first(running, checked, "states")
            left += max(0, running.pop(job) - count)
            total += count
            print(f"{name:18} {operations:5,} operations {count:8,} states {seconds:7.1f} s", flush=True)
        print(f"{total:,} states that a power cut may leave: nothing lost, nothing wrong", flush=True)
        if given.no_kills:
            return
        each = -(-given.kills // len(names))
        checked.value = total = 0
        kills = [pool.apply_async(survey_kills, (name, given.seed, each)) for name in names]
        while kills:
            job, (_, count) = _first(kills, checked, "kills")
            kills.remove(job)
            total += count
        print(f"{total:,} kills: nothing lost, nothing wrong")


if __name__ == "__main__":
    sys.exit(main())
