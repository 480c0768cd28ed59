"""What git knows of a folder: the only module that calls git."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from castore.errors import NotPushed, RootsUnreadable, printable

_SECONDS = 10
_LONG_SECONDS = 300

# What git sets for hooks and aliases (`git rev-parse --local-env-vars`): with it, git would answer for another
# repository or index than the one that the folder lies in.
_LOCAL = frozenset(
    (
        "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_CEILING_DIRECTORIES", "GIT_COMMON_DIR", "GIT_DIR", "GIT_GRAFT_FILE",
        "GIT_IMPLICIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_INTERNAL_SUPER_PREFIX", "GIT_NAMESPACE",
        "GIT_NO_REPLACE_OBJECTS", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_QUARANTINE_PATH", "GIT_REPLACE_REF_BASE",
        "GIT_SHALLOW_FILE", "GIT_WORK_TREE",
    )
)  # fmt: skip


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
    real = path.resolve()  # a linked .castore lies where its data does
    return bool(os.environ.get("GIT_DIR")) or any((folder / ".git").exists() for folder in (real, *real.parents))


def index(top: Path, inside: str, names: Sequence[str]) -> Snapshot:
    """What the index of the work tree ``top`` has of ``inside``'s sub-folders ``names``, all sides of a conflict."""
    out = _demand(top, "ls-files", "--stage", "-z", "--full-name", "--", *(f"{inside}/{name}" for name in names))
    files = _files(out, blob_field=1, prefix=f"{inside}/")
    # what `git add --intent-to-add` announces has no content yet
    return Snapshot(f"the index of {top}", {path: blob for path, blob in files.items() if blob not in _EMPTY})


_EMPTY = (
    "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
    "473a0f4c3be8a93681a267e3b1e9a7dcda1185436fe141f7749120a303721813",
)  # the empty blob, by SHA-1 and by SHA-256


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
    """(name, commit or tree)."""
    found = []
    refs = _lines(_demand(folder, "for-each-ref", "--format=%(objectname) %(refname:short)"))
    # to the end of the chain: a tag may be of a tag
    for ref, line in zip(refs, _check(folder, [f"{ref.partition(' ')[0]}^{{}}" for ref in refs]), strict=True):
        own, _, name = ref.partition(" ")
        final, _, kind = line.rpartition(" ")[0].partition(" ")
        if kind not in ("commit", "tree", "blob"):
            raise RootsUnreadable(f"git can't read {name} ({own}): fetch it first, or delete the ref")
        if kind != "blob":
            found.append((name, final))
    if head := _ask(folder, "rev-parse", "--verify", "--quiet", "HEAD"):
        found.append(("HEAD", head))
    # a stash is a commit whose further parents are the index and the untracked files of that moment
    for line in _lines(_demand(folder, "stash", "list", "--format=%gd %H %P")):
        name, own, _, *more = line.split(" ")
        found += [(name, one) for one in (own, *more)]
    for line in _lines(_demand(folder, "worktree", "list", "--porcelain")):
        if line.startswith("HEAD ") and line[5:].strip("0"):
            found.append(("a linked worktree", line[5:]))
    return found + _under_way(Path(_demand(folder, "rev-parse", "--absolute-git-dir").removesuffix("\n")))


def _under_way(git_dir: Path) -> list[tuple[str, str]]:
    """Commits that a merge, a pick or a rebase holds on to without a ref."""
    found = []
    for name in ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REBASE_HEAD", "rebase-merge/autostash", "rebase-apply/autostash"):
        try:
            found += [(name, line.split()[0]) for line in _lines((git_dir / name).read_text())]
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise RootsUnreadable(f"can't read {git_dir / name}: {error}") from error
    return found


def _lines(out: str) -> list[str]:
    # not splitlines(): a branch may be called what that takes for the end of a line
    return [line for line in out.split("\n") if line]


def worktrees(folder: Path) -> tuple[str, list[Path]]:
    """Where ``folder`` lies in its work tree, and the tops of all work trees of its repository, its own first."""
    top = Path(_demand(folder, "rev-parse", "--show-toplevel").removesuffix("\n")).resolve()
    out = _demand(folder, "worktree", "list", "--porcelain", "-z")
    paths = [Path(line[9:]) for line in out.split("\0") if line.startswith("worktree ")]
    others = [path for path in paths if path.resolve() != top and (path / ".git").exists()]
    return str(folder.resolve().relative_to(top)), [top, *others]


def blobs(folder: Path, wanted: Mapping[str, str], limit: int) -> dict[str, bytes]:
    """The content of each blob; ``wanted`` has where each is found, to name it.

    RootsUnreadable when one isn't there, as in a partial clone, or is larger than ``limit`` bytes.
    """
    ids = list(wanted)
    if not ids:
        return {}
    for line in _check(folder, ids):
        own, _, length = line.partition(" blob ")
        if not length:
            one = line.partition(" ")[0]
            raise RootsUnreadable(f"git has no blob {one} of {wanted.get(one)} (a partial clone?): fetch it first")
        if int(length) > limit:
            raise RootsUnreadable(f"{wanted[own]} has {length} bytes, more than a manifest can have: remove it")
    out = memoryview(_demand_bytes(folder, ["cat-file", "--batch"], "\n".join(ids).encode() + b"\n"))
    found = {}
    at = 0
    for one in ids:
        end = bytes(out[at : at + 200]).index(b"\n")
        header = bytes(out[at : at + end]).decode().split(" ")
        if len(header) != 3 or header[1] != "blob":
            raise RootsUnreadable(f"git has no blob {one} of {wanted[one]}: fetch it first")
        size, start = int(header[2]), at + end + 1
        found[one] = bytes(out[start : start + size])
        at = start + size + 1
    return found


def _check(folder: Path, names: Sequence[str]) -> list[str]:
    """What each name is: "object kind size", or something else."""
    given = "".join(f"{name}\n" for name in names).encode()
    return _lines(os.fsdecode(_demand_bytes(folder, ["cat-file", "--batch-check"], given)))


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
        # the name of a folder may look like a pattern
        done = _run(folder, ["--literal-pathspecs", *arguments], given=given, seconds=_LONG_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RootsUnreadable(f"git {arguments[0]} failed: {error}") from error
    if done.returncode:
        said = _lines(os.fsdecode(done.stderr)) or [f"exit {done.returncode}"]
        raise RootsUnreadable(f"git {arguments[0]} failed: {next((one for one in said if 'fatal:' in one), said[-1])}")
    return done.stdout


def _run(
    path: Path,
    arguments: Sequence[str],
    *,
    seconds: int,
    given: bytes = b"",
    looking: bool = True,
    extra: Mapping[str, str] | None = None,
    secrets: bool = False,
) -> subprocess.CompletedProcess[bytes]:
    # hooks and helpers are programs of others: what a job may do with GitHub's cache is none of their business
    environment = {
        name: value for name, value in os.environ.items() if name not in _LOCAL and not name.startswith("ACTIONS_")
    } | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", **(extra or {})}
    if not secrets:
        environment = _without_secrets(environment)
    if looking:
        # a promisor remote isn't asked: what is here decides; and no lock is taken for a look
        environment |= {"GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(
        ["git", "-C", str(path), "-c", "core.quotePath=false", *arguments],
        input=given, capture_output=True, timeout=seconds, check=False, env=environment,
    )  # fmt: skip


# -- handing on ------------------------------------------------------------------------------------------------------
#
# Commits are made without the work tree: whatever lies in it, is staged or is under way stays as it is. Files that
# castore commits are new ones with names that nobody else gives, so they fit on top of whatever others have pushed.

_PUSHES = 6
_BOT = ("github-actions[bot]", "41898282+github-actions[bot]@users.noreply.github.com")
_ADDRESS = re.compile(r"://[^\s/@]*@")  # it may have a password in it


def committed(folder: Path, names: Sequence[str], commit: str = "HEAD") -> set[str]:
    """Paths below ``folder`` of the files that a commit has in its sub-folders ``names``. NotPushed when git fails."""
    if not _ask(folder, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"):
        return set()  # before the first commit
    prefix = _act(folder, "rev-parse", "--show-prefix").removesuffix("\n")
    wanted = [prefix + name for name in names]
    out = _act(
        folder, "--literal-pathspecs", "ls-tree", "-r", "-z", "--full-tree", "--name-only", commit, "--", *wanted
    )
    return {path.removeprefix(prefix) for path in out.split("\0") if path}


def stage(folder: Path, added: Sequence[str], removed: Sequence[str]) -> None:
    """Put files below ``folder``, or their removal, into the index, even ones that git ignores. NotPushed."""
    for paths, command in ((added, ["add", "-f"]), (removed, ["rm", "--cached", "--ignore-unmatch", "-q"])):
        if paths:
            given = b"".join(os.fsencode(path) + b"\0" for path in paths)
            options = ["--pathspec-from-file=-", "--pathspec-file-nul"]
            _act(folder, "--literal-pathspecs", *command, *options, given=given)


def branch(folder: Path) -> tuple[str, str]:
    """(remote, branch) that a push goes to. NotPushed when no branch is checked out, or there is no such remote."""
    name = (_ask(folder, "symbolic-ref", "--quiet", "HEAD") or "").removeprefix("refs/heads/")
    if not name:
        raise NotPushed("no branch is checked out (this is how a pull request or a tag is)")
    remotes = (_ask(folder, "remote") or "").split()
    upstream = _ask(folder, "config", "--get", f"branch.{name}.remote")
    for remote in (upstream, "origin", *(remotes if len(remotes) == 1 else ())):
        if remote in remotes:
            return str(remote), name
    raise NotPushed(f"it isn't known where to: of the remotes ({', '.join(remotes) or 'none'}) none is origin")


def publish(
    folder: Path, files: Sequence[str], removed: Sequence[str], message: str, pause: Callable[[float], None]
) -> str:
    """Commit ``files`` and the absence of ``removed``, paths below ``folder``, and push the branch that is checked out.

    What others have pushed meanwhile stays: the commit is made anew on top of it. Returns the commit that was pushed,
    which need not be new. NotPushed after ``_PUSHES`` tries, or at once when the other side forbids it.
    """
    import random

    remote, name = branch(folder)
    reason = ""
    base = "HEAD"
    for attempt in range(_PUSHES):
        if attempt:
            pause(min(2.0**attempt, 20.0) * random.uniform(0.2, 0.6))  # many sessions may have ended at once
        try:
            own = _commit(folder, base, files, removed, message)
            if base == "HEAD":
                _act(folder, "update-ref", "-m", "castore", f"refs/heads/{name}", own)
            _act(folder, *_QUIET, "push", "--quiet", remote, f"{own}:refs/heads/{name}", network=True)
            return own
        except NotPushed as error:
            reason = error.reason
            if any(word in reason for word in ("[remote rejected]", "denied", "Authentication failed")) and (
                "lock" not in reason
            ):
                raise
        try:
            _act(folder, *_QUIET, "fetch", "--quiet", remote, f"refs/heads/{name}", network=True)
            base = _act(folder, "rev-parse", "FETCH_HEAD").strip()
        except NotPushed:
            continue  # the next push tells what is wrong
    raise NotPushed(f"{reason} ({_PUSHES} tries)")


_QUIET = ("-c", "core.hooksPath=/dev/null")  # hooks are for the commits of people, and may not see what pushing takes


def _commit(folder: Path, base: str, files: Sequence[str], removed: Sequence[str], message: str) -> str:
    """A commit on top of ``base`` in which the files are; ``base`` itself when they are there already."""
    import tempfile

    head = _ask(folder, "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    names = sorted({path.partition("/")[0] for path in (*files, *removed)})
    there = committed(folder, names, head) if head and names else set()
    new, gone = [path for path in files if path not in there], [path for path in removed if path in there]
    if not new and not gone:
        if head is None:
            raise NotPushed("there is nothing to commit")
        return head
    prefix = _act(folder, "rev-parse", "--show-prefix").removesuffix("\n")
    given = "".join(f"{folder / path}\n" for path in new).encode()
    blobs = _act(folder, "hash-object", "-w", "--no-filters", "--stdin-paths", given=given).split()
    lines = [f"100644 {blob}\t{prefix}{path}\0" for blob, path in zip(blobs, new, strict=True)]
    lines += [f"0 {'0' * len(blobs[0] if blobs else str(head))}\t{prefix}{path}\0" for path in gone]
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        if head:
            _act(folder, "read-tree", head, extra=index)
        _act(folder, "update-index", "-z", "--index-info", given="".join(lines).encode(), extra=index)
        tree = _act(folder, "write-tree", extra=index).strip()
    parents = ["-p", head] if head else []
    return _act(folder, *_identity(folder), "commit-tree", tree, *parents, "-F", "-", given=message.encode()).strip()


def _identity(folder: Path) -> list[str]:
    if all(_ask(folder, "config", "--get", f"user.{one}") for one in ("name", "email")):
        return []
    return ["-c", f"user.name={_BOT[0]}", "-c", f"user.email={_BOT[1]}"]


def _act(
    folder: Path,
    *arguments: str,
    given: bytes = b"",
    extra: Mapping[str, str] | None = None,
    network: bool = False,
) -> str:
    """What git prints. NotPushed, with what it says, when it fails. Only the ``network`` needs to know passwords."""
    what = next(one for one in arguments if one[0] != "-" and "=" not in one)
    try:
        done = _run(
            folder, arguments, given=given, seconds=_LONG_SECONDS, looking=False, extra=extra or {}, secrets=network
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotPushed(f"git {what}: {type(error).__name__}") from error
    if done.returncode:
        said = _ADDRESS.sub("://", " ".join(os.fsdecode(done.stderr or done.stdout).split()))
        raise NotPushed(f"git {what}: {printable(said)[:500] or f'exit {done.returncode}'}")
    return os.fsdecode(done.stdout)


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the settings for git in it that send a header, which is how a token is handed to it."""
    kept = {name: value for name, value in environment.items() if not name.startswith(_SETTINGS)}
    numbers = range(int(environment.get("GIT_CONFIG_COUNT") or 0))
    pairs = [
        (environment.get(f"GIT_CONFIG_KEY_{i}", ""), environment.get(f"GIT_CONFIG_VALUE_{i}", "")) for i in numbers
    ]
    pairs = [pair for pair in pairs if not pair[0].lower().endswith("extraheader")]
    for i, (key, value) in enumerate(pairs):
        kept |= {f"GIT_CONFIG_KEY_{i}": key, f"GIT_CONFIG_VALUE_{i}": value}
    return kept | ({"GIT_CONFIG_COUNT": str(len(pairs))} if pairs else {})


_SETTINGS = ("GIT_CONFIG_COUNT", "GIT_CONFIG_KEY_", "GIT_CONFIG_VALUE_")


def problem(path: Path) -> str:
    """Why git doesn't take ``path`` for a part of a work tree; empty when it does."""
    try:
        done = _run(path, ["rev-parse", "--show-toplevel"], seconds=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"git can't be run: {type(error).__name__}"
    return "" if done.returncode == 0 else printable(" ".join(os.fsdecode(done.stderr).split()))[:500]


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


def is_committed(path: Path) -> bool:
    """Whether the commit that is checked out has a file ``path``; False when git fails, too."""
    return _ask(path.parent, "cat-file", "-e", f"HEAD:./{path.name}") is not None
