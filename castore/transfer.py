"""Objects between the store and remotes, whatever their kind: fetch what a checkpoint lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from castore.errors import ObjectMissing
from castore.format import part_index
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.format.part_index import ChunkRef
from castore.parallel import map_ahead, map_all
from castore.progress import Progress
from castore.remotes import fallback
from castore.remotes.base import Remote
from castore.remotes.fallback import ErrorRecorder
from castore.repo import Repo
from castore.state.parts import locate_errors


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull brought: the number of objects, and their plain bytes.

    ``remote_errors`` maps the name of each remote that was passed over to its first error: what it lacked came from
    another one.
    """

    objects: int
    bytes: int
    remote_errors: Mapping[str, str] = field(default_factory=dict)


def pull(repo: Repo, entry: Entry, parts: Iterable[str], progress: Progress) -> Pulled:
    """Fetch the objects that the store lacks of these parts of a checkpoint, each verified before it is stored.

    ObjectMissing when no remote has a good copy of one; what was fetched until then stays. ``progress`` counts plain
    bytes.
    """
    recorders = [ErrorRecorder(remote) for remote in repo.remotes]
    indexes: dict[ObjectId, tuple[bytes, bytes]] = {}
    missing: dict[ObjectId, int] = {}
    with repo.lock():

        def read_index(name: str) -> tuple[ObjectId, bytes, bytes | None, tuple[ChunkRef, ...]]:
            index_id = entry.manifest.parts[name].index
            with locate_errors(name, entry.id):
                data, frame = fallback.read(repo.store, recorders, index_id)
                return index_id, data, frame, part_index.decode_chunks(data)

        for index_id, data, frame, chunks in map_all(read_index, parts, fallback.ASKERS, name="castore-fetch"):
            if frame is not None:
                indexes[index_id] = data, frame
            missing.update((chunk.id, chunk.length) for chunk in chunks if not repo.store.has(chunk.id))
        _fetch_all(repo, recorders, missing, progress)
        # last: an index without its chunks would be taken for damage
        for index_id, (data, frame) in indexes.items():
            repo.store.adopt(index_id, frame, memoryview(bytearray(len(data))))
    plain_bytes = sum(missing.values()) + sum(len(data) for data, _ in indexes.values())
    errors = {recorder.name: recorder.error for recorder in recorders if recorder.error}
    return Pulled(len(missing) + len(indexes), plain_bytes, errors)


def _fetch_all(repo: Repo, remotes: Sequence[Remote], lengths: Mapping[ObjectId, int], progress: Progress) -> None:
    """Fetch objects, given with their plain lengths, in parallel. ObjectMissing."""
    done, total = 0, sum(lengths.values())

    def fetch(object_id: ObjectId) -> ObjectId:
        if fallback.fetch(repo.store, remotes, object_id) is None:
            raise ObjectMissing(object_id)
        return object_id

    for object_id in map_ahead(fetch, lengths, fallback.prepare(remotes, lengths), name="castore-fetch"):
        done += lengths[object_id]
        progress(done, total)
