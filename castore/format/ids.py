"""Object ids: BLAKE3-256 of plain bytes. Pure; the only module that imports blake3."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NewType

from blake3 import blake3

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes; a memoryview must have format ``B``."""

ObjectId = NewType("ObjectId", str)
"""The id of an object or of a manifest: 64 lower-case hex digits."""

DIGEST_BYTES = 32
_ID = re.compile(r"[0-9a-f]{64}")


def hash_bytes(data: Buffer) -> ObjectId:
    """Return the id of ``data``: what ``b3sum`` prints for the same bytes. Releases the GIL while hashing."""
    return ObjectId(blake3(data).hexdigest())


def is_object_id(text: object) -> bool:
    """Return whether ``text`` is a complete, well-formed id."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def join_digests(ids: Iterable[ObjectId]) -> bytes:
    """Return the ids as raw digests, 32 bytes each, back to back."""
    return b"".join(map(bytes.fromhex, ids))


def split_digests(data: bytes) -> list[ObjectId]:
    """Invert :func:`join_digests`. ValueError if ``data`` is not a whole number of digests."""
    if len(data) % DIGEST_BYTES:
        raise ValueError("not a whole number of digests")
    digits = data.hex()
    width = 2 * DIGEST_BYTES
    return [ObjectId(digits[start : start + width]) for start in range(0, len(digits), width)]
