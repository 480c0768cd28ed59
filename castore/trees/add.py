"""Any file or folder -> a manifest of kind ``files``; :mod:`castore.checkout` is the way back.

The part ``files`` is one stream: the files, sorted by path, back to back. It is cut where its content says so (FastCDC:
Xia et al. 2016), so that an edit changes the chunks around it and no others. Its tree has, for each path below the name
of what was added, ``{"mode", "data"}`` for a file, ``{"link"}`` for a symbolic link and ``{"mode"}`` for a folder.

A few chunks are in memory at a time, whatever the size of the files.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from castore.errors import FileChanged, PackageMissing, StorageError, UnsupportedFile
from castore.format import manifest, part_index
from castore.format.ids import ObjectId
from castore.format.manifest import Manifest, Part
from castore.format.part_index import ChunkRef, Index, TensorRef, TensorSpec
from castore.repo import Repo
from castore.storage import safe_paths
from castore.storage.object_store import Writer

PART = "files"
KIND: manifest.Kind = "files"

# Whoever cuts otherwise shares no chunks with what is stored. An edit costs the chunk it is in, at times the next one.
_SMALLEST, _AVERAGE, _LARGEST = 256 << 10, 1 << 20, 4 << 20
_BUFFER = 16 << 20  # of the stream in memory; FastCDC has to see _LARGEST bytes to cut
MODE = 0o777  # neither set-user-id nor set-group-id nor sticky: they would be rights that the data gives itself

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""
Cut = Callable[[memoryview, int, int, int], Iterable[Any]]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What :func:`add` stored. ``skipped`` are folders that were passed over, as they are never checked out."""

    id: ObjectId
    manifest: Manifest
    path: Path
    files: int
    folders: int
    links: int
    bytes: int
    new_objects: int
    new_bytes: int
    skipped: tuple[str, ...]


def no_progress(_done: int, _total: int) -> None:
    """For whoever doesn't want to know."""


# -- add -------------------------------------------------------------------------------------------------------------


def add_tree(
    repo: Repo,
    path: Path,
    *,
    name: str | None = None,
    tags: Sequence[str] = (),
    note: str = "",
    created: datetime | None = None,
    progress: Progress = no_progress,
) -> Added:
    """Store a file, or a folder with all that is in it, under run ``name`` (that of the path unless given).

    When this returns it survives a power cut. UnsupportedFile, naming it, for what could not be checked out exactly as
    it is; FileChanged when a file is written to meanwhile; StorageError when one can't be read; PackageMissing without
    fastcdc. Then nothing became visible.
    """
    cut = _cutter()
    tree = _scan(path)
    draft = Manifest(
        kind=KIND,
        run=_run_name(tree.top) if name is None else name,
        step=0,
        created=manifest.timestamp(created or datetime.now(UTC)),
        parts={PART: Part(index=ObjectId("0" * 64), bytes=tree.bytes, stored_bytes=0)},
        tags=sorted(set(tags)),
        note=note,
        info={"files": len(tree.files), "folders": len(tree.folders), "links": len(tree.links), "name": tree.top},
    )
    manifest.encode(draft)  # what can't be recorded fails before gigabytes are read
    with repo.lock():
        with repo.store.writer() as writer, contextlib.closing(_Stream(tree.files)) as stream:
            chunks = _put(writer, _cut(stream.readinto, cut), repo.threads, tree.bytes, progress)
            own = writer.put(
                part_index.encode(Index(chunks, tuple(stream.tensors), _describe(tree, stream.modes)), PART)
            )
            written = writer.commit()
        stored = sum(repo.store.stored_size(one) or 0 for one in {own, *(chunk.id for chunk in chunks)})
        final = msgspec.structs.replace(draft, parts={PART: Part(index=own, bytes=stream.done, stored_bytes=stored)})
        own_id, manifest_path = repo.catalog.add(final)
    return Added(
        id=own_id,
        manifest=final,
        path=manifest_path,
        files=len(tree.files),
        folders=len(tree.folders),
        links=len(tree.links),
        bytes=stream.done,
        new_objects=written.objects,
        new_bytes=written.bytes,
        skipped=tuple(tree.skipped),
    )


@dataclass(slots=True)
class _Tree:
    """What is to be added, by path below the folder that holds it. Folders come with their permissions."""

    top: str
    files: list[tuple[str, Path]] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    bytes: int = 0


def _scan(start: Path) -> _Tree:
    try:
        found = os.lstat(start)
        if stat.S_ISLNK(found.st_mode):
            raise UnsupportedFile(str(start), "a symbolic link: give what it leads to")
        start = Path(os.path.realpath(start))
    except OSError as error:
        raise UnsupportedFile(str(start), f"can't be added: {error.strerror}") from error
    tree = _Tree(start.name)
    if not tree.top or safe_paths.is_reserved(tree.top):
        raise UnsupportedFile(str(start), "can't be added as a whole: add what is in it")
    waiting = [(tree.top, start)]
    while waiting:
        name, path = waiting.pop()
        folder = _note(tree, name, path)
        if folder:
            waiting += [(f"{name}/{one}", path / one) for one in _names_in(path)]
    tree.files.sort()
    tree.skipped.sort()
    return tree


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise StorageError("read", str(folder), error) from error


def _note(tree: _Tree, name: str, path: Path) -> bool:
    """Enter what is at ``path`` into the tree; whether it is a folder whose content belongs there too."""
    found = safe_paths.status(path)
    if found is None:
        raise FileChanged(str(path))
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UnsupportedFile(ascii(os.fspath(path)), "its name is not valid UTF-8: rename it") from None
    if safe_paths.is_reserved(path.name):
        tree.skipped.append(name)
    elif stat.S_ISREG(found.st_mode):
        tree.files.append((name, path))
        tree.bytes += found.st_size
    elif stat.S_ISDIR(found.st_mode):
        tree.folders[name] = stat.S_IMODE(found.st_mode) & MODE
    elif stat.S_ISLNK(found.st_mode):
        tree.links[name] = _link_target(name, path)
    else:
        raise UnsupportedFile(str(path), "neither file, folder nor link: remove it, or add what is beside it")
    return name in tree.folders


def _link_target(name: str, path: Path) -> str:
    try:
        target = os.readlink(path)
        target.encode()
    except OSError as error:
        raise StorageError("read", str(path), error) from error
    except UnicodeEncodeError:
        raise UnsupportedFile(str(path), "a link whose target is not valid UTF-8") from None
    if reason := safe_paths.why_not_link(name, target):
        raise UnsupportedFile(str(path), f"{reason}, which is never checked out: replace it by what it leads to")
    return target


class _Stream:
    """The files one after another. Notes of each the tensor that it is in the stream, and its permissions."""

    def __init__(self, files: Sequence[tuple[str, Path]]) -> None:
        self.tensors: list[TensorSpec] = []
        self.modes: list[int] = []
        self.done = 0
        self._left = iter(files)
        self._path = Path()
        self._descriptor = -1
        self._before: os.stat_result | None = None
        self._start = 0

    def readinto(self, into: memoryview) -> int:
        """As of a file; 0 at the end of the last file."""
        while True:
            if self._before is None and not self._open_next():
                return 0
            with self._reporting():
                count = os.readv(self._descriptor, [into])
            self.done += count
            if count:
                return count
            self._finish()

    def close(self) -> None:
        """Give back what is open when reading ends early."""
        if self._before is not None:
            self._before = None
            os.close(self._descriptor)

    def _open_next(self) -> bool:
        following = next(self._left, None)
        if following is None:
            return False
        self._path = following[1]
        with self._reporting():
            # without blocking: what was a file may be a pipe by now
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = os.fstat(self._descriptor)
        self._start = self.done
        if not stat.S_ISREG(self._before.st_mode):
            self.close()
            raise FileChanged(str(self._path))
        return True

    def _finish(self) -> None:
        assert self._before is not None
        before, after, size = self._before, os.fstat(self._descriptor), self.done - self._start
        self.close()
        if not before.st_size == after.st_size == size or before.st_mtime_ns != after.st_mtime_ns:
            raise FileChanged(str(self._path))
        self.tensors.append(TensorSpec("uint8", (size,), self._start if size else 0))
        self.modes.append(stat.S_IMODE(before.st_mode) & MODE)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError("read", str(self._path), error) from error


def _cutter() -> Cut:
    try:
        # without its compiled half the package says on standard output that it is slow, where programs read JSON
        with contextlib.redirect_stdout(sys.stderr):
            from fastcdc import fastcdc
    except ImportError:
        raise PackageMissing("adding files", "fastcdc", "files") from None
    cut: Cut = fastcdc
    return cut


def _cut(readinto: Callable[[memoryview], int], cut: Cut) -> Iterator[bytes]:
    """The stream in chunks.

    The package's own way with files is to map them into memory whole, one at a time, so it is fed a buffer here. A cut
    depends on the bytes since the cut before it, _LARGEST at most: those must be in the buffer, or the end of all.
    """
    buffer = memoryview(bytearray(_BUFFER))
    filled, ended = 0, False
    while filled or not ended:
        while filled < _BUFFER and not ended:
            count = readinto(buffer[filled:])
            filled += count
            ended = not count
        done = 0
        for chunk in cut(buffer[:filled], _SMALLEST, _AVERAGE, _LARGEST):
            if not ended and filled - chunk.offset < _LARGEST:
                break
            done = chunk.offset + chunk.length
            yield bytes(buffer[chunk.offset : done])
        buffer[: filled - done] = buffer[done:filled]
        filled -= done


def _put(writer: Writer, chunks: Iterable[bytes], threads: int, total: int, progress: Progress) -> tuple[ChunkRef, ...]:
    refs = []
    done = 0
    for ref in ahead(lambda data: ChunkRef(writer.put(data), len(data)), chunks, threads):
        refs.append(ref)
        done += ref.length
        progress(done, total)
    return tuple(refs)


def ahead(function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int) -> Iterator[_Result]:
    """``function`` of each item, in order, computed by threads that are a few items ahead."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="castore")
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _describe(tree: _Tree, modes: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {name: {"mode": mode} for name, mode in tree.folders.items()}
    found |= {name: {"link": target} for name, target in tree.links.items()}
    for number, (name, _) in enumerate(tree.files):
        found[name] = {"mode": modes[number], "data": TensorRef(number)}
    return dict(sorted(found.items()))


def _run_name(top: str) -> str:
    """``top`` as the name of a run, which has fewer characters to choose from."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", top).lstrip("._-")[:64] or "files"
