from __future__ import annotations

import ast
import random
import struct
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import bits, exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import castore
from castore import Repo
from castore.errors import CorruptIndex, UnsupportedValue
from castore.format.part_index import DTYPES, TensorSpec
from castore.state.tensors import allocate

ALL_DTYPES = sorted({str(x)[6:] for x in vars(torch).values() if isinstance(x, torch.dtype)})
STORED = [name for name in ALL_DTYPES if name in DTYPES]


def reloaded(repo: Repo, state: Any) -> Any:
    saved = repo.save({"model": state}, run="ci", step=1)
    return repo.load(saved.id)["model"]


def filled(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """A tensor of random bytes: for floats that includes NaNs of every payload."""
    count = torch.Size(shape).numel()
    size = DTYPES[dtype][0]
    data = bytearray(random.Random(seed).randbytes(count * size))
    if dtype == "bool":
        data = bytearray(byte & 1 for byte in data)
    return torch.tensor(list(data), dtype=torch.uint8).view(getattr(torch, dtype)).reshape(shape)


def test_every_element_type_of_torch_is_stored_except_the_quantised() -> None:
    assert [name for name in ALL_DTYPES if name not in DTYPES] == ["qint32", "qint8", "quint2x4", "quint4x2", "quint8"]
    assert {"bfloat16", "float8_e4m3fn", "float8_e5m2", "complex32", "uint16", "uint64", "bool"} <= set(STORED)


@pytest.mark.parametrize("dtype", STORED)
def test_every_element_type_comes_back_bit_for_bit(repo: Repo, dtype: str) -> None:
    state = {
        "matrix": filled(dtype, 40, 7),
        "scalar": filled(dtype, 1, seed=2)[0],
        "nothing": filled(dtype, 3, 0, 2),
        "transposed": filled(dtype, 9, 5, seed=3).T,
        "large": filled(dtype, 70_001, seed=4),
    }
    assert DTYPES[dtype][0] == state["matrix"].element_size()
    found = reloaded(repo, state)
    assert exact(found) == exact(state)
    assert all(tensor.is_contiguous() for tensor in found.values())


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda base: base.T, id="transposed"),
        pytest.param(lambda base: base[::3], id="every third row"),
        pytest.param(lambda base: base[:, 1:], id="without the first column"),
        pytest.param(lambda base: base[::2, ::7], id="strided both ways"),
        pytest.param(lambda base: base[0].expand(250, -1), id="expanded"),
        pytest.param(lambda base: base[:, :1].expand(-1, 300), id="expanded columns"),
        pytest.param(lambda base: base.view(10, 30, 7, 43).permute(2, 0, 3, 1), id="four axes permuted"),
        pytest.param(lambda base: base.as_strided((200, 300), (150, 1)), id="rows that overlap"),
        pytest.param(lambda base: base[5:9].unsqueeze(1), id="a contiguous part"),
        pytest.param(lambda base: base[:, 3], id="one column"),
        pytest.param(lambda base: base.flatten()[1:], id="begins off the alignment"),
        pytest.param(lambda base: base.T[:, :0], id="an empty part"),
        pytest.param(lambda base: base[0, :1][::2], id="one element that keeps its stride"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "complex128", "bool"])
def test_a_view_is_stored_as_the_dense_tensor_it_shows(
    repo: Repo, dtype: str, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    tensor = view(filled(dtype, 300, 301))
    found = reloaded(repo, {"x": tensor})["x"]
    assert found.shape == tensor.shape
    assert bits(found) == bits(tensor)
    assert found.is_contiguous()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_any_permuted_and_strided_view_comes_back(repo: Repo, shape: list[int], rng: random.Random) -> None:
    tensor = filled("int16", *shape).permute(rng.sample(range(len(shape)), len(shape)))
    tensor = tensor[tuple(slice(rng.randrange(2), None, rng.randrange(1, 3)) for _ in shape)]
    assert exact(reloaded(repo, [tensor, tensor.T if tensor.dim() == 2 else tensor])[0]) == exact(tensor)


def test_conjugate_and_negative_views_are_stored_as_what_they_show(repo: Repo) -> None:
    base = torch.complex(torch.arange(6.0), torch.arange(6.0) + 1)
    state = {"conj": base.conj(), "neg": base.conj().imag, "both": base.conj().reshape(2, 3).T}
    assert state["conj"].is_conj()
    assert state["neg"].is_neg()
    found = reloaded(repo, state)
    assert not found["conj"].is_conj()
    assert found["conj"].tolist() == [complex(i, -i - 1) for i in range(6)]
    assert found["neg"].tolist() == [-i - 1.0 for i in range(6)]
    assert exact(found["both"]) == exact(state["both"].resolve_conj())


def test_the_bits_of_a_nan_survive_even_a_copy_of_a_view(repo: Repo) -> None:
    signalling = torch.tensor([0x7F800001, 0x7FC12345, -0x400000 + 7, -1], dtype=torch.int32).repeat(3, 1)
    state = {"dense": signalling.view(torch.float32), "view": signalling.T.view(torch.float32)}
    found = reloaded(repo, state)
    assert torch.equal(found["dense"].view(torch.int32), signalling)
    assert torch.equal(found["view"].view(torch.int32), signalling.T)


def test_tied_tensors_come_back_tied_and_are_stored_once(repo: Repo) -> None:
    weight = torch.randn(50_000)
    state = {"wte": weight, "head": weight, "alias": weight.view(-1), "list": [weight], "other": weight.clone()}
    saved = repo.save({"model": state}, run="ci", step=1)
    found = repo.load(saved.id)["model"]
    assert found["wte"] is found["head"] is found["alias"] is found["list"][0]
    assert found["other"] is not found["wte"]
    assert saved.manifest.parts["model"].bytes == 2 * 200_000
    assert saved.new_objects == 4 + 1  # the chunks of one weight, and the index


def test_views_of_one_memory_that_differ_are_not_tied(repo: Repo) -> None:
    base = torch.arange(16.0)
    state = {"base": base, "shape": base.view(4, 4), "half": base[:8], "type": base.view(torch.int32), "T": base.view(
        4, 4).T, "empty": base[:0], "empty2": base[:0]}  # fmt: skip
    found = reloaded(repo, state)
    assert exact(found) == exact(state)
    assert len({id(tensor) for tensor in found.values()}) == len(state)


def test_plain_values_keep_their_exact_types(repo: Repo) -> None:
    nan = struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000321))[0]
    state = {
        0: "int key", "0": "str key", -(2**70): "large key",
        "tuple": (1, [2, (3,)], ()), "none": None, "bytes": b"\x00\xff", "big": 2**200, "bools": [True, False, 1, 0],
        "floats": [0.0, -0.0, nan, float("-inf")], "complex": complex(nan, -0.0), "text": "naïve \0 🜁",
        "ordered": OrderedDict([("b", 1), ("a", torch.ones(2))]), "order": {"z": 1, "a": 2},
    }  # fmt: skip
    assert exact(reloaded(repo, state)) == exact(state)


@pytest.mark.parametrize("state", [torch.arange(5), 3, [], (torch.ones(2), None), OrderedDict()], ids=str)
def test_a_part_may_be_any_value(repo: Repo, state: Any) -> None:
    assert exact(reloaded(repo, state)) == exact(state)


class Subclass(torch.Tensor):
    pass


class Mapping(dict[str, int]):
    pass


class Text(str):
    __slots__ = ()


Pair = namedtuple("Pair", "a b")
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.filterwarnings("ignore")  # torch says of quantised and compressed tensors that they may go
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda: torch.eye(3).to_sparse(), "to_dense", id="sparse"),
        pytest.param(lambda: torch.eye(3).to_sparse_csr(), "to_dense", id="csr"),
        pytest.param(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "dtype", id="quantised"),
        pytest.param(lambda: torch.empty(3, device="meta"), "meta", id="meta"),
        pytest.param(lambda: torch.ones(3).as_subclass(Subclass), "Subclass", id="tensor subclass"),
        pytest.param(lambda: torch.nn.parameter.UninitializedParameter(), "Uninitialized", id="uninitialised"),
        pytest.param(lambda: object(), "object", id="object"),
        pytest.param(lambda: {1, 2}, "set", id="set"),
        pytest.param(lambda: Text("x"), "Text", id="str subclass"),
        pytest.param(lambda: defaultdict(lambda: 1), "factory is one of", id="factory"),
        pytest.param(lambda: Mapping(a=1), "Mapping", id="dict subclass"),
        pytest.param(lambda: torch.max(torch.ones(2, 2), 0), "max is a special tuple", id="structseq"),
        pytest.param(lambda: np.array(["a"]), "array of type <U1", id="array of text"),
        pytest.param(lambda: np.array([object()]), "array of type object", id="array of objects"),
        pytest.param(lambda: np.datetime64("2026-01-01"), "datetime64", id="time"),
        pytest.param(lambda: np.longdouble(1), "scalar of type (longdouble|float128|float64)", id="long double"),
        pytest.param(lambda: np.ma.masked_array([1]), "MaskedArray", id="masked array"),
        pytest.param(lambda: torch.ones(2).untyped_storage(), "UntypedStorage", id="storage"),
        pytest.param(lambda: print, "builtin_function", id="function"),
        pytest.param(lambda: "\ud800", "Unicode", id="lone surrogate"),
    ],
)
def test_what_cant_be_stored_exactly_is_refused_by_its_key(repo: Repo, make: Callable[[], Any], reason: str) -> None:
    state = {"state": [None, {7: make()}]}
    with pytest.raises(UnsupportedValue, match=rf"^can't store optimizer\[.state.\]\[1\]\[7\]: .*{reason}"):
        repo.save({"model": {"w": torch.ones(2)}, "optimizer": state}, run="ci", step=1)
    assert repo.catalog.listing().entries == ()


@pytest.mark.parametrize(
    ("state", "reason"),
    [({"a": {2.5: 1}}, r'model\["a"\]\[2\.5\]: a dict key'), ({(1, 2): 1}, "a dict key"), (LOOP, "inside itself")],
    ids=["float key", "tuple key", "a list inside itself"],
)
def test_keys_and_loops_that_have_no_form_are_refused(repo: Repo, state: Any, reason: str) -> None:
    with pytest.raises(UnsupportedValue, match=reason):
        repo.save({"model": state}, run="ci", step=1)


@pytest.mark.parametrize(
    "spec", [TensorSpec("float99", (1,), 0), TensorSpec("int8", (2**62,), 0), TensorSpec("int8", (2**62, 2**62), 0)]
)
def test_a_tensor_that_torch_cant_make_is_a_corrupt_index(spec: TensorSpec) -> None:
    with pytest.raises(CorruptIndex):
        allocate(spec)


class Training:
    """A model with tied weights and a buffer, its optimizer and schedule, and the state of both random generators."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Embedding(50, 32), torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 50)
        )
        self.model[3].weight = self.model[0].weight
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, amsgrad=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)

    def step(self) -> float:
        tokens = torch.randint(50, (16,))
        loss = torch.nn.functional.cross_entropy(self.model(tokens), tokens.roll(self.rng.randrange(16)))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def state(self) -> dict[str, Any]:
        trainer = {"schedule": self.schedule.state_dict(), "torch": torch.get_rng_state(), "rng": self.rng.getstate()}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "trainer": trainer}

    def restore(self, parts: dict[str, Any]) -> None:
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict(parts["trainer"]["schedule"])
        torch.set_rng_state(parts["trainer"]["torch"])
        self.rng.setstate(parts["trainer"]["rng"])


def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(repo: Repo) -> None:
    one = Training(1)
    for _ in range(3):
        one.step()
    saved = repo.save(one.state(), run="ci", step=3)
    at_save = exact(one.state())
    expected = [one.step() for _ in range(4)]
    other = Training(2)
    other.restore(repo.load(saved.id))
    assert exact(other.state()) == at_save
    assert [other.step() for _ in range(4)] == expected
    assert exact(other.state()) == exact(one.state())


def test_nothing_in_castore_can_unpickle() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
    for path in Path(castore.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    assert not forbidden & {name.name.split(".")[0] for name in names}, path.name
                case ast.ImportFrom(module=module):
                    assert (module or "").split(".")[0] not in forbidden, path.name
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                    # for the files of others alone, and with nothing but data in them
                    given = {one.arg: ast.unparse(one.value) for one in keywords}
                    assert given.get("weights_only") == "True", path.name
                case ast.Call(func=ast.Name(id=name)):
                    assert name not in {"eval", "exec", "__import__"}, path.name
