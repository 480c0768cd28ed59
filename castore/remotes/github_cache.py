"""The GitHub Actions cache as a remote: a client of its service, version 2, and the bundles that it holds.

The service is GitHub's own and may change. Nothing that it returns is believed: a key that it matched by its prefix, an
index that isn't the one that git names, an object that isn't what its id says are all misses, each with its reason.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import proxy_bypass
from xml.sax.saxutils import escape

import urllib3

from castore.errors import CorruptBundle, NotInActions, RemoteError, RemoteUnavailable, UploadRefused, printable
from castore.format import bundle
from castore.format.bundle import BundleLayout, Place, Record
from castore.format.ids import ObjectId

NAME = "GitHub's cache"
BLOCK = 16 << 20
"""Bytes of a block of a large upload: with ``_AT_ONCE`` of them in memory, far below what a save may take."""

_AT_ONCE = 4
_READERS = 8
_TRIES = 5
_LONGEST_PAUSE = 60.0
_MOST_ANSWER = 1 << 20
_MOST_ATTEMPTS = 5  # at one key: each failed upload leaves one reserved
_TIMEOUT = urllib3.Timeout(connect=10, read=60)
_SLOWEST = 60.0  # seconds for any answer, and beside that
_LEAST_SPEED = 50_000  # bytes a second
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_EXPIRED = frozenset({401, 403})
# a namespace: entries of another version are invisible, so what else a workflow caches can't be taken for a bundle
_VERSION = hashlib.sha256(b"castore bundle 1").hexdigest()


Read = Callable[[int, int], bytes]
Progress = Callable[[int, int], None]


class CacheService:
    """The cache service as one job sees it. Any number of threads may use it at once.

    Nothing that it raises or says has the job's token in it, or the signature of an address.
    """

    def __init__(self, url: str, token: str, mode: str = "", proxy: str = "") -> None:
        if not _is_address(url, "https") and not _is_address(url, "http", _LOCAL):
            raise NotInActions("ACTIONS_RESULTS_URL is not an https address: the token isn't sent there")
        if not token.isascii() or not token.isprintable() or " " in token:
            raise NotInActions("ACTIONS_RUNTIME_TOKEN is not a token: something changed it")
        self._url = urljoin(url, "/twirp/github.actions.results.api.v1.CacheService/")
        self._token = token
        self._mode = mode.strip().lower()
        self._pool = urllib3.PoolManager(maxsize=_READERS, retries=False)
        self._proxy = urllib3.ProxyManager(proxy, maxsize=_READERS, retries=False) if proxy else None
        self.uploaded = 0
        self.downloaded = 0
        self.requests = 0
        self._counting = threading.Lock()

    @classmethod
    def of_job(cls, environment: Mapping[str, str]) -> CacheService:
        """The service that a job's ``environment`` leads to. NotInActions."""
        if environment.get("GITHUB_ACTIONS") != "true":
            raise NotInActions(
                "this is no job of GitHub Actions, and its cache can't be had elsewhere. On other machines, name a "
                "folder in [remotes] of config.toml, or keep .castore/objects in the cache of your CI"
            )
        url, token = environment.get("ACTIONS_RESULTS_URL", ""), environment.get("ACTIONS_RUNTIME_TOKEN", "")
        if not url or not token:
            raise NotInActions(
                "this step has no access to the cache: GitHub gives it to actions alone, not to `run:` steps. Write "
                "`uses: OWNER/castore@v1` with `mode: restore` or `mode: save`"
            )
        proxy = environment.get("https_proxy") or environment.get("HTTPS_PROXY") or ""
        return cls(url, token, environment.get("ACTIONS_CACHE_MODE", ""), proxy)

    @property
    def unreadable(self) -> str:
        """Why this job may not read the cache; empty if it may."""
        return f"ACTIONS_CACHE_MODE = {self._mode}" if self._mode in ("write-only", "none") else ""

    @property
    def unwritable(self) -> str:
        """Why this job may not write to the cache; empty if it may."""
        return f"ACTIONS_CACHE_MODE = {self._mode}" if self._mode in ("read", "none") else ""

    # -- entries -----------------------------------------------------------------------------------------------------

    def look_up(self, key: str) -> str | None:
        """A signed address of the entry with exactly this key; None when there is none. RemoteUnavailable."""
        status, answer = self._call("GetCacheEntryDownloadURL", key=key, restore_keys=[], version=_VERSION)
        if status != 200:
            raise self._unavailable(status, answer)
        # a key is taken for a prefix, too: another entry may be what was found
        if answer.get("ok") is not True or answer.get("matched_key") != key:
            return None
        return self._signed(answer.get("signed_download_url"))

    def reserve(self, key: str) -> str | None:
        """A signed address to upload to; None when the key is taken. UploadRefused, RemoteUnavailable."""
        status, answer = self._call("CreateCacheEntry", key=key, version=_VERSION)
        if status == 409:
            return None
        self._demand(status, answer)
        return self._signed(answer.get("signed_upload_url"))

    def finish(self, key: str, size: int) -> None:
        """Make what was uploaded visible. UploadRefused, RemoteUnavailable."""
        self._demand(*self._call("FinalizeCacheEntryUpload", key=key, size_bytes=str(size), version=_VERSION))

    def read(self, url: str, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of what a signed address leads to; None when the signature has run out.

        CorruptBundle when there are no such bytes; RemoteUnavailable.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        status, data = self._send("GET", url, headers=headers, limit=stop - start)
        if status in _EXPIRED:
            return None
        if status == 404:
            raise CorruptBundle("its bytes are gone: evicted since it was found")
        if status != 206 or len(data) != stop - start:
            raise CorruptBundle("it is shorter than git says, or the cache returned something else")
        with self._counting:
            self.downloaded += len(data)
        return data

    def send(self, url: str, size: int, read: Read, progress: Progress) -> bool:
        """Upload ``size`` bytes, of which ``read`` gives any range. False when the signature runs out on the way.

        RemoteUnavailable.
        """
        done = 0

        def put(target: str, data: bytes, headers: Mapping[str, str]) -> bool:
            nonlocal done
            status, _ = self._send("PUT", target, body=data, headers=headers, limit=_MOST_ANSWER)
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
        names = [base64.b64encode(f"{number:08}".encode()).decode() for number in range(len(starts))]

        def send_block(number: int) -> bool:
            start = starts[number]
            block = read(start, min(size, start + BLOCK))
            return put(f"{url}&comp=block&blockid={quote(names[number], safe='')}", block, {})

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="castore-upload") as pool:
            if not all(_drain(pool, [pool.submit(send_block, number) for number in range(len(starts))])):
                return False
        blocks = "".join(f"<Latest>{escape(name)}</Latest>" for name in names)
        listing = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{blocks}</BlockList>'.encode()
        return put(f"{url}&comp=blocklist", listing, {"Content-Type": "application/xml"})

    # -- requests ----------------------------------------------------------------------------------------------------

    def _pool_for(self, url: str) -> urllib3.PoolManager:
        host = urlsplit(url).hostname or ""
        return self._pool if self._proxy is None or host in _LOCAL or proxy_bypass(host) else self._proxy

    def _call(self, method: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        """(status, answer) of a method of the service."""
        status, data = self._send(
            "POST",
            self._url + method,
            body=json.dumps(fields).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
            limit=_MOST_ANSWER,
        )
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            answer = None
        if status == 200 and not isinstance(answer, dict):
            raise RemoteUnavailable(NAME, "the service's answer is not JSON of the kind that was expected")
        return status, answer if isinstance(answer, dict) else {}

    def _demand(self, status: int, answer: Mapping[str, Any]) -> None:
        """UploadRefused when the service says no, RemoteUnavailable when it says nothing of use."""
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
        """What the service says, fit to be shown: an answer may repeat the request."""
        return printable(_SIGNATURE.sub("***", text.replace(self._token, "***")))[:200] if isinstance(text, str) else ""

    def _signed(self, url: object) -> str:
        if not isinstance(url, str) or not any(_is_address(url, one) for one in ("https", urlsplit(self._url).scheme)):
            raise RemoteUnavailable(NAME, "the service gave no address that could be used")
        return url if "?" in url else f"{url}?"

    def _send(
        self, method: str, url: str, *, headers: Mapping[str, str], limit: int, body: bytes | None = None
    ) -> tuple[int, bytes]:
        """(status, body), which is cut beyond ``limit``. What may pass is tried again, ``_TRIES`` times in all."""
        reason = ""
        for attempt in range(_TRIES):
            pause = random.uniform(0.25, 0.5) * 2**attempt  # many jobs are not to come back at once
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
                data = _body(response, limit)
                if response.status not in _AGAIN:
                    return response.status, data
                reason = f"HTTP {response.status}"
                pause = max(pause, _seconds(response.headers.get("Retry-After")))
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                reason = type(error).__name__  # its text has the address in it, with the signature
            if attempt + 1 < _TRIES:
                time.sleep(min(pause, _LONGEST_PAUSE))
        raise RemoteUnavailable(NAME, f"no answer of use after {_TRIES} tries: {reason}")


_LOCAL = ("127.0.0.1", "localhost", "::1")
_SIGNATURE = re.compile(r"(?i)\b(sig|signature|se|sp|sv|skoid|sktid)=[^&\s\"']*")


def _is_address(url: str, scheme: str, hosts: Collection[str] = ()) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == scheme and bool(parts.hostname) and (not hosts or parts.hostname in hosts)
    except ValueError:
        return False


def _body(response: urllib3.BaseHTTPResponse, limit: int) -> bytes:
    """What was answered, up to one byte beyond ``limit``; TimeoutError when it comes so slowly that it never ends."""
    deadline = time.monotonic() + _SLOWEST + limit / _LEAST_SPEED
    data = bytearray()
    while len(data) <= limit and (more := response.read1(limit + 1 - len(data), decode_content=False)):
        data += more
        if time.monotonic() > deadline:
            response.close()
            raise TimeoutError("too slow")
    if len(data) > limit:
        response.close()  # there may be no end to it
    return bytes(data)


def _drain(pool: ThreadPoolExecutor, futures: Sequence[Any]) -> Iterator[Any]:
    """The results in order; what has not begun is dropped when one fails, so that an error or Ctrl-C ends it soon."""
    try:
        for future in futures:
            yield future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:  # a date: the usual pause will do
        return 0.0


# -- the remote ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Opened:
    """A bundle that is there: a signed address, and where its objects lie."""

    key: str
    url: str
    places: Mapping[ObjectId, Place]


class GitHubCache:
    """The objects in the bundles that git's ``records`` name. Each bundle is looked up once, when it is needed."""

    name = NAME

    def __init__(self, service: CacheService, records: Sequence[Record]) -> None:
        self.service = service
        self.records = tuple(records)
        self._found: dict[ObjectId, _Opened | str] = {}  # or why it can't be had
        self._bad: dict[ObjectId, str] = {}
        self.down = service.unreadable  # why nothing can be read, whatever there is
        self._opening = threading.Lock()

    def get(self, wanted: ObjectId) -> bytes | None:
        """The frame. None when no bundle has it; RemoteUnavailable."""
        if wanted in self._bad or not self.has([wanted]):
            return None
        reason = ""
        for own, opened in self._holding(wanted):
            try:
                return self._read(own, opened, opened.places[wanted])
            except CorruptBundle as error:
                reason = f"bundle {own[:12]}: {error}"
            except RemoteUnavailable as error:
                self.down = error.reason  # asking for the next object would take as long
                raise
        self._bad[wanted] = reason
        return None

    def has(self, wanted: Iterable[ObjectId]) -> set[ObjectId]:
        """Those that the bundles' verified indexes list; whether their bytes are good, only reading tells."""
        wanted = set(wanted) - self._bad.keys()
        self._open(own for one in wanted for own in self.bundles_of(one))
        if any(not self._holding(one) and not self.bundles_of(one) for one in wanted):
            # a chunk of which no record speaks: any bundle may have it
            self._open(record.bundle for record in self.records)
        return {one for one in wanted if self._holding(one)} if not self.down else set()

    def explain_missing(self, wanted: ObjectId) -> str:
        """Why there is no such object, in words."""
        if wanted in self._bad:
            return self._bad[wanted]
        bundles = self.bundles_of(wanted)
        if self.down or not bundles:
            return self.down or "no bundle has it"
        told = (f"bundle {own[:12]}: {found}" for own in bundles if isinstance(found := self._found.get(own), str))
        return "; ".join(told) or "no bundle has it"

    def mark_corrupt(self, wanted: ObjectId, reason: str) -> None:
        """What was read under this id is not what it should be."""
        self._bad[wanted] = f"its copy is bad: {reason}"

    def bundles_of(self, index: ObjectId) -> list[ObjectId]:
        """The bundles that the records name for the part with this index, newest record first."""
        named = (own for record in self.records for own in record.parts.get(index, ()))
        return list(dict.fromkeys(named))

    def holds(self, own: ObjectId) -> Mapping[ObjectId, int]:
        """The stored size of each object of a bundle; nothing when it can't be had."""
        self._open([own])
        found = self._found.get(own)
        return {one: place.length for one, place in found.places.items()} if isinstance(found, _Opened) else {}

    def missing(self) -> set[ObjectId]:
        """The bundles that were looked for and are not there."""
        return {own for own, found in self._found.items() if isinstance(found, str)} if not self.down else set()

    def upload(self, layout: BundleLayout, read: Read, progress: Progress) -> str:
        """Upload a bundle, of which ``read`` gives any range, and return the key under which a look-up found it then.

        When it is there already nothing is sent. A key that a failed upload left reserved, or under which something
        else stands, is passed over. UploadRefused, RemoteUnavailable.
        """
        for attempt in range(_MOST_ATTEMPTS):
            key = f"castore-{layout.id}{f'-{secrets.token_hex(4)}' if attempt else ''}"
            url = self.service.reserve(key)
            if url is None:
                if self._confirm(layout, key) is None:
                    return key
            elif self.service.send(url, layout.size, read, progress):
                refusal: RemoteError | None = None
                try:
                    self.service.finish(key, layout.size)
                except RemoteError as error:
                    refusal = error  # it may be the answer alone that was lost
                problem = self._confirm(layout, key, patient=refusal is None)
                if problem is None:
                    return key
                raise refusal or UploadRefused(NAME, f"it was accepted, but a look-up says: {problem}")
        raise UploadRefused(NAME, f"{_MOST_ATTEMPTS} uploads of the same bytes were not taken: no signature held")

    def _confirm(self, layout: BundleLayout, key: str, *, patient: bool = False) -> str | None:
        """What is wrong with the bundle under a key; None when it is the one."""
        record = Record(bundle=layout.id, key=key, created="", bytes=layout.size, objects=len(layout.places), parts={})
        problem = None
        for pause in (0.0, 1.0, 2.0) if patient else (0.0,):
            time.sleep(pause)
            try:
                self._look_up(record)
                return None
            except CorruptBundle as error:
                problem = str(error)
        return problem

    def _open(self, bundles: Iterable[ObjectId]) -> None:
        with self._opening:
            new = [own for own in dict.fromkeys(bundles) if own not in self._found]
            if not new or self.down:
                return
            with ThreadPoolExecutor(min(_READERS, len(new)), thread_name_prefix="castore-lookup") as pool:
                found = list(_drain(pool, [pool.submit(self._find, own) for own in new]))
            self._found.update(zip(new, found, strict=True))

    def _find(self, own: ObjectId) -> _Opened | str:
        reason = "git has no record of it"
        for record in self.records:
            if record.bundle == own and not self.down:
                try:
                    return self._look_up(record)
                except CorruptBundle as error:
                    reason = str(error)
                except RemoteUnavailable as error:
                    self.down = error.reason  # asking for the next one would take as long
        return self.down or reason

    def _look_up(self, record: Record) -> _Opened:
        """CorruptBundle when it is not there or is not what git says."""
        start = record.bytes - bundle.tail_bytes(record.objects)
        for _ in range(2):
            url = self.service.look_up(record.key)
            if url is None:
                raise CorruptBundle("not in the cache: evicted, or saved where this job can't see it")
            tail = self.service.read(url, start, record.bytes)
            if tail is not None:
                return _Opened(record.key, url, bundle.read_tail(record.bundle, tail, record.bytes))
        raise CorruptBundle("the cache gives addresses that it then refuses")

    def _read(self, own: ObjectId, opened: _Opened, place: Place) -> bytes:
        data = self.service.read(opened.url, place.offset, place.offset + place.length)
        if data is None:
            url = self.service.look_up(opened.key)
            data = self.service.read(url, place.offset, place.offset + place.length) if url else None
            if url is None or data is None:
                raise CorruptBundle("evicted while it was read")
            self._found[own] = _Opened(opened.key, url, opened.places)
        return data

    def _holding(self, wanted: ObjectId) -> Collection[tuple[ObjectId, _Opened]]:
        return [
            (own, found)
            for own, found in list(self._found.items())
            if isinstance(found, _Opened) and wanted in found.places
        ]
