"""Remotes: where objects are that the store lacks. Whatever one returns is hostile until it is verified.

A remote never makes anything worse: one that can't be reached, or whose copy is bad, has nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from castore import objects
from castore.errors import CorruptObject, ObjectMissing, RemoteError, StorageError, UnsupportedVersion
from castore.ids import ObjectId
from castore.store import LocalStore


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

    def lacks(self, wanted: ObjectId) -> str:
        """Why an object that it was asked for isn't to be had from it, in words."""
        ...

    def distrust(self, wanted: ObjectId, reason: str) -> None:
        """What it gave under this id is not what the id says: from now on it has no such object."""
        ...


def having(remotes: Sequence[Remote], wanted: Iterable[ObjectId]) -> set[ObjectId]:
    """Those that one of the remotes says it has. A remote is asked only for what those before it lack."""
    left = set(wanted)
    found: set[ObjectId] = set()
    for remote in remotes:
        if not left:
            break
        try:
            here = remote.has(left) & left
        except (StorageError, RemoteError):
            continue
        found |= here
        left -= here
    return found


def read(
    store: LocalStore, remotes: Sequence[Remote], wanted: ObjectId, *, mend: bool = True
) -> tuple[bytes, bytes | None]:
    """(plain bytes, frame if it came from a remote), verified. A frame isn't stored: the caller decides when.

    ObjectMissing or CorruptObject of the store when no remote has a good copy either.
    """
    try:
        return store.read(wanted, mend=mend), None
    except (ObjectMissing, CorruptObject):
        for remote, frame in _frames(remotes, wanted):
            plain = _decoded(remote, wanted, frame)
            if plain is not None:
                return bytes(plain), frame
        raise


def read_into(store: LocalStore, remotes: Sequence[Remote], wanted: ObjectId, out: memoryview) -> None:
    """Fill ``out``, verified; what comes from a remote is stored. ObjectMissing or CorruptObject of the store."""
    try:
        store.read_into(wanted, out)
    except (ObjectMissing, CorruptObject):
        for remote, frame in _frames(remotes, wanted):
            if _adopt(store, remote, wanted, frame, out):
                return
        raise


def fetch(store: LocalStore, remotes: Sequence[Remote], wanted: ObjectId) -> str | None:
    """Store an object that a remote has, once verified, and return the remote's name; None when none has a good one."""
    for remote, frame in _frames(remotes, wanted):
        try:
            out = bytearray(objects.plain_length(wanted, memoryview(frame)))
        except (CorruptObject, UnsupportedVersion) as error:
            remote.distrust(wanted, _reason(error))
            continue
        if _adopt(store, remote, wanted, frame, memoryview(out)):
            return remote.name
    return None


def whereabouts(remotes: Sequence[Remote], wanted: ObjectId) -> str:
    """Why none of the remotes has an object, in words; empty when there are none."""
    return "".join(f"; {remote.name}: {remote.lacks(wanted)}" for remote in remotes)


def _frames(remotes: Sequence[Remote], wanted: ObjectId) -> Iterable[tuple[Remote, bytes]]:
    return ((remote, frame) for remote in remotes if (frame := _get(remote, wanted)) is not None)


def _get(remote: Remote, wanted: ObjectId) -> bytes | None:
    try:
        return remote.get(wanted)
    except (StorageError, RemoteError):
        return None


def _adopt(store: LocalStore, remote: Remote, wanted: ObjectId, frame: bytes, out: memoryview) -> bool:
    try:
        store.adopt(wanted, frame, out)
    except (CorruptObject, UnsupportedVersion) as error:
        remote.distrust(wanted, _reason(error))
        return False
    return True


def _decoded(remote: Remote, wanted: ObjectId, frame: bytes) -> bytearray | None:
    try:
        out = bytearray(objects.plain_length(wanted, memoryview(frame)))
        objects.decode_into(wanted, memoryview(frame), memoryview(out))
    except (CorruptObject, UnsupportedVersion) as error:
        remote.distrust(wanted, _reason(error))
        return None
    return out


def _reason(error: CorruptObject | UnsupportedVersion) -> str:
    return error.reason if isinstance(error, CorruptObject) else str(error)
