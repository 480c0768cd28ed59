"""From a line of [remotes] in config.toml to a remote."""

from __future__ import annotations

from pathlib import Path

import pytest

from castore import Repo
from castore.errors import ConfigError, UsageError
from castore.remotes.folder import Folder
from castore.remotes.registry import open_configured, open_remote


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("elsewhere", "/project/elsewhere"),
        ("/mnt/shared", "/mnt/shared"),
        ("file:/mnt/shared", "/mnt/shared"),
        ("file:///mnt/shared", "/mnt/shared"),
        ("file://localhost/mnt/shared", "/mnt/shared"),
        ("FILE:///mnt/a%20b%3Fc", "/mnt/a b?c"),
        ("file:elsewhere", "/project/elsewhere"),
        ("odd:name", "/project/odd:name"),
        ("/odd?name#x", "/odd?name#x"),
    ],
)
def test_paths_and_file_urls_are_folders(location: str, path: str) -> None:
    assert open_remote("shared", location, Path("/project")) == Folder("shared", Path(path))


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        (
            "ssh://host/folder",
            "ssh:// is not a kind of remote that castore knows: write the path of a folder, or file:, s3://, gs://",
        ),
        ("s3://key:secret@bucket/folder", "a URL holds no credentials"),
        ("az://container/folder?sig=secret", "a URL holds no credentials"),
        ("s3:///folder", "names no bucket"),
        ("ftp://x", "ftp:// is not a kind of remote"),
        ("file://server/share", "names the machine server"),
        ("file:///mnt?x=1", "is not the URL of a folder"),
        ("file:///mnt%00", "is not the URL of a folder"),
        ("file:", "is not the URL of a folder"),
    ],
)
def test_what_can_not_be_opened_is_an_error_of_the_settings(tmp_path: Path, location: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_configured({"bucket": location}, tmp_path / ".castore")
    assert isinstance(caught.value, UsageError)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/.castore/config.toml: remotes.bucket: ")


def test_a_repository_opens_what_its_settings_name_in_order(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    lines = f'[remotes]\na = "x"\nb = "file://{tmp_path}/y"\n'
    (repo.root / "config.toml").write_text(lines)
    assert Repo.open(tmp_path).remotes == [Folder("a", tmp_path / "x"), Folder("b", tmp_path / "y")]
    (repo.root / "config.toml").write_text(lines + 'c = "ssh://bucket"\n')
    with pytest.raises(ConfigError, match=r"remotes\.c: ssh://"):
        Repo.open(tmp_path)
