"""castore.dcp: what many ranks save is what one process would save, and any number of ranks load it."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as files
from bucket_service import BucketService
from ranks import Died, Raised, Start, run
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import castore
import castore.ranks
from castore import Repo, dcp
from castore.remotes import marks
from castore.remotes.base import is_publishing
from castore.remotes.marks import Marks
from castore.transfer import find_manifest

# -- what a state may hold ---------------------------------------------------------------------------------------------


def whole(state: Any) -> Any:
    """A state with each DTensor gathered, ties kept."""
    gathered: dict[int, torch.Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, DTensor):
            return gathered.setdefault(id(value), value.full_tensor())
        if isinstance(value, dict):
            return type(value)((key, walk(item)) for key, item in value.items())
        return type(value)(map(walk, value)) if isinstance(value, list | tuple) else value

    return walk(state)


@functools.cache
def row() -> DeviceMesh:
    """All ranks, side by side."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def random_state(seed: int) -> dict[str, Any]:
    """Tensors of random shapes, element types and placements, ties, and values that DCP's own flattening loses."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    state: dict[Any, Any] = {"empty": {}, 7: "an int key", "nested": [1, (2.5, {"x": []})], "none": torch.empty(0, 3)}
    for i in range(chance.randint(1, 10)):
        shape = [chance.choice([1, 2, 3, 5, 64, 129, 257])]
        shape += [chance.choice([1, 7, 33, 100, 301]) for _ in range(chance.randint(0, 2))]
        dtype = chance.choice([torch.float32, torch.bfloat16, torch.float64, torch.complex128, torch.uint8, torch.bool])
        tensor = torch.randint(0, 200, shape, generator=generator).to(dtype)
        choices: list[Placement | None] = [Shard(0), Shard(0), Shard(len(shape) - 1), Replicate(), None]
        placement = chance.choice(choices)
        state[f"t{i}"] = tensor if placement is None else distribute_tensor(tensor, row(), [placement])
    state["tied"] = state["t0"]
    return state


def zeros(state: dict[str, Any]) -> dict[str, Any]:
    """A state of equal form to load into, its tensors zero and tied as before."""
    made = {id(item): torch.zeros_like(item) for item in state.values() if isinstance(item, torch.Tensor)}
    return {key: made.get(id(item), item) for key, item in state.items()}


def save_and_load_random_states(rank: int, root: Path, seeds: range) -> list[str]:
    """The seeds that went wrong, and how."""
    repo, wrong = Repo.open(root), []
    for seed in seeds:
        state = random_state(seed)
        saved = dcp.save(repo, {"model": state}, run="ranks", step=seed)
        plain = whole(state)
        if rank == 0:
            alone = repo.save({"model": plain}, run="alone", step=seed)
            if alone.manifest.parts != saved.manifest.parts:
                wrong.append(f"{seed}: the parts differ")
        target = {"model": zeros(state)}
        dcp.load(repo, target, saved.id)
        loaded = whole(target["model"])
        if list(loaded) != list(plain) or loaded["tied"] is not loaded["t0"]:
            wrong.append(f"{seed}: the form differs")
        for key, value in plain.items():
            if isinstance(value, torch.Tensor):
                if not torch.equal(loaded[key], value):
                    wrong.append(f"{seed}: {key} {value.dtype} {list(value.shape)} {state[key]!s:.80}")
            elif loaded[key] != value:
                wrong.append(f"{seed}: {key}")
    return wrong


@pytest.mark.parametrize(("size", "count"), [(2, 16), (3, 8), (4, 6)])
def test_any_placement_is_stored_as_one_process_would(
    repo: Repo, tmp_path: Path, start: Start, size: int, count: int
) -> None:
    seeds = range(100 * size, 100 * size + count)
    assert run(start, tmp_path, size, save_and_load_random_states, repo.root.parent, seeds) == [[]] * size


def test_rows_of_large_tensors_travel_in_several_rounds(repo: Repo, tmp_path: Path, start: Start) -> None:
    assert run(start, tmp_path, 2, save_columns_in_rounds, repo.root.parent) == [True, True]


def save_columns_in_rounds(_rank: int, root: Path) -> bool:
    from castore.state import boxes

    boxes.MAX_ROUND = 1 << 16
    repo, mesh = Repo.open(root), init_device_mesh("cpu", (2,))
    tensor = torch.arange(600_000).view(600, 1000)
    saved = dcp.save(repo, {"model": {"w": distribute_tensor(tensor, mesh, [Shard(1)])}}, run="columns", step=1)
    return torch.equal(repo.load(saved.id)["model"]["w"], tensor)


def load_without_shared_memory(rank: int, root: Path) -> bool:
    repo, whole_tensor = Repo.open(root), torch.arange(300_000).view(1000, 300)
    saved = dcp.save(repo, {"model": {"w": whole_tensor}}, run="plain", step=1)
    if rank == 1:  # as in a container that doesn't see the other's processes
        opened = castore.ranks._opened
        castore.ranks._opened = lambda _offer: opened(None)
    target = {"model": {"w": torch.zeros(1000, 300, dtype=torch.int64)}}
    dcp.load(repo, target, saved.id)
    return torch.equal(target["model"]["w"], whole_tensor)


def test_ranks_that_share_no_memory_read_by_themselves(repo: Repo, tmp_path: Path, start: Start) -> None:
    assert run(start, tmp_path, 2, load_without_shared_memory, repo.root.parent) == [True, True]


# -- the layouts that people train with --------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(301, 700), nn.Linear(700, 301)
        self.tiny = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("count", torch.arange(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x))) + self.tiny.sum()


def trained(layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: nn.Module = Net()
    size = dist.get_world_size()
    by_columns_and_rows = {"a": ColwiseParallel(), "b": RowwiseParallel()}
    if layout == "fsdp":
        fully_shard(model)
    elif layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("copies", "shards")))
    elif layout == "tp":
        parallelize_module(model, init_device_mesh("cpu", (size,)), by_columns_and_rows)
    elif layout == "fsdp and tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], by_columns_and_rows)
        fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    forward = nn.parallel.DistributedDataParallel(model) if layout == "ddp" else model
    for _ in range(2):
        forward(torch.randn(4, 301)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_layouts(rank: int, root: Path, layouts: list[str]) -> dict[str, bool]:
    repo, same = Repo.open(root), {}
    for layout in layouts:
        model, optimizer = trained(layout)
        named_model, named_optimizer = get_state_dict(model, optimizer)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "named": {"model": dict(named_model), "optimizer": dict(named_optimizer)},
        }
        saved = dcp.save(repo, state, run=layout.replace(" ", "-"), step=2)
        plain = whole(state)
        if rank == 0:
            same[layout] = repo.save(plain, run="alone", step=2).manifest.parts == saved.manifest.parts
            loaded = repo.load(saved.id)
            same[f"{layout}: loaded by one process"] = torch.equal(
                loaded["model"]["a.weight"], plain["model"]["a.weight"]
            )
        dist.barrier()
    return same


def load_layouts(_rank: int, root: Path, saved_by: list[str], into: str) -> list[str]:
    """What of a checkpoint of each layout is not in a model of another, on another number of ranks."""
    repo, wrong = Repo.open(root), []
    for layout in saved_by:
        model, optimizer = trained(into)
        named_model, named_optimizer = get_state_dict(model, optimizer)
        for state in (named_model, *named_optimizer["state"].values()):
            for tensor in state.values():
                tensor.detach().zero_()
        state = {"named": {"model": dict(named_model), "optimizer": dict(named_optimizer)}}
        entry = dcp.load(repo, state, f"{layout.replace(' ', '-')}:latest")
        named = state["named"]
        set_state_dict(model, optimizer, model_state_dict=named["model"], optim_state_dict=named["optimizer"])
        expected = repo.load(entry.id, ["named"])["named"]
        now_model, now_optimizer = map(whole, get_state_dict(model, optimizer))
        for key, tensor in expected["model"].items():
            if not torch.equal(now_model[key], tensor):
                wrong.append(f"{layout}: {key}")
        for key, moments in expected["optimizer"]["state"].items():
            for name, tensor in moments.items():
                if not torch.equal(now_optimizer["state"][key][name], tensor):
                    wrong.append(f"{layout}: {name} of {key}")
    return wrong


@pytest.mark.slow
def test_layouts_are_stored_as_one_process_would_and_load_on_other_ranks(
    repo: Repo, tmp_path: Path, start: Start
) -> None:
    layouts = ["fsdp", "hsdp", "tp", "fsdp and tp", "ddp"]
    same, *_ = run(start, tmp_path, 4, save_layouts, repo.root.parent, layouts)
    assert [name for name, is_same in same.items() if not is_same] == []
    assert len(same) == 2 * len(layouts)
    for size, into in ((2, "tp"), (3, "fsdp"), (2, "ddp")):
        assert run(start, tmp_path, size, load_layouts, repo.root.parent, layouts, into) == [[]] * size


# -- torch.distributed.checkpoint --------------------------------------------------------------------------------------


def go_through_dcp(_rank: int, root: Path) -> list[str]:
    repo, wrong = Repo.open(root), []
    model, _ = trained("fsdp")
    state = {"model": model.state_dict(), "trainer": {"losses": [1.0, float("inf")], "betas": (0.9, 0.95)}}
    writer = dcp.CastoreWriter(repo, run="dcp")
    files.save(state, storage_writer=writer, checkpoint_id="out/step-7")
    assert writer.saved is not None
    direct = dcp.save(repo, {"model": dict(state["model"]), "trainer": state["trainer"]}, run="direct", step=7)
    if writer.saved.manifest.parts != direct.manifest.parts or writer.saved.manifest.step != 7:
        wrong.append("the writer's parts")
    for want in (writer.saved.id, direct.id):
        target = {
            "model": {key: torch.zeros_like(value) for key, value in state["model"].items()},
            "trainer": {"losses": None, "betas": None},
        }
        reader = dcp.CastoreReader(repo, want)
        files.load(target, storage_reader=reader)
        if reader.entry is None or reader.entry.id != want or target["trainer"] != state["trainer"]:
            wrong.append("values")
        plain, loaded = whole(state["model"]), whole(target["model"])
        wrong += [key for key in plain if not torch.equal(plain[key], loaded[key])]
    group = dist.new_group(backend="gloo")
    for kind in (AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS):
        writer = dcp.CastoreWriter(repo, run=kind.name.lower(), step=8)
        files.async_save(
            {"model": model.state_dict()}, storage_writer=writer, process_group=group, async_checkpointer_type=kind
        ).result()
        dist.barrier()
        saved = repo.find(f"{kind.name.lower()}:latest").manifest
        if saved.parts["model"] != direct.manifest.parts["model"]:
            wrong.append(f"async {kind}")
    return wrong


@pytest.mark.slow
def test_dcp_saves_and_loads_with_castore_as_its_storage(repo: Repo, tmp_path: Path, start: Start) -> None:
    assert run(start, tmp_path, 2, go_through_dcp, repo.root.parent) == [[], []]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_without_ranks_dcp_saves_and_loads_alone(repo: Repo) -> None:
    state = {"flat": torch.arange(5), "nested": {"x": [torch.ones(2), "text"]}}
    writer = dcp.CastoreWriter(repo, step=1, no_dist=True)
    files.save(state, storage_writer=writer, no_dist=True)
    loaded = repo.load("latest")["state"]
    assert torch.equal(loaded["flat"], state["flat"])
    assert torch.equal(loaded["nested"]["x"][0], torch.ones(2))
    assert loaded["nested"]["x"][1] == "text"
    target = {"flat": torch.zeros(5, dtype=torch.int64), "nested": {"x": [torch.zeros(2), ""]}}
    files.load(target, storage_reader=dcp.CastoreReader(repo, no_dist=True), no_dist=True)
    assert torch.equal(target["flat"], state["flat"])
    assert target["nested"]["x"][1] == "text"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_writer_without_a_step_says_how_to_give_one(repo: Repo) -> None:
    with pytest.raises(CheckpointException, match="give CastoreWriter the step, or a checkpoint_id"):
        files.save({"a": torch.ones(1)}, storage_writer=dcp.CastoreWriter(repo, no_dist=True), no_dist=True)


def test_alone_it_is_a_save_and_a_load(repo: Repo, state: Any) -> None:
    parts = state()
    saved = dcp.save(repo, parts, run="main", step=1, metrics={"val_loss": 2.0})
    again = repo.save(parts, run="main", step=2)
    assert saved.manifest.parts == again.manifest.parts
    pending = dcp.async_save(repo, parts, run="main", step=3)
    assert pending.result().manifest.parts == again.manifest.parts
    assert pending.done()


# -- saving in the background ------------------------------------------------------------------------------------------


def save_in_background(rank: int, root: Path) -> list[str]:
    repo, wrong = Repo.open(root), []
    model, _ = trained("fsdp")
    before = whole(model.state_dict())
    pending = dcp.async_save(repo, {"model": model.state_dict()}, run="background", step=1)
    for _ in range(20):  # training's own collectives go on meanwhile
        dist.all_reduce(torch.ones(1000))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    saved = pending.result()
    loaded = repo.load(saved.id)["model"]
    wrong += [key for key, value in before.items() if not torch.equal(loaded[key], value)]
    bad = {"val_loss": float("nan")} if rank == 1 else {}
    try:
        dcp.async_save(repo, {"model": model.state_dict()}, run="background", step=2, metrics=bad).result()
        wrong.append("no error")
    except castore.CastoreError as error:
        wrong += [] if type(error).__name__ == ("InvalidManifest" if rank == 1 else "RankFailed") else [repr(error)]
    after = dcp.async_save(repo, {"model": model.state_dict()}, run="background", step=3).result()
    return wrong if after.manifest.step == 3 else [*wrong, "step 3"]


def test_background_saves_hold_the_state_of_the_call_and_share_errors(repo: Repo, tmp_path: Path, start: Start) -> None:
    assert run(start, tmp_path, 2, save_in_background, repo.root.parent) == [[], []]


# -- what can't be saved or loaded -------------------------------------------------------------------------------------


def save_what_does_not_fit(rank: int, root: Path) -> list[str]:
    repo, mesh = Repo.open(root), init_device_mesh("cpu", (2,))
    messages = []
    whole_tensor = distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)])
    states: list[Any] = [
        {"w": torch.ones(3 + rank)},
        {"w": torch.ones(3) if rank else 5},
        {"w": lambda: 0} if rank else {"w": 1},
        {"w": whole_tensor},
    ]
    for state in states[:3]:
        with pytest.raises(castore.CastoreError) as caught:
            dcp.save(repo, {"model": state}, run="bad", step=1)
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    dcp.save(repo, {"model": states[3]}, run="good", step=1)
    target = {"model": {"w": torch.zeros(4, 4) if rank else torch.zeros(4, 3)}}
    with pytest.raises(castore.CastoreError) as caught:
        dcp.load(repo, target, "good:latest")
    messages.append(f"{type(caught.value).__name__}: {caught.value}")
    dcp.load(repo, {"model": {"w": torch.zeros(4, 3)}}, "good:latest")  # and the ranks still understand each other
    return messages


def test_what_does_not_fit_is_an_error_on_every_rank(repo: Repo, tmp_path: Path, start: Start) -> None:
    first, second = run(start, tmp_path, 2, save_what_does_not_fit, repo.root.parent)
    different = 'UnsupportedValue: can\'t store model["w"]: rank 0 has float32 [3], but rank 1 has float32 [4]'
    assert (first[0], second[0]) == (different, different)
    assert (
        first[1] == second[1] == 'UnsupportedValue: can\'t store model["w"]: a tensor on one rank, but a int on rank 0'
    )
    assert first[2].startswith("RankFailed: rank 1 failed, so all of them stop: UnsupportedValue")
    assert second[2].startswith("UnsupportedValue: can't store")
    assert first[3].startswith("RankFailed: rank 1 failed")
    assert second[3].startswith('UsageError: can\'t load model["w"]')
    assert {entry.manifest.run for entry in repo.checkpoints()} == {"good"}


def test_a_dtensor_given_to_a_plain_save_names_what_stores_it(repo: Repo, tmp_path: Path, start: Start) -> None:
    (raised,) = run(start, tmp_path, 1, save_plainly, repo.root.parent)
    assert raised == Raised(
        "UnsupportedValue", 'can\'t store model["w"]: a DTensor is not a plain tensor: castore.dcp.save stores it'
    )


def save_plainly(_rank: int, root: Path) -> None:
    tensor = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
    Repo.open(root).save({"model": {"w": tensor}}, run="x", step=1)


# -- machines without a common disk ------------------------------------------------------------------------------------


def save_and_load_on_two_machines(rank: int, roots: list[Path]) -> Any:
    repo, mesh = Repo.open(roots[rank]), init_device_mesh("cpu", (2,))
    tensor = torch.randn(500, 301, generator=torch.Generator().manual_seed(3))
    state = {
        "w": distribute_tensor(tensor, mesh, [Shard(0)]),
        "c": distribute_tensor(tensor.T, mesh, [Shard(1)]),
        "b": 1,
    }
    saved = dcp.save(repo, {"model": state}, run="two", step=4)
    local = len(repo.store.stored())
    target = {"model": {**state, "w": torch.zeros_like(state["w"]), "c": torch.zeros(301, 500)}}
    dcp.load(repo, target, "two:latest" if rank == 0 else "no such run:latest")  # the lowest rank's word counts
    is_equal = torch.equal(target["model"]["w"].full_tensor(), tensor) and torch.equal(target["model"]["c"], tensor.T)
    return saved.id, local, is_equal, repo.find("two:latest").id == saved.id


def two_machines(tmp_path: Path, remote: str) -> list[Path]:
    roots = [tmp_path / name for name in ("one", "two", "three")]
    for root in roots:
        Repo.init(root)
        config = f'[store]\nchunk_size = "64KiB"\nfsync = false\n[remotes]\n{remote}\n'
        (root / ".castore" / "config.toml").write_text(config)
    return roots


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_machines_without_a_common_disk_meet_in_a_remote(
    tmp_path: Path, start: Start, s3: BucketService, place: str
) -> None:
    (tmp_path / "shared").mkdir()
    url = s3.url() if place == "bucket" else str(tmp_path / "shared")
    roots = two_machines(tmp_path, f'shared = "{url}"')
    results = run(start, tmp_path, 2, save_and_load_on_two_machines, roots, environment=s3.environment())
    assert not any(isinstance(result, Raised | Died) for result in results), results
    (first_id, _, *first), (second_id, _, *second) = results
    assert first_id == second_id
    assert (first, second) == ([True, True], [True, True])
    third = Repo.open(roots[2])
    entry = find_manifest(third.remote(), first_id)
    third.catalog.add(entry.manifest)
    loaded = third.load(first_id)["model"]
    expected = torch.randn(500, 301, generator=torch.Generator().manual_seed(3))
    assert torch.equal(loaded["w"], expected)
    alone = third.save({"model": {"w": expected, "c": expected.T.contiguous(), "b": 1}}, run="alone", step=1)
    assert alone.manifest.parts["model"].index == entry.manifest.parts["model"].index


def save_what_is_marked(rank: int, roots: list[Path]) -> Any:
    repo, mesh = Repo.open(roots[rank]), init_device_mesh("cpu", (2,))
    tensor = torch.randn(500, 301, generator=torch.Generator().manual_seed(3))
    state = {"w": distribute_tensor(tensor, mesh, [Shard(0)])}
    dcp.save(repo, {"model": state}, run="two", step=1)
    remote = repo.remote()
    assert is_publishing(remote)
    if rank == 0:
        marks.write(remote, Marks.of(file.name for file in remote.files("objects")))
    dist.barrier()
    marked_at = marks.written_at(remote)
    saved = dcp.save(repo, {"model": {**state, "n": 2}}, run="two", step=2)
    return saved.id, marked_at


def test_each_rank_writes_again_what_gc_has_marked_in_the_remote(tmp_path: Path, start: Start) -> None:
    (tmp_path / "shared").mkdir()
    roots = two_machines(tmp_path, f'shared = "{tmp_path / "shared"}"')
    results = run(start, tmp_path, 2, save_what_is_marked, roots)
    assert not any(isinstance(result, Raised | Died) for result in results), results
    (saved_id, marked_at), _ = results
    third = Repo.open(roots[2])
    remote = third.remote()
    assert is_publishing(remote)
    entry = find_manifest(remote, saved_id)
    third.fetch(entry)
    written = {file.name.rpartition("/")[2]: file.modified for file in remote.files("objects")}
    needed = [entry.id, *third.store.stored()]
    assert [name for name in needed if written[name] < marked_at] == []


def test_without_a_remote_two_stores_are_an_error_before_anything_is_written(tmp_path: Path, start: Start) -> None:
    roots = two_machines(tmp_path, "")
    first, second = run(start, tmp_path, 2, save_and_load_on_two_machines, roots)
    assert (first.kind, second.kind) == ("UsageError", "UsageError")
    assert "the ranks see different stores" in first.message
    assert not any(Repo.open(root).store.stored() or Repo.open(root).checkpoints() for root in roots)
