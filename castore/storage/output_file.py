"""Files that a user asks for, outside of ``.castore/``: each appears complete under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from castore.errors import RefusedPath, StorageError
from castore.format.ids import Buffer
from castore.storage import fs, safe_paths

_DEFAULT_MODE = 0o666  # less what the umask takes away: the kernel applies it, as to a file of any other program


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
        self._descriptor, self._temporary = fs.create_temporary(
            target.parent, _DEFAULT_MODE if mode is None else stat.S_IRUSR | stat.S_IWUSR
        )
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

    def finish(self, *, replace: bool, durable: bool) -> None:
        """Give the file its name. Raise RefusedPath if something of that name appeared and ``replace`` is not set."""
        try:
            with fs.closing(self._descriptor, self._temporary):
                if durable:
                    fs.sync(self._descriptor, self._temporary)
            if replace:
                fs.rename(self._temporary, self._target)
            elif not fs.link(self._temporary, self._target):
                raise RefusedPath(str(self._target), "it appeared in the meantime: --force replaces it")
        finally:
            fs.discard(self._temporary)

    def discard(self) -> None:
        """Remove the temporary file; nothing appears under the target's name."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        fs.discard(self._temporary)


def write_link(target: Path, text: str, *, replace: bool = False) -> None:
    """Create a symbolic link at ``target`` that says ``text``; with ``replace`` it replaces a file or link there."""
    if not replace:
        fs.symlink(text, target)
        return
    descriptor, temporary = fs.create_temporary(target.parent)
    fs.close(descriptor, temporary)
    fs.unlink(temporary)
    fs.symlink(text, temporary)
    fs.rename(temporary, target)
