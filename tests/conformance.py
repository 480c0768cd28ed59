"""What every remote must do. A new one passes by naming itself in test_conformance.py: a shelf, and a class of tests.

A shelf stocks a remote with bytes, good or not, behind the remote's back, as its owner or an attacker could:

    class BucketShelf(Shelf): ...

    class TestBucket(PublishingConformance):
        remote_class = Bucket

        @pytest.fixture
        def shelf(self, tmp_path: Path) -> BucketShelf:
            return BucketShelf(tmp_path)
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import obstore
import pytest

from castore import Repo
from castore.errors import ObjectMissing, RemoteError, StorageError
from castore.format import ids
from castore.format.frame import HEADER_BYTES, MAX_STORED, encode_frame
from castore.format.ids import ObjectId
from castore.remotes import fallback
from castore.remotes.base import PublishingRemote, Remote
from castore.remotes.bucket import Bucket


def frame_of(plain: bytes) -> bytes:
    return encode_frame(plain)


PLAINS = [random.Random(number).randbytes(1000 * number) for number in range(1, 13)]
FRAMES: dict[ObjectId, bytes] = {ids.hash_bytes(plain): frame_of(plain) for plain in PLAINS}
FIRST, SECOND, *_ = FRAMES
ABSENT = ids.hash_bytes(b"no remote has it")


class Shelf(Protocol):
    """Where a kind of remote keeps its objects."""

    def stock(self, contents: Mapping[ObjectId, bytes]) -> Remote:
        """Return a remote that holds exactly these bytes under these ids."""

    def stock_oversized(self, object_id: ObjectId) -> Remote:
        """Return a remote that holds ``MAX_STORED + 1`` bytes under an id, or says that it does."""


class PublishingShelf(Shelf, Protocol):
    def stock(self, contents: Mapping[ObjectId, bytes]) -> PublishingRemote: ...

    def refuse_writes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have every write fail from now on."""

    def contents(self) -> dict[str, bytes]:
        """Return whatever is kept, leftovers of any kind included, by name: that of an object is its id."""


class BucketShelf:
    """A store of obstore, stocked past castore."""

    def __init__(self, store: Any, url: str = "s3://of-a-test") -> None:
        self.store, self.url = store, url

    def stock(self, contents: Mapping[ObjectId, bytes]) -> Bucket:
        for object_id, data in contents.items():
            obstore.put(self.store, f"objects/{object_id[:2]}/{object_id}", data)
        return self.open()

    def stock_oversized(self, object_id: ObjectId) -> Bucket:
        obstore.put(self.store, f"objects/{object_id[:2]}/{object_id}", bytes(MAX_STORED + 1))
        return self.open()

    def open(self) -> Bucket:
        return Bucket("bucket", self.url, self.store)

    def refuse_writes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise obstore.exceptions.GenericError("Generic error: status code: 507 and no more room")

        monkeypatch.setattr(obstore, "put", fail)

    def contents(self) -> dict[str, bytes]:
        names = [file["path"] for page in obstore.list(self.store) for file in page]
        return {name.rpartition("/")[2]: obstore.get(self.store, name).bytes().to_bytes() for name in names}


def truncated(frame: bytes) -> bytes:
    return frame[: max(HEADER_BYTES, len(frame) // 2)]


def flipped(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


def garbage(frame: bytes) -> bytes:
    return random.Random(7).randbytes(len(frame))


def foreign(_: bytes) -> bytes:
    return FRAMES[SECOND]


def header_alone(frame: bytes) -> bytes:
    return frame[:HEADER_BYTES]


def extended(frame: bytes) -> bytes:
    return frame + b"\0"


def bomb(frame: bytes) -> bytes:
    return frame[:8] + (1 << 60).to_bytes(8, "little") + frame[16:]


def of_a_later_version(frame: bytes) -> bytes:
    return frame[:4] + b"\xff" + frame[5:]


HARMS = [truncated, flipped, garbage, foreign, header_alone, extended, bomb, of_a_later_version]


class Conformance:
    """The tests of a remote that is read."""

    remote_class: type

    @pytest.fixture
    def shelf(self) -> Any:
        raise NotImplementedError("say where this remote keeps its objects")

    @pytest.fixture
    def store(self, tmp_path: Path) -> Any:
        """An empty store that the objects are fetched into."""
        return Repo.init(tmp_path / "fetching").store

    def test_its_name_is_fit_for_a_message(self, shelf: Shelf) -> None:
        assert re.fullmatch(r"[ -~]+", shelf.stock({}).name)

    def test_an_absent_object_is_none_and_explained(self, shelf: Shelf, store: Any) -> None:
        remote = shelf.stock(FRAMES)
        assert isinstance(remote, self.remote_class)
        assert remote.get(ABSENT) is None
        assert remote.has([ABSENT]) == set()
        assert remote.explain_missing(ABSENT)
        assert fallback.fetch(store, [remote], ABSENT) is None

    def test_nothing_is_had_of_an_empty_one(self, shelf: Shelf) -> None:
        remote = shelf.stock({})
        assert remote.has(FRAMES) == set()
        assert remote.has([]) == set()
        assert [remote.get(object_id) for object_id in FRAMES] == [None] * len(FRAMES)
        assert remote.explain_missing(FIRST)

    def test_present_objects_are_returned_as_they_were_stored(self, shelf: Shelf, store: Any) -> None:
        remote = shelf.stock(FRAMES)
        assert remote.has([*FRAMES, ABSENT]) == FRAMES.keys()
        assert remote.has(iter([FIRST])) == {FIRST}
        assert {object_id: remote.get(object_id) for object_id in FRAMES} == FRAMES
        assert fallback.fetch(store, [remote], FIRST) == remote.name
        assert ids.hash_bytes(store.read(FIRST)) == FIRST

    def test_get_needs_no_has_before_it(self, shelf: Shelf) -> None:
        assert shelf.stock(FRAMES).get(SECOND) == FRAMES[SECOND]

    @pytest.mark.parametrize("harm", HARMS)
    def test_wrong_bytes_are_a_miss_that_is_remembered_and_logged(
        self, shelf: Shelf, store: Any, harm: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        remote = shelf.stock({**FRAMES, FIRST: harm(FRAMES[FIRST])})
        with caplog.at_level(logging.WARNING, "castore"):
            assert fallback.fetch(store, [remote], FIRST) is None
        assert not store.has(FIRST)
        assert list(store.temporary.iterdir()) == []
        assert remote.name in caplog.text
        assert FIRST[:12] in caplog.text
        with pytest.raises(ObjectMissing):
            fallback.read(store, [remote], FIRST)
        assert remote.get(FIRST) is None
        assert remote.has([FIRST, SECOND]) == {SECOND}
        assert "corrupt" in remote.explain_missing(FIRST)
        assert fallback.fetch(store, [remote], SECOND) == remote.name

    @pytest.mark.parametrize("harm", HARMS)
    def test_wrong_bytes_never_reach_a_buffer_as_if_they_were_right(self, shelf: Shelf, store: Any, harm: Any) -> None:
        remote = shelf.stock({FIRST: harm(FRAMES[FIRST])})
        with pytest.raises(ObjectMissing):
            fallback.read_into(store, [remote], FIRST, memoryview(bytearray(len(PLAINS[0]))))

    @pytest.mark.parametrize("harm", HARMS)
    def test_another_remote_makes_up_for_it(self, shelf: Shelf, store: Any, harm: Any) -> None:
        class Good:
            name = "good"

            def get(self, object_id: ObjectId) -> bytes | None:
                return FRAMES.get(object_id)

        remotes: Any = [shelf.stock({FIRST: harm(FRAMES[FIRST])}), Good()]
        assert fallback.fetch(store, remotes, FIRST) == "good"
        assert store.has(FIRST)

    def test_what_is_larger_than_any_object_is_not_returned(self, shelf: Shelf, store: Any) -> None:
        remote = shelf.stock_oversized(FIRST)
        try:
            frame = remote.get(FIRST)
        except (StorageError, RemoteError):
            frame = None
        assert frame is None or len(frame) <= MAX_STORED
        assert fallback.fetch(store, [remote], FIRST) is None
        assert not store.has(FIRST)
        assert remote.explain_missing(FIRST)

    def test_many_threads_may_ask_at_once(self, shelf: Shelf) -> None:
        remote = shelf.stock(FRAMES)
        asked = [*FRAMES, ABSENT] * 8
        with ThreadPoolExecutor(8) as pool:
            frames = pool.map(remote.get, asked)
            held = pool.map(lambda object_id: remote.has([object_id]), asked)
            assert list(frames) == [FRAMES.get(object_id) for object_id in asked]
            assert list(held) == [{object_id} & FRAMES.keys() for object_id in asked]

    def test_threads_that_find_damage_do_not_disturb_others(self, shelf: Shelf) -> None:
        remote = shelf.stock(FRAMES)

        def use(number: int) -> bytes | None:
            if number % 3 == 0:
                remote.mark_corrupt(FIRST, "a test says so")
            return remote.get(SECOND)

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(use, range(60))) == {FRAMES[SECOND]}
        assert remote.get(FIRST) is None

    def test_a_mark_sticks_and_tells_its_reason(self, shelf: Shelf) -> None:
        remote = shelf.stock(FRAMES)
        remote.mark_corrupt(FIRST, "its bytes hash to 0123")
        for _ in range(2):
            assert remote.get(FIRST) is None
            assert remote.has(FRAMES) == FRAMES.keys() - {FIRST}
        assert "its bytes hash to 0123" in remote.explain_missing(FIRST)
        assert remote.get(SECOND) == FRAMES[SECOND]

    def test_explanations_are_short_and_on_one_line(self, shelf: Shelf) -> None:
        remote = shelf.stock({FIRST: FRAMES[FIRST]})
        remote.mark_corrupt(SECOND, "x")
        for object_id in (ABSENT, SECOND):
            assert re.fullmatch(r"[^\n]{3,500}", remote.explain_missing(object_id))
            assert remote.explain_missing(object_id) in fallback.explain_missing([remote], object_id)

    def test_a_mark_needs_no_object(self, shelf: Shelf) -> None:
        remote = shelf.stock({})
        remote.mark_corrupt(ABSENT, "x")
        assert remote.get(ABSENT) is None
        assert remote.has([ABSENT]) == set()

    def test_its_errors_are_kept_for_the_result(self, shelf: Shelf, store: Any) -> None:
        recorder = fallback.ErrorRecorder(shelf.stock({FIRST: garbage(FRAMES[FIRST]), SECOND: FRAMES[SECOND]}))
        assert fallback.fetch(store, [recorder], SECOND) == recorder.name
        assert recorder.error == ""
        assert fallback.fetch(store, [recorder], FIRST) is None
        assert FIRST[:12] in recorder.error
        assert "corrupt" in recorder.explain_missing(FIRST)


class PublishingConformance(Conformance):
    """The tests of a remote that can also be written to."""

    creates = True
    """Whether the place where it keeps its objects can refuse to overwrite one."""

    def test_what_is_put_is_there(self, shelf: PublishingShelf) -> None:
        remote = shelf.stock({})
        assert all(remote.put(object_id, frame) for object_id, frame in FRAMES.items())
        assert remote.has(FRAMES) == FRAMES.keys()
        assert {object_id: remote.get(object_id) for object_id in FRAMES} == FRAMES
        assert shelf.contents() == FRAMES
        assert shelf.stock({}).get(FIRST) == FRAMES[FIRST]  # through another instance, too

    def test_a_good_copy_is_left_as_it_is(self, shelf: PublishingShelf) -> None:
        remote = shelf.stock(FRAMES)
        if not self.creates:
            assert all(remote.put(object_id, FRAMES[object_id]) for object_id in FRAMES)
            assert shelf.contents() == FRAMES
            return
        for object_id in FRAMES:
            # the same plain bytes in another frame: whoever relies on the size of the first is not disturbed
            assert remote.put(object_id, frame_of(b"as if it were another encoding")) is False
        assert shelf.contents() == FRAMES

    @pytest.mark.parametrize("harm", [*HARMS, lambda _: b""])
    def test_a_corrupt_copy_is_replaced(self, shelf: PublishingShelf, harm: Any) -> None:
        remote = shelf.stock({FIRST: harm(FRAMES[FIRST])})
        remote.mark_corrupt(FIRST, "x")
        assert remote.put(FIRST, FRAMES[FIRST]) is True
        assert remote.get(FIRST) == FRAMES[FIRST]
        assert remote.has([FIRST]) == {FIRST}
        assert shelf.contents() == {FIRST: FRAMES[FIRST]}

    def test_many_threads_may_put_the_same(self, shelf: PublishingShelf) -> None:
        remote = shelf.stock({})
        with ThreadPoolExecutor(8) as pool:
            new = list(pool.map(lambda object_id: remote.put(object_id, FRAMES[object_id]), [*FRAMES] * 8))
        assert sum(new) == len(FRAMES) or (not self.creates and sum(new) > len(FRAMES))
        assert shelf.contents() == FRAMES

    def test_a_put_that_fails_leaves_nothing(self, shelf: PublishingShelf, monkeypatch: pytest.MonkeyPatch) -> None:
        remote = shelf.stock({SECOND: FRAMES[SECOND]})

        shelf.refuse_writes(monkeypatch)
        with pytest.raises((StorageError, RemoteError)):
            remote.put(FIRST, FRAMES[FIRST])
        assert shelf.contents() == {SECOND: FRAMES[SECOND]}
        assert remote.get(FIRST) is None

    def test_a_copy_is_renewed_when_asked_for(self, shelf: PublishingShelf) -> None:
        remote = shelf.stock(FRAMES)
        assert remote.put(FIRST, frame_of(PLAINS[0]), renew=True) is True
        assert remote.get(FIRST) == FRAMES[FIRST]
        assert shelf.contents() == FRAMES

    def test_files_are_written_listed_read_and_removed(self, shelf: PublishingShelf) -> None:
        remote = shelf.stock({})
        before = time.time()
        assert remote.read_file("manifests/main/one.json", 100) is None
        assert list(remote.files("manifests")) == []
        assert remote.write_file("manifests/main/one.json", b"{}")
        assert remote.write_file("manifests/main/two.json", b"{ }")
        assert remote.write_file("manifests/main/two.json", b"{  }", replace=True)
        assert remote.write_file("manifesto", b"of another folder")
        if self.creates:
            assert remote.write_file("manifests/main/two.json", b"no") is False
        assert remote.read_file("manifests/main/two.json", 100) == b"{  }"
        with pytest.raises((StorageError, RemoteError)):
            remote.read_file("manifests/main/two.json", 3)
        listed = {file.name: file for file in remote.files("manifests")}
        assert {name: file.size for name, file in listed.items()} == {
            "manifests/main/one.json": 2,
            "manifests/main/two.json": 4,
        }
        assert all(before - 2 <= file.modified <= time.time() + 2 for file in listed.values())
        others = [f"manifests/main/{number}.json" for number in range(30)]
        for name in others:
            remote.write_file(name, b"{}")
        remote.remove(["manifests/main/never.json", *others, "manifests/main/one.json"])
        assert [file.name for file in remote.files("manifests")] == ["manifests/main/two.json"]

    def test_more_objects_than_are_asked_for_one_by_one(self, shelf: PublishingShelf) -> None:
        many = {ids.hash_bytes(bytes([number % 256, number // 256])): FRAMES[FIRST] for number in range(400)}
        held = dict(list(many.items())[:350])
        remote = shelf.stock(held)
        assert remote.has(many) == held.keys()
        assert remote.has([*many]) == held.keys()
