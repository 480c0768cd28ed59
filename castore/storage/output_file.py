"""Files that a user asks for, outside of ``.castore/``: each appears complete under its name, or not at all."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from castore.errors import RefusedPath, StorageError
from castore.format.ids import Buffer
from castore.storage import fs, safe_paths

_DEFAULT_MODE = 0o666  # less what the umask takes away: the kernel applies it, as to a file of any other program
_LEFTOVER = re.compile(r"castore-tmp-([0-9a-f]{8})-(\d{1,9})-[0-9a-f]+-\d+")
_FORGOTTEN_SECONDS = 86400.0


def check_target(target: Path, *, replace: bool = False) -> None:
    """Raise RefusedPath unless an output file may be written to ``target``.

    Its folder must exist, no link may be followed, and it may not lie inside .git or .castore. Nothing may be there
    already or, with ``replace``, a regular file.
    """
    safe_paths.check_target(target)
    status = safe_paths.status(target)
    if safe_paths.is_folder(status) or not target.name:
        raise RefusedPath(str(target), "it is a folder")
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise RefusedPath(str(target), "it is not a regular file")
    if status is not None and not replace:
        raise RefusedPath(str(target), "it exists: --force replaces it")
    if not safe_paths.is_folder(safe_paths.status(Path(os.path.realpath(target.parent)))):
        raise RefusedPath(str(target), "the folder isn't there")


def write(target: Path, data: Buffer, *, replace: bool = False, durable: bool = True) -> None:
    """Write ``data`` to the file ``target``. Raise RefusedPath as :func:`check_target` does, or StorageError."""
    with _creating(target, replace, durable) as output:
        output.write([data])


def write_with(fill: Callable[[Path], None], target: Path, *, replace: bool = False, durable: bool = True) -> int:
    """Let ``fill`` write a file, such as by a library that takes a path, and return its size in bytes.

    ``fill`` is given the path of an empty temporary file beside ``target``, which it may write to or replace. Raise
    RefusedPath as :func:`check_target` does, StorageError, and whatever ``fill`` raises.
    """
    with _creating(target, replace, durable) as output:
        return output.fill(fill)


@contextlib.contextmanager
def _creating(target: Path, replace: bool, durable: bool) -> Iterator[OutputFile]:
    """Check the target, and give the file its name once the block has written it."""
    check_target(target, replace=replace)
    with contextlib.suppress(StorageError):  # a folder that may be written to and not be read
        remove_leftovers(target.parent)
    output = OutputFile(target)
    try:
        yield output
    except BaseException:
        output.discard()
        raise
    output.finish(replace=replace, durable=durable)
    if durable:
        fs.sync_directory(target.parent)


class OutputFile:
    """A file in the making: a temporary file beside ``target``, until :meth:`finish` gives it that name.

    The caller has checked ``target``, ends with :meth:`finish` or :meth:`discard`, and syncs the folder afterwards.
    ``mode`` is the file's permissions, which are set before there is anything to read; by default the umask decides.
    """

    def __init__(self, target: Path, mode: int | None = None) -> None:
        self._target = target
        # nobody else may read it before it has the permissions asked for
        first_mode = _DEFAULT_MODE if mode is None else stat.S_IRUSR | stat.S_IWUSR
        self._descriptor, self._temporary = _create_temporary(target.parent, first_mode)
        if mode is not None:
            try:
                fs.set_mode(self._temporary, mode, self._descriptor)
            except BaseException:
                self.discard()
                raise

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append ``buffers`` to the file."""
        fs.write(self._descriptor, self._temporary, buffers)

    def fill(self, fill: Callable[[Path], None]) -> int:
        """Let ``fill`` write to the temporary file's path, or replace the file, and return its size in bytes."""
        mode = stat.S_IMODE(os.fstat(self._descriptor).st_mode)
        fill(self._temporary)
        # the library may have renamed a file of its own over this one
        try:
            descriptor = os.open(self._temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError("open", str(self._temporary), error) from error
        os.close(self._descriptor)
        self._descriptor = descriptor
        # safetensors makes its file readable to its owner alone
        fs.set_mode(self._temporary, mode, descriptor)
        return os.fstat(descriptor).st_size

    def finish(self, *, replace: bool, durable: bool, seen: os.stat_result | None = None) -> None:
        """Give the file its name. Raise RefusedPath if something of that name appeared and ``replace`` is not set.

        With ``seen``, what is replaced must still be that: see :func:`check_unchanged`.
        """
        try:
            with fs.closing(self._descriptor, self._temporary):
                if durable:
                    fs.sync(self._descriptor, self._temporary)
            if replace:
                check_unchanged(self._target, seen)
                fs.rename(self._temporary, self._target)
            elif not fs.link(self._temporary, self._target):
                raise RefusedPath(str(self._target), "it appeared in the meantime: --force replaces it")
        finally:
            _discard(self._temporary)

    def discard(self) -> None:
        """Remove the temporary file; nothing appears under the target's name."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        _discard(self._temporary)


def write_link(target: Path, text: str, *, replace: bool = False, seen: os.stat_result | None = None) -> None:
    """Create a symbolic link at ``target`` that says ``text``; with ``replace`` it replaces a file or link there.

    With ``seen``, what is replaced must still be that: see :func:`check_unchanged`.
    """
    if not replace:
        fs.symlink(text, target)
        return
    descriptor, temporary = _create_temporary(target.parent, stat.S_IRUSR)
    fs.close(descriptor, temporary)
    fs.unlink(temporary)
    try:
        fs.symlink(text, temporary)
        check_unchanged(target, seen)
        fs.rename(temporary, target)
    finally:
        _discard(temporary)


def check_unchanged(path: Path, seen: os.stat_result | None) -> None:
    """Raise RefusedPath if a file or link is not the one that was ``seen`` there, as far as its status tells.

    That is no lock, but it notices an edit while gigabytes are read for another file. One that is gone is no error, as
    then nothing is lost; without ``seen`` there is nothing to compare.
    """
    status = safe_paths.status(path)
    if status is None or seen is None:
        return
    is_same = (status.st_ino, status.st_size, status.st_mtime_ns) == (seen.st_ino, seen.st_size, seen.st_mtime_ns)
    # an edit may set the time of modification back, but not this one; of a file with two names, replacing one sets it
    if not is_same or (seen.st_nlink == 1 and status.st_ctime_ns != seen.st_ctime_ns):
        raise RefusedPath(str(path), "it changed meanwhile: run the checkout again")


def is_same_file(folder: Path, first: str, second: str) -> bool:
    """Whether the file system of ``folder`` takes two names for one: it is asked, with an empty file."""
    scratch = folder / f"castore-tmp-{_machine()}-{os.getpid()}-0-0"
    fs.make_directory(scratch, stat.S_IRWXU)
    try:
        descriptor, temporary = fs.create_temporary(scratch, stat.S_IRUSR)
        fs.close(descriptor, temporary)
        fs.rename(temporary, scratch / first)
        is_same = safe_paths.status(scratch / second) is not None
        fs.unlink(scratch / first)
        return is_same
    finally:
        fs.remove_directory(scratch)


_unfinished: set[str] = set()
"""The names of the temporary files that this process is writing."""


def _create_temporary(folder: Path, mode: int) -> tuple[int, Path]:
    descriptor, path = fs.create_temporary(folder, mode, f"castore-tmp-{_machine()}-")
    _unfinished.add(path.name)
    return descriptor, path


def _discard(path: Path) -> None:
    fs.discard(path)
    _unfinished.discard(path.name)


@contextlib.contextmanager
def marking(folders: Iterable[Path]) -> Iterator[None]:
    """Have a temporary file in each of ``folders`` while the block runs: if it is killed, they have leftovers."""
    marks: list[Path] = []
    try:
        for folder in folders:
            descriptor, path = _create_temporary(folder, stat.S_IRUSR)
            marks.append(path)
            fs.close(descriptor, path)
        yield
    finally:
        for path in marks:
            _discard(path)


def is_leftover(name: str) -> bool:
    """Whether ``name`` is that of a temporary file, of a process at work or of one that was killed."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: Path) -> bool:
    """Remove the temporary files that killed processes left in ``folder``, and return whether there were any.

    Those of processes at work stay. Of a process of another machine that can't be known: what it made stays for a day.
    """
    found = False
    for entry in fs.scan(folder):
        if (match := _LEFTOVER.fullmatch(entry.name)) and not _is_in_use(Path(entry.path), match[1], int(match[2])):
            found = True
            if entry.is_dir(follow_symlinks=False):
                for file in fs.scan(entry.path):  # the one empty file of is_same_file()
                    fs.discard(Path(file.path))
                fs.remove_directory(Path(entry.path))
            else:
                fs.discard(Path(entry.path))
    return found


def _is_in_use(path: Path, machine: str, pid: int) -> bool:
    """Whether the process that created a temporary file may still be writing it."""
    if machine != _machine():
        status = safe_paths.status(path)
        return status is not None and time.time() - status.st_mtime < _FORGOTTEN_SECONDS
    if pid == os.getpid():  # in a new container every process may have the number that the killed one had
        return path.name in _unfinished
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@functools.cache
def _machine() -> str:
    """Return eight characters that differ where a process has a number of its own: by machine and by container."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{zlib.crc32(f'{os.uname().nodename} {namespace}'.encode()):08x}"
