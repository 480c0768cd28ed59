"""A client of the GitHub Actions cache service, version 2: entries are looked up, read in ranges, and uploaded.

The service is GitHub's own and may change, so none of its answers is trusted: one that makes no sense is an error, and
an entry whose key the service only matched by a prefix does not exist.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import proxy_bypass
from xml.sax.saxutils import escape

import urllib3

from castore.errors import CorruptBundle, NotInActions, RemoteUnavailable, UploadRefused, printable
from castore.parallel import map_ahead
from castore.progress import Progress

NAME = "GitHub's cache"
BLOCK = 16 << 20
"""Bytes of a block of a large upload: with ``_UPLOADERS`` of them in memory, far below what a save may take."""
CONNECTIONS = 8
"""How many requests may be under way at once without one of them losing its connection."""

_UPLOADERS = 4
_TRIES = 5
_MAX_PAUSE = 60.0
_MAX_ANSWER_BYTES = 1 << 20
_TIMEOUT = urllib3.Timeout(connect=10, read=60)
_ANSWER_SECONDS = 60.0  # for any answer, plus its size at the least speed
_MIN_SPEED = 50_000  # bytes a second
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_EXPIRED = frozenset({401, 403})
# a namespace: entries of another version are invisible, so what else a workflow caches can't be taken for a bundle
_VERSION = hashlib.sha256(b"castore bundle 1").hexdigest()
_ALLOW_HTTP = "CASTORE_ALLOW_HTTP_CACHE"
_LOCAL = ("127.0.0.1", "localhost", "::1")
_SIZE = re.compile(r"[0-9]{1,18}", re.ASCII)
_SIGNATURE = re.compile(r"(?i)\b(sig|signature|se|sp|sv|skoid|sktid)=[^&\s\"']*")

_logger = logging.getLogger(__name__)

ReadRange = Callable[[int, int], bytes]
"""Returns the bytes [start, stop) of what is uploaded."""


class _Answer(NamedTuple):
    """An answer to a request: its HTTP status, its body, or the beginning of it, and its headers."""

    status: int
    data: bytes
    headers: Mapping[str, str]


class CacheService:
    """The cache service as one job sees it. Any number of threads may use it at once.

    Neither the job's token nor the signature of an address appears in anything that it raises, returns or logs.
    """

    def __init__(self, url: str, token: str, mode: str = "", proxy: str = "", *, allow_http: bool = False) -> None:
        if not _is_address(url, "https") and not _is_address(url, "http", () if allow_http else _LOCAL):
            raise NotInActions(
                "ACTIONS_RESULTS_URL is not an https address: the token isn't sent there. For your own cache server "
                f"in a network that you trust, set {_ALLOW_HTTP}=1"
            )
        if allow_http and not _is_address(url, "https"):
            _logger.warning("%s: the job's token and all data go over plain http, as %s=1 allows", NAME, _ALLOW_HTTP)
        if not token.isascii() or not token.isprintable() or " " in token:
            raise NotInActions("ACTIONS_RUNTIME_TOKEN is not a token: something changed it")
        self._url = urljoin(url, "/twirp/github.actions.results.api.v1.CacheService/")
        self._token = token
        self._mode = mode.strip().lower()
        self._pool = urllib3.PoolManager(maxsize=CONNECTIONS, retries=False)
        self._proxy = urllib3.ProxyManager(proxy, maxsize=CONNECTIONS, retries=False) if proxy else None
        self.uploaded = 0
        self.downloaded = 0
        self.requests = 0
        self._counting = threading.Lock()

    @classmethod
    def of_job(cls, environment: Mapping[str, str]) -> CacheService:
        """Return the service that a job's ``environment`` variables describe. NotInActions."""
        if environment.get("GITHUB_ACTIONS") != "true":
            raise NotInActions(
                "this is no job of GitHub Actions, and its cache can't be reached from elsewhere. On other machines, "
                "name a folder in [remotes] of config.toml, or keep .castore/objects in the cache of your CI"
            )
        url, token = environment.get("ACTIONS_RESULTS_URL", ""), environment.get("ACTIONS_RUNTIME_TOKEN", "")
        if not url or not token:
            raise NotInActions(
                "this step has no access to the cache: GitHub gives it to actions alone, not to `run:` steps; "
                "`castore ci workflow` prints a workflow with its `mode: restore` and `mode: save`"
            )
        proxy = environment.get("https_proxy") or environment.get("HTTPS_PROXY") or ""
        mode, allow_http = environment.get("ACTIONS_CACHE_MODE", ""), environment.get(_ALLOW_HTTP) == "1"
        return cls(url, token, mode, proxy, allow_http=allow_http)

    @property
    def unreadable(self) -> str:
        """The reason this job may not read the cache; empty if it may."""
        return f"ACTIONS_CACHE_MODE = {self._mode}" if self._mode in ("write-only", "none") else ""

    @property
    def unwritable(self) -> str:
        """The reason this job may not write to the cache; empty if it may."""
        return f"ACTIONS_CACHE_MODE = {self._mode}" if self._mode in ("read", "none") else ""

    # -- entries -----------------------------------------------------------------------------------------------------

    def look_up(self, key: str) -> str | None:
        """Return a signed address of the entry with exactly this key, or None. RemoteUnavailable."""
        status, answer = self._call("GetCacheEntryDownloadURL", key=key, restore_keys=[], version=_VERSION)
        if status != 200:
            raise self._unavailable(status, answer)
        # the service also takes a key for a prefix, so the entry that it found may be another one
        if answer.get("ok") is not True or answer.get("matched_key") != key:
            return None
        return self._signed(answer.get("signed_download_url"))

    def reserve(self, key: str) -> str | None:
        """Return a signed address to upload to; None when the key is taken. UploadRefused, RemoteUnavailable."""
        status, answer = self._call("CreateCacheEntry", key=key, version=_VERSION)
        if status == 409 or (status == 200 and answer.get("ok") is False and not self._message(answer.get("message"))):
            return None  # without a reason it is one that an upload which failed has reserved
        self._require_ok(status, answer)
        return self._signed(answer.get("signed_upload_url"))

    def finish(self, key: str, size: int) -> None:
        """Make an upload visible. UploadRefused, RemoteUnavailable."""
        self._require_ok(*self._call("FinalizeCacheEntryUpload", key=key, size_bytes=str(size), version=_VERSION))

    def read(self, url: str, start: int, stop: int) -> bytes | None:
        """Return the bytes [start, stop) behind a signed address; None when its signature has expired.

        CorruptBundle when there are no such bytes; RemoteUnavailable.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        # a server may ignore the range, and answer 200 with everything from the first byte
        status, data, _ = self._send("GET", url, headers=headers, limit=stop - start, limit_of_whole=stop)
        if status == 200:
            status, data = 206, data[start:stop]
        if status in _EXPIRED:
            return None
        if status == 404:
            raise CorruptBundle("its bytes are gone: evicted after it was looked up")
        if status != 206 or len(data) != stop - start:
            raise CorruptBundle("it is shorter than git says, or the cache returned something else")
        with self._counting:
            self.downloaded += len(data)
        return data

    def size(self, url: str) -> int | None:
        """Return the number of bytes behind a signed address; None when its signature has expired.

        CorruptBundle when that can't be told; RemoteUnavailable.
        """
        answer = self._send("GET", url, headers={"Range": "bytes=0-0"}, limit=1)
        if answer.status in _EXPIRED:
            return None
        told = {
            206: answer.headers.get("Content-Range", "").rpartition("/")[2],
            200: answer.headers.get("Content-Length", ""),  # from a server that ignores the range
        }.get(answer.status, "")
        if not _SIZE.fullmatch(told):
            raise CorruptBundle(f"its size can't be told: HTTP {answer.status}")
        return int(told)

    def send(self, url: str, size: int, read: ReadRange, progress: Progress) -> bool:
        """Upload the ``size`` bytes that ``read`` returns ranges of; False when the signature expires meanwhile.

        RemoteUnavailable.
        """
        done = 0

        def put(target: str, data: bytes, headers: Mapping[str, str]) -> bool:
            nonlocal done
            status, _, _ = self._send("PUT", target, body=data, headers=headers, limit=_MAX_ANSWER_BYTES)
            if status in _EXPIRED:
                return False
            if status not in (200, 201):
                raise RemoteUnavailable(NAME, f"HTTP {status} to the upload")
            with self._counting:
                self.uploaded += len(data)
                done += len(data)
                progress(min(done, size), size)
            return True

        if size <= BLOCK:
            return put(url, read(0, size), {"x-ms-blob-type": "BlockBlob"})
        starts = range(0, size, BLOCK)
        # 48 bytes, all of one length, as the official client names them: some servers take no other names
        names = [base64.b64encode(f"{uuid.uuid4()}{number:012}".encode()).decode() for number in range(len(starts))]

        def send_block(number: int) -> bool:
            start = starts[number]
            block = read(start, min(size, start + BLOCK))
            return put(f"{url}&comp=block&blockid={quote(names[number], safe='')}", block, {})

        if not all(map_ahead(send_block, range(len(starts)), _UPLOADERS, name="castore-upload")):
            return False
        blocks = "".join(f"<Latest>{escape(name)}</Latest>" for name in names)
        listing = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{blocks}</BlockList>'.encode()
        return put(f"{url}&comp=blocklist", listing, {"Content-Type": "application/xml"})

    # -- requests ----------------------------------------------------------------------------------------------------

    def _pool_for(self, url: str) -> urllib3.PoolManager:
        host = urlsplit(url).hostname or ""
        return self._pool if self._proxy is None or host in _LOCAL or proxy_bypass(host) else self._proxy

    def _call(self, method: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        """Call a method of the service; return (HTTP status, answer)."""
        status, data, _ = self._send(
            "POST",
            self._url + method,
            body=json.dumps(fields).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
            limit=_MAX_ANSWER_BYTES,
        )
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if status == 200 and not isinstance(answer, dict):
            raise RemoteUnavailable(NAME, "the service's answer is not JSON of the expected kind")
        return status, answer if isinstance(answer, dict) else {}

    def _require_ok(self, status: int, answer: Mapping[str, Any]) -> None:
        """Raise UploadRefused when the service says no, RemoteUnavailable when its answer says nothing useful."""
        if status != 200:
            raise self._unavailable(status, answer)
        if answer.get("ok") is not True:
            raise UploadRefused(NAME, self._message(answer.get("message")) or "it gave no reason")

    def _unavailable(self, status: int, answer: Mapping[str, Any]) -> RemoteUnavailable:
        message = self._message(answer.get("msg"))
        if status == 401:
            message = message or "the job's token was not accepted"
        return RemoteUnavailable(NAME, f"HTTP {status}{f': {message}' if message else ''}")

    def _message(self, text: object) -> str:
        """Return the service's words without secrets: an answer may repeat the request."""
        return printable(_SIGNATURE.sub("***", text.replace(self._token, "***")))[:200] if isinstance(text, str) else ""

    def _signed(self, url: object) -> str:
        schemes = ("https", urlsplit(self._url).scheme)
        if not isinstance(url, str) or not any(_is_address(url, scheme) for scheme in schemes):
            raise RemoteUnavailable(NAME, "the service gave no usable address")
        return url if "?" in url else f"{url}?"

    def _send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        limit: int,
        limit_of_whole: int = 0,
        body: bytes | None = None,
    ) -> _Answer:
        """Return the answer, of whose body at most one byte beyond ``limit`` is read.

        If status 200 says that this is the whole, where a part was asked for, up to ``limit_of_whole`` is read.

        Transient failures are retried, ``_TRIES`` tries in all. RemoteUnavailable.
        """
        reason = ""
        for attempt in range(_TRIES):
            pause = random.uniform(0.25, 0.5) * 2**attempt  # random, or many jobs would all return at once
            try:
                with self._counting:
                    self.requests += 1
                response = self._pool_for(url).request(
                    method,
                    url,
                    body=body,
                    headers={**headers, "User-Agent": "castore", "Accept-Encoding": "identity"},
                    preload_content=False,
                    redirect=False,
                    retries=False,
                    timeout=_TIMEOUT,
                )
                data = _read_body(response, max(limit, limit_of_whole) if response.status == 200 else limit)
                if response.status not in _TRANSIENT:
                    return _Answer(response.status, data, response.headers)
                reason = f"HTTP {response.status}"
                pause = max(pause, _seconds(response.headers.get("Retry-After")))
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                reason = type(error).__name__  # its text contains the address, with the signature
            _logger.info("%s: try %d of %d of a %s request failed: %s", NAME, attempt + 1, _TRIES, method, reason)
            if attempt + 1 < _TRIES:
                time.sleep(min(pause, _MAX_PAUSE))
        raise RemoteUnavailable(NAME, f"no usable answer after {_TRIES} tries: {reason}")


def _is_address(url: str, scheme: str, hosts: Collection[str] = ()) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == scheme and bool(parts.hostname) and (not hosts or parts.hostname in hosts)
    except ValueError:
        return False


def _read_body(response: urllib3.BaseHTTPResponse, limit: int) -> bytes:
    """Return the body, cut one byte beyond ``limit``; TimeoutError when it comes too slowly."""
    deadline = time.monotonic() + _ANSWER_SECONDS + limit / _MIN_SPEED
    data = bytearray()
    while len(data) <= limit and (more := response.read1(limit + 1 - len(data), decode_content=False)):
        data += more
        if time.monotonic() > deadline:
            response.close()
            raise TimeoutError("too slow")
    if len(data) > limit:
        response.close()  # it may never end
    return bytes(data)


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:  # a date: the usual pause will do
        return 0.0
