"""Resuming: whose checkpoint, all of it or nothing, and by way of load_state_dict; stopping on request."""

from __future__ import annotations

import copy
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import exact

from castore import Experiment, Metric, Repo
from castore.errors import ConfigError, CorruptObject, NothingAvailable, PushIncomplete, StorageError, UsageError
from castore.restoring import random_state
from castore.torch import Checkpointer, Resumed
from castore.transfer import read_manifests


def linear(seed: int, width: int = 4) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(width, width)


def optimizer_of(model: torch.nn.Module) -> torch.optim.AdamW:
    """One that has state, as after a step."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, next(model.parameters()).shape[-1])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def everything(checkpointer: Checkpointer) -> Any:
    """All that a resume may change, bit for bit."""
    parts = [checkpointer._model, checkpointer._optimizer, *checkpointer._others.values()]
    return exact([part.state_dict() for part in parts if part is not None]), exact(random_state())


# -- whose -------------------------------------------------------------------------------------------------------------


def test_two_loops_in_one_repository_never_load_each_others_weights(repo: Repo) -> None:
    first, second = linear(1), linear(2)
    a, b = Checkpointer(repo, first, run="a"), Checkpointer(repo, second, run="b")
    a.save(100, {"val_loss": 1.0})
    a.wait()
    assert b.resume() == 0
    b.save(5, {"val_loss": 9.0})
    b.wait()
    before = exact(first.state_dict()), exact(second.state_dict())
    with torch.no_grad():
        first.weight.zero_()
        second.weight.zero_()
    assert (a.resume(), b.resume(), a.resume("best")) == (100, 5, 100)
    assert (exact(first.state_dict()), exact(second.state_dict())) == before


def test_a_second_experiment_starts_at_its_own_step(repo: Repo) -> None:
    """Of the same run by default: a wider model, another data set, which no checkpoint here is of."""
    checkpointer = Checkpointer(repo, linear(1), experiment=Experiment(data="a"))
    checkpointer.save(100, {"val_loss": 1.0})
    checkpointer.wait()
    fresh = Checkpointer(repo, linear(1), experiment=Experiment(data="b")).resume()
    assert (fresh, fresh.id) == (0, "")
    assert "no checkpoint of this experiment" in fresh.why
    assert Checkpointer(repo, linear(1, 8)).resume() == 0


def test_without_an_experiment_the_tensors_make_it(repo: Repo) -> None:
    for width in (4, 8):
        checkpointer = Checkpointer(repo, linear(1, width))
        assert checkpointer.resume() == 0
        checkpointer.save(width, {"val_loss": 1.0})
        checkpointer.wait()
    assert [Checkpointer(repo, linear(9, width)).resume() for width in (4, 8)] == [4, 8]
    wrapped = torch.nn.DataParallel(linear(9))
    assert Checkpointer(repo, wrapped).resume() == 4  # `module.` before each name is no other experiment


def test_it_goes_on_from_where_the_run_got_furthest_and_from_the_best_on_request(repo: Repo) -> None:
    """When the loss rises, the best would lead back to the same place for ever."""
    checkpointer = Checkpointer(repo, linear(1), run="r")
    for step, loss in ((10, 1.0), (20, 2.0), (30, 3.0)):
        checkpointer.save(step, {"val_loss": loss})
    checkpointer.wait()
    resumed = Checkpointer(repo, linear(2), run="r").resume()
    assert isinstance(resumed, Resumed)
    assert (resumed, resumed.run, resumed.why) == (30, "r", "the furthest step of run r")
    assert resumed.id == repo.resolve("r:latest").require().id
    best = Checkpointer(repo, linear(2), run="r").resume("best")
    assert (best, best.why) == (10, "best of run r")
    assert Checkpointer(repo, linear(2), run="other").resume(resumed.id) == 30


def test_what_is_scored_can_be_named(repo: Repo) -> None:
    checkpointer = Checkpointer(repo, linear(1), maximize="accuracy", minimize=("ppl",))
    for step, accuracy in ((1, 0.9), (2, 0.5)):
        checkpointer.save(step, {"accuracy": accuracy, "ppl": 7.0})
    saved = checkpointer.wait()
    assert saved is not None
    assert saved.manifest.experiment.metrics == {"accuracy": Metric("max"), "ppl": Metric("min")}
    assert Checkpointer(repo, linear(1), maximize="accuracy", minimize=("ppl",)).resume("best") == 1


# -- all or nothing ----------------------------------------------------------------------------------------------------


class Part:
    """Something with a state that may refuse to load one."""

    def __init__(self, value: int, refuses: bool = False) -> None:
        self.value, self.refuses = value, refuses

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]
        if self.refuses and self.value == 1:
            raise ValueError("not this one")


@pytest.fixture
def saved(repo: Repo) -> Repo:
    model = linear(1)
    checkpointer = Checkpointer(repo, model, optimizer_of(model), experiment=Experiment(), counter=Part(1))
    checkpointer.save(7, {"val_loss": 1.0})
    checkpointer.wait()
    return repo


def other(repo: Repo, width: int = 4, *, optimizer: bool = True, **others: Any) -> Checkpointer:
    model = linear(2, width)
    made = optimizer_of(model) if optimizer else None
    random.seed(5)
    np.random.seed(5)
    return Checkpointer(repo, model, made, experiment=Experiment(), **others)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 8, "counter": Part(2)}, r"has \[4, 4\] for weight, where the model has \[8, 8\]"),
        ({}, "has a state of 'counter', which this Checkpointer was not given: give counter="),
        (
            {"counter": Part(2), "scaler": Part(3)},
            "has no state of 'scaler': leave it out, or resume with strict=False",
        ),
        ({"counter": Part(2, refuses=True)}, "doesn't fit, and nothing was changed: not this one"),
        ({"counter": Part(2), "optimizer": False}, "has an optimizer, and this Checkpointer was given none"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(saved: Repo, options: dict[str, Any], says: str) -> None:
    checkpointer = other(saved, **options)
    before = everything(checkpointer)
    with pytest.raises(UsageError, match=says):
        checkpointer.resume()
    assert everything(checkpointer) == before


def test_an_optimizer_with_other_groups_changes_nothing(saved: Repo) -> None:
    model = linear(2)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}]
    checkpointer = Checkpointer(saved, model, torch.optim.AdamW(groups), experiment=Experiment(), counter=Part(2))
    before = everything(checkpointer)
    with pytest.raises(UsageError, match="different number of parameter groups"):
        checkpointer.resume()
    assert everything(checkpointer) == before


@pytest.mark.parametrize("part", ["model", "optimizer", "trainer"])
def test_damaged_data_changes_nothing(saved: Repo, part: str) -> None:
    from castore.format import part_index

    entry = saved.checkpoints()[0]
    chunk = part_index.decode_chunks(saved.store.read(entry.manifest.parts[part].index))[0].id
    path = saved.store.path(chunk)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    checkpointer = other(saved, counter=Part(2))
    before = everything(checkpointer)
    with pytest.raises(CorruptObject):
        checkpointer.resume()
    assert everything(checkpointer) == before
    with pytest.raises(NothingAvailable):
        checkpointer.resume()
    assert everything(checkpointer) == before


def test_without_strict_what_only_one_side_has_is_left_alone(saved: Repo) -> None:
    scaler = Part(3)
    checkpointer = other(saved, scaler=scaler)
    assert checkpointer.resume(strict=False) == 7
    assert scaler.value == 3


def test_a_checkpoint_of_something_else_is_told(repo: Repo) -> None:
    own = repo.save({"model": linear(1).state_dict()}, run="main", step=1, experiment=Experiment()).id
    with pytest.raises(UsageError, match="was not saved by a Checkpointer"):
        other(repo).resume(own)


def test_a_mean_in_its_run_is_passed_over(repo: Repo) -> None:
    from castore.averaging import average, choose

    checkpointer = other(repo)
    for step in (1, 2):
        checkpointer.save(step, {"val_loss": 1.0})
        checkpointer.wait()
    (run,) = {entry.manifest.run for entry in repo.checkpoints()}
    last = repo.find("latest").id
    mean = average(repo, choose(repo, "latest", 2), run=run)
    assert mean.saved.manifest.step == 2
    again = other(repo)
    assert again.resume() == 2
    assert again.parent == last


def test_reserved_names_are_refused(repo: Repo) -> None:
    with pytest.raises(UsageError, match="'random' is castore's own name"):
        Checkpointer(repo, linear(1), random=Part(1))


# -- by way of load_state_dict -----------------------------------------------------------------------------------------


class Versioned(torch.nn.Module):
    """A module of version 2, whose version 1 kept its scale by another measure."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2))
        self.note = "new"

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[prefix + "scale"] = state[prefix + "scale"] * 10
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]


def test_versions_and_extra_state_of_modules_come_back(repo: Repo) -> None:
    model = torch.nn.Sequential(Versioned(), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].scale.fill_(3)
    model[0].note = "old"
    checkpointer = Checkpointer(repo, model)
    checkpointer.save(1, {"val_loss": 1.0})
    checkpointer.wait()
    again = torch.nn.Sequential(Versioned(), torch.nn.BatchNorm1d(2))
    Checkpointer(repo, again).resume()
    assert again[0].scale.tolist() == [3, 3]  # not migrated a second time
    assert again[0].note == "old"
    assert exact(dict(again.state_dict())) == exact(dict(model.state_dict()))


def test_load_hooks_run(repo: Repo) -> None:
    model = linear(1)
    checkpointer = Checkpointer(repo, model)
    checkpointer.save(1, {"val_loss": 1.0})
    checkpointer.wait()
    again = linear(2)
    seen: list[str] = []
    again.register_load_state_dict_post_hook(lambda *_: seen.append("post"))
    again._register_load_state_dict_pre_hook(lambda *_: seen.append("pre"))
    Checkpointer(repo, again).resume()
    assert seen == ["pre", "post"]
    assert exact(dict(again.state_dict())) == exact(dict(model.state_dict()))


class Copying(torch.nn.Linear):
    """A module whose state_dict returns copies."""

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        state = super().state_dict(*arguments, **options)
        return OrderedDict((key, value.clone()) for key, value in state.items())


def test_a_state_dict_of_copies_is_no_reason_to_load_nothing(repo: Repo) -> None:
    first, second = Copying(2, 2), Copying(2, 2)
    checkpointer = Checkpointer(repo, first)
    checkpointer.save(1, {"val_loss": 1.0})
    checkpointer.wait()
    Checkpointer(repo, second).resume()
    assert exact(dict(second.state_dict())) == exact(dict(first.state_dict()))


def test_a_model_on_the_meta_device_is_told_what_to_do(repo: Repo) -> None:
    checkpointer = Checkpointer(repo, linear(1))
    checkpointer.save(1, {"val_loss": 1.0})
    checkpointer.wait()
    with pytest.raises(UsageError, match=r"is on the meta device: .*to_empty"):
        Checkpointer(repo, linear(1).to("meta")).resume()


@pytest.mark.parametrize("saved_as", ["plain", "wrapped"])
def test_wrapped_and_plain_models_load_each_others_checkpoints(repo: Repo, saved_as: str) -> None:
    def make(seed: int, kind: str) -> torch.nn.Module:
        return torch.nn.DataParallel(linear(seed)) if kind == "wrapped" else linear(seed)

    first = make(1, saved_as)
    checkpointer = Checkpointer(repo, first)
    checkpointer.save(1, {"val_loss": 1.0})
    checkpointer.wait()
    second = make(2, "plain" if saved_as == "wrapped" else "wrapped")
    assert Checkpointer(repo, second).resume() == 1
    assert exact(list(second.state_dict().values())) == exact(list(first.state_dict().values()))


@pytest.mark.parametrize("context", ["inference", "device", "autocast", "no_grad"])
def test_what_surrounds_a_call_changes_nothing(repo: Repo, context: str) -> None:
    contexts = {
        "inference": lambda: torch.inference_mode(),
        "device": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "no_grad": lambda: torch.no_grad(),
    }
    first, second = linear(1), linear(2)
    saving, loading = (Checkpointer(repo, model, optimizer_of(model)) for model in (first, second))
    with contexts[context]():
        saving.save(1, {"val_loss": 1.0})
        saving.wait()
        assert loading.resume() == 1
    assert exact(dict(second.state_dict())) == exact(dict(first.state_dict()))
    assert second.weight.requires_grad
    second(torch.ones(1, 4)).sum().backward()  # tensors made in inference mode would refuse
    loading._optimizer.step()  # type: ignore[union-attr]


def test_a_metric_that_is_not_finite_costs_no_weights(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = Checkpointer(repo, linear(1))
    with caplog.at_level("WARNING", "castore"):
        checkpointer.save(1, {"val_loss": 1.0, "grad_norm": float("nan"), "lr": 0.1})
    saved = checkpointer.wait()
    assert saved is not None
    assert saved.manifest.metrics == {"val_loss": 1.0, "lr": 0.1}
    assert "metric grad_norm is nan and was left out" in caplog.text


def test_a_folder_stands_for_the_repository_in_it_or_above_it_or_a_new_one(repo: Repo, tmp_path: Path) -> None:
    below = repo.root.parent / "scripts"
    below.mkdir()
    assert Checkpointer(below, linear(0)).repo.root == repo.root
    outside = Path(tempfile.mkdtemp(dir=tmp_path.parent))
    made = Checkpointer(str(outside), linear(0)).repo
    assert made.root == outside / ".castore"
    (made.root / "config.toml").write_text("[store]\nchunk_size = 7\n")
    with pytest.raises(ConfigError):
        Checkpointer(outside, linear(0))
    (made.root / "config.toml").unlink()  # as while another process makes it
    assert Checkpointer(outside, linear(0)).repo.root == made.root


def test_what_has_no_state_is_told(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4)), 2)
    checkpointer = Checkpointer(repo, linear(1), loader=loader, background=False)
    checkpointer.save(1)
    assert "loader is a plain DataLoader, which can't tell where it is" in caplog.text
    assert "loader" not in repo.load("latest")["trainer"]
    with pytest.raises(UsageError, match="schedule is a str, which has no state_dict"):
        Checkpointer(repo, linear(1), schedule="cosine")


# -- saving in time ----------------------------------------------------------------------------------------------------


def saved_steps(repo: Repo, every: str, stop: int, seconds: float = 0.0) -> list[int]:
    """The steps at which a loop saves by itself, oldest first."""
    with Checkpointer(repo, linear(1), run="timed", background=False) as checkpointer:
        for step in checkpointer.steps(stop, every=every):
            checkpointer.log(val_loss=1 / (step + 1))
            time.sleep(seconds)
    return [entry.manifest.step for entry in reversed(repo.checkpoints())]


def test_a_loop_saves_every_so_many_steps_and_the_last_one(repo: Repo, capfd: pytest.CaptureFixture[str]) -> None:
    assert saved_steps(repo, "4 steps", 10) == [4, 8, 10]
    assert {entry.manifest.step: entry.manifest.metrics["val_loss"] for entry in repo.checkpoints()} == {
        4: 1 / 4, 8: 1 / 8, 10: 1 / 10,
    }  # fmt: skip
    assert saved_steps(repo, "4 steps", 13) == [4, 8, 10, 12, 13]
    first, second = capfd.readouterr().err.splitlines()
    assert first == "castore: run timed at step 0: run timed has no checkpoint of this experiment yet"
    newest = next(entry.id for entry in repo.checkpoints() if entry.manifest.step == 10)
    assert second == f"castore: run timed at step 10 from {newest[:12]}: the furthest step of run timed"


def test_a_loop_saves_by_the_clock(repo: Repo) -> None:
    steps = saved_steps(repo, "0.2 s", 12, seconds=0.05)
    assert steps[-1] == 12
    assert 2 <= len(steps) <= 4  # in 0.6 s, and at the end


def test_a_loop_saves_all_the_time(repo: Repo) -> None:
    assert saved_steps(repo, "continuous", 3) == [1, 2, 3]


def test_a_loop_that_saves_itself_saves_no_step_twice(repo: Repo) -> None:
    with Checkpointer(repo, linear(1), background=False) as checkpointer:
        for step in checkpointer.steps(4, every="2 steps"):
            if step == 1:
                checkpointer.save(2, {"val_loss": 0.5})
    assert [entry.manifest.step for entry in repo.checkpoints()] == [4, 2]


@pytest.mark.parametrize("every", ["often", "0 steps", "-1 steps", "5", "10 parsecs", "0 s", "steps"])
def test_a_cadence_that_is_none_says_what_to_write(repo: Repo, every: str) -> None:
    with pytest.raises(UsageError, match="write '500 steps', '10 min' or 'continuous'"):
        next(Checkpointer(repo, linear(1)).steps(5, every=every))


# -- asked to end ------------------------------------------------------------------------------------------------------

LOOP = """
import signal, sys, time, torch, castore
from castore.torch import Checkpointer
torch.manual_seed(0)
model = torch.nn.Linear(2, 2)
repo = castore.Repo.open(sys.argv[1])
with Checkpointer(repo, model, run="loop", stop_signals=True) as checkpointer:
    for step in checkpointer.steps(100_000):
        print(step, flush=True)
        time.sleep(0.05)
"""


def start_loop(repo: Repo, *before: str) -> subprocess.Popen[str]:
    script = "\n".join([*before, LOOP])
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(repo.root.parent)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_exits_with_its_code(repo: Repo, number: signal.Signals) -> None:
    process = start_loop(repo)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"castore: {number.name}: finishing the step and saving" in err
    (entry,) = repo.checkpoints()
    assert entry.manifest.step == int(out.splitlines()[-1] if out else 0) + 1


def test_a_signal_that_is_ignored_stays_ignored(repo: Repo) -> None:
    """As nohup has it."""
    process = start_loop(repo, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    assert process.stdout is not None
    steps = [process.stdout.readline() for _ in range(3)]
    assert all(steps)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_the_handlers_are_as_before_after_the_block(repo: Repo) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Checkpointer(repo, linear(1), stop_signals=True) as checkpointer:
        assert checkpointer.stopping == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert checkpointer.stopping == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    assert copy.copy(repo).root == repo.root


def test_a_disk_that_fails_once_all_was_verified_is_told_and_all_but_the_model_is_as_it_was(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Checkpointer(repo, model, optimizer, run="a") as checkpointer:
        checkpointer.save(1, {"val_loss": 1.0})
    optimizer.param_groups[0]["lr"] = 0.25
    drawn = torch.get_rng_state()

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("read", "objects", OSError(errno.EIO, os.strerror(errno.EIO)))

    monkeypatch.setattr(Repo, "load_into", fail)
    with pytest.raises(StorageError, match="can't read objects"):
        Checkpointer(repo, model, optimizer, run="a").resume()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert torch.equal(torch.get_rng_state(), drawn)


def save_in_a_block(repo: Repo, model: torch.nn.Module, step: int, error: Exception | None = None) -> None:
    with Checkpointer(repo, model, run="mine") as checkpointer:
        checkpointer.save(step)
        checkpointer.wait()
        if error:
            raise error


def test_each_save_is_pushed_when_the_settings_say_so(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    path = repo.root / "config.toml"
    path.write_text(path.read_text() + 'shared = "shared"\npush = "auto"\n')
    repo = Repo.open(tmp_path)
    model = torch.nn.Linear(3, 2)
    with Checkpointer(repo, model, run="mine") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"val_loss": 1.0 / step})
    ids = {entry.id for entry in repo.checkpoints()}
    remote = repo.publishing_remote()
    assert {entry.id for entry in read_manifests(remote)} == ids
    (tmp_path / "shared").rename(tmp_path / "moved")
    (tmp_path / "shared").touch()  # a file where the remote's folder was
    torch.nn.init.normal_(model.weight)
    with pytest.raises(PushIncomplete, match="1 checkpoint could not be pushed to shared"):
        save_in_a_block(repo, model, 3)
    (tmp_path / "shared").unlink()
    (tmp_path / "moved").rename(tmp_path / "shared")
    assert len(repo.checkpoints()) == 3
    assert repo.push(repo.checkpoints()).objects


def test_an_error_of_the_loop_is_not_hidden_by_one_of_the_push(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    path = repo.root / "config.toml"
    path.write_text(path.read_text() + 'shared = "config.toml/x"\npush = "auto"\n')
    (tmp_path / "config.toml").touch()  # a file where the remote's folder would be
    repo = Repo.open(tmp_path)
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ZeroDivisionError) as caught:
        save_in_a_block(repo, model, 1, ZeroDivisionError())
    assert "could not be pushed to shared" in "".join(caught.value.__notes__)
