from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from castore.errors import RefusedPath, StorageError
from castore.storage import fs, output_file
from castore.storage.output_file import OutputFile


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def fail(*_: object, **__: object) -> None:
    raise StorageError("sync", "x", OSError(errno.EIO, "broken"))


def test_a_file_is_written_and_replaced_only_when_asked_to(tmp_path: Path) -> None:
    target = tmp_path / "out"
    output_file.write(target, b"first")
    with pytest.raises(RefusedPath, match="it exists: --force replaces it"):
        output_file.write(target, b"second")
    assert target.read_bytes() == b"first"
    output_file.write(target, b"second", replace=True)
    assert target.read_bytes() == b"second"
    assert names(tmp_path) == ["out"]


def test_permissions_follow_the_umask_even_if_a_library_makes_a_file_of_its_own(tmp_path: Path) -> None:
    def replace(path: Path) -> None:
        other = path.with_name("other")
        other.write_bytes(b"content")
        other.chmod(0o600)
        other.rename(path)

    before = os.umask(0o027)
    try:
        output_file.write(tmp_path / "a", b"x")
        assert output_file.write_with(replace, tmp_path / "b") == 7
    finally:
        os.umask(before)
    assert (mode(tmp_path / "a"), mode(tmp_path / "b")) == (0o640, 0o640)
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_target_that_is_no_plain_new_file_is_refused(tmp_path: Path, replace: bool) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / ".git").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    for name in ("folder", "link", "pipe", ".git/x", "nowhere/x"):
        with pytest.raises(RefusedPath):
            output_file.write(tmp_path / name, b"x", replace=replace)
        with pytest.raises(RefusedPath):
            output_file.write_with(lambda _: pytest.fail("nothing should be written"), tmp_path / name, replace=replace)
    assert names(tmp_path) == before
    assert names(tmp_path / ".git") == []


def test_an_error_leaves_neither_a_file_nor_a_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output_file.write_with(half, tmp_path / "out")
    with pytest.raises(StorageError, match="open"):
        output_file.write_with(Path.unlink, tmp_path / "out")
    for step in ("write", "sync", "link"):
        monkeypatch.setattr(fs, step, fail)
        with pytest.raises(StorageError, match="broken"):
            output_file.write(tmp_path / "out", b"x")
        monkeypatch.undo()
    assert names(tmp_path) == []


def test_what_appears_in_the_meantime_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RefusedPath, match="it appeared in the meantime"):
        output_file.write_with(lambda _: target.write_bytes(b"theirs") and None, target)
    assert target.read_bytes() == b"theirs"
    assert names(tmp_path) == ["out"]


def test_a_file_of_given_permissions_is_never_open_to_others(tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "out", 0o644)
    output.write([b"a", b"b"])
    assert "out" not in names(tmp_path)
    output.finish(replace=False, durable=True)
    assert (mode(tmp_path / "out"), (tmp_path / "out").read_bytes()) == (0o644, b"ab")
    secret = OutputFile(tmp_path / "secret", 0o600)
    assert {mode(tmp_path / name) for name in names(tmp_path) if name != "out"} == {0o600}
    secret.discard()
    assert names(tmp_path) == ["out"]


def test_links_replace_files_and_links_only_when_asked_to(tmp_path: Path) -> None:
    (tmp_path / "link").write_text("mine")
    with pytest.raises(StorageError, match="exists"):
        output_file.write_link(tmp_path / "link", "elsewhere")
    output_file.write_link(tmp_path / "link", "elsewhere", replace=True)
    assert os.readlink(tmp_path / "link") == "elsewhere"
    assert names(tmp_path) == ["link"]
