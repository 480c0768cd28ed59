"""Reversible encodings of a chunk, numbered for ever. Pure; the only module that imports zstandard.

======  ========  ==============================================================================================
number  name      payload
======  ========  ==============================================================================================
0       raw       the plain bytes
1       zstd      one zstd frame that declares its content size
2       planes    the bytes of equal significance of every element stored together, each plane raw or zstd
======  ========  ==============================================================================================

Of trained floating-point numbers only one byte compresses: the sign and exponent (ZipNN, arXiv:2411.05239). Splitting
the planes and compressing that one alone gives a smaller result than zstd over the whole, several times faster. Such a
plane holds hardly any matches, so zstd is set to do little but entropy coding.
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from castore.format.ids import Buffer

if TYPE_CHECKING:
    import zstandard

RAW, ZSTD, PLANES = 0, 1, 2
NAMES = {RAW: "raw", ZSTD: "zstd", PLANES: "planes"}

MAX_WINDOW = 1 << 23
"""Largest zstd window that is decoded, in bytes. Frames written here stay far below it."""

_PROBE_SLICES = 4
_PROBE_BYTES = 8192
_WORTH = 0.97  # an encoding that saves less than 3 % isn't worth the time to decode it
_PLANE_RAW, _PLANE_ZSTD = 0, 1
_PLANE_HEADER = struct.Struct("<BBI")  # width in bytes, raw or zstd, stored length


class CodecError(ValueError):
    """A payload is not a valid encoding of the expected number of bytes."""


# -- encode ----------------------------------------------------------------------------------------------------------


def encode(plain: Buffer, itemsize: int = 1) -> tuple[int, list[Buffer]]:
    """Return (codec, payload): the codec that suits a sample of ``plain`` best, and buffers to write one after another.

    ``itemsize`` is the width in bytes of the numbers in ``plain``, 1 for other data. The payload may alias ``plain``
    (codec raw), so it must be written before ``plain`` changes.
    """
    sample = _sample(plain, itemsize)
    as_zstd = len(_compressor(_GENERAL).compress(sample))
    if itemsize in _GROUPS and len(plain) % itemsize == 0:
        plane_sizes = _probe_planes(sample, itemsize)
        as_planes = sum(min(size, raw) for size, raw in plane_sizes)
        if as_planes < min(as_zstd, _WORTH * len(sample)):
            return PLANES, _encode_planes(plain, itemsize, [size < _WORTH * raw for size, raw in plane_sizes])
    if as_zstd < _WORTH * len(sample):
        frame = _compressor(_GENERAL).compress(plain)
        if len(frame) < len(plain):
            return ZSTD, [frame]
    return RAW, [plain]


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


def _probe_planes(sample: bytes, itemsize: int) -> list[tuple[int, int]]:
    """Return the (compressed, raw) size of each plane of the sample."""
    compressor = _compressor(_ENTROPY)
    planes = _split(sample, itemsize)
    return [(len(compressor.compress(plane)), len(plane)) for plane in planes]


def _split(plain: Buffer, itemsize: int) -> list[memoryview]:
    """Return the planes of ``plain``, with the widths of ``_GROUPS``."""
    import numpy as np

    planes = []
    offset = 0
    # the last two widths are 1 and 1: both bytes are fetched together and taken apart while they are in the cache
    for width in _GROUPS[itemsize][:-2]:
        numbers = np.frombuffer(plain, dtype=f"<u{width}")
        planes.append(np.ascontiguousarray(numbers[offset // width :: itemsize // width]))
        offset += width
    pairs = np.frombuffer(plain, dtype="<u2")[offset // 2 :: itemsize // 2]
    low, high = np.empty(len(pairs), np.uint8), np.empty(len(pairs), np.uint8)
    scratch = np.empty(min(len(pairs), _BLOCK_PAIRS), np.uint16)
    for start in range(0, len(pairs), _BLOCK_PAIRS):
        stop = min(start + _BLOCK_PAIRS, len(pairs))
        block = scratch[: stop - start]
        block[:] = pairs[start:stop]
        low[start:stop] = block
        np.right_shift(block, 8, out=block)
        high[start:stop] = block
    return [plane.view(np.uint8).data for plane in (*planes, low, high)]


_BLOCK_PAIRS = 1 << 16


def _encode_planes(plain: Buffer, itemsize: int, shrinks: Sequence[bool]) -> list[Buffer]:
    header = [bytes([itemsize])]
    payload: list[Buffer] = []
    for width, plane, shrink in zip(_GROUPS[itemsize], _split(plain, itemsize), shrinks, strict=True):
        stored: Buffer = _compressor(_ENTROPY).compress(plane) if shrink else plane
        kind = _PLANE_ZSTD
        if len(stored) >= len(plane):
            stored, kind = plane, _PLANE_RAW
        header.append(_PLANE_HEADER.pack(width, kind, len(stored)))
        payload.append(stored)
    return [b"".join(header), *payload]


# -- copying ---------------------------------------------------------------------------------------------------------

_WORTH_NUMPY = 1 << 16


def copy(source: Buffer, target: memoryview) -> None:
    """Copy ``source`` into ``target``, of the same length. Releases the GIL for long buffers.

    Assigning to a memoryview holds the GIL, and the first touch of new memory takes longer than the copying itself.
    """
    if len(target) < _WORTH_NUMPY:
        target[:] = source
        return
    import numpy as np

    np.frombuffer(target, np.uint8)[:] = np.frombuffer(source, np.uint8)


# -- decode ----------------------------------------------------------------------------------------------------------


def decode(codec: int, payload: memoryview, out: memoryview) -> None:
    """Decode ``payload`` into all of ``out``. CodecError if it does not fill ``out`` exactly.

    Hostile bytes cost no memory beyond ``out`` and one plane of it.
    """
    if codec == RAW:
        if len(payload) != len(out):
            raise CodecError(f"raw payload of {len(payload)} bytes where {len(out)} were expected")
        copy(payload, out)
    elif codec == ZSTD:
        copy(_decompress(payload, len(out)), out)
    elif codec == PLANES:
        _decode_planes(payload, out)
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
