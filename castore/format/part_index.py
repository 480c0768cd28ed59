"""Index of a part (its values, tensors and chunks) <-> msgpack. Pure; the only module that imports msgpack.

The index is a *flat* sequence of msgpack objects: a small extension object announces a container, and its items
follow. In a nested encoding a few hostile bytes could reserve gigabytes, as every array header preallocates. Read
flat, with every count checked against the bytes left, an index takes memory in proportion to its size.
"""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from castore.errors import CorruptIndex, UnsupportedValue, UnsupportedVersion
from castore.format.frame import MAX_PLAIN
from castore.format.ids import DIGEST_BYTES, ObjectId, join_digests, split_digests

VERSION = 1
MAX_DEPTH = 100
MAX_DIMENSIONS = 64

DTYPES: dict[str, tuple[int, int]] = {
    "bool": (1, 1), "uint8": (1, 1), "int8": (1, 1), "uint16": (2, 2), "int16": (2, 2),
    "uint32": (4, 4), "int32": (4, 4), "uint64": (8, 8), "int64": (8, 8),
    "float16": (2, 2), "bfloat16": (2, 2), "float32": (4, 4), "float64": (8, 8),
    "complex32": (4, 2), "complex64": (8, 4), "complex128": (16, 8),
    "float8_e4m3fn": (1, 1), "float8_e4m3fnuz": (1, 1), "float8_e5m2": (1, 1), "float8_e5m2fnuz": (1, 1),
    "float8_e8m0fnu": (1, 1), "float4_e2m1fn_x2": (1, 1),
    "uint1": (1, 1), "uint2": (1, 1), "uint3": (1, 1), "uint4": (1, 1), "uint5": (1, 1), "uint6": (1, 1),
    "uint7": (1, 1), "int1": (1, 1), "int2": (1, 1), "int3": (1, 1), "int4": (1, 1), "int5": (1, 1),
    "int6": (1, 1), "int7": (1, 1), "bits8": (1, 1), "bits16": (2, 2),
    "bits1x8": (1, 1), "bits2x4": (1, 1), "bits4x2": (1, 1),
}  # fmt: skip
"""Name -> (bytes of an element, bytes of each number in it). Elements are stored little-endian."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor: element type, shape, and the offset of its first byte in the part's stream."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """A chunk of the stream: the id of its object and its plain length in bytes."""

    id: ObjectId
    length: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands for tensor ``number`` of the index in a tree; a tied tensor has several."""

    number: int


@dataclass(frozen=True, slots=True)
class Object:
    """Stands in a tree for a value of a type that is neither a leaf nor a plain container: see :data:`OBJECTS`.

    The last of ``items`` is what it holds; those before it say how. The value's path is that of what it holds.
    """

    kind: str
    items: tuple[Any, ...]


OBJECTS = {
    "collections.Counter": 1,  # dict
    "collections.defaultdict": 2,  # name of the factory or None, dict
    "namedtuple": 3,  # its type's module and name with a colon between, tuple of field names, tuple
    "numpy.ndarray": 2,  # dtype as numpy writes it, TensorRef
    "numpy.generic": 2,  # dtype, number
    "torch.Size": 1,  # tuple
    "torch.dtype": 1,  # name
    "torch.device": 1,  # as torch writes it
}
"""The kinds of :class:`Object`, each with the number of its items."""


@dataclass(frozen=True, slots=True)
class Index:
    """A part: ``tree`` holds its values, with a TensorRef in place of each tensor."""

    chunks: tuple[ChunkRef, ...]
    tensors: tuple[TensorSpec, ...]
    tree: Any


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the number of bytes of a dense tensor."""
    size = DTYPES[dtype][0]
    for extent in shape:
        size *= extent
    return size


# -- encode ----------------------------------------------------------------------------------------------------------

_LIST, _TUPLE, _DICT, _ORDERED, _TENSOR, _INTEGER, _COMPLEX, _OBJECT = range(1, 9)
_COUNT = struct.Struct("<I")
_PAIR = struct.Struct("<dd")
_CONTAINERS: dict[type, int] = {list: _LIST, tuple: _TUPLE, dict: _DICT, OrderedDict: _ORDERED}


def encode(index: Index, name: str = "") -> bytes:
    """Return the index's bytes. Deterministic: equal parts give equal bytes and so have the same index id.

    UnsupportedValue, naming the key below ``name``, for a value that the format has no exact form for.
    """
    pack = msgpack.Packer(use_bin_type=True, strict_types=True).pack
    lengths = b"".join(_COUNT.pack(chunk.length) for chunk in index.chunks)
    data = bytearray()
    for head in (VERSION, join_digests(chunk.id for chunk in index.chunks), lengths, len(index.tensors)):
        data += pack(head)
    for spec in index.tensors:
        for value in (spec.dtype, len(spec.shape), *spec.shape, spec.offset):
            data += pack(value)
    _encode_value(index.tree, name, 0, data, pack)
    if len(data) > MAX_PLAIN:
        reason = f"the values other than tensors take {len(data)} bytes, over the limit of {MAX_PLAIN}"
        raise UnsupportedValue(name or "part", reason + ": store large bytes and strings as uint8 tensors")
    return bytes(data)


def _encode_value(value: Any, key: str, depth: int, out: bytearray, pack: Any) -> None:
    kind = type(value)
    if depth > MAX_DEPTH:
        raise UnsupportedValue(key[:80], f"nested more than {MAX_DEPTH} deep")
    if kind in _CONTAINERS:
        out += pack(msgpack.ExtType(_CONTAINERS[kind], _COUNT.pack(len(value))))
        if kind is list or kind is tuple:
            for i, item in enumerate(value):
                _encode_value(item, f"{key}[{i}]", depth + 1, out, pack)
        else:
            for name, item in value.items():
                check_key(name, key)
                _encode_value(name, key, depth + 1, out, pack)
                _encode_value(item, join_key(key, name), depth + 1, out, pack)
    elif kind is Object:
        out += pack(msgpack.ExtType(_OBJECT, _COUNT.pack(len(value.items))))
        for item in (value.kind, *value.items):
            _encode_value(item, key, depth + 1, out, pack)
    else:
        out += pack(check_leaf(value, key))


def check_leaf(value: Any, key: str) -> Any:
    """Return what msgpack packs for a value other than a container. UnsupportedValue, naming ``key``, if it can't."""
    kind = type(value)
    if kind is TensorRef:
        return msgpack.ExtType(_TENSOR, _COUNT.pack(value.number))
    if kind is complex:
        return msgpack.ExtType(_COMPLEX, _PAIR.pack(value.real, value.imag))
    if kind is int:
        if -(2**63) <= value < 2**64:
            return value
        return msgpack.ExtType(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UnsupportedValue(key, f"a string that is not valid Unicode ({error.reason})") from None
        return value
    if value is None or kind in (bool, float, bytes):
        return value
    raise UnsupportedValue(key, f"{_type_name(kind)} is not a tensor, number, string, bytes, None or a container")


def check_key(name: Any, key: str) -> None:
    """Raise UnsupportedValue unless ``name`` can be a key of the dict at ``key``."""
    if type(name) not in (str, int):
        raise UnsupportedValue(join_key(key, name), f"a dict key is a str or an int, not {_type_name(type(name))}")


def join_key(key: str, name: Any) -> str:
    """Return the readable path of item ``name`` below ``key``, empty at the top; different places, different paths.

    A string at the top stands as it is, since the names of a model's tensors are full of dots; below it keys are
    written as in Python. One at the top that could be taken for a path, or that is empty, is quoted, too.

    >>> join_key(join_key(join_key("", "state"), 3), "exp_avg"), join_key("", "blocks.0.weight")
    ('state[3]["exp_avg"]', 'blocks.0.weight')
    """
    if type(name) is str:
        if key and name.isascii() and name.isprintable() and '"' not in name and "\\" not in name:
            return f'{key}["{name}"]'  # as below, and ten times as fast
        return name if not key and name and "[" not in name else f"{key}[{json.dumps(name, ensure_ascii=False)}]"
    if type(name) is int and name.bit_length() > _DECIMAL_BITS:
        return f"{key}[{name:#x}]"
    return f"{key}[{name!r}]"


_DECIMAL_BITS = 64  # Python refuses to print very large integers as decimals


def items(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """Return the (readable path, item) pairs of a container at ``key``; an empty list for any other value."""
    value = content(value)
    if isinstance(value, dict):
        return [(join_key(key, name), item) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return [(f"{key}[{i}]", item) for i, item in enumerate(value)]
    return []


def content(value: Any) -> Any:
    """Return what an :class:`Object` holds; any other value as it is."""
    while type(value) is Object:
        value = value.items[-1]
    return value


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (readable path, value) for every value in a state that has no items, empty containers included."""
    children = items(value, key)
    if not children:
        yield key, content(value)
    for path, item in children:
        yield from leaves(item, path)


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# -- decode ----------------------------------------------------------------------------------------------------------


def decode(data: bytes) -> Index:
    """Return the index in ``data``, whose hash the caller has verified. Raise CorruptIndex or UnsupportedVersion."""
    reader = _Reader(data)
    chunks = _read_chunks(reader)
    tensors = _read_tensors(reader, sum(chunk.length for chunk in chunks))
    tree = _read_value(reader, len(tensors), 0)
    reader.finish()
    return Index(chunks, tensors, tree)


def decode_chunks(data: bytes) -> tuple[ChunkRef, ...]:
    """Return the chunks alone, without reading the rest: availability needs no more."""
    return _read_chunks(_Reader(data))


class _Reader:
    """Reads msgpack objects one after another, none of them a container."""

    def __init__(self, data: bytes) -> None:
        self._size = len(data)
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=max(len(data), 1), max_array_len=0, max_map_len=0, strict_map_key=False, raw=False
        )
        self._unpacker.feed(data)

    def next(self, *kinds: type) -> Any:
        """Return the next object, of one of ``kinds``; any scalar if none are given."""
        try:
            value = self._unpacker.unpack()
        except (msgpack.exceptions.UnpackException, ValueError, RecursionError) as error:
            raise CorruptIndex(f"index is damaged: {error or type(error).__name__}") from error
        if kinds and type(value) not in kinds:
            raise CorruptIndex(f"index is damaged: {type(value).__name__} where {kinds[0].__name__} was expected")
        return value

    def count(self, value: int) -> int:
        """Return ``value`` if so many objects can follow, each of which takes at least one byte."""
        if not 0 <= value <= self._size - self._unpacker.tell():
            raise CorruptIndex(f"index is damaged: {value} items do not fit in the bytes left")
        return value

    def finish(self) -> None:
        if self._unpacker.tell() != self._size:
            raise CorruptIndex("index is damaged: trailing bytes")


def _read_chunks(reader: _Reader) -> tuple[ChunkRef, ...]:
    version = reader.next()
    if type(version) is not int or version < 1:
        raise CorruptIndex("index is damaged: it does not begin with a version")
    if version != VERSION:
        raise UnsupportedVersion("index", version)
    digests, packed = reader.next(bytes), reader.next(bytes)
    if len(digests) % DIGEST_BYTES or len(packed) != len(digests) // DIGEST_BYTES * _COUNT.size:
        raise CorruptIndex("index is damaged: chunk ids and lengths don't match")
    lengths = [length for (length,) in _COUNT.iter_unpack(packed)]
    if not all(0 < length <= MAX_PLAIN for length in lengths):
        raise CorruptIndex("index is damaged: a chunk's length is out of range")
    return tuple(map(ChunkRef, split_digests(digests), lengths))


def _read_tensors(reader: _Reader, stream: int) -> tuple[TensorSpec, ...]:
    tensors = []
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # few, and each in memory once
    names = {name: name for name in DTYPES}
    for _ in range(reader.count(reader.next(int))):
        dtype = names.get(given := reader.next(str), "")
        if not dtype:
            raise CorruptIndex(f"index is damaged: unknown element type {given[:40]!r}")
        dimensions = reader.count(reader.next(int))
        if dimensions > MAX_DIMENSIONS:
            raise CorruptIndex(f"index is damaged: {dimensions} dimensions")
        shape = tuple(reader.next(int) for _ in range(dimensions))
        if not all(0 <= extent < 2**63 for extent in shape):
            raise CorruptIndex("index is damaged: a shape is out of range")
        tensors.append(TensorSpec(dtype, shapes.setdefault(shape, shape), reader.next(int)))
    _check_extents(tensors, stream)
    return tuple(tensors)


def _check_extents(tensors: Sequence[TensorSpec], stream: int) -> None:
    """Raise CorruptIndex for overlap, which could claim the same bytes a million times, or an end after the stream."""
    end = 0
    for spec in sorted((spec for spec in tensors if spec.nbytes), key=lambda spec: spec.offset):
        if spec.offset < end:
            raise CorruptIndex("index is damaged: tensors overlap")
        end = spec.offset + spec.nbytes
    if end > stream:
        raise CorruptIndex("index is damaged: a tensor ends after the stream")


def _read_value(reader: _Reader, tensors: int, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CorruptIndex(f"index is damaged: nested more than {MAX_DEPTH} deep")
    value = reader.next()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if type(value) is not msgpack.ExtType:
        raise CorruptIndex(f"index is damaged: {type(value).__name__} among the values")
    code, data = value
    if code == _INTEGER and data:
        return int.from_bytes(data, "little", signed=True)
    if code == _COMPLEX and len(data) == _PAIR.size:
        return complex(*_PAIR.unpack(data))
    if len(data) != _COUNT.size:
        raise CorruptIndex("index is damaged: extension of the wrong length")
    (number,) = _COUNT.unpack(data)
    if code == _TENSOR and number < tensors:
        return TensorRef(number)
    if code in (_LIST, _TUPLE):
        values = [_read_value(reader, tensors, depth + 1) for _ in range(reader.count(number))]
        return values if code == _LIST else tuple(values)
    if code == _OBJECT:
        return _read_object(reader, tensors, depth, number)
    if code in (_DICT, _ORDERED):
        return _read_dict(reader, tensors, depth, OrderedDict() if code == _ORDERED else {}, number)
    raise CorruptIndex(f"index is damaged: extension {code} with {number}")


def _read_object(reader: _Reader, tensors: int, depth: int, count: int) -> Object:
    kind = reader.next(str)
    if OBJECTS.get(kind) != count:
        raise CorruptIndex(f"index is damaged: an object of kind {kind[:40]!r} with {count} items")
    return Object(kind, tuple(_read_value(reader, tensors, depth + 1) for _ in range(count)))


def _read_dict(reader: _Reader, tensors: int, depth: int, into: dict[Any, Any], count: int) -> dict[Any, Any]:
    for _ in range(reader.count(count)):
        key = reader.next()
        if type(key) is msgpack.ExtType and key.code == _INTEGER and key.data:
            key = int.from_bytes(key.data, "little", signed=True)
        if type(key) not in (str, int) or key in into:
            raise CorruptIndex("index is damaged: a dict key is repeated or of the wrong type")
        into[key] = _read_value(reader, tensors, depth + 1)
    return into
