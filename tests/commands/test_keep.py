"""The commands that decide what is kept: gc, pin, unpin, tag, untag, forget."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest
from builders import tree
from project import Project
from stores import SETTINGS, by_step

from castore import Repo
from castore.storage import fs


def availability(project: Project) -> dict[str, str]:
    return {f"{entry['run']}{entry['step']}": entry["availability"] for entry in project.json("log")}


def stored(project: Project) -> set[str]:
    return {path.name for path in (project.root / ".castore" / "objects").glob("*/*")}


def commit(project: Project) -> None:
    project.git("add", ".castore")
    project.git("commit", "-q", "-m", "x")


# -- gc ---------------------------------------------------------------------------------------------------------------


def test_gc_says_what_goes_what_stays_and_why_and_does_it(eight: Project) -> None:
    planned = eight.call("gc", "--keep", "3", "--keep-optimizer", "1", "--dry-run")
    assert "would be deleted" in planned
    assert set(availability(eight).values()) == {"full"}
    out = eight.call("gc", "--keep", "3", "--keep-optimizer", "1")
    assert out == planned.replace("would be deleted", "deleted")
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert sorted(kind for kind, _ in lines) == ["drop"] * 4 + ["gc"] + ["keep"] * 4
    assert "step 6 of a, model optimizer trainer: the best" in out
    assert "step 4 of a, model: number 3 by score; without its optimizer and trainer" in out
    assert "step 1 of a: number 8 by score in its experiment, of which 3 are kept" in out
    found = availability(eight)
    assert {name for name, state in found.items() if state == "full"} == {"a6", "b2"}
    assert {name for name, state in found.items() if state == "weights-only"} == {"a5", "a4"}
    assert list(found.values()).count("history") == 4


def test_gc_json_has_every_decision(eight: Project) -> None:
    plan = eight.json("gc", "--keep", "1", "--keep-latest", "0")
    assert len(plan["deleted"]) == 21
    assert plan["freed_bytes"] > 0
    assert plan["kept_bytes"] > 0
    assert (plan["dry_run"], plan["young"]) == (False, 0)
    kept = [one for one in plan["checkpoints"] if one["keep"]]
    assert [(one["run"], one["step"], one["reasons"]) for one in kept] == [("a", 6, ["the best"])]
    assert len(plan["checkpoints"]) == 8


def test_gc_follows_the_settings_unless_told_otherwise(eight: Project) -> None:
    config = eight.root / ".castore" / "config.toml"
    config.write_text("[retention]\nkeep = 2\nkeep_latest = 0\n")
    assert len(eight.json("gc", "--keep", "8", "--dry-run")["deleted"]) == 10
    eight.call("gc")
    assert sorted(name for name, state in availability(eight).items() if state == "full") == ["a5", "a6"]


def test_max_size_lets_the_worst_go(eight: Project) -> None:
    eight.call("gc", "--max-size", "1B")
    assert [name for name, state in availability(eight).items() if state != "history"] == ["b2", "a6"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "-1"], "--keep"),
        (["--max-size", "much"], "'much' is not a size"),
        (["--grace", "soon"], "'soon' is not a duration"),
        (["--keep", "many"], "--keep"),
    ],
)
def test_a_wrong_gc_deletes_nothing(eight: Project, arguments: list[str], says: str) -> None:
    before = stored(eight)
    assert says in eight.call("gc", *arguments, code=2)
    assert stored(eight) == before


def test_a_broken_manifest_stops_gc_with_exit_5(eight: Project) -> None:
    broken = eight.root / ".castore" / "manifests" / "a" / "000000009-0123456789ab.json"
    broken.write_text("<<<<<<< HEAD\n{}\n")
    before = stored(eight)
    err = eight.call("gc", "--keep", "1", code=5)
    assert str(broken) in err
    assert "merge conflict markers" in err
    assert "nothing was deleted" in err
    assert stored(eight) == before


def test_a_git_that_fails_stops_gc_with_exit_4(eight: Project) -> None:
    (eight.root / ".git" / "HEAD").write_text("nonsense")
    before = stored(eight)
    assert "nothing was deleted" in eight.call("gc", "--keep", "1", code=4)
    assert stored(eight) == before


def test_manifests_that_are_all_gone_stop_gc(eight: Project) -> None:
    shutil.rmtree(eight.root / ".castore" / "manifests")
    assert "not one manifest" in eight.call("gc", "--grace", "0", code=4)


def test_a_lock_held_by_others_stops_gc_with_exit_6(eight: Project) -> None:
    config = eight.root / ".castore" / "config.toml"
    config.write_text("[store]\nlock_timeout = 0.1\n")
    with Repo.open(eight.root).lock():
        assert "is held by another castore process" in eight.run("gc", code=6)
        eight.run("log")


def test_gc_says_what_goes_and_why_and_a_dry_run_touches_nothing(history_copy: Project) -> None:
    keep = ("gc", "--keep", "1", "--keep-latest", "1", "--keep-optimizer", "0")
    before = tree(history_copy.root)
    told = history_copy.call(*keep, "--dry-run")
    assert tree(history_copy.root) == before
    last = by_step(history_copy, 4)[:12]
    assert re.search(rf"^keep    {last}, step 4 of side, .*: the best, the newest$", told, re.MULTILINE)
    assert (
        len(
            re.findall(
                r"^drop    \w{12}, step [123] of main: number [234] by score in its experiment, of which 1 are kept$",
                told,
                re.M,
            )
        )
        == 3
    )
    assert re.search(r"^gc      \d+ objects, [\d.]+ MB would be deleted; [\d.]+ kB kept$", told, re.MULTILINE)
    assert history_copy.call(*keep) == told.replace("would be deleted", "deleted")
    states = {entry["step"]: entry["availability"] for entry in history_copy.json("log")}
    assert states == {1: "history", 2: "history", 3: "history", 4: "full"}


def test_gc_prints_data_and_frees_what_it_says(history_copy: Project) -> None:
    size = history_copy.json("stats")["objects"]["bytes"]
    found = history_copy.json("gc", "--keep", "2", "--keep-optimizer", "1", "--grace", "0")
    assert found["dry_run"] is False
    assert history_copy.json("stats")["objects"]["bytes"] == size - found["freed_bytes"] == found["kept_bytes"]
    kept = {one["step"]: one["keep"] for one in found["checkpoints"]}
    assert kept == {1: [], 2: [], 3: ["model"], 4: ["model", "optimizer", "trainer"]}


def test_gc_evicts_to_fit_a_size(history_copy: Project) -> None:
    history_copy.call("gc", "--max-size", "1kB")
    assert [entry["step"] for entry in history_copy.json("log") if entry["availability"] != "history"] == [4]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "-1"], "--keep"),
        (["--max-size", "many"], "'many' is not a size"),
        (["--grace", "3"], "'3' is not a duration"),
    ],
)
def test_gc_refuses_what_makes_no_sense(history: Project, arguments: list[str], says: str) -> None:
    assert says in history.call("gc", *arguments, code=2)


@pytest.mark.parametrize(("trouble", "code"), [("manifest", 5), ("git", 4), ("lock", 6)])
def test_gc_that_can_not_know_deletes_nothing(history_copy: Project, trouble: str, code: int) -> None:
    if trouble == "manifest":
        next((history_copy.root / ".castore" / "manifests").glob("*/*.json")).write_text("{}")
    if trouble == "git":
        (history_copy.root / ".git" / "HEAD").write_text("nonsense")
    before = tree(history_copy.root / ".castore" / "objects")
    (history_copy.root / ".castore" / "config.toml").write_text(SETTINGS.replace("5.0", "0.1"))
    with contextlib.ExitStack() as stack:
        if trouble == "lock":
            stack.enter_context(fs.lock(history_copy.root / ".castore" / "lock", exclusive=False, timeout=1))
        history_copy.run("gc", "--keep", "0", "--grace", "0", code=code)
    assert tree(history_copy.root / ".castore" / "objects") == before


# -- pin, unpin and forget --------------------------------------------------------------------------------------------


def test_a_pin_keeps_a_checkpoint_until_it_is_taken_back(eight: Project) -> None:
    worst = next(entry for entry in eight.json("log") if entry["run"] == "a" and entry["step"] == 1)["id"]
    assert f"pinned {worst[:12]}: commit" in eight.call("pin", worst[:8])
    eight.call("pin", worst)  # again, which changes nothing
    assert ".castore/pins/" in eight.git("status", "--porcelain", "--untracked-files=all")
    eight.call("gc", "--keep", "1", "--keep-latest", "0")
    assert availability(eight)["a1"] == "full"
    eight.call("unpin", worst)
    assert "isn't pinned" in eight.call("unpin", worst, code=3)
    eight.call("gc", "--keep", "1", "--keep-latest", "0")
    assert availability(eight)["a1"] == "history"


def test_forget_removes_a_manifest_and_its_data_goes_in_time(eight: Project) -> None:
    best = eight.json("resolve")["match"]["id"]
    assert "isn't in git's last commit" in eight.call("forget", "best", code=2)
    commit(eight)
    path = eight.json("forget", "best")["path"]
    assert not Path(path).exists()
    commit(eight)
    assert "no checkpoint" in eight.call("show", best, code=3)
    everything = ["--keep", "99", "--keep-optimizer", "99"]
    assert eight.json("gc", *everything)["young"] == 3  # another branch may still bring the manifest
    assert len(eight.json("gc", *everything, "--grace", "0")["deleted"]) == 3
    assert set(availability(eight).values()) == {"full"}


def test_forget_takes_force_where_there_is_no_other_copy(eight: Project) -> None:
    shutil.rmtree(eight.root / ".git")
    assert "lose it with --force" in eight.call("forget", "best", code=2)
    assert not Path(eight.json("forget", "best", "--force")["path"]).exists()


def test_a_pinned_checkpoint_is_not_forgotten(eight: Project) -> None:
    commit(eight)
    checkpoint_id = eight.json("pin", "best")["id"]
    assert f"`castore unpin {checkpoint_id[:12]}` first" in eight.call("forget", checkpoint_id, "--force", code=2)
    eight.call("unpin", checkpoint_id)
    eight.call("forget", checkpoint_id)


def test_a_pin_is_taken_back_when_its_manifest_is_gone(eight: Project) -> None:
    checkpoint_id = eight.json("pin", "best")["id"]
    pins = eight.root / ".castore" / "pins"
    twin = checkpoint_id[:20] + ("0" if checkpoint_id[20] != "0" else "1") + checkpoint_id[21:]
    (pins / twin).touch()
    next((eight.root / ".castore" / "manifests" / "a").glob(f"*-{checkpoint_id[:12]}.json")).unlink()
    assert "give more digits" in eight.call("unpin", checkpoint_id[:12], code=3)
    eight.call("unpin", twin)
    assert eight.json("unpin", checkpoint_id[:12]) == {"id": checkpoint_id}
    assert list(pins.iterdir()) == []
    assert "no checkpoint" in eight.call("unpin", checkpoint_id[:12], code=3)


def test_a_pin_keeps_all_parts_until_it_is_taken_back(history_copy: Project) -> None:
    first = by_step(history_copy, 1)
    assert history_copy.json("pin", first[:9])["id"] == first
    gc = ("gc", "--keep", "1", "--keep-optimizer", "1")
    kept = {one["step"]: one["keep"] for one in history_copy.json(*gc)["checkpoints"]}
    assert kept[1] == ["model", "optimizer", "trainer"]
    assert kept[2] == []
    history_copy.call("unpin", first)
    assert {one["step"]: one["keep"] for one in history_copy.json(*gc)["checkpoints"]}[1] == []
    assert "isn't pinned" in history_copy.call("unpin", first, code=3)
    history_copy.call("pin", "0123", code=3)


def test_forgetting_leaves_the_data_to_gc(history_copy: Project) -> None:
    gc = ("gc", "--keep-optimizer", "10", "--grace", "0")
    first = by_step(history_copy, 1)
    path = Path(history_copy.json("forget", first)["path"])
    assert not path.exists()
    # the index of git and its branch still have it
    assert history_copy.json(*gc)["deleted"] == []
    history_copy.git("add", "-A")
    history_copy.git("commit", "-q", "-m", "forget")
    history_copy.git("reflog", "expire", "--expire=all", "--all")
    assert history_copy.json(*gc)["freed_bytes"] > 0
    history_copy.call("show", first, code=3)
    history_copy.call("forget", first, code=3)


def test_a_pin_is_acknowledged_only_where_there_is_data_to_keep(eight: Project) -> None:
    eight.call("gc", "--keep", "1", "--keep-latest", "0")
    dropped = eight.json("log")[0]["id"]
    assert "can't be pinned, as no data of it is left to keep: its data is not in the store" in eight.call(
        "pin", dropped, code=4
    )
    assert not (eight.root / ".castore" / "pins").exists()


def test_a_pin_waits_for_a_gc_that_may_be_deleting_the_data(eight: Project) -> None:
    config = eight.root / ".castore" / "config.toml"
    config.write_text("[store]\nlock_timeout = 0.2\n")
    with Repo.open(eight.root).lock(exclusive=True):
        for command in ("pin", "forget"):
            assert "is held by another castore process" in eight.call(command, "best", code=6)
    checkpoint_id = eight.json("pin", "best")["id"]
    with Repo.open(eight.root).lock(exclusive=True):
        assert "is held by another castore process" in eight.call("unpin", checkpoint_id, code=6)


def test_a_pin_of_what_is_partly_gone_says_what_it_does_not_keep(history_copy: Project) -> None:
    repo = Repo.open(history_copy.root)
    entry = repo.checkpoints()[0]
    repo.store.path(entry.manifest.parts["optimizer"].index).unlink()
    process = history_copy.start("pin", entry.id)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "pinned" in out
    assert f"part optimizer of {entry.id[:12]} is not kept by that: its data is not in the store" in err


# -- tag and untag ----------------------------------------------------------------------------------------------------


def id_of(project: Project, step: int) -> str:
    return str(by_step(project, step))


def test_a_tag_names_a_checkpoint_wherever_an_id_does(eight: Project) -> None:
    first = id_of(eight, 3)
    out = eight.call("tag", first[:12], "release")
    assert out == f"tagged {first[:12]} as release: commit {eight.root / '.castore' / 'tags' / 'release'}\n"
    assert (eight.root / ".castore" / "tags" / "release").read_text() == f"{first}\n"
    assert eight.json("show", "release")["id"] == first
    assert eight.json("resolve", "release")["match"]["id"] == first
    assert eight.call("verify", "release") == eight.call("verify", first)
    eight.call("export", "release", str(eight.root / "out.pt"))
    assert (eight.root / "out.pt").is_file()
    assert eight.call("diff", "release", first) == eight.call("diff", first, first)
    assert eight.call("tag").split() == ["tag", "id", "run", "step", "release", first[:12], "a", "3"]
    assert eight.json("tag") == [{"name": "release", "id": first, "known": True}]


def test_log_finds_what_has_a_tag(eight: Project) -> None:
    first = id_of(eight, 3)
    eight.call("tag", first, "release")
    eight.call("tag", first, "v1.0")
    (entry,) = eight.json("log", "--tag", "release")
    assert (entry["id"], entry["tags"]) == (first, ["release", "v1.0"])
    assert eight.call("log", "--tag", "release").rstrip().endswith("release v1.0")
    assert "release v1.0" in eight.call("log", "--graph")
    assert "release v1.0" in eight.call("show", first)
    assert eight.call("log", "--tag", "relase") == (
        "nothing here has the tag relase: `castore tag` lists those that name something\n"
    )
    assert "did you mean release?" in eight.call("show", "relase", code=3)


def test_what_is_tagged_stays_whole_until_the_tag_is_gone(eight: Project) -> None:
    eight.call("tag", id_of(eight, 3), "release")
    out = eight.call("gc", "--keep", "1", "--keep-latest", "0", "--grace", "0s")
    assert "step 3 of a, model optimizer trainer: tagged release" in out
    assert availability(eight)["a3"] == "full"
    assert "removed the tag release" in eight.call("untag", "release")
    eight.call("gc", "--keep", "1", "--keep-latest", "0", "--grace", "0s")
    assert availability(eight)["a3"] == "history"
    assert "there is no tag 'release'" in eight.call("untag", "release", code=3)


def test_a_tag_moves_only_on_request(eight: Project) -> None:
    first, second = id_of(eight, 3), id_of(eight, 4)
    eight.call("tag", first, "release")
    eight.call("tag", first, "release")
    err = eight.call("tag", second, "release", code=2)
    assert f"tag release names {first[:12]}: --force moves it" in err
    assert eight.json("show", "release")["id"] == first
    eight.call("tag", second, "release", "--force")
    assert eight.json("show", "release")["id"] == second


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["best", "beef"], 2, "the first digits of an id"),
        (["best", "latest"], 2, "a selector"),
        (["best", "../config.toml"], 2, "1 to 64 letters"),
        (["best", "--force", "a/b"], 2, "1 to 64 letters"),
        (["best"], 2, "`castore tag best NAME`"),
        (["nonesuch", "x"], 3, "nonesuch"),
        (["best", "Release"], 2, "differs from tag release in case alone"),
    ],
)
def test_what_makes_no_tag_is_refused(eight: Project, arguments: list[str], code: int, says: str) -> None:
    eight.call("tag", "best", "release")
    before = tree(eight.root / ".castore")
    assert says in eight.call("tag", *arguments, code=code)
    assert tree(eight.root / ".castore") == before


def test_a_tagged_checkpoint_is_not_forgotten(eight: Project) -> None:
    eight.call("tag", id_of(eight, 3), "release")
    assert "is tagged: `castore untag release` first" in eight.call("forget", "release", "--force", code=2)


def test_a_tag_whose_checkpoint_is_not_here_says_so(eight: Project) -> None:
    first = id_of(eight, 3)
    eight.call("tag", first, "release")
    (path,) = (eight.root / ".castore" / "manifests").glob(f"*/*-{first[:12]}.json")
    path.unlink()
    assert f"tag release names {first[:12]}, whose manifest isn't here" in eight.call("show", "release", code=3)
    assert "its manifest isn't here" in eight.call("tag")
    assert f"release names {first[:12]}, which isn't here" in eight.call("doctor")
    eight.call("untag", "release")


@pytest.mark.parametrize("how", ["text", "link", "pipe", "large"])
def test_a_damaged_tag_is_told_stops_gc_and_can_be_set_again(eight: Project, how: str) -> None:
    eight.call("tag", "best", "release")
    path = eight.root / ".castore" / "tags" / "release"
    path.unlink()
    if how == "link":
        path.symlink_to("/dev/zero")
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("x" * (10 if how == "text" else 1_000_000))
    eight.run("show", "release", code=5 if how in ("text", "link") else 1)
    eight.run("gc", code=5)
    assert str(path) in eight.start("doctor").communicate()[0]
    assert len(eight.json("log")) == 8
    eight.call("tag", "best", "release", "--force")
    eight.run("gc")


def test_what_has_no_data_left_is_not_tagged(eight: Project) -> None:
    shutil.rmtree(eight.root / ".castore" / "objects")
    err = eight.call("tag", id_of(eight, 3), "release", code=4)
    assert "can't be tagged, as no data of it is left to keep" in err
    assert eight.json("tag") == []
