"""Packs: the objects of one part as a few large files, where a checkpoint has thousands of objects.

A pack is a bundle (:mod:`castore.format.bundle`) at ``packs/<bundle id>``. ``packs/parts/<index id>`` names the packs
that a part needs, and is written when they are there. Whatever is read is untrusted: a bundle's index is checked
against its id, and an object against its own by whoever asked for it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from castore.errors import CorruptBundle
from castore.format import bundle
from castore.format.bundle import Place
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import canonical
from castore.parallel import map_all
from castore.remotes import joined_reads
from castore.remotes.base import RemoteFile
from castore.remotes.joined_reads import JoinedRead

MAX_BYTES = 32 << 20
"""Frames that go into one pack: the memory that writing one takes."""

PACK_ABOVE = 1000
"""Objects of a push above which they go into packs: a few hundred requests cost little."""

PARTS = "packs/parts"
"""The folder with a file for each part that has packs, called like its index."""

MAX_POINTER_BYTES = 1 << 20
_MOST_POINTERS = 256  # are opened in search of an object: the newest, which a new checkpoint shares most with
_LISTED_FOR = 30.0  # seconds that a listing counts
_REQUESTS = 16


class Files(Protocol):
    """What packs need of a remote."""

    writable: bool

    def files(self, folder: str) -> Iterator[RemoteFile]: ...
    def read_file(self, name: str, limit: int) -> bytes | None: ...
    def read_range(self, name: str, start: int, stop: int) -> bytes | None: ...
    def write_file(self, name: str, data: bytes, *, replace: bool = False) -> bool: ...


class Pointer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file of a part: the ``packs`` that hold its objects, as far as they don't lie alone, with their sizes."""

    version: int = 1
    packs: dict[str, int]


class Packs:
    """The packs of a remote. Any number of threads may use it at once."""

    def __init__(self, remote: Files) -> None:
        self._remote = remote
        self._places: dict[ObjectId, tuple[ObjectId, Place]] = {}
        self._sizes: dict[ObjectId, int] = {}  # of opened packs
        self._unusable: set[ObjectId] = set()  # packs
        self._corrupt: set[tuple[ObjectId, ObjectId]] = set()  # an object in a pack
        self._pointers: set[ObjectId] = set()  # that were opened
        self._listed: tuple[float, dict[ObjectId, float]] = (-_LISTED_FOR, {})
        self._joined: dict[ObjectId, JoinedRead] = {}
        self._opening = threading.Lock()
        self._lock = threading.Lock()  # of what packs are known to hold

    def fresh(self, remote: Files) -> Packs:
        """Return the packs of the same remote, of which nothing is known yet but what is corrupt."""
        other = Packs(remote)
        other._corrupt = self._corrupt
        return other

    def holds(self, object_id: ObjectId) -> bool:
        """Whether an opened pack has the object."""
        return object_id in self._places

    def forget(self, object_id: ObjectId, *, is_corrupt: bool = False) -> bool:
        """Take an object for absent from its pack, for good if it is corrupt there; return whether a pack had it."""
        self._joined.pop(object_id, None)
        known = self._places.pop(object_id, None)
        if known and is_corrupt:
            self._corrupt.add((known[0], object_id))
        return known is not None

    def find(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return those that packs have. Packs are opened for that, first those of a part whose index is asked for."""
        asked = set(object_ids)
        missing = asked - self._places.keys()
        if missing:
            with self._opening:
                self._open_pointers(missing)
        return asked & self._places.keys()

    def read(self, object_id: ObjectId) -> bytes:
        """Return the frame of an object that an opened pack has, unverified. CorruptBundle; RemoteUnavailable."""
        known = self._places.get(object_id)
        if known is None:
            raise CorruptBundle("its copy in a pack was found to be corrupt")
        pack_id, place = known

        def read(place: Place) -> bytes:
            data = self._remote.read_range(name_of(pack_id), place.offset, place.offset + place.length)
            if data is None or len(data) != place.length:
                raise CorruptBundle(f"pack {pack_id[:12]} is gone, or shorter than it should be")
            return data

        frame = None
        if joined := self._joined.pop(object_id, None):
            with contextlib.suppress(CorruptBundle):  # by itself it may be had
                frame = joined.take(object_id, read)
        return read(place) if frame is None else frame

    def plan(self, object_ids: Iterable[ObjectId]) -> None:
        """Plan to read objects together that lie next to each other."""
        by_pack: dict[ObjectId, dict[ObjectId, Place]] = {}
        for object_id in object_ids:
            if known := self._places.get(object_id):
                by_pack.setdefault(known[0], {})[object_id] = known[1]
        for places in by_pack.values():
            self._joined.update(joined_reads.plan(places))

    def name_for(self, object_id: ObjectId) -> str:
        """Return the name of the pack that is known to have an object; empty if none is."""
        known = self._places.get(object_id)
        return name_of(known[0]) if known else ""

    def put(self, frames: Sequence[tuple[ObjectId, bytes]], *, renew: bool) -> str:
        """Write a pack, again if it is to be renewed; readers find it when :meth:`finish` has named it. RemoteError.

        Return its name. What it holds is good, even if it was found there to be corrupt, or not to be there.
        """
        layout = bundle.lay_out({object_id: len(frame) for object_id, frame in frames})
        data = b"".join((bundle.HEADER, *(frame for _, frame in frames), layout.tail))
        corrupt = {(layout.id, object_id) for object_id in layout.places} & self._corrupt
        self._remote.write_file(name_of(layout.id), data, replace=renew or bool(corrupt))
        self._corrupt -= corrupt
        for object_id in layout.places:
            self.forget(object_id)  # the copy elsewhere may be about to be deleted
        self._add(layout.id, layout.size, layout.places)
        return name_of(layout.id)

    def finish(self, index_id: ObjectId, needed: Iterable[ObjectId]) -> None:
        """Write the file that names the packs with the objects ``needed`` by a part. RemoteError."""
        packs = {self._places[object_id][0] for object_id in needed if object_id in self._places}
        if packs:
            pointer = Pointer(packs={pack_id: self._sizes[pack_id] for pack_id in sorted(packs)})
            self._remote.write_file(f"{PARTS}/{index_id}", canonical(pointer), replace=True)
            self._pointers.add(index_id)

    def _open_pointers(self, missing: set[ObjectId]) -> None:
        """Open the packs of parts whose index is among ``missing``, then, if some are still missing, other packs."""
        if not self._remote.writable:  # it has no listing either
            wanted = sorted(missing - self._pointers)
            self._open(wanted)
            return
        listed = self._list()
        named = missing & listed.keys()
        self._open(sorted(named - self._pointers))
        if missing - self._places.keys() - named:
            newest = sorted(listed.keys() - self._pointers, key=lambda index_id: -listed[index_id])
            self._open(newest[:_MOST_POINTERS])

    def _list(self) -> Mapping[ObjectId, float]:
        when, listed = self._listed
        if time.monotonic() - when > _LISTED_FOR:
            listed = {}
            for file in self._remote.files(PARTS):
                name = file.name.rpartition("/")[2]
                if is_object_id(name):
                    listed[ObjectId(name)] = file.modified
            self._listed = (time.monotonic(), listed)
        return listed

    def _open(self, index_ids: Sequence[ObjectId]) -> None:
        if not index_ids:
            return
        pointers = map_all(self._read_pointer, index_ids, min(_REQUESTS, len(index_ids)), name="castore-packs")
        self._pointers.update(index_id for index_id, pointer in zip(index_ids, pointers, strict=True) if pointer)
        known = self._sizes.keys() | self._unusable
        packs = {pack: size for pointer in pointers for pack, size in pointer.items() if pack not in known}
        if packs:
            map_all(self._open_pack, packs.items(), min(_REQUESTS, len(packs)), name="castore-packs")

    def _read_pointer(self, index_id: ObjectId) -> dict[ObjectId, int]:
        data = self._remote.read_file(f"{PARTS}/{index_id}", MAX_POINTER_BYTES)
        return read_pointer(data) if data is not None else {}

    def _open_pack(self, pack: tuple[ObjectId, int]) -> None:
        pack_id, size = pack
        try:
            self._add(pack_id, size, self._read_tail(pack_id, size))
        except CorruptBundle:
            self._unusable.add(pack_id)

    def _read_tail(self, pack_id: ObjectId, size: int) -> Mapping[ObjectId, Place]:
        # a guess at its length saves a request for most: a pack of 4 MiB chunks has ten objects
        start = max(0, size - bundle.tail_bytes(256))
        end = self._remote.read_range(name_of(pack_id), start, size)
        if end is None or len(end) < bundle.TRAILER_BYTES:
            raise CorruptBundle("gone, or shorter than it should be")
        length = bundle.tail_bytes(bundle.read_count(end[-bundle.TRAILER_BYTES :]))
        if length > len(end):
            end = self._remote.read_range(name_of(pack_id), max(0, size - length), size) or b""
        return bundle.read_tail(pack_id, end[-length:], size)

    def _add(self, pack_id: ObjectId, size: int, places: Mapping[ObjectId, Place]) -> None:
        with self._lock:
            self._sizes[pack_id] = size
            self._unusable.discard(pack_id)
            for object_id, place in places.items():
                if (pack_id, object_id) not in self._corrupt:
                    self._places.setdefault(object_id, (pack_id, place))


def read_pointer(data: bytes) -> dict[ObjectId, int]:
    """Return the packs, with their sizes, that the file of a part names; none if it is not such a file."""
    try:
        pointer = msgspec.json.decode(data, type=Pointer)
    except (ValueError, msgspec.MsgspecError, RecursionError):
        return {}
    if pointer.version != 1 or canonical(pointer) != data:
        return {}
    least = len(bundle.HEADER) + bundle.TRAILER_BYTES
    return {ObjectId(pack): size for pack, size in pointer.packs.items() if is_object_id(pack) and size > least}


def name_of(pack_id: ObjectId) -> str:
    """Return the name of a pack's file."""
    return f"packs/{pack_id}"
