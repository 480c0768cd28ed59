"""Collect what a repository holds into one report: quality, lineage, sessions, retention and storage.

:func:`collect_report` only reads. What is made of a :class:`Report` is pure, one file for each form: ``as_json``,
``markdown`` and ``html``.
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec

from castore.errors import CastoreError, printable
from castore.format import manifest
from castore.format.ids import ObjectId
from castore.format.manifest import Entry, Experiment
from castore.gc import GCPlan
from castore.policy.lineage import ancestors, lanes
from castore.policy.order import newest_first
from castore.policy.resolution import Availability, Damaged, PartState, Requirement, Resolution, availability, resolve
from castore.policy.retention import Decision, Policy
from castore.policy.scoring import rank, score
from castore.repo import Repo
from castore.stats import Stats, plan_gc, stats
from castore.storage import fs, output_file

_MAX_SESSION_BYTES = 1 << 20


class RecordedRejection(msgspec.Struct, frozen=True):
    """A checkpoint that a session passed over when it looked for one to resume."""

    id: str = ""
    reasons: list[str] = msgspec.field(default_factory=list)


class RecordedResolution(msgspec.Struct, frozen=True, kw_only=True):
    """How a session found the checkpoint it resumed, as its trainer recorded it."""

    want: str = ""
    match: str | None = None
    differences: list[str] = msgspec.field(default_factory=list)
    rejected: list[RecordedRejection] = msgspec.field(default_factory=list)
    rejected_count: int = 0
    damaged: list[str] = msgspec.field(default_factory=list)
    instead_of: str | None = None


class RecordedLosses(msgspec.Struct, frozen=True):
    """The training loss of a session: ``means`` over spans of ``every`` steps from step ``first`` on, as text."""

    first: Annotated[int, msgspec.Meta(ge=0)]
    every: Annotated[int, msgspec.Meta(ge=1)]
    means: str

    def __post_init__(self) -> None:
        """Raise ValueError unless the means are numbers with spaces between."""
        if not all(math.isfinite(float(mean)) for mean in self.means.split()):
            raise ValueError("a training loss is not finite")


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A training session, read from its summary.

    If no summary was kept, it is reconstructed from the session's checkpoints, and ``stopped`` is None.
    """

    run: str = ""
    started: str
    stopped: str | None = None
    start_step: int | None = None
    final_step: int | None = None
    resumed_from: str | None = None
    fresh: str = ""
    weights_only: bool = False
    resolution: RecordedResolution | None = None
    start_loss: float | None = None
    final_loss: float | None = None
    best_loss: float | None = None
    train_losses: RecordedLosses | None = None
    checkpoints: list[str] = msgspec.field(default_factory=list)
    skipped: list[str] = msgspec.field(default_factory=list)
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    connection_density: float | None = None
    environment: dict[str, Any] = msgspec.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedCheckpoint:
    """A checkpoint, and what the report knows about it beside its manifest.

    ``experiment`` and ``session`` are positions in the report's lists of them. ``keep``: the parts that the policy
    keeps, or None if there is no plan. ``lane``: the checkpoint's row in the drawing of the lineage.
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
        """What gc would leave of the checkpoint, judged by the policy alone."""
        if self.keep is None:
            return None
        kept = {name: PartState("local" if name in self.keep else "missing") for name in self.entry.manifest.parts}
        return availability(kept)


@dataclass(frozen=True, slots=True)
class EnvironmentDifference:
    """A fact about the environment that differs between sessions: (value, positions of the sessions) pairs."""

    key: str
    values: tuple[tuple[Any, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """``checkpoints`` come newest first, ``sessions`` oldest first; ``experiments``: that of the newest one first.

    ``best`` is the best checkpoint of the newest checkpoint's experiment, even if its data is gone; ``resolution`` is
    what a session that resumes from the best would get. ``retention_problem``: the reason why there is no plan of gc.
    ``elsewhere`` counts the checkpoints that only other branches have. ``broken`` lists unreadable files.
    """

    name: str
    made: str
    run: str | None
    checkpoints: tuple[ReportedCheckpoint, ...]
    experiments: tuple[Experiment, ...]
    best: ObjectId | None
    resolution: Resolution
    sessions: tuple[SessionRecord, ...]
    differences: tuple[EnvironmentDifference, ...]
    same: Mapping[str, Any]
    policy: Policy
    retention_problem: str
    elsewhere: int
    store: Stats
    broken: tuple[Damaged, ...]

    def find(self, checkpoint_id: str | None) -> ReportedCheckpoint | None:
        return next((checkpoint for checkpoint in self.checkpoints if checkpoint.entry.id == checkpoint_id), None)

    @property
    def kept_counts(self) -> Counter[str]:
        """How many checkpoints the policy keeps in full, as weights only and as history."""
        return Counter(checkpoint.kept_as for checkpoint in self.checkpoints if checkpoint.kept_as)


# -- collecting --------------------------------------------------------------------------------------------------------


def collect_report(repo: Repo, now: datetime, run: str | None = None) -> Report:
    """Collect the report of ``run``, or of all runs if None. Only reads. Raise Locked or StorageError."""
    listing = repo.catalog.listing()
    entries = [entry for entry in listing.entries if _is_reported(entry, run)]
    with repo.lock():
        states = repo.part_states_of(entries)
    plan = plan_gc(repo, now)
    decisions = {decision.entry.id: decision for decision in plan.decisions} if isinstance(plan, GCPlan) else {}
    known = {entry.id for entry in listing.entries}
    summaries, unreadable = _read_summaries(repo.root / "sessions", run)
    sessions = merge_sessions(summaries, entries)
    differences, same = compare_environments(sessions)
    tie_tolerance = repo.config.resume.tie_tolerance
    experiments, checkpoints, best = _judge(entries, states, decisions, sessions, tie_tolerance)
    requirement = Requirement(
        experiment=experiments[0] if experiments else Experiment(), weights_only=True, tie_tolerance=tie_tolerance
    )
    return Report(
        name=printable(repo.root.parent.name),
        made=manifest.timestamp(now),
        run=run,
        checkpoints=checkpoints,
        experiments=experiments,
        best=best,
        resolution=resolve(requirement, entries, lambda entry: states[entry.id]),
        sessions=sessions,
        differences=differences,
        same=same,
        policy=repo.policy,
        retention_problem=str(plan) if isinstance(plan, CastoreError) else "",
        elsewhere=sum(
            decision.entry.id not in known for decision in decisions.values() if _is_reported(decision.entry)
        ),
        store=stats(repo, now, plan),
        broken=(*(Damaged(_below(file.path, repo.root), file.reason) for file in listing.broken), *unreadable),
    )


def _is_reported(entry: Entry, run: str | None = None) -> bool:
    return entry.manifest.kind == "checkpoint" and run in (None, entry.manifest.run)


def _below(path: Path, root: Path) -> str:
    """Return ``path`` relative to ``root``: the rest of it is no business of the people a report is shown to."""
    return printable(os.path.relpath(path, root))


def _judge(
    entries: Sequence[Entry],
    states: Mapping[ObjectId, Mapping[str, PartState]],
    decisions: Mapping[ObjectId, Decision],
    sessions: Sequence[SessionRecord],
    tie_tolerance: float,
) -> tuple[tuple[Experiment, ...], tuple[ReportedCheckpoint, ...], ObjectId | None]:
    """Return (experiments, checkpoints, best of the first experiment), the newest checkpoint's experiment first."""
    groups: dict[bytes, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(msgspec.json.encode(entry.manifest.experiment, order="sorted"), []).append(entry)
    bests = [next(rank(group, tie_tolerance)).id for group in groups.values()]
    experiment_of = {entry.id: number for number, group in enumerate(groups.values()) for entry in group}
    best_path = frozenset(ancestors(entries, bests[0]) if bests else ())
    lane_of = lanes(entries, best_path)
    session_of = {(session.run, session.started): number for number, session in enumerate(sessions)}
    checkpoints = []
    for entry in entries:
        decision = decisions.get(entry.id)
        checkpoints.append(
            ReportedCheckpoint(
                entry=entry,
                score=score(entry.manifest),
                states=states[entry.id],
                experiment=experiment_of[entry.id],
                best_of_experiment=entry.id in bests,
                on_best_path=entry.id in best_path,
                lane=lane_of[entry.id],
                session=session_of.get((entry.manifest.run, _session_start(entry))),
                keep=decision.parts if decision else None,
                reasons=decision.reasons if decision else (),
            )
        )
    experiments = tuple(group[0].manifest.experiment for group in groups.values())
    return experiments, tuple(checkpoints), bests[0] if bests else None


# -- sessions ----------------------------------------------------------------------------------------------------------


def _read_summaries(folder: Path, run: str | None) -> tuple[list[SessionRecord], list[Damaged]]:
    """Return the session summaries of one run or of all, and the files that are not valid summaries."""
    sessions, broken = [], []
    for path in sorted(folder.glob("*/*.json")):
        if run not in (None, path.parent.name):
            continue
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ValueError("not a file")
            session = msgspec.json.decode(fs.read(path, _MAX_SESSION_BYTES), type=SessionRecord)
            # the folder decides which run it is: sessions are matched with manifests, which lie in such folders too
            sessions.append(msgspec.structs.replace(session, run=path.parent.name))
        except (OSError, ValueError, CastoreError, RecursionError) as error:
            broken.append(Damaged(_below(path, folder.parent), f"not a session's summary: {error}"))
    return sessions, broken


def merge_sessions(summaries: Iterable[SessionRecord], entries: Iterable[Entry]) -> tuple[SessionRecord, ...]:
    """Return every session that left a summary or a checkpoint, oldest first. A summary knows more and wins."""
    sessions = {(session.run, session.started): session for session in summaries}
    entries_of: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if started := _session_start(entry):
            entries_of.setdefault((entry.manifest.run, started), []).append(entry)
    for key, made in entries_of.items():
        if key not in sessions and (session := _reconstruct_session(newest_first(made))) is not None:
            sessions[key] = session
    return tuple(sorted(sessions.values(), key=lambda session: (session.started, session.run)))


def _session_start(entry: Entry) -> str:
    """When the session that made a checkpoint started, or "" if its manifest does not say."""
    session = entry.manifest.info.get("session")
    started = session.get("started") if isinstance(session, Mapping) else None
    return started if isinstance(started, str) else ""


def _reconstruct_session(entries: Sequence[Entry]) -> SessionRecord | None:
    """Reconstruct a session from its checkpoints, newest first; None if what they record is not valid."""
    newest = entries[0].manifest
    losses = [entry.manifest.metrics["val_loss"] for entry in entries if "val_loss" in entry.manifest.metrics]
    recorded = {name: newest.info.get(name) for name in ("tokens_per_second", "connection_density", "environment")}
    facts = {
        **newest.info["session"],
        **{name: value for name, value in recorded.items() if value is not None},
        "run": newest.run,
        "stopped": None,
        "final_step": newest.step,
        "final_loss": newest.metrics.get("val_loss"),
        "best_loss": min(losses, default=None),
        "checkpoints": [entry.id for entry in reversed(entries)],
    }
    try:
        return msgspec.convert(facts, SessionRecord)
    except msgspec.ValidationError:
        return None


def compare_environments(
    sessions: Sequence[SessionRecord],
) -> tuple[tuple[EnvironmentDifference, ...], dict[str, Any]]:
    """Return (facts that differ between sessions, facts that are equal in all); those with fewest values come first."""
    numbers_of: dict[str, dict[bytes, tuple[Any, list[int]]]] = {}
    for number, session in enumerate(sessions):
        for key, value in session.environment.items():
            values = numbers_of.setdefault(key, {})
            values.setdefault(msgspec.json.encode(value, order="sorted"), (value, []))[1].append(number)
    with_environment = sum(bool(session.environment) for session in sessions)
    differences, same = [], {}
    for key, values in sorted(numbers_of.items(), key=lambda item: (len(item[1]), item[0])):
        with_key = sum(len(numbers) for _, numbers in values.values())
        if len(values) == 1 and with_key == with_environment:
            same[key] = next(iter(values.values()))[0]
        else:
            pairs = tuple((value, tuple(numbers)) for value, numbers in values.values())
            differences.append(EnvironmentDifference(key, pairs))
    return tuple(differences), same


# -- as a file ---------------------------------------------------------------------------------------------------------


def check_target(out: Path) -> None:
    """Raise RefusedPath unless a report may be written there: nothing is there yet, or a regular file."""
    output_file.check_target(out, replace=True)


def write_report(out: Path, data: bytes) -> None:
    """Write ``data`` to a file that appears, or is replaced, complete or not at all. RefusedPath, StorageError."""
    output_file.write(out, data, replace=True, durable=False)
