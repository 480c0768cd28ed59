from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from builders import entry, manifest, tree
from project import Project

from castore import Repo, errors
from castore.errors import AmbiguousId, CorruptManifest, StorageError, UnknownId
from castore.format.bundle import Record
from castore.format.manifest import Entry, Manifest
from castore.policy.selector import Selector
from castore.storage.catalog import Catalog
from castore.trees.add import add_tree


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "tmp").mkdir()
    return Catalog(tmp_path, durable=False)


def find(catalog: Catalog, prefix: str) -> Entry:
    return Selector.parse(prefix).choose(catalog.matching(prefix), catalog.known_ids())


def test_what_is_added_is_listed_newest_first(catalog: Catalog) -> None:
    added = {catalog.add(manifest(step, run=run))[0] for step, run in [(3, "a"), (1, "b"), (2, "a")]}
    listing = catalog.listing()
    assert [one.manifest.step for one in listing.entries] == [3, 2, 1]
    assert {one.id for one in listing.entries} == added
    assert listing.broken == ()


def test_adding_the_same_manifest_again_changes_nothing(catalog: Catalog) -> None:
    first = catalog.add(manifest(1))
    before = tree(catalog.root.parent)
    assert catalog.add(manifest(1)) == first
    assert tree(catalog.root.parent) == before


def test_a_file_in_the_way_of_a_manifest_is_not_replaced(catalog: Catalog) -> None:
    _, path = catalog.add(manifest(1))
    path.write_bytes(b"something else")
    with pytest.raises(CorruptManifest, match="another file has this manifest's name"):
        catalog.add(manifest(1))
    assert path.read_bytes() == b"something else"


def test_listing_changes_nothing_and_reports_what_is_broken_beside_the_others(catalog: Catalog) -> None:
    good, path = catalog.add(manifest(1))
    folder = path.parent
    _, edited = catalog.add(manifest(2))
    edited.write_bytes(edited.read_bytes().replace(b'"step": 2', b'"step": 3'))
    _, moved = catalog.add(manifest(4))
    moved.rename(folder / "000000004-000000000000.json")
    _, newer = catalog.add(manifest(5))
    newer.write_bytes(newer.read_bytes().replace(b'"version": 1', b'"version": 9'))
    shutil.copy(path, folder / "copy.json")
    (folder / "empty.json").write_bytes(b"")
    (folder / "large.json").write_bytes(b" " * (2 << 20))
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")  # to open it would be to wait for ever
    (folder / "link.json").symlink_to(path)
    (folder / "dangling.json").symlink_to("nowhere")
    (catalog.root / "run").symlink_to(folder)
    (folder / "notes.txt").write_bytes(b"not of interest")
    (catalog.root / ".gitkeep").write_bytes(b"")
    before = tree(catalog.root.parent)
    listing = catalog.listing()
    assert [one.id for one in listing.entries] == [good]
    reasons = {broken.path.name: broken.reason for broken in listing.broken}
    expected = {
        edited.name: "changed or moved",
        "000000004-000000000000.json": "changed or moved",
        newer.name: "upgrade castore",
        "copy.json": "changed or moved",
        "empty.json": "not a valid manifest",
        "large.json": "at most",
        "folder.json": "not a regular file",
        "pipe.json": "not a regular file",
        "link.json": "not a regular file",
        "dangling.json": "not a regular file",
        "run": "a symbolic link",
    }
    assert reasons.keys() == expected.keys()
    assert [name for name, words in expected.items() if words not in reasons[name]] == []
    assert tree(catalog.root.parent) == before


def test_every_changed_byte_of_a_manifest_shows(catalog: Catalog) -> None:
    _, path = catalog.add(manifest(1, metrics={"val_loss": 2.5}))
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        listing = catalog.listing()
        assert listing.entries == ()
        assert len(listing.broken) == 1


def test_a_catalog_whose_folder_is_gone_is_empty(catalog: Catalog) -> None:
    catalog.root.rmdir()
    assert catalog.listing().entries == ()


def test_a_catalog_that_is_no_folder_is_an_error(catalog: Catalog) -> None:
    catalog.root.rmdir()
    catalog.root.write_bytes(b"")
    with pytest.raises(StorageError, match="manifests"):
        catalog.listing()


def test_a_prefix_finds_its_one_checkpoint_in_either_case(catalog: Catalog) -> None:
    for step in range(30):
        checkpoint_id, _ = catalog.add(manifest(step))
        for prefix in (checkpoint_id, checkpoint_id[:12].upper(), checkpoint_id[:20]):
            found = find(catalog, prefix)
            assert (found.id, found.manifest.step) == (checkpoint_id, step)


def test_a_prefix_that_fits_several_names_them(catalog: Catalog) -> None:
    by_digits: dict[str, list[Manifest]] = {}
    for one in map(entry, range(5000)):  # two of 300 share four digits in one case of two
        alike = by_digits.setdefault(one.id[:4], [])
        alike.append(one.manifest)
        if len(alike) == 2:
            break
    added = [catalog.add(one)[0] for one in [*alike, manifest(9999)]]
    with pytest.raises(AmbiguousId, match="give more digits") as caught:
        find(catalog, added[0][:4])
    assert sorted(caught.value.matches) == sorted(added[:2])


def test_an_unknown_id_suggests_those_that_look_alike(catalog: Catalog) -> None:
    wanted = [catalog.add(manifest(step))[0] for step in range(30)][7][:10]
    mistyped = wanted[:4] + ("0" if wanted[4] != "0" else "1") + wanted[5:]
    with pytest.raises(UnknownId, match="did you mean") as caught:
        find(catalog, mistyped)
    assert wanted in caught.value.near


@pytest.mark.parametrize("prefix", ["", "zzzz", "../x"])
def test_what_is_like_no_id_says_where_ids_are_listed(catalog: Catalog, prefix: str) -> None:
    catalog.add(manifest(1))
    with pytest.raises(UnknownId, match="castore log"):
        find(catalog, prefix)


def test_an_id_that_agrees_in_the_file_name_alone_is_another_one(catalog: Catalog) -> None:
    checkpoint_id, _ = catalog.add(manifest(1))
    with pytest.raises(UnknownId):
        find(catalog, checkpoint_id[:12] + ("0" if checkpoint_id[12] != "0" else "1"))


def test_a_damaged_manifest_is_an_error_to_who_asks_for_it_and_to_no_one_else(catalog: Catalog) -> None:
    (checkpoint_id, path), (other, _) = catalog.add(manifest(1)), catalog.add(manifest(2))
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step": 3'))
    with pytest.raises(CorruptManifest, match="changed or moved"):
        find(catalog, checkpoint_id)
    assert find(catalog, other).id == other


@pytest.mark.parametrize(("first", "second"), [("Main", "main"), ("ci", "CI")])
def test_runs_that_are_one_folder_on_some_disks_are_refused(
    repo: Repo, tmp_path: Path, first: str, second: str
) -> None:
    repo.save({"model": {"x": 1}}, run=first, step=1)
    with pytest.raises(errors.InvalidManifest, match=f"run {second} differs from run {first} in case alone"):
        repo.save({"model": {"x": 2}}, run=second, step=2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.InvalidManifest, match="in case alone"):
        add_tree(repo, tmp_path / "file", name=second)
    repo.save({"model": {"x": 2}}, run=first, step=2)
    assert {entry.manifest.run for entry in repo.checkpoints()} == {first}


def test_manifests_that_a_sparse_checkout_hides_are_no_fresh_start(tmp_path: Path) -> None:
    project = Project(tmp_path)
    repo = Repo.init(tmp_path)
    repo.save({"model": {"x": 1}}, run="main", step=1)
    project.git("add", "-A")
    project.git("commit", "-qm", "one")
    project.git("sparse-checkout", "set", "--no-cone", "/texts", "/.castore/config.toml", "/.castore/.gitignore")
    assert not list((repo.root / "manifests").rglob("*.json"))
    for command in ("log", "resolve", "gc", "stats", "verify"):
        assert "git has manifests (1) and the work tree has none" in project.run(command, code=4)
    assert "as in a sparse checkout" in project.train("--allow-fresh", code=4)
    project.git("sparse-checkout", "disable")
    assert len(project.json("log")) == 1
    project.git("rm", "-q", "-r", ".castore/manifests/main")  # on purpose
    assert project.json("log") == []


def test_a_record_under_another_name_is_broken(catalog: Catalog) -> None:
    one = entry(1)
    parts = {one.manifest.parts["model"].index: [one.id]}
    record = Record(bundle=one.id, key="k", created="2026-01-01T00:00:00.000000Z", bytes=999, objects=1, parts=parts)
    path = catalog.add_record(record)
    assert catalog.records() == ([record], [])
    path.rename(path.with_name("0123456789abcdef.json"))
    records, broken = catalog.records()
    assert records == []
    assert [item.reason for item in broken] == [f"its content belongs under {record.file_name}"]
