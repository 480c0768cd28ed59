from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact, parts, tree

from castore import Repo
from castore.errors import CorruptObject, ObjectMissing, StorageError
from castore.format import part_index
from castore.format.frame import MAX_STORED
from castore.format.ids import ObjectId, hash_bytes
from castore.policy.resolution import availability
from castore.remotes import fallback
from castore.remotes.folder import Folder


@pytest.fixture
def pair(repo: Repo, tmp_path: Path) -> tuple[Repo, ObjectId, Path]:
    """A repository with a checkpoint, and a remote that has all of its objects."""
    saved = repo.save(parts(3), run="ci", step=1)
    shared = tmp_path / "elsewhere"
    shutil.copytree(repo.store.objects, shared / "objects")
    with open(repo.root / "config.toml", "a") as file:
        file.write('[remotes]\nshared = "elsewhere"\n')
    return Repo.open(tmp_path), saved.id, shared


def objects_of(repo: Repo, part: str) -> list[ObjectId]:
    """The index of a part of the only checkpoint, then its chunks."""
    (entry,) = repo.checkpoints()
    index_id = entry.manifest.parts[part].index
    return [index_id, *(chunk.id for chunk in part_index.decode_chunks(repo.store.read(index_id)))]


def empty(repo: Repo) -> None:
    shutil.rmtree(repo.store.objects)
    repo.store.objects.mkdir()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def states(repo: Repo) -> dict[str, str]:
    (entry,) = repo.checkpoints()
    return {name: state.where for name, state in repo.part_states(entry).items()}


class Crowded:
    """A remote that answers once four have asked for chunks."""

    def __init__(self, remote: Folder) -> None:
        self._remote = remote
        self.together = threading.Barrier(4)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)

    def get(self, object_id: ObjectId) -> bytes | None:
        frame = self._remote.get(object_id)
        if frame is not None and len(frame) > CHUNK // 2:
            self.together.wait(30)
        return frame


CHUNK = 64 << 10


@pytest.mark.parametrize("ask", ["load", "outline", "load_tensors"])
def test_what_a_load_lacks_is_fetched_by_more_threads_than_compute(repo: Repo, tmp_path: Path, ask: str) -> None:
    (repo.root / "config.toml").write_text(f"[store]\nchunk_size = '{CHUNK}'\nthreads = 1\nfsync = false\n")
    repo = Repo.open(repo.root.parent)
    state = {"a": torch.randint(0, 256, (8 * CHUNK,), dtype=torch.uint8)}
    saved = repo.save({"model": state}, run="ci", step=1)
    shutil.copytree(repo.store.objects, tmp_path / "elsewhere" / "objects")
    empty(repo)
    repo.remotes.append(remote := Crowded(Folder("elsewhere", tmp_path / "elsewhere")))
    if ask == "load":
        assert exact(repo.load(saved.id)["model"]) == exact(state)
    elif ask == "outline":
        assert repo.outline(saved.id, ["model"])["model"]["a"].shape == state["a"].shape
    else:
        assert exact(repo.load_tensors(saved.id, ["a"])["model"]) == exact(state)
    assert not remote.together.broken
    assert states(repo) == {"model": "local"} or ask == "load_tensors"


def test_what_is_missing_is_fetched_by_a_load_and_kept(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, checkpoint_id, _ = pair
    empty(repo)
    assert states(repo) == {"model": "remote", "trainer": "remote"}
    assert list(repo.store.objects.iterdir()) == []
    assert availability(repo.part_states(repo.find(checkpoint_id))) == "full"
    assert exact(repo.load(checkpoint_id)) == exact(parts(3))
    assert states(repo) == {"model": "local", "trainer": "local"}
    (repo.root.parent / "elsewhere").rename(repo.root.parent / "gone")
    assert exact(repo.load(checkpoint_id)) == exact(parts(3))


def test_what_is_damaged_is_quarantined_and_fetched(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, checkpoint_id, _ = pair
    damaged = objects_of(repo, "model")
    for damaged_id in damaged:
        flip(repo.store.path(damaged_id))
    assert exact(repo.load(checkpoint_id)) == exact(parts(3))
    assert {name[:64] for name in os.listdir(repo.store.quarantine)} == set(damaged)
    assert all(hash_bytes(repo.store.read(damaged_id)) == damaged_id for damaged_id in damaged)


def test_an_index_is_kept_only_after_its_chunks(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, checkpoint_id, shared = pair
    own_index, chunk, *_ = objects_of(repo, "model")
    empty(repo)
    (shared / "objects" / chunk[:2] / chunk).unlink()
    assert states(repo)["model"] == "missing"
    with pytest.raises(ObjectMissing, match="part 'model'"):
        repo.load(checkpoint_id)
    assert not repo.store.has(own_index)


@pytest.mark.parametrize("role", [0, 1], ids=["index", "chunk"])
@pytest.mark.parametrize("trick", ["flipped", "other", "empty", "bomb", "link", "pipe", "folder"])
def test_a_hostile_remote_can_only_miss(pair: tuple[Repo, ObjectId, Path], trick: str, role: int) -> None:
    repo, checkpoint_id, shared = pair
    object_ids = objects_of(repo, "model")
    target, other = object_ids[role], object_ids[1 - role]
    path = shared / "objects" / target[:2] / target
    frame = path.read_bytes()
    path.unlink()
    match trick:
        case "flipped":
            path.write_bytes(frame[:-1] + bytes([frame[-1] ^ 1]))
        case "other":
            path.write_bytes((shared / "objects" / other[:2] / other).read_bytes())
        case "empty":
            path.write_bytes(b"")
        case "bomb":
            path.write_bytes(frame[:8] + (1 << 60).to_bytes(8, "little") + frame[16:])
        case "link":
            path.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    empty(repo)
    with pytest.raises(ObjectMissing) as caught:
        repo.load(checkpoint_id)
    assert (caught.value.object_id, caught.value.part, caught.value.manifest) == (target, "model", checkpoint_id)
    assert not repo.store.has(target)
    assert os.listdir(repo.store.temporary) == []


def test_damage_here_is_reported_as_such_when_no_remote_has_a_good_copy(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, checkpoint_id, shared = pair
    chunk = objects_of(repo, "model")[1]
    flip(repo.store.path(chunk))
    flip(shared / "objects" / chunk[:2] / chunk)
    with pytest.raises(CorruptObject, match="part 'model'"):
        repo.load(checkpoint_id)


def test_a_second_remote_is_asked_when_the_first_has_a_bad_copy(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, checkpoint_id, shared = pair
    good = shared.parent / "good"
    shutil.copytree(shared, good)
    for damaged_id in objects_of(repo, "model"):
        flip(shared / "objects" / damaged_id[:2] / damaged_id)
    (repo.root / "config.toml").write_text(f'[remotes]\nnowhere = "nowhere"\nshared = "elsewhere"\ngood = "{good}"\n')
    repo = Repo.open(repo.root)
    empty(repo)
    assert exact(repo.load(checkpoint_id)) == exact(parts(3))


def test_a_remote_is_never_written_to(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, checkpoint_id, shared = pair
    chunk = objects_of(repo, "model")[1]
    flip(shared / "objects" / chunk[:2] / chunk)
    before = tree(shared)
    empty(repo)
    with pytest.raises(ObjectMissing):
        repo.load(checkpoint_id)
    assert tree(shared) == before


def test_an_oversized_file_of_a_remote_is_not_read(tmp_path: Path) -> None:
    remote = Folder("big", tmp_path)
    target = hash_bytes(b"x")
    path = tmp_path / "objects" / target[:2] / target
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(MAX_STORED + 1)
    with pytest.raises(StorageError, match="at most"):
        remote.get(target)


def test_a_link_in_a_remote_is_not_followed(tmp_path: Path) -> None:
    remote = Folder("linked", tmp_path)
    target = hash_bytes(b"x")
    path = tmp_path / "objects" / target[:2] / target
    path.parent.mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"s")
    path.symlink_to(tmp_path / "secret")
    assert remote.has([target]) == set()
    with pytest.raises(StorageError):
        remote.get(target)


@pytest.mark.parametrize("place", ["absolute", "relative"])
def test_a_relative_path_starts_where_the_project_lives(
    pair: tuple[Repo, ObjectId, Path], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, _, shared = pair
    (repo.root / "config.toml").write_text(
        f'[remotes]\na = "{shared if place == "absolute" else "elsewhere"}"\n'
    )  # fmt: skip
    monkeypatch.chdir("/")
    (remote,) = Repo.open(repo.root).remotes
    some = objects_of(repo, "model")
    assert remote.has([*some, hash_bytes(b"unknown")]) == set(some)


def test_having_asks_each_for_what_the_others_lack(tmp_path: Path, rng: random.Random) -> None:
    stored = []
    for name in ("a", "b"):
        target = hash_bytes(rng.randbytes(10))
        path = tmp_path / name / "objects" / target[:2] / target
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        stored.append(target)
    both = [Folder(name, tmp_path / name) for name in ("a", "b", "c")]
    assert fallback.available(both, [*stored, hash_bytes(b"")]) == set(stored)


def test_the_state_of_a_part_needs_all_missing_chunks_in_remotes(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, _, shared = pair
    _, first, second, *_ = objects_of(repo, "model")
    repo.store.path(first).unlink()
    assert states(repo)["model"] == "remote"
    repo.store.path(second).unlink()
    (shared / "objects" / second[:2] / second).unlink()
    (entry,) = repo.checkpoints()
    assert repo.part_states(entry)["model"].where == "missing"
    assert "1 of its" in repo.part_states(entry)["model"].reason


def test_an_error_of_a_remote_is_passed_over_and_logged(
    pair: tuple[Repo, ObjectId, Path], caplog: pytest.LogCaptureFixture
) -> None:
    repo, checkpoint_id, shared = pair
    index_id = objects_of(repo, "model")[0]
    path = shared / "objects" / index_id[:2] / index_id
    path.unlink()
    path.symlink_to("/dev/zero")
    empty(repo)
    with caplog.at_level(logging.WARNING, "castore"), pytest.raises(ObjectMissing):
        repo.load(checkpoint_id)
    (record,) = caplog.records
    assert record.name == "castore.remotes.fallback"
    assert record.getMessage().startswith(f"remote shared passed over, asked for object {index_id[:12]}: can't read ")


def test_the_library_says_nothing_unless_it_is_asked() -> None:
    script = "import castore, logging; logging.getLogger('castore.remotes.fallback').warning('x')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == done.stdout == ""
