"""The commands that move weights and files in and out: export, import, add, checkout."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact, parts
from project import Project
from safetensors import safe_open
from safetensors.torch import load_file

from castore import Repo
from castore.format import part_index
from castore.format.manifest import Manifest

# -- export and import ------------------------------------------------------------------------------------------------


def test_export_writes_what_other_programs_read(weights: Project) -> None:
    best = weights.json("resolve")["match"]["id"]
    out = weights.call("export", "best", "model.safetensors")
    assert re.fullmatch(rf"wrote model.safetensors: 4 tensors, 400.\d kB, of checkpoint {best[:12]}\n", out)
    model = parts(2)["model"]
    found = load_file(weights.root / "model.safetensors")
    assert exact(dict(sorted(found.items()))) == exact(dict(sorted(model.items())))
    with safe_open(weights.root / "model.safetensors", framework="pt") as file:
        assert (file.metadata()["castore_id"], file.metadata()["castore_step"]) == (best, "2")
    shown = weights.json("export", best[:8], "model.pt")
    assert (shown["id"], shown["path"], shown["part"], shown["tensors"]) == (best, "model.pt", "model", 4)
    assert exact(torch.load(weights.root / "model.pt", weights_only=True)) == exact(model)


def test_import_makes_a_checkpoint_that_compares_and_exports_again(weights: Project) -> None:
    weights.call("export", "best", "a.safetensors")
    checkpoint_id = weights.json("resolve")["match"]["id"]
    out = weights.call(
        "import", "a.safetensors", "--like", checkpoint_id[:8], "--metric", "val_loss=1.5", "--metric", "x=2",
        "--step", "9", "--tag", "theirs", "--note", "from afar",
    )  # fmt: skip
    made = re.match(r"saved ([0-9a-f]{64}): step 9 of run main, ", out)
    assert made
    shown = weights.json("show", made[1])
    assert (shown["kind"], shown["step"], shown["run"], list(shown["parts"])) == ("checkpoint", 9, "main", ["model"])
    assert (shown["tags"], shown["note"], shown["config"]) == (["theirs"], "from afar", {"lr": 0.1})
    assert shown["metrics"] == {"val_loss": 1.5, "x": 2.0}
    assert shown["experiment"]["data"] == "d"
    assert weights.json("resolve", "--part", "model")["match"]["id"] == made[1]
    weights.call("export", made[1], "b.safetensors")
    assert exact(load_file(weights.root / "b.safetensors")) == exact(load_file(weights.root / "a.safetensors"))


def test_import_without_a_model_to_follow(weights: Project) -> None:
    torch.save({"w": torch.ones(3)}, weights.root / "x.pt")
    made = weights.json("import", "x.pt", "--run", "theirs")
    shown = weights.json("show", made["id"])
    assert (shown["run"], shown["step"], shown["metrics"]) == ("theirs", 0, {})
    assert (weights.root / made["path"]).exists()


def test_a_session_goes_on_from_imported_weights(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.train()
    checkpoint_id = project.json("resolve")["match"]["id"]
    project.run("export", checkpoint_id, "w.safetensors")
    made = project.json("import", "w.safetensors", "--like", checkpoint_id)["id"]
    out = project.train("--resume", made)
    assert f"resume  {made[:12]}, step 4 of run main" in out
    assert "only the weights" in out
    assert made in [entry["parent"] for entry in project.json("log")]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["export", "0123", "x.pt"], 3, "no checkpoint '0123'"),
        (["export", "best", "x.pt", "--part", "optimizer"], 3, "no part 'optimizer'"),
        (["export", "best", "x.safetensors", "--part", "trainer"], 2, "can't store seed: safetensors holds tensors"),
        (["export", "best", "texts"], 2, "it is a folder"),
        (["export", "best", "nowhere/x.pt"], 2, "the folder isn't there"),
        (["export", "best", ".git/x.pt"], 2, "inside .git"),
        (["export", "best", "link", "--force"], 2, "symbolic link"),
        (["export", "best", "texts/0.txt"], 2, "it exists: --force replaces it"),
        (["import", "gone.pt"], 2, "No such file"),
        (["import", "texts/0.txt"], 2, "neither .safetensors nor .pt"),
        (["import", "bad.safetensors"], 5, "not a valid safetensors file"),
        (["import", "bad.pt"], 5, "not the zip that torch.save writes"),
        (["import", "good.pt", "--metric", "val_loss"], 2, "--metric val_loss is not NAME=VALUE"),
        (["import", "good.pt", "--metric", "=3"], 2, "--metric =3 is not NAME=VALUE"),
        (["import", "good.pt", "--metric", "val_loss=nan"], 2, "not a finite number"),
        (["import", "good.pt", "--step", "-1"], 2, "--step"),
        (["import", "good.pt", "--run", "../x"], 2, "run '../x'"),
        (["import", "good.pt", "--like", "0123"], 3, "no checkpoint '0123'"),
        (["import", "good.pt", "--note", "a\x1b[2Jb"], 2, "one line of text"),
        (["add", "gone"], 2, "No such file"),
        (["add", "link"], 2, "add what it leads to"),
        (["add", "odd"], 2, "odd/pipe: neither file, folder nor link"),
        (["add", "texts", "--name", "a b"], 2, "run 'a b'"),
        (["add", "."], 2, "odd/pipe"),
        (["checkout", "latest"], 3, "no files yet: `castore add PATH` adds some"),
        (["checkout", "best"], 3, "no files 'best'; `castore log --kind files` lists them"),
        (["export", "best", "odd/pipe", "--force"], 2, "it is not a regular file"),
        (["export", "best", "texts", "--format", "transformers", "--force"], 2, "replaces a file, never a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_says_why_and_changes_nothing(
    weights: Project, arguments: list[str], code: int, says: str
) -> None:
    (weights.root / "link").symlink_to("texts/0.txt")
    (weights.root / "bad.safetensors").write_bytes(b"\xff" * 100)
    (weights.root / "bad.pt").write_bytes(pickle.dumps({"a": 1}))
    (weights.root / "odd").mkdir()
    os.mkfifo(weights.root / "odd" / "pipe")
    torch.save({"w": torch.ones(3)}, weights.root / "good.pt")

    def state() -> tuple[list[str], Any, str]:
        names = sorted(str(path) for path in weights.root.rglob("*") if "/.castore/" not in str(path))
        return names, weights.json("log", "--kind", "all"), (weights.root / "texts" / "0.txt").read_text()

    before = state()
    assert says in weights.call(*arguments, code=code)
    assert state() == before


# -- add and checkout -------------------------------------------------------------------------------------------------


def test_a_folder_is_added_and_comes_back(empty: Project) -> None:
    (empty.root / "texts" / "empty").mkdir()
    (empty.root / "texts" / "run").write_text("#!/bin/sh\n")
    (empty.root / "texts" / "run").chmod(0o755)
    (empty.root / "texts" / "again").symlink_to("run")
    (empty.root / "texts" / ".git").mkdir()
    out = empty.call("add", "texts", "--name", "books", "--tag", "t", "--note", "n").splitlines()
    assert out[0] == "skipped texts/.git, which is never checked out"
    assert re.match(r"added   [0-9a-f]{12}, books: 7 files, 2 folders, 1 link, \d+\.\d kB, .* new$", out[1])
    (checkpoint_id,) = empty.json("log", "--kind", "files")
    assert (checkpoint_id["run"], checkpoint_id["tags"], checkpoint_id["note"], checkpoint_id["availability"]) == (
        "books",
        ["t"],
        "n",
        "full",
    )
    (empty.root / "texts" / ".git").rmdir()
    out = empty.call("checkout", checkpoint_id["id"][:6], "back")
    assert out.startswith("wrote   back/texts: 7 files, 2 folders, 1 link, ")
    different = subprocess.run(["diff", "-r", "--no-dereference", "texts", "back/texts"], cwd=empty.root)
    assert different.returncode == 0
    assert os.access(empty.root / "back" / "texts" / "run", os.X_OK)
    assert os.readlink(empty.root / "back" / "texts" / "again") == "run"
    shutil.rmtree(empty.root / "texts")
    empty.call("checkout", "books:latest")
    assert (empty.root / "texts" / "run").read_text() == "#!/bin/sh\n"


def test_an_edit_of_one_byte_costs_little_in_another_process(empty: Project, rng: random.Random) -> None:
    big = empty.root / "big.bin"
    data = bytearray(rng.randbytes(60_000_000))
    big.write_bytes(data)
    first = empty.json("add", "big.bin")
    assert first["new_bytes"] > 60_000_000
    assert empty.json("add", "big.bin")["new_bytes"] == 0
    data[30_000_000] ^= 1
    big.write_bytes(data)
    edited = empty.json("add", "big.bin")
    assert 0 < edited["new_bytes"] < 8_400_000
    assert edited["name"] == "big.bin"
    shown = empty.json("checkout", "latest", "out")
    assert (shown["id"], shown["paths"], shown["bytes"]) == (edited["id"], ["out/big.bin"], len(data))
    assert (empty.root / "out" / "big.bin").read_bytes() == data
    empty.run("checkout", first["id"], "out", "--force")
    data[30_000_000] ^= 1
    assert (empty.root / "out" / "big.bin").read_bytes() == data


def test_checkout_overwrites_only_when_told_to(empty: Project) -> None:
    empty.call("add", "texts")
    (empty.root / "texts" / "0.txt").write_text("mine")
    err = empty.call("checkout", "latest", code=2)
    assert "won't write texts/0.txt: it exists as no version that was added: `castore add` keeps it, --force" in err
    assert (empty.root / "texts" / "0.txt").read_text() == "mine"
    out = empty.call("checkout", "latest", "--force").splitlines()
    assert out[0] == "overwrote texts/0.txt, which no version holds"
    assert out[1].startswith("wrote   1 file that differed, in texts: 6 files")
    assert "bottles" in (empty.root / "texts" / "0.txt").read_text()
    assert empty.call("checkout", "latest").startswith("same    texts: 6 files")


def test_checkout_goes_from_version_to_version_and_deletes_when_told_to(empty: Project) -> None:
    first = empty.json("add", "texts")["id"]
    (empty.root / "texts" / "0.txt").write_text("edited")
    (empty.root / "texts" / "new.txt").write_text("new")
    second = empty.json("add", "texts")["id"]
    empty.call("checkout", first)
    assert "bottles" in (empty.root / "texts" / "0.txt").read_text()
    assert (empty.root / "texts" / "new.txt").exists()
    out = empty.call("checkout", first, "--delete").splitlines()
    assert out[0] == "deleted texts/new.txt, which another version holds"
    assert not (empty.root / "texts" / "new.txt").exists()
    empty.call("checkout", second)
    assert (empty.root / "texts" / "0.txt").read_text() == "edited"
    (empty.root / "texts" / "mine").write_text("mine")
    assert "--force deletes it" in empty.call("checkout", second, "--delete", code=2)
    shown = empty.json("checkout", second, "--delete", "--force")
    assert (shown["written"], shown["deleted"], shown["lost"]) == (0, ["texts/mine"], ["texts/mine"])


def test_checkout_never_replaces_a_pipe(empty: Project) -> None:
    (empty.root / "file").write_text("x")
    checkpoint_id = empty.json("add", "file")["id"]
    (empty.root / "file").unlink()
    os.mkfifo(empty.root / "file")
    assert "neither a file nor a link" in empty.call("checkout", checkpoint_id, "--force", code=2)
    assert (empty.root / "file").is_fifo()
    (empty.root / "file").unlink()
    (empty.root / "file").symlink_to("texts/0.txt")
    empty.call("checkout", checkpoint_id, "--force")
    assert (empty.root / "file").read_text() == "x"
    assert "bottles" in (empty.root / "texts" / "0.txt").read_text()


def test_checkout_of_nothing_says_so(empty: Project) -> None:
    repo = Repo.open(empty.root)
    part = repo.save({"model": {}}, run="x", step=1).manifest.parts["model"]
    fields = {"run": "none", "step": 0, "created": "2026-01-02T03:04:05.000000Z"}
    repo.catalog.add(Manifest(kind="files", parts={"files": part}, **fields))
    assert "wrote   nothing, as the tree is empty: " in empty.call("checkout", "none:latest", "out")


def test_missing_and_damaged_data_have_exit_codes_of_their_own(empty: Project) -> None:
    checkpoint_id = empty.json("add", "texts")["id"]
    repo = Repo.open(empty.root)
    part = repo.find(checkpoint_id).manifest.parts["files"]
    chunk = repo.store.path(part_index.decode(repo.store.read(part.index)).chunks[0].id)
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert f"(part 'files' of checkpoint {checkpoint_id[:12]})" in empty.run("checkout", checkpoint_id, "out", code=5)
    chunk.write_bytes(b"")
    assert "`castore verify --repair`" in empty.run("checkout", checkpoint_id, "out", code=5)
    assert "is missing" in empty.run("checkout", checkpoint_id, "out", code=4)
    assert [path for path in (empty.root / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("arguments", [["add", "texts"], ["log"]], ids=["add", "log"])
def test_a_locked_store_exits_6(empty: Project, arguments: Sequence[str]) -> None:
    empty.call("add", "texts")
    Repo.open(empty.root).save({"model": {"x": 1}}, run="main", step=1)
    (empty.root / ".castore" / "config.toml").write_text("[store]\nlock_timeout = 0.1\n")
    with Repo.open(empty.root).lock(exclusive=True):
        assert "is held by another castore process" in empty.run(*arguments, code=6)


def test_a_killed_checkout_leaves_no_half_file_under_its_name(empty: Project, rng: random.Random) -> None:
    (empty.root / "many").mkdir()
    for i in range(40):
        (empty.root / "many" / str(i)).write_bytes(rng.randbytes(2_000_000))
    empty.run("add", "many")
    process = empty.start("checkout", "latest", "out")
    while not (empty.root / "out" / "many" / "12").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    found = [path for path in (empty.root / "out" / "many").iterdir() if path.name.isdigit()]
    assert found
    for path in found:
        assert path.read_bytes() == (empty.root / "many" / path.name).read_bytes()
    empty.run("checkout", "latest", "out", "--force")
    assert len([path for path in (empty.root / "out" / "many").iterdir() if path.name.isdigit()]) == 40


def test_names_from_a_manifest_reach_the_terminal_as_text(empty: Project) -> None:
    evil = "a\x1b[2Jb\n"
    (empty.root / evil).write_text("x")
    assert "\x1b" not in empty.call("add", evil)
    out = empty.call("checkout", "latest", "out")
    assert "\x1b" not in out
    assert "a\\x1b[2Jb\\n" in out
    (empty.root / "out" / evil).write_text("mine")
    assert "\x1b" not in empty.call("checkout", "latest", "out", code=2)
    assert "overwrote a\\x1b[2Jb\\n" in empty.call("checkout", "latest", "out", "--force")
