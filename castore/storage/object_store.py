"""Objects in a local folder, each verified whenever it is read."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from castore.errors import CorruptObject, ObjectMissing, StateChanged, StorageError, UnsupportedVersion
from castore.format import codecs
from castore.format.frame import MAX_STORED, bound, decode_frame, encode_frame_into, plain_length
from castore.format.ids import Buffer, ObjectId, hash_bytes, is_object_id
from castore.parallel import map_all
from castore.storage import fs
from castore.storage.buffers import COPIES, FILES

# Writing and syncing wait for the disk, not for the processor: on two cores, two threads that compute and eight that
# write, sync and rename saved fastest; four or sixteen were slower. The pool of buffers bounds how many files wait.
_FINISHERS = 8

# Bytes from which a file is written past the page cache. There, a page that the kernel has to take anew costs more than
# the disk (docs/performance.md); for few pages that is little, and nothing is gained.
_DIRECT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The file of an object: its size in bytes, and when it was last written, in seconds since 1970."""

    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Written:
    """What a save added to the store: how many objects that were not there before, and their stored bytes."""

    objects: int
    bytes: int


_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextlib.contextmanager
def _unless_full() -> Iterator[list[bool]]:
    """Yield a list that is empty after the block if the disk, or the user's share of it, is full."""
    room = [True]
    try:
        yield room
    except StorageError as error:
        if error.errno not in _DISK_FULL:
            raise
        room.clear()


def _unranked(_object_id: ObjectId) -> int:
    return 0


def _by_rank(object_ids: Iterable[ObjectId], rank: Callable[[ObjectId], int]) -> list[list[ObjectId]]:
    return [list(group) for _, group in itertools.groupby(sorted(object_ids, key=rank), key=rank)]


class ObjectStore:
    """Objects at ``root/objects/ab/<id>``. Safe for any number of threads and processes at once.

    Readers and writers hold the repository's shared lock. A damaged object is moved to ``root/quarantine/``, and a
    discarded one to ``root/trash/``, from where it comes back if it is read or saved before the trash is emptied.
    """

    def __init__(self, root: Path, *, durable: bool = True, direct: bool = True) -> None:
        self.objects = root / "objects"
        self._folder = str(self.objects)
        self.temporary = root / "tmp"
        self.quarantine = root / "quarantine"
        self.trash = root / "trash"
        self.durable = durable
        # the objects whose content and name are known to be on the disk, since this process verified or wrote them
        self._settled: dict[ObjectId, fs.Stamp] = {}
        # objects whose content this process has verified, or written itself
        self._verified: dict[ObjectId, fs.Stamp] = {}
        # folders with objects that were adopted, whose names may not be on the disk yet
        self._unsure: set[Path] = set()
        self._lock = threading.Lock()
        self._scratch = codecs.Scratch()
        self._plain = codecs.Scratch()
        self._direct = None if direct else False  # None until it was tried
        self._trying = threading.Lock()

    def path(self, object_id: ObjectId) -> Path:
        """Return where the object's file is, or would be."""
        return self.objects / object_id[:2] / object_id

    # -- reading -----------------------------------------------------------------------------------------------------

    def has(self, object_id: ObjectId) -> bool:
        """Return whether the object's file is in the store. Its content is not looked at."""
        return self._stamp(object_id) is not None

    def stored_size(self, object_id: ObjectId) -> int | None:
        """Return the size of the object's file in bytes; None if it is not in the store."""
        stamp = self._stamp(object_id)
        return stamp[1] if stamp else None

    def read(self, object_id: ObjectId, *, mend: bool = True) -> bytes:
        """Return the object's plain bytes, verified.

        ObjectMissing; CorruptObject, and then the file has been moved to quarantine. Without ``mend`` nothing in the
        store changes: no file is moved to quarantine, and none back from the trash.
        """
        with self._frame(object_id, mend) as frame:
            out = bytearray(plain_length(object_id, frame))
            decode_frame(object_id, frame, memoryview(out))
        return bytes(out)

    def will_read(self, object_id: ObjectId) -> None:
        """Have the disk begin to read an object's file: two threads that decode don't keep it busy by themselves."""
        fs.will_need(f"{self._folder}/{object_id[:2]}/{object_id}")

    def read_into(self, object_id: ObjectId, out: memoryview) -> None:
        """Read and verify an object straight into ``out``, which must be exactly as long. Errors: :meth:`read`."""
        with self._frame(object_id) as frame:
            decode_frame(object_id, frame, out)

    def check(self, object_id: ObjectId, scratch: bytearray, *, mend: bool = False) -> int:
        """Read and verify an object; return its plain length in bytes.

        The object is decoded into ``scratch``, which grows as needed and can be reused. Nothing in the store changes,
        but that with ``mend`` a damaged object is moved to quarantine. ObjectMissing, CorruptObject.
        """
        with self._frame(object_id, mend) as frame:
            length = plain_length(object_id, frame)
            if len(scratch) < length:
                scratch.extend(bytes(length - len(scratch)))
            with memoryview(scratch) as whole, whole[:length] as out:
                decode_frame(object_id, frame, out)
        return length

    def frame(self, object_id: ObjectId) -> bytes:
        """Return the bytes of the object's file, verified unless this process has done that. Errors: :meth:`read`."""
        is_verified = self.is_verified(object_id)
        with self._frame(object_id) as frame:
            if not is_verified:
                length = plain_length(object_id, frame)
                decode_frame(object_id, frame, self._plain.take(length))
            return bytes(frame)

    def is_verified(self, object_id: ObjectId) -> bool:
        """Whether this process has read or written the very file that the object has now."""
        stamp = self._verified.get(object_id)
        return stamp is not None and stamp == self._stamp(object_id)

    def stored(self) -> dict[ObjectId, StoredObject]:
        """List every object in the store. Whatever else lies among them is left out: see :meth:`strays`."""
        objects = {}
        for folder in fs.scan(self.objects) if self.objects.is_dir() else ():
            for file in fs.scan(folder.path) if folder.is_dir(follow_symlinks=False) else ():
                is_object = is_object_id(file.name) and folder.name == file.name[:2]
                if is_object and file.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):  # moved away since it was listed
                        status = file.stat(follow_symlinks=False)
                        objects[ObjectId(file.name)] = StoredObject(status.st_size, status.st_mtime)
        return objects

    def strays(self) -> list[Path]:
        """List what lies among the objects and is not one: misnamed, in a wrong folder, or not a regular file."""
        strays = []
        for folder in fs.scan(self.objects) if self.objects.is_dir() else ():
            if not folder.is_dir(follow_symlinks=False) or len(folder.name) != 2:
                strays.append(Path(folder.path))
                continue
            strays += [
                Path(file.path)
                for file in fs.scan(folder.path)
                if not (is_object_id(file.name) and file.name.startswith(folder.name))
                or not file.is_file(follow_symlinks=False)
            ]
        return sorted(strays)

    @contextlib.contextmanager
    def _frame(self, object_id: ObjectId, mend: bool = True) -> Iterator[memoryview]:
        """Read the object's file; if the block finds it corrupt, move it to quarantine."""
        stamp = self._stamp(object_id)
        if stamp is None and mend and self._restore_from_trash(object_id):
            stamp = self._stamp(object_id)
        if stamp is None:
            raise ObjectMissing(object_id)
        try:
            if stamp[1] > MAX_STORED:
                raise CorruptObject(object_id, f"its file has {stamp[1]} bytes, over the limit")
            yield fs.read_into(self.path(object_id), MAX_STORED, self._scratch.take)
            self._verified[object_id] = stamp
        except FileNotFoundError:
            raise ObjectMissing(object_id) from None
        except CorruptObject:
            if mend:
                self._move_to_quarantine(object_id, stamp)
            raise

    def _stamp(self, object_id: ObjectId) -> fs.Stamp | None:
        return fs.stamp(f"{self._folder}/{object_id[:2]}/{object_id}")

    # -- adding ------------------------------------------------------------------------------------------------------

    def writer(self) -> Writer:
        """Return a context in which objects are put; they are durable once its :meth:`Writer.commit` has returned."""
        return Writer(self)

    def adopt(self, object_id: ObjectId, frame: bytes, out: memoryview) -> None:
        """Verify a frame that a remote sent by decoding it into ``out``, and store it.

        CorruptObject or UnsupportedVersion if it isn't what the id names; then nothing is stored. The data is synced
        but not the name: if a power cut takes it the object is fetched again, and a save that finds the object syncs
        the directory.
        """
        decode_frame(object_id, memoryview(frame), out)
        buffer = FILES.take(len(frame))
        try:
            codecs.copy(frame, buffer[: len(frame)])
            self._place(object_id, buffer, len(frame))
        finally:
            FILES.give_back(buffer)
        with self._lock:
            self._unsure.add(self.path(object_id).parent)

    def adopt_index(self, index_id: ObjectId, frame: bytes, length: int) -> None:
        """Adopt the index, of ``length`` plain bytes, of a part whose chunks are all here.

        An index without its chunks would be taken for damage, so what was adopted before is made sure first. Errors
        are those of :meth:`adopt`.
        """
        with self._lock:
            folders, self._unsure = self._unsure, set()
        if self.durable and folders:
            above = {self.objects.parent, self.objects}
            map_all(fs.sync_directory, sorted(above | folders), _FINISHERS, name="castore-sync")
        self.adopt(index_id, frame, memoryview(bytearray(length)))

    def _place(self, object_id: ObjectId, buffer: memoryview, size: int) -> None:
        """Write the first ``size`` bytes of a buffer of the pool as an object's file."""
        path = self.path(object_id)
        fs.make_directory(path.parent)
        direct = size >= _DIRECT_BYTES and self._writes_direct()
        descriptor, temp = fs.create_temporary(self.temporary, direct=direct)
        try:
            with fs.closing(descriptor, temp):
                if direct:
                    fs.write_direct(descriptor, temp, buffer, size)
                else:
                    fs.write(descriptor, temp, [buffer[:size]])
                if self.durable:
                    fs.sync(descriptor, temp)
            # only after the sync: a torn file under a valid id would be deduplicated against for ever
            fs.rename(temp, path)
        except BaseException:
            fs.discard(temp)
            raise

    def _writes_direct(self) -> bool:
        with self._trying:
            if self._direct is None:
                self._direct = fs.can_write_direct(self.temporary)
            return self._direct

    # -- removing: trash and quarantine ------------------------------------------------------------------------------

    def discard(self, object_ids: Iterable[ObjectId], rank: Callable[[ObjectId], int] = _unranked) -> None:
        """Move objects to the trash, lower ranks first, also if the power fails. The caller holds the exclusive lock.

        On a disk so full that the trash can't take another name, delete them all, in the same order.
        """
        groups = _by_rank(object_ids, rank)
        for object_id in itertools.chain(*groups):
            self._settled.pop(object_id, None)
        moved: set[ObjectId] = set()
        with _unless_full() as room:
            fs.make_directory(self.trash)
            _refuse_link(self.trash)
            for number, group in enumerate(groups):
                if number and self.durable:
                    fs.sync_directory(self.trash)
                for object_id in group:
                    fs.rename(self.path(object_id), self.trash / object_id)
                    moved.add(object_id)
        if not room:
            places = {object_id: self.trash / object_id for object_id in moved}
            self._delete([[places.get(object_id, self.path(object_id)) for object_id in group] for group in groups])

    def list_trash(self, rank: Callable[[ObjectId], int] = _unranked) -> list[list[Path]]:
        """List the files in the trash by rank, lower ranks first; castore puts no folders there: any are left alone."""
        if not self.trash.is_dir():
            return []
        _refuse_link(self.trash)
        with os.scandir(self.trash) as files:
            names = [ObjectId(file.name) for file in files if not file.is_dir(follow_symlinks=False)]
        return [[self.trash / name for name in group] for group in _by_rank(names, rank)]

    def empty_trash(self, listed: Sequence[Sequence[Path]]) -> None:
        """Delete for good what :meth:`list_trash` found, lower ranks first, also if the power fails.

        Listed under the exclusive lock, but this needs none: either another process restores an object, by one atomic
        rename, or it is deleted here. If an object was restored since it was listed, higher ranks are left to the next
        gc: an index needs its chunks.
        """
        self._delete(listed)

    def _delete(self, groups: Sequence[Sequence[Path]]) -> None:
        """Delete files; that those of a group are gone is sure before those of the next one go.

        After a group of which one was gone already, because it was restored, the next ones stay.
        """
        for number, group in enumerate(groups):
            if number and self.durable:
                for folder in sorted({path.parent for path in groups[number - 1]}):
                    fs.sync_directory(folder)
            was_there = [fs.unlink(path) for path in group]
            if not all(was_there):
                return

    def restore_trash(self, rank: Callable[[ObjectId], int] = _unranked) -> None:
        """Restore every object from the trash, higher ranks first, also if the power fails.

        The caller holds the exclusive lock.
        """
        for group in reversed(self.list_trash(rank)):
            folders = set()
            for path in group:
                if is_object_id(path.name) and not self.has(ObjectId(path.name)):
                    self._restore_from_trash(ObjectId(path.name))
                    folders.add(self.path(ObjectId(path.name)).parent)
            if self.durable and folders:
                for folder in (self.objects, *sorted(folders)):
                    fs.sync_directory(folder)

    def _restore_from_trash(self, object_id: ObjectId) -> bool:
        """Restore the object from trash; return False if it is not there."""
        if not (self.trash / object_id).exists():
            return False
        fs.make_directory(self.path(object_id).parent)
        try:
            fs.rename(self.trash / object_id, self.path(object_id))
        except StorageError as error:
            if error.errno == errno.ENOENT:  # emptied a moment ago
                return False
            raise
        return True

    def quarantined(self) -> frozenset[ObjectId]:
        """Return the ids of the objects of which a damaged copy was moved to quarantine."""
        names = (file.name.partition("-")[0] for file in fs.scan(self.quarantine)) if self.quarantine.is_dir() else ()
        return frozenset(ObjectId(name) for name in names if is_object_id(name))

    def set_aside(self, object_id: ObjectId) -> None:
        """Move to quarantine whatever stands in the object's place and is not a regular file, if anything does."""
        path = self.path(object_id)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                fs.make_directory(self.quarantine)
                fs.rename(path, self._quarantine_path(object_id))

    def _move_to_quarantine(self, object_id: ObjectId, stamp: fs.Stamp | None) -> None:
        # only the file that was read: a writer may have put a good one in its place since
        if stamp is None or self._stamp(object_id) != stamp:
            return
        # what is wrong with the object matters more than whether it could be moved (a read-only store, for example)
        with contextlib.suppress(StorageError):
            fs.make_directory(self.quarantine)
            moved = self._quarantine_path(object_id)
            fs.rename(self.path(object_id), moved)
            if fs.stamp(moved) != stamp:  # a good one replaced it between the look and the move
                fs.rename(moved, self.path(object_id))

    def _quarantine_path(self, object_id: ObjectId) -> Path:
        return self.quarantine / f"{object_id}-{time.time_ns():x}"

    def remove_leftovers(self, older_than: float) -> None:
        """Delete what killed processes left in tmp/: files last written before ``older_than``, in seconds since 1970.

        The caller holds the exclusive lock, so no save is under way; a younger file may belong to a process that needs
        no lock.
        """
        _refuse_link(self.temporary)
        for name in os.listdir(self.temporary) if self.temporary.is_dir() else ():
            path = self.temporary / name
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(path).st_mtime < older_than and not path.is_dir():
                    fs.unlink(path)


def _refuse_link(folder: Path) -> None:
    # a link that came with a branch could lead to files that are not castore's to delete
    if folder.is_symlink():
        raise StorageError("delete in", str(folder), OSError(errno.ELOOP, "it is a symbolic link: remove that"))


class Writer:
    """Adds the objects of one save. :meth:`put` may be called from several threads.

    If the context is left without :meth:`commit`, it waits for the files in flight and removes its temporary files.
    Objects already in place stay: they are complete, and others may refer to them.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._finishers = ThreadPoolExecutor(_FINISHERS, thread_name_prefix="castore-finish")
        self._claimed: set[ObjectId] = set()
        self._unfinished: list[Future[None]] = []
        # the folder above too: a fresh clone has no objects/, and the process that made it may have died before syncing
        self._directories: set[Path] = {store.objects.parent, store.objects}
        self._is_new = True  # a guess about the next object, which costs time alone when it is wrong
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

    def put(self, plain: Buffer, itemsize: int = 1, *, is_shared: bool = False) -> ObjectId:
        """Store ``plain`` unless the store has a good copy; return the object's id.

        ``itemsize`` is that of the elements in ``plain``, in bytes: see :func:`castore.format.codecs.encode`.
        ``plain`` may be reused once this returns. If others might write to it until then (``is_shared``), what is
        stored is a copy, and StateChanged is raised if they did. The object is durable only after :meth:`commit`.
        """
        if not is_shared:
            return self._put(plain, itemsize)[0]
        with COPIES.hold(COPIES.take(len(plain))) as buffer:
            copied = buffer[: len(plain)]
            if self._is_new:  # a copy serves for hashing too, if the object is as new as the one before it
                codecs.copy(plain, copied)
                object_id, is_new = self._put(copied, itemsize)
                if is_new and not codecs.is_equal(plain, copied):
                    raise StateChanged
                return object_id
            object_id = hash_bytes(plain)
            if self._has(object_id, len(plain)):
                return object_id
            codecs.copy(plain, copied)
            # what is encoded must be the very bytes that the id names: else the object would be damaged for ever
            if hash_bytes(copied) != object_id:
                raise StateChanged
            self._write(object_id, copied, itemsize)
            return object_id

    def _put(self, plain: Buffer, itemsize: int) -> tuple[ObjectId, bool]:
        """Store bytes that nobody writes to; return the object's id, and whether it was written."""
        object_id = hash_bytes(plain)
        if self._has(object_id, len(plain)):
            return object_id, False
        self._write(object_id, plain, itemsize)
        return object_id, True

    def _has(self, object_id: ObjectId, length: int) -> bool:
        """Whether the object needs no writing: it is stored, or this save stores it already."""
        with self._lock:
            if object_id in self._claimed:
                return True
            self._claimed.add(object_id)
        self._is_new = not self._is_settled(object_id, length)
        return not self._is_new

    def commit(self) -> Written:
        """Wait until every object is durable under its name. Raises the first error of any."""
        for future in self._unfinished:
            future.result()
        if self._store.durable:
            list(self._finishers.map(fs.sync_directory, sorted(self._directories)))
        for object_id in self._claimed:
            stamp = self._store._stamp(object_id)
            if stamp is not None:
                self._store._settled[object_id] = self._store._verified[object_id] = stamp
        return Written(self._new_objects, self._new_bytes)

    def _is_settled(self, object_id: ObjectId, length: int) -> bool:
        """Return whether the store has a good copy.

        It must be worth as much as a written one: it is verified once a process, and its directory is synced.
        """
        stamp = self._store._stamp(object_id)
        if stamp is None and not self._store._restore_from_trash(object_id):
            return False
        if stamp and self._store._settled.get(object_id) == stamp:
            return True
        try:
            self._store.read_into(object_id, memoryview(bytearray(length)))
        except (CorruptObject, ObjectMissing, UnsupportedVersion, StorageError):
            return False
        # another process may have renamed it a moment ago without having synced the directory yet
        with self._lock:
            self._directories.add(self._store.path(object_id).parent)
        return True

    def _write(self, object_id: ObjectId, plain: Buffer, itemsize: int) -> None:
        buffer = FILES.take(bound(len(plain)))
        try:
            self._raise_if_failed()
            size = encode_frame_into(plain, itemsize, buffer)
        except BaseException:
            FILES.give_back(buffer)
            raise
        with self._lock:
            self._new_objects += 1
            self._new_bytes += size
            self._directories.add(self._store.path(object_id).parent)
            self._unfinished.append(self._finishers.submit(self._finish, object_id, buffer, size))

    def _finish(self, object_id: ObjectId, buffer: memoryview, size: int) -> None:
        try:
            self._raise_if_failed()
            self._store._place(object_id, buffer, size)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            FILES.give_back(buffer)

    def _fail(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = self._error or error

    def _raise_if_failed(self) -> None:
        # the first error ends the save: later ones are its consequences, so it is the one to report
        if self._error is not None:
            raise self._error
