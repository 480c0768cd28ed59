"""The conformance suite, and a push and a fetch, on object stores that nobody here wrote."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("conformance")

from azurite import ACCOUNT, CONTAINER, KEY, Azurite  # noqa: E402
from buckets import BUCKET, S3Server, rclone, seaweedfs  # noqa: E402
from builders import parts  # noqa: E402
from conformance import BucketShelf, PublishingConformance  # noqa: E402

from castore import Repo  # noqa: E402
from castore.format.manifest import Entry  # noqa: E402
from castore.remotes import registry  # noqa: E402
from castore.remotes.bucket import Bucket  # noqa: E402

PROGRAMS = Path(__file__).parents[2] / "build" / "peers" / "venv" / "bin"


class PeerShelf(BucketShelf):
    """A folder of its own in a bucket of a server, reached by URL and environment."""

    def __init__(self, scheme: str = "s3", bucket: str = BUCKET) -> None:
        url = f"{scheme}://{bucket}/{uuid.uuid4().hex}"
        super().__init__(Bucket("stocking", url)._store, url)

    def open(self) -> Bucket:
        remote = registry.open_remote("bucket", self.url, Path())
        assert isinstance(remote, Bucket)
        return remote


@pytest.fixture(scope="module")
def programs() -> Path:
    if not PROGRAMS.is_dir():
        pytest.fail("the programs to test against are not installed: run `make test-peers`")
    return PROGRAMS


@pytest.fixture(scope="module")
def weed(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = seaweedfs(programs, tmp_path_factory.mktemp("seaweedfs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def dumb(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = rclone(programs, tmp_path_factory.mktemp("rclone"))
    yield server
    server.close()


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def in_weed(weed: S3Server, monkeypatch: pytest.MonkeyPatch) -> PeerShelf:
    use(weed, monkeypatch)
    return PeerShelf()


@pytest.fixture
def in_rclone(dumb: S3Server, monkeypatch: pytest.MonkeyPatch) -> PeerShelf:
    use(dumb, monkeypatch)
    return PeerShelf()


@pytest.fixture
def in_azurite(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> PeerShelf:
    import base64

    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(KEY).decode())
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite.base)
    return PeerShelf("az", CONTAINER)


class TestSeaweedFS(PublishingConformance):
    remote_class = Bucket

    @pytest.fixture
    def shelf(self, in_weed: PeerShelf) -> PeerShelf:
        return in_weed


class TestRclone(PublishingConformance):
    remote_class = Bucket
    creates = False

    @pytest.fixture
    def shelf(self, in_rclone: PeerShelf) -> PeerShelf:
        return in_rclone


class TestAzurite(PublishingConformance):
    remote_class = Bucket

    @pytest.fixture
    def shelf(self, in_azurite: PeerShelf) -> PeerShelf:
        return in_azurite


@pytest.mark.parametrize("shelf", ["in_weed", "in_rclone", "in_azurite"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_was_pushed_is_loaded_by_another_machine(
    request: pytest.FixtureRequest,
    repo: Repo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shelf: str,
    packed: bool,
) -> None:
    stocked: Any = request.getfixturevalue(shelf)
    if packed:
        monkeypatch.setattr("castore.transfer.PACK_ABOVE", 1)
    saved = repo.save(parts(3), run="main", step=1)
    entry = Entry(saved.id, saved.manifest)
    remote = stocked.open()
    assert repo.push([entry], remote).objects == len(repo.store.stored())
    assert repo.push([entry], stocked.open()).objects == 0
    (tmp_path / "other").mkdir()
    other = Repo.init(tmp_path / "other")
    other.fetch(entry, remotes=[stocked.open()])
    assert other.store.stored().keys() == repo.store.stored().keys()
