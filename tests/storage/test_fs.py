"""The one write path: the first error is the one that is raised."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from castore import Repo
from castore.errors import Locked, StorageError
from castore.storage import fs, output_file


def fail(number: int) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full, and then fails when files are closed and removed, too. Faults that no real disk here has."""
    assert tmp_path.exists()  # to make it, pytest closes files
    monkeypatch.setattr("castore.storage.fs.os.writev", fail(errno.ENOSPC))
    monkeypatch.setattr("castore.storage.fs.os.unlink", fail(errno.EROFS))
    close = os.close

    def close_and_fail(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("castore.storage.fs.os.close", close_and_fail)


@pytest.mark.usefixtures("disk")
def test_cleaning_up_does_not_hide_why_a_file_was_not_published(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left") as caught:
        fs.publish(tmp_path / "a", b"data", tmp_path)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.usefixtures("disk")
def test_nor_why_an_output_file_was_not_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left"):
        output_file.write(tmp_path / "a", b"data")


def test_nor_why_a_save_failed(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.storage.fs.os.writev", fail(errno.ENOSPC))
    monkeypatch.setattr("castore.storage.fs.os.unlink", fail(errno.EROFS))
    with pytest.raises(StorageError, match="No space left"):
        repo.save({"model": {"x": 1}}, run="r", step=1)


# -- the lock ----------------------------------------------------------------------------------------------------------


def hold_again_and_again(path: str, start: float) -> None:
    """Hold the shared lock for 0.3 s, and again at once, as a process that loads one checkpoint after another does."""
    time.sleep(start)
    while True:  # until the test is over, which ends it
        with fs.lock(Path(path), exclusive=False, timeout=10):
            time.sleep(0.3)


def test_overlapping_shared_holders_do_not_keep_the_exclusive_lock_out(
    tmp_path: Path, start: Callable[..., BaseProcess]
) -> None:
    path = tmp_path / "lock"
    # one of them has the lock at any time
    holders = [start(hold_again_and_again, str(path), number * 0.08) for number in range(4)]
    while not path.exists():
        time.sleep(0.01)
    time.sleep(1)
    for _ in range(3):
        with fs.lock(path, exclusive=True, timeout=3):
            assert all(holder.is_alive() for holder in holders)
        time.sleep(0.2)


def test_a_thread_that_has_the_lock_does_not_wait_for_those_who_wait_for_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    waited = threading.Event()

    def wait_for_exclusive() -> None:
        waited.set()
        with fs.lock(path, exclusive=True, timeout=10):
            pass

    with fs.lock(path, exclusive=False, timeout=1):
        thread = threading.Thread(target=wait_for_exclusive)
        thread.start()
        waited.wait()
        time.sleep(0.2)
        with fs.lock(path, exclusive=False, timeout=1):
            pass
        with pytest.raises(Locked):  # a stranger queues up behind it
            run_in_thread(lambda: hold_once(path))
    thread.join()


def hold_once(path: Path) -> None:
    with fs.lock(path, exclusive=False, timeout=0.3):
        pass


def run_in_thread(function: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with fs.lock(path, exclusive=False, timeout=1):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with fs.lock(path, exclusive=True, timeout=2):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
