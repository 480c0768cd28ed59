"""Any file or folder -> a manifest of kind ``files``; :mod:`castore.trees.checkout` is the way back.

The part ``files`` is one stream: the files, sorted by path, back to back. Its content decides where it is cut (FastCDC:
Xia et al. 2020), so that an edit changes the chunks around it and no others. Its tree maps each path, beginning
with the name that was added, to ``{"mode", "data"}`` for a file, ``{"link"}`` for a link, ``{"mode"}`` for a folder.

A few chunks are in memory at a time, whatever the size of the files.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from castore.errors import FileChanged, StorageError, UnsupportedFile
from castore.format import manifest, part_index
from castore.format.ids import ObjectId
from castore.format.manifest import Manifest, Part
from castore.format.part_index import ChunkRef, Index, TensorRef, TensorSpec
from castore.parallel import map_ahead
from castore.progress import Progress, ignore_progress
from castore.repo import Repo
from castore.storage import safe_paths
from castore.storage.object_store import Writer, Written
from castore.trees.tree import KIND, MODE, PART

# Other bounds would share no chunks with what is stored. An edit costs the chunk it is in, at times the next one too.
_SMALLEST, _AVERAGE, _LARGEST = 256 << 10, 1 << 20, 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What :func:`add_tree` stored. ``bytes`` is the size of all files, ``new_bytes`` what the new objects take.

    ``skipped`` are the folders left out because they are never checked out: .git and .castore.
    """

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


# -- add -------------------------------------------------------------------------------------------------------------


def add_tree(
    repo: Repo,
    path: Path,
    *,
    name: str | None = None,
    tags: Sequence[str] = (),
    note: str = "",
    created: datetime | None = None,
    progress: Progress = ignore_progress,
) -> Added:
    """Store a file, or a folder with everything in it, under run ``name``, by default the name of the path.

    When this returns, the data survives a power cut. Raise UnsupportedFile naming what could not be checked out exactly
    as it is, FileChanged if a file is written to while it is read, StorageError if one can't be read. Then
    nothing became visible.
    """
    tree = _scan(path)
    draft = _draft(tree, name, tags, note, created or datetime.now(UTC))
    repo.catalog.check_run(draft.run)
    manifest.encode(draft)  # what can't be recorded fails before gigabytes are read
    with repo.lock():
        part, written = _store(repo, tree, progress)
        final = msgspec.structs.replace(draft, parts={PART: part})
        manifest_id, manifest_path = repo.catalog.add(final)
    return Added(
        id=manifest_id,
        manifest=final,
        path=manifest_path,
        files=len(tree.files),
        folders=len(tree.folders),
        links=len(tree.links),
        bytes=part.bytes,
        new_objects=written.objects,
        new_bytes=written.bytes,
        skipped=tuple(tree.skipped),
    )


@dataclass(slots=True)
class _Tree:
    """What to add, by paths that begin with ``top``. ``folders`` have their permissions, ``links`` their targets."""

    top: str
    files: list[tuple[str, Path]] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    bytes: int = 0


def _scan(start: Path) -> _Tree:
    """Look through ``start`` without reading a file. Raise UnsupportedFile, FileChanged or StorageError."""
    try:
        if stat.S_ISLNK(os.lstat(start).st_mode):
            raise UnsupportedFile(str(start), "a symbolic link: add what it leads to")
        start = Path(os.path.realpath(start))
    except OSError as error:
        raise UnsupportedFile(str(start), f"can't be added: {error.strerror}") from error
    tree = _Tree(start.name)
    if not tree.top or safe_paths.is_reserved(tree.top):
        raise UnsupportedFile(str(start), "can't be added as a whole: add what is in it")
    pending = [(tree.top, start)]
    while pending:
        name, path = pending.pop()
        is_kept_folder = _enter(tree, name, path)
        if is_kept_folder:
            pending += [(f"{name}/{child}", path / child) for child in _names_in(path)]
    tree.files.sort()
    tree.skipped.sort()
    return tree


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise StorageError("read", str(folder), error) from error


def _enter(tree: _Tree, name: str, path: Path) -> bool:
    """Enter what is at ``path`` into the tree, and return whether it is a folder whose content belongs there too."""
    status = safe_paths.status(path)
    if status is None:
        raise FileChanged(str(path))
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UnsupportedFile(ascii(os.fspath(path)), "its name is not valid UTF-8: rename it") from None
    if safe_paths.is_reserved(path.name):
        tree.skipped.append(name)
    elif stat.S_ISREG(status.st_mode):
        tree.files.append((name, path))
        tree.bytes += status.st_size
    elif stat.S_ISDIR(status.st_mode):
        tree.folders[name] = stat.S_IMODE(status.st_mode) & MODE
    elif stat.S_ISLNK(status.st_mode):
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
        raise UnsupportedFile(str(path), f"{reason}, which is never checked out: replace it with what it leads to")
    return target


def _draft(tree: _Tree, name: str | None, tags: Sequence[str], note: str, created: datetime) -> Manifest:
    """Return the manifest of a tree, but for its index."""
    return Manifest(
        kind=KIND,
        run=_run_name(tree.top) if name is None else name,
        step=0,
        created=manifest.timestamp(created),
        parts={PART: Part(index=ObjectId("0" * 64), bytes=tree.bytes, stored_bytes=0)},
        tags=sorted(set(tags)),
        note=note,
        info={"files": len(tree.files), "folders": len(tree.folders), "links": len(tree.links), "name": tree.top},
    )


def _store(repo: Repo, tree: _Tree, progress: Progress) -> tuple[Part, Written]:
    """Store the files and their index; the caller holds the lock."""
    with repo.store.writer() as writer, contextlib.closing(_Stream(tree.files)) as stream:
        chunks = _put(writer, _cut(stream), repo.threads, tree.bytes, progress)
        index = Index(chunks, tuple(stream.tensors), _describe(tree, stream.modes))
        index_id = writer.put(part_index.encode(index, PART))
        written = writer.commit()
    object_ids = {index_id, *(chunk.id for chunk in chunks)}
    stored_bytes = sum(repo.store.stored_size(object_id) or 0 for object_id in object_ids)
    return Part(index=index_id, bytes=stream.done, stored_bytes=stored_bytes), written


class _Stream:
    """The files one after another, as one file to read. Collects for each file its tensor and its permissions."""

    def __init__(self, files: Sequence[tuple[str, Path]]) -> None:
        self.tensors: list[TensorSpec] = []
        self.modes: list[int] = []
        self.done = 0
        self._remaining = iter(files)
        self._path = Path()
        self._descriptor = -1
        self._before: os.stat_result | None = None
        self._start = 0

    def readinto(self, buffer: memoryview) -> int:
        """Fill at most ``buffer``, like a file's method, and return the number of bytes; 0 after the last file."""
        while True:
            if self._before is None and not self._open_next():
                return 0
            with self._locating_errors():
                count = os.readv(self._descriptor, [buffer])
            self.done += count
            if count:
                return count
            self._finish()

    def close(self) -> None:
        """Close the file that is open when reading ends early."""
        if self._before is not None:
            self._before = None
            os.close(self._descriptor)

    def _open_next(self) -> bool:
        following = next(self._remaining, None)
        if following is None:
            return False
        _, self._path = following
        with self._locating_errors():
            # without blocking: the file may have become a pipe by now
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
    def _locating_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError("read", str(self._path), error) from error


def _cut(stream: _Stream) -> Iterator[bytes]:
    """Yield the stream in chunks."""
    from pyfastcdc import FastCDC

    for chunk in FastCDC(_AVERAGE, min_size=_SMALLEST, max_size=_LARGEST).cut_stream(stream):
        yield bytes(chunk.data)  # its memory is used again for the next chunk


def _put(writer: Writer, chunks: Iterable[bytes], threads: int, total: int, progress: Progress) -> tuple[ChunkRef, ...]:
    def put(data: bytes) -> ChunkRef:
        return ChunkRef(writer.put(data), len(data))

    refs = []
    done = 0
    for ref in map_ahead(put, chunks, threads):
        refs.append(ref)
        done += ref.length
        progress(done, total)
    return tuple(refs)


def _describe(tree: _Tree, modes: Sequence[int]) -> dict[str, Any]:
    """Return the tree of the index: a dict from every path to what is there."""
    nodes: dict[str, Any] = {name: {"mode": mode} for name, mode in tree.folders.items()}
    nodes |= {name: {"link": target} for name, target in tree.links.items()}
    for number, (name, _) in enumerate(tree.files):
        nodes[name] = {"mode": modes[number], "data": TensorRef(number)}
    return dict(sorted(nodes.items()))


def _run_name(top: str) -> str:
    """Return ``top`` with what a run's name can't hold replaced by dashes."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", top).lstrip("._-")[:64] or "files"
