from __future__ import annotations

import json
import random
import tracemalloc
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from builders import manifest
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import CorruptManifest, InvalidManifest, UnsupportedVersion
from castore.format.ids import hash_bytes
from castore.format.manifest import MAX_BYTES, MAX_DEPTH, Experiment, Manifest, Metric, Part, decode, encode, timestamp

finite = st.floats(allow_nan=False, allow_infinity=False)
ids = st.binary(max_size=4).map(hash_bytes)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | finite | st.text(max_size=9)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
ranges = st.tuples(finite, finite).filter(lambda pair: pair[0] < pair[1])
metrics = st.builds(
    lambda direction, pair: Metric(direction=direction, low=pair[0], high=pair[1]),
    st.sampled_from(["max", "min"]),
    ranges | st.just((None, None)),
)
names = st.text(max_size=9).filter(lambda name: name != "val_loss")
objects = st.dictionaries(st.text(max_size=5), json_values, max_size=3)
manifests = st.builds(
    Manifest,
    run=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    step=st.integers(0, 999_999_999),
    created=st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1)).map(lambda t: timestamp(t.replace(tzinfo=UTC))),
    parent=st.none() | ids,
    parts=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,31}", fullmatch=True),
        st.builds(Part, index=ids, bytes=st.integers(0, 2**62), stored_bytes=st.integers(0, 2**62)),
        min_size=1,
        max_size=3,
    ),
    experiment=st.builds(
        Experiment,
        model=st.dictionaries(st.text(max_size=5), scalars, max_size=3),
        tokenizer=st.text(max_size=5),
        evaluation=st.dictionaries(st.text(max_size=5), scalars, max_size=3),
        metrics=st.dictionaries(names, metrics, max_size=2),
    ),
    metrics=st.dictionaries(names, finite, max_size=3),
    tags=st.lists(st.text(max_size=5), max_size=3),
    note=st.text(),
    config=objects,
    info=objects,
)


@given(manifests)
def test_a_manifest_comes_back_and_its_id_is_the_hash_of_its_file(original: Manifest) -> None:
    data = encode(original)
    assert decode(data) == (hash_bytes(data), original)
    assert encode(original) == data


def test_the_file_is_sorted_indented_json_with_a_final_newline() -> None:
    data = encode(manifest(5, note="é", metrics={"b": 1.0, "a": 2.5}))
    assert data == json.dumps(json.loads(data), sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"


def test_whole_numbers_may_be_given_where_fractions_are_meant() -> None:
    ranged = manifest(experiment=Experiment(metrics={"acc": Metric(low=0, high=100)}), metrics={"acc": 50})
    _, decoded = decode(encode(ranged))
    assert decoded.experiment == ranged.experiment
    assert encode(decoded) == encode(ranged)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return {"x": value}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"run": ""}, "run"),
        ({"run": "../up"}, "run"),
        ({"run": ".hidden"}, "run"),
        ({"run": "a" * 65}, "run"),
        ({"step": -1}, "step -1"),
        ({"step": 10**9}, "step 1000000000"),
        ({"step": 1.5}, "Expected `int`"),
        ({"step": True}, "Expected `int`"),
        ({"created": "2026-01-02T03:04:05Z"}, "created"),
        ({"created": "2026-19-02T03:04:05.000000Z"}, "must be in"),
        ({"created": "2026-02-30T03:04:05.000000Z"}, "day is out of range"),
        ({"created": "2026-01-02T29:04:05.000000Z"}, "must be in"),
        ({"parent": "abc"}, "parent"),
        ({"parts": {}}, "no part"),
        ({"parts": {"Model": Part(index="ab" * 32, bytes=1, stored_bytes=1)}}, "lower-case"),
        ({"parts": {"model": Part(index="xy" * 32, bytes=1, stored_bytes=1)}}, "no valid index"),
        ({"parts": {"model": Part(index="ab" * 32, bytes=-1, stored_bytes=1)}}, "no valid index or size"),
        ({"parts": {"model": Part(index="ab" * 32, bytes=2**70, stored_bytes=1)}}, "no valid index or size"),
        ({"metrics": {"val_loss": float("nan")}}, "val_loss is nan"),
        ({"metrics": {"acc": float("inf")}}, "acc is inf"),
        ({"metrics": {"val_loss": -0.1}}, "val_loss is negative"),
        ({"metrics": {"acc": "high"}}, "must be real number"),
        ({"experiment": Experiment(metrics={"val_loss": Metric()})}, "can't be declared"),
        ({"experiment": Experiment(metrics={"acc": Metric(low=1.0, high=1.0)})}, "low must be below high"),
        ({"experiment": Experiment(metrics={"acc": Metric(low=0.0, high=float("inf"))})}, "low must be below high"),
        ({"experiment": Experiment(metrics={"acc": Metric(low=0.0)})}, "half a range"),
        ({"experiment": Experiment(metrics={"acc": "maximum"})}, "declared by 'max', 'min' or a Metric"),  # type: ignore[dict-item]
        ({"experiment": Experiment(model={"dropout": float("nan")})}, "nan is not a finite number"),
        ({"experiment": Experiment(evaluation={"seed": 2**64})}, "64 bits"),
        ({"experiment": Experiment(model={"sizes": [1]})}, "Expected"),
        ({"config": {"x": float("inf")}}, "finite"),
        ({"config": {"x": {1: 2}}}, "not a string"),
        ({"config": {"x": 2**63}}, "64 bits"),
        pytest.param({"info": {"x": object()}}, "object is not a JSON value", id="an object"),
        ({"info": deep(MAX_DEPTH)}, "nested"),
        ({"tags": [1]}, "Expected `str`"),
        ({"note": "x" * MAX_BYTES}, "over 1048576"),
        ({"note": "\ud800"}, "surrogate"),
    ],
    ids=str,
)
def test_what_breaks_a_rule_is_not_written(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidManifest, match=reason):
        encode(manifest(**{"step": 1, **fields}))


VALID = encode(manifest(7, config={"lr": 0.1, "x": [1, {"y": None}]}, metrics={"val_loss": 2.0}, tags=["a"]))


def replaced(old: bytes, new: bytes) -> bytes:
    assert VALID.count(old) == 1
    return VALID.replace(old, new)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"null\n", id="null"),
        pytest.param(b"{}\n", id="no fields"),
        pytest.param(VALID[:-1], id="no final newline"),
        pytest.param(VALID + b"\n", id="another newline"),
        pytest.param(b"\xef\xbb\xbf" + VALID, id="byte order mark"),
        pytest.param(VALID.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(VALID.replace(b"  ", b"    "), id="indented otherwise"),
        pytest.param(json.dumps(json.loads(VALID)).encode(), id="on one line"),
        pytest.param(replaced(b'"run": "ci"', b'"run": "ci",\n  "run": "ci"'), id="key twice"),
        pytest.param(replaced(b'"step": 7', b'"step": 8,\n  "step": 7'), id="another value twice"),
        pytest.param(replaced(b'"note": "",\n  ', b""), id="a default left out"),
        pytest.param(replaced(b'"step": 7', b'"step": 7,\n  "stop": 7'), id="unknown field"),
        pytest.param(replaced(b'"step": 7', b'"step": 7.0'), id="step as a float"),
        pytest.param(replaced(b'"step": 7', b'"step": 7e0'), id="step with an exponent"),
        pytest.param(replaced(b'"val_loss": 2.0', b'"val_loss": 2'), id="loss as an integer"),
        pytest.param(replaced(b'"val_loss": 2.0', b'"val_loss": NaN'), id="NaN"),
        pytest.param(replaced(b'"val_loss": 2.0', b'"val_loss": 1e999'), id="out of range"),
        pytest.param(replaced(b'"val_loss": 2.0', b'"val_loss": null'), id="null loss"),
        pytest.param(replaced(b'"val_loss": 2.0', b'"val_loss": -2.0'), id="negative loss"),
        pytest.param(replaced(b'"lr": 0.1', b'"lr": Infinity'), id="infinite setting"),
        pytest.param(replaced(b'"lr": 0.1', b'"lr": 0.10'), id="number in other digits"),
        pytest.param(replaced(b'"ci"', b'"\\u0063i"'), id="letter escaped"),
        pytest.param(replaced(b'"ci"', b'"../../ci"'), id="run that climbs"),
        pytest.param(replaced(b"2026-01-", b"2026-19-"), id="month 19"),
        pytest.param(replaced(b'"kind": "checkpoint"', b'"kind": "dataset"'), id="another kind"),
        pytest.param(replaced(b'"version": 1', b'"version": 1' + b"0" * 5000), id="a version beyond printing"),
        pytest.param(VALID + b" " * MAX_BYTES, id="too large"),
        pytest.param(b'{"a":' * 100_000, id="very deep"),
        pytest.param(b"[" * MAX_BYTES, id="deep as can be"),
    ],
)
def test_anything_but_the_canonical_form_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptManifest):
        decode(data, "some/path.json")


def test_a_deep_manifest_is_refused_before_its_indented_form_fills_the_memory() -> None:
    inner = "[" * 400 + "1,1" + ",1" * 200_000 + "]" * 400
    data = replaced(b'"lr": 0.1', b'"lr": ' + inner.encode())
    tracemalloc.start()
    try:
        with pytest.raises(CorruptManifest, match="nested"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("extra", [b"", b'"later": {"a": [1]},\n  ', b'"run": 5,\n  '])
def test_a_newer_version_says_to_upgrade_whatever_else_it_holds(extra: bytes) -> None:
    data = replaced(b'"version": 1', b'"version": 2').replace(b'"step"', extra + b'"step"')
    with pytest.raises(UnsupportedVersion, match=r"version 2.*upgrade castore"):
        decode(data)


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_bytes_are_corrupt_or_of_another_version(data: bytes) -> None:
    with pytest.raises((CorruptManifest, UnsupportedVersion)):
        decode(data)


@given(manifests, st.randoms(use_true_random=False))
def test_a_changed_manifest_is_refused_or_another_one(original: Manifest, rng: random.Random) -> None:
    data = encode(original)
    for _ in range(10):
        changed = bytearray(data)
        at = rng.randrange(len(data))
        changed[at : at + rng.randrange(3)] = rng.choice([b"", b"0", b'"', b",", b"}", b"\xff", rng.randbytes(2)])
        try:
            checkpoint_id, decoded = decode(bytes(changed))
        except (CorruptManifest, UnsupportedVersion):
            continue
        assert encode(decoded) == bytes(changed)
        assert (checkpoint_id == hash_bytes(data)) == (changed == data)


def test_every_time_zone_is_written_as_utc_so_that_text_order_is_time_order() -> None:
    east = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=9)))
    assert timestamp(east) == "2026-01-01T18:04:05.000006Z"
    assert timestamp(east + timedelta(microseconds=1)) > timestamp(east)


def test_a_manifest_lives_under_its_run_step_and_id() -> None:
    assert manifest(42).file_name(hash_bytes(b"abc")) == "ci/000000042-6437b3ac3846.json"
