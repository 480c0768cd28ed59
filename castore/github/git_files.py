"""The files of ``.castore/`` that tell other machines what a session made: which git lacks, and how it gets them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from castore.errors import CorruptionError, NotPushed, StorageError, UsageError
from castore.format import manifest
from castore.format.bundle import MAX_RECORD_BYTES
from castore.format.manifest import Entry
from castore.github.publish import publish
from castore.repo import Repo
from castore.storage import fs, git_commits

MAX_BYTES = max(manifest.MAX_BYTES, MAX_RECORD_BYTES)
"""Bytes of the largest of these files."""

FOLDERS = ("manifests", "pins", "bundles", "sessions")
"""Where in ``.castore/`` they lie."""

_MAX_TEXT_BYTES = 16 << 20


def known(repo: Repo) -> set[str]:
    """Return the files that git has, in the commit checked out or on the branch when it was last fetched."""
    return git_commits.committed(repo.root, FOLDERS) | (_on_remote(repo) or set())


def adopt(repo: Repo, contents: Mapping[str, bytes]) -> tuple[list[str], list[str]]:
    """Add files that another machine made, by path in ``.castore/``.

    Return (paths of those added, what could not be read as what it should be). A path that castore doesn't write is in
    neither.
    """
    added, passed_over = [], []
    for path, data in sorted(contents.items()):
        try:
            if repo.catalog.adopt(path, data):
                added.append(path)
        except (CorruptionError, UsageError) as error:
            passed_over.append(f"{path}: {error}")
    return added, passed_over


def manifest_path(entry: Entry) -> str:
    return f"manifests/{entry.manifest.file_name(entry.id)}"


def list_files(repo: Repo) -> list[str]:
    """Return the files that git should have, relative to the repository. Prepared data can be prepared again: none."""
    paths = [manifest_path(entry) for entry in repo.checkpoints()]
    for name in ("pins", "bundles", "sessions"):
        paths += [path.relative_to(repo.root).as_posix() for path in (repo.root / name).rglob("*") if _is_plain(path)]
    return paths


def read_texts(repo: Repo, paths: Sequence[str]) -> dict[str, str]:
    """Return the texts of files in ``.castore/``, by path, for a bundle to carry: manifests first, up to 16 MiB."""
    texts: dict[str, str] = {}
    size = 0
    for path in sorted(paths, key=lambda path: (not path.startswith("manifests/"), path)):
        with contextlib.suppress(OSError, StorageError, UnicodeDecodeError):  # what is no text isn't castore's
            text = fs.read(repo.root / path, MAX_BYTES).decode()
            size += len(text)
            if size > _MAX_TEXT_BYTES:
                break
            texts[path] = text
    return texts


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.name.isprintable()


def record(
    repo: Repo,
    files: Sequence[str],
    known: Collection[str],
    removed: Sequence[str],
    message: str,
    pause: Callable[[float], None],
) -> tuple[tuple[str, ...], str | None]:
    """Stage those of ``files`` that git doesn't know, or with a ``message`` commit and push them.

    Return (files added or removed, the commit that was pushed).
    """
    added = [path for path in files if path not in known]
    pushed = publish(repo.root, new_to_remote(repo, files, known), removed, message, pause) if message else None
    try:
        git_commits.stage(repo.root, added, removed)
    except NotPushed:  # the index is in use, which is no failure once the same files are pushed
        if not pushed:
            raise
    return (*added, *removed), pushed


def new_to_remote(repo: Repo, files: Sequence[str], known: Collection[str]) -> list[str]:
    """Return the files that this machine made: those that the branch didn't have when it was last fetched.

    Only these are pushed, as what it had then and lacks by now was removed by others.
    """
    published = _on_remote(repo)
    return [path for path in files if path not in (known if published is None else published)]


def _on_remote(repo: Repo) -> set[str] | None:
    """Return the files that the branch had when it was last fetched; None if it never was."""
    try:
        tip = git_commits.known_tip(repo.root, *git_commits.branch(repo.root))
        return git_commits.committed(repo.root, FOLDERS, tip) if tip else None
    except NotPushed:  # no branch is checked out
        return None
