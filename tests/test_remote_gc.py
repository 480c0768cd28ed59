"""Garbage in a remote: two passes with grace, one collector, and nothing that anybody needs."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from builders import parts
from hypothesis import given, settings
from hypothesis import strategies as st

from castore import Repo
from castore.errors import (
    CastoreError,
    CollectionStopped,
    CorruptBundle,
    CorruptManifest,
    RootsUnreadable,
    StorageError,
    UsageError,
)
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.policy.retention import Policy
from castore.remote_gc import RemoteGCPlan, collect_remote
from castore.remote_verify import verify_remote
from castore.remotes import marks
from castore.remotes.base import RemoteFile
from castore.remotes.folder import Folder
from castore.remotes.marks import Marks
from castore.transfer import Pushed

HOUR = timedelta(hours=1)
KEEP_ONE = Policy(keep=1, keep_latest=0, keep_optimizer=0)


class Clock:
    """A remote's clock: files get older when it is moved."""

    def __init__(self, remote: Folder) -> None:
        self.remote = remote
        self.now = datetime.now(UTC)

    def pass_by(self, time: timedelta) -> None:
        for path in self.remote.path.rglob("*"):
            if path.is_file():
                moment = path.stat().st_mtime - time.total_seconds()
                os.utime(path, (moment, moment))


def save(repo: Repo, step: int, loss: float) -> Entry:
    saved = repo.save(parts(step), run="main", step=step, metrics={"val_loss": loss})
    return Entry(saved.id, saved.manifest)


@pytest.fixture
def remote(tmp_path: Path) -> Folder:
    return Folder("shared", tmp_path / "shared")


@pytest.fixture
def collecting(repo: Repo) -> Repo:
    path = repo.root / "config.toml"
    path.write_text(path.read_text() + '[remotes]\nshared = "shared"\ncollector = "me"\n')
    return Repo.open(repo.root.parent)


def collect(repo: Repo, remote: Folder, policy: Policy = KEEP_ONE, *, dry_run: bool = False) -> RemoteGCPlan:
    return collect_remote(repo, remote, policy, machine="me", grace=HOUR, dry_run=dry_run)


def names(remote: Folder) -> set[str]:
    return {file.name for file in remote.files("objects")}


def test_only_the_collector_that_the_settings_name_may_delete(repo: Repo, collecting: Repo, remote: Folder) -> None:
    entry = save(collecting, 1, 3.0)
    collecting.push([entry], remote)
    with pytest.raises(UsageError, match=r"not named in config\.toml, and this machine is me"):
        collect_remote(repo, remote, KEEP_ONE, machine="me", grace=HOUR)
    with pytest.raises(UsageError, match="the collector is me, and this machine is you"):
        collect_remote(collecting, remote, KEEP_ONE, machine="you", grace=HOUR)
    collect_remote(collecting, remote, KEEP_ONE, machine="you", grace=HOUR, dry_run=True)


def test_it_takes_two_passes_with_the_grace_period_between(collecting: Repo, remote: Folder) -> None:
    best, worse = save(collecting, 1, 2.0), save(collecting, 2, 3.0)
    collecting.push([best, worse], remote)
    clock = Clock(remote)
    before = names(remote)
    young = collect(collecting, remote)
    assert (young.delete, young.mark) == ({}, {})
    assert young.waiting
    clock.pass_by(2 * HOUR)
    marking = collect(collecting, remote)
    assert marking.delete == {}
    assert marking.mark.keys() == young.waiting.keys()
    assert names(remote) == before
    again = collect(collecting, remote)
    assert (again.delete, again.mark) == ({}, {})
    clock.pass_by(2 * HOUR)
    assert collect(collecting, remote, dry_run=True).delete.keys() == marking.mark.keys()
    assert names(remote) == before
    last = collect(collecting, remote)
    assert last.delete == marking.mark
    assert names(remote) == before - last.delete.keys()
    assert remote.has([worse.manifest.parts["model"].index]) == set()
    assert {best.id, worse.id} <= {name.rpartition("/")[2] for name in names(remote)}  # manifests stay
    index_ids = {part.index for part in best.manifest.parts.values()}
    kept = next(decision.parts for decision in last.decisions if decision.entry.id == best.id)
    assert remote.has(index_ids) == {best.manifest.parts[name].index for name in kept}


def test_what_was_pushed_again_meanwhile_stays(collecting: Repo, remote: Folder) -> None:
    best, worse = save(collecting, 1, 2.0), save(collecting, 2, 3.0)
    collecting.push([best, worse], remote)
    clock = Clock(remote)
    clock.pass_by(2 * HOUR)
    marking = collect(collecting, remote)
    assert marking.mark
    clock.pass_by(2 * HOUR)
    before = names(remote)
    assert collecting.push([worse], remote).objects  # marked, so written again
    assert collect(collecting, remote).delete == {}
    assert names(remote) == before


def test_what_was_written_since_it_was_marked_is_marked_anew(collecting: Repo, remote: Folder) -> None:
    best, worse = save(collecting, 1, 2.0), save(collecting, 2, 3.0)
    collecting.push([best, worse], remote)
    clock = Clock(remote)
    clock.pass_by(2 * HOUR)
    marked = collect(collecting, remote).mark
    clock.pass_by(HOUR)
    collecting.push([worse], remote)
    clock.pass_by(2 * HOUR)
    again = collect(collecting, remote)
    assert (again.delete, again.mark) == ({}, marked)
    clock.pass_by(2 * HOUR)
    assert collect(collecting, remote).delete == marked


def test_checkpoints_of_other_machines_count(collecting: Repo, remote: Folder, tmp_path: Path) -> None:
    """Their manifests are in the remote alone: nobody has pulled them."""
    (tmp_path / "other").mkdir()
    other = Repo.init(tmp_path / "other")
    theirs = save(other, 7, 1.0)
    other.push([theirs], remote)
    mine = save(collecting, 1, 2.0)
    collecting.push([mine], remote)
    clock = Clock(remote)
    for _ in range(3):
        clock.pass_by(2 * HOUR)
        collect(collecting, remote)
    models = {entry.manifest.parts["model"].index for entry in (theirs, mine)}
    assert remote.has(models) == models


@pytest.mark.parametrize("harm", ["manifest", "index", "marks", "no manifest"])
def test_what_can_not_be_read_stops_it(collecting: Repo, remote: Folder, tmp_path: Path, harm: str) -> None:
    (tmp_path / "other").mkdir()
    other = Repo.init(tmp_path / "other")
    theirs = save(other, 7, 1.0)
    other.push([theirs], remote)
    clock = Clock(remote)
    clock.pass_by(2 * HOUR)
    if harm == "manifest":
        (remote.path / "manifests" / theirs.manifest.file_name(theirs.id)).write_bytes(b"{}")
    elif harm == "index":
        index_id = theirs.manifest.parts["model"].index
        (remote.path / "objects" / index_id[:2] / index_id).write_bytes(b"garbage")
    elif harm == "marks":
        remote.write_file("gc/marked.json", b"{}")
    else:
        (remote.path / "manifests" / theirs.manifest.file_name(theirs.id)).unlink()
    before = names(remote)
    with pytest.raises(CastoreError) as caught:
        collect(collecting, remote)
    expected = {"manifest": CorruptManifest, "marks": CorruptBundle, "no manifest": RootsUnreadable}
    assert isinstance(caught.value, expected.get(harm, CastoreError))
    assert names(remote) == before
    if harm != "marks":
        assert marks.read(remote).files == frozenset()


# -- pushes while a pass is at work ----------------------------------------------------------------------------------


class Meddling(Folder):
    """A folder in which something happens just before the first files are deleted."""

    before_removal: ClassVar[Callable[[], None]]

    def remove(self, names: Sequence[str]) -> None:
        if list(names) != [marks.PASS]:
            happen, Meddling.before_removal = Meddling.before_removal, lambda: None
            happen()
        super().remove(names)


@pytest.fixture
def marked(collecting: Repo, remote: Folder, monkeypatch: pytest.MonkeyPatch) -> tuple[Entry, Entry]:
    """Two checkpoints that were pushed, the second of which a pass is about to delete."""
    monkeypatch.setattr(marks, "_POLL", 0.01)
    entries = save(collecting, 1, 2.0), save(collecting, 2, 3.0)
    collecting.push(entries, remote)
    clock = Clock(remote)
    clock.pass_by(2 * HOUR)
    assert collect(collecting, remote).mark
    clock.pass_by(2 * HOUR)
    return entries


@pytest.fixture
def pusher(collecting: Repo, tmp_path: Path) -> Repo:
    """Another machine's."""
    (tmp_path / "pusher").mkdir()
    Repo.init(tmp_path / "pusher")
    shutil.copy(collecting.root / "config.toml", tmp_path / "pusher" / ".castore")
    return Repo.open(tmp_path / "pusher")


def good_again(pusher: Repo) -> Entry:
    """Save what was marked as part of the best checkpoint, which the collector knows nothing of."""
    saved = pusher.save(parts(2), run="main", step=3, metrics={"val_loss": 0.5})
    return Entry(saved.id, saved.manifest)


def fetch_elsewhere(remote: Folder, entry: Entry, path: Path) -> None:
    path.mkdir()
    other = Repo.init(path)
    other.catalog.add(entry.manifest)
    other.fetch(entry, remotes=[remote])
    assert other.load(entry.id)


@pytest.mark.usefixtures("marked")
def test_a_push_during_the_deletion_writes_again_what_was_deleted(
    collecting: Repo, pusher: Repo, remote: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = good_again(pusher)
    meddling = Meddling("shared", remote.path)

    is_waiting = threading.Event()

    def wait(*arguments: Any) -> None:
        is_waiting.set()
        really_wait(*arguments)

    really_wait = marks._wait
    monkeypatch.setattr(marks, "_wait", wait)
    with ThreadPoolExecutor(1) as thread:
        pushes: list[Future[Pushed]] = []

        def push() -> None:
            pushes.append(thread.submit(pusher.push, [wanted], remote))
            assert is_waiting.wait(60)

        Meddling.before_removal = push
        assert collect(collecting, meddling).delete
        assert pushes[0].result().checkpoints == (wanted.id,)
    assert list(verify_remote(collecting, remote)) == []
    fetch_elsewhere(remote, wanted, tmp_path / "other")


@pytest.mark.usefixtures("marked")
def test_a_push_waits_in_vain_for_a_pass_that_was_killed(
    collecting: Repo, pusher: Repo, remote: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        for name in list(marks.read(remote).files)[::2]:
            (remote.path / name).unlink()
        raise StorageError("remove", "a file", OSError(errno.EIO, "a test says so"))

    Meddling.before_removal = die
    with pytest.raises(StorageError):
        collect(collecting, Meddling("shared", remote.path))
    monkeypatch.setattr(marks, "PATIENCE", 0.1)
    wanted = good_again(pusher)
    pusher.push([wanted], remote)
    assert list(verify_remote(collecting, remote)) == []
    fetch_elsewhere(remote, wanted, tmp_path / "other")
    assert collect(collecting, remote).decisions  # another pass may begin


@pytest.mark.usefixtures("marked")
def test_a_pass_that_a_push_took_for_dead_deletes_nothing_more(
    collecting: Repo, pusher: Repo, remote: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "PATIENCE", 0.1)
    wanted = good_again(pusher)

    class Slow(Folder):
        def read_file(self, name: str, limit: int) -> bytes | None:
            if name == marks.PASS and (token := super().read_file(name, limit)) and not token.startswith(b"stopped"):
                pusher.push([wanted], remote)  # what is to be deleted has been planned
            return super().read_file(name, limit)

    before = names(remote)
    with pytest.raises(CollectionStopped, match="run it again later"):
        collect(collecting, Slow("shared", remote.path))
    assert names(remote) >= before
    assert list(verify_remote(collecting, remote)) == []


def test_of_two_passes_the_later_one_goes_on(
    collecting: Repo, remote: Folder, marked: tuple[Entry, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "PATIENCE", 0.1)

    class Twice(Folder):
        def files(self, folder: str) -> Iterator[RemoteFile]:
            yield from list(super().files(folder))
            if folder == "packs":
                assert collect(collecting, remote).delete

    with pytest.raises(CollectionStopped):
        collect(collecting, Twice("shared", remote.path))
    assert remote.has([marked[1].manifest.parts["model"].index]) == set()
    assert marks.Activity.of(remote).at_work == b""


@pytest.mark.usefixtures("marked")
def test_a_push_that_is_interrupted_while_it_waits_leaves_nothing_that_looks_whole(
    collecting: Repo, pusher: Repo, remote: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = pusher.save({**parts(2), "model": {**parts(2)["model"], "n": 1}}, run="main", step=3)
    wanted = Entry(saved.id, saved.manifest)  # its chunks are marked, its index is new

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def push() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(marks, "_wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pusher.push([wanted], remote)

    Meddling.before_removal = push
    assert collect(collecting, Meddling("shared", remote.path)).delete
    assert pusher.push([wanted], remote).checkpoints == (wanted.id,)
    fetch_elsewhere(remote, wanted, tmp_path / "other")


class Interrupted(Folder):
    """A folder in which something else happens, once, just before an operation."""

    before: ClassVar[dict[int, Callable[[], None]]] = {}
    operations: ClassVar[int] = 0

    def _turn(self) -> None:
        Interrupted.operations += 1
        Interrupted.before.pop(Interrupted.operations, lambda: None)()

    def get(self, object_id: ObjectId) -> bytes | None:
        self._turn()
        return super().get(object_id)

    def has(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        self._turn()
        return super().has(object_ids)

    def put(self, object_id: ObjectId, frame: bytes, *, renew: bool = False) -> bool:
        self._turn()
        return super().put(object_id, frame, renew=renew)

    def files(self, folder: str) -> Iterator[RemoteFile]:
        self._turn()
        return super().files(folder)

    def read_file(self, name: str, limit: int) -> bytes | None:
        self._turn()
        return super().read_file(name, limit)

    def write_file(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        self._turn()
        return super().write_file(name, data, replace=replace)

    # not in a request to delete: no push waits so short a time that one is still under way


@pytest.mark.parametrize("index", ["marked", "new"])
@pytest.mark.parametrize("outer", ["gc", "push"])
@pytest.mark.usefixtures("marked")
def test_a_push_and_a_pass_at_any_moment_of_each_other(
    collecting: Repo,
    pusher: Repo,
    remote: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outer: str,
    index: str,
) -> None:
    monkeypatch.setattr(marks, "PATIENCE", 0.1)
    monkeypatch.setattr(marks, "_TOO_LATE", 0.05)
    monkeypatch.setattr("castore.remotes.fallback.ASKERS", 1)
    more = {"n": 1} if index == "new" else {}
    saved = pusher.save({**parts(2), "model": parts(2)["model"] | more}, run="main", step=3, metrics={"val_loss": 0.5})
    wanted = Entry(saved.id, saved.manifest)
    prepared = tmp_path / "prepared"
    shutil.copytree(remote.path, prepared)
    for moment in itertools.count(1):
        shutil.rmtree(remote.path)
        shutil.copytree(prepared, remote.path)

        def act(name: str, place: Folder) -> None:
            with contextlib.suppress(CollectionStopped):
                if name == "gc":
                    collect(collecting, place, Policy(keep=1, keep_latest=0, keep_optimizer=1))
                else:
                    assert pusher.push([wanted], place).checkpoints == (wanted.id,)

        inner = "push" if outer == "gc" else "gc"
        Interrupted.operations = 0
        Interrupted.before = {moment: functools.partial(act, inner, Folder("shared", remote.path))}
        act(outer, Interrupted("shared", remote.path))
        if Interrupted.before:
            break
        assert list(verify_remote(collecting, remote)) == [], moment
        fetch_elsewhere(remote, wanted, tmp_path / f"other{moment}")
    assert moment > 15


@pytest.mark.parametrize("end", ["another pass", "a failed pass", "a push", "its own"])
def test_what_a_pass_deleted_before_it_failed_is_never_overlooked(
    remote: Folder, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(marks, "PATIENCE", 0.05)
    marks.write(remote, Marks.of(["objects/a"]))
    before = marks.Activity.of(remote)
    failed = marks.Pass(remote)
    failed.begin()
    failed.go_on()
    if end == "its own":
        failed.end(marks_changed=False)
    elif end == "a push":
        assert not marks.nothing_deleted_since(remote, marks.Activity.of(remote))
    else:
        other = marks.Pass(remote)
        other.begin()
        other.end(marks_changed=False)
    for _ in range(2):
        assert not marks.nothing_deleted_since(remote, before)
    later = marks.Activity.of(remote)
    assert marks.nothing_deleted_since(remote, later)
    another = marks.Pass(remote)
    another.begin()
    another.end(marks_changed=False)
    assert not marks.nothing_deleted_since(remote, before)


def test_a_pass_on_a_machine_that_slept_stops(remote: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work = marks.Pass(remote)
    at_work.begin()
    at_work.go_on()
    hours = itertools.count(0, 3600)
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))
    with pytest.raises(CollectionStopped):
        at_work.go_on()


@pytest.mark.usefixtures("marked")
def test_a_push_that_needs_nothing_marked_waits_for_nobody(collecting: Repo, remote: Folder) -> None:
    remote.write_file(marks.PASS, b"one that is at work")
    new = save(collecting, 9, 1.0)
    assert collecting.push([new], remote).checkpoints == (new.id,)


# -- other ways to delete too much -----------------------------------------------------------------------------------


def test_chunks_stay_for_as_long_as_an_index_that_lists_them(collecting: Repo, remote: Folder) -> None:
    import torch

    frozen = torch.randn(100_000)

    def save_model(step: int, loss: float, **more: object) -> Entry:
        saved = collecting.save({"model": more}, run="main", step=step, metrics={"val_loss": loss})
        return Entry(saved.id, saved.manifest)

    old, best = save_model(1, 3.0, frozen=frozen), save_model(2, 1.0, n=2)
    collecting.push([old, best], remote)
    clock = Clock(remote)
    clock.pass_by(2 * HOUR)
    young = save_model(3, 2.0, frozen=frozen, n=3)
    collecting.push([young], remote)
    assert collect(collecting, remote).mark
    index_id = young.manifest.parts["model"].index
    seen = set()
    for _ in range(6):
        clock.pass_by(HOUR * 0.7)
        collect(collecting, remote)
        is_there = bool(remote.has([index_id]))
        seen.add(is_there)
        assert not is_there or not list(verify_remote(collecting, remote))
    assert seen == {True, False}


def test_the_folder_of_a_repository_is_refused(collecting: Repo, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    theirs = Repo.init(tmp_path / "theirs")
    save(theirs, 1, 2.0)
    before = theirs.store.stored().keys()
    with pytest.raises(UsageError, match="folder of a repository"):
        collect(collecting, Folder("theirs", theirs.root))
    assert theirs.store.stored().keys() == before


def test_the_age_of_files_is_told_by_the_clock_of_the_remote(collecting: Repo, remote: Folder) -> None:
    class Behind(Folder):
        """Its clock is two days behind this machine's."""

        def files(self, folder: str) -> Iterator[RemoteFile]:
            for file in super().files(folder):
                yield RemoteFile(file.name, file.size, file.modified - 48 * 3600)

    behind = Behind("shared", remote.path)
    entries = [save(collecting, 1, 2.0), save(collecting, 2, 3.0)]
    collecting.push(entries, remote)
    for _ in range(3):
        plan = collect(collecting, behind)
        assert (plan.mark, plan.delete) == ({}, {})
        assert plan.waiting


def test_what_a_killed_push_left_goes(collecting: Repo, remote: Folder) -> None:
    collecting.push([save(collecting, 1, 2.0)], remote)
    leftover = remote.path / "tmp" / "123-of-a-dead-process"
    leftover.write_bytes(b"half an object")
    clock = Clock(remote)
    for _ in range(2):
        assert leftover.exists()
        clock.pass_by(2 * HOUR)
        collect(collecting, remote)
    assert not leftover.exists()


@settings(max_examples=20)
@given(st.data())
def test_whatever_happens_between_passes_kept_checkpoints_stay_whole(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Repo.init(folder)
        (Path(folder) / ".castore" / "config.toml").write_text(
            '[store]\nchunk_size = "64KiB"\nfsync = false\n[remotes]\nshared = "shared"\ncollector = "me"\n'
        )
        repo = Repo.open(folder)
        remote = Folder("shared", Path(folder) / "shared")
        clock = Clock(remote)
        entries: list[Entry] = []
        pushed: set[str] = set()
        for step in range(data.draw(st.integers(2, 8))):
            match data.draw(st.sampled_from(["save", "push", "push", "gc", "wait"])):
                case "save":
                    loss = random.Random(step).random() + 1
                    entries.append(save(repo, data.draw(st.integers(0, 3)) + 10 * len(entries), loss))
                case "push" if entries:
                    entry = data.draw(st.sampled_from(entries))
                    repo.push([entry], remote)
                    pushed.add(entry.id)
                case "gc":
                    if pushed:
                        collect(repo, remote, Policy(keep=2, keep_latest=1, keep_optimizer=1))
                case "wait":
                    clock.pass_by(2 * HOUR)
        if not pushed:
            return
        plan = collect(repo, remote, Policy(keep=2, keep_latest=1, keep_optimizer=1))
        other = Repo.init(Path(folder) / "other")
        other.remotes.append(remote)
        for decision in plan.decisions:
            if decision.entry.id in pushed:
                parts_there = decision.entry.manifest.parts.items()
                there = [name for name, part in parts_there if remote.has([part.index])]
                other.fetch(decision.entry, there)  # whatever looks whole is whole
