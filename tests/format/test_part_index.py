from __future__ import annotations

import random
import struct
import tracemalloc
from collections import OrderedDict
from typing import Any

import msgpack
import pytest
from builders import exact
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import CorruptIndex, UnsupportedValue, UnsupportedVersion
from castore.format import part_index
from castore.format.ids import hash_bytes
from castore.format.part_index import MAX_DEPTH, ChunkRef, Index, TensorRef, TensorSpec

A, B = hash_bytes(b"a"), hash_bytes(b"b")
TENSORS = (TensorSpec("float32", (5, 3), 0), TensorSpec("bool", (), 64), TensorSpec("bfloat16", (0, 7), 0))
CHUNKS = (ChunkRef(A, 60), ChunkRef(B, 5))

keys = st.text(max_size=5) | st.integers() | st.integers(-(2**90), 2**90)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**300), 2**300),
    st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1]),
    st.floats(),
    st.complex_numbers(allow_nan=True, allow_infinity=True),
    st.text(),
    st.binary(),
    st.integers(0, len(TENSORS) - 1).map(TensorRef),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


def encoded(tree: Any) -> bytes:
    return part_index.encode(Index(CHUNKS, TENSORS, tree))


@given(trees)
def test_a_tree_comes_back_with_exact_types_and_order(tree: Any) -> None:
    index = part_index.decode(encoded(tree))
    assert exact(index.tree) == exact(tree)
    assert (index.chunks, index.tensors) == (CHUNKS, TENSORS)
    assert part_index.decode_chunks(encoded(tree)) == CHUNKS


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        float("inf"),
        struct.unpack("<d", struct.pack("<Q", 0xFFF0DEADBEEF0001))[0],
        complex(*struct.unpack("<dd", struct.pack("<QQ", 0x7FF8000000000123, 1 << 63))),
        2**4000,
        -(2**64),
        {1: "int", "1": "str", -(2**80): "big"},
        {},
        (),
        [[], OrderedDict(), ((),)],
    ],
    ids=repr,
)
def test_the_awkward_values_are_kept_bit_for_bit(value: Any) -> None:
    assert exact(part_index.decode(encoded(value)).tree) == exact(value)


@given(trees)
def test_equal_parts_give_equal_bytes(tree: Any) -> None:
    copy = part_index.decode(encoded(tree)).tree
    assert encoded(copy) == encoded(tree)


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"a": [1, {"b": {1, 2}}]}, r'part\["a"\]\[1\]\["b"\]'),
        ({"a": {3: object()}}, r'part\["a"\]\[3\]'),
        ({"a": {3.5: 1}}, r'part\["a"\]\[3\.5\]'),
        ({"a": {True: 1}}, r'part\["a"\]\[True\]'),
        ({"a": {2**90: object()}}, r'part\["a"\]\[0x'),
        ({10**5000: object()}, r"part\[0x"),  # larger than Python is willing to print
        ({"a": Text("x")}, r'part\["a"\]'),
        ({"a": "\ud800"}, r'part\["a"\]'),
        ({"a": {"\ud800": 1}}, r'part\["a"\]'),
        ({"a": bytearray(b"x")}, r'part\["a"\]'),
        ({"a": range(3)}, r'part\["a"\]'),
        (object(), "part"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_without_an_exact_form_is_refused_by_its_key(tree: Any, key: str) -> None:
    with pytest.raises(UnsupportedValue, match=f"^can't store {key}"):
        part_index.encode(Index((), (), tree), "part")


def nested(depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = [tree]
    return tree


def test_what_is_nested_up_to_the_limit_is_stored_and_deeper_is_refused() -> None:
    assert part_index.decode(encoded(nested(MAX_DEPTH))).tree == nested(MAX_DEPTH)
    with pytest.raises(UnsupportedValue, match="nested"):
        encoded(nested(MAX_DEPTH + 1))


def test_values_over_the_size_of_an_object_are_refused() -> None:
    with pytest.raises(UnsupportedValue, match="uint8 tensors"):
        encoded(bytes(part_index.MAX_PLAIN))


pack = msgpack.Packer(use_bin_type=True, strict_types=True).pack
HEAD = pack(1) + pack(b"") + pack(b"")


def container(code: int, count: int) -> bytes:
    return pack(msgpack.ExtType(code, struct.pack("<I", count)))


@given(st.one_of(st.binary(max_size=120), st.binary(max_size=60).map(HEAD.__add__)))
def test_arbitrary_bytes_are_corrupt_or_of_another_version(data: bytes) -> None:
    for decode in (part_index.decode, part_index.decode_chunks):
        try:
            decode(data)
        except (CorruptIndex, UnsupportedVersion):
            pass


@given(trees, st.randoms(use_true_random=False))
def test_a_damaged_index_raises_nothing_else(tree: Any, rng: random.Random) -> None:
    data = bytearray(encoded(tree))
    for _ in range(20):
        damaged = bytearray(data)
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                damaged[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 2:
                del damaged[at : at + rng.randrange(1, 9)]
            case 3:
                damaged[at:] = data[rng.randrange(len(data)) :]
        try:
            part_index.decode(bytes(damaged))
        except (CorruptIndex, UnsupportedVersion):
            pass


@given(trees)
def test_every_truncation_and_a_byte_more_are_corrupt(tree: Any) -> None:
    data = encoded(tree)
    for broken in [*(data[:i] for i in range(len(data))), data + b"\0", data + b"\xc0"]:
        with pytest.raises(CorruptIndex):
            part_index.decode(broken)


@pytest.mark.parametrize("version", [2, 99, 2**64 - 1])
def test_a_newer_version_says_to_upgrade(version: int) -> None:
    with pytest.raises(UnsupportedVersion, match="upgrade castore"):
        part_index.decode(pack(version) + HEAD[1:] + pack(0) + pack(None))


@pytest.mark.parametrize("version", [0, -1, True, "1", None, 1.0])
def test_what_is_no_version_is_corrupt(version: Any) -> None:
    with pytest.raises(CorruptIndex, match="begin with a version"):
        part_index.decode(pack(version) + HEAD[1:] + pack(0) + pack(None))


def with_tensors(*specs: TensorSpec) -> bytes:
    return part_index.encode(Index(CHUNKS, specs, None))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (with_tensors(TensorSpec("int8", (9,), 0), TensorSpec("int8", (9,), 8)), "overlap"),
        (with_tensors(TensorSpec("int8", (9,), 0), TensorSpec("int8", (9,), 0)), "overlap"),
        (with_tensors(TensorSpec("int8", (9,), -1)), "overlap"),
        (with_tensors(TensorSpec("int8", (66,), 0)), "after the stream"),
        (with_tensors(TensorSpec("int64", (2**62, 2**62), 0)), "after the stream"),
        (with_tensors(TensorSpec("int8", (-1,), 0)), "shape is out of range"),
        (with_tensors(TensorSpec("int8", (0, 2**63), 0)), "shape is out of range"),
        (with_tensors(TensorSpec("object", (), 0)), "unknown element type"),
        (with_tensors(TensorSpec("int8", (1,) * 65, 0)), "65 dimensions"),
        (part_index.encode(Index((ChunkRef(A, 0),), (), None)), "length is out of range"),
        (part_index.encode(Index((ChunkRef(A, part_index.MAX_PLAIN + 1),), (), None)), "length is out of range"),
        (pack(1) + pack(b"x" * 33) + pack(b"xxxx") + pack(0) + pack(None), "don't match"),
        (pack(1) + pack(b"x" * 32) + pack(b"xxxxx") + pack(0) + pack(None), "don't match"),
        (HEAD + pack(-1) + pack(None), "-1 items"),
        (HEAD + pack(0) + pack([]), "list among the values"),
        (HEAD + pack(0) + pack({}), "dict among the values"),
        (HEAD + pack(0) + pack(msgpack.Timestamp(5)), "Timestamp among"),
        (HEAD + pack(0) + pack(msgpack.ExtType(5, bytes(4))), "extension 5"),  # a tensor that isn't there
        (HEAD + pack(0) + pack(msgpack.ExtType(99, bytes(4))), "extension 99"),
        (HEAD + pack(0) + pack(msgpack.ExtType(1, bytes(3))), "wrong length"),
        (HEAD + pack(0) + pack(msgpack.ExtType(6, b"")), "wrong length"),
        (HEAD + pack(0) + container(3, 2) + pack("a") + pack(1) + pack("a") + pack(2), "repeated"),
        (HEAD + pack(0) + container(3, 1) + pack(1.5) + pack(1), "wrong type"),
        (HEAD + pack(0) + container(1, 1) * (MAX_DEPTH + 1) + pack(1), "nested"),
        (HEAD + pack(0) + b"\xa2\xff\xff", "damaged"),
    ],
)  # fmt: skip
def test_an_index_that_makes_no_sense_is_corrupt(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptIndex, match=reason):
        part_index.decode(data)


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(HEAD + pack(2**32 - 1), id="tensors"),
        pytest.param(HEAD + pack(1) + pack("int8") + pack(2**32 - 1), id="dimensions"),
        pytest.param(HEAD + pack(0) + container(1, 2**32 - 1), id="list"),
        pytest.param(HEAD + pack(0) + container(3, 2**32 - 1), id="dict"),
        pytest.param(HEAD + pack(0) + b"\xdd\xff\xff\xff\xff", id="msgpack array"),
        pytest.param(HEAD + pack(0) + b"\xdf\xff\xff\xff\xff", id="msgpack map"),
        pytest.param(HEAD + pack(0) + b"\xc6\xff\xff\xff\xff", id="msgpack bytes"),
        pytest.param(HEAD + pack(0) + b"\xc9\xff\xff\xff\xff\x01", id="msgpack extension"),
        pytest.param(HEAD + pack(0) + b"\xdd\x00\x0f\xff\xff" * 1000, id="nested msgpack arrays"),
    ],
)
def test_a_count_of_billions_reserves_nothing(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CorruptIndex):
            part_index.decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()
