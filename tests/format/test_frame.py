from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
from builders import sparse, trained
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import CorruptObject, UnsupportedVersion
from castore.format import codecs
from castore.format.frame import MAX_PLAIN, decode_frame, encode_frame, plain_length
from castore.format.ids import hash_bytes

SAMPLES = {
    codecs.RAW: (random.Random(5).randbytes(150), 1),
    codecs.ZSTD: (b"the same words " * 20, 1),
    codecs.PLANES: (trained(300), 4),
    codecs.SPARSE: (sparse(1003, 0.5), 4),
}
# a reserved bit of the zstd frame header, which decoders must ignore, and unused ones of its table: what comes out is
# the same
IGNORED = {codecs.RAW: 0, codecs.ZSTD: 1, codecs.PLANES: 1, codecs.SPARSE: 3}


HEADS = st.sampled_from([b"", b"CSTO", b"CSTO\x01", b"CSTO\x01\x02\0\0", b"CSTO\x02\x03\0\0"])


def frame_of(plain: bytes, itemsize: int = 1) -> bytes:
    return encode_frame(plain, itemsize)


def read(frame: bytes, plain: bytes) -> bytes:
    object_id = hash_bytes(plain)
    out = bytearray(plain_length(object_id, memoryview(frame)))
    decode_frame(object_id, memoryview(frame), memoryview(out))
    return bytes(out)


@given(st.binary(max_size=2000), st.sampled_from([1, 2, 4, 8]))
def test_an_object_comes_back(plain: bytes, itemsize: int) -> None:
    assert read(frame_of(plain, itemsize), plain) == plain


@pytest.mark.parametrize("codec", SAMPLES)
def test_a_flipped_bit_is_never_returned_as_data(codec: int) -> None:
    plain, itemsize = SAMPLES[codec]
    frame = frame_of(plain, itemsize)
    assert frame[5] == codec
    accepted = 0
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert read(bytes(flipped), plain) == plain
            accepted += 1
        except (CorruptObject, UnsupportedVersion):
            pass
    assert accepted == IGNORED[codec]


@pytest.mark.parametrize("codec", SAMPLES)
def test_an_object_cut_short_or_with_a_byte_more_is_refused(codec: int) -> None:
    plain, itemsize = SAMPLES[codec]
    frame = frame_of(plain, itemsize)
    for broken in [*(frame[:i] for i in range(len(frame))), *(frame + bytes([i]) for i in range(256))]:
        with pytest.raises(CorruptObject):
            read(broken, plain)


def test_a_whole_object_under_another_id_is_refused() -> None:
    out = bytearray(3)
    with pytest.raises(CorruptObject, match="hash to"):
        decode_frame(hash_bytes(b"abd"), memoryview(frame_of(b"abc")), memoryview(out))


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"CSTO", b"CSTO\x01", b"CSTO\x01\x02\0\0", b"CSTO\x02\x03\0\0"]),
    st.integers(0, 40),
)
def test_arbitrary_bytes_are_corrupt_or_of_another_version(tail: bytes, head: bytes, size: int) -> None:
    frame = memoryview(head + tail)
    object_id = hash_bytes(b"something else")
    with pytest.raises((CorruptObject, UnsupportedVersion)):
        decode_frame(object_id, frame, memoryview(bytearray(size)))


def test_a_newer_version_says_to_upgrade() -> None:
    frame = bytearray(frame_of(b"abc"))
    frame[4] = 3
    with pytest.raises(UnsupportedVersion, match=r"version 3.*upgrade castore"):
        read(bytes(frame), b"abc")


@pytest.mark.parametrize("length", [MAX_PLAIN + 1, 2**40, 2**64 - 1])
def test_a_claim_of_more_than_the_limit_is_refused_before_anything_is_allocated(length: int) -> None:
    frame = memoryview(struct.pack("<4sBBHQ", b"CSTO", 1, 0, 0, length) + b"abc")
    tracemalloc.start()
    try:
        with pytest.raises(CorruptObject, match="over the limit"):
            plain_length(hash_bytes(b"abc"), frame)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_claim_other_than_the_expected_length_is_refused() -> None:
    frame = memoryview(frame_of(b"abc"))
    with pytest.raises(CorruptObject, match="3 bytes where 4"):
        decode_frame(hash_bytes(b"abc"), frame, memoryview(bytearray(4)))


def test_more_than_the_limit_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="at most"):
        encode_frame(bytes(MAX_PLAIN + 1))
