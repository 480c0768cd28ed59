"""Commits and pushes, made without the work tree.

Whatever is changed, staged or in progress in the work tree stays as it is. The files that castore commits are new ones
with names that nobody else gives, so they fit on top of whatever others have pushed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from castore.errors import BareRepository, NotPushed, printable
from castore.storage.git_process import LONG_SECONDS, Done, ask, run, split_lines

_BOT = ("github-actions[bot]", "41898282+github-actions[bot]@users.noreply.github.com")
_CREDENTIALS = re.compile(r"://[^\s/@]*@")
_NO_HOOKS = (
    "-c",
    "core.hooksPath=/dev/null",
)  # hooks are for people's commits, and must not see the credentials of a push


def committed(folder: Path, names: Sequence[str], commit: str = "HEAD") -> set[str]:
    """Return the files, relative to ``folder``, that a commit has in its sub-folders ``names``. NotPushed."""
    if not ask(folder, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"):
        return set()  # before the first commit
    prefix = _act(folder, "rev-parse", "--show-prefix").removesuffix("\n")
    options = ["-r", "-z", "--full-tree", "--name-only"]
    out = _act(folder, "--literal-pathspecs", "ls-tree", *options, commit, "--", *(prefix + name for name in names))
    return {path.removeprefix(prefix) for path in out.split("\0") if path}


def stage(folder: Path, added: Sequence[str], removed: Sequence[str]) -> None:
    """Stage files below ``folder`` byte for byte, even ignored ones, and the removal of others. NotPushed.

    Not by `git add`: a filter or a conversion that someone has set for all files would stage other bytes.
    """
    if added or removed:
        prefix = _act(folder, "rev-parse", "--show-prefix").removesuffix("\n")
        given = _index_lines(folder, prefix, added, removed)
        _act(folder, "update-index", "-z", "--index-info", given=given)


def _index_lines(folder: Path, prefix: str, added: Sequence[str], removed: Sequence[str]) -> bytes:
    """Return what `git update-index --index-info` takes to add files with their very bytes, and to remove others."""
    paths = "".join(f"{folder / path}\n" for path in added).encode(errors="surrogateescape")
    blobs = _act(folder, "hash-object", "-w", "--no-filters", "--stdin-paths", given=paths).split() if added else []
    nothing = "0" * len(blobs[0] if blobs else _act(folder, "hash-object", "--stdin", given=b"").strip())
    lines = [f"100644 {blob}\t{prefix}{path}\0" for blob, path in zip(blobs, added, strict=True)]
    lines += [f"0 {nothing}\t{prefix}{path}\0" for path in removed]
    return "".join(lines).encode(errors="surrogateescape")


def branch(folder: Path) -> tuple[str, str]:
    """Return the (remote, branch) to push to. NotPushed when no branch is checked out, or no remote is right."""
    name = current_branch(folder)
    if not name:
        raise NotPushed("no branch is checked out (this is how a pull request or a tag is)")
    return remote_of(folder, name), name


def current_branch(folder: Path) -> str:
    """Return the name of the branch that is checked out; empty if none is."""
    return (ask(folder, "symbolic-ref", "--quiet", "HEAD") or "").removeprefix("refs/heads/")


def remote_of(folder: Path, name: str) -> str:
    """Return the remote that a branch is fetched from and pushed to. NotPushed when no remote is right."""
    remotes = (ask(folder, "remote") or "").split()
    upstream = ask(folder, "config", "--get", f"branch.{name}.remote")
    for remote in (upstream, "origin", *(remotes if len(remotes) == 1 else ())):
        if remote in remotes:
            return str(remote)
    raise NotPushed(f"it isn't known where to: of the remotes ({', '.join(remotes) or 'none'}) none is origin")


def known_tip(folder: Path, remote: str, name: str) -> str | None:
    """Return the commit that a remote's branch had when this repository last heard of it; None if it never did."""
    return ask(folder, "rev-parse", "--verify", "--quiet", f"refs/remotes/{remote}/{name}^{{commit}}")


def is_ancestor(folder: Path, older: str, newer: str) -> bool:
    """Return whether ``newer`` has all that ``older`` has; False when that can't be told, as in a shallow clone."""
    return ask(folder, "merge-base", "--is-ancestor", older, newer) is not None


def make_commit(folder: Path, base: str, files: Sequence[str], removed: Sequence[str], message: str) -> str:
    """Commit ``files`` and the absence of ``removed``, paths below ``folder``, on top of ``base``; return the commit.

    It is ``base`` itself when nothing would change. No ref is moved. NotPushed when git fails, or without a commit to
    return.
    """
    import tempfile  # takes as long to import as all of this module

    base_id = ask(folder, "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    names = sorted({path.partition("/")[0] for path in (*files, *removed)})
    there = committed(folder, names, base_id) if base_id and names else set()
    new, gone = [path for path in files if path not in there], [path for path in removed if path in there]
    if not new and not gone:
        if base_id is None:
            raise NotPushed("there is nothing to commit")
        return base_id
    prefix = _act(folder, "rev-parse", "--show-prefix").removesuffix("\n")
    lines = _index_lines(folder, prefix, new, gone)
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        if base_id:
            _act(folder, "read-tree", base_id, extra=index)
        _act(folder, "update-index", "-z", "--index-info", given=lines, extra=index)
        tree = _act(folder, "write-tree", extra=index).strip()
    parents = ["-p", base_id] if base_id else []
    return _act(folder, *_identity(folder), "commit-tree", tree, *parents, "-F", "-", given=message.encode()).strip()


def move_branch(folder: Path, name: str, commit_id: str) -> None:
    """Let a local branch point to a commit; index and work tree stay as they are. NotPushed."""
    _act(folder, "update-ref", "-m", "castore", f"refs/heads/{name}", commit_id)


@dataclass(frozen=True, slots=True)
class PushResult:
    """What became of a push, and git's words about a failure.

    ``refused``: the other side decided against it. ``outdated``: the branch there has commits that this one lacks.
    ``failed``: no decision was reported, as when the network or the credentials fail.
    """

    outcome: Literal["pushed", "outdated", "refused", "failed"]
    reason: str = ""


def push(folder: Path, remote: str, name: str, commit_id: str, *, dry_run: bool = False) -> PushResult:
    """Push a commit to the branch ``name`` of a remote, without force; with ``dry_run``, only ask."""
    options = ["--porcelain", *(["--dry-run"] if dry_run else [])]
    arguments = [*_NO_HOOKS, "push", *options, remote, f"{commit_id}:refs/heads/{name}"]
    try:
        done = run(folder, arguments, seconds=LONG_SECONDS, read_only=False, secrets=True)
    except (OSError, BareRepository) as error:
        return PushResult("failed", f"git push: {error}")
    if done.returncode == 0:
        return PushResult("pushed")
    # git-push(1), OUTPUT: flag <tab> from:to <tab> [summary] (reason). The flag of any failure is "!", and only the
    # summary, fixed words in brackets that git never translates, says who decided: "[rejected]" is git here, as the
    # branch has moved; "[remote rejected]" the other side. The free text of the reason is shown and never looked at.
    summaries = [line.split("\t")[2] for line in split_lines(os.fsdecode(done.stdout)) if line.startswith("!\t")]
    outcome: Literal["outdated", "refused", "failed"] = "failed"
    if any(summary.startswith("[rejected]") for summary in summaries):
        outcome = "outdated"
    elif any(summary.startswith("[remote rejected]") for summary in summaries):
        outcome = "refused"
    return PushResult(outcome, _failure("push", done, "; ".join(summaries)))


def fetch_branch(folder: Path, remote: str, name: str) -> str:
    """Fetch a branch of a remote; return its commit. NotPushed."""
    _act(folder, *_NO_HOOKS, "fetch", "--quiet", remote, f"refs/heads/{name}", network=True)
    return _act(folder, "rev-parse", "--verify", "FETCH_HEAD").strip()


def _identity(folder: Path) -> list[str]:
    if all(ask(folder, "config", "--get", f"user.{field}") for field in ("name", "email")):
        return []
    return ["-c", f"user.name={_BOT[0]}", "-c", f"user.email={_BOT[1]}"]


def _act(
    folder: Path,
    *arguments: str,
    given: bytes = b"",
    extra: Mapping[str, str] | None = None,
    network: bool = False,
) -> str:
    """Return what git prints. NotPushed with git's words when it fails. Only ``network`` commands get credentials."""
    what = next(argument for argument in arguments if argument[0] != "-" and "=" not in argument)
    try:
        done = run(
            folder, arguments, given=given, seconds=LONG_SECONDS, read_only=False, extra=extra or {}, secrets=network
        )
    except (OSError, BareRepository) as error:
        raise NotPushed(f"git {what}: {error}") from error
    if done.returncode:
        raise NotPushed(_failure(what, done))
    return os.fsdecode(done.stdout)


def _failure(what: str, done: Done, summary: str = "") -> str:
    """Return git's words on one line, without the passwords that a remote's address may contain."""
    words = " ".join(f"{summary} {os.fsdecode(done.stderr or done.stdout)}".split())
    return f"git {what}: {printable(_CREDENTIALS.sub('://', words))[:500] or f'exit {done.returncode}'}"
