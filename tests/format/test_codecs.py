from __future__ import annotations

import array
import random
import struct
import tracemalloc

import pytest
import zstandard
from builders import encoded, sparse, trained
from hypothesis import given
from hypothesis import strategies as st

from castore.format import codecs
from castore.format.codecs import PLANES, RAW, SPARSE, ZSTD, CodecError

# every header and length of a plane, so that random payloads get past the first check
plane_header = st.builds(
    struct.Struct("<BBI").pack, st.integers(0, 9), st.integers(0, 2), st.integers(0, 40) | st.integers(0, 2**32 - 1)
)
hostile = st.one_of(
    st.builds(
        lambda head, bitmap, rest: struct.pack("<BBBBI", *head, len(bitmap)) + bitmap + rest,
        st.tuples(st.integers(0, 9), st.integers(0, 4), st.integers(0, 2), st.integers(0, 8)),
        st.binary(max_size=4) | st.binary(max_size=4).map(zstandard.compress),
        st.binary(max_size=40) | st.binary(max_size=40).map(zstandard.compress),
    ),
    st.binary(max_size=80),
    st.binary(max_size=40).map(lambda tail: b"\x28\xb5\x2f\xfd" + tail),
    st.binary(max_size=64).map(zstandard.compress),
    st.builds(
        lambda size, headers, tail: bytes([size]) + b"".join(headers) + tail,
        st.integers(0, 9),
        st.lists(plane_header, max_size=9),
        st.binary(max_size=60),
    ),
)


numbers = st.sampled_from([1, 2, 4, 8]).flatmap(
    lambda width: st.one_of(
        st.binary(max_size=200),
        st.integers(0, 3000).map(lambda n: trained(n)),
        st.tuples(st.integers(0, 3000), st.floats(0, 1)).map(lambda pair: sparse(*pair)),
        st.integers(0, 40_000).map(lambda n: random.Random(n).randbytes(n)),
        st.integers(0, 60_000).map(bytes),
        st.tuples(st.binary(min_size=1, max_size=9), st.integers(0, 9000)).map(lambda pair: pair[0] * pair[1]),
    ).map(lambda data: (data, width))
)


def decoded(codec: int, payload: bytes, size: int) -> bytes:
    out = bytearray(size)
    codecs.decode(codec, memoryview(payload), memoryview(out))
    return bytes(out)


@given(numbers)
def test_whatever_is_encoded_comes_back(case: tuple[bytes, int]) -> None:
    plain, itemsize = case
    codec, payload = encoded(plain, itemsize)
    assert decoded(codec, payload, len(plain)) == plain
    assert len(payload) <= len(plain) + 32


float32 = trained(40_000)
bfloat16 = b"".join(float32[i : i + 2] for i in range(2, len(float32), 4))
mixed = sparse(40_000, 0.5)
halves = b"".join(mixed[i : i + 2] for i in range(2, len(mixed), 4))
float64 = array.array("d", array.array("f", trained(20_000))).tobytes()


@pytest.mark.parametrize(
    ("plain", "itemsize", "codec", "ratio"),
    [
        pytest.param(float32, 4, PLANES, 0.90, id="trained float32"),
        pytest.param(bfloat16, 2, PLANES, 0.72, id="trained bfloat16"),
        pytest.param(float64, 8, PLANES, 0.65, id="trained float64"),
        pytest.param(sparse(40_000, 0.1), 4, SPARSE, 0.11, id="a tenth of float32"),
        pytest.param(sparse(40_000, 0.9), 4, SPARSE, 0.81, id="most of float32"),
        pytest.param(halves, 2, SPARSE, 0.43, id="half of bfloat16"),
        pytest.param(b"the quick brown fox jumps over the lazy dog. " * 3000, 1, ZSTD, 0.01, id="text"),
        pytest.param(bytes(100_000), 4, ZSTD, 0.01, id="zeros"),
        pytest.param(random.Random(1).randbytes(100_000), 4, RAW, 1.0, id="noise as numbers"),
        pytest.param(random.Random(2).randbytes(100_000), 1, RAW, 1.0, id="noise as bytes"),
        pytest.param(float32 + b"x", 4, ZSTD, 0.97, id="not whole numbers"),
        pytest.param(b"", 4, RAW, 1.0, id="nothing"),
    ],
)
def test_the_probe_picks_the_codec_that_shrinks(plain: bytes, itemsize: int, codec: int, ratio: float) -> None:
    chosen, payload = encoded(plain, itemsize)
    assert chosen == codec
    assert len(payload) <= ratio * len(plain)
    assert decoded(chosen, payload, len(plain)) == plain


def test_data_that_deceives_the_probe_is_stored_at_little_more_than_its_size() -> None:
    rng = random.Random(3)
    plain = bytearray(rng.randbytes(1 << 20))
    for i in range(4):  # zeros where the probe looks, noise elsewhere
        at = i * ((len(plain) - 8192) // 3)
        plain[at : at + 8192] = bytes(8192)
    for itemsize in (1, 2, 4, 8):
        codec, payload = encoded(bytes(plain), itemsize)
        assert len(payload) <= len(plain) + 32
        assert decoded(codec, payload, len(plain)) == plain


@given(st.integers(0, 5), hostile, st.sampled_from([0, 1, 2, 6, 8, 24, 64]))
def test_arbitrary_bytes_fill_the_buffer_or_raise_codec_error(codec: int, payload: bytes, size: int) -> None:
    try:
        decoded(codec, payload, size)
    except CodecError:
        pass


SAMPLES = {
    RAW: (random.Random(4).randbytes(100), 1),
    ZSTD: (b"many a word, " * 30, 1),
    PLANES: (trained(500), 4),
    SPARSE: (sparse(1003, 0.5), 4),
}


@pytest.mark.parametrize("codec", SAMPLES)
def test_a_payload_cut_short_or_longer_or_of_another_size_is_refused(codec: int) -> None:
    plain, itemsize = SAMPLES[codec]
    chosen, payload = encoded(plain, itemsize)
    assert chosen == codec
    for broken in [*(payload[:i] for i in range(len(payload))), payload + b"\0", payload + payload]:
        with pytest.raises(CodecError):
            decoded(codec, broken, len(plain))
    for size in (0, len(plain) - itemsize, len(plain) - 1, len(plain) + 1, len(plain) + itemsize):
        with pytest.raises(CodecError):
            decoded(codec, payload, size)


def zstd(plain: bytes, **parameters: int) -> bytes:
    compressor = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(**parameters))
    return compressor.compress(plain)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        pytest.param(zstd(b"a" * 100, write_content_size=0), "declares", id="no declared size"),
        pytest.param(zstd(b"a" * 99), "declares 99", id="another declared size"),
        pytest.param(zstd(b"a" * 50) * 2, "declares 50", id="two frames"),
        pytest.param(zstd(b"a" * 100) + zstd(b""), "extra|unused", id="an empty frame after it"),
        pytest.param(zstd(b"a" * 100) + b"\x50\x2a\x4d\x18\0\0\0\0", "extra|unused", id="a skippable frame after it"),
    ],
)
def test_a_zstd_frame_that_says_too_little_or_too_much_is_refused(frame: bytes, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        decoded(ZSTD, frame, 100)


def test_a_zstd_frame_of_nothing_is_refused_as_what_follows_it_would_not_be_seen() -> None:
    with pytest.raises(CodecError):
        decoded(ZSTD, zstd(b"") + b"anything", 0)


def test_a_zstd_window_over_the_limit_is_refused() -> None:
    wide = codecs.MAX_WINDOW.bit_length()
    size = 3 * codecs.MAX_WINDOW
    with pytest.raises(CodecError, match="window"):
        decoded(ZSTD, zstd(bytes(size), window_log=wide), size)
    assert decoded(ZSTD, zstd(bytes(size), window_log=wide - 1), size) == bytes(size)


@pytest.mark.parametrize("codec", [ZSTD, PLANES, SPARSE])
def test_a_bomb_costs_no_more_than_what_was_expected(codec: int) -> None:
    bomb = zstd(bytes(64 << 20))  # a few KB that declare 64 MiB
    if codec == PLANES:
        bomb = bytes([2]) + struct.pack("<BBI", 1, 1, len(bomb)) + struct.pack("<BBI", 1, 0, 0) + bomb
    if codec == SPARSE:
        bomb = struct.pack("<BBBBI", 2, RAW, 1, 0, len(bomb)) + bomb
    out = bytearray(1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            codecs.decode(codec, memoryview(bomb), memoryview(out))
        assert tracemalloc.get_traced_memory()[1] < len(out)
    finally:
        tracemalloc.stop()


def test_a_frame_that_holds_more_than_it_declares_is_refused_within_the_expected_memory() -> None:
    honest = bytearray(zstd(bytes(1 << 20)))
    assert zstandard.get_frame_parameters(bytes(honest)).content_size == 1 << 20
    at = bytes(honest).index(struct.pack("<I", 1 << 20))
    honest[at : at + 4] = struct.pack("<I", 1000)  # declares 1000, holds a MiB
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decoded(ZSTD, bytes(honest), 1000)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_zeros_that_only_the_sample_saw_cost_no_space() -> None:
    rng = random.Random(5)
    plain = bytearray(trained(1 << 18))
    for i in range(4):
        at = i * ((len(plain) - 8192) // 3) // 4 * 4
        for element in range(at, at + 8192, 4):
            plain[element : element + 4] = plain[element : element + 4] if rng.random() < 0.5 else bytes(4)
    codec, payload = encoded(bytes(plain), 4)
    assert codec == SPARSE
    assert len(payload) <= 0.9 * len(plain)
    assert decoded(codec, payload, len(plain)) == plain


def sparse_payload(width: int, codec: int, kind: int, unused: int, bitmap: bytes, elements: bytes) -> bytes:
    return struct.pack("<BBBBI", width, codec, kind, unused, len(bitmap)) + bitmap + elements


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        pytest.param(sparse_payload(4, RAW, 0, 7, b"\3", bytes(8)), "past the end", id="a bit after the last"),
        pytest.param(sparse_payload(4, RAW, 0, 7, b"\0\0", b""), "bitmap of 2", id="a longer bitmap"),
        pytest.param(sparse_payload(4, RAW, 0, 7, b"\1", bytes(4))[:8], "cut short", id="a bitmap beyond the end"),
        pytest.param(sparse_payload(4, RAW, 0, 6, b"\1", bytes(4)), "elements were", id="other unused bits"),
        pytest.param(sparse_payload(4, SPARSE, 0, 7, b"\1", bytes(4)), "codec 3", id="sparse within sparse"),
        pytest.param(sparse_payload(3, RAW, 0, 7, b"\1", bytes(3)), "of 3 bytes", id="an element of 3 bytes"),
        pytest.param(sparse_payload(4, RAW, 2, 7, b"\1", bytes(4)), "kind 2", id="an unknown kind"),
        pytest.param(sparse_payload(4, RAW, 0, 7, b"\1", bytes(3)), "raw payload", id="an element cut short"),
    ],
)
def test_a_sparse_payload_that_breaks_a_rule_is_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(CodecError, match=reason):
        decoded(SPARSE, payload, 4)


@given(st.integers(2, 8), st.binary(min_size=1, max_size=12))
def test_planes_of_any_widths_that_add_up_are_put_together(itemsize: int, element: bytes) -> None:
    # a later castore may group bytes otherwise; what it writes must be readable by the rules alone
    plain = (element * 400)[: itemsize * 40]
    planes = [plain[i::itemsize] for i in range(itemsize)]
    headers = b"".join(struct.pack("<BBI", 1, 0, len(plane)) for plane in planes)
    assert decoded(PLANES, bytes([itemsize]) + headers + b"".join(planes), len(plain)) == plain
