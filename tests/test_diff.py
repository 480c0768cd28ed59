from __future__ import annotations

import math
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch

from castore import Experiment, Repo
from castore.diff import ABSENT, Difference, Part, Tensor, Value, diff
from castore.errors import CorruptObject, ObjectMissing
from castore.format import part_index
from castore.state.tensors import equal_bits, relative_change

BIG = torch.arange(100_000, dtype=torch.float32)


def compared(repo: Repo, before: Any, after: Any) -> Difference:
    """Two checkpoints with a model only, and how they differ."""
    made = [
        repo.save({"model": state}, run="ci", step=i, metrics={"val_loss": 2.0 - i}).id
        for i, state in enumerate((before, after))
    ]
    return diff(repo, *(repo.find(one) for one in made))


def model(repo: Repo, before: Any, after: Any) -> Part:
    (part,) = compared(repo, before, after).parts
    return part


def test_equal_states_are_equal_by_their_index_alone(repo: Repo) -> None:
    assert model(repo, {"w": BIG}, {"w": BIG.clone()}) == Part("model", "equal")


def test_each_tensor_is_equal_changed_added_or_removed(repo: Repo) -> None:
    before = {"same": BIG, "moved": torch.ones(5), "type": torch.ones(3), "shape": torch.ones(4), "gone": torch.ones(2)}
    after = {
        "same": BIG,
        "moved": torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0]),
        "type": torch.ones(3).half(),
        "shape": torch.ones(2, 2),
        "new": torch.ones(7),
    }
    assert model(repo, before, after) == Part(
        "model",
        "changed",
        (
            Tensor("same", "equal", "float32 [100000]", "float32 [100000]"),
            Tensor("moved", "changed", "float32 [5]", "float32 [5]", 0.5),
            Tensor("type", "changed", "float32 [3]", "float16 [3]"),
            Tensor("shape", "changed", "float32 [4]", "float32 [2, 2]"),
            Tensor("gone", "removed", "float32 [2]", ""),
            Tensor("new", "added", "", "float32 [7]"),
        ),
    )


def test_equal_tensors_in_other_chunks_are_equal(repo: Repo) -> None:
    """A small tensor before them moves the others to other places in other chunks."""
    some = {f"w{i}": torch.full((100,), float(i)) for i in range(5)}
    part = model(repo, some, {"new": torch.ones(3), **some})
    assert {one.key: one.state for one in part.tensors} == {"new": "added", **dict.fromkeys(some, "equal")}


def test_two_tensors_that_change_places_in_a_chunk_are_changed(repo: Repo) -> None:
    """The chunk is the same one: it is the offset in it that tells."""
    one, other = torch.ones(100), torch.zeros(100)
    part = model(repo, {"a": one, "b": other}, {"b": one, "a": other})
    assert {tensor.key: tensor.state for tensor in part.tensors} == {"a": "changed", "b": "changed"}


def test_a_single_changed_element_of_a_large_tensor_is_found(repo: Repo) -> None:
    changed = BIG.clone()
    changed[77_777] += 100
    (tensor,) = model(repo, {"w": BIG}, {"w": changed}).tensors
    assert tensor.state == "changed"
    assert tensor.change == pytest.approx(100 / 99_999)


def test_more_than_a_batch_is_compared_in_order(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.diff._BATCH_BYTES", 1000)
    before = {f"w{i}": torch.full((100,), float(i + 1)) for i in range(20)}
    after = {name: tensor * (1.5 if i % 3 else 1) for i, (name, tensor) in enumerate(before.items())}
    part = model(repo, before, {"first": torch.ones(2), **after})
    assert [one.key for one in part.tensors] == [*before, "first"]
    assert [one.state for one in part.tensors[:-1]] == ["changed" if i % 3 else "equal" for i in range(20)]
    assert all(one.change == pytest.approx(1 / 3) for one in part.tensors if one.state == "changed")


def test_values_that_differ_are_listed_by_key_with_both(repo: Repo) -> None:
    before = {"a": 1, "b": [1, {"c": "x"}], "nan": math.nan, "z": 0.0, "same": b"1", "gone": None, "t": True, "e": {}}
    after = {"a": 1.0, "b": [1, {"c": "y"}], "nan": math.nan, "z": -0.0, "same": b"1", "new": (), "t": 1, "e": []}
    values = model(repo, before, after).values
    assert values == (
        Value("a", 1, 1.0),
        Value('b[1]["c"]', "x", "y"),
        Value("z", 0.0, -0.0),
        Value("gone", None, ABSENT),
        Value("t", True, 1),
        Value("e", {}, []),
        Value("new", ABSENT, ()),
    )
    assert [(type(one.before), type(one.after)) for one in values[:1]] == [(int, float)]


def test_containers_of_other_types_are_changed_values(repo: Repo) -> None:
    before = {"betas": [0.9, 0.95], "nested": {"a": {"b": 1}}, "w": [BIG]}
    after = OrderedDict(betas=(0.9, 0.95), nested={"a": OrderedDict(b=1)}, w=(BIG,))
    part = model(repo, before, after)
    assert part.state == "changed"
    assert part.values == (
        Value("", dict, OrderedDict),
        Value("betas", list, tuple),
        Value('nested["a"]', dict, OrderedDict),
        Value("w", list, tuple),
    )


def test_what_the_manifests_say_is_compared(repo: Repo) -> None:
    model = {"w": torch.ones(2)}
    a = repo.save(
        {"model": model, "trainer": {}}, run="a", step=1, metrics={"val_loss": 2.0, "x": 1.0},
        experiment=Experiment(model={"n": 1}, data="d"), config={"rate": {"max": 0.1}, "same": 1}, tags=["t"],
    )  # fmt: skip
    b = repo.save(
        {"model": model, "optimizer": {}}, run="a", step=2, metrics={"val_loss": 1.0}, parent=a.id,
        experiment=Experiment(model={"n": 2}, data="d"), config={"rate": {"max": 0.2}, "same": 1},
    )  # fmt: skip
    found = diff(repo, repo.find(a.id), repo.find(b.id))
    assert found.config == (Value('rate["max"]', 0.1, 0.2),)
    assert found.experiment == (Value('model["n"]', 1, 2),)
    assert {one.key: (one.before, one.after) for one in found.metrics} == {
        "score": (pytest.approx(1 / 3), 0.5), "val_loss": (2.0, 1.0), "x": (1.0, ABSENT),
    }  # fmt: skip
    assert {one.key for one in found.identity} == {"step", "created", "parent", "tags"}
    assert {one.name: one.state for one in found.parts} == {
        "model": "equal", "trainer": "removed", "optimizer": "added",
    }  # fmt: skip


def test_a_dropped_part_can_not_be_compared_and_says_so(repo: Repo) -> None:
    first, second = (repo.save({"model": {"w": BIG + i}, "trainer": {"a": i}}, run="a", step=i) for i in range(2))
    repo.store.path(first.manifest.parts["model"].index).unlink()
    found = diff(repo, repo.find(first.id), repo.find(second.id))
    model, trainer = found.parts
    assert (model.state, model.problem) == ("unknown", f"the data of {first.id[:12]} is not in the store")
    assert trainer.values == (Value("a", 0, 1),)


@pytest.mark.parametrize("lost", [True, False])
def test_damage_is_an_error_that_says_where(repo: Repo, lost: bool) -> None:
    first, second = (repo.save({"model": {"w": BIG + i}}, run="a", step=i) for i in range(2))
    chunk = part_index.decode_chunks(repo.store.read(second.manifest.parts["model"].index))[0].id
    path = repo.store.path(chunk)
    path.unlink() if lost else path.write_bytes(b"x")
    with pytest.raises(ObjectMissing if lost else CorruptObject) as caught:
        diff(repo, repo.find(first.id), repo.find(second.id))
    assert (caught.value.object_id, caught.value.part, caught.value.manifest) == (chunk, "model", second.id)


def test_only_the_chunks_of_tensors_that_may_differ_are_read(repo: Repo) -> None:
    first, second = (
        repo.save({"model": {"same": BIG, "other": torch.full((100,), float(i))}}, run="a", step=i) for i in range(2)
    )
    found = part_index.decode(repo.store.read(first.manifest.parts["model"].index))
    for chunk in found.chunks[: math.ceil(BIG.nbytes / (64 << 10))]:
        repo.store.path(chunk.id).unlink()
    (part,) = diff(repo, repo.find(first.id), repo.find(second.id)).parts
    assert [one.state for one in part.tensors] == ["equal", "changed"]


def test_torch_is_imported_only_when_bytes_must_be_compared(repo: Repo) -> None:
    ids = [
        repo.save({"model": {"w": BIG, **more}, "trainer": {"a": i}}, run="a", step=i).id
        for i, more in enumerate(({}, {"new": torch.ones(2).int()}, {"new": torch.zeros(2).int()}))
    ]
    script = (
        "import sys; from castore import Repo; from castore.diff import diff; repo = Repo.open('.');"
        "diff(repo, *map(repo.find, sys.argv[1:])); print('torch' in sys.modules)"
    )
    for other, expected in ((ids[1], "False\n"), (ids[2], "True\n")):
        done = subprocess.run(
            [sys.executable, "-c", script, ids[1] if other == ids[2] else ids[0], other],
            cwd=repo.root.parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == expected


# -- comparing tensors -----------------------------------------------------------------------------------------------

NUMBERS = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_the_change_is_relative_to_the_largest_magnitude(dtype: torch.dtype) -> None:
    before, after = (
        torch.tensor(values, dtype=torch.float64).to(dtype) for values in ([4.0, 0.0, 2.0], [4.0, 1.0, 2.0])
    )
    assert relative_change(before, after) == relative_change(after, before) == 0.25
    assert relative_change(before, before.clone()) == 0
    assert equal_bits(before, before.clone())
    assert not equal_bits(before, after)


@pytest.mark.parametrize("values", [(2**62, 2**62 + 1), (-(2**63), 1 - 2**63), (-1, 0), (3, 2**63 - 1)])
def test_the_change_of_an_integer_is_exact(values: tuple[int, int]) -> None:
    one, other = (torch.tensor([value, 5]) for value in values)
    expected = abs(values[1] - values[0]) / max(5, *map(abs, values))
    assert relative_change(one, other) == relative_change(other, one) == pytest.approx(expected, rel=1e-12, abs=0)
    unsigned = [tensor.view(torch.uint64) for tensor in (one, other)]
    if min(values) >= 0:
        assert relative_change(*unsigned) == pytest.approx(expected, rel=1e-12, abs=0)
    huge = [torch.tensor([value], dtype=torch.uint64) for value in (2**64 - 1, 2**64 - 2)]
    assert relative_change(*huge) == pytest.approx(2.0**-64, abs=0)


def test_the_change_is_at_most_two() -> None:
    assert relative_change(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])) == 2
    assert relative_change(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_change(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_change(torch.tensor(False), torch.tensor(True)) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_there_is_no_change_to_name_beside_what_is_not_finite(value: float) -> None:
    assert relative_change(torch.tensor([1.0, value]), torch.tensor([2.0, value])) is None


def test_bits_decide_what_is_equal() -> None:
    nan = torch.tensor([math.nan, 1.0])
    assert equal_bits(nan, nan.clone())
    assert not equal_bits(torch.tensor(0.0), torch.tensor(-0.0))


def test_a_change_beyond_the_first_slice_is_found() -> None:
    before = torch.ones(3 << 20)
    after = before.clone()
    after[-1] = 0.5
    assert relative_change(before, after) == 0.5
