"""The processes that save or load together: torch.distributed over gloo, on connections of their own.

Training's own process group must not be used: a save in the background would come between its collectives.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from castore.errors import RankFailed
from castore.format.ids import Buffer
from castore.parallel import processors
from castore.storage import fs
from castore.storage.object_store import ObjectStore

if TYPE_CHECKING:
    from castore.repo import Repo

_T = TypeVar("_T")

TIMEOUT = 600.0
"""Seconds that ranks wait for each other: longer than any of them writes."""


class Ranks:
    """The ranks of a process group, or this process alone: ``rank`` is its own number, ``size`` how many there are.

    Every method is called by all of them, in the same order. What fails on one is an error on all: its own there, and
    RankFailed on the others, also when a rank died, or did not call within the timeout. After that nobody knows what
    the others have sent, and every further call fails at once.

        >>> Ranks().together(lambda: "here")
        ['here']
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self._group = group
        self.may_shard = is_distributed() and not alone  # tensors may be sharded, also over one rank alone
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1
        self._stores: dict[str, list[int]] = {}
        self._lost: RankFailed | None = None

    def together(self, function: Callable[[], _T]) -> list[_T]:
        """Call ``function``, and return what it returned on each rank; results must be picklable."""
        try:
            outcome: tuple[bool, Any] = True, function()
        except RankFailed:
            raise  # the others know
        except Exception as error:
            self.fail(error)
            raise
        outcomes = self._share(outcome)
        for rank, (is_good, reason) in enumerate(outcomes):
            if not is_good:
                raise RankFailed(rank, reason)
        return [result for _, result in outcomes]

    def locally(self, function: Callable[[], _T]) -> _T:
        """Call ``function`` and return what it returned here. On an error the others fail, at their next call."""
        try:
            return function()
        except RankFailed:
            raise  # the others know
        except Exception as error:
            self.fail(error)
            raise

    def fail(self, error: Exception) -> None:
        """Tell the other ranks of an error of this one, where they wait for it."""
        with contextlib.suppress(RankFailed):
            self._share((False, f"{type(error).__name__}: {error}"))

    def agree(self) -> None:
        """Go on if all ranks do."""
        self.together(lambda: None)

    def _share(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        shared: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(shared, value, group=self._group)
        return shared

    def exchange(self, outgoing: Mapping[int, Buffer], incoming: Mapping[int, int]) -> dict[int, memoryview]:
        """Send bytes to ranks, and return what ranks sent that were to send so many. Call :meth:`agree` before."""
        received = {rank: torch.empty(size, dtype=torch.uint8) for rank, size in incoming.items()}
        with self._connected():
            work = [dist.irecv(data, group=self._group, group_src=rank) for rank, data in received.items()]
            sent = [torch.frombuffer(data, dtype=torch.uint8) for data in outgoing.values()]
            work += [
                dist.isend(data, group=self._group, group_dst=rank) for rank, data in zip(outgoing, sent, strict=True)
            ]
            for waited in work:
                if waited is not None:
                    waited.wait()
        return {rank: data.numpy().data for rank, data in received.items()}

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        if self._lost:
            raise self._lost
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._lost = RankFailed(None, f"it ended, or did not answer in time ({reason})")
            raise self._lost from error

    def same_store(self, store: ObjectStore) -> list[int]:
        """Return the ranks that see the very same store as this one, in order: on other machines it may be another."""
        key = str(store.temporary)
        if key not in self._stores:
            with contextlib.ExitStack() as made:
                names = self.together(lambda: made.enter_context(_token(store.temporary)))
                # whoever sees the file of another rank has the same folder before it
                self._stores[key] = [rank for rank, name in enumerate(names) if (store.temporary / name).exists()]
                self.agree()
        return self._stores[key]

    @contextlib.contextmanager
    def shared_memory(self, size: int) -> Iterator[dict[int, memoryview]]:
        """Yield memory of each rank on this machine, of ``size`` bytes and by rank, which all of these share.

        Empty where ranks can't share any, as on macOS. The caller lets go of it within the block.
        """
        with contextlib.ExitStack() as held:
            offers = self.together(lambda: held.enter_context(_offered(size)))
            views = {rank: view for rank, offer in enumerate(offers) if (view := held.enter_context(_opened(offer)))}
            seen = self.together(lambda: sorted(views))
            # in containers, one may see another that doesn't see it
            is_common = all(seen[rank] == seen[self.rank] for rank in views)
            yield {rank: view[_TOKEN:] for rank, view in views.items()} if is_common else {}


_TOKEN = 16  # bytes at the beginning of shared memory, by which it is told from anything else

_Offer = tuple[int, int, bytes, int] | None


@contextlib.contextmanager
def _offered(size: int) -> Iterator[_Offer]:
    """Yield what other processes need to open new memory: process, descriptor, token and size. It is in no folder."""
    if not hasattr(os, "memfd_create"):
        yield None
        return
    token = secrets.token_bytes(_TOKEN)
    descriptor = os.memfd_create("castore")
    try:
        os.write(descriptor, token)
        os.ftruncate(descriptor, _TOKEN + size)
        yield os.getpid(), descriptor, token, _TOKEN + size
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _opened(offer: _Offer) -> Iterator[memoryview | None]:
    """Yield the memory that was offered; None if this process can't see it."""
    if offer is None:
        yield None
        return
    process, descriptor, token, size = offer
    try:
        opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        # on another machine, the number of the process is that of any other
        is_it = os.read(opened, _TOKEN) == token and os.fstat(opened).st_size == size
        memory = mmap.mmap(opened, size) if is_it else None
    except OSError:
        memory = None
    finally:
        os.close(opened)
    # not closed: it goes with the last view of it
    yield memoryview(memory) if memory else None


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[str]:
    fs.make_directory(folder)
    descriptor, path = fs.create_temporary(folder, prefix=f"rank-{secrets.token_hex(8)}-")
    try:
        fs.close(descriptor, path)
        yield path.name
    finally:
        fs.discard(path)


def is_distributed() -> bool:
    """Whether torch.distributed is in use, by however many ranks."""
    return dist.is_available() and dist.is_initialized()


def connect(process_group: dist.ProcessGroup | None = None, *, timeout: float = TIMEOUT) -> Ranks:
    """Connect the ranks of a process group, all of them when None; without torch.distributed, this process alone.

    Every rank calls this at the same point of the program. ``timeout`` is how many seconds they wait for each other.
    RankFailed if not all come.
    """
    if not is_distributed() or dist.get_world_size(process_group) == 1:
        return Ranks()
    members = dist.get_process_group_ranks(process_group) if process_group else None
    wait = timedelta(seconds=timeout)
    try:
        group = dist.new_group(members, wait, backend="gloo", use_local_synchronization=members is not None)
    except RuntimeError as error:
        reason = f"not every rank came here within {timeout:g} s, and all have to: none may save or load alone"
        raise RankFailed(None, f"{reason} ({str(error).splitlines()[0]})") from error
    return Ranks(group)


_connected: dict[tuple[str, float], tuple[Any, Ranks]] = {}  # with the default group that there was then


def ranks_of(process_group: dist.ProcessGroup | None = None, *, timeout: float = TIMEOUT) -> Ranks:
    """Return what :func:`connect` returned before for the same arguments; connecting takes long.

    >>> ranks_of().size  # without torch.distributed
    1
    """
    if not is_distributed():
        return Ranks()
    key = (process_group.group_name if process_group else "", timeout)
    default, ranks = _connected.get(key, (None, None))
    if ranks is None or default is not dist.group.WORLD:
        ranks = connect(process_group, timeout=timeout)
        _connected[key] = dist.group.WORLD, ranks
    return ranks


def threads_of(repo: Repo) -> int:
    """Return how many threads of this rank hash and compress: the machine's processors are for all ranks on it."""
    return repo.config.store.threads or max(1, processors() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
