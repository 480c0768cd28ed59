"""A folder as a remote: the ``objects/`` of another store, on a shared disk say."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from castore.errors import StorageError
from castore.format.frame import MAX_STORED
from castore.format.ids import ObjectId


@dataclass(frozen=True, slots=True)
class Folder:
    """Objects at ``path/objects/ab/<id>``, which are only ever read. Nothing there is followed, moved or waited for."""

    name: str
    path: Path
    _bad: dict[ObjectId, str] = field(default_factory=dict)

    def get(self, wanted: ObjectId) -> bytes | None:
        """What the file holds. StorageError when it is a link, can't be read or is larger than any object."""
        if wanted in self._bad:
            return None
        path = self._file(wanted)
        try:
            with open(path, "rb", opener=_open) as file:
                # of what is no file it is zero, which is all that is read then
                size = os.fstat(file.fileno()).st_size
                if size > MAX_STORED:
                    raise OSError(errno.EFBIG, f"{size} bytes, where at most {MAX_STORED} make sense")
                return file.read(size)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError("read", str(path), error) from error

    def has(self, wanted: Iterable[ObjectId]) -> set[ObjectId]:
        """Those that are regular files there."""
        return {one for one in wanted if one not in self._bad and self._is_file(one)}

    def explain_missing(self, wanted: ObjectId) -> str:
        """Why there is no such object: a folder that is gone is not one that lacks a file."""
        if wanted in self._bad:
            return f"its copy is bad: {self._bad[wanted]}"
        try:
            os.lstat(self._file(wanted))
        except FileNotFoundError:
            return "not there" if self.path.is_dir() else f"there is no folder {self.path}"
        except OSError as error:
            return f"can't be read: {error.strerror}"
        return "not there" if not self._is_file(wanted) else "can't be read"

    def mark_corrupt(self, wanted: ObjectId, reason: str) -> None:
        """Not to be read again, while this process lives."""
        self._bad[wanted] = reason

    def _is_file(self, wanted: ObjectId) -> bool:
        try:
            return stat.S_ISREG(os.lstat(self._file(wanted)).st_mode)
        except OSError:
            return False

    def _file(self, wanted: ObjectId) -> Path:
        return self.path / "objects" / wanted[:2] / wanted


def _open(path: str, flags: int) -> int:
    # a link could lead to a terminal and a pipe has no end: neither may be what a load waits for
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
