"""The stand-in of the cache service is one that the official client, and with Azurite the blob store, agree with."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urljoin
from urllib.request import Request, urlopen

import pytest
from actions_service import Service, answer, redirect
from conftest import Official

pytestmark = pytest.mark.peers

Make = Callable[[dict[str, str]], Official]


def fill(folder: Path, size: int = 100_000) -> dict[str, bytes]:
    """Some files, one in a folder, that don't compress."""
    rng = random.Random(1)
    files = {"large": rng.randbytes(size), "inner/small": b"small", "empty": b""}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_saved_and_restored_by_another_job(any_service: Service, official: Make) -> None:
    saving, restoring = official(any_service.environment()), official(any_service.environment("refs/heads/topic"))
    files = fill(saving.workspace / "data")
    saved = saving.save("key-1", "data")
    (entry,) = any_service.entries()
    assert saved.result == entry.id, saved.said
    restored = restoring.restore("key-1", "data")
    assert restored.result == "key-1", restored.said
    assert contents(restoring.workspace / "data") == files


def test_misses_prefixes_and_scopes(any_service: Service, official: Make) -> None:
    topic, main = official(any_service.environment("refs/heads/topic")), official(any_service.environment())
    fill(topic.workspace / "data")
    assert topic.restore("key-1", "data").result is None
    topic.save("key-1", "data")
    assert topic.restore("key-2", "data").result is None
    assert topic.restore("key-2", "data", ["none", "key-"]).result == "key-1"
    assert topic.restore("key", "data").result == "key-1", "the key itself is a prefix"
    assert topic.restore("key-1", "other").result is None, "the path is part of the version"
    assert main.restore("key-1", "data").result is None
    any_service.evict("key-1")
    assert topic.restore("key-1", "data").result is None


def test_a_key_is_saved_once(any_service: Service, official: Make) -> None:
    client = official(any_service.environment())
    files = fill(client.workspace / "data")
    assert client.save("key", "data").result > 0
    (client.workspace / "data" / "large").write_bytes(b"other")
    again = client.save("key", "data")
    assert again.result == -1
    assert "Unable to reserve cache with key key, another job may be creating this cache." in again.said
    client.restore("key", "data")
    assert contents(client.workspace / "data") == files


def test_a_large_archive_goes_up_in_blocks_and_down_in_ranges(any_service: Service, official: Make) -> None:
    client = official(any_service.environment())
    files = fill(client.workspace / "data", 129 << 20)
    assert client.save("key", "data").result > 0
    if any_service.log[1].kind == "blob":
        assert sum("comp=block&" in logged.path for logged in any_service.log) == 3
        assert sum("comp=blocklist" in logged.path for logged in any_service.log) == 1
    (entry,) = any_service.entries()
    assert entry.size is not None
    assert entry.size > 129 << 20
    url = urljoin(any_service.url, any_service.blobs.url(entry.blob, "r", 600))
    assert client.download(url) == any_service.blob("key")
    assert client.restore("key", "data").result == "key"
    assert contents(client.workspace / "data") == files


def test_denials_are_told(service: Service, official: Make) -> None:
    reader = official(service.environment(token=service.token(write=False)))
    fill(reader.workspace / "data")
    denied = reader.save("key", "data")
    assert denied.result == -1
    assert "cache write denied:" in denied.said
    blind = official(service.environment(token=service.token(read=False)))
    denied = blind.restore("key", "data")
    assert denied.result is None
    assert "cache read denied:" in denied.said


@pytest.mark.parametrize(("mode", "calls"), [("read", ["Get"]), ("write-only", ["Create", "Finalize"]), ("none", [])])
def test_the_mode_is_heeded_without_asking(service: Service, official: Make, mode: str, calls: list[str]) -> None:
    client = official(service.environment(mode=mode))
    fill(client.workspace / "data")
    client.save("key", "data")
    client.restore("key", "data")
    called = [logged.method for logged in service.log if logged.kind == "twirp"]
    assert len(called) == len(calls)
    assert all(method.startswith(expected) for method, expected in zip(called, calls, strict=True))


def test_a_limit_is_no_reason_to_try_again(service: Service, official: Make) -> None:
    service.limit_uploads(0)
    client = official(service.environment())
    fill(client.workspace / "data")
    limited = client.save("key", "data")
    assert limited.result == -1
    assert "your rate limit will reset in 60 seconds" in limited.said
    assert service.count("CreateCacheEntry") == 1


def test_a_failure_is_one(service: Service, official: Make) -> None:
    client = official(service.environment())
    fill(client.workspace / "data")
    service.fault("CreateCacheEntry", answer(503))
    assert client.save("key", "data").result > 0
    assert service.count("CreateCacheEntry") == 2


def test_urls_that_ran_out_are_refused(any_service: Service, official: Make) -> None:
    client = official(any_service.environment())
    fill(client.workspace / "data")
    assert client.save("key", "data").result > 0
    any_service.url_lifetime = -60
    assert client.restore("key", "data").result is None
    refused = client.save("other", "data")
    assert refused.result == -1
    assert "internal error uploading cache archive" in refused.said


def test_a_redirected_download_is_followed(service: Service, official: Make) -> None:
    client = official(service.environment())
    files = fill(client.workspace / "data")
    client.save("key", "data")
    (entry,) = service.entries()
    service.fault("GET", redirect(urljoin(service.url, service.blobs.url(entry.blob, "r", 600))))
    assert client.restore("key", "data").result == "key"
    assert contents(client.workspace / "data") == files
    assert service.count("GET") == 2


def status(verb: str, url: str, body: bytes = b"x") -> int:
    """The status of the answer to a request."""
    headers = {} if "&comp=" in url else {"x-ms-blob-type": "BlockBlob"}
    try:
        with urlopen(Request(url, body if verb == "PUT" else None, headers, method=verb)) as response:
            return int(response.status)
    except HTTPError as error:
        error.close()
        return error.code


def test_both_blob_stores_refuse_alike(any_service: Service) -> None:
    def url(permissions: str, name: str = "one") -> str:
        return urljoin(any_service.url, any_service.blobs.url(name, permissions, 600))

    def stage(block_id: str) -> int:
        return status("PUT", f"{url('cw', 'two')}&comp=block&blockid={block_id}", block_id[:1].encode())

    def commit(*ids: str) -> int:
        listed = "".join(f"<Latest>{block}</Latest>" for block in ids)
        return status("PUT", url("cw", "two") + "&comp=blocklist", f"<BlockList>{listed}</BlockList>".encode())

    assert status("PUT", url("cw")) == 201
    assert status("GET", url("r")) == 200
    assert status("GET", url("cw")) == status("PUT", url("r")) == 403
    assert status("GET", url("r").replace("sp=r", "sp=rw")) == 403
    assert status("GET", url("r").replace("/one?", "/two?")) == 403
    assert status("GET", url("r", "none")) == 404
    assert stage("AAAA") == stage("BBBB") == 201
    assert status("GET", url("r", "two")) == 404
    assert stage("AAAAAAAA") == 400
    assert commit("AAAA", "CCCC") == 400
    assert status("GET", url("r", "two")) == 404
    assert commit("BBBB", "AAAA") == commit("BBBB", "AAAA") == 201
    assert any_service.blobs.read("two") == b"BA"
    assert status("PUT", url("cw", "two") + "&comp=blocklist", b"<BlockList>") == 400
