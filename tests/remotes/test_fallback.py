from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
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
    own = entry.manifest.parts[part].index
    return [own, *(chunk.id for chunk in part_index.decode_chunks(repo.store.read(own)))]


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


def test_what_is_missing_is_fetched_by_a_load_and_kept(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, own, _ = pair
    empty(repo)
    assert states(repo) == {"model": "remote", "trainer": "remote"}
    assert list(repo.store.objects.iterdir()) == []
    assert availability(repo.part_states(repo.find(own))) == "full"
    assert exact(repo.load(own)) == exact(parts(3))
    assert states(repo) == {"model": "local", "trainer": "local"}
    (repo.root.parent / "elsewhere").rename(repo.root.parent / "gone")
    assert exact(repo.load(own)) == exact(parts(3))


def test_what_is_damaged_is_quarantined_and_fetched(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, own, _ = pair
    damaged = objects_of(repo, "model")
    for one in damaged:
        flip(repo.store.path(one))
    assert exact(repo.load(own)) == exact(parts(3))
    assert {name[:64] for name in os.listdir(repo.store.quarantine)} == set(damaged)
    assert all(hash_bytes(repo.store.read(one)) == one for one in damaged)


def test_an_index_is_kept_only_after_its_chunks(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, own, shared = pair
    own_index, chunk, *_ = objects_of(repo, "model")
    empty(repo)
    (shared / "objects" / chunk[:2] / chunk).unlink()
    assert states(repo)["model"] == "missing"
    with pytest.raises(ObjectMissing, match="part 'model'"):
        repo.load(own)
    assert not repo.store.has(own_index)


@pytest.mark.parametrize("role", [0, 1], ids=["index", "chunk"])
@pytest.mark.parametrize("trick", ["flipped", "other", "empty", "bomb", "link", "pipe", "folder"])
def test_a_hostile_remote_can_only_miss(pair: tuple[Repo, ObjectId, Path], trick: str, role: int) -> None:
    repo, own, shared = pair
    wanted = objects_of(repo, "model")
    target, other = wanted[role], wanted[1 - role]
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
        repo.load(own)
    assert (caught.value.object_id, caught.value.part, caught.value.manifest) == (target, "model", own)
    assert not repo.store.has(target)
    assert os.listdir(repo.store.temporary) == []


def test_damage_here_is_reported_as_such_when_no_remote_has_a_good_copy(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, own, shared = pair
    chunk = objects_of(repo, "model")[1]
    flip(repo.store.path(chunk))
    flip(shared / "objects" / chunk[:2] / chunk)
    with pytest.raises(CorruptObject, match="part 'model'"):
        repo.load(own)


def test_a_second_remote_is_asked_when_the_first_has_a_bad_copy(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, own, shared = pair
    good = shared.parent / "good"
    shutil.copytree(shared, good)
    for one in objects_of(repo, "model"):
        flip(shared / "objects" / one[:2] / one)
    (repo.root / "config.toml").write_text(f'[remotes]\nnowhere = "nowhere"\nshared = "elsewhere"\ngood = "{good}"\n')
    repo = Repo.open(repo.root)
    empty(repo)
    assert exact(repo.load(own)) == exact(parts(3))


def test_a_remote_is_never_written_to(pair: tuple[Repo, ObjectId, Path]) -> None:
    repo, own, shared = pair
    chunk = objects_of(repo, "model")[1]
    flip(shared / "objects" / chunk[:2] / chunk)
    before = tree(shared)
    empty(repo)
    with pytest.raises(ObjectMissing):
        repo.load(own)
    assert tree(shared) == before


def test_an_oversized_file_of_a_remote_is_not_read(tmp_path: Path) -> None:
    remote = Folder("big", tmp_path)
    own = hash_bytes(b"x")
    path = tmp_path / "objects" / own[:2] / own
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(MAX_STORED + 1)
    with pytest.raises(StorageError, match="at most"):
        remote.get(own)


def test_a_link_in_a_remote_is_not_followed(tmp_path: Path) -> None:
    remote = Folder("linked", tmp_path)
    own = hash_bytes(b"x")
    path = tmp_path / "objects" / own[:2] / own
    path.parent.mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"s")
    path.symlink_to(tmp_path / "secret")
    assert remote.has([own]) == set()
    with pytest.raises(StorageError):
        remote.get(own)


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
    made = []
    for name in ("a", "b"):
        own = hash_bytes(rng.randbytes(10))
        path = tmp_path / name / "objects" / own[:2] / own
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        made.append(own)
    both = [Folder(name, tmp_path / name) for name in ("a", "b", "c")]
    assert fallback.having(both, [*made, hash_bytes(b"")]) == set(made)


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
