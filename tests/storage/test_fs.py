"""The one write path: the first error is the one that is raised."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from castore import Repo
from castore.errors import StorageError
from castore.storage import fs, output_file


def fail(number: int) -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full, and then fails when files are closed and removed, too. Faults that no real disk here has."""
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
