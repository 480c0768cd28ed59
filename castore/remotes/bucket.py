"""Buckets (S3, Azure, GCS) and websites as remotes, through the package obstore, the extra ``castore[buckets]``.

Below the URL: ``objects/ab/<id>``, ``packs/`` (:mod:`castore.remotes.packs`) and ``manifests/``. Credentials come from
the environment or the provider's usual files alone, and no text of a provider's answer reaches a message or a log.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

from castore.errors import CorruptBundle, PackageMissing, RemoteUnavailable, UploadRefused
from castore.format.frame import MAX_STORED
from castore.format.ids import ObjectId
from castore.parallel import map_all
from castore.remotes.base import RemoteFile
from castore.remotes.packs import Packs

if TYPE_CHECKING:
    from obstore.store import ObjectStore

REQUESTS = 16
"""Small requests at once: each waits for the network."""

_LIST_ABOVE = 300  # ids: a page of a listing tells of a thousand, a request of one
_MAX_PACK = 256 << 20  # bytes that are read of a server without ranges
_BODY_TRIES = 3  # obstore repeats requests, and goes on in a body only where the server has ranges
_DOWN_SECONDS = 60.0  # an unreachable remote is not asked again at once: each try takes as long as its retries
_TIMEOUT = timedelta(seconds=120)
_RETRY: Any = {
    "max_retries": 7,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=8), "base": 2},
}
_SCHEMES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws/credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_WEB = ("https", "http")

_Result = TypeVar("_Result")


class _Connection:
    """What all that read and write a bucket share."""

    def __init__(self, store: ObjectStore | None) -> None:
        self.store = store
        self.opening = threading.Lock()
        self.creates = True  # until a server says that it can't put only what is absent
        self.down: tuple[float, str] = (0.0, "")


class Bucket:
    """A bucket, or a folder in one. Nothing is contacted, and obstore not imported, before it is first used.

    >>> Bucket.from_location("cloud", "s3://models/gpt", Path()).url
    's3://models/gpt'
    """

    writable = True

    def __init__(self, name: str, url: str, store: ObjectStore | None = None) -> None:
        self.name, self.url = name, url
        self._connection = _Connection(store)
        self._corrupt: dict[ObjectId, str] = {}
        self._corrupt_in_pack: dict[ObjectId, str] = {}
        self._seen: set[ObjectId] = set()  # that lie there by themselves: asked for once
        self._packs = Packs(self)

    @classmethod
    def from_location(cls, name: str, location: str, base: Path) -> Self:  # noqa: ARG003
        """Open a bucket by its URL. ValueError for one without a bucket, or with what is no part of an address."""
        try:
            url = urlsplit(location)
            host, credentials = url.hostname, url.username or url.password
        except ValueError:
            raise ValueError("it is not a URL") from None
        if credentials or url.query or url.fragment:
            # not repeated: it may hold a secret
            raise ValueError("a URL holds no credentials, ? or #: castore reads credentials from the environment alone")
        if not host:
            raise ValueError(f"{location} names no bucket: write {url.scheme}://BUCKET/FOLDER")
        return cls(name, location.rstrip("/"))

    # -- objects -----------------------------------------------------------------------------------------------------

    def get(self, object_id: ObjectId) -> bytes | None:
        """Return the frame, by itself or in a pack; None when there is none. RemoteUnavailable."""
        if object_id in self._corrupt:
            return None
        if not self._packs.holds(object_id):
            frame = self.read_file(_key(object_id), MAX_STORED)
            if frame is not None:
                return frame
            self._seen.discard(object_id)
            if not self._packs.find([object_id]):
                return None
        try:
            return self._packs.read(object_id)
        except CorruptBundle as error:
            self.mark_corrupt(object_id, str(error))
            return self.get(object_id)  # it may lie there by itself, too

    def has(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return those that are there. Few are asked for one by one; of many, names are listed first."""
        asked = set(object_ids) - self._corrupt.keys()
        rest = asked - self._seen - {object_id for object_id in asked if self._packs.holds(object_id)}
        if len(rest) > _LIST_ABOVE:
            rest -= self._list_some(rest)
        there = map_all(self._is_there, sorted(rest), REQUESTS, name="castore-ask") if rest else []
        self._seen.update(object_id for object_id, is_there in zip(sorted(rest), there, strict=True) if is_there)
        return (asked & self._seen) | self._packs.find(asked - self._seen)

    def fresh(self) -> Self:
        """Return the same bucket without what was found to be there, since others may have deleted it."""
        other = copy.copy(self)
        other._seen, other._packs = set(), self._packs.fresh(other)
        return other

    def may_have(self, object_ids: Iterable[ObjectId]) -> set[ObjectId]:
        """Return all that are not known to be corrupt there: only asking tells."""
        return set(object_ids) - self._corrupt.keys()

    def expect(self, object_ids: Iterable[ObjectId]) -> None:
        """Plan to read objects together that lie next to each other in a pack."""
        asked = set(object_ids) - self._seen
        self._packs.plan(asked if self._packs.find(asked) else ())

    def explain_missing(self, object_id: ObjectId) -> str:
        """Explain, for an error message, why this remote cannot supply the object."""
        if reason := self._corrupt.get(object_id) or self._corrupt_in_pack.get(object_id):
            mend = "; `castore push --repair` where a good copy is mends it" if self.writable else ""
            return f"bad copy in {self.name}, it is corrupt: {reason}{mend}"
        return self._reason_down() or "not there"

    def mark_corrupt(self, object_id: ObjectId, reason: str) -> None:
        """Mark this remote's copy as corrupt; treat it as absent for the rest of this process.

        An object in a pack may also lie there by itself, where a repair has put it: then that copy counts from now on.
        """
        if self._packs.forget(object_id, is_corrupt=True):
            self._corrupt_in_pack[object_id] = reason
        else:
            self._corrupt[object_id] = reason
        self._seen.discard(object_id)

    def put(self, object_id: ObjectId, frame: bytes, *, renew: bool = False) -> bool:
        """Publish a verified frame; return False if a copy was there already that isn't marked as corrupt."""
        is_new = self._create(_key(object_id), frame, replace=renew or object_id in self._corrupt)
        self._corrupt.pop(object_id, None)
        self._packs.forget(object_id)
        self._seen.add(object_id)
        return is_new

    def put_packed(self, frames: Sequence[tuple[ObjectId, bytes]], *, renew: bool = False) -> str:
        """Publish verified frames as one file, whose name is returned. UploadRefused.

        :meth:`finish_packs` makes them visible.
        """
        return self._packs.put(frames, renew=renew)

    def packed(self, object_ids: Iterable[ObjectId]) -> dict[ObjectId, str]:
        """Return those that are known to lie in packs, with the names of these."""
        return {object_id: name for object_id in object_ids if (name := self._packs.name_for(object_id))}

    def finish_packs(self, index_id: ObjectId, needed: Iterable[ObjectId]) -> None:
        """Name the packs in which the objects of a part lie, so that whoever reads the part finds them."""
        self._packs.finish(index_id, needed)

    def _is_there(self, object_id: ObjectId) -> bool:
        obstore = _load_obstore(self.name)
        return self._ask(lambda store: obstore.head(store, _key(object_id))) is not None

    def _list_some(self, object_ids: set[ObjectId]) -> set[ObjectId]:
        """Return those that a listing names, read for as long as that is cheaper than asking for each."""
        most = len(object_ids) // REQUESTS
        names = {_key(object_id): object_id for object_id in object_ids}
        found: set[ObjectId] = set()
        for number, file in enumerate(self.files("objects"), 1):
            if object_id := names.get(file.name):
                found.add(object_id)
            if len(found) == len(object_ids) or number >= 1000 * most:
                break
        else:
            # all was listed: what isn't named isn't there, but may be in a pack
            self._seen |= found
            return object_ids
        self._seen |= found
        return found

    # -- files -------------------------------------------------------------------------------------------------------

    def files(self, folder: str) -> Iterator[RemoteFile]:
        """Yield every file below a folder. RemoteUnavailable."""
        obstore = _load_obstore(self.name)
        listing: Any = self._ask(lambda store: obstore.list(store, f"{folder}/", chunk_size=1000))
        while page := self._ask(lambda _: next(listing, None)):
            for file in page:
                yield RemoteFile(file["path"], file["size"], file["last_modified"].timestamp())

    def read_file(self, name: str, limit: int) -> bytes | None:
        """Return what a file holds; None when there is none. RemoteUnavailable, also for more than ``limit`` bytes."""
        obstore = _load_obstore(self.name)

        def read(store: ObjectStore) -> bytes:
            got = obstore.get(store, name)
            if got.meta["size"] > limit:
                raise RemoteUnavailable(self.name, f"{name} holds {got.meta['size']} bytes, where {limit} make sense")
            data: bytes = got.bytes().to_bytes()
            return data

        return self._ask(read, tries=_BODY_TRIES)

    def read_range(self, name: str, start: int, stop: int) -> bytes | None:
        """Return bytes of a file, as far as it has them; None when there is no such file. RemoteUnavailable."""
        obstore = _load_obstore(self.name)

        def read(store: ObjectStore) -> bytes:
            try:
                data: bytes = obstore.get_range(store, name, start=start, end=stop).to_bytes()
            except obstore.exceptions.GenericError as error:
                if "status code: 416" in str(error):
                    return b""  # it ends before
                if "non-partial" not in str(error):
                    raise
                whole = obstore.get(store, name)  # a server without ranges is slower
                if whole.meta["size"] > _MAX_PACK:
                    raise RemoteUnavailable(self.name, f"{name} is too large to be read without ranges") from None
                data = whole.bytes().to_bytes()[start:stop]
            return data

        return self._ask(read, tries=_BODY_TRIES)

    def write_file(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Write a file; return False, without ``replace``, if there was one already. RemoteError."""
        return self._create(name, data, replace=replace)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files; those that aren't there are no error. RemoteUnavailable."""
        obstore = _load_obstore(self.name)
        for start in range(0, len(names), 1000):
            some = list(names[start : start + 1000])
            try:
                self._ask(functools.partial(obstore.delete, paths=some), passed=(FileNotFoundError,))
            except FileNotFoundError:  # of one, and where it stopped isn't known
                for name in some:
                    self._ask(functools.partial(obstore.delete, paths=[name]))

    def _create(self, name: str, data: bytes, *, replace: bool) -> bool:
        obstore = _load_obstore(self.name)
        exists = (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError)
        unable = obstore.exceptions.NotSupportedError

        def put(store: ObjectStore, mode: str) -> bool:
            obstore.put(store, name, data, mode=mode, use_multipart=False)
            return True

        if not replace and self._connection.creates:
            try:
                self._ask(functools.partial(put, mode="create"), passed=(*exists, unable), is_write=True)
                return True
            except exists:
                return False
            except unable:
                self._connection.creates = False  # equal names hold equal contents: writing one again does no harm
            except UploadRefused as error:
                if "HTTP 501" not in str(error):
                    raise
                self._connection.creates = False
        self._ask(functools.partial(put, mode="overwrite"), is_write=True)
        return True

    # -- requests ----------------------------------------------------------------------------------------------------

    def _ask(
        self,
        request: Callable[[ObjectStore], _Result],
        *,
        tries: int = 1,
        passed: tuple[type[Exception], ...] = (),
        is_write: bool = False,
    ) -> _Result | None:
        """Return what a request returns, None when there is no such file. Errors in ``passed`` are raised as they are.

        RemoteUnavailable or, of a write, UploadRefused.
        """
        failures = (_load_obstore(self.name).exceptions.BaseError, OSError)
        if reason := self._reason_down():
            raise RemoteUnavailable(self.name, reason)
        store = self._store
        while True:
            tries -= 1
            try:
                return request(store)
            except passed:
                raise
            except FileNotFoundError as error:
                if not is_write and not _MISSING_BUCKET.search(str(error)):
                    return None
                failure = self._failure(error, is_write)
            except failures as error:
                if tries > 0 and _BROKEN_BODY.search(str(error)):
                    continue
                failure = self._failure(error, is_write)
            raise failure  # out here: what the provider wrote would be its context

    def _failure(self, error: Exception, is_write: bool) -> RemoteUnavailable | UploadRefused:
        """Return the error to raise. What the provider wrote is not in it: that may quote an address with a key."""
        text = str(error)
        status = _STATUS.search(text)
        scheme = urlsplit(self.url).scheme
        credentials = f": credentials come from {_SCHEMES[scheme]}" if scheme in _SCHEMES else ""
        if _NO_CREDENTIALS.search(text):
            reason = f"no credentials{credentials}"
        elif _MISSING_BUCKET.search(text):
            reason = f"there is no bucket {urlsplit(self.url).hostname}: create it, or correct the URL"
        elif status and status[1] in ("401", "403"):
            code = _CODE.search(text)
            reason = f"access denied (HTTP {status[1]}{f', {code[1]}' if code else ''}){credentials}"
        elif status:
            code = _CODE.search(text)
            reason = f"HTTP {status[1]}{f', {code[1]}' if code else ''}"
        elif _BROKEN_BODY.search(text):
            reason = "the answer was cut short, several times"
        elif "error sending request" in text or "HTTP error" in text:
            reason = "no answer"
        else:
            reason = f"{type(error).__name__} of the request"
        if reason == "no answer" or (status and status[1] in ("429", "503")):
            self._connection.down = (time.monotonic() + _DOWN_SECONDS, reason)
        return UploadRefused(self.name, reason) if is_write else RemoteUnavailable(self.name, reason)

    def _reason_down(self) -> str:
        """Return why the remote was found to be down a moment ago; empty if it wasn't."""
        until, reason = self._connection.down
        return reason if time.monotonic() < until else ""

    @property
    def _store(self) -> ObjectStore:
        with self._connection.opening:
            if self._connection.store is None:
                self._connection.store = self._open()
            return self._connection.store

    def _open(self) -> ObjectStore:
        obstore = _load_obstore(self.name)
        scheme = urlsplit(self.url).scheme
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
        is_open = endpoint.startswith("http://") or scheme == "http"  # on a network of one's own
        options: Any = {"timeout": _TIMEOUT, "connect_timeout": timedelta(seconds=10), "allow_http": is_open}
        config: Any = {}
        if scheme == "s3":
            # ids are hashes of what they name: over TLS a signature of each body protects nothing more
            config = {**_aws_files(), **({} if is_open else {"unsigned_payload": True})}
        try:
            store: ObjectStore = obstore.store.from_url(
                self.url, config=config or None, client_options=options, retry_config=_RETRY
            )
            return store
        except (obstore.exceptions.BaseError, ValueError) as error:
            missing = "account" if "Account must be specified" in str(error) else ""
            what = f"{missing or 'settings'} can't be read from the environment"
            hint = f": {_SCHEMES[scheme]}" if scheme in _SCHEMES else ""
            raise RemoteUnavailable(self.name, f"{what}{hint}") from None


class Website(Bucket):
    """A bucket that is read over HTTPS. Nothing can be listed there, and nothing written."""

    writable = False

    def files(self, folder: str) -> Iterator[RemoteFile]:
        """Raise RemoteUnavailable: a website has no listing."""
        raise RemoteUnavailable(self.name, f"a website has no list of its {folder}: ask for a full id")

    def _list_some(self, object_ids: set[ObjectId]) -> set[ObjectId]:  # noqa: ARG002
        return set()

    def _create(self, name: str, data: bytes, *, replace: bool) -> bool:  # noqa: ARG002
        raise UploadRefused(self.name, "https:// is for reading alone")

    def remove(self, names: Sequence[str]) -> None:  # noqa: ARG002
        """Raise UploadRefused."""
        raise UploadRefused(self.name, "https:// is for reading alone")


def _load_obstore(name: str) -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise PackageMissing(f"remote {name}", "obstore", "buckets") from None
    return obstore


def _key(object_id: ObjectId) -> str:
    return f"objects/{object_id[:2]}/{object_id}"


_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT",
    "GOOGLE_STORAGE_URL",
)  # fmt: skip
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_MISSING_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound")
_NO_CREDENTIALS = re.compile(r"169\.254\.169\.254|metadata\.google\.internal|/latest/api/token")
_BROKEN_BODY = re.compile(
    r"error decoding response body|Content-Range header not present|request or response body error"
)


def _aws_files() -> dict[str, str]:
    """Return what the profile in use says in ~/.aws, where the environment has no key. (obstore reads the rest.)"""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    import configparser

    profile = os.environ.get("AWS_PROFILE", "default")
    home = Path.home() / ".aws"
    found: dict[str, str] = {}
    for variable, name, section, keys in (
        (
            "AWS_SHARED_CREDENTIALS_FILE",
            "credentials",
            profile,
            ("aws_access_key_id", "aws_secret_access_key", "aws_session_token"),
        ),
        ("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}", ("region",)),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.environ.get(variable) or home / name, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
        for key in keys:
            if value := parser.get(section, key, fallback=""):
                found[key.removeprefix("aws_") if key == "aws_session_token" else key] = value
    if "region" in found and (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        del found["region"]
    return found
