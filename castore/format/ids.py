"""Object ids: BLAKE3-256 of plain bytes. The only module that imports blake3."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NewType

from blake3 import blake3

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes; a memoryview has format ``B``."""

ObjectId = NewType("ObjectId", str)
"""64 lower-case hex digits."""

DIGEST_BYTES = 32
_ID = re.compile(r"[0-9a-f]{64}")


def hash_bytes(data: Buffer) -> ObjectId:
    """The id of ``data``: what `b3sum` prints for the same bytes. Releases the GIL while hashing."""
    return ObjectId(blake3(data).hexdigest())


def is_object_id(text: object) -> bool:
    """Whether ``text`` is a full, well-formed id."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def join_digests(ids: Iterable[ObjectId]) -> bytes:
    """The ids as raw digests, 32 bytes each, back to back."""
    return b"".join(bytes.fromhex(one) for one in ids)


def split_digests(data: bytes) -> list[ObjectId]:
    """The inverse of :func:`join_digests`. ValueError when ``data`` is not whole digests."""
    if len(data) % DIGEST_BYTES:
        raise ValueError("not a whole number of digests")
    text = data.hex()
    width = 2 * DIGEST_BYTES
    return [ObjectId(text[i : i + width]) for i in range(0, len(text), width)]
