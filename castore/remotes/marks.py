"""The marks of a collection in a remote: what is to be deleted there unless somebody turns out to need it.

Nobody can lock a remote. So a collection that is at work says so there, and gives a sign of life before it deletes
anything. A push that needs something marked looks, before it writes an index and when it is done, whether something was
deleted meanwhile.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Self

import msgspec

from castore.errors import CollectionStopped, CorruptBundle
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import canonical
from castore.remotes.base import PublishingRemote

NAME = "gc/marked.json"
"""The file of a remote with its marks; when it was written is when they were made, by the remote's own clock."""

PASS = "gc/pass"
"""The file of a remote that a collection writes when it begins, and anew before it deletes anything.

It holds random text, which begins with ``stopped`` when nobody is at work any more and something may be gone.
"""

PATIENCE = 300.0
"""Seconds without a sign of life after which a collection is told to stop: no request to delete takes so long."""

_MAX_BYTES = 1 << 28
_MAX_TOKEN = 1 << 10
_STOPPED = b"stopped "
_TOO_LATE = PATIENCE / 2
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

    @classmethod
    def of(cls, files: Iterable[str]) -> Self:
        """Return marks of files, by their names."""
        names = frozenset(files)
        return cls({ObjectId(name) for path in names if is_object_id(name := path.rpartition("/")[2])}, names)


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


def written_at(remote: PublishingRemote, name: str = NAME) -> float:
    """Return when the marks, or :data:`PASS`, were written, by the remote's clock (Unix time); 0 if they weren't."""
    return next((file.modified for file in remote.files("gc") if file.name == name), 0.0)


# -- a collection at work --------------------------------------------------------------------------------------------


class Pass:
    """A collection at work, which others can see. It ends when it is told to, or when another one begins."""

    def __init__(self, remote: PublishingRemote) -> None:
        self._remote = remote
        self._token = b""
        self._needs_trace = False
        self.began = 0.0
        """When it did, by the remote's clock (Unix time)."""

    def begin(self) -> None:
        """Say that it is at work, once no other one is. RemoteError or StorageError."""
        before = _token(self._remote)
        if _is_live(before):
            _logger.warning("another gc is at work in %s: waiting for its end", self._remote.name)
            _wait(self._remote, before)
        self._needs_trace = bool(before)  # of an earlier pass, which may have deleted something
        self._sign()
        self.began = written_at(self._remote, PASS)

    def go_on(self) -> None:
        """Give a sign of life, before anything is deleted. CollectionStopped; RemoteError or StorageError."""
        looked = time.time()  # goes on while the machine sleeps
        if _token(self._remote) != self._token:
            raise CollectionStopped(self._remote.name)
        self._needs_trace = True
        self._sign()
        if not 0 <= time.time() - looked < _TOO_LATE:
            raise CollectionStopped(self._remote.name)

    def end(self, *, marks_changed: bool) -> None:
        """Say that nothing is deleted any more. RemoteError or StorageError.

        If something may be gone and the marks don't tell whoever pushed meanwhile, a trace is left.
        """
        if _token(self._remote) != self._token:
            return
        if marks_changed or not self._needs_trace:
            self._remote.remove([PASS])
        else:
            _stop(self._remote)

    def _sign(self) -> None:
        self._token = secrets.token_hex(16).encode()
        self._remote.write_file(PASS, self._token, replace=True)


@dataclass(frozen=True, slots=True)
class Activity:
    """What tells whether a collection has deleted anything between two looks at a remote."""

    at_work: bytes
    marked: float

    @classmethod
    def of(cls, remote: PublishingRemote) -> Activity:
        """Look at a remote. RemoteError or StorageError."""
        at_work = _token(remote)  # first: a pass changes the marks, and then it ends
        return cls(at_work, written_at(remote))


def nothing_deleted_since(remote: PublishingRemote, before: Activity) -> bool:
    """Whether nothing marked was deleted since ``before``, and nothing that was renewed since then will be.

    False after waiting for a collection to end; one that gives no sign of life is told to stop. RemoteError or
    StorageError.
    """
    now = Activity.of(remote)
    if _is_live(now.at_work):
        _logger.warning("gc is at work in %s: waiting, since some of what is pushed had been marked", remote.name)
        _wait(remote, now.at_work)
        return False
    return now == before


def _wait(remote: PublishingRemote, at_work: bytes) -> None:
    since = time.monotonic()
    while _is_live(at_work):
        if time.monotonic() - since > PATIENCE:
            at_work = _stop(remote)
            break
        time.sleep(min(_POLL, PATIENCE))
        before, at_work = at_work, _token(remote)
        if at_work != before:
            since = time.monotonic()
    if at_work:  # it did not end by itself
        time.sleep(min(_IN_FLIGHT, PATIENCE))


def _token(remote: PublishingRemote) -> bytes:
    return remote.read_file(PASS, _MAX_TOKEN) or b""


def _is_live(token: bytes) -> bool:
    return bool(token) and not token.startswith(_STOPPED)


def _stop(remote: PublishingRemote) -> bytes:
    """Tell whoever is at work to stop, and leave a trace for whoever pushed meanwhile."""
    token = _STOPPED + secrets.token_hex(16).encode()
    remote.write_file(PASS, token, replace=True)
    return token
