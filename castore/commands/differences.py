"""How `castore diff` shows a difference: as lines for people, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from castore.diff import Absent, Difference, Part, Tensor, Value

_LONGEST = 80  # characters of a value shown to people
MOST = 5  # tensors and values of a part that are shown unless all are asked for
_LONGEST_JSON = 1000


def describe(difference: Difference, *, most: int | None = MOST) -> Iterator[str]:
    """Yield what differs, section by section; of each part ``most`` tensors, those that moved most, and values."""
    yield from _describe_settings(difference)
    for part in difference.parts:
        yield from _describe_part(part, most)


def _describe_settings(difference: Difference) -> Iterator[str]:
    """Yield what differs beside the data: identity, configuration, experiment and metrics."""
    for value in difference.identity:
        if value.key == "parent":
            yield f"parent: {' -> '.join((side or 'none')[:12] for side in (value.before, value.after))}"
        else:
            yield _describe_value(value)
    for section in ("config", "experiment", "metrics"):
        yield from (f"{section}.{_describe_value(value)}" for value in getattr(difference, section))


def _describe_part(part: Part, most: int | None) -> Iterator[str]:
    if part.problem:
        yield f"{part.name}: can't be compared: {part.problem}"
        return
    states = [tensor.state for tensor in part.tensors]
    counts = [(state, states.count(state)) for state in ("equal", "changed", "added", "removed")]
    told = ", ".join(f"{count} {state}" for state, count in counts if count)
    yield f"{part.name}: {part.state}{f' (tensors: {told})' if told else ''}"
    differing = [tensor for tensor in part.tensors if tensor.state != "equal"]
    if most is not None and len(differing) > most:
        differing.sort(key=_moved, reverse=True)
    for tensor in differing[:most]:
        if tensor.state == "changed" and tensor.before == tensor.after:
            yield f"  changed {tensor.key}  {tensor.before}  {_describe_change(tensor.change)}"
        else:
            yield f"  {tensor.state:7} {tensor.key}  {' -> '.join(filter(None, (tensor.before, tensor.after)))}"
    for value in part.values[:most]:
        yield f"  {_describe_value(value)}"
    shown = len(differing[:most]) + len(part.values[:most])
    if more := len(differing) + len(part.values) - shown:
        yield f"  and {more:,} more: --all shows them"


def _moved(tensor: Tensor) -> float:
    """How much is to be told of a tensor: one that came, went or holds what can't be compared is told first."""
    return math.inf if tensor.state != "changed" or tensor.change is None else tensor.change


def _describe_change(change: float | None) -> str:
    if change is None:
        return "not finite, or no numbers"
    return f"by at most {change:.3g}" if change else "by nothing that counts, such as the sign of a zero"


def _describe_value(value: Value) -> str:
    before, after = (_shorten(side, _LONGEST) for side in (value.before, value.after))
    return f"{value.key or 'the whole'}: {before} -> {after}"


def _shorten(value: Any, limit: int) -> str:
    if isinstance(value, Absent):
        return "absent"
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, str | bytes):
        value = value[: limit + 1]
    elif isinstance(value, int) and value.bit_length() > 4096:  # Python refuses to print it
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def as_json(difference: Difference) -> dict[str, Any]:
    """Return the difference as values of JSON."""
    sections: dict[str, Any] = {
        name: [_value_json(value) for value in getattr(difference, name)]
        for name in ("identity", "config", "experiment", "metrics")
    }
    parts = {
        part.name: {
            "state": part.state,
            "problem": part.problem,
            "tensors": [dataclasses.asdict(tensor) for tensor in part.tensors],
            "values": [_value_json(value) for value in part.values],
        }
        for part in difference.parts
    }
    return {**sections, "parts": parts}


def _value_json(value: Value) -> dict[str, Any]:
    """Return JSON's own values as they are, others as Python writes them; a side that is absent is left out."""
    sides: dict[str, Any] = {"key": value.key}
    for name, side in (("before", value.before), ("after", value.after)):
        if not isinstance(side, Absent):
            sides[name] = side if _is_json(side) else _shorten(side, _LONGEST_JSON)
    return sides


def _is_json(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | bool)
