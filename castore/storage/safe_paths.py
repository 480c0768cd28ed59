"""Where files may be written: paths that come from data, and targets that a user names.

Paths from data are hostile. What they may be is decided by their text alone, before anything is written; whatever is on
the disk already is only looked at, and a symbolic link is never followed. Races with other processes of the same user
are out of scope: such a process could write wherever it likes itself.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from castore.errors import RefusedPath, StorageError

# macOS ignores these in file names, so that ".g<U+200C>it" is .git there
_IGNORED = re.compile("[\u200c-\u200f\u202a-\u202e\u206a-\u206f\ufeff]")
_MAX_NAME = 255


def is_reserved(name: str) -> bool:
    """Whether some file system takes ``name`` for ``.git`` or ``.castore``, where files can make programs run."""
    return _IGNORED.sub("", name).casefold().rstrip(". ") in (".git", ".castore", "git~1")


def why_not_member(path: str) -> str:
    """Why ``path`` can't be that of a file in a tree; empty when it can: relative, plain, and outside ``.git``."""
    for name in path.split("/"):
        if name in ("", ".", ".."):
            return "an absolute path" if path.startswith("/") else f"a path with the component {name!r}"
        if "\0" in name or len(name.encode(errors="surrogatepass")) > _MAX_NAME:
            return "a path with a component that no file system takes"
        if is_reserved(name):
            return "a path inside .git or .castore"
    return ""


def why_not_link(path: str, target: str) -> str:
    """Why a link at ``path`` in a tree can't say ``target``; empty when it stays in the tree whatever other links say.

    It may go up with leading ``..``, through what are real folders, and not again after it went down: there it might go
    through another link, and ``..`` of that is elsewhere.
    """
    names = [name for name in target.split("/") if name not in ("", ".")]
    up = next((i for i, name in enumerate(names) if name != ".."), len(names))
    if not target or "\0" in target:
        return "a link to nothing"
    if target.startswith("/"):
        return f"a link to the absolute path {target[:200]!r}"
    # one level stays: what is added is below a name of its own
    if up > path.count("/") - 1 or ".." in names[up:]:
        return f"a link that leads out of it, to {target[:200]!r}"
    if any(map(is_reserved, names)):
        return "a link into .git or .castore"
    return ""


def folded(path: str) -> str:
    """The same for paths that are one on a file system that ignores case or how accents are composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def colliding(paths: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of paths that differ only as :func:`folded` does."""
    first: dict[str, str] = {}
    return [(first[key], path) for path in paths if first.setdefault(key := folded(path), path) != path]


def check_target(target: Path) -> None:
    """RefusedPath unless a user's ``target`` is a place to write to.

    No component of it below where it starts may be a symbolic link, and it may not lie inside .git or .castore; of an
    absolute path the last component counts, since systems have links further up.
    """
    below = [target] if target.is_absolute() else [target, *target.parents]
    for path in below:
        if path.is_symlink():
            raise RefusedPath(str(target), f"{path} is a symbolic link, and links are not followed")
    if any(map(is_reserved, Path(os.path.realpath(target)).parts)):
        raise RefusedPath(str(target), "it is inside .git or .castore")


def status(path: Path) -> os.stat_result | None:
    """What is at ``path`` itself, without following a link; None for nothing. StorageError."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError("look at", str(path), error) from error


def is_replaceable(found: os.stat_result) -> bool:
    """Whether it is a regular file or a link: a device or a pipe is no output of anybody's, and its place matters."""
    return stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)


def is_folder(found: os.stat_result | None) -> bool:
    return found is not None and stat.S_ISDIR(found.st_mode)
