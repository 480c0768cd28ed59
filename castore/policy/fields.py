"""What is known of a checkpoint, by name: to show as columns, to sort by and to filter with. Pure."""

from __future__ import annotations

import difflib
import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from castore.config import parse_duration, parse_size
from castore.errors import UsageError
from castore.format.manifest import Entry
from castore.policy.resolution import Availability
from castore.policy.scoring import score

BUILT_IN = ("id", "run", "step", "score", "data", "size", "age", "created", "parent", "tags", "note", "kind")
"""Names that every checkpoint has. Any other is that of a metric or, with or without its sections, of a setting."""

Value = str | int | float | tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A checkpoint, and what is known of it beside its manifest at the moment ``now``."""

    entry: Entry
    data: Availability
    now: datetime
    tags: tuple[str, ...] = ()

    def value(self, name: str) -> Value:
        """Return what has this name, None if nothing has: sizes in bytes, ages in seconds."""
        manifest = self.entry.manifest
        match name:
            case "id" | "data" | "tags":
                return {"id": self.entry.id, "data": self.data, "tags": self.tags}[name]
            case "score":
                return score(manifest)
            case "size":
                return sum(part.stored_bytes for part in manifest.parts.values())
            case "age":
                return max(0.0, (self.now - datetime.fromisoformat(manifest.created)).total_seconds())
            case "run" | "step" | "created" | "parent" | "note" | "kind":
                found: Value = getattr(manifest, name)
                return found
        if name in manifest.metrics:
            return manifest.metrics[name]
        return next((value for path, value in _settings(manifest.config) if f".{path}".endswith(f".{name}")), None)


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        elif value is None:
            continue  # as good as no such setting
        elif isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{prefix}{name}", str(value).lower() if isinstance(value, bool) else str(value)
        else:
            yield f"{prefix}{name}", value


def check_name(name: str, facts: Sequence[Facts]) -> None:
    """Raise UsageError for a name that means nothing for any of these checkpoints."""
    if name in BUILT_IN or not facts or any(one.value(name) is not None for one in facts):
        return
    known = [*BUILT_IN, *sorted({metric for one in facts for metric in one.entry.manifest.metrics})]
    settings = {path.rpartition(".")[2] for one in facts for path, _ in _settings(one.entry.manifest.config)}
    near = difflib.get_close_matches(name, [*known, *sorted(settings)], 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}, and each setting of a run"
    raise UsageError(f"nothing here has a {name!r}: {hint}")


def sort_by(facts: Sequence[Facts], order: str) -> list[Facts]:
    """Return checkpoints in the order of a name, the largest first with ``-`` before it; those without come last."""
    name = order.removeprefix("-")
    check_name(name, facts)
    has = [one for one in facts if one.value(name) is not None]
    is_text = any(isinstance(one.value(name), str | tuple) for one in has)

    def key(one: Facts) -> Any:
        value = one.value(name)
        return str(value) if is_text else value

    return sorted(has, key=key, reverse=order.startswith("-")) + [one for one in facts if one.value(name) is None]


# -- filters -----------------------------------------------------------------------------------------------------------

_TERM = re.compile(r"""\s*([\w.]+)\s*(<=|>=|!=|=|<|>)\s*("[^"]*"|[^\s"]+)\s*""")
_JOIN = re.compile(r"(and|or)\b", re.IGNORECASE)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Term:
    """One comparison, such as ``val_loss<2``. ``*`` in a text stands for anything."""

    name: str
    operator: str
    text: str

    def holds(self, facts: Facts) -> bool:
        """Whether a checkpoint has such a value. UsageError for what can't be compared."""
        value = facts.value(self.name)
        if self.operator in ("=", "!="):
            return (value is not None and self._equals(value)) == (self.operator == "=")
        if value is None:
            return False
        if isinstance(value, tuple):
            raise UsageError(f"{self.name} is compared with = or !=")
        return _COMPARE[self.operator](value, self.text if isinstance(value, str) else self._number())

    def _equals(self, value: str | float | tuple[str, ...]) -> bool:
        if isinstance(value, tuple):
            return any(fnmatch.fnmatchcase(one, self.text) for one in value)
        if isinstance(value, str):
            prefix = "*" if self.name in ("id", "parent", "created") else ""  # as ids are given: by their first digits
            return fnmatch.fnmatchcase(value, self.text + prefix)
        return value == self._number()

    def _number(self) -> float:
        try:
            if self.name == "size":
                return parse_size(self.text)
            if self.name == "age":
                return parse_duration(self.text).total_seconds()
            return float(self.text.replace(",", "").replace("_", ""))
        except ValueError as error:
            hint = error if self.name in ("size", "age") else f"{self.text!r} is not a number"
            raise UsageError(f"{self.name}{self.operator}{self.text}: {hint}") from None


@dataclass(frozen=True, slots=True)
class Filter:
    """Terms joined by ``and`` and ``or``, of which ``and`` binds tighter.

    >>> Filter.parse('val_loss < 2 and run=ci or tags="v1"').alternatives[1]
    (Term(name='tags', operator='=', text='v1'),)
    """

    alternatives: tuple[tuple[Term, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Read what a user wrote. UsageError."""
        alternatives: list[list[Term]] = [[]]
        at = 0
        while term := _TERM.match(text, at):
            name, compare, value = term.groups()
            alternatives[-1].append(Term(name, compare, value.removeprefix('"').removesuffix('"')))
            at = term.end()
            if at == len(text):
                return cls(tuple(map(tuple, alternatives)))
            if not (join := _JOIN.match(text, at)):
                break
            at = join.end()
            if join[1].lower() == "or":
                alternatives.append([])
        shown = text[at:].strip() or text.strip()
        raise UsageError(f"--filter can't be read at {shown!r}: write 'val_loss<2 and run=ci', with = != < <= > or >=")

    @property
    def names(self) -> frozenset[str]:
        """What it looks at."""
        return frozenset(term.name for terms in self.alternatives for term in terms)

    def choose(self, facts: Iterable[Facts]) -> list[Facts]:
        """Return the checkpoints for which it holds. UsageError for a name that none of them has."""
        given = list(facts)
        for name in sorted(self.names):
            check_name(name, given)
        return [one for one in given if any(all(term.holds(one) for term in terms) for terms in self.alternatives)]
