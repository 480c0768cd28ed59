from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from castore import Repo
from castore.config import TEMPLATE, Config, parse, parse_size
from castore.errors import ConfigError


def test_the_template_writes_out_every_default() -> None:
    assert tomllib.loads(TEMPLATE) == msgspec.to_builtins(Config())
    assert parse(TEMPLATE) == parse("") == Config()


def test_every_setting_of_the_template_is_explained() -> None:
    lines = TEMPLATE.splitlines()
    settings = [i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert settings
    assert [lines[i] for i in settings if not lines[i - 1] or lines[i - 1].startswith("[")] == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[store]\nchunk_sise = 1", "chunk_sise"),
        ("[stoer]", "stoer"),
        ("store = 5", "store"),
        ("[store]\nchunk_size = 4194304", "store.chunk_size"),
        ('[store]\nchunk_size = "huge"', "store.chunk_size.*'huge' is not a size"),
        ('[store]\nchunk_size = "-4MiB"', "store.chunk_size"),
        ('[store]\nchunk_size = "63KiB"', "store.chunk_size.*between"),
        ('[store]\nchunk_size = "65MiB"', "store.chunk_size.*between"),
        ('[store]\nchunk_size = "100001"', "store.chunk_size.*multiple of 64"),
        ('[store]\nchunk_size = "' + "9" * 5000 + '"', "store.chunk_size.*between"),
        ("[store]\nthreads = -1", "store.threads"),
        ("[store]\nthreads = 257", "store.threads"),
        ("[store]\nthreads = 1.5", "store.threads"),
        ("[store]\nfsync = 1", "store.fsync"),
        ("[store]\nlock_timeout = -0.1", "store.lock_timeout"),
        ("[store]\nlock_timeout = nan", "store.lock_timeout"),
        ("[store]\nlock_timeout = inf", "store.lock_timeout"),
        ("[resume]\ntie_tolerance = nan", "resume.tie_tolerance"),
        ("[resume]\ntie_tolerance = 2", "resume.tie_tolerance"),
        ('[resume]\non_missing = "maybe"', "resume.on_missing"),
        ("[store", "not valid TOML"),
        ("[store]\nthreads = 1\nthreads = 2", "not valid TOML"),
        ("x = " + "[" * 5000, "path/config.toml"),
    ],
    ids=lambda value: value[:60],
)
def test_what_cant_be_used_is_an_error_that_names_the_setting(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        parse(text, "path/config.toml")
    assert str(caught.value).startswith("path/config.toml: ")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20), ("512KiB", 512 << 10), ("4MiB", 4 << 20), ("4 mib", 4 << 20), ("4M", 4_000_000),
        ("20GB", 20 * 10**9), ("1.5GiB", 3 << 29), ("2TB", 2 * 10**12), ("7B", 7), (" 0 ", 0),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e9", "4 MiB 2", "0x10", "4PB", "1.", "nan"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_a_repository_follows_its_settings(tmp_path: Path) -> None:
    root = Repo.init(tmp_path).root
    (root / "config.toml").write_text('[store]\nchunk_size = "128KiB"\nthreads = 3\n')
    repo = Repo.open(tmp_path)
    assert (repo.config.chunk_bytes, repo.threads) == (128 << 10, 3)
    (root / "config.toml").write_bytes(b"[store]\n\xff\xfe = 1")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        Repo.open(tmp_path)
