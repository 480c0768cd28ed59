"""What the workflows and the action promise, read from their files: nothing here starts a job."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from project import PROGRAM, Project

from castore.format import bundle
from castore.format.ids import ObjectId
from nanecho import config as configs

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
INSTALL = ROOT / ".github" / "install" / "action.yml"
MAIN = (ROOT / ".github" / "action" / "main.mjs").read_text()
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
CHECK = ROOT / ".github" / "scripts" / "check_persistence.py"

parametrized = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path: Path) -> list[dict[str, Any]]:
    content = yaml.safe_load(path.read_text())
    if "runs" in content:
        return content["runs"]["steps"]
    return [step for job in content["jobs"].values() for step in job["steps"]]


def calls(path: Path) -> Iterator[dict[str, Any]]:
    """The steps that run this repository's action."""
    return (step for step in steps(path) if step.get("uses") == "./")


def test_the_workflows_are_there() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "netrain-cached.yml", "test-training-persistence.yml"]


@pytest.mark.parametrize("path", [*WORKFLOWS, INSTALL], ids=lambda path: path.name)
def test_foreign_actions_are_pinned_to_a_commit(path: Path) -> None:
    for line in re.findall(r"uses: *(.*)", path.read_text()):
        assert re.fullmatch(r"\./\S*|[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_every_action_is_pinned_to_one_commit() -> None:
    pins: dict[str, set[str]] = {}
    for path in [*WORKFLOWS, INSTALL]:
        for name, commit in re.findall(r"uses: *([\w./-]+)@(\S+)", path.read_text()):
            pins.setdefault(name, set()).add(commit)
    assert all(len(commits) == 1 for commits in pins.values()), pins


@parametrized
def test_a_job_may_do_nothing_that_it_does_not_ask_for(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {}
    for name, job in jobs(path).items():
        assert job["permissions"] in ({"contents": "read"}, {"contents": "write"}), name
        pushes = any(step.get("with", {}).get("commit") for step in job["steps"])
        calls_api = any("gh api" in step.get("run", "") for step in job["steps"])
        assert (job["permissions"]["contents"] == "write") == (pushes or calls_api), name


@parametrized
def test_every_job_has_a_limit(path: Path) -> None:
    assert all(0 < job["timeout-minutes"] <= 360 for job in jobs(path).values())


@parametrized
def test_no_session_is_cancelled_for_another(path: Path) -> None:
    concurrency = yaml.safe_load(path.read_text())["concurrency"]
    assert "github.ref" in concurrency["group"]
    if path.name != "ci.yml":
        assert concurrency["cancel-in-progress"] is False


@pytest.mark.parametrize("path", [*WORKFLOWS, INSTALL], ids=lambda path: path.name)
def test_nothing_is_pasted_into_a_script(path: Path) -> None:
    for step in steps(path):
        assert "${{" not in step.get("run", ""), step


@parametrized
def test_checkout_leaves_no_token_behind(path: Path) -> None:
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@parametrized
def test_a_save_runs_whatever_came_before(path: Path) -> None:
    for step in calls(path):
        if step["with"]["mode"] == "save":
            assert step["if"].startswith("always()")


@parametrized
def test_the_action_is_called_with_inputs_that_it_has(path: Path) -> None:
    for step in calls(path):
        given = set(step["with"])
        assert given <= set(ACTION["inputs"])
        assert not given & options_of({"save": "restore", "restore": "save"}[step["with"]["mode"]])


def options_of(mode: str) -> set[str]:
    """The inputs that main.mjs takes in one of its modes."""
    line = re.search(rf"^  {mode}: (.*)$", MAIN, re.MULTILINE)
    assert line
    return set(re.findall(r'"([a-z-]+)"', line.group(1)))


def test_the_actions_inputs_are_those_that_its_script_reads() -> None:
    read = set(re.findall(r'input\("([a-z-]+)"\)', MAIN)).union(*map(options_of, ("save", "restore", "recover")))
    assert read == set(ACTION["inputs"])


def test_the_action_says_what_it_runs() -> None:
    assert ACTION["runs"]["using"].startswith("node")
    assert (ROOT / ACTION["runs"]["main"]).read_text() == MAIN
    assert "appendFileSync(process.env.GITHUB_OUTPUT, `exit-code=" in MAIN
    assert "exit-code" in ACTION["outputs"]


def program_help(*command: str) -> str:
    return subprocess.run([PROGRAM, *command, "--help"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("mode", ["restore", "save"])
def test_the_program_has_the_options_that_the_action_gives_it(mode: str) -> None:
    shown = program_help("ci", mode)
    for name in options_of(mode):
        assert re.search(rf"--{name}\b(?!-)", shown), name


@parametrized
def test_training_is_called_with_options_that_it_has(path: Path) -> None:
    shown = program_help("train")
    for step in steps(path):
        for command in re.findall(r"castore\"? train |CASTORE\" train ", step.get("run", "")):
            called = step["run"][step["run"].index(command) :].replace("\\\n", " ").split("\n")[0]
            for name in re.findall(r" (--[a-z-]+)", called):
                assert re.search(rf"{name}\b(?!-)", shown), name


def test_the_persistence_test_gives_options_that_training_has() -> None:
    path = CHECK.with_name("persistence.toml")
    config = configs.make(configs.read_toml(path.read_text(), str(path)))
    assert config.run.session_iters == config.run.eval_every == config.run.save_every == 10


def test_the_documentation_shows_workflows_that_could_run() -> None:
    text = (ROOT / "docs" / "ci.md").read_text()
    shown = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert [workflow["name"] for workflow in shown] == ["train", "train", "recover"]
    train = program_help("train")
    for workflow in shown:
        assert workflow["permissions"] == {}
        if workflow["name"] == "train":
            assert workflow["concurrency"]["cancel-in-progress"] is False
        (job,) = workflow["jobs"].values()
        for step in job["steps"]:
            if step.get("uses", "").startswith("OWNER/"):
                assert step["uses"] == "OWNER/castore@v1"
                assert set(step["with"]) <= set(ACTION["inputs"])
                assert (step["with"]["mode"] == "save") == (step.get("if") == "always()")
            for name in re.findall(r" (--[a-z-]+)", step["run"]) if "castore train" in step.get("run", "") else []:
                assert f"{name} " in train, name
    for name in set(re.findall(r"castore (?:ci )?(?:train )?(--[a-z-]+)", text)):
        assert f"{name} " in train, name


def test_a_workflow_is_printed_that_names_where_castore_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from castore.errors import UsageError
    from castore.github import workflow as workflows

    shown = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)
    assert shown is not None
    project = Project(tmp_path)
    assert project.call("ci", "workflow", "--action", "you/castore", "--help")
    assert project.run("ci", "workflow", "--action", "you/castore") == shown[1].replace("OWNER/", "you/")
    assert "is not OWNER/NAME" in project.run("ci", "workflow", "--action", "you/castore@v1; id", code=2)

    class Installed:
        url = ""

        def read_text(self, _name: str) -> str:
            return json.dumps({"url": self.url})

    monkeypatch.setattr(workflows.importlib.metadata, "distribution", lambda _name: Installed())
    project.git("remote", "add", "origin", "git@github.com:mine/castore.git")
    for url, owner in (
        ("https://github.com/you/castore.git", "you/castore"),
        ("ssh://git@github.com/you/fork", "you/fork"),
        (tmp_path.as_uri(), "mine/castore"),
        ("https://example.com/you/castore", None),
        ("https://evilgithub.com/you/castore", None),
        ("", None),
    ):
        Installed.url = url
        assert workflows.installed_from() == owner
    with pytest.raises(UsageError, match="--action OWNER/castore says"):
        workflows.workflow()


def test_the_route_by_actions_cache_saves_data_alone(tmp_path: Path) -> None:
    """After a restore that failed, an entry with nothing in it would be the newest, and restored from then on."""
    text = (ROOT / "docs" / "ci.md").read_text()
    (_, workflow, _) = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    (job,) = workflow["jobs"].values()
    (asked,) = [step for step in job["steps"] if step.get("id") == "data"]
    (saved,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/cache/save")]
    assert saved["if"] == "always() && steps.data.outputs.here == 'true'"
    assert asked["if"] == "always()"
    project = Project(tmp_path)
    project.train()
    outputs = tmp_path / "outputs"

    def ask() -> tuple[int, str]:
        outputs.write_text("")
        path = f"{Path(PROGRAM).parent}:{project.environment['PATH']}"
        environment = project.environment | {"GITHUB_OUTPUT": str(outputs), "PATH": path}
        done = subprocess.run(["bash", "-e", "-c", asked["run"]], cwd=tmp_path, env=environment, capture_output=True)
        return done.returncode, outputs.read_text()

    assert ask() == (0, "here=true\n")
    shutil.rmtree(tmp_path / ".castore" / "objects")
    assert project.train(code=4)
    assert ask() == (4, "")
    project.train("--allow-fresh")
    assert ask() == (0, "here=true\n")


def test_the_packages_that_the_action_installs_are_pinned() -> None:
    listed = re.search(r"PACKAGES = \[(.*)\]", MAIN)
    assert listed
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert set(re.findall(r'"(\w+)"', listed.group(1))) <= pinned


def plan(**environment: str) -> tuple[int, str, str]:
    """Run the first step of the training workflow as the runner would."""
    (step,) = (
        step for step in steps(ROOT / ".github" / "workflows" / "netrain-cached.yml") if step.get("id") == "plan"
    )
    assert set(step["env"]) == {"TYPE", "ITERATIONS", "FRESH"}
    script = step["run"].replace('"$GITHUB_OUTPUT"', "/dev/stderr")
    ran = subprocess.run(
        ["bash", "-e", "-c", script],
        env={"ITERATIONS": "", "FRESH": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout, ran.stderr


def test_a_fresh_start_needs_the_exact_words() -> None:
    assert "resume=best\n" in plan(TYPE="ci")[2]
    assert "resume=none\n" in plan(TYPE="ci", FRESH="start afresh")[2]
    for words in ("yes", "true", "Start afresh", "start afresh "):
        code, said, outputs = plan(TYPE="ci", FRESH=words)
        assert (code, outputs) == (2, "")
        assert "::error::" in said


def test_the_number_of_iterations_is_a_number() -> None:
    assert "iterations=200\n" in plan(TYPE="ci")[2]
    assert "iterations=5\n" in plan(TYPE="full", ITERATIONS="5")[2]
    for number in ("0", "-1", "1e3", "5; id", "5\nresume=none"):
        assert plan(TYPE="ci", ITERATIONS=number)[0] == 2
    assert plan(TYPE="other")[0] == 2


# -- the persistence check -----------------------------------------------------------------------------------------

ID, LATER = "a" * 64, "b" * 64
FIRST = {"start_step": 0, "final_step": 10, "steps": 10, "final_loss": 5.25, "checkpoints": [ID]}
SECOND = {
    "start_step": 10,
    "final_step": 20,
    "steps": 10,
    "resumed_from": ID,
    "fresh": "",
    "weights_only": False,
    "start_loss": 5.25,
    "final_loss": 4.5,
    "checkpoints": [LATER],
}
STRAIGHT = {"start_step": 0, "final_step": 20, "final_loss": 4.5}


def check(tmp_path: Path, first: Any, second: Any, *more: str, straight: Any = STRAIGHT) -> tuple[int, str]:
    arguments = []
    for name, session in (("first", first), ("second", second), ("straight", straight)):
        (tmp_path / f"{name}.json").write_text(json.dumps(session))
        arguments += [f"--{name}", str(tmp_path / f"{name}.json")]
    report = tmp_path / "report.md"
    ran = subprocess.run(
        [sys.executable, "-I", "-S", str(CHECK), *arguments, "--report", str(report), *more],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in ran.stderr
    assert not report.exists() or report.read_text() == ran.stdout
    return ran.returncode, ran.stdout


def test_a_session_that_went_on_passes(tmp_path: Path) -> None:
    code, report = check(tmp_path, FIRST, SECOND, "--match", ID, "--downloaded-bytes", "40000")
    assert code == 0, report
    assert "all 16 checks passed" in report


@pytest.mark.parametrize(
    "change",
    [
        {"resumed_from": None, "fresh": "there is no checkpoint yet", "start_step": 0, "steps": 20, "start_loss": None},
        {"resumed_from": LATER},
        {"start_step": 9},
        {"final_step": 19},
        {"start_step": True},
        {"final_step": 10, "steps": 0},
        {"weights_only": True},
        {"start_loss": 5.26},
        {"start_loss": float("nan")},
        {"start_loss": None},
        {"final_loss": 5.2},
        {"final_loss": None},
        {"checkpoints": []},
        {"fresh": "no checkpoint can be resumed, and --allow-fresh allows that"},
    ],
    ids=str,
)
def test_one_that_did_not_fails(tmp_path: Path, change: dict[str, Any]) -> None:
    code, report = check(tmp_path, FIRST, SECOND | change)
    assert code == 1
    assert "checks failed" in report


@pytest.mark.parametrize(
    "change", [{"checkpoints": []}, {"final_step": 9}, {"final_loss": None}, {"start_step": 1}], ids=str
)
def test_a_first_session_that_saved_nothing_fails(tmp_path: Path, change: dict[str, Any]) -> None:
    assert check(tmp_path, FIRST | change, SECOND)[0] == 1


def test_an_empty_summary_fails(tmp_path: Path) -> None:
    assert check(tmp_path, {}, {}, straight={})[0] == 1


def test_what_is_no_summary_fails(tmp_path: Path) -> None:
    assert check(tmp_path, FIRST, [])[0] == 1


@pytest.mark.parametrize(
    "more", [["--match", LATER], ["--match", ""], ["--downloaded-bytes", "0"], ["--downloaded-bytes", ""]], ids=str
)
def test_what_was_restored_counts(tmp_path: Path, more: list[str]) -> None:
    assert check(tmp_path, FIRST, SECOND, *more)[0] == 1


def test_lost_bundles_are_lost_but_their_records_are_whole(tmp_path: Path) -> None:
    record = bundle.Record(
        bundle=ObjectId("c" * 64),
        key="castore-1",
        created="2026-01-02T03:04:05.000006Z",
        bytes=1000,
        objects=1,
        parts={ObjectId("d" * 64): [ObjectId("c" * 64)]},
    )
    (tmp_path / record.file_name).write_bytes(bundle.encode_record(record))
    script = [sys.executable, str(CHECK.with_name("lose_bundles.py")), str(tmp_path)]
    subprocess.run(script, check=True)
    (path,) = tmp_path.iterdir()
    lost = bundle.decode_record(path.read_bytes())
    assert path.name == lost.file_name
    assert lost == msgspec.structs.replace(record, key="gone-castore-1")
    path.unlink()
    assert subprocess.run(script, capture_output=True, check=False).returncode == 1
