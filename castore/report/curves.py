"""Curves as text for a terminal, and as a picture. The packages that draw them are extras, imported only here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from castore.errors import PackageMissing

_MARKERS = ("braille", "•", "x", "o", "+", "*")  # distinct even without colour
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito 2008


@dataclass(frozen=True, slots=True)
class Curve:
    """Points in order of ``x``; ``spread``, if given, is half the height of a band around each point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()


def draw(curves: Sequence[Curve], *, width: int, height: int, x_label: str, y_label: str, colour: bool) -> list[str]:
    """Return the curves as lines of text. Raise PackageMissing without plotext."""
    try:
        import plotext
    except ImportError as error:
        raise PackageMissing("drawing curves in the terminal", "plotext", "plot") from error
    plotext.clear_figure()
    plotext.theme("pro" if colour else "clear")
    plotext.plot_size(width, height)
    plotext.xlabel(x_label)
    plotext.title(y_label)
    for curve, marker in zip(curves, _MARKERS * len(curves), strict=False):
        plotext.plot(list(curve.x), list(curve.y), label=curve.name, marker="braille" if colour else marker)
    text = plotext.build()
    lines = text if colour else plotext.uncolorize(text)
    return [line.rstrip() for line in lines.rstrip("\n").split("\n")]


def picture(curves: Sequence[Curve], path: Path, *, x_label: str, y_label: str) -> None:
    """Write the curves as a picture that is readable on light and dark backgrounds; the suffix of ``path`` is its type.

    Raise PackageMissing without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib import figure
    except ImportError as error:
        raise PackageMissing("drawing a picture", "matplotlib", "plot") from error
    grey = "#808080"
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 11, "text.color": grey, "axes.labelcolor": grey,
                                "svg.hashsalt": "castore"}):  # fmt: skip
        drawn = figure.Figure(figsize=(8, 4.2), layout="constrained")
        axes = drawn.add_subplot()
        for curve, colour in zip(curves, _COLOURS * len(curves), strict=False):
            axes.plot(curve.x, curve.y, color=colour, label=curve.name, linewidth=2)
            if curve.spread:
                low = [y - spread for y, spread in zip(curve.y, curve.spread, strict=True)]
                high = [y + spread for y, spread in zip(curve.y, curve.spread, strict=True)]
                axes.fill_between(curve.x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(frameon=False)
        axes.grid(color=grey, alpha=0.3)
        axes.tick_params(colors=grey)
        for spine in axes.spines.values():
            spine.set_visible(False)
        drawn.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
