"""FORMAT.md holds: a reader and a writer made from it alone agree with castore, and both with the golden repository.

The second reader is tests/second_reader.py; like the writer here it uses nothing of castore.
"""

from __future__ import annotations

import ast
import json
import math
import shutil
import struct
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard
from blake3 import blake3
from builders import encoded, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden import describe, states
from second_reader import (
    DECODERS,
    ELEMENT_TYPES,
    MAPPINGS,
    SEQUENCES,
    byte_size,
    plain_planes,
    plain_sparse,
    read_index,
    read_object,
    read_part,
    table,
)

import castore
from castore.errors import CorruptManifest, UnsupportedVersion
from castore.format import bundle, chunking, codecs, frame, manifest, part_index
from castore.format.frame import encode_frame
from castore.format.ids import ObjectId

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
EXPECTED_CHECKPOINTS = EXPECTED["checkpoints"]
CHUNK = 64 << 10


def write_index(chunks: list[tuple[str, int]], tensors: list[tuple[str, list[int], int]], tree: Any) -> bytes:
    digests = bytes.fromhex("".join(chunk_id for chunk_id, _ in chunks))
    out = [1, digests, b"".join(struct.pack("<I", length) for _, length in chunks)]
    out.append(len(tensors))
    for dtype, shape, offset in tensors:
        out += [dtype, len(shape), *shape, offset]

    def value(described: Any) -> None:
        kind, content = next(iter(described.items())) if type(described) is dict else ("plain", described)
        if kind in SEQUENCES.values():
            code = next(code for code, name in SEQUENCES.items() if name == kind)
            out.append(msgpack.ExtType(code, struct.pack("<I", len(content))))
            for item in content:
                value(item)
        elif kind in MAPPINGS.values():
            code = next(code for code, name in MAPPINGS.items() if name == kind)
            out.append(msgpack.ExtType(code, struct.pack("<I", len(content))))
            for key, item in content:
                value(key)
                value(item)
        elif kind == "object":
            out.append(msgpack.ExtType(8, struct.pack("<I", len(content) - 1)))
            for item in content:
                value(item)
        elif kind == "tensor":
            out.append(msgpack.ExtType(5, struct.pack("<I", content)))
        elif kind == "complex":
            out.append(msgpack.ExtType(7, b"".join(bytes.fromhex(half)[::-1] for half in content)))
        elif kind == "float":
            out.append(struct.unpack(">d", bytes.fromhex(described["bits"]))[0])
        elif kind == "bytes":
            out.append(bytes.fromhex(content))
        elif kind == "int" and not -(2**63) <= int(content) < 2**64:
            size = abs(int(content)).bit_length() // 8 + 1
            out.append(msgpack.ExtType(6, int(content).to_bytes(size, "little", signed=True)))
        else:
            out.append(int(content) if kind == "int" else content)

    value(tree)
    return b"".join(map(msgpack.packb, out))


def lay_out(tensors: list[tuple[int, int]], c: int) -> tuple[list[int], list[int]]:
    """Offsets of tensors given as (bytes, number width), and the lengths of the chunks."""
    lengths: list[int] = []
    begins: dict[int, tuple[int, int]] = {}  # tensor: (chunk, offset in it)
    still_open: dict[int, list[tuple[int, int, int]]] = {}  # number width: (tensor, from, to)

    def close(width: int) -> None:
        shared = still_open.pop(width)
        begins.update({tensor: (len(lengths), start) for tensor, start, _ in shared})
        lengths.append(shared[-1][2])

    for tensor, (size, width) in enumerate(tensors):
        if size == 0:
            continue
        if size >= c / 2:
            begins[tensor] = (len(lengths), 0)
            lengths.extend([c] * (size // c) + [size % c] * (size % c > 0))
            continue
        start = math.ceil(still_open[width][-1][2] / 64) * 64 if width in still_open else 0
        if start + size > c:
            close(width)
            start = 0
        still_open.setdefault(width, []).append((tensor, start, start + size))
    for width in list(still_open):
        close(width)
    starts = [sum(lengths[:chunk]) for chunk in range(len(lengths))]
    offsets = [starts[begins[i][0]] + begins[i][1] if i in begins else 0 for i in range(len(tensors))]
    return offsets, lengths


# -- a second implementation: manifests (section 7) -------------------------------------------------------------------


def canonical(document: Any) -> bytes:
    return (written(document, "\n") + "\n").encode()


def written(value: Any, newline: str) -> str:
    deeper = newline + "  "
    if isinstance(value, dict):
        members = [f"{written(key, '')}: {written(value[key], deeper)}" for key in sorted(value)]
        return "{" + deeper + ("," + deeper).join(members) + newline + "}" if members else "{}"
    if isinstance(value, list):
        items = [written(item, deeper) for item in value]
        return "[" + deeper + ("," + deeper).join(items) + newline + "]" if items else "[]"
    if isinstance(value, float):
        return written_float(value)
    return json.dumps(value, ensure_ascii=False)


def written_float(value: float) -> str:
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    minus = "-" * sign
    if value == 0:
        return minus + "0.0"
    d = "".join(map(str, digits)).rstrip("0")
    e = len(digits) - 1 + exponent
    if not -5 <= e <= 15:
        return f"{minus}{d[0]}{'.' * (len(d) > 1)}{d[1:]}e{e}"
    if e < 0:
        return minus + "0." + "0" * (-e - 1) + d
    return minus + d[: e + 1].ljust(e + 1, "0") + "." + (d[e + 1 :] or "0")


# -- the golden repository -------------------------------------------------------------------------------------------


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the golden repository; the folder that holds its .castore."""
    shutil.copytree(GOLDEN / "castore", tmp_path / ".castore")
    return tmp_path


def test_the_golden_repository_is_unchanged() -> None:
    files = [path for path in (GOLDEN / "castore").rglob("*") if path.is_file()]
    hashes = {str(path.relative_to(GOLDEN / "castore")): blake3(path.read_bytes()).hexdigest() for path in files}
    assert hashes == {name: about["blake3"] for name, about in EXPECTED["files"].items()}


def test_the_golden_repository_exercises_every_codec_and_plane() -> None:
    seen: set[Any] = set()
    for name in EXPECTED["files"]:
        data = (GOLDEN / "castore" / name).read_bytes()
        if data[:4] == b"CSTO":
            seen.add(("raw", "zstd", "planes")[data[5]])
            assert EXPECTED["files"][name]["plain"] == struct.unpack_from("<Q", data, 8)[0]
            if data[5] == 2:
                seen |= {("element", data[16]), ("plane kind", data[18])}
                seen.add(("plane kind", data[17 + 6 * {2: 1, 4: 2, 8: 3}[data[16]] + 1]))
    assert seen == {
        "raw", "zstd", "planes", ("element", 2), ("element", 4), ("element", 8), ("plane kind", 0), ("plane kind", 1),
    }  # fmt: skip


def test_the_golden_sparse_object_is_read_by_both() -> None:
    path = next((GOLDEN.parent / "v2").iterdir())
    data = path.read_bytes()
    assert data[:8] == b"CSTO\2\3\0\0"
    (n,) = struct.unpack_from("<Q", data, 8)
    plain = plain_sparse(data[16:], n)
    assert blake3(plain).hexdigest() == path.name
    out = bytearray(n)
    frame.decode_frame(ObjectId(path.name), memoryview(data), memoryview(out))
    assert out == plain


@settings(deadline=None)
@given(st.integers(0, 5000), st.floats(0, 1), st.sampled_from([2, 4, 8]), st.integers(0, 99))
def test_an_independent_reader_decodes_numbers_of_which_some_are_zero(
    n: int, zeros: float, width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    numbers = (rng.normal(scale=0.02, size=n).astype("<f8").view("<u8") >> (64 - 8 * width)).astype(f"<u{width}")
    numbers[rng.random(n) < zeros] = 0
    codec, payload = encoded(numbers.tobytes(), width)
    assert DECODERS[codec](payload, n * width) == numbers.tobytes()


def test_an_independent_reader_finds_everything_that_was_saved() -> None:
    root = GOLDEN / "castore"
    listed = sorted(path for path in (root / "manifests").glob("*/*.json"))
    assert [str(path.relative_to(root)) for path in listed] == [
        checkpoint["file"] for checkpoint in EXPECTED_CHECKPOINTS
    ]
    for path, expected in zip(listed, EXPECTED_CHECKPOINTS, strict=True):
        data = path.read_bytes()
        checkpoint_id = blake3(data).hexdigest()
        document = json.loads(data)
        assert canonical(document) == data
        assert (checkpoint_id, document) == (expected["id"], expected["manifest"])
        assert path.name == f"{document['step']:09}-{checkpoint_id[:12]}.json"
        assert path.parent.name == document["run"]
        for name, part in document["parts"].items():
            assert read_part(root, part["index"]) == expected["parts"][name]


def test_castore_loads_the_very_values_that_were_saved(golden: Path) -> None:
    repo = castore.Repo.open(golden)
    for expected in EXPECTED_CHECKPOINTS:
        state = repo.load(expected["id"])
        assert {name: describe(part) for name, part in state.items()} == expected["parts"]


def test_castore_lists_the_golden_manifests(golden: Path) -> None:
    listing = castore.Repo.open(golden).catalog.listing()
    assert listing.broken == ()
    assert [entry.id for entry in listing.entries] == [
        checkpoint["id"] for checkpoint in reversed(EXPECTED_CHECKPOINTS)
    ]
    newest = listing.entries[0].manifest
    assert newest.parent == listing.entries[1].id
    assert newest.config == EXPECTED_CHECKPOINTS[1]["manifest"]["config"]


def test_castore_still_gives_the_golden_states_the_same_ids(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "castore", tmp_path / ".castore", ignore=shutil.ignore_patterns("objects", "manifests"))
    repo = castore.Repo.open(tmp_path)
    for (parts, about), expected in zip(states(), EXPECTED_CHECKPOINTS, strict=True):
        saved = repo.save(parts, **about)
        saved_parts = {name: (part.index, part.bytes) for name, part in saved.manifest.parts.items()}
        recorded = expected["manifest"]["parts"]
        assert saved_parts == {name: (part["index"], part["bytes"]) for name, part in recorded.items()}


def test_an_independent_writer_makes_the_golden_indexes_byte_for_byte() -> None:
    for expected in EXPECTED_CHECKPOINTS:
        for name, part in expected["manifest"]["parts"].items():
            data = read_object(GOLDEN / "castore", part["index"])
            described = expected["parts"][name]
            types = [(tensor["dtype"], tensor["shape"]) for tensor in described["tensors"]]
            sizes = [(byte_size(dtype, shape), ELEMENT_TYPES[dtype][1]) for dtype, shape in types]
            offsets, lengths = lay_out(sizes, CHUNK)
            chunks = read_index(data)[0]
            assert [length for _, length in chunks] == lengths
            tensors = [(dtype, shape, offset) for (dtype, shape), offset in zip(types, offsets, strict=True)]
            assert write_index(chunks, tensors, described["value"]) == data


# -- layout and codecs -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from([1, 2, 4, 8])), max_size=40), st.integers(1, 8))
def test_tensors_are_laid_out_as_the_specification_says(counts: list[tuple[int, int]], sixty_fours: int) -> None:
    sizes = [(count * width, width) for count, width in counts]
    offsets, chunks = chunking.plan_layout(sizes, 64 * sixty_fours)
    assert (list(offsets), [chunk.length for chunk in chunks]) == lay_out(sizes, 64 * sixty_fours)


def splits(width: int, start: int = 0) -> Iterator[list[int]]:
    """Every division of an element into planes that codec 2 allows."""
    if start == width:
        yield []
    for plane in (1, 2, 4, 8):
        if width % plane == 0 and start % plane == 0 and start + plane <= width:
            yield from ([plane, *rest] for rest in splits(width, start + plane))


@pytest.mark.parametrize("width", range(2, 9))
@pytest.mark.parametrize("kind", [0, 1])
def test_castore_decodes_every_split_into_planes_that_the_format_allows(width: int, kind: int) -> None:
    plain = np.random.default_rng(width).bytes(24 * width)
    elements = np.frombuffer(plain, dtype=np.uint8).reshape(24, width)
    for planes in splits(width):
        header, stored = bytes([width]), b""
        for i, plane in enumerate(planes):
            o = sum(planes[:i])
            data = elements[:, o : o + plane].tobytes()
            data = zstandard.compress(data) if kind else data
            header += struct.pack("<BBI", plane, kind, len(data))
            stored += data
        assert plain_planes(header + stored, len(plain)) == plain
        out = bytearray(len(plain))
        codecs.decode(2, memoryview(header + stored), memoryview(out))
        assert out == plain


@settings(deadline=None)
@given(st.binary(max_size=4000) | st.binary(max_size=40).map(lambda few: few * 100), st.sampled_from([1, 2, 4, 8]))
def test_an_independent_reader_decodes_whatever_castore_encodes(plain: bytes, width: int) -> None:
    codec, payload = encoded(plain, width)
    assert DECODERS[codec](payload, len(plain)) == plain


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("count", [300, 50_000])
def test_an_independent_reader_decodes_numbers_that_castore_splits_into_planes(kind: str, count: int) -> None:
    plain = np.random.default_rng(count).normal(scale=0.02, size=count).astype(kind).tobytes()
    codec, payload = encoded(plain, int(kind[2]))
    assert codec == 2
    assert plain_planes(payload, len(plain)) == plain


# -- canonical form of manifests -------------------------------------------------------------------------------------

FINITE = st.floats(allow_nan=False, allow_infinity=False) | st.builds(
    lambda digits, exponent: float(f"{digits}e{exponent}"), st.integers(-(10**6), 10**6), st.integers(-14, 16)
)
TEXT = st.text(max_size=12) | st.text('\x00\x07\x08\t\n\x0b\f\r\x1f\x7f\x80\u2028\ufeff"\\/é\uffff😀', max_size=12)
INTEGER = st.integers(-(2**63), 2**63 - 1)
SCALAR = st.none() | st.booleans() | INTEGER | FINITE | TEXT
FREE_FORM = st.dictionaries(
    TEXT,
    st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)),
    max_size=4,
)
ID = st.binary(min_size=32, max_size=32).map(bytes.hex)
METRIC = st.builds(
    lambda direction, ends: {"direction": direction, "low": ends and min(ends), "high": ends and max(ends)},
    st.sampled_from(["max", "min"]),
    st.none() | st.lists(FINITE, min_size=2, max_size=2, unique=True),
)
PART = st.fixed_dictionaries({"index": ID, "bytes": st.integers(0, 2**63 - 1), "stored_bytes": st.integers(0, 2**40)})
DOCUMENT = st.fixed_dictionaries(
    {
        "version": st.just(1),
        "kind": st.just("checkpoint"),
        "run": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"),
        "step": st.integers(0, 999_999_999),
        "created": st.datetimes()
        .filter(lambda moment: moment.year >= 1000)
        .map(lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")),
        "parent": st.none() | ID,
        "parts": st.dictionaries(st.from_regex(r"\A[a-z][a-z0-9_]{0,31}\Z"), PART, min_size=1, max_size=3),
        "experiment": st.fixed_dictionaries(
            {
                "model": st.dictionaries(TEXT, SCALAR, max_size=3),
                "tokenizer": TEXT,
                "data": TEXT,
                "evaluation": st.dictionaries(TEXT, SCALAR, max_size=3),
                "metrics": st.dictionaries(TEXT, METRIC, max_size=2),
            }
        ),
        "metrics": st.dictionaries(TEXT, FINITE, max_size=3),
        "tags": st.lists(TEXT, max_size=3),
        "note": TEXT,
        "config": FREE_FORM,
        "info": FREE_FORM,
    }
)


def as_manifest(document: dict[str, Any]) -> castore.Manifest:
    experiment = document["experiment"]
    metrics = {name: castore.Metric(**metric) for name, metric in experiment["metrics"].items()}
    parts = {name: manifest.Part(**part) for name, part in document["parts"].items()}
    return castore.Manifest(
        **document | {"experiment": castore.Experiment(**experiment | {"metrics": metrics}), "parts": parts}
    )


@settings(deadline=None)
@given(DOCUMENT)
def test_an_independent_canonicaliser_writes_every_manifest_as_castore_does(document: dict[str, Any]) -> None:
    data = canonical(document)
    expected = as_manifest(document)
    assert manifest.encode(expected) == data
    assert manifest.decode(data) == (blake3(data).hexdigest(), expected)
    assert canonical(json.loads(data)) == data


@settings(deadline=None, max_examples=1000)
@given(FINITE | st.builds(math.ldexp, st.sampled_from([1.0, 1.5]), st.integers(-1074, 1023)))
def test_every_float_is_written_as_the_specification_says(value: float) -> None:
    data = manifest.encode(minimal(config={"value": value}))
    assert f'\n    "value": {written_float(value)}\n'.encode() in data


def test_the_examples_of_floats_in_the_specification_are_right() -> None:
    texts = [text for _, left, _, right in table("value") for text in (left, right)]
    assert len(texts) == 10
    for text in texts:
        assert written_float(float(text)) == text
        assert f'"value": {text}\n'.encode() in manifest.encode(minimal(config={"value": float(text)}))


def minimal(**fields: Any) -> castore.Manifest:
    part = manifest.Part(index="0" * 64, bytes=0, stored_bytes=0)
    basic = {"run": "r", "step": 1, "created": "2025-01-02T03:04:05.000006Z", "parts": {"model": part}}
    return castore.Manifest(**basic | fields)


@pytest.mark.parametrize(
    ("passage", "replacement"),
    [
        (b'  "note": "",\n', b""),
        (b'"note": ""', b'"note": "",\n  "other": ""'),
        (b'"note": "",', b'"note": "",\n  "note": "",'),
        (b'"note": ""', b'"note":  ""'),
        (b'"note": ""', b'"note": "\\u0041"'),
        (b'"note": ""', b'"note": "\\/"'),
        (b'"note": ""', b'"note": "\xed\xa0\x80"'),
        (b'"val_loss": 1.0', b'"val_loss": 1'),
        (b'"val_loss": 1.0', b'"val_loss": 1.00'),
        (b'"val_loss": 1.0', b'"val_loss": 1e0'),
        (b'"val_loss": 1.0', b'"val_loss": NaN'),
        (b'"val_loss": 1.0', b'"val_loss": 1e999'),
        (b'"step": 1', b'"step": 1.0'),
        (b'"step": 1', b'"step": 1000000000'),
        (b'"step": 1', b'"step": true'),
        (b'"kind": "checkpoint"', b'"kind": "dataset"'),
        (b'"run": "r"', b'"run": "../r"'),
        (b".000006Z", b"Z"),
        (b"2025-01-02T", b"2025-13-02T"),
        (b'"n": 1', b'"n": 9223372036854775808'),
        (b'"n": 1', b'"n": -9223372036854775809'),
        (b'"bytes": 0', b'"bytes": -1'),
        (b"\n", b"\r\n"),
        (b"}\n", b"}"),
        (b"{\n", b"\xef\xbb\xbf{\n"),
    ],
)
def test_a_manifest_in_any_other_form_is_refused(passage: bytes, replacement: bytes) -> None:
    data = manifest.encode(minimal(metrics={"val_loss": 1.0}, config={"n": 1}))
    assert passage in data
    with pytest.raises(CorruptManifest):
        manifest.decode(data.replace(passage, replacement))


def test_a_manifest_has_as_many_levels_as_the_specification_says() -> None:
    def nested(levels: int) -> dict[str, Any]:
        return {"x": nested(levels - 1)} if levels > 1 else {}

    assert manifest.encode(minimal(config=nested(32)))
    deeper = json.loads(manifest.encode(minimal())) | {"config": nested(33)}
    with pytest.raises(CorruptManifest):
        manifest.decode(canonical(deeper))


# -- unknown versions ------------------------------------------------------------------------------------------------


def test_an_object_of_an_unknown_version_is_named_and_left_in_place(golden: Path) -> None:
    repo = castore.Repo.open(golden)
    expected = EXPECTED_CHECKPOINTS[0]
    chunk_id = read_index(read_object(golden / ".castore", expected["manifest"]["parts"]["model"]["index"]))[0][0][0]
    path = golden / ".castore" / "objects" / chunk_id[:2] / chunk_id
    data = bytearray(path.read_bytes())
    data[4] = 3
    path.write_bytes(data)
    reason = rf"object {chunk_id[:12]} \(part .model. of .*\) has format version 3"
    with pytest.raises(UnsupportedVersion, match=reason):
        repo.load(expected["id"])
    assert path.read_bytes() == data


def test_an_index_of_an_unknown_version_says_so(golden: Path) -> None:
    repo = castore.Repo.open(golden)
    document = EXPECTED_CHECKPOINTS[0]["manifest"]
    newer = b"\x02" + read_object(golden / ".castore", document["parts"]["trainer"]["index"])[1:]
    index_id = blake3(newer).hexdigest()
    folder = golden / ".castore" / "objects" / index_id[:2]
    folder.mkdir(exist_ok=True)
    (folder / index_id).write_bytes(struct.pack("<4sBBHQ", b"CSTO", 1, 0, 0, len(newer)) + newer)
    parts = document["parts"] | {"trainer": document["parts"]["trainer"] | {"index": index_id}}
    checkpoint_id = add_manifest(golden, document | {"parts": parts})
    with pytest.raises(UnsupportedVersion, match=r"index \(part .trainer. of .*\) has format version 2"):
        repo.load(checkpoint_id)


def test_a_manifest_of_an_unknown_version_says_so_and_hides_no_other(golden: Path) -> None:
    document = EXPECTED_CHECKPOINTS[0]["manifest"] | {"version": 2, "kind": "something new", "extra": [1.5]}
    checkpoint_id = add_manifest(golden, document)
    with pytest.raises(UnsupportedVersion, match="format version 2"):
        manifest.decode(canonical(document))
    listing = castore.Repo.open(golden).catalog.listing()
    assert len(listing.entries) == 2
    (broken,) = listing.broken
    assert checkpoint_id[:12] in broken.path.name
    assert "version 2" in broken.reason


def add_manifest(repository: Path, document: dict[str, Any]) -> str:
    data = canonical(document)
    checkpoint_id = blake3(data).hexdigest()
    name = f"{document['step']:09}-{checkpoint_id[:12]}.json"
    (repository / ".castore" / "manifests" / document["run"] / name).write_bytes(data)
    return checkpoint_id


# -- the tables of the specification ---------------------------------------------------------------------------------

MODULES = {
    "bundle": bundle,
    "chunking": chunking,
    "codecs": codecs,
    "part_index": part_index,
    "manifest": manifest,
    "frame": frame,
}


def test_the_limits_are_those_of_the_code() -> None:
    stated = {name.strip("`"): int(value) for name, value, _ in table("constant")}
    defined = {}
    for name, module in MODULES.items():
        for statement in ast.parse(Path(module.__file__).read_text()).body:
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Name) and target.id.startswith("MAX_"):
                    defined[f"{name}.{target.id}"] = getattr(module, target.id)
    assert stated == defined


def test_the_element_types_are_those_of_the_code() -> None:
    assert ELEMENT_TYPES == part_index.DTYPES


def test_the_versions_are_those_of_the_code() -> None:
    frame = encode_frame(sparse(1000, 0.5), 4)
    stated = {name: int(version.split()[0]) for name, version, _ in table("format")}
    assert stated == {
        "frame": frame[4],
        "index": part_index.VERSION,
        "manifest": manifest.VERSION,
        "bundle": bundle.HEADER[4],
        "record of a bundle": bundle.VERSION,
    }


def test_the_fields_are_those_of_the_code() -> None:
    kinds = [
        table("field", 0),
        table("field of a part"),
        table("field of `experiment`"),
        table("field of a declared metric"),
    ]
    kinds.append(table("field", 1))
    stated = [sorted(name.strip("` ") for row in rows for name in row[0].split(",")) for rows in kinds]
    classes = [castore.Manifest, manifest.Part, castore.Experiment, castore.Metric, bundle.Record]
    assert stated == [sorted(kind.__struct_fields__) for kind in classes]


def test_the_patterns_of_names_are_those_of_the_code() -> None:
    rules = {name: rule for name, _, rule in table("field")}
    assert f"`{manifest.RUN.pattern}`" in "`" + rules["run"]
    assert f"`{manifest.PART.pattern}`" in rules["parts"] + "`"
