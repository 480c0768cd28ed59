"""Sessions in GitHub Actions: fetch what the next one begins with, and pass on what this one made.

Both return what they did as values; :mod:`castore.github.summary` puts it in words.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from castore import gc
from castore.errors import (
    CastoreError,
    CorruptionError,
    DataMissing,
    GitUnreadable,
    NotPushed,
    RemoteUnavailable,
    UploadRefused,
    UsageError,
)
from castore.format.bundle import Record
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.github import bundling, git_files
from castore.github.bundling import KeptParts
from castore.policy.order import newest_first
from castore.policy.resolution import Match, Resolution
from castore.policy.retention import Policy
from castore.progress import Progress
from castore.remotes.github_cache import GitHubCache
from castore.remotes.github_service import CacheService
from castore.repo import Repo
from castore.storage import git, git_commits
from castore.storage.catalog import BrokenFile

_UNCHANGING = ("manifests", "pins", "bundles")
_CAUGHT_UP = ("manifests", "bundles", "pins", "tags")


def connect(repo: Repo, service: CacheService) -> tuple[GitHubCache, list[BrokenFile]]:
    """Add the GitHub cache to the remotes; return it, and the record files that failed to parse."""
    records, broken = repo.catalog.records()
    remote = GitHubCache(service, records)
    repo.remotes.append(remote)
    return remote, broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What went over the network, in bytes and requests."""

    uploaded: int
    downloaded: int
    requests: int


def traffic_of(remote: GitHubCache) -> Traffic:
    service = remote.service
    return Traffic(uploaded=service.uploaded, downloaded=service.downloaded, requests=service.requests)


# -- what other sessions pushed meanwhile ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CaughtUp:
    """What the tip of the job's branch had beyond what is checked out, and is here by now.

    ``files`` were added to ``.castore/`` and staged; ``passed_over`` lists what could not be read as what it should be.
    ``problem`` is the reason the branch could not be asked; then the session begins with what is checked out.
    """

    branch: str = ""
    files: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    problem: str = ""


def catch_up(repo: Repo, ref: str) -> CaughtUp:
    """Add the manifests, records, pins and tags that sessions have pushed since the commit that is checked out.

    A queued job is fixed at the commit that triggered it: without this it would train the steps of those before it
    again. The branch is the one that is checked out or, at a commit alone, that of the job's ``ref``; a pull request or
    a tag has none that sessions push to. Code and data of the work tree stay as they are. StorageError.
    """
    name = git_commits.current_branch(repo.root) or (ref if ref.startswith("refs/heads/") else "")
    if not name or git.problem(repo.root):
        return CaughtUp()
    name = name.removeprefix("refs/heads/")
    try:
        tip = git_commits.fetch_branch(repo.root, git_commits.remote_of(repo.root, name), name)
        there = git.files_at(repo.root, tip, _CAUGHT_UP).files
        missing = {path: blob for path, blob in there.items() if not os.path.lexists(repo.root / path)}
        contents = git.blobs(repo.root, {blob: path for path, blob in missing.items()}, git_files.MAX_BYTES)
    except (NotPushed, GitUnreadable) as error:
        return CaughtUp(branch=name, problem=error.reason)
    added, passed_over = git_files.adopt(repo, {path: contents[blob] for path, blob in missing.items()})
    try:
        git_commits.stage(repo.root, added, [])  # so that a later merge or pull finds what it brings
    except NotPushed as error:
        passed_over.append(f"not staged: {error}")
    return CaughtUp(branch=name, files=tuple(added), passed_over=tuple(passed_over))


def obstacles(repo: Repo, service: CacheService) -> tuple[str, ...]:
    """Return the reasons `ci save --commit` would fail or do nothing in this job, asked before hours of training.

    A push is tried without being made, so the remote is asked for the right to it.
    """
    if problem := git.problem(repo.root):
        return (f"git says: {problem}",)
    modes = {"write to": service.unwritable, "read": service.unreadable}
    reasons = [f"this job may not {verb} the cache ({mode})" for verb, mode in modes.items() if mode]
    try:
        remote, name = git_commits.branch(repo.root)
        result = git_commits.push(repo.root, remote, name, "HEAD", dry_run=True)
        if result.outcome not in ("pushed", "outdated"):
            reasons.append(f"a push to {name} {result.outcome}: {result.reason}")
    except NotPushed as error:
        reasons.append(error.reason)
    return tuple(reasons)


# -- restore ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredSession:
    """What the session can begin with: ``match``, now in the store; or nothing, for the reason in ``fresh``.

    ``further`` were fetched too: earlier sessions trained on from ``match`` to there, so one may continue from them.
    ``remote_errors`` maps the name of each remote that was passed over to its first error.
    """

    resolution: Resolution | None
    match: Match | None
    further: tuple[Entry, ...]
    fresh: str
    traffic: Traffic
    remote_errors: Mapping[str, str] = field(default_factory=dict)


def restore(
    repo: Repo, remote: GitHubCache, selector: str, *, allow_fresh: bool, progress: Progress
) -> RestoredSession:
    """Resolve ``selector`` and fetch all available parts of the match.

    A match whose data proves corrupt is passed over like one whose data is gone. Raise the errors of
    :meth:`Resolution.require` when there are checkpoints and none is available, unless a fresh start is allowed;
    RemoteUnavailable when the cache can't be asked.
    """
    if selector == "none":
        return _start_fresh(remote, None, "as --resume none asks for", {})
    tried: set[ObjectId] = set()
    errors: dict[str, str] = {}
    while True:
        resolution = repo.resolve(selector, weights_only=True)
        if resolution.match is None:
            break
        entry = repo.find(resolution.match.id)
        try:
            _pull(repo, entry, progress, errors, whole=resolution.match.availability == "full")
        except (DataMissing, CorruptionError):
            if entry.id in tried:
                raise
            tried.add(entry.id)  # remotes remember what proved corrupt, so the next resolution takes it into account
            continue
        further: tuple[Entry, ...] = ()
        if resolution.selector == "best":
            further = _fetch_descendants(repo, entry, progress, errors)
        match, traffic = resolution.match, traffic_of(remote)
        return RestoredSession(
            resolution=resolution, match=match, further=further, fresh="", traffic=traffic, remote_errors=errors
        )
    if resolution.unavailable and remote.down and not remote.service.unreadable:
        # out of reach is not the same as gone: a fresh start would throw the checkpoints away
        raise RemoteUnavailable(remote.name, f"{remote.down}; so it can't be told which checkpoints are available")
    if reason := repo.fresh_start(resolution, allow_fresh=allow_fresh):
        return _start_fresh(remote, resolution, reason, errors)
    resolution.require()
    raise AssertionError("Resolution.require returned without a match")


def _start_fresh(
    remote: GitHubCache, resolution: Resolution | None, reason: str, errors: Mapping[str, str]
) -> RestoredSession:
    return RestoredSession(
        resolution=resolution,
        match=None,
        further=(),
        fresh=reason,
        traffic=traffic_of(remote),
        remote_errors=errors,
    )


def _pull(repo: Repo, entry: Entry, progress: Progress, errors: dict[str, str], *, whole: bool) -> None:
    """Fetch all parts, or unless the checkpoint is available as a ``whole`` those that are. Adds to ``errors``."""
    parts = list(entry.manifest.parts)
    if not whole:
        parts = [name for name, state in repo.part_states(entry).items() if state.where != "missing"]
    pulled = repo.fetch(entry, parts, progress=progress)
    errors.update({name: error for name, error in pulled.remote_errors.items() if name not in errors})


def _fetch_descendants(repo: Repo, best: Entry, progress: Progress, errors: dict[str, str]) -> tuple[Entry, ...]:
    """Fetch the checkpoints with more steps that earlier sessions reached from ``best``, one for each config.

    The next session resumes from the one with its own config, which isn't known here: training on from the best with
    the same config would only repeat it.
    """
    experiment = [
        entry.manifest for entry in repo.checkpoints() if entry.manifest.experiment == best.manifest.experiment
    ]
    configs = {msgspec.json.encode(manifest.config, order="sorted"): manifest.config for manifest in experiment}
    reached = {entry.id: entry for config in configs.values() if (entry := repo.furthest(best, config))}
    return tuple(
        entry
        for entry in reached.values()
        if entry.manifest.step > best.manifest.step and _try_to_pull(repo, entry, progress, errors)
    )


def _try_to_pull(repo: Repo, entry: Entry, progress: Progress, errors: dict[str, str]) -> bool:
    if any(state.where == "missing" for state in repo.part_states(entry).values()):
        return False
    try:
        _pull(repo, entry, progress, errors, whole=True)
    except (DataMissing, CorruptionError):
        return False
    return True


# -- save ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionProgress:
    """How far a session came, by its manifests. Losses are validation losses."""

    run: str
    checkpoints: int
    start_step: int
    final_step: int
    start_loss: float | None
    final_loss: float | None
    best_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """What was done with this machine's checkpoints.

    ``skipped`` is the reason nothing was done, and then nothing else is set. ``records`` name the new bundle; none when
    there was nothing to upload. ``left_out`` lists checkpoints that could not be uploaded, as (id, reason);
    ``unconfirmed`` those that aren't here and that the cache was not seen to have; ``unasked`` is the reason the cache
    could not be asked at all.
    ``not_collected`` is the reason garbage collection failed: then all that this session made is uploaded. ``files`` of
    ``.castore/`` were added to git or removed; of those ``altered`` git has other bytes than were written, so that no
    other machine can read them; ``commit`` is what was pushed.
    """

    skipped: str = ""
    session: SessionProgress | None = None
    plan: gc.GCPlan | None = None
    not_collected: str = ""
    records: tuple[Record, ...] = ()
    files: tuple[str, ...] = ()
    left_out: tuple[tuple[ObjectId, str], ...] = ()
    unconfirmed: tuple[ObjectId, ...] = ()
    unasked: str = ""
    altered: tuple[str, ...] = ()
    commit: str | None = None
    traffic: Traffic = Traffic(uploaded=0, downloaded=0, requests=0)


def save(
    repo: Repo,
    remote: GitHubCache,
    policy: Policy | None = None,
    *,
    commit: bool = False,
    message: str = "",
    ref: str = "",
    progress: Progress,
    now: datetime | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> SavedSession:
    """Collect garbage, upload what the cache lacks of the kept checkpoints, and stage or push what names it in git.

    Manifests, pins, sessions and records are staged, or with ``commit`` committed and pushed, only after a look-up has
    confirmed the bundle. When garbage collection fails, what the session made is uploaded all the same. A job that may
    not write to the cache does nothing. ``ref`` is the job's. UsageError, UploadRefused, RemoteUnavailable, NotPushed.
    """
    if skipped := _reason_to_skip(repo, remote):
        return SavedSession(skipped=skipped)
    if commit:
        git_commits.branch(repo.root)  # raises now: what can't be pushed needn't be uploaded
    now = now or datetime.now(UTC)
    known = git_files.known(repo)
    new = [entry for entry in repo.checkpoints() if git_files.manifest_path(entry) not in known]
    plan, kept, not_collected = _collect_garbage(repo, policy, new, now)
    files = git_files.read_texts(repo, git_files.new_to_remote(repo, git_files.list_files(repo), known))
    uploaded = bundling.upload_missing(repo, remote, kept, files, ref=ref, progress=progress, now=now)
    removed = bundling.remove_stale_records(repo, remote, kept, ref=ref, now=now) if plan is not None else ()
    session = _session_progress(repo, new)
    message = (message or _commit_message(session)) if commit else ""
    try:
        changed, pushed = git_files.record(repo, git_files.list_files(repo), known, removed, message, pause)
    except NotPushed as error:
        raise NotPushed(error.reason, uploaded.records[0].key if uploaded.records else "") from error
    return SavedSession(
        session=session,
        plan=plan,
        not_collected=not_collected,
        records=uploaded.records,
        files=changed,
        left_out=uploaded.left_out,
        unconfirmed=uploaded.unconfirmed,
        unasked=remote.down,
        altered=tuple(git.altered(repo.root, _UNCHANGING) or ()),
        commit=pushed,
        traffic=traffic_of(remote),
    )


def _reason_to_skip(repo: Repo, remote: GitHubCache) -> str:
    """Return the reason this job is not meant to save, or "". UsageError, UploadRefused when saving can't work."""
    if problem := git.problem(repo.root):
        raise UsageError(f"git has to tell the next session what was saved, but in {repo.root} it says: {problem}")
    if remote.service.unwritable:
        return f"this job may not write to the cache ({remote.service.unwritable})"
    if remote.service.unreadable:
        reason = f"this job may not read the cache ({remote.service.unreadable}), so an upload couldn't be confirmed"
        raise UploadRefused(remote.name, reason)
    return ""


def _collect_garbage(
    repo: Repo, policy: Policy | None, new: Sequence[Entry], now: datetime
) -> tuple[gc.GCPlan | None, KeptParts, str]:
    """Return (plan, what it keeps here, ""); when that fails (None, all parts of the ``new`` checkpoints, reason)."""
    try:
        plan = gc.collect_garbage(repo, policy, now=now, elsewhere=True)
        in_work_tree = {entry.id for entry in repo.checkpoints()}
    except CastoreError as error:
        return None, [(entry, tuple(entry.manifest.parts)) for entry in new], str(error)
    decisions = [decision for decision in plan.decisions if decision.parts and decision.entry.id in in_work_tree]
    return plan, [(decision.entry, decision.parts) for decision in decisions], ""


def _session_progress(repo: Repo, new: Sequence[Entry]) -> SessionProgress | None:
    """Return how far the ``new`` checkpoints lead; None when there are none."""
    if not new:
        return None
    manifests = [entry.manifest for entry in newest_first(new)[::-1]]
    new_ids = {entry.id for entry in new}
    parents = (manifest.parent for manifest in manifests)
    start_id = next((parent for parent in parents if parent and parent not in new_ids), None)
    try:
        start = repo.find(start_id).manifest if start_id else None
    except CastoreError:  # its manifest was removed
        start = None
    losses = [manifest.metrics["val_loss"] for manifest in manifests if "val_loss" in manifest.metrics]
    return SessionProgress(
        run=manifests[-1].run,
        checkpoints=len(manifests),
        start_step=start.step if start else 0,
        final_step=manifests[-1].step,
        start_loss=start.metrics.get("val_loss") if start else None,
        final_loss=manifests[-1].metrics.get("val_loss"),
        best_loss=min(losses, default=None),
    )


def _commit_message(session: SessionProgress | None) -> str:
    if session is None:
        return "castore: what the cache holds"
    loss = "" if session.final_loss is None else f", validation loss {session.final_loss:.4f}"
    return f"castore: {session.run} at step {session.final_step:,}{loss}"
