"""A second implementation of reading, made from FORMAT.md alone: it uses nothing of castore but that text."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zstandard
from blake3 import blake3

SPECIFICATION = (Path(__file__).parents[1] / "castore" / "format" / "FORMAT.md").read_text(encoding="utf-8")


def table(first: str, nth: int = 0) -> list[list[str]]:
    """The rows of the nth table in FORMAT.md whose first column has this heading."""
    after = SPECIFICATION.split(f"\n| {first} |")[nth + 1].split("\n\n")[0]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in after.splitlines()[2:]]


def element_types() -> dict[str, tuple[int, int]]:
    rows = table("element type")
    return {
        name.split("`")[0]: (int(size), int(width))
        for names, size, width in rows
        for name in names.replace("(0 or 1)", "").replace(" `", "").split(",")
    }


# -- a second implementation: objects (sections 3 to 5) --------------------------------------------------------------


class Damaged(Exception):
    pass


def need(condition: object, what: str) -> None:
    if not condition:
        raise Damaged(what)


def read_object(root: Path, object_id: str, length: int | None = None) -> bytes:
    data = (root / "objects" / object_id[:2] / object_id).read_bytes()
    need(16 <= len(data) <= 67112960, "size")
    magic, version, codec, zero, n = struct.unpack_from("<4sBBHQ", data)
    need(magic == b"CSTO" and zero == 0 and n <= 67108864, "header")
    need(length in (None, n), "length")
    need((version, codec) in ((1, 0), (1, 1), (1, 2), (2, 3)), "codec")
    plain = DECODERS[codec](data[16:], n)
    need(blake3(plain).hexdigest() == object_id, "hash")
    return plain


def plain_raw(payload: bytes, n: int) -> bytes:
    need(len(payload) == n, "raw length")
    return payload


def plain_zstd(payload: bytes, n: int) -> bytes:
    header = zstandard.get_frame_parameters(payload)
    need(header.content_size == n and header.window_size <= 8388608 and header.dict_id == 0, "zstd header")
    return zstandard.ZstdDecompressor().decompress(payload, max_output_size=n, allow_extra_data=False)


def plain_planes(payload: bytes, n: int) -> bytes:
    s = payload[0]
    need(2 <= s <= 8 and n % s == 0, "element width")
    headers = []
    while sum(w for w, _, _ in headers) < s:
        headers.append(struct.unpack_from("<BBI", payload, 1 + 6 * len(headers)))
    at = 1 + 6 * len(headers)
    elements = np.zeros((n // s, s), dtype=np.uint8)
    o = 0
    for w, kind, stored in headers:
        need(w in (1, 2, 4, 8) and s % w == 0 and o % w == 0 and o + w <= s and kind in (0, 1), "plane header")
        plane = (plain_raw, plain_zstd)[kind](payload[at : at + stored], n // s * w)
        elements[:, o : o + w] = np.frombuffer(plane, dtype=np.uint8).reshape(-1, w)
        at, o = at + stored, o + w
    need(at == len(payload), "rest")
    return elements.tobytes()


def plain_sparse(payload: bytes, n: int) -> bytes:
    s, codec, kind, after, b = struct.unpack_from("<BBBBI", payload)
    need(s in (2, 4, 8) and n % s == 0 and codec in (0, 1, 2) and kind in (0, 1) and 8 + b <= len(payload), "header")
    count = n // s
    need(after == -count % 8, "bits after the last")
    bitmap = int.from_bytes(DECODERS[kind](payload[8 : 8 + b], (count + 7) // 8), "little")
    need(bitmap >> count == 0, "bits past the end")
    elements = DECODERS[codec](payload[8 + b :], bitmap.bit_count() * s)
    taken = iter(range(0, len(elements), s))
    return b"".join(
        elements[at : at + s] if bitmap >> i & 1 and (at := next(taken)) >= 0 else bytes(s) for i in range(count)
    )


DECODERS = (plain_raw, plain_zstd, plain_planes, plain_sparse)


# -- a second implementation: parts (section 6); values in the notation of expected.json ------------------------------

SEQUENCES = {1: "list", 2: "tuple"}
MAPPINGS = {3: "dict", 4: "OrderedDict"}
ELEMENT_TYPES = element_types()


def read_part(root: Path, index_id: str) -> dict[str, Any]:
    chunks, tensors, value = read_index(read_object(root, index_id))
    stream = b"".join(read_object(root, chunk, length) for chunk, length in chunks)
    described = []
    end = 0
    for offset, size in sorted((offset, byte_size(dtype, shape)) for dtype, shape, offset in tensors):
        need(size == 0 or offset >= end, "overlap")
        end = max(end, offset + size)
    for dtype, shape, offset in tensors:
        size = byte_size(dtype, shape)
        data = stream[offset : offset + size]
        need(len(data) == size, "beyond the stream")
        content = {"bytes": data.hex()} if size <= 64 else {"blake3": blake3(data).hexdigest()}
        described.append({"dtype": dtype, "shape": shape, **content})
    return {"value": value, "tensors": described}


def byte_size(dtype: str, shape: list[int]) -> int:
    return ELEMENT_TYPES[dtype][0] * math.prod(shape)


def read_index(data: bytes) -> tuple[list[tuple[str, int]], list[tuple[str, list[int], int]], Any]:
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False)
    unpacker.feed(data)
    take = unpacker.unpack
    need(take() == 1, "version")
    digests, packed = take(), take()
    need(len(digests) * 4 == len(packed) * 32, "chunks")
    lengths = struct.unpack(f"<{len(packed) // 4}I", packed)
    chunks = [(digests[32 * i : 32 * i + 32].hex(), length) for i, length in enumerate(lengths)]
    tensors = [(take(), [take() for _ in range(take())], take()) for _ in range(take())]

    def value(depth: int = 0) -> Any:
        need(depth <= 100, "depth")
        item = take()
        if type(item) is not msgpack.ExtType:
            return scalar(item)
        code, payload = item
        if code == 6:
            return scalar(int.from_bytes(payload, "little", signed=True))
        if code == 7:
            return {"complex": [struct.pack(">d", half).hex() for half in struct.unpack("<dd", payload)]}
        (number,) = struct.unpack("<I", payload)
        if code in SEQUENCES:
            return {SEQUENCES[code]: [value(depth + 1) for _ in range(number)]}
        if code in MAPPINGS:
            return {MAPPINGS[code]: [[value(depth + 1), value(depth + 1)] for _ in range(number)]}
        if code == 8:
            return {"object": [take(), *(value(depth + 1) for _ in range(number))]}
        need(code == 5 and number < len(tensors), "extension")
        return {"tensor": number}

    tree = value()
    need(unpacker.tell() == len(data), "rest")
    return chunks, tensors, tree


def scalar(value: Any) -> Any:
    if type(value) is float:
        return {"float": repr(value), "bits": struct.pack(">d", value).hex()}
    if type(value) is int:
        return {"int": str(value)}
    if type(value) is bytes:
        return {"bytes": value.hex()}
    need(value is None or type(value) in (bool, str), "type")
    return value
