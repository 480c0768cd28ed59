"""The action's script under node, with programs in place of castore and pip that write down how they were called."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MAIN = ROOT / ".github" / "action" / "main.mjs"
POST = MAIN.with_name("post.mjs")
NODE = shutil.which("node")

pytestmark = [pytest.mark.peers, pytest.mark.skipif(NODE is None, reason="node is not installed")]

CACHE = {
    "ACTIONS_RUNTIME_TOKEN": "secret-of-the-cache",
    "ACTIONS_RESULTS_URL": "https://results.example",
    "ACTIONS_CACHE_SERVICE_V2": "true",
    "ACTIONS_CACHE_MODE": "write",
}
OTHERS = {"ACTIONS_ID_TOKEN_REQUEST_TOKEN": "secret-of-the-identity", "ACTIONS_RUNTIME_URL": "https://runtime.example"}

PROGRAM = """#!{python}
import json, os, signal, sys, time
with open({log!r}, "a") as log:
    print(json.dumps({{"argv": sys.argv, "cwd": os.getcwd(), "env": dict(os.environ)}}), file=log)
{body}
"""
CASTORE = """
if os.environ.get("WAIT"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    print("waiting", flush=True)
    time.sleep(60)
with open(os.environ["GITHUB_OUTPUT"], "a") as output:
    print("match=" + "a" * 64, file=output)
if os.environ.get("DIE"):
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(os.environ.get("CODE", "0")))
"""
# makes what `python3 -m venv` makes, with itself as its python; pip install of a folder makes castore
PYTHON = """
if sys.argv[1:3] == ["-m", "venv"]:
    folder = os.path.join(sys.argv[3], "bin")
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(os.path.join(folder, "python")):
        os.symlink(os.path.abspath(__file__), os.path.join(folder, "python"))
elif sys.argv[1:3] == ["-m", "pip"]:
    if os.environ.get("PIP_CODE"):
        sys.exit(int(os.environ["PIP_CODE"]))
    if "--no-deps" in sys.argv:
        os.symlink({castore!r}, os.path.join(os.path.dirname(sys.argv[0]), "castore"))
"""


class Runner:
    """What GitHub's runner gives to an action."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log, self.output = folder / "log", folder / "output"
        self.bin, self.tools, self.work = folder / "bin", folder / "tools", folder / "work"
        for path in (self.bin, self.tools, self.work):
            path.mkdir()
        self.output.touch()
        self.castore = self.write(self.tools / "castore", CASTORE)
        self.write(self.bin / "python3", PYTHON.replace("{castore!r}", repr(str(self.castore))))

    def write(self, path: Path, body: str) -> Path:
        path.write_text(PROGRAM.format(python=sys.executable, log=str(self.log), body=body))
        path.chmod(0o755)
        return path

    def start(self, inputs: Mapping[str, str], script: Path = MAIN, **environment: str) -> subprocess.Popen[str]:
        assert NODE
        return subprocess.Popen(
            [NODE, str(script)],
            cwd=self.work,
            env={
                "PATH": str(self.bin),
                "RUNNER_TEMP": str(self.folder / "temp"),
                "GITHUB_OUTPUT": str(self.output),
                "GITHUB_SERVER_URL": "https://git.example",
                **CACHE,
                **OTHERS,
                **{f"INPUT_{name.upper()}": value for name, value in inputs.items()},
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, inputs: Mapping[str, str], code: int = 0, script: Path = MAIN, **environment: str) -> str:
        process = self.start(inputs, script, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, out + err
        assert f"exit-code={code}\n" in self.output.read_text()
        return out

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def actions(call: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in call["env"].items() if name.startswith("ACTIONS_")}


def test_inputs_become_arguments(runner: Runner) -> None:
    message = "Checkpoints; $(id) `id` --commit\nand more"
    inputs = {"keep": "3", "keep-optimizer": "1", "max-size": "5GB", "commit": "true", "message": message}
    runner.run({"mode": "save", "castore": "../tools/castore", "resume": "", "allow-fresh": "false", **inputs})
    (call,) = runner.calls()
    assert sorted(call["argv"][1:3]) == ["ci", "save"]
    assert sorted(call["argv"][3:]) == sorted(
        ["--commit", "--keep=3", "--keep-optimizer=1", "--max-size=5GB", f"--message={message}"]
    )
    assert call["cwd"] == str(runner.work)


def test_restore_runs_in_its_folder_and_passes_outputs_on(runner: Runner) -> None:
    (runner.work / "project").mkdir()
    inputs = {"mode": "restore", "resume": "main:best", "allow-fresh": "true", "castore": "../tools/castore"}
    runner.run({**inputs, "working-directory": "project", "commit": "false"})
    (call,) = runner.calls()
    assert call["argv"][1:] == ["ci", "restore", "--allow-fresh", "--resume=main:best"]
    assert call["cwd"] == str(runner.work / "project")
    assert f"match={'a' * 64}\n" in runner.output.read_text()


BOTH = {
    "mode": "both", "castore": "../tools/castore", "resume": "main:best", "keep": "3", "commit": "true", "token": "t",
}  # fmt: skip


def test_one_step_restores_now_and_saves_after_the_job(runner: Runner) -> None:
    runner.run(BOTH)
    runner.run(BOTH, script=POST)
    restored, saved = runner.calls()
    assert restored["argv"][1:] == ["ci", "restore", "--resume=main:best"]
    assert sorted(saved["argv"][1:]) == sorted(["ci", "save", "--commit", "--keep=3"])
    assert all(actions(call) == CACHE and call["env"]["GIT_CONFIG_COUNT"] == "2" for call in runner.calls())


def test_a_save_after_the_job_that_fails_fails_the_step(runner: Runner) -> None:
    said = runner.run(BOTH, script=POST, code=5, CODE="5")
    assert "::error title=castore::castore ci save: exit code 5" in said


@pytest.mark.parametrize("mode", ["restore", "save"])
def test_in_other_modes_nothing_happens_after_the_job(runner: Runner, mode: str) -> None:
    process = runner.start({"mode": mode, "castore": "../tools/castore"}, POST)
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    assert runner.calls() == []
    assert runner.output.read_text() == ""


def test_castore_gets_the_caches_variables_and_no_others(runner: Runner) -> None:
    runner.run({"mode": "save", "castore": "../tools/castore", "token": "secret-of-git"})
    (call,) = runner.calls()
    assert actions(call) == CACHE
    assert not any(name.startswith(("INPUT_", "GIT_CONFIG")) for name in call["env"])
    assert "secret-of-git" not in json.dumps(call)


def test_a_restore_can_fetch_the_branch(runner: Runner) -> None:
    runner.run({"mode": "restore", "castore": "../tools/castore", "token": "secret-of-git"})
    (call,) = runner.calls()
    assert actions(call) == CACHE
    assert call["env"]["GIT_CONFIG_COUNT"] == "2"
    assert call["env"]["GIT_CONFIG_VALUE_1"].startswith("AUTHORIZATION: basic ")
    assert "secret-of-git" not in json.dumps(call)


def test_a_lost_push_is_recovered_by_the_bundles_name(runner: Runner) -> None:
    runner.run({"mode": "recover", "bundle": "--commit", "commit": "true", "token": "t", "castore": "../tools/castore"})
    (call,) = runner.calls()
    assert call["argv"][1:] == ["ci", "recover", "--commit", "--", "--commit"]
    assert call["env"]["GIT_CONFIG_COUNT"] == "2"


def test_a_value_is_never_an_option(runner: Runner) -> None:
    runner.run({"mode": "save", "message": "--commit", "castore": "../tools/castore"})
    assert runner.calls()[0]["argv"][1:] == ["ci", "save", "--message=--commit"]


@pytest.mark.parametrize(
    "inputs",
    [
        {"mode": ""},
        {"mode": "constructor"},
        {"mode": "save --commit"},
        {"mode": "save", "commit": "yes"},
        {"mode": "restore", "commit": "true"},
        {"mode": "restore", "keep": "3"},
        {"mode": "save", "resume": "best"},
        {"mode": "save", "bundle": "castore-ab"},
        {"mode": "both", "bundle": "castore-ab"},
        {"mode": "recover"},
        {"mode": "recover", "bundle": "castore-ab", "keep": "3"},
    ],
    ids=str,
)
def test_a_wrong_input_is_refused(runner: Runner, inputs: dict[str, str]) -> None:
    said = runner.run({"castore": "../tools/castore", **inputs}, code=2)
    assert "::error title=castore::" in said
    assert not runner.calls()


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 7])
def test_the_exit_code_is_castores(runner: Runner, code: int) -> None:
    said = runner.run({"mode": "restore", "castore": "../tools/castore"}, code=code, CODE=str(code))
    assert f"::error title=castore::castore ci restore: exit code {code}" in said


def test_a_killed_castore_fails_the_step(runner: Runner) -> None:
    runner.run({"mode": "restore", "castore": "../tools/castore"}, code=128 + signal.SIGKILL, DIE="1")


def test_a_program_that_is_not_there_fails_the_step(runner: Runner) -> None:
    assert "can't be run" in runner.run({"mode": "restore", "castore": "../tools/none"}, code=1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_a_cancelled_step_lets_castore_end(runner: Runner, number: signal.Signals, code: int) -> None:
    process = runner.start({"mode": "save", "castore": "../tools/castore"}, WAIT="1")
    assert process.stdout
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code


def test_the_one_on_path_is_used(runner: Runner) -> None:
    runner.run({"mode": "restore"}, PATH=f"{runner.tools}{os.pathsep}{runner.bin}")
    assert [Path(call["argv"][0]).name for call in runner.calls()] == ["castore"]


def test_else_it_is_installed_once_without_torch_and_without_secrets(runner: Runner) -> None:
    inputs = {"mode": "save", "commit": "true", "token": "secret-of-git"}
    runner.run(inputs)
    *installing, castore = runner.calls()
    assert actions(castore) == CACHE
    assert Path(castore["argv"][0]).parent == runner.folder / "temp" / "castore-action" / "bin"
    packages, castore_itself = (call["argv"][1:] for call in installing if call["argv"][1:3] == ["-m", "pip"])
    assert packages[packages.index("--constraint") + 1] == str(ROOT / "constraints.txt")
    assert "blake3" in packages
    assert not {"torch", "safetensors"} & set(packages)
    assert castore_itself[-2:] == ["--no-deps", str(ROOT)]
    for call in installing:
        assert not actions(call)
        assert not any(name.startswith(("INPUT_", "GIT_CONFIG")) for name in call["env"])
        assert "secret" not in json.dumps(call)
    runner.run(inputs)
    assert len(runner.calls()) == len(installing) + 2


def test_a_failed_installation_is_told_and_tried_again(runner: Runner) -> None:
    assert "could not be installed" in runner.run({"mode": "restore"}, code=9, PIP_CODE="9")
    runner.run({"mode": "restore"})
    assert runner.calls()[-1]["argv"][1:] == ["ci", "restore"]


def test_of_saves_the_pushing_one_alone_gets_gits_token(runner: Runner) -> None:
    for inputs in ({"commit": "false"}, {"commit": "true"}):
        said = runner.run({"mode": "save", "token": "secret-of-git", "castore": "../tools/castore", **inputs})
    plain, pushing = runner.calls()
    assert not any(name.startswith("GIT_CONFIG") for name in plain["env"])
    encoded = base64.b64encode(b"x-access-token:secret-of-git").decode()
    assert f"::add-mask::{encoded}\n" in said
    assert "secret-of-git" not in json.dumps(pushing)
    asked = subprocess.run(
        ["git", "config", "--get-urlmatch", "http.extraheader", "https://git.example/OWNER/project"],
        env={**os.environ, **{name: value for name, value in pushing["env"].items() if name.startswith("GIT_CONFIG")}},
        cwd=runner.work,
        check=True,
        capture_output=True,
        text=True,
    )
    assert asked.stdout == f"AUTHORIZATION: basic {encoded}\n"


def test_nothing_is_left_for_later_steps(runner: Runner) -> None:
    files = {name: runner.folder / name.lower() for name in ("GITHUB_ENV", "GITHUB_PATH", "GITHUB_STATE")}
    for path in files.values():
        path.touch()
    runner.run(
        {"mode": "save", "commit": "true", "token": "secret-of-git"},
        **{name: str(path) for name, path in files.items()},
    )
    assert all(path.read_text() == "" for path in files.values())
    assert "secret" not in runner.output.read_text()
