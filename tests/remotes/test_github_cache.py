"""The client of GitHub's cache and the bundles in it, against a service that refuses what the real one refuses."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import actions_service
import pytest
from actions_service import Handle, Reply, Request
from actions_service import Service as Cache
from builders import parts

from castore import Repo
from castore.errors import NotInActions, RemoteUnavailable, UploadRefused
from castore.format import bundle, ids
from castore.format.bundle import Record
from castore.format.ids import ObjectId
from castore.github import bundling, sessions
from castore.progress import ignore_progress
from castore.remotes import fallback, github_service, joined_reads
from castore.remotes.github_cache import GitHubCache
from castore.remotes.github_service import CacheService


@pytest.fixture
def cache() -> Iterator[Cache]:
    with Cache() as cache:
        yield cache


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses are noted instead of made."""
    made: list[float] = []
    monkeypatch.setattr(github_service.time, "sleep", made.append)
    return made


def client(cache: Cache, **options: Any) -> CacheService:
    return CacheService.of_job(cache.environment(**options))


class Box:
    """A bundle of a few objects in the cache, and their frames."""

    def __init__(self, repo: Repo, cache: Cache) -> None:
        self.cache = cache
        self.saved = repo.save(parts(1), run="a", step=1)
        self.frames = {object_id: repo.store.path(object_id).read_bytes() for object_id in sorted(repo.store.stored())}
        self.layout = bundle.lay_out({object_id: len(frame) for object_id, frame in self.frames.items()})
        self.key = GitHubCache(client(cache), []).upload(
            self.layout, bundling.read_ranges(repo.store, self.layout, {}), ignore_progress
        )
        indexes = [part.index for part in self.saved.manifest.parts.values()]
        self.record = Record(
            bundle=self.layout.id,
            key=self.key,
            created="2026-01-02T03:04:05.000006Z",
            bytes=self.layout.size,
            objects=len(self.frames),
            parts={index_id: [self.layout.id] for index_id in indexes},
        )

    def remote(self, **options: Any) -> GitHubCache:
        return GitHubCache(client(self.cache, **options), [self.record])

    @property
    def index_id(self) -> ObjectId:
        return next(iter(self.record.parts))


@pytest.fixture
def box(repo: Repo, cache: Cache) -> Box:
    return Box(repo, cache)


# -- who may come in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"GITHUB_ACTIONS": "true"},
        {"GITHUB_ACTIONS": "true", "ACTIONS_RESULTS_URL": "https://x/", "ACTIONS_RUNTIME_TOKEN": ""},
        {"GITHUB_ACTIONS": "true", "ACTIONS_RESULTS_URL": "http://example.com/", "ACTIONS_RUNTIME_TOKEN": "t"},
        {"ACTIONS_RESULTS_URL": "https://x/", "ACTIONS_RUNTIME_TOKEN": "t"},
        {"GITHUB_ACTIONS": "true", "ACTIONS_RESULTS_URL": "https://[::1", "ACTIONS_RUNTIME_TOKEN": "t"},
        {"GITHUB_ACTIONS": "true", "ACTIONS_RESULTS_URL": "https://x/", "ACTIONS_RUNTIME_TOKEN": "t\nx: y"},
        {"GITHUB_ACTIONS": "true", "ACTIONS_RESULTS_URL": "https://x/", "ACTIONS_RUNTIME_TOKEN": "€"},
    ],
)
def test_elsewhere_than_in_an_action_it_says_so(environment: dict[str, str]) -> None:
    with pytest.raises(NotInActions):
        CacheService.of_job(environment)


@pytest.mark.parametrize(
    ("mode", "may_read", "may_write"),
    [
        ("read", True, False),
        ("write", True, True),
        ("write-only", False, True),
        ("none", False, False),
        (None, True, True),
    ],
)
def test_the_mode_of_the_job_is_kept_to(cache: Cache, mode: str | None, may_read: bool, may_write: bool) -> None:
    service = client(cache, mode=mode)
    assert (not service.unreadable, not service.unwritable) == (may_read, may_write)


def test_a_job_that_may_not_read_asks_nothing(box: Box) -> None:
    before = len(box.cache.log)
    remote = box.remote(mode="write-only")
    assert remote.has([box.index_id]) == set()
    assert remote.explain_missing(box.index_id) == "ACTIONS_CACHE_MODE = write-only"
    assert len(box.cache.log) == before


# -- reading ---------------------------------------------------------------------------------------------------------


def test_every_object_of_a_bundle_can_be_read_by_itself(box: Box) -> None:
    remote = box.remote()
    assert remote.has(box.frames) == box.frames.keys()
    assert {object_id: remote.get(object_id) for object_id in box.frames} == box.frames
    assert box.cache.count("GetCacheEntryDownloadURL") == 2  # one of them confirmed the upload


def test_only_what_is_asked_for_is_fetched(box: Box) -> None:
    before = box.cache.downloaded_bytes
    assert box.remote().get(box.index_id) == box.frames[box.index_id]
    assert box.cache.downloaded_bytes - before == len(box.frames[box.index_id]) + bundle.tail_bytes(len(box.frames))


@pytest.mark.parametrize("ask", ["part_states", "pull"])
def test_the_indexes_of_a_checkpoint_are_read_at_once(repo: Repo, box: Box, ask: str) -> None:
    entry = repo.find(box.saved.id)
    shutil.rmtree(repo.store.objects)
    repo.remotes.append(box.remote())
    all_are_here = threading.Barrier(len(box.record.parts))

    def wait_for_the_others(request: Request, handle: Handle) -> Reply:
        all_are_here.wait(30)
        return handle(request)

    repo.remotes[-1].has(box.record.parts)  # which reads the index of the bundle
    box.cache.fault("GET", wait_for_the_others, times=len(box.record.parts))
    if ask == "pull":
        repo.fetch(entry)
    else:
        assert {state.where for state in repo.part_states(entry).values()} == {"remote"}
    assert not all_are_here.broken


def test_what_no_record_names_is_looked_for_in_every_bundle_and_else_a_miss(box: Box) -> None:
    remote = box.remote()
    chunk = next(object_id for object_id in box.frames if object_id not in box.record.parts)
    assert remote.get(chunk) == box.frames[chunk]
    assert remote.get(ids.hash_bytes(b"unknown")) is None
    assert remote.explain_missing(ids.hash_bytes(b"unknown")) == "no bundle has it"


def truncated(box: Box) -> None:
    box.cache.truncate(box.key, box.layout.size - 5)


def empty(box: Box) -> None:
    box.cache.replace(box.key, b"")


def another(box: Box) -> None:
    box.cache.replace(box.key, b"x" * box.layout.size)


def longer(box: Box) -> None:
    box.cache.replace(box.key, box.cache.blob(box.key) + b"x")


def evicted(box: Box) -> None:
    box.cache.evict(box.key)


def without_bytes(box: Box) -> None:
    box.cache.lose(box.key)


def named_by_a_prefix(box: Box) -> None:
    """Another entry's key begins with the wanted one: the service takes that for a match."""
    data = box.cache.blob(box.key)
    box.cache.evict(box.key)
    service = client(box.cache)
    url = service.reserve(box.key + "-x")
    assert url is not None
    assert service.send(url, len(data), lambda start, stop: data[start:stop], ignore_progress)
    service.finish(box.key + "-x", len(data))


def saved_on_another_branch(box: Box) -> None:
    box.cache.entries()
    box.cache._named(box.key).scope = "refs/pull/7/merge"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncated, "shorter than git says|index does not match its id"),
        (empty, "shorter than git says"),
        (another, "index does not match its id"),
        (longer, None),
        (evicted, "not in the cache: evicted"),
        (without_bytes, "gone"),
        (named_by_a_prefix, "not in the cache"),
        (saved_on_another_branch, "not in the cache"),
    ],
)
def test_a_bundle_that_is_not_what_git_says_is_a_miss_with_its_reason(
    box: Box, harm: Callable[[Box], None], reason: str | None
) -> None:
    harm(box)
    remote = box.remote()
    if reason is None:  # bytes behind a good bundle harm nothing
        assert remote.get(box.index_id) == box.frames[box.index_id]
        return
    assert remote.get(box.index_id) is None
    assert remote.has(box.frames) == set()
    assert re.search(reason, remote.explain_missing(box.index_id))
    assert remote.missing() == {box.layout.id}


def test_an_object_with_wrong_bytes_is_not_stored_and_not_asked_for_again(box: Box, tmp_path: Path) -> None:
    place = box.layout.places[box.index_id]
    data = bytearray(box.cache.blob(box.key))
    data[place.offset + place.length - 1] ^= 1
    box.cache.replace(box.key, bytes(data))
    other = Repo.init(tmp_path / "other")
    other.remotes.append(remote := box.remote())
    assert fallback.fetch(other.store, other.remotes, box.index_id) is None
    assert not other.store.has(box.index_id)
    assert "its copy is corrupt" in remote.explain_missing(box.index_id)
    assert remote.has([box.index_id]) == set()
    others = box.frames.keys() - {box.index_id}
    assert all(fallback.fetch(other.store, other.remotes, object_id) for object_id in others)


def test_a_bomb_costs_no_more_than_its_claim_allows(box: Box, tmp_path: Path) -> None:
    """Its header claims more than the index that git vouches for, or more than any object has."""
    place = box.layout.places[box.index_id]
    for claim in (1 << 62, (64 << 20) + 1, 64 << 20):
        frame = struct.pack("<4sBBHQ", b"CSTO", 1, 1, 0, claim) + zlib.compress(bytes(1 << 20))
        data = bytearray(box.cache.blob(box.key))
        data[place.offset : place.offset + place.length] = frame[: place.length].ljust(place.length, b"\0")
        box.cache.replace(box.key, bytes(data))
        other = Repo.init(tmp_path / f"other{claim}")
        assert fallback.fetch(other.store, [box.remote()], box.index_id) is None
        assert not other.store.has(box.index_id)


# -- trouble on the way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action",
    [
        actions_service.answer(500),
        actions_service.answer(503),
        actions_service.answer(429, {"Retry-After": "1"}),
        actions_service.lost(),
        actions_service.cut(10),
    ],
    ids=["500", "503", "429", "lost", "cut"],
)
@pytest.mark.parametrize("method", ["GetCacheEntryDownloadURL", "GET"])
def test_what_may_pass_is_tried_again(box: Box, method: str, action: Any, pauses: list[float]) -> None:
    box.cache.fault(method, action, times=2)
    assert box.remote().get(box.index_id) == box.frames[box.index_id]
    assert len(pauses) == 2 + 1  # one was before the upload was confirmed


def test_retry_after_is_waited_for_but_not_for_ever(box: Box, pauses: list[float]) -> None:
    for seconds in ("7", "999999", "Wed, 21 Oct 2026 07:28:00 GMT"):
        box.cache.fault("GetCacheEntryDownloadURL", actions_service.answer(429, {"Retry-After": seconds}))
    assert box.remote().get(box.index_id) == box.frames[box.index_id]
    assert pauses[-3] == 7
    assert pauses[-2] == 60
    assert pauses[-1] < 5


def test_a_service_that_is_down_is_asked_about_one_thing_only(box: Box) -> None:
    box.cache.fault("GetCacheEntryDownloadURL", actions_service.answer(502), times=1000)
    remote = box.remote()
    before = box.cache.count("GetCacheEntryDownloadURL")
    assert remote.has(box.frames) == set()
    assert remote.has(box.frames) == set()
    assert remote.get(box.index_id) is None
    assert box.cache.count("GetCacheEntryDownloadURL") - before == 5
    assert remote.explain_missing(box.index_id) == "no usable answer after 5 tries: HTTP 502"
    assert remote.missing() == set()  # it isn't known to be gone


@pytest.mark.parametrize(
    "action",
    [
        actions_service.endless(),
        actions_service.redirect("http://127.0.0.1:1/"),
        actions_service.answer(200, {}, b"x"),
        actions_service.answer(206, {}, b"x"),
        actions_service.answer(404),
        actions_service.answer(416),
    ],
    ids=["endless", "redirect", "200", "206", "404", "416"],
)
def test_an_answer_that_is_none_is_a_miss(box: Box, action: Any) -> None:
    box.cache.fault("GET", action, times=1000)
    assert box.remote().get(box.index_id) is None


def test_a_server_that_ignores_ranges_is_read_all_the_same(box: Box) -> None:
    """As self-hosted ones do: 200 with the whole is a legal answer."""
    box.cache.fault("GET", actions_service.whole(), times=1000)
    remote = box.remote()
    for object_id, frame in box.frames.items():
        assert remote.get(object_id) == frame


def test_neighbours_are_read_together_and_each_index_once(box: Box) -> None:
    remote = box.remote()
    remote.expect(box.frames)
    before = box.cache.count("GET")
    assert {object_id: remote.get(object_id) for object_id in box.frames} == box.frames
    assert box.cache.count("GET") == before + 1
    assert remote.get(box.index_id) == box.frames[box.index_id]
    assert box.cache.count("GET") == before + 1


def test_what_can_not_be_read_together_is_read_by_itself(box: Box) -> None:
    remote = box.remote()
    remote.expect(box.frames)
    box.cache.fault("GET", actions_service.answer(404))
    assert {object_id: remote.get(object_id) for object_id in box.frames} == box.frames


def test_a_joined_read_is_no_longer_than_its_limit(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_reads, "MAX_BYTES", max(map(len, box.frames.values())) + 1)
    remote = box.remote()
    remote.expect(box.frames)
    before = box.cache.count("GET")
    assert {object_id: remote.get(object_id) for object_id in box.frames} == box.frames
    assert box.cache.count("GET") > before + 1


def test_threads_that_want_neighbours_at_once_read_them_once(box: Box) -> None:
    remote = box.remote()
    remote.expect(box.frames)
    before = box.cache.count("GET")
    with ThreadPoolExecutor(8) as pool:
        assert dict(zip(box.frames, pool.map(remote.get, box.frames), strict=True)) == box.frames
    assert box.cache.count("GET") == before + 1


def test_corrupt_bytes_of_the_index_are_a_miss(box: Box) -> None:
    box.cache.fault("GET", actions_service.corrupt(), times=1000)
    assert box.remote().get(box.index_id) is None


NONSENSE = [
    b"",
    b"[]",
    b"nonsense",
    b"[" * 100_000,
    b'{"ok": true}',
    b'{"ok": 1}',
    b'{"ok": true, "matched_key": 7}',
    b"{}" + b" " * 2_000_000,
]


@pytest.mark.parametrize("body", NONSENSE, ids=range(len(NONSENSE)))
def test_an_answer_of_the_service_that_makes_no_sense_is_a_miss(box: Box, body: bytes) -> None:
    box.cache.fault("GetCacheEntryDownloadURL", actions_service.answer(200, {}, body), times=1000)
    assert box.remote().get(box.index_id) is None


@pytest.mark.parametrize(
    "url", ["", "file:///etc/passwd", "ftp://x/", 7, "http://", "//x", "https://[::1?x", "https://\u2100.com/?x"]
)
def test_an_address_that_is_none_is_not_followed(box: Box, url: Any) -> None:
    body = json.dumps({"ok": True, "matched_key": box.key, "signed_download_url": url}).encode()
    box.cache.fault("GetCacheEntryDownloadURL", actions_service.answer(200, {}, body), times=1000)
    assert box.remote().get(box.index_id) is None


def test_a_signature_that_ran_out_is_renewed(box: Box) -> None:
    remote = box.remote()
    assert remote.has([box.index_id])
    box.cache.expire_urls()
    assert remote.get(box.index_id) == box.frames[box.index_id]
    assert remote.get(box.index_id) == box.frames[box.index_id]
    assert box.cache.count("GetCacheEntryDownloadURL") == 3


def test_a_newly_signed_address_that_is_refused_means_out_of_reach_and_not_gone(box: Box) -> None:
    box.cache.url_lifetime = -1
    remote = box.remote()
    assert remote.get(box.index_id) is None
    assert "HTTP 401 or 403 to an address that it had just signed" in remote.explain_missing(box.index_id)
    assert remote.down
    assert remote.missing() == set()


def test_addresses_that_stop_to_hold_while_it_is_read_mean_out_of_reach(box: Box) -> None:
    remote = box.remote()
    assert remote.has([box.index_id])
    box.cache.url_lifetime = -1
    box.cache.expire_urls()
    with pytest.raises(RemoteUnavailable, match="HTTP 401 or 403"):
        remote.get(box.index_id)


def test_http_is_for_those_who_ask_for_it(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    environment = box.cache.environment() | {"ACTIONS_RESULTS_URL": "http://cache.example:8080/"}
    with pytest.raises(NotInActions, match="set CASTORE_ALLOW_HTTP_CACHE=1"):
        CacheService.of_job(environment)
    CacheService.of_job(environment | {"CASTORE_ALLOW_HTTP_CACHE": "1"})
    assert "go over plain http" in caplog.text


def test_a_key_that_is_taken_without_a_reason_is_passed_over(cache: Cache) -> None:
    """As self-hosted servers answer for one that is reserved."""
    cache.fault("CreateCacheEntry", actions_service.answer(200, {}, b'{"ok": false}'))
    assert re.fullmatch(r"castore-[0-9a-f]{64}-[0-9a-f]{8}", upload(cache, FRAMES))


def test_blocks_have_names_of_48_bytes(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(github_service, "BLOCK", 100)
    upload(cache, FRAMES)
    names = {
        base64.b64decode(unquote(name)) for entry in cache.log for name in re.findall(r"blockid=([^&]+)", entry.path)
    }
    assert len(names) > 2
    assert {len(name) for name in names} == {48}


def test_a_denial_to_read_is_a_miss_with_its_reason(box: Box) -> None:
    remote = GitHubCache(CacheService(box.cache.url, box.cache.token(read=False)), [box.record])
    assert remote.get(box.index_id) is None
    assert "cache read denied" in remote.explain_missing(box.index_id)


def test_a_token_that_is_not_accepted_is_a_miss_and_never_shown(box: Box) -> None:
    remote = GitHubCache(CacheService(box.cache.url, "secret-token"), [box.record])
    assert remote.get(box.index_id) is None
    assert "HTTP 401" in remote.explain_missing(box.index_id)
    assert "secret" not in remote.explain_missing(box.index_id)


def test_an_upload_that_is_refused_shows_no_signature(cache: Cache) -> None:
    def echo(request: Any, handle: Any) -> Any:
        return actions_service.answer(400, {}, json.dumps(request.query).encode())(request, handle)

    cache.fault("PUT", echo)
    with pytest.raises(RemoteUnavailable) as caught:
        upload(cache, FRAMES)
    assert "HTTP 400" in str(caught.value)
    assert "sig" not in str(caught.value)


def test_an_answer_that_drips_is_given_up(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(github_service, "_ANSWER_SECONDS", -1.0)
    remote = box.remote()
    assert remote.get(box.index_id) is None
    assert "TimeoutError" in remote.explain_missing(box.index_id)


def test_a_proxy_is_gone_through_but_not_to_this_machine(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def asking(*arguments: Any, **_: Any) -> None:
        asked.append(arguments[-1])
        raise ZeroDivisionError

    monkeypatch.setattr("urllib3.ProxyManager.request", asking)
    environment = box.cache.environment() | {"HTTPS_PROXY": "http://proxy.example:3128"}
    service = CacheService.of_job(environment)
    assert GitHubCache(service, [box.record]).get(box.index_id) == box.frames[box.index_id]
    with pytest.raises(ZeroDivisionError):
        service.read("https://cache.example/x?sig=1", 0, 1)
    assert asked == ["https://cache.example/x?sig=1"]


def test_a_message_that_repeats_the_token_is_shown_without_it(box: Box) -> None:
    body = json.dumps({"code": "x", "msg": "no: secret-token\x1b[2J" + "y" * 5000}).encode()
    box.cache.fault("GetCacheEntryDownloadURL", actions_service.answer(400, {}, body))
    remote = GitHubCache(CacheService(box.cache.url, "secret-token"), [box.record])
    assert remote.get(box.index_id) is None
    assert "no: ***\\x1b[2J" in remote.explain_missing(box.index_id)
    assert len(remote.explain_missing(box.index_id)) < 300


# -- uploading -------------------------------------------------------------------------------------------------------


def upload(cache: Cache, data: dict[ObjectId, bytes], remote: GitHubCache | None = None) -> str:
    layout = bundle.lay_out({object_id: len(frame) for object_id, frame in data.items()})
    whole = bundle.HEADER + b"".join(data.values()) + layout.tail
    remote = remote or GitHubCache(client(cache), [])
    key = remote.upload(layout, lambda start, stop: whole[start:stop], ignore_progress)
    assert cache.blob(key) == whole
    return key


FRAMES = {ids.hash_bytes(bytes([i])): bytes([i]) * (100 + i) for i in range(5)}


def test_a_bundle_of_several_blocks_arrives_whole(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(github_service, "BLOCK", 64)
    upload(cache, FRAMES)
    assert sum("comp=block&" in logged.path for logged in cache.log) > 8


def test_the_same_bundle_is_not_sent_twice(cache: Cache) -> None:
    assert upload(cache, FRAMES) == upload(cache, FRAMES)
    assert cache.count("PUT") == 1


def test_a_key_that_a_failed_upload_left_reserved_is_passed_over(cache: Cache) -> None:
    layout = bundle.lay_out({object_id: len(frame) for object_id, frame in FRAMES.items()})
    client(cache).reserve(f"castore-{layout.id}")
    assert upload(cache, FRAMES).startswith(f"castore-{layout.id}-")


def test_something_else_under_the_key_is_passed_over(cache: Cache) -> None:
    key = upload(cache, FRAMES)
    cache.replace(key, b"something else")
    assert upload(cache, FRAMES).startswith(f"{key}-")


def test_signatures_that_never_hold_end_it(cache: Cache) -> None:
    cache.fault("PUT", actions_service.answer(403), times=1000)
    with pytest.raises(UploadRefused, match="HTTP 401 or 403 to addresses that it had just signed"):
        upload(cache, FRAMES)


@pytest.mark.parametrize("method", ["CreateCacheEntry", "PUT", "FinalizeCacheEntryUpload"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again_by_an_upload(cache: Cache, method: str, status: int) -> None:
    cache.fault(method, actions_service.answer(status), times=4)
    upload(cache, FRAMES)


@pytest.mark.parametrize("method", ["CreateCacheEntry", "PUT", "FinalizeCacheEntryUpload"])
def test_an_upload_that_is_never_taken_says_so(cache: Cache, method: str) -> None:
    cache.fault(method, actions_service.answer(503), times=1000)
    with pytest.raises(RemoteUnavailable, match="503"):
        upload(cache, FRAMES)


def test_a_finished_upload_of_which_the_answer_was_lost_is_found(cache: Cache) -> None:
    def lost_on_the_way_back(request: Any, handle: Any) -> Any:
        handle(request)
        return actions_service.answer(500)(request, handle)

    cache.fault("FinalizeCacheEntryUpload", lost_on_the_way_back)
    upload(cache, FRAMES)


def test_a_refusal_is_told_in_the_words_of_the_service(cache: Cache) -> None:
    remote = GitHubCache(CacheService(cache.url, cache.token(write=False)), [])
    with pytest.raises(UploadRefused, match="cache write denied"):
        upload(cache, FRAMES, remote)


def test_a_signature_that_runs_out_during_an_upload_begins_another(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(github_service, "BLOCK", 64)
    cache.fault("PUT", actions_service.answer(403), when=lambda request: "blockid" in request.query)
    assert re.fullmatch(r"castore-[0-9a-f]{64}-[0-9a-f]{8}", upload(cache, FRAMES))


def test_what_is_accepted_but_not_there_is_no_success(cache: Cache) -> None:
    cache.fault("GetCacheEntryDownloadURL", actions_service.answer(200, {}, b'{"ok": false}'), times=1000)
    with pytest.raises(UploadRefused, match="look-up says: not in the cache"):
        upload(cache, FRAMES)


def test_a_look_up_that_takes_a_moment_to_find_it_is_tried_again(cache: Cache) -> None:
    cache.fault("GetCacheEntryDownloadURL", actions_service.answer(200, {}, b'{"ok": false}'), times=2)
    upload(cache, FRAMES)


# -- many bundles ----------------------------------------------------------------------------------------------------


def test_evicted_bundles_are_looked_up_once_each(cache: Cache) -> None:
    records = [
        Record(
            bundle=ids.hash_bytes(b"b%d" % i),
            key=f"castore-{i}",
            created="2026-01-02T03:04:05.000006Z",
            bytes=1000,
            objects=3,
            parts={ids.hash_bytes(b"p%d" % i): [ids.hash_bytes(b"b%d" % i)]},
        )
        for i in range(50)
    ]
    remote = GitHubCache(client(cache), records)
    for record in records:
        assert remote.has(record.parts) == set()
    assert cache.count("GetCacheEntryDownloadURL") == 50
    assert len(remote.missing()) == 50


def test_connecting_makes_the_cache_a_remote(repo: Repo, cache: Cache, box: Box) -> None:
    repo.catalog.add_record(box.record)
    (repo.root / "bundles" / "0000000000000000.json").write_text("{}")
    remote, (broken,) = sessions.connect(repo, client(cache))
    assert broken.path.name == "0000000000000000.json"
    assert remote.records == (box.record,)
    assert repo.remotes[-1] is remote
    repo.store.discard(list(repo.store.stored()))
    repo.store.empty_trash(repo.store.list_trash())
    assert {state.where for state in repo.part_states(repo.find(box.saved.id)).values()} == {"remote"}
    assert repo.load(box.saved.id).keys() == box.saved.manifest.parts.keys()
