from __future__ import annotations

import random
from datetime import UTC, datetime

from builders import parts, tree

from castore import Repo, gc
from castore.format.ids import ObjectId
from castore.policy.retention import Policy
from castore.stats import FolderUsage, Usage, count, stats

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def fake_id(number: int) -> ObjectId:
    return ObjectId(f"{number:064x}")


def test_shared_objects_count_once_in_each_group() -> None:
    sizes = {fake_id(1): 5, fake_id(2): 20, fake_id(3): 7}
    first, second = {fake_id(1): 10, fake_id(2): 20}, {fake_id(2): 20, fake_id(3): 30}
    assert count([("a", first), ("b", second)], sizes) == {"a": Usage(1, 30, 30, 25), "b": Usage(1, 50, 50, 27)}
    both = count([("", first), ("", second)], sizes)[""]
    assert both == Usage(2, 80, 60, 32)
    assert (both.saved_by_sharing, both.saved_by_compression) == (20, 28)


def test_what_is_not_here_counts_nowhere() -> None:
    assert count([("a", {fake_id(1): 10}), ("b", {fake_id(2): 10, fake_id(3): 1})], {fake_id(2): 4}) == {
        "b": Usage(1, 10, 10, 4)
    }


def test_an_empty_repository_has_nothing(repo: Repo) -> None:
    counted = stats(repo, NOW)
    assert (counted.manifests, counted.availability, counted.objects, counted.total) == (
        {},
        {},
        FolderUsage(0, 0),
        Usage(),
    )
    assert (counted.by_part, counted.by_run, counted.gc.bytes, counted.gc.problem) == ({}, {}, 0, "")
    assert counted.folders == {name: FolderUsage(0, 0) for name in ("tmp", "trash", "quarantine")}


def test_numbers_add_up(repo: Repo) -> None:
    a = repo.save(parts(1), run="a", step=1).manifest
    b = repo.save({"model": parts(1)["model"], "trainer": {"seed": 2}}, run="b", step=2).manifest
    counted = stats(repo, NOW)
    stored = sum(stored_object.size for stored_object in repo.store.stored().values())
    assert counted.objects == FolderUsage(len(repo.store.stored()), stored)
    assert counted.total.stored == stored
    assert counted.unneeded == 0
    assert (counted.total.parts, counted.manifests, counted.availability) == (4, {"checkpoint": 2}, {"full": 2})
    # both have the same model, which is nearly all there is
    assert a.parts["model"].index == b.parts["model"].index
    assert counted.by_part["model"].raw == 2 * counted.by_part["model"].distinct > 2 * a.parts["model"].bytes
    assert counted.total.saved_by_sharing == counted.by_part["model"].distinct
    assert counted.total.raw - counted.total.saved_by_sharing - counted.total.saved_by_compression == stored
    assert sum(usage.raw for usage in counted.by_run.values()) == counted.total.raw
    assert counted.by_run["a"].saved_by_sharing == 0
    assert counted.by_run["a"].stored == sum(part.stored_bytes for part in a.parts.values())


def test_availability_and_what_gc_would_free_are_what_gc_does(repo: Repo) -> None:
    for step in range(1, 5):
        state = {**parts(step), "optimizer": {"m": parts(step + 100)["model"]["big"]}}
        repo.save(state, run="ci", step=step, metrics={"val_loss": 10.0 / step})
    gc.collect_garbage(repo, Policy(keep=2, keep_optimizer=1))
    (repo.root / "config.toml").write_text("[retention]\nkeep = 1\nkeep_latest = 0\n")
    repo = Repo.open(repo.root)
    before = stats(repo, NOW)
    assert before.availability == {"full": 1, "weights-only": 1, "history": 2}
    assert before.gc.bytes > 0
    freed = gc.collect_garbage(repo, now=NOW)
    assert (before.gc.objects, before.gc.bytes) == (len(freed.delete), freed.freed_bytes)
    after = stats(repo, NOW)
    assert before.objects.bytes - after.objects.bytes == freed.freed_bytes
    assert (after.gc.objects, after.gc.bytes, after.gc.problem) == (0, 0, "")


def test_where_gc_can_not_plan_it_says_why_and_the_rest_is_told(repo: Repo) -> None:
    repo.save(parts(1), run="a", step=1)
    (repo.catalog.root / "a" / "000000002-0123456789ab.json").write_text("{}")
    counted = stats(repo, NOW)
    assert "000000002-0123456789ab.json" in counted.gc.problem
    assert counted.total.stored > 0


def test_what_no_manifest_needs_is_told_apart(repo: Repo, rng: random.Random) -> None:
    repo.save(parts(1), run="a", step=1)
    with repo.store.writer() as writer:
        extra = writer.put(rng.randbytes(5000))
        writer.commit()
    assert stats(repo, NOW).unneeded == repo.store.stored_size(extra)


def test_leftovers_are_weighed_and_nothing_is_changed(repo: Repo) -> None:
    saved = repo.save(parts(1), run="a", step=1)
    trainer = saved.manifest.parts["trainer"].index
    size = repo.store.stored_size(trainer)
    repo.store.discard([trainer])
    (repo.root / "tmp" / "left").write_bytes(b"12345")
    (repo.root / "quarantine").mkdir()
    (repo.root / "quarantine" / "x").write_bytes(b"1")
    model = repo.store.path(saved.manifest.parts["model"].index)
    model.write_bytes(model.read_bytes()[:-1])
    before = tree(repo.root)
    counted = stats(repo, NOW)
    assert counted.folders == {"tmp": FolderUsage(1, 5), "trash": FolderUsage(1, size), "quarantine": FolderUsage(1, 1)}
    assert counted.availability == {"history": 1}
    assert tree(repo.root) == before


def test_a_damaged_index_is_for_verify_to_tell(repo: Repo) -> None:
    saved = repo.save(parts(1), run="a", step=1)
    path = repo.store.path(saved.manifest.parts["model"].index)
    path.write_bytes(b"x")
    assert set(stats(repo, NOW).by_part) == {"trainer"}
