"""Hostile bytes for every decoder, for a moment: ``make torture`` does it for longer."""

from __future__ import annotations

import random
from pathlib import Path

import fuzz
import pytest

NAMES = [
    "frame", "index", "chunks", "tree", "manifest", "tag", "bundle tail", "bundle count", "record", "contents",
    "pointer", "marks", "config", "session", "filter", "selector", "safetensors", "git", "cache service", "bucket",
    "pt",
]  # fmt: skip


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Target]:
    made = fuzz.targets(tmp_path_factory.mktemp("fuzz"))
    assert list(made) == NAMES
    return made


@pytest.mark.parametrize("name", NAMES)
def test_hostile_bytes_raise_nothing_but_errors_of_castore(decoders: dict[str, fuzz.Target], name: str) -> None:
    target = decoders[name]
    fuzz.run(target, name, fuzz.corpus(name))
    most = 30 if name in ("cache service", "bucket") else 500  # those take up to thirty requests each
    inputs = fuzz.mutations(random.Random(name), target, name, seconds=60, most=most)
    assert fuzz.run(target, name, inputs) == most


def test_a_decoder_that_fails_is_noticed_and_its_input_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path)
    with pytest.raises(AssertionError, match="bad raised IndexError for "):
        fuzz.run(fuzz.Target(lambda data: data[3], (b"abcd",)), "bad", [b"abcd", b"ab"])
    assert fuzz.corpus("bad") == [b"ab"]
