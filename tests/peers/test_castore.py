"""castore's client and the official one see each other's entries, with either blob store."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from actions_service import Service as Cache
from conftest import Official

from castore.format import bundle
from castore.format.ids import ObjectId, hash_bytes
from castore.progress import ignore_progress
from castore.remotes import github_service
from castore.remotes.github_cache import GitHubCache
from castore.remotes.github_service import CacheService

pytestmark = pytest.mark.peers

Make = Callable[[dict[str, str]], Official]


def saved(cache: Cache, make: Make, monkeypatch: pytest.MonkeyPatch) -> tuple[str, bytes]:
    """An entry of the official client: its key, and what it holds. castore then looks where that client does."""
    official = make(cache.environment())
    (official.workspace / "folder").mkdir()
    (official.workspace / "folder" / "file").write_bytes(random.Random(1).randbytes(100_000))
    assert official.save("theirs", "folder").result > 0
    (entry,) = cache.entries()
    monkeypatch.setattr(github_service, "_VERSION", entry.version)
    return entry.key, cache.blob(entry.key)


def test_castore_reads_an_entry_of_the_official_client(
    any_service: Cache, official: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, data = saved(any_service, official, monkeypatch)
    service = CacheService.of_job(any_service.environment())
    url = service.look_up(key)
    assert url is not None
    assert service.read(url, 0, len(data)) == data
    assert service.read(url, 100, 250) == data[100:250]
    assert service.look_up("the") is None  # a prefix of a key is no key


@pytest.mark.parametrize("block", [16 << 20, 10_000])
def test_the_official_client_restores_an_entry_of_castore(
    any_service: Cache, official: Make, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    _, data = saved(any_service, official, monkeypatch)
    monkeypatch.setattr(github_service, "BLOCK", block)
    service = CacheService.of_job(any_service.environment())
    url = service.reserve("ours")
    assert url is not None
    assert service.send(url, len(data), lambda start, stop: data[start:stop], ignore_progress)
    service.finish("ours", len(data))
    other = official(any_service.environment())
    assert other.restore("ours", "folder").result == "ours"
    assert (other.workspace / "folder" / "file").read_bytes() == random.Random(1).randbytes(100_000)


@pytest.mark.parametrize("block", [16 << 20, 10_000])
def test_a_bundle_goes_into_azures_blobs_and_comes_back(
    any_service: Cache, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(github_service, "BLOCK", block)
    frames: dict[ObjectId, bytes] = {hash_bytes(bytes([i])): os.urandom(9_000) for i in range(8)}
    layout = bundle.lay_out({object_id: len(frame) for object_id, frame in frames.items()})
    data = bundle.HEADER + b"".join(frames.values()) + layout.tail
    key = GitHubCache(CacheService.of_job(any_service.environment()), []).upload(
        layout, lambda start, stop: data[start:stop], ignore_progress
    )
    record = bundle.Record(
        bundle=layout.id,
        key=key,
        created="2026-01-02T03:04:05.000006Z",
        bytes=layout.size,
        objects=len(frames),
        parts={},
    )
    remote = GitHubCache(CacheService.of_job(any_service.environment()), [record])
    assert {object_id: remote.get(object_id) for object_id in frames} == frames
