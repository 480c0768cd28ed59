"""A report as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec

from castore.report.collect import Report, ReportedCheckpoint, SessionRecord
from castore.stats import stats_as_json


def report_as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON values. It leaves whole manifests to ``castore show``."""
    match = report.resolution.match
    return {
        "generator": "castore report",
        "name": report.name,
        "made": report.made,
        "run": report.run,
        "best": report.best,
        "next": asdict(match) if match else None,
        "passed_over": [asdict(rejected) for rejected in report.resolution.rejected],
        "checkpoints": [_checkpoint(checkpoint) for checkpoint in report.checkpoints],
        "experiments": [msgspec.to_builtins(experiment) for experiment in report.experiments],
        "sessions": [_session(session) for session in report.sessions],
        "environment": {
            "differences": [
                {
                    "key": difference.key,
                    "values": [{"value": value, "sessions": list(numbers)} for value, numbers in difference.values],
                }
                for difference in report.differences
            ],
            "same": dict(report.same),
        },
        "retention": {
            "policy": {**asdict(report.policy), "data_ttl": report.policy.data_ttl.total_seconds()},
            "problem": report.retention_problem,
            "counts": dict(report.kept_counts),
            "elsewhere": report.elsewhere,
        },
        "store": stats_as_json(report.store),
        "broken": [asdict(file) for file in report.broken],
    }


def _session(session: SessionRecord) -> dict[str, Any]:
    losses = session.train_losses
    values = [float(mean) for mean in losses.means.split()] if losses else []
    return {
        **msgspec.to_builtins(session),
        "train_losses": {"first": losses.first, "every": losses.every, "means": values} if losses else None,
    }


def _checkpoint(checkpoint: ReportedCheckpoint) -> dict[str, Any]:
    manifest = checkpoint.entry.manifest
    return {
        "id": checkpoint.entry.id,
        "run": manifest.run,
        "step": manifest.step,
        "created": manifest.created,
        "parent": manifest.parent,
        "score": checkpoint.score,
        "metrics": manifest.metrics,
        "tags": manifest.tags,
        "note": manifest.note,
        "parts": {
            name: {**msgspec.to_builtins(part), "where": checkpoint.states[name].where}
            for name, part in manifest.parts.items()
        },
        "availability": checkpoint.availability,
        "kept_as": checkpoint.kept_as,
        "keep": None if checkpoint.keep is None else list(checkpoint.keep),
        "reasons": list(checkpoint.reasons),
        "experiment": checkpoint.experiment,
        "best_of_experiment": checkpoint.best_of_experiment,
        "on_best_path": checkpoint.on_best_path,
        "lane": checkpoint.lane,
        "session": checkpoint.session,
        "connection_density": _number(manifest.info, "connection_density"),
        "tokens_per_second": _number(manifest.info, "tokens_per_second"),
    }


def _number(info: Mapping[str, Any], name: str) -> float | None:
    """A number that a trainer recorded; ``info`` may hold anything under that name."""
    value = info.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
