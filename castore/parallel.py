"""One bounded pool of threads for everything that works ahead: hashing, compressing, reading, asking remotes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def map_ahead(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    threads: int,
    *,
    ahead: int | None = None,
    name: str = "castore",
) -> Iterator[_Result]:
    """Yield ``function(item)`` for each item, in order, computed by ``threads`` threads.

    At most ``ahead`` items (twice ``threads`` by default) are taken from ``items`` before their results are taken from
    here, which bounds memory. The first error is raised in place of its result. After an error, or when the caller
    stops early, what has not begun is dropped, and what has is waited for.

        >>> list(map_ahead(abs, [-1, 2, -3], threads=2))
        [1, 2, 3]
    """
    limit = 2 * threads if ahead is None else ahead
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    pending: deque[Future[_Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_all(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int, *, name: str = "castore"
) -> list[_Result]:
    """Return ``[function(item) for item in items]``, computed by ``threads`` threads. Errors: :func:`map_ahead`."""
    return list(map_ahead(function, items, threads, name=name))


def processors() -> int:
    """Return how many processors this process may use: as many threads as it pays to compute with.

    >>> processors() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
