"""Reversible encodings of a chunk, numbered for ever. Pure; the only module that imports zstandard.

======  ========  ==============================================================================================
number  name      payload
======  ========  ==============================================================================================
0       raw       the plain bytes
1       zstd      one zstd frame that declares its content size
2       planes    the bytes of equal significance of every element stored together, each plane raw or zstd
3       sparse    a bitmap of the elements that are not zero, then these in another codec
======  ========  ==============================================================================================

Of trained floating-point numbers only one byte compresses: the sign and exponent (ZipNN, arXiv:2411.05239). Splitting
the planes and compressing that one alone gives a smaller result than zstd over the whole, several times faster. Such a
plane holds hardly any matches, so zstd is set to do little but entropy coding. Where some elements are zero, as the
unconnected weights of a growing network are, the zeros would hide that structure, so they are taken out first.
"""

from __future__ import annotations

import functools
import math
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from castore.format.ids import Buffer

if TYPE_CHECKING:
    import zstandard

RAW, ZSTD, PLANES, SPARSE = 0, 1, 2, 3
NAMES = {RAW: "raw", ZSTD: "zstd", PLANES: "planes", SPARSE: "sparse"}

MAX_WINDOW = 1 << 23
"""Largest zstd window that is decoded, in bytes. Frames written here stay far below it."""

OVERHEAD = 32
"""How many bytes more than the plain ones a payload may take while it is made: the headers of planes."""

_PROBE_SLICES = 4
_PROBE_BYTES = 8192
_WORTH = 0.97  # an encoding that saves less than 3 % isn't worth the time to decode it
_WORTH_SPARSE = 1 / 32  # of the elements are zero: the bitmap of fewer zeros takes about as much as they do
_PLANE_RAW, _PLANE_ZSTD = 0, 1
_PLANE_HEADER = struct.Struct("<BBI")  # width in bytes, raw or zstd, stored length
_SPARSE_HEADER = struct.Struct("<BBBBI")  # width, codec; of the bitmap: raw or zstd, unused bits, stored length


class CodecError(ValueError):
    """A payload is not a valid encoding of the expected number of bytes."""


# -- encode ----------------------------------------------------------------------------------------------------------


def encode(plain: Buffer, itemsize: int, out: memoryview) -> tuple[int, int]:
    """Encode ``plain`` into ``out``; return (codec, length of the payload): the codec that suits a sample best.

    ``itemsize`` is the width in bytes of the numbers in ``plain``, 1 for other data. ``out`` takes at least
    ``len(plain) + OVERHEAD`` bytes.
    """
    codec, shrinks = _choose(plain, itemsize)
    if codec == SPARSE:
        if length := _encode_sparse(plain, itemsize, out):
            return SPARSE, length
        codec = RAW  # the sample deceived
    if codec == PLANES:
        return PLANES, _encode_planes(plain, itemsize, shrinks, out)
    if codec == ZSTD:
        frame = _compressor(_GENERAL).compress(plain)
        if len(frame) < len(plain):
            out[: len(frame)] = frame
            return ZSTD, len(frame)
    if itemsize in _GROUPS:
        copy(plain, out[: len(plain)])
    else:  # files, say: for them alone NumPy is not loaded
        out[: len(plain)] = plain
    return RAW, len(plain)


def _choose(plain: Buffer, itemsize: int) -> tuple[int, Sequence[bool]]:
    """Return (codec, whether each plane is worth compressing), judged by a sample."""
    sample = _sample(plain, itemsize)
    best: float = _WORTH * len(sample)
    codec, shrinks = RAW, list[bool]()
    as_zstd = len(_compressor(_GENERAL).compress(sample))
    if as_zstd < best:
        best, codec = as_zstd, ZSTD
    if itemsize in _GROUPS and len(plain) % itemsize == 0:
        plane_sizes = _probe_planes(sample, itemsize)
        as_planes = sum(min(size, raw) for size, raw in plane_sizes)
        if as_planes < best:
            best, codec, shrinks = as_planes, PLANES, [size < _WORTH * raw for size, raw in plane_sizes]
        if codec != RAW and _probe_sparse(sample, itemsize) < _WORTH * best:
            return SPARSE, []
    return codec, shrinks


def _sample(plain: Buffer, itemsize: int) -> bytes:
    """Return a few evenly spaced slices that stand for the whole, each starting at an element."""
    size = len(plain)
    if size <= _PROBE_SLICES * _PROBE_BYTES:
        return bytes(plain)
    stride = (size - _PROBE_BYTES) // (_PROBE_SLICES - 1)
    starts = [(i * stride) // itemsize * itemsize for i in range(_PROBE_SLICES)]
    view = memoryview(plain)
    return b"".join(view[start : start + _PROBE_BYTES] for start in starts)


# Widths of the planes of an element, least significant first. The low half of a float never shrinks, and one copy
# of twice the width is cheaper than two copies.
_GROUPS = {2: (1, 1), 4: (2, 1, 1), 8: (4, 2, 1, 1)}


def _probe_planes(sample: Buffer, itemsize: int) -> list[tuple[int, int]]:
    """Return the (compressed, raw) size of each plane of the sample."""
    compressor = _compressor(_ENTROPY)
    count = len(sample) // itemsize
    planes = [memoryview(bytearray(width * count)) for width in _GROUPS[itemsize]]
    _split(sample, itemsize, planes)
    return [(len(compressor.compress(plane)), len(plane)) for plane in planes]


def _probe_sparse(sample: bytes, itemsize: int) -> float:
    """Return the size of the sample's bitmap and of its elements that are not zero; infinite if all are, or most."""
    bitmap, elements = _take_zeros_out(sample, itemsize)
    if not elements or len(elements) > (1 - _WORTH_SPARSE) * len(sample):
        return math.inf
    as_planes = sum(min(size, raw) for size, raw in _probe_planes(elements, itemsize))
    return min(len(_compressor(_ENTROPY).compress(bitmap)), len(bitmap)) + as_planes


_BLOCK = 1 << 16  # elements that are taken apart while they are in the cache


def _split(plain: Buffer, itemsize: int, planes: Sequence[memoryview]) -> None:
    """Fill ``planes``, which have the widths of ``_GROUPS``, with those of ``plain``."""
    import numpy as np

    widths = _GROUPS[itemsize]
    numbers = np.frombuffer(plain, dtype=f"<u{itemsize}")
    targets = [np.frombuffer(plane, dtype=f"<u{width}") for plane, width in zip(planes, widths, strict=True)]
    scratch = np.empty(min(len(numbers), _BLOCK), numbers.dtype)
    for start in range(0, len(numbers), _BLOCK):
        stop = min(start + _BLOCK, len(numbers))
        rest = numbers[start:stop]
        for number, target in enumerate(targets):
            if number:  # narrower numbers take the low bytes of wider ones, so the next bytes are moved down
                rest = np.right_shift(rest, 8 * widths[number - 1], out=scratch[: stop - start])
            target[start:stop] = rest


def _encode_planes(plain: Buffer, itemsize: int, shrinks: Sequence[bool], out: memoryview) -> int:
    """Encode into ``out``; return the length of the payload. A plane that is stored raw is split straight into it."""
    count = len(plain) // itemsize
    widths = _GROUPS[itemsize]
    at = 1 + len(widths) * _PLANE_HEADER.size
    out[0] = itemsize
    # where a raw plane goes is known as long as none before it is compressed; the others wait in scratch memory
    in_place = next((number for number, shrink in enumerate(shrinks) if shrink), len(widths))
    ends = [count * sum(widths[: number + 1]) for number in range(len(widths))]
    split_at = ends[in_place - 1] if in_place else 0
    scratch = _scratch.take(count * itemsize - split_at)
    planes = [
        out[at + end - count * width : at + end]
        if end <= split_at
        else scratch[end - count * width - split_at :][: count * width]
        for width, end in zip(widths, ends, strict=True)
    ]
    _split(plain, itemsize, planes)
    for number, (width, plane, shrink) in enumerate(zip(widths, planes, shrinks, strict=True)):
        stored: Buffer = _compressor(_ENTROPY).compress(plane) if shrink else plane
        kind = _PLANE_ZSTD if shrink and len(stored) < len(plane) else _PLANE_RAW
        if kind == _PLANE_RAW:
            stored = plane
        _PLANE_HEADER.pack_into(out, 1 + number * _PLANE_HEADER.size, width, kind, len(stored))
        if number >= in_place:
            copy(stored, out[at : at + len(stored)])
        at += len(stored)
    return at


def _take_zeros_out(plain: Buffer, itemsize: int) -> tuple[bytes, memoryview]:
    """Return (bitmap of the elements that are not zero, lowest bit first; these elements).

    >>> bitmap, elements = _take_zeros_out(bytes([0, 0, 7, 0, 0, 0, 0, 9]), 2)
    >>> bin(bitmap[0]), list(elements)
    ('0b1010', [7, 0, 0, 9])
    """
    import numpy as np

    numbers = np.frombuffer(plain, dtype=f"<u{itemsize}")
    present = numbers != 0
    return np.packbits(present, bitorder="little").tobytes(), memoryview(numbers[present]).cast("B")


def _encode_sparse(plain: Buffer, itemsize: int, out: memoryview) -> int:
    """Encode into ``out``; return the length of the payload, or 0 if there are too few zeros."""
    bitmap, elements = _take_zeros_out(plain, itemsize)
    compressed = _compressor(_ENTROPY).compress(bitmap)
    kind, stored = (_PLANE_ZSTD, compressed) if len(compressed) < len(bitmap) else (_PLANE_RAW, bitmap)
    at = _SPARSE_HEADER.size + len(stored)
    if at + len(elements) >= len(plain):
        return 0
    out[_SPARSE_HEADER.size : at] = stored
    codec, length = encode(elements, itemsize, out[at:])
    _SPARSE_HEADER.pack_into(out, 0, itemsize, codec, kind, -(len(plain) // itemsize) % 8, len(stored))
    return at + length


# -- copying ---------------------------------------------------------------------------------------------------------

_WORTH_NUMPY = 1 << 16


class Scratch(threading.local):
    """Per-thread scratch buffer, reused to avoid page faults: fresh memory costs as much as decoding into it.

    >>> len(Scratch().take(10))
    10
    """

    def __init__(self) -> None:
        self._data = bytearray()

    def take(self, size: int) -> memoryview:
        """Return ``size`` bytes of undefined content, valid until the same thread calls this again."""
        if len(self._data) < size:
            self._data = bytearray(size)
        return memoryview(self._data)[:size]


_scratch = Scratch()


def copy(source: Buffer, target: memoryview) -> None:
    """Copy ``source`` into ``target``, of the same length. Releases the GIL for long buffers.

    Assigning to a memoryview holds the GIL, and the first touch of new memory takes longer than the copying itself.
    """
    if len(target) < _WORTH_NUMPY:
        target[:] = source
        return
    import numpy as np

    np.frombuffer(target, np.uint8)[:] = np.frombuffer(source, np.uint8)


def is_equal(first: Buffer, second: Buffer) -> bool:
    """Whether two buffers hold the same bytes. Releases the GIL for long buffers.

    >>> is_equal(b"ab", b"ab"), is_equal(b"ab", b"aB"), is_equal(b"ab", b"a")
    (True, False, False)
    """
    if len(first) != len(second) or len(first) < _WORTH_NUMPY:
        return bytes(first) == bytes(second)
    import numpy as np

    whole = len(first) // 8 * 8
    views = (memoryview(first), memoryview(second))
    left, right = (np.frombuffer(view[:whole], np.uint64) for view in views)
    return np.array_equal(left, right) and bytes(views[0][whole:]) == bytes(views[1][whole:])


# -- decode ----------------------------------------------------------------------------------------------------------


def decode(codec: int, payload: memoryview, out: memoryview) -> None:
    """Decode ``payload`` into all of ``out``. CodecError if it does not fill ``out`` exactly.

    Hostile bytes cost no memory beyond ``out`` and twice as much.
    """
    if codec == RAW:
        if len(payload) != len(out):
            raise CodecError(f"raw payload of {len(payload)} bytes where {len(out)} were expected")
        copy(payload, out)
    elif codec == ZSTD:
        copy(_decompress(payload, len(out)), out)
    elif codec == PLANES:
        _decode_planes(payload, out)
    elif codec == SPARSE:
        _decode_sparse(payload, out)
    else:
        raise CodecError(f"unknown codec {codec}")


def _decompress(frame: memoryview, size: int) -> bytes:
    import zstandard

    try:
        # max_output_size is ignored when the frame declares a size, so the declared one is checked first
        declared = zstandard.get_frame_parameters(frame)
        if declared.content_size != size or not size:  # zstandard reads only the header of an empty frame
            raise CodecError(f"zstd frame declares {declared.content_size} bytes where {size} were expected")
        if declared.window_size > MAX_WINDOW:
            raise CodecError(f"zstd window of {declared.window_size} bytes is over the limit")
        data = _decompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(str(error)) from error
    if len(data) != size:
        raise CodecError(f"zstd frame holds {len(data)} bytes where {size} were expected")
    return data


def _decode_planes(payload: memoryview, out: memoryview) -> None:
    import numpy as np

    itemsize = payload[0] if len(payload) else 0
    if not 2 <= itemsize <= 8 or len(out) % itemsize:
        raise CodecError(f"planes of {itemsize} bytes can't make {len(out)} bytes")
    count = len(out) // itemsize
    headers = _plane_headers(payload, itemsize)
    at = 1 + len(headers) * _PLANE_HEADER.size
    if at + sum(length for _, _, length in headers) != len(payload):
        raise CodecError("planes don't add up to the payload")
    offset = 0
    for width, kind, length in headers:
        stored = payload[at : at + length]
        plane: Buffer = _decompress(stored, count * width) if kind == _PLANE_ZSTD else stored
        if len(plane) != count * width:
            raise CodecError(f"plane of {len(plane)} bytes where {count * width} were expected")
        numbers = np.frombuffer(out, dtype=f"<u{width}")
        numbers[offset // width :: itemsize // width] = np.frombuffer(plane, dtype=f"<u{width}")
        at += length
        offset += width


def _decode_sparse(payload: memoryview, out: memoryview) -> None:
    import numpy as np

    if len(payload) < _SPARSE_HEADER.size:
        raise CodecError("sparse header is cut short")
    itemsize, codec, kind, unused, length = _SPARSE_HEADER.unpack_from(payload)
    if itemsize not in _GROUPS or len(out) % itemsize or codec == SPARSE or kind not in (_PLANE_RAW, _PLANE_ZSTD):
        raise CodecError(f"sparse elements of {itemsize} bytes in codec {codec} and kind {kind}")
    at = _SPARSE_HEADER.size + length
    if at > len(payload):
        raise CodecError("sparse bitmap is cut short")
    count = len(out) // itemsize
    stored = payload[_SPARSE_HEADER.size : at]
    bitmap: Buffer = _decompress(stored, -(-count // 8)) if kind == _PLANE_ZSTD else stored
    if 8 * len(bitmap) - unused != count:
        raise CodecError(f"bitmap of {len(bitmap)} bytes where {count} elements were expected")
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little").view(np.bool_)
    if bits[count:].any():
        raise CodecError("bitmap names elements past the end")
    present = bits[:count]
    elements = _scratch.take(int(np.count_nonzero(present)) * itemsize)
    decode(codec, payload[at:], elements)
    numbers = np.frombuffer(out, dtype=f"<u{itemsize}")
    numbers[:] = 0
    numbers[present] = np.frombuffer(elements, numbers.dtype)


def _plane_headers(payload: memoryview, itemsize: int) -> list[tuple[int, int, int]]:
    headers: list[tuple[int, int, int]] = []
    offset = 0
    while offset < itemsize:
        at = 1 + len(headers) * _PLANE_HEADER.size
        if at + _PLANE_HEADER.size > len(payload):
            raise CodecError("plane header is cut short")
        width, kind, length = _PLANE_HEADER.unpack_from(payload, at)
        if width not in (1, 2, 4, 8) or itemsize % width or offset % width or kind not in (_PLANE_RAW, _PLANE_ZSTD):
            raise CodecError(f"plane of width {width} and kind {kind} at byte {offset}")
        headers.append((width, kind, length))
        offset += width
    if offset != itemsize:
        raise CodecError("planes are wider than the element")
    return headers


# -- zstd objects: one per thread, as they are expensive to make and not safe to share -------------------------------

_GENERAL, _ENTROPY = "general", "entropy"
_local = threading.local()


def _compressor(kind: str) -> zstandard.ZstdCompressor:
    compressor: zstandard.ZstdCompressor | None = getattr(_local, kind, None)
    if compressor is None:
        import zstandard

        compressor = zstandard.ZstdCompressor(compression_params=_parameters(kind))
        setattr(_local, kind, compressor)
    return compressor


@functools.cache
def _parameters(kind: str) -> Any:
    import zstandard

    if kind == _GENERAL:
        return zstandard.ZstdCompressionParameters.from_level(1, window_log=20)
    return zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        min_match=7,
        hash_log=6,
        window_log=17,
        chain_log=6,
        search_log=1,
        target_length=0,
    )


def _decompressor() -> zstandard.ZstdDecompressor:
    decompressor: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if decompressor is None:
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        _local.decompressor = decompressor
    return decompressor
