"""The commands that look a store over and keep it small and whole, through the installed program."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import parts, tree
from project import Project

from castore import Experiment, Repo
from castore.format import part_index
from castore.format.ids import ObjectId
from castore.storage import fs

SETTINGS = '[store]\nchunk_size = "64KiB"\nthreads = 2\nfsync = false\nlock_timeout = 5.0\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with four checkpoints: three in a row, and a second one resumed from the first."""
    project = Project(tmp_path_factory.mktemp("made"))
    project.run("init")
    (project.root / ".castore" / "config.toml").write_text(SETTINGS)
    repo = Repo.open(project.root)
    ids: list[ObjectId] = []
    for step, run, parent in ((1, "main", None), (2, "main", 0), (3, "main", 1), (4, "side", 0)):
        saved = repo.save(
            {**parts(step), "optimizer": {"m": parts(step + 100)["model"]["big"]}},
            run=run, step=step, parent=None if parent is None else ids[parent], metrics={"val_loss": 4.0 / step},
            tags=["nice"] if step == 3 else [], config={"rate": 0.1 * step}, experiment=Experiment(data="d"),
        )  # fmt: skip
        ids.append(saved.id)
    project.git("add", "-A")
    project.git("commit", "-q", "-m", "x")
    return project


@pytest.fixture
def project(made: Project, tmp_path: Path) -> Project:
    """A copy, to be changed."""
    copy = Project.__new__(Project)
    copy.root, copy.environment = tmp_path / "copy", made.environment
    shutil.copytree(made.root, copy.root)
    return copy


def repo_of(project: Project) -> Repo:
    return Repo.open(project.root)


def by_step(project: Project, step: int) -> str:
    (own,) = (entry["id"] for entry in project.json("log") if entry["step"] == step)
    return str(own)


def chunks_of(project: Project, step: int, part: str = "model") -> list[ObjectId]:
    repo = repo_of(project)
    own = repo.find(by_step(project, step)).manifest.parts[part].index
    return [chunk.id for chunk in part_index.decode_chunks(repo.store.read(own))]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def set_remote(project: Project) -> None:
    shutil.copytree(project.root / ".castore" / "objects", project.root.parent / "shared" / "objects")
    (project.root / ".castore" / "config.toml").write_text(SETTINGS + '[remotes]\nshared = "../shared"\n')


# -- verify ----------------------------------------------------------------------------------------------------------


def test_verify_of_a_whole_store_says_how_much_it_read(made: Project) -> None:
    size = sum(path.stat().st_size for path in (made.root / ".castore" / "objects").rglob("*") if path.is_file())
    assert re.fullmatch(r"verify  \d+\.\d MB read: all is well\n", made.run("verify"))
    assert made.json("verify") == {"ok": True, "bytes": size, "findings": []}
    assert made.json("verify", "main:best")["bytes"] < size / 2


def test_verify_exits_5_and_names_what_is_damaged_and_who_needs_it(project: Project) -> None:
    own, chunk = by_step(project, 3), chunks_of(project, 3)[0]
    flip(repo_of(project).store.path(chunk))
    before = tree(project.root)
    out, err = project.start("verify").communicate()
    assert out.splitlines()[0].startswith(f"damaged object {chunk[:12]}: ")
    assert f"needed by model of {own[:12]}" in out
    assert "1 finding, 1 to be mended" in out
    assert err == ""
    project.run("verify", code=5)
    project.run("verify", own, code=5)
    project.run("verify", by_step(project, 1))
    assert tree(project.root) == before


def test_verify_prints_findings_as_data(project: Project) -> None:
    own, chunk = by_step(project, 3), chunks_of(project, 3)[0]
    path = repo_of(project).store.path(chunk)
    path.unlink()
    process = project.start("verify", "--json")
    found = json.loads(process.communicate()[0])
    assert process.returncode == 5
    assert found["ok"] is False
    assert found["findings"] == [
        {
            "kind": "missing", "reason": "not in the store", "path": str(path), "object_id": chunk, "harmless": False,
            "needed_by": [{"checkpoint_id": own, "part": "model"}], "repaired_from": "",
        }
    ]  # fmt: skip


def test_verify_repairs_from_a_remote_and_then_exits_0(project: Project) -> None:
    set_remote(project)
    damaged, missing = chunks_of(project, 3)[:2]
    store = repo_of(project).store
    flip(store.path(damaged))
    store.path(missing).unlink()
    project.run("verify", code=5)
    out = project.run("verify", "--repair")
    assert out.count("repaired: a good copy came from shared") == 2
    assert "2 findings, 0 to be mended" in out
    assert project.json("verify")["findings"] == []
    assert [path.name[:64] for path in store.quarantine.iterdir()] == [damaged]


def test_verify_that_can_not_repair_exits_5(project: Project) -> None:
    chunk = chunks_of(project, 3)[0]
    flip(repo_of(project).store.path(chunk))
    project.run("verify", "--repair", code=5)
    project.run("verify", code=5)


def test_strays_are_told_but_are_no_failure(project: Project) -> None:
    (project.root / ".castore" / "objects" / "\x1b[31mnotes").write_text("x")
    out = project.run("verify")
    assert out.startswith("stray")
    assert "\x1b" not in out
    assert "1 finding, 0 to be mended" in out
    assert project.json("verify")["findings"][0]["harmless"] is True


def test_dropped_data_is_no_finding_unless_it_is_named(project: Project) -> None:
    project.run("gc", "--keep", "1", "--keep-latest", "0", "--keep-optimizer", "0")
    project.run("verify")
    project.run("verify", by_step(project, 1), code=5)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["verify", "0123"], 3, "no checkpoint '0123'"),
        (["verify", "nowhere:best"], 3, "no checkpoint"),
        (["diff", "0123", "best"], 3, "no checkpoint '0123'"),
        (["diff", "best"], 2, "Missing argument 'B'"),
        (["-C", "/", "verify"], 2, "no .castore/ in"),
        (["-C", "/", "stats"], 2, "no .castore/ in"),
        (["-C", "/", "diff", "a", "b"], 2, "no .castore/ in"),
        (["-C", "/", "doctor"], 2, "no .castore/ in"),
        (["verify", "--repairs"], 2, "--repair"),
    ],
)
def test_wrong_calls_have_their_codes(made: Project, arguments: list[str], code: int, says: str) -> None:
    assert says in made.run(*arguments, code=code)


def has_open(pid: int, path: Path) -> bool:
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(one) == str(path):
                return True
    return False


def test_a_terminal_gets_a_bar_when_it_takes_long(project: Project) -> None:
    """Here because the lock is held for more than two seconds after the program wanted it."""
    lock = project.root / ".castore" / "lock"
    ours, theirs = pty.openpty()
    project.environment = project.environment | {"TERM": "xterm"}
    with fs.lock(lock, exclusive=True, timeout=1):
        process = project.start("verify", stderr=theirs)
        while not has_open(process.pid, lock):
            time.sleep(0.01)
        time.sleep(2.1)
    os.close(theirs)
    out, _ = process.communicate()
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "verify" in shown
    assert "━" in shown
    assert re.fullmatch(r"verify  \d+\.\d MB read: all is well\n", out)


# -- a remote in the other commands ----------------------------------------------------------------------------------


def test_data_in_a_remote_is_available_and_fetched_when_it_is_loaded(project: Project) -> None:
    set_remote(project)
    shutil.rmtree(project.root / ".castore" / "objects")
    assert {part["where"] for entry in project.json("log") for part in entry["parts"].values()} == {"remote"}
    assert project.json("resolve")["match"]["availability"] == "full"
    script = "import castore; repo = castore.Repo.open('.'); repo.load('best')"
    subprocess.run([sys.executable, "-c", script], cwd=project.root, check=True)
    assert [
        {part["where"] for part in entry["parts"].values()} == {"local"} for entry in project.json("log")
    ] == [True, False, False, False]  # fmt: skip


def test_wrong_remotes_are_a_usage_error(project: Project) -> None:
    config = project.root / ".castore" / "config.toml"
    for text in ('[remotes]\n"a b" = "x"\n', '[remotes]\na = ""\n', "[remotes]\na = 3\n", "remotes = 1\n"):
        config.write_text(text)
        assert "config.toml: " in project.run("log", code=2)


# -- stats -----------------------------------------------------------------------------------------------------------


def test_stats_add_up(project: Project) -> None:
    found = project.json("stats")
    size = sum(path.stat().st_size for path in (project.root / ".castore" / "objects").rglob("*") if path.is_file())
    total = found["total"]
    assert found["objects"]["bytes"] == total["stored"] == size
    assert total["raw"] - total["saved_by_sharing"] - total["saved_by_compression"] == size
    assert found["availability"] == {"full": 4}
    assert set(found["by_part"]) == {"model", "optimizer", "trainer"}
    assert {name: one["parts"] for name, one in found["by_run"].items()} == {"main": 9, "side": 3}
    out = project.run("stats")
    assert out.startswith("manifests   4 checkpoint; checkpoints: 4 full\n")
    for text in ("raw ", "sharing ", "compression ", "stored ", "quarantine/ 0 files, 0 B", "optimizer  4", "side  3"):
        assert text in out


def test_stats_say_what_gc_would_free(project: Project) -> None:
    with open(project.root / ".castore" / "config.toml", "a") as file:
        file.write("[retention]\nkeep = 1\nkeep_latest = 0\nkeep_optimizer = 0\n")
    expected = project.json("stats")["gc"]
    assert expected["bytes"] > 0
    assert project.json("gc")["freed_bytes"] == expected["bytes"]
    assert project.json("stats")["gc"] == {"objects": 0, "bytes": 0, "problem": ""}


def test_stats_say_why_gc_can_not_plan(project: Project) -> None:
    (project.root / ".git" / "HEAD").write_text("nonsense")
    out = project.run("stats")
    assert "can't be told what is still needed: git" in out
    assert "stored" in out


# -- diff ------------------------------------------------------------------------------------------------------------


def test_diff_says_what_changed(made: Project) -> None:
    out = made.run("diff", by_step(made, 2), by_step(made, 3))
    lines = out.splitlines()
    assert "step: 2 -> 3" in lines
    assert any(line.startswith("config.rate: 0.2 -> 0.3") for line in lines)
    assert any(line.startswith("metrics.val_loss: 2.0 -> 1.33") for line in lines)
    assert "model: changed (tensors: 4 changed)" in lines
    assert any(re.fullmatch(r"  changed big  float32 \[50000\]  by at most [01]\.\d+", line) for line in lines)
    assert "  seed: 2 -> 3" in lines
    assert made.run("diff", "main:best", "main:best") == "model: equal\noptimizer: equal\ntrainer: equal\n"


def test_diff_prints_data(made: Project) -> None:
    found = made.json("diff", by_step(made, 1), by_step(made, 4))
    assert {one["key"]: (one["before"], one["after"]) for one in found["config"]} == {"rate": (0.1, 0.4)}
    model = found["parts"]["model"]
    assert model["state"] == "changed"
    assert {one["key"] for one in model["tensors"]} == {"big", "small", "tied", "step"}
    assert found["parts"]["trainer"]["values"] == [{"key": "seed", "before": 1, "after": 4}]


def test_diff_of_dropped_data_still_compares_what_is_known(project: Project) -> None:
    first, last = by_step(project, 1), by_step(project, 4)
    project.run("gc", "--keep", "1", "--keep-latest", "0", "--keep-optimizer", "0")
    out = project.run("diff", first, last)
    assert f"model: can't be compared: the data of {first[:12]} is not in the store" in out
    assert "step: 1 -> 4" in out


@pytest.mark.parametrize(("lost", "code"), [(True, 4), (False, 5)])
def test_diff_of_damaged_data_has_its_code(project: Project, lost: bool, code: int) -> None:
    path = repo_of(project).store.path(chunks_of(project, 3)[0])
    path.unlink() if lost else flip(path)
    assert f"part 'model' of checkpoint {by_step(project, 3)[:12]}" in project.run(
        "diff", by_step(project, 2), by_step(project, 3), code=code
    )


def test_diff_shows_any_value_safely(project: Project) -> None:
    values: list[dict[str, Any]] = [
        {"text": "\x1b[2J", "big": 1 << 20_000, "bytes": b"\0" * 1000, "x": float("nan"), "c": 1j},
        {"text": "\n\u202e", "big": -(1 << 20_000), "bytes": b"\1", "x": float("inf"), "c": 2j, "t": torch.ones(2)},
    ]
    ids = [repo_of(project).save({"trainer": one}, run="odd", step=i).id for i, one in enumerate(values)]
    out = project.run("diff", *ids)
    assert all(line.isprintable() for line in out.splitlines())
    assert "big: an integer of 20001 bits" in out
    assert "  added   t  float32 [2]" in out
    found = project.json("diff", *ids)["parts"]["trainer"]["values"]
    assert {one["key"] for one in found} == set(values[0])


def test_diff_tells_containers_apart_and_small_changes_of_large_integers(project: Project) -> None:
    values: list[dict[str, Any]] = [
        {"betas": [1, 2], "n": torch.tensor([2**62]), "z": torch.tensor([0.0])},
        {"betas": (1, 2), "n": torch.tensor([2**62 + 1]), "z": torch.tensor([-0.0])},
    ]
    ids = [repo_of(project).save({"trainer": one}, run="odd", step=i).id for i, one in enumerate(values)]
    out = project.run("diff", *ids)
    assert "  betas: list -> tuple\n" in out
    assert "  changed n  int64 [1]  by at most 2.17e-19\n" in out
    assert "the sign of a zero" in out
    assert "by at most 0" not in out
    (value,) = project.json("diff", *ids)["parts"]["trainer"]["values"]
    assert value == {"key": "betas", "before": "list", "after": "tuple"}


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_finds_no_problem_in_a_healthy_project(project: Project) -> None:
    found = project.json("doctor")
    assert found["ok"] is True
    assert {check["level"] for check in found["checks"]} <= {"ok", "warning"}
    assert re.search(r"^ok +git: \d+ files of .castore committed$", project.run("doctor"), re.MULTILINE)


@pytest.mark.parametrize("trouble", ["settings", "manifest", "ignored", "tracked"])
def test_doctor_exits_1_with_a_problem_and_says_what_to_do(project: Project, trouble: str) -> None:
    folder = project.root / ".castore"
    match trouble:
        case "settings":
            (folder / "config.toml").write_text("threads = ")
        case "manifest":
            next((folder / "manifests").glob("*/*.json")).write_text("{}")
        case "ignored":
            project.git("rm", "-r", "-q", "--cached", ".castore")
            (project.root / ".gitignore").write_text(".castore\n")
        case "tracked":
            project.git("add", "-f", ".castore/objects")
    process = project.start("doctor")
    out, err = process.communicate()
    assert (process.returncode, err) == (1, "")
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("problem"))
    assert re.match(r" {8}\w", lines[at + 1])
    assert json.loads(project.start("doctor", "--json").communicate()[0])["ok"] is False


# -- log --graph -----------------------------------------------------------------------------------------------------


def test_log_draws_which_was_resumed_from_which(made: Project) -> None:
    ids = {step: by_step(made, step)[:12] for step in (1, 2, 3, 4)}
    assert made.run("log", "--graph").splitlines() == [
        f"* {ids[3]}  main, step 3  val loss 1.3333  full  nice",
        f"* {ids[2]}  main, step 2  val loss 2.0000  full",
        f"| * {ids[4]}  side, step 4  val loss 1.0000  full",
        "|/",
        f"* {ids[1]}  main, step 1  val loss 4.0000  full",
    ]


def test_log_draws_what_was_asked_for_and_says_where_it_comes_from(made: Project) -> None:
    own, parent = by_step(made, 4)[:12], by_step(made, 1)[:12]
    assert made.run("log", "--graph", "--run", "side") == (
        f"* {own}  side, step 4  val loss 1.0000  full  from {parent}, which isn't listed\n"
    )
    assert made.json("log", "--graph") == made.json("log")


# -- gc, pin, unpin, forget ------------------------------------------------------------------------------------------


def test_gc_says_what_goes_and_why_and_a_dry_run_touches_nothing(project: Project) -> None:
    keep = ("gc", "--keep", "1", "--keep-latest", "1", "--keep-optimizer", "0")
    before = tree(project.root)
    told = project.run(*keep, "--dry-run")
    assert tree(project.root) == before
    last = by_step(project, 4)[:12]
    assert re.search(rf"^keep    {last}, step 4 of side, .*: the best, the newest$", told, re.MULTILINE)
    assert (
        len(
            re.findall(
                r"^drop    [0-9a-f]{12}, step [123] of main: number [234] of its experiment, 1 are kept$", told, re.M
            )
        )
        == 3
    )
    assert re.search(r"^gc      \d+ objects, [\d.]+ MB would go; [\d.]+ kB kept$", told, re.MULTILINE)
    assert project.run(*keep) == told.replace("would go", "deleted")
    states = {entry["step"]: entry["availability"] for entry in project.json("log")}
    assert states == {1: "history", 2: "history", 3: "history", 4: "full"}


def test_gc_prints_data_and_frees_what_it_says(project: Project) -> None:
    size = project.json("stats")["objects"]["bytes"]
    found = project.json("gc", "--keep", "2", "--keep-optimizer", "1", "--grace", "0")
    assert found["dry_run"] is False
    assert project.json("stats")["objects"]["bytes"] == size - found["freed_bytes"] == found["kept_bytes"]
    kept = {one["step"]: one["keep"] for one in found["checkpoints"]}
    assert kept == {1: [], 2: [], 3: ["model"], 4: ["model", "optimizer", "trainer"]}


def test_gc_evicts_to_fit_a_size(project: Project) -> None:
    project.run("gc", "--max-size", "1kB")
    assert [entry["step"] for entry in project.json("log") if entry["availability"] != "history"] == [4]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "-1"], "--keep"),
        (["--max-size", "many"], "'many' is not a size"),
        (["--grace", "3"], "'3' is not a duration"),
    ],
)
def test_gc_refuses_what_makes_no_sense(made: Project, arguments: list[str], says: str) -> None:
    assert says in made.run("gc", *arguments, code=2)


@pytest.mark.parametrize(("trouble", "code"), [("manifest", 5), ("git", 4), ("lock", 6)])
def test_gc_that_can_not_know_deletes_nothing(project: Project, trouble: str, code: int) -> None:
    if trouble == "manifest":
        next((project.root / ".castore" / "manifests").glob("*/*.json")).write_text("{}")
    if trouble == "git":
        (project.root / ".git" / "HEAD").write_text("nonsense")
    before = tree(project.root / ".castore" / "objects")
    (project.root / ".castore" / "config.toml").write_text(SETTINGS.replace("5.0", "0.1"))
    with contextlib.ExitStack() as stack:
        if trouble == "lock":
            stack.enter_context(fs.lock(project.root / ".castore" / "lock", exclusive=False, timeout=1))
        project.run("gc", "--keep", "0", "--grace", "0", code=code)
    assert tree(project.root / ".castore" / "objects") == before


def test_a_pin_keeps_a_checkpoint_until_it_is_taken_back(project: Project) -> None:
    first = by_step(project, 1)
    assert project.json("pin", first[:9])["id"] == first
    gc = ("gc", "--keep", "1", "--keep-optimizer", "1")
    kept = {one["step"]: one["keep"] for one in project.json(*gc)["checkpoints"]}
    assert kept[1] == ["model", "optimizer", "trainer"]
    assert kept[2] == []
    project.run("unpin", first)
    assert {one["step"]: one["keep"] for one in project.json(*gc)["checkpoints"]}[1] == []
    assert "isn't pinned" in project.run("unpin", first, code=3)
    project.run("pin", "0123", code=3)


def test_forgetting_leaves_the_data_to_gc(project: Project) -> None:
    gc = ("gc", "--keep-optimizer", "10", "--grace", "0")
    first = by_step(project, 1)
    path = Path(project.json("forget", first)["path"])
    assert not path.exists()
    # the index of git and its branch still have it
    assert project.json(*gc)["deleted"] == []
    project.git("add", "-A")
    project.git("commit", "-q", "-m", "forget")
    project.git("reflog", "expire", "--expire=all", "--all")
    assert project.json(*gc)["freed_bytes"] > 0
    project.run("show", first, code=3)
    project.run("forget", first, code=3)


# -- start-up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["stats"], ["doctor"], ["log", "--graph"], ["verify", "--help"], ["diff", "best", "best"]]
)
def test_looking_imports_neither_torch_nor_numpy(made: Project, arguments: list[str]) -> None:
    code = "import sys, cli\ntry: cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=made.root, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy"} & set(done.stderr.split())
