"""The commands that tell whether all is well: verify, doctor."""

from __future__ import annotations

import json
import re

import pytest
from builders import tree
from project import Project
from stores import by_step, chunks_of, flip, repo_of, set_remote

# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_of_a_whole_store_says_how_much_it_read(history: Project) -> None:
    size = sum(path.stat().st_size for path in (history.root / ".castore" / "objects").rglob("*") if path.is_file())
    assert re.fullmatch(r"verify  \d+\.\d MB read: all is well\n", history.call("verify"))
    assert history.json("verify") == {"ok": True, "bytes": size, "findings": []}
    assert history.json("verify", "main:best")["bytes"] < size / 2


def test_verify_exits_5_and_names_what_is_damaged_and_who_needs_it(history_copy: Project) -> None:
    checkpoint_id, chunk = by_step(history_copy, 3), chunks_of(history_copy, 3)[0]
    flip(repo_of(history_copy).store.path(chunk))
    before = tree(history_copy.root)
    out, err = history_copy.start("verify").communicate()
    assert out.splitlines()[0].startswith(f"damaged object {chunk[:12]}: ")
    assert f"needed by model of {checkpoint_id[:12]}" in out
    assert "1 finding, 1 to repair" in out
    assert err == ""
    history_copy.run("verify", code=5)
    history_copy.run("verify", checkpoint_id, code=5)
    history_copy.run("verify", by_step(history_copy, 1))
    assert tree(history_copy.root) == before


def test_verify_prints_findings_as_data(history_copy: Project) -> None:
    checkpoint_id, chunk = by_step(history_copy, 3), chunks_of(history_copy, 3)[0]
    path = repo_of(history_copy).store.path(chunk)
    path.unlink()
    process = history_copy.start("verify", "--json")
    found = json.loads(process.communicate()[0])
    assert process.returncode == 5
    assert found["ok"] is False
    assert found["findings"] == [
        {
            "kind": "missing", "reason": "not in the store", "path": str(path), "object_id": chunk, "harmless": False,
            "needed_by": [{"checkpoint_id": checkpoint_id, "part": "model"}], "repaired_from": "",
        }
    ]  # fmt: skip


def test_verify_repairs_from_a_remote_and_then_exits_0(history_copy: Project) -> None:
    set_remote(history_copy)
    damaged, missing = chunks_of(history_copy, 3)[:2]
    store = repo_of(history_copy).store
    flip(store.path(damaged))
    store.path(missing).unlink()
    history_copy.call("verify", code=5)
    out = history_copy.call("verify", "--repair")
    assert out.count("repaired: a good copy came from shared") == 2
    assert "2 findings, 0 to repair" in out
    assert history_copy.json("verify")["findings"] == []
    assert [path.name[:64] for path in store.quarantine.iterdir()] == [damaged]


def test_verify_that_can_not_repair_exits_5(history_copy: Project) -> None:
    chunk = chunks_of(history_copy, 3)[0]
    flip(repo_of(history_copy).store.path(chunk))
    history_copy.call("verify", "--repair", code=5)
    history_copy.call("verify", code=5)


def test_strays_are_told_but_are_no_failure(history_copy: Project) -> None:
    (history_copy.root / ".castore" / "objects" / "\x1b[31mnotes").write_text("x")
    out = history_copy.call("verify")
    assert out.startswith("stray")
    assert "\x1b" not in out
    assert "1 finding, 0 to repair" in out
    assert history_copy.json("verify")["findings"][0]["harmless"] is True


def test_dropped_data_is_no_finding_unless_it_is_named(history_copy: Project) -> None:
    history_copy.call("gc", "--keep", "1", "--keep-latest", "0", "--keep-optimizer", "0")
    history_copy.call("verify")
    history_copy.call("verify", by_step(history_copy, 1), code=5)


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
def test_wrong_calls_have_their_codes(history: Project, arguments: list[str], code: int, says: str) -> None:
    assert says in history.call(*arguments, code=code)


# -- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_finds_no_problem_in_a_healthy_project(history_copy: Project) -> None:
    found = history_copy.json("doctor")
    assert found["ok"] is True
    assert {check["level"] for check in found["checks"]} <= {"ok", "warning"}
    assert re.search(r"^ok +git: \d+ files of .castore committed$", history_copy.call("doctor"), re.MULTILINE)


@pytest.mark.parametrize("trouble", ["settings", "manifest", "ignored", "tracked"])
def test_doctor_exits_1_with_a_problem_and_says_what_to_do(history_copy: Project, trouble: str) -> None:
    folder = history_copy.root / ".castore"
    match trouble:
        case "settings":
            (folder / "config.toml").write_text("threads = ")
        case "manifest":
            next((folder / "manifests").glob("*/*.json")).write_text("{}")
        case "ignored":
            history_copy.git("rm", "-r", "-q", "--cached", ".castore")
            (history_copy.root / ".gitignore").write_text(".castore\n")
        case "tracked":
            history_copy.git("add", "-f", ".castore/objects")
    process = history_copy.start("doctor")
    out, err = process.communicate()
    assert (process.returncode, err) == (1, "")
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("problem"))
    assert re.match(r" {8}\w", lines[at + 1])
    assert json.loads(history_copy.start("doctor", "--json").communicate()[0])["ok"] is False
