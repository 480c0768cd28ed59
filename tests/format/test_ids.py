from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.format.ids import hash_bytes, is_object_id, join_digests, split_digests


def test_an_id_is_the_blake3_that_b3sum_prints() -> None:
    assert hash_bytes(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert hash_bytes(memoryview(b"abc")) == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"


@pytest.mark.parametrize("text", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "٣" * 64, 5, None])
def test_only_64_lower_case_hex_digits_are_an_id(text: object) -> None:
    assert is_object_id("0123456789abcdef" * 4)
    assert not is_object_id(text)


@given(st.lists(st.binary()))
def test_digests_come_apart_as_they_were_joined(contents: list[bytes]) -> None:
    ids = [hash_bytes(content) for content in contents]
    assert split_digests(join_digests(ids)) == ids


def test_half_a_digest_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        split_digests(b"x" * 33)
