"""Bundles: one remote entry that holds many objects, and the record of one that is committed to git. Pure.

=========  ======  ==================================================
offset     bytes   field
=========  ======  ==================================================
0          8       magic ``CSTB``, version 1, three zero bytes
8          ...     frames (:mod:`castore.objects`), back to back
f          44 n    the index: for each frame, in order, id (32 bytes), offset (u64), length (u32)
f + 44 n   16      f (u64), n (u32), magic ``CSTB``
=========  ======  ==================================================

The id of a bundle is the BLAKE3 of its index. The record in git says it, so a reader needs two requests: one for the
index, which it verifies, and one for the object that it wants, which verifies itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

import msgspec

from castore.errors import CorruptBundle, UnsupportedVersion
from castore.format.frame import HEADER_BYTES, MAX_STORED
from castore.format.ids import DIGEST_BYTES, Buffer, ObjectId, hash_bytes, is_object_id
from castore.format.manifest import CREATED, canonical

VERSION = 1
MAX_OBJECTS = 1 << 17
MAX_RECORD_BYTES = 1 << 20
_LONGEST_KEY = 512  # what GitHub allows

_MAGIC = b"CSTB"
HEADER = _MAGIC + bytes((VERSION, 0, 0, 0))
_PLACE = struct.Struct(f"<{DIGEST_BYTES}sQL")
_TRAILER = struct.Struct("<QL4s")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frame lies in its bundle, in bytes."""

    offset: int
    length: int


# -- the bundle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """A bundle that is to be written: ``HEADER``, the frames at their places, then ``tail``; ``size`` bytes in all."""

    id: ObjectId
    places: Mapping[ObjectId, Place]
    tail: bytes
    size: int


def lay_out(sizes: Mapping[ObjectId, int]) -> Layout:
    """The bundle of frames of these sizes, in this order."""
    places = {}
    at = len(HEADER)
    for own, size in sizes.items():
        places[own] = Place(at, size)
        at += size
    index = b"".join(_PLACE.pack(bytes.fromhex(own), place.offset, place.length) for own, place in places.items())
    tail = index + _TRAILER.pack(at, len(places), _MAGIC)
    return Layout(hash_bytes(index), places, tail, at + len(tail))


def tail_bytes(count: int) -> int:
    """How long the end of a bundle of ``count`` objects is: what :func:`read_tail` takes."""
    return _PLACE.size * count + _TRAILER.size


def read_tail(expected: ObjectId, tail: Buffer, size: int) -> dict[ObjectId, Place]:
    """Where each object lies in the bundle ``expected`` of ``size`` bytes that ends so. CorruptBundle.

    The hash comes first. The rest then only proves that whoever wrote it kept to the format.
    """
    index, trailer = tail[: -_TRAILER.size], tail[-_TRAILER.size :]
    if len(trailer) < _TRAILER.size or hash_bytes(index) != expected:
        raise CorruptBundle("its index is not the one that git names: other bytes stand in its place")
    start, count, magic = _TRAILER.unpack(trailer)
    if (start, count, magic) != (size - len(tail), len(index) // _PLACE.size, _MAGIC):
        raise CorruptBundle("its last bytes contradict its index")
    places = {}
    at = len(HEADER)
    for digest, offset, length in _PLACE.iter_unpack(index):
        if offset != at or not HEADER_BYTES <= length <= MAX_STORED:
            raise CorruptBundle("its index lists frames that don't follow one another")
        places[ObjectId(digest.hex())] = Place(offset, length)
        at += length
    if at != start or len(places) != count:
        raise CorruptBundle("its index lists an object twice, or not all of the bundle")
    return places


# -- its record ------------------------------------------------------------------------------------------------------


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What git knows of a bundle: under which ``key`` it was uploaded, and what can be read with its help.

    ``parts`` maps the index id of each part of a checkpoint to all the bundles that hold its objects together. ``ref``
    is the git ref of the job that uploaded it, as not every other sees what it did.
    """

    version: int = VERSION
    bundle: ObjectId
    key: str
    created: str
    bytes: int
    objects: int
    ref: str = ""
    parts: dict[ObjectId, list[ObjectId]]

    @property
    def file_name(self) -> str:
        """Where it lives below ``bundles/``: named by its content, so that two branches never conflict over one."""
        return f"{hash_bytes(encode_record(self))[:16]}.json"


PARTS_OF_A_RECORD = 1000
"""So that a record stays far below its limit; what goes beyond is another record of the same bundle."""


def encode_record(record: Record) -> bytes:
    """The record's file."""
    return canonical(record)


def decode_record(data: bytes) -> Record:
    """The record in a file's bytes. CorruptBundle or UnsupportedVersion for anything else."""
    try:
        record = msgspec.json.decode(data[: MAX_RECORD_BYTES + 1], type=Record)
        if record.version > VERSION:
            raise UnsupportedVersion("the record of a bundle", record.version)
        _check(record)
        if encode_record(record) != data:
            raise ValueError("not in canonical form")
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise CorruptBundle(f"not a valid record of a bundle: {error}") from error
    return record


def _check(record: Record) -> None:
    ids = [record.bundle, *record.parts, *(one for bundles in record.parts.values() for one in bundles)]
    if not all(map(is_object_id, ids)):
        raise ValueError("an id is not one")
    if (
        not (0 < len(record.key) <= _LONGEST_KEY and record.key.isascii() and record.key.isprintable())
        or "," in record.key
    ):
        raise ValueError("its key is none")
    if not CREATED.fullmatch(record.created):
        raise ValueError("created is not a UTC time with microseconds")
    datetime.fromisoformat(record.created)  # ValueError for a month of 19
    if not all(record.parts.values()):
        raise ValueError("a part lies in no bundle")
    if not record.ref.isprintable() or len(record.ref) > _LONGEST_KEY:
        raise ValueError("its ref is none")
    if record.version < 1 or not 0 < record.objects <= MAX_OBJECTS or not 0 < record.bytes < 2**63:
        raise ValueError("a number is out of range")
    if record.bytes < len(HEADER) + tail_bytes(record.objects):
        raise ValueError("it is smaller than its own index")


# -- which objects go into a new one ---------------------------------------------------------------------------------

MOST_BUNDLES = 4
"""One more that a checkpoint depends on is one more that may have been evicted."""


def cover(
    needed: Mapping[ObjectId, int], bundles: Mapping[ObjectId, Mapping[ObjectId, int]]
) -> tuple[list[ObjectId], set[ObjectId]]:
    """(existing bundles to rely on, objects that a new bundle must have) so that all of ``needed`` can be had.

    ``needed`` and each of ``bundles`` map objects to stored sizes. When it would take more than ``MOST_BUNDLES``, or
    more than half of what the existing ones hold isn't needed, the new one holds everything.
    """
    left = set(needed)
    chosen: list[ObjectId] = []
    while left:
        best = max(bundles, key=lambda one: sum(needed[own] for own in left & bundles[one].keys()), default=None)
        if best is None or not left & bundles[best].keys():
            break
        chosen.append(best)
        left -= bundles[best].keys()
    held = sum(sum(bundles[one].values()) for one in chosen)
    used = sum(needed[own] for own in needed.keys() - left)
    if len(chosen) + bool(left) > MOST_BUNDLES or held > 2 * used:
        return [], set(needed)
    return chosen, left


def in_order(parts: Iterable[Iterable[ObjectId]], wanted: set[ObjectId]) -> list[ObjectId]:
    """The ``wanted`` objects, each once and those of a part side by side."""
    return list(dict.fromkeys(own for objects in parts for own in objects if own in wanted))
