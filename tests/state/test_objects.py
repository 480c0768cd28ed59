"""Values that frameworks keep beside tensors are restored as what they are, and nothing that was stored is run."""

from __future__ import annotations

import subprocess
import sys
import typing
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import exact
from hypothesis import given
from hypothesis import strategies as st

from castore import Repo
from castore.diff import diff
from castore.errors import CorruptIndex
from castore.format import part_index
from castore.format.part_index import Index, Object, TensorRef
from castore.state import objects, tensors

Pair = namedtuple("Pair", "left right")


class Point(typing.NamedTuple):
    x: float
    weights: Any = None


class Extended(Pair):
    __slots__ = ()


def reloaded(repo: Repo, state: Any) -> Any:
    return repo.load(repo.save({"trainer": state}, run="ci", step=1).id)["trainer"]


@pytest.mark.parametrize(
    "value",
    [
        Counter({30: 1, 80: 2}),
        Counter(),
        Counter("abracadabra"),
        defaultdict(int, a=1),
        defaultdict(None, {1: [2]}),
        defaultdict(list, a=[1]),
        torch.Size([2, 3]),
        torch.Size([]),
        torch.bfloat16,
        torch.device("cuda", 1),
        torch.device("cpu"),
        Pair(1, "x"),
        Point(0.5),
        Extended(1, 2),
        np.float32(0.1),
        np.float16(0.5),
        np.float64(-0.0),
        np.int8(-3),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.complex64(1 - 2j),
        [Counter({1: 2}), {"a": Pair(Counter({3: 1}), torch.Size([1]))}],
        OrderedDict(a=defaultdict(dict, b={"c": (torch.float16,)})),
    ],
    ids=repr,
)
def test_a_value_is_restored_as_what_it_is(repo: Repo, value: Any) -> None:
    loaded = reloaded(repo, value)
    assert type(loaded) is type(value)
    assert loaded == value
    assert repr(loaded) == repr(value)
    if isinstance(value, defaultdict):
        assert loaded.default_factory is value.default_factory
    if isinstance(value, np.generic):
        assert (loaded.dtype, loaded.tobytes()) == (value.dtype, value.tobytes())


def read_only() -> np.ndarray:
    array = np.arange(4.0)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.arange(12.0).reshape(3, 4).T,
        np.arange(10)[::-1],
        np.array(3, dtype="float16"),
        np.zeros((0, 3), dtype="complex64"),
        np.array([True, False]),
        np.array([2**64 - 1], dtype="uint64"),
        np.array([np.nan, -0.0, np.inf], dtype=">f8"),
        read_only(),
        np.random.default_rng(0).normal(size=200_000),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_an_array_is_restored_with_its_type_and_every_bit(repo: Repo, array: np.ndarray) -> None:
    loaded = reloaded(repo, {"array": array})["array"]
    assert type(loaded) is np.ndarray
    assert (loaded.dtype.str, loaded.shape, loaded.tobytes()) == (array.dtype.str, array.shape, array.tobytes())
    assert loaded.flags.writeable


def test_an_array_is_chunked_like_a_tensor_and_shares_its_data(repo: Repo) -> None:
    array = np.random.default_rng(0).normal(size=200_000)
    repo.save({"trainer": {"x": torch.from_numpy(array.copy())}}, run="ci", step=1)
    before = sum(stored.size for stored in repo.store.stored().values())
    repo.save({"trainer": {"x": array}}, run="ci", step=2)
    assert sum(stored.size for stored in repo.store.stored().values()) - before < 10_000


SCHEDULERS = {
    "MultiStepLR": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    "SequentialLR": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1), torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])],
        [2],
    ),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(repo: Repo, name: str) -> None:
    def make() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=np.float64(0.5), momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    def step(scheduler: Any) -> None:
        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()

    optimizer, scheduler = make()
    for _ in range(3):
        step(scheduler)
    state = reloaded(repo, {"optimizer": optimizer.state_dict(), "schedule": scheduler.state_dict()})
    other_optimizer, other = make()
    other_optimizer.load_state_dict(state["optimizer"])
    other.load_state_dict(state["schedule"])
    for _ in range(5):
        step(scheduler)
        step(other)
        assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


# -- what surrounds a call changes nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize("surrounding", ["default device", "inference mode", "autocast", "default dtype", "no grad"])
def test_what_surrounds_a_call_changes_nothing(repo: Repo, surrounding: str) -> None:
    state = {
        "w": torch.arange(100_000, dtype=torch.float32),
        "t": torch.ones(3, 4).t(),
        "e": torch.empty(0),
        "a": np.arange(3),
        "n": np.float32(1.5),
    }
    plain = repo.save({"model": state}, run="plain", step=1).manifest.parts["model"].index
    if surrounding == "default device":
        torch.set_default_device("meta")
    if surrounding == "default dtype":
        torch.set_default_dtype(torch.float64)
    try:
        with {
            "inference mode": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
            "no grad": torch.no_grad,
        }.get(surrounding, torch.enable_grad)():
            saved = repo.save({"model": state}, run="r", step=1)
            loaded = repo.load(saved.id)["model"]
            target = {"w": torch.zeros(100_000, device="cpu", dtype=torch.float32)}
            repo.save({"model": {"w": state["w"]}}, run="target", step=1)
            repo.load_into("target:latest", {"model": target})
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert saved.manifest.parts["model"].index == plain
    assert torch.equal(target["w"], state["w"])
    for name in ("w", "t", "e"):
        assert exact(loaded[name]) == exact(state[name])
        assert not loaded[name].is_inference()
        assert loaded[name].device.type == "cpu"
    assert loaded["a"].tobytes() == state["a"].tobytes()


def test_an_array_is_filled_in_place(repo: Repo) -> None:
    saved = repo.save({"trainer": {"a": np.arange(5.0), "c": Counter({1: 2})}}, run="r", step=1)
    target = {"a": np.zeros(5), "c": Counter()}
    address = target["a"].ctypes.data
    repo.load_into(saved.id, {"trainer": target})
    assert (target["a"].tolist(), target["a"].ctypes.data) == ([0, 1, 2, 3, 4], address)


def test_diff_tells_types_and_contents_apart(repo: Repo) -> None:
    states = [
        {"c": Counter({1: 2}), "n": np.float32(1.0), "d": torch.float16, "a": np.arange(3), "same": Counter({5: 6})},
        {"c": {1: 2}, "n": np.float64(1.0), "d": torch.bfloat16, "a": np.arange(1, 4), "same": Counter({5: 6})},
    ]
    ids = [repo.save({"trainer": state}, run="r", step=step).id for step, state in enumerate(states)]
    (part,) = diff(repo, *map(repo.find, ids)).parts
    assert [(value.key, value.before, value.after) for value in part.values] == [
        ("c", "collections.Counter", dict),
        ("n", "numpy.generic float32", "numpy.generic float64"),
        ("d", "float16", "bfloat16"),
    ]
    assert [(tensor.key, tensor.state) for tensor in part.tensors] == [("a", "changed")]


# -- named tuples: by name, and nothing is imported -------------------------------------------------------------------

SCRIPT = """
import sys, castore
value = castore.Repo.open(sys.argv[1]).load(sys.argv[2])["trainer"]
print(type(value).__module__, type(value).__qualname__, value._fields, value, "somewhere" in sys.modules)
print(castore.Repo.open(sys.argv[1]).save({"trainer": value}, run="again", step=1).manifest.parts["trainer"].index)
"""


def test_a_named_tuple_whose_type_is_not_there_becomes_an_equal_one(repo: Repo, tmp_path: Path) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "somewhere.py").write_text("raise SystemExit('imported')")
    Somewhere = namedtuple("Somewhere", "a b", module="somewhere")
    saved = repo.save({"trainer": Somewhere(1, [2])}, run="r", step=1)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(repo.root.parent), saved.id],
        env={"PYTHONPATH": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "somewhere Somewhere ('a', 'b') Somewhere(a=1, b=[2]) False",
        saved.manifest.parts["trainer"].index,
    ], done.stderr


def stored(value: Object) -> Any:
    index = part_index.decode(part_index.encode(Index((), (), value)))
    return tensors.restore(index.tree, [])


@pytest.mark.parametrize(
    "value",
    [
        Object("namedtuple", ("os:system", ("a",), ("touch x",))),
        Object("namedtuple", ("builtins:eval", ("a",), ("1",))),
        Object("namedtuple", ("builtins:tuple", ("a",), (1,))),
        Object("namedtuple", (":", ("a",), (1,))),
        Object("namedtuple", ("subprocess:Popen", ("a",), (1,))),
    ],
    ids=lambda value: value.items[0],
)
def test_a_name_that_is_no_named_tuple_of_these_fields_is_not_called(value: Object) -> None:
    try:
        made = stored(value)
    except CorruptIndex:
        return
    assert isinstance(made, tuple)
    assert tuple(made) == value.items[-1]


@pytest.mark.parametrize(
    "value",
    [
        Object("namedtuple", ("m:N", ("a", "b"), (1,))),
        Object("namedtuple", ("m:N", ("class",), (1,))),
        Object("namedtuple", ("m:N", ("_x",), (1,))),
        Object("namedtuple", ("m:N", ("a", "a"), (1, 2))),
        Object("namedtuple", ("m:not a name", ("a",), (1,))),
        Object("namedtuple", (5, ("a",), (1,))),
        Object("namedtuple", ("m:N", ["a"], (1,))),
        Object("collections.Counter", ([1],)),
        Object("collections.defaultdict", ("eval", {})),
        Object("collections.defaultdict", ([], {})),
        Object("collections.defaultdict", ("int", [])),
        Object("torch.dtype", ("load",)),
        Object("torch.dtype", ([],)),
        Object("torch.device", ("nowhere",)),
        Object("torch.device", (1,)),
        Object("torch.Size", (("a",),)),
        Object("torch.Size", ([1],)),
        Object("numpy.generic", ("object", 1)),
        Object("numpy.generic", ("int8", 300)),
        Object("numpy.generic", ("int8", "1")),
        Object("numpy.generic", ([], 1)),
        Object("numpy.ndarray", ("<f4", 5)),
        Object("numpy.ndarray", ("O", 5)),
        Object("numpy.ndarray", ("nonsense", 5)),
    ],
    ids=repr,
)
def test_what_no_value_can_be_made_of_is_damage(value: Object) -> None:
    with pytest.raises(CorruptIndex, match=f"no {value.kind} can be made of its items"):
        stored(value)


def test_an_array_of_a_tensor_of_another_type_is_damage() -> None:
    with pytest.raises(CorruptIndex):
        tensors.restore(Object("numpy.ndarray", ("<f4", TensorRef(0))), [torch.ones(2, dtype=torch.int64)])


@pytest.mark.parametrize("value", [Object("os.system", (1,)), Object("torch.Size", (1, 2)), Object("torch.Size", ())])
def test_a_kind_that_is_unknown_or_has_another_number_of_items_is_damage(value: Object) -> None:
    with pytest.raises(CorruptIndex, match="an object of kind"):
        stored(value)


# -- readable paths ---------------------------------------------------------------------------------------------------

KEYS = st.one_of(st.sampled_from(["a", "b", "a.b", "a[0]", '"', "[", "]", "", "a[", '["a"]', "0"]), st.integers(-1, 2))
TREES = st.recursive(
    st.none(),
    lambda items: st.one_of(st.lists(items, max_size=3), st.dictionaries(KEYS, items, max_size=4)),
    max_leaves=12,
)


@given(TREES)
def test_different_places_have_different_paths(tree: Any) -> None:
    paths = [path for path, _ in part_index.leaves(tree)]
    assert len(set(paths)) == len(paths)


def test_very_large_keys_differ_too() -> None:
    assert part_index.join_key("a", 2**5000) != part_index.join_key("a", 2**5000 + 1)


def test_tensors_are_asked_for_by_the_keys_that_are_printed(repo: Repo) -> None:
    state = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1), "*": torch.ones(2)}, "a[0]": torch.ones(3), "*": None}
    saved = repo.save({"model": state}, run="r", step=1)
    for key, length in (("a.b", 1), ('a["b"]', 1), ('["a[0]"]', 3)):
        loaded = repo.load_tensors(saved.id, [key])["model"]
        assert {key: len(tensor) for key, tensor in loaded.items()} == {key: length}
    assert repo.load_tensors(saved.id, ["a.b"])["model"]["a.b"].item() == 1
    assert repo.load_tensors(saved.id, ['a["b"]'])["model"]['a["b"]'].item() == 0


def test_take_apart_needs_no_torch(tmp_path: Path) -> None:
    Repo.init(tmp_path)
    script = (
        "import sys, castore; from collections import Counter; repo = castore.Repo.open(sys.argv[1]);"
        "print(repo.save({'trainer': {'c': Counter(a=1)}}, run='r', step=1).id); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Repo.open(tmp_path).load(done.stdout.strip())["trainer"] == {"c": Counter(a=1)}
    assert objects.take_apart({"c": Counter(a=1)}, "") == {"c": Object("collections.Counter", ({"a": 1},))}
