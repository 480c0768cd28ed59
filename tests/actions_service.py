"""A local stand-in for the GitHub Actions cache service, version 2, that refuses whatever the real one refuses.

    with Service() as service:
        subprocess.run([...], env=os.environ | service.environment(ref="refs/heads/main"))

One HTTP server on the loopback interface plays both parts. The cache service proper answers three Twirp calls
(JSON over POST), which reserve an entry, make it visible, and look one up; they hand out signed URLs. The bytes go
to and come from those URLs, where a blob store answers as Azure does. Bytes are held in memory.

A client that follows the protocol by halves fails here. A test can also make the service misbehave (``fault``),
change what it stores (``evict``, ``replace``, ``swap``, ``truncate``), and read what was asked of it (``log``).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import itertools
import json
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, socket
from socketserver import TCPServer
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit
from xml.etree import ElementTree

TWIRP = "/twirp/github.actions.results.api.v1.CacheService/"
CONTAINER = "/actions-cache/"
PIECE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request, read to its end. Names of headers are in lower case; ``path`` is without the query."""

    verb: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def method(self) -> str:
        """What faults and the log call it: the name of the Twirp call, or the verb when it is for a blob."""
        return self.path.removeprefix(TWIRP) if self.path.startswith(TWIRP) else self.verb


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer. After ``after`` bytes of the body, or before anything if that is 0, ``wait`` seconds pass.

    A body given as bytes gets a Content-Length unless ``headers`` has one; the connection is closed after a reply
    that promises more than it has. ``status`` 0 closes it without an answer.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Iterable[bytes] = b""
    wait: float = 0
    after: int = 0


@dataclass(slots=True)
class Logged:
    """One request and what became of it. Sizes are of bodies; ``path`` has neither signature nor expiry."""

    kind: str  # twirp or blob
    method: str
    path: str
    range: str  # of bytes asked for, or empty
    status: int
    request_bytes: int
    response_bytes: int = 0


# -- misbehaviour ---------------------------------------------------------------------------------------------------

Handle = Callable[[Request], Reply]
Action = Callable[[Request, Handle], Reply]


@dataclass(slots=True)
class Fault:
    """The next ``times`` requests with this ``method``, for which ``when`` holds, meet ``action``."""

    method: str
    action: Action
    times: int = 1
    when: Callable[[Request], bool] = lambda _: True


def answer(status: int, headers: Mapping[str, str] | None = None, body: bytes | None = None) -> Action:
    """Answer this, and do nothing of what was asked."""
    error = json.dumps({"code": "unavailable", "msg": f"a fault of the test: {status}"}).encode()
    return lambda _request, _handle: Reply(status, headers or {}, error if body is None else body)


def redirect(url: str) -> Action:
    """Send the client elsewhere."""
    return answer(302, {"Location": url}, b"")


def lost() -> Action:
    """Do what was asked, then close the connection without an answer."""
    return lambda request, handle: replace(handle(request), status=0)


def cut(after: int) -> Action:
    """Do what was asked, promise the whole answer, and close the connection after so many bytes of it."""

    def action(request: Request, handle: Handle) -> Reply:
        reply = handle(request)
        body = b"".join(_pieces(reply.body))
        return replace(reply, headers={"Content-Length": str(len(body)), **reply.headers}, body=body[:after])

    return action


def hang(seconds: float, after: int = 0) -> Action:
    """Do what was asked, but answer late: pause after so many bytes of the answer, or before it begins."""
    return lambda request, handle: replace(handle(request), wait=seconds, after=after)


def corrupt(at: int = -1) -> Action:
    """Answer with one bit of the byte at ``at`` wrong."""

    def action(request: Request, handle: Handle) -> Reply:
        reply = handle(request)
        body = bytearray(b"".join(_pieces(reply.body)))
        body[at] ^= 1
        return replace(reply, body=bytes(body))

    return action


def whole() -> Action:
    """Answer as if no range had been asked for."""

    def action(request: Request, handle: Handle) -> Reply:
        headers = {name: value for name, value in request.headers.items() if name not in ("range", "x-ms-range")}
        return handle(replace(request, headers=headers))

    return action


def endless() -> Action:
    """Answer as asked, but with a body of no given length that never ends."""

    def action(request: Request, handle: Handle) -> Reply:
        reply = handle(request)
        headers = {name: value for name, value in reply.headers.items() if name != "Content-Length"}
        return replace(reply, headers=headers | {"Connection": "close"}, body=itertools.repeat(bytes(PIECE)))

    return action


# -- blobs ----------------------------------------------------------------------------------------------------------


class BlobStore(Protocol):
    """Where the bytes of entries are: what clients reach by signed URLs, and the service behind their back."""

    def url(self, name: str, permissions: str, lifetime: float) -> str:
        """A URL, perhaps relative to the service's, that permits ``r`` or ``cw`` on a blob for some seconds."""

    def size(self, name: str) -> int | None:
        """The number of bytes, or None if there is no such blob."""

    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def delete(self, name: str) -> None: ...


class AzureError(Exception):
    """A refusal in the form of Azure's."""

    def __init__(self, status: int, code: str, message: str = "", **headers: str) -> None:
        super().__init__(status, code, message)
        body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.reply = Reply(status, {"Content-Type": "application/xml", "x-ms-error-code": code} | names, body.encode())


@dataclass(slots=True)
class Blob:
    """What is stored under a name. There is no blob to read before something was committed."""

    data: bytes | None = None
    staged: dict[str, bytes] = field(default_factory=dict)  # blocks that no list has named yet
    committed: dict[str, slice] = field(default_factory=dict)  # where the blocks of the last list are in ``data``
    etag: str = ""
    modified: str = ""

    def commit(self, data: bytes, committed: dict[str, slice] | None = None) -> None:
        self.data, self.staged, self.committed = data, {}, committed or {}
        self.etag, self.modified = f'"0x{secrets.token_hex(8).upper()}"', formatdate(usegmt=True)


class Blobs:
    """Block blobs in memory behind signed URLs. Of the ways to name a block in a list it knows Latest only."""

    max_blocks = 50_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blobs: dict[str, Blob] = {}
        self._secret = secrets.token_bytes(32)

    def url(self, name: str, permissions: str, lifetime: float) -> str:
        expiry = (datetime.now(UTC) + timedelta(seconds=lifetime)).isoformat().replace("+00:00", "Z")
        query = {"se": expiry, "sp": permissions, "sr": "b", "sig": self._sign(CONTAINER + name, permissions, expiry)}
        return f"{CONTAINER}{name}?{urlencode(query)}"

    def expire(self) -> None:
        """Make all URLs given out before invalid: with another secret their signatures are wrong."""
        self._secret = secrets.token_bytes(32)

    def size(self, name: str) -> int | None:
        data = self._blobs.get(name, Blob()).data
        return None if data is None else len(data)

    def read(self, name: str) -> bytes:
        return self._existing(name).data or b""

    def write(self, name: str, data: bytes) -> None:
        self._blobs.setdefault(name, Blob()).commit(data)

    def delete(self, name: str) -> None:
        self._blobs.pop(name, None)

    def handle(self, request: Request) -> Reply:
        try:
            name = self._permitted(request)
            # one request at a time, as committing a list and staging the blocks that it names exclude each other
            with self._lock:
                reply = self._put(name, request) if request.verb == "PUT" else self._get(name, request)
        except AzureError as refusal:
            reply = refusal.reply
        ids = {"x-ms-request-id": secrets.token_hex(16), "x-ms-version": "2025-11-05"}
        return replace(reply, headers=ids | dict(reply.headers))

    def _sign(self, path: str, permissions: str, expiry: str) -> str:
        message = "\n".join([path, permissions, expiry]).encode()
        return base64.b64encode(hmac.digest(self._secret, message, hashlib.sha256)).decode()

    def _permitted(self, request: Request) -> str:
        """The name of the blob, if the query permits the request."""
        permissions, expiry, signature = (request.query.get(name, "") for name in ("sp", "se", "sig"))
        if not hmac.compare_digest(signature.encode(), self._sign(request.path, permissions, expiry).encode()):
            raise AzureError(403, "AuthenticationFailed", "Signature did not match.")
        if datetime.fromisoformat(expiry) <= datetime.now(UTC):
            raise AzureError(403, "AuthenticationFailed", "Signature not valid in the specified time frame.")
        needed = {"GET": "r", "HEAD": "r", "PUT": "w"}.get(request.verb)
        if needed is None:
            raise AzureError(405, "UnsupportedHttpVerb")
        if needed not in permissions:
            raise AzureError(403, "AuthorizationPermissionMismatch")
        return request.path.removeprefix(CONTAINER)

    def _existing(self, name: str) -> Blob:
        blob = self._blobs.get(name)
        if blob is None or blob.data is None:
            raise AzureError(404, "BlobNotFound")
        return blob

    def _get(self, name: str, request: Request) -> Reply:
        blob = self._existing(name)
        data = blob.data or b""
        headers = {
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "x-ms-blob-type": "BlockBlob",
            **_tag(blob),
        }
        if request.headers.get("if-match", blob.etag) not in (blob.etag, "*"):
            raise AzureError(412, "ConditionNotMet")
        if request.verb == "HEAD":
            return Reply(200, headers | {"Content-Length": str(len(data))})
        asked = request.headers.get("x-ms-range") or request.headers.get("range")
        if not asked:
            return Reply(200, headers, data)
        # Azure has neither ranges from the end nor several at once
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise AzureError(400, "InvalidHeaderValue", "Range")
        start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if start >= len(data):
            raise AzureError(416, "InvalidRange", Content_Range=f"bytes */{len(data)}")
        return Reply(206, headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1])

    def _put(self, name: str, request: Request) -> Reply:
        match request.query.get("comp"):
            case None:
                if request.headers.get("x-ms-blob-type") != "BlockBlob":
                    raise AzureError(400, "MissingRequiredHeader", "x-ms-blob-type")
                self.write(name, request.body)
                return Reply(201, _tag(self._blobs[name]))
            case "block":
                self._stage(name, request.query.get("blockid", ""), request.body)
                return Reply(201)
            case "blocklist":
                self._commit(name, request.body)
                return Reply(201, _tag(self._blobs[name]))
        raise AzureError(400, "InvalidQueryParameterValue", "comp")

    def _stage(self, name: str, block_id: str, data: bytes) -> None:
        blob = self._blobs.setdefault(name, Blob())
        length = _decoded_length(block_id)
        if not 0 < length <= 64 or any(_decoded_length(other) != length for other in blob.staged):
            raise AzureError(400, "InvalidBlobOrBlock", "ids are base64, of up to 64 bytes, all of the same length")
        if len(blob.staged) >= self.max_blocks and block_id not in blob.staged:
            raise AzureError(409, "BlockCountExceedsLimit")
        blob.staged[block_id] = data

    def _commit(self, name: str, document: bytes) -> None:
        blob = self._blobs.setdefault(name, Blob())
        try:
            root = ElementTree.fromstring(document)
        except ElementTree.ParseError:
            raise AzureError(400, "InvalidXmlDocument") from None
        if root.tag != "BlockList" or any(child.tag != "Latest" for child in root):
            raise AzureError(400, "InvalidXmlNodeValue")
        ids = [(child.text or "").strip() for child in root]
        if len(ids) > self.max_blocks:
            raise AzureError(400, "BlockListTooLong")
        pieces, committed, size = [], {}, 0
        for block_id in ids:
            piece = blob.staged.get(block_id)
            # a list sent again, as the answer to the first was lost, finds its blocks in the blob
            if piece is None and blob.data is not None and block_id in blob.committed:
                piece = blob.data[blob.committed[block_id]]
            if piece is None:
                raise AzureError(400, "InvalidBlockList")
            pieces.append(piece)
            committed[block_id] = slice(size, size + len(piece))
            size += len(piece)
        blob.commit(b"".join(pieces), committed)


def _tag(blob: Blob) -> dict[str, str]:
    return {"ETag": blob.etag, "Last-Modified": blob.modified}


def _decoded_length(block_id: str) -> int:
    """The number of bytes behind base64, or 0 if it isn't that."""
    try:
        return len(base64.b64decode(block_id, validate=True))
    except (binascii.Error, ValueError):
        return 0


# -- entries --------------------------------------------------------------------------------------------------------

STATUS = {
    "malformed": 400,
    "invalid_argument": 400,
    "unauthenticated": 401,
    "permission_denied": 403,
    "bad_route": 404,
    "not_found": 404,
    "already_exists": 409,
    "resource_exhausted": 429,
}


class TwirpError(Exception):
    """A refusal in the form of Twirp's."""

    def __init__(self, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(code, message)
        self.reply = _json(STATUS[code], {"code": code, "msg": message}, headers)


@dataclass(frozen=True, slots=True)
class Job:
    """What a token stands for: a job on a ref, and what it may do."""

    ref: str
    read: bool
    write: bool


@dataclass(slots=True)
class Entry:
    """An entry: reserved, and invisible, while ``size`` is None."""

    scope: str
    key: str
    version: str
    id: int
    blob: str
    size: int | None = None


class Cache:
    """Entries, and the three calls that make and find them."""

    def __init__(self, *, blobs: BlobStore | None = None, default_branch: str = "refs/heads/main") -> None:
        self.blobs: BlobStore = Blobs() if blobs is None else blobs
        self.default_branch = default_branch
        self.url_lifetime: float = 600  # seconds; may be negative, so that URLs have expired when given out
        self.url = ""
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._entries: list[Entry] = []
        self._uploads: deque[float] = deque()
        self._numbers = itertools.count(1)
        self.limit_uploads(200)

    # what tests use

    def token(self, ref: str | None = None, read: bool = True, write: bool = True) -> str:
        """A token for a job on ``ref``, by default the default branch."""
        token = secrets.token_urlsafe(24)
        self._jobs[token] = Job(ref or self.default_branch, read, write)
        return token

    def limit_uploads(self, count: int, seconds: float = 60) -> None:
        """Answer 429 to whoever reserves more entries than ``count`` within so many seconds."""
        self._limit = (count, seconds)

    def expire_urls(self) -> None:
        """Make all URLs given out before invalid. Only for the stand-in's own blobs."""
        assert isinstance(self.blobs, Blobs)
        self.blobs.expire()

    def entries(self) -> list[Entry]:
        """All entries, oldest first; those that are only reserved have no size."""
        with self._lock:
            return [replace(entry) for entry in self._entries]

    def blob(self, key: str, ref: str | None = None) -> bytes:
        """The bytes of an entry; as in all that follow, the newest one with ``key``, in the scope ``ref`` if given."""
        return self.blobs.read(self._named(key, ref).blob)

    def replace(self, key: str, data: bytes, ref: str | None = None) -> None:
        """Give an entry other bytes."""
        self.blobs.write(self._named(key, ref).blob, data)

    def truncate(self, key: str, size: int, ref: str | None = None) -> None:
        self.replace(key, self.blob(key, ref)[:size], ref)

    def swap(self, key: str, other: str) -> None:
        """Exchange the bytes of two entries."""
        with self._lock:
            first, second = self._named(key), self._named(other)
            first.blob, second.blob = second.blob, first.blob

    def evict(self, key: str, ref: str | None = None) -> None:
        """Remove an entry and its bytes, as the service does with those unused for long."""
        with self._lock:
            entry = self._named(key, ref)
            self._entries.remove(entry)
            self.blobs.delete(entry.blob)

    def lose(self, key: str, ref: str | None = None) -> None:
        """Remove the bytes of an entry, which can still be looked up."""
        self.blobs.delete(self._named(key, ref).blob)

    def _named(self, key: str, ref: str | None = None) -> Entry:
        with self._lock:
            for entry in reversed(self._entries):
                if entry.key == key and ref in (None, entry.scope):
                    return entry
        raise KeyError(key)

    # what clients use

    def handle(self, request: Request) -> Reply:
        """Answer a call, or refuse it."""
        calls = {
            "CreateCacheEntry": self._create,
            "FinalizeCacheEntryUpload": self._finalize,
            "GetCacheEntryDownloadURL": self._look_up,
        }
        try:
            job = self._job(request)
            call = calls.get(request.method)
            kind = request.headers.get("content-type", "").partition(";")[0].strip()
            if request.verb != "POST" or call is None or kind != "application/json":
                raise TwirpError("bad_route", f"no handler for {request.verb} {request.path} with {kind!r}")
            with self._lock:
                return _json(200, call(job, _fields(request.body)))
        except TwirpError as refusal:
            return refusal.reply

    def _job(self, request: Request) -> Job:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        job = self._jobs.get(token)
        if scheme != "Bearer" or job is None:
            raise TwirpError("unauthenticated", "invalid token")
        return job

    def _create(self, job: Job, fields: dict[str, Any]) -> dict[str, Any]:
        key, version = _take(fields, _key, "key"), _take(fields, _version, "version")
        _nothing_else(fields)
        if not job.write:
            return {"ok": False, "signed_upload_url": "", "message": _denied("write", job)}
        self._count_upload()
        if self._own(job, key, version):
            raise TwirpError("already_exists", "cache entry with the same key, version, and scope already exists")
        entry = Entry(job.ref, key, version, next(self._numbers), secrets.token_hex(16))
        self._entries.append(entry)
        return {"ok": True, "signed_upload_url": self._signed(entry, "cw"), "message": ""}

    def _finalize(self, job: Job, fields: dict[str, Any]) -> dict[str, Any]:
        key, version = _take(fields, _key, "key"), _take(fields, _version, "version")
        # the official client leaves a size of 0 out, as it does with all that has the default value of its type
        size = _take(fields, _size, "size_bytes") if "size_bytes" in fields else 0
        _nothing_else(fields)
        if not job.write:
            return {"ok": False, "entry_id": "0", "message": _denied("write", job)}
        entry = self._own(job, key, version)
        if entry is None or entry.size is not None:
            raise TwirpError("not_found", "no such entry is reserved")
        uploaded = self.blobs.size(entry.blob)
        if uploaded != size:
            return {"ok": False, "entry_id": "0", "message": f"{size} bytes announced, {uploaded} uploaded"}
        entry.size = size
        return {"ok": True, "entry_id": str(entry.id), "message": ""}

    def _look_up(self, job: Job, fields: dict[str, Any]) -> dict[str, Any]:
        key, version = _take(fields, _key, "key"), _take(fields, _version, "version")
        keys = [key, *_take(fields, _keys, "restore_keys")] if "restore_keys" in fields else [key]
        _nothing_else(fields)
        if len(keys) > 10:
            raise TwirpError("invalid_argument", "more than 10 keys")
        if not job.read:
            raise TwirpError("permission_denied", _denied("read", job))
        for entry in self._matches(job, keys, version):
            return {"ok": True, "signed_download_url": self._signed(entry, "r"), "matched_key": entry.key}
        return {"ok": False, "signed_download_url": "", "matched_key": ""}

    def _matches(self, job: Job, keys: Sequence[str], version: str) -> Iterator[Entry]:
        """Entries that the job may read, best first: by scope, then key, the exact one before the newest longer one."""
        for scope in dict.fromkeys([job.ref, self.default_branch]):
            visible = [
                entry
                for entry in reversed(self._entries)
                if entry.scope == scope and entry.version == version and entry.size is not None
            ]
            for key in keys:
                yield from (entry for entry in visible if entry.key == key)
                yield from (entry for entry in visible if entry.key.startswith(key))

    def _own(self, job: Job, key: str, version: str) -> Entry | None:
        """The entry, reserved or visible, that the job itself would write."""
        for entry in self._entries:
            if (entry.scope, entry.key, entry.version) == (job.ref, key, version):
                return entry
        return None

    def _signed(self, entry: Entry, permissions: str) -> str:
        return urljoin(self.url, self.blobs.url(entry.blob, permissions, self.url_lifetime))

    def _count_upload(self) -> None:
        count, seconds = self._limit
        now = time.monotonic()
        while self._uploads and self._uploads[0] <= now - seconds:
            self._uploads.popleft()
        if len(self._uploads) >= count:
            left = self._uploads[0] + seconds - now if self._uploads else seconds
            raise TwirpError("resource_exhausted", "rate limit exceeded", {"Retry-After": str(max(1, round(left)))})
        self._uploads.append(now)


def _json(status: int, value: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, {"Content-Type": "application/json"} | dict(headers or {}), json.dumps(value).encode())


def _denied(what: str, job: Job) -> str:
    return f"cache {what} denied: the token of a job on {job.ref} does not permit it"


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise TwirpError("malformed", "the json request could not be decoded")
    fields.pop("metadata", None)  # an old field, which clients may send
    return fields


def _take(fields: dict[str, Any], check: Callable[[Any], Any], name: str) -> Any:
    """The value of a field, which is gone from ``fields`` then."""
    try:
        return check(fields.pop(name))
    except (KeyError, TypeError, ValueError):
        raise TwirpError("invalid_argument", f"{name} is missing or invalid") from None


def _nothing_else(fields: dict[str, Any]) -> None:
    if fields:
        raise TwirpError("malformed", f"unknown fields {sorted(fields)}")


def _matching(pattern: str, value: Any) -> str:
    if re.fullmatch(pattern, value, re.DOTALL) is None:
        raise ValueError(value)
    return str(value)


def _key(value: Any) -> str:
    return _matching("[^,]{1,512}", value)


def _version(value: Any) -> str:
    return _matching("[0-9a-f]{64}", value)


def _size(value: Any) -> int:
    return int(_matching("[0-9]{1,19}", value))  # a string: JSON has no 64-bit integers


def _keys(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(value)
    return [_key(key) for key in value]


# -- HTTP -----------------------------------------------------------------------------------------------------------


class Service(Cache):
    """The whole service, reachable at ``url`` while the context lasts."""

    def __init__(self, *, blobs: BlobStore | None = None, default_branch: str = "refs/heads/main") -> None:
        super().__init__(blobs=blobs, default_branch=default_branch)
        self.faults: list[Fault] = []  # those still to come; the first that fits is used
        self.log: list[Logged] = []
        self.closing = threading.Event()

    def __enter__(self) -> Service:
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.disconnect()
        self._server.server_close()
        self._thread.join()

    def environment(self, ref: str | None = None, mode: str | None = None, token: str | None = None) -> dict[str, str]:
        """The variables of a job on ``ref`` with this cache mode: read, write, write-only, none, or not told which.

        The token permits what the mode says, and everything without one, unless another is given.
        """
        if token is None:
            token = self.token(ref, mode in (None, "read", "write"), mode in (None, "write", "write-only"))
        return {
            "ACTIONS_RUNTIME_TOKEN": token,
            "ACTIONS_RESULTS_URL": self.url,
            "ACTIONS_CACHE_SERVICE_V2": "True",
            "GITHUB_ACTIONS": "true",
            "GITHUB_REF": ref or self.default_branch,
        } | ({} if mode is None else {"ACTIONS_CACHE_MODE": mode})

    def fault(
        self, method: str, action: Action, times: int = 1, when: Callable[[Request], bool] = lambda _: True
    ) -> None:
        """Meet the next requests with a fault; ``method`` is a Twirp call, or GET, HEAD or PUT of a blob."""
        with self._lock:
            self.faults.append(Fault(method, action, times, when))

    @property
    def uploaded_bytes(self) -> int:
        """What clients sent to blobs."""
        return sum(logged.request_bytes for logged in self.log if logged.kind == "blob")

    @property
    def downloaded_bytes(self) -> int:
        """What clients were sent from blobs."""
        return sum(logged.response_bytes for logged in self.log if logged.kind == "blob")

    def count(self, method: str) -> int:
        """The number of requests so far with this method."""
        return sum(logged.method == method for logged in self.log)

    def serve(self, request: Request) -> tuple[Reply, Logged]:
        """The reply to a request, and its entry in the log."""
        is_blob = request.path.startswith(CONTAINER)
        handle = self.blobs.handle if is_blob and isinstance(self.blobs, Blobs) else self.handle
        fault = self._fault(request)
        reply = handle(request) if fault is None else fault.action(request, handle)
        query = urlencode({name: value for name, value in request.query.items() if name in ("comp", "blockid")})
        logged = Logged(
            "blob" if is_blob else "twirp",
            request.method,
            request.path + ("?" if query else "") + query,
            request.headers.get("x-ms-range") or request.headers.get("range", ""),
            reply.status,
            len(request.body),
        )
        self.log.append(logged)
        return reply, logged

    def _fault(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.method == request.method and fault.when(request):
                    fault.times -= 1
                    if fault.times <= 0:
                        self.faults.remove(fault)
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # all are over when the service is closed: nothing is left for the next test
    request_queue_size = 128

    def __init__(self, service: Service) -> None:
        self.service = service
        self.connections: set[socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would ask the network for a name
        self.server_name, self.server_port = "localhost", self.socket.getsockname()[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def disconnect(self) -> None:
        for connection in self.connections.copy():
            try:
                connection.shutdown(SHUT_RDWR)
            except OSError:
                pass  # it is closed already


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    server: _Server

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True  # the client is gone

    def serve(self) -> None:
        length = self.headers.get("Content-Length")
        if self.command in ("PUT", "POST") and length is None:
            self.close_connection = True
            self.respond(Reply(411, {"Connection": "close"}))
            return
        size = int(length or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            self.close_connection = True
            return
        # not self.path, in which two slashes at the start have become one
        target = urlsplit("http://localhost" + self.requestline.split()[1])
        query = dict(parse_qsl(target.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.respond(*self.server.service.serve(Request(self.command, target.path, query, headers, body)))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def respond(self, reply: Reply, logged: Logged | None = None) -> None:
        if reply.wait and not reply.after:
            self.server.service.closing.wait(reply.wait)
        if not reply.status:
            self.close_connection = True
            return
        headers = dict(reply.headers)
        if isinstance(reply.body, bytes):
            headers.setdefault("Content-Length", str(len(reply.body)))
        self.send_response(reply.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = 0
        for piece in _pieces(reply.body, reply.after):
            if logged is not None:
                logged.response_bytes += len(piece)  # first, so that a client that has the bytes finds them counted
            self.wfile.write(piece)
            sent += len(piece)
            if reply.wait and sent == reply.after:
                self.server.service.closing.wait(reply.wait)
        if str(sent) != headers.get("Content-Length"):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _pieces(body: bytes | Iterable[bytes], first: int = 0) -> Iterator[bytes]:
    """The body in pieces, the first of which has ``first`` bytes if that is not 0."""
    if not isinstance(body, bytes):
        yield from body
        return
    if first and body:
        yield body[:first]
    for start in range(first, len(body), PIECE):
        yield body[start : start + PIECE]
