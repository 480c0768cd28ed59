"""The file of a tag, and what a tag may be called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.errors import CorruptTag, UsageError
from castore.format import tag
from castore.format.ids import ObjectId, hash_bytes

HEX = "0123456789abcdef"


@given(st.text(HEX, min_size=64, max_size=64))
def test_a_tag_holds_an_id(digits: str) -> None:
    data = tag.encode(ObjectId(digits))
    assert len(data) == tag.MAX_BYTES
    assert tag.decode(data, "tags/x") == digits


@given(st.binary(max_size=80))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptTag, match=r"^tags/x: it doesn't hold an id"):
        tag.decode(data, "tags/x")


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"\n", lambda d: d.upper(), lambda d: d[1:]])
def test_an_id_that_is_written_otherwise_is_refused(change: object) -> None:
    assert callable(change)
    with pytest.raises(CorruptTag):
        tag.decode(change(tag.encode(hash_bytes(b"x"))), "tags/x")


@pytest.mark.parametrize("name", ["release", "v1.0", "z", "0x1", "best-so-far", "Z" * 64, "fade-in", "2026.11"])
def test_names_that_a_tag_may_have(name: str) -> None:
    assert tag.check_name(name) == name
    assert tag.is_tag_name(name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "1 to 64 letters"),
        ("a" * 65, "1 to 64 letters"),
        ("a/b", "1 to 64 letters"),
        ("..", "1 to 64 letters"),
        ("-f", "1 to 64 letters"),
        (".hidden", "1 to 64 letters"),
        ("a b", "1 to 64 letters"),
        ("release\n", "1 to 64 letters"),
        ("ü", "1 to 64 letters"),
        ("run:best", "1 to 64 letters"),
        ("best", "a selector"),
        ("Latest", "a selector"),
        ("NONE", "a selector"),
        ("beef", "the first digits of an id"),
        ("BEEF", "the first digits of an id"),
        ("2026", "the first digits of an id"),
    ],
)
def test_names_that_mean_something_else_are_refused(name: str, says: str) -> None:
    assert not tag.is_tag_name(name)
    with pytest.raises(UsageError, match=says):
        tag.check_name(name)
