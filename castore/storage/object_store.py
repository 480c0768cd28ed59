"""LocalStore: objects in a folder, each verified whenever it is read."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from castore.errors import CorruptObject, ObjectMissing, StorageError, UnsupportedVersion
from castore.format.frame import MAX_STORED, decode_frame, encode_frame, plain_length
from castore.format.ids import Buffer, ObjectId, hash_bytes, is_object_id
from castore.storage import fs

# fsync waits for the disk, not for the processor: two threads that compute and eight that finish saved fastest on two
# cores; four or sixteen were slower. The cap on files in flight bounds descriptors, not memory: what is waiting to be
# synced has been written and its buffer freed.
_FINISHERS = 8
_IN_FLIGHT = 64

Stamp = tuple[int, int, int]
"""What identifies a file's content without reading it: inode, size, time of modification in ns."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object's file: its size in bytes, and when it was written, in seconds since 1970."""

    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Written:
    """What a save added: objects that were not there before, and their stored bytes."""

    objects: int
    bytes: int


class ObjectStore:
    """Objects at ``root/objects/ab/<id>``. Safe for any number of threads and processes at once.

    Readers and writers hold the repository's shared lock. A damaged object is moved to ``root/quarantine/``; what is
    discarded passes through ``root/trash/``, from where whoever wants it takes it back.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self.objects = root / "objects"
        self._folder = str(self.objects)
        self.temporary = root / "tmp"
        self.quarantine = root / "quarantine"
        self.trash = root / "trash"
        self.durable = durable
        # objects whose content and name this process has seen reach the disk
        self._settled: dict[ObjectId, Stamp] = {}
        self._scratch = fs.Scratch()

    def path(self, wanted: ObjectId) -> Path:
        return self.objects / wanted[:2] / wanted

    def stored_size(self, wanted: ObjectId) -> int | None:
        """Bytes of the object's file; None when it isn't here."""
        stamp = self._stamp(wanted)
        return stamp[1] if stamp else None

    def has(self, wanted: ObjectId) -> bool:
        return self._stamp(wanted) is not None

    def read(self, wanted: ObjectId, *, mend: bool = True) -> bytes:
        """The object's plain bytes, verified. ObjectMissing, CorruptObject (and then it is moved to quarantine).

        Without ``mend`` nothing is moved, not even back from the trash: this is for looking.
        """
        with self._frame(wanted, mend) as frame:
            out = bytearray(plain_length(wanted, frame))
            decode_frame(wanted, frame, memoryview(out))
        return bytes(out)

    def stored(self) -> dict[ObjectId, Stored]:
        """Every object that is here. Files of other names are passed over, and what is no regular file."""
        found = {}
        for folder in _scan(self.objects) if self.objects.is_dir() else ():
            for file in _scan(folder.path) if folder.is_dir(follow_symlinks=False) else ():
                is_own = is_object_id(file.name) and folder.name == file.name[:2]
                if is_own and file.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):  # moved away since it was listed
                        status = file.stat(follow_symlinks=False)
                        found[ObjectId(file.name)] = Stored(status.st_size, status.st_mtime)
        return found

    def strays(self) -> list[Path]:
        """What lies among the objects and is none: of another name, in another's folder, or not a regular file."""
        found = []
        for folder in _scan(self.objects) if self.objects.is_dir() else ():
            if not folder.is_dir(follow_symlinks=False) or len(folder.name) != 2:
                found.append(Path(folder.path))
                continue
            found += [
                Path(file.path)
                for file in _scan(folder.path)
                if not (is_object_id(file.name) and file.name.startswith(folder.name))
                or not file.is_file(follow_symlinks=False)
            ]
        return sorted(found)

    def check(self, wanted: ObjectId, scratch: bytearray) -> int:
        """Read and verify an object where it lies; nothing is moved. Returns its plain length.

        ``scratch`` is used, and grown, instead of new memory. ObjectMissing, CorruptObject.
        """
        with self._frame(wanted, mend=False) as frame:
            length = plain_length(wanted, frame)
            if len(scratch) < length:
                scratch.extend(bytes(length - len(scratch)))
            with memoryview(scratch) as whole, whole[:length] as out:
                decode_frame(wanted, frame, out)
        return length

    def adopt(self, own: ObjectId, frame: bytes, out: memoryview) -> None:
        """Store a frame that comes from elsewhere, once it has been verified by decoding it into ``out``.

        CorruptObject or UnsupportedVersion when it isn't what the id names; then nothing was stored. The data is
        synced, the name isn't: one that a power cut takes is fetched again, and a save that finds the object syncs it.
        """
        decode_frame(own, memoryview(frame), out)
        path = self.path(own)
        fs.make_directory(path.parent)
        descriptor, temp = fs.create_temporary(self.temporary)
        try:
            try:
                fs.write(descriptor, temp, [frame])
                if self.durable:
                    fs.sync(descriptor, temp)
            finally:
                fs.close(descriptor, temp)
            fs.rename(temp, path)
        except BaseException:
            fs.unlink(temp)
            raise

    def discard(self, unwanted: Iterable[ObjectId]) -> None:
        """Move objects to the trash, in order. The caller holds the exclusive lock."""
        fs.make_directory(self.trash)
        _refuse_link(self.trash)
        for own in unwanted:
            fs.rename(self.path(own), self.trash / own)
            self._settled.pop(own, None)

    def empty_trash(self) -> None:
        """Delete what is in the trash for good; needs no lock, as taking something back is one rename."""
        for path in self._in_trash():
            fs.unlink(path)

    def restore_trash(self) -> None:
        """Take everything back from the trash. The caller holds the exclusive lock."""
        for path in self._in_trash():
            if is_object_id(path.name) and not self.has(ObjectId(path.name)):
                self._take_back(ObjectId(path.name))

    def _in_trash(self) -> list[Path]:
        """Files alone: what else lies there came from somebody else."""
        if not self.trash.is_dir():
            return []
        _refuse_link(self.trash)
        with os.scandir(self.trash) as files:
            return [Path(file.path) for file in files if not file.is_dir(follow_symlinks=False)]

    def quarantined(self) -> frozenset[ObjectId]:
        """The objects of which a damaged copy was moved away."""
        names = (file.name.partition("-")[0] for file in _scan(self.quarantine)) if self.quarantine.is_dir() else ()
        return frozenset(ObjectId(name) for name in names if is_object_id(name))

    def remove_leftovers(self, older_than: float) -> None:
        """Delete what killed processes left in tmp/: files last written before ``older_than``, in seconds since 1970.

        The caller holds the exclusive lock, so no save is under way; what is younger may be of who needs no lock.
        """
        _refuse_link(self.temporary)
        for name in os.listdir(self.temporary) if self.temporary.is_dir() else ():
            path = self.temporary / name
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(path).st_mtime < older_than and not path.is_dir():
                    fs.unlink(path)

    def _take_back(self, wanted: ObjectId) -> bool:
        """Whether the object was in the trash and is here again."""
        if not (self.trash / wanted).exists():
            return False
        fs.make_directory(self.path(wanted).parent)
        try:
            fs.rename(self.trash / wanted, self.path(wanted))
        except StorageError as error:
            if error.errno == errno.ENOENT:  # emptied a moment ago
                return False
            raise
        return True

    def read_into(self, wanted: ObjectId, out: memoryview) -> None:
        """Like :meth:`read`, straight into ``out``, which must be exactly as long as the object."""
        with self._frame(wanted) as frame:
            decode_frame(wanted, frame, out)

    def writer(self) -> Writer:
        """A context in which objects are put; they are durable once its :meth:`Writer.commit` has returned."""
        return Writer(self)

    @contextlib.contextmanager
    def _frame(self, wanted: ObjectId, mend: bool = True) -> Iterator[memoryview]:
        """The object's file. What the block finds to be damaged is moved to quarantine."""
        stamp = self._stamp(wanted)
        if stamp is None and mend and self._take_back(wanted):
            stamp = self._stamp(wanted)
        if stamp is None:
            raise ObjectMissing(wanted)
        try:
            if stamp[1] > MAX_STORED:
                raise CorruptObject(wanted, f"its file has {stamp[1]} bytes, over the limit")
            yield fs.read_into(self.path(wanted), MAX_STORED, self._scratch.take)
        except FileNotFoundError:
            raise ObjectMissing(wanted) from None
        except CorruptObject:
            if mend:
                self._move_to_quarantine(wanted, stamp)
            raise

    def set_aside(self, wanted: ObjectId) -> None:
        """Move what stands in an object's place and is no regular file, if anything is, to quarantine."""
        path = self.path(wanted)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                fs.make_directory(self.quarantine)
                fs.rename(path, self.quarantine / f"{wanted}-{time.time_ns():x}")

    def _stamp(self, wanted: ObjectId) -> Stamp | None:
        return _stamp(f"{self._folder}/{wanted[:2]}/{wanted}")

    def _move_to_quarantine(self, wanted: ObjectId, stamp: Stamp | None) -> None:
        # only the file that was read: a writer may have put a good one in its place since
        if stamp is None or self._stamp(wanted) != stamp:
            return
        # what is wrong with the object matters more than whether it could be moved (a read-only store, say)
        with contextlib.suppress(StorageError):
            fs.make_directory(self.quarantine)
            moved = self.quarantine / f"{wanted}-{time.time_ns():x}"
            fs.rename(self.path(wanted), moved)
            if _stamp(moved) != stamp:  # the good one came between the look and the move
                fs.rename(moved, self.path(wanted))


def _refuse_link(folder: Path) -> None:
    # one that came with a branch could lead to files that are not castore's to delete
    if folder.is_symlink():
        raise StorageError("delete in", str(folder), OSError(errno.ELOOP, "it is a symbolic link: remove that"))


def _scan(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except OSError as error:
        raise StorageError("read", str(folder), error) from error


def _stamp(path: Path | str) -> Stamp | None:
    """None when there is no regular file: a pipe, a folder or a link under an object's name is no object."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    return (found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


class Writer:
    """The objects of one save. :meth:`put` may be called from several threads.

    Left without :meth:`commit`, it waits for what is in flight and removes its temporary files; objects already in
    place stay, as they are whole and may be referenced by others.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(_IN_FLIGHT)
        self._finishers = ThreadPoolExecutor(_FINISHERS, thread_name_prefix="castore-finish")
        self._claimed: set[ObjectId] = set()
        self._unfinished: list[Future[None]] = []
        # the folder above too: a fresh clone has no objects/, and whoever made it may not have lived to sync it
        self._directories: set[Path] = {store.objects.parent, store.objects}
        self._error: BaseException | None = None
        self._new_objects = 0
        self._new_bytes = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fail(error)
        self._finishers.shutdown(wait=True)

    def put(self, plain: Buffer, itemsize: int = 1) -> ObjectId:
        """Store ``plain`` unless a good copy is there already; ``itemsize`` as in :func:`castore.objects.encode`.

        ``plain`` may be reused once this returns. The object is durable only after :meth:`commit`.
        """
        own = hash_bytes(plain)
        with self._lock:
            if own in self._claimed:
                return own
            self._claimed.add(own)
        if not self._is_settled(own, len(plain)):
            self._write(own, encode_frame(plain, itemsize))
        return own

    def commit(self) -> Written:
        """Wait until every object is durable under its name; what failed first is raised."""
        for future in self._unfinished:
            future.result()
        if self._store.durable:
            list(self._finishers.map(fs.sync_directory, sorted(self._directories)))
        for own in self._claimed:
            stamp = self._store._stamp(own)
            if stamp is not None:
                self._store._settled[own] = stamp
        return Written(self._new_objects, self._new_bytes)

    def _is_settled(self, own: ObjectId, length: int) -> bool:
        """Whether a good copy is there. A hit is worth no less than a write: verified once, its directory synced."""
        stamp = self._store._stamp(own)
        if stamp is None and not self._store._take_back(own):
            return False
        if stamp and self._store._settled.get(own) == stamp:
            return True
        try:
            self._store.read_into(own, memoryview(bytearray(length)))
        except (CorruptObject, ObjectMissing, UnsupportedVersion, StorageError):
            return False
        # another process may have renamed it a moment ago and not have synced the directory yet
        with self._lock:
            self._directories.add(self._store.path(own).parent)
        return True

    def _write(self, own: ObjectId, frame: list[Buffer]) -> None:
        self._raise_if_failed()
        path = self._store.path(own)
        fs.make_directory(path.parent)
        self._slots.acquire()
        try:
            descriptor, temp = fs.create_temporary(self._store.temporary)
        except BaseException:
            self._slots.release()
            raise
        try:
            size = fs.write(descriptor, temp, frame)
        except BaseException:
            self._slots.release()
            with contextlib.suppress(StorageError):
                fs.close(descriptor, temp)
            fs.unlink(temp)
            raise
        with self._lock:
            self._new_objects += 1
            self._new_bytes += size
            self._directories.add(path.parent)
            self._unfinished.append(self._finishers.submit(self._finish, descriptor, temp, path))

    def _finish(self, descriptor: int, temp: Path, path: Path) -> None:
        try:
            try:
                self._raise_if_failed()
                if self._store.durable:
                    fs.sync(descriptor, temp)
            finally:
                self._slots.release()
                fs.close(descriptor, temp)
            # only now: a torn file under a valid id would be deduplicated against for ever
            fs.rename(temp, path)
        except BaseException as error:
            self._fail(error)
            fs.unlink(temp)
            raise

    def _fail(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = self._error or error

    def _raise_if_failed(self) -> None:
        # the first error ends the save: what comes after it is reported as that error, not as a consequence of it
        if self._error is not None:
            raise self._error
