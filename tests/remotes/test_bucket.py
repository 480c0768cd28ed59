"""Buckets under harm: what the service, the network or the settings do wrong is told, and never costs data."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bucket_service import KEY_ID, SECRET, BucketService, Harm, Request

from castore.errors import CastoreError, PackageMissing, RemoteError, RemoteUnavailable, UploadRefused
from castore.format import ids
from castore.format.frame import encode_frame
from castore.format.ids import ObjectId
from castore.remotes import bucket, packs
from castore.remotes.bucket import Bucket, Website

PLAINS = [random.Random(number).randbytes(2000) for number in range(20)]
FRAMES = {ids.hash_bytes(plain): encode_frame(plain) for plain in PLAINS}
FIRST, *_ = FRAMES
INDEX = ids.hash_bytes(b"the index of a part")


@pytest.fixture
def remote(s3: BucketService) -> Bucket:
    return Bucket("cloud", s3.url())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repetitions, so that a test of what stays broken is quick."""
    monkeypatch.setitem(bucket._RETRY, "max_retries", 2)


@pytest.mark.parametrize("harms", [("503", ""), ("reset", ""), ("slow",), ("503", "reset", "503", "")])
def test_what_passes_is_waited_for(s3: BucketService, remote: Bucket, harms: tuple[Harm, ...]) -> None:
    with s3.harming(*harms):
        assert remote.put(FIRST, FRAMES[FIRST]) in (True, False)  # an answer that was lost looks like another's copy
        assert remote.has([FIRST, INDEX]) == {FIRST}
        assert remote.get(FIRST) == FRAMES[FIRST]
        assert [file.size for file in remote.files("objects")] == [len(FRAMES[FIRST])]


@pytest.mark.parametrize("harms", [("cut", ""), ("cut", "no ranges", "")])
def test_a_body_that_is_cut_is_read_again(s3: BucketService, remote: Bucket, harms: tuple[Harm, ...]) -> None:
    remote.put(FIRST, FRAMES[FIRST])
    with s3.harming(*harms, when=lambda request: request.method == "GET"):
        assert remote.get(FIRST) == FRAMES[FIRST]


@pytest.mark.usefixtures("impatient")
def test_a_body_that_is_always_cut_is_an_error(s3: BucketService, remote: Bucket) -> None:
    remote.put(FIRST, FRAMES[FIRST])
    with s3.harming("cut", when=lambda request: request.method == "GET"), pytest.raises(RemoteUnavailable):
        remote.get(FIRST)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ("403", r"cloud: access denied \(HTTP 403(, AccessDenied)?\): credentials come from AWS_ACCESS_KEY_ID"),
        ("expired", r"cloud: HTTP 400(, ExpiredToken)?$"),
        ("503", r"cloud: HTTP 503(, SlowDown)?$"),
        ("reset", r"cloud: no answer$"),
    ],
)
@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda remote: remote.get(FIRST), id="get"),
        pytest.param(lambda remote: remote.has([FIRST]), id="has"),
        pytest.param(lambda remote: list(remote.files("objects")), id="files"),
        pytest.param(lambda remote: remote.put(FIRST, FRAMES[FIRST]), id="put"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_what_stays_broken_is_one_short_error(
    s3: BucketService, remote: Bucket, harm: Harm, reason: str, ask: Callable[[Bucket], object]
) -> None:
    with s3.harming(harm), pytest.raises(RemoteError) as caught:
        ask(remote)
    assert re.search(reason, str(caught.value))
    assert re.fullmatch(r"[^\n]{1,300}", str(caught.value))


@pytest.mark.usefixtures("impatient")
def test_a_remote_that_does_not_answer_is_not_asked_again_at_once(
    monkeypatch: pytest.MonkeyPatch, s3: BucketService
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
    remote = Bucket("cloud", s3.url())
    with pytest.raises(RemoteUnavailable, match="no answer"):
        remote.get(FIRST)
    monkeypatch.setattr(remote._connection, "store", None)  # whoever asks now must not come as far as a request
    with pytest.raises(RemoteUnavailable, match="no answer"):
        remote.get(FIRST)
    assert "no answer" in remote.explain_missing(FIRST)


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_does_not_exist_is_not_an_empty_one() -> None:
    remote = Bucket("cloud", "s3://no-such-bucket-here/x")
    asks: list[Callable[[], object]] = [
        lambda: remote.get(FIRST),
        lambda: remote.has([FIRST]),
        lambda: remote.read_file("gc/marked.json", 10),
        lambda: remote.read_range("packs/x", 0, 10),
        lambda: list(remote.files("objects")),
        lambda: remote.put(FIRST, b""),
    ]
    for ask in asks:
        with pytest.raises(RemoteError, match="there is no bucket no-such-bucket-here"):
            ask()


@pytest.mark.usefixtures("impatient")
def test_without_credentials_it_says_which_are_looked_for(
    s3: BucketService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RemoteUnavailable, match=r"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY|no answer"):
        Bucket("cloud", s3.url()).get(FIRST)


@pytest.mark.parametrize("profile", ["default", "training"])
def test_the_usual_files_are_read(
    s3: BucketService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    if profile != "default":
        monkeypatch.setenv("AWS_PROFILE", profile)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        f"[{profile}]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n"
    )
    section = profile if profile == "default" else f"profile {profile}"
    (tmp_path / ".aws" / "config").write_text(f"[{section}]\nregion = us-east-1\n")
    remote = Bucket("cloud", s3.url())
    assert remote.put(FIRST, FRAMES[FIRST])
    assert remote.get(FIRST) == FRAMES[FIRST]


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(PackageMissing, match=r"pip install 'castore\[buckets\]'"):
        Bucket("cloud", "s3://bucket").has([FIRST])


def test_a_website_is_for_reading_alone() -> None:
    site = Website("site", "https://models.example/gpt")
    assert not site.writable
    with pytest.raises(UploadRefused):
        site.put(FIRST, FRAMES[FIRST])
    with pytest.raises(UploadRefused):
        site.remove(["x"])
    with pytest.raises(RemoteUnavailable, match="full id"):
        list(site.files("manifests"))


def test_few_objects_are_asked_for_and_many_are_listed(s3: BucketService, remote: Bucket) -> None:
    for object_id, frame in FRAMES.items():
        remote.put(object_id, frame)
    fresh = Bucket("cloud", remote.url)
    s3.requests.clear()
    assert fresh.has([*FRAMES, INDEX]) == FRAMES.keys()
    assert [request.method for request in s3.requests].count("HEAD") == len(FRAMES) + 1
    s3.requests.clear()
    assert fresh.has(FRAMES) == FRAMES.keys()  # known by now
    assert s3.requests == []
    fresh = Bucket("cloud", remote.url)
    absent = [ids.hash_bytes(bytes([number % 256, number // 256])) for number in range(500)]
    assert fresh.has([*FRAMES, *absent]) == FRAMES.keys()
    assert [request.method for request in s3.requests].count("HEAD") == 0
    assert len(s3.requests) <= 3


# -- packs -----------------------------------------------------------------------------------------------------------


def put_packed(remote: Bucket, index_id: ObjectId = INDEX) -> None:
    frames = list(FRAMES.items())
    remote.put_packed(frames[:10])
    remote.put_packed([*frames[10:], (index_id, encode_frame(b"the index of a part"))])
    remote.finish_packs(index_id, [*FRAMES, index_id])


def test_objects_in_packs_are_found_and_read_together(s3: BucketService, remote: Bucket) -> None:
    put_packed(remote)
    fresh = Bucket("cloud", remote.url)
    s3.requests.clear()
    assert fresh.get(INDEX) == encode_frame(b"the index of a part")
    opening = len(s3.requests)
    assert opening <= 6  # by itself, the list of parts, what names the packs, two ends of packs, and the index
    assert fresh.has(FRAMES) == FRAMES.keys()
    fresh.expect(FRAMES)
    assert {object_id: fresh.get(object_id) for object_id in FRAMES} == FRAMES
    assert len(s3.requests) - opening == 2


def test_an_object_in_a_pack_is_found_by_itself(remote: Bucket) -> None:
    put_packed(remote)
    assert Bucket("cloud", remote.url).get(FIRST) == FRAMES[FIRST]
    assert Bucket("cloud", remote.url).has([FIRST, ids.hash_bytes(b"absent")]) == {FIRST}


def test_packs_are_found_on_a_website(remote: Bucket) -> None:
    put_packed(remote)
    site = Website("site", remote.url)
    assert site.get(INDEX) is not None
    assert site.has(FRAMES) == FRAMES.keys()
    assert site.get(FIRST) == FRAMES[FIRST]


def test_a_server_without_ranges_is_only_slower(s3: BucketService, remote: Bucket) -> None:
    put_packed(remote)
    with s3.harming("no ranges"):
        fresh = Bucket("cloud", remote.url)
        assert {object_id: fresh.get(object_id) for object_id in FRAMES} == FRAMES


@pytest.mark.parametrize("file", ["pack", "pointer"])
@pytest.mark.parametrize("harm", [lambda data: data[:0], lambda data: data[:-1], lambda data: b"\0" * len(data), None])
def test_a_damaged_pack_is_a_miss(remote: Bucket, file: str, harm: Callable[[bytes], bytes] | None) -> None:
    put_packed(remote)
    files = [found.name for found in remote.files("packs")]
    for name in files:
        if name.startswith(packs.PARTS) == (file == "pointer"):
            if harm is None:
                remote.remove([name])
            else:
                data = remote.read_file(name, 1 << 20)
                assert data is not None
                remote.write_file(name, harm(data), replace=True)
    fresh = Bucket("cloud", remote.url)
    assert fresh.get(FIRST) is None
    assert fresh.has([FIRST]) == set()
    assert fresh.explain_missing(FIRST)


def test_a_good_copy_beside_a_bad_one_in_a_pack_is_found(remote: Bucket) -> None:
    put_packed(remote)
    assert Bucket("cloud", remote.url).put(FIRST, FRAMES[FIRST])
    fresh = Bucket("cloud", remote.url)
    assert fresh.has([INDEX]) == {INDEX}
    fresh.mark_corrupt(FIRST, "its bytes hash to 0123")  # the one in the pack
    assert fresh.get(FIRST) == FRAMES[FIRST]


REQUESTS: list[Callable[[Bucket], object]] = [
    lambda remote: remote.get(FIRST),
    lambda remote: remote.has([FIRST]),
    lambda remote: remote.put(INDEX, b"x"),
    lambda remote: list(remote.files("objects")),
    lambda remote: remote.remove(["x"]),
]

# -- secrets ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    texts: list[str] = []
    with caplog.at_level(logging.DEBUG):
        yield texts
    texts += [record.getMessage() for record in caplog.records]
    texts += [str(record.exc_info) for record in caplog.records]


@pytest.mark.usefixtures("impatient")
def test_a_planted_secret_appears_in_no_error_and_no_log(
    s3: BucketService, remote: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    harms: list[Harm] = ["403", "503", "expired", "cut", "reset", "wrong"]
    remote.put(FIRST, FRAMES[FIRST])
    with everything_logged(caplog) as texts:
        for harm in harms:
            fresh = Bucket("cloud", remote.url)
            with s3.harming(harm):
                for ask in REQUESTS:
                    try:
                        ask(fresh)
                    except CastoreError as error:
                        texts += [str(error), repr(error), str(error.__cause__), str(error.__context__)]
            texts += [fresh.explain_missing(FIRST), repr(fresh), str(vars(fresh).get("_down"))]
    assert len(texts) > 20
    for text in texts:
        assert SECRET not in text
        assert KEY_ID not in text


def test_requests_are_counted_by_time_too(s3: BucketService, remote: Bucket) -> None:
    """The service that tests use does what it says: it is slow when told to, and only then."""
    with s3.harming("slow"):
        began = time.monotonic()
        remote.has([FIRST])
        assert time.monotonic() - began >= 0.3
    assert Request("HEAD", "x") != Request("GET", "x")
