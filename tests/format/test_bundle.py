from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import CorruptBundle, UnsupportedVersion
from castore.format import bundle
from castore.format.bundle import MOST_BUNDLES, Record
from castore.format.ids import ObjectId, hash_bytes

SIZES = st.lists(st.integers(16, 5000), max_size=20).map(
    lambda sizes: {hash_bytes(bytes([i])): size for i, size in enumerate(sizes)}
)


def a(number: int) -> ObjectId:
    return hash_bytes(b"%d" % number)


def record(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "bundle": a(1),
        "key": f"castore-{a(1)}",
        "created": "2026-01-02T03:04:05.000006Z",
        "bytes": 5000,
        "objects": 7,
        "parts": {a(2): [a(3), a(1)]},
    }
    return Record(**(fields | changes))


# -- the format ------------------------------------------------------------------------------------------------------


@given(SIZES)
def test_a_bundle_says_where_its_objects_are(sizes: dict[ObjectId, int]) -> None:
    layout = bundle.lay_out(sizes)
    assert layout.size == 8 + sum(sizes.values()) + bundle.tail_bytes(len(sizes))
    assert bundle.read_tail(layout.id, layout.tail, layout.size) == layout.places
    assert {object_id: place.length for object_id, place in layout.places.items()} == sizes


def test_another_implementation_reads_it() -> None:
    """By FORMAT.md, section 14, alone."""
    frames = {a(1): b"a" * 20, a(2): b"b" * 30}
    layout = bundle.lay_out({object_id: len(frame) for object_id, frame in frames.items()})
    data = bundle.HEADER + b"".join(frames.values()) + layout.tail
    assert data[:8] == b"CSTB\x01\0\0\0"
    start, count, magic = struct.unpack("<QI4s", data[-16:])
    assert (magic, count) == (b"CSTB", 2)
    index = data[start:-16]
    assert blake3(index).hexdigest() == layout.id
    read_back = {}
    for at in range(0, len(index), 44):
        digest, offset, length = struct.unpack("<32sQI", index[at : at + 44])
        read_back[digest.hex()] = data[offset : offset + length]
    assert read_back == frames


def test_another_implementation_reads_what_a_bundle_says_of_itself() -> None:
    """By FORMAT.md, section 14, alone."""
    contents = bundle.Contents(ref="refs/heads/main", files={"pins/x": "", "a": "é"}, parts={a(1): [None, a(2)]})
    data = bundle.encode_contents(contents)
    told = {
        "version": 1,
        "ref": "refs/heads/main",
        "files": {"a": "é", "pins/x": ""},
        "parts": {a(1): [None, a(2)]},
    }
    assert data == json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    assert bundle.decode_contents(data) == contents
    (made,) = contents.records(a(3), "key", size=5000, objects=7, created=record().created)
    assert (made.bundle, made.ref, made.parts) == (a(3), "refs/heads/main", {a(1): [a(3), a(2)]})


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_contents_or_refused(data: bytes) -> None:
    with pytest.raises((CorruptBundle, UnsupportedVersion)):
        bundle.decode_contents(data)


@given(st.data(), SIZES)
def test_a_changed_tail_is_refused(draw: st.DataObject, sizes: dict[ObjectId, int]) -> None:
    layout = bundle.lay_out(sizes)
    changed = bytearray(layout.tail)
    if draw.draw(st.booleans()):
        changed[draw.draw(st.integers(0, len(changed) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    else:
        del changed[draw.draw(st.integers(0, len(changed) - 1)) :]
    with pytest.raises(CorruptBundle):
        bundle.read_tail(layout.id, bytes(changed), layout.size)


@pytest.mark.parametrize(
    "places",
    [
        [(a(1), 8, 15)],
        [(a(1), 9, 20)],
        [(a(1), 8, 20), (a(2), 20, 20)],
        [(a(1), 8, 20), (a(1), 28, 20)],
        [(a(1), 8, (64 << 20) + 4097)],
    ],
)
def test_an_index_that_breaks_a_rule_is_refused_though_its_hash_is_right(
    places: list[tuple[ObjectId, int, int]],
) -> None:
    index = b"".join(struct.pack("<32sQI", bytes.fromhex(object_id), at, length) for object_id, at, length in places)
    start = 8 + sum(length for _, _, length in places)
    tail = index + struct.pack("<QI4s", start, len(places), b"CSTB")
    with pytest.raises(CorruptBundle):
        bundle.read_tail(hash_bytes(index), tail, start + len(tail))


# -- records ---------------------------------------------------------------------------------------------------------


def test_a_record_comes_back() -> None:
    assert bundle.decode_record(bundle.encode_record(record())) == record()
    assert record().file_name == f"{hash_bytes(bundle.encode_record(record()))[:16]}.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"bundle": "x"},
        {"key": ""},
        {"key": "a,b"},
        {"key": "ä"},
        {"key": "a\nb"},
        {"key": "k" * 513},
        {"created": "yesterday"},
        {"bytes": -1},
        {"bytes": 2**63},
        {"bytes": 100},
        {"objects": 0},
        {"objects": 1 << 21, "bytes": 1 << 40},
        {"parts": {"x": [a(1)]}},
        {"parts": {a(1): ["../x"]}},
        {"parts": {a(1): []}},
        {"created": "2026-13-99T99:99:99.000000Z"},
        {"ref": "a\nb"},
        {"version": 0},
    ],
)
def test_a_record_that_breaks_a_rule_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptBundle):
        bundle.decode_record(bundle.encode_record(record(**changes)))


def test_a_record_of_another_version_is_not_taken_for_damage() -> None:
    with pytest.raises(UnsupportedVersion):
        bundle.decode_record(bundle.encode_record(record(version=2)))


def test_a_record_in_other_bytes_is_refused() -> None:
    with pytest.raises(CorruptBundle):
        bundle.decode_record(msgspec.json.encode(record()))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_or_refused(data: bytes) -> None:
    with pytest.raises((CorruptBundle, UnsupportedVersion)):
        bundle.decode_record(data)


# -- what goes into a new bundle -------------------------------------------------------------------------------------

ITEMS = {a(i): 100 for i in range(10)}
IDS = list(ITEMS)


def test_objects_in_existing_bundles_are_not_uploaded_again() -> None:
    assert bundle.choose_bundles(ITEMS, {a(100): dict.fromkeys(IDS[:8], 100)}) == ([a(100)], set(IDS[8:]))
    assert bundle.choose_bundles(ITEMS, {a(100): ITEMS}) == ([a(100)], set())


def test_a_bundle_of_which_most_is_not_needed_is_not_relied_on() -> None:
    held = dict.fromkeys(IDS[:4], 100) | {a(50): 401}
    assert bundle.choose_bundles(ITEMS, {a(100): held}) == ([], set(IDS))
    held[a(50)] = 400
    assert bundle.choose_bundles(ITEMS, {a(100): held}) == ([a(100)], set(IDS[4:]))


def test_no_checkpoint_depends_on_more_than_four_bundles() -> None:
    three = {a(100 + i): dict.fromkeys(IDS[3 * i : 3 * i + 3], 100) for i in range(3)}
    assert bundle.choose_bundles(ITEMS, three) == (list(three), {IDS[9]})
    four = {a(100 + i): dict.fromkeys(IDS[2 * i : 2 * i + 2], 100) for i in range(4)}
    assert bundle.choose_bundles(ITEMS, four) == ([], set(IDS))


@given(
    st.dictionaries(st.sampled_from(IDS), st.integers(16, 1000), min_size=1),
    st.dictionaries(
        st.sampled_from([a(100 + i) for i in range(6)]), st.dictionaries(st.sampled_from(IDS), st.integers(16, 1000))
    ),
)
def test_every_needed_object_is_in_a_chosen_or_the_new_bundle(
    needed: dict[ObjectId, int], bundles: dict[ObjectId, dict[ObjectId, int]]
) -> None:
    chosen, new = bundle.choose_bundles(needed, bundles)
    held = {object_id for bundle_id in chosen for object_id in bundles[bundle_id]}
    assert needed.keys() <= held | new
    assert not held & new
    assert len(chosen) + bool(new) <= MOST_BUNDLES
    assert len(set(chosen)) == len(chosen)
