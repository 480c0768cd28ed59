"""How long work tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called from one thread, now and then, with the bytes (or items) done so far and the total, which may grow."""

    def __call__(self, done: int, total: int, /) -> None: ...


def ignore_progress(done: int, total: int, /) -> None:
    """Progress callback that does nothing."""
