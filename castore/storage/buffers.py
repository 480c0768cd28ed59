"""Page-aligned memory that is used again: what files are written from, and how many are on their way at a time."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LIMIT = 64 << 20  # bytes: enough that eight threads write files of 4 MiB while others fill the next ones
_LEAST = 3  # buffers that may be in use whatever their size, or large chunks would be written one at a time
_STEP = 256 << 10


class BufferPool:
    """Buffers for the threads of one process; a forked child begins with an empty pool.

    >>> pool = BufferPool()
    >>> with pool.hold(pool.take(5)) as buffer:
    ...     len(buffer) >= 5
    True
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Begin anew: what the threads of a parent had taken would never come back to its child."""
        self._changed = threading.Condition()
        self._free: list[memoryview] = []
        self._in_use = 0
        self._bytes = 0  # of all buffers, in use or free

    def take(self, size: int) -> memoryview:
        """Return a buffer of at least ``size`` bytes and of whole pages; wait while too much is in use.

        Its content is undefined. The caller gives it back.
        """
        rounded = -(-size // _STEP) * _STEP
        with self._changed:
            while True:
                fitting = [buffer for buffer in self._free if len(buffer) >= size]
                if fitting:
                    taken = min(fitting, key=len)
                    self._free.remove(taken)
                    break
                while self._free and self._bytes + rounded > _LIMIT:
                    self._bytes -= len(self._free.pop())
                if self._bytes + rounded <= _LIMIT or self._in_use < _LEAST:
                    # private: shared memory would be one with a forked child's
                    taken = memoryview(mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
                    self._bytes += rounded
                    break
                self._changed.wait()
            self._in_use += 1
        return taken

    def give_back(self, buffer: memoryview) -> None:
        """Let others use a buffer that :meth:`take` has returned."""
        with self._changed:
            self._in_use -= 1
            self._free.append(buffer)
            self._changed.notify_all()

    @contextmanager
    def hold(self, buffer: memoryview) -> Iterator[memoryview]:
        """Give a buffer back when the block ends."""
        try:
            yield buffer
        finally:
            self.give_back(buffer)


# Of this process, whatever repositories it opens: new memory costs as much as encoding into it. Two, since who waits
# for a buffer of one while holding one of the same could wait for ever.
FILES = BufferPool()
"""What files are written from."""
COPIES = BufferPool()
"""Copies of memory that others may write to; their holder may wait for one of ``FILES``."""
