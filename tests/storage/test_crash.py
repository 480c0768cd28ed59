"""A save that is killed, or cut short by a power failure, at any operation on the disk.

Everything that castore does to the disk goes through castore.fs, so that a wrapper around those few functions sees
every operation and can end the process before any of them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from builders import exact, parts

from castore import Repo
from castore.format.bundle import Record
from castore.storage import fs, object_store

DURABLE = '[store]\nchunk_size = "64KiB"\nthreads = 2\nlock_timeout = 0.2\n'


def new_repo(folder: Path) -> Repo:
    Repo.init(folder)
    (folder / ".castore" / "config.toml").write_text(DURABLE)
    return Repo.open(folder)


def unsynced(folder: Path) -> Repo:
    (folder / ".castore" / "config.toml").write_text(DURABLE + "fsync = false\n")
    return Repo.open(folder)


class Operation(NamedTuple):
    """One operation: the file or folder it is about, and for a rename or link the new name."""

    name: str
    path: Path
    target: Path | None = None


# where the operations are called, and what of their arguments they are about
WRAPPED: list[tuple[Any, str, Callable[..., Operation]]] = [
    (fs, "create_temporary", lambda directory, **_: Operation("create", directory)),
    (fs, "write", lambda _, path, _buffers: Operation("write", path)),
    (fs, "write_direct", lambda _, path, _buffer, _size: Operation("write", path)),
    (fs, "sync", lambda _, path: Operation("sync", path)),
    (fs, "close", lambda _, path: Operation("close", path)),
    (fs, "sync_directory", lambda path: Operation("sync directory", path)),
    (fs, "rename", lambda source, target: Operation("rename", source, target)),
    (fs, "unlink", lambda path: Operation("unlink", path)),
    (os, "mkdir", lambda path, *_: Operation("mkdir", Path(path))),
    (os, "link", lambda source, target: Operation("link", Path(source), Path(target))),
]


def wrap(replace: Callable[[Any, str, Any], None], before: Callable[[Operation], None],
         after: Callable[[Operation], None]) -> None:  # fmt: skip
    """Call ``before`` and, when it succeeded, ``after`` every operation."""

    def around(original: Callable[..., Any], describe: Callable[..., Operation]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            operation = describe(*arguments, **options)
            before(operation)
            result = original(*arguments, **options)
            after(operation)
            return result

        return wrapped

    for module, name, describe in WRAPPED:
        replace(module, name, around(getattr(module, name), describe))


# -- killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 1 << 30], ids=["direct", "buffered"])
def direct_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """From how many bytes on files are written past the page cache."""
    size: int = request.param
    monkeypatch.setattr(object_store, "_DIRECT_BYTES", size)
    return size


def save_killed_before(root: str, nth: int, direct_bytes: int) -> None:
    """Save step 2, but die before operation ``nth``, counted from 0."""
    object_store._DIRECT_BYTES = direct_bytes
    count = itertools.count()
    lock = threading.Lock()

    def kill(_: Operation) -> None:
        with lock:
            if next(count) == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    wrap(setattr, kill, lambda _: None)
    os.fsync = os.fdatasync = lambda _: None  # who is killed loses nothing that the kernel has
    Repo.open(root).save(parts(2), run="new", step=2)


@pytest.mark.slow
def test_a_save_killed_before_any_operation_leaves_every_visible_checkpoint_whole(
    tmp_path: Path, start: Callable[..., BaseProcess], direct_bytes: int
) -> None:
    template = new_repo(tmp_path / "template")
    older = template.save(parts(1), run="old", step=1).id
    appeared = []
    for nth in itertools.count():
        folder = tmp_path / str(nth)
        shutil.copytree(tmp_path / "template", folder)
        child = start(save_killed_before, str(folder), nth, direct_bytes)
        child.join()
        repo = unsynced(folder)
        listing = repo.catalog.listing()
        assert listing.broken == ()
        assert older in {entry.id for entry in listing.entries}
        for entry in listing.entries:
            assert exact(repo.load(entry.id)) == exact(parts(entry.manifest.step))
        appeared.append(len(listing.entries) == 2)
        again = repo.save(parts(2), run="later", step=2)
        assert exact(repo.load(again.id)) == exact(parts(2))
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        shutil.rmtree(folder)
    # more than one operation for each object; visible from one operation on, close to the last, and then for good
    assert len(appeared) > 40
    first = appeared.index(True)
    assert first >= len(appeared) - 4
    assert all(appeared[first:])


# -- power failure -----------------------------------------------------------------------------------------------------


def recorded(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> list[Operation]:
    """What ``action`` does to the disk. Syncs count once they are done, everything else from when it begins."""
    log: list[Operation] = []
    with monkeypatch.context() as patch:
        wrap(
            patch.setattr,
            lambda done: None if "sync" in done.name else log.append(done),
            lambda done: log.append(done) if "sync" in done.name else None,
        )
        action()
    return log


def violations(log: list[Operation], root: Path) -> list[str]:
    """Where a power failure could lose what a visible or acknowledged manifest needs.

    After one, only data that was synced and names whose folder was synced are sure to be there.
    """
    found = []
    synced: set[Path] = set()
    unsure: dict[Path, Path] = {}  # name -> the folder whose sync makes it sure
    for operation in log:
        match operation:
            case Operation("sync", path):
                synced.add(path)
            case Operation("write", path):
                synced.discard(path)
            case Operation("sync directory", path):
                unsure = {name: folder for name, folder in unsure.items() if folder != path}
            case Operation("mkdir", path) if path != root / "tmp":
                unsure[path] = path.parent
            case Operation("rename" | "link", path, target):
                assert target is not None
                if path not in synced:
                    found.append(f"{target.name} gets its name before its data is synced")
                if target.is_relative_to(root / "manifests"):
                    found += [f"{target.name} appears before {name.name} is sure" for name in unsure
                              if not name.is_relative_to(root / "manifests")]  # fmt: skip
                unsure[target] = target.parent
    return found + [f"{name.name} is not sure when the save returns" for name in unsure]


@pytest.fixture
def durable(tmp_path: Path) -> Repo:
    """A durable repository as it is after a clone: nothing that git ignores is there."""
    root = new_repo(tmp_path).root
    shutil.rmtree(root / "objects")
    shutil.rmtree(root / "tmp")
    return Repo.open(tmp_path)


def save_after_clone(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    shutil.rmtree(repo.store.objects, ignore_errors=True)
    return recorded(monkeypatch, lambda: Repo.open(repo.root.parent).save(parts(1), run="ci", step=1))


@pytest.mark.usefixtures("direct_bytes")
def test_everything_is_synced_in_the_order_that_survives_a_power_failure(
    durable: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = save_after_clone(durable, monkeypatch)
    assert violations(log, durable.root) == []
    names = [operation.name for operation in log]
    objects = len(list(durable.store.objects.glob("*/*")))
    assert names.count("rename") == objects
    assert names.count("sync") == objects + 1
    assert names.count("link") == 1


@pytest.mark.usefixtures("direct_bytes")
def test_every_sync_of_a_save_is_needed(durable: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    log = save_after_clone(durable, monkeypatch)
    syncs = [i for i, operation in enumerate(log) if "sync" in operation.name]
    needless = [log[i] for i in syncs if not violations(log[:i] + log[i + 1 :], durable.root)]
    assert needless == []


def test_a_hit_on_an_object_of_another_process_is_synced_like_a_write(
    durable: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.save(parts(1), run="ci", step=1)
    other = Repo.open(durable.root.parent)  # has not seen these objects reach the disk
    log = recorded(monkeypatch, lambda: other.save(parts(1), run="ci", step=2))
    assert "rename" not in [operation.name for operation in log]
    link = next(i for i, operation in enumerate(log) if operation.name == "link")
    synced = {operation.path for operation in log[:link] if operation.name == "sync directory"}
    store = durable.store.objects
    assert synced >= {*store.iterdir(), store, durable.root, durable.catalog.root}


def test_a_hit_on_what_this_process_has_synced_costs_no_sync_of_its_folder(
    durable: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.save(parts(1), run="ci", step=1)
    log = recorded(monkeypatch, lambda: durable.save(parts(1), run="ci", step=2))
    store = durable.store.objects
    synced = [operation.path for operation in log if operation.name == "sync directory"]
    assert sorted(synced) == sorted([store, durable.root, durable.catalog.root, durable.catalog.root / "ci"])


def test_a_new_repository_is_complete_and_sure_before_it_can_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = recorded(monkeypatch, lambda: Repo.init(tmp_path))
    linked = [operation.target.name for operation in log if operation.target is not None]
    assert linked[-1] == "config.toml"
    last = next(i for i, operation in enumerate(log) if operation.target == tmp_path / ".castore" / "config.toml")
    assert Operation("sync directory", tmp_path) in log[:last]
    assert Operation("sync directory", tmp_path / ".castore") in log[last:]


def test_without_fsync_in_the_settings_nothing_is_synced(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    log = recorded(monkeypatch, lambda: repo.save(parts(1), run="ci", step=1))
    assert [operation for operation in log if "sync" in operation.name] == []
    assert len(log) > 20


@pytest.mark.parametrize("folder", ["pins", "bundles", "manifests"])
def test_what_is_recorded_in_a_folder_of_its_own_survives_with_the_folder(
    durable: Repo, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """A first pin or record makes its folder; a manifests/ without a file is not in a clone."""
    saved = durable.save(parts(1), run="ci", step=1)
    record = Record(
        bundle=saved.id, key="k", created="2026-01-01T00:00:00.000000Z", bytes=1000, objects=1,
        parts={saved.manifest.parts["model"].index: [saved.id]},
    )  # fmt: skip
    actions: dict[str, Callable[[], object]] = {
        "pins": lambda: durable.catalog.pin(saved.id),
        "bundles": lambda: durable.catalog.add_record(record),
        "manifests": lambda: durable.catalog.add(saved.manifest),
    }
    shutil.rmtree(durable.root / folder, ignore_errors=True)
    log = recorded(monkeypatch, actions[folder])
    assert violations(log, durable.root) == []
    syncs = [i for i, operation in enumerate(log) if "sync" in operation.name]
    needless = [log[i] for i in syncs if not violations(log[:i] + log[i + 1 :], durable.root)]
    assert needless == []
