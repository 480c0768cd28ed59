"""gc where data is missing or damaged, the disk is full, or gc itself was killed."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact

import castore
from castore import Repo, errors
from castore.format.ids import ObjectId
from castore.policy.resolution import availability
from castore.policy.retention import Policy
from castore.storage import fs
from castore.verify import verify

ONE = Policy(keep=1, keep_latest=0, keep_optimizer=1)


def parts(seed: int) -> dict[str, Any]:
    weights = torch.randn(30_000, generator=torch.Generator().manual_seed(seed))
    return {"model": {"weights": weights}, "optimizer": {"first": weights * 0.1}, "trainer": {"step": seed}}


def save(repo: Repo, step: int, loss: float, **options: Any) -> ObjectId:
    return repo.save(options.pop("parts", parts(step)), run="r", step=step, metrics={"val_loss": loss}, **options).id


def index_of(repo: Repo, checkpoint_id: str, part: str = "model") -> ObjectId:
    return repo.find(checkpoint_id).manifest.parts[part].index


def chunk_of(repo: Repo, checkpoint_id: str, part: str = "model") -> ObjectId:
    from castore.format import part_index

    return part_index.decode_chunks(repo.store.read(index_of(repo, checkpoint_id, part)))[0].id


def state(repo: Repo, checkpoint_id: str) -> str:
    return availability(repo.part_states(repo.find(checkpoint_id)))


# -- what cannot be loaded takes no place ------------------------------------------------------------------------------


def test_better_checkpoints_without_a_model_do_not_push_out_live_ones(repo: Repo) -> None:
    """A part that all share, such as a tokenizer, is still there: that doesn't make them worth a place."""
    tokenizer = {"tokenizer": {"vocabulary": "abc" * 1000}}
    lost = [save(repo, step, 1.0 + 0.01 * step, parts=parts(step) | tokenizer) for step in range(12)]
    live = [save(repo, step, 3.0 - 0.01 * step, parts=parts(step) | tokenizer) for step in range(20, 23)]
    for checkpoint_id in lost:
        chunk_id = chunk_of(repo, checkpoint_id)
        repo.store.path(index_of(repo, checkpoint_id)).unlink()
        repo.store.path(chunk_id).unlink()
    castore.collect_garbage(repo)
    assert [state(repo, checkpoint_id) for checkpoint_id in live] == ["weights-only", "full", "full"]
    assert {state(repo, checkpoint_id) for checkpoint_id in lost} == {"history"}
    assert repo.resolve("best").require().id == live[-1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_chunk(repo: Repo, checkpoint_id: str) -> None:
    repo.store.path(chunk_of(repo, checkpoint_id)).unlink()


def lose_index(repo: Repo, checkpoint_id: str) -> None:
    repo.store.path(index_of(repo, checkpoint_id)).unlink()


def damage_chunk(repo: Repo, checkpoint_id: str) -> None:
    flip(repo.store.path(chunk_of(repo, checkpoint_id)))


def quarantine_chunk(repo: Repo, checkpoint_id: str) -> None:
    damage_chunk(repo, checkpoint_id)
    with pytest.raises(errors.CorruptObject):
        repo.load(checkpoint_id)


HARMS = [lose_chunk, lose_index, damage_chunk, quarantine_chunk]


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_best_one_that_cannot_be_loaded_leaves_its_place_to_the_next(
    repo: Repo, harm: Callable[[Repo, str], None], dry_run: bool
) -> None:
    worst, second, best = save(repo, 1, 3.0), save(repo, 2, 2.0), save(repo, 3, 1.0)
    harm(repo, best)
    other = Repo.open(repo.root.parent)  # which has verified nothing yet
    planned = castore.collect_garbage(other, ONE, dry_run=True)
    before = set(repo.store.stored())
    if not dry_run:
        assert castore.collect_garbage(other, ONE).delete == planned.delete
        assert exact(Repo.open(repo.root.parent).load(second)) == exact(parts(2))
        assert repo.resolve("best").require().id == second
        assert state(repo, worst) == "history"
    else:
        assert set(repo.store.stored()) == before
    kept = {decision.entry.id: decision.parts for decision in planned.decisions}
    assert kept[second] == ("model", "optimizer", "trainer")
    assert kept[worst] == ()
    # what is left of a damaged one may be repaired, and stays for that; without its index nothing can be
    assert bool(kept[best]) == (harm is not lose_index)


def test_weights_alone_take_no_place_of_those_that_can_be_resumed(repo: Repo) -> None:
    ids = [save(repo, step, 4.0 - step) for step in range(3)]
    repo.store.path(chunk_of(repo, ids[2], "optimizer")).unlink()
    castore.collect_garbage(repo, Policy(keep=3, keep_optimizer=1))
    assert [state(repo, checkpoint_id) for checkpoint_id in ids] == ["weights-only", "full", "weights-only"]


def test_a_checkpoint_without_a_model_part_is_kept_whole_or_not_at_all(repo: Repo) -> None:
    """Without a part of that name it isn't known what would be of use without the rest."""
    tensors = parts(1)["model"]
    ids = [save(repo, step, 4.0 - step, parts={"net": tensors, "optimizer": {"x": step}}) for step in range(4)]
    castore.collect_garbage(repo, Policy(keep=2, keep_latest=1, keep_optimizer=1))
    assert [state(repo, checkpoint_id) for checkpoint_id in ids] == ["history", "history", "full", "full"]


def test_gc_reads_what_it_keeps_once(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        save(repo, step, 4.0 - step)
    other = Repo.open(repo.root.parent)
    read: list[str] = []
    check = other.store.check
    monkeypatch.setattr(
        other.store, "check", lambda object_id, *a, **k: (read.append(object_id), check(object_id, *a, **k))
    )
    castore.collect_garbage(other, Policy(keep=3, keep_latest=0, keep_optimizer=3))
    assert read == []  # nothing is deleted, so nothing depends on it
    castore.collect_garbage(other, Policy(keep=2, keep_latest=0, keep_optimizer=2))
    assert len(read) == len(set(read)) > 0
    read.clear()
    castore.collect_garbage(other, Policy(keep=1, keep_latest=0, keep_optimizer=1))
    assert read == []
    monkeypatch.setattr(repo.store, "check", check)
    castore.collect_garbage(repo, ONE)  # this one wrote all of it


# -- a full disk --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB with few inodes."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-N", "128", "-O", "^has_journal", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Take every byte and every inode."""
    with open(folder / "full", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with contextlib.suppress(OSError):
        for number in range(1000):
            (folder / f"inode{number}").touch()
    with pytest.raises(OSError, match="No space left"):
        (folder / "more").mkdir()


def has_loop_devices() -> bool:
    return (
        os.geteuid() == 0
        and Path("/dev/loop-control").exists()
        and not subprocess.run(["losetup", "-f"], capture_output=True, check=False).returncode
    )


def no_room(_source: Path, _target: Path) -> None:
    raise errors.StorageError("rename to", "trash", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def test_gc_frees_a_full_disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real one where loop devices can be used; elsewhere one whose trash takes no name."""
    is_real = has_loop_devices()
    folder = request.getfixturevalue("small_disk") if is_real else tmp_path
    Repo.init(folder)
    repo = Repo.open(folder)
    ids = [save(repo, step, 4.0 - step) for step in range(4)]
    (repo.root / "trash").rmdir()  # as in a clone
    if is_real:
        fill(folder)
    else:
        monkeypatch.setattr("castore.storage.object_store.fs.rename", no_room)
    plan = castore.collect_garbage(Repo.open(folder), ONE)
    assert plan.freed_bytes > 500_000
    assert not plan.delete.keys() & set(repo.store.stored())
    assert exact(Repo.open(folder).load(ids[-1])) == exact(parts(3))
    if is_real:
        assert os.statvfs(folder).f_bavail > 0
        save(Repo.open(folder), 9, 0.5)
    assert list(verify(Repo.open(folder))) == []


def test_a_trash_that_fills_up_on_the_way_is_emptied_first(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(4):
        save(repo, step, 4.0 - step)
    rename, moved = fs.rename, []

    def rename_three(source: Path, target: Path) -> None:
        if target.parent.name == "trash":
            if len(moved) == 3:
                no_room(source, target)
            moved.append(target)
        rename(source, target)

    monkeypatch.setattr("castore.storage.object_store.fs.rename", rename_three)
    plan = castore.collect_garbage(repo, ONE)
    assert len(moved) == 3
    assert not plan.delete.keys() & set(repo.store.stored())
    assert list((repo.root / "trash").iterdir()) == []


def test_another_error_of_the_trash_stops_gc(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        save(repo, step, 4.0 - step)

    def broken(_source: Path, _target: Path) -> None:
        raise errors.StorageError("rename to", "trash", OSError(errno.EIO, os.strerror(errno.EIO)))

    monkeypatch.setattr("castore.storage.object_store.fs.rename", broken)
    before = set(repo.store.stored())
    with pytest.raises(errors.StorageError, match="Input/output error"):
        castore.collect_garbage(repo, ONE)
    assert set(repo.store.stored()) == before


# -- killed --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: whatever the program tries to do on the disk after it doesn't happen either."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let so many renames and removals happen, and nothing after them."""
    count = 0

    def limited(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return operation(*arguments)

        return run

    monkeypatch.setattr(fs, "rename", limited(fs.rename))
    monkeypatch.setattr(fs, "unlink", limited(fs.unlink))


@pytest.mark.parametrize("then_pinned", [False, True])
def test_a_gc_killed_at_any_operation_leaves_whole_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then_pinned: bool
) -> None:
    """Nothing that verify takes for damage, after the first gc or after the one that cleans up and is killed too."""
    killed = True
    number = 0
    while killed:
        folder = tmp_path / str(number)
        Repo.init(folder)
        (folder / ".castore" / "config.toml").write_text("[store]\nfsync = false\n")
        repo = Repo.open(folder)
        ids = [save(repo, step, 4.0 - step) for step in range(3)]
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                castore.collect_garbage(Repo.open(folder), ONE)
                killed = False
            except Killed:
                pass
        check(folder, ids)
        for further in range(number + 3):
            with monkeypatch.context() as patch:
                kill_at(patch, further)
                try:
                    castore.collect_garbage(Repo.open(folder), Policy(keep=2, keep_latest=0) if then_pinned else ONE)
                except Killed:
                    pass
            check(folder, ids)
        castore.collect_garbage(Repo.open(folder), ONE, grace=timedelta(0))
        assert state(Repo.open(folder), ids[0]) == "history"
        assert list((folder / ".castore" / "trash").iterdir()) == []
        number += 2
    assert number > 10


def check(folder: Path, ids: list[ObjectId]) -> None:
    repo = Repo.open(folder)
    assert list(verify(repo)) == []
    assert exact(repo.load(ids[-1])) == exact(parts(2))
    assert repo.resolve("best").require().id == ids[-1]
