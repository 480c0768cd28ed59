"""What a save costs in syncs: none too many. That none is missing is shown by tests/test_crash_states.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import parts
from power_cuts import Operation, recording

from castore import Repo
from castore.storage import object_store

DURABLE = '[store]\nchunk_size = "64KiB"\nthreads = 2\n'


@pytest.fixture
def durable(tmp_path: Path) -> Repo:
    """A durable repository as it is after a clone: nothing that git ignores is there."""
    root = Repo.init(tmp_path).root
    (root / "config.toml").write_text(DURABLE)
    shutil.rmtree(root / "objects")
    shutil.rmtree(root / "tmp")
    return Repo.open(tmp_path)


def log_of(repo: Repo, action: Callable[[], object]) -> list[Operation]:
    with recording(repo.root) as record:
        action()
    return record.log


def synced_folders(log: list[Operation]) -> list[str]:
    return sorted(operation.path for operation in log if operation.kind == "sync folder")


@pytest.mark.parametrize("direct_bytes", [0, 1 << 30], ids=["direct", "buffered"])
def test_a_file_is_synced_once_and_a_folder_once(
    durable: Repo, monkeypatch: pytest.MonkeyPatch, direct_bytes: int
) -> None:
    monkeypatch.setattr(object_store, "_DIRECT_BYTES", direct_bytes)
    log = log_of(durable, lambda: durable.save(parts(1), run="ci", step=1))
    objects = list(durable.store.objects.glob("*/*"))
    kinds = [operation.kind for operation in log]
    assert kinds.count("rename") == len(objects)
    assert kinds.count("sync") == len(objects) + 1
    assert kinds.count("link") == 1
    folders = {f"objects/{path.parent.name}" for path in objects}
    # that the manifests' folder is sure is seen to before the manifest's own
    assert synced_folders(log) == sorted([".", "objects", *folders, "manifests", "manifests/ci"])


def test_a_hit_on_an_object_of_another_process_is_synced_like_a_write(durable: Repo) -> None:
    durable.save(parts(1), run="ci", step=1)
    other = Repo.open(durable.root.parent)  # has not seen these objects reach the disk
    log = log_of(durable, lambda: other.save(parts(1), run="ci", step=2))
    kinds = [operation.kind for operation in log]
    assert "rename" not in kinds
    folders = {f"objects/{path.name}" for path in durable.store.objects.iterdir()}
    assert set(synced_folders(log[: kinds.index("link")])) >= {*folders, "objects", ".", "manifests"}


def test_a_hit_on_what_this_process_has_synced_costs_no_sync_of_its_folder(durable: Repo) -> None:
    durable.save(parts(1), run="ci", step=1)
    log = log_of(durable, lambda: durable.save(parts(1), run="ci", step=2))
    assert synced_folders(log) == [".", "manifests", "manifests/ci", "objects"]


def test_without_fsync_in_the_settings_nothing_is_synced(repo: Repo) -> None:
    log = log_of(repo, lambda: repo.save(parts(1), run="ci", step=1))
    assert [operation for operation in log if "sync" in operation.kind] == []
    assert len(log) > 20
