"""Reading again what a remote holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import parts

from castore import Repo
from castore.format.manifest import Entry
from castore.remote_verify import verify_remote
from castore.remotes.folder import Folder


@pytest.fixture
def pushed(repo: Repo, tmp_path: Path) -> tuple[Repo, Folder, Entry]:
    saved = repo.save(parts(3), run="main", step=1)
    remote = Folder("shared", tmp_path / "shared")
    entry = Entry(saved.id, saved.manifest)
    repo.push([entry], remote)
    return repo, remote, entry


def test_all_is_well(pushed: tuple[Repo, Folder, Entry]) -> None:
    repo, remote, entry = pushed
    told: list[tuple[int, int]] = []
    assert list(verify_remote(repo, remote, progress=lambda done, total: told.append((done, total)))) == []
    assert told[-1][0] == told[-1][1] > 0
    assert list(verify_remote(repo, remote, [entry.id])) == []


@pytest.mark.parametrize("named", [True, False])
def test_every_damaged_or_missing_object_is_found(pushed: tuple[Repo, Folder, Entry], named: bool) -> None:
    repo, remote, entry = pushed
    for path in sorted((remote.path / "objects").rglob("?" * 64)):
        if path.name == entry.id:
            continue
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        (finding,) = verify_remote(repo, Folder("shared", remote.path), [entry.id] if named else None)
        assert (finding.kind, finding.object_id) == ("damaged", path.name)
        assert {need.checkpoint_id for need in finding.needed_by} == {entry.id}
        path.unlink()
        missing = list(verify_remote(repo, Folder("shared", remote.path), [entry.id] if named else None))
        is_index = path.name in {part.index for part in entry.manifest.parts.values()}
        assert [finding.kind for finding in missing] == ([] if is_index else ["missing"])
        path.write_bytes(good)


def test_what_no_manifest_needs_is_read_too(pushed: tuple[Repo, Folder, Entry]) -> None:
    repo, remote, entry = pushed
    stray = "ab" * 32
    remote.write_file(f"objects/ab/{stray}", b"no object")
    (finding,) = verify_remote(repo, remote)
    assert (finding.object_id, finding.needed_by) == (stray, ())
    assert list(verify_remote(repo, remote, [entry.id])) == []
