"""Decide where files may be written: paths that come from data, and targets that a user names.

Paths from data are hostile. Whether one is allowed is decided by its text alone, before anything is written; what is on
the disk already is only looked at, and a symbolic link is never followed. Races with other processes of the same user
are out of scope: such a process can write wherever it likes itself.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from castore.errors import RefusedPath, StorageError

# macOS ignores these in file names: there ".g<U+200C>it" is .git
_IGNORED = re.compile("[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]")
_MAX_NAME = 255


def is_reserved(name: str) -> bool:
    """Return whether some file system takes ``name`` for ``.git`` or ``.castore``, where a file can run programs."""
    return _IGNORED.sub("", name).casefold().rstrip(". ") in (".git", ".castore", "git~1")


def why_not_member(path: str) -> str:
    """Return why ``path`` is not allowed in a tree; empty if it is relative, plain and outside ``.git``."""
    for name in path.split("/"):
        if name in ("", ".", ".."):
            return "an absolute path" if path.startswith("/") else f"a path with the component {name!r}"
        if "\0" in name or len(name.encode(errors="surrogatepass")) > _MAX_NAME:
            return "a path with a component that no file system accepts"
        if is_reserved(name):
            return "a path inside .git or .castore"
    return ""


def why_not_link(path: str, target: str) -> str:
    """Return why a link at ``path`` in a tree may not say ``target``, or an empty string if it stays in the tree.

    Leading ``..`` are allowed: they go up through real folders. A later ``..`` is not, as the path may have gone down
    through another link before it, whose parent is elsewhere.
    """
    names = [name for name in target.split("/") if name not in ("", ".")]
    levels_up = next((i for i, name in enumerate(names) if name != ".."), len(names))
    if not target or "\0" in target:
        return "a link to nothing"
    if target.startswith("/"):
        return f"a link to the absolute path {target[:200]!r}"
    # one level stays: everything added is below the name it was added by
    if levels_up > path.count("/") - 1 or ".." in names[levels_up:]:
        return f"a link that leads out of it, to {target[:200]!r}"
    if any(map(is_reserved, names)):
        return "a link into .git or .castore"
    return ""


def collision_key(path: str) -> str:
    """Return a key that is equal for paths a file system that ignores case, or composes accents, would merge."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def colliding(paths: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of paths that some file systems merge, since they differ in case or composition of accents only.

    >>> colliding(["data/a", "data/A", "b"])
    [('data/a', 'data/A')]
    """
    first: dict[str, str] = {}
    return [(first[key], path) for path in paths if first.setdefault(key := collision_key(path), path) != path]


def check_target(target: Path) -> None:
    """Raise RefusedPath if ``target``, which a user named, is or leads through a symbolic link, .git or .castore.

    Of a relative path every component is checked for links, of an absolute path the last one: systems have links
    further up.
    """
    checked = [target] if target.is_absolute() else [target, *target.parents]
    for path in checked:
        if path.is_symlink():
            raise RefusedPath(str(target), f"{path} is a symbolic link, and links are not followed")
    if any(map(is_reserved, Path(os.path.realpath(target)).parts)):
        raise RefusedPath(str(target), "it is inside .git or .castore")


def status(path: Path) -> os.stat_result | None:
    """Return what is at ``path`` itself, without following a link, or None if nothing is. Raise StorageError."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError("look at", str(path), error) from error


def is_replaceable(status: os.stat_result) -> bool:
    """Return whether it is a regular file or a link: a device or pipe is never an earlier output, so it stays."""
    return stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)


def is_file(status: os.stat_result) -> bool:
    """Return whether it is a regular file."""
    return stat.S_ISREG(status.st_mode)


def is_folder(status: os.stat_result | None) -> bool:
    """Return whether the result of :func:`status` is a folder, not a link to one."""
    return status is not None and stat.S_ISDIR(status.st_mode)
