"""What a push lost is brought back from the bundle: by the installed program, real clones, real git."""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from actions_service import Service as Cache
from actions_service import whole
from machines import Machine, World

import castore
from castore import Repo
from castore.errors import CorruptBundle, DataMissing, Locked, NotPushed, UnsupportedVersion, UsageError
from castore.format import bundle
from castore.format import frame as frames
from castore.format.ids import hash_bytes
from castore.github import bundling, recovery
from castore.progress import ignore_progress
from castore.remotes.github_cache import GitHubCache
from castore.remotes.github_service import CacheService


@pytest.fixture
def lost(world: World, one: castore.SaveResult) -> Lost:
    """A second session has uploaded its checkpoint, and its push was refused; its machine is gone."""
    machine = world.machine()
    machine.restore()
    saved = machine.checkpoint(20, 2.0, parent=one.id)
    machine.repo.catalog.pin(saved.id)
    machine.repo.add_session("a", datetime.now(UTC), {"final_step": 20})
    hook = world.origin / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho this branch is protected\nexit 1\n")
    hook.chmod(0o755)
    said = machine.run("ci", "save", "--commit", code=1)
    hook.unlink()
    key = said.split("castore ci recover ")[1].split()[0]
    assert key in machine.summary.read_text()
    return Lost(saved, key)


class Lost:
    def __init__(self, saved: castore.SaveResult, key: str) -> None:
        self.saved, self.key = saved, key


def recover(machine: Machine, name: str, **options: Any) -> recovery.Recovered:
    return recovery.recover(machine.repo, CacheService.of_job(machine.job), name, pause=lambda _: None, **options)


def upload(cache: Cache, plain: bytes) -> str:
    """Upload a bundle that ends with an object of these bytes; return its key."""
    contents = {hash_bytes(data): frames.encode_frame(data) for data in (b"first", plain)}
    layout = bundle.lay_out({object_id: len(frame) for object_id, frame in contents.items()})
    data = bundle.HEADER + b"".join(contents.values()) + layout.tail
    remote = GitHubCache(CacheService.of_job(cache.environment()), [])
    return remote.upload(layout, lambda start, stop: data[start:stop], ignore_progress)


def change_frames(data: bytes) -> bytes:
    (end,) = struct.unpack("<Q", data[-16:-8])
    return data[: end - 10] + bytes(byte ^ 1 for byte in data[end - 10 : end]) + data[end:]


def test_a_lost_push_is_brought_back_and_trusted_once_it_is_committed(world: World, lost: Lost) -> None:
    helper = world.machine()
    said = helper.run("ci", "recover", lost.key)
    assert f"new     {lost.saved.id[:12]}: a, step 20, validation loss 2" in said
    assert "git     4 files, staged: look at them, commit and push" in said
    assert f"| `{lost.saved.id[:12]}` | `a` | 20 | 2.0000 |" in helper.summary.read_text()
    staged = helper.git("diff", "--cached", "--name-status").splitlines()
    folders = sorted(line.removeprefix("A\t.castore/").partition("/")[0] for line in staged)
    assert folders == ["bundles", "manifests", "pins", "sessions"]
    match = world.machine().restore().match
    assert match is not None
    assert match.step == 10  # until somebody commits it
    helper.git("commit", "-qm", "recovered")
    helper.git("push", "-q", "origin", "main")
    later = world.machine()
    match = later.restore().match
    assert match is not None
    assert (match.id, match.availability) == (lost.saved.id, "full")
    assert later.repo.load(lost.saved.id)["trainer"] is not None
    assert later.repo.catalog.pins() == {lost.saved.id}


def test_it_can_be_committed_at_once(world: World, lost: Lost) -> None:
    machine = world.machine()
    told = machine.json("ci", "recover", lost.key.removeprefix("castore-"), "--commit", "--message", "back again")
    assert (told["checkpoints"], len(told["files"]), told["passed_over"]) == ([lost.saved.id], 4, [])
    assert world.machine().git("log", "-1", "--format=%s %H").split() == ["back", "again", told["commit"]]
    assert machine.told()["commit"] == told["commit"]


def test_what_is_there_stays_as_it_is(world: World, lost: Lost) -> None:
    recover(world.machine(), lost.key, commit=True)
    machine = world.machine()
    again = recover(machine, lost.key, commit=True)
    assert (again.checkpoints, again.files) == ((), ())
    assert "has all of it: nothing was lost" in machine.run("ci", "recover", lost.key)
    assert machine.git("status", "--porcelain") == ""


def test_a_push_of_what_was_recovered_can_be_lost_too(world: World, lost: Lost) -> None:
    hook = world.origin / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    machine = world.machine()
    with pytest.raises(NotPushed, match=f"castore ci recover {lost.key}"):
        recover(machine, lost.key, commit=True)
    hook.unlink()
    assert recover(machine, lost.key, commit=True).commit
    assert lost.saved.id in {entry.id for entry in world.machine().repo.checkpoints()}


def test_a_record_of_many_parts_comes_back_as_several(
    world: World, lost: Lost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("castore.format.bundle.PARTS_OF_A_RECORD", 1)
    machine = world.machine()
    recover(machine, lost.key)
    records, broken = machine.repo.catalog.records()
    assert (len(records), broken) == (1 + len(lost.saved.manifest.parts), [])


def test_a_server_that_ignores_ranges_will_do(world: World, lost: Lost) -> None:
    world.cache.fault("GET", whole(), times=100)
    assert recover(world.machine(), lost.key).checkpoints


@pytest.mark.parametrize("name", ["", "ab" * 6, "castore-", "../" * 30, "castore-" + "g" * 64, "a" * 64 + "-xyz"])
def test_what_names_no_bundle_is_refused(world: World, name: str) -> None:
    with pytest.raises(UsageError, match="names no bundle"):
        recover(world.machine(), name)


def test_a_bundle_that_is_gone_is_told(world: World, lost: Lost) -> None:
    world.cache.evict(lost.key)
    machine = world.machine()
    with pytest.raises(DataMissing, match="evicted"):
        recover(machine, lost.key)
    machine.run("ci", "recover", lost.key, code=4)
    assert machine.git("status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda data: data[:-1], "doesn't end like"),
        (lambda data: data[:10], "holds 10 bytes"),
        (lambda data: data[:0], "size can't be told"),
        (lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], "index does not match its id"),
        (lambda data: data[:-16] + b"\xff" * 12 + data[-4:], "doesn't end like"),
        (lambda data: change_frames(data), "its copy is corrupt"),
    ],
    ids=["shorter", "tiny", "empty", "index", "trailer", "frames"],
)
def test_a_poisoned_bundle_is_refused_and_nothing_changed(
    world: World, lost: Lost, harm: Callable[[bytes], bytes], reason: str
) -> None:
    world.cache.replace(lost.key, harm(world.cache.blob(lost.key)))
    machine = world.machine()
    with pytest.raises(CorruptBundle, match=reason):
        recover(machine, lost.key)
    assert machine.git("status", "--porcelain") == ""


def test_hostile_contents_write_nowhere_else(world: World, lost: Lost, cache: Cache) -> None:
    files = {
        "../outside.txt": "x",
        "/tmp/castore-outside.txt": "x",
        "config.toml": "[store]\n",
        "local.toml": "x",
        "tags/release": "x",
        "manifests/a/0000000001-0123456789ab.json": "{}",
        "sessions/../x/20260101T000000.000000Z.json": "{}",
        "sessions/a/20260101T000000.000000Z.json": "[" * 100_000,
        "sessions/a/20260101T000001.000000Z.json": "no json",
        "objects/ab/cd": "x",
        "manifests/\0": "x",
    }
    index_id, machine = hash_bytes(b"i"), world.machine()
    contents = bundle.Contents(files=files, parts={index_id: [None]})
    key = upload(cache, bundle.encode_contents(contents))
    machine.run("ci", "recover", key, code=5)
    status = machine.git("status", "--porcelain", "--untracked-files=all").splitlines()
    assert [line.partition("/")[0] for line in status] == ["A  .castore"]
    assert "/bundles/" in status[0]
    assert not (machine.root.parent / "outside.txt").exists()
    assert lost.key != key


@pytest.mark.parametrize(
    ("plain", "error"),
    [
        (b"weights", CorruptBundle),
        (b"{}", CorruptBundle),
        (b'{"version": 2, "files": {}, "parts": {}}', UnsupportedVersion),
        (b'{"version": 1, "files": {}, "parts": {"x": [null]}}', CorruptBundle),
        (b'{"version": 1, "files": {}, "parts": {"' + b"a" * 64 + b'": ["../x"]}}', CorruptBundle),
        (b'{"version": 1, "files": {}, "parts": {"' + b"a" * 64 + b'": []}}', CorruptBundle),
        (b'{"version": 1, "ref": "a\\n", "files": {}, "parts": {"' + b"a" * 64 + b'": [null]}}', CorruptBundle),
    ],
)
def test_what_says_nothing_or_nonsense_of_itself_is_refused(
    world: World, cache: Cache, plain: bytes, error: type[Exception]
) -> None:
    machine = world.machine()
    with pytest.raises(error):
        recover(machine, upload(cache, plain))
    assert machine.git("status", "--porcelain") == ""


def test_saves_upload_a_little_more_than_objects(world: World) -> None:
    machine = world.machine()
    saved = machine.checkpoint(10, 3.0)
    outcome = machine.save()
    stored = sum(part.stored_bytes for part in saved.manifest.parts.values())
    assert outcome.traffic.uploaded - stored < 4000
    (record, *_) = outcome.records
    assert record.objects == machine.stored() + 1


def test_it_waits_for_who_deletes(world: World, lost: Lost) -> None:
    machine = world.machine()
    world.configure(machine, "[store]\nlock_timeout = 0.1\n")
    with Repo.open(machine.root).lock(exclusive=True), pytest.raises(Locked):
        recover(machine, lost.key)


def test_an_upload_waits_for_who_deletes(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    machine.restore()
    world.configure(machine, "[store]\nlock_timeout = 0.1\n")
    kept = [(machine.repo.find(one.id), ["model"])]
    remote = GitHubCache(CacheService.of_job(machine.job), [])
    with Repo.open(machine.root).lock(exclusive=True), pytest.raises(Locked):
        bundling.upload_missing(machine.repo, remote, kept, {}, ref="", progress=ignore_progress, now=datetime.now(UTC))


def test_outside_of_actions_it_says_so(world: World) -> None:
    machine = world.machine()
    machine.environment.pop("GITHUB_ACTIONS")
    machine.run("ci", "recover", "castore-" + "a" * 64, code=2)
