"""What a repository holds, as one report: quality, lineage, sessions, what is kept and why, and what all of it takes.

:func:`collect` reads and changes nothing. A report in hand, the rest is pure: its JSON, its Markdown, and the page that
``castore.report_page`` makes of it.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from castore import gc
from castore.errors import CastoreError
from castore.format import manifest
from castore.format.ids import ObjectId
from castore.format.manifest import Entry, Experiment
from castore.policy.resolution import Availability, Damaged, PartState, Requirement, Resolution, availability, resolve
from castore.policy.retention import Decision, Policy
from castore.policy.scoring import newest_first, rank, score
from castore.repo import Repo
from castore.stats import Stats, Usage, stats
from castore.storage import fs, output_file
from castore.text import escape_markdown, format_number, format_size

_MAX_SESSION_BYTES = 1 << 20
_SHOWN = 20  # rows of a table in a job's summary


class Passed(msgspec.Struct, frozen=True):
    """A checkpoint that a session did not begin with."""

    id: str = ""
    reasons: list[str] = msgspec.field(default_factory=list)


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """How a session's beginning was found, as its trainer recorded it."""

    want: str = ""
    match: str | None = None
    differences: list[str] = msgspec.field(default_factory=list)
    rejected: list[Passed] = msgspec.field(default_factory=list)
    rejected_count: int = 0
    damaged: list[str] = msgspec.field(default_factory=list)
    instead_of: str | None = None


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A training session, from its summary; without one, from what its checkpoints tell (``stopped`` is None then)."""

    run: str = ""
    started: str
    stopped: str | None = None
    start_step: int | None = None
    final_step: int | None = None
    resumed_from: str | None = None
    fresh: str = ""
    weights_only: bool = False
    resolution: Choice | None = None
    start_loss: float | None = None
    final_loss: float | None = None
    best_loss: float | None = None
    checkpoints: list[str] = msgspec.field(default_factory=list)
    skipped: list[str] = msgspec.field(default_factory=list)
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    connection_density: float | None = None
    environment: dict[str, Any] = msgspec.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint and what is known beside its manifest.

    ``keep``: the parts that the policy keeps, None when that couldn't be told. ``lane``: its row in the drawing of the
    lineage. ``session``: its place in the report's sessions.
    """

    entry: Entry
    score: float | None
    states: Mapping[str, PartState]
    experiment: int
    best_of_experiment: bool
    on_best_path: bool
    lane: int
    session: int | None
    keep: tuple[str, ...] | None
    reasons: tuple[str, ...]

    @property
    def availability(self) -> Availability:
        return availability(self.states)

    @property
    def kept_as(self) -> Availability | None:
        """What gc leaves of it, by the policy alone."""
        if self.keep is None:
            return None
        kept = {name: PartState("local" if name in self.keep else "missing") for name in self.entry.manifest.parts}
        return availability(kept)


@dataclass(frozen=True, slots=True)
class Difference:
    """A fact about the environment that isn't the same in all sessions: each value, and the sessions that had it."""

    key: str
    values: tuple[tuple[Any, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """``checkpoints`` come newest first, ``sessions`` oldest first, ``experiments`` as the checkpoints name them.

    ``best`` is the best of the line of the newest checkpoint, which may be history; ``resolution`` is what a session
    that resumes from the best would find. ``retention_problem``: why it can't be told what gc would do.
    ``elsewhere`` counts checkpoints that other branches have. ``broken``: files that aren't what their place says.
    """

    name: str
    made: str
    run: str | None
    checkpoints: tuple[Checkpoint, ...]
    experiments: tuple[Experiment, ...]
    best: ObjectId | None
    resolution: Resolution
    sessions: tuple[SessionRecord, ...]
    differences: tuple[Difference, ...]
    same: Mapping[str, Any]
    policy: Policy
    retention_problem: str
    elsewhere: int
    store: Stats
    broken: tuple[Damaged, ...]

    def find(self, own: str | None) -> Checkpoint | None:
        return next((one for one in self.checkpoints if one.entry.id == own), None)


# -- collecting --------------------------------------------------------------------------------------------------------


def collect_report(repo: Repo, now: datetime, run: str | None = None) -> Report:
    """Everything a report tells, of one ``run`` or of all. Nothing is changed. Locked, StorageError."""
    listing = repo.catalog.listing()
    entries = [
        one for one in listing.entries if one.manifest.kind == "checkpoint" and run in (None, one.manifest.run)
    ]  # fmt: skip
    broken = [Damaged(_below(one.path, repo.root), one.reason) for one in listing.broken]
    with repo.lock():
        states = {entry.id: repo.part_states(entry) for entry in entries}
    decisions, problem = _decisions(repo, now)
    known = {entry.id for entry in listing.entries}
    summaries, unreadable = _summaries(repo.root / "sessions", run)
    sessions = merge_sessions(summaries, entries)
    differences, same = compare_environments(sessions)
    experiments, checkpoints, best = _judge(entries, states, decisions, sessions, repo.config.resume.tie_tolerance)
    wanted = Requirement(
        experiment=experiments[0] if experiments else Experiment(),
        weights_only=True,
        tie_tolerance=repo.config.resume.tie_tolerance,
    )
    return Report(
        name=repo.root.parent.name,
        made=manifest.timestamp(now),
        run=run,
        checkpoints=checkpoints,
        experiments=experiments,
        best=best,
        resolution=resolve(wanted, entries, lambda entry: states[entry.id]),
        sessions=sessions,
        differences=differences,
        same=same,
        policy=repo.policy,
        retention_problem=problem,
        elsewhere=sum(own not in known for own, one in decisions.items() if one.entry.manifest.kind == "checkpoint"),
        store=stats(repo, now),
        broken=(*broken, *unreadable),
    )


def _below(path: Path, root: Path) -> str:
    """Where it is in the repository: a report may be shown to people whom the rest of the path is no concern of."""
    return os.path.relpath(path, root)


def _decisions(repo: Repo, now: datetime) -> tuple[dict[ObjectId, Decision], str]:
    try:
        plan = gc.collect_garbage(repo, dry_run=True, now=now)
    except CastoreError as error:
        return {}, str(error)
    return {one.entry.id: one for one in plan.decisions}, ""


def _judge(
    entries: Sequence[Entry],
    states: Mapping[ObjectId, Mapping[str, PartState]],
    decisions: Mapping[ObjectId, Decision],
    sessions: Sequence[SessionRecord],
    tie_tolerance: float,
) -> tuple[tuple[Experiment, ...], tuple[Checkpoint, ...], ObjectId | None]:
    """(lines, checkpoints, the best of the first line), the line of the newest checkpoint first."""
    grouped: dict[bytes, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(msgspec.json.encode(entry.manifest.experiment, order="sorted"), []).append(entry)
    bests = [rank(group, tie_tolerance)[0].id for group in grouped.values()]
    line_of = {entry.id: i for i, group in enumerate(grouped.values()) for entry in group}
    path = frozenset(ancestors(entries, bests[0]) if bests else ())
    places = lanes(entries, path)
    number_of = {(one.run, one.started): i for i, one in enumerate(sessions)}
    found = []
    for entry in entries:
        decision = decisions.get(entry.id)
        found.append(
            Checkpoint(
                entry=entry,
                score=score(entry.manifest),
                states=states[entry.id],
                experiment=line_of[entry.id],
                best_of_experiment=entry.id in bests,
                on_best_path=entry.id in path,
                lane=places[entry.id],
                session=number_of.get((entry.manifest.run, _started(entry))),
                keep=decision.parts if decision else None,
                reasons=decision.reasons if decision else (),
            )
        )
    lines = tuple(group[0].manifest.experiment for group in grouped.values())
    return lines, tuple(found), bests[0] if bests else None


def ancestors(entries: Iterable[Entry], own: ObjectId) -> list[ObjectId]:
    """``own``, its parent, that one's parent and so on, as far as they are among ``entries``."""
    parents = {entry.id: entry.manifest.parent for entry in entries}
    found: list[ObjectId] = []
    at: ObjectId | None = own
    while at in parents:
        found.append(at)
        at = parents[at]
    return found


def lanes(entries: Sequence[Entry], best_path: frozenset[ObjectId]) -> dict[ObjectId, int]:
    """A row for each checkpoint, of a drawing with steps from left to right, in which no two branches overlap.

    A branch goes on in its parent's row along the best path or else with the heaviest child; the best path is in row 0.
    """
    known = {entry.id: entry for entry in entries}
    children: dict[ObjectId | None, list[Entry]] = {}
    for entry in sorted(entries, key=lambda one: (one.manifest.created, one.manifest.step, one.id)):
        parent = entry.manifest.parent
        children.setdefault(parent if parent in known else None, []).append(entry)
    order = list(children.get(None, ()))
    for entry in order:  # grows while it is walked
        order += children.get(entry.id, ())
    weights: Counter[ObjectId] = Counter()
    for entry in reversed(order):
        weights[entry.id] += 1
        if entry.manifest.parent in known:
            weights[entry.manifest.parent] += weights[entry.id]

    def worth(entry: Entry) -> tuple[bool, int]:
        return entry.id in best_path, weights[entry.id]

    found: dict[ObjectId, int] = {}
    taken: list[list[tuple[int, int]]] = []  # of each row, the spans of steps
    pending = sorted(children.get(None, ()), key=worth, reverse=True)
    for start in pending:  # grows while it is walked
        branch = [start]
        while below := children.get(branch[-1].id):
            first, *rest = sorted(below, key=worth, reverse=True)
            branch.append(first)
            pending += rest
        steps = [one.manifest.step for one in branch]
        if start.manifest.parent in known:
            steps.append(known[start.manifest.parent].manifest.step)
        span = min(steps), max(steps)
        row = next(
            (i for i, spans in enumerate(taken) if all(b < span[0] or span[1] < a for a, b in spans)), len(taken)
        )
        if row == len(taken):
            taken.append([])
        taken[row].append(span)
        found |= dict.fromkeys((one.id for one in branch), row)
    return found


# -- sessions ----------------------------------------------------------------------------------------------------------


def _summaries(folder: Path, run: str | None) -> tuple[list[SessionRecord], list[Damaged]]:
    """The summaries kept for a run or all of them, and the files that aren't one."""
    found, broken = [], []
    for path in sorted(folder.glob("*/*.json")):
        if run not in (None, path.parent.name):
            continue
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ValueError("not a file")
            session = msgspec.json.decode(fs.read(path, _MAX_SESSION_BYTES), type=SessionRecord)
            # the folder says whose it is: manifests name their run too, and both have to mean the same
            found.append(msgspec.structs.replace(session, run=path.parent.name))
        except (OSError, ValueError, CastoreError, RecursionError) as error:
            broken.append(Damaged(_below(path, folder.parent), f"not a session's summary: {error}"))
    return found, broken


def merge_sessions(summaries: Iterable[SessionRecord], entries: Iterable[Entry]) -> tuple[SessionRecord, ...]:
    """The sessions of which a summary or a checkpoint tells, oldest first. A summary knows more and wins."""
    found = {(one.run, one.started): one for one in summaries}
    made: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if started := _started(entry):
            made.setdefault((entry.manifest.run, started), []).append(entry)
    for key, of_session in made.items():
        if key not in found and (session := _reconstructed(newest_first(of_session))) is not None:
            found[key] = session
    return tuple(sorted(found.values(), key=lambda one: (one.started, one.run)))


def _started(entry: Entry) -> str:
    session = entry.manifest.info.get("session")
    started = session.get("started") if isinstance(session, Mapping) else None
    return started if isinstance(started, str) else ""


def _reconstructed(made: Sequence[Entry]) -> SessionRecord | None:
    """A session from its checkpoints, newest first; None when they record none that can be read."""
    last = made[0].manifest
    losses = [one.manifest.metrics["val_loss"] for one in made if "val_loss" in one.manifest.metrics]
    told = {name: last.info.get(name) for name in ("tokens_per_second", "connection_density", "environment")}
    facts = {
        **last.info["session"],
        **{name: value for name, value in told.items() if value is not None},
        "run": last.run,
        "stopped": None,
        "final_step": last.step,
        "final_loss": last.metrics.get("val_loss"),
        "best_loss": min(losses, default=None),
        "checkpoints": [one.id for one in reversed(made)],
    }
    try:
        return msgspec.convert(facts, SessionRecord)
    except msgspec.ValidationError:
        return None


def compare_environments(sessions: Sequence[SessionRecord]) -> tuple[tuple[Difference, ...], dict[str, Any]]:
    """(what differs between sessions, what is the same in all), those that differ least first."""
    values: dict[str, dict[bytes, tuple[Any, list[int]]]] = {}
    for i, session in enumerate(sessions):
        for key, value in session.environment.items():
            seen = values.setdefault(key, {})
            seen.setdefault(msgspec.json.encode(value, order="sorted"), (value, []))[1].append(i)
    told = sum(bool(session.environment) for session in sessions)
    differs, same = [], {}
    for key, seen in sorted(values.items(), key=lambda item: (len(item[1]), item[0])):
        whole = sum(len(numbers) for _, numbers in seen.values())
        if len(seen) == 1 and whole == told:
            same[key] = next(iter(seen.values()))[0]
        else:
            differs.append(Difference(key, tuple((value, tuple(numbers)) for value, numbers in seen.values())))
    return tuple(differs), same


# -- as JSON -----------------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON values. Whole manifests are left to ``castore show``."""
    match = report.resolution.match
    return {
        "name": report.name,
        "made": report.made,
        "run": report.run,
        "best": report.best,
        "next": asdict(match) if match else None,
        "passed_over": [asdict(one) for one in report.resolution.rejected],
        "checkpoints": [_checkpoint_json(one) for one in report.checkpoints],
        "experiments": [msgspec.to_builtins(experiment) for experiment in report.experiments],
        "sessions": [msgspec.to_builtins(one) for one in report.sessions],
        "environment": {
            "differences": [
                {"key": one.key, "values": [{"value": value, "sessions": list(who)} for value, who in one.values]}
                for one in report.differences
            ],
            "same": dict(report.same),
        },
        "retention": {
            "policy": {**asdict(report.policy), "data_ttl": report.policy.data_ttl.total_seconds()},
            "problem": report.retention_problem,
            "counts": dict(_kept_counts(report)),
            "elsewhere": report.elsewhere,
        },
        "store": _store_json(report.store),
        "broken": [asdict(one) for one in report.broken],
    }


def _checkpoint_json(one: Checkpoint) -> dict[str, Any]:
    found = one.entry.manifest
    return {
        "id": one.entry.id,
        "run": found.run,
        "step": found.step,
        "created": found.created,
        "parent": found.parent,
        "score": one.score,
        "metrics": found.metrics,
        "tags": found.tags,
        "note": found.note,
        "parts": {
            name: {**msgspec.to_builtins(part), "where": one.states[name].where} for name, part in found.parts.items()
        },
        "availability": one.availability,
        "kept_as": one.kept_as,
        "keep": None if one.keep is None else list(one.keep),
        "reasons": list(one.reasons),
        "experiment": one.experiment,
        "best_of_experiment": one.best_of_experiment,
        "on_best_path": one.on_best_path,
        "lane": one.lane,
        "session": one.session,
        "connection_density": _recorded(found.info, "connection_density"),
        "tokens_per_second": _recorded(found.info, "tokens_per_second"),
    }


def _recorded(info: Mapping[str, Any], name: str) -> float | None:
    value = info.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _kept_counts(report: Report) -> Counter[str]:
    return Counter(one.kept_as for one in report.checkpoints if one.kept_as)


def _store_json(store: Stats) -> dict[str, Any]:
    return {
        "manifests": dict(store.manifests),
        "availability": dict(store.availability),
        "objects": asdict(store.objects),
        "total": _usage_json(store.total),
        "unneeded": store.unneeded,
        "by_part": {name: _usage_json(one) for name, one in sorted(store.by_part.items())},
        "by_run": {name: _usage_json(one) for name, one in sorted(store.by_run.items())},
        "gc": asdict(store.gc),
        "folders": {name: asdict(one) for name, one in store.folders.items()},
    }


def _usage_json(one: Usage) -> dict[str, int]:
    saved = {"saved_by_sharing": one.saved_by_sharing, "saved_by_compression": one.saved_by_compression}
    return {**asdict(one), **saved}


# -- as Markdown -------------------------------------------------------------------------------------------------------


def as_markdown(report: Report) -> str:
    """The report for a job's summary: where it stands, the best, the newest checkpoints, what is kept and stored."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"### castore: {escape_markdown(report.name)}{f', run `{report.run}`' if report.run else ''}"
    yield ""
    yield from (
        f"- **can't be read**: {escape_markdown(one.path)}: {escape_markdown(one.reason)}"
        for one in report.broken[:_SHOWN]
    )
    if report.broken:
        yield ""
    if not report.checkpoints:
        yield "No checkpoint yet: `castore train` makes the first one."
        return
    yield from _standing(report)
    yield ""
    yield from _table(report)
    yield ""
    yield from _retention(report)
    total = report.store.total
    if total.raw:
        shared, packed = format_size(total.saved_by_sharing), format_size(total.saved_by_compression)
        held = f"{format_size(total.stored)} hold what would take {format_size(total.raw)}"
        yield f"- **Store**: {held}; sharing saves {shared}, compression {packed}."
    else:
        yield "- **Store**: none of the data is here."


def _standing(report: Report) -> Iterator[str]:
    newest = report.checkpoints[0].entry
    runs = len({one.entry.manifest.run for one in report.checkpoints})
    yield (
        f"- **Stands at** step {newest.manifest.step:,} of run `{newest.manifest.run}`: {len(report.checkpoints):,} "
        f"checkpoints of {runs} {'run' if runs == 1 else 'runs'}, {len(report.sessions):,} sessions."
    )
    if best := report.find(report.best):
        yield f"- **Best** {_named(best)}."
    match = report.resolution.match
    if match and match.id != report.best:
        yield f"- **The next session** begins with `{match.id[:12]}`, step {match.step:,}: {match.availability}."
    elif not match:
        yield "- **The next session** finds nothing to begin with: the data of no checkpoint can be had."
    if report.sessions:
        last = report.sessions[-1]
        losses = f"{format_number(last.start_loss)} to {format_number(last.final_loss)}"
        steps = f"step {_count(last.start_step)} to {_count(last.final_step)}"
        stopped = f"stopped: {escape_markdown(last.stopped)}" if last.stopped else "no summary of it was kept"
        yield f"- **Last session** of run `{last.run}`: {steps}, validation loss {losses}; {stopped}."


def _named(one: Checkpoint) -> str:
    found = one.entry.manifest
    loss = f", validation loss {format_number(found.metrics['val_loss'])}" if "val_loss" in found.metrics else ""
    told = f"`{one.entry.id[:12]}`, step {found.step:,} of run `{found.run}`{loss}"
    return f"{told}, score {format_number(one.score)}, {one.availability}"


def _table(report: Report) -> Iterator[str]:
    yield "| checkpoint | run | step | val loss | score | data | kept as | tags |"
    yield "|---|---|--:|--:|--:|---|---|---|"
    for one in report.checkpoints[:_SHOWN]:
        found = one.entry.manifest
        best = " **best**" if one.entry.id == report.best else ""
        yield (
            f"| `{one.entry.id[:12]}`{best} | `{found.run}` | {found.step:,} "
            f"| {format_number(found.metrics.get('val_loss'))} | {format_number(one.score)} | {one.availability} "
            f"| {one.kept_as or '-'} | {' '.join(map(escape_markdown, found.tags))} |"
        )
    if len(report.checkpoints) > _SHOWN:
        yield f"| and {len(report.checkpoints) - _SHOWN:,} older ones | | | | | | | |"


def _retention(report: Report) -> Iterator[str]:
    if report.retention_problem:
        yield f"- **Retention**: can't be told: {escape_markdown(report.retention_problem)}"
        return
    counts = _kept_counts(report)
    told = ", ".join(f"{counts[name]:,} {name}" for name in ("full", "weights-only", "history"))
    freed = format_size(report.store.gc.bytes)
    yield f"- **Retention**: the policy keeps {told}; `castore gc` would free {freed}."


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


# -- as a file ---------------------------------------------------------------------------------------------------------


def check_target(out: Path) -> None:
    """Raise RefusedPath unless a report may be written there: nothing is there yet, or a regular file."""
    output_file.check_target(out, replace=True)


def write_report(out: Path, data: bytes) -> None:
    """Write ``data`` to a file that appears, or is replaced, complete or not at all. RefusedPath, StorageError."""
    output_file.write(out, data, replace=True, durable=False)
