"""The program as a whole: help, wrong calls, options before the command, start-up, packaging."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from project import Project

import castore

ROOT = Path(__file__).parent.parent.parent

# -- help -------------------------------------------------------------------------------------------------------------


COMMANDS = (
    "init", "train", "demo",
    "log", "show", "resolve", "diff", "stats",
    "gc", "pin", "unpin", "tag", "untag", "forget",
    "push", "fetch", "pull", "status", "ls", "find",
    "verify", "doctor",
    "export", "import", "average", "add", "checkout",
    "report",
)  # fmt: skip


HELP = [*COMMANDS[: COMMANDS.index("status")], "remote", *COMMANDS[COMMANDS.index("status") :], "ci"]


def test_help_names_every_command_and_exit_code(project: Project) -> None:
    out = project.run("--help")
    assert [line.split()[0] for line in out.splitlines() if re.match(r"  [a-z]+  ", line)] == HELP
    assert "7 nothing to do" in out
    assert re.fullmatch(r"castore \d+\.\d+\.\d+\n", project.run("--version"))


@pytest.mark.parametrize("command", [*COMMANDS, "ci restore", "ci save"])
def test_every_command_has_help_with_an_example_and_json(project: Project, command: str) -> None:
    out = project.call(*command.split(), "--help")
    assert f"Example: castore {command}" in out
    assert "--json" in out


# -- what is wrong before a command begins ----------------------------------------------------------------------------


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


def test_a_missing_configuration_is_not_taken_for_no_repository(trained_copy: Project) -> None:
    (trained_copy.root / ".castore" / "config.toml").unlink()
    assert "config.toml: is missing: `castore init`" in trained_copy.train(code=2)
    trained_copy.call("init")
    assert len(trained_copy.json("log")) == 2


def test_a_store_that_may_not_be_written_can_be_read(trained_copy: Project) -> None:
    before = trained_copy.json("log")
    subprocess.run(["mount", "--bind", "-o", "ro", ".castore", ".castore"], cwd=trained_copy.root, check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", ".castore"], cwd=trained_copy.root, check=True)
        assert trained_copy.json("log") == before
        assert trained_copy.json("resolve")["match"]["step"] == 4
        assert "can't" in trained_copy.train(code=1)
    finally:
        subprocess.run(["umount", ".castore"], cwd=trained_copy.root, check=True)


def test_wrong_remotes_are_a_usage_error(history_copy: Project) -> None:
    config = history_copy.root / ".castore" / "config.toml"
    for text in ('[remotes]\n"a b" = "x"\n', '[remotes]\na = ""\n', "[remotes]\na = 3\n", "remotes = 1\n"):
        config.write_text(text)
        assert "config.toml: " in history_copy.call("log", code=2)


def test_outside_a_repository_each_says_what_to_do(tmp_path: Path) -> None:
    project = Project(tmp_path)
    for arguments in (["export", "best", "x.pt"], ["import", "x.pt"], ["add", "texts"], ["checkout", "latest"]):
        assert "run `castore init`" in project.call(*arguments, code=2)


# -- completion -------------------------------------------------------------------------------------------------------


def completed(project: Project, *words: str) -> list[str]:
    """What bash is offered for the last word."""
    environment = {"_CASTORE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["castore", *words])}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'castore'; from castore.__main__ import main; main()"],
        env={**project.environment, **environment, "COMP_CWORD": str(len(words))},
        cwd=project.root,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_tab_offers_ids_runs_tags_and_remotes(history_copy: Project, tmp_path: Path) -> None:
    history_copy.call("remote", "add", "bucket", str(tmp_path))
    history_copy.call("tag", "latest", "stable")
    history_copy.call("add", "texts", "--name", "books")
    run, first = history_copy.json("log")[0]["run"], history_copy.json("log")[0]["id"][:12]
    offered = completed(history_copy, "show", "")
    assert offered[:2] == ["best", "latest"]
    assert {f"{run}:best", "stable", first} <= set(offered)
    assert completed(history_copy, "show", first[:4]) == [first]
    assert completed(history_copy, "push", "--remote", "") == ["bucket"]
    assert completed(history_copy, "untag", "s") == ["stable"]
    assert completed(history_copy, "checkout", "boo") == ["books:latest"]
    assert run in completed(history_copy, "log", "--run", "")
    elsewhere = Project(tmp_path)
    assert completed(elsewhere, "-C", str(history_copy.root), "log", "--tag", "") == ["stable"]
    assert completed(elsewhere, "show", "") == []


# -- start-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["log"], ["log", "--json"], ["resolve"], ["train", "--help"]])
def test_looking_imports_neither_torch_nor_numpy(trained: Project, arguments: list[str]) -> None:
    code = "import sys; from castore.__main__ import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=trained.root, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy"} & set(done.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["ls", "best"],
        ["ls", "best", "model"],
        ["remote", "list"],
        ["remote", "add", "x", "s3://y/z", "--help"],
        ["stats"],
        ["doctor"],
        ["log", "--graph"],
        ["verify", "--help"],
        ["diff", "best", "best"],
    ],
)
def test_examining_imports_neither_torch_nor_numpy(history: Project, arguments: list[str]) -> None:
    code = "import sys; from castore.__main__ import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=history.root, capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy"} & set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["add", "texts"], ["checkout", "latest", "out"]])
def test_files_need_neither_torch_nor_numpy(empty: Project, arguments: list[str]) -> None:
    empty.call("add", "texts")
    # new for the second one, one that shrinks and one that doesn't, and both of more than a few pages
    (empty.root / "texts" / "long.txt").write_text(" ".join(str(i * i) for i in range(50_000)))
    (empty.root / "texts" / "noise.bin").write_bytes(random.Random(1).randbytes(300_000))
    code = "import sys; from castore.__main__ import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=empty.root, capture_output=True, text=True)
    assert done.returncode == 0
    assert not {"torch", "numpy"} & set(done.stderr.split())


# -- packaging ---------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_two_packages_and_no_module_beside_them() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = settings["tool"]["setuptools"]
    assert "py-modules" not in listed
    assert settings["project"]["scripts"] == {"castore": "castore.__main__:main"}
    folders = [path.parent for package in ("castore", "nanecho") for path in (ROOT / package).rglob("__init__.py")]
    assert sorted(listed["packages"]) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with what the wheel installs."""
    for package in ("castore", "nanecho"):
        shutil.copytree(ROOT / package, tmp_path / "site" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


@pytest.mark.parametrize("start", [["-m", "castore"], ["-c", "from castore.__main__ import main; main()"]])
def test_a_module_of_the_user_named_cli_is_left_alone(project: Project, installed: Path, start: list[str]) -> None:
    (project.root / "cli.py").write_text("raise SystemExit('the cli of the user')")
    environment = project.environment | {"PYTHONPATH": f"{project.root}{os.pathsep}{installed}"}
    done = subprocess.run(
        [sys.executable, *start, "init", "--json"], cwd=project.root, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"root": str(project.root / ".castore")}


def test_a_checkout_runs_without_being_installed(project: Project) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "--version"]
    done = subprocess.run(command, cwd=project.root, env=project.environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"castore {castore.__version__}\n")


@pytest.mark.parametrize("what", ["pipe", "folder", "link to a device"])
def test_settings_that_are_no_regular_file_are_refused_and_not_waited_for(empty: Project, what: str) -> None:
    config = empty.root / ".castore" / "config.toml"
    config.unlink()
    if what == "pipe":
        os.mkfifo(config)
    elif what == "folder":
        config.mkdir()
    else:
        config.symlink_to("/dev/zero")
    assert "config.toml: can't be read: " in empty.run("log", code=2)
