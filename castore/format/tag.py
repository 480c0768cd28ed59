"""Tags: names that people give to checkpoints, ``.castore/tags/<name>``, each a file that holds one id. Pure."""

from __future__ import annotations

import re

from castore.errors import CorruptTag, UsageError
from castore.format.ids import ObjectId, is_object_id

MAX_BYTES = 65
"""The size of every tag's file: an id and a newline."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEX = re.compile(r"[0-9A-Fa-f]+")
_WORDS = frozenset({"best", "latest", "none"})


def is_tag_name(text: str) -> bool:
    """Return whether a tag may be called ``text``: see :func:`check_name`."""
    return bool(_NAME.fullmatch(text)) and not _HEX.fullmatch(text) and text.lower() not in _WORDS


def check_name(text: str) -> str:
    """Return ``text`` if a tag may be called that. UsageError if it may not, or could be mistaken for something else.

    >>> check_name("v1.0-release")
    'v1.0-release'
    """
    if not _NAME.fullmatch(text):
        raise UsageError(f"{text!r} can't name a tag: it takes 1 to 64 letters, digits, dots, dashes and underscores")
    if not is_tag_name(text):
        other = "a selector" if text.lower() in _WORDS else "the first digits of an id"
        raise UsageError(f"{text!r} can't name a tag: it is {other}; choose a name that is neither")
    return text


def encode(checkpoint_id: ObjectId) -> bytes:
    """Return the content of a tag's file."""
    return f"{checkpoint_id}\n".encode()


def decode(data: bytes, path: str) -> ObjectId:
    """Invert :func:`encode`. CorruptTag, with the ``path``, for anything else."""
    text = data.decode("ascii", "replace")
    if not text.endswith("\n") or not is_object_id(text[:-1]):
        raise CorruptTag(path, "it doesn't hold an id: restore it from git, or `castore tag` it again with --force")
    return ObjectId(text[:-1])
