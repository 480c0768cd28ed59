"""Objects from the store or, when it lacks a good copy, from remotes in order, verified before they are used.

A remote never makes anything worse: one that can't be reached, or whose copy is corrupt, counts as having nothing. Each
error passed over this way is logged as a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from castore.errors import CorruptObject, ObjectMissing, RemoteError, StorageError, UnsupportedVersion
from castore.format import codecs
from castore.format.frame import decode_frame, plain_length
from castore.format.ids import ObjectId
from castore.remotes.base import Remote
from castore.storage.object_store import ObjectStore

ASKERS = 8
"""Threads that ask remotes at once: a request waits for the network, not for a processor."""

_MAX_MEMORY = 128 << 20  # of what they hold: each a frame, and what it decodes to

_scratch = codecs.Scratch()

_COPIES = 2  # that a remote may have of an object: by itself, and in a pack

_logger = logging.getLogger(__name__)


def available(remotes: Sequence[Remote], object_ids: Iterable[ObjectId]) -> set[ObjectId]:
    """Return those of ``object_ids`` that some remote claims to hold.

    Each remote is asked only for what the ones before it lack.
    """
    missing = set(object_ids)
    held: set[ObjectId] = set()
    for remote in remotes:
        if not missing:
            break
        try:
            claimed = remote.has(missing) & missing
        except (StorageError, RemoteError) as error:
            _logger.warning("remote %s passed over, asked for %d objects: %s", remote.name, len(missing), error)
            continue
        held |= claimed
        missing -= claimed
    return held


def may_have(remotes: Sequence[Remote], object_ids: Iterable[ObjectId]) -> set[ObjectId]:
    """Return those that :func:`available` may return, as far as can be told without asking what costs a request."""
    asked = set(object_ids)
    held: set[ObjectId] = set()
    for remote in remotes:
        try:
            held |= remote.may_have(asked - held)
        except (StorageError, RemoteError) as error:
            _logger.warning("remote %s passed over, asked for %d objects: %s", remote.name, len(asked), error)
    return held & asked


def read(
    store: ObjectStore, remotes: Sequence[Remote], object_id: ObjectId, *, mend: bool = True
) -> tuple[bytes, bytes | None]:
    """Return (plain bytes, frame if it came from a remote), verified. The frame is not stored: the caller decides when.

    Raise the store's ObjectMissing or CorruptObject when no remote has a good copy either.
    """
    try:
        return store.read(object_id, mend=mend), None
    except (ObjectMissing, CorruptObject) as error:
        for remote, frame in _frames(remotes, object_id):
            if (decoded := _decoded(remote, object_id, frame)) is not None:
                return bytes(decoded), frame
        raise _explained(error, remotes) from None


def read_into(store: ObjectStore, remotes: Sequence[Remote], object_id: ObjectId, out: memoryview) -> None:
    """Fill ``out`` with the object's plain bytes, verified; what comes from a remote is stored.

    Raise the store's ObjectMissing or CorruptObject when no remote has a good copy either.
    """
    try:
        store.read_into(object_id, out)
    except (ObjectMissing, CorruptObject) as error:
        for remote, frame in _frames(remotes, object_id):
            if _adopt(store, remote, object_id, frame, out):
                return
        raise _explained(error, remotes) from None


def fetch(store: ObjectStore, remotes: Sequence[Remote], object_id: ObjectId) -> str | None:
    """Copy an object from the first remote with a good copy into the store; return that remote's name, or None."""
    for remote, frame in _frames(remotes, object_id):
        try:
            out = _scratch.take(plain_length(object_id, memoryview(frame)))
        except (CorruptObject, UnsupportedVersion) as error:
            _mark_corrupt(remote, object_id, error)
            continue
        if _adopt(store, remote, object_id, frame, out):
            return remote.name
    return None


def plain(remote: Remote, object_id: ObjectId) -> bytearray | None:
    """Return the plain bytes of an object in a remote, verified; None without a good copy. RemoteError, StorageError.

    Here, unlike in :func:`read`, a remote that fails is not taken for one that lacks the object.
    """
    for _ in range(_COPIES):
        frame = remote.get(object_id)
        if frame is not None and (decoded := _decoded(remote, object_id, frame)) is not None:
            return decoded
    return None


def check(remote: Remote, object_id: ObjectId) -> str | None:
    """Read and verify a remote's copy of an object; return what is wrong, or None. Errors: :func:`plain`."""
    return remote.explain_missing(object_id) if plain(remote, object_id) is None else None


def prepare(remotes: Sequence[Remote], lengths: Mapping[ObjectId, int]) -> int:
    """Tell remotes which objects they will be asked for, given with their plain lengths; return by how many threads.

    Eight, unless the objects are so large that fewer fill the memory. While one waits for the network or until the
    disk has what it fetched, others decode.
    """
    for remote in remotes:
        try:
            remote.expect(lengths)
        except (StorageError, RemoteError) as error:
            _logger.warning("remote %s passed over, asked for %d objects: %s", remote.name, len(lengths), error)
    return max(1, min(ASKERS, _MAX_MEMORY // (2 * max(lengths.values(), default=1))))


def explain_missing(remotes: Sequence[Remote], object_id: ObjectId) -> str:
    """Explain, to be appended to an error message, why none of the remotes supplies an object; "" without remotes."""
    return "".join(f"; {remote.name}: {remote.explain_missing(object_id)}" for remote in remotes)


def _explained(error: ObjectMissing | CorruptObject, remotes: Sequence[Remote]) -> ObjectMissing | CorruptObject:
    """Return the store's error with what each remote has to say about it."""
    elsewhere = explain_missing(remotes, ObjectId(error.object_id))
    if isinstance(error, CorruptObject):
        return CorruptObject(error.object_id, error.reason, elsewhere=elsewhere)
    return ObjectMissing(error.object_id, elsewhere=elsewhere)


@dataclass(slots=True)
class ErrorRecorder:
    """A remote that forwards to another and keeps its first error in ``error``, for a result to tell the user."""

    remote: Remote
    error: str = ""

    @property
    def name(self) -> str:
        return self.remote.name

    def get(self, object_id: ObjectId) -> bytes | None:
        try:
            return self.remote.get(object_id)
        except (StorageError, RemoteError) as error:
            self.error = self.error or str(error)
            raise

    def has(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        try:
            return self.remote.has(object_ids)
        except (StorageError, RemoteError) as error:
            self.error = self.error or str(error)
            raise

    def may_have(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        return self.remote.may_have(object_ids)

    def expect(self, object_ids: Iterable[ObjectId]) -> None:
        self.remote.expect(object_ids)

    def explain_missing(self, object_id: ObjectId) -> str:
        return self.remote.explain_missing(object_id)

    def mark_corrupt(self, object_id: ObjectId, reason: str) -> None:
        self.error = self.error or f"its copy of object {object_id[:12]} is corrupt: {reason}"
        self.remote.mark_corrupt(object_id, reason)


def _frames(remotes: Sequence[Remote], object_id: ObjectId) -> Iterator[tuple[Remote, bytes]]:
    """Yield (remote, frame) for each copy of an object, unverified: whoever finds one corrupt marks it as that."""
    for remote in remotes:
        for _ in range(_COPIES):
            try:
                frame = remote.get(object_id)
            except (StorageError, RemoteError) as error:
                _logger.warning("remote %s passed over, asked for object %s: %s", remote.name, object_id[:12], error)
                break
            if frame is None:
                break
            yield remote, frame


def _adopt(store: ObjectStore, remote: Remote, object_id: ObjectId, frame: bytes, out: memoryview) -> bool:
    try:
        store.adopt(object_id, frame, out)
    except (CorruptObject, UnsupportedVersion) as error:
        _mark_corrupt(remote, object_id, error)
        return False
    return True


def _decoded(remote: Remote, object_id: ObjectId, frame: bytes) -> bytearray | None:
    try:
        out = bytearray(plain_length(object_id, memoryview(frame)))
        decode_frame(object_id, memoryview(frame), memoryview(out))
    except (CorruptObject, UnsupportedVersion) as error:
        _mark_corrupt(remote, object_id, error)
        return None
    return out


def _mark_corrupt(remote: Remote, object_id: ObjectId, error: CorruptObject | UnsupportedVersion) -> None:
    reason = error.reason if isinstance(error, CorruptObject) else str(error)
    _logger.warning("remote %s passed over, its copy of object %s is corrupt: %s", remote.name, object_id[:12], reason)
    remote.mark_corrupt(object_id, reason)
