"""The commands that look and change nothing: log, show, resolve, diff, stats."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from project import Project, read_terminal
from stores import by_step, chunks_of, flip, repo_of, set_remote

from castore import Repo

# -- log --------------------------------------------------------------------------------------------------------------


def test_log_lists_newest_first_with_all_that_programs_need(trained: Project) -> None:
    new, old = trained.json("log")
    assert (new["step"], old["step"], new["run"], new["parent"], old["parent"]) == (4, 2, "main", old["id"], None)
    assert new["tags"] == ["nice"]
    assert 0 < old["score"] < new["score"] < 1
    assert new["metrics"]["val_loss"] > 0
    assert new["availability"] == "full"
    assert set(new["parts"]) == {"model", "optimizer", "trainer"}
    assert all(len(part["index"]) == 64 and part["stored_bytes"] > 0 for part in new["parts"].values())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", new["created"])


HEADS = ["id", "run", "step", "score", "val", "loss", "data", "size", "age", "tags"]


def test_log_prints_a_table_from_any_subfolder(trained: Project) -> None:
    inside = trained.call("log", cwd=trained.root / "texts")
    assert inside.splitlines()[0].split() == HEADS
    assert len(trained.call("-C", "texts", "log", "-n", "1").splitlines()) == 2
    assert trained.call("log", "--run", "other") == "no checkpoint of run other\n"


def test_a_broken_manifest_is_told_and_hides_no_other(trained_copy: Project) -> None:
    broken = trained_copy.root / ".castore" / "manifests" / "main" / "000000009-0123456789ab.json"
    broken.write_text("{}")
    process = trained_copy.start("log")
    out, err = process.communicate()
    assert process.returncode == 0
    assert str(broken) in err
    assert out.count("full") == 2
    assert broken.read_text() == "{}"


def test_log_shows_the_newest_and_says_how_many_are_older(eight: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.commands.log._ROWS", 3)
    ids = [entry["id"] for entry in eight.json("log")]  # programs get all
    *rows, last = eight.call("log").splitlines()
    assert [row[:12] for row in rows[1:]] == [checkpoint_id[:12] for checkpoint_id in ids[:3]]
    assert last == f"and {len(ids) - 3} older: `castore log -n 0` lists all"
    assert len(eight.call("log", "-n", "0").splitlines()) == len(ids) + 1
    assert len(eight.call("log", "-n", "5").splitlines()) == 6
    assert len(eight.json("log", "-n", "2")) == 2


def test_log_of_another_kind_is_empty_in_words(empty: Project) -> None:
    assert empty.call("log", "--kind", "files") == "no manifest of kind files yet\n"
    assert empty.json("log", "--kind", "dataset") == []
    assert "--kind" in empty.call("log", "--kind", "nonsense", code=2)


def test_log_marks_the_best_and_what_is_pinned(history_copy: Project) -> None:
    history_copy.call("pin", by_step(history_copy, 3))
    rows = {row.split()[2]: row for row in history_copy.call("log").splitlines()[1:]}
    assert rows["4"].endswith("  (best)")
    assert rows["3"].endswith("  (pinned) nice")
    assert "(" not in rows["1"] + rows["2"]


def test_log_shows_sorts_and_filters_by_any_name(history: Project) -> None:
    head, *rows = history.call("log", "--columns", "step,rate, val_loss,parent", "--sort", "-rate").splitlines()
    assert head.split() == ["step", "rate", "val", "loss", "parent"]
    assert [row.split()[:3] for row in rows] == [
        ["4", "0.4000", "1.0000"], ["3", "0.3000", "1.3333"], ["2", "0.2000", "2.0000"], ["1", "0.1000", "4.0000"],
    ]  # fmt: skip
    assert rows[0].split()[3] == by_step(history, 1)[:12]
    found = history.json("log", "--filter", "run=main and val_loss<3", "--sort", "step")
    assert [one["step"] for one in found] == [2, 3]
    assert history.call("log", "--filter", "run=x*") == "nothing for which run=x* holds\n"
    for arguments in (["--filter", "los<3"], ["--columns", "id,los"], ["--sort", "los"]):
        assert "nothing here has a 'los'" in history.call("log", *arguments, code=2)


def test_log_of_checkpoints_without_a_validation_loss(empty: Project) -> None:
    repo_of(empty).save({"model": {"x": 1}}, run="r", step=1)
    assert empty.call("log").split("\n")[0].split() == ["id", "run", "step", "score", "data", "size", "age", "tags"]
    assert "nothing here has a 'val_loss'" in empty.call("log", "--columns", "id,val_loss", code=2)


def test_what_has_no_data_is_one_line_of_the_log(history_copy: Project) -> None:
    history_copy.call("gc", "--keep", "1", "--keep-latest", "0", "--keep-optimizer", "0")
    gone = [one for one in history_copy.json("log") if one["availability"] == "history"]
    assert len(gone) >= 2
    *rows, last = history_copy.call("log").splitlines()
    assert len(rows) == 1 + 4 - len(gone)
    assert last.startswith(f"history  {len(gone)} checkpoints of run main whose data isn't available, best val loss ")
    whole = history_copy.call("log", "--history").splitlines()
    assert len(whole) == 5
    assert sum(" history " in row for row in whole) == len(gone)
    assert len(history_copy.call("log", "--filter", "data=history").splitlines()) == 1 + len(gone)
    shutil.rmtree(history_copy.root / ".castore" / "objects")
    assert history_copy.call("log").startswith("history  4 checkpoints of 2 runs whose data")


@pytest.mark.parametrize(
    ("columns", "heads"),
    [(100, "id run step score val loss data size age tags"), (60, "id run step val loss data age tags"),
     (40, "id step val loss tags"), (15, "id")],
)  # fmt: skip
def test_log_fits_the_terminal_and_has_colours_if_wanted(history: Project, columns: int, heads: str) -> None:
    def shown(**environment: str) -> str:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        values = {name: value for name, value in history.environment.items() if name not in ("COLUMNS", "NO_COLOR")}
        process = history.start("log", stdout=theirs, stderr=theirs, env={**values, "TERM": "xterm", **environment})
        os.close(theirs)
        text = read_terminal(ours).replace("\r\n", "\n")
        assert process.wait() == 0
        return text

    coloured, plain = shown(), shown(NO_COLOR="1")
    ages = r" +\d+ (s|min)"
    assert re.sub(ages, "", re.sub(r"\x1b\[\d+m", "", coloured)) == re.sub(ages, "", plain)
    assert "\x1b[1mid" in coloured
    assert "\x1b" not in plain
    assert plain.splitlines()[0].split() == heads.split()
    assert all(len(line) <= columns for line in plain.splitlines())


def test_log_draws_which_was_resumed_from_which(history: Project) -> None:
    ids = {step: by_step(history, step)[:12] for step in (1, 2, 3, 4)}
    assert history.call("log", "--graph").splitlines() == [
        f"* {ids[3]}  main, step 3  val loss 1.3333  full  nice",
        f"* {ids[2]}  main, step 2  val loss 2.0000  full",
        f"| * {ids[4]}  side, step 4  val loss 1.0000  full",
        "|/",
        f"* {ids[1]}  main, step 1  val loss 4.0000  full",
    ]


def test_log_draws_what_was_asked_for_and_says_where_it_comes_from(history: Project) -> None:
    checkpoint_id, parent = by_step(history, 4)[:12], by_step(history, 1)[:12]
    assert history.call("log", "--graph", "--run", "side") == (
        f"* {checkpoint_id}  side, step 4  val loss 1.0000  full  from {parent}, which isn't listed\n"
    )
    assert history.json("log", "--graph") == history.json("log")


def test_data_in_a_remote_is_available_and_fetched_when_it_is_loaded(history_copy: Project) -> None:
    set_remote(history_copy)
    shutil.rmtree(history_copy.root / ".castore" / "objects")
    assert {part["where"] for entry in history_copy.json("log") for part in entry["parts"].values()} == {"remote"}
    assert history_copy.json("resolve")["match"]["availability"] == "full"
    script = "import castore; repo = castore.Repo.open('.'); repo.load('best')"
    subprocess.run([sys.executable, "-c", script], cwd=history_copy.root, check=True)
    assert [
        {part["where"] for part in entry["parts"].values()} == {"local"} for entry in history_copy.json("log")
    ] == [True, False, False, False]  # fmt: skip


# -- show and resolve -------------------------------------------------------------------------------------------------


def test_show_prints_the_whole_manifest(trained: Project) -> None:
    checkpoint_id = trained.json("log")[0]["id"]
    short = trained.call("show", checkpoint_id[:10])
    assert "n_embd: 16" in short
    assert "learning_rate" not in short
    assert re.search(r"^and \d+ lines of config and \d+ lines of info: --all shows them$", short, re.MULTILINE)
    assert "learning_rate: 0.002" in trained.call("show", checkpoint_id, "--config").splitlines()
    out = trained.call("show", checkpoint_id[:10], "--all")
    for text in (
        checkpoint_id,
        "a first try",
        "val_loss",
        "optimizer",
        "n_embd: 16",
        "learning_rate: 0.002",
        "resolution",
    ):
        assert text in out
    assert trained.json("show", checkpoint_id)["experiment"]["model"]["n_embd"] == 16


def test_an_unknown_id_exits_3(trained: Project) -> None:
    assert "no checkpoint '0123'" in trained.call("show", "0123", code=3)


def test_show_begins_with_the_kind(empty: Project) -> None:
    checkpoint_id = empty.json("add", "texts")["id"]
    assert empty.call("show", checkpoint_id).startswith(f"files      {checkpoint_id}\n")


def test_resolve_says_which_and_why_no_other(trained_copy: Project) -> None:
    best = trained_copy.json("resolve")["match"]
    assert best["step"] == 4
    shutil.rmtree(trained_copy.root / ".castore" / "objects")
    found = json.loads(trained_copy.start("resolve", "--json").communicate()[0])
    assert found["match"] is None
    assert [one["step"] for one in found["rejected"]] == [4, 2]
    assert found["rejected"][0]["unavailable"] is True


# -- names of checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"), [("best", "a6"), ("latest", "b2"), ("a:best", "a6"), ("a:latest", "a6"), ("b:best", "b2")]
)
@pytest.mark.parametrize("command", ["show", "pin", "resolve"])
def test_names_work_wherever_an_id_does(eight: Project, command: str, name: str, expected: str) -> None:
    ids = {f"{entry['run']}{entry['step']}": entry["id"] for entry in eight.json("log")}
    found = eight.json(command, name)
    assert (found["match"]["id"] if command == "resolve" else found["id"]) == ids[expected]


def test_best_is_the_best_that_is_there(eight: Project) -> None:
    best = eight.json("show", "best")
    for part in best["parts"].values():
        (eight.root / ".castore" / "objects" / part["index"][:2] / part["index"]).unlink()
    assert eight.json("show", "best")["step"] == 5
    assert eight.json("show", best["id"])["step"] == 6


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("0000", "no checkpoint '0000'"),
        ("", "no checkpoint ''"),
        ("c:best", "no checkpoint of run 'c'; runs: a, b"),
        ("bset", "bset"),
    ],
)
def test_a_name_of_nothing_exits_3(eight: Project, wanted: str, says: str) -> None:
    assert says in eight.call("show", wanted, code=3)


def test_a_near_miss_is_told_what_fits_and_three_digits_are_too_few(eight: Project) -> None:
    checkpoint_id = eight.json("log")[0]["id"]
    wrong = checkpoint_id[:7] + ("0" if checkpoint_id[7] != "0" else "1")
    assert f"did you mean {checkpoint_id[:8]}" in eight.call("show", wrong, code=3)
    assert "too short for an id: give at least 4 digits" in eight.call("show", checkpoint_id[:3], code=2)


# -- diff -------------------------------------------------------------------------------------------------------------


def test_diff_says_what_changed(history: Project) -> None:
    out = history.call("diff", by_step(history, 2), by_step(history, 3))
    lines = out.splitlines()
    assert "step: 2 -> 3" in lines
    assert any(line.startswith("config.rate: 0.2 -> 0.3") for line in lines)
    assert any(line.startswith("metrics.val_loss: 2.0 -> 1.33") for line in lines)
    assert "model: changed (tensors: 4 changed)" in lines
    assert any(re.fullmatch(r"  changed big  float32 \[50000\]  by at most [01]\.\d+", line) for line in lines)
    assert "  seed: 2 -> 3" in lines
    assert history.call("diff", "main:best", "main:best") == "model: equal\noptimizer: equal\ntrainer: equal\n"


def test_diff_shows_what_moved_most_and_all_on_request(empty: Project) -> None:
    repo = repo_of(empty)
    for i in range(2):
        model = {f"layer.{n}": torch.tensor([1.0, 1.0 + i * n / 100]) for n in range(9)}
        repo.save({"model": model, "trainer": {"seed": i}}, run="r", step=i, config={"rate": i})
    first, last = (by_step(empty, i) for i in range(2))
    changes = [line for line in empty.call("diff", first, last).splitlines() if line.startswith("  ")]
    assert [line.split()[:2] for line in changes[:5]] == [["changed", f"layer.{n}"] for n in (8, 7, 6, 5, 4)]
    assert changes[5:] == ["  and 3 more: --all shows them", "  seed: 0 -> 1"]
    whole = empty.call("diff", first, last, "--all")
    assert all(f"  changed layer.{n}  " in whole for n in range(1, 9))
    assert "more" not in whole
    one = empty.call("diff", first, last, "--part", "model")
    assert one.count("  changed layer.") == 8
    assert "trainer" not in one
    assert "neither has a part 'modle'; parts: model, trainer" in empty.call(
        "diff", first, last, "--part", "modle", code=3
    )
    settings = empty.call("diff", first, last, "--config").splitlines()
    assert {"config.rate: 0 -> 1", "step: 0 -> 1"} <= {*settings}
    assert not any(line.startswith(("model", "trainer", " ")) for line in settings)
    assert empty.call("diff", first, first, "--config") == "nothing differs\n"
    assert "choose one" in empty.call("diff", first, last, "--config", "--part", "model", code=2)


def test_diff_prints_data(history: Project) -> None:
    found = history.json("diff", by_step(history, 1), by_step(history, 4))
    assert {one["key"]: (one["before"], one["after"]) for one in found["config"]} == {"rate": (0.1, 0.4)}
    model = found["parts"]["model"]
    assert model["state"] == "changed"
    assert {one["key"] for one in model["tensors"]} == {"big", "small", "tied", "step"}
    assert found["parts"]["trainer"]["values"] == [{"key": "seed", "before": 1, "after": 4}]


def test_diff_of_dropped_data_still_compares_what_is_known(history_copy: Project) -> None:
    first, last = by_step(history_copy, 1), by_step(history_copy, 4)
    history_copy.call("gc", "--keep", "1", "--keep-latest", "0", "--keep-optimizer", "0")
    out = history_copy.call("diff", first, last)
    assert f"model: can't be compared: the data of {first[:12]} is not in the store" in out
    assert "step: 1 -> 4" in out


@pytest.mark.parametrize(("lost", "code"), [(True, 4), (False, 5)])
def test_diff_of_damaged_data_has_its_code(history_copy: Project, lost: bool, code: int) -> None:
    path = repo_of(history_copy).store.path(chunks_of(history_copy, 3)[0])
    path.unlink() if lost else flip(path)
    assert f"part 'model' of checkpoint {by_step(history_copy, 3)[:12]}" in history_copy.call(
        "diff", by_step(history_copy, 2), by_step(history_copy, 3), code=code
    )


def test_diff_shows_any_value_safely(history_copy: Project) -> None:
    values: list[dict[str, Any]] = [
        {"text": "\x1b[2J", "big": 1 << 20_000, "bytes": b"\0" * 1000, "x": float("nan"), "c": 1j},
        {"text": "\n\u202e", "big": -(1 << 20_000), "bytes": b"\1", "x": float("inf"), "c": 2j, "t": torch.ones(2)},
    ]
    ids = [repo_of(history_copy).save({"trainer": one}, run="odd", step=i).id for i, one in enumerate(values)]
    out = history_copy.call("diff", *ids)
    assert all(line.isprintable() for line in out.splitlines())
    assert "big: an integer of 20001 bits" in out
    assert "  added   t  float32 [2]" in out
    found = history_copy.json("diff", *ids)["parts"]["trainer"]["values"]
    assert {one["key"] for one in found} == set(values[0])


def test_diff_tells_containers_apart_and_small_changes_of_large_integers(history_copy: Project) -> None:
    values: list[dict[str, Any]] = [
        {"betas": [1, 2], "n": torch.tensor([2**62]), "z": torch.tensor([0.0])},
        {"betas": (1, 2), "n": torch.tensor([2**62 + 1]), "z": torch.tensor([-0.0])},
    ]
    ids = [repo_of(history_copy).save({"trainer": one}, run="odd", step=i).id for i, one in enumerate(values)]
    out = history_copy.call("diff", *ids)
    assert "  betas: list -> tuple\n" in out
    assert "  changed n  int64 [1]  by at most 2.17e-19\n" in out
    assert "the sign of a zero" in out
    assert "by at most 0" not in out
    (value,) = history_copy.json("diff", *ids)["parts"]["trainer"]["values"]
    assert value == {"key": "betas", "before": "list", "after": "tuple"}


# -- stats ------------------------------------------------------------------------------------------------------------


def test_stats_add_up(history_copy: Project) -> None:
    found = history_copy.json("stats")
    size = sum(
        path.stat().st_size for path in (history_copy.root / ".castore" / "objects").rglob("*") if path.is_file()
    )
    total = found["total"]
    assert found["objects"]["bytes"] == total["stored"] == size
    assert total["raw"] - total["saved_by_sharing"] - total["saved_by_compression"] == size
    assert found["availability"] == {"full": 4}
    assert set(found["by_part"]) == {"model", "optimizer", "trainer"}
    assert {name: one["parts"] for name, one in found["by_run"].items()} == {"main": 9, "side": 3}
    out = history_copy.call("stats")
    assert out.startswith("manifests   4 checkpoint; checkpoints: 4 full\n")
    for text in ("raw ", "sharing ", "compression ", "stored ", "quarantine/ 0 files, 0 B", "optimizer  4", "side  3"):
        assert text in out


def test_stats_say_what_gc_would_free(history_copy: Project) -> None:
    with open(history_copy.root / ".castore" / "config.toml", "a") as file:
        file.write("[retention]\nkeep = 1\nkeep_latest = 0\nkeep_optimizer = 0\n")
    expected = history_copy.json("stats")["gc"]
    assert expected["bytes"] > 0
    assert history_copy.json("gc")["freed_bytes"] == expected["bytes"]
    assert history_copy.json("stats")["gc"] == {"objects": 0, "bytes": 0, "problem": ""}


def test_stats_say_why_gc_can_not_plan(history_copy: Project) -> None:
    (history_copy.root / ".git" / "HEAD").write_text("nonsense")
    out = history_copy.call("stats")
    assert "can't be told what is still needed: git" in out
    assert "stored" in out


def test_names_that_are_not_utf8_are_shown_escaped_everywhere(tmp_path: Path) -> None:
    """A branch, the project's folder and a damaged manifest may be called anything."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\x1b"))
    folder.mkdir()
    project = Project(folder)
    repo = Repo.init(folder)
    repo.save({"model": {"x": 1}}, run="r", step=1, metrics={"val_loss": 1.0})
    project.git("add", "-f", ".castore/manifests")
    project.git("commit", "-qm", "one")
    project.git("checkout", "-q", "-b", os.fsdecode(b"branch-\xe9"))
    repo.save({"model": {"x": 2}}, run="r", step=2, metrics={"val_loss": 0.5})
    project.git("add", "-f", ".castore/manifests")
    project.git("commit", "-qm", "two")
    project.git("checkout", "-q", "-")
    assert "the best on branch-\\udce9" in project.run("gc", "--dry-run")
    for arguments in (["gc", "--dry-run"], ["report"], ["log"], ["stats"], ["doctor"]):
        project.json(*arguments)
    for form in ("html", "md"):
        project.run("report", "--format", form, "-o", "report")
        text = (folder / "report").read_text(encoding="utf-8")
        assert "caf" in text
        assert "\x1b" not in text
    (repo.root / "manifests" / "r" / os.fsdecode(b"\xe9.json")).write_text("{")
    assert "manifests/r/\\udce9.json" in project.json("report")["broken"][0]["path"]
    project.run("report", "-o", "report2.html")
