"""The report on this machine's own address, made again whenever the repository has changed."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from castore.errors import UsageError
from castore.repo import Repo

_WATCHED = ("manifests", "sessions", "pins", "tags", "bundles", "objects")


def stamp(repo: Repo) -> str:
    """Return text that differs once a checkpoint was saved, a session ended, or data came or went."""
    seen = hashlib.sha256()
    for name in _WATCHED:
        folder = (repo.location.data if name == "objects" else repo.root) / name
        for path in _folders(folder):
            try:
                changed = os.stat(path).st_mtime_ns
            except OSError:
                continue
            seen.update(f"{path}\0{changed}\0".encode(errors="surrogateescape"))
    return seen.hexdigest()[:16]


def _folders(folder: Path) -> Iterator[str]:
    yield str(folder)
    try:
        with os.scandir(folder) as items:
            yield from sorted(item.path for item in items if item.is_dir(follow_symlinks=False))
    except OSError:
        return


class Server(http.server.ThreadingHTTPServer):
    """Serves the page at ``/``, and at ``/stamp`` what :func:`stamp` says, to this machine alone.

    ``make`` is given the stamp and returns the page. Raise UsageError if the port can't be listened on.
    """

    daemon_threads = True

    def __init__(self, port: int, get_stamp: Callable[[], str], make: Callable[[str], bytes]) -> None:
        self._get_stamp, self._make = get_stamp, make
        self._lock = threading.Lock()
        self._page = "", b""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UsageError(f"--port {port}: {error.strerror}; --port 0 takes a free one") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_port}/"

    def answer(self, path: str, host: str) -> tuple[int, str, bytes]:
        """Return (status, type, body). A page elsewhere must not read this one through a name that leads here."""
        if host not in (f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"):
            return 403, "text/plain", b"not for other names\n"
        if path == "/stamp":
            return 200, "text/plain", self._get_stamp().encode()
        if path != "/":
            return 404, "text/plain", b"there is / alone\n"
        with self._lock:
            now = self._get_stamp()
            if self._page[0] != now:
                self._page = now, self._make(now)
            return 200, "text/html; charset=utf-8", self._page[1]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        try:
            status, kind, body = self.server.answer(self.path, self.headers.get("Host", ""))
        except Exception as error:  # whatever a report stumbles over: the next request may do better
            status, kind, body = 500, "text/plain", f"{error}\n".encode(errors="backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: the page asks every few seconds."""
