"""Saving and loading by many ranks together: one checkpoint, the same that one process would save.

Each chunk is stored by a rank that has bytes of it. The manifest is written when every rank's objects are durable. All
that ranks tell each other passes through :meth:`castore.ranks.Ranks.together`, so an error on one ends all of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec

from castore import transfer
from castore.errors import CastoreError, NotFound, UploadRefused, UsageError
from castore.format import chunking, manifest, part_index
from castore.format.ids import Buffer, ObjectId
from castore.format.manifest import Entry, Manifest, Part
from castore.format.part_index import ChunkRef, Index, TensorSpec
from castore.parallel import map_all
from castore.ranks import Ranks, threads_of
from castore.remotes import fallback
from castore.repo import Repo, SaveResult
from castore.state import shards, tensors
from castore.state.boxes import Job, SpreadTensor, plan_jobs
from castore.state.merging import Description, merge
from castore.state.parts import locate_errors
from castore.state.shards import Region, ShardedFlat, ShardedTarget
from castore.storage.object_store import Writer

_log = logging.getLogger(__name__)


# -- saving ------------------------------------------------------------------------------------------------------------


def save(repo: Repo, parts: Mapping[str, ShardedFlat], ranks: Ranks, **fields: Any) -> SaveResult:
    """Save what all ranks have of these parts as one checkpoint; ``fields`` are those of :meth:`castore.Repo.save`.

    Those of the lowest rank count. On return it is durable, on every rank. The errors of :meth:`castore.Repo.save`, and
    RankFailed when another rank had one, died or didn't answer: then no checkpoint is visible that was not before.
    """
    with _locked(repo, ranks) as stores:
        described = ranks.together(lambda: _describe(parts))
        draft = ranks.together(lambda: repo.draft(_names(described), **fields) if ranks.rank == 0 else None)[0]
        assert draft is not None
        saving = _Saving(repo, ranks, parts, described, stores)
        reports = ranks.together(saving.write)
        (saved, *_) = ranks.together(lambda: saving.commit(draft, reports) if ranks.rank == 0 else None)
        assert saved is not None
        ranks.together(lambda: saving.adopt(saved))
    return saved


@contextlib.contextmanager
def _locked(repo: Repo, ranks: Ranks) -> Iterator[list[int]]:
    """Hold the lock of every store, by the lowest rank that sees it; yield the ranks that see this one's.

    One alone: a process that waits to delete would come between two of them, and wait for the first for ever.
    """
    stores = ranks.same_store(repo.store)
    with contextlib.ExitStack() as held:
        ranks.together(lambda: held.enter_context(repo.lock()) if ranks.rank == stores[0] else None)
        yield stores


def _describe(parts: Mapping[str, ShardedFlat]) -> dict[str, Description]:
    return {name: Description(flat.tree, flat.tensors) for name, flat in parts.items()}


def _names(described: Sequence[Mapping[str, Description]]) -> list[str]:
    return list(dict.fromkeys(name for parts in described for name in parts))


@dataclass(frozen=True, slots=True)
class _Layout:
    """A part as one process would lay it out."""

    tree: Any
    tensors: Sequence[SpreadTensor]
    offsets: Sequence[int]
    chunks: Sequence[chunking.Chunk]


@dataclass(frozen=True, slots=True)
class _Report:
    """What a rank stored: (number of the job, id, stored bytes) of each chunk, and what of it was new."""

    stored: list[tuple[int, ObjectId, int]]
    new_objects: int
    new_bytes: int


class _Saving:
    """One checkpoint in the making, on one rank."""

    def __init__(
        self,
        repo: Repo,
        ranks: Ranks,
        parts: Mapping[str, ShardedFlat],
        described: Sequence[Mapping[str, Description]],
        stores: Sequence[int],
    ) -> None:
        self._repo, self._ranks, self._described = repo, ranks, described
        self._has_all = len(stores) == ranks.size  # whether all ranks see one store
        self._is_first = ranks.rank == stores[0]
        self._sources = {name: flat.sources for name, flat in parts.items()}
        self._names = _names(described)
        self._layouts: list[_Layout] = []
        self._jobs: list[Job] = []

    def write(self) -> _Report:
        """Store this rank's chunks, durably; with several stores, push them."""
        if not self._has_all:
            _check_remote(self._repo)
        self._layouts = [self._layout(name) for name in self._names]
        self._jobs = plan_jobs([(layout.tensors, layout.chunks) for layout in self._layouts], self._ranks.size)
        with self._repo.store.writer() as writer:
            stored = self._store(writer)
            written = writer.commit()
        if not self._has_all:
            transfer.push_objects(
                self._repo.store, self._repo.publishing_remote(), [object_id for _, object_id in stored]
            )
        sizes = [(number, object_id, self._repo.store.stored_size(object_id) or 0) for number, object_id in stored]
        return _Report(sizes, written.objects, written.bytes)

    def _layout(self, name: str) -> _Layout:
        tree, tensors = merge(name, [parts.get(name) for parts in self._described])
        sizes = (
            (part_index.nbytes(tensor.dtype, tensor.shape), part_index.DTYPES[tensor.dtype][1]) for tensor in tensors
        )
        return _Layout(tree, tensors, *chunking.plan_layout(sizes, self._repo.config.chunk_bytes))

    def _store(self, writer: Writer) -> list[tuple[int, ObjectId]]:
        mine = self._ranks.rank

        def store(work: tuple[int, Job, list[Buffer]]) -> tuple[int, ObjectId]:
            number, job, received = work
            arrived = iter(received)
            own = self._sources[self._names[job.part]] if any(s.holder.rank == mine for s in job.shares) else ()
            data = [
                own[share.holder.source].read(share.start, share.stop) if share.holder.rank == mine else next(arrived)
                for share in job.shares
            ]
            chunk = shards.assemble(job, data, self._layouts[job.part].tensors)
            is_shared = len(data) == 1 and own and own[job.shares[0].holder.source].is_shared
            return number, writer.put(chunk, job.chunk.itemsize, is_shared=bool(is_shared))

        return map_all(store, self._work(), threads_of(self._repo))

    def _work(self) -> Iterator[tuple[int, Job, list[Buffer]]]:
        """Yield this rank's jobs with what other ranks have of them: first those that need none, then by rounds."""
        numbered = list(enumerate(self._jobs))
        for number, job in numbered:
            if job.round == 0 and job.owner == self._ranks.rank:
                yield number, job, []
        travelling = sorted((work for work in numbered if work[1].round), key=lambda work: work[1].round)
        for _, jobs in itertools.groupby(travelling, key=lambda work: work[1].round):
            yield from self._exchange(list(jobs))

    def _exchange(self, jobs: Sequence[tuple[int, Job]]) -> Iterator[tuple[int, Job, list[Buffer]]]:
        """Send and receive the shares of a round, all between two ranks in one message."""
        mine = self._ranks.rank
        outgoing: dict[int, bytearray] = {}
        incoming: dict[int, int] = {}

        def collect() -> None:
            for _, job in jobs:
                for share in job.shares:
                    sender = share.holder.rank
                    if sender == mine != job.owner:
                        source = self._sources[self._names[job.part]][share.holder.source]
                        outgoing.setdefault(job.owner, bytearray()).extend(source.read(share.start, share.stop))
                    elif job.owner == mine != sender:
                        incoming[sender] = incoming.get(sender, 0) + share.stop - share.start

        self._ranks.together(collect)
        received = self._ranks.exchange(outgoing, incoming)
        done = dict.fromkeys(received, 0)
        for number, job in jobs:
            if job.owner != mine:
                continue
            arrived: list[Buffer] = []
            for share in job.shares:
                sender = share.holder.rank
                if sender != mine:
                    at = done[sender]
                    done[sender] = at + share.stop - share.start
                    arrived.append(received[sender][at : done[sender]])
            yield number, job, arrived

    def commit(self, draft: Manifest, reports: Sequence[_Report]) -> SaveResult:
        """Write the indexes and the manifest of what all ranks have stored."""
        stored = {number: (one, size) for report in reports for number, one, size in report.stored}
        chunk_ids: list[list[ObjectId]] = [[] for _ in self._names]
        sizes: dict[ObjectId, int] = {}
        for number, job in enumerate(self._jobs):
            object_id, size = stored[number]
            chunk_ids[job.part].append(object_id)
            sizes[object_id] = size
        described: dict[str, Part] = {}
        with self._repo.store.writer() as writer:
            indexes = [
                (layout, writer.put(part_index.encode(_index(layout, ids), name)))
                for name, layout, ids in zip(self._names, self._layouts, chunk_ids, strict=True)
            ]
            written = writer.commit()
        for name, ids, (layout, index_id) in zip(self._names, chunk_ids, indexes, strict=True):
            sizes[index_id] = self._repo.store.stored_size(index_id) or 0
            plain = sum(part_index.nbytes(tensor.dtype, tensor.shape) for tensor in layout.tensors)
            described[name] = Part(
                index=index_id, bytes=plain, stored_bytes=sum(sizes[one] for one in {index_id, *ids})
            )
        final = msgspec.structs.replace(draft, parts=described)
        if not self._has_all:
            entry = Entry(*manifest.decode(manifest.encode(final)))
            remote = self._repo.publishing_remote()
            # what gc had marked there, each rank has written again
            renewed = {one for one, _ in stored.values()}
            pushed = transfer.push(self._repo.store, contextlib.nullcontext, [entry], remote, renewed=renewed)
            if pushed.left_out:
                raise UploadRefused(remote.name, next(iter(pushed.left_out.values())))
        checkpoint_id, path = self._repo.catalog.add(final)
        return SaveResult(
            id=checkpoint_id,
            manifest=final,
            path=path,
            new_objects=written.objects + sum(report.new_objects for report in reports),
            new_bytes=written.bytes + sum(report.new_bytes for report in reports),
            warnings=self._repo.warn_unscored(final),
        )

    def adopt(self, saved: SaveResult) -> None:
        """Give a store other than the lowest rank's the manifest, too, so that it knows what its objects are of."""
        if self._is_first and self._ranks.rank != 0:
            try:
                self._repo.catalog.add(saved.manifest)
            except CastoreError as error:  # it is saved all the same
                _log.warning("checkpoint %s is not listed on this machine: %s", saved.id[:12], error)


def _check_remote(repo: Repo) -> None:
    """Raise UsageError, before anything is written, without a remote that brings several stores together."""
    try:
        repo.publishing_remote()
    except UsageError as error:
        raise UsageError(f"the ranks see different stores, and need a remote in which these meet: {error}") from error


def _index(layout: _Layout, chunk_ids: Sequence[ObjectId]) -> Index:
    chunks = tuple(ChunkRef(one, chunk.length) for one, chunk in zip(chunk_ids, layout.chunks, strict=True))
    tensors = tuple(
        TensorSpec(tensor.dtype, tensor.shape, offset)
        for tensor, offset in zip(layout.tensors, layout.offsets, strict=True)
    )
    return Index(chunks, tensors, layout.tree)


# -- loading -----------------------------------------------------------------------------------------------------------


def find(repo: Repo, selector: str, ranks: Ranks) -> Entry:
    """Return the manifest that a selector names for the lowest rank: git may differ from machine to machine.

    >>> import tempfile
    >>> from castore import Repo
    >>> repo = Repo.init(tempfile.mkdtemp())
    >>> saved = repo.save({"trainer": {"step": 1}}, run="main", step=1)
    >>> find(repo, "latest", Ranks()).id == saved.id
    True
    """
    data = ranks.together(lambda: manifest.encode(repo.find(selector).manifest) if ranks.rank == 0 else b"")[0]
    return Entry(*manifest.decode(data))


def read_indexes(repo: Repo, entry: Entry, parts: Iterable[str]) -> dict[str, Index]:
    """Read and verify the indexes of parts. NotFound for one that the checkpoint lacks."""
    indexes = {}
    for name in parts:
        if name not in entry.manifest.parts:
            has = ", ".join(entry.manifest.parts)
            raise NotFound(f"checkpoint {entry.id[:12]} has no part {name!r}: it has {has}")
        with locate_errors(name, entry.id):
            data, _ = fallback.read(repo.store, repo.remotes, entry.manifest.parts[name].index)
            indexes[name] = part_index.decode(data)
    return indexes


@dataclass(frozen=True, slots=True)
class Loaded:
    """States by part, made of the target's tensors; these are filled once :meth:`finish` was called."""

    states: dict[str, Any]
    finish: Callable[[], None]


def load(repo: Repo, entry: Entry, target: Mapping[str, Any], ranks: Ranks, *, staged: bool = False) -> Loaded:
    """Read what this rank has of the tensors of ``target``, a dict from parts to states.

    Where possible straight into them, so that after an error some are filled; when ``staged``, none is before all was
    read and :meth:`Loaded.finish` is called. The errors of :meth:`castore.Repo.load_into`, and RankFailed.
    """
    sharded = ShardedTarget(target, staged=staged)
    indexes = ranks.locally(lambda: read_indexes(repo, entry, target))
    placed = ranks.locally(lambda: {name: sharded.place(name, index) for name, index in indexes.items()})
    fill_regions(repo, entry, indexes, {name: regions for name, (_, regions) in placed.items()}, ranks)
    states = {name: tensors.restore(index.tree, placed[name][0]) for name, index in indexes.items()}
    return Loaded(states, sharded.finish)


def fill_regions(
    repo: Repo,
    entry: Entry,
    indexes: Mapping[str, Index],
    regions: Mapping[str, Mapping[int, Sequence[Region]]],
    ranks: Ranks,
) -> None:
    """Read what this rank needs of each part into its memory, each chunk once and verified.

    What is in remotes alone is fetched once for all ranks of a store. ObjectMissing, CorruptObject, RankFailed.
    """
    with _locked(repo, ranks) as stores:
        reads = ranks.locally(
            lambda: [
                (name, read) for name, index in indexes.items() for read in shards.plan_reads(index, regions[name])
            ]
        )
        wanted = ranks.together(lambda: [(name, read.number) for name, read in reads])
        _fetch(repo, [read for _, read in reads], ranks, stores)
        reading = _Reading(repo, entry, ranks, reads)
        ranks.together(lambda: reading.run(wanted))


_ChunkKey = tuple[str, int]  # part, number of the chunk

_SLOTS = 4  # chunks that a rank decodes for others, and for itself, between two times that all ranks meet


class _Reading:
    """Fills one rank's tensors. A chunk that several ranks of a machine need is decoded by one, in memory they share.

    Decoding takes several times as long as copying, and for a part of a chunk as long as for all of it.
    """

    def __init__(self, repo: Repo, entry: Entry, ranks: Ranks, reads: Sequence[tuple[str, shards.Read]]) -> None:
        self._entry, self._ranks = entry, ranks
        self._chunk_size = max((read.chunk.length for _, read in reads), default=0)
        self._reads = {(name, read.number): read for name, read in reads}
        self._threads = threads_of(repo)
        self._reader = shards.ChunkReader(repo.store, repo.remotes, self._threads)

    def run(self, wanted: Sequence[Collection[_ChunkKey]]) -> None:
        """Read everything; ``wanted`` are the chunks that each rank needs."""
        common = {key for key, count in Counter(key for keys in wanted for key in keys).items() if count > 1}
        size = max(self._ranks.together(lambda: self._chunk_size))
        shared: set[_ChunkKey] = set()
        if common:
            with self._ranks.shared_memory(2 * _SLOTS * size) as memory:
                machines = self._ranks.together(lambda: sorted(memory))
                assigned = [_assign([(rank, wanted[rank]) for rank in near]) for near in machines]
                counts = (len(keys) for readers in assigned for keys in readers.values())
                rounds = -(-max(counts, default=0) // _SLOTS)
                mine = assigned[self._ranks.rank]  # none at all where nothing can be shared
                shared = {key for keys in mine.values() for key in keys}
                self._read_shared(mine, rounds, memory, size)
        alone = [key for key in self._reads if key not in shared]
        for name, keys in itertools.groupby(alone, key=lambda key: key[0]):
            with locate_errors(name, self._entry.id):
                self._reader.fill([self._reads[key] for key in keys])

    def _read_shared(
        self, assigned: Mapping[int, Sequence[_ChunkKey]], rounds: int, memory: Mapping[int, memoryview], size: int
    ) -> None:
        """Read the chunks that were ``assigned`` to ranks, round by round; while one is copied the next is decoded."""

        def slots(rank: int, number: int) -> Iterator[tuple[_ChunkKey, memoryview]]:
            for i, key in enumerate(assigned.get(rank, ())[number * _SLOTS : (number + 1) * _SLOTS]):
                at = (number % 2 * _SLOTS + i) * size
                if rank == self._ranks.rank or key in self._reads:
                    yield key, memory[rank][at : at + size]

        def decode(work: tuple[_ChunkKey, memoryview]) -> None:
            key, slot = work
            read = self._reads[key]
            with locate_errors(key[0], self._entry.id):
                self._reader.read_into(read, slot[: read.chunk.length])

        with ThreadPoolExecutor(self._threads, thread_name_prefix="castore") as pool:
            decoding = [pool.submit(decode, work) for work in slots(self._ranks.rank, 0)]
            for number in range(rounds):
                self._ranks.together(functools.partial(_wait_for, decoding))
                # everyone has copied what was in the other half
                decoding = [pool.submit(decode, work) for work in slots(self._ranks.rank, number + 1)]
                for rank in assigned:
                    for key, slot in slots(rank, number):
                        self._reads[key].take(slot[: self._reads[key].chunk.length])
            self._ranks.agree()  # nobody lets go of memory that another one still copies from


def _wait_for(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.result()


def _assign(wanted: Sequence[tuple[int, Collection[_ChunkKey]]]) -> dict[int, list[_ChunkKey]]:
    """Return which chunks each of these ranks is to decode for others, too: about as many each, of all it decodes."""
    users: dict[_ChunkKey, list[int]] = {}
    for rank, keys in wanted:
        for key in keys:
            users.setdefault(key, []).append(rank)
    load = Counter(ranks[0] for ranks in users.values() if len(ranks) == 1)
    assigned: dict[int, list[_ChunkKey]] = {rank: [] for rank, _ in wanted}
    for key, ranks in users.items():
        if len(ranks) > 1:
            reader = min(ranks, key=lambda rank: (load[rank], rank))
            load[reader] += 1
            assigned[reader].append(key)
    return assigned


def _fetch(repo: Repo, reads: Sequence[shards.Read], ranks: Ranks, stores: Sequence[int]) -> None:
    """Fetch what the store lacks of chunks to be read, a share by each rank that sees it."""
    needed = {read.chunk.id: read.chunk.length for read in reads}
    missing = {one: length for one, length in needed.items() if not repo.store.has(one)} if repo.remotes else {}
    by_rank = ranks.together(lambda: missing)
    wanted = sorted({one: length for rank in stores for one, length in by_rank[rank].items()}.items())
    if not any(by_rank):
        return
    share = dict(wanted[stores.index(ranks.rank) :: len(stores)])

    def fetch() -> None:
        transfer.fetch_objects(repo.store, repo.remotes, share)

    ranks.together(fetch)
