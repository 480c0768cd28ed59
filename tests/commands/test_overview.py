"""castore ls of what is here, and find; tests/commands/test_remotes.py has status and ls of a remote."""

from __future__ import annotations

import shutil

import pytest
from project import Project

from castore import Repo


@pytest.fixture
def books(empty: Project) -> tuple[Project, list[str]]:
    """Two versions of a folder, the older one first."""
    shutil.rmtree(empty.root / "texts")
    (empty.root / "books" / "poems").mkdir(parents=True)
    (empty.root / "books" / "poems" / "ode.txt").write_text("ode")
    (empty.root / "books" / "novel.txt").write_text("novel")
    first = empty.json("add", "books")["id"]
    (empty.root / "books" / "novel.txt").write_text("a longer novel")
    (empty.root / "books" / "copy").symlink_to("novel.txt")
    return empty, [first, empty.json("add", "books")["id"]]


def test_ls_shows_what_is_in_a_folder(books: tuple[Project, list[str]]) -> None:
    project, (first, _) = books
    assert project.call("ls", "books:latest").splitlines() == [
        "path                     size",
        "books/copy -> novel.txt     -",
        "books/novel.txt          14 B",
        "books/poems/              3 B",
    ]
    assert [node["path"] for node in project.json("ls", first[:8], "books/poems/")] == ["books/poems/ode.txt"]
    (novel,) = project.json("ls", first, "books/novel.txt")
    assert (novel["kind"], novel["bytes"], novel["mode"] & 0o600) == ("file", 5, 0o600)
    assert "there is no 'books/nvoel.txt' in it" in project.call("ls", first, "books/nvoel.txt", code=3)


def test_latest_of_a_name_is_what_has_that_name(books: tuple[Project, list[str]]) -> None:
    project, (_, second) = books
    out = project.call("show", "books:latest").splitlines()
    assert out[0] == f"files      {second}"
    assert out[-1] == f"what is in it: `castore ls {second[:12]}`"
    assert "score" not in "".join(out)


def test_ls_shows_the_tensors_of_a_part(history: Project) -> None:
    tensors = history.json("ls", "latest", "model")
    state = Repo.open(history.root).load("latest")["model"]
    assert {row["tensor"]: (row["dtype"], row["shape"], row["bytes"]) for row in tensors} == {
        name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor.nbytes)
        for name, tensor in state.items()
    }
    name = tensors[0]["tensor"]
    row = history.call("ls", "latest", f"model/{name[:-1]}?").splitlines()[-1].split("  ")
    assert row[0] == name
    assert "no part 'modle'; parts: model" in history.call("ls", "latest", "modle", code=3)
    assert "has no tensor 'nope'" in history.call("ls", "latest", "model/nope", code=3)


def test_find_says_which_versions_hold_a_path(books: tuple[Project, list[str]]) -> None:
    project, (first, second) = books
    (ode,) = project.json("find", "ode.*")
    assert (ode["path"], ode["versions"]) == ("books/poems/ode.txt", [second, first])
    assert project.call("find", "books/*o*").splitlines()[1:] == [
        f"books/copy -> novel.txt     -  {second[:12]}  books         1",
        f"books/novel.txt          14 B  {second[:12]}  books         2",
        f"books/poems/              3 B  {second[:12]}  books         2",
        f"books/poems/ode.txt       3 B  {second[:12]}  books         2",
    ]
    assert "no added files hold 'poem'" in project.call("find", "poem", code=3)


def test_find_says_what_it_could_not_look_into(books: tuple[Project, list[str]]) -> None:
    project, (first, second) = books
    index = next((project.root / ".castore" / "manifests").rglob(f"*{first[:8]}*"))
    assert index
    shutil.rmtree(project.root / ".castore" / "objects")
    process = project.start("find", "ode.txt")
    _, err = process.communicate()
    assert process.returncode == 3
    assert f"{first[:12]} was not looked into: " in err
    assert f"{second[:12]} was not looked into: " in err
