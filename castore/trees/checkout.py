"""A manifest of kind ``files`` -> files and folders on the disk.

The tree comes from an index, which is as hostile as whoever wrote its manifest. All of it is judged before anything is
written (:mod:`castore.paths`): no path leads out of the folder, through a link, or into ``.git`` or ``.castore``; no
link leads out of the tree. A few chunks are in memory at a time, whatever the size of the files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castore.errors import CorruptIndex, NotFound, RefusedPath, StorageError, UnsafePath
from castore.format import chunking, part_index
from castore.format.ids import ObjectId
from castore.format.part_index import ChunkRef, Index, TensorRef, TensorSpec
from castore.remotes import fallback
from castore.repo import Repo
from castore.state.parts import locate_errors
from castore.storage import fs, safe_paths
from castore.trees.add import KIND, MODE, PART, Progress, ahead, no_progress

_FINISHERS = 8  # what syncs waits for the disk, not for the processor
_IN_FLIGHT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedOut:
    """What :func:`check_out` wrote. ``paths`` are the uppermost ones."""

    id: ObjectId
    paths: tuple[Path, ...]
    files: int
    folders: int
    links: int
    bytes: int


def check_out(
    repo: Repo,
    wanted: str,
    folder: Path,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> CheckedOut:
    """Write what was added as ``wanted`` into ``folder``, under the name it had; every byte is verified.

    Each file appears complete or not at all, with the permissions it had. UnsafePath or CorruptIndex for a tree that
    could write elsewhere, RefusedPath for a folder that is no place to write to or where something is in the way
    (``force`` replaces files and links, never folders): then nothing was written. ObjectMissing, CorruptObject.
    """
    safe_paths.check_target(folder)
    entry = repo.find(wanted, kind=KIND)
    if PART not in entry.manifest.parts:
        raise NotFound(f"{entry.id[:12]} has no part {PART!r}")
    own = entry.manifest.parts[PART].index
    with repo.lock(), locate_errors(PART, entry.id):
        data, frame = fallback.read(repo.store, repo.remotes, own)
        found = part_index.decode(data)
        tree = _read_tree(found)
        _check_disk(tree, folder, force)
        _Checkout(repo, folder, tree, force).write(found, progress)
        # last: an index without its chunks would be taken for damage
        if frame is not None:
            repo.store.adopt(own, frame, memoryview(bytearray(len(data))))
    return CheckedOut(
        id=entry.id,
        paths=tuple(folder / name for name in tree.everything() if "/" not in name),
        files=len(tree.files),
        folders=len(tree.folders),
        links=len(tree.links),
        bytes=tree.bytes,
    )


@dataclass(frozen=True, slots=True)
class _File:
    number: int
    path: str
    mode: int
    size: int


@dataclass(slots=True)
class _Stored:
    """A tree that is safe to write: folders come before what is in them, and every file is a tensor of its own."""

    files: dict[int, _File] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    def everything(self) -> list[str]:
        return sorted([*self.folders, *self.links, *(file.path for file in self.files.values())])


def _read_tree(found: Index) -> _Stored:
    """CorruptIndex or UnsafePath unless the index describes a tree that can do no harm."""
    if type(found.tree) is not dict:
        raise CorruptIndex("the index describes no tree of files")
    tree = _Stored()
    for path in sorted(found.tree, key=str):
        if type(path) is not str:
            raise CorruptIndex("the index describes no tree of files: a path is a number")
        if reason := safe_paths.why_not_member(path):
            raise UnsafePath(path, reason)
        parent = path.rpartition("/")[0]
        if parent and parent not in tree.folders:
            raise UnsafePath(path, "which lies in no folder of the tree")
        _read_node(tree, path, found.tree[path], found.tensors)
    return tree


def _read_node(tree: _Stored, path: str, node: Any, tensors: Sequence[TensorSpec]) -> None:
    match node:
        case {"link": str(target), **rest} if not rest:
            if reason := safe_paths.why_not_link(path, target):
                raise UnsafePath(path, reason)
            tree.links[path] = target
        case {"mode": int(mode), **rest} if not rest and mode >= 0:
            tree.folders[path] = mode & MODE
        case {"mode": int(mode), "data": TensorRef(number), **rest} if not rest and mode >= 0:
            spec = tensors[number]
            # a file twice would let a small index fill any disk
            if spec.dtype != "uint8" or len(spec.shape) != 1 or number in tree.files:
                raise CorruptIndex(f"the index describes no tree of files: {path[:200]!r} has no data of its own")
            tree.files[number] = _File(number, path, mode & MODE, spec.nbytes)
            tree.bytes += spec.nbytes
        case _:
            raise CorruptIndex(f"the index describes no tree of files: {path[:200]!r} is neither file, folder nor link")


def _check_disk(tree: _Stored, folder: Path, force: bool) -> None:
    """Make ``folder``; RefusedPath or StorageError when the tree can't go there as it is."""
    fs.make_directory(folder)
    if not safe_paths.is_folder(safe_paths.status(folder)):
        raise RefusedPath(str(folder), "it is no folder")
    here = {path: safe_paths.status(folder / path) for path in _reachable(tree, folder)}
    taken = []
    for path, status in here.items():
        if path in tree.folders:
            if status is not None and not safe_paths.is_folder(status):
                raise RefusedPath(str(folder / path), "it is no folder there, and links are not followed")
        elif safe_paths.is_folder(status):
            raise RefusedPath(str(folder / path), "it is a folder there")
        elif status is not None and not safe_paths.is_replaceable(status):
            raise RefusedPath(str(folder / path), "it is neither a file nor a link there")
        elif status is not None:
            taken.append(path)
    if taken and not force:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise RefusedPath(str(folder / taken[0]), f"it exists{more}: --force replaces files")
    if pairs := safe_paths.colliding(tree.everything()):
        _check_collisions(folder, pairs)
    free = shutil.disk_usage(folder).free
    if tree.bytes > free:
        error = OSError(errno.ENOSPC, f"it takes {tree.bytes} bytes and {free} are free")
        raise StorageError("check out to", str(folder), error)


def _reachable(tree: _Stored, folder: Path) -> Iterator[str]:
    """The paths of the tree whose folders exist and are real ones: nothing can be in the way of the others."""
    absent: set[str] = set()
    for path in tree.everything():
        if path.rpartition("/")[0] in absent:
            absent.add(path)
            continue
        yield path
        if path in tree.folders and not safe_paths.is_folder(safe_paths.status(folder / path)):
            absent.add(path)


def _check_collisions(folder: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """RefusedPath when two paths of the tree are one here, where the second would overwrite the first.

    The file system itself is asked, with an empty file of the same name.
    """
    scratch = folder / f".{os.getpid()}-names"
    fs.make_directory(scratch)
    try:
        for one, other in pairs:
            names = [scratch / path.replace("/", "-")[-200:] for path in (one, other)]
            descriptor, temp = fs.create_temporary(scratch)
            fs.close(descriptor, temp)
            fs.rename(temp, names[0])
            same = safe_paths.status(names[1]) is not None
            fs.unlink(names[0])
            if same:
                raise RefusedPath(str(folder / other), f"here it is the same file as {one}")
    finally:
        fs.remove_directory(scratch)


class _Checkout:
    """One checkout in progress."""

    def __init__(self, repo: Repo, folder: Path, tree: _Stored, force: bool) -> None:
        self._repo = repo
        self._folder = folder
        self._tree = tree
        self._force = force
        self._durable = repo.config.store.fsync
        self._made: dict[Path, int] = {}

    def write(self, found: Index, progress: Progress) -> None:
        for path, mode in self._tree.folders.items():
            if fs.make_directory(self._folder / path):
                self._made[self._folder / path] = mode
        self._write_files(found, progress)
        for path, target in self._tree.links.items():
            self._link(self._folder / path, target)
        if self._durable:
            for name in ("", *self._tree.folders):
                fs.sync_directory(self._folder / name)
        # last and from the bottom up: one may forbid writing
        for made, mode in reversed(self._made.items()):
            fs.set_mode(made, mode)

    def _write_files(self, found: Index, progress: Progress) -> None:
        finishing: deque[Future[None]] = deque()
        with (
            ThreadPoolExecutor(_FINISHERS, thread_name_prefix="castore-finish") as finishers,
            contextlib.closing(self._written(found, progress)) as written,
        ):
            for file, descriptor, temp in written:
                finishing.append(finishers.submit(self._finish, file, descriptor, temp))
                if len(finishing) > _IN_FLIGHT:
                    finishing.popleft().result()
            for future in finishing:
                future.result()

    def _written(self, found: Index, progress: Progress) -> Generator[tuple[_File, int, Path], None, None]:
        """Each file once all its bytes are in a temporary one beside it, which is open still."""
        for file in self._tree.files.values():
            if not file.size:
                yield file, *self._create(file)
        descriptor, temp = -1, Path()
        try:
            done = 0
            for data, pieces in self._chunks(found):
                for piece in pieces:
                    file = self._tree.files[piece.tensor]
                    if piece.start == 0:
                        descriptor, temp = self._create(file)
                    length = piece.stop - piece.start
                    fs.write(descriptor, temp, [data[piece.at : piece.at + length]])
                    if piece.stop == file.size:
                        finished, descriptor = descriptor, -1
                        yield file, finished, temp
                    done += length
                progress(done, self._tree.bytes)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
                fs.unlink(temp)

    def _chunks(self, found: Index) -> Iterator[tuple[memoryview, list[chunking.Piece]]]:
        """The chunks that hold bytes of files, in order. A tensor that is no file of the tree isn't read."""
        extents = [(spec.offset, spec.nbytes if i in self._tree.files else 0) for i, spec in enumerate(found.tensors)]
        covered = chunking.pieces_by_chunk(extents, [chunk.length for chunk in found.chunks])

        def read(item: tuple[ChunkRef, list[chunking.Piece]]) -> tuple[memoryview, list[chunking.Piece]]:
            data = memoryview(bytearray(item[0].length))
            fallback.read_into(self._repo.store, self._repo.remotes, item[0].id, data)
            return data, item[1]

        wanted = [(chunk, pieces) for chunk, pieces in zip(found.chunks, covered, strict=True) if pieces]
        return ahead(read, wanted, self._repo.threads)

    def _create(self, file: _File) -> tuple[int, Path]:
        descriptor, temp = fs.create_temporary((self._folder / file.path).parent)
        # before there is anything to read in it
        fs.set_mode(temp, file.mode, descriptor)
        return descriptor, temp

    def _finish(self, file: _File, descriptor: int, temp: Path) -> None:
        target = self._folder / file.path
        try:
            try:
                if self._durable:
                    fs.sync(descriptor, temp)
            finally:
                fs.close(descriptor, temp)
            self._place(temp, target)
        finally:
            fs.unlink(temp)

    def _place(self, temp: Path, target: Path) -> None:
        if self._force:
            fs.rename(temp, target)
        elif not fs.link(temp, target):
            raise RefusedPath(str(target), "it was made meanwhile: --force replaces files")

    def _link(self, path: Path, text: str) -> None:
        if not self._force:
            fs.symlink(text, path)
            return
        descriptor, temp = fs.create_temporary(path.parent)
        fs.close(descriptor, temp)
        fs.unlink(temp)
        fs.symlink(text, temp)
        fs.rename(temp, path)
