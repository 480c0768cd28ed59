"""How a notebook shows checkpoints: a table, and the curve of their validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from castore.format.manifest import Entry
from castore.policy.scoring import score
from castore.text import format_number, format_size, printable

_ROWS = 20
_WIDTH, _HEIGHT = 480, 120  # pixels of the curve
_HEADS = ("id", "run", "step", "score", "val loss", "size", "created", "tags")


class Checkpoints(list[Entry]):
    """Checkpoints, newest first. A notebook shows them as a table, and their validation loss as a curve."""

    def _repr_html_(self) -> str:
        """Return HTML that holds no script, and all text of manifests escaped."""
        if not self:
            return "<p>no checkpoint</p>"
        head = "".join(f"<th>{name}</th>" for name in _HEADS)
        rows = "".join(f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in _cells(one))}</tr>" for one in self[:_ROWS])
        older = f"<p>and {len(self) - _ROWS:,} older</p>" if len(self) > _ROWS else ""
        return f"{_curves(self)}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{older}"


def _cells(entry: Entry) -> tuple[str, ...]:
    manifest = entry.manifest
    return (
        entry.id[:12],
        manifest.run,
        f"{manifest.step:,}",
        format_number(score(manifest)),
        format_number(manifest.metrics.get("val_loss")),
        format_size(sum(part.stored_bytes for part in manifest.parts.values())),
        manifest.created[:16].replace("T", " "),
        " ".join(manifest.tags),
    )


def _safe(text: str) -> str:
    return escape(printable(text))


def _curves(entries: Sequence[Entry]) -> str:
    """Return a line for each run, over the steps; empty if no run has two values to draw."""
    runs: dict[str, dict[int, float]] = {}
    for entry in entries:
        manifest = entry.manifest
        if "val_loss" in manifest.metrics:  # of several at one step the newest counts
            runs.setdefault(manifest.run, {}).setdefault(manifest.step, manifest.metrics["val_loss"])
    drawn = {run: sorted(points.items()) for run, points in runs.items() if len(points) > 1}
    if not drawn:
        return ""
    steps = [step for points in drawn.values() for step, _ in points]
    losses = [loss for points in drawn.values() for _, loss in points]
    step_span, loss_span = max(steps) - min(steps), (max(losses) - min(losses)) or 1.0
    lines = "".join(
        f'<polyline fill="none" stroke="hsl({i * 137 % 360} 65% 45%)" stroke-width="2" points="'
        + " ".join(
            f"{4 + (step - min(steps)) / step_span * (_WIDTH - 8):.1f},"
            f"{4 + (max(losses) - loss) / loss_span * (_HEIGHT - 8):.1f}"
            for step, loss in points
        )
        + f'"><title>{_safe(run)}</title></polyline>'
        for i, (run, points) in enumerate(drawn.items())
    )
    says = (
        f"val loss {format_number(min(losses))} to {format_number(max(losses))}, steps {min(steps):,} to {max(steps):,}"
    )
    drawing = f'<svg role="img" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{lines}</svg>'
    return f"<figure>{drawing}<figcaption>{says}</figcaption></figure>"
