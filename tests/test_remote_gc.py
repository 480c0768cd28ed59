"""Garbage in a remote: two passes with grace, one collector, and nothing that anybody needs."""

from __future__ import annotations

import os
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from builders import parts
from hypothesis import given, settings
from hypothesis import strategies as st

from castore import Repo
from castore.errors import CastoreError, CorruptBundle, CorruptManifest, RootsUnreadable, UsageError
from castore.format.manifest import Entry
from castore.policy.retention import Policy
from castore.remote_gc import RemoteGCPlan, collect_remote
from castore.remotes import marks
from castore.remotes.folder import Folder

HOUR = timedelta(hours=1)
KEEP_ONE = Policy(keep=1, keep_latest=0, keep_optimizer=0)


class Clock:
    """A remote's clock: files get older when it is moved."""

    def __init__(self, remote: Folder) -> None:
        self.remote = remote
        self.now = datetime.now(UTC)

    def pass_by(self, time: timedelta) -> None:
        for path in self.remote.path.rglob("*"):
            if path.is_file():
                moment = path.stat().st_mtime - time.total_seconds()
                os.utime(path, (moment, moment))


def save(repo: Repo, step: int, loss: float) -> Entry:
    saved = repo.save(parts(step), run="main", step=step, metrics={"val_loss": loss})
    return Entry(saved.id, saved.manifest)


@pytest.fixture
def remote(tmp_path: Path) -> Folder:
    return Folder("shared", tmp_path / "shared")


@pytest.fixture
def collecting(repo: Repo) -> Repo:
    path = repo.root / "config.toml"
    path.write_text(path.read_text() + '[remotes]\nshared = "shared"\ncollector = "me"\n')
    return Repo.open(repo.root.parent)


def collect(repo: Repo, remote: Folder, policy: Policy = KEEP_ONE, *, dry_run: bool = False) -> RemoteGCPlan:
    return collect_remote(repo, remote, policy, machine="me", grace=HOUR, dry_run=dry_run)


def names(remote: Folder) -> set[str]:
    return {file.name for file in remote.files("objects")}


def test_only_the_collector_that_the_settings_name_may_delete(repo: Repo, collecting: Repo, remote: Folder) -> None:
    entry = save(collecting, 1, 3.0)
    collecting.push([entry], remote)
    with pytest.raises(UsageError, match=r"not named in config\.toml, and this machine is me"):
        collect_remote(repo, remote, KEEP_ONE, machine="me", grace=HOUR)
    with pytest.raises(UsageError, match="the collector is me, and this machine is you"):
        collect_remote(collecting, remote, KEEP_ONE, machine="you", grace=HOUR)
    collect_remote(collecting, remote, KEEP_ONE, machine="you", grace=HOUR, dry_run=True)


def test_it_takes_two_passes_with_the_grace_period_between(collecting: Repo, remote: Folder) -> None:
    best, worse = save(collecting, 1, 2.0), save(collecting, 2, 3.0)
    collecting.push([best, worse], remote)
    clock = Clock(remote)
    before = names(remote)
    young = collect(collecting, remote)
    assert (young.delete, young.mark) == ({}, {})
    assert young.waiting
    clock.pass_by(2 * HOUR)
    marking = collect(collecting, remote)
    assert marking.delete == {}
    assert marking.mark.keys() == young.waiting.keys()
    assert names(remote) == before
    again = collect(collecting, remote)
    assert (again.delete, again.mark) == ({}, {})
    clock.pass_by(2 * HOUR)
    assert collect(collecting, remote, dry_run=True).delete.keys() == marking.mark.keys()
    assert names(remote) == before
    last = collect(collecting, remote)
    assert last.delete == marking.mark
    assert names(remote) == before - last.delete.keys()
    assert remote.has([worse.manifest.parts["model"].index]) == set()
    assert {best.id, worse.id} <= {name.rpartition("/")[2] for name in names(remote)}  # manifests stay
    index_ids = {part.index for part in best.manifest.parts.values()}
    kept = next(decision.parts for decision in last.decisions if decision.entry.id == best.id)
    assert remote.has(index_ids) == {best.manifest.parts[name].index for name in kept}


def test_what_was_pushed_again_meanwhile_stays(collecting: Repo, remote: Folder) -> None:
    best, worse = save(collecting, 1, 2.0), save(collecting, 2, 3.0)
    collecting.push([best, worse], remote)
    clock = Clock(remote)
    clock.pass_by(2 * HOUR)
    marking = collect(collecting, remote)
    assert marking.mark
    clock.pass_by(2 * HOUR)
    before = names(remote)
    assert collecting.push([worse], remote).objects  # marked, so written again
    assert collect(collecting, remote).delete == {}
    assert names(remote) == before


def test_what_was_written_since_it_was_marked_is_marked_anew(collecting: Repo, remote: Folder) -> None:
    best, worse = save(collecting, 1, 2.0), save(collecting, 2, 3.0)
    collecting.push([best, worse], remote)
    clock = Clock(remote)
    clock.pass_by(2 * HOUR)
    marked = collect(collecting, remote).mark
    clock.pass_by(HOUR)
    collecting.push([worse], remote)
    clock.pass_by(2 * HOUR)
    again = collect(collecting, remote)
    assert (again.delete, again.mark) == ({}, marked)
    clock.pass_by(2 * HOUR)
    assert collect(collecting, remote).delete == marked


def test_checkpoints_of_other_machines_count(collecting: Repo, remote: Folder, tmp_path: Path) -> None:
    """Their manifests are in the remote alone: nobody has pulled them."""
    (tmp_path / "other").mkdir()
    other = Repo.init(tmp_path / "other")
    theirs = save(other, 7, 1.0)
    other.push([theirs], remote)
    mine = save(collecting, 1, 2.0)
    collecting.push([mine], remote)
    clock = Clock(remote)
    for _ in range(3):
        clock.pass_by(2 * HOUR)
        collect(collecting, remote)
    models = {entry.manifest.parts["model"].index for entry in (theirs, mine)}
    assert remote.has(models) == models


@pytest.mark.parametrize("harm", ["manifest", "index", "marks", "no manifest"])
def test_what_can_not_be_read_stops_it(collecting: Repo, remote: Folder, tmp_path: Path, harm: str) -> None:
    (tmp_path / "other").mkdir()
    other = Repo.init(tmp_path / "other")
    theirs = save(other, 7, 1.0)
    other.push([theirs], remote)
    clock = Clock(remote)
    clock.pass_by(2 * HOUR)
    if harm == "manifest":
        (remote.path / "manifests" / theirs.manifest.file_name(theirs.id)).write_bytes(b"{}")
    elif harm == "index":
        index_id = theirs.manifest.parts["model"].index
        (remote.path / "objects" / index_id[:2] / index_id).write_bytes(b"garbage")
    elif harm == "marks":
        remote.write_file("gc/marked.json", b"{}")
    else:
        (remote.path / "manifests" / theirs.manifest.file_name(theirs.id)).unlink()
    before = names(remote)
    with pytest.raises(CastoreError) as caught:
        collect(collecting, remote)
    expected = {"manifest": CorruptManifest, "marks": CorruptBundle, "no manifest": RootsUnreadable}
    assert isinstance(caught.value, expected.get(harm, CastoreError))
    assert names(remote) == before
    if harm != "marks":
        assert marks.read(remote).files == frozenset()


@settings(max_examples=20)
@given(st.data())
def test_whatever_happens_between_passes_kept_checkpoints_stay_whole(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Repo.init(folder)
        (Path(folder) / ".castore" / "config.toml").write_text(
            '[store]\nchunk_size = "64KiB"\nfsync = false\n[remotes]\nshared = "shared"\ncollector = "me"\n'
        )
        repo = Repo.open(folder)
        remote = Folder("shared", Path(folder) / "shared")
        clock = Clock(remote)
        entries: list[Entry] = []
        pushed: set[str] = set()
        for step in range(data.draw(st.integers(2, 8))):
            match data.draw(st.sampled_from(["save", "push", "push", "gc", "wait"])):
                case "save":
                    loss = random.Random(step).random() + 1
                    entries.append(save(repo, data.draw(st.integers(0, 3)) + 10 * len(entries), loss))
                case "push" if entries:
                    entry = data.draw(st.sampled_from(entries))
                    repo.push([entry], remote)
                    pushed.add(entry.id)
                case "gc":
                    if pushed:
                        collect(repo, remote, Policy(keep=2, keep_latest=1, keep_optimizer=1))
                case "wait":
                    clock.pass_by(2 * HOUR)
        if not pushed:
            return
        plan = collect(repo, remote, Policy(keep=2, keep_latest=1, keep_optimizer=1))
        other = Repo.init(Path(folder) / "other")
        other.remotes.append(remote)
        for decision in plan.decisions:
            if decision.entry.id in pushed:
                kept = [name for name in decision.parts if remote.has([decision.entry.manifest.parts[name].index])]
                other.fetch(decision.entry, kept)  # whatever looks whole is whole
