"""What git knows of a folder. Nothing here changes a repository, fetches anything or takes a lock.

Everything raises BareRepository where a folder passes for a repository that a commit has brought.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from castore.errors import BareRepository, GitUnreadable, printable
from castore.storage.git_process import LONG_SECONDS, SHORT_SECONDS, ask, run, split_lines


def root(path: Path) -> Path | None:
    """Return the top of the git work tree that ``path`` lies in, or None."""
    top = ask(path, "rev-parse", "--show-toplevel")
    return Path(top) if top else None


def commit(path: Path) -> str | None:
    """Return the commit checked out at ``path``, with ``-dirty`` when tracked files differ from it, or None."""
    head = ask(path, "rev-parse", "--verify", "--quiet", "HEAD")
    if not head:
        return None
    changed = ask(path, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed else head


@contextlib.contextmanager
def _understanding() -> Iterator[None]:
    """Raise GitUnreadable when the block can't make sense of what git printed."""
    try:
        yield
    except (ValueError, LookupError, OSError) as error:
        raise GitUnreadable("git printed what castore does not understand: check that git works here") from error


# -- everything that git still holds ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Files below a folder as one ref, stash or index has them: path relative to the folder -> blob.

    ``name`` is for people to read, with whatever can't be printed escaped.
    """

    name: str
    files: dict[str, str]


def is_inside(path: Path) -> bool:
    """Return whether ``path`` lies in a git work tree. Works without git, for when git fails."""
    real = path.resolve()  # a linked .castore lies where its data does
    return bool(os.environ.get("GIT_DIR")) or any((folder / ".git").exists() for folder in (real, *real.parents))


def index(top: Path, inside: str, names: Sequence[str], *, empty: Sequence[str] = ()) -> Snapshot:
    """Return the files that the index of the work tree ``top`` has in the sub-folders ``names`` of ``inside``.

    Empty files are left out but for those in the sub-folders ``empty``. All sides of a conflict are included.
    GitUnreadable when git fails.
    """
    out = _demand(top, "ls-files", "--stage", "-z", "--full-name", "--", *(f"{inside}/{name}" for name in names))
    files = _files(out, blob_field=1, prefix=f"{inside}/")
    # a file of `git add --intent-to-add` has no content yet
    kept = {path: blob for path, blob in files.items() if blob not in _EMPTY or path.partition("/")[0] in empty}
    return Snapshot(printable(f"the index of {top}"), kept)


_EMPTY = (
    "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
    "473a0f4c3be8a93681a267e3b1e9a7dcda1185436fe141f7749120a303721813",
)  # the empty blob, by SHA-1 and by SHA-256


def tips(folder: Path, names: Sequence[str]) -> list[Snapshot]:
    """Return the files at HEAD, at every branch (local and remote-tracking), tag and stash, and in linked worktrees.

    Tips and not history, so that a shallow clone is as good as a full one. GitUnreadable when git fails.
    """
    prefix = _prefix(folder)
    snapshots: dict[str, Snapshot] = {}
    for tip, commit_id in _tips(folder):
        if commit_id not in snapshots:
            snapshots[commit_id] = _snapshot(folder, prefix, tip, commit_id, names)
    return list(snapshots.values())


def files_at(folder: Path, commit_id: str, names: Sequence[str]) -> Snapshot:
    """Return the files that a commit has in the sub-folders ``names`` of ``folder``. GitUnreadable when git fails."""
    return _snapshot(folder, _prefix(folder), commit_id, commit_id, names)


def _prefix(folder: Path) -> str:
    return _demand(folder, "rev-parse", "--show-prefix").removesuffix("\n")


@_understanding()
def _snapshot(folder: Path, prefix: str, tip: str, commit_id: str, names: Sequence[str]) -> Snapshot:
    paths = [prefix + name for name in names]
    out = _demand(folder, "ls-tree", "-r", "-z", "--full-tree", commit_id, "--", *paths)
    return Snapshot(printable(tip), _files(out, blob_field=2, prefix=prefix))


@_understanding()
def _tips(folder: Path) -> list[tuple[str, str]]:
    """Return (name, commit or tree) of everything that git keeps."""
    # before the refs: what is held without one may get one meanwhile, and then be held by that alone
    held = _held_without_ref(folder)
    found = []
    refs = split_lines(_demand(folder, "for-each-ref", "--format=%(objectname) %(refname:short)"))
    # to the end of the chain: a tag may be of a tag
    peeled = _check(folder, [f"{ref.partition(' ')[0]}^{{}}" for ref in refs])
    for ref, line in zip(refs, peeled, strict=True):
        git_id, _, name = ref.partition(" ")
        peeled_id, _, kind = line.rpartition(" ")[0].partition(" ")
        if kind not in ("commit", "tree", "blob"):
            raise GitUnreadable(f"git can't read {name} ({git_id}): fetch it first, or delete the ref")
        if kind != "blob":
            found.append((name, peeled_id))
    return found + held


def _held_without_ref(folder: Path) -> list[tuple[str, str]]:
    """Return (name, commit) of HEAD, of all stashes, of linked worktrees, and of what is in progress."""
    found = []
    if head := ask(folder, "rev-parse", "--verify", "--quiet", "HEAD"):
        found.append(("HEAD", head))
    # a stash is a commit whose further parents are the index and the untracked files of that moment
    for line in split_lines(_demand(folder, "stash", "list", "--format=%gd %H %P")):
        name, stash_id, _, *parents = line.split(" ")
        found += [(name, commit_id) for commit_id in (stash_id, *parents)]
    for line in split_lines(_demand(folder, "worktree", "list", "--porcelain")):
        if line.startswith("HEAD ") and line[5:].strip("0"):
            found.append(("a linked worktree", line[5:]))
    return found + _in_progress(Path(_demand(folder, "rev-parse", "--absolute-git-dir").removesuffix("\n")))


def _in_progress(git_dir: Path) -> list[tuple[str, str]]:
    """Return the commits that a merge, a pick or a rebase in progress holds without a ref."""
    found = []
    for name in ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REBASE_HEAD", "rebase-merge/autostash", "rebase-apply/autostash"):
        try:
            found += [(name, line.split()[0]) for line in split_lines((git_dir / name).read_text())]
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise GitUnreadable(f"can't read {git_dir / name}: {error}") from error
    return found


def altered(folder: Path, names: Sequence[str]) -> list[str] | None:
    """Return the files in ``folder``'s sub-folders ``names`` that the index has with other bytes; None if git fails.

    By a filter or a conversion of line ends, that is: what was changed here since it was added is not among them.
    """
    out = ask(folder, "ls-files", "--stage", "-z", "--", *names)
    changed = ask(folder, "diff", "--name-only", "-z", "--relative", "--no-ext-diff", "--", *names)
    if out is None or changed is None:
        return None
    blobs = _files(out, blob_field=1, prefix="")
    left_out = set(changed.split("\0"))
    paths = [path for path in blobs if path not in left_out and os.path.isfile(folder / path) and "\n" not in path]
    given = "".join(f"{folder / path}\n" for path in paths).encode(errors="surrogateescape")
    try:
        here = _demand_bytes(folder, ["hash-object", "--no-filters", "--stdin-paths"], given).decode().split()
        return [path for path, blob in zip(paths, here, strict=True) if blobs[path] != blob]
    except (GitUnreadable, ValueError):
        return None


@_understanding()
def worktrees(folder: Path) -> tuple[str, list[Path]]:
    """Return where ``folder`` lies in its work tree, and the tops of all its repository's work trees, its own first."""
    top = Path(_demand(folder, "rev-parse", "--show-toplevel").removesuffix("\n")).resolve()
    out = _demand(folder, "worktree", "list", "--porcelain", "-z")
    paths = [Path(line[9:]) for line in out.split("\0") if line.startswith("worktree ")]
    others = [path for path in paths if path.resolve() != top and (path / ".git").exists()]
    return str(folder.resolve().relative_to(top)), [top, *others]


def blobs(folder: Path, places: Mapping[str, str], limit: int, *, leave_out_larger: bool = False) -> dict[str, bytes]:
    """Return the content of each blob of ``places``, which maps blob ids to where each was found, for messages.

    GitUnreadable when one isn't there, as in a partial clone, or is larger than ``limit`` bytes and not to be left out.
    """
    return _contents(folder, "blob", places, limit, leave_out_larger=leave_out_larger)


@_understanding()
def _contents(
    folder: Path, kind: str, places: Mapping[str, str], limit: int, *, leave_out_larger: bool = False
) -> dict[str, bytes]:
    git_ids = []
    for line in _check(folder, list(places)) if places else ():
        git_id, _, length = line.partition(f" {kind} ")
        if not length:
            git_id = line.partition(" ")[0]
            place = places.get(git_id)
            raise GitUnreadable(f"git has no {kind} {git_id} of {place} (a partial clone?): fetch it first")
        if int(length) <= limit:
            git_ids.append(git_id)
        elif not leave_out_larger:
            raise GitUnreadable(f"{places[git_id]} has {length} bytes, where at most {limit} make sense: remove it")
    if not git_ids:
        return {}
    out = memoryview(_demand_bytes(folder, ["cat-file", "--batch"], "\n".join(git_ids).encode() + b"\n"))
    contents = {}
    at = 0
    for git_id in git_ids:
        end = bytes(out[at : at + 200]).index(b"\n")
        header = bytes(out[at : at + end]).decode().split(" ")
        if len(header) != 3 or header[1] != kind:
            raise GitUnreadable(f"git has no {kind} {git_id} of {places[git_id]}: fetch it first")
        size, start = int(header[2]), at + end + 1
        contents[git_id] = bytes(out[start : start + size])
        at = start + size + 1
    return contents


def _check(folder: Path, names: Sequence[str]) -> list[str]:
    """Return a line for each name: "id kind size", or something else when git doesn't have it."""
    given = "".join(f"{name}\n" for name in names).encode()
    return split_lines(os.fsdecode(_demand_bytes(folder, ["cat-file", "--batch-check"], given)))


@_understanding()
def _files(out: str, *, blob_field: int, prefix: str) -> dict[str, str]:
    """Return path -> blob id of the regular files in a listing: a link can't be a manifest or a pin."""
    files: dict[str, str] = {}
    for number, line in enumerate(line for line in out.split("\0") if line):
        fields, path = line.split("\t", 1)
        mode, *rest = fields.split(" ")
        if mode.startswith("100"):
            name = path.removeprefix(prefix)
            # the sides of a conflict have the same path
            files[name if name not in files else f"{name}?{number}"] = rest[blob_field - 1]
    return files


def _demand(folder: Path, *arguments: str) -> str:
    return os.fsdecode(_demand_bytes(folder, arguments))


def _demand_bytes(folder: Path, arguments: Sequence[str], given: bytes = b"") -> bytes:
    """Return what git prints. GitUnreadable when it fails."""
    try:
        # the name of a folder may look like a pattern
        done = run(folder, ["--literal-pathspecs", *arguments], given=given, seconds=LONG_SECONDS)
    except OSError as error:
        raise GitUnreadable(f"git {arguments[0]} failed: {error}") from error
    if done.returncode:
        lines = split_lines(os.fsdecode(done.stderr)) or [f"exit {done.returncode}"]
        # which line is shown; nothing is decided by it
        raise GitUnreadable(
            f"git {arguments[0]} failed: {next((line for line in lines if 'fatal:' in line), lines[-1])}"
        )
    return done.stdout


def problem(path: Path) -> str:
    """Return git's words for why ``path`` is not part of a work tree; empty when it is."""
    try:
        done = run(path, ["rev-parse", "--show-toplevel"], seconds=SHORT_SECONDS)
    except OSError as error:
        return f"git can't be run: {type(error).__name__}"
    except BareRepository as error:
        return str(error)
    return "" if done.returncode == 0 else printable(" ".join(os.fsdecode(done.stderr).split()))[:500]


# -- who vouches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """git's word on the signature of a commit, by the keys that its settings allow; and whose it is.

    ``code`` is ``%G?`` of git-log, such as ``G`` for good and trusted. ``is_accepted``: whether `git verify-commit`
    succeeds, which minds gpg.minTrustLevel, too; ``words`` are git's reasons if it doesn't. ``is_signed``: whether
    there is a signature at all; ``is_ssh``: whether one that was not accepted is of an SSH key.
    """

    code: str
    signer: str
    is_accepted: bool
    words: str = ""
    is_signed: bool = True
    is_ssh: bool = False

    @property
    def is_good(self) -> bool:
        """Whether the commit counts as signed by a key that git is told to trust."""
        # `git verify-commit` alone takes a key of GPG of which nothing is known
        return self.code == "G" and self.is_accepted


@_understanding()
def additions(folder: Path, name: str) -> dict[str, list[tuple[str, str]]]:
    """Return which commits of HEAD's history brought files below ``folder / name``: path -> (commit, blob) pairs.

    Paths are relative to ``folder``. A commit brings a regular file with other bytes than before, too; a merge brings
    only what none of its parents has. Nothing before the first commit. GitUnreadable when git fails, and in a shallow
    clone, whose oldest commit seems to have added everything.
    """
    if _demand(folder, "rev-parse", "--is-shallow-repository").strip() == "true":
        raise GitUnreadable("who brought a manifest isn't known in a shallow clone: `git fetch --unshallow` first")
    if ask(folder, "rev-parse", "--verify", "--quiet", "HEAD") is None:
        return {}
    prefix = _prefix(folder)
    out = _demand(
        folder, "log", "--format=%x00%H", "--raw", "-z", "--no-abbrev", "--no-renames", "--diff-filter=AMT",
        "--diff-merges=combined", "--full-history", "HEAD", "--", name,
    )  # fmt: skip
    brought: dict[str, list[tuple[str, str]]] = {}
    commit_id = change = ""
    for field in out.split("\0"):
        text = field.strip("\n")
        if change:  # asked first, as a path may begin with anything
            if blob := _new_blob(change):
                brought.setdefault(field.removeprefix(prefix), []).append((commit_id, blob))
            change = ""
        elif text.startswith(":"):
            change = text
        elif text:
            commit_id = text
    return brought


def _new_blob(change: str) -> str:
    """Return the blob of a regular file that none of the parents has, by a line of `git log --raw`; empty if it has."""
    fields = change.lstrip(":").split(" ")
    parents = len(change) - len(change.lstrip(":"))
    mode, old, blob = fields[parents], fields[parents + 1 : 2 * parents + 1], fields[2 * parents + 1]
    return blob if mode.startswith("100") and blob not in old else ""


def signatures(folder: Path, commit_ids: Sequence[str]) -> dict[str, Signature]:
    """Return what git says of the signature of each commit. GitUnreadable when git fails."""
    found: dict[str, Signature] = {}
    for start in range(0, len(commit_ids), _AT_ONCE):
        found |= _signatures(folder, commit_ids[start : start + _AT_ONCE])
    return found


_AT_ONCE = 500  # git runs a program or two for each, and has to end in time
_MAX_COMMIT = 1 << 20
_SIGNED = re.compile(rb"^gpgsig(?:-sha256)? (.*)$", re.MULTILINE)


@_understanding()
def _signatures(folder: Path, commit_ids: Sequence[str]) -> dict[str, Signature]:
    given = "".join(f"{commit_id}\n" for commit_id in commit_ids).encode()
    options = ["--stdin", "--no-walk=unsorted", "-z", "--format=%H%x00%G?%x00%GS"]
    fields = os.fsdecode(_demand_bytes(folder, ["log", *options], given)).removesuffix("\0").split("\0")
    shown = {fields[at]: (fields[at + 1], printable(fields[at + 2])) for at in range(0, len(fields), 3)}
    good = [commit_id for commit_id in commit_ids if shown[commit_id][0] == "G"]
    are_all_accepted = bool(good) and _refusal(folder, good) is None
    accepted = {commit_id for commit_id in good if are_all_accepted or _refusal(folder, [commit_id]) is None}
    others = {commit_id: f"commit {commit_id}" for commit_id in commit_ids if commit_id not in accepted}
    texts = _contents(folder, "commit", others, _MAX_COMMIT)
    found = {}
    for commit_id in commit_ids:
        code, signer = shown[commit_id]
        if commit_id in accepted:
            found[commit_id] = Signature(code=code, signer=signer, is_accepted=True)
            continue
        header = _SIGNED.search(texts[commit_id].partition(b"\n\n")[0])
        words = _refusal(folder, [commit_id]) if header else ""
        found[commit_id] = Signature(
            code=code,
            signer=signer,
            is_accepted=words is None,
            words=words or "",
            is_signed=header is not None,
            is_ssh=header is not None and b"SSH SIGNATURE" in header[1],
        )
    return found


def _refusal(folder: Path, commit_ids: Sequence[str]) -> str | None:
    """Return what `git verify-commit` says against any of the commits; None if it accepts all."""
    try:
        done = run(folder, ["verify-commit", *commit_ids], seconds=LONG_SECONDS)
    except OSError as error:
        raise GitUnreadable(f"git verify-commit failed: {error}") from error
    return printable(" ".join(os.fsdecode(done.stderr).split()))[:500] if done.returncode else None


def knows_allowed_signers(folder: Path) -> bool:
    """Return whether git is told whose SSH keys to trust."""
    return bool(ask(folder, "config", "--get", "gpg.ssh.allowedSignersFile"))


# -- for reports to people -----------------------------------------------------------------------------------------


def is_ignored(path: Path) -> bool:
    """Return whether git ignores ``path``, which it doesn't track."""
    return ask(path.parent, "check-ignore", "-q", "--", path.name) is not None


def uncommitted(folder: Path, names: Sequence[str]) -> list[str] | None:
    """Return the files in ``folder``'s sub-folders ``names`` that differ from the last commit; None when git fails."""
    out = ask(folder, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", *names)
    return None if out is None else [line[3:] for line in out.split("\0") if line]


def tracked(folder: Path, names: Sequence[str]) -> list[str] | None:
    """Return the files in ``folder``'s sub-folders ``names`` that git tracks; None when it fails."""
    out = ask(folder, "ls-files", "-z", "--", *names)
    return None if out is None else [path for path in out.split("\0") if path]


def is_committed(path: Path) -> bool:
    """Return whether the commit that is checked out has a file ``path``; False when git fails, too."""
    return ask(path.parent, "cat-file", "-e", f"HEAD:./{path.name}") is not None
