"""Pushing while training goes on: :class:`BackgroundPusher`."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from castore.errors import CastoreError, PushIncomplete, describe
from castore.format.manifest import Entry

if TYPE_CHECKING:
    from castore.remotes.base import PublishingRemote
    from castore.repo import Repo


class BackgroundPusher:
    """Pushes checkpoints to a remote, one after another, in a thread of its own.

    What could not be pushed is tried again with the next one, and a last time at the end. No error of the thread is
    lost, whatever it is. For use by several threads.
    """

    def __init__(self, repo: Repo, remote: PublishingRemote) -> None:
        self._repo, self._remote = repo, remote
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="castore-push")
        self._lock = threading.Lock()
        self._pending: list[Entry] = []
        self._newest: Future[None] | None = None
        self._error: BaseException | None = None
        self._is_finished = False

    @property
    def pending(self) -> tuple[Entry, ...]:
        """The checkpoints that are not in the remote yet, oldest first."""
        with self._lock:
            return tuple(self._pending)

    @property
    def is_pushing(self) -> bool:
        """Whether a push is under way, or about to be."""
        return self._newest is not None and not self._newest.done()

    def add(self, entry: Entry) -> None:
        """Have a checkpoint pushed soon."""
        with self._lock:
            self._pending.append(entry)
        self._start()

    def _start(self) -> None:
        try:
            with self._lock:
                self._newest = self._thread.submit(self._push)
        except Exception as error:
            if self._is_finished:
                raise
            self._error = error  # no thread could be started: the checkpoint itself is saved

    def wait(self) -> None:
        """Wait until no push is under way. What could not be pushed stays pending."""
        if self._newest is not None:
            self._newest.result()

    def failure(self) -> PushIncomplete | None:
        """Return the error of what could not be pushed so far; None if there is none, or :meth:`finish` raised it."""
        if self._error is None or self._is_finished:
            return None
        return self._incomplete(self._error)

    def _incomplete(self, error: BaseException) -> PushIncomplete:
        incomplete = PushIncomplete(self._remote.name, [entry.id for entry in self.pending], describe(error))
        incomplete.__cause__ = error
        return incomplete

    def finish(self) -> None:
        """Wait until all is pushed. PushIncomplete, once, if something isn't: it is still in the store."""
        if self._is_finished:
            return
        self._start()
        self.wait()
        self._is_finished = True  # not if the wait was interrupted: then the program's end tells
        self._thread.shutdown(wait=True)
        if self._error is not None:
            raise self._incomplete(self._error)

    def _push(self) -> None:
        entries = self.pending
        if not entries:
            return
        try:
            pushed = self._repo.push(entries, self._remote)
        except BaseException as error:  # nobody above would tell of it; a panic of a library in Rust is no Exception
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
