"""Choose the checkpoint to resume from, and give a reason for every checkpoint that was rejected. Pure.

A checkpoint is compatible if it can be loaded and means the same: equal model parameters, tokenizer and data. ``best``
goes by score within the requirement's own experiment. Compatible checkpoints of other experiments come after all of
those, newest first, since their scores can't be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from castore.errors import CorruptManifest, NothingAvailable, NothingMatches, printable
from castore.format.ids import ObjectId
from castore.format.manifest import Entry, Experiment
from castore.policy.order import newest_first
from castore.policy.scoring import rank, score

_MOST_LINES = 10  # of rejections in an error or explanation
_LISTED_EACH = 3  # rejections with the same reason; more of them are summed up in one line


@dataclass(frozen=True, slots=True)
class PartState:
    """The availability of a part's data and, if it is missing, the reason."""

    where: Literal["local", "remote", "missing"]
    reason: str = ""


Availability = Literal["full", "weights-only", "history"]


def availability(parts: Mapping[str, PartState]) -> Availability:
    """Return a manifest's availability, given the states of its parts: all, the model alone, or nothing usable."""
    if all(state.where != "missing" for state in parts.values()):
        return "full"
    if "model" in parts and parts["model"].where != "missing":
        return "weights-only"
    return "history"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """What a run needs. ``selector`` is ``best``, ``latest`` or a full checkpoint id.

    ``config`` is the run's free-form configuration, for listing differences; None compares nothing. ``parts`` must be
    available; None stands for all parts of the checkpoint. If no candidate has them and ``weights_only`` is true, the
    first candidate with its model is accepted.
    """

    selector: str = "best"
    experiment: Experiment = field(default_factory=Experiment)
    config: Mapping[str, Any] | None = None
    parts: tuple[str, ...] | None = None
    weights_only: bool = False
    allow_data_change: bool = False
    tie_tolerance: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The checkpoint to use. ``differences`` lists what differs from the requirement and is allowed to.

    >>> match = Match(id="ab" * 32, step=500, run="ci", score=0.5, availability="full", differences=())
    >>> f"{match.id[:12]}, step {match.step} of run {match.run}"
    'abababababab, step 500 of run ci'
    """

    id: ObjectId
    step: int
    run: str
    score: float | None
    availability: Availability
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A checkpoint that was considered and not used. ``unavailable``: it is compatible, but its data is missing.

    >>> rejected = Rejected(id="ab" * 32, step=500, run="ci", score=0.5, reasons=("tokenizer is a there, b here",))
    >>> (rejected.reasons, rejected.unavailable)
    (('tokenizer is a there, b here',), False)
    """

    id: ObjectId
    step: int
    run: str
    score: float | None
    reasons: tuple[str, ...]
    unavailable: bool = False


@dataclass(frozen=True, slots=True)
class Damaged:
    """A file that should be a manifest and can't be read: it may have described a better checkpoint than the match."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """The ``match``, or None, and every checkpoint that was preferred to it or incompatible, with reasons.

    ``note`` says what else whoever asked should know of the choice.

    >>> rejected = Rejected(id="ab" * 32, step=500, run="ci", score=0.5, reasons=("tokenizer is a there, b here",))
    >>> resolution = Resolution(selector="best", match=None, rejected=(rejected,))
    >>> resolution.explain_rejections()
    ['abababababab, step 500 of run ci: tokenizer is a there, b here']
    >>> resolution.require()
    Traceback (most recent call last):
    castore.errors.NothingMatches: none of 1 checkpoint(s) fits
      abababababab (run ci, step 500): tokenizer is a there, b here
    """

    selector: str
    match: Match | None
    rejected: tuple[Rejected, ...]
    damaged: tuple[Damaged, ...] = ()
    note: str = ""

    def __repr__(self) -> str:
        match, others = self.match, f"{len(self.rejected)} rejected"
        found = "no match"
        if match:
            score = "no score" if match.score is None else f"score {match.score:.4f}"
            found = f"{match.id[:12]}, step {match.step:,} of run {match.run}, {score}, {match.availability}"
        damaged = f", {len(self.damaged)} damaged" if self.damaged else ""
        return printable(f"<Resolution {self.selector}: {found}; {others}{damaged}>")

    @property
    def unavailable(self) -> tuple[Rejected, ...]:
        """The rejected checkpoints that only lack their data."""
        return tuple(rejected for rejected in self.rejected if rejected.unavailable)

    def explain_rejections(self) -> list[str]:
        """Return a line for each rejected checkpoint; more than three of one run with equal reasons share a line."""
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
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more: `castore resolve --json` lists them"]
        return lines

    def require(self) -> Match:
        """Return the match. CorruptManifest, NothingAvailable or NothingMatches, with the reasons, if there is none."""
        if self.match is not None:
            return self.match
        for damaged in self.damaged:
            raise CorruptManifest(damaged.path, damaged.reason)
        if self.unavailable:
            head = f"{len(self.unavailable)} compatible checkpoint(s), but the data of none is available"
            raise NothingAvailable(head + _listed(self.unavailable))
        if self.rejected:
            raise NothingMatches(f"none of {len(self.rejected)} checkpoint(s) fits" + _listed(self.rejected))
        raise NothingMatches("there is no checkpoint yet: `castore train` makes the first one")


def resolve(
    requirement: Requirement,
    entries: Iterable[Entry],
    parts_of: Callable[[Entry], Mapping[str, PartState]],
) -> Resolution:
    """Return the first candidate, in order of preference, whose needed parts are available.

    ``parts_of`` returns the states of an entry's parts. It is called only for compatible candidates, up to the match:
    a call may have to ask a remote.
    """
    is_id = requirement.selector not in ("best", "latest")
    entries = [entry for entry in entries if not is_id or entry.id == requirement.selector]
    compatible = []
    incompatible = []
    known: dict[int, list[str]] = {}  # most entries share one experiment, which is one object
    for entry in entries:
        experiment = entry.manifest.experiment
        problems = known.get(id(experiment))
        if problems is None:
            problems = known[id(experiment)] = _incompatibilities(requirement, experiment)
        if problems:
            incompatible.append(_reject(entry, problems))
        else:
            compatible.append(entry)
    unavailable = []
    match = None
    for entry in _by_preference(requirement, compatible):
        parts = parts_of(entry)
        reasons = _missing(parts, tuple(entry.manifest.parts) if requirement.parts is None else requirement.parts)
        if not reasons:
            match = _match(requirement, entry, availability(parts))
            break
        unavailable.append((entry, parts, reasons))
    if match is None and requirement.weights_only:
        usable = (entry for entry, parts, _ in unavailable if availability(parts) != "history")
        match = next((_match(requirement, entry, "weights-only") for entry in usable), None)
    passed_over = [
        _reject(entry, reasons, unavailable=True)
        for entry, _, reasons in unavailable
        if match is None or entry.id != match.id
    ]
    note = ""
    if requirement.selector == "best" and match and match.score is None:
        note = "no candidate has a val_loss or a metric that its experiment declares: the newest was taken for the best"
    return Resolution(requirement.selector, match, tuple(passed_over + incompatible), note=note)


def _missing(parts: Mapping[str, PartState], needed: Sequence[str]) -> list[str]:
    """Return the reasons why needed parts are unavailable, each once; empty if all are available."""
    reasons: dict[str, list[str]] = {}
    for name in needed:
        state = parts.get(name, PartState("missing", "this checkpoint has no such part"))
        if state.where == "missing":
            reasons.setdefault(state.reason, []).append(name)
    return [
        reason if len(names) == len(needed) > 1 else f"{', '.join(names)}: {reason}"
        for reason, names in reasons.items()
    ]


def _by_preference(requirement: Requirement, compatible: list[Entry]) -> Iterable[Entry]:
    if requirement.selector != "best":
        return newest_first(compatible)
    comparable = [entry for entry in compatible if entry.manifest.experiment == requirement.experiment]
    others = [entry for entry in compatible if entry.manifest.experiment != requirement.experiment]
    return itertools.chain(rank(comparable, requirement.tie_tolerance), newest_first(others))


def _incompatibilities(requirement: Requirement, experiment: Experiment) -> list[str]:
    required = requirement.experiment
    problems = [f"model {text}" for text in _differences(required.model, experiment.model)]
    if required.tokenizer != experiment.tokenizer:
        problems.append(_difference("tokenizer", required.tokenizer, experiment.tokenizer))
    if required.data != experiment.data and not requirement.allow_data_change:
        problems.append(_difference("data", required.data, experiment.data))
    return problems


def _match(requirement: Requirement, entry: Entry, available: Availability) -> Match:
    manifest = entry.manifest
    required, experiment = requirement.experiment, manifest.experiment
    differences = [] if requirement.config is None else _differences(requirement.config, manifest.config)
    if required.data != experiment.data:
        differences.append(_difference("data", required.data, experiment.data))
    differences += [f"evaluation {text}" for text in _differences(required.evaluation, experiment.evaluation)]
    if required.metrics != experiment.metrics:
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


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Return one line with both values for each key whose values differ."""
    return [
        _difference(key, here.get(key, "absent"), there.get(key, "absent"))
        for key in sorted({*here, *there})
        if here.get(key, _ABSENT) != there.get(key, _ABSENT)
    ]


_ABSENT = object()


def _difference(name: str, here: object, there: object) -> str:
    return f"{printable(name)} is {_short(there)} there, {_short(here)} here"


def _short(value: object) -> str:
    """Return the value in at most 60 characters; of a digest, the first 12."""
    text = printable(str(value))
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_digest else text[:60]


def _listed(rejected: tuple[Rejected, ...]) -> str:
    lines = [
        f"\n  {checkpoint.id[:12]} (run {checkpoint.run}, step {checkpoint.step}): {'; '.join(checkpoint.reasons)}"
        for checkpoint in rejected[:_MOST_LINES]
    ]
    more = len(rejected) - _MOST_LINES
    return "".join(lines) + (f"\n  and {more} more" if more > 0 else "")
