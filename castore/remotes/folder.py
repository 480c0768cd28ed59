"""A folder as a remote: the ``objects/`` of another store, on a shared disk for example."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import unquote, urlsplit

from castore.errors import CorruptObject, StorageError, UnsupportedVersion
from castore.format.frame import MAX_STORED, decode_frame, plain_length
from castore.format.ids import ObjectId
from castore.remotes.base import RemoteFile
from castore.storage import fs


@dataclass(frozen=True, slots=True)
class Folder:
    """Objects at ``path/objects/ab/<id>``. Reading changes nothing there, follows no link and waits for no pipe.

    >>> Folder("shared", Path("/nowhere")).explain_missing(ObjectId("ab" * 32))
    'there is no folder /nowhere'
    """

    writable: ClassVar[bool] = True

    name: str
    path: Path
    _corrupt: dict[ObjectId, str] = field(default_factory=dict)
    _sure: set[Path] = field(default_factory=set)

    @classmethod
    def from_location(cls, name: str, location: str, base: Path) -> Self:
        """Open a folder by its path or ``file:`` URL. ValueError when the URL names another machine."""
        if not location.lower().startswith("file:"):
            return cls(name, base / location)
        url = urlsplit(location)
        if url.netloc not in ("", "localhost"):
            raise ValueError(f"{location} names the machine {url.netloc}: write file:///path, with three slashes")
        path = unquote(url.path)
        if url.query or url.fragment or not path or "\0" in path:
            raise ValueError(f"{location} is not the URL of a folder: write file:///path, and %3F and %23 for ? and #")
        return cls(name, base / path)

    def get(self, object_id: ObjectId) -> bytes | None:
        """Return the file's bytes. StorageError when it is a link, can't be read or is larger than any object."""
        if object_id in self._corrupt:
            return None
        path = self._file(object_id)
        try:
            with open(path, "rb", opener=_open) as file:
                # zero for a pipe or a device, of which nothing is read then
                size = os.fstat(file.fileno()).st_size
                if size > MAX_STORED:
                    raise OSError(errno.EFBIG, f"{size} bytes, where at most {MAX_STORED} make sense")
                return file.read(size)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError("read", str(path), error) from error

    def has(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return those that are regular files there."""
        return {object_id for object_id in object_ids if object_id not in self._corrupt and self._is_file(object_id)}

    def fresh(self) -> Self:
        """Return this one: the folder is looked at each time."""
        return self

    def may_have(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return what :meth:`has` returns: looking costs little."""
        return self.has(object_ids)

    def expect(self, object_ids: Iterable[ObjectId]) -> None:
        """Do nothing: each object is a file of its own."""

    def explain_missing(self, object_id: ObjectId) -> str:
        """Explain, for an error message, why this remote cannot supply the object.

        A folder that is gone reads differently from one that lacks a file.
        """
        if object_id in self._corrupt:
            return f"its copy is corrupt: {self._corrupt[object_id]}"
        try:
            os.lstat(self._file(object_id))
        except FileNotFoundError:
            return "not there" if self.path.is_dir() else f"there is no folder {self.path}"
        except OSError as error:
            return f"can't be read: {error.strerror}"
        return "can't be read" if self._is_file(object_id) else "not there"

    def mark_corrupt(self, object_id: ObjectId, reason: str) -> None:
        """Mark this remote's copy as corrupt; treat it as absent for the rest of this process."""
        self._corrupt[object_id] = reason

    def put(self, object_id: ObjectId, frame: bytes, *, renew: bool = False) -> bool:
        """Publish a verified frame, durably; return False if a good copy was there already. StorageError."""
        path, temporary = self._file(object_id), self.path / "tmp"
        self._make_folders(temporary, path.parent)
        is_new = fs.publish(path, frame, temporary)
        if not (is_new or renew) and self._is_good(object_id):
            return False
        if not is_new:
            self._replace(path, frame, temporary)
        self._corrupt.pop(object_id, None)
        return True

    def files(self, folder: str) -> Iterator[RemoteFile]:
        """Yield every regular file below a folder. StorageError."""
        pending = [self.path / folder]
        while pending:
            try:
                with os.scandir(pending.pop()) as listing:
                    for item in listing:
                        if item.is_dir(follow_symlinks=False):
                            pending.append(Path(item.path))
                        elif item.is_file(follow_symlinks=False):
                            status = item.stat(follow_symlinks=False)
                            name = Path(item.path).relative_to(self.path).as_posix()
                            yield RemoteFile(name, status.st_size, status.st_mtime)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError("list", str(self.path / folder), error) from error

    def read_file(self, name: str, limit: int) -> bytes | None:
        """Return a regular file's bytes; None when there is none. StorageError, also for more than ``limit`` bytes."""
        try:
            return fs.read(self.path / name, limit)
        except FileNotFoundError:
            return None

    def write_file(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Write a file, durably; return False, without ``replace``, if there was one already. StorageError."""
        path, temporary = self.path / name, self.path / "tmp"
        self._make_folders(temporary, path.parent)
        return fs.publish(path, data, temporary, replace=replace)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files, durably; those that aren't there are no error. StorageError."""
        for name in names:
            try:
                os.unlink(self.path / name)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError("remove", str(self.path / name), error) from error
        for folder in sorted({(self.path / name).parent for name in names}):
            if folder.is_dir():
                fs.sync_directory(folder)

    def _make_folders(self, *folders: Path) -> None:
        """Create folders, and those above them, whose names are durable then, whoever created them."""
        for folder in folders:
            is_new = fs.make_directory(folder)
            if not is_new and (folder == self.path or folder in self._sure):
                continue
            if folder != self.path:
                self._make_folders(folder.parent)
            # the process that created it may have died before syncing; one sync serves for all that are there by now
            there = [Path(item.path) for item in fs.scan(folder.parent)]
            fs.sync_directory(folder.parent)
            self._sure.update(there)

    def _is_good(self, object_id: ObjectId) -> bool:
        """Whether the file decodes to the bytes that the id names, whatever was marked before."""
        try:
            frame = fs.read(self._file(object_id), MAX_STORED) if self._is_file(object_id) else b""
            plain = bytearray(plain_length(object_id, memoryview(frame)))
            decode_frame(object_id, memoryview(frame), memoryview(plain))
        except (CorruptObject, UnsupportedVersion, StorageError, FileNotFoundError):
            return False
        return True

    def _replace(self, path: Path, frame: bytes, temporary: Path) -> None:
        """Put a good file in the place of a corrupt one, or of a link, atomically."""
        new = temporary / f"{path.name}-{os.getpid()}-{os.urandom(4).hex()}"
        fs.publish(new, frame, temporary)
        try:
            fs.rename(new, path)
        finally:
            fs.discard(new)
        fs.sync_directory(path.parent)

    def _is_file(self, object_id: ObjectId) -> bool:
        try:
            return stat.S_ISREG(os.lstat(self._file(object_id)).st_mode)
        except OSError:
            return False

    def _file(self, object_id: ObjectId) -> Path:
        return self.path / "objects" / object_id[:2] / object_id


def _open(path: str, flags: int) -> int:
    # a link could lead to a terminal, and a pipe has no end: a load must wait for neither
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
