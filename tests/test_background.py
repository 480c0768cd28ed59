"""Saves in the background: nothing that happens meanwhile changes what is saved, and no error is lost."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact, parts

from castore import Experiment, Repo
from castore.errors import InvalidManifest, NothingAvailable, PushIncomplete, StorageError, UnsupportedValue, UsageError
from castore.storage import fs
from castore.torch import AsyncSaver, Checkpointer


class Gate:
    """Holds every write until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.open = threading.Event()
        write = fs.write

        def gated(descriptor: int, path: Path, buffers: Any) -> int:
            assert self.open.wait(20)
            if error is not None:
                raise StorageError("write", str(path), error)
            return write(descriptor, path, buffers)

        monkeypatch.setattr(fs, "write", gated)


def test_the_state_may_change_as_soon_as_save_has_returned(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    state = parts(1)
    with AsyncSaver(repo) as saver:
        saver.save(state, run="a", step=1)
        for tensor in state["model"].values():
            tensor.zero_()
        state["trainer"]["order"].clear()
        state["model"].clear()
        assert saver.poll() is None
        gate.open.set()
        saved = saver.wait()
        assert saved is not None
        assert saver.wait() is None
    assert exact(repo.load(saved.id)) == exact(parts(1))


def test_one_save_waits_for_the_other_and_the_memory_is_used_again(repo: Repo) -> None:
    with AsyncSaver(repo) as saver:
        saver.save(parts(1), run="a", step=1)
        memory = {id(buffer) for buffers in saver._buffers.values() for buffer in buffers}
        saver.save(parts(2), run="a", step=2)
        assert {id(buffer) for buffers in saver._buffers.values() for buffer in buffers} == memory
        saver.save({"model": {"other": torch.ones(7)}}, run="a", step=3)
    loaded = {entry.manifest.step: repo.load(entry.id) for entry in repo.checkpoints()}
    assert exact(loaded) == exact({3: {"model": {"other": torch.ones(7)}}, 2: parts(2), 1: parts(1)})


def test_the_time_of_a_checkpoint_is_that_of_its_state(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with AsyncSaver(repo) as saver:
        saver.save(parts(1), run="a", step=1)
        other = Repo.open(repo.root)
        gate.open.set()
        saved = saver.wait()
        assert saved is not None
        later = other.save(parts(2), run="a", step=2)
    assert saved.manifest.created < later.manifest.created


@pytest.mark.parametrize("call", ["save", "poll", "wait", "end"])
def test_an_error_in_the_background_is_raised_once_by_the_next_call(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    gate = Gate(monkeypatch, OSError(28, "No space left on device"))
    gate.open.set()
    saver = AsyncSaver(repo)
    saver.save(parts(1), run="a", step=1)
    saver._pending[0].exception()
    calls = {
        "save": lambda: saver.save(parts(2), run="a", step=2),
        "poll": saver.poll,
        "wait": saver.wait,
        "end": lambda: saver.__exit__(None, None, None),
    }
    with pytest.raises(StorageError, match="No space left"):
        calls[call]()
    assert saver.wait() is None
    assert repo.checkpoints() == []


def test_what_cannot_be_stored_is_told_at_once(repo: Repo) -> None:
    with AsyncSaver(repo) as saver, pytest.raises(UnsupportedValue):
        saver.save({"model": {"x": object()}}, run="a", step=1)


@pytest.mark.parametrize(
    ("error", "says"),
    [(StorageError("write", "x", OSError(28, "full")), "can't write x: full"), (MemoryError(), "MemoryError")],
)
def test_an_error_of_the_block_is_not_hidden_by_one_in_the_background(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def write(*_: Any) -> int:
        raise error

    monkeypatch.setattr(fs, "write", write)

    def fail() -> None:
        with AsyncSaver(repo) as saver:
            saver.save(parts(1), run="a", step=1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    assert caught.value.__notes__ == [f"a save in the background failed, too: {says}"]


SCRIPT = """
import sys, torch, castore
from castore.torch import AsyncSaver
repo = castore.Repo.open(sys.argv[1])
saver = AsyncSaver(repo)
saver.save({"model": {"x": torch.ones(2_000_000)}}, run="a", step=1, **{FIELDS})
"""


def test_a_program_that_ends_without_waiting_saves_all_the_same(repo: Repo) -> None:
    script = SCRIPT.replace("{FIELDS}", "{}")
    subprocess.run([sys.executable, "-c", script, str(repo.root.parent)], check=True)
    (entry,) = repo.checkpoints()
    assert torch.equal(repo.load(entry.id)["model"]["x"], torch.ones(2_000_000))


def test_a_program_that_ends_without_asking_is_told_of_the_error(repo: Repo) -> None:
    shutil.rmtree(repo.root / "tmp")
    (repo.root / "tmp").write_text("in the way")
    for end in ("", "del saver\nprint('on')"):
        script = SCRIPT.replace("{FIELDS}", "{}") + end
        done = subprocess.run([sys.executable, "-c", script, str(repo.root.parent)], capture_output=True, text=True)
        assert done.returncode == 1
        assert "a save in the background failed: can't create" in done.stderr
        assert done.stdout == ("on\n" if end else "")
    assert repo.checkpoints() == []


FORKING = """
import os, sys, threading, torch, castore
from castore.torch import AsyncSaver
repo = castore.Repo.open(sys.argv[1])
saver = AsyncSaver(repo)
original = repo.save
has_ended = threading.Event()
def slow(*arguments, **fields):
    has_ended.wait()
    return original(*arguments, **fields)
repo.save = slow
saver.save({"model": {"x": torch.ones(10)}}, run="a", step=1)
child = os.fork()
if child == 0:
    sys.exit(0)  # as a worker of a data loader does, by way of the handlers of the interpreter's end
assert os.waitpid(child, 0)[1] == 0
has_ended.set()
saver.wait()
print("saved")
"""


def test_a_saver_that_only_its_own_thread_holds_ends_without_a_word(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    saver = AsyncSaver(repo)
    gone = weakref.ref(saver)
    saver.save({"model": {"w": torch.ones(300_000)}}, run="main", step=1)
    del saver  # the save goes on
    deadline = time.monotonic() + 30
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone() is None
    assert repo.find("latest").manifest.step == 1
    assert not told


def test_a_forked_child_does_not_wait_for_the_save_of_its_parent(repo: Repo) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING, str(repo.root.parent)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("saved\n", 0), done.stderr  # one that waited would wait for ever
    assert len(repo.checkpoints()) == 1


def test_what_cannot_be_recorded_is_refused_before_anything_is_copied(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    saver = AsyncSaver(repo)
    monkeypatch.setattr(saver, "_copy", lambda name, _flat: copied.append(name))
    for fields, says in (
        ({"step": -1}, "step -1 is not between"),
        ({"run": "a b"}, "run 'a b' is not 1 to 64"),
        ({"config": {"model": {"path": Path("/x")}}}, "config.model.path: PosixPath is not a JSON value"),
        ({"info": {"a": [1.0, float("inf")]}}, r"info.a\[1\]: inf is not a finite number"),
        ({"metrics": {"val_loss": float("nan")}}, "val_loss is nan"),
    ):
        with pytest.raises(InvalidManifest, match=says):
            saver.save({"model": {"x": torch.ones(2)}}, **({"run": "a", "step": 1} | fields))
    with pytest.raises(UsageError, match="takes no 'metric': did you mean 'metrics'"):
        saver.save({"model": {"x": torch.ones(2)}}, run="a", step=1, metric={})
    with pytest.raises(UsageError, match="needs a run"):
        saver.save({"model": {"x": torch.ones(2)}}, step=1)
    assert copied == []


def test_a_repository_can_be_pickled(repo: Repo) -> None:
    saved = repo.save(parts(1), run="a", step=1)
    again = pickle.loads(pickle.dumps(repo))
    assert again.root == repo.root
    assert again.config == repo.config
    assert exact(again.load(saved.id)) == exact(parts(1))


# -- Checkpointer ----------------------------------------------------------------------------------------------------

EXPERIMENT = Experiment(model={"width": 8}, tokenizer="t", data="d")


class Loop:
    """Somebody's training loop: a small model, noise from torch's generator, a schedule."""

    def __init__(self, repo: Repo, **options: Any) -> None:
        torch.manual_seed(7)
        self.model = torch.nn.Linear(8, 8)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.checkpointer = Checkpointer(
            repo, self.model, self.optimizer, run="mine", experiment=EXPERIMENT, schedule=self.schedule, **options
        )

    def train(self, start: int, stop: int) -> float:
        for step in range(start, stop):
            loss = (self.model(torch.randn(4, 8)) ** 2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            if (step + 1) % 2 == 0:
                self.checkpointer.save(step + 1, {"val_loss": loss.item()})
        self.checkpointer.wait()
        return loss.item()


@pytest.mark.parametrize("background", [True, False])
def test_a_loop_that_is_resumed_goes_on_as_if_it_had_never_stopped(repo: Repo, background: bool) -> None:
    whole = Loop(repo, background=background).train(0, 8)
    entries = repo.checkpoints()
    assert [entry.manifest.step for entry in entries] == [8, 6, 4, 2]
    assert [entry.manifest.parent for entry in entries] == [entries[1].id, entries[2].id, entries[3].id, None]
    other = Loop(repo)
    torch.manual_seed(99)
    assert other.checkpointer.resume(entries[2].id) == 4
    assert other.train(4, 8) == whole


def test_the_end_of_the_block_waits(repo: Repo) -> None:
    loop = Loop(repo)
    with loop.checkpointer as checkpointer:
        checkpointer.save(1)
    assert len(repo.checkpoints()) == 1


def test_a_first_start_is_at_step_0_and_one_without_data_is_an_error(repo: Repo) -> None:
    loop = Loop(repo)
    assert loop.checkpointer.resume() == 0
    loop.train(0, 2)
    repo.store.discard(list(repo.store.stored()))
    repo.store.empty_trash(repo.store.list_trash())
    fresh = Loop(Repo.open(repo.root))
    with pytest.raises(NothingAvailable):
        fresh.checkpointer.resume()
    assert fresh.checkpointer.resume(allow_fresh=True) == 0


def test_tags_notes_and_settings_are_recorded(repo: Repo) -> None:
    loop = Loop(repo)
    loop.checkpointer.save(1, {"val_loss": 2.0}, tags=["a"], note="b", config={"lr": 0.1})
    saved = loop.checkpointer.wait()
    assert saved is not None
    assert (saved.manifest.tags, saved.manifest.note, saved.manifest.config) == (["a"], "b", {"lr": 0.1})
    assert saved.manifest.run == "mine"


PUSHING = """
import pathlib, sys, torch, castore
from castore.torch import AsyncSaver
repo = castore.Repo.init(sys.argv[1])
path = repo.root / "config.toml"
path.write_text(path.read_text() + 'shared = "' + sys.argv[2] + '"\\npush = "auto"\\n')
repo = castore.Repo.open(sys.argv[1])
"""
UNPUSHED = """
saver = AsyncSaver(repo)
saver.save({"model": {"w": torch.ones(3)}}, run="main", step=1)
"""


def run_program(script: str, folder: Path, shared: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(folder), str(shared)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("works", [True, False])
def test_a_program_that_ends_without_a_with_block_waits_for_the_push_and_fails_with_it(
    tmp_path: Path, works: bool
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / ("shared" if works else "file/in the way")
    process = run_program(PUSHING + UNPUSHED, tmp_path, folder)
    (entry,) = Repo.open(tmp_path).checkpoints()
    if works:
        assert (process.returncode, process.stderr) == (0, "")
        assert [path.name[10:22] for path in (tmp_path / "shared" / "manifests").rglob("*.json")] == [entry.id[:12]]
    else:
        assert process.returncode == 1
        assert process.stderr.startswith("castore: 1 checkpoint could not be pushed to shared; nothing is lost")


UNEXPECTED = """
def fail(*arguments, **options):
    raise {ERROR}
repo.push = fail
"""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("MemoryError", "MemoryError"),
        ("RuntimeError('can not start new thread')", "RuntimeError: can not start new thread"),
        ("BaseException('panicked')", "BaseException: panicked"),
    ],
)
def test_a_push_that_fails_in_a_way_nobody_expected_fails_the_program(tmp_path: Path, error: str, says: str) -> None:
    script = PUSHING + UNEXPECTED.replace("{ERROR}", error) + UNPUSHED
    process = run_program(script, tmp_path, tmp_path / "shared")
    assert process.returncode == 1
    first, why = process.stderr.splitlines()
    assert first.startswith("castore: 1 checkpoint could not be pushed to shared; nothing is lost")
    assert why == f"  {says}"


@pytest.fixture
def pushing(tmp_path: Path) -> Repo:
    """A repository whose saves are pushed to the folder ``shared``."""
    path = Repo.init(tmp_path).root / "config.toml"
    path.write_text(path.read_text() + 'shared = "shared"\npush = "auto"\n')
    return Repo.open(tmp_path)


def pushed(repo: Repo) -> list[str]:
    return sorted(path.name[10:22] for path in (repo.root.parent / "shared").rglob("manifests/**/*.json"))


def save_and_wait(repo: Repo, error: Exception | None = None) -> None:
    with AsyncSaver(repo) as saver:
        saver.save(parts(1), run="a", step=1)
        saver.wait()
        if error:
            raise error


def test_the_end_of_the_block_tells_of_any_error_of_a_push(pushing: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(pushing, "push", fail)
    with pytest.raises(PushIncomplete, match="1 checkpoint could not be pushed to shared") as caught:
        save_and_wait(pushing)
    assert caught.value.reason == "MemoryError"
    assert isinstance(caught.value.__cause__, MemoryError)
    (entry,) = pushing.checkpoints()
    assert caught.value.ids == (entry.id,)
    with pytest.raises(ZeroDivisionError) as divided:
        save_and_wait(pushing, ZeroDivisionError())
    assert "1 checkpoint could not be pushed" in divided.value.__notes__[0]


INTERRUPTED = """
import os, signal, threading
may_fail = threading.Event()
tries = []
def fail(*arguments, **options):
    tries.append(1)
    if len(tries) == 2:  # the one that is waited for
        os.kill(os.getpid(), signal.SIGINT)
        may_fail.wait(20)
    raise MemoryError
repo.push = fail
saver = AsyncSaver(repo)
saver.save({"model": {"w": torch.ones(3)}}, run="main", step=1)
saver.wait()
try:
    saver.finish_pushing()
except KeyboardInterrupt:
    print("stopped", flush=True)
may_fail.set()
"""


def test_a_push_whose_wait_was_interrupted_is_told_of_at_the_end(tmp_path: Path) -> None:
    process = run_program(PUSHING + INTERRUPTED, tmp_path, tmp_path / "shared")
    assert (process.stdout, process.returncode) == ("stopped\n", 1), process.stderr
    assert "1 checkpoint could not be pushed" in process.stderr


class NoThread:
    """Makes the system refuse threads of a name, until ``allowed`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.allowed = False
        start = threading.Thread.start

        def limited(thread: threading.Thread) -> None:
            if thread.name.startswith(name) and not self.allowed:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)


def test_a_push_that_no_thread_can_be_started_for_comes_with_the_next(
    pushing: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = NoThread(monkeypatch, "castore-push")
    with pytest.raises(PushIncomplete, match="can't start new thread"):
        save_and_wait(pushing)
    with AsyncSaver(pushing) as saver:
        saver.save(parts(2), run="a", step=2)
        saved = saver.wait()
        assert saved is not None  # it is in the store, whatever becomes of the push
        assert saver.unpushed == (saved.id,)
        assert not saver.is_pushing
        limit.allowed = True
        saver.save(parts(3), run="a", step=3)
    newest, second, _ = pushing.checkpoints()
    assert pushed(pushing) == sorted(entry.id[:12] for entry in (newest, second))


def test_a_save_that_no_thread_can_be_started_for_is_never_made_later(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then its memory holds another state."""
    limit = NoThread(monkeypatch, "castore-save")
    with AsyncSaver(repo) as saver:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            saver.save(parts(1), run="a", step=1)
        limit.allowed = True
        saver.save(parts(2), run="a", step=2)
    loaded = {entry.manifest.step: repo.load(entry.id) for entry in repo.checkpoints()}
    assert exact(loaded) == exact({2: parts(2)})
