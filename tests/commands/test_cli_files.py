"""The commands that move weights and files in and out, and prepared data, through the installed program."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import pty
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact, parts
from project import Project
from safetensors import safe_open
from safetensors.torch import load_file

from castore import Experiment, Repo
from castore.format import part_index
from castore.format.manifest import Manifest

EXPERIMENT = Experiment(model={"n": 1}, data="d")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project with two checkpoints."""
    project = Project(tmp_path)
    project.run("init")
    (project.root / ".castore" / "config.toml").write_text('[store]\nchunk_size = "64KiB"\nlock_timeout = 5.0\n')
    repo = Repo.open(project.root)
    for step in (1, 2):
        model = parts(step)["model"]
        repo.save({"model": model, "trainer": {"seed": step}}, run="main", step=step, experiment=EXPERIMENT,
                  config={"lr": 0.1}, metrics={"val_loss": 5.0 - step})  # fmt: skip
    return project


@pytest.fixture
def empty(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    project.run("init")
    return project


# -- export and import -----------------------------------------------------------------------------------------------


def test_export_writes_what_other_programs_read(project: Project) -> None:
    best = project.json("resolve")["match"]["id"]
    out = project.run("export", "best", "model.safetensors")
    assert re.fullmatch(rf"wrote model.safetensors: 4 tensors, 400.\d kB, of checkpoint {best[:12]}\n", out)
    model = parts(2)["model"]
    found = load_file(project.root / "model.safetensors")
    assert exact(dict(sorted(found.items()))) == exact(dict(sorted(model.items())))
    with safe_open(project.root / "model.safetensors", framework="pt") as file:
        assert (file.metadata()["castore_id"], file.metadata()["castore_step"]) == (best, "2")
    shown = project.json("export", best[:8], "model.pt")
    assert (shown["id"], shown["path"], shown["part"], shown["tensors"]) == (best, "model.pt", "model", 4)
    assert exact(torch.load(project.root / "model.pt", weights_only=True)) == exact(model)


def test_import_makes_a_checkpoint_that_compares_and_exports_again(project: Project) -> None:
    project.run("export", "best", "a.safetensors")
    own = project.json("resolve")["match"]["id"]
    out = project.run("import", "a.safetensors", "--like", own[:8], "--metric", "val_loss=1.5", "--metric", "x=2",
                      "--step", "9", "--tag", "theirs", "--note", "from afar")  # fmt: skip
    made = re.match(r"saved ([0-9a-f]{64}): step 9 of run main, ", out)
    assert made
    shown = project.json("show", made[1])
    assert (shown["kind"], shown["step"], shown["run"], list(shown["parts"])) == ("checkpoint", 9, "main", ["model"])
    assert (shown["tags"], shown["note"], shown["config"]) == (["theirs"], "from afar", {"lr": 0.1})
    assert shown["metrics"] == {"val_loss": 1.5, "x": 2.0}
    assert shown["experiment"]["data"] == "d"
    assert project.json("resolve", "--part", "model")["match"]["id"] == made[1]
    project.run("export", made[1], "b.safetensors")
    assert exact(load_file(project.root / "b.safetensors")) == exact(load_file(project.root / "a.safetensors"))


def test_import_without_a_model_to_follow(project: Project) -> None:
    torch.save({"w": torch.ones(3)}, project.root / "x.pt")
    made = project.json("import", "x.pt", "--run", "theirs")
    shown = project.json("show", made["id"])
    assert (shown["run"], shown["step"], shown["metrics"]) == ("theirs", 0, {})
    assert (project.root / made["path"]).exists()


def test_a_session_goes_on_from_imported_weights(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.train()
    own = project.json("resolve")["match"]["id"]
    project.run("export", own, "w.safetensors")
    made = project.json("import", "w.safetensors", "--like", own)["id"]
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
        (["import", "bad.safetensors"], 5, "no valid safetensors file"),
        (["import", "bad.pt"], 5, "not the zip that torch.save writes"),
        (["import", "good.pt", "--metric", "val_loss"], 2, "--metric val_loss is not NAME=VALUE"),
        (["import", "good.pt", "--metric", "=3"], 2, "--metric =3 is not NAME=VALUE"),
        (["import", "good.pt", "--metric", "val_loss=nan"], 2, "not a finite number"),
        (["import", "good.pt", "--step", "-1"], 2, "--step"),
        (["import", "good.pt", "--run", "../x"], 2, "run '../x'"),
        (["import", "good.pt", "--like", "0123"], 3, "no checkpoint '0123'"),
        (["import", "good.pt", "--note", "a\x1b[2Jb"], 2, "one line of text"),
        (["add", "gone"], 2, "No such file"),
        (["add", "link"], 2, "give what it leads to"),
        (["add", "odd"], 2, "odd/pipe: neither file, folder nor link"),
        (["add", "texts", "--name", "a b"], 2, "run 'a b'"),
        (["add", "."], 2, "odd/pipe"),
        (["checkout", "latest"], 3, "no files yet: `castore add PATH` adds some"),
        (["checkout", "best"], 3, "no files 'best'; `castore log --kind files` lists them"),
        (["export", "best", "odd/pipe", "--force"], 2, "it is no regular file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_says_why_and_changes_nothing(
    project: Project, arguments: list[str], code: int, says: str
) -> None:
    (project.root / "link").symlink_to("texts/0.txt")
    (project.root / "bad.safetensors").write_bytes(b"\xff" * 100)
    (project.root / "bad.pt").write_bytes(pickle.dumps({"a": 1}))
    (project.root / "odd").mkdir()
    os.mkfifo(project.root / "odd" / "pipe")
    torch.save({"w": torch.ones(3)}, project.root / "good.pt")

    def state() -> tuple[list[str], Any, str]:
        names = sorted(str(path) for path in project.root.rglob("*") if "/.castore/" not in str(path))
        return names, project.json("log", "--kind", "all"), (project.root / "texts" / "0.txt").read_text()

    before = state()
    assert says in project.run(*arguments, code=code)
    assert state() == before


def test_outside_a_repository_each_says_what_to_do(tmp_path: Path) -> None:
    project = Project(tmp_path)
    for arguments in (["export", "best", "x.pt"], ["import", "x.pt"], ["add", "texts"], ["checkout", "latest"]):
        assert "run `castore init`" in project.run(*arguments, code=2)


# -- add and checkout ------------------------------------------------------------------------------------------------


def test_a_folder_is_added_and_comes_back(empty: Project) -> None:
    (empty.root / "texts" / "empty").mkdir()
    (empty.root / "texts" / "run").write_text("#!/bin/sh\n")
    (empty.root / "texts" / "run").chmod(0o755)
    (empty.root / "texts" / "again").symlink_to("run")
    (empty.root / "texts" / ".git").mkdir()
    out = empty.run("add", "texts", "--name", "books", "--tag", "t", "--note", "n").splitlines()
    assert out[0] == "passed  texts/.git, which is never checked out"
    assert re.match(r"added   [0-9a-f]{12}, books: 7 files, 2 folders, 1 link, \d+\.\d kB, .* new$", out[1])
    (own,) = empty.json("log", "--kind", "files")
    assert (own["run"], own["tags"], own["note"], own["availability"]) == ("books", ["t"], "n", "full")
    (empty.root / "texts" / ".git").rmdir()
    out = empty.run("checkout", own["id"][:6], "back")
    assert out.startswith("wrote   back/texts: 7 files, 2 folders, 1 link, ")
    different = subprocess.run(["diff", "-r", "--no-dereference", "texts", "back/texts"], cwd=empty.root)
    assert different.returncode == 0
    assert os.access(empty.root / "back" / "texts" / "run", os.X_OK)
    assert os.readlink(empty.root / "back" / "texts" / "again") == "run"
    shutil.rmtree(empty.root / "texts")
    empty.run("checkout", "books:latest")
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
    empty.run("add", "texts")
    (empty.root / "texts" / "0.txt").write_text("mine")
    err = empty.run("checkout", "latest", code=2)
    assert "won't write texts/0.txt: it exists and 5 more: --force replaces files" in err
    assert (empty.root / "texts" / "0.txt").read_text() == "mine"
    empty.run("checkout", "latest", "--force")
    assert "bottles" in (empty.root / "texts" / "0.txt").read_text()


def test_checkout_never_replaces_a_pipe(empty: Project) -> None:
    (empty.root / "file").write_text("x")
    own = empty.json("add", "file")["id"]
    (empty.root / "file").unlink()
    os.mkfifo(empty.root / "file")
    assert "neither a file nor a link" in empty.run("checkout", own, "--force", code=2)
    assert (empty.root / "file").is_fifo()
    (empty.root / "file").unlink()
    (empty.root / "file").symlink_to("texts/0.txt")
    empty.run("checkout", own, "--force")
    assert (empty.root / "file").read_text() == "x"
    assert "bottles" in (empty.root / "texts" / "0.txt").read_text()


def test_checkout_of_nothing_says_so(empty: Project) -> None:
    repo = Repo.open(empty.root)
    part = repo.save({"model": {}}, run="x", step=1).manifest.parts["model"]
    fields = {"run": "none", "step": 0, "created": "2026-01-02T03:04:05.000000Z"}
    repo.catalog.add(Manifest(kind="files", parts={"files": part}, **fields))
    assert "wrote   nothing, as the tree is empty: " in empty.run("checkout", "none:latest", "out")


def test_show_begins_with_the_kind(empty: Project) -> None:
    own = empty.json("add", "texts")["id"]
    assert empty.run("show", own).startswith(f"files      {own}\n")


def test_json_of_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9-\xc2\x9b"))
    folder.mkdir()
    project = Project(folder)
    root = project.json("init")["root"]
    assert root == str(folder / ".castore")
    out = project.run("init", "--json")
    assert "caf\\udce9-\\u009b" in out
    assert out.encode().isascii()


def test_missing_and_damaged_data_have_exit_codes_of_their_own(empty: Project) -> None:
    own = empty.json("add", "texts")["id"]
    repo = Repo.open(empty.root)
    part = repo.find(own).manifest.parts["files"]
    chunk = repo.store.path(part_index.decode(repo.store.read(part.index)).chunks[0].id)
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert f"(part 'files' of checkpoint {own[:12]})" in empty.run("checkout", own, "out", code=5)
    chunk.write_bytes(b"")
    assert "`castore verify --repair`" in empty.run("checkout", own, "out", code=5)
    assert "is missing" in empty.run("checkout", own, "out", code=4)
    assert [path for path in (empty.root / "out").rglob("*") if path.is_file()] == []


def test_a_locked_store_exits_6(empty: Project) -> None:
    (empty.root / ".castore" / "config.toml").write_text("[store]\nlock_timeout = 0.1\n")
    with Repo.open(empty.root).lock(exclusive=True):
        assert "is held by another castore process" in empty.run("add", "texts", code=6)


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
    assert "\x1b" not in empty.run("add", evil)
    out = empty.run("checkout", "latest", "out")
    assert "\x1b" not in out
    assert "a\\x1b[2Jb\\n" in out
    assert "\x1b" not in empty.run("checkout", "latest", "out", code=2)


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_terminal_sees_that_something_is_under_way(project: Project, command: str) -> None:
    """On standard error, so that standard output can be read by a program."""
    torch.save({"w": torch.ones(3)}, project.root / "x.pt")
    arguments = ["import", "x.pt"] if command == "import" else ["export", "best", "x.safetensors"]
    ours, theirs = pty.openpty()
    project.environment = project.environment | {"TERM": "xterm"}
    process = project.start(*arguments, "--json", stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end, when nobody holds the other side
        while True:
            shown += os.read(ours, 65536)
    os.close(ours)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert json.loads(out)
    assert f"{command}ing".encode() in shown


@pytest.mark.parametrize("arguments", [["add", "texts"], ["checkout", "latest", "out"]])
def test_files_need_no_torch(empty: Project, arguments: list[str]) -> None:
    empty.run("add", "texts")
    code = "import sys, cli\ntry: cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=empty.root, capture_output=True, text=True)
    assert done.returncode == 0
    assert "torch" not in done.stderr.split()


# -- prepared data ---------------------------------------------------------------------------------------------------


def data_line(out: str) -> str:
    (line,) = re.findall(r"^ +(prepared .*)$", out, re.MULTILINE)
    return str(line)


def test_the_second_session_says_that_it_reuses_the_data(tmp_path: Path) -> None:
    project = Project(tmp_path)
    assert data_line(project.train()) == "prepared now: these texts, so split and tokenized, are new here"
    (own,) = project.json("log", "--kind", "dataset")
    assert (own["kind"], own["run"], own["availability"]) == ("dataset", "datasets", "full")
    assert data_line(project.train()) == f"prepared before: {own['id'][:12]}"
    assert data_line(project.train("--run", "other", "--resume", "none")).startswith("prepared before: ")
    assert {entry["kind"] for entry in project.json("log")} == {"checkpoint"}
    assert len(project.json("log", "--kind", "all")) == len(project.json("log")) + 1
    for path in (project.root / ".castore" / "objects").rglob("*"):
        if path.is_file() and path.name == project.json("show", own["id"])["parts"]["data"]["index"]:
            path.unlink()
    assert data_line(project.train()).startswith(f"prepared now: {own['id'][:12]} can't be had: ")
    assert data_line(project.train()) == f"prepared before: {own['id'][:12]}"


@pytest.mark.parametrize("tokenizer", [[], ["--tokenizer", "bpe", "--vocab-size", "300"]])
def test_training_is_the_same_bit_for_bit_with_prepared_data(tmp_path: Path, tokenizer: list[str]) -> None:
    found = []
    for name, sessions in (("fresh", 1), ("reused", 2)):
        (tmp_path / name).mkdir()
        project = Project(tmp_path / name)
        for session in range(sessions):
            out = project.train("--run", f"r{session}", "--resume", "none", *tokenizer)
        assert data_line(out).startswith("prepared now" if sessions == 1 else "prepared before")
        newest = project.json("log", "--run", f"r{sessions - 1}")[0]
        shown = project.json("show", newest["id"])
        found.append((newest["parts"]["model"]["index"], newest["parts"]["optimizer"]["index"], shown["experiment"]))
    assert found[0] == found[1]


def test_two_sessions_prepare_at_once(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.run("init")
    arguments = ["train", "--data-dir", "texts", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size",
                 "16", "--session-iters", "1", "--threads", "1"]  # fmt: skip
    both = [project.start(*arguments, "--run", run) for run in ("a", "b")]
    for process in both:
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        assert "prepared " in out
    assert {entry["availability"] for entry in project.json("log", "--kind", "all")} == {"full"}
    assert data_line(project.run(*arguments)).startswith("prepared before: ")


def test_old_prepared_data_is_collected_and_prepared_again(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.train()
    (own,) = project.json("log", "--kind", "dataset")
    config = project.root / ".castore" / "config.toml"
    config.write_text('[retention]\ndata_ttl = "0.0001s"\nauto_gc = false\n')
    deleted = project.json("gc", "--grace", "0")["deleted"]
    assert own["parts"]["data"]["index"] in deleted
    (gone,) = project.json("log", "--kind", "dataset")
    assert gone["availability"] == "history"
    assert data_line(project.train()) == f"prepared now: {own['id'][:12]} is older than data_ttl = 0.0001s"
    assert len(project.json("log", "--kind", "dataset")) == 2


def test_log_of_another_kind_is_empty_in_words(empty: Project) -> None:
    assert empty.run("log", "--kind", "files") == "no manifest of kind files yet\n"
    assert empty.json("log", "--kind", "dataset") == []
    assert "--kind" in empty.run("log", "--kind", "nonsense", code=2)
