"""What a user types to name a checkpoint, prepared data or a tree of files, and the choice among manifests. Pure.

``best`` and ``latest`` look at every run, ``RUN:best`` and ``RUN:latest`` at one; anything else is the name of a tag
or the first digits of an id, and no tag may have a name of hex digits alone. Every command and function that takes
such a text reads it here.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from castore.errors import AmbiguousId, NotFound, UnknownId, UsageError
from castore.format.manifest import Entry, Kind
from castore.format.tag import is_tag_name

MIN_DIGITS = 4
"""Fewer digits than this name nothing, even where only one id begins with them: the next one saved may, too."""

_SUGGESTED = 3
_SUGGESTED_DIGITS = 8  # at least: fewer are hard to compare by eye

_NONE = {"checkpoint": "no checkpoint", "dataset": "no prepared data", "files": "no files"}
_IS = {"checkpoint": "a checkpoint", "dataset": "prepared data", "files": "a tree of files"}
_REMEDY = {
    "checkpoint": "`castore train` makes the first one",
    "dataset": "`castore train` prepares some",
    "files": "`castore add PATH` adds some",
}


def check_digits(text: str) -> None:
    """Raise UsageError if ``text`` is the beginning of an id, but too short to name one."""
    if 0 < len(text) < MIN_DIGITS and set(text.lower()) <= set("0123456789abcdef"):
        raise UsageError(f"{text!r} is too short for an id: give at least {MIN_DIGITS} digits")


@dataclass(frozen=True, slots=True)
class Selector:
    """A selector taken apart: ``name`` is ``best``, ``latest``, a tag or the first digits of an id.

    ``run`` limits ``best`` and ``latest`` to one run; empty means every run. ``kind`` is the kind of manifest that is
    wanted, None for any; only checkpoints have a quality, so ``best`` is a word for no other kind.

        >>> Selector.parse("main:best")
        Selector(name='best', run='main', kind='checkpoint')
        >>> Selector.parse("3f2a91")
        Selector(name='3f2a91', run='', kind=None)
    """

    name: str
    run: str = ""
    kind: Kind | None = None

    @classmethod
    def parse(cls, text: str, kind: Kind | None = None) -> Selector:
        """Read what a user typed. Without a ``kind``, ``best`` and ``latest`` mean checkpoints."""
        run, _, name = text.rpartition(":")
        if name == "latest" or (name == "best" and kind in (None, "checkpoint")):
            return cls(name, run, kind or "checkpoint")
        return cls(text, "", kind)

    @property
    def is_relative(self) -> bool:
        """Whether this names a place in an order (``best``, ``latest``), not one manifest by its id."""
        return self.name == "latest" or (self.name == "best" and self.kind == "checkpoint")

    def widened(self, entries: Iterable[Entry]) -> Selector:
        """Return what ``RUN:latest`` means where any kind will do: of anything, if that run has no checkpoint."""
        kinds = {entry.manifest.kind for entry in entries if entry.manifest.run == self.run}
        if self.name != "latest" or not kinds or "checkpoint" in kinds:
            return self
        return dataclasses.replace(self, kind=None)

    def candidates(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the entries of the wanted kind and run, in the order given. NotFound for a run that has none."""
        of_kind = [entry for entry in entries if self.kind in (None, entry.manifest.kind)]
        candidates = [entry for entry in of_kind if self.run in ("", entry.manifest.run)]
        if self.run and not candidates:
            runs = sorted({entry.manifest.run for entry in of_kind})
            hint = f"runs: {', '.join(runs)}" if runs else _REMEDY[self.kind or "checkpoint"]
            raise NotFound(f"{_NONE[self.kind or 'checkpoint']} of run {self.run!r}; {hint}")
        return candidates

    def newest(self, entries: Iterable[Entry]) -> Entry:
        """Return the first candidate of ``entries``, which come newest first. NotFound when there is none."""
        for entry in self.candidates(entries):
            return entry
        kind = self.kind or "checkpoint"
        raise NotFound(f"{_NONE[kind]} yet: {_REMEDY[kind]}")

    def choose(self, matches: Sequence[Entry], known: Iterable[str]) -> Entry:
        """Return the one entry of ``matches``, which are those whose id begins with :attr:`name`.

        ``known`` are tags, and ids or their first digits, from which to suggest one when there is no match. UsageError
        for fewer than :data:`MIN_DIGITS` digits, UnknownId, AmbiguousId; NotFound when the match is of another kind
        than the wanted one.
        """
        check_digits(self.name)
        if len(matches) > 1:
            raise AmbiguousId(self.name, sorted(entry.id for entry in matches))
        if not matches:
            raise self._unknown(known)
        (entry,) = matches
        kind = entry.manifest.kind
        if self.kind not in (None, kind):
            hint = f"`castore log --kind {self.kind}` lists those"
            raise NotFound(f"{entry.id[:12]} is {_IS[kind]}, not {_IS[self.kind]}: {hint}")
        return entry

    def _unknown(self, known: Iterable[str]) -> NotFound:
        digits = max(len(self.name), _SUGGESTED_DIGITS)
        names = [text if is_tag_name(text) else text[:digits] for text in known]
        near = difflib.get_close_matches(self.name.lower(), names, n=_SUGGESTED, cutoff=0.6)
        if self.kind in (None, "checkpoint"):
            return UnknownId(self.name, near)
        hint = f"did you mean {', '.join(near)}?" if near else f"`castore log --kind {self.kind}` lists them"
        return NotFound(f"{_NONE[self.kind]} {self.name!r}; {hint}")
