"""Fetching what a checkpoint lacks, from remotes of any kind."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from builders import parts

from castore import Repo, transfer
from castore.errors import ObjectMissing, RemoteUnavailable
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.remotes.folder import Folder


class Down(Folder):
    """A remote that says it has everything and gives nothing."""

    def get(self, object_id: ObjectId) -> bytes | None:
        raise RemoteUnavailable(self.name, f"down when asked for {object_id[:4]}")


@pytest.fixture
def emptied(repo: Repo, tmp_path: Path) -> tuple[Repo, Entry]:
    """A repository that lacks all objects of its checkpoint, and has no remotes; they are in the folder ``shared``."""
    saved = repo.save(parts(3), run="ci", step=1)
    shutil.copytree(repo.store.objects, tmp_path / "shared" / "objects")
    shutil.rmtree(repo.store.objects)
    return repo, repo.find(saved.id)


def test_everything_is_fetched_once_and_progress_ends_at_the_total(emptied: tuple[Repo, Entry], tmp_path: Path) -> None:
    repo, entry = emptied
    repo.remotes.append(Folder("shared", tmp_path / "shared"))
    told: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        threads.add(threading.get_ident())
        told.append((done, total))

    pulled = repo.fetch(entry, progress=progress)
    assert pulled.objects == len(list((tmp_path / "shared").rglob("?" * 64)))
    assert pulled.bytes > sum(part.bytes for part in entry.manifest.parts.values())  # and the indexes
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    assert threads == {threading.get_ident()}
    assert pulled.remote_errors == {}
    assert repo.fetch(entry, progress=progress) == transfer.Pulled(0, 0)


def test_a_remote_that_was_passed_over_is_told_of(emptied: tuple[Repo, Entry], tmp_path: Path) -> None:
    repo, entry = emptied
    shutil.copytree(tmp_path / "shared", tmp_path / "flipped")
    for path in (tmp_path / "flipped").rglob("?" * 64):
        path.write_bytes(path.read_bytes()[:-1])
    repo.remotes += [
        Down("down", tmp_path / "shared"),
        Folder("flipped", tmp_path / "flipped"),
        Folder("good", tmp_path / "shared"),
    ]
    pulled = repo.fetch(entry)
    assert pulled.remote_errors.keys() == {"down", "flipped"}
    assert "down when asked for" in pulled.remote_errors["down"]
    assert "is corrupt" in pulled.remote_errors["flipped"]


def test_what_nobody_has_is_named_and_an_index_is_not_kept_without_it(
    emptied: tuple[Repo, Entry], tmp_path: Path
) -> None:
    repo, entry = emptied
    repo.remotes.append(Folder("shared", tmp_path / "shared"))
    indexes = {part.index for part in entry.manifest.parts.values()}
    chunk = next(path for path in (tmp_path / "shared").rglob("?" * 64) if path.name not in indexes)
    chunk.unlink()
    with pytest.raises(ObjectMissing) as caught:
        repo.fetch(entry)
    assert caught.value.object_id == chunk.name
    assert not indexes & repo.store.stored().keys()
