"""Manifest <-> canonical JSON, validated. Pure.

A manifest's id is the BLAKE3 of its file's bytes, so the bytes are canonical: sorted keys, indent 2, a final newline,
finite numbers only, no duplicate keys. A file with the same content in any other form is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec

from castore.errors import CorruptManifest, InvalidManifest, UnsupportedVersion, printable
from castore.format.ids import ObjectId, hash_bytes, is_object_id

VERSION = 1
MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_STEP = 999_999_999
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
PART = re.compile(r"[a-z][a-z0-9_]{0,31}")

Scalar = str | int | float | bool | None
Kind = Literal["checkpoint", "dataset", "files"]


class Metric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a metric is scored: which ``direction`` is better, and the range that is mapped into [0, 1].

    Without a range, which is both ends or neither, any value counts: see :mod:`castore.policy.scoring`.

    >>> perplexity = Metric(direction="min", low=1.0, high=100.0)
    >>> (perplexity.direction, perplexity.high)
    ('min', 100.0)
    """

    direction: Literal["max", "min"] = "max"
    low: float | None = None
    high: float | None = None


class Experiment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What makes checkpoints comparable: scores are compared within one experiment only.

    ``model`` holds the parameters that loading a checkpoint depends on; ``tokenizer`` and ``data`` are digests;
    ``evaluation`` describes what the validation loss was measured on; ``metrics`` declares the metrics that are scored,
    for short by ``"max"`` or ``"min"`` alone.

    >>> experiment = Experiment(model={"n_layer": 4, "n_embd": 128}, metrics={"accuracy": Metric()})
    >>> experiment == Experiment(model={"n_layer": 6, "n_embd": 128}, metrics={"accuracy": Metric()})
    False
    """

    model: dict[str, Scalar] = msgspec.field(default_factory=dict)
    tokenizer: str = ""
    data: str = ""
    evaluation: dict[str, Scalar] = msgspec.field(default_factory=dict)
    metrics: dict[str, Metric] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(isinstance(metric, str) for metric in self.metrics.values()):
            msgspec.structs.force_setattr(
                self, "metrics", {name: _metric(metric) for name, metric in self.metrics.items()}
            )


def _metric(given: Any) -> Any:
    """A direction stands for a metric without a range. Anything else is judged when the manifest is encoded."""
    return Metric(direction=given) if given in ("max", "min") else given


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One part of a checkpoint: the id of its index, and its size in plain and in stored bytes (informative)."""

    index: ObjectId
    bytes: int
    stored_bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file in git that describes a checkpoint, prepared data or a tree of files.

    ``step`` counts completed training steps; ``parent`` is the id of the checkpoint it was resumed from. Only a
    checkpoint has metrics and an experiment. ``config`` and ``info`` are free-form JSON that castore never interprets.

    >>> part = Part(index="ab" * 32, bytes=4096, stored_bytes=3500)
    >>> manifest = Manifest(run="ci", step=500, created="2026-01-02T03:04:05.000006Z", parts={"model": part})
    >>> manifest.file_name("cd" * 32)
    'ci/000000500-cdcdcdcdcdcd.json'
    """

    version: int = VERSION
    kind: Kind = "checkpoint"
    run: str
    step: int
    created: str
    parent: ObjectId | None = None
    parts: dict[str, Part]
    experiment: Experiment = msgspec.field(default_factory=Experiment)
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    tags: list[str] = msgspec.field(default_factory=list)
    note: str = ""
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    info: dict[str, Any] = msgspec.field(default_factory=dict)

    def file_name(self, checkpoint_id: ObjectId) -> str:
        """Return the path of the manifest with this id below ``manifests/``."""
        return f"{self.run}/{self.step:09d}-{checkpoint_id[:12]}.json"


class Entry(NamedTuple):
    """A manifest of the catalog and its id."""

    id: ObjectId
    manifest: Manifest

    def __repr__(self) -> str:
        return f"<Entry {describe(self)}>"


def describe(entry: Entry) -> str:
    """Return the short line that tells a person which checkpoint this is.

    >>> describe(Entry("ab" * 32, Manifest(run="ci", step=5000, created="", parts={}, metrics={"val_loss": 2.5})))
    'abababababab: step 5,000 of run ci, val_loss 2.5'
    """
    manifest = entry.manifest
    metrics = "".join(f", {name} {value:.6g}" for name, value in list(manifest.metrics.items())[:3])
    kind = "" if manifest.kind == "checkpoint" else f"{manifest.kind}, "
    return printable(f"{entry.id[:12]}: {kind}step {manifest.step:,} of run {manifest.run}{metrics}")


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of the manifest's file, which :func:`decode` accepts. InvalidManifest if it breaks a rule."""
    try:
        _check(manifest)
        # decoded once to apply the types: a range of 0 to 1 is written as 0.0 to 1.0, and a step of 1.5 is refused
        data = canonical(_decoder.decode(canonical(manifest)))
    except (ValueError, TypeError, OverflowError, msgspec.MsgspecError, RecursionError) as error:
        raise InvalidManifest(f"can't record this checkpoint: {error}") from error
    if len(data) > MAX_BYTES:
        raise InvalidManifest(f"can't record this checkpoint: its manifest has {len(data)} bytes, over {MAX_BYTES}")
    return data


_decoder = msgspec.json.Decoder(Manifest)


def decode(data: bytes, path: str = "manifest") -> tuple[ObjectId, Manifest]:
    """Return (id, manifest) for a file's bytes. Raise CorruptManifest or UnsupportedVersion for anything else."""
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        manifest = _decoder.decode(data)
        if manifest.version < 1:
            raise ValueError(f"invalid version {manifest.version}")
        if manifest.version == VERSION:
            _check(manifest, plain=_is_plain(data))
            if canonical(manifest) != data:
                raise ValueError("not in canonical form: it was edited or merged by hand")
            return hash_bytes(data), manifest
    except (ValueError, TypeError, msgspec.MsgspecError, RecursionError) as error:
        _raise_if_newer(data, path)
        if b"<<<<<<< " in data:
            reason = "has merge conflict markers; manifests are never merged: keep one side unchanged"
            raise CorruptManifest(path, reason) from error
        raise CorruptManifest(path, f"not a valid manifest: {error}") from error
    raise UnsupportedVersion(path, manifest.version)


def timestamp(moment: datetime) -> str:
    """Return ``moment`` as manifests write it: UTC with microseconds, so that text order is time order."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _raise_if_newer(data: bytes, path: str) -> None:
    # a newer version may have fields that don't validate here: report it as newer, not as damaged
    try:
        version = msgspec.json.decode(data[: MAX_BYTES + 1], type=dict[str, Any]).get("version")
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return
    if isinstance(version, int) and version > VERSION:
        raise UnsupportedVersion(path, version)


_ONE_DIGIT = bytes.maketrans(b"123456789", b"000000000")


def _is_plain(data: bytes) -> bool:
    """Return True only if no value in ``data`` can break a rule of :func:`_check_json`: a fast path for most manifests.

    With at most ``MAX_DEPTH`` brackets nothing is nested too deep, and integers of fewer than 19 digits fit in 64 bits.
    JSON text can break the rules in no other way.
    """
    return data.count(b"{") + data.count(b"[") <= MAX_DEPTH and b"0" * 19 not in data.translate(_ONE_DIGIT)


def canonical(value: Any) -> bytes:
    """Return ``value`` as canonical JSON: sorted keys, indent 2, a final newline."""
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2) + b"\n"


def _check(manifest: Manifest, *, plain: bool = False) -> None:
    """Raise ValueError for what the types do not exclude. Free-form values known to be ``plain`` are not visited."""
    if not RUN.fullmatch(manifest.run):
        raise ValueError(f"run {manifest.run[:80]!r} is not 1 to 64 letters, digits, '.', '_' or '-'")
    if not 0 <= manifest.step <= MAX_STEP:
        raise ValueError(f"step {manifest.step} is not between 0 and {MAX_STEP}")
    if not CREATED.fullmatch(manifest.created):
        raise ValueError(f"created {manifest.created[:40]!r} is not a UTC time with microseconds")
    datetime.fromisoformat(manifest.created)  # ValueError for a month of 19
    if manifest.parent is not None and not is_object_id(manifest.parent):
        raise ValueError("parent is not an id")
    _check_parts(manifest.parts)
    if not plain:
        # before anything is formatted: indented, a deep value grows far beyond its own size
        experiment = manifest.experiment
        _check_json(manifest.config, "config")
        _check_json(manifest.info, "info")
        _check_json(experiment.model, "experiment.model")
        _check_json(experiment.evaluation, "experiment.evaluation")
    _check_quality(manifest)


def _check_parts(parts: Mapping[str, Part]) -> None:
    if not parts:
        raise ValueError("it has no part")
    for name, part in parts.items():
        if not PART.fullmatch(name):
            raise ValueError(f"part {name[:40]!r} is not a lower-case name")
        if not is_object_id(part.index) or not (0 <= part.bytes < 2**63 and 0 <= part.stored_bytes < 2**63):
            raise ValueError(f"part {name} has no valid index or size")


def _check_quality(manifest: Manifest) -> None:
    if manifest.kind != "checkpoint" and (manifest.metrics or manifest.experiment != Experiment()):
        raise ValueError(f"a manifest of kind {manifest.kind} has neither metrics nor an experiment")
    for name, value in manifest.metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"metric {name} is {value}, not a finite number")
    if manifest.metrics.get("val_loss", 0.0) < 0:
        raise ValueError("val_loss is negative")
    for name, metric in manifest.experiment.metrics.items():
        if name == "val_loss":
            raise ValueError("val_loss is always scored and can't be declared as a metric")
        if not isinstance(metric, Metric):
            raise ValueError(f"metric {name} is declared by 'max', 'min' or a Metric, not by {str(metric)[:40]!r}")
        if (metric.low is None) != (metric.high is None):
            raise ValueError(f"metric {name} has half a range: give both low and high, or neither")
        if metric.low is None or metric.high is None:
            continue
        if not (math.isfinite(metric.low) and math.isfinite(metric.high) and metric.low < metric.high):
            raise ValueError(f"metric {name} has an invalid range: low must be below high, both finite")


def _check_json(value: Any, name: str) -> None:
    """Raise ValueError, naming the key, unless ``value`` survives JSON unchanged.

    Iterative: it visits every value of every manifest.
    """
    pending: list[tuple[Any, int, str]] = [(value, 1, name)]
    while pending:
        container, depth, path = pending.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"{path[:80]} is nested more than {MAX_DEPTH} deep")
        is_mapping = isinstance(container, Mapping)
        for key, item in container.items() if is_mapping else enumerate(container):
            if is_mapping and not isinstance(key, str):
                raise ValueError(f"{path}: key {key!r} is not a string")
            kind = type(item)
            if kind is str or kind is bool or item is None:
                continue
            if (kind is float and math.isfinite(item)) or (kind is int and -(2**63) <= item < 2**63):
                continue
            where = f"{path}.{key}" if is_mapping else f"{path}[{key}]"
            if kind is float:
                raise ValueError(f"{where}: {item} is not a finite number")
            if kind is int:
                raise ValueError(f"{where}: an integer does not fit in 64 bits")
            if not isinstance(item, Mapping | list | tuple):
                raise ValueError(f"{where}: {kind.__name__} is not a JSON value")
            pending.append((item, depth + 1, where))
