"""The frame around an object as stored: header + payload. Pure.

======  =====  =============================================
offset  bytes  field
======  =====  =============================================
0       4      magic ``CSTO``
4       1      frame version, 1
5       1      codec number (:mod:`castore.codecs`)
6       2      zero
8       8      plain length in bytes, little-endian
16      ...    payload, to the end of the file
======  =====  =============================================
"""

from __future__ import annotations

import struct

from castore.errors import CorruptObject, UnsupportedVersion
from castore.format import codecs
from castore.format.ids import Buffer, ObjectId, hash_bytes

MAX_PLAIN = 64 << 20
"""Largest object, plain bytes: a frame that claims more is refused before anything is allocated."""

MAX_STORED = MAX_PLAIN + 4096
"""Largest frame: an encoding is only used where it shrinks, so the rest is headers."""

_MAGIC = b"CSTO"
_VERSION = 1
_HEADER = struct.Struct("<4sBBHQ")
HEADER_BYTES = _HEADER.size


def encode_frame(plain: Buffer, itemsize: int = 1) -> list[Buffer]:
    """The frame of ``plain`` as buffers to be written one after another; see :func:`castore.codecs.encode`."""
    if len(plain) > MAX_PLAIN:
        raise ValueError(f"an object holds at most {MAX_PLAIN} bytes, not {len(plain)}")
    codec, payload = codecs.encode(plain, itemsize)
    return [_HEADER.pack(_MAGIC, _VERSION, codec, 0, len(plain)), *payload]


def plain_length(expected: ObjectId, frame: memoryview) -> int:
    """The plain length that a frame declares, checked against the limit but not yet against the data."""
    return _header(expected, frame)[1]


def decode_frame(expected: ObjectId, frame: memoryview, out: memoryview) -> None:
    """Decode a frame into all of ``out`` and verify it. CorruptObject unless ``out`` then holds what the id names.

    The hash is taken of ``out`` itself, after decoding: what is checked is what the caller uses.
    """
    codec, length = _header(expected, frame)
    if length != len(out):
        raise CorruptObject(expected, f"holds {length} bytes where {len(out)} were expected")
    try:
        codecs.decode(codec, frame[HEADER_BYTES:], out)
    except codecs.CodecError as error:
        raise CorruptObject(expected, str(error)) from error
    found = hash_bytes(out)
    if found != expected:
        raise CorruptObject(expected, f"its bytes hash to {found[:12]}")


def _header(expected: ObjectId, frame: memoryview) -> tuple[int, int]:
    """(codec, plain length) of a frame."""
    if len(frame) < HEADER_BYTES:
        raise CorruptObject(expected, "shorter than a header")
    magic, version, codec, zero, length = _HEADER.unpack_from(frame)
    if magic != _MAGIC:
        raise CorruptObject(expected, "not a castore object")
    if version != _VERSION:
        raise UnsupportedVersion(f"object {expected[:12]}", version)
    if zero or codec not in codecs.NAMES:
        raise CorruptObject(expected, "header is not valid")
    if length > MAX_PLAIN:
        raise CorruptObject(expected, f"claims {length} bytes, over the limit")
    return codec, length
