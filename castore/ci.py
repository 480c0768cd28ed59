"""Sessions in GitHub Actions: get what the next one begins with, and hand on what this one made.

Both return what they did as values, and tell it as Markdown for the summary of a job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from castore import bundle, gc, git, manifest, transfer, words
from castore.bundle import Record
from castore.errors import CastoreError, CorruptionError, DataMissing, UploadRefused, UsageError
from castore.ids import ObjectId
from castore.quality import Entry
from castore.remotes.actions import Actions, Service
from castore.repo import Repo
from castore.resolve import Match, Rejected, Resolution
from castore.retention import Policy
from castore.transfer import Progress

_GONE_AFTER = timedelta(days=14)  # GitHub lets an entry go that nobody used for seven days
_SHOWN = 20


def connect(repo: Repo, service: Service) -> Actions:
    """Make the cache one of the remotes of ``repo``, by the records of bundles in the work tree."""
    records, _ = repo.catalog.records()
    remote = Actions(service, records)
    repo.remotes.append(remote)
    return remote


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What went over the network, in bytes and requests."""

    uploaded: int
    downloaded: int
    requests: int


def _traffic(remote: Actions) -> Traffic:
    service = remote.service
    return Traffic(uploaded=service.uploaded, downloaded=service.downloaded, requests=service.requests)


# -- restore ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What the session can begin with: ``match``, now in the store, or nothing, for the reason ``fresh``.

    ``further`` was fetched too: from ``match`` a session was trained to there before, so it may go on from there.
    """

    resolution: Resolution | None
    match: Match | None
    further: Entry | None
    fresh: str
    traffic: Traffic


def restore(repo: Repo, remote: Actions, want: str, *, allow_fresh: bool, progress: Progress) -> Restored:
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
        entry = repo.catalog.find(resolution.match.id)
        try:
            _pull(repo, entry, progress, whole=resolution.match.availability == "full")
        except (DataMissing, CorruptionError):
            if entry.id in tried:
                raise
            tried.add(entry.id)  # what is wrong is known now: the next look at what there is takes it into account
            continue
        further = _further(repo, entry, progress) if want.rpartition(":")[2] == "best" else None
        return Restored(
            resolution=resolution, match=resolution.match, further=further, fresh="", traffic=_traffic(remote)
        )
    if not resolution.rejected and not resolution.damaged:
        return _fresh(remote, resolution, "there is no checkpoint yet")
    if allow_fresh or repo.config.resume.on_missing == "fresh":
        why = "--allow-fresh" if allow_fresh else 'on_missing = "fresh" in config.toml'
        return _fresh(remote, resolution, f"no checkpoint can be had, and {why} allows a fresh start")
    resolution.require()
    raise AssertionError("a resolution without a match demands one")


def _fresh(remote: Actions, resolution: Resolution | None, why: str) -> Restored:
    return Restored(resolution=resolution, match=None, further=None, fresh=why, traffic=_traffic(remote))


def _pull(repo: Repo, entry: Entry, progress: Progress, *, whole: bool) -> None:
    """Fetch all parts, or unless it is there as a ``whole`` those that can be had."""
    parts = list(entry.manifest.parts)
    if not whole:
        parts = [name for name, state in repo.part_states(entry).items() if state.where != "missing"]
    transfer.pull(repo, entry, parts, progress)


def _further(repo: Repo, best: Entry, progress: Progress) -> Entry | None:
    """Where sessions from the best have led, if that is further: one with the same options would only repeat them."""
    found = repo.furthest(best, best.manifest.config)
    if found is None or found.manifest.step <= best.manifest.step:
        return None
    if any(state.where == "missing" for state in repo.part_states(found).values()):
        return None
    try:
        _pull(repo, found, progress, whole=True)
    except (DataMissing, CorruptionError):
        return None
    return found


# -- save ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
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

    ``record`` is that of the new bundle; None when everything that is kept was there already. ``left_out`` are
    checkpoints that could not be handed on, as (id, reason). ``commit`` is what was pushed, if anything was to be.
    """

    skipped: str = ""
    session: Session | None = None
    plan: gc.Plan | None = None
    record: Record | None = None
    staged: tuple[Path, ...] = ()
    left_out: tuple[tuple[ObjectId, str], ...] = ()
    commit: str | None = None
    traffic: Traffic = Traffic(uploaded=0, downloaded=0, requests=0)


def save(
    repo: Repo,
    remote: Actions,
    policy: Policy | None = None,
    *,
    commit: bool = False,
    message: str = "",
    progress: Progress,
    now: datetime | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> HandedOn:
    """Collect garbage, upload what kept checkpoints need and the cache lacks, and stage what git is to know.

    Only when a look-up has confirmed the bundle, manifests and records are staged, and with ``commit`` committed and
    pushed. A job that may not write to the cache does nothing at all. UploadRefused, RemoteUnavailable, NotPushed, and
    what :func:`castore.gc.collect` raises.
    """
    now = now or datetime.now(UTC)
    if git.root(repo.root.parent) is None:
        raise UsageError(f"{repo.root} is in no git work tree, by which the next session would know of what was saved")
    if remote.service.unwritable:
        return HandedOn(skipped=f"this job may not write to the cache ({remote.service.unwritable})")
    if remote.service.unreadable:
        reason = f"this job may not read the cache ({remote.service.unreadable}), so an upload couldn't be confirmed"
        raise UploadRefused(remote.name, reason)
    new = _new_checkpoints(repo)
    session = _session(repo, new)
    found = gc.collect(repo, policy, now=now)
    own = {entry.id for entry in repo.checkpoints()}
    kept = [(one.entry, one.parts) for one in found.decisions if one.parts and one.entry.id in own]
    record, left_out = _hand_on(repo, remote, kept, progress, now)
    _forget_gone(repo, remote, now)
    staged = [*(repo.catalog.root / entry.manifest.file_name(entry.id) for entry in new)]
    staged += _changed(repo, "bundles", "sessions")
    pushed = None
    git.stage(repo.root, staged)
    if commit and staged:
        git.commit_staged(repo.root, message or _message(session), staged)
        pushed = git.push(repo.root, pause)
    return HandedOn(
        session=session,
        plan=found,
        record=record,
        staged=tuple(staged),
        left_out=left_out,
        commit=pushed,
        traffic=_traffic(remote),
    )


def _hand_on(
    repo: Repo, remote: Actions, kept: Sequence[tuple[Entry, Sequence[str]]], progress: Progress, now: datetime
) -> tuple[Record | None, tuple[tuple[ObjectId, str], ...]]:
    """(record of the new bundle, checkpoints left out). The record is written once the bundle is known to be there."""
    with repo.lock():
        handover = transfer.plan(repo, remote, kept)
        if not handover.parts:
            return None, handover.left_out
        if handover.objects:
            layout = bundle.lay_out({own: repo.store.stored_size(own) or 0 for own in handover.objects})
            key = remote.upload(layout, transfer.reader(repo.store, layout), progress)
            basis = Record(
                bundle=layout.id, key=key, created="", bytes=layout.size, objects=len(layout.places), parts={}
            )
        else:  # all of it lies in bundles that are there: what is new is only which
            relied = {own for needed in handover.parts.values() for own in needed}
            basis = next(record for record in remote.records if record.bundle in relied)
        record = Record(
            bundle=basis.bundle,
            key=basis.key,
            created=manifest.timestamp(now),
            bytes=basis.bytes,
            objects=basis.objects,
            parts={
                own: [ObjectId(one) if one else basis.bundle for one in needed]
                for own, needed in handover.parts.items()
            },
        )
        repo.catalog.add_record(record)
    return (record if handover.objects else None), handover.left_out


def _forget_gone(repo: Repo, remote: Actions, now: datetime) -> None:
    """Remove the records of bundles that were evicted long ago: each would be looked up again by every session."""
    missing = remote.missing()
    for record in remote.records:
        if record.bundle in missing and now - datetime.fromisoformat(record.created) > _GONE_AFTER:
            repo.catalog.remove_record(record)


def _changed(repo: Repo, *names: str) -> list[Path]:
    """Files of these folders that differ from the last commit, removed ones too."""
    top = git.root(repo.root.parent)
    found = git.uncommitted(repo.root, [name for name in names if (repo.root / name).exists()] or ["manifests"])
    if top is None or found is None:
        raise UsageError(f"git can't tell what has changed in {repo.root}: see `git status` there")
    return [top / name for name in found]


def _new_checkpoints(repo: Repo) -> list[Entry]:
    """Those that git has not committed yet, newest first."""
    changed = {path.name for path in _changed(repo, "manifests")}
    return [entry for entry in repo.checkpoints() if entry.manifest.file_name(entry.id).rpartition("/")[2] in changed]


def _session(repo: Repo, new: Sequence[Entry]) -> Session | None:
    if not new:
        return None
    made = sorted((entry.manifest for entry in new), key=lambda one: (one.created, one.step))
    ids = {entry.id for entry in new}
    before = next((one.parent for one in made if one.parent and one.parent not in ids), None)
    try:
        start = repo.catalog.find(before).manifest if before else None
    except CastoreError:  # its manifest was removed
        start = None
    losses = [one.metrics["val_loss"] for one in made if "val_loss" in one.metrics]
    return Session(
        run=made[-1].run,
        checkpoints=len(made),
        start_step=start.step if start else 0,
        final_step=made[-1].step,
        start_loss=start.metrics.get("val_loss") if start else None,
        final_loss=made[-1].metrics.get("val_loss"),
        best_loss=min(losses, default=None),
    )


def _message(session: Session | None) -> str:
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
        yield f"{told}{quality}: {match.availability}, {_text(found.resolution.want if found.resolution else '')}."
        if found.further:
            further = found.further.manifest
            yield ""
            yield f"From it a session was trained to step {further.step:,} before, which was fetched too."
        for text in match.differences:
            yield f"- differs: {_text(text)}"
    else:
        yield f"**Nothing to resume from**: {_text(found.fresh)}. Training begins at step 0."
    yield from _rejected_lines(found.resolution.rejected if found.resolution else ())
    yield ""
    yield _traffic_line(found.traffic)


def refused_markdown(reason: str) -> str:
    """The part of a job's summary for what ended in an error."""
    head, *rest = reason.split("\n")
    lines = [f"### castore: failed\n\n**{_text(head)}**\n", *(f"- {_text(line.strip())}" for line in rest[:_SHOWN])]
    return "\n".join(lines) + "\n\n"


def _rejected_lines(rejected: Sequence[Rejected]) -> Iterator[str]:
    if not rejected:
        return
    yield ""
    yield "| passed over | step | score | why |"
    yield "|---|---|---|---|"
    for one in rejected[:_SHOWN]:
        why = "; ".join(map(_text, one.reasons))
        yield f"| `{one.id[:12]}` of `{one.run}` | {one.step:,} | {words.number(one.score)} | {why} |"
    if len(rejected) > _SHOWN:
        yield f"| and {len(rejected) - _SHOWN} more | | | |"


def handed_on_markdown(found: HandedOn) -> str:
    """The part of a job's summary that tells what the session made, and what of it the next one can have."""
    return "\n".join(_handed_on_lines(found)) + "\n\n"


def _handed_on_lines(found: HandedOn) -> Iterator[str]:
    yield "### castore: saved"
    yield ""
    if found.skipped:
        yield f"**Nothing was saved**: {_text(found.skipped)}."
        return
    session = found.session
    if session:
        steps = f"step {session.start_step:,} to {session.final_step:,} ({session.final_step - session.start_step:,})"
        yield "| run | steps | validation loss | best | checkpoints |"
        yield "|---|---|---|---|---|"
        losses = f"{words.number(session.start_loss)} to {words.number(session.final_loss)}"
        best = words.number(session.best_loss)
        yield f"| `{session.run}` | {steps} | {losses} | {best} | {session.checkpoints} |"
    else:
        yield "No new checkpoint."
    yield ""
    if found.record:
        record = found.record
        yield f"Bundle `{record.bundle[:12]}`: {record.objects} objects, {words.size(record.bytes)}, confirmed."
    else:
        yield "The cache has all that is kept already."
    if found.plan:
        decisions = [one for one in found.plan.decisions if one.entry.manifest.kind == "checkpoint"]
        kept = sum(bool(one.parts) for one in decisions)
        freed = words.size(found.plan.freed_bytes)
        yield f"{kept} checkpoints are kept, {len(decisions) - kept} are history; {freed} were deleted here."
    yield from (f"- left out: `{own[:12]}`: {_text(reason)}" for own, reason in found.left_out)
    committed = f"pushed as `{found.commit[:12]}`" if found.commit else "staged" if found.staged else "nothing new"
    yield f"In git: {len(found.staged)} files, {committed}."
    yield ""
    yield _traffic_line(found.traffic)


def _traffic_line(traffic: Traffic) -> str:
    up, down = words.size(traffic.uploaded), words.size(traffic.downloaded)
    return f"{up} up, {down} down, {traffic.requests} requests to the cache."


def _text(text: str) -> str:
    """``text`` as text: nothing in it is taken for Markdown, HTML or the end of a cell."""
    return "".join(one if one.isalnum() or one in _PLAIN else f"&#{ord(one)};" for one in words.printable(text))


_PLAIN = " .,;/'\"=%?-"
