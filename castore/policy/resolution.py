"""Requirement x manifests x availability -> the checkpoint to use, and a reason for every other one. Pure.

Compatible is what can be loaded and means the same: equal model parameters, tokenizer and data. Best is decided by
score inside the requirement's own experiment; compatible checkpoints that were evaluated otherwise come after all of
those, newest first, since their scores say nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from castore.errors import CorruptManifest, NothingAvailable, NothingMatches, printable
from castore.format.ids import ObjectId
from castore.format.manifest import Entry, Experiment
from castore.policy.scoring import newest_first, rank, score

_SHOWN = 10
_LISTED_EACH = 3  # for the same reason, before they are summed up


@dataclass(frozen=True, slots=True)
class PartState:
    """Where a part's data is, and if it can't be had, why."""

    where: Literal["local", "remote", "missing"]
    reason: str = ""


Availability = Literal["full", "weights-only", "history"]


def availability(parts: Mapping[str, PartState]) -> Availability:
    """Of a manifest, from the state of its parts: everything, the model alone, or nothing usable."""
    if all(state.where != "missing" for state in parts.values()):
        return "full"
    if "model" in parts and parts["model"].where != "missing":
        return "weights-only"
    return "history"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """What a run needs. ``want`` is ``best``, ``latest`` or a full id.

    ``config`` is the run's free-form configuration, for listing differences; None to compare none. ``parts`` are those
    that must be there, all that the checkpoint has when None. When no candidate has them and ``weights_only`` is true,
    the first that has a model will do.
    """

    want: str = "best"
    experiment: Experiment = field(default_factory=Experiment)
    config: Mapping[str, Any] | None = None
    parts: tuple[str, ...] | None = None
    weights_only: bool = False
    allow_data_change: bool = False
    tie_tolerance: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The checkpoint to use. ``differences`` lists what is not the same there but may differ."""

    id: ObjectId
    step: int
    run: str
    score: float | None
    availability: Availability
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A checkpoint that was considered and not used. ``unavailable``: compatible, but its data can't be had."""

    id: ObjectId
    step: int
    run: str
    score: float | None
    reasons: tuple[str, ...]
    unavailable: bool = False


@dataclass(frozen=True, slots=True)
class Damaged:
    """A file that should be a manifest and can't be read as one: what it was may have been better than the match."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """``match``, or None; and every checkpoint that came before it or could not be used, with reasons."""

    want: str
    match: Match | None
    rejected: tuple[Rejected, ...]
    damaged: tuple[Damaged, ...] = ()

    @property
    def unavailable(self) -> tuple[Rejected, ...]:
        """The rejected ones that would do if their data were there."""
        return tuple(rejected for rejected in self.rejected if rejected.unavailable)

    def explain_rejections(self) -> list[str]:
        """Say which checkpoints were passed over and why; of many with the same reason in one run, give the range."""
        groups: dict[tuple[str, tuple[str, ...]], list[Rejected]] = {}
        for rejected in self.rejected:
            groups.setdefault((rejected.run, rejected.reasons), []).append(rejected)
        lines = []
        for (run, reasons), members in groups.items():
            why = "; ".join(reasons)
            if len(members) <= _LISTED_EACH:
                lines += [f"{member.id[:12]}, step {member.step:,} of run {run}: {why}" for member in members]
            else:
                steps = [member.step for member in members]
                span = f"steps {min(steps):,} to {max(steps):,}"
                lines.append(f"{len(members)} checkpoints, {span} of run {run}: {why}")
        if len(lines) > _SHOWN:
            lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more: `castore resolve --json` lists them"]
        return lines

    def require(self) -> Match:
        """The match. CorruptManifest, NothingAvailable or NothingMatches, with the reasons, when there is none."""
        if self.match is not None:
            return self.match
        for damaged in self.damaged:
            raise CorruptManifest(damaged.path, damaged.reason)
        if self.unavailable:
            head = f"{len(self.unavailable)} compatible checkpoint(s), but the data of none can be had"
            raise NothingAvailable(head + _listed(self.unavailable))
        if self.rejected:
            raise NothingMatches(f"none of {len(self.rejected)} checkpoint(s) fits" + _listed(self.rejected))
        raise NothingMatches("there is no checkpoint yet: `castore train` makes the first one")


def resolve(
    requirement: Requirement,
    entries: Iterable[Entry],
    parts_of: Callable[[Entry], Mapping[str, PartState]],
) -> Resolution:
    """The first candidate, in order of preference, whose needed parts can be had.

    ``parts_of`` is asked about compatible candidates alone, and not beyond the match: finding out may cost a look at
    a remote.
    """
    if requirement.want not in ("best", "latest"):
        entries = [entry for entry in entries if entry.id == requirement.want]
    compatible = []
    rejected = []
    for entry in entries:
        problems = _incompatibilities(requirement, entry.manifest.experiment)
        if problems:
            rejected.append(_reject(entry, problems))
        else:
            compatible.append(entry)
    unavailable = []
    match = None
    for entry in _preference(requirement, compatible):
        parts = parts_of(entry)
        missing = _missing(parts, tuple(entry.manifest.parts) if requirement.parts is None else requirement.parts)
        if not missing:
            match = _match(requirement, entry, availability(parts))
            break
        unavailable.append((entry, parts, missing))
    if match is None and requirement.weights_only:
        usable = (entry for entry, parts, _ in unavailable if availability(parts) != "history")
        match = next((_match(requirement, entry, "weights-only") for entry in usable), None)
    passed = [_reject(one, missing, unavailable=True) for one, _, missing in unavailable if not _is(match, one)]
    return Resolution(requirement.want, match, tuple(passed + rejected))


def _missing(parts: Mapping[str, PartState], needed: Sequence[str]) -> list[str]:
    """Why not all of the needed parts can be had, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name in needed:
        state = parts.get(name, PartState("missing", "this checkpoint has no such part"))
        if state.where == "missing":
            reasons.setdefault(state.reason, []).append(name)
    return [
        reason if len(names) == len(needed) > 1 else f"{', '.join(names)}: {reason}"
        for reason, names in reasons.items()
    ]


def _is(match: Match | None, entry: Entry) -> bool:
    return match is not None and match.id == entry.id


def _preference(requirement: Requirement, compatible: list[Entry]) -> list[Entry]:
    if requirement.want != "best":
        return newest_first(compatible)
    own = [entry for entry in compatible if entry.manifest.experiment == requirement.experiment]
    others = [entry for entry in compatible if entry.manifest.experiment != requirement.experiment]
    return rank(own, requirement.tie_tolerance) + newest_first(others)


def _incompatibilities(requirement: Requirement, experiment: Experiment) -> list[str]:
    need = requirement.experiment
    problems = [f"model {text}" for text in _differing(need.model, experiment.model)]
    if need.tokenizer != experiment.tokenizer:
        problems.append(_differs("tokenizer", need.tokenizer, experiment.tokenizer))
    if need.data != experiment.data and not requirement.allow_data_change:
        problems.append(_differs("data", need.data, experiment.data))
    return problems


def _match(requirement: Requirement, entry: Entry, available: Availability) -> Match:
    manifest = entry.manifest
    need = requirement.experiment
    differences = [] if requirement.config is None else _differing(requirement.config, manifest.config)
    if need.data != manifest.experiment.data:
        differences.append(_differs("data", need.data, manifest.experiment.data))
    differences += [f"evaluation {text}" for text in _differing(need.evaluation, manifest.experiment.evaluation)]
    if need.metrics != manifest.experiment.metrics:
        differences.append("other metrics are declared")
    return Match(
        id=entry.id,
        step=manifest.step,
        run=manifest.run,
        score=score(manifest),
        availability=available,
        differences=tuple(differences),
    )


def _reject(entry: Entry, reasons: Iterable[str], unavailable: bool = False) -> Rejected:
    return Rejected(
        id=entry.id,
        step=entry.manifest.step,
        run=entry.manifest.run,
        score=score(entry.manifest),
        reasons=tuple(reasons),
        unavailable=unavailable,
    )


def _differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """One line for each key whose value is not the same, with both values."""
    return [
        _differs(key, here.get(key, "absent"), there.get(key, "absent"))
        for key in sorted({*here, *there})
        if here.get(key, _ABSENT) != there.get(key, _ABSENT)
    ]


_ABSENT = object()


def _differs(name: str, here: object, there: object) -> str:
    return f"{printable(name)} is {_short(there)} there, {_short(here)} here"


def _short(value: object) -> str:
    text = printable(str(value))
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_digest else text[:60]


def _listed(rejected: tuple[Rejected, ...]) -> str:
    lines = [
        f"\n  {one.id[:12]} (run {one.run}, step {one.step}): {'; '.join(one.reasons)}" for one in rejected[:_SHOWN]
    ]
    more = len(rejected) - _SHOWN
    return "".join(lines) + (f"\n  and {more} more" if more > 0 else "")
