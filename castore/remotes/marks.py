"""The marks of a collection in a remote: what is to be deleted there unless somebody turns out to need it."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import msgspec

from castore.errors import CorruptBundle
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import canonical
from castore.remotes.base import PublishingRemote

NAME = "gc/marked.json"
"""The file of a remote with its marks; when it was written is when they were made, by the remote's own clock."""

_MAX_BYTES = 1 << 28


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    objects: list[str]
    files: list[str]


@dataclass(frozen=True, slots=True)
class Marks:
    """Names of files that were of no use when the marks were made, and the objects that these names stand for."""

    objects: AbstractSet[ObjectId] = frozenset()
    files: AbstractSet[str] = frozenset()


def read(remote: PublishingRemote) -> Marks:
    """Return what is marked. CorruptBundle if the file can't be understood: then it isn't known what goes."""
    data = remote.read_file(NAME, _MAX_BYTES)
    if data is None:
        return Marks()
    try:
        file = msgspec.json.decode(data, type=_File)
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise CorruptBundle(f"{remote.name}: {NAME} is not a list of marks: remove it, and gc begins again") from error
    return Marks(frozenset(map(ObjectId, filter(is_object_id, file.objects))), frozenset(file.files))


def write(remote: PublishingRemote, marked: Marks) -> None:
    """Replace the marks. RemoteError or StorageError."""
    file = _File(objects=sorted(marked.objects), files=sorted(marked.files))
    remote.write_file(NAME, canonical(file), replace=True)


def clear(remote: PublishingRemote) -> None:
    """Remove the marks. RemoteError or StorageError."""
    remote.remove([NAME])
