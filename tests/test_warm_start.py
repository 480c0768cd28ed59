"""Beginning with the weights of another checkpoint: what fits is taken, and what was is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from project import TINY, Project
from torch import nn

from castore import Repo
from castore.errors import NotFound, UsageError
from castore.torch import warm_start


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
