"""The frame around an object as stored: header + payload. Pure.

======  =====  =============================================
offset  bytes  field
======  =====  =============================================
0       4      magic ``CSTO``
4       1      frame version: 1, or 2 for codec 3, which version 1 doesn't know
5       1      codec number (:mod:`castore.format.codecs`)
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
"""Plain bytes of the largest object: a frame that claims more is refused before anything is allocated."""

MAX_STORED = MAX_PLAIN + 4096
"""Bytes of the largest frame: an encoding is used only if it is smaller, so the surplus is for headers."""

_MAGIC = b"CSTO"
_VERSIONS = (1, 2)
_HEADER = struct.Struct("<4sBBHQ")
HEADER_BYTES = _HEADER.size


def encode_frame(plain: Buffer, itemsize: int = 1) -> bytes:
    """Return the frame of ``plain``. See :func:`encode_frame_into`."""
    out = bytearray(bound(len(plain)))
    with memoryview(out) as view:
        size = encode_frame_into(plain, itemsize, view)
    return bytes(out[:size])


def encode_frame_into(plain: Buffer, itemsize: int, out: memoryview) -> int:
    """Write the frame of ``plain`` into ``out``; return its length. ValueError above ``MAX_PLAIN`` bytes.

    ``itemsize`` is as in :func:`castore.format.codecs.encode`; ``out`` has at least :func:`bound` bytes.
    """
    if len(plain) > MAX_PLAIN:
        raise ValueError(f"an object holds at most {MAX_PLAIN} bytes, not {len(plain)}")
    codec, length = codecs.encode(plain, itemsize, out[HEADER_BYTES:])
    _HEADER.pack_into(out, 0, _MAGIC, _version_of(codec), codec, 0, len(plain))
    return HEADER_BYTES + length


def bound(length: int) -> int:
    """Return how many bytes :func:`encode_frame_into` needs for ``length`` plain ones."""
    return HEADER_BYTES + length + codecs.OVERHEAD


def plain_length(object_id: ObjectId, frame: memoryview) -> int:
    """Return the plain length that a frame declares: within the limit, but not yet checked against the data."""
    return _read_header(object_id, frame)[1]


def decode_frame(object_id: ObjectId, frame: memoryview, out: memoryview) -> None:
    """Decode a frame into all of ``out``. CorruptObject unless ``out`` then holds the bytes that the id names.

    The hash is taken of ``out`` itself, after decoding: the buffer that is checked is the one the caller uses.
    """
    codec, length = _read_header(object_id, frame)
    if length != len(out):
        raise CorruptObject(object_id, f"holds {length} bytes where {len(out)} were expected")
    try:
        codecs.decode(codec, frame[HEADER_BYTES:], out)
    except codecs.CodecError as error:
        raise CorruptObject(object_id, str(error)) from error
    actual_id = hash_bytes(out)
    if actual_id != object_id:
        raise CorruptObject(object_id, f"its bytes hash to {actual_id[:12]}")


def _read_header(object_id: ObjectId, frame: memoryview) -> tuple[int, int]:
    """Return (codec, plain length)."""
    if len(frame) < HEADER_BYTES:
        raise CorruptObject(object_id, "shorter than a header")
    magic, version, codec, zero, length = _HEADER.unpack_from(frame)
    if magic != _MAGIC:
        raise CorruptObject(object_id, "not a castore object")
    if version not in _VERSIONS:
        raise UnsupportedVersion(f"object {object_id[:12]}", version)
    if zero or codec not in codecs.NAMES or version != _version_of(codec):
        raise CorruptObject(object_id, "invalid header")
    if length > MAX_PLAIN:
        raise CorruptObject(object_id, f"claims {length} bytes, over the limit")
    return codec, length


def _version_of(codec: int) -> int:
    """Return the oldest version that has the codec: whoever knows only version 1 calls no sparse object damaged."""
    return 2 if codec == codecs.SPARSE else 1
