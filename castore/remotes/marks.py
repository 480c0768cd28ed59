"""The marks of a collection in a remote: what is to be deleted there unless somebody turns out to need it.

Nobody can lock a remote. So a collection that is at work says so there, and gives a sign of life before it deletes
anything; and a push that needed something marked looks, when it is done, whether something was deleted meanwhile.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import msgspec

from castore.errors import CollectionStopped, CorruptBundle
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import canonical
from castore.remotes.base import PublishingRemote

NAME = "gc/marked.json"
"""The file of a remote with its marks; when it was written is when they were made, by the remote's own clock."""

PASS = "gc/pass"
"""The file of a remote that a collection writes when it begins, and anew before it deletes; empty if it must stop."""

PATIENCE = 300.0
"""Seconds without a sign of life after which a collection is told to stop: no request to delete takes so long."""

_MAX_BYTES = 1 << 28
_MAX_TOKEN = 1 << 10
_POLL = 2.0
_IN_FLIGHT = 10.0  # seconds for what was asked for before it could be told to stop

_logger = logging.getLogger(__name__)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    objects: list[str]
    files: list[str]


@dataclass(frozen=True, slots=True)
class Marks:
    """Names of files that were of no use when the marks were made, and the objects that these names stand for."""

    objects: AbstractSet[ObjectId] = frozenset()
    files: AbstractSet[str] = frozenset()


def read(remote: PublishingRemote) -> Marks:
    """Return what is marked. CorruptBundle if the file can't be understood: then it isn't known what goes."""
    data = remote.read_file(NAME, _MAX_BYTES)
    if data is None:
        return Marks()
    try:
        file = msgspec.json.decode(data, type=_File)
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise CorruptBundle(f"{remote.name}: {NAME} is not a list of marks: remove it, and gc begins again") from error
    return Marks(frozenset(map(ObjectId, filter(is_object_id, file.objects))), frozenset(file.files))


def write(remote: PublishingRemote, marked: Marks) -> None:
    """Replace the marks. RemoteError or StorageError."""
    file = _File(objects=sorted(marked.objects), files=sorted(marked.files))
    remote.write_file(NAME, canonical(file), replace=True)


def clear(remote: PublishingRemote) -> None:
    """Remove the marks. RemoteError or StorageError."""
    remote.remove([NAME])


# -- a collection at work --------------------------------------------------------------------------------------------


class Pass:
    """A collection at work, which others can see. It ends when it is told to, or when another one begins."""

    def __init__(self, remote: PublishingRemote) -> None:
        self._remote = remote
        self._token = b""
        self.began = 0.0
        """When it did, by the remote's clock (Unix time)."""

    def begin(self) -> None:
        """Say that it is at work. RemoteError or StorageError."""
        self._sign()
        self.began = next((file.modified for file in self._remote.files("gc") if file.name == PASS), 0.0)

    def go_on(self) -> None:
        """Give a sign of life, before anything is deleted. CollectionStopped; RemoteError or StorageError."""
        if self._remote.read_file(PASS, _MAX_TOKEN) != self._token:
            raise CollectionStopped(self._remote.name)
        self._sign()

    def end(self) -> None:
        """Say that nothing is deleted any more. RemoteError or StorageError."""
        if self._remote.read_file(PASS, _MAX_TOKEN) == self._token:
            self._remote.remove([PASS])

    def _sign(self) -> None:
        self._token = secrets.token_hex(16).encode()
        self._remote.write_file(PASS, self._token, replace=True)


@dataclass(frozen=True, slots=True)
class Activity:
    """What tells whether a collection has deleted anything between two looks at a remote."""

    marked: float
    at_work: bytes

    @classmethod
    def of(cls, remote: PublishingRemote) -> Activity:
        """Look at a remote. RemoteError or StorageError."""
        marked = next((file.modified for file in remote.files("gc") if file.name == NAME), 0.0)
        return cls(marked, remote.read_file(PASS, _MAX_TOKEN) or b"")


def nothing_deleted_since(remote: PublishingRemote, before: Activity) -> bool:
    """Whether nothing marked was deleted since ``before``, and nothing that was renewed since then will be.

    False after waiting for a collection to end; one that gives no sign of life is told to stop. RemoteError or
    StorageError.
    """
    now = Activity.of(remote)
    if now == before and not now.at_work:
        return True
    _wait(remote, now.at_work)
    return False


def _wait(remote: PublishingRemote, at_work: bytes) -> None:
    if at_work:
        _logger.warning("gc is at work in %s: waiting, since some of what was pushed had been marked", remote.name)
    since = time.monotonic()
    while at_work:
        if time.monotonic() - since > PATIENCE:
            remote.write_file(PASS, b"", replace=True)
            time.sleep(min(_IN_FLIGHT, PATIENCE))
            return
        time.sleep(min(_POLL, PATIENCE))
        before, at_work = at_work, remote.read_file(PASS, _MAX_TOKEN) or b""
        if at_work != before:
            since = time.monotonic()
