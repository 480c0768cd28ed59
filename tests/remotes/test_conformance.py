"""Every remote, held to the same conformance suite."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore, MemoryStore

pytest.register_assert_rewrite("conformance")

from actions_service import Service  # noqa: E402
from bucket_service import BucketService  # noqa: E402
from conformance import FRAMES, BucketShelf, Conformance, PublishingConformance  # noqa: E402

from castore.format import bundle  # noqa: E402
from castore.format.bundle import Record  # noqa: E402
from castore.format.frame import MAX_STORED  # noqa: E402
from castore.format.ids import ObjectId  # noqa: E402
from castore.progress import ignore_progress  # noqa: E402
from castore.remotes import registry  # noqa: E402
from castore.remotes.bucket import Bucket, Website  # noqa: E402
from castore.remotes.folder import Folder  # noqa: E402
from castore.remotes.github_cache import GitHubCache  # noqa: E402
from castore.remotes.github_service import CacheService  # noqa: E402


class FolderShelf:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def stock(self, contents: Mapping[ObjectId, bytes]) -> Folder:
        for object_id, data in contents.items():
            self._path(object_id).write_bytes(data)
        return Folder("shared", self.path)

    def stock_oversized(self, object_id: ObjectId) -> Folder:
        with open(self._path(object_id), "wb") as file:
            file.truncate(MAX_STORED + 1)
        return Folder("shared", self.path)

    def refuse_writes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "writev", fail)

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.path.rglob("*") if path.is_file()}

    def _path(self, object_id: ObjectId) -> Path:
        path = self.path / "objects" / object_id[:2] / object_id
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class TestFolder(PublishingConformance):
    remote_class = Folder

    @pytest.fixture
    def shelf(self, tmp_path: Path) -> FolderShelf:
        return FolderShelf(tmp_path / "shelf")


class TestBucketInMemory(PublishingConformance):
    remote_class = Bucket

    @pytest.fixture
    def shelf(self) -> BucketShelf:
        return BucketShelf(MemoryStore())


class TestBucketInAFolder(PublishingConformance):
    remote_class = Bucket

    @pytest.fixture
    def shelf(self, tmp_path: Path) -> BucketShelf:
        return BucketShelf(LocalStore(tmp_path / "shelf", mkdir=True))


class S3Shelf(BucketShelf):
    """A folder of a bucket, reached as users reach it: by its URL and the environment."""

    def __init__(self, service: BucketService) -> None:
        self.service = service
        url = service.url()
        super().__init__(Bucket("stocking", url)._store, url)

    def open(self) -> Bucket:
        remote = registry.open_remote("bucket", self.url, Path())
        assert isinstance(remote, Bucket)
        return remote

    def refuse_writes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.service, "harm", lambda request: "403" if request.method == "PUT" else "")


class TestBucketInS3(PublishingConformance):
    remote_class = Bucket

    @pytest.fixture
    def shelf(self, s3: BucketService) -> S3Shelf:
        return S3Shelf(s3)


class TestBucketInS3WithoutConditions(PublishingConformance):
    """A service that ignores If-None-Match and ranges, as some do."""

    remote_class = Bucket
    creates = False

    @pytest.fixture
    def shelf(self, s3: BucketService, monkeypatch: pytest.MonkeyPatch) -> S3Shelf:
        monkeypatch.setattr(s3, "harm", lambda request: "no create" if request.method == "PUT" else "no ranges")
        return S3Shelf(s3)


class WebShelf:
    """A folder that a web server shows."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"

    def stock(self, contents: Mapping[ObjectId, bytes]) -> Website:
        for object_id, data in contents.items():
            path = self.folder / "objects" / object_id[:2] / object_id
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        remote = registry.open_remote("web", self.url, Path())
        assert isinstance(remote, Website)
        return remote

    def stock_oversized(self, object_id: ObjectId) -> Website:
        return self.stock({object_id: bytes(MAX_STORED + 1)})


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class TestWebsite(Conformance):
    remote_class = Website

    @pytest.fixture
    def shelf(self, tmp_path: Path) -> Iterator[WebShelf]:
        folder = tmp_path / "site"
        folder.mkdir()
        handler = functools.partial(QuietHandler, directory=str(folder))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield WebShelf(folder, server.server_address[1])
            server.shutdown()


class GitHubShelf:
    """One bundle whose record git has, so its index is honest; the bytes at its places may be anything."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def stock(self, contents: Mapping[ObjectId, bytes]) -> GitHubCache:
        if not contents:
            return GitHubCache(self._client(), [])
        layout = bundle.lay_out({object_id: len(data) for object_id, data in contents.items()})
        whole = bundle.HEADER + b"".join(contents.values()) + layout.tail
        key = GitHubCache(self._client(), []).upload(layout, lambda start, stop: whole[start:stop], ignore_progress)
        return GitHubCache(self._client(), [self._record(layout, key)])

    def stock_oversized(self, object_id: ObjectId) -> GitHubCache:
        layout = bundle.lay_out({object_id: MAX_STORED + 1})
        client = self._client()
        url = client.reserve("oversized")
        assert url is not None
        data = bundle.HEADER + bytes(MAX_STORED + 1) + layout.tail
        assert client.send(url, layout.size, lambda start, stop: data[start:stop], ignore_progress)
        client.finish("oversized", layout.size)
        return GitHubCache(self._client(), [self._record(layout, "oversized")])

    def _client(self) -> CacheService:
        return CacheService.of_job(self.service.environment())

    @staticmethod
    def _record(layout: bundle.Layout, key: str) -> Record:
        return Record(
            bundle=layout.id,
            key=key,
            created="2026-01-02T03:04:05.000006Z",
            bytes=layout.size,
            objects=len(layout.places),
            parts={object_id: [layout.id] for object_id in layout.places},
        )


class TestGitHubCache(Conformance):
    remote_class = GitHubCache

    @pytest.fixture
    def shelf(self) -> Iterator[GitHubShelf]:
        with Service() as service:
            yield GitHubShelf(service)


def test_every_class_in_the_registry_is_held_to_the_suite() -> None:
    covered = {suite.remote_class for suite in (TestFolder, TestBucketInS3, TestWebsite, TestGitHubCache)}
    assert set(registry.CLASSES.values()) <= covered


def test_the_suite_itself_has_good_frames() -> None:
    assert len(FRAMES) == 12
