"""Pushing: what is there afterwards, in which order it came, and what an interruption or damage leaves."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from builders import parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore

from castore import Repo
from castore.errors import CollectionStopped, CorruptManifest, NotFound, ObjectMissing, RemoteUnavailable, UploadRefused
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.gc import collect_garbage
from castore.policy.retention import Policy
from castore.remote_gc import collect_remote
from castore.remotes import marks, packs
from castore.remotes.base import RemoteFile
from castore.remotes.bucket import Bucket, Website
from castore.remotes.folder import Folder
from castore.remotes.marks import Marks
from castore.transfer import find_manifest, read_manifests


class Watched(Bucket):
    """A bucket in memory that notes the order of what is written, and can fail."""

    def __init__(self, name: str = "cloud", store: Any = None) -> None:
        super().__init__(name, "s3://in-memory", store or MemoryStore())
        self.written: list[str] = []
        self.fails_after = 1 << 30
        self._turns = itertools.count()  # one a write, whichever thread makes it

    def _create(self, name: str, data: bytes, *, replace: bool) -> bool:
        if next(self._turns) >= self.fails_after:
            raise UploadRefused(self.name, "a test says so")
        is_new = super()._create(name, data, replace=replace)
        if is_new:
            self.written.append(name)
        return is_new

    def again(self) -> Watched:
        """The same bucket, in another process."""
        return Watched(self.name, self._connection.store)


def save(repo: Repo, step: int = 1, **more: Any) -> Entry:
    saved = repo.save({**parts(step), **more}, run="main", step=step, metrics={"val_loss": 3.0 - step / 100})
    return Entry(saved.id, saved.manifest)


def clone(repo: Repo, path: Path) -> Repo:
    """Another machine's clone: manifests and settings, no data."""
    shutil.copytree(repo.root, path / ".castore", ignore=shutil.ignore_patterns("objects", "tmp", "cache"))
    (path / ".castore" / "tmp").mkdir()
    (path / ".castore" / "objects").mkdir()
    return Repo.open(path)


@pytest.fixture(params=["bucket", "folder"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return Watched() if request.param == "bucket" else Folder("shared", tmp_path / "shared")


def test_what_was_pushed_is_loaded_elsewhere(repo: Repo, remote: Any, tmp_path: Path) -> None:
    entry = save(repo)
    told: list[tuple[int, int]] = []
    pushed = repo.push([entry], remote, progress=lambda done, total: told.append((done, total)))
    assert pushed.checkpoints == (entry.id,)
    assert pushed.objects == len(repo.store.stored())
    assert pushed.bytes == sum(stored.size for stored in repo.store.stored().values())
    assert told[-1] == (pushed.bytes, pushed.bytes)
    assert pushed.left_out == {}
    other = clone(repo, tmp_path / "other")
    other.remotes.append(remote)
    assert other.resolve("best").require().id == entry.id
    assert other.load(entry.id).keys() == entry.manifest.parts.keys()
    assert other.store.stored().keys() == repo.store.stored().keys()


def test_chunks_come_before_indexes_and_manifests_last(repo: Repo) -> None:
    entry = save(repo)
    remote = Watched()
    repo.push([entry], remote)
    indexes = {part.index for part in entry.manifest.parts.values()}
    names = [name.rpartition("/")[2] for name in remote.written]
    for part in entry.manifest.parts.values():
        chunks = [names.index(name) for name in names if name not in indexes and name != entry.id and len(name) == 64]
        assert chunks
        assert names.index(part.index) > min(chunks)
    assert {*names[-2:]} == {entry.id, Path(entry.manifest.file_name(entry.id)).name}
    assert remote.written[-2] == f"manifests/{entry.manifest.file_name(entry.id)}"  # its object tells of both


def test_a_second_push_moves_nothing(repo: Repo, remote: Any) -> None:
    entry = save(repo)
    repo.push([entry], remote)
    again = repo.push([entry], remote.again() if isinstance(remote, Watched) else remote)
    assert (again.objects, again.bytes, again.checkpoints) == (0, 0, (entry.id,))


def test_a_push_that_fails_goes_on_where_it_stopped(repo: Repo, tmp_path: Path) -> None:
    entry = save(repo)
    whole = Watched()
    repo.push([entry], whole)
    remote = Watched()
    failures = 0
    while True:
        attempt = remote.again()
        attempt.fails_after = 2
        other = clone(repo, tmp_path / f"other{failures}")
        other.remotes.append(remote.again())
        states = other.part_states(entry)
        for name, state in states.items():  # at no moment does a part look whole that is not
            if state.where == "remote":
                assert other.load(entry.id, [name])
        try:
            repo.push([entry], attempt)
            break
        except UploadRefused:
            failures += 1
    assert failures > 3
    assert sorted(file.name for file in remote.files("")) == sorted(file.name for file in whole.files(""))


def test_damage_here_is_not_pushed_and_the_rest_is(repo: Repo, remote: Any) -> None:
    entry = save(repo)
    trainer = entry.manifest.parts["trainer"].index
    path = repo.store.path(trainer)
    path.write_bytes(path.read_bytes()[:-1])
    pushed = Repo.open(repo.root.parent).push([entry], remote)
    assert pushed.checkpoints == (entry.id,)
    assert [part for _, part in pushed.left_out] == ["trainer"]
    assert remote.has([trainer]) == set()
    assert remote.has([entry.manifest.parts["model"].index])


def test_a_damaged_chunk_holds_back_its_part(repo: Repo, remote: Any) -> None:
    entry = save(repo)
    indexes = {part.index for part in entry.manifest.parts.values()}
    chunk = next(object_id for object_id in repo.store.stored() if object_id not in indexes)
    path = repo.store.path(chunk)
    path.write_bytes(path.read_bytes()[:-1])
    pushed = Repo.open(repo.root.parent).push([entry], remote)
    assert chunk[:12] in " ".join(pushed.left_out.values())
    assert remote.has([chunk]) == set()
    for _, part in pushed.left_out:
        assert remote.has([entry.manifest.parts[part].index]) == set()


def test_a_part_that_was_dropped_here_is_told(repo: Repo, remote: Any) -> None:
    entry = save(repo)
    repo.store.path(entry.manifest.parts["trainer"].index).unlink()
    pushed = repo.push([entry], remote)
    assert pushed.left_out == {(entry.id, "trainer"): "its data isn't here"}
    assert pushed.checkpoints == (entry.id,)


@pytest.mark.parametrize("harm", [b"", b"garbage"])
def test_repair_replaces_bad_copies(repo: Repo, tmp_path: Path, harm: bytes) -> None:
    entry = save(repo)
    remote = Watched()
    repo.push([entry], remote)
    for object_id in repo.store.stored():
        remote.write_file(f"objects/{object_id[:2]}/{object_id}", harm, replace=True)
    other = clone(repo, tmp_path / "other")
    other.remotes.append(remote.again())
    with pytest.raises(ObjectMissing, match=r"cloud: bad copy in cloud, it is corrupt.*push --repair"):
        other.load(entry.id)
    pushed = repo.push([entry], remote.again(), repair=True)
    assert pushed.objects == len(repo.store.stored())
    other.remotes[:] = [remote.again()]
    assert other.load(entry.id)
    assert repo.push([entry], remote.again(), repair=True).objects == 0


def test_a_read_only_remote_is_refused(repo: Repo) -> None:
    with pytest.raises(UploadRefused, match="reading alone"):
        repo.push([save(repo)], Website("site", "https://models.example"))


# -- packs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs as for thousands of objects, with few."""
    monkeypatch.setattr("castore.transfer.PACK_ABOVE", 5)
    monkeypatch.setattr("castore.transfer.MAX_BYTES", 300_000)


def large(repo: Repo, step: int = 1, chunks: int = 12) -> Entry:
    """A checkpoint whose model has several chunks that nothing compresses."""
    data = random.Random(step).randbytes(chunks << 16)
    import torch

    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    saved = repo.save({"model": {"w": tensor}, "trainer": {"step": step}}, run="main", step=step)
    return Entry(saved.id, saved.manifest)


@pytest.mark.usefixtures("small_packs")
def test_many_objects_go_into_packs_and_come_back(repo: Repo, tmp_path: Path) -> None:
    entry = large(repo)
    remote = Watched()
    pushed = repo.push([entry], remote)
    assert pushed.objects == len(repo.store.stored())
    loose = [name for name in remote.written if name.startswith("objects/")]
    assert len(loose) == 2  # the trainer's index, and the manifest
    assert len([name for name in remote.written if name.startswith("packs/")]) == 5  # three, the index, their names
    other = clone(repo, tmp_path / "other")
    other.remotes.append(remote.again())
    assert other.part_states(entry)["model"].where == "remote"
    assert other.fetch(entry).objects == len(repo.store.stored())
    assert other.store.stored().keys() == repo.store.stored().keys()
    assert repo.push([entry], remote.again()).objects == 0


@pytest.mark.usefixtures("small_packs")
def test_a_part_that_shares_packed_chunks_pushes_the_others_alone(repo: Repo, tmp_path: Path) -> None:
    import torch

    entry = large(repo)
    remote = Watched()
    repo.push([entry], remote)
    state = repo.load(entry.id)
    state["model"]["more"] = torch.frombuffer(bytearray(random.Random(9).randbytes(1 << 16)), dtype=torch.uint8)
    saved = repo.save(state, run="main", step=2)
    second = Entry(saved.id, saved.manifest)
    assert repo.push([second], remote.again()).objects == 2  # a chunk and an index
    assert repo.push([second], remote.again(), repair=True).objects == 0
    for number, cloud in enumerate(
        (remote.again(), Website("site", "https://models.example", remote._connection.store))
    ):
        other = clone(repo, tmp_path / f"other{number}")
        other.fetch(second, remotes=[cloud])
        assert torch.equal(other.load(second.id)["model"]["more"], state["model"]["more"])
    # the packs stay for as long as the second needs them, whatever becomes of the first
    repo.forget(entry)
    for file in list(remote.files("manifests")):
        if entry.id[:12] in file.name:
            remote.remove([file.name])
    path = repo.root / "config.toml"
    path.write_text(path.read_text() + '[remotes]\nshared = "shared"\ncollector = "me"\n')
    collecting = Repo.open(repo.root.parent)
    for _ in range(3):
        plan = collect_remote(collecting, remote.again(), Policy(), machine="me", grace=timedelta(0))
    assert plan.delete == {}
    assert not remote.again().has([entry.manifest.parts["model"].index])
    other = clone(repo, tmp_path / "last")
    other.fetch(second, remotes=[remote.again()])


class Failing(Watched):
    """A bucket that can't be read of late."""

    def get(self, object_id: ObjectId) -> bytes | None:
        raise RemoteUnavailable(self.name, f"no answer when asked for {object_id[:8]}")


def test_gc_deletes_nothing_when_an_index_can_not_be_read_for_now(repo: Repo, tmp_path: Path) -> None:
    remote = Watched()
    entry = save(repo)
    repo.push([entry], remote)
    path = repo.root / "config.toml"
    path.write_text(path.read_text() + '[remotes]\nshared = "shared"\ncollector = "me"\n')
    collecting = clone(repo, tmp_path / "other")
    before = sorted(file.name for file in remote.files(""))
    for _ in range(2):
        failing = Failing("cloud", remote._connection.store)
        with pytest.raises(RemoteUnavailable, match="no answer"):
            collect_remote(collecting, failing, Policy(), machine="me", grace=timedelta(0))
    assert sorted(file.name for file in remote.files("")) == before


@pytest.mark.usefixtures("small_packs")
def test_a_bad_object_in_a_pack_is_mended_by_one_beside_it(repo: Repo, tmp_path: Path) -> None:
    entry = large(repo)
    remote = Watched()
    repo.push([entry], remote)
    for file in list(remote.files("packs")):
        if not file.name.startswith(packs.PARTS):
            data = bytearray(remote.read_file(file.name, 1 << 30) or b"")
            data[min(40_000, len(data) - 1)] ^= len(data) > 40_000  # all but that of the index
            remote.write_file(file.name, bytes(data), replace=True)
    other = clone(repo, tmp_path / "other")
    other.remotes.append(remote.again())
    with pytest.raises(ObjectMissing, match="bad copy in cloud"):
        other.fetch(entry)
    assert repo.push([entry], remote.again(), repair=True).objects == 3
    other.remotes[:] = [remote.again()]
    other.fetch(entry)
    assert other.load(entry.id)


class Counting(Watched):
    """A bucket that counts its requests."""

    requests = 0

    def _ask(self, *arguments: Any, **options: Any) -> Any:
        type(self).requests += 1
        return super()._ask(*arguments, **options)


def test_thousands_of_objects_take_few_requests(repo: Repo, tmp_path: Path) -> None:
    entry = large(repo, chunks=1600)
    store = MemoryStore()
    units = sum(stored.size for stored in repo.store.stored().values()) / (8 << 20)
    Counting.requests = 0
    assert repo.push([entry], Counting("cloud", store)).objects == len(repo.store.stored()) > 1600
    fixed = 20  # whatever the size: marks, what is there, the small part, names and the manifest
    assert Counting.requests <= 1.2 * units + fixed
    other = clone(repo, tmp_path / "other")
    Counting.requests = 0
    other.fetch(entry, remotes=[Counting("cloud", store)])
    assert Counting.requests <= 1.2 * units + fixed
    assert other.store.stored().keys() == repo.store.stored().keys()


# -- marks of a collection -------------------------------------------------------------------------------------------


def push_and_mark(repo: Repo, entry: Entry, remote: Watched) -> list[str]:
    """Push a checkpoint and mark all that is there then; return the names of the files."""
    repo.push([entry], remote)
    files = [file.name for file in remote.files("")]
    marks.write(remote, Marks.of(files))
    return files


@pytest.mark.usefixtures("small_packs")
def test_what_is_marked_for_deletion_is_written_again(repo: Repo) -> None:
    entry = large(repo)
    remote = Watched()
    files = push_and_mark(repo, entry, remote)
    again = remote.again()
    assert repo.push([entry], again).objects == len(repo.store.stored())
    assert {name for name in files if not name.startswith("manifests/")} <= {*again.written}


@pytest.mark.parametrize("chunks", [3, 12])
@pytest.mark.usefixtures("small_packs")
def test_a_repair_writes_again_what_is_marked(repo: Repo, chunks: int) -> None:
    entry = large(repo, chunks=chunks)
    remote = Watched()
    push_and_mark(repo, entry, remote)
    again = remote.again()
    assert repo.push([entry], again, repair=True).objects == len(repo.store.stored())
    written = {name.rpartition("/")[2] for name in again.written}
    assert {entry.id, *(part.index for part in entry.manifest.parts.values())} <= written


@pytest.mark.usefixtures("small_packs")
def test_a_pack_that_is_written_again_under_a_marked_name_may_be_deleted(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = large(repo)
    remote = Watched()
    repo.push([entry], remote)
    files = [file.name for file in remote.files("packs")]
    marks.write(remote, Marks(frozenset(), frozenset(files)))
    remote.remove([name for name in files if name.startswith(packs.PARTS)])  # as gc does first
    looks = []
    real = marks.nothing_deleted_since
    monkeypatch.setattr(marks, "nothing_deleted_since", lambda *given: (looks.append(given), real(*given))[1])
    repo.push([entry], remote.again())
    assert len(looks) >= 2  # before the index, and after the manifest


@pytest.mark.usefixtures("small_packs")
def test_a_push_is_not_disturbed_by_others_of_the_same_process(repo: Repo, tmp_path: Path) -> None:
    first, second = large(repo), large(repo, step=2, chunks=3)

    class Busy(Watched):
        def _create(self, name: str, data: bytes, *, replace: bool) -> bool:
            if name.startswith("packs/") and not self.disturbed:
                self.disturbed.append(name)
                repo.push([second], self)
                collect_garbage(repo, dry_run=True)
            return super()._create(name, data, replace=replace)

        disturbed: ClassVar[list[str]] = []

    busy = Busy()
    repo.remotes.append(busy)
    repo.push([first], busy)
    assert busy.disturbed
    other = clone(repo, tmp_path / "other")
    other.fetch(first, remotes=[busy.again()])
    assert other.load(first.id)


@pytest.mark.usefixtures("small_packs")
def test_a_pack_that_was_gone_and_is_written_again_counts(repo: Repo, tmp_path: Path) -> None:
    entry = large(repo)
    remote = Watched()
    repo.push([entry], remote)
    index_id = entry.manifest.parts["model"].index
    kept_open = remote.again()
    assert kept_open.has([index_id]) == {index_id}
    remote.remove([file.name for file in remote.files("packs") if not file.name.startswith(packs.PARTS)])
    assert kept_open.get(index_id) is None
    repo.push([entry], kept_open)
    other = clone(repo, tmp_path / "other")
    other.fetch(entry, remotes=[remote.again()])
    assert other.load(entry.id)


@pytest.mark.parametrize("chunks", [3, 30])
@pytest.mark.usefixtures("small_packs")
def test_what_a_remote_had_at_the_last_push_is_looked_for_again(repo: Repo, tmp_path: Path, chunks: int) -> None:
    """A process pushes for weeks, and others delete meanwhile."""
    first = large(repo, chunks=chunks)
    kept_open = Watched()
    repo.push([first], kept_open)
    gone = [file.name for file in kept_open.files("") if not file.name.startswith("manifests")]
    kept_open.again().remove(gone)
    state = repo.load(first.id)
    state["model"]["more"] = 1
    saved = repo.save(state, run="main", step=2)
    second = Entry(saved.id, saved.manifest)
    assert repo.push([second], kept_open).left_out == {}
    other = clone(repo, tmp_path / "other")
    other.fetch(second, remotes=[kept_open.again()])
    assert other.load(second.id)


class Interrupted(Watched):
    """A bucket in which something else happens, once, just before a request that does not delete."""

    before: ClassVar[dict[int, Callable[[], None]]] = {}
    requests: ClassVar[int] = 0

    def _ask(self, request: Any, **options: Any) -> Any:
        if "paths" not in getattr(request, "keywords", {}):
            Interrupted.requests += 1
            Interrupted.before.pop(Interrupted.requests, lambda: None)()
        return super()._ask(request, **options)


@pytest.mark.slow
@pytest.mark.parametrize("outer", ["gc", "push"])
@pytest.mark.usefixtures("small_packs")
def test_a_push_of_packs_and_a_pass_at_any_moment_of_each_other(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outer: str
) -> None:
    monkeypatch.setattr(marks, "PATIENCE", 0.1)
    monkeypatch.setattr(marks, "_TOO_LATE", 0.05)
    monkeypatch.setattr("castore.remotes.fallback.ASKERS", 1)
    path = repo.root / "config.toml"
    path.write_text(path.read_text() + '[remotes]\nshared = "shared"\ncollector = "me"\n')
    pusher = clone(repo, tmp_path / "pusher")
    collecting = Repo.open(repo.root.parent)
    model = pusher.load(large(pusher, chunks=8).id)["model"]
    old = pusher.save({"model": model}, run="main", step=1, metrics={"val_loss": 3.0})
    saved = pusher.save({"model": {**model, "more": 1}}, run="main", step=3, metrics={"val_loss": 0.1})
    first, wanted = Entry(old.id, old.manifest), Entry(saved.id, saved.manifest)
    prepared = Watched()
    pusher.push([first], prepared)
    best = pusher.save({"model": {"n": 2}}, run="main", step=2, metrics={"val_loss": 0.5})
    pusher.push([Entry(best.id, best.manifest)], prepared)
    now = datetime.now(UTC)

    def collect(remote: Watched, hours: int) -> None:
        policy = Policy(keep=1, keep_latest=0)
        with contextlib.suppress(CollectionStopped):
            collect_remote(
                collecting, remote, policy, machine="me", grace=timedelta(hours=1), now=now + timedelta(hours=hours)
            )

    collect(prepared, 2)
    assert any(name.startswith(packs.PARTS) for name in marks.read(prepared).files)
    contents = {file.name: prepared.read_file(file.name, 1 << 30) or b"" for file in prepared.files("")}
    for moment in itertools.count(1):
        remote = Watched()
        for name in sorted(contents, key=lambda name: name == marks.NAME):  # the marks are younger than what is marked
            remote.write_file(name, contents[name])

        def act(name: str, place: Watched) -> None:
            if name == "gc":
                collect(place, 6)
            else:
                assert pusher.push([wanted], place).left_out == {}

        Interrupted.requests = 0
        inner = functools.partial(act, "push" if outer == "gc" else "gc", remote.again())
        Interrupted.before = {moment: inner}
        act(outer, Interrupted("cloud", remote._connection.store))
        if Interrupted.before:
            break
        third = clone(repo, tmp_path / f"other{moment}")
        third.catalog.add(wanted.manifest)
        third.fetch(wanted, remotes=[remote.again()])
        assert third.load(wanted.id), moment
    assert moment > 15


# -- manifests in a remote -------------------------------------------------------------------------------------------


def test_a_manifest_is_found_by_its_id_or_the_first_digits(repo: Repo) -> None:
    remote = Watched()
    entries = [save(repo, step) for step in (1, 2)]
    repo.push(entries, remote)
    for entry in entries:
        for digits in (4, 12, 20, 64):
            assert find_manifest(remote.again(), entry.id[:digits].upper()) == entry
    assert sorted(read_manifests(remote.again())) == sorted(entries)
    with pytest.raises(NotFound, match="cloud has no checkpoint"):
        find_manifest(remote, "f" * 64)
    with pytest.raises(NotFound, match=r"castore ls cloud"):
        find_manifest(remote, "0123456789ab" if not entries[0].id.startswith("0123") else "ab0123456789")


def test_a_manifest_that_is_not_what_was_asked_for_is_refused(repo: Repo) -> None:
    remote = Watched()
    first, second = (save(repo, step) for step in (1, 2))
    repo.push([first, second], remote)
    name = f"manifests/{first.manifest.file_name(first.id)}"
    other = remote.read_file(f"manifests/{second.manifest.file_name(second.id)}", 1 << 20)
    assert other is not None
    remote.write_file(name, other, replace=True)
    with pytest.raises(CorruptManifest, match="under another name"):
        read_manifests(remote)
    frame = remote.get(second.id)
    assert frame is not None
    remote.write_file(f"objects/{first.id[:2]}/{first.id}", frame, replace=True)
    with pytest.raises(NotFound, match="corrupt"):
        find_manifest(remote.again(), first.id)


class Unreachable(Folder):
    def files(self, folder: str) -> Iterator[RemoteFile]:
        raise RemoteUnavailable(self.name, f"no answer when asked for {folder}")

    def read_file(self, name: str, limit: int) -> bytes | None:
        raise RemoteUnavailable(self.name, f"no answer when asked for {name}, {limit}")


def test_a_remote_that_is_down_fails_the_push(repo: Repo, tmp_path: Path) -> None:
    with pytest.raises(RemoteUnavailable, match="no answer"):
        repo.push([save(repo)], Unreachable("down", tmp_path / "shared"))


# -- any sequence ----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9), st.booleans()), min_size=1, max_size=6))
def test_whatever_fails_in_between_the_end_is_the_same(steps: Sequence[tuple[int, int, bool]]) -> None:
    """Pushes of any checkpoints in any order, cut short anywhere, and a last one that isn't."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Repo.init(folder)
        (Path(folder) / ".castore" / "config.toml").write_text('[store]\nchunk_size = "64KiB"\nfsync = false\n')
        repo = Repo.open(folder)
        entries = {step: save(repo, step) for step in {step for step, _, _ in steps}}
        remote = Watched()
        for step, writes, repair in steps:
            attempt = remote.again()
            attempt.fails_after = writes
            try:
                repo.push([entries[step]], attempt, repair=repair)
            except UploadRefused:
                continue
        repo.push(list(entries.values()), remote.again())
        whole = Watched()
        repo.push(list(entries.values()), whole)
        assert {file.name for file in remote.files("")} == {file.name for file in whole.files("")}
        other = clone(repo, Path(folder) / "other")
        other.remotes.append(remote.again())
        for entry in entries.values():
            other.fetch(entry)
        assert other.store.stored().keys() == repo.store.stored().keys()


@pytest.mark.usefixtures("small_packs")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(4, 16)), min_size=2, max_size=4),
    st.permutations(range(4)),
    st.lists(st.sampled_from([0, 1, 2, 3, "gc", "gc"]), min_size=6, max_size=12),
)
def test_what_looks_whole_is_whole_and_the_best_stays(
    runs: Sequence[tuple[int, int]], losses: Sequence[int], steps: Sequence[int | str]
) -> None:
    """Checkpoints that share any of sixteen chunks, in packs or not, beside collections without grace."""
    import tempfile

    import torch

    blocks = [torch.frombuffer(bytearray(random.Random(n).randbytes(1 << 16)), dtype=torch.uint8) for n in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        Repo.init(folder)
        text = '[store]\nchunk_size = "64KiB"\nfsync = false\n[remotes]\nshared = "shared"\ncollector = "me"\n'
        (Path(folder) / ".castore" / "config.toml").write_text(text)
        repo = Repo.open(folder)
        entries: list[Entry] = []
        for number, (start, length) in enumerate(runs):
            state = {"model": {f"{n}": block for n, block in enumerate(blocks) if start <= n < start + length}}
            saved = repo.save(state, run="main", step=number, metrics={"val_loss": 1.0 + losses[number]})
            entries.append(Entry(saved.id, saved.manifest))
        remote = Watched()
        indexes = [entry.manifest.parts["model"].index for entry in entries]
        pushed: set[ObjectId] = set()  # equal models are one: who pushes the one has pushed the other
        for step in steps:
            if isinstance(step, int):
                repo.push([entries[step % len(entries)]], remote.again())
                pushed.add(indexes[step % len(entries)])
            elif list(remote.files("manifests")):
                policy = Policy(keep=1, keep_latest=0)
                collect_remote(repo, remote.again(), policy, machine="me", grace=timedelta(0))
        there = [number for number, index_id in enumerate(indexes) if index_id in pushed]
        best = min(there, key=lambda number: losses[number], default=None)
        for number, entry in enumerate(entries):
            is_there = remote.again().has([indexes[number]])
            assert is_there or number != best
            if is_there:
                (Path(folder) / f"{number}").mkdir()
                Repo.init(Path(folder) / f"{number}").fetch(entry, remotes=[remote.again()])
