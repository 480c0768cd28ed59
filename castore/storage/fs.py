"""The one module that writes, syncs, renames, links, unlinks and locks.

Durability rules, which everything above relies on:

* a file's data is synced *before* the file gets the name that others look for;
* a name is durable only once its directory is synced;
* a failed sync is never retried on the same file: the kernel has marked the pages clean, so a second sync would
  report a success that means nothing. The file is abandoned and the error raised.

Failures of the operating system are raised as :class:`StorageError`, never as OSError. Reading is the exception:
a missing file is FileNotFoundError, which callers translate into what is missing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from castore.errors import Locked, StorageError
from castore.format.ids import Buffer

_POLL_SECONDS = 0.05
_WRITEV_BUFFERS = 512  # below IOV_MAX (1024) everywhere
_serial = itertools.count()


@contextlib.contextmanager
def _reporting(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(action, str(path), error) from error


# -- files -----------------------------------------------------------------------------------------------------------


def create_temporary(directory: Path, mode: int = 0o644) -> tuple[int, Path]:
    """A new, empty file with a name no other process or thread uses, opened for writing. The caller closes it.

    ``mode`` is its permissions, less what the umask takes away.
    """
    path = directory / f"{os.getpid()}-{time.time_ns():x}-{next(_serial)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with _reporting("create", path):
        try:
            return os.open(path, flags, mode), path
        except FileNotFoundError:  # git doesn't keep the folder in a clone
            os.makedirs(directory, exist_ok=True)
            return os.open(path, flags, mode), path


def write(descriptor: int, path: Path, buffers: Sequence[Buffer]) -> int:
    """Write all of ``buffers`` one after another without joining them; returns the number of bytes."""
    views = [memoryview(buffer) for buffer in buffers if len(buffer)]
    total = sum(len(view) for view in views)
    with _reporting("write", path):
        while views:
            written = os.writev(descriptor, views[:_WRITEV_BUFFERS])
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]
    return total


def sync(descriptor: int, path: Path) -> None:
    """Make the file's data durable. After an error the file must be abandoned."""
    with _reporting("sync", path):
        _sync_data(descriptor)


def close(descriptor: int, path: Path) -> None:
    """Give the descriptor back. Some network file systems report only here that they could not write."""
    with _reporting("close", path):
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    with _reporting("sync", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file its final name, replacing whatever had it, atomically."""
    with _reporting("rename to", target):
        os.replace(source, target)


def link(source: Path, target: Path) -> bool:
    """Give a file a second name, atomically; False when there is something of that name already."""
    with _reporting("create", target):
        try:
            os.link(source, target)
        except FileExistsError:
            return False
        return True


def symlink(text: str, path: Path) -> None:
    """Create a symbolic link that says ``text``."""
    with _reporting("create", path):
        os.symlink(text, path)


def set_mode(path: Path, mode: int, descriptor: int | None = None) -> None:
    """Set the permissions of a file or folder, by its descriptor if it is open."""
    with _reporting("set permissions of", path):
        os.chmod(path if descriptor is None else descriptor, mode)


def unlink(path: Path) -> None:
    """Remove a name; a name already gone is fine."""
    with _reporting("remove", path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_directory(path: Path) -> None:
    """Remove an empty folder; one that is gone or still in use is left as it is."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def make_directory(path: Path) -> bool:
    """Create a directory and its parents; True when ``path`` itself is new. Not durable until the parent is synced."""
    with _reporting("create directory", path):
        try:
            try:
                os.mkdir(path)
            except FileNotFoundError:
                make_directory(path.parent)
                os.mkdir(path)  # once: below a dangling link it would fail for ever
        except FileExistsError:
            return False
        return True


def publish(path: Path, data: bytes, temporary: Path, *, durable: bool = True) -> bool:
    """Create ``path`` with ``data``, durably and never partially visible; False when it exists already.

    The link is the commit point: nothing can see the file before it is complete and on the disk.
    """
    descriptor, temp = create_temporary(temporary)
    try:
        try:
            write(descriptor, temp, [data])
            if durable:
                sync(descriptor, temp)
        finally:
            close(descriptor, temp)
        with _reporting("create", path):
            try:
                os.link(temp, path)
                created = True
            except FileExistsError:
                created = False
        if durable:
            sync_directory(path.parent)
        return created
    finally:
        unlink(temp)


def read(path: Path | str, limit: int) -> bytes:
    """The whole file. FileNotFoundError when there is none; StorageError when larger than ``limit`` bytes."""
    return bytes(read_into(path, limit, lambda size: memoryview(bytearray(size))))


def read_into(path: Path | str, limit: int, memory: Callable[[int], memoryview]) -> memoryview:
    """The whole file, in what ``memory`` gives for its size. Errors as those of :func:`read`."""
    try:
        # not blocking: a pipe under an object's name would be waited for for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise OSError(errno.EFBIG, f"{size} bytes, where at most {limit} make sense")
            view = memory(size)
            done = 0
            # some file systems return less than was asked for, which would look like damage
            while done < size and (more := os.readv(descriptor, [view[done:]])):
                done += more
            return view[:done]
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError("read", str(path), error) from error


class Scratch(threading.local):
    """Memory of each thread's own that is used again: new memory costs as much as what is decoded into it."""

    def __init__(self) -> None:
        self._data = bytearray()

    def take(self, size: int) -> memoryview:
        """``size`` bytes, until this thread takes some the next time. What is in them means nothing."""
        if len(self._data) < size:
            self._data = bytearray(size)
        return memoryview(self._data)[:size]


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file. StorageError when it can't be read or hasn't so many."""
    with _reporting("read", path), open(path, "rb", buffering=0) as file:
        file.seek(start)
        data = b""
        while len(data) < stop - start and (more := file.read(stop - start - len(data))):
            data += more
        if len(data) < stop - start:
            raise OSError(errno.EIO, f"it ends before byte {stop}")
        return data


if sys.platform == "darwin":

    def _sync_data(descriptor: int) -> None:
        # fsync on macOS stops at the drive's cache; F_FULLFSYNC reaches the medium
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)

else:

    def _sync_data(descriptor: int) -> None:
        os.fdatasync(descriptor)


# -- the lock --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: Path, *, exclusive: bool, timeout: float) -> Iterator[None]:
    """Hold a shared or exclusive advisory lock on ``path`` for the length of the block.

    Always on a fresh descriptor: converting a lock isn't atomic, and two threads must not share one. Raises Locked
    after ``timeout`` seconds.
    """
    descriptor = _open_lock(path, exclusive)
    if descriptor is None:
        yield
        return
    try:
        deadline = time.monotonic() + timeout
        while not _try_lock(descriptor, path, exclusive):
            if time.monotonic() >= deadline:
                raise Locked(str(path), timeout)
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path, exclusive: bool) -> int | None:
    """A fresh descriptor; None on a read-only file system without a lock file, where nobody can delete anything."""
    with _reporting("open", path):
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if exclusive or error.errno not in (errno.EROFS, errno.EACCES):
                raise
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None


def _try_lock(descriptor: int, path: Path, exclusive: bool) -> bool:
    mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    with _reporting("lock", path):
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
