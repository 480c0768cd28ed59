"""Remotes: where objects are that the store lacks. Whatever one returns is hostile until it is verified.

A remote never makes anything worse: one that can't be reached, or whose copy is bad, has nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from castore.errors import CorruptObject, ObjectMissing, RemoteError, StorageError, UnsupportedVersion
from castore.format.frame import decode_frame, plain_length
from castore.format.ids import ObjectId
from castore.remotes.base import Remote
from castore.storage.object_store import ObjectStore


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
    store: ObjectStore, remotes: Sequence[Remote], wanted: ObjectId, *, mend: bool = True
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


def read_into(store: ObjectStore, remotes: Sequence[Remote], wanted: ObjectId, out: memoryview) -> None:
    """Fill ``out``, verified; what comes from a remote is stored. ObjectMissing or CorruptObject of the store."""
    try:
        store.read_into(wanted, out)
    except (ObjectMissing, CorruptObject):
        for remote, frame in _frames(remotes, wanted):
            if _adopt(store, remote, wanted, frame, out):
                return
        raise


def fetch(store: ObjectStore, remotes: Sequence[Remote], wanted: ObjectId) -> str | None:
    """Store an object that a remote has, once verified, and return the remote's name; None when none has a good one."""
    for remote, frame in _frames(remotes, wanted):
        try:
            out = bytearray(plain_length(wanted, memoryview(frame)))
        except (CorruptObject, UnsupportedVersion) as error:
            remote.mark_corrupt(wanted, _reason(error))
            continue
        if _adopt(store, remote, wanted, frame, memoryview(out)):
            return remote.name
    return None


def whereabouts(remotes: Sequence[Remote], wanted: ObjectId) -> str:
    """Why none of the remotes has an object, in words; empty when there are none."""
    return "".join(f"; {remote.name}: {remote.explain_missing(wanted)}" for remote in remotes)


def _frames(remotes: Sequence[Remote], wanted: ObjectId) -> Iterable[tuple[Remote, bytes]]:
    return ((remote, frame) for remote in remotes if (frame := _get(remote, wanted)) is not None)


def _get(remote: Remote, wanted: ObjectId) -> bytes | None:
    try:
        return remote.get(wanted)
    except (StorageError, RemoteError):
        return None


def _adopt(store: ObjectStore, remote: Remote, wanted: ObjectId, frame: bytes, out: memoryview) -> bool:
    try:
        store.adopt(wanted, frame, out)
    except (CorruptObject, UnsupportedVersion) as error:
        remote.mark_corrupt(wanted, _reason(error))
        return False
    return True


def _decoded(remote: Remote, wanted: ObjectId, frame: bytes) -> bytearray | None:
    try:
        out = bytearray(plain_length(wanted, memoryview(frame)))
        decode_frame(wanted, memoryview(frame), memoryview(out))
    except (CorruptObject, UnsupportedVersion) as error:
        remote.mark_corrupt(wanted, _reason(error))
        return None
    return out


def _reason(error: CorruptObject | UnsupportedVersion) -> str:
    return error.reason if isinstance(error, CorruptObject) else str(error)
