"""What git knows of a folder: the only module that calls git."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from castore.errors import RootsUnreadable

_SECONDS = 10
_LONG_SECONDS = 300


def root(path: Path) -> Path | None:
    """The top of the git work tree that ``path`` lies in, if any."""
    top = _ask(path, "rev-parse", "--show-toplevel")
    return Path(top) if top else None


def commit(path: Path) -> str | None:
    """The commit checked out at ``path``, with ``-dirty`` when tracked files differ from it."""
    head = _ask(path, "rev-parse", "--verify", "--quiet", "HEAD")
    if not head:
        return None
    changed = _ask(path, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed else head


def _ask(path: Path, *arguments: str) -> str | None:
    """What git prints, without the last newline; None when it fails or isn't installed."""
    try:
        done = _run(path, arguments, seconds=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return os.fsdecode(done.stdout).removesuffix("\n") if done.returncode == 0 else None


# -- everything that git still holds ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Files below a folder as one ref, stash or index has them: path relative to the folder -> blob."""

    name: str
    files: dict[str, str]


def is_inside(path: Path) -> bool:
    """Whether ``path`` lies in a git work tree, told without git: it may be that git fails."""
    return bool(os.environ.get("GIT_DIR")) or any((folder / ".git").exists() for folder in (path, *path.parents))


def index(folder: Path, names: Sequence[str]) -> Snapshot:
    """What the index has of ``folder``'s sub-folders ``names``, every side of a conflict included."""
    out = _demand(folder, "ls-files", "--stage", "-z", "--", *names)
    return Snapshot("the index", _files(out, blob_field=1, prefix=""))


def tips(folder: Path, names: Sequence[str]) -> list[Snapshot]:
    """The same for HEAD, every branch (local and remote-tracking), tag and stash, and HEAD of linked worktrees.

    Tips and not history, so that a shallow clone is as good as a full one. RootsUnreadable when git fails.
    """
    prefix = _demand(folder, "rev-parse", "--show-prefix").removesuffix("\n")
    found: dict[str, Snapshot] = {}
    for name, commit_id in _tips(folder):
        if commit_id not in found:
            wanted = [prefix + one for one in names]
            out = _demand(folder, "ls-tree", "-r", "-z", "--full-tree", commit_id, "--", *wanted)
            found[commit_id] = Snapshot(name, _files(out, blob_field=2, prefix=prefix))
    return list(found.values())


def _tips(folder: Path) -> list[tuple[str, str]]:
    """(name, commit)."""
    form = "%(objecttype) %(objectname) %(*objecttype) %(*objectname) %(refname:short)"
    found = []
    for line in _demand(folder, "for-each-ref", f"--format={form}").splitlines():
        kind, own, peeled_kind, peeled, name = line.split(" ", 4)
        if "commit" in (kind, peeled_kind):
            found.append((name, own if kind == "commit" else peeled))
    if head := _ask(folder, "rev-parse", "--verify", "--quiet", "HEAD"):
        found.append(("HEAD", head))
    # a stash is a commit whose further parents are the index and the untracked files of that moment
    for line in _demand(folder, "stash", "list", "--format=%gd %H %P").splitlines():
        name, own, _, *more = line.split(" ")
        found += [(name, one) for one in (own, *more)]
    for line in _demand(folder, "worktree", "list", "--porcelain").splitlines():
        if line.startswith("HEAD ") and line[5:].strip("0"):
            found.append(("a linked worktree", line[5:]))
    return found


def linked_worktrees(folder: Path) -> list[Path]:
    """Where ``folder`` is in the other worktrees of its repository, for those in which it exists."""
    top = _demand(folder, "rev-parse", "--show-toplevel").removesuffix("\n")
    inside = folder.resolve().relative_to(Path(top).resolve())
    out = _demand(folder, "worktree", "list", "--porcelain", "-z")
    paths = [Path(line[9:]) for line in out.split("\0") if line.startswith("worktree ")]
    return [path / inside for path in paths if path.resolve() != Path(top).resolve() and (path / inside).is_dir()]


def blobs(folder: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """The content of each blob. RootsUnreadable when one isn't there, as in a partial clone."""
    ids = list(dict.fromkeys(wanted))
    if not ids:
        return {}
    out = memoryview(_demand_bytes(folder, ["cat-file", "--batch"], "\n".join(ids).encode() + b"\n"))
    found = {}
    at = 0
    for one in ids:
        end = bytes(out[at : at + 200]).index(b"\n")
        header = bytes(out[at : at + end]).decode().split(" ")
        if len(header) != 3 or header[1] != "blob":
            raise RootsUnreadable(f"git has no blob {one} (a partial clone?): fetch it first")
        size, start = int(header[2]), at + end + 1
        found[one] = bytes(out[start : start + size])
        at = start + size + 1
    return found


def _files(out: str, *, blob_field: int, prefix: str) -> dict[str, str]:
    """Regular files only: a link can't be a manifest or a pin."""
    found = {}
    for number, line in enumerate(one for one in out.split("\0") if one):
        fields, path = line.split("\t", 1)
        mode, *rest = fields.split(" ")
        if mode.startswith("100"):
            name = path.removeprefix(prefix)
            # the sides of a conflict have the same path
            found[name if name not in found else f"{name}?{number}"] = rest[blob_field - 1]
    return found


def _demand(folder: Path, *arguments: str) -> str:
    return os.fsdecode(_demand_bytes(folder, arguments))


def _demand_bytes(folder: Path, arguments: Sequence[str], given: bytes = b"") -> bytes:
    """What git prints; RootsUnreadable when it fails."""
    try:
        done = _run(folder, arguments, given=given, seconds=_LONG_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RootsUnreadable(f"git {arguments[0]} failed: {error}") from error
    if done.returncode:
        said = os.fsdecode(done.stderr).strip().splitlines()
        raise RootsUnreadable(f"git {arguments[0]} failed: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout


def _run(
    path: Path, arguments: Sequence[str], *, seconds: int, given: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    # a promisor remote isn't asked: what is here decides; and no lock is taken for a look
    environment = os.environ | {"GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    return subprocess.run(
        ["git", "-C", str(path), "-c", "core.quotePath=false", *arguments],
        input=given, capture_output=True, timeout=seconds, check=False, env=environment,
    )  # fmt: skip


# -- what a person may want to know ----------------------------------------------------------------------------------


def is_ignored(path: Path) -> bool:
    """Whether git passes over ``path``, which it doesn't track."""
    return _ask(path.parent, "check-ignore", "-q", "--", path.name) is not None


def uncommitted(folder: Path, names: Sequence[str]) -> list[str] | None:
    """Files below ``folder``'s sub-folders ``names`` that differ from the last commit; None when git fails."""
    out = _ask(folder, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", *names)
    return None if out is None else [line[3:] for line in out.split("\0") if line]


def tracked(folder: Path, names: Sequence[str]) -> list[str] | None:
    """Files below ``folder``'s sub-folders ``names`` that git tracks; None when it fails."""
    out = _ask(folder, "ls-files", "-z", "--", *names)
    return None if out is None else [path for path in out.split("\0") if path]
