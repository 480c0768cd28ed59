"""Bring back what a lost push should have added to git, from the bundle that was uploaded before it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from castore.errors import CorruptBundle, NotPushed, ObjectMissing, RemoteUnavailable, UsageError
from castore.format import bundle, manifest
from castore.format.bundle import Contents
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.github import git_files
from castore.github.sessions import Traffic, traffic_of
from castore.remotes import fallback
from castore.remotes.github_cache import GitHubCache
from castore.remotes.github_service import CacheService
from castore.repo import Repo
from castore.storage import git, git_commits

_PREFIX = "castore-"
_NAME = re.compile(r"(?P<id>[0-9a-f]{64})(?:-[0-9a-f]{8})?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What a bundle says of itself, and what of it was new here.

    ``checkpoints`` are those that are new. ``files`` of ``.castore/`` were added to git; none when it had all of them.
    ``passed_over`` lists what could not be read as what it should be. ``commit`` is what was pushed.
    """

    bundle: ObjectId
    key: str
    checkpoints: tuple[Entry, ...]
    files: tuple[str, ...]
    passed_over: tuple[str, ...]
    commit: str | None
    traffic: Traffic


def recover(
    repo: Repo,
    service: CacheService,
    name: str,
    *,
    commit: bool = False,
    message: str = "",
    now: datetime | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Recovered:
    """Add the manifests, pins, sessions and records that a bundle carries, and stage, or commit and push, them.

    ``name`` is the bundle's id or its key. What is here already stays as it is. Nothing vouches for these files but the
    name: whoever gives it, and whoever accepts the commit, decides that they are to be trusted. UsageError for what is
    no name; DataMissing when the cache has no such entry; CorruptBundle when it holds something else, or carries
    nothing; RemoteUnavailable, NotPushed.
    """
    key = name.strip().removeprefix(_PREFIX)
    match = _NAME.fullmatch(key)
    if match is None:
        raise UsageError(f"{name[:100]!r} names no bundle: give its key, castore- and 64 hex digits, or the whole id")
    if problem := git.problem(repo.root):
        raise UsageError(f"what is brought back is for git, but in {repo.root} it says: {problem}")
    if commit:
        git_commits.branch(repo.root)  # raises now: what can't be pushed needn't be read
    bundle_id = ObjectId(match["id"])
    remote = GitHubCache(service, [])
    named = remote.open_unrecorded(bundle_id, _PREFIX + key)
    contents = _read_contents(repo, remote, bundle_id)
    before = {entry.id for entry in repo.checkpoints()}
    known = git_files.known(repo)
    with repo.lock():
        new_files = {
            path: text.encode()
            for path, text in contents.files.items()
            if path.partition("/")[0] in git_files.FOLDERS and not os.path.lexists(repo.root / path)
        }
        _, passed_over = git_files.adopt(repo, new_files)
        created = manifest.timestamp(now or datetime.now(UTC))
        new = contents.records(bundle_id, named.key, size=named.bytes, objects=named.objects, created=created)
        here = [record for record in repo.catalog.records()[0] if record.bundle == bundle_id]
        records = [repo.catalog.add_record(record) for record in new if record.parts not in [r.parts for r in here]]
    carried = contents.files.keys() | {path.relative_to(repo.root).as_posix() for path in records}
    files = [path for path in git_files.list_files(repo) if path in carried]
    message = (message or f"castore: recovered from bundle {bundle_id[:12]}") if commit else ""
    try:
        changed, pushed = git_files.record(repo, files, known, (), message, pause)
    except NotPushed as error:
        raise NotPushed(error.reason, named.key) from error
    return Recovered(
        bundle=bundle_id,
        key=named.key,
        checkpoints=tuple(entry for entry in repo.checkpoints() if entry.id not in before),
        files=changed,
        passed_over=tuple(passed_over),
        commit=pushed,
        traffic=traffic_of(remote),
    )


def _read_contents(repo: Repo, remote: GitHubCache, bundle_id: ObjectId) -> Contents:
    """Return what an opened bundle says of itself, in its last object. CorruptBundle, RemoteUnavailable."""
    contents_id = list(remote.holds(bundle_id))[-1]
    try:
        plain, _ = fallback.read(repo.store, [remote], contents_id, mend=False)
    except ObjectMissing as error:
        if remote.down:
            raise RemoteUnavailable(remote.name, remote.down) from error
        reason = remote.explain_missing(contents_id)
        raise CorruptBundle(f"bundle {bundle_id[:12]} carries nothing that can be read: {reason}") from error
    return bundle.decode_contents(plain)
