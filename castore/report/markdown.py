"""A report as Markdown, for the summary of a CI job."""

from __future__ import annotations

from collections.abc import Iterator

from castore.report.collect import Report, ReportedCheckpoint
from castore.text import escape_markdown, format_number, format_size

_MAX_ROWS = 20


def report_as_markdown(report: Report) -> str:
    """Return the report as Markdown: progress, the best and the newest checkpoints, what is kept and what is stored."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"### castore: {escape_markdown(report.name)}{f', run `{report.run}`' if report.run else ''}"
    yield ""
    yield from (
        f"- **can't be read**: {escape_markdown(file.path)}: {escape_markdown(file.reason)}"
        for file in report.broken[:_MAX_ROWS]
    )
    if report.broken:
        yield ""
    if not report.checkpoints:
        yield "No checkpoint yet: `castore train` makes the first one."
        return
    yield from _progress(report)
    yield ""
    yield from _table(report)
    yield ""
    yield _retention(report)
    yield _store(report)


def _progress(report: Report) -> Iterator[str]:
    newest = report.checkpoints[0].entry.manifest
    runs = len({checkpoint.entry.manifest.run for checkpoint in report.checkpoints})
    yield (
        f"- **Progress**: step {newest.step:,} of run `{newest.run}`; {len(report.checkpoints):,} "
        f"checkpoints of {runs} {'run' if runs == 1 else 'runs'}, {len(report.sessions):,} sessions."
    )
    if best := report.find(report.best):
        yield f"- **Best**: {_describe(best)}."
    match = report.resolution.match
    if match and match.id != report.best:
        yield f"- **The next session** resumes `{match.id[:12]}`, step {match.step:,}: {match.availability}."
    elif not match:
        yield "- **The next session** has nothing to resume: no checkpoint has its data."
    if report.sessions:
        last = report.sessions[-1]
        losses = f"{format_number(last.start_loss)} to {format_number(last.final_loss)}"
        steps = f"step {_count(last.start_step)} to {_count(last.final_step)}"
        stopped = f"stopped: {escape_markdown(last.stopped)}" if last.stopped else "no summary of it was kept"
        yield f"- **Last session** of run `{last.run}`: {steps}, validation loss {losses}; {stopped}."


def _describe(checkpoint: ReportedCheckpoint) -> str:
    manifest = checkpoint.entry.manifest
    loss = f", validation loss {format_number(manifest.metrics['val_loss'])}" if "val_loss" in manifest.metrics else ""
    place = f"`{checkpoint.entry.id[:12]}`, step {manifest.step:,} of run `{manifest.run}`{loss}"
    return f"{place}, score {format_number(checkpoint.score)}, {checkpoint.availability}"


def _table(report: Report) -> Iterator[str]:
    yield "| checkpoint | run | step | val loss | score | data | kept as | tags |"
    yield "|---|---|--:|--:|--:|---|---|---|"
    for checkpoint in report.checkpoints[:_MAX_ROWS]:
        manifest = checkpoint.entry.manifest
        best = " **best**" if checkpoint.entry.id == report.best else ""
        yield (
            f"| `{checkpoint.entry.id[:12]}`{best} | `{manifest.run}` | {manifest.step:,} "
            f"| {format_number(manifest.metrics.get('val_loss'))} | {format_number(checkpoint.score)} "
            f"| {checkpoint.availability} | {checkpoint.kept_as or '-'} "
            f"| {' '.join(map(escape_markdown, manifest.tags))} |"
        )
    if len(report.checkpoints) > _MAX_ROWS:
        yield f"| and {len(report.checkpoints) - _MAX_ROWS:,} older ones | | | | | | | |"


def _retention(report: Report) -> str:
    if report.retention_problem:
        return f"- **Retention**: unknown: {escape_markdown(report.retention_problem)}"
    counts = report.kept_counts
    kept = ", ".join(f"{counts[name]:,} {name}" for name in ("full", "weights-only", "history"))
    freed = format_size(report.store.gc.bytes)
    return f"- **Retention**: the policy keeps {kept}; `castore gc` would free {freed}."


def _store(report: Report) -> str:
    total = report.store.total
    if not total.raw:
        return "- **Store**: none of the data is here."
    shared, packed = format_size(total.saved_by_sharing), format_size(total.saved_by_compression)
    held = f"{format_size(total.stored)} hold {format_size(total.raw)} of plain data"
    return f"- **Store**: {held}; sharing saves {shared}, compression {packed}."


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
