"""The stand-in of the cache service refuses what the real one refuses, so that other tests may rely on it."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from actions_service import (
    CONTAINER,
    TWIRP,
    Action,
    Blobs,
    Service,
    answer,
    corrupt,
    cut,
    endless,
    hang,
    lost,
    redirect,
    whole,
)

CREATE, FINALIZE, GET = "CreateCacheEntry", "FinalizeCacheEntryUpload", "GetCacheEntryDownloadURL"
V, W = "a" * 64, "b" * 64
DATA = bytes(range(256)) * 8
BLOCK_BLOB = {"x-ms-blob-type": "BlockBlob"}


class Client:
    """Speaks the protocol, rightly unless told otherwise, over one connection that is kept alive."""

    def __init__(self, service: Service, ref: str | None = None, **permissions: bool) -> None:
        self.token = service.token(ref, **permissions)
        self.connection = http.client.HTTPConnection("127.0.0.1", urlsplit(service.url).port, timeout=5)

    def send(
        self, verb: str, url: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        split = urlsplit(url)
        self.connection.request(verb, split.path + (f"?{split.query}" if split.query else ""), body, headers or {})
        response = self.connection.getresponse()
        return response.status, response.headers, response.read()

    def call(self, method: str, *, status: int = 200, **fields: Any) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        got, _, body = self.send("POST", TWIRP + method, json.dumps(fields), headers)
        assert got == status, body
        value: dict[str, Any] = json.loads(body)
        return value

    def create(self, key: str, version: str = V) -> str:
        return str(self.call("CreateCacheEntry", key=key, version=version)["signed_upload_url"])

    def finalize(self, key: str, size: int, version: str = V) -> dict[str, Any]:
        return self.call("FinalizeCacheEntryUpload", key=key, version=version, size_bytes=str(size))

    def save(self, key: str, data: bytes = DATA, version: str = V) -> None:
        assert self.send("PUT", self.create(key, version), data, BLOCK_BLOB)[0] == 201
        assert self.finalize(key, len(data), version)["ok"] is True

    def find(self, key: str, *restore_keys: str, version: str = V) -> str:
        """The key that is found, or nothing."""
        fields = {"restore_keys": list(restore_keys)} if restore_keys else {}
        answer = self.call("GetCacheEntryDownloadURL", key=key, version=version, **fields)
        assert answer["ok"] is bool(answer["matched_key"]) is bool(answer["signed_download_url"])
        return str(answer["matched_key"])

    def url(self, key: str) -> str:
        return str(self.call("GetCacheEntryDownloadURL", key=key, version=V)["signed_download_url"])

    def read(self, key: str) -> bytes:
        status, _, data = self.send("GET", self.url(key))
        assert status == 200, data
        return data


@pytest.fixture
def service() -> Iterator[Service]:
    threads = threading.active_count()
    with Service() as service:
        yield service
    assert threading.active_count() <= threads


@pytest.fixture
def join(service: Service) -> Iterator[Callable[..., Client]]:
    """Makes clients: jobs of their own."""
    clients: list[Client] = []

    def join(ref: str | None = None, **permissions: bool) -> Client:
        clients.append(Client(service, ref, **permissions))
        return clients[-1]

    yield join
    for client in clients:
        client.connection.close()


@pytest.fixture
def client(join: Callable[..., Client]) -> Client:
    return join()


def block_list(*ids: str) -> bytes:
    return f"<BlockList>{''.join(f'<Latest>{block}</Latest>' for block in ids)}</BlockList>".encode()


def block_id(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_what_is_saved_is_found_and_read(service: Service, client: Client) -> None:
    client.save("k")
    assert client.find("k") == "k"
    assert client.read("k") == DATA == service.blob("k")
    assert [(entry.scope, entry.key, entry.version, entry.size) for entry in service.entries()] == [
        ("refs/heads/main", "k", V, len(DATA))
    ]
    client.send("PUT", client.create("empty"), b"", BLOCK_BLOB)
    assert client.call(FINALIZE, key="empty", version=V)["ok"] is True, "no size is a size of 0"
    assert client.read("empty") == b""


# -- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "change"),
    [
        (CREATE, {"key": ""}),
        (CREATE, {"key": "a,b"}),
        (CREATE, {"key": "a" * 513}),
        (CREATE, {"key": 1}),
        (CREATE, {"key": None}),
        (CREATE, {"version": "a" * 63}),
        (CREATE, {"version": "g" * 64}),
        (CREATE, {"version": None}),
        (CREATE, {"size": "1"}),
        (FINALIZE, {"size_bytes": len(DATA)}),
        (FINALIZE, {"size_bytes": "1e3"}),
        (FINALIZE, {"size_bytes": "-1"}),
        (FINALIZE, {"key": "a,b"}),
        (FINALIZE, {"sizeBytes": "2048"}),
        (GET, {"key": "a,b"}),
        (GET, {"version": ""}),
        (GET, {"restore_keys": "a"}),
        (GET, {"restore_keys": ["a,b"]}),
        (GET, {"restore_keys": list("abcdefghij")}),
        (GET, {"restoreKeys": ["a"]}),
    ],
)
def test_a_call_with_a_wrong_field_is_refused(client: Client, method: str, change: dict[str, Any]) -> None:
    good = {"key": "k", "version": V} | ({"size_bytes": str(len(DATA))} if method == FINALIZE else {})
    if method == FINALIZE:
        client.send("PUT", client.create("k"), DATA, BLOCK_BLOB)
    wrong = {name: value for name, value in (good | change).items() if value is not None}
    assert client.call(method, status=400, **wrong)["code"] in ("malformed", "invalid_argument")
    client.call(method, **good)  # it was only the change


def test_an_old_field_and_long_keys_are_accepted(client: Client) -> None:
    key = "é" * 512
    assert client.call(CREATE, key=key, version=V, metadata={"repository_id": "1"})["ok"] is True
    assert client.find("k", *"abcdefghi") == ""


@pytest.mark.parametrize(
    ("verb", "path", "body", "change", "expected"),
    [
        ("POST", TWIRP + GET, b"{", {}, (400, "malformed")),
        ("POST", TWIRP + GET, b"[]", {}, (400, "malformed")),
        ("POST", TWIRP + GET, b"", {}, (400, "malformed")),
        ("POST", TWIRP + "DeleteCacheEntry", b"{}", {}, (404, "bad_route")),
        ("POST", "/" + TWIRP + GET, b"{}", {}, (404, "bad_route")),
        ("POST", "/base" + TWIRP + GET, b"{}", {}, (404, "bad_route")),
        ("PUT", TWIRP + GET, b"{}", {}, (404, "bad_route")),
        ("GET", TWIRP + GET, b"", {}, (404, "bad_route")),
        ("POST", TWIRP + GET, b"{}", {"Content-Type": "text/plain"}, (404, "bad_route")),
        ("POST", TWIRP + GET, b"{}", {"Authorization": "Bearer other"}, (401, "unauthenticated")),
        ("POST", TWIRP + GET, b"{}", {"Authorization": ""}, (401, "unauthenticated")),
        ("POST", TWIRP + GET, b"{}", {"Authorization": "Basic {token}"}, (401, "unauthenticated")),
    ],
)
def test_a_request_that_is_no_call_is_refused(
    client: Client, verb: str, path: str, body: bytes, change: dict[str, str], expected: tuple[int, str]
) -> None:
    headers = {"Authorization": f"Bearer {client.token}", "Content-Type": "application/json"} | {
        name: value.format(token=client.token) for name, value in change.items()
    }
    status, got, text = client.send(verb, path, body, headers)
    assert (status, json.loads(text)["code"]) == expected
    assert got["Content-Type"] == "application/json"
    assert client.find("k") == ""  # and the connection can be used again


def test_an_entry_is_reserved_once_and_invisible_until_finalized(join: Callable[..., Client]) -> None:
    client, other = join(), join("refs/heads/topic")
    url = client.create("k")
    assert client.call(CREATE, key="k", version=V, status=409)["code"] == "already_exists"
    assert client.send("PUT", url, DATA, BLOCK_BLOB)[0] == 201
    assert client.find("k") == ""
    assert client.call(FINALIZE, key="k", version=V, size_bytes=str(len(DATA)))["entry_id"].isdigit()
    assert client.find("k") == "k"
    assert client.call(CREATE, key="k", version=V, status=409)["code"] == "already_exists"
    # a scope and a version of their own each
    assert other.create("k")
    assert client.create("k", W)


def test_only_what_was_uploaded_is_finalized(join: Callable[..., Client]) -> None:
    client, other = join(), join("refs/heads/topic")
    url = client.create("k")
    size = str(len(DATA))
    assert client.finalize("k", 0)["ok"] is False, "nothing was uploaded"
    client.send("PUT", url, DATA, BLOCK_BLOB)
    refused = client.finalize("k", len(DATA) - 1)
    assert (refused["ok"], bool(refused["message"])) == (False, True)
    assert client.call(FINALIZE, key="k", version=V)["ok"] is False
    assert other.call(FINALIZE, key="k", version=V, size_bytes=size, status=404)["code"] == "not_found"
    assert client.call(FINALIZE, key="k", version=W, size_bytes=size, status=404)["code"] == "not_found"
    assert client.find("k") == ""
    assert client.finalize("k", len(DATA))["ok"] is True
    assert client.call(FINALIZE, key="k", version=V, size_bytes=size, status=404)["code"] == "not_found"


def test_lookups_go_by_scope_then_key_exact_before_newest(join: Callable[..., Client]) -> None:
    main, topic, merge = join(), join("refs/heads/topic"), join("refs/pull/7/merge")
    for key in ("k-1", "k-2", "k", "other"):
        main.save(key)
    assert main.find("k") == "k"
    assert main.find("k-") == "k-2", "the key is a prefix too, of the newest"
    assert main.find("none", "k-", "other") == "k-2"
    assert main.find("none", "other", "k-") == "other"
    assert main.find("none", "none") == ""
    assert main.find("-1") == ""
    assert main.find("k", version=W) == ""

    topic.save("k-0")
    assert topic.find("k-2") == "k-2", "the scope of the default branch is seen by all"
    assert topic.find("k-") == "k-0", "its own comes first"
    assert topic.find("k-2", "k-") == "k-0", "for all keys"
    assert main.find("k-0") == ""
    merge.save("pull")
    assert merge.find("pull") == "pull"
    assert merge.find("k-2") == "k-2"
    assert main.find("pull") == topic.find("pull") == merge.find("k-0") == ""


def test_another_default_branch() -> None:
    with Service(default_branch="refs/heads/trunk") as service:
        trunk, main = Client(service), Client(service, "refs/heads/main")
        trunk.save("k")
        assert main.find("k") == "k"
        main.save("own")
        assert trunk.find("own") == ""
        trunk.connection.close()
        main.connection.close()


def test_a_token_permits_only_what_it_is_for(service: Service, join: Callable[..., Client]) -> None:
    main, reader, writer = join(), join(write=False), join(read=False)
    main.save("k")
    assert reader.find("k") == "k"
    for method in (CREATE, FINALIZE):
        fields = {"size_bytes": "1"} if method == FINALIZE else {}
        denied = reader.call(method, key="n", version=V, **fields)
        assert denied["ok"] is False
        assert denied["message"].startswith("cache write denied:")
    writer.save("w")
    denied = writer.call(GET, key="k", version=V, status=403)
    assert denied["code"] == "permission_denied"
    assert denied["msg"].startswith("cache read denied:")
    assert len(service.entries()) == 2


@pytest.mark.parametrize(
    ("mode", "reads", "writes"),
    [
        (None, True, True),
        ("write", True, True),
        ("read", True, False),
        ("write-only", False, True),
        ("none", False, False),
    ],
)
def test_the_environment_of_a_job(
    service: Service, client: Client, mode: str | None, reads: bool, writes: bool
) -> None:
    variables = service.environment("refs/heads/topic", mode)
    assert variables["ACTIONS_RESULTS_URL"] == service.url
    assert service.url.endswith("/")
    assert variables.get("ACTIONS_CACHE_MODE") == mode
    assert variables["ACTIONS_CACHE_SERVICE_V2"] == "True"
    assert (variables["GITHUB_ACTIONS"], variables["GITHUB_REF"]) == ("true", "refs/heads/topic")
    client.token = variables["ACTIONS_RUNTIME_TOKEN"]
    assert client.call(CREATE, key="k", version=V)["ok"] is writes
    assert [entry.scope for entry in service.entries()] == ["refs/heads/topic"] * writes
    client.call(GET, key="k", version=V, status=200 if reads else 403)
    assert service.environment(token="t")["ACTIONS_RUNTIME_TOKEN"] == "t"


def test_uploads_are_limited(service: Service, client: Client) -> None:
    for i in range(200):
        client.create(f"k{i}")
    headers = {"Authorization": f"Bearer {client.token}", "Content-Type": "application/json"}
    status, got, body = client.send("POST", TWIRP + CREATE, json.dumps({"key": "k", "version": V}), headers)
    assert (status, json.loads(body)["code"]) == (429, "resource_exhausted")
    assert 50 <= int(got["Retry-After"]) <= 60
    assert client.find("k") == "", "nothing else is"
    service.limit_uploads(0, 60)
    client.call(CREATE, key="k", version=V, status=429)
    service.limit_uploads(1, 0.05)
    time.sleep(0.06)
    client.create("k")
    client.call(CREATE, key="l", version=V, status=429)


# -- blobs ----------------------------------------------------------------------------------------------------------


def test_urls_permit_one_thing_on_one_blob_for_a_while(service: Service, client: Client) -> None:
    upload = client.create("k")
    client.send("PUT", upload, DATA, BLOCK_BLOB)
    client.finalize("k", len(DATA))
    client.save("other")
    download, other = client.url("k"), client.url("other")

    def refusal(verb: str, url: str) -> tuple[int, str]:
        status, headers, _ = client.send(verb, url, DATA if verb == "PUT" else None, BLOCK_BLOB)
        return status, headers["x-ms-error-code"]

    assert client.send("GET", download)[0] == client.send("HEAD", download)[0] == 200
    assert refusal("GET", upload) == refusal("HEAD", upload) == (403, "AuthorizationPermissionMismatch")
    assert refusal("PUT", download) == (403, "AuthorizationPermissionMismatch")
    assert refusal("DELETE", upload) == (405, "UnsupportedHttpVerb")
    forged = (403, "AuthenticationFailed")
    assert refusal("GET", download.replace("sig=", "sig=A")) == forged
    assert refusal("PUT", download.replace("sp=r", "sp=cw")) == forged
    assert refusal("GET", download.replace("se=20", "se=30")) == forged
    assert refusal("GET", other.partition("?")[0] + "?" + download.partition("?")[2]) == forged
    assert refusal("GET", download.partition("?")[0]) == forged

    service.url_lifetime = -1
    assert refusal("GET", client.url("k")) == forged
    service.url_lifetime = 600
    service.expire_urls()
    assert refusal("GET", download) == refusal("PUT", upload) == forged
    assert client.read("k") == DATA


def test_a_blob_is_put_in_one_piece(service: Service, client: Client) -> None:
    url = client.create("k")
    for headers in ({}, {"x-ms-blob-type": "PageBlob"}):
        assert client.send("PUT", url, DATA, headers)[0] == 400
    assert client.finalize("k", len(DATA))["ok"] is False
    status, headers, _ = client.send("PUT", url, DATA, BLOCK_BLOB)
    assert (status, bool(headers["ETag"]), bool(headers["Last-Modified"])) == (201, True, True)
    assert headers["x-ms-request-id"]
    assert service.blob("k") == DATA
    assert client.send("PUT", f"{url}&comp=blocklist", block_list(block_id("0001")))[0] == 400
    client.connection.putrequest("PUT", urlsplit(url).path + "?" + urlsplit(url).query)
    client.connection.endheaders()  # without a length: what follows could not be told from the next request
    response = client.connection.getresponse()
    assert (response.status, response.headers["Connection"], response.read()) == (411, "close", b"")
    assert service.blob("k") == DATA


def test_a_blob_is_put_in_blocks(service: Service, client: Client) -> None:
    url = client.create("k")
    first, second, unused = map(block_id, ("0001", "0002", "0003"))
    for name, data in ((second, b"two"), (first, b"old"), (unused, b"no"), (first, b"one")):
        assert client.send("PUT", f"{url}&comp=block&blockid={name}", data)[0] == 201
    assert client.finalize("k", 6)["ok"] is False
    assert client.send("GET", service.url[:-1] + service.blobs.url(service.entries()[0].blob, "r", 600))[0] == 404
    for _ in range(2):  # sent again, as the first answer may be lost
        status, headers, _ = client.send("PUT", f"{url}&comp=blocklist", block_list(first, second))
        assert (status, bool(headers["ETag"])) == (201, True)
    assert client.finalize("k", 6)["ok"] is True
    assert service.blob("k") == b"onetwo"
    assert client.send("PUT", f"{url}&comp=blocklist", block_list(first, unused))[0] == 400, "the rest was dropped"
    assert client.send("PUT", f"{url}&comp=blocklist", block_list(second, first, second))[0] == 201
    assert service.blob("k") == b"twoonetwo"


@pytest.mark.parametrize(
    ("query", "body", "code"),
    [
        ("comp=block", b"x", "InvalidBlobOrBlock"),
        ("comp=block&blockid=", b"x", "InvalidBlobOrBlock"),
        ("comp=block&blockid=a", b"x", "InvalidBlobOrBlock"),
        ("comp=block&blockid=AAAA%21AAA", b"x", "InvalidBlobOrBlock"),
        ("comp=block&blockid=" + block_id("00002"), b"x", "InvalidBlobOrBlock"),
        ("comp=block&blockid=" + block_id("a" * 65), b"x", "InvalidBlobOrBlock"),
        ("comp=blocklist", block_list(block_id("0002")), "InvalidBlockList"),
        ("comp=blocklist", b"<BlockList>", "InvalidXmlDocument"),
        ("comp=blocklist", b"", "InvalidXmlDocument"),
        ("comp=blocklist", b"<List/>", "InvalidXmlNodeValue"),
        ("comp=blocklist", b"<BlockList><Block>AAAA</Block></BlockList>", "InvalidXmlNodeValue"),
        ("comp=metadata", b"", "InvalidQueryParameterValue"),
    ],
)
def test_wrong_blocks_are_refused(client: Client, query: str, body: bytes, code: str) -> None:
    url = client.create("k")
    good = f"{url}&comp=block&blockid={block_id('0001')}"
    if block_id("00002") in query:
        assert client.send("PUT", good, b"x")[0] == 201
    status, headers, text = client.send("PUT", f"{url}&{query}", body)
    assert (status, headers["x-ms-error-code"]) == (400, code)
    assert f"<Code>{code}</Code>".encode() in text
    assert client.send("PUT", good, b"x")[0] == 201
    assert client.send("PUT", f"{url}&comp=blocklist", block_list(block_id("0001")))[0] == 201


def test_a_blob_has_so_many_blocks(service: Service, client: Client) -> None:
    assert isinstance(service.blobs, Blobs)
    assert service.blobs.max_blocks == 50_000
    service.blobs.max_blocks = 2
    url = client.create("k")
    for name, status in (("0", 201), ("1", 201), ("2", 409), ("1", 201)):
        assert client.send("PUT", f"{url}&comp=block&blockid={block_id(name)}", b"x")[0] == status
    for ids, status in (("011", 400), ("01", 201)):
        assert client.send("PUT", f"{url}&comp=blocklist", block_list(*map(block_id, ids)))[0] == status


@pytest.mark.parametrize("name", ["Range", "x-ms-range"])
@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("bytes=0-9", 0, 10), ("bytes=5-5", 5, 6), ("bytes=2000-", 2000, 2048), ("bytes=2000-9999", 2000, 2048)],
)
def test_ranges(service: Service, client: Client, name: str, asked: str, start: int, end: int) -> None:
    client.save("k")
    status, headers, data = client.send("GET", client.url("k"), headers={name: asked})
    assert (status, data) == (206, DATA[start:end])
    assert headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(DATA)}"
    assert headers["Content-Length"] == str(end - start)
    assert service.log[-1].range == asked
    assert service.downloaded_bytes == end - start


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("bytes=2048-", 416),
        ("bytes=9999-10000", 416),
        ("bytes=-5", 400),
        ("bytes=5-4", 400),
        ("bytes=0-1,3-4", 400),
        ("0-1", 400),
    ],
)
def test_wrong_ranges_are_refused(client: Client, asked: str, status: int) -> None:
    client.save("k")
    got, headers, data = client.send("GET", client.url("k"), headers={"Range": asked})
    assert (got, DATA in data) == (status, False)
    if status == 416:
        assert headers["Content-Range"] == "bytes */2048"


def test_a_blob_can_be_asked_about(service: Service, client: Client) -> None:
    client.save("k")
    url = client.url("k")
    status, headers, data = client.send("HEAD", url)
    assert (status, headers["Content-Length"], data) == (200, "2048", b"")
    for etag, expected in ((headers["ETag"], 200), ("*", 200), ('"other"', 412)):
        assert client.send("GET", url, headers={"If-Match": etag})[0] == expected
    service.replace("k", DATA[::-1])
    assert client.send("GET", url, headers={"If-Match": headers["ETag"]})[0] == 412, "it is another now"
    assert client.send("GET", service.url[:-1] + CONTAINER + "none")[0] == 403, "not told whether there is one"


# -- what tests can do ----------------------------------------------------------------------------------------------


def test_entries_can_be_changed(service: Service, join: Callable[..., Client]) -> None:
    client, topic = join(), join("refs/heads/topic")
    for key in ("a", "b", "c", "d"):
        client.save(key, key.encode() * 100)
    service.swap("a", "b")
    service.replace("c", b"poison")
    service.truncate("d", 3)
    assert [client.read(key) for key in "abcd"] == [b"b" * 100, b"a" * 100, b"poison", b"ddd"]

    url = client.url("a")
    service.evict("a")
    assert client.find("a") == ""
    assert client.send("GET", url)[0] == 404
    client.create("a")
    service.lose("b")
    assert client.find("b") == "b"
    assert client.send("GET", client.url("b"))[0] == client.send("HEAD", client.url("b"))[0] == 404

    topic.save("c", b"topic")
    assert (service.blob("c"), service.blob("c", "refs/heads/main")) == (b"topic", b"poison")
    service.evict("c", "refs/heads/topic")
    assert topic.read("c") == b"poison"
    with pytest.raises(KeyError):
        service.blob("none")


def test_requests_are_logged_without_signatures(service: Service, client: Client) -> None:
    url = client.create("k")
    client.send("PUT", f"{url}&comp=block&blockid={block_id('01')}", DATA)
    client.send("PUT", f"{url}&comp=blocklist", block_list(block_id("01")))
    client.finalize("k", len(DATA))
    client.read("k")
    client.send("GET", url)
    path = urlsplit(url).path
    assert [(logged.kind, logged.method, logged.path, logged.status) for logged in service.log] == [
        ("twirp", CREATE, TWIRP + CREATE, 200),
        ("blob", "PUT", f"{path}?comp=block&blockid={block_id('01').replace('=', '%3D')}", 201),
        ("blob", "PUT", f"{path}?comp=blocklist", 201),
        ("twirp", FINALIZE, TWIRP + FINALIZE, 200),
        ("twirp", GET, TWIRP + GET, 200),
        ("blob", "GET", path, 200),
        ("blob", "GET", path, 403),
    ]
    assert service.uploaded_bytes == len(DATA) + len(block_list(block_id("01")))
    assert service.log[-2].response_bytes == len(DATA)
    assert service.downloaded_bytes == len(DATA) + service.log[-1].response_bytes
    assert (service.count("PUT"), service.count(CREATE), service.count("HEAD")) == (2, 1, 0)


def test_faults_meet_the_requests_they_are_for(service: Service, client: Client) -> None:
    client.save("k")
    service.fault(GET, answer(503, {"Retry-After": "0"}), times=2)
    service.fault("PUT", answer(500), when=lambda request: request.query.get("comp") == "blocklist")
    service.fault("GET", redirect("http://127.0.0.1:1/"))
    url = client.create("other")
    assert client.send("PUT", url, b"x", BLOCK_BLOB)[0] == 201
    assert client.send("PUT", f"{url}&comp=blocklist", block_list())[0] == 500
    for _ in range(2):
        assert client.call(GET, key="k", version=V, status=503)["code"] == "unavailable"
    status, headers, _ = client.send("GET", client.url("k"))
    assert (status, headers["Location"]) == (302, "http://127.0.0.1:1/")
    assert client.read("k") == DATA
    assert service.faults == []
    assert service.blob("other") == b"x", "a list that was answered for is not committed"


@pytest.mark.parametrize(
    ("action", "status", "expected"),
    [(corrupt(0), 206, b"\x0b\x0b"), (corrupt(), 206, b"\x0a\x0a"), (whole(), 200, DATA)],
)
def test_faults_change_the_answer(
    service: Service, client: Client, action: Action, status: int, expected: bytes
) -> None:
    client.save("k")
    url = client.url("k")
    service.fault("GET", action)
    got, _, data = client.send("GET", url, headers={"Range": "bytes=10-11"})
    assert (got, data) == (status, expected)


def test_faults_break_the_connection(service: Service, client: Client) -> None:
    client.save("k")
    url = client.url("k")
    service.fault("GET", cut(100))
    with pytest.raises(http.client.IncompleteRead) as caught:
        client.send("GET", url)
    assert caught.value.partial == DATA[:100]
    client.connection.close()

    service.fault(CREATE, lost())
    with pytest.raises(http.client.RemoteDisconnected):
        client.create("other")
    assert [entry.key for entry in service.entries()] == ["k", "other"], "it was done all the same"
    assert service.log[-1].status == 0

    service.fault("GET", endless())
    client.connection.request("GET", urlsplit(url).path + "?" + urlsplit(url).query)
    response = client.connection.getresponse()
    assert response.length is None
    assert len(response.read(10**7)) == 10**7
    response.close()


@pytest.mark.parametrize("after", [0, 100])
def test_a_fault_makes_the_answer_late(service: Service, client: Client, after: int) -> None:
    client.save("k")
    url = client.url("k")
    service.fault("GET", hang(0.05, after))
    began = time.monotonic()
    assert client.send("GET", url)[2] == DATA
    assert time.monotonic() - began >= 0.05

    service.fault("GET", hang(60, after))  # and does not keep the service from closing
    client.connection.close()
    client.connection.timeout = 0.05
    with pytest.raises(TimeoutError):
        client.send("GET", url)
    assert service.log[-1].response_bytes == after


def test_an_upload_that_breaks_off_changes_nothing(service: Service, client: Client) -> None:
    url = urlsplit(client.create("k"))
    with socket.create_connection(("127.0.0.1", url.port or 0)) as connection:
        head = f"PUT {url.path}?{url.query} HTTP/1.1\r\nx-ms-blob-type: BlockBlob\r\nContent-Length: 10\r\n\r\n"
        connection.sendall(head.encode() + b"12345")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert client.finalize("k", 5)["ok"] is False
    assert service.count("PUT") == 0
