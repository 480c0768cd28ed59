"""Bundles (one remote entry that holds many objects) and the records of them that are committed to git. Pure.

=========  ======  ==================================================
offset     bytes   field
=========  ======  ==================================================
0          8       magic ``CSTB``, version 1, three zero bytes
8          ...     frames (:mod:`castore.format.frame`), back to back
f          44 n    the index: for each frame, in order, id (32 bytes), offset (u64), length (u32)
f + 44 n   16      f (u64), n (u32), magic ``CSTB``
=========  ======  ==================================================

The id of a bundle is the BLAKE3 of its index, and the record in git states it. So reading an object takes two requests:
one for the index, verified against the bundle's id, and one for the object's frame, verified against the object's id.

The object of the last frame may be the bundle's :class:`Contents`: what a commit would say of it.
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
_LONGEST_KEY = 512  # the limit of the GitHub Actions cache

_MAGIC = b"CSTB"
HEADER = _MAGIC + bytes((VERSION, 0, 0, 0))
_PLACE = struct.Struct(f"<{DIGEST_BYTES}sQL")
_TRAILER = struct.Struct("<QL4s")


@dataclass(frozen=True, slots=True)
class Place:
    """Position of a frame in its bundle, in bytes."""

    offset: int
    length: int


# -- the bundle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BundleLayout:
    """A bundle to write: ``HEADER``, the frames at their ``places``, then ``tail``; ``size`` bytes in all."""

    id: ObjectId
    places: Mapping[ObjectId, Place]
    tail: bytes
    size: int


def lay_out(sizes: Mapping[ObjectId, int]) -> BundleLayout:
    """Return the layout of a bundle with frames of these sizes (bytes), in this order."""
    places = {}
    offset = len(HEADER)
    for object_id, size in sizes.items():
        places[object_id] = Place(offset, size)
        offset += size
    index = b"".join(
        _PLACE.pack(bytes.fromhex(object_id), place.offset, place.length) for object_id, place in places.items()
    )
    tail = index + _TRAILER.pack(offset, len(places), _MAGIC)
    return BundleLayout(hash_bytes(index), places, tail, offset + len(tail))


def tail_bytes(count: int) -> int:
    """Return the length of the tail of a bundle with ``count`` objects: the bytes that :func:`read_tail` takes."""
    return _PLACE.size * count + _TRAILER.size


TRAILER_BYTES = _TRAILER.size
"""Length of the end of a bundle, which :func:`read_count` takes."""


def read_count(trailer: Buffer) -> int:
    """Return the number of objects that the end of a bundle states; nothing vouches for it. CorruptBundle."""
    _, count, magic = _TRAILER.unpack(trailer)
    if magic != _MAGIC or not 0 < count <= MAX_OBJECTS:
        raise CorruptBundle("it is no bundle: it doesn't end like one")
    return int(count)


def read_tail(bundle_id: ObjectId, tail: Buffer, size: int) -> dict[ObjectId, Place]:
    """Return the place of every object in the bundle of ``size`` bytes that ends in ``tail``. CorruptBundle.

    The hash is checked first; the remaining checks catch a writer that did not follow the format.
    """
    index, trailer = tail[: -_TRAILER.size], tail[-_TRAILER.size :]
    if len(trailer) < _TRAILER.size or hash_bytes(index) != bundle_id:
        raise CorruptBundle("its index does not match its id: the entry holds other bytes")
    frames_end, count, magic = _TRAILER.unpack(trailer)
    if len(index) % _PLACE.size:
        raise CorruptBundle("its index is no whole number of entries")
    if (frames_end, count, magic) != (size - len(tail), len(index) // _PLACE.size, _MAGIC):
        raise CorruptBundle("its trailer contradicts its index")
    places = {}
    expected_offset = len(HEADER)
    for digest, offset, length in _PLACE.iter_unpack(index):
        if offset != expected_offset or not HEADER_BYTES <= length <= MAX_STORED:
            raise CorruptBundle("its index lists frames that are not contiguous, or a length out of range")
        places[ObjectId(digest.hex())] = Place(offset, length)
        expected_offset += length
    if expected_offset != frames_end or len(places) != count:
        raise CorruptBundle("its index lists an object twice, or does not cover the whole bundle")
    return places


# -- the record of a bundle ------------------------------------------------------------------------------------------


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file in git that describes a bundle: the ``key`` it was uploaded under, and the parts it helps to read.

    ``parts`` maps the index id of each part to all the bundles that together hold its objects. ``ref`` is the git ref
    of the job that uploaded the bundle: a job on another ref may not be able to see the entry.
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
        """Path below ``bundles/``. Named after the content, so two branches never conflict over a record."""
        return f"{hash_bytes(encode_record(self))[:16]}.json"


PARTS_OF_A_RECORD = 1000
"""Keeps a record far below ``MAX_RECORD_BYTES``; further parts go into another record of the same bundle."""


def encode_record(record: Record) -> bytes:
    """Return the bytes of the record's file."""
    return canonical(record)


def decode_record(data: bytes) -> Record:
    """Return the record in a file's bytes. Raise CorruptBundle or UnsupportedVersion for anything else."""
    try:
        record = msgspec.json.decode(data[: MAX_RECORD_BYTES + 1], type=Record)
        if record.version > VERSION:
            raise UnsupportedVersion("the record of a bundle", record.version)
        _check(record)
        if encode_record(record) != data:
            raise ValueError("not in canonical form")
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise CorruptBundle(f"not a valid bundle record: {error}") from error
    return record


def _check(record: Record) -> None:
    bundle_ids = (bundle_id for bundles in record.parts.values() for bundle_id in bundles)
    if not all(map(is_object_id, [record.bundle, *record.parts, *bundle_ids])):
        raise ValueError("invalid id")
    if not _is_valid_key(record.key):
        raise ValueError("invalid key")
    if not CREATED.fullmatch(record.created):
        raise ValueError("created is not a UTC time with microseconds")
    datetime.fromisoformat(record.created)  # ValueError for a month of 19
    if not all(record.parts.values()):
        raise ValueError("a part lists no bundle")
    if not record.ref.isprintable() or len(record.ref) > _LONGEST_KEY:
        raise ValueError("invalid ref")
    if record.version < 1 or not 0 < record.objects <= MAX_OBJECTS or not 0 < record.bytes < 2**63:
        raise ValueError("a number is out of range")
    if record.bytes < len(HEADER) + tail_bytes(record.objects):
        raise ValueError("the bundle would be smaller than its own index")


def _is_valid_key(key: str) -> bool:
    return 0 < len(key) <= _LONGEST_KEY and key.isascii() and key.isprintable() and "," not in key


# -- what a bundle says of itself ------------------------------------------------------------------------------------


class Contents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle's last frame holds: the commit that names the bundle can be made again from it, should it be lost.

    ``files`` maps paths in ``.castore/`` to texts that the commit adds beside the bundle's records. ``parts`` and
    ``ref`` are those of the records; None stands for the bundle itself, whose id depends on these bytes.
    """

    version: int = VERSION
    ref: str = ""
    files: dict[str, str]
    parts: dict[ObjectId, list[ObjectId | None]]

    def records(self, bundle_id: ObjectId, key: str, *, size: int, objects: int, created: str) -> tuple[Record, ...]:
        """Return the records of the bundle, which is ``size`` bytes long and holds ``objects``. CorruptBundle."""
        named = sorted((index_id, [needed or bundle_id for needed in ids]) for index_id, ids in self.parts.items())
        batches = (named[start : start + PARTS_OF_A_RECORD] for start in range(0, len(named), PARTS_OF_A_RECORD))
        records = [
            Record(
                bundle=bundle_id,
                key=key,
                created=created,
                bytes=size,
                objects=objects,
                ref=self.ref,
                parts=dict(batch),
            )
            for batch in batches
        ]
        return tuple(decode_record(encode_record(record)) for record in records)


def encode_contents(contents: Contents) -> bytes:
    """Return the plain bytes of the object that a bundle's last frame holds."""
    return canonical(contents)


def decode_contents(data: Buffer) -> Contents:
    """Return the contents in an object's plain bytes. CorruptBundle or UnsupportedVersion for anything else."""
    try:
        contents = msgspec.json.decode(data, type=Contents)
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise CorruptBundle(f"its last object names nothing that could be recovered: {error}") from error
    if contents.version > VERSION:
        raise UnsupportedVersion("the contents of a bundle", contents.version)
    return contents


# -- which objects go into a new bundle ------------------------------------------------------------------------------

MOST_BUNDLES = 4
"""A checkpoint depends on at most this many bundles: each further one is one more that the cache may have evicted."""


def choose_bundles(
    needed: Mapping[ObjectId, int], bundles: Mapping[ObjectId, Mapping[ObjectId, int]]
) -> tuple[list[ObjectId], set[ObjectId]]:
    """Return (existing bundles to rely on, objects that go into a new bundle); together they hold all of ``needed``.

    ``needed`` and each value of ``bundles`` map object ids to stored sizes. The new bundle holds everything if
    ``MOST_BUNDLES`` would be exceeded otherwise, or if over half the bytes of the existing bundles are not needed.
    """
    uncovered = set(needed)
    chosen: list[ObjectId] = []

    def gain(bundle_id: ObjectId) -> int:
        return sum(needed[object_id] for object_id in uncovered & bundles[bundle_id].keys())

    while uncovered:
        best = max(bundles, key=gain, default=None)
        if best is None or not uncovered & bundles[best].keys():
            break
        chosen.append(best)
        uncovered -= bundles[best].keys()
    held = sum(sum(bundles[bundle_id].values()) for bundle_id in chosen)
    used = sum(needed[object_id] for object_id in needed.keys() - uncovered)
    if len(chosen) + bool(uncovered) > MOST_BUNDLES or held > 2 * used:
        return [], set(needed)
    return chosen, uncovered


def in_order(parts: Iterable[Iterable[ObjectId]], selected: set[ObjectId]) -> list[ObjectId]:
    """Return the ``selected`` objects, each once, with those of a part side by side."""
    return list(dict.fromkeys(object_id for objects in parts for object_id in objects if object_id in selected))
