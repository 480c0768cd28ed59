"""Job summaries: what a session restored and saved, as GitHub's Markdown. Text from elsewhere is always escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from castore.github.recovery import Recovered
from castore.github.sessions import CaughtUp, RestoredSession, SavedSession, SessionProgress, Traffic
from castore.policy.resolution import Rejected
from castore.text import escape_markdown, format_number, format_size

_MAX_ROWS = 20


def restored_markdown(
    restored: RestoredSession,
    caught_up: CaughtUp | None = None,
    obstacles: Sequence[str] = (),
    passed_over: Sequence[str] = (),
) -> str:
    """Return the section that tells where the session begins, and why there.

    ``obstacles`` are the reasons its work could not be handed on, ``passed_over`` are damaged files.
    """
    warnings = [f"**What this job trains can't be handed on**: {escape_markdown(reason)}" for reason in obstacles]
    spaced = [line for warning in warnings for line in (warning, "")]
    caught_up_lines = _caught_up_lines(caught_up or CaughtUp())
    lines = (*spaced, *caught_up_lines, *_restored_lines(restored), *_passed_over_lines(passed_over))
    return _section(["### castore: restored", "", *lines])


def saved_markdown(saved: SavedSession, passed_over: Sequence[str] = ()) -> str:
    """Return the section that tells what the session made, and what of it the next one can get."""
    return _section([*_saved_lines(saved), *_passed_over_lines(passed_over)])


def recovered_markdown(recovered: Recovered) -> str:
    """Return the section that tells what was brought back from a bundle, for who decides whether to trust it."""
    told = f"pushed as `{recovered.commit[:12]}`" if recovered.commit else "staged"
    lines = ["### castore: recovered", "", f"From bundle `{recovered.bundle[:12]}`:", ""]
    if recovered.checkpoints:
        rows = [
            (
                f"`{entry.id[:12]}`",
                f"`{entry.manifest.run}`",
                f"{entry.manifest.step:,}",
                format_number(entry.manifest.metrics.get("val_loss")),
            )
            for entry in recovered.checkpoints[:_MAX_ROWS]
        ]
        lines += [*_table(("checkpoint", "run", "step", "validation loss"), rows), ""]
    lines.append(
        f"{len(recovered.files)} files, {told}." if recovered.files else "Git has all of it: nothing was lost."
    )
    return _section([*lines, *_passed_over_lines(recovered.passed_over), "", _traffic_line(recovered.traffic)])


def failed_markdown(reason: str) -> str:
    """Return the section for a command that ended in an error; lines after the first become a list.

    >>> print(failed_markdown("save: no access\\n  a detail"), end="")
    ### castore: failed
    <BLANKLINE>
    **save&#58; no access**
    <BLANKLINE>
    - a detail
    <BLANKLINE>
    """
    first, *details = reason.split("\n")
    items = (f"- {escape_markdown(detail.strip())}" for detail in details[:_MAX_ROWS])
    return _section(["### castore: failed", "", f"**{escape_markdown(first)}**", "", *items])


# -- building blocks -------------------------------------------------------------------------------------------------


def _section(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a table's lines. The cells are Markdown: what comes from elsewhere is escaped already."""
    for cells in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cells) + " |"


def _traffic_line(traffic: Traffic) -> str:
    up, down = format_size(traffic.uploaded), format_size(traffic.downloaded)
    return f"{up} up, {down} down, {traffic.requests} requests to the cache."


# -- restored --------------------------------------------------------------------------------------------------------


def _caught_up_lines(caught_up: CaughtUp) -> Iterator[str]:
    branch = escape_markdown(caught_up.branch)
    if caught_up.problem:
        yield f"**{branch} could not be asked what others pushed meanwhile**: {escape_markdown(caught_up.problem)}"
        yield ""
    elif caught_up.files:
        yield f"{len(caught_up.files)} files that others pushed to {branch} meanwhile were added."
        yield ""


def _passed_over_lines(passed_over: Sequence[str]) -> Iterator[str]:
    if passed_over:
        yield ""
        yield "**Damaged files were passed over**:"
        yield ""
        yield from (f"- {escape_markdown(text)}" for text in passed_over[:_MAX_ROWS])
    if len(passed_over) > _MAX_ROWS:
        yield f"- and {len(passed_over) - _MAX_ROWS} more"


def _restored_lines(restored: RestoredSession) -> Iterator[str]:
    if match := restored.match:
        told = f"Resuming from step **{match.step:,}** of run `{match.run}`, checkpoint `{match.id[:12]}`"
        score = "" if match.score is None else f", score {match.score:.4f}"
        want = escape_markdown(restored.resolution.selector) if restored.resolution else ""
        yield f"{told}{score}: {match.availability}, {want}."
        for descendant in restored.further:
            step = descendant.manifest.step
            yield ""
            yield f"An earlier session trained on from there to step {step:,}; its last checkpoint was fetched too."
        for difference in match.differences:
            yield f"- differs: {escape_markdown(difference)}"
    else:
        yield f"**Nothing to resume from**: {escape_markdown(restored.fresh)}. Training begins at step 0."
    yield from _rejected_lines(restored.resolution.rejected if restored.resolution else ())
    for name, error in restored.remote_errors.items():
        yield ""
        yield f"**A remote was passed over**: {escape_markdown(name)}: {escape_markdown(error)}"
    yield ""
    yield _traffic_line(restored.traffic)


def _rejected_lines(rejected: Sequence[Rejected]) -> Iterator[str]:
    if not rejected:
        return
    rows = [
        (
            f"`{checkpoint.id[:12]}` of `{checkpoint.run}`",
            f"{checkpoint.step:,}",
            format_number(checkpoint.score),
            "; ".join(map(escape_markdown, checkpoint.reasons)),
        )
        for checkpoint in rejected[:_MAX_ROWS]
    ]
    if len(rejected) > _MAX_ROWS:
        rows.append((f"and {len(rejected) - _MAX_ROWS} more", "", "", ""))
    yield ""
    yield from _table(("passed over", "step", "score", "why"), rows)


# -- saved -----------------------------------------------------------------------------------------------------------


def _saved_lines(saved: SavedSession) -> Iterator[str]:
    yield "### castore: saved"
    yield ""
    if saved.skipped:
        yield f"**Nothing was saved**: {escape_markdown(saved.skipped)}."
        return
    if saved.session:
        yield from _progress_lines(saved.session)
    else:
        yield "No new checkpoint."
    yield ""
    if saved.records:
        record = saved.records[0]
        yield f"Bundle `{record.bundle[:12]}`: {record.objects} objects, {format_size(record.bytes)}, confirmed."
    elif saved.unasked:
        yield f"**No bundle**: the cache could not be asked what it has: {escape_markdown(saved.unasked)}"
    elif saved.unconfirmed or saved.left_out:
        yield "No bundle: there was nothing that could be uploaded."
    else:
        yield "The cache has all that is kept already."
    yield from (
        f"- **unconfirmed**: `{checkpoint_id[:12]}` is not here, and the cache was not seen to have all of it"
        for checkpoint_id in saved.unconfirmed
    )
    if saved.plan:
        decisions = [decision for decision in saved.plan.decisions if decision.entry.manifest.kind == "checkpoint"]
        kept = sum(bool(decision.parts) for decision in decisions)
        freed = format_size(saved.plan.freed_bytes)
        yield f"{kept} checkpoints are kept, {len(decisions) - kept} are history; {freed} were deleted here."
    if saved.not_collected:
        yield f"**No garbage was collected**: {escape_markdown(saved.not_collected)}"
    yield from (f"- left out: `{checkpoint_id[:12]}`: {escape_markdown(why)}" for checkpoint_id, why in saved.left_out)
    yield from (f"- **altered by git**: {escape_markdown(path)}: `castore doctor` says more" for path in saved.altered)
    told = f"pushed as `{saved.commit[:12]}`" if saved.commit else "staged"
    yield f"In git: {len(saved.files)} files added or removed, {told}."
    yield ""
    yield _traffic_line(saved.traffic)


def _progress_lines(session: SessionProgress) -> Iterator[str]:
    row = (
        f"`{session.run}`",
        f"step {session.start_step:,} to {session.final_step:,} ({session.final_step - session.start_step:,})",
        f"{format_number(session.start_loss)} to {format_number(session.final_loss)}",
        format_number(session.best_loss),
        f"{session.checkpoints}",
    )
    yield from _table(("run", "steps", "validation loss", "best", "checkpoints"), [row])
