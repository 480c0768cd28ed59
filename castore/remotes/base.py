"""What a remote is: where objects are that the store lacks. Whatever one returns is hostile until it is verified."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from castore.format.ids import ObjectId


class Remote(Protocol):
    """What objects can be fetched from. Any number of threads may ask at once.

    StorageError or RemoteError when it can't be read.
    """

    @property
    def name(self) -> str:
        """What config.toml calls it."""
        ...

    def get(self, wanted: ObjectId) -> bytes | None:
        """The frame it has under this id, at most ``objects.MAX_STORED`` bytes of anything; None when it has none."""
        ...

    def has(self, wanted: Iterable[ObjectId]) -> set[ObjectId]:
        """Those that it says it has."""
        ...

    def explain_missing(self, wanted: ObjectId) -> str:
        """Why an object that it was asked for isn't to be had from it, in words."""
        ...

    def mark_corrupt(self, wanted: ObjectId, reason: str) -> None:
        """What it gave under this id is not what the id says: from now on it has no such object."""
        ...
