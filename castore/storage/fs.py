"""The one write path: no other module writes, syncs, renames, links, unlinks or locks a file.

Durability rules, on which everything above relies:

* a file's data is synced *before* the file gets the name that others look for;
* a name is durable only once its directory is synced;
* a failed sync is never retried on the same file: the kernel has marked the pages clean, so a second sync would
  report a success that means nothing. The file is abandoned and the error raised.

Failures of the operating system are raised as :class:`StorageError`, never as OSError. There is one exception: reading
a missing file raises FileNotFoundError, which callers turn into an error that says what is missing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from castore.errors import Locked, StorageError
from castore.format.ids import Buffer

_POLL_SECONDS = 0.05
_WRITEV_BUFFERS = 512  # below IOV_MAX (1024) everywhere
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux alone
_REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
BLOCK = 4096
"""Direct writes begin and end at multiples of this: no disk has larger blocks."""

_serial = itertools.count()


@contextlib.contextmanager
def _reporting(action: str, path: Path) -> Iterator[None]:
    """Raise an OSError of the block as a StorageError that says what failed, and where."""
    try:
        yield
    except OSError as error:
        raise StorageError(action, str(path), error) from error


# -- files -----------------------------------------------------------------------------------------------------------


def create_temporary(
    directory: Path, mode: int | None = None, prefix: str = "", *, direct: bool = False
) -> tuple[int, Path]:
    """A new, empty file with a name no other process or thread uses, opened for writing. The caller closes it.

    ``mode`` is its permissions, less what the umask takes away; by default those of a file in the store. With
    ``direct`` it is written by :func:`write_direct`.
    """
    path = directory / f"{prefix}{os.getpid()}-{time.time_ns():x}-{next(_serial)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (_O_DIRECT if direct else 0)
    with _reporting("create", path):
        try:
            descriptor = os.open(path, flags, _FILE_MODE if mode is None else mode)
        except FileNotFoundError:  # git doesn't keep the folder in a clone
            make_directory(directory)
            descriptor = os.open(path, flags, _FILE_MODE if mode is None else mode)
        if mode is None and _is_shared(directory):
            os.chmod(descriptor, _SHARED_FILE_MODE)
        return descriptor, path


def write(descriptor: int, path: Path, buffers: Sequence[Buffer]) -> int:
    """Write all of ``buffers`` one after another, without joining them; return the number of bytes."""
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


def write_direct(descriptor: int, path: Path, buffer: memoryview, size: int) -> int:
    """Write the first ``size`` bytes of a page-aligned ``buffer``, past the page cache; return ``size``.

    The kernel takes whole blocks, so up to a block of what follows in the buffer is written too, and cut off again. If
    the file system refuses after all, or stops within a block, what remains is written as :func:`write` does.
    """
    padded = -(-size // BLOCK) * BLOCK
    done = 0
    with _reporting("write", path):
        while done < padded and done % BLOCK == 0:
            try:
                done += os.write(descriptor, buffer[done:padded])
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                break
        if done < padded:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_O_DIRECT)
            while done < size:
                done += os.write(descriptor, buffer[done:size])
        if done > size:
            os.ftruncate(descriptor, size)
    return size


def can_write_direct(directory: Path) -> bool:
    """Whether :func:`write_direct` works on files in a directory. Tried by writing one."""
    if not _O_DIRECT:
        return False
    path = None
    try:
        descriptor, path = create_temporary(directory, direct=True)
        try:
            with mmap.mmap(-1, BLOCK) as block:
                return os.write(descriptor, block) == BLOCK
        finally:
            os.close(descriptor)
    except (OSError, StorageError):  # whatever it is, the write that follows tells
        return False
    finally:
        if path is not None:
            discard(path)


def sync(descriptor: int, path: Path) -> None:
    """Make the data of a file durable. After an error the file must be abandoned, see the module's rules."""
    with _reporting("sync", path):
        _sync_data(descriptor)


def close(descriptor: int, path: Path) -> None:
    """Close a descriptor. Some network file systems report only now that they could not write."""
    with _reporting("close", path):
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: files created, renamed or removed in it."""
    with _reporting("sync", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file its final name, atomically; a file that had this name is replaced."""
    with _reporting("rename to", target):
        os.replace(source, target)


def link(source: Path, target: Path) -> bool:
    """Give a file a second name, atomically; return False if something has that name already."""
    with _reporting("create", target):
        try:
            os.link(source, target)
        except FileExistsError:
            return False
        return True


def symlink(target: str, path: Path) -> None:
    """Create a symbolic link at ``path`` that leads to ``target``."""
    with _reporting("create", path):
        os.symlink(target, path)


def set_mode(path: Path, mode: int, descriptor: int | None = None) -> None:
    """Set the permissions of a file or folder; through ``descriptor`` if it is open."""
    with _reporting("set permissions of", path):
        os.chmod(path if descriptor is None else descriptor, mode)


def unlink(path: Path) -> bool:
    """Remove a file; return False if it is gone already, which is no error."""
    with _reporting("remove", path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return False
        return True


def discard(path: Path) -> None:
    """Remove a temporary file if that is possible. Whatever led here matters more than an error of the removal."""
    with contextlib.suppress(StorageError):
        unlink(path)


@contextlib.contextmanager
def closing(descriptor: int, path: Path) -> Iterator[None]:
    """Close a file after the block. An error of closing it is raised unless the block has failed already."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(StorageError):
            close(descriptor, path)
        raise
    close(descriptor, path)


def remove_directory(path: Path) -> None:
    """Remove a folder if it is empty; leave it alone, without an error, if it is not or is gone."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def make_directory(path: Path, mode: int | None = None) -> bool:
    """Create a directory and its parents; return whether ``path`` is new. Not durable until its parent is synced.

    ``mode`` is its permissions, less what the umask takes away; by default those of a folder in the store.
    """
    with _reporting("create directory", path):
        try:
            try:
                os.mkdir(path, _FOLDER_MODE if mode is None else mode)
            except FileNotFoundError:
                make_directory(path.parent, mode)
                os.mkdir(path, _FOLDER_MODE if mode is None else mode)  # not in a loop: a dangling link fails for ever
        except FileExistsError:
            return False
        if mode is None and _is_shared(path.parent):
            os.chmod(path, _SHARED_FOLDER_MODE)
        return True


# -- a store that a group shares -------------------------------------------------------------------------------------

_FILE_MODE, _SHARED_FILE_MODE = 0o644, 0o664
_FOLDER_MODE, _SHARED_FOLDER_MODE = 0o777, 0o2775
_SHARED = stat.S_ISGID | stat.S_IWGRP


def _is_shared(folder: Path) -> bool:
    """Whether what is created in ``folder`` is for its group to change, too, whatever the umask: it says so itself."""
    return os.stat(folder).st_mode & _SHARED == _SHARED


def share_with_group(folder: Path) -> None:
    """Let the group of ``folder`` change what is in it, now and later; what other users own is left to them.

    The folder itself comes last, so that one that is shared is shared whole.
    """
    with _reporting("share with its group", folder):
        if _is_shared(folder):
            return
        for parent, folders, files in os.walk(folder, topdown=False):
            for name, mode in [*((name, 0o060) for name in files), *((name, 0o2070) for name in folders)]:
                path = os.path.join(parent, name)
                status = os.lstat(path)
                if status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode):
                    os.chmod(path, stat.S_IMODE(status.st_mode) | mode)
        if os.stat(folder).st_uid == os.geteuid():
            os.chmod(folder, stat.S_IMODE(os.stat(folder).st_mode) | 0o2070)


def publish(path: Path, data: bytes, temporary_folder: Path, *, durable: bool = True, replace: bool = False) -> bool:
    """Create ``path`` with ``data``, durably and never partially visible; return False if it exists already.

    The link is the commit point, or with ``replace`` the renaming: the file is complete and on the disk before anything
    can see it. The temporary file in ``temporary_folder``, which must be on the same file system, is gone afterwards.
    """
    descriptor, temporary = create_temporary(temporary_folder)
    try:
        with closing(descriptor, temporary):
            write(descriptor, temporary, [data])
            if durable and data:  # an empty file is its name
                sync(descriptor, temporary)
        is_written = True
        if replace:
            rename(temporary, path)
        else:
            is_written = link(temporary, path)
        if durable:
            sync_directory(path.parent)
        return is_written
    finally:
        discard(temporary)


def read(path: Path | str, limit: int) -> bytes:
    """Return the whole content of a file. FileNotFoundError; StorageError if it has more than ``limit`` bytes."""
    return bytes(read_into(path, limit, lambda size: memoryview(bytearray(size))))


def read_into(path: Path | str, limit: int, allocate: Callable[[int], memoryview]) -> memoryview:
    """Read the whole file into the buffer that ``allocate`` returns for its size. Errors are those of :func:`read`."""
    try:
        # non-blocking: reading a pipe that stands under an object's name would wait for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):  # a pipe or a device holds nothing that was stored
                raise OSError(errno.EINVAL, "it is not a regular file")
            size = status.st_size
            if size > limit:
                raise OSError(errno.EFBIG, f"{size} bytes, where at most {limit} make sense")
            view = allocate(size)
            done = 0
            # some file systems return less than was asked for, which would look like damage
            while done < size and (count := os.readv(descriptor, [view[done:]])):
                done += count
            return view[:done]
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError("read", str(path), error) from error


def will_need(path: Path | str) -> None:
    """Ask the kernel to begin reading a file that will be read soon; nothing happens if there is none."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file. StorageError if it can't be read or is shorter."""
    with _reporting("read", path), open(path, "rb", buffering=0) as file:
        file.seek(start)
        data = b""
        while len(data) < stop - start and (piece := file.read(stop - start - len(data))):
            data += piece
        if len(data) < stop - start:
            raise OSError(errno.EIO, f"it ends before byte {stop}")
        return data


Stamp = tuple[int, int, int]
"""Identifies a file's content without reading it: inode, size in bytes, time of modification in ns."""


def stamp(path: Path | str) -> Stamp | None:
    """Return the stamp of a regular file; None when there is none, or a pipe, a folder or a link in its place."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    return (status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def scan(folder: Path | str) -> list[os.DirEntry[str]]:
    """Return what is in a folder, in no order; nothing if the folder does not exist."""
    try:
        with os.scandir(folder) as items:
            return list(items)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError("read", str(folder), error) from error


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
    """Hold a shared or exclusive advisory lock on the file ``path`` while the block runs.

    Each call opens its own descriptor: two threads must not share a lock, and converting one isn't atomic. A process
    that waits for the exclusive lock comes before those that ask for a shared one after it. A thread that has the lock
    already never waits for those who wait for it. A forked child doesn't have the locks of its parent. Locked after
    ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    is_nested = _holds(path)
    with contextlib.ExitStack() as gate:
        if not is_nested:
            # closed while somebody waits for the exclusive lock, whom overlapping shared holders would keep out
            gate.enter_context(_flock(gate_of(path), path, exclusive, deadline, timeout))
        held = _flock(path, path, exclusive, deadline, timeout)
        held.__enter__()
    _count_hold(path, 1)
    try:
        yield
    finally:
        _count_hold(path, -1)
        held.__exit__(None, None, None)


def gate_of(path: Path) -> Path:
    """Return the file beside a lock that decides who may ask for it."""
    return path.with_name(path.name + ".gate")


@contextlib.contextmanager
def _flock(file: Path, path: Path, exclusive: bool, deadline: float, timeout: float) -> Iterator[None]:
    """Hold ``flock`` on ``file``, which serves the lock ``path``. Locked after the ``deadline``."""
    descriptor = _open_lock(file, exclusive)
    if descriptor is None:
        yield
        return
    _lock_descriptors.add(descriptor)
    try:
        while not _try_lock(descriptor, path, exclusive):
            if time.monotonic() >= deadline:
                raise Locked(str(path), timeout)
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        if descriptor in _lock_descriptors:  # else this is a forked child, which closed it
            _lock_descriptors.discard(descriptor)
            os.close(descriptor)


class _Holds(threading.local):
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()


_holds_of_thread = _Holds()


def _holds(path: Path) -> bool:
    return _holds_of_thread.counts[os.path.abspath(path)] > 0


def _count_hold(path: Path, change: int) -> None:
    _holds_of_thread.counts[os.path.abspath(path)] += change


_lock_descriptors: set[int] = set()


def _forget_locks() -> None:
    """Close what a forked child inherited: as long as it is open anywhere, the lock of the parent doesn't end."""
    global _holds_of_thread
    for descriptor in _lock_descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _lock_descriptors.clear()
    _holds_of_thread = _Holds()


os.register_at_fork(after_in_child=_forget_locks)


def _open_lock(path: Path, exclusive: bool) -> int | None:
    """Open the lock file; return None on a read-only file system without one, where nobody can delete anything."""
    with _reporting("open", path):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
            if os.fstat(descriptor).st_uid == os.geteuid() and _is_shared(path.parent):
                os.chmod(descriptor, _SHARED_FILE_MODE)
            return descriptor
        except OSError as error:
            if exclusive or error.errno not in (errno.EROFS, errno.EACCES):
                raise
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None


def _try_lock(descriptor: int, path: Path, exclusive: bool) -> bool:
    """Take the lock if that is possible without waiting; return whether it was."""
    mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    with _reporting("lock", path):
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
