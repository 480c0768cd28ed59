from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import exact, parts, trained, tree

from castore import Repo
from castore.errors import CorruptObject, ObjectMissing, StorageError, UnsupportedVersion
from castore.format.frame import MAX_STORED
from castore.format.ids import ObjectId, hash_bytes
from castore.storage import fs
from castore.storage.buffers import FILES, BufferPool
from castore.storage.object_store import ObjectStore, Written


@pytest.fixture
def store(repo: Repo) -> ObjectStore:
    return repo.store


def put(store: ObjectStore, *contents: bytes, itemsize: int = 1) -> Written:
    with store.writer() as writer:
        for plain in contents:
            assert writer.put(plain, itemsize) == hash_bytes(plain)
        return writer.commit()


def objects_in(store: ObjectStore) -> list[str]:
    return sorted(path.name for path in store.objects.glob("*/*"))


def damage(store: ObjectStore, damaged_id: ObjectId) -> None:
    path = store.path(damaged_id)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("plain", "itemsize"), [(b"", 1), (b"x" * 5000, 1), (trained(5000), 4), (random.Random(6).randbytes(999), 1)]
)
def test_what_is_put_is_read(store: ObjectStore, plain: bytes, itemsize: int) -> None:
    put(store, plain, itemsize=itemsize)
    plain_id = hash_bytes(plain)
    out = bytearray(len(plain))
    store.read_into(plain_id, memoryview(out))
    assert store.read(plain_id) == out == plain
    assert store.has(plain_id)
    assert store.stored_size(plain_id) == os.path.getsize(store.path(plain_id))
    assert os.listdir(store.temporary) == []


def test_equal_content_is_stored_once(store: ObjectStore) -> None:
    assert put(store, b"a", b"b", b"a").objects == 2
    before = tree(store.objects)
    assert put(store, b"b", b"a") == Written(0, 0)
    assert put(ObjectStore(store.objects.parent), b"a") == Written(0, 0)
    assert tree(store.objects) == before


def test_an_object_that_is_not_there_is_missing(store: ObjectStore) -> None:
    absent_id = hash_bytes(b"never put")
    assert not store.has(absent_id)
    assert store.stored_size(absent_id) is None
    with pytest.raises(ObjectMissing, match=absent_id[:12]):
        store.read(absent_id)
    with pytest.raises(ObjectMissing, match=absent_id[:12]):
        store.read_into(absent_id, memoryview(bytearray(9)))


def test_a_damaged_object_is_quarantined_and_written_anew_by_the_next_put(store: ObjectStore) -> None:
    put(store, b"precious", b"other")
    precious_id = hash_bytes(b"precious")
    damage(store, precious_id)
    damaged = store.path(precious_id).read_bytes()
    with pytest.raises(CorruptObject, match=precious_id[:12]):
        store.read(precious_id)
    (quarantined,) = store.quarantine.iterdir()
    assert quarantined.name.startswith(precious_id)
    assert quarantined.read_bytes() == damaged
    with pytest.raises(ObjectMissing):
        store.read(precious_id)
    assert put(store, b"precious", b"other").objects == 1
    assert store.read(precious_id) == b"precious"


def test_reading_into_a_buffer_quarantines_too(store: ObjectStore) -> None:
    put(store, b"precious")
    damage(store, hash_bytes(b"precious"))
    with pytest.raises(CorruptObject):
        store.read_into(hash_bytes(b"precious"), memoryview(bytearray(8)))
    assert len(list(store.quarantine.iterdir())) == 1


def test_a_damaged_object_is_never_deduplicated_against(store: ObjectStore) -> None:
    put(store, b"precious")
    precious_id = hash_bytes(b"precious")
    damage(store, precious_id)
    assert put(ObjectStore(store.objects.parent), b"precious").objects == 1
    assert store.read(precious_id) == b"precious"


def test_an_object_of_a_newer_version_is_left_but_not_deduplicated_against(store: ObjectStore) -> None:
    put(store, b"precious")
    precious_id = hash_bytes(b"precious")
    data = bytearray(store.path(precious_id).read_bytes())
    data[4] = 9
    store.path(precious_id).write_bytes(data)
    with pytest.raises(UnsupportedVersion):
        store.read(precious_id)
    assert store.path(precious_id).read_bytes() == data
    assert put(ObjectStore(store.objects.parent), b"precious").objects == 1
    assert store.read(precious_id) == b"precious"


def test_a_file_larger_than_any_object_is_damage_and_not_read(store: ObjectStore) -> None:
    put(store, b"precious")
    precious_id = hash_bytes(b"precious")
    os.truncate(store.path(precious_id), MAX_STORED + 1)
    with pytest.raises(CorruptObject, match="over the limit"):
        store.read(precious_id)
    assert put(store, b"precious").objects == 1
    assert store.read(precious_id) == b"precious"


def test_a_hit_is_verified_once_and_again_only_if_the_file_changed(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = fs.read_into
    monkeypatch.setattr(fs, "read_into", lambda path, *rest: reads.append(path) or read(path, *rest))
    put(store, b"precious")
    fresh = ObjectStore(store.objects.parent)
    for _ in range(3):
        put(fresh, b"precious")
    assert len(reads) == 1
    os.utime(store.path(hash_bytes(b"precious")), ns=(1, 1))
    put(fresh, b"precious")
    assert len(reads) == 2


def test_a_good_object_that_took_the_place_of_a_bad_one_stays(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, b"precious")
    precious_id = hash_bytes(b"precious")
    good = store.path(precious_id).read_bytes()
    damage(store, precious_id)
    make_directory = fs.make_directory

    def replace_meanwhile(path: Path) -> bool:
        # the last thing a reader does between its look at the damaged file and the move
        (store.temporary / "other").write_bytes(good)
        os.replace(store.temporary / "other", store.path(precious_id))
        return make_directory(path)

    monkeypatch.setattr(fs, "make_directory", replace_meanwhile)
    with pytest.raises(CorruptObject):
        store.read(precious_id)
    assert store.read(precious_id) == b"precious"


def test_threads_that_put_the_same_and_other_objects_all_find_them_stored(store: ObjectStore) -> None:
    contents = [f"{i}".encode() * 50 for i in range(100)]
    with store.writer() as writer:
        threads = [threading.Thread(target=lambda: [writer.put(one) for one in contents]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert writer.commit().objects == len(contents)
    assert [store.read(hash_bytes(one)) for one in contents] == contents


@pytest.mark.parametrize("durable", [True, False])
def test_what_fails_after_put_has_returned_ends_the_save_with_a_typed_error(store: ObjectStore, durable: bool) -> None:
    store.durable = durable
    put(store, b"older")
    contents = [f"{i}".encode() for i in range(300)]  # more than may be in flight: none may wait for ever
    store.path(hash_bytes(contents[5])).mkdir(parents=True)  # in the way of the rename
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageError, match="rename"):
        put(store, *contents)
    assert os.listdir(store.temporary) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert store.read(hash_bytes(b"older")) == b"older"
    store.path(hash_bytes(contents[5])).rmdir()
    put(store, *contents)
    assert [store.read(hash_bytes(one)) for one in contents] == contents


def test_a_failed_sync_is_not_tried_again_and_its_object_never_appears(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.durable = True
    synced = []

    def fail(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StorageError, match="can't sync") as caught:
            put(store, *(f"{i}".encode() for i in range(20)))
    assert caught.value.errno == 5
    assert len(synced) == len(set(synced))
    assert objects_in(store) == []
    assert os.listdir(store.temporary) == []


def test_an_object_that_the_disk_cant_read_is_not_deduplicated_against(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, b"precious")

    def fail(path: Path, limit: int, *_: object) -> bytes:
        raise StorageError("read", str(path), OSError(5, f"Input/output error below {limit}"))

    with monkeypatch.context() as patch:
        patch.setattr(fs, "read_into", fail)
        assert put(ObjectStore(store.objects.parent), b"precious").objects == 1
    assert store.read(hash_bytes(b"precious")) == b"precious"


@pytest.mark.parametrize("what", ["file", "loop"])
def test_what_is_no_folder_where_objects_should_be_is_a_storage_error(store: ObjectStore, what: str) -> None:
    x_id = hash_bytes(b"x")
    folder = store.path(x_id).parent
    if what == "file":
        folder.write_bytes(b"")
    else:
        folder.symlink_to(folder)
    for call in (store.has, store.read, store.stored_size, lambda _: put(store, b"x")):
        with pytest.raises(StorageError):
            call(x_id)


def test_a_store_whose_disk_is_not_mounted_is_a_storage_error(store: ObjectStore) -> None:
    store.objects.rmdir()
    store.objects.symlink_to("not/mounted")
    with pytest.raises(StorageError):
        put(store, b"x")


# -- in a process of its own: limits and signals ---------------------------------------------------------------------


def save_on_a_full_disk(root: str, limit: int, fields: dict[str, Any]) -> None:
    repo = Repo.open(root)
    older = repo.catalog.listing().entries
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    with pytest.raises(StorageError, match="File too large"):
        repo.save(parts(2), run="ci", step=2, **fields)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert os.listdir(repo.store.temporary) == []
    assert repo.catalog.listing().entries == older
    assert exact(repo.load(older[0].id)) == exact(parts(1))
    with Repo.open(root).lock(exclusive=True):
        pass


@pytest.mark.parametrize(
    ("limit", "fields"),
    [
        pytest.param(0, {}, id="every write fails"),
        pytest.param(30_000, {}, id="objects fail"),
        pytest.param(100_000, {"note": "x" * 200_000}, id="the manifest fails"),
    ],
)
def test_a_full_disk_is_a_typed_error_and_leaves_the_old_checkpoints_and_nothing_else(
    repo: Repo, start: Callable[..., BaseProcess], limit: int, fields: dict[str, Any]
) -> None:
    repo.save(parts(1), run="ci", step=1)
    child = start(save_on_a_full_disk, str(repo.root), limit, fields)
    child.join()
    assert child.exitcode == 0
    saved = repo.save(parts(2), run="ci", step=2, **fields)
    assert exact(repo.load(saved.id)) == exact(parts(2))


def interrupt_a_save(root: str, nth: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    repo = Repo.open(root)
    write, calls = fs.write, []

    def interrupt(*arguments: Any) -> int:
        calls.append(None)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGINT)
        return write(*arguments)

    fs.write = interrupt
    with pytest.raises(KeyboardInterrupt):
        repo.save(parts(2), run="ci", step=2)
    fs.write = write
    assert os.listdir(repo.store.temporary) == []
    assert len(repo.catalog.listing().entries) == 1
    with Repo.open(root).lock(exclusive=True):
        pass


@pytest.mark.parametrize("nth", [1, 3])
def test_an_interrupted_save_leaves_no_temporary_file_and_no_lock(
    repo: Repo, start: Callable[..., BaseProcess], nth: int
) -> None:
    saved = repo.save(parts(1), run="ci", step=1)
    child = start(interrupt_a_save, str(repo.root), nth)
    child.join()
    assert child.exitcode == 0
    assert exact(repo.load(saved.id)) == exact(parts(1))


def test_a_folder_that_can_not_be_listed_is_a_storage_error(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repo.root / "objects" / "ab"
    folder.mkdir(parents=True)
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if os.fspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(path)

    monkeypatch.setattr("castore.storage.object_store.os.scandir", refuse)
    with pytest.raises(StorageError, match=f"can't read {folder}: Permission denied"):
        repo.store.strays()


# -- past the page cache -----------------------------------------------------------------------------------------------


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as data:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = np.frombuffer(data, np.uint8).ctypes.data
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def in_memory(path: Path) -> bool:
    """Whether files are in memory alone: tmpfs takes direct writes, too, and keeps them in the page cache."""
    done = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False)
    return done.stdout.strip() in ("tmpfs", "ramfs")


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    if not fs.can_write_direct(tmp_path):
        pytest.skip("the file system of the temporary folder takes no direct writes")
    return tmp_path


@pytest.mark.parametrize("size", [64 << 10, (64 << 10) + 1, 300_000, (1 << 20) - 1, 4 << 20])
def test_what_is_written_past_the_page_cache_is_what_was_given(on_disk: Path, size: int) -> None:
    store = ObjectStore(on_disk)
    plain = random.Random(size).randbytes(size)
    put(store, plain)
    object_id = hash_bytes(plain)
    assert store.read(object_id) == plain
    assert store.path(object_id).stat().st_size == size + 16
    assert put(ObjectStore(on_disk), plain) == Written(0, 0)


def test_a_save_leaves_the_page_cache_alone(on_disk: Path) -> None:
    store, buffered = ObjectStore(on_disk / "a"), ObjectStore(on_disk / "b", direct=False)
    plain = random.Random(1).randbytes(4 << 20)
    put(store, plain)
    put(buffered, plain)
    if in_memory(on_disk) or cached_bytes(buffered.path(hash_bytes(plain))) < 4 << 20:
        pytest.skip("the file system has no page cache that can be looked at")
    assert cached_bytes(store.path(hash_bytes(plain))) == 0


@pytest.mark.parametrize("accepted", [0, 1, 4096, 5000])
def test_a_file_system_that_refuses_or_stops_within_a_block_is_written_to_as_usual(
    on_disk: Path, monkeypatch: pytest.MonkeyPatch, accepted: int
) -> None:
    """Faults that no file system here has."""
    write, calls = os.write, []

    def stop(descriptor: int, data: Any) -> int:
        is_direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        if not is_direct:
            return write(descriptor, data)
        calls.append(len(data))
        if not accepted or len(calls) > 1:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
        try:
            return write(descriptor, data[:accepted])
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)

    store = ObjectStore(on_disk)
    assert store._writes_direct()
    monkeypatch.setattr("castore.storage.fs.os.write", stop)
    plain = random.Random(2).randbytes(200_000)
    put(store, plain)
    assert calls
    assert store.read(hash_bytes(plain)) == plain


def test_where_the_file_system_refuses_from_the_start_everything_is_written_as_usual(
    on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def refuse(path: Any, flags: int, *arguments: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return open_file(path, flags, *arguments)

    monkeypatch.setattr("castore.storage.fs.os.open", refuse)
    store = ObjectStore(on_disk)
    assert put(store, bytes(range(256)) * 1000, os.urandom(100_000)).objects == 2
    assert os.listdir(store.temporary) == []


def test_a_forked_child_has_buffers_of_its_own(on_disk: Path) -> None:
    store = ObjectStore(on_disk)
    taken = [FILES.take(size << 20) for size in (64, 4, 4)]  # all that may be in use at a time
    taken[0][:4] = b"mine"
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            taken[0][:4] = b"here"
            put(store, os.urandom(4 << 20))
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(taken[0][:4]) == b"mine"
    for buffer in taken:
        FILES.give_back(buffer)


def test_more_threads_than_buffers_wait_for_each_other_and_not_for_ever(on_disk: Path) -> None:
    (Repo.init(on_disk).root / "config.toml").write_text("[store]\nthreads = 64\nfsync = false\n")
    repo = Repo.open(on_disk)
    state = {f"t{i}": torch.full((1 << 20,), float(i)) for i in range(40)}  # a chunk each, in memory that may change
    saved = repo.save({"model": state}, run="r", step=1)
    assert exact(repo.load(saved.id)["model"]) == exact(state)


def test_buffers_are_waited_for_and_used_again() -> None:
    pool = BufferPool()
    taken = [pool.take(16 << 20) for _ in range(4)]
    got: list[memoryview] = []
    thread = threading.Thread(target=lambda: got.append(pool.take(1)))
    thread.start()
    thread.join(0.2)
    assert got == []
    pool.give_back(taken[2])
    thread.join()
    assert got[0] is taken[2]
    for buffer in (taken[0], taken[1], taken[3], got[0]):
        pool.give_back(buffer)
    large = [pool.take(65 << 20) for _ in range(3)]  # larger than the limit, and yet a few at a time
    assert [len(buffer) for buffer in large] == [65 << 20] * 3
