"""The protocols of remotes: stores elsewhere that objects are read from and, some of them, published to.

Remotes hold frames (:mod:`castore.format.frame`), the stored form of objects. Whatever a remote returns is untrusted
until it is verified, which :mod:`castore.remotes.fallback` does. tests/conformance.py checks all classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeGuard, runtime_checkable

from castore.format.ids import ObjectId


class Remote(Protocol):
    """A remote that objects are read from. Any number of threads may use it at once.

    Methods raise StorageError or RemoteError when the remote can't be read; ``explain_missing`` and ``mark_corrupt``
    never raise.
    """

    @property
    def name(self) -> str:
        """The name that messages use: for a configured remote, its key in ``[remotes]`` of config.toml."""
        ...

    def get(self, object_id: ObjectId) -> bytes | None:
        """Return the frame stored under an id, unverified; None when there is none.

        At most ``frame.MAX_STORED`` bytes are ever read.
        """
        ...

    def has(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return those of ``object_ids`` that the remote claims to hold. None of their bytes are read."""
        ...

    def may_have(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return those that :meth:`has` may return, as far as can be told without asking what costs a request."""
        ...

    def expect(self, object_ids: Iterable[ObjectId]) -> None:
        """Take note of what :meth:`get` will soon be asked for, so that it can be read together. Reads nothing."""
        ...

    def explain_missing(self, object_id: ObjectId) -> str:
        """Explain, for an error message, why this remote cannot supply the object."""
        ...

    def mark_corrupt(self, object_id: ObjectId, reason: str) -> None:
        """Mark this remote's copy as corrupt; treat it as absent from now on."""
        ...


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a remote: its name below the remote's location, its bytes, and when it was written (Unix time)."""

    name: str
    size: int
    modified: float


@runtime_checkable
class PublishingRemote(Remote, Protocol):
    """A remote that objects can also be written to, and files beside them.

    Files are named by relative paths with slashes, which the caller has checked.
    """

    @property
    def writable(self) -> bool:
        """Whether this one takes objects: a website doesn't."""
        ...

    def fresh(self) -> Self:
        """Return the same remote without what was found to be there, since others may have deleted it.

        What is corrupt stays known. Who uses this one at the same time is not disturbed.
        """
        ...

    def put(self, object_id: ObjectId, frame: bytes, *, renew: bool = False) -> bool:
        """Publish a frame that the caller has verified; return False if a good copy was there already.

        Readers see either the whole frame or nothing. A good copy is never overwritten, unless it is to be renewed; a
        corrupt one is replaced.
        """
        ...

    def files(self, folder: str) -> Iterator[RemoteFile]:
        """Yield every file below a folder, none if there is no such folder."""
        ...

    def read_file(self, name: str, limit: int) -> bytes | None:
        """Return what a file holds; None when there is none. More than ``limit`` bytes are an error."""
        ...

    def write_file(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Write a file; without ``replace`` one that is there stays, and False is returned."""
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Remove files. Those that aren't there are no error."""
        ...


def is_publishing(remote: Remote) -> TypeGuard[PublishingRemote]:
    """Whether a remote can be listed and written to."""
    return isinstance(remote, PublishingRemote) and remote.writable


class ConfiguredRemote(Remote, Protocol):
    """A remote that a line ``name = "location"`` in ``[remotes]`` of config.toml can name."""

    @classmethod
    def from_location(cls, name: str, location: str, base: Path) -> Self:
        """Open the remote at ``location``, a URL or a path; relative paths start at ``base``.

        Nothing is contacted yet. ValueError, saying what to write instead, when the location is malformed.
        """
        ...
