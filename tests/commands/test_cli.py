"""The installed program, as a user runs it: real processes in a real git repository."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project import TINY, Project

from castore import Experiment, Repo
from castore.format.part_index import decode_chunks
from castore.storage.object_store import ObjectStore


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after one session; tests only look at it."""
    project = Project(tmp_path_factory.mktemp("trained"))
    project.train("--tag", "nice", "--note", "a first try")
    return project


@pytest.fixture
def copied(trained: Project, tmp_path: Path) -> Project:
    """A copy of a trained project, to be changed."""
    shutil.copytree(trained.root, tmp_path / "copy")
    project = Project.__new__(Project)
    project.root, project.environment = tmp_path / "copy", trained.environment
    return project


# -- the main job ----------------------------------------------------------------------------------------------------


def test_train_makes_a_repository_at_the_git_root_and_says_so(project: Project) -> None:
    out = project.train(*["--session-iters", "1"], code=0)
    assert out.splitlines()[0].startswith(f"made    {project.root}/.castore")
    assert "fresh   starting at step 0: there is no checkpoint yet" in out
    tracked = project.git("add", "-A", "--dry-run", ".castore")
    assert ".castore/config.toml" in tracked
    assert ".castore/manifests/main/000000001-" in tracked
    assert "objects" not in tracked
    assert "lock" not in tracked


def parts(project: Project, step: int) -> dict[str, str]:
    (entry,) = (entry for entry in project.json("log") if entry["step"] == step)
    return {name: part["index"] for name, part in entry["parts"].items()}


@pytest.mark.parametrize("options", [["--threads", "1"], ["--threads", "2", "--grad-accum", "2"]])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, options: list[str]) -> None:
    """Across a growth of connections, with dropout, in processes of their own."""
    found = []
    for name, sessions in (("whole", [9]), ("parts", [3, 2, 4])):
        (tmp_path / name).mkdir()
        project = Project(tmp_path / name)
        for steps in sessions:
            project.train(
                "--session-iters", str(steps), "--connection-every", "4", "--dropout", "0.1", "--resume", "latest",
                "--save-every", "100", "--eval-every", "100", *options,
            )  # fmt: skip
        found.append(parts(project, 9))
    assert found[0]["model"] == found[1]["model"]
    assert found[0]["optimizer"] == found[1]["optimizer"]


def test_the_end_of_the_run_exits_7_and_says_what_to_do(copied: Project) -> None:
    err = copied.train("--max-iters", "4", code=7)
    assert "is at step 4 and --max-iters is 4: give a higher --max-iters" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_what_was_trained_and_exits_with_its_code(project: Project, number: int, code: int) -> None:
    process = project.training("--save-every", "1000000", "--eval-every", "1")
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code
    name = signal.Signals(number).name
    assert f"{name}: finishing the step and saving" in err
    newest = project.json("log")[0]
    assert newest["availability"] == "full"
    assert f"-> {newest['step']} in" in out
    assert name in project.json("show", newest["id"])["info"]["saved_because"]


# in the background a second save doesn't begin before the first has ended: at most the one under way is lost, too
@pytest.mark.parametrize(("how", "most"), [("--no-background", 5), ("--background", 10)])
def test_a_killed_session_loses_at_most_save_every_steps(project: Project, how: str, most: int) -> None:
    process = project.training("--save-every", "5", "--eval-every", "5", how)
    assert process.stdout is not None
    steps = [0]
    deadline = time.monotonic() + 0.5
    for line in process.stdout:
        if match := re.match(r"step    (\d+) ", line.replace(",", "")):
            steps.append(int(match[1]))
        if time.monotonic() > deadline:
            process.kill()
            break
    process.communicate()
    newest = max(entry["step"] for entry in project.json("log"))
    assert steps[-1] - newest <= most
    assert f"resume  {project.json('log')[0]['id'][:12]}, step {newest:,} " in project.train("--resume", "latest")


def test_two_sessions_at_once_both_save(project: Project) -> None:
    project.run("init")
    both = [
        project.start("train", "--data-dir", "texts", *TINY, "--run", run, "--resume", "none") for run in ("a", "b")
    ]
    for process in both:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    found = project.json("log")
    assert sorted((entry["run"], entry["step"]) for entry in found) == [("a", 2), ("a", 4), ("b", 2), ("b", 4)]
    assert "history" not in {entry["availability"] for entry in found}


def test_the_summary_is_printed_as_json_and_kept(project: Project) -> None:
    summary = project.json("train", "--data-dir", "texts", *TINY)
    assert (summary["start_step"], summary["final_step"], summary["stopped"]) == (0, 4, "session-iters")
    assert json.loads(Path(summary["path"]).read_text()) == {
        name: value for name, value in summary.items() if name != "path"
    }
    assert Path(summary["path"]).parent == project.root / ".castore" / "sessions" / "main"


def test_a_toml_file_gives_the_same_options_and_the_command_line_wins(project: Project) -> None:
    (project.root / "run.toml").write_text('data_dir = "texts"\nn_embd = 16\nbatch_size = 3\nseed = 5\n')
    rest = [
        option
        for pair in zip(TINY[::2], TINY[1::2], strict=True)
        if pair[0] not in ("--n-embd", "--batch-size")
        for option in pair
    ]
    project.run("train", "--config", "run.toml", *rest, "--seed", "6")
    config = project.json("show", project.json("log")[0]["id"])["config"]
    assert (config["n_embd"], config["batch_size"], config["seed"]) == (16, 3, 6)


def test_a_terminal_gets_a_progress_bar(copied: Project) -> None:
    ours, theirs = pty.openpty()
    copied.environment = copied.environment | {"TERM": "xterm"}
    process = copied.start("train", "--data-dir", "texts", *TINY, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while process.poll() is None or not shown.endswith(b"from the best checkpoint\r\n"):
        try:
            shown += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)
    process.wait()
    assert process.returncode == 0
    assert "━" in shown.decode()
    assert "step 8 of 8" in shown.decode()
    assert "\nstep    " not in shown.decode()


# -- what can go wrong -----------------------------------------------------------------------------------------------


def test_an_incompatible_checkpoint_exits_3_and_names_both_values(copied: Project) -> None:
    err = copied.train("--n-embd", "32", code=3)
    assert "model n_embd is 16 there, 32 here" in err
    assert "--allow-fresh" in err


def test_evicted_data_exits_4_with_the_reason_for_each(copied: Project) -> None:
    shutil.rmtree(copied.root / ".castore" / "objects")
    err = copied.train(code=4)
    assert err.count("): its data is not in the store") == 2
    assert "--allow-fresh" in err
    assert {entry["availability"] for entry in copied.json("log")} == {"history"}
    copied.run("resolve", code=4)


def test_a_damaged_object_exits_5_and_names_what_it_belongs_to(copied: Project) -> None:
    best = copied.json("resolve")["match"]["id"]
    store = ObjectStore(copied.root / ".castore")
    index = store.read(copied.json("show", best)["parts"]["model"]["index"])
    damaged = store.path(decode_chunks(index)[0].id)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    err = copied.train("--resume", best, code=5)
    assert f"of checkpoint {best[:12]}" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["log"], "no .castore/ in"),
        (["show", "abc"], "run `castore init`"),
        (["resolve"], "run `castore init`"),
        (["train", "--n-layer", "many"], "--n-layer"),
        (["train", "--n-layer", "0"], "n_layer"),
        (["train", "--n-layr", "3"], "--n-layer"),
        (["train", "--config", "nowhere.toml"], "can't read nowhere.toml"),
        (["train", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["-C", "nowhere", "log"], "-C nowhere"),
        (["prune"], "prune"),
    ],
)
def test_a_wrong_call_exits_2_and_says_what_is_wrong(project: Project, arguments: list[str], says: str) -> None:
    assert says in project.run(*arguments, code=2)


@pytest.mark.parametrize(
    ("text", "says"),
    [("n_layr = 3", "did you mean n_layer?"), ("n_layer = 'x'", "run.toml: "), ("n_layer =", "not valid TOML")],
)
def test_a_wrong_settings_file_exits_2_and_names_it(project: Project, text: str, says: str) -> None:
    (project.root / "run.toml").write_text(text)
    assert says in project.run("train", "--config", "run.toml", code=2)


def test_an_unknown_id_exits_3(trained: Project) -> None:
    assert "no checkpoint '0123'" in trained.run("show", "0123", code=3)


def test_a_broken_manifest_is_told_and_hides_no_other(copied: Project) -> None:
    broken = copied.root / ".castore" / "manifests" / "main" / "000000009-0123456789ab.json"
    broken.write_text("{}")
    process = copied.start("log")
    out, err = process.communicate()
    assert process.returncode == 0
    assert str(broken) in err
    assert out.count("full") == 2
    assert broken.read_text() == "{}"


def test_text_from_a_manifest_reaches_the_terminal_as_text_alone(copied: Project) -> None:
    evil = "\x1b]0;gone\x07 \x9b31m \u202e\U000e0001\x7f\nmatch   deadbeef"
    repo = Repo.open(copied.root)
    line = Experiment(model={"n_embd": evil, evil: 1}, tokenizer=evil)
    metrics = {"val_loss": 0.001, evil: 1.0}
    own = repo.save(
        {"model": {}},
        run="evil",
        step=9,
        metrics=metrics,
        experiment=line,
        tags=[evil],
        note=evil,
        config={evil: [evil]},
    ).id
    shown = copied.run("log") + copied.run("show", own) + copied.run("resolve", own)
    shown += copied.train("--resume", own, code=3)
    shown += copied.start("train", "--data-dir", "texts", *TINY, "--session-iters", "1").communicate()[0]
    assert "gone" in shown
    shown += copied.run("show", own, "--json")
    found = copied.json("show", own)
    assert (found["note"], found["config"], found["experiment"]["tokenizer"]) == (evil, {evil: [evil]}, evil)
    assert all(one.isprintable() for one in shown.replace("\n", ""))
    assert "\nmatch   deadbeef" not in shown


def test_a_reader_that_goes_away_costs_nothing_of_what_was_trained(project: Project) -> None:
    process = project.training("--save-every", "1000000", "--eval-every", "1")
    assert process.stdout is not None
    process.stdout.close()
    with process:  # closes the other pipes
        assert process.wait() == 128 + signal.SIGPIPE
    assert "SIGPIPE" in project.json("show", "latest")["info"]["saved_because"]


def test_a_session_that_fails_leaves_a_summary_that_says_why(copied: Project) -> None:
    process = copied.start("train", "--data-dir", "texts", *TINY, "--max-iters", "4", "--json")
    out, err = process.communicate()
    assert process.returncode == 7, err
    summary = json.loads(out)
    assert summary["stopped"].startswith("error: nothing to train")
    assert json.loads(Path(summary["path"]).read_text())["steps"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--note", "two\nlines"],
        ["--tag", "\x1b[1m"],
        ["--seed", "9" * 30],
        ["--learning-rate", "inf"],
        ["--resume", ""],
    ],
)
def test_what_can_not_be_recorded_is_refused_before_anything_is_trained(copied: Project, arguments: list[str]) -> None:
    before = copied.json("log")
    copied.train(*arguments, code=2)
    assert copied.json("log") == before


def test_a_store_that_may_not_be_written_can_be_read(copied: Project) -> None:
    before = copied.json("log")
    subprocess.run(["mount", "--bind", "-o", "ro", ".castore", ".castore"], cwd=copied.root, check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", ".castore"], cwd=copied.root, check=True)
        assert copied.json("log") == before
        assert copied.json("resolve")["match"]["step"] == 4
        assert "can't" in copied.train(code=1)
    finally:
        subprocess.run(["umount", ".castore"], cwd=copied.root, check=True)


def test_a_missing_configuration_is_not_taken_for_no_repository(copied: Project) -> None:
    (copied.root / ".castore" / "config.toml").unlink()
    assert "config.toml: is missing: `castore init`" in copied.train(code=2)
    copied.run("init")
    assert len(copied.json("log")) == 2


# -- looking ---------------------------------------------------------------------------------------------------------


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
    inside = trained.run("log", cwd=trained.root / "texts")
    assert inside.splitlines()[0].split() == HEADS
    assert len(trained.run("-C", "texts", "log", "-n", "1").splitlines()) == 2
    assert trained.run("log", "--run", "other") == "no checkpoint of run other\n"


def test_show_prints_the_whole_manifest(trained: Project) -> None:
    own = trained.json("log")[0]["id"]
    out = trained.run("show", own[:10])
    for text in (own, "a first try", "val_loss", "optimizer", "n_embd: 16", "learning_rate: 0.002", "resolution"):
        assert text in out
    assert trained.json("show", own)["experiment"]["model"]["n_embd"] == 16


def test_resolve_says_which_and_why_no_other(copied: Project) -> None:
    best = copied.json("resolve")["match"]
    assert best["step"] == 4
    shutil.rmtree(copied.root / ".castore" / "objects")
    found = json.loads(copied.start("resolve", "--json").communicate()[0])
    assert found["match"] is None
    assert [one["step"] for one in found["rejected"]] == [4, 2]
    assert found["rejected"][0]["unavailable"] is True


def test_init_is_repeatable_and_prints_where(project: Project) -> None:
    assert project.json("init") == {"root": str(project.root / ".castore")}
    (project.root / ".castore" / "config.toml").write_text("[store]\nthreads = 1\n")
    project.run("init")
    assert (project.root / ".castore" / "config.toml").read_text() == "[store]\nthreads = 1\n"
    assert project.run("log") == "no checkpoint yet: `castore train` makes the first one\n"


# -- help and start-up -----------------------------------------------------------------------------------------------

COMMANDS = (
    "init", "train", "demo", "log", "show", "resolve", "gc", "pin", "unpin", "forget",
    "verify", "stats", "diff", "doctor", "export", "import", "add", "checkout", "report",
)  # fmt: skip


def test_help_names_every_command_and_exit_code(project: Project) -> None:
    out = project.run("--help")
    assert [line.split()[0] for line in out.splitlines() if re.match(r"  [a-z]+  ", line)] == [*COMMANDS, "ci"]
    assert "7 nothing to do" in out
    assert re.fullmatch(r"castore \d+\.\d+\.\d+\n", project.run("--version"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(project: Project, command: str) -> None:
    out = project.run(command, "--help")
    assert f"Example: castore {command}" in out
    assert "--json" in out


def test_train_groups_its_options(project: Project) -> None:
    out = project.run("train", "--help")
    assert re.findall(r"^(\w+):$", out, re.MULTILINE) == ["Options", "Run", "Training", "Model", "Data", "Machine"]


@pytest.mark.parametrize("arguments", [["--help"], ["log"], ["log", "--json"], ["resolve"], ["train", "--help"]])
def test_looking_imports_neither_torch_nor_numpy(trained: Project, arguments: list[str]) -> None:
    code = "import sys, cli\ntry: cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=trained.root, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy"} & set(done.stderr.split())
