"""`castore train`: real processes in a real git repository."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from project import TINY, Project, read_terminal

from castore.format.part_index import decode_chunks
from castore.storage.object_store import ObjectStore

# -- the main job -----------------------------------------------------------------------------------------------------


def test_train_makes_a_repository_at_the_git_root_and_says_so(project: Project) -> None:
    out = project.train(*["--session-iters", "1"], code=0)
    assert out.splitlines()[0].startswith(f"made    {project.root}/.castore")
    assert "fresh   starting at step 0: there is no checkpoint yet" in out
    tracked = project.git("add", "-A", "--dry-run", ".castore")
    assert ".castore/config.toml" in tracked
    assert ".castore/manifests/main/000000001-" in tracked
    assert "objects" not in tracked
    assert "lock" not in tracked


def index_ids(project: Project, step: int) -> dict[str, str]:
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
        found.append(index_ids(project, 9))
    assert found[0]["model"] == found[1]["model"]
    assert found[0]["optimizer"] == found[1]["optimizer"]


def test_the_end_of_the_run_exits_7_and_says_what_to_do(trained_copy: Project) -> None:
    err = trained_copy.train("--max-iters", "4", code=7)
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


def test_a_terminal_gets_a_progress_bar(trained_copy: Project) -> None:
    ours, theirs = pty.openpty()
    trained_copy.environment = trained_copy.environment | {"TERM": "xterm"}
    process = trained_copy.start("train", "--data-dir", "texts", *TINY, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = read_terminal(ours)
    process.wait()
    assert process.returncode == 0
    assert "━" in shown
    assert "step 8 of 8" in shown
    assert "\nstep    " not in shown


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_an_incompatible_checkpoint_exits_3_and_names_both_values(trained_copy: Project) -> None:
    err = trained_copy.train("--n-embd", "32", code=3)
    assert "model n_embd is 16 there, 32 here" in err
    assert "--allow-fresh" in err


def test_evicted_data_exits_4_with_the_reason_for_each(trained_copy: Project) -> None:
    shutil.rmtree(trained_copy.root / ".castore" / "objects")
    err = trained_copy.train(code=4)
    assert err.count("): its data is not in the store") == 2
    assert "--allow-fresh" in err
    assert {entry["availability"] for entry in trained_copy.json("log")} == {"history"}
    trained_copy.run("resolve", code=4)


def test_a_damaged_object_exits_5_and_names_what_it_belongs_to(trained_copy: Project) -> None:
    best = trained_copy.json("resolve")["match"]["id"]
    store = ObjectStore(trained_copy.root / ".castore")
    index = store.read(trained_copy.json("show", best)["parts"]["model"]["index"])
    damaged = store.path(decode_chunks(index)[0].id)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    err = trained_copy.train("--resume", best, code=5)
    assert f"of checkpoint {best[:12]}" in err


@pytest.mark.parametrize(
    ("text", "says"),
    [("n_layr = 3", "did you mean n_layer?"), ("n_layer = 'x'", "run.toml: "), ("n_layer =", "not valid TOML")],
)
def test_a_wrong_settings_file_exits_2_and_names_it(project: Project, text: str, says: str) -> None:
    (project.root / "run.toml").write_text(text)
    assert says in project.run("train", "--config", "run.toml", code=2)


def test_a_reader_that_goes_away_costs_nothing_of_what_was_trained(project: Project) -> None:
    process = project.training("--save-every", "1000000", "--eval-every", "1")
    assert process.stdout is not None
    process.stdout.close()
    with process:  # closes the other pipes
        assert process.wait() == 128 + signal.SIGPIPE
    assert "SIGPIPE" in project.json("show", "latest")["info"]["saved_because"]


def test_a_session_that_fails_leaves_a_summary_that_says_why(trained_copy: Project) -> None:
    process = trained_copy.start("train", "--data-dir", "texts", *TINY, "--max-iters", "4", "--json")
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
def test_what_can_not_be_recorded_is_refused_before_anything_is_trained(
    trained_copy: Project, arguments: list[str]
) -> None:
    before = trained_copy.json("log")
    trained_copy.train(*arguments, code=2)
    assert trained_copy.json("log") == before


def test_train_groups_its_options(project: Project) -> None:
    out = project.run("train", "--help")
    assert re.findall(r"^(\w+):$", out, re.MULTILINE) == ["Options", "Run", "Training", "Model", "Data", "Machine"]


# -- prepared data ----------------------------------------------------------------------------------------------------


def data_line(out: str) -> str:
    (line,) = re.findall(r"^ +(prepared .*)$", out, re.MULTILINE)
    return str(line)


def test_the_second_session_says_that_it_reuses_the_data(tmp_path: Path) -> None:
    project = Project(tmp_path)
    assert data_line(project.train()) == "prepared now: these texts were not split and tokenized like this before"
    (checkpoint_id,) = project.json("log", "--kind", "dataset")
    assert (checkpoint_id["kind"], checkpoint_id["run"], checkpoint_id["availability"]) == (
        "dataset",
        "datasets",
        "full",
    )
    assert data_line(project.train()) == f"prepared before: {checkpoint_id['id'][:12]}"
    assert data_line(project.train("--run", "other", "--resume", "none")).startswith("prepared before: ")
    assert {entry["kind"] for entry in project.json("log")} == {"checkpoint"}
    assert len(project.json("log", "--kind", "all")) == len(project.json("log")) + 1
    for path in (project.root / ".castore" / "objects").rglob("*"):
        if path.is_file() and path.name == project.json("show", checkpoint_id["id"])["parts"]["data"]["index"]:
            path.unlink()
    assert data_line(project.train()).startswith(f"prepared now: {checkpoint_id['id'][:12]} is not usable: ")
    assert data_line(project.train()) == f"prepared before: {checkpoint_id['id'][:12]}"


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
    (checkpoint_id,) = project.json("log", "--kind", "dataset")
    config = project.root / ".castore" / "config.toml"
    config.write_text('[retention]\ndata_ttl = "0.0001s"\nauto_gc = false\n')
    deleted = project.json("gc", "--grace", "0")["deleted"]
    assert checkpoint_id["parts"]["data"]["index"] in deleted
    (gone,) = project.json("log", "--kind", "dataset")
    assert gone["availability"] == "history"
    assert data_line(project.train()) == f"prepared now: {checkpoint_id['id'][:12]} is older than data_ttl = 0.0001s"
    assert len(project.json("log", "--kind", "dataset")) == 2


def test_an_error_of_the_summary_does_not_hide_the_error_of_the_session(project: Project) -> None:
    project.run("init")
    (project.root / ".castore" / "sessions").write_text("in the way")
    out = project.train("--learning-rate", "1e30", "--warmup-iters", "0", "--session-iters", "20", code=1)
    assert "is not finite after step" in out.splitlines()[-1]
    assert "the session's summary was not written: can't create directory" in out
    assert "can't create directory" in project.train(code=1)  # a session that went well says so too
