from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from builders import exact, parts, tree

import castore
from castore import Experiment, Metric, Repo
from castore.errors import (
    ConfigError,
    CorruptObject,
    InvalidManifest,
    Locked,
    NotFound,
    NothingAvailable,
    NothingMatches,
    ObjectMissing,
    RepoNotFound,
    UnknownId,
    UsageError,
)
from castore.format import part_index
from castore.format.ids import ObjectId, hash_bytes
from castore.policy.retention import Policy


def save(repo: Repo, step: int, loss: float | None = None, **fields: Any) -> ObjectId:
    metrics = {} if loss is None else {"val_loss": loss}
    return repo.save(parts(step), run="ci", step=step, metrics=metrics, **fields).id


def chunk_of(repo: Repo, wanted: str, part: str) -> Path:
    """The file of a chunk of a part."""
    found = part_index.decode(repo.store.read(repo.find(wanted).manifest.parts[part].index))
    return repo.store.path(found.chunks[0].id)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_init_makes_a_repository_that_open_finds_from_below(tmp_path: Path) -> None:
    made = Repo.init(tmp_path / "new" / "project")
    below = tmp_path / "new" / "project" / "a" / "b"
    below.mkdir(parents=True)
    assert Repo.open(below).root == made.root == (tmp_path / "new" / "project" / ".castore").resolve()


def test_init_again_keeps_every_file(repo: Repo) -> None:
    save(repo, 1)
    before = tree(repo.root)
    assert Repo.init(repo.root.parent).config == repo.config
    assert tree(repo.root) == before


@pytest.mark.parametrize("lost", ["config.toml", ".gitignore", "manifests", "objects", "tmp"])
def test_init_completes_what_was_made_only_in_part(tmp_path: Path, lost: str) -> None:
    whole = Repo.init(tmp_path / "whole").root
    part = Repo.init(tmp_path / "part").root
    path = part / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Repo.init(tmp_path / "part")
    assert sorted(map(str, whole.rglob("*"))) == sorted(
        str(path).replace("/part/", "/whole/") for path in part.rglob("*")
    )


def test_what_git_keeps_of_a_repository_is_a_repository(repo: Repo, tmp_path: Path) -> None:
    save(repo, 1)
    subprocess.run(["git", "-C", tmp_path, "init", "--quiet"], check=True)
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    kept = subprocess.run(["git", "-C", tmp_path, "ls-files"], check=True, capture_output=True, text=True).stdout
    top = {experiment.split("/")[1] for experiment in kept.split()}
    assert {".gitignore", "config.toml", "manifests"} <= top
    assert not top & {"objects", "tmp", "lock", "quarantine"}
    clone = tmp_path / "clone"
    for name in kept.split():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / name, clone / name)
    cloned = Repo.open(clone)
    assert len(cloned.catalog.listing().entries) == 1
    again = save(cloned, 1)
    assert exact(cloned.load(again)) == exact(parts(1))


def test_without_a_repository_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RepoNotFound, match="castore init"):
        Repo.open(tmp_path)


def test_a_repository_without_its_settings_is_not_mistaken_for_one_further_up(repo: Repo) -> None:
    inner = repo.root.parent / "inner"
    (inner / ".castore").mkdir(parents=True)
    with pytest.raises(ConfigError, match="castore init"):
        Repo.open(inner)


# -- save and load -----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_whole_or_by_parts(repo: Repo) -> None:
    saved = repo.save(parts(1), run="ci", step=7, tags=["b", "a", "b"], note="n", config={"lr": 0.1}, info={"x": 1})
    assert exact(repo.load(saved.id)) == exact(parts(1))
    assert exact(repo.load(saved.id[:8], ["trainer"])) == exact({"trainer": parts(1)["trainer"]})
    assert repo.load(saved.id, []) == {}
    found = repo.find(saved.id)
    assert found.manifest == saved.manifest
    assert (found.manifest.tags, found.manifest.note, found.manifest.config) == (["a", "b"], "n", {"lr": 0.1})
    assert hash_bytes(saved.path.read_bytes()) == saved.id
    assert os.listdir(repo.root / "tmp") == []


def test_sizes_in_the_manifest_are_those_of_the_data(repo: Repo) -> None:
    saved = repo.save(parts(1), run="ci", step=1)
    part = saved.manifest.parts["model"]
    assert part.bytes == 50_000 * 4 + 15 * 4 + 8
    stored = sum(path.stat().st_size for path in repo.store.objects.glob("*/*"))
    assert sum(part.stored_bytes for part in saved.manifest.parts.values()) == stored == saved.new_bytes


def test_an_unchanged_part_costs_nothing_to_save_again(repo: Repo) -> None:
    first = repo.save(parts(1), run="ci", step=1)
    again = repo.save(parts(1), run="ci", step=2)
    assert first.new_objects > 0
    assert (again.new_objects, again.new_bytes) == (0, 0)
    assert again.manifest.parts == first.manifest.parts
    assert again.id != first.id


def test_a_parent_may_be_given_as_a_prefix(repo: Repo) -> None:
    first = save(repo, 1)
    assert repo.find(save(repo, 2, parent=first[:10])).manifest.parent == first
    assert repo.find(save(repo, 3, parent=first)).manifest.parent == first
    with pytest.raises(UnknownId):
        save(repo, 4, parent="0123")


def test_whole_numbers_are_fine_as_metrics_and_ranges(repo: Repo) -> None:
    experiment = Experiment(metrics={"acc": Metric("max", 0, 100)})
    saved = repo.save(parts(1), run="ci", step=1, experiment=experiment, metrics={"acc": 50, "val_loss": 1})
    assert repo.resolve("best", experiment).require().score == pytest.approx(0.5)
    assert repo.find(saved.id).manifest.experiment == experiment


@pytest.mark.parametrize(
    "fields",
    [
        {"metrics": {"val_loss": float("nan")}},
        {"metrics": {"val_loss": "low"}},
        {"metrics": {"val_loss": None}},
        {"metrics": {"val_loss": 10**400}},
        {"run": "a/b"},
        {"step": 1.5},
        {"step": "1"},
        pytest.param({"config": {"x": object()}}, id="an object"),
        {"experiment": Experiment(model={"dropout": float("inf")})},
        {"note": 5},
    ],
    ids=str,
)
def test_a_save_that_is_refused_writes_nothing_and_returns_no_id(repo: Repo, fields: dict[str, Any]) -> None:
    before = tree(repo.root)
    with pytest.raises(InvalidManifest):
        repo.save(parts(1), **{"run": "ci", "step": 1, **fields})
    assert tree(repo.root) == before


def test_a_checkpoint_without_parts_is_refused(repo: Repo) -> None:
    with pytest.raises(InvalidManifest, match="no part"):
        repo.save({}, run="ci", step=1)


def test_an_unknown_id_or_part_is_named(repo: Repo) -> None:
    checkpoint_id = save(repo, 1)
    with pytest.raises(UnknownId, match="abcd"):
        repo.load("abcd" if not checkpoint_id.startswith("abcd") else "dcba")
    with pytest.raises(NotFound, match="no part 'optimizer': it has model, trainer"):
        repo.load(checkpoint_id, ["optimizer"])
    with pytest.raises(UsageError, match="give at least 4 digits"):
        repo.load(checkpoint_id[:3])


def test_a_damaged_chunk_is_an_error_that_names_object_part_and_checkpoint(repo: Repo) -> None:
    checkpoint_id = save(repo, 1)
    other = save(repo, 2)
    path = chunk_of(repo, checkpoint_id, "model")
    flip(path)
    with pytest.raises(CorruptObject) as caught:
        repo.load(checkpoint_id)
    assert (caught.value.object_id, caught.value.part, caught.value.manifest) == (path.name, "model", checkpoint_id)
    assert all(text in str(caught.value) for text in (path.name[:12], "'model'", checkpoint_id[:12]))
    with pytest.raises(ObjectMissing) as missing:  # it is in quarantine now
        repo.load(checkpoint_id)
    assert (missing.value.object_id, missing.value.part, missing.value.manifest) == (path.name, "model", checkpoint_id)
    assert exact(repo.load(checkpoint_id, ["trainer"])) == exact({"trainer": parts(1)["trainer"]})
    assert exact(repo.load(other)) == exact(parts(2))
    save(repo, 1)
    assert exact(repo.load(checkpoint_id)) == exact(parts(1))


def test_every_byte_of_every_object_is_verified_when_it_is_loaded(repo: Repo) -> None:
    checkpoint_id = save(repo, 1)
    for path in list(repo.store.objects.glob("*/*")):
        good = path.read_bytes()
        flip(path)
        with pytest.raises(CorruptObject, match=path.name[:12]):
            repo.load(checkpoint_id)
        path.write_bytes(good)
    assert exact(repo.load(checkpoint_id)) == exact(parts(1))


# -- resolve -----------------------------------------------------------------------------------------------------------


def test_resolve_skips_what_cant_be_had_and_says_why(repo: Repo) -> None:
    best, damaged, newer, good = save(repo, 1, 1.0), save(repo, 2, 2.0), save(repo, 3, 3.0), save(repo, 4, 4.0)
    chunk_of(repo, best, "model").unlink()
    flip(repo.store.path(repo.find(damaged).manifest.parts["trainer"].index))
    path = repo.store.path(repo.find(newer).manifest.parts["trainer"].index)
    data = bytearray(path.read_bytes())
    data[4] = 9
    path.write_bytes(data)
    resolution = repo.resolve("best")
    assert resolution.require().id == good
    reasons = {one.id: " ".join(one.reasons) for one in resolution.rejected}
    assert reasons.keys() == {best, damaged, newer}
    assert "model: 1 of its 6 objects are missing" in reasons[best]
    assert "trainer: " in reasons[damaged]
    assert "damaged" in reasons[damaged]
    assert "upgrade castore" in reasons[newer]


def test_resolve_finds_best_latest_and_ids(repo: Repo) -> None:
    with pytest.raises(NothingMatches, match="castore train"):
        repo.resolve("best").require()
    first, second = save(repo, 1, 1.0), save(repo, 2, 2.0)
    assert repo.resolve("best").require().id == first
    assert repo.resolve("latest").require().id == second
    assert repo.resolve(first[:9]).require().id == first
    with pytest.raises(UnknownId):
        repo.resolve("0" * 64)
    with pytest.raises(NothingMatches, match="tokenizer"):
        repo.resolve("best", Experiment(tokenizer="another")).require()
    for path in repo.store.objects.glob("*/*"):
        path.unlink()
    with pytest.raises(NothingAvailable, match="its data is not in the store"):
        repo.resolve("best").require()


def test_find_takes_any_kind_unless_told_which(repo: Repo) -> None:
    older, newer = save(repo, 1, 1.0), save(repo, 2, 2.0)
    data = repo.save({"data": {"tokens": 7}}, run="tokens", step=0, kind="dataset").id
    assert repo.find("best").id == repo.find("ci:best").id == older
    assert repo.find("latest").id == repo.find("latest", kind="checkpoint").id == newer
    assert repo.find("latest", kind="dataset").id == repo.find(data[:12]).id == data
    with pytest.raises(NotFound, match="is prepared data, not a checkpoint"):
        repo.find(data, kind="checkpoint")
    with pytest.raises(NotFound, match="no files yet"):
        repo.find("latest", kind="files")
    with pytest.raises(NotFound, match="no checkpoint of run 'other'; runs: ci"):
        repo.find("other:latest")


def test_opening_listing_loading_and_resolving_change_no_file(repo: Repo) -> None:
    one, two = save(repo, 1, 1.0), save(repo, 2, 2.0)
    chunk_of(repo, two, "model").unlink()
    (repo.root / "manifests" / "ci" / "broken.json").write_text("{")
    (repo.root / "tmp" / "left-by-a-killed-process").write_text("x")
    (repo.root / "objects" / "stray").write_text("x")
    before = tree(repo.root)
    again = Repo.open(repo.root.parent)
    assert len(again.catalog.listing().broken) == 1
    again.load(one)
    for want in ("best", "latest", one, two):
        again.resolve(want)
    with pytest.raises(ObjectMissing):
        again.load(two)
    assert tree(repo.root) == before


# -- beside other processes --------------------------------------------------------------------------------------------


def test_a_lock_held_by_another_is_an_error_after_the_configured_time(repo: Repo) -> None:
    checkpoint_id = save(repo, 1)
    other = Repo.open(repo.root.parent)
    with other.lock(exclusive=True):
        for call in (lambda: repo.load(checkpoint_id), lambda: save(repo, 2), lambda: repo.resolve("best")):
            with pytest.raises(Locked, match=r"waited 0\.2 s"):
                call()
    with other.lock(), pytest.raises(Locked), repo.lock(exclusive=True):
        pass
    with other.lock():
        assert exact(repo.load(checkpoint_id)) == exact(parts(1))


def save_steps(root: str, run: str, steps: list[int]) -> None:
    for step in steps:
        Repo.open(root).save(parts(step), run=run, step=step)


def test_processes_that_save_at_once_all_find_what_they_saved(repo: Repo, start: Callable[..., BaseProcess]) -> None:
    steps = list(range(6))
    children = [start(save_steps, str(repo.root), f"run{i}", steps) for i in range(3)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    entries = repo.catalog.listing().entries
    assert len(entries) == 18
    for entry in entries:
        assert exact(repo.load(entry.id)) == exact(parts(entry.manifest.step))


def save_for_ever(root: str) -> None:
    repo = Repo.open(root)
    for step in itertools.count():
        repo.save(parts(step), run=f"run{os.getpid()}", step=step)


def test_whenever_a_save_is_killed_every_visible_checkpoint_loads(
    repo: Repo, start: Callable[..., BaseProcess], rng: random.Random
) -> None:
    seen = 0
    for _ in range(6):
        child = start(save_for_ever, str(repo.root))
        while len(repo.catalog.listing().entries) == seen and child.is_alive():
            time.sleep(0.001)
        time.sleep(rng.random() * 0.1)
        child.kill()
        child.join()
        assert child.exitcode == -9
        listing = repo.catalog.listing()
        assert listing.broken == ()
        assert len(listing.entries) > seen
        seen = len(listing.entries)
        for entry in listing.entries:
            assert exact(repo.load(entry.id)) == exact(parts(entry.manifest.step))


def test_a_state_without_tensors_is_saved_without_torch(repo: Repo) -> None:
    script = (
        "import sys, castore; repo = castore.Repo.open(sys.argv[1]);"
        "print(repo.save({'trainer': {'step': 5}}, run='ci', step=5).id); assert 'torch' not in sys.modules\n"
        "try: repo.save({'trainer': {'x': [object()]}}, run='ci', step=6)\n"
        "except castore.CastoreError as error: assert 'trainer[\"x\"][0]' in str(error), error\n"
        "else: raise SystemExit('saved')"
    )
    done = subprocess.run([sys.executable, "-c", script, repo.root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert repo.load(done.stdout.strip()) == {"trainer": {"step": 5}}


# -- clocks and what `best` goes by ------------------------------------------------------------------------------------


def test_a_checkpoint_is_never_older_than_its_parent(repo: Repo) -> None:
    """The machine that saved the parent was a day ahead, and this one isn't."""
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    first = repo.save(parts(1), run="ci", step=1, metrics={"val_loss": 2.0}, created=tomorrow)
    second = repo.save(parts(2), run="ci", step=2, metrics={"val_loss": 3.0}, parent=first.id)
    assert second.manifest.created > first.manifest.created
    assert repo.resolve("latest").require().id == second.id
    assert [entry.id for entry in repo.checkpoints()] == [second.id, first.id]
    third = repo.save(parts(3), run="ci", step=3, parent="f" * 64)  # which is not here
    assert third.manifest.created < first.manifest.created


def test_gc_keeps_the_newest_by_lineage_whatever_clocks_said(repo: Repo) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    first = repo.save(parts(1), run="ci", step=1, metrics={"val_loss": 2.0}, created=tomorrow)
    manifest_now = datetime.now(UTC)
    second = repo.save(parts(2), run="ci", step=2, metrics={"val_loss": 3.0}, parent=first.id, created=manifest_now)
    best = repo.save(parts(3), run="other", step=3, metrics={"val_loss": 1.0}, created=manifest_now - timedelta(days=9))
    castore.collect_garbage(repo, Policy(keep=1, keep_latest=1))
    kept = {entry.id for entry in repo.checkpoints() if repo.part_states(entry)["model"].where == "local"}
    assert kept == {second.id, best.id}


def test_a_save_without_anything_that_is_scored_says_so(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "castore"):
        saved = repo.save(parts(1), run="ci", step=1, metrics={"train_loss": 2.0})
        again = repo.save(parts(2), run="ci", step=2)
    assert saved.warnings == again.warnings
    assert "neither val_loss nor a metric" in saved.warnings[0]
    assert len(caplog.records) == 1
    assert "the newest was taken for the best" in repo.resolve("best").note
    assert repo.resolve("latest").note == ""
    scored = repo.save(parts(3), run="ci", step=3, metrics={"acc": 0.5}, experiment=Experiment(metrics={"acc": "max"}))  # type: ignore[dict-item]
    assert scored.warnings == ()
    assert repo.resolve("best").note == ""
    assert scored.manifest.experiment.metrics["acc"] == Metric("max")
