"""What all commands share: text that is only text, JSON, and progress on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from project import TINY, Project, read_terminal

from castore import Experiment, Repo
from castore.commands import console
from castore.commands.console import Display
from castore.storage import fs

ROOT = Path(__file__).parent.parent.parent


def test_text_from_a_manifest_reaches_the_terminal_as_text_alone(trained_copy: Project) -> None:
    evil = "\x1b]0;gone\x07 \x9b31m \u202e\U000e0001\x7f\nmatch   deadbeef"
    repo = Repo.open(trained_copy.root)
    line = Experiment(model={"n_embd": evil, evil: 1}, tokenizer=evil)
    metrics = {"val_loss": 0.001, evil: 1.0}
    checkpoint_id = repo.save(
        {"model": {}},
        run="evil",
        step=9,
        metrics=metrics,
        experiment=line,
        tags=[evil],
        note=evil,
        config={evil: [evil]},
    ).id
    shown = (
        trained_copy.run("log") + trained_copy.run("show", checkpoint_id) + trained_copy.run("resolve", checkpoint_id)
    )
    shown += trained_copy.train("--resume", checkpoint_id, code=3)
    shown += trained_copy.start("train", "--data-dir", "texts", *TINY, "--session-iters", "1").communicate()[0]
    assert "gone" in shown
    shown += trained_copy.run("show", checkpoint_id, "--json")
    found = trained_copy.json("show", checkpoint_id)
    assert (found["note"], found["config"], found["experiment"]["tokenizer"]) == (evil, {evil: [evil]}, evil)
    assert all(one.isprintable() for one in shown.replace("\n", ""))
    assert "\nmatch   deadbeef" not in shown


def test_json_of_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9-\xc2\x9b"))
    folder.mkdir()
    project = Project(folder)
    root = project.json("init")["root"]
    assert root == str(folder / ".castore")
    out = project.run("init", "--json")
    assert "caf\\udce9-\\u009b" in out
    assert out.encode().isascii()


def has_open(pid: int, path: Path) -> bool:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(link) == str(path):
                return True
    return False


def run_slowly(project: Project, *arguments: str) -> tuple[str, str]:
    """What a command prints and what it shows on a terminal, kept waiting for the lock for longer than two seconds."""
    lock = project.root / ".castore" / "lock"
    ours, theirs = pty.openpty()
    project.environment = project.environment | {"TERM": "xterm"}
    with fs.lock(lock, exclusive=True, timeout=1):
        process = project.start(*arguments, stderr=theirs)
        os.close(theirs)
        while process.poll() is None and not has_open(process.pid, lock):
            time.sleep(0.01)
        time.sleep(2.1)
    shown = read_terminal(ours)
    out, _ = process.communicate()
    assert process.returncode == 0
    return out, shown


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_terminal_sees_that_something_is_under_way(weights: Project, command: str) -> None:
    """On standard error, so that standard output can be read by a program."""
    torch.save({"w": torch.ones(3)}, weights.root / "x.pt")
    arguments = ["import", "x.pt"] if command == "import" else ["export", "best", "x.safetensors"]
    out, shown = run_slowly(weights, *arguments, "--json")
    assert json.loads(out)
    assert f"{command}ing" in shown


def test_a_terminal_gets_a_bar_when_it_takes_long(history_copy: Project) -> None:
    out, shown = run_slowly(history_copy, "verify")
    assert "verify" in shown
    assert "━" in shown
    assert re.fullmatch(r"verify  \d+\.\d MB read: all is well\n", out)


KINDS: list[Any] = ["bytes", "count", "spinner"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seconds", [0, 10])
def test_progress_is_for_long_work_on_a_terminal(
    kind: Any, seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing before the delay, nothing where standard error is no terminal, and never on standard output."""
    monkeypatch.setattr(console, "DELAY", seconds)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = {}
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        with Display("working", kind) as display:
            for done in range(3):
                display(done, 2)
                if is_terminal and not seconds:
                    wait_until(lambda: display._bar is not None)
        assert display.done == 2
        out, shown[is_terminal] = capsys.readouterr()
        assert out == ""
    assert shown[False] == ""
    assert ("working" in shown[True]) == (seconds == 0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_error_ends_the_display_before_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "DELAY", 0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(ZeroDivisionError), Display("working", "bytes") as display:  # noqa: PT012
        wait_until(lambda: display._bar is not None)
        _ = 1 / 0
    before = capsys.readouterr().err
    assert before.endswith("\x1b[?25h")  # the cursor is back
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


# -- standard output ---------------------------------------------------------------------------------------------------


def test_json_in_a_file_is_whole_while_a_terminal_shows_the_progress(project: Project, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    project.environment = project.environment | {"TERM": "xterm"}
    with open(tmp_path / "summary.json", "w+") as file:
        process = project.start("train", "--json", "--data-dir", "texts", *TINY, stdout=file, stderr=theirs)
        os.close(theirs)
        shown = read_terminal(ours)
        assert process.wait() == 0
        file.seek(0)
        assert json.load(file)["final_step"] == 4
    assert "━" in shown


@pytest.mark.parametrize("command", ["log", "log --json", "show latest", "report --format json"])
def test_a_reader_that_goes_away_ends_the_program_quietly(tmp_path: Path, command: str) -> None:
    project = Project(tmp_path)
    repo = Repo.init(tmp_path)
    for step in range(80 if command != "show latest" else 1):
        note = "n" * (3000 if command != "show latest" else 300_000)
        repo.save({"model": {"x": step}}, run="r", step=step, note=note, tags=[note[:3000]])
    process = project.start(*command.split())
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait() == 1
    assert process.stderr.read() == ""
    process.stderr.close()


# -- logs --------------------------------------------------------------------------------------------------------------

LOGS = r"""
import logging, sys
from castore.__main__ import app, main
@app.command()
def speak():
    logger = logging.getLogger("castore.remotes.test")
    logger.debug("the details")
    logger.info("it went \x1b[31mon\nsecond line")
main()
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ""),
        (["-v"], "castore.remotes.test: it went \\x1b[31mon\nsecond line\n"),
        (["--verbose"], "castore.remotes.test: it went \\x1b[31mon\nsecond line\n"),
        (["-vv"], "castore.remotes.test: the details\ncastore.remotes.test: it went \\x1b[31mon\nsecond line\n"),
    ],
    ids=["silent", "info", "long", "debug"],
)
def test_what_is_logged_is_shown_on_request(options: list[str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGS, *options, "speak"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("", expected)
