"""The weights of a checkpoint in another model: all of them, or what fits, and what did is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from project import TINY, Project
from ranks import Start, run
from torch import nn
from torch.distributed.fsdp import fully_shard

from castore import Repo
from castore.errors import CorruptObject, NotFound, UsageError
from castore.format import part_index
from castore.torch import load_model, warm_start


def saved(repo: Repo, **layers: nn.Module) -> nn.ModuleDict:
    model = nn.ModuleDict(layers)
    repo.save({"model": model.state_dict()}, run="small", step=7)
    return model


def test_what_fits_is_taken_and_the_rest_is_told(repo: Repo) -> None:
    old = saved(repo, words=nn.Embedding(5, 3), body=nn.Linear(3, 3), head=nn.Linear(3, 2), gone=nn.Linear(1, 1))
    layers: dict[str, Any] = {"words": nn.Embedding(8, 3), "body": nn.Linear(3, 3).to(torch.bfloat16)}
    new = nn.ModuleDict({**layers, "head": nn.Linear(3, 4), "added": nn.Linear(2, 2)})
    before = {key: value.clone() for key, value in new.state_dict().items()}
    started = warm_start(new, repo, "small:latest")
    assert started.id == repo.find("small:latest").id
    assert started.taken == ("body.weight", "body.bias")
    assert started.partly == ("words.weight", "head.weight")
    assert started.fresh == ("head.bias", "added.weight", "added.bias")
    assert started.unused == ("gone.bias", "gone.weight", "head.bias")
    assert torch.equal(new["body"].weight, old["body"].weight.to(torch.bfloat16))
    assert torch.equal(new["words"].weight[:5], old["words"].weight)
    assert torch.equal(new["words"].weight[5:], before["words.weight"][5:])
    assert all(torch.equal(new.state_dict()[key], before[key]) for key in started.fresh)


def test_names_that_wrappers_add_to_do_not_matter(repo: Repo) -> None:
    old = saved(repo, body=nn.Linear(3, 3))
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"body": nn.Linear(3, 3)})})
    assert warm_start(wrapped, repo, "small:latest").taken == ("module.body.weight", "module.body.bias")
    assert torch.equal(wrapped["module"]["body"].weight, old["body"].weight)


def test_where_nothing_fits_nothing_is_changed(repo: Repo) -> None:
    saved(repo, body=nn.Linear(3, 3))
    other = nn.Linear(7, 7)
    before = other.weight.detach().clone()
    with pytest.raises(UsageError, match=r"no tensor of checkpoint .* fits the model, by name and shape"):
        warm_start(other, repo, "small:latest")
    assert torch.equal(other.weight, before)
    with pytest.raises(NotFound, match="no checkpoint of run 'large'"):
        warm_start(other, repo, "large:latest")


def test_load_model_takes_whatever_saved_it(repo: Repo) -> None:
    old = saved(repo, body=nn.Linear(3, 3), norm=nn.BatchNorm1d(3))
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"body": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})})
    memory = [tensor.data_ptr() for tensor in wrapped.state_dict().values()]
    assert load_model(wrapped, repo, "small:latest").id == repo.find("small:latest").id
    loaded = wrapped.state_dict()
    assert all(torch.equal(loaded[f"module.{key}"], value) for key, value in old.state_dict().items())
    assert memory == [tensor.data_ptr() for tensor in loaded.values()]  # read into its own tensors
    halved = nn.ModuleDict({"body": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)}).to(torch.bfloat16)
    load_model(halved, repo)
    assert torch.equal(halved["body"].weight, old["body"].weight.to(torch.bfloat16))


def test_a_folder_will_do(repo: Repo) -> None:
    saved(repo, body=nn.Linear(2, 2))
    model = nn.ModuleDict({"body": nn.Linear(2, 2)})
    assert load_model(model, repo.root.parent, "latest").id == repo.find("latest").id
    assert warm_start(model, str(repo.root.parent), "latest").taken == ("body.weight", "body.bias")


def test_load_model_changes_nothing_where_a_tensor_does_not_fit_or_is_damaged(repo: Repo) -> None:
    saved(repo, body=nn.Linear(3, 3), head=nn.Linear(3, 2))
    for other, message in (
        (nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 4)}), r"has \[2, 3\] for head.weight"),
        (nn.ModuleDict({"body": nn.Linear(3, 3)}), "has head.bias, which the model lacks"),
        (nn.ModuleDict({"body": nn.Linear(3, 3), "more": nn.Linear(1, 1)}), "has no more.bias"),
    ):
        before = other["body"].weight.detach().clone()
        with pytest.raises(UsageError, match=message):
            load_model(other, repo)
        assert torch.equal(other["body"].weight, before)
    with pytest.raises(NotFound, match="has no part 'ema'"):
        load_model(nn.Linear(3, 3), repo, part="ema")
    same = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    before = same["body"].weight.detach().clone()
    entry = repo.find("best")
    (chunk,) = {one.id for one in part_index.decode(repo.store.read(entry.manifest.parts["model"].index)).chunks}
    path = repo.store.path(chunk)
    path.chmod(0o644)
    path.write_bytes(b"damage" + path.read_bytes()[6:])
    with pytest.raises(CorruptObject):
        load_model(same, repo)
    assert torch.equal(same["body"].weight, before)


def load_sharded(rank: int, root: str) -> bool:
    repo = Repo.open(root)
    stored = repo.load("small:latest", ["model"])["model"]
    same: nn.Module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 7))
    grown = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 7))
    before = grown[0].weight.detach().clone()
    fully_shard(same)
    fully_shard(grown)
    load_model(same, repo, "small:latest")
    started = warm_start(grown, repo, "small:latest")
    whole = {key: value.full_tensor() for key, value in same.state_dict().items()}
    rows = grown.state_dict()["0.weight"].full_tensor()
    return (
        all(torch.equal(whole[key], stored[key]) for key in stored)
        and started.partly == ("0.weight",)
        and torch.equal(rows[:5], stored["0.weight"])
        and (rank > 0 or torch.equal(rows[5:7], before[5:7]))  # what rank 0 had drawn for itself
    )


def test_ranks_take_what_is_theirs(repo: Repo, tmp_path: Path, start: Start) -> None:
    repo.save({"model": nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 7)).state_dict()}, run="small", step=1)
    assert run(start, tmp_path, 2, load_sharded, str(repo.root.parent)) == [True, True]


def test_train_begins_with_the_weights_of_another_shape(tmp_path: Path) -> None:
    empty = Project(tmp_path)
    Repo.init(empty.root)
    empty.run("train", "--data-dir", "texts", *TINY, "--run", "small")
    small = empty.json("log")[0]
    out = empty.run(
        "train", "--data-dir", "texts", *TINY, "--run", "longer", "--block-size", "32", "--init-from", "small:latest"
    )
    assert f"init    from {small['id'][:12]}: " in out
    assert "1 in part: position.weight" in out
    first = min((one for one in empty.json("log") if one["run"] == "longer"), key=lambda one: one["step"])
    shown = empty.json("show", first["id"])
    assert shown["parent"] == small["id"]
    assert shown["info"]["session"]["init_from"]["partly"] == ["position.weight"]
    # from then on there is something to resume
    again = empty.run(
        "train", "--data-dir", "texts", *TINY, "--run", "longer", "--block-size", "32", "--init-from", "small:latest"
    )
    assert "init    from" not in again
    assert "resume  " in again
