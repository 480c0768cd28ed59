"""Sessions in GitHub Actions: get what the next one begins with, and hand on what this one made.

Both return what they did as values, and tell it as Markdown for the summary of a job.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from castore import gc, transfer
from castore.errors import (
    CastoreError,
    CorruptionError,
    DataMissing,
    NotPushed,
    RemoteUnavailable,
    UploadRefused,
    UsageError,
)
from castore.format import bundle, manifest
from castore.format.bundle import Record
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.policy.resolution import Match, Rejected, Resolution
from castore.policy.retention import Policy
from castore.remotes.github_cache import CacheService, GitHubCache
from castore.repo import Repo
from castore.storage import git
from castore.storage.catalog import BrokenFile
from castore.text import escape_markdown, format_number, format_size
from castore.transfer import Progress

_GONE_AFTER = timedelta(days=14)  # GitHub lets an entry go that nobody used for seven days
_SHOWN = 20


def connect(repo: Repo, service: CacheService) -> tuple[GitHubCache, list[BrokenFile]]:
    """Make the cache one of the remotes of ``repo``, by the records of bundles in the work tree; and what is none."""
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


def _traffic(remote: GitHubCache) -> Traffic:
    service = remote.service
    return Traffic(uploaded=service.uploaded, downloaded=service.downloaded, requests=service.requests)


# -- restore ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What the session can begin with: ``match``, now in the store, or nothing, for the reason ``fresh``.

    ``further`` were fetched too: from ``match`` sessions were trained to there before, so one may go on from there.
    """

    resolution: Resolution | None
    match: Match | None
    further: tuple[Entry, ...]
    fresh: str
    traffic: Traffic


def restore(repo: Repo, remote: GitHubCache, want: str, *, allow_fresh: bool, progress: Progress) -> Restored:
    """Resolve ``want`` and fetch what the match needs, all parts of it that can be had.

    One whose data proves bad is passed over like one whose data is gone. The errors of :meth:`Resolution.require` when
    there are checkpoints and none can be had, unless a fresh start is allowed.
    """
    if want == "none":
        return _fresh(remote, None, "as --resume none asks for")
    tried: set[ObjectId] = set()
    while True:
        resolution = repo.resolve(want, weights_only=True)
        if resolution.match is None:
            break
        entry = repo.find(resolution.match.id)
        try:
            _pull(repo, entry, progress, whole=resolution.match.availability == "full")
        except (DataMissing, CorruptionError):
            if entry.id in tried:
                raise
            tried.add(entry.id)  # what is wrong is known now: the next look at what there is takes it into account
            continue
        further = _further(repo, entry, progress) if resolution.selector == "best" else ()
        return Restored(
            resolution=resolution, match=resolution.match, further=further, fresh="", traffic=_traffic(remote)
        )
    if resolution.unavailable and remote.down and not remote.service.unreadable:
        # not the same as gone: a fresh start would throw away what is only out of reach
        raise RemoteUnavailable(remote.name, f"{remote.down}; so it can't be told which checkpoints can be had")
    if why := repo.fresh_start(resolution, allow_fresh=allow_fresh):
        return _fresh(remote, resolution, why)
    resolution.require()
    raise AssertionError("a resolution without a match demands one")


def _fresh(remote: GitHubCache, resolution: Resolution | None, why: str) -> Restored:
    return Restored(resolution=resolution, match=None, further=(), fresh=why, traffic=_traffic(remote))


def _pull(repo: Repo, entry: Entry, progress: Progress, *, whole: bool) -> None:
    """Fetch all parts, or unless it is there as a ``whole`` those that can be had."""
    parts = list(entry.manifest.parts)
    if not whole:
        parts = [name for name, state in repo.part_states(entry).items() if state.where != "missing"]
    transfer.pull(repo, entry, parts, progress)


def _further(repo: Repo, best: Entry, progress: Progress) -> tuple[Entry, ...]:
    """Where sessions from the best have led, if that is further: one with the same settings would only repeat them.

    With which settings the next one comes isn't known here: for all that there were.
    """
    experiment = [
        entry.manifest for entry in repo.checkpoints() if entry.manifest.experiment == best.manifest.experiment
    ]
    settings = list({msgspec.json.encode(one.config, order="sorted"): one.config for one in experiment}.values())
    ends = {found.id: found for config in settings if (found := repo.furthest(best, config))}
    return tuple(
        one for one in ends.values() if one.manifest.step > best.manifest.step and _fetched(repo, one, progress)
    )


def _fetched(repo: Repo, entry: Entry, progress: Progress) -> bool:
    if any(state.where == "missing" for state in repo.part_states(entry).values()):
        return False
    try:
        _pull(repo, entry, progress, whole=True)
    except (DataMissing, CorruptionError):
        return False
    return True


# -- save ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionProgress:
    """What a session made, by its manifests: from where, and how far. Losses are of validation."""

    run: str
    checkpoints: int
    start_step: int
    final_step: int
    start_loss: float | None
    final_loss: float | None
    best_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOn:
    """What was done with what this machine has. ``skipped`` says why nothing was, and then nothing was.

    ``records`` are those of the new bundle; none when everything that is kept was there already. ``left_out`` are
    checkpoints that could not be handed on, as (id, reason). ``not_collected`` says why garbage was not: then what
    this session made is handed on, all of it. ``files`` of ``.castore/`` are new to git; ``commit`` is what was pushed.
    """

    skipped: str = ""
    session: SessionProgress | None = None
    plan: gc.GCPlan | None = None
    not_collected: str = ""
    records: tuple[Record, ...] = ()
    files: tuple[str, ...] = ()
    left_out: tuple[tuple[ObjectId, str], ...] = ()
    commit: str | None = None
    traffic: Traffic = Traffic(uploaded=0, downloaded=0, requests=0)


_IN_GIT = ("manifests", "pins", "bundles", "sessions")


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
) -> HandedOn:
    """Collect garbage, upload what kept checkpoints need and the cache lacks, and tell git of it.

    Only when a look-up has confirmed the bundle, manifests, pins, sessions and records are staged, or with ``commit``
    committed and pushed. When garbage can't be collected what the session made is handed on all the same. A job that
    may not write to the cache does nothing at all. ``ref`` is the job's. UploadRefused, RemoteUnavailable, NotPushed.
    """
    now = now or datetime.now(UTC)
    if problem := git.problem(repo.root):
        raise UsageError(f"git has to tell the next session what was saved, but in {repo.root} it says: {problem}")
    if remote.service.unwritable:
        return HandedOn(skipped=f"this job may not write to the cache ({remote.service.unwritable})")
    if remote.service.unreadable:
        reason = f"this job may not read the cache ({remote.service.unreadable}), so an upload couldn't be confirmed"
        raise UploadRefused(remote.name, reason)
    if commit:
        git.branch(repo.root)  # what can't be pushed needn't be uploaded
    known = git.committed(repo.root, _IN_GIT)
    new = [entry for entry in repo.checkpoints() if _path(entry) not in known]
    found, not_collected = None, ""
    kept: list[tuple[Entry, Sequence[str]]] = [(entry, tuple(entry.manifest.parts)) for entry in new]
    try:
        found = gc.collect_garbage(repo, policy, now=now, elsewhere=True)
        own = {entry.id for entry in repo.checkpoints()}
        kept = [(one.entry, one.parts) for one in found.decisions if one.parts and one.entry.id in own]
    except CastoreError as error:
        not_collected = str(error)
    records, left_out = _hand_on(repo, remote, kept, ref, progress, now)
    removed = [] if found is None else _forget(repo, remote, kept, ref, now)
    files = _files(repo)
    added = tuple(path for path in files if path not in known)
    pushed = None
    if commit:
        pushed = git.publish(repo.root, files, removed, message or _message(_session(repo, new)), pause)
        with contextlib.suppress(NotPushed):  # whoever works in the index now has nothing to do with what was pushed
            git.stage(repo.root, added, removed)
    else:
        git.stage(repo.root, added, removed)
    return HandedOn(
        session=_session(repo, new),
        plan=found,
        not_collected=not_collected,
        records=records,
        files=(*added, *removed),
        left_out=left_out,
        commit=pushed,
        traffic=_traffic(remote),
    )


def _path(entry: Entry) -> str:
    return f"manifests/{entry.manifest.file_name(entry.id)}"


def _files(repo: Repo) -> list[str]:
    """What git is to have, relative to the repository. Prepared data stays here: it can be prepared again."""
    found = [_path(entry) for entry in repo.checkpoints()]
    for name in ("pins", "bundles", "sessions"):
        found += [path.relative_to(repo.root).as_posix() for path in (repo.root / name).rglob("*") if _is_plain(path)]
    return found


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.name.isprintable()


def _hand_on(
    repo: Repo,
    remote: GitHubCache,
    kept: Sequence[tuple[Entry, Sequence[str]]],
    ref: str,
    progress: Progress,
    now: datetime,
) -> tuple[tuple[Record, ...], tuple[tuple[ObjectId, str], ...]]:
    """(records of the new bundle, checkpoints left out). Records are written once the bundle is known to be there."""
    with repo.lock():
        handover = transfer.plan_upload(repo, remote, kept)
        if not handover.parts:
            return (), handover.left_out
        if len(handover.objects) > bundle.MAX_OBJECTS:
            reason = f"{len(handover.objects)} objects are more than a bundle holds: a larger chunk_size makes fewer"
            raise UploadRefused(remote.name, reason)
        if handover.objects:
            layout = bundle.lay_out({own: repo.store.stored_size(own) or 0 for own in handover.objects})
            key = remote.upload(layout, transfer.reader(repo.store, layout), progress)
            own, size, count = layout.id, layout.size, len(layout.places)
        else:  # all of it lies in bundles that are there: what is new is only which
            relied = {one for needed in handover.parts.values() for one in needed}
            basis = next(record for record in remote.records if record.bundle in relied)
            own, key, size, count = basis.bundle, basis.key, basis.bytes, basis.objects
        parts = {index: [ObjectId(one) if one else own for one in needed] for index, needed in handover.parts.items()}
        records = tuple(
            Record(
                bundle=own,
                key=key,
                created=manifest.timestamp(now),
                bytes=size,
                objects=count,
                ref=ref,
                parts=dict(some),
            )
            for some in _batches(list(parts.items()), bundle.PARTS_OF_A_RECORD)
        )
        for record in records:
            repo.catalog.add_record(record)
    return (records if handover.objects else ()), handover.left_out


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _forget(
    repo: Repo, remote: GitHubCache, kept: Sequence[tuple[Entry, Sequence[str]]], ref: str, now: datetime
) -> list[str]:
    """Remove old records of bundles that are gone, or that nothing kept needs: every session would look them up.

    Only those of this ref: what a job of another ref uploaded may be there for others.
    """
    needed = {entry.manifest.parts[name].index for entry, parts in kept for name in parts}
    removed = []
    for record in remote.records:
        is_old = now - datetime.fromisoformat(record.created) > _GONE_AFTER
        is_useless = record.bundle in remote.missing() or not needed & record.parts.keys()
        if is_old and is_useless and record.ref == ref:
            path = repo.catalog.remove_record(record)
            removed.append(path.relative_to(repo.root).as_posix())
    return removed


def _session(repo: Repo, new: Sequence[Entry]) -> SessionProgress | None:
    if not new:
        return None
    made = sorted((entry.manifest for entry in new), key=lambda one: (one.created, one.step))
    ids = {entry.id for entry in new}
    before = next((one.parent for one in made if one.parent and one.parent not in ids), None)
    try:
        start = repo.find(before).manifest if before else None
    except CastoreError:  # its manifest was removed
        start = None
    losses = [one.metrics["val_loss"] for one in made if "val_loss" in one.metrics]
    return SessionProgress(
        run=made[-1].run,
        checkpoints=len(made),
        start_step=start.step if start else 0,
        final_step=made[-1].step,
        start_loss=start.metrics.get("val_loss") if start else None,
        final_loss=made[-1].metrics.get("val_loss"),
        best_loss=min(losses, default=None),
    )


def _message(session: SessionProgress | None) -> str:
    if session is None:
        return "castore: what the cache holds"
    loss = "" if session.final_loss is None else f", validation loss {session.final_loss:.4f}"
    return f"castore: {session.run} at step {session.final_step:,}{loss}"


# -- in words --------------------------------------------------------------------------------------------------------


def restored_markdown(found: Restored) -> str:
    """The part of a job's summary that tells where the session begins, and why there."""
    return "\n".join(_restored_lines(found)) + "\n\n"


def _restored_lines(found: Restored) -> Iterator[str]:
    yield "### castore: restored"
    yield ""
    if found.match:
        match = found.match
        told = f"Resuming from step **{match.step:,}** of run `{match.run}`, checkpoint `{match.id[:12]}`"
        quality = "" if match.score is None else f", score {match.score:.4f}"
        want = escape_markdown(found.resolution.selector) if found.resolution else ""
        yield f"{told}{quality}: {match.availability}, {want}."
        for further in found.further:
            yield ""
            yield f"From it a session was trained to step {further.manifest.step:,} before, which was fetched too."
        for text in match.differences:
            yield f"- differs: {escape_markdown(text)}"
    else:
        yield f"**Nothing to resume from**: {escape_markdown(found.fresh)}. Training begins at step 0."
    yield from _rejected_lines(found.resolution.rejected if found.resolution else ())
    yield ""
    yield _traffic_line(found.traffic)


def refused_markdown(reason: str) -> str:
    """The part of a job's summary for what ended in an error."""
    head, *rest = reason.split("\n")
    lines = [
        f"### castore: failed\n\n**{escape_markdown(head)}**\n",
        *(f"- {escape_markdown(experiment.strip())}" for experiment in rest[:_SHOWN]),
    ]
    return "\n".join(lines) + "\n\n"


def _rejected_lines(rejected: Sequence[Rejected]) -> Iterator[str]:
    if not rejected:
        return
    yield ""
    yield "| passed over | step | score | why |"
    yield "|---|---|---|---|"
    for one in rejected[:_SHOWN]:
        why = "; ".join(map(escape_markdown, one.reasons))
        yield f"| `{one.id[:12]}` of `{one.run}` | {one.step:,} | {format_number(one.score)} | {why} |"
    if len(rejected) > _SHOWN:
        yield f"| and {len(rejected) - _SHOWN} more | | | |"


def handed_on_markdown(found: HandedOn) -> str:
    """The part of a job's summary that tells what the session made, and what of it the next one can have."""
    return "\n".join(_handed_on_lines(found)) + "\n\n"


def _handed_on_lines(found: HandedOn) -> Iterator[str]:
    yield "### castore: saved"
    yield ""
    if found.skipped:
        yield f"**Nothing was saved**: {escape_markdown(found.skipped)}."
        return
    session = found.session
    if session:
        steps = f"step {session.start_step:,} to {session.final_step:,} ({session.final_step - session.start_step:,})"
        yield "| run | steps | validation loss | best | checkpoints |"
        yield "|---|---|---|---|---|"
        losses = f"{format_number(session.start_loss)} to {format_number(session.final_loss)}"
        best = format_number(session.best_loss)
        yield f"| `{session.run}` | {steps} | {losses} | {best} | {session.checkpoints} |"
    else:
        yield "No new checkpoint."
    yield ""
    if found.records:
        record = found.records[0]
        yield f"Bundle `{record.bundle[:12]}`: {record.objects} objects, {format_size(record.bytes)}, confirmed."
    else:
        yield "The cache has all that is kept already."
    if found.plan:
        decisions = [one for one in found.plan.decisions if one.entry.manifest.kind == "checkpoint"]
        kept = sum(bool(one.parts) for one in decisions)
        freed = format_size(found.plan.freed_bytes)
        yield f"{kept} checkpoints are kept, {len(decisions) - kept} are history; {freed} were deleted here."
    if found.not_collected:
        yield f"**No garbage was collected**: {escape_markdown(found.not_collected)}"
    yield from (f"- left out: `{own[:12]}`: {escape_markdown(reason)}" for own, reason in found.left_out)
    told = f"pushed as `{found.commit[:12]}`" if found.commit else "staged"
    yield f"In git: {len(found.files)} files more or less, {told}."
    yield ""
    yield _traffic_line(found.traffic)


def _traffic_line(traffic: Traffic) -> str:
    up, down = format_size(traffic.uploaded), format_size(traffic.downloaded)
    return f"{up} up, {down} down, {traffic.requests} requests to the cache."
