"""A manifest of kind ``files`` -> files and folders on the disk.

The tree comes from an index, which is as hostile as the author of its manifest: :mod:`castore.trees.tree` checks all of
it before anything is written. What is there already as it should be is left alone. What was added once can be had
again, so it may be replaced; what no version holds is somebody's work, and stays unless ``force`` says otherwise. That
is decided before data is read, so each file is looked at once more just before it goes.

A few chunks are in memory at a time, whatever the size of the files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from castore.errors import CastoreError, NotFound, RefusedPath, StorageError
from castore.format import chunking, part_index
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.format.part_index import ChunkRef, Index
from castore.parallel import map_ahead
from castore.policy.order import newest_first
from castore.progress import Progress, ignore_progress
from castore.remotes import fallback
from castore.repo import Repo
from castore.state.parts import locate_errors
from castore.storage import fs, output_file, safe_paths
from castore.storage.output_file import OutputFile
from castore.trees.compare import matching
from castore.trees.tree import KIND, PART, File, Tree, read_tree

_FINISHERS = 8  # a thread that syncs waits for the disk, not for the processor
_IN_FLIGHT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedOut:
    """What :func:`check_out` did.

    ``paths`` are the topmost files, folders and links; ``files``, ``folders``, ``links`` and ``bytes`` are those of the
    whole tree. ``written`` counts the files and links that were not as they should be. ``overwritten`` and ``deleted``
    are what was there and isn't any more, of which no version that was added holds ``lost``.
    """

    id: ObjectId
    paths: tuple[Path, ...]
    files: int
    folders: int
    links: int
    bytes: int
    written: int
    overwritten: tuple[str, ...]
    deleted: tuple[str, ...]
    lost: tuple[str, ...]


def check_out(
    repo: Repo,
    selector: str,
    folder: Path,
    *,
    force: bool = False,
    delete: bool = False,
    progress: Progress = ignore_progress,
) -> CheckedOut:
    """Write the files that ``selector`` names into ``folder``, under the name they were added by, and verify each byte.

    What is there already, byte for byte, is not written again. With ``delete``, what the tree lacks is deleted from its
    folders; other files in ``folder`` are not touched. Each file appears complete or not at all, with the permissions
    it had.

    Raise UnsafePath or CorruptIndex for a tree that could write elsewhere, and RefusedPath if ``folder`` may not be
    written to or something is in the way that no added version holds (``force`` replaces such files and links, never
    folders): then nothing was written. With ``force``, too, raise RefusedPath if a file or link that was to be replaced
    or deleted changed after it was compared: it stays, as does what was written by then. Raise ObjectMissing or
    CorruptObject for data that is missing or damaged.
    """
    safe_paths.check_target(folder)
    entry = repo.find(selector, kind=KIND)
    if PART not in entry.manifest.parts:
        raise NotFound(f"{entry.id[:12]} has no part {PART!r}")
    index_id = entry.manifest.parts[PART].index
    with repo.lock(), locate_errors(PART, entry.id):
        data, frame = fallback.read(repo.store, repo.remotes, index_id)
        index = part_index.decode(data)
        tree = read_tree(index)
        plan = _plan(repo, entry, index, tree, folder, force, delete, progress)
        _Checkout(repo, folder, tree, plan).run(index, progress)
        # last, and only with all of its chunks: without them it would be taken for damage
        if frame is not None and all(repo.store.has(chunk.id) for chunk in index.chunks):
            repo.store.adopt_index(index_id, frame, len(data))
    return CheckedOut(
        id=entry.id,
        paths=tuple(folder / name for name in tree.paths() if "/" not in name),
        files=len(tree.files),
        folders=len(tree.folders),
        links=len(tree.links),
        bytes=tree.bytes,
        written=len(plan.files) + len(plan.links),
        overwritten=tuple(sorted(plan.replaced)),
        deleted=tuple(sorted(plan.deleted)),
        lost=tuple(sorted(plan.lost)),
    )


# -- what to do ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """What differs between a tree and the disk: ``files`` by the number of their tensor, and paths.

    ``replaced`` are those of files and links that exist, ``deleted`` what the tree lacks, both with their status before
    they were compared; ``lost`` are those of both that no other version holds. ``modes`` are of files whose content is
    right and whose permissions are not.
    """

    files: dict[int, File]
    links: dict[str, str]
    modes: dict[str, int]
    replaced: dict[str, os.stat_result]
    deleted: dict[str, os.stat_result]
    lost: set[str]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())


def _plan(
    repo: Repo, entry: Entry, index: Index, tree: Tree, folder: Path, force: bool, delete: bool, progress: Progress
) -> _Plan:
    """Create ``folder`` and look what is there. Raise RefusedPath or StorageError if that, or space, is in the way."""
    fs.make_directory(folder, 0o777)  # less what the umask takes away
    if not safe_paths.is_folder(safe_paths.status(folder)):
        raise RefusedPath(str(folder), "it is not a folder")
    occupied = _occupied(tree, folder)
    right = matching(
        index,
        tree,
        folder,
        set(occupied),
        read=lambda chunk: _read_chunk(repo, chunk),
        threads=repo.threads,
        progress=progress,
    )
    replaced = {path: status for path, status in occupied.items() if path not in right}
    deleted = _surplus(tree, folder) if delete else {}
    lost = _held_by_none(repo, entry, folder, {*replaced, *deleted})
    if lost and not force:
        first, more = min(lost), f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        action = "--force overwrites it" if first in replaced else "--force deletes it"
        raise RefusedPath(
            str(folder / first), f"it exists{more} as no version that was added: `castore add` keeps it, {action}"
        )
    if pairs := safe_paths.colliding(tree.paths()):
        _check_collisions(folder, pairs)
    plan = _Plan(
        files={number: file for number, file in tree.files.items() if file.path not in right},
        links={path: text for path, text in tree.links.items() if path not in right},
        modes={
            file.path: file.mode
            for file in tree.files.values()
            if file.path in right and stat.S_IMODE(occupied[file.path].st_mode) != file.mode
        },
        replaced=replaced,
        deleted=deleted,
        lost=lost,
    )
    free = shutil.disk_usage(folder).free
    if plan.bytes > free:
        error = OSError(errno.ENOSPC, f"it takes {plan.bytes} bytes and {free} are free")
        raise StorageError("check out to", str(folder), error)
    return plan


def _occupied(tree: Tree, folder: Path) -> dict[str, os.stat_result]:
    """Return what exists where files and links belong. Raise RefusedPath for what is never replaced."""
    occupied = {}
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
            occupied[path] = status
    return occupied


def _reachable(tree: Tree, folder: Path) -> Iterator[str]:
    """Yield the paths whose parent folders exist and are not links: nothing can be in the way of the others."""
    absent: set[str] = set()
    for path in tree.paths():
        if path.rpartition("/")[0] in absent:
            absent.add(path)
            continue
        yield path
        if path in tree.folders and not safe_paths.is_folder(safe_paths.status(folder / path)):
            absent.add(path)


def _surplus(tree: Tree, folder: Path) -> dict[str, os.stat_result]:
    """Return the files and links in the tree's folders that the tree lacks, with their status.

    Raise RefusedPath for a device or pipe. Folders named .git and .castore are passed over, as they are never added.
    """
    known = set(tree.paths())
    surplus = {}
    pending = [path for path in tree.folders if "/" not in path]
    while pending:
        parent = pending.pop()
        for item in fs.scan(folder / parent):
            path = f"{parent}/{item.name}"
            status = safe_paths.status(folder / path)
            if status is None or safe_paths.is_reserved(item.name) or output_file.is_leftover(item.name):
                continue
            if safe_paths.is_folder(status):
                pending.append(path)
            elif path not in known and not safe_paths.is_replaceable(status):
                raise RefusedPath(str(folder / path), "it is neither a file nor a link: delete it yourself")
            elif path not in known:
                surplus[path] = status
    return surplus


def _held_by_none(repo: Repo, entry: Entry, folder: Path, paths: set[str]) -> set[str]:
    """Return those of ``paths`` whose content is that of no version whose data is in the store, and good.

    Nothing in the store changes: what is only in the trash may be deleted for good at any moment.
    """
    lost = set(paths)
    names = {path.partition("/")[0] for path in paths}
    for other in newest_first(repo.catalog.listing().entries):
        if not lost:
            break
        if other.id == entry.id or other.manifest.kind != KIND or other.manifest.info.get("name") not in names:
            continue
        with contextlib.suppress(CastoreError):  # one that is damaged or gone holds nothing
            index = part_index.decode(repo.store.read(other.manifest.parts[PART].index, mend=False))
            lost -= matching(
                index,
                read_tree(index),
                folder,
                lost,
                holds=lambda chunk: _holds(repo, chunk),
                read=lambda chunk: _read_held(repo, chunk),
                threads=repo.threads,
            )
    return lost


def _holds(repo: Repo, chunk: ChunkRef) -> bool:
    """Whether the store has a good copy of a chunk: it is read, as a damaged one may be all that is left."""
    return repo.store.is_verified(chunk.id) or _read_held(repo, chunk) is not None


def _read_held(repo: Repo, chunk: ChunkRef) -> memoryview | None:
    try:
        return memoryview(repo.store.read(chunk.id, mend=False))
    except CastoreError:  # damaged or gone
        return None


def _read_chunk(repo: Repo, chunk: ChunkRef) -> memoryview:
    data = memoryview(bytearray(chunk.length))
    fallback.read_into(repo.store, repo.remotes, chunk.id, data)
    return data


def _check_collisions(folder: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Raise RefusedPath if this file system takes both paths of a pair for one: the second would replace the first.

    The file system itself is asked, with an empty file of the same name.
    """
    for first, second in pairs:
        if output_file.is_same_file(folder, *(path.replace("/", "-")[-200:] for path in (first, second))):
            raise RefusedPath(str(folder / second), f"here it is the same file as {first}")


# -- doing it --------------------------------------------------------------------------------------------------------


class _Checkout:
    """One checkout in progress: folders, the files in them, links, what is deleted; the folders' permissions last."""

    def __init__(self, repo: Repo, folder: Path, tree: Tree, plan: _Plan) -> None:
        self._repo = repo
        self._folder = folder
        self._tree = tree
        self._plan = plan
        self._durable = repo.config.store.fsync
        self._unfinished: dict[OutputFile, os.stat_result | None] = {}
        """Files in the making, with the status of what each replaces, if it does."""

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
        for path, target in self._plan.links.items():
            seen = self._plan.replaced.get(path)
            output_file.write_link(self._folder / path, target, replace=seen is not None, seen=seen)
        for path, mode in self._plan.modes.items():
            fs.set_mode(self._folder / path, mode)
        self._delete()
        if self._durable and (self._plan.files or self._plan.links or self._plan.deleted):
            for name in ("", *self._tree.folders):
                fs.sync_directory(self._folder / name)

    def _delete(self) -> None:
        """Delete what the tree lacks, and the folders that are empty then."""
        for path, seen in self._plan.deleted.items():
            output_file.check_unchanged(self._folder / path, seen)
            fs.unlink(self._folder / path)
        emptied = {str(parent) for path in self._plan.deleted for parent in PurePosixPath(path).parents[:-1]}
        for path in sorted(emptied - set(self._tree.folders), reverse=True):
            fs.remove_directory(self._folder / path)

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
        for file in self._plan.files.values():
            if not file.size:
                yield self._create(file)
        outputs: dict[int, OutputFile] = {}
        done, total = 0, self._plan.bytes
        for data, pieces in self._read_chunks(index):
            for piece in pieces:
                file = self._plan.files[piece.tensor]
                if piece.start == 0:
                    outputs[piece.tensor] = self._create(file)
                length = piece.stop - piece.start
                outputs[piece.tensor].write([data[piece.at : piece.at + length]])
                if piece.stop == file.size:
                    yield outputs.pop(piece.tensor)
                done += length
            progress(done, total)

    def _read_chunks(self, index: Index) -> Iterator[tuple[memoryview, list[chunking.Piece]]]:
        """Yield the chunks that hold bytes of files, in order. Those of no file to write aren't read."""
        extents = [
            (spec.offset, spec.nbytes if number in self._plan.files else 0) for number, spec in enumerate(index.tensors)
        ]
        covered = chunking.pieces_by_chunk(extents, [chunk.length for chunk in index.chunks])

        def read(item: tuple[ChunkRef, list[chunking.Piece]]) -> tuple[memoryview, list[chunking.Piece]]:
            chunk, pieces = item
            return _read_chunk(self._repo, chunk), pieces

        needed = [(chunk, pieces) for chunk, pieces in zip(index.chunks, covered, strict=True) if pieces]
        return map_ahead(read, needed, self._repo.threads)

    def _create(self, file: File) -> OutputFile:
        output = OutputFile(self._folder / file.path, file.mode)
        self._unfinished[output] = self._plan.replaced.get(file.path)
        return output

    def _finish(self, output: OutputFile) -> None:
        seen = self._unfinished.pop(output)
        output.finish(replace=seen is not None, durable=self._durable, seen=seen)
