"""LocalStore: objects in a folder, each verified whenever it is read."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from castore import fs, objects
from castore.errors import CorruptObject, ObjectMissing, StorageError, UnsupportedVersion
from castore.ids import Buffer, ObjectId, object_id

# fsync waits for the disk, not for the processor: two threads that compute and eight that finish saved fastest on two
# cores; four or sixteen were slower. The cap on files in flight bounds descriptors, not memory: what is waiting to be
# synced has been written and its buffer freed.
_FINISHERS = 8
_IN_FLIGHT = 64

Stamp = tuple[int, int, int]
"""What identifies a file's content without reading it: inode, size, time of modification in ns."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a save added: objects that were not there before, and their stored bytes."""

    objects: int
    bytes: int


class LocalStore:
    """Objects at ``root/objects/ab/<id>``. Safe for any number of threads and processes at once.

    Readers and writers hold the repository's shared lock; nothing here deletes, except that a damaged object is moved
    to ``root/quarantine/``.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self.objects = root / "objects"
        self.temporary = root / "tmp"
        self.quarantine = root / "quarantine"
        self.durable = durable
        # objects whose content and name this process has seen reach the disk
        self._settled: dict[ObjectId, Stamp] = {}

    def path(self, wanted: ObjectId) -> Path:
        return self.objects / wanted[:2] / wanted

    def stored_size(self, wanted: ObjectId) -> int | None:
        """Bytes of the object's file; None when it isn't here."""
        stamp = self._stamp(wanted)
        return stamp[1] if stamp else None

    def has(self, wanted: ObjectId) -> bool:
        return self._stamp(wanted) is not None

    def read(self, wanted: ObjectId) -> bytes:
        """The object's plain bytes, verified. ObjectMissing, CorruptObject (and then quarantined)."""
        frame, stamp = self._frame(wanted)
        try:
            out = bytearray(objects.plain_length(wanted, memoryview(frame)))
            objects.decode_into(wanted, memoryview(frame), memoryview(out))
        except CorruptObject:
            self._move_to_quarantine(wanted, stamp)
            raise
        return bytes(out)

    def read_into(self, wanted: ObjectId, out: memoryview) -> None:
        """Like :meth:`read`, straight into ``out``, which must be exactly as long as the object."""
        frame, stamp = self._frame(wanted)
        try:
            objects.decode_into(wanted, memoryview(frame), out)
        except CorruptObject:
            self._move_to_quarantine(wanted, stamp)
            raise

    def writer(self) -> Writer:
        """A context in which objects are put; they are durable once its :meth:`Writer.commit` has returned."""
        return Writer(self)

    def _frame(self, wanted: ObjectId) -> tuple[bytes, Stamp | None]:
        stamp = self._stamp(wanted)
        if stamp is not None and stamp[1] > objects.MAX_STORED:
            self._move_to_quarantine(wanted, stamp)
            raise CorruptObject(wanted, f"its file has {stamp[1]} bytes, over the limit")
        try:
            return fs.read(self.path(wanted), objects.MAX_STORED), stamp
        except FileNotFoundError:
            raise ObjectMissing(wanted) from None

    def _stamp(self, wanted: ObjectId) -> Stamp | None:
        return _stamp(self.path(wanted))

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


def _stamp(path: Path) -> Stamp | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


class Writer:
    """The objects of one save. :meth:`put` may be called from several threads.

    Left without :meth:`commit`, it waits for what is in flight and removes its temporary files; objects already in
    place stay, as they are whole and may be referenced by others.
    """

    def __init__(self, store: LocalStore) -> None:
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
        own = object_id(plain)
        with self._lock:
            if own in self._claimed:
                return own
            self._claimed.add(own)
        if not self._is_settled(own, len(plain)):
            self._write(own, objects.encode(plain, itemsize))
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
        if stamp is None:
            return False
        if self._store._settled.get(own) == stamp:
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
