"""The GitHub Actions cache as a remote: the objects in the bundles that records in git name.

The cache may return anything: an index whose hash isn't the one in git and an object that isn't what its id says are
misses, each with its reason.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from castore.errors import CorruptBundle, DataMissing, RemoteError, RemoteUnavailable, UploadRefused
from castore.format import bundle
from castore.format.bundle import BundleLayout, Place, Record
from castore.format.ids import ObjectId
from castore.parallel import map_all
from castore.progress import Progress
from castore.remotes import joined_reads
from castore.remotes.github_service import CONNECTIONS, NAME, CacheService, ReadRange
from castore.remotes.joined_reads import JoinedRead

_MAX_INDEXES = 64 << 20  # bytes of frames of indexes that are kept, since each is asked for several times
_MAX_KEYS = 5  # each failed upload leaves its key reserved, and the next one takes another

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A bundle that the cache holds: its key, a signed address, and the places of its objects."""

    key: str
    url: str
    places: Mapping[ObjectId, Place]


class GitHubCache:
    """The objects in the bundles that ``records`` name. Each bundle is looked up once, when it is first needed.

    ``down`` is the reason nothing can be read, whatever the cache holds; empty while it can be.
    """

    name = NAME

    def __init__(self, service: CacheService, records: Sequence[Record]) -> None:
        self.service = service
        self.records = tuple(records)
        self.down = service.unreadable
        self._bundles: dict[ObjectId, _Opened | str] = {}  # a str is the reason the bundle is unusable
        self._corrupt: dict[ObjectId, str] = {}
        self._opening = threading.Lock()
        self._joined: dict[tuple[ObjectId, ObjectId], JoinedRead] = {}  # by bundle and object
        self._indexes: dict[ObjectId, bytes] = {}

    # -- objects -----------------------------------------------------------------------------------------------------

    def get(self, object_id: ObjectId) -> bytes | None:
        """Return the frame; None when no bundle has it. RemoteUnavailable."""
        if object_id in self._corrupt or not self.has([object_id]):
            return None
        if object_id in self._indexes:
            return self._indexes[object_id]
        reason = ""
        for bundle_id, opened in self._holders(object_id):
            try:
                return self._keep_index(object_id, self._read_object(bundle_id, opened, object_id))
            except CorruptBundle as error:
                reason = f"bundle {bundle_id[:12]}: {error}"
            except RemoteUnavailable as error:
                self.down = error.reason  # asking for the next object would take as long
                raise
        _logger.info("%s: object %s passed over: %s", NAME, object_id[:12], reason)
        self._corrupt[object_id] = reason
        return None

    def has(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return those that the bundles' verified indexes list; only reading shows whether their bytes are good."""
        asked = set(object_ids) - self._corrupt.keys()
        self._open(bundle_id for object_id in asked for bundle_id in self.bundles_of(object_id))
        if any(not self._holders(object_id) and not self.bundles_of(object_id) for object_id in asked):
            # records name the bundles of indexes alone: a chunk may lie in any of them
            self._open(record.bundle for record in self.records)
        return {object_id for object_id in asked if self._holders(object_id)} if not self.down else set()

    def may_have(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return those of which the records in git name a bundle, and no look-up has shown otherwise."""
        asked = set(object_ids) - self._corrupt.keys() if not self.down else set()
        unusable = {bundle_id for bundle_id, state in self._bundles.items() if isinstance(state, str)}
        return {object_id for object_id in asked if set(self.bundles_of(object_id)) - unusable}

    def expect(self, object_ids: Iterable[ObjectId]) -> None:
        """Plan to read objects together that lie next to each other in a bundle."""
        wanted = self.has(object_ids)
        for bundle_id, opened in list(self._bundles.items()):
            if isinstance(opened, _Opened):
                places = {object_id: opened.places[object_id] for object_id in wanted & opened.places.keys()}
                wanted -= places.keys()
                for object_id, read in joined_reads.plan(places).items():
                    self._joined[bundle_id, object_id] = read

    def explain_missing(self, object_id: ObjectId) -> str:
        """Explain, for an error message, why this remote cannot supply the object."""
        if object_id in self._corrupt:
            return self._corrupt[object_id]
        bundle_ids = self.bundles_of(object_id)
        if self.down or not bundle_ids:
            return self.down or "no bundle has it"
        reasons = (
            f"bundle {bundle_id[:12]}: {reason}"
            for bundle_id in bundle_ids
            if isinstance(reason := self._bundles.get(bundle_id), str)
        )
        return "; ".join(reasons) or "no bundle has it"

    def mark_corrupt(self, object_id: ObjectId, reason: str) -> None:
        """Mark this remote's copy as corrupt; treat it as absent from now on."""
        self._corrupt[object_id] = f"its copy is corrupt: {reason}"

    # -- bundles -----------------------------------------------------------------------------------------------------

    def bundles_of(self, index_id: ObjectId) -> list[ObjectId]:
        """Return the bundles that the records name for the part with this index, newest record first."""
        named = (bundle_id for record in self.records for bundle_id in record.parts.get(index_id, ()))
        return list(dict.fromkeys(named))

    def holds(self, bundle_id: ObjectId) -> Mapping[ObjectId, int]:
        """Return the stored size in bytes of each object of a bundle; empty when the bundle is unusable."""
        self._open([bundle_id])
        opened = self._bundles.get(bundle_id)
        if not isinstance(opened, _Opened):
            return {}
        return {object_id: place.length for object_id, place in opened.places.items()}

    def missing(self) -> set[ObjectId]:
        """Return the bundles that were looked up and proved unusable; empty when the cache can't be read at all."""
        if self.down:
            return set()
        return {bundle_id for bundle_id, state in self._bundles.items() if isinstance(state, str)}

    def open_unrecorded(self, bundle_id: ObjectId, key: str) -> Record:
        """Open a bundle that no record names; return a record of it, without parts.

        Its index is the one that the id names. DataMissing when there is no such entry; CorruptBundle when there is
        another one under its key; RemoteUnavailable.
        """
        url = self.service.look_up(key)
        if url is None:
            raise DataMissing(f"{NAME} has no {key}: evicted, saved where this job can't see it, or never there")
        size = self.service.size(url)
        if size is not None and size < len(bundle.HEADER) + bundle.TRAILER_BYTES:
            raise CorruptBundle(f"{key} holds {size} bytes: it is no bundle")
        trailer = self.service.read(url, size - bundle.TRAILER_BYTES, size) if size else None
        if size is None or trailer is None:
            raise RemoteUnavailable(NAME, "HTTP 401 or 403 to an address that it had just signed")
        count = bundle.read_count(trailer)
        record = Record(bundle=bundle_id, key=key, created="", bytes=size, objects=count, parts={})
        self._bundles[bundle_id] = self._look_up(record)
        self.records = (*self.records, record)
        return record

    def upload(self, layout: BundleLayout, read: ReadRange, progress: Progress) -> str:
        """Upload a bundle, whose bytes ``read`` returns; return the key under which a look-up has confirmed it.

        Nothing is sent when it is there already. A key that a failed upload left reserved, or that holds something
        else, is passed over. UploadRefused, RemoteUnavailable.
        """
        for attempt in range(_MAX_KEYS):
            key = f"castore-{layout.id}{f'-{secrets.token_hex(4)}' if attempt else ''}"
            url = self.service.reserve(key)
            if url is None:
                if self._confirm(layout, key) is None:
                    return key
            elif self.service.send(url, layout.size, read, progress):
                refusal: RemoteError | None = None
                try:
                    self.service.finish(key, layout.size)
                except RemoteError as error:
                    refusal = error  # perhaps only the answer was lost
                problem = self._confirm(layout, key, patient=refusal is None)
                if problem is None:
                    return key
                raise refusal or UploadRefused(NAME, f"it was accepted, but a look-up says: {problem}")
        raise UploadRefused(
            NAME,
            f"{_MAX_KEYS} uploads were not taken: HTTP 401 or 403 to addresses that it had just signed",
        )

    def _confirm(self, layout: BundleLayout, key: str, *, patient: bool = False) -> str | None:
        """Look a bundle up under a key; return what is wrong with it, or None."""
        record = Record(bundle=layout.id, key=key, created="", bytes=layout.size, objects=len(layout.places), parts={})
        problem = None
        for pause in (0.0, 1.0, 2.0) if patient else (0.0,):
            time.sleep(pause)
            try:
                self._look_up(record)
                return None
            except CorruptBundle as error:
                problem = str(error)
        return problem

    def _open(self, bundle_ids: Iterable[ObjectId]) -> None:
        with self._opening:
            new = [bundle_id for bundle_id in dict.fromkeys(bundle_ids) if bundle_id not in self._bundles]
            if not new or self.down:
                return
            states = map_all(self._find, new, min(CONNECTIONS, len(new)), name="castore-lookup")
            self._bundles.update(zip(new, states, strict=True))

    def _find(self, bundle_id: ObjectId) -> _Opened | str:
        """Return the bundle, or the reason it is unusable."""
        reason = "git has no record of it"
        for record in self.records:
            if record.bundle == bundle_id and not self.down:
                try:
                    return self._look_up(record)
                except CorruptBundle as error:
                    reason = str(error)
                    _logger.info("%s: bundle %s passed over: %s", NAME, bundle_id[:12], reason)
                except RemoteUnavailable as error:
                    _logger.warning("remote %s passed over: %s", NAME, error.reason)
                    self.down = error.reason  # asking for the next one would take as long
        return self.down or reason

    def _look_up(self, record: Record) -> _Opened:
        """Return a bundle whose index is the one in git. CorruptBundle; RemoteUnavailable, also when refused."""
        start = record.bytes - bundle.tail_bytes(record.objects)
        for _ in range(2):
            url = self.service.look_up(record.key)
            if url is None:
                raise CorruptBundle("not in the cache: evicted, or saved where this job can't see it")
            tail = self.service.read(url, start, record.bytes)
            if tail is not None:
                return _Opened(record.key, url, bundle.read_tail(record.bundle, tail, record.bytes))
        raise RemoteUnavailable(NAME, "HTTP 401 or 403 to an address that it had just signed")

    def _read_object(self, bundle_id: ObjectId, opened: _Opened, object_id: ObjectId) -> bytes:
        def read(place: Place) -> bytes:
            return self._read(bundle_id, opened, place)

        frame = None
        if joined := self._joined.pop((bundle_id, object_id), None):
            with contextlib.suppress(CorruptBundle):  # by itself it may be had
                frame = joined.take(object_id, read)
        return read(opened.places[object_id]) if frame is None else frame

    def _keep_index(self, object_id: ObjectId, frame: bytes) -> bytes:
        """Keep the frame of an index for when it is asked for again; return it."""
        if self.bundles_of(object_id) and sum(map(len, list(self._indexes.values()))) + len(frame) <= _MAX_INDEXES:
            self._indexes[object_id] = frame
        return frame

    def _read(self, bundle_id: ObjectId, opened: _Opened, place: Place) -> bytes:
        data = self.service.read(opened.url, place.offset, place.offset + place.length)
        if data is None:  # the signature expired: another look-up gives a new one
            url = self.service.look_up(opened.key)
            if url is None:
                raise CorruptBundle("evicted while it was read")
            data = self.service.read(url, place.offset, place.offset + place.length)
            if data is None:
                raise RemoteUnavailable(NAME, "HTTP 401 or 403 to an address that it had just signed")
            self._bundles[bundle_id] = _Opened(opened.key, url, opened.places)
        return data

    def _holders(self, object_id: ObjectId) -> Collection[tuple[ObjectId, _Opened]]:
        return [
            (bundle_id, opened)
            for bundle_id, opened in list(self._bundles.items())
            if isinstance(opened, _Opened) and object_id in opened.places
        ]
