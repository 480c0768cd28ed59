from __future__ import annotations

import hashlib
import io
import os
import random
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import PEAK
from typing_extensions import Buffer

from castore import Repo, errors, gc
from castore.format import manifest, part_index
from castore.format.manifest import Manifest, Part
from castore.format.part_index import ChunkRef, Index, TensorRef, TensorSpec
from castore.storage import safe_paths
from castore.trees import checkout
from castore.trees.add import _cut, add_tree


def look(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below ``root``: kind, permissions, content."""
    found: dict[str, tuple[Any, ...]] = {}
    for folder, folders, names in os.walk(root):
        for name in [*folders, *names]:
            path = Path(folder, name)
            mode = path.lstat().st_mode
            key = str(path.relative_to(root))
            if stat.S_ISLNK(mode):
                found[key] = ("link", os.readlink(path))
            elif stat.S_ISDIR(mode):
                found[key] = ("folder", stat.S_IMODE(mode))
            else:
                found[key] = ("file", stat.S_IMODE(mode), path.read_bytes())
    return found


def leftovers(root: Path) -> list[str]:
    """Temporary files, wherever."""
    return [str(path) for path in root.rglob("*") if path.name.startswith("castore-tmp-")]


@pytest.fixture
def source(tmp_path: Path, rng: random.Random) -> Path:
    """A folder with one of everything that can be kept."""
    root = tmp_path / "stuff"
    (root / "deep" / "er" / "empty").mkdir(parents=True)
    (root / "big.bin").write_bytes(rng.randbytes(9_000_000))
    (root / "run.sh").write_bytes(b"#!/bin/sh\n")
    (root / "run.sh").chmod(0o750)
    (root / "deep" / "secret").write_bytes(b"s")
    (root / "deep" / "secret").chmod(0o600)
    (root / "deep" / "zero").touch()
    (root / "deep" / "er").chmod(0o711)
    (root / "naïve ☃ name\n").write_bytes(b"x" * 100)
    (root / "deep" / "copy").write_bytes((root / "big.bin").read_bytes())
    (root / "deep" / "up").symlink_to("../run.sh")
    (root / "deep" / "dangling").symlink_to("nowhere/at/all")
    (root / "here").symlink_to("deep/er")
    return root


def test_everything_comes_back_as_it_was(repo: Repo, source: Path, tmp_path: Path) -> None:
    added = add_tree(repo, source)
    out = checkout.check_out(repo, added.id, tmp_path / "out")
    assert look(tmp_path / "out" / "stuff") == look(source)
    assert out.paths == (tmp_path / "out" / "stuff",)
    assert (out.files, out.folders, out.links, out.bytes) == (6, 4, 3, 18_000_111)
    assert (added.files, added.folders, added.links, added.bytes) == (6, 4, 3, 18_000_111)
    assert added.manifest.kind == "files"
    assert added.manifest.run == "stuff"
    # the copy of the large file takes next to nothing
    assert added.new_bytes < 15_000_000
    assert leftovers(tmp_path) == []


def test_a_single_file_comes_back_under_its_name(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("hello")
    (tmp_path / "words.txt").chmod(0o555)
    added = add_tree(repo, tmp_path / "words.txt")
    assert added.manifest.run == "words.txt"
    checkout.check_out(repo, "words.txt:latest", tmp_path / "out")
    assert look(tmp_path / "out") == {"words.txt": ("file", 0o555, b"hello")}


def test_a_folder_that_forbids_writing_is_filled_first(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("c")
    (tmp_path / "a" / "b").chmod(0o555)
    (tmp_path / "a").chmod(0o500)
    added = add_tree(repo, tmp_path / "a")
    checkout.check_out(repo, added.id, tmp_path / "out")
    assert look(tmp_path / "out" / "a") == look(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "out" / "a").stat().st_mode) == 0o500


def test_set_user_id_and_the_like_are_dropped(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(b"x")
    (tmp_path / "tool").chmod(0o6755)
    added = add_tree(repo, tmp_path / "tool")
    checkout.check_out(repo, added.id, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out" / "tool").stat().st_mode) == 0o755
    hostile = save_tree(repo, {"tool": {"mode": 0o106777, "data": TensorRef(0)}})
    checkout.check_out(repo, hostile, tmp_path / "out2")
    assert stat.S_IMODE((tmp_path / "out2" / "tool").stat().st_mode) == 0o777


def test_an_edit_in_the_middle_costs_a_chunk_or_two(repo: Repo, tmp_path: Path, rng: random.Random) -> None:
    content = bytearray(rng.randbytes(40_000_000))
    path = tmp_path / "big"
    path.write_bytes(content)
    first = add_tree(repo, path)
    changes: dict[str, Callable[[], Any]] = {
        "changed": lambda: content.__setitem__(20_000_000, content[20_000_000] ^ 1),
        "inserted": lambda: content.insert(10_000_000, 7),
        "removed": lambda: content.pop(30_000_000),
    }
    for change in changes.values():
        change()
        path.write_bytes(content)
        again = add_tree(repo, path)
        assert 0 < again.new_bytes <= 2 * 4_200_000
        assert again.new_objects <= 4
        assert again.id != first.id
        checkout.check_out(repo, again.id, tmp_path / "out", force=True)
        assert (tmp_path / "out" / "big").read_bytes() == content


def test_cuts_depend_on_the_content_and_not_on_how_it_is_read(rng: random.Random) -> None:
    content = rng.randbytes(21_000_000) + bytes(9_000_000) + rng.randbytes(5_000_000)

    class Dribble(io.BytesIO):
        def readinto(self, buffer: Buffer) -> int:
            return super().readinto(memoryview(buffer)[: rng.randrange(1, 3_000_000)])

    whole, pieces = list(_cut(io.BytesIO(content))), list(_cut(Dribble(content)))
    assert whole == pieces
    assert b"".join(whole) == content
    assert 256 << 10 <= min(map(len, whole[:-1])) <= max(map(len, whole)) <= 4 << 20


def test_cuts_are_those_of_what_is_stored_already() -> None:
    content = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(1 << 18))
    assert [len(chunk) for chunk in _cut(io.BytesIO(content))] == [721161, 1522180, 1207545, 1632481, 1495685, 1809556]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    st.dictionaries(
        st.lists(st.sampled_from(["a", "b", "A", "é", "x y", "-"]), min_size=1, max_size=3).map("/".join),
        st.binary(max_size=3000),
        max_size=8,
    ),
    st.integers(0, 10**9),
)
def test_any_tree_comes_back(repo: Repo, tmp_path: Path, tree: dict[str, bytes], serial: int) -> None:
    root = tmp_path / f"{serial}-{len(os.listdir(tmp_path))}"
    root.mkdir()
    for name, content in tree.items():
        path = root / name
        if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    added = add_tree(repo, root)
    checkout.check_out(repo, added.id, tmp_path / "out" / root.name)
    assert look(tmp_path / "out" / root.name / root.name) == look(root)


@pytest.mark.slow
def test_memory_stays_bounded_whatever_the_size(tmp_path: Path) -> None:
    """Both ways with 400 MB of holes and noise in less than 120 MB more than the imports take."""
    script = f"""{PEAK}
import sys
from pathlib import Path
from castore import Repo
from castore.trees import checkout
from castore.trees.add import add_tree
import pyfastcdc, numpy, zstandard
repo = Repo.open(sys.argv[1])
before = peak()
added = add_tree(repo, Path(sys.argv[1], "big"))
checkout.check_out(repo, added.id, Path(sys.argv[1], "out"))
print(peak() - before)
"""
    Repo.init(tmp_path)
    (tmp_path / ".castore" / "config.toml").write_text("[store]\nthreads = 2\nfsync = false\n")
    noise = random.Random(1)
    with open(tmp_path / "big", "wb") as file:
        for _ in range(20):
            file.write(noise.randbytes(5_000_000))
            file.seek(15_000_000, os.SEEK_CUR)
        file.write(b"end")
    done = subprocess.run([sys.executable, "-c", script, tmp_path], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 120 << 20
    assert (tmp_path / "out" / "big").stat().st_size == (tmp_path / "big").stat().st_size


# -- what can't be added ---------------------------------------------------------------------------------------------


def nothing_was_added(repo: Repo) -> bool:
    return not repo.catalog.listing().entries


def test_what_would_not_come_back_is_an_error_that_names_it(repo: Repo, tmp_path: Path) -> None:
    cases: dict[str, Callable[[Path], Any]] = {
        "neither file, folder nor link": os.mkfifo,
        "absolute path": lambda path: path.symlink_to("/etc/passwd"),
        "leads out of it": lambda path: path.symlink_to("../outside"),
        "not valid UTF-8": lambda path: open(os.fsencode(path) + b"\xff", "w").close(),
        "into .git": lambda path: path.symlink_to(".git/hooks"),
    }
    for i, (says, make) in enumerate(cases.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        make(folder / "odd")
        with pytest.raises(errors.UnsupportedFile, match=says) as caught:
            add_tree(repo, folder)
        assert "odd" in str(caught.value)
    assert nothing_was_added(repo)


def test_a_socket_is_an_error_that_names_it(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "a" / "sock"))
        with pytest.raises(errors.UnsupportedFile, match="sock"):
            add_tree(repo, tmp_path / "a")


def test_a_path_that_is_missing_or_a_link_is_an_error(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(".")
    for name, says in (("nowhere", "No such file"), ("link", "add what it leads to")):
        with pytest.raises(errors.UnsupportedFile, match=says):
            add_tree(repo, tmp_path / name)
    with pytest.raises(errors.UnsupportedFile, match="as a whole"):
        add_tree(repo, tmp_path / ".castore")


def test_git_and_castore_folders_are_passed_over_and_said(repo: Repo, tmp_path: Path) -> None:
    for name in (".git/hooks", "sub/.GIT", ".castore", "kept"):
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "a" / name / "file").write_text("x")
    added = add_tree(repo, tmp_path / "a")
    assert added.skipped == ("a/.castore", "a/.git", "a/sub/.GIT")
    assert added.files == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "changed while it was read"),
        (lambda path: os.utime(path, ns=(1, 1)), "changed while it was read"),
        (lambda path: os.truncate(path, 5), "changed while it was read"),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_an_error(
    repo: Repo, tmp_path: Path, rng: random.Random, change: Callable[[Path], Any], says: str
) -> None:
    path = tmp_path / "big"
    path.write_bytes(rng.randbytes(40_000_000))
    calls = []

    def progress(done: int, total: int) -> None:
        if not calls:
            change(path)
        calls.append((done, total))

    with pytest.raises(errors.FileChanged, match=says):
        add_tree(repo, path, progress=progress)
    assert nothing_was_added(repo)


def test_a_file_that_goes_or_becomes_a_link_meanwhile_is_an_error(
    repo: Repo, tmp_path: Path, rng: random.Random
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").write_bytes(rng.randbytes(40_000_000))
    for change in (Path.unlink, lambda path: (path.unlink(), path.symlink_to("/etc/hostname"))):
        late = tmp_path / "a" / "2"
        late.unlink(missing_ok=True)
        late.write_bytes(b"x")

        def progress(_done: int, _total: int, late: Path = late, change: Any = change) -> None:
            if late.is_file() and not late.is_symlink():
                change(late)

        with pytest.raises(errors.StorageError, match=r"can.t read .*/a/2"):
            add_tree(repo, tmp_path / "a", progress=progress)
    assert nothing_was_added(repo)


# -- where it is checked out -----------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unless_asked_for(repo: Repo, source: Path, tmp_path: Path) -> None:
    added = add_tree(repo, source)
    out = tmp_path / "out"
    (out / "stuff" / "deep").mkdir(parents=True)
    (out / "stuff" / "deep" / "secret").write_text("mine")
    (out / "stuff" / "deep" / "other").write_text("also mine")
    (out / "stuff" / "run.sh").symlink_to(tmp_path / "elsewhere")
    before = look(out)
    with pytest.raises(
        errors.RefusedPath,
        match=r"deep/secret: it exists and 1 more as no version .*--force overwrites it",
    ):
        checkout.check_out(repo, added.id, out)
    assert look(out) == before
    checkout.check_out(repo, added.id, out, force=True)
    assert look(out / "stuff") == look(source) | {"deep/other": ("file", 0o644, b"also mine")} | {
        "deep": ("folder", 0o755)
    }
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_there_already_is_left_alone(repo: Repo, source: Path, tmp_path: Path) -> None:
    added = add_tree(repo, source)
    checkout.check_out(repo, added.id, tmp_path / "out")
    before = {path: path.lstat().st_ino for path in (tmp_path / "out").rglob("*")}
    for chunk in part_index.decode(repo.store.read(added.manifest.parts["files"].index)).chunks:
        repo.store.path(chunk.id).unlink(missing_ok=True)  # nothing is read either
    same = checkout.check_out(repo, added.id, tmp_path / "out")
    assert {path: path.lstat().st_ino for path in (tmp_path / "out").rglob("*")} == before
    assert (same.written, same.overwritten, same.deleted) == (0, (), ())
    (tmp_path / "out" / "stuff" / "run.sh").chmod(0o600)
    checkout.check_out(repo, added.id, tmp_path / "out")
    assert look(tmp_path / "out" / "stuff") == look(source)


def test_a_neighbour_in_the_same_chunk_is_no_edit(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in "abc":
        (tmp_path / "d" / name).write_text(name)
    added = add_tree(repo, tmp_path / "d")
    (tmp_path / "d" / "b").write_text("B")
    with pytest.raises(errors.RefusedPath, match=r"d/b: it exists as no"):
        checkout.check_out(repo, added.id, tmp_path)
    done = checkout.check_out(repo, added.id, tmp_path, force=True)
    assert (done.written, done.overwritten, done.lost) == (1, ("d/b",), ("d/b",))


def test_a_version_whose_data_is_gone_holds_nothing(repo: Repo, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("old")
    old = add_tree(repo, file)
    file.write_text("new")
    new = add_tree(repo, file)
    checkout.check_out(repo, old.id, tmp_path)
    (chunk,) = part_index.decode(repo.store.read(old.manifest.parts["files"].index)).chunks
    repo.store.path(chunk.id).unlink()
    with pytest.raises(errors.RefusedPath, match="as no version"):
        checkout.check_out(repo, new.id, tmp_path)
    assert file.read_text() == "old"


def test_a_version_whose_data_is_damaged_holds_only_what_is_left(
    repo: Repo, tmp_path: Path, rng: random.Random
) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    old_bytes = {name: rng.randbytes(5_000_000) for name in ("intact", "rotten", "surplus")}
    for name, content in old_bytes.items():
        (folder / name).write_bytes(content)
    old = add_tree(repo, folder)
    for name in ("intact", "rotten"):
        (folder / name).write_bytes(rng.randbytes(1000))
    (folder / "surplus").unlink()
    new = add_tree(repo, folder)
    checkout.check_out(repo, old.id, tmp_path)
    chunks = part_index.decode(repo.store.read(old.manifest.parts["files"].index)).chunks
    plain = {chunk.id: repo.store.read(chunk.id) for chunk in chunks}
    for name in ("rotten", "surplus"):
        damaged = repo.store.path(next(chunk_id for chunk_id, data in plain.items() if data in old_bytes[name]))
        data = bytearray(damaged.read_bytes())
        data[200] ^= 1
        damaged.write_bytes(data)
    other = Repo.open(tmp_path)  # it has verified nothing yet
    with pytest.raises(errors.RefusedPath, match=r"rotten: it exists and 1 more as no version"):
        checkout.check_out(other, new.id, tmp_path, delete=True)
    assert {name: (folder / name).read_bytes() for name in old_bytes} == old_bytes
    done = checkout.check_out(other, new.id, tmp_path, delete=True, force=True)
    assert set(done.overwritten) == {"d/intact", "d/rotten"}
    assert done.lost == ("d/rotten", "d/surplus")


def test_delete_spares_git_pipes_and_what_is_beside_the_tree(repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "d" / "kept").mkdir(parents=True)
    added = add_tree(repo, tmp_path / "d")
    (tmp_path / "d" / ".git").mkdir()
    (tmp_path / "d" / ".git" / "config").write_text("x")
    (tmp_path / "d" / "more" / "deep").mkdir(parents=True)
    (tmp_path / "d" / "more" / "deep" / "link").symlink_to("nowhere")
    (tmp_path / "beside").write_text("x")
    os.mkfifo(tmp_path / "d" / "pipe")
    with pytest.raises(errors.RefusedPath, match="neither a file nor a link"):
        checkout.check_out(repo, added.id, tmp_path, force=True, delete=True)
    (tmp_path / "d" / "pipe").unlink()
    done = checkout.check_out(repo, added.id, tmp_path, force=True, delete=True)
    assert done.deleted == done.lost == ("d/more/deep/link",)
    assert set(look(tmp_path / "d")) == {".git", ".git/config", "kept"}
    assert (tmp_path / "beside").exists()


def set_back(path: Path) -> None:
    """Edit a file in place, and give it the time that it had."""
    status = path.stat()
    path.write_bytes(b"EDIT")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


EDITS: list[tuple[str, Callable[[Path], Any]]] = [
    ("file", lambda path: path.write_bytes(b"EDIT")),
    ("file", lambda path: path.write_bytes(b"a longer edit")),
    ("file", set_back),
    ("file", lambda path: (path.unlink(), path.symlink_to("edited"))),
    ("file", lambda path: (path.unlink(), path.mkdir())),
    ("link", lambda path: (path.unlink(), path.symlink_to("edited"))),
    ("link", lambda path: (path.unlink(), path.write_bytes(b"EDIT"))),
    ("surplus", lambda path: path.write_bytes(b"EDIT")),
    ("surplus", lambda path: (path.unlink(), path.symlink_to("edited"))),
]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("name", "edit"), EDITS)
def test_what_changes_while_a_checkout_reads_is_never_lost(
    repo: Repo, tmp_path: Path, rng: random.Random, name: str, edit: Callable[[Path], Any], force: bool
) -> None:
    root = tmp_path / "d"
    root.mkdir()
    for path in ("file", "surplus"):
        (root / path).write_bytes(b"held")
    (root / "link").symlink_to("old")
    old = add_tree(repo, root)
    for path in ("file", "surplus", "link"):
        (root / path).unlink()
    (root / "big").write_bytes(rng.randbytes(9_000_000))
    (root / "file").write_bytes(b"new")
    (root / "link").symlink_to("new")
    new = add_tree(repo, root)
    checkout.check_out(repo, old.id, tmp_path, delete=True)
    time.sleep(0.05)  # a file system's clock may tick no faster than every 10 ms
    edited: list[tuple[Any, ...]] = []

    def progress(_done: int, _total: int) -> None:
        if not edited:  # the first chunk of what is written: what is there has been compared
            edit(root / name)
            edited.append(look(root)[name])

    with pytest.raises(errors.RefusedPath, match=f"{name}: it changed meanwhile"):
        checkout.check_out(repo, new.id, tmp_path, delete=True, force=force, progress=progress)
    assert look(root)[name] == edited[0]
    assert leftovers(tmp_path) == []


def test_a_file_of_two_names_is_replaced_under_both(repo: Repo, tmp_path: Path) -> None:
    """Replacing one changes when the other was last changed, by no edit."""
    root = tmp_path / "d"
    root.mkdir()
    for name in "ab":
        (root / name).write_text("new")
    (root / "c").write_text("kept")
    new = add_tree(repo, root)
    for name in "abc":
        (root / name).unlink()
    for name in "abxy":
        (root / name).write_text("old")
    add_tree(repo, root)
    for name in "bxy":
        (root / name).unlink()
        (root / name).hardlink_to(root / "a")
    done = checkout.check_out(repo, new.id, tmp_path, delete=True)
    assert (done.overwritten, done.deleted, done.lost) == (("d/a", "d/b"), ("d/x", "d/y"), ())
    assert {name: entry[2] for name, entry in look(root).items()} == {"a": b"new", "b": b"new", "c": b"kept"}


def test_what_is_gone_by_now_is_written_and_not_deleted(repo: Repo, tmp_path: Path, rng: random.Random) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (root / "big").write_bytes(rng.randbytes(9_000_000))
    (root / "file").write_text("new")
    new = add_tree(repo, root)
    (root / "big").unlink()
    for name in ("file", "surplus"):
        (root / name).write_text("edited")

    def progress(done: int, total: int) -> None:
        for name in ("file", "surplus") if done < total else ():
            (root / name).unlink(missing_ok=True)

    checkout.check_out(repo, new.id, tmp_path, delete=True, force=True, progress=progress)
    assert {name: len(entry[2]) for name, entry in look(root).items()} == {"big": 9_000_000, "file": 3}


contents = st.sampled_from([b"", b"1", b"2", b"33"])
edits = st.dictionaries(st.sampled_from(["a", "b", "s/a", "s/b"]), st.none() | contents, max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(versions=st.lists(edits, min_size=1, max_size=3), edit=edits, chosen=st.integers(0, 2), delete=st.booleans())
def test_what_no_version_holds_is_never_lost(
    repo: Repo,
    tmp_path: Path,
    versions: list[dict[str, bytes | None]],
    edit: dict[str, bytes | None],
    chosen: int,
    delete: bool,
) -> None:
    """Against a model: (path, content) pairs that were added once may go, others may not."""

    def apply(changes: dict[str, bytes | None]) -> dict[str, bytes]:
        for path, content in changes.items():
            (root / path).unlink(missing_ok=True)
            if content is not None:
                (root / path).write_bytes(content)
        return {name: entry[2] for name, entry in look(root).items() if entry[0] == "file"}

    serial = len(list(tmp_path.iterdir()))
    root = tmp_path / str(serial) / f"tree{serial}"
    (root / "s").mkdir(parents=True)
    added = [(apply(changes), add_tree(repo, root).id) for changes in versions]
    held = {pair for state, _ in added for pair in state.items()}
    before = apply(edit)
    wanted, selected = added[min(chosen, len(added) - 1)]
    lost = {
        path
        for path, content in before.items()
        if (path, content) not in held and (path in wanted or delete)
    }  # fmt: skip
    after = wanted if delete else before | wanted
    if lost:
        with pytest.raises(errors.RefusedPath):
            checkout.check_out(repo, selected, root.parent, delete=delete)
        assert apply({}) == before
    done = checkout.check_out(repo, selected, root.parent, delete=delete, force=bool(lost))
    assert {path.partition("/")[2] for path in done.lost} == lost
    assert apply({}) == after


@pytest.mark.parametrize("force", [False, True])
def test_folders_are_never_replaced_and_links_never_followed(
    repo: Repo, source: Path, tmp_path: Path, force: bool
) -> None:
    added = add_tree(repo, source)
    obstacles: list[tuple[Callable[[Path], Any], str]] = [
        (lambda out: (out / "stuff" / "run.sh").mkdir(parents=True), "run.sh: it is a folder"),
        (lambda out: (out / "stuff").symlink_to(tmp_path / "elsewhere"), "links are not followed"),
        (lambda out: ((out / "stuff").mkdir(), (out / "stuff" / "deep").symlink_to(".")), "links are not followed"),
        (lambda out: (out / "stuff").write_text("a file"), "stuff: it is not a folder"),
    ]
    (tmp_path / "elsewhere").mkdir()
    for i, (make, says) in enumerate(obstacles):
        out = tmp_path / f"out{i}"
        out.mkdir()
        make(out)
        before = look(out)
        with pytest.raises(errors.RefusedPath, match=says):
            checkout.check_out(repo, added.id, out, force=force)
        assert look(out) == before
    assert look(tmp_path / "elsewhere") == {}


def test_the_target_is_no_link_and_not_inside_git(repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("x")
    added = add_tree(repo, tmp_path / "f")
    (tmp_path / "real").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "hidden").symlink_to(".git")
    monkeypatch.chdir(tmp_path)
    for target in ("link", "link/below", ".git", ".git/hooks", ".castore/objects", "hidden/x", "real/../.GIT"):
        with pytest.raises(errors.RefusedPath):
            checkout.check_out(repo, added.id, Path(target))
    with pytest.raises(errors.RefusedPath):
        checkout.check_out(repo, added.id, tmp_path / "hidden" / "x")
    assert os.listdir("real") == os.listdir(".git") == []


def test_a_damaged_or_missing_chunk_leaves_no_half_file(repo: Repo, source: Path, tmp_path: Path) -> None:
    added = add_tree(repo, source)
    index_id = added.manifest.parts["files"].index
    chunks = part_index.decode(repo.store.read(index_id)).chunks
    damaged = repo.store.path(chunks[3].id)
    good = damaged.read_bytes()
    for make, kind in (
        (lambda: damaged.write_bytes(good[:-1] + bytes([good[-1] ^ 1])), errors.CorruptObject),
        (lambda: damaged.unlink(missing_ok=True), errors.ObjectMissing),
    ):
        make()
        out = tmp_path / kind.__name__
        with pytest.raises(kind, match=f"part 'files' of checkpoint {added.id[:12]}"):
            checkout.check_out(repo, added.id, out)
        whole = look(source)
        assert all(whole["/".join(name.split("/")[1:])][0] == "folder" or content[2] == whole[name[6:]][2]
                   for name, content in look(out).items() if name != "stuff" and content[0] == "file")  # fmt: skip
        assert leftovers(tmp_path) == []


def test_what_a_remote_has_is_fetched(repo: Repo, source: Path, tmp_path: Path) -> None:
    from castore.remotes.folder import Folder

    added = add_tree(repo, source)
    (tmp_path / "away").mkdir()
    os.rename(repo.store.objects, tmp_path / "away" / "objects")
    repo.remotes.append(Folder("away", tmp_path / "away"))
    checkout.check_out(repo, added.id, tmp_path / "out")
    assert look(tmp_path / "out" / "stuff") == look(source)


# -- hostile trees ---------------------------------------------------------------------------------------------------


def save_tree(repo: Repo, tree: Any, content: bytes = b"hello", tensors: int = 1) -> str:
    """A manifest whose tree is whatever an attacker wants."""
    specs = tuple(
        TensorSpec("uint8", (len(content) // tensors,), i * (len(content) // tensors)) for i in range(tensors)
    )
    with repo.store.writer() as writer:
        chunks = (ChunkRef(writer.put(content), len(content)),)
        index_id = writer.put(part_index.encode(Index(chunks, specs, tree)))
        writer.commit()
    made = Manifest(
        kind="files",
        run="evil",
        step=0,
        created=f"2026-01-01T00:00:00.{len(repo.catalog.listing().entries):06d}Z",
        parts={"files": Part(index=index_id, bytes=1, stored_bytes=1)},
    )
    return repo.catalog.add(made)[0]


FILE = {"mode": 0o644, "data": TensorRef(0)}
FOLDER = {"mode": 0o755}


@pytest.mark.parametrize(
    "path",
    ["../x", "/x", "a/../../x", "a//x", "./x", "a/.", "", "a\0b", ".git", ".git/hooks/post-checkout", ".GIT/x",
     "a/.git/config", ".g\u200cit/x", ".git./x", ".git /x", "GIT~1/x", ".castore/config.toml", "x" * 300],
)  # fmt: skip
def test_a_path_that_leads_elsewhere_is_refused(repo: Repo, tmp_path: Path, path: str) -> None:
    parents = {str(parent): FOLDER for parent in Path(path).parents if str(parent) not in (".", "/")}
    hostile = save_tree(repo, {"good": FILE, **parents, path: {"mode": 0o755}})
    with pytest.raises(errors.UnsafePath):
        checkout.check_out(repo, hostile, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "target"),
    [("top/link", "../x"), ("top/link", "/etc/passwd"), ("top/a/link", "../../x"), ("link", "x"), ("top/link", ""),
     ("top/link", "a/../../x"), ("top/link", "a/.."), ("top/link", ".git/config"), ("top/link", "x\0y")],
)  # fmt: skip
def test_a_link_that_leads_out_is_refused(repo: Repo, tmp_path: Path, path: str, target: str) -> None:
    hostile = save_tree(repo, {"top": FOLDER, "top/a": FOLDER, path: {"link": target}})
    with pytest.raises(errors.UnsafePath):
        checkout.check_out(repo, hostile, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_that_stay_inside_are_allowed() -> None:
    for path, target in (("a/b", "c"), ("a/b/c", "../d"), ("a/b/c", "."), ("a/b/c/d", "../../x/y")):
        assert safe_paths.why_not_link(path, target) == ""


NO_TREES: list[Any] = [
    [],
    None,
    {1: FILE},
    {"a": {}},
    {"a": 3},
    {"a": {"mode": "755"}},
    {"a": {"mode": -1, "data": TensorRef(0)}},
    {"a": {"data": TensorRef(0)}},
    {"a": {"mode": 0o644, "data": b"inline"}},
    {"a": {"mode": 0o644, "data": TensorRef(0), "owner": 0}},
    {"a": {"link": "x", "mode": 0o777}},
    {"a": FILE, "b": FILE},
]


@pytest.mark.parametrize("tree", NO_TREES, ids=str)
def test_what_is_no_tree_is_refused(repo: Repo, tmp_path: Path, tree: Any) -> None:
    hostile = save_tree(repo, tree)
    with pytest.raises(errors.CorruptIndex, match="does not describe a tree"):
        checkout.check_out(repo, hostile, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"link": "b"}, "a/x": FILE},
        {"a": FILE, "a/x": FOLDER},
        {"a/x": FILE},
    ],
    ids=str,
)
def test_a_file_lies_in_a_folder_of_the_tree(repo: Repo, tmp_path: Path, tree: Any) -> None:
    hostile = save_tree(repo, tree)
    with pytest.raises(errors.UnsafePath):
        checkout.check_out(repo, hostile, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_are_one_elsewhere_are_two_here_if_the_file_system_says_so(repo: Repo, tmp_path: Path) -> None:
    tree = {"A": {"mode": 0o644, "data": TensorRef(0)}, "a": {"mode": 0o644, "data": TensorRef(1)}}
    made = save_tree(repo, tree, b"oneTWO", tensors=2)
    checkout.check_out(repo, made, tmp_path / "out")
    assert {name: content[2] for name, content in look(tmp_path / "out").items()} == {"A": b"one", "a": b"TWO"}
    assert safe_paths.colliding(["x", "a/B", "A/b", "\u00e9", "e\u0301"]) == [("a/B", "A/b"), ("\u00e9", "e\u0301")]


def test_more_than_the_disk_holds_is_refused_before_anything_is_written(repo: Repo, tmp_path: Path) -> None:
    """A small index may repeat a chunk as often as it likes."""
    with repo.store.writer() as writer:
        zeros = ChunkRef(writer.put(bytes(64 << 20)), 64 << 20)
        count = 1_000_000
        specs = (TensorSpec("uint8", (count * (64 << 20),), 0),)
        index_id = writer.put(part_index.encode(Index((zeros,) * count, specs, {"bomb": FILE})))
        writer.commit()
    made = Manifest(
        kind="files",
        run="evil",
        step=0,
        created="2026-01-01T00:00:00.000000Z",
        parts={"files": Part(index=index_id, bytes=1, stored_bytes=1)},
    )
    hostile = repo.catalog.add(made)[0]
    with pytest.raises(errors.StorageError, match="are free"):
        checkout.check_out(repo, hostile, tmp_path / "out")
    assert look(tmp_path / "out") == {}


def test_only_files_are_checked_out(repo: Repo, state: Callable[..., Any], tmp_path: Path) -> None:
    saved = repo.save(state(), run="main", step=1)
    with pytest.raises(errors.NotFound, match="is a checkpoint, not a tree of files"):
        checkout.check_out(repo, saved.id, tmp_path / "out")
    with pytest.raises(errors.NotFound, match="no files of run 'main'; `castore add PATH` adds some"):
        checkout.check_out(repo, "main:latest", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- beside checkpoints ----------------------------------------------------------------------------------------------


def test_gc_keeps_what_was_added_until_it_is_forgotten(repo: Repo, source: Path, tmp_path: Path) -> None:
    from datetime import timedelta

    added = add_tree(repo, source)
    (tmp_path / "f").write_text("x")
    other = add_tree(repo, tmp_path / "f")
    assert gc.collect_garbage(repo, grace=timedelta(0)).delete == {}
    repo.catalog.forget(repo.find(added.id))
    gc.collect_garbage(repo, grace=timedelta(0))
    checkout.check_out(repo, other.id, tmp_path / "out")
    assert repo.checkpoints() == []


def test_a_name_that_is_no_run_is_made_one(repo: Repo, tmp_path: Path) -> None:
    folder = tmp_path / "-my  data (1)é"
    folder.mkdir()
    assert manifest.RUN.fullmatch(add_tree(repo, folder).manifest.run)
    assert add_tree(repo, folder, name="data").manifest.run == "data"
    with pytest.raises(errors.InvalidManifest):
        add_tree(repo, folder, name="a/b")


KILLED = """
import os, sys
from pathlib import Path
from castore import Repo
from castore.trees import checkout
def kill(done, total):
    if done > 6_000_000:
        os.kill(os.getpid(), 9)
checkout.check_out(Repo.open(sys.argv[1]), "latest", Path(sys.argv[2]), progress=kill)
"""


def test_what_a_killed_checkout_leaves_is_nobody_elses_and_gone_with_the_next(
    repo: Repo, source: Path, tmp_path: Path
) -> None:
    (source / "deep" / "nearly.bin").write_bytes(b"n" * 7_000_000)
    add_tree(repo, source)
    expected = look(source)
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(out)], check=False, umask=0)
    assert killed.returncode == -9
    folders = [path for path in out.rglob("*") if path.is_dir()]
    assert len(folders) >= 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    asked = {Path("stuff", path): mode for path, (kind, mode, *_) in expected.items() if kind == "file"}
    for path in (path for path in out.rglob("*") if path.is_file()):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == asked.get(path.relative_to(out), mode)
        assert mode in (0o400, *asked.values())
    assert leftovers(out)
    stranger = out / "castore-tmp-00000000-1-0-0"  # of another machine, which may be at work
    mine = out / "castore-tmp-notes"
    for path in (stranger, mine):
        path.touch()
    checkout.check_out(repo, "latest", out, force=True)
    assert leftovers(out) == [str(stranger), str(mine)] or leftovers(out) == [str(mine), str(stranger)]
    assert look(out / "stuff") == expected
    os.utime(stranger, (0, 0))
    checkout.check_out(repo, "latest", out, force=True)
    assert leftovers(out) == [str(mine)]


def test_a_folder_is_never_more_open_than_asked(repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a moment either."""
    (tmp_path / "private" / "inner").mkdir(parents=True)
    (tmp_path / "private" / "inner" / "key").write_text("secret")
    (tmp_path / "private").chmod(0o700)
    add_tree(repo, tmp_path / "private")
    made: list[int] = []
    mkdir = os.mkdir

    def watched(path: Path, mode: int = 0o777) -> None:
        mkdir(path, mode)
        if Path(path).name in ("private", "inner"):
            made.append(stat.S_IMODE(os.stat(path).st_mode))

    monkeypatch.setattr(os, "mkdir", watched)
    checkout.check_out(repo, "latest", tmp_path / "out")
    assert made == [0o700, 0o700]
