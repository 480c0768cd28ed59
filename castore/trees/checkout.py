"""A manifest of kind ``files`` -> files and folders on the disk.

The tree comes from an index, which is as hostile as the author of its manifest. All of it is checked before anything is
written (:mod:`castore.storage.safe_paths`): no path leads out of the folder, through a link, or into ``.git`` or
``.castore``; no link leads out of the tree. A few chunks are in memory at a time, whatever the size of the files.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import stat
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from castore.errors import CorruptIndex, NotFound, RefusedPath, StorageError, UnsafePath
from castore.format import chunking, part_index
from castore.format.ids import ObjectId
from castore.format.part_index import ChunkRef, Index, TensorRef, TensorSpec
from castore.parallel import map_ahead
from castore.progress import Progress, ignore_progress
from castore.remotes import fallback
from castore.repo import Repo
from castore.state.parts import locate_errors
from castore.storage import fs, output_file, safe_paths
from castore.storage.output_file import OutputFile
from castore.trees.add import KIND, MODE, PART

_FINISHERS = 8  # a thread that syncs waits for the disk, not for the processor
_IN_FLIGHT = 64
_NO_TREE = "the index does not describe a tree of files"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedOut:
    """What :func:`check_out` wrote. ``paths`` are the topmost files, folders and links; ``bytes`` is over all files."""

    id: ObjectId
    paths: tuple[Path, ...]
    files: int
    folders: int
    links: int
    bytes: int


def check_out(
    repo: Repo,
    selector: str,
    folder: Path,
    *,
    force: bool = False,
    progress: Progress = ignore_progress,
) -> CheckedOut:
    """Write the files that ``selector`` names into ``folder``, under the name they were added by, and verify each byte.

    Each file appears complete or not at all, with the permissions it had. Raise UnsafePath or CorruptIndex for a tree
    that could write elsewhere, and RefusedPath if ``folder`` may not be written to or something is in the way
    (``force`` replaces files and links, never folders): then nothing was written. Raise ObjectMissing or CorruptObject
    for data that is missing or damaged.
    """
    safe_paths.check_target(folder)
    entry = repo.find(selector, kind=KIND)
    if PART not in entry.manifest.parts:
        raise NotFound(f"{entry.id[:12]} has no part {PART!r}")
    index_id = entry.manifest.parts[PART].index
    with repo.lock(), locate_errors(PART, entry.id):
        data, frame = fallback.read(repo.store, repo.remotes, index_id)
        index = part_index.decode(data)
        tree = _read_tree(index)
        _check_disk(tree, folder, force)
        _Checkout(repo, folder, tree, force).run(index, progress)
        # last: an index without its chunks would be taken for damage
        if frame is not None:
            repo.store.adopt(index_id, frame, memoryview(bytearray(len(data))))
    return CheckedOut(
        id=entry.id,
        paths=tuple(folder / name for name in tree.paths() if "/" not in name),
        files=len(tree.files),
        folders=len(tree.folders),
        links=len(tree.links),
        bytes=tree.bytes,
    )


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    mode: int
    size: int


@dataclass(slots=True)
class _Tree:
    """A tree that is safe to write: each folder comes before what is in it, each file is a tensor of its own.

    ``files`` are by the number of their tensor, ``folders`` have their permissions, ``links`` the text they hold.
    """

    files: dict[int, _File] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    def paths(self) -> list[str]:
        return sorted([*self.folders, *self.links, *(file.path for file in self.files.values())])


def _read_tree(index: Index) -> _Tree:
    """Return the tree that the index describes. Raise CorruptIndex or UnsafePath if it could do any harm."""
    if type(index.tree) is not dict:
        raise CorruptIndex(_NO_TREE)
    tree = _Tree()
    for path in sorted(index.tree, key=str):
        if type(path) is not str:
            raise CorruptIndex(f"{_NO_TREE}: a path is a number")
        if reason := safe_paths.why_not_member(path):
            raise UnsafePath(path, reason)
        parent = path.rpartition("/")[0]
        if parent and parent not in tree.folders:
            raise UnsafePath(path, "which is not in a folder of the tree")
        _read_node(tree, path, index.tree[path], index.tensors)
    return tree


def _read_node(tree: _Tree, path: str, node: Any, tensors: Sequence[TensorSpec]) -> None:
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
                raise CorruptIndex(f"{_NO_TREE}: {path[:200]!r} has no data of its own")
            tree.files[number] = _File(path, mode & MODE, spec.nbytes)
            tree.bytes += spec.nbytes
        case _:
            raise CorruptIndex(f"{_NO_TREE}: {path[:200]!r} is neither file, folder nor link")


def _check_disk(tree: _Tree, folder: Path, force: bool) -> None:
    """Create ``folder``. Raise RefusedPath or StorageError if something there, or too little space, is in the way."""
    fs.make_directory(folder, 0o777)  # less what the umask takes away
    if not safe_paths.is_folder(safe_paths.status(folder)):
        raise RefusedPath(str(folder), "it is not a folder")
    occupied = _occupied(tree, folder)
    if occupied and not force:
        more = f" and {len(occupied) - 1} more" if len(occupied) > 1 else ""
        raise RefusedPath(str(folder / occupied[0]), f"it exists{more}: --force replaces files")
    if pairs := safe_paths.colliding(tree.paths()):
        _check_collisions(folder, pairs)
    free = shutil.disk_usage(folder).free
    if tree.bytes > free:
        error = OSError(errno.ENOSPC, f"it takes {tree.bytes} bytes and {free} are free")
        raise StorageError("check out to", str(folder), error)


def _occupied(tree: _Tree, folder: Path) -> list[str]:
    """Return the paths where files or links would be replaced. Raise RefusedPath for what is never replaced."""
    occupied = []
    for path in _reachable(tree, folder):
        status = safe_paths.status(folder / path)
        if path in tree.folders:
            if status is not None and not safe_paths.is_folder(status):
                raise RefusedPath(str(folder / path), "it is not a folder there, and links are not followed")
        elif safe_paths.is_folder(status):
            raise RefusedPath(str(folder / path), "it is a folder there")
        elif status is not None and not safe_paths.is_replaceable(status):
            raise RefusedPath(str(folder / path), "it is neither a file nor a link there")
        elif status is not None:
            occupied.append(path)
    return occupied


def _reachable(tree: _Tree, folder: Path) -> Iterator[str]:
    """Yield the paths whose parent folders exist and are not links: nothing can be in the way of the others."""
    absent: set[str] = set()
    for path in tree.paths():
        if path.rpartition("/")[0] in absent:
            absent.add(path)
            continue
        yield path
        if path in tree.folders and not safe_paths.is_folder(safe_paths.status(folder / path)):
            absent.add(path)


def _check_collisions(folder: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Raise RefusedPath if this file system takes both paths of a pair for one: the second would replace the first.

    The file system itself is asked, with an empty file of the same name.
    """
    for first, second in pairs:
        if output_file.is_same_file(folder, *(path.replace("/", "-")[-200:] for path in (first, second))):
            raise RefusedPath(str(folder / second), f"here it is the same file as {first}")


class _Checkout:
    """One checkout in progress: folders, then the files in them, then links, and the folders' permissions last."""

    def __init__(self, repo: Repo, folder: Path, tree: _Tree, force: bool) -> None:
        self._repo = repo
        self._folder = folder
        self._tree = tree
        self._force = force
        self._durable = repo.config.store.fsync
        self._unfinished: set[OutputFile] = set()

    def run(self, index: Index, progress: Progress) -> None:
        new_folders = self._make_folders()
        try:
            # this user's alone until the end, and marked: who completes a killed checkout sets their permissions
            with output_file.marking(new_folders):
                self._fill(index, progress)
        finally:
            # from the bottom up: one may forbid writing
            for path, mode in reversed(new_folders.items()):
                fs.set_mode(path, mode)

    def _fill(self, index: Index, progress: Progress) -> None:
        try:
            self._write_files(index, progress)
        finally:
            for output in self._unfinished:
                output.discard()
        for path, target in self._tree.links.items():
            output_file.write_link(self._folder / path, target, replace=self._force)
        if self._durable:
            for name in ("", *self._tree.folders):
                fs.sync_directory(self._folder / name)

    def _make_folders(self) -> dict[Path, int]:
        """Create the folders of the tree; return those that were not there, or unfinished, with their permissions."""
        output_file.remove_leftovers(self._folder)
        paths = {self._folder / path: mode for path, mode in self._tree.folders.items()}
        return {
            path: mode
            for path, mode in paths.items()
            if fs.make_directory(path, stat.S_IRWXU) or output_file.remove_leftovers(path)
        }

    def _write_files(self, index: Index, progress: Progress) -> None:
        with contextlib.closing(self._written_files(index, progress)) as written:
            for _ in map_ahead(self._finish, written, _FINISHERS, ahead=_IN_FLIGHT, name="castore-finish"):
                pass

    def _written_files(self, index: Index, progress: Progress) -> Generator[OutputFile, None, None]:
        """Yield each file once all of its bytes are written; it has no name yet."""
        for file in self._tree.files.values():
            if not file.size:
                yield self._create(file)
        outputs: dict[int, OutputFile] = {}
        done = 0
        for data, pieces in self._read_chunks(index):
            for piece in pieces:
                file = self._tree.files[piece.tensor]
                if piece.start == 0:
                    outputs[piece.tensor] = self._create(file)
                length = piece.stop - piece.start
                outputs[piece.tensor].write([data[piece.at : piece.at + length]])
                if piece.stop == file.size:
                    yield outputs.pop(piece.tensor)
                done += length
            progress(done, self._tree.bytes)

    def _read_chunks(self, index: Index) -> Iterator[tuple[memoryview, list[chunking.Piece]]]:
        """Yield the chunks that hold bytes of files, in order. A tensor that is not a file of the tree isn't read."""
        extents = [
            (spec.offset, spec.nbytes if number in self._tree.files else 0) for number, spec in enumerate(index.tensors)
        ]
        covered = chunking.pieces_by_chunk(extents, [chunk.length for chunk in index.chunks])

        def read(item: tuple[ChunkRef, list[chunking.Piece]]) -> tuple[memoryview, list[chunking.Piece]]:
            chunk, pieces = item
            data = memoryview(bytearray(chunk.length))
            fallback.read_into(self._repo.store, self._repo.remotes, chunk.id, data)
            return data, pieces

        needed = [(chunk, pieces) for chunk, pieces in zip(index.chunks, covered, strict=True) if pieces]
        return map_ahead(read, needed, self._repo.threads)

    def _create(self, file: _File) -> OutputFile:
        output = OutputFile(self._folder / file.path, file.mode)
        self._unfinished.add(output)
        return output

    def _finish(self, output: OutputFile) -> None:
        self._unfinished.remove(output)
        output.finish(replace=self._force, durable=self._durable)
