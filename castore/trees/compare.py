"""Which paths on the disk already are as a tree says, found by hashing them: data is read only where a hash differs."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from castore.format import chunking
from castore.format.chunking import Piece
from castore.format.ids import hash_bytes
from castore.format.part_index import ChunkRef, Index
from castore.parallel import map_ahead
from castore.progress import Progress, ignore_progress
from castore.storage import safe_paths
from castore.trees.tree import Tree


def matching(
    index: Index,
    tree: Tree,
    folder: Path,
    paths: Collection[str],
    *,
    read: Callable[[ChunkRef], memoryview | None],
    threads: int,
    holds: Callable[[ChunkRef], bool] | None = None,
    progress: Progress = ignore_progress,
) -> set[str]:
    """Return those of ``paths`` that are a file or link of ``tree`` with that very content, below ``folder``.

    Permissions may differ. A chunk whose hash matches is not read; if ``holds`` denies it, it matches nothing all the
    same. ``read`` is asked for a chunk whose hash does not match, as another file in it may be the one that differs;
    None stands for one that can't be read.
    """
    files = {
        number: folder / file.path
        for number, file in tree.files.items()
        if file.path in paths and _size(folder / file.path) == file.size
    }
    extents = [(spec.offset, spec.nbytes if number in files else 0) for number, spec in enumerate(index.tensors)]
    covered = chunking.pieces_by_chunk(extents, [chunk.length for chunk in index.chunks])

    def differing(item: tuple[ChunkRef, list[Piece]]) -> set[int]:
        chunk, pieces = item
        there = [_read(files[piece.tensor], piece) for piece in pieces]
        if _fill(pieces, chunk.length) and hash_bytes(b"".join(there)) == chunk.id:
            return set() if holds is None or holds(chunk) else {piece.tensor for piece in pieces}
        data = read(chunk)
        return {
            piece.tensor
            for piece, content in zip(pieces, there, strict=True)
            if data is None or content != data[piece.at : piece.at + piece.stop - piece.start]
        }

    needed = [(chunk, pieces) for chunk, pieces in zip(index.chunks, covered, strict=True) if pieces]
    total = sum(size for _, size in extents)
    done = 0
    changed: set[int] = set()
    for (_, pieces), found in zip(needed, map_ahead(differing, needed, threads), strict=True):
        changed |= found
        done += sum(piece.stop - piece.start for piece in pieces)
        progress(done, total)
    return {tree.files[number].path for number in files if number not in changed} | {
        path for path in paths if path in tree.links and tree.links[path] == _link_text(folder / path)
    }


def _fill(pieces: Sequence[Piece], length: int) -> bool:
    """Whether the pieces, one after the other, are all of a chunk."""
    at = 0
    for piece in pieces:
        if piece.at != at:
            return False
        at += piece.stop - piece.start
    return at == length


def _size(path: Path) -> int | None:
    status = safe_paths.status(path)
    return status.st_size if status is not None and safe_paths.is_file(status) else None


def _link_text(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _read(path: Path, piece: Piece) -> bytes:
    """Return the bytes of a piece of a file; fewer, or none, where it can't be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, piece.stop - piece.start, piece.start)
    except OSError:
        return b""
    finally:
        os.close(descriptor)
