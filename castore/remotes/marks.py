"""The marks of a collection in a remote: what is to be deleted there unless somebody turns out to need it."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import msgspec

from castore.errors import CorruptBundle
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import canonical
from castore.remotes.base import PublishingRemote

_NAME = "gc/marked.json"
_MAX_BYTES = 1 << 28


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    time: float
    objects: list[str]
    files: list[str]


@dataclass(frozen=True, slots=True)
class Marks:
    """Objects, and names of other files, that were of no use at a ``time`` (Unix time; 0 if nothing is marked)."""

    time: float = 0.0
    objects: AbstractSet[ObjectId] = frozenset()
    files: AbstractSet[str] = frozenset()


def read(remote: PublishingRemote) -> Marks:
    """Return what is marked. CorruptBundle if the file can't be understood: then it isn't known what goes."""
    data = remote.read_file(_NAME, _MAX_BYTES)
    if data is None:
        return Marks()
    try:
        file = msgspec.json.decode(data, type=_File)
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise CorruptBundle(f"{remote.name}: {_NAME} is not a list of marks: remove it, and gc begins again") from error
    return Marks(file.time, frozenset(map(ObjectId, filter(is_object_id, file.objects))), frozenset(file.files))


def write(remote: PublishingRemote, marked: Marks) -> None:
    """Replace the marks. RemoteError or StorageError."""
    file = _File(time=marked.time, objects=sorted(marked.objects), files=sorted(marked.files))
    remote.write_file(_NAME, canonical(file), replace=True)


def clear(remote: PublishingRemote) -> None:
    """Remove the marks. RemoteError or StorageError."""
    remote.remove([_NAME])
