"""Pushing while training goes on: :class:`BackgroundPusher`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from castore.errors import CastoreError, PushIncomplete
from castore.format.manifest import Entry

if TYPE_CHECKING:
    from castore.remotes.base import PublishingRemote
    from castore.repo import Repo


class BackgroundPusher:
    """Pushes checkpoints to a remote, one after another, in a thread of its own.

    What could not be pushed is tried again with the next one, and a last time at the end. For use by several threads.
    """

    def __init__(self, repo: Repo, remote: PublishingRemote) -> None:
        self._repo, self._remote = repo, remote
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="castore-push")
        self._lock = threading.Lock()
        self._pending: list[Entry] = []
        self._error: CastoreError | None = None
        self._is_finished = False
        self._at_work = 0

    @property
    def pending(self) -> tuple[Entry, ...]:
        """The checkpoints that are not in the remote yet, oldest first."""
        with self._lock:
            return tuple(self._pending)

    @property
    def is_pushing(self) -> bool:
        """Whether a push is under way, or about to be."""
        return self._at_work > 0

    def add(self, entry: Entry) -> None:
        """Have a checkpoint pushed soon."""
        with self._lock:
            self._pending.append(entry)
            self._at_work += 1
        self._thread.submit(self._push)

    def wait(self) -> None:
        """Wait until no push is under way. What could not be pushed stays pending."""
        if not self._is_finished:
            self._thread.submit(lambda: None).result()

    def failure(self) -> CastoreError | None:
        """Return the error of what could not be pushed so far; None if there is none, or :meth:`finish` was called."""
        if self._error is None or self._is_finished:
            return None
        return self._incomplete(self._error)

    def _incomplete(self, error: CastoreError) -> PushIncomplete:
        return PushIncomplete(self._remote.name, [entry.id for entry in self.pending], str(error))

    def finish(self) -> None:
        """Wait until all is pushed. PushIncomplete, once, if something isn't: it is still in the store."""
        if self._is_finished:
            return
        self._is_finished = True
        with self._lock:
            self._at_work += 1
        self._thread.submit(self._push).result()
        self._thread.shutdown(wait=True)
        if self._error is not None:
            raise self._incomplete(self._error)

    def _push(self) -> None:
        try:
            self._push_pending()
        finally:
            with self._lock:
                self._at_work -= 1

    def _push_pending(self) -> None:
        entries = self.pending
        if not entries:
            return
        try:
            pushed = self._repo.push(entries, self._remote)
        except CastoreError as error:
            self._error = error
            return
        incomplete = {checkpoint_id for checkpoint_id, _ in pushed.left_out}
        reasons = list(pushed.left_out.values())
        self._error = CastoreError(reasons[0]) if reasons else None
        with self._lock:
            done = {entry.id for entry in entries} - incomplete
            self._pending = [entry for entry in self._pending if entry.id not in done]


def pusher_of(repo: Repo) -> BackgroundPusher | None:
    """Return what pushes each checkpoint after it was saved, if config.toml asks for that. UsageError, ConfigError."""
    return BackgroundPusher(repo, repo.publishing_remote()) if repo.config.pushes else None
