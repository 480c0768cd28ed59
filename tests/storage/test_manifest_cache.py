"""What was read of manifests before is used as long as their files are the same, and never otherwise."""

from __future__ import annotations

import os
import random
from pathlib import Path

import msgspec
import pytest
from builders import manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castore import Repo
from castore.format.manifest import Entry
from castore.storage import catalog as catalogs
from castore.storage import manifest_cache
from castore.storage.catalog import Catalog

COUNT = 120


@pytest.fixture
def catalog(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """One with enough manifests for a cache, which has been written; files count as settled at once."""
    monkeypatch.setattr(manifest_cache, "_SETTLED_SECONDS", -3600.0)
    for step in range(COUNT):
        repo.catalog.add(manifest(step + 1, run=f"run{step % 3}", config={"lr": step // 50}))
    assert len(repo.catalog.listing().entries) == COUNT
    assert cache_of(repo.catalog).is_file()
    return repo.catalog


def cache_of(catalog: Catalog) -> Path:
    return catalog.root.parent / "cache" / "manifests"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read as manifests."""
    read, paths = catalogs._read_manifest, []

    def note(path: str) -> Entry:
        paths.append(path)
        return read(path)

    monkeypatch.setattr(catalogs, "_read_manifest", note)
    return paths


def a_file(catalog: Catalog) -> Path:
    return min(catalog.root.rglob("*.json"))


def test_what_has_not_changed_is_not_read_again(catalog: Catalog, reads: list[str]) -> None:
    listing = catalog.listing()
    assert reads == []
    assert listing == catalog.listing(cached=False)
    assert len(reads) == COUNT


def test_only_what_is_new_is_read(catalog: Catalog, reads: list[str]) -> None:
    a_file(catalog).unlink()
    new, path = catalog.add(manifest(COUNT + 1))
    listing = catalog.listing()
    assert reads == [str(path)]
    assert new in {entry.id for entry in listing.entries}
    assert listing == catalog.listing(cached=False)
    assert len(listing.entries) == COUNT


def test_a_change_that_keeps_size_and_time_is_noticed(catalog: Catalog) -> None:
    path = a_file(catalog)
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"lr": 0', b'"lr": 9'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    listing = catalog.listing()
    assert [broken.path for broken in listing.broken] == [path]
    assert listing == catalog.listing(cached=False)


def test_one_file_in_place_of_another_is_noticed(catalog: Catalog) -> None:
    first, second = sorted(catalog.root.rglob("*.json"))[:2]
    os.replace(first, second)
    assert catalog.listing() == catalog.listing(cached=False)
    assert len(catalog.listing().broken) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_whatever_stands_in_the_cache_the_listing_is_the_same(catalog: Catalog, data: st.DataObject) -> None:
    path = cache_of(catalog)
    good = path.read_bytes()
    damaged = bytearray(good)
    if data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        damaged = bytearray(data.draw(st.binary(max_size=200)))
    path.write_bytes(damaged)
    assert catalog.listing() == catalog.listing(cached=False)
    path.write_bytes(good)


def test_a_cache_that_came_with_a_clone_is_not_believed(catalog: Catalog, tmp_path: Path) -> None:
    """Its stamps are those of files on another machine."""
    forged = manifest_cache.read(cache_of(catalog))
    lies = {
        path: (stamp, Entry(entry.id, msgspec.structs.replace(entry.manifest, metrics={"val_loss": 0.0})))
        for path, stamp, entry in zip(forged.paths, forged.stamps, forged.entries, strict=True)
    }
    for path in list(catalog.root.rglob("*.json")):  # as git writes them
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    manifest_cache.write(cache_of(catalog), lies, tmp_path)
    assert all("val_loss" not in entry.manifest.metrics for entry in catalog.listing().entries)


def test_files_that_may_change_within_a_tick_of_the_clock_are_read_again(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    monkeypatch.setattr(manifest_cache, "_SETTLED_SECONDS", 3600.0)
    cache_of(catalog).unlink()
    catalog.listing()
    catalog.listing()
    assert len(reads) == 2 * COUNT


def test_one_of_another_version_is_none(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    monkeypatch.setattr(manifest_cache, "_VERSION", 2)
    assert len(catalog.listing().entries) == len(reads) == COUNT


def test_few_new_ones_do_not_write_it_again(catalog: Catalog, reads: list[str]) -> None:
    stamp = cache_of(catalog).stat().st_mtime_ns
    for step in range(3):
        catalog.add(manifest(1000 + step))
        catalog.listing()
    assert cache_of(catalog).stat().st_mtime_ns == stamp
    assert len(reads) == 1 + 2 + 3


def test_where_it_can_not_be_written_there_is_none(catalog: Catalog) -> None:
    cache = cache_of(catalog)
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_bytes(b"a file in its place")
    assert len(catalog.listing().entries) == COUNT


def test_the_order_is_that_of_reading_all(catalog: Catalog) -> None:
    rng = random.Random(1)
    for step in range(30):
        parent = rng.choice(catalog.listing().entries).id
        catalog.add(manifest(rng.randrange(200), run="other", parent=parent, note=str(step)))
        assert catalog.listing().entries == catalog.listing(cached=False).entries
