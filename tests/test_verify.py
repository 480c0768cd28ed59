from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from builders import exact, parts, tree
from memory import PEAK

from castore import Repo, gc
from castore.errors import CastoreError, Locked, ObjectMissing, UnknownId
from castore.format import part_index
from castore.format.frame import MAX_STORED
from castore.format.ids import ObjectId, hash_bytes
from castore.policy.retention import Policy
from castore.verify import Finding, Need, verify


def save(repo: Repo, step: int = 1, **fields: Any) -> ObjectId:
    state = {**parts(step), "optimizer": {"exp_avg": parts(step + 1000)["model"]["big"]}}
    return repo.save(state, run="ci", step=step, metrics={"val_loss": 10.0 / step}, **fields).id


def index_of(repo: Repo, checkpoint_id: ObjectId, part: str = "model") -> ObjectId:
    return repo.find(checkpoint_id).manifest.parts[part].index


def chunks_of(repo: Repo, checkpoint_id: ObjectId, part: str = "model") -> list[ObjectId]:
    return [chunk.id for chunk in part_index.decode_chunks(repo.store.read(index_of(repo, checkpoint_id, part)))]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def found(repo: Repo, *ids: str, **options: Any) -> list[Finding]:
    return list(verify(repo, ids or None, **options))


def with_remote(repo: Repo) -> Repo:
    """The repository with a remote that has everything it has now."""
    shutil.copytree(repo.store.objects, repo.root.parent / "shared" / "objects")
    with open(repo.root / "config.toml", "a") as file:
        file.write('[remotes]\nshared = "shared"\n')
    return Repo.open(repo.root)


# -- everything ------------------------------------------------------------------------------------------------------


def test_a_whole_store_has_no_finding_and_every_byte_is_counted(repo: Repo) -> None:
    save(repo, 1)
    save(repo, 2)
    told: list[tuple[int, int]] = []
    assert found(repo, progress=lambda done, total: told.append((done, total))) == []
    size = sum(one.size for one in repo.store.stored().values())
    assert told[-1] == (size, size)
    assert told == sorted(told)


def test_every_damaged_object_is_found_with_all_that_need_it(repo: Repo) -> None:
    one = save(repo, 1)
    other = repo.save(parts(1), run="other", step=7).id
    for stored_id in repo.store.stored():
        path = repo.store.path(stored_id)
        before = path.read_bytes()
        flip(path)
        (finding,) = [one for one in found(repo) if one.object_id == stored_id]
        assert (finding.kind, finding.path) == ("damaged", path)
        needed = {(need.checkpoint_id, need.part) for need in finding.needed_by}
        expected = {
            (manifest, part)
            for manifest in (one, other)
            for part in repo.find(manifest).manifest.parts
            if path.write_bytes(before)
            and stored_id in {index_of(repo, manifest, part), *chunks_of(repo, manifest, part)}
        }
        assert needed == expected
        assert needed
        assert len(finding.needed_by) == len(needed)
    assert found(repo) == []


@pytest.mark.parametrize("damage", ["cut", "extended", "empty", "foreign", "huge"])
def test_any_change_of_a_file_is_damage(repo: Repo, damage: str) -> None:
    chunk = chunks_of(repo, save(repo))[0]
    path = repo.store.path(chunk)
    data = path.read_bytes()
    changed = {"cut": data[:-1], "extended": data + b"\0", "empty": b"", "foreign": b"PK\3\4" + data[4:], "huge": data}
    path.write_bytes(changed[damage])
    if damage == "huge":
        os.truncate(path, MAX_STORED + 1)
    assert [(one.kind, one.object_id) for one in found(repo)] == [("damaged", chunk)]


def test_looking_changes_nothing_whatever_it_finds(repo: Repo) -> None:
    checkpoint_id = save(repo, 1)
    flip(repo.store.path(chunks_of(repo, checkpoint_id)[0]))
    flip(repo.store.path(index_of(repo, checkpoint_id, "trainer")))
    repo.store.discard([index_of(repo, checkpoint_id, "optimizer")])
    (repo.root / "objects" / "stray").write_text("x")
    (repo.catalog.root / "ci" / "000000001-0123456789ab.json").write_text("{}")
    before = tree(repo.root)
    kinds = sorted(one.kind for one in found(repo))
    assert kinds == ["damaged", "damaged", "manifest", "stray"]
    assert len(found(repo, checkpoint_id)) == 3
    with pytest.raises(CastoreError):
        found(repo, "latest")
    with pytest.raises(ObjectMissing):
        repo.store.read(index_of(repo, checkpoint_id, "optimizer"), mend=False)
    assert tree(repo.root) == before


def test_an_index_without_a_chunk_is_a_finding_and_a_part_without_its_index_is_not(repo: Repo) -> None:
    checkpoint_id = save(repo)
    chunk = chunks_of(repo, checkpoint_id)[1]
    repo.store.path(chunk).unlink()
    (finding,) = found(repo)
    assert (finding.kind, finding.object_id, finding.needed_by) == ("missing", chunk, (Need(checkpoint_id, "model"),))
    for part in ("model", "optimizer", "trainer"):
        repo.store.path(index_of(repo, checkpoint_id, part)).unlink()
    assert found(repo) == []


def test_what_gc_drops_is_no_finding(repo: Repo) -> None:
    for step in range(1, 7):
        save(repo, step)
    gc.collect_garbage(repo, Policy(keep=3, keep_optimizer=1))
    assert len(repo.checkpoints()) == 6
    assert found(repo) == []


def test_a_model_that_is_gone_beside_its_optimizer_is_inconsistent(repo: Repo) -> None:
    checkpoint_id = save(repo)
    model = index_of(repo, checkpoint_id)
    repo.store.path(model).unlink()
    (finding,) = found(repo)
    assert (finding.kind, finding.object_id, finding.needed_by) == (
        "inconsistent",
        model,
        (Need(checkpoint_id, "model"),),
    )
    assert "optimizer and trainer" in finding.reason


def test_an_equal_part_of_another_checkpoint_is_no_inconsistency(repo: Repo) -> None:
    same = {"seed": 1}
    first = repo.save({"model": parts(1)["model"], "trainer": same}, run="ci", step=1).id
    second = repo.save({"model": parts(2)["model"], "trainer": same}, run="ci", step=2).id
    assert index_of(repo, first, "trainer") == index_of(repo, second, "trainer")
    repo.store.path(index_of(repo, first)).unlink()
    assert found(repo) == []


def test_an_index_that_damage_took_away_was_not_dropped(repo: Repo) -> None:
    checkpoint_id = save(repo)
    lost = index_of(repo, checkpoint_id, "optimizer")
    flip(repo.store.path(lost))
    assert [one.repaired_from for one in found(repo, repair=True)] == [""]
    (finding,) = found(repo)
    assert (finding.kind, finding.object_id, finding.needed_by) == (
        "missing",
        lost,
        (Need(checkpoint_id, "optimizer"),),
    )
    assert "quarantine" in finding.reason


def test_an_index_that_describes_no_part_is_damaged(repo: Repo) -> None:
    checkpoint_id = save(repo)
    with repo.store.writer() as writer:
        bad = writer.put(b"\xc1 no index")
        writer.commit()
    entry = repo.find(checkpoint_id)
    part = entry.manifest.parts["model"]
    changed = {name: getattr(entry.manifest, name) for name in entry.manifest.__struct_fields__}
    changed["parts"] = {"model": type(part)(index=bad, bytes=1, stored_bytes=1)}
    other, _ = repo.catalog.add(type(entry.manifest)(**changed))
    (finding,) = found(repo)
    assert (finding.kind, finding.object_id, finding.needed_by) == ("damaged", bad, (Need(other, "model"),))


def test_an_index_that_lies_about_a_length_is_found(repo: Repo) -> None:
    checkpoint_id = save(repo)
    true = part_index.decode(repo.store.read(index_of(repo, checkpoint_id)))
    first = true.chunks[0]
    lying = part_index.encode(
        part_index.Index((part_index.ChunkRef(first.id, first.length + 64), *true.chunks[1:]), true.tensors, true.tree)
    )
    with repo.store.writer() as writer:
        bad = writer.put(lying)
        writer.commit()
    entry = repo.find(checkpoint_id)
    part = entry.manifest.parts["model"]
    changed = {name: getattr(entry.manifest, name) for name in entry.manifest.__struct_fields__}
    changed["parts"] = {"model": type(part)(index=bad, bytes=1, stored_bytes=1)}
    repo.catalog.add(type(entry.manifest)(**changed))
    (finding,) = found(repo)
    assert (finding.kind, finding.object_id) == ("inconsistent", first.id)
    assert f"holds {first.length} bytes where an index says {first.length + 64}" in finding.reason


def test_files_that_are_no_objects_are_strays_and_harmless(repo: Repo) -> None:
    checkpoint_id = save(repo)
    chunk = chunks_of(repo, checkpoint_id)[0]
    folder = repo.root / "objects"
    (folder / "README").write_text("x")
    (folder / chunk[:2] / "notes.txt").write_text("x")
    (folder / "zz").mkdir()
    shutil.copy(repo.store.path(chunk), folder / "zz" / chunk)
    os.mkfifo(folder / chunk[:2] / "pipe")
    (folder / "link").symlink_to(folder / chunk[:2])
    findings = found(repo)
    names = {"README", "notes.txt", chunk, "pipe", "link"}
    assert {(one.kind, one.path.name) for one in findings} == {("stray", name) for name in names}
    assert all(one.is_harmless for one in findings)
    assert found(repo, repair=True) == findings
    assert (folder / "README").exists()


def test_for_one_checkpoint_the_rest_of_the_store_is_not_looked_at(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint_id = save(repo)
    for where, name in ((repo.store, "stored"), (repo.store, "strays"), (repo.catalog, "listing")):
        monkeypatch.setattr(where, name, lambda: pytest.fail("everything was looked at"))
    assert found(repo, checkpoint_id) == []
    repo.store.path(chunks_of(repo, checkpoint_id)[0]).unlink()
    assert [one.kind for one in found(repo, checkpoint_id)] == ["missing"]


def test_objects_that_cannot_be_looked_for_are_unreadable(repo: Repo) -> None:
    checkpoint_id = save(repo)
    chunk = chunks_of(repo, checkpoint_id)[0]
    shutil.rmtree(repo.store.path(chunk).parent)
    repo.store.path(chunk).parent.write_text("a file where a folder was")
    assert ("unreadable", chunk) in {(one.kind, one.object_id) for one in found(repo, checkpoint_id)}


def test_a_pipe_under_the_name_of_an_object_is_not_waited_for(repo: Repo) -> None:
    checkpoint_id = save(repo)
    model, chunk = index_of(repo, checkpoint_id), chunks_of(repo, checkpoint_id)[0]
    for one in (model, chunk):
        repo.store.path(one).unlink()
        os.mkfifo(repo.store.path(one))
    assert {(one.kind, one.object_id) for one in found(repo, checkpoint_id)} == {("damaged", model)}
    assert {(one.kind, one.object_id) for one in found(repo)} == {("damaged", model), ("damaged", chunk)}
    repo.store.path(model).unlink()
    assert sorted(one.kind for one in found(repo)) == ["damaged", "inconsistent"]


@pytest.mark.parametrize("what", ["pipe", "folder", "link"])
@pytest.mark.parametrize("part", ["index", "chunk", "unneeded"])
def test_what_stands_in_the_place_of_an_object_is_damage_and_makes_room(repo: Repo, what: str, part: str) -> None:
    checkpoint_id = save(repo)
    ids = {"index": index_of(repo, checkpoint_id), "chunk": chunks_of(repo, checkpoint_id)[0]}
    repo = with_remote(repo)
    damaged = ids.get(part, ObjectId(ids["chunk"][:2] + "0" * 62))
    path = repo.store.path(damaged)
    path.unlink(missing_ok=True)
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: os.symlink(__file__, path)}[what](path)
    for ask in ([], [checkpoint_id] if part != "unneeded" else []):
        (finding,) = found(repo, *ask)
        assert (finding.kind, finding.object_id, finding.is_harmless) == ("damaged", damaged, False)
        assert bool(finding.needed_by) == (part != "unneeded")
    (finding,) = found(repo, repair=True)
    assert finding.repaired_from == ("" if part == "unneeded" else "shared")
    assert found(repo) == []
    assert [name[:64] for name in os.listdir(repo.store.quarantine)] == [damaged]


def test_bytes_of_indexes_count_where_there_is_nothing_else(repo: Repo) -> None:
    checkpoint_id = repo.save({"trainer": {"seed": 1}}, run="ci", step=1).id
    size = repo.store.stored_size(index_of(repo, checkpoint_id, "trainer"))
    told: list[tuple[int, int]] = []
    assert found(repo, progress=lambda done, total: told.append((done, total))) == []
    assert told == [(size, size)]


def test_reading_is_never_far_ahead_of_whoever_takes_the_findings(repo: Repo) -> None:
    repo.save({"trainer": {}, "model": {str(i): parts(i)["model"]["big"] for i in range(30)}}, run="ci", step=1)
    indexes = {part.index for entry in repo.checkpoints() for part in entry.manifest.parts.values()}
    for stored_id in repo.store.stored().keys() - indexes:
        flip(repo.store.path(stored_id))
    reading = verify(repo, repair=True)
    next(reading)
    time.sleep(0.5)
    moved = len(os.listdir(repo.store.quarantine))
    reading.close()
    assert moved <= 4 * repo.threads


def test_a_newer_version_is_unreadable_but_never_moved(repo: Repo) -> None:
    chunk = chunks_of(repo, save(repo))[0]
    path = repo.store.path(chunk)
    data = bytearray(path.read_bytes())
    data[4] = 9
    path.write_bytes(data)
    (finding,) = found(repo, repair=True)
    assert (finding.kind, finding.object_id) == ("unreadable", chunk)
    assert path.read_bytes() == data


def test_a_broken_manifest_is_a_finding(repo: Repo) -> None:
    save(repo)
    (path,) = repo.catalog.root.glob("*/*.json")
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step": 2'))
    (finding,) = found(repo)
    assert (finding.kind, finding.path) == ("manifest", path)


# -- chosen checkpoints ----------------------------------------------------------------------------------------------


def test_of_a_chosen_checkpoint_everything_must_be_there(repo: Repo) -> None:
    first, second = save(repo, 1), save(repo, 2)
    gc.collect_garbage(repo, Policy(keep=1, keep_latest=0, keep_optimizer=1))
    assert found(repo, second) == []
    missing = found(repo, first)
    assert {(one.kind, need.part) for one in missing for need in one.needed_by} == {
        ("missing", part) for part in ("model", "optimizer", "trainer")
    }
    assert found(repo, "best", "ci:latest", second[:9]) == []


def test_only_what_the_chosen_need_is_read(repo: Repo) -> None:
    first, second = save(repo, 1), save(repo, 2)
    flip(repo.store.path(chunks_of(repo, first)[0]))
    (repo.root / "objects" / "stray").write_text("x")
    assert found(repo, second) == []
    assert [one.kind for one in found(repo, second, first)] == ["damaged"]


def test_an_unknown_id_is_an_error(repo: Repo) -> None:
    with pytest.raises(UnknownId):
        found(repo, "0123")


# -- repair ----------------------------------------------------------------------------------------------------------


def test_repair_fetches_what_is_damaged_or_missing(repo: Repo) -> None:
    checkpoint_id = save(repo)
    repo = with_remote(repo)
    damaged, missing = chunks_of(repo, checkpoint_id)[:2]
    flip(repo.store.path(damaged))
    flip(repo.store.path(index_of(repo, checkpoint_id, "optimizer")))
    repo.store.path(missing).unlink()
    assert [one.repaired_from for one in found(repo)] == ["", "", ""]
    findings = found(repo, repair=True)
    assert {(one.kind, one.object_id, one.repaired_from) for one in findings} == {
        ("damaged", damaged, "shared"),
        ("damaged", index_of(repo, checkpoint_id, "optimizer"), "shared"),
        ("missing", missing, "shared"),
    }
    assert all(one.is_harmless for one in findings)
    assert found(repo) == []
    assert {name[:64] for name in os.listdir(repo.store.quarantine)} == {
        damaged,
        index_of(repo, checkpoint_id, "optimizer"),
    }
    (repo.root.parent / "shared").rename(repo.root.parent / "gone")
    assert exact(repo.load(checkpoint_id)["model"]) == exact(parts(1)["model"])


def test_repair_brings_back_a_chosen_checkpoint_that_was_dropped(repo: Repo) -> None:
    checkpoint_id = save(repo)
    repo = with_remote(repo)
    shutil.rmtree(repo.store.objects)
    repo.store.objects.mkdir()
    assert all(one.repaired_from == "shared" for one in found(repo, checkpoint_id, repair=True))
    assert found(repo, checkpoint_id) == []


def test_repair_keeps_no_index_whose_chunks_nobody_has(repo: Repo) -> None:
    checkpoint_id = save(repo)
    repo = with_remote(repo)
    lost = chunks_of(repo, checkpoint_id)[0]
    model = index_of(repo, checkpoint_id)
    shutil.rmtree(repo.store.objects)
    repo.store.objects.mkdir()
    (repo.root.parent / "shared" / "objects" / lost[:2] / lost).unlink()
    left = {one.object_id for one in found(repo, checkpoint_id, repair=True) if not one.is_harmless}
    assert left == {lost, model}
    assert not repo.store.has(model)


def test_repair_without_a_remote_moves_the_damage_to_quarantine(repo: Repo) -> None:
    checkpoint_id = save(repo)
    chunk = chunks_of(repo, checkpoint_id)[0]
    flip(repo.store.path(chunk))
    (finding,) = found(repo, repair=True)
    assert (finding.kind, finding.is_harmless) == ("damaged", False)
    assert not repo.store.has(chunk)
    (finding,) = found(repo)
    assert (finding.kind, finding.object_id) == ("missing", chunk)


def test_a_bad_copy_in_a_remote_repairs_nothing(repo: Repo) -> None:
    checkpoint_id = save(repo)
    repo = with_remote(repo)
    chunk = chunks_of(repo, checkpoint_id)[0]
    flip(repo.store.path(chunk))
    flip(repo.root.parent / "shared" / "objects" / chunk[:2] / chunk)
    (finding,) = found(repo, repair=True)
    assert not finding.is_harmless
    assert not repo.store.has(chunk)


def test_repair_takes_back_what_is_still_in_the_trash(repo: Repo) -> None:
    checkpoint_id = save(repo)
    taken = [index_of(repo, checkpoint_id), *chunks_of(repo, checkpoint_id)]
    repo.store.discard(taken)
    assert {one.object_id for one in found(repo, checkpoint_id)} == {taken[0]}
    findings = found(repo, checkpoint_id, repair=True)
    assert {(one.object_id, one.repaired_from) for one in findings} == {(one, "trash/") for one in taken}
    assert exact(repo.load(checkpoint_id)["model"]) == exact(parts(1)["model"])


# -- at work beside others -------------------------------------------------------------------------------------------


def test_gc_waits_and_saves_go_on_while_it_reads(repo: Repo) -> None:
    checkpoint_id = save(repo)
    flip(repo.store.path(chunks_of(repo, checkpoint_id)[0]))
    reading = verify(repo)
    next(reading)
    with pytest.raises(Locked):
        gc.collect_garbage(repo)
    save(repo, 2)
    reading.close()
    gc.collect_garbage(repo)


def test_a_save_that_ends_meanwhile_is_no_finding(repo: Repo) -> None:
    stop = threading.Event()

    def write() -> None:
        step = 1
        while not stop.is_set():
            save(repo, step)
            step += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert [found(repo) for _ in range(15)] == [[]] * 15
    finally:
        stop.set()
        writer.join()


@pytest.mark.slow
def test_memory_stays_at_a_chunk_a_thread(tmp_path: Path) -> None:
    """400 MB in chunks of 8 MiB, of which two threads have two each (file and plain bytes) at a time."""
    Repo.init(tmp_path)
    (tmp_path / ".castore" / "config.toml").write_text('[store]\nchunk_size = "8MiB"\nthreads = 2\nfsync = false\n')
    fill = (
        "import torch, castore; repo = castore.Repo.open('.');"
        "repo.save({'model': {str(i): torch.randn(10_000_000) for i in range(10)}}, run='ci', step=1)"
    )
    check = (
        f"{PEAK}\n"
        "import castore, numpy; from castore.verify import verify; repo = castore.Repo.open('.'); before = peak();"
        "assert list(verify(repo)) == []; print((peak() - before) >> 20)"
    )
    for script in (fill, check):
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80


def test_verify_needs_neither_torch_nor_numpy_for_data_that_is_no_numbers(repo: Repo) -> None:
    repo.save({"trainer": {"text": "x" * 1000}}, run="ci", step=1)
    script = (
        "import sys; from castore import Repo; from castore.verify import verify;"
        "print(list(verify(Repo.open('.'))), {'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repo.root.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] set()\n"


def test_an_id_names_the_plain_bytes(repo: Repo) -> None:
    """What verify relies on: an object under another's id is damage, though it is whole."""
    checkpoint_id = save(repo)
    first, second = chunks_of(repo, checkpoint_id)[:2]
    shutil.copy(repo.store.path(second), repo.store.path(first))
    (finding,) = found(repo)
    assert finding.object_id == first
    assert hash_bytes(repo.store.read(second)) == second
