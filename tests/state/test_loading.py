"""Loading less than everything, and into what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact, parts

from castore import Repo
from castore.errors import CorruptObject, NotFound, UsageError
from castore.storage import fs


@pytest.fixture
def saved(repo: Repo) -> str:
    return repo.save(parts(1), run="a", step=1).id


def model(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.LayerNorm(200), torch.nn.Linear(200, 3))


# -- some tensors ----------------------------------------------------------------------------------------------------


def test_the_tensors_of_matching_keys_come_alone(repo: Repo, saved: str) -> None:
    state = parts(1)["model"]
    assert exact(repo.load_tensors(saved, ["small"], ["model"])) == exact({"model": {"small": state["small"]}})
    found = repo.load_tensors(saved, ["s*", "tied"])
    assert found.keys() == {"model", "trainer"}
    assert exact(found["model"]) == exact({name: state[name] for name in ("small", "step", "tied")})
    assert found["trainer"] == {}


def test_only_their_chunks_are_read(repo: Repo, saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = fs.read_into

    def counting(path: Path, *rest: Any) -> memoryview:
        read.append(str(path))
        return whole(path, *rest)

    monkeypatch.setattr(fs, "read_into", counting)
    repo.load_tensors(saved, ["small"], ["model"])
    assert sum("/objects/" in path for path in read) == 2  # the index, and the chunk that small ones share


def test_nested_keys_are_those_that_diff_prints(repo: Repo) -> None:
    state = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}, 1: {"exp_avg": torch.zeros(3)}}}}
    checkpoint_id = repo.save(state, run="a", step=1).id
    assert repo.load_tensors(checkpoint_id, ['state[1]["exp_avg"]'])["optimizer"].keys() == {'state[1]["exp_avg"]'}
    assert len(repo.load_tensors(checkpoint_id, ['*"exp_avg"*'])["optimizer"]) == 2


def test_a_pattern_that_matches_nothing_is_told(repo: Repo, saved: str) -> None:
    with pytest.raises(NotFound, match="no tensor smal: part model has big, for example"):
        repo.load_tensors(saved, ["small", "smal"], ["model"])
    with pytest.raises(UsageError, match="list of names"):
        repo.load_tensors(saved, "small")


# -- into what is there ----------------------------------------------------------------------------------------------


def test_a_module_is_filled_in_place(repo: Repo) -> None:
    source, target = model(1), model(2)
    checkpoint_id = repo.save({"model": source.state_dict()}, run="a", step=1).id
    memory = {name: weight.data_ptr() for name, weight in target.named_parameters()}
    found = repo.load_into(checkpoint_id, target)
    assert exact(dict(target.state_dict())) == exact(dict(source.state_dict()))
    assert {name: weight.data_ptr() for name, weight in target.named_parameters()} == memory
    assert found["model"]["0.weight"].data_ptr() == memory["0.weight"]


def test_a_state_of_any_nesting_is_filled_and_the_rest_comes_back(repo: Repo) -> None:
    state = {"a": [torch.arange(5), {"b": torch.ones(2, 3)}], "n": 7}
    checkpoint_id = repo.save({"x": state, "y": {"z": torch.ones(1)}}, run="a", step=1).id
    target = {"a": [torch.zeros(5, dtype=torch.int64), {"b": torch.zeros(2, 3)}], "n": 0}
    found = repo.load_into(checkpoint_id, {"x": target})
    assert exact(found) == exact({"x": state})
    assert found["x"]["a"][0] is target["a"][0]
    assert target["n"] == 0


def test_what_is_not_dense_is_filled_too(repo: Repo) -> None:
    values = torch.arange(12.0).reshape(3, 4)
    checkpoint_id = repo.save({"x": {"t": values}}, run="a", step=1).id
    target = torch.zeros(4, 3).t()
    assert not target.is_contiguous()
    repo.load_into(checkpoint_id, {"x": {"t": target}})
    assert torch.equal(target, values)


def test_what_is_tied_there_and_not_here_is_filled_twice(repo: Repo, saved: str) -> None:
    target = {name: torch.zeros_like(value) for name, value in parts(1)["model"].items()}
    repo.load_into(saved, {"model": target})
    assert exact(target) == exact(parts(1)["model"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"big": torch.zeros(5)},
            'can\'t load model\\["big"\\]: the checkpoint has float32 \\[50000\\], the target float32 \\[5\\]',
        ),
        ({"small": torch.zeros(3, 5, dtype=torch.float64)}, "the target float64"),
        ({"more": torch.zeros(3)}, "it has more, which the checkpoint doesn't have"),
        ({"small": None}, "it has no tensor small"),
    ],
)
def test_a_target_that_does_not_fit_is_left_as_it_is(
    repo: Repo, saved: str, change: dict[str, Any], reason: str
) -> None:
    target = {name: torch.zeros_like(value) for name, value in parts(1)["model"].items()} | change
    with pytest.raises(UsageError, match=reason):
        repo.load_into(saved, {"model": target})
    assert all(not value.any() for value in target.values() if value is not None)


def test_a_request_that_makes_no_sense_is_told(repo: Repo, saved: str) -> None:
    with pytest.raises(UsageError, match="give a module, or a dict from parts"):
        repo.load_into(saved, torch.zeros(3))
    with pytest.raises(TypeError, match="device"):
        repo.load_into(saved, {}, device="meta")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="no place for it"):
        repo.load_into(saved, {"model": {}}, ["model", "trainer"])
    with pytest.raises(NotFound, match="no part 'other'"):
        repo.load_into(saved, {"other": {}})


def test_damage_is_told_whatever_was_filled(repo: Repo, saved: str) -> None:
    paths = sorted(repo.store.path(object_id) for object_id in repo.store.stored())
    largest = max(paths, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(data)
    target = {name: torch.zeros_like(value) for name, value in parts(1)["model"].items()}
    with pytest.raises(CorruptObject):
        repo.load_into(saved, {"model": target})


def test_a_device_is_where_tensors_go(repo: Repo, saved: str) -> None:
    assert repo.load(saved, ["model"], device="meta")["model"]["big"].is_meta
    assert repo.load_tensors(saved, ["big"], ["model"], device="meta")["model"]["big"].is_meta


def test_a_load_into_what_is_there_takes_no_second_copy(repo: Repo, state: Callable[..., Any]) -> None:
    checkpoint_id = repo.save(state(1), run="a", step=1).id
    made: list[Any] = []
    target = {name: torch.zeros_like(value) for name, value in parts(1)["model"].items()}
    before = torch.empty

    def counting(*arguments: Any, **options: Any) -> torch.Tensor:
        made.append(arguments)
        return before(*arguments, **options)

    torch.empty = counting  # type: ignore[assignment]
    try:
        repo.load_into(checkpoint_id, {"model": target})
    finally:
        torch.empty = before  # type: ignore[assignment]
    assert made == []
