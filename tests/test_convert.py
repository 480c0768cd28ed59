from __future__ import annotations

import json
import os
import pickle
import re
import resource
import stat
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import bits, exact, parts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from castore import Experiment, Repo, convert, errors
from castore.format.part_index import DTYPES

KNOWN = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16",
         "float32", "float64", "complex64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
         "float8_e8m0fnu", "float4_e2m1fn_x2"]  # fmt: skip


def tensor_of(dtype: str, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    width = DTYPES[dtype][0]
    count = 1
    for extent in shape:
        count *= extent
    raw = torch.arange(count * width, dtype=torch.uint8) % 2
    return raw.view(getattr(torch, dtype)).reshape(shape)


def saved(repo: Repo, model: Any, **options: Any) -> str:
    return repo.save({"model": model}, run="main", step=7, **options).id


# -- export ----------------------------------------------------------------------------------------------------------


def test_every_element_type_that_safetensors_knows_is_exact(repo: Repo, tmp_path: Path) -> None:
    model = {dtype: tensor_of(dtype) for dtype in KNOWN}
    model |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "int_scalar": torch.tensor(3)}
    checkpoint_id = saved(repo, model)
    found = convert.export(repo, checkpoint_id, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        again = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert again.keys() == model.keys()
    for name, tensor in model.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].shape == tensor.shape
        assert bits(again[name].clone() if name == "empty" else again[name]) == bits(tensor), name
    assert (found.tensors, found.bytes) == (len(model), (tmp_path / "out.safetensors").stat().st_size)


def test_the_header_says_where_it_is_from(repo: Repo, tmp_path: Path) -> None:
    checkpoint_id = saved(repo, {"a": torch.ones(1)})
    convert.export(repo, checkpoint_id[:8], tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "castore_id": checkpoint_id,
            "castore_run": "main",
            "castore_step": "7",
            "castore_part": "model",
        }


def test_nested_states_become_names_with_dots_and_tied_tensors_are_written_for_each(repo: Repo, tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    checkpoint_id = saved(
        repo, {"layers": [{"w": shared}, OrderedDict(b=torch.ones(2))], "head": shared, "3": {4: shared}}
    )
    convert.export(repo, checkpoint_id, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert sorted(found) == ["3.4", "head", "layers.0.w", "layers.1.b"]
    assert found["head"].equal(shared)
    assert found["layers.0.w"].equal(shared)


@pytest.mark.parametrize(
    ("model", "key", "says"),
    [
        ({"a": {"b": 3}}, "a.b", "not a int"),
        ({"a": torch.ones(1), "b": [torch.ones(1), None]}, "b.1", "not a NoneType"),
        ({"a": {}}, "a", "an empty container"),
        ({}, "this part", "an empty container"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "a.b", "two tensors have this name"),
        ({1: torch.ones(1), "1": torch.ones(1)}, "1", "two tensors have this name"),
        ({"z": torch.ones(2, dtype=torch.complex128)}, "z", "knows no complex128"),
        ({"z": torch.ones(2, dtype=torch.uint8).view(torch.bits8)}, "z", "knows no bits8"),
        ({"__metadata__": torch.ones(1)}, "__metadata__", "for itself"),
    ],
)
def test_what_safetensors_cannot_hold_is_an_error_that_names_the_key(
    repo: Repo, tmp_path: Path, model: Any, key: str, says: str
) -> None:
    checkpoint_id = saved(repo, model)
    with pytest.raises(errors.UnsupportedValue, match=says) as caught:
        convert.export(repo, checkpoint_id, tmp_path / "out.safetensors")
    assert caught.value.key == key
    assert [path.name for path in tmp_path.iterdir()] == [".castore"]
    if key != "__metadata__":
        convert.export(repo, checkpoint_id, tmp_path / "out.pt")


def test_a_pt_is_the_plain_state(repo: Repo, tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    model = {"layers": [{"w": shared}], "head": shared, "step": 3, "betas": (0.9, None)}
    checkpoint_id = saved(repo, model)
    found = convert.export(repo, checkpoint_id, tmp_path / "out.pt")
    again = torch.load(tmp_path / "out.pt", weights_only=True)
    assert exact(again) == exact(model)
    assert again["head"].data_ptr() == again["layers"][0]["w"].data_ptr()
    assert found.tensors == 2


def test_another_part_can_be_exported_and_one_that_is_not_there_is_told(repo: Repo, tmp_path: Path) -> None:
    checkpoint_id = repo.save(
        {"model": {"a": torch.ones(1)}, "optimizer": {"m": torch.zeros(2)}}, run="main", step=1
    ).id
    convert.export(repo, checkpoint_id, tmp_path / "o.safetensors", part="optimizer")
    assert list(load_file(tmp_path / "o.safetensors")) == ["m"]
    with pytest.raises(errors.NotFound, match="no part 'trainer'"):
        convert.export(repo, checkpoint_id, tmp_path / "t.safetensors", part="trainer")
    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_the_file_is_written_aside_and_only_replaces_when_asked_to(repo: Repo, tmp_path: Path, suffix: str) -> None:
    checkpoint_id = saved(repo, {"a": torch.ones(5)})
    out = tmp_path / f"out.{suffix}"
    out.write_text("mine")
    with pytest.raises(errors.RefusedPath, match="it exists: --force replaces it"):
        convert.export(repo, checkpoint_id, out)
    assert out.read_text() == "mine"
    before = os.open(out, os.O_RDONLY)
    convert.export(repo, checkpoint_id, out, force=True)
    assert os.read(before, 9) == b"mine"  # renamed over, not written into
    os.close(before)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o666 & ~mask
    assert sorted(path.name for path in tmp_path.iterdir()) == [".castore", f"out.{suffix}"]


def test_the_umask_of_the_process_is_left_alone(repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that creates a file meanwhile would create one that everybody may write to."""
    checkpoint_id = saved(repo, {"a": torch.ones(5)})
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail(f"the umask was set to {mask}"))
    convert.export(repo, checkpoint_id, tmp_path / "out.safetensors")
    convert.export(repo, checkpoint_id, tmp_path / "out.pt")


@pytest.mark.parametrize("force", [False, True])
def test_links_git_and_castore_are_no_places_to_export_to(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    checkpoint_id = saved(repo, {"a": torch.ones(5)})
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / ".git").mkdir()
    (tmp_path / "hidden").symlink_to(".git")
    (tmp_path / "plain").mkdir()
    (tmp_path / "also").symlink_to("plain")
    monkeypatch.chdir(tmp_path)
    targets = ["link", tmp_path / "link", ".git/x", ".GIT/x", "hidden/x", "also/x", tmp_path / "hidden" / "x",
               ".castore/objects/x", "plain", "plain/../.git/x", "nowhere/x", "."]  # fmt: skip
    for target in targets:
        with pytest.raises(errors.RefusedPath):
            convert.export(repo, checkpoint_id, Path(target), force=force)
    assert (tmp_path / "victim").read_text() == "mine"
    assert os.listdir(".git") == os.listdir("plain") == []


def test_a_full_disk_leaves_nothing_behind(repo: Repo, tmp_path: Path, start: Callable[..., Any]) -> None:
    checkpoint_id = saved(repo, {"a": torch.randn(1_000_000)})
    for suffix in ("safetensors", "pt"):
        process = start(_export_with_little_room, tmp_path, checkpoint_id, f"out.{suffix}")
        process.join()
        assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == [".castore"]


def _export_with_little_room(root: Path, checkpoint_id: str, name: str) -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    with pytest.raises(errors.StorageError):
        convert.export(Repo.open(root), checkpoint_id, root / name)


# -- import ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_what_was_exported_comes_back(repo: Repo, tmp_path: Path, suffix: str) -> None:
    model = {f"layer.{dtype}": tensor_of(dtype) for dtype in KNOWN} | {"empty": torch.empty(2, 0)}
    model["layer.big"] = torch.randn(100_000)
    checkpoint_id = saved(repo, model)
    out = tmp_path / f"out{suffix}"
    if suffix == ".pth":
        torch.save(model, out)
    else:
        convert.export(repo, checkpoint_id, out)
    found = convert.import_file(repo, out, run="again", step=3, tags=["t"], note="n", metrics={"val_loss": 2.3})
    assert exact(dict(sorted(repo.load(found.id)["model"].items()))) == exact(dict(sorted(model.items())))
    assert list(found.manifest.parts) == ["model"]
    assert (found.manifest.run, found.manifest.step, found.manifest.tags) == ("again", 3, ["t"])
    assert found.manifest.metrics == {"val_loss": 2.3}
    # large tensors are not stored again; small ones share chunks, and the order in the file is its own
    assert found.new_bytes < 10_000
    if suffix == ".safetensors":
        assert found.manifest.info["exported_from"] == found.manifest.parent == checkpoint_id


def test_a_nested_pt_with_plain_values_is_kept_as_it_is(repo: Repo, tmp_path: Path) -> None:
    tied = torch.randn(3)
    state = {"model": OrderedDict(a=tied, b=tied), "step": 3, "betas": (0.9, 0.95), "raw": b"\0\xff", "none": None}
    torch.save(state, tmp_path / "x.pt")
    found = convert.import_file(repo, tmp_path / "x.pt")
    assert exact(repo.load(found.id)["model"]) == exact(state)
    assert (found.manifest.run, found.manifest.step) == ("imported", 0)


def test_like_takes_line_settings_run_and_step(repo: Repo, tmp_path: Path) -> None:
    line = Experiment(model={"n": 3}, tokenizer="t", data="d")
    checkpoint_id = saved(repo, {"a": torch.ones(2)}, experiment=line, config={"lr": 0.1}, metrics={"val_loss": 3.0})
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    found = convert.import_file(repo, tmp_path / "x.safetensors", like=checkpoint_id[:9], metrics={"val_loss": 2.0})
    made = found.manifest
    assert (made.experiment, made.config, made.run, made.step) == (line, {"lr": 0.1}, "main", 7)
    assert repo.resolve("best", line, parts=["model"]).require().id == found.id
    assert made.info["like"] == checkpoint_id
    with pytest.raises(errors.UnknownId):
        convert.import_file(repo, tmp_path / "x.safetensors", like="0123")


def header(text: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE_SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x08\0\0",
    "huge header": b"\xff" * 8,
    "header beyond the file": header({}, length=1 << 30),
    "no JSON": header(b"\xff\xfe{"),
    "a list": header([]),
    "deep": header(b"[" * 100_000),
    "data missing": header({"a": tensor()}),
    "claims a terabyte": header({"a": tensor(shape=(1 << 40,), offsets=(0, 1 << 42))}, b"1234"),
    "shape and bytes differ": header({"a": tensor(shape=(1 << 40,))}, b"1234"),
    "shape overflows": header({"a": tensor(shape=(1 << 62, 1 << 62))}, b"1234"),
    "backwards": header({"a": tensor(offsets=(4, 0))}, b"1234"),
    "negative": header({"a": tensor(shape=(-1,))}, b"1234"),
    "overlap": header({"a": tensor(), "b": tensor()}, b"1234"),
    "hole": header({"a": tensor(), "b": tensor(offsets=(8, 12))}, b"123456789012"),
    "trailing bytes": header({"a": tensor()}, b"12345"),
    "unknown type": header({"a": tensor("F99")}, b"1234"),
    "type torch has not": header({"a": tensor("F6_E2M3", (4,), (0, 3))}, b"123"),
    "a pickle": pickle.dumps({"a": 1}),
}


def nothing_was_saved(repo: Repo) -> bool:
    return not repo.catalog.listing().entries and not repo.store.stored()


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_a_hostile_safetensors_file_is_an_error_and_nothing_is_saved(repo: Repo, tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(HOSTILE_SAFETENSORS[name])
    with pytest.raises(errors.InvalidFile, match=r"x\.safetensors: .*nothing was imported"):
        convert.import_file(repo, tmp_path / "x.safetensors")
    assert nothing_was_saved(repo)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.integers(0, 300), st.integers(0, 255), st.booleans())
@example(0, 0, True)
def test_a_changed_or_cut_file_is_read_or_refused_and_nothing_else(
    tmp_path: Path, at: int, value: int, cut: bool
) -> None:
    for suffix in ("safetensors", "pt"):
        path = tmp_path / f"good.{suffix}"
        if not path.exists():
            model = {"a": torch.arange(5.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
            save_file(model, path) if suffix == "safetensors" else torch.save(model, path)
        data = bytearray(path.read_bytes())
        at %= len(data)
        data[at] = value
        other = tmp_path / f"other.{suffix}"
        other.write_bytes(data[:at] if cut else data)
        try:
            convert.read(other)
        except (errors.InvalidFile, errors.UnsupportedFile):
            continue


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    """What torch.save writes, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", b"little")
        for name, data in ({"version": b"3\n"} | more).items():
            file.writestr(f"archive/{name}", data)
    return path


class Runs:
    """Does what its pickle says as soon as it is read."""

    def __init__(self, what: Callable[..., Any], *arguments: Any) -> None:
        self.done = what, arguments

    def __reduce__(self) -> Any:
        return self.done


def laughs() -> bytes:
    """Lists in lists in lists: 2 ** 60 items in a few hundred bytes."""
    value: Any = [0]
    for _ in range(60):
        value = [value, value]
    return pickle.dumps(value, 2)


def inside_itself() -> bytes:
    value: list[Any] = []
    value.append(value)
    return pickle.dumps(value, 2)


PICKLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "runs a command": (lambda: pickle.dumps({"a": Runs(os.system, "touch pwned")}, 2), "posix.system"),
    "runs a command, protocol 4": (lambda: pickle.dumps({"a": Runs(os.system, "touch pwned")}, 4), "STACK_GLOBAL"),
    "evaluates": (lambda: pickle.dumps(Runs(eval, "open('pwned', 'w')"), 2), "eval"),
    "bytearray of any size": (lambda: pickle.dumps(Runs(bytearray, 10**12), 2), "bytearray"),
    "laughs": (laughs, "more than 1000000 values"),
    "inside itself": (inside_itself, "more than 100 nested"),
    "a name repeated": (lambda: pickle.dumps({"x" * 2000: [0] * 1000}, 2), "a name of more than"),
    "cut": (lambda: pickle.dumps({"a": 1}, 2)[:-3], "pickle"),
    "no pickle": (lambda: b"\xff" * 10, "pickle"),
    "empty": (lambda: b"", "pickle"),
    "stack underflow": (lambda: b"\x80\x02R.", "torch can't read it"),
    "a storage that isn't there": (
        lambda: (
            b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ."
        ),
        "torch can't read it",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_an_error_and_nothing_runs_or_is_saved(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, says = PICKLES[name]
    for path in (archive(tmp_path / "x.pt", make()), tmp_path / "bare.pt"):
        if path.name == "bare.pt":
            path.write_bytes(make())
            says = "not the zip that torch.save writes"
        with pytest.raises(errors.InvalidFile, match=says):
            convert.import_file(repo, path)
    assert nothing_was_saved(repo)
    assert not (tmp_path / "pwned").exists()


def test_a_few_bytes_seen_as_a_huge_tensor_are_refused(repo: Repo, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.pt")
    base = torch.zeros(100_000)
    torch.save([base[i : i + 90_000] for i in range(1000)], tmp_path / "y.pt")
    for name in ("x.pt", "y.pt"):
        with pytest.raises(errors.InvalidFile, match="claim more than 8 times"):
            convert.import_file(repo, tmp_path / name)
    assert nothing_was_saved(repo)
    torch.save([base[:90_000], base[10_000:]], tmp_path / "z.pt")
    convert.import_file(repo, tmp_path / "z.pt")


def test_a_compressed_or_lying_zip_is_refused(repo: Repo, tmp_path: Path) -> None:
    pickled = pickle.dumps({"a": 1}, 2)
    archive(tmp_path / "bomb.pt", pickled, zipfile.ZIP_DEFLATED, **{"data/0": bytes(10_000_000)})
    with pytest.raises(errors.InvalidFile, match="compressed"):
        convert.import_file(repo, tmp_path / "bomb.pt")
    lying = archive(tmp_path / "lying.pt", pickled, **{"data/0": b"12345678"})
    data = lying.read_bytes()
    for stored, meant in ((1 << 30, 1 << 30), (1 << 30, 8), (8, 1 << 30)):
        lying.write_bytes(data.replace(struct.pack("<II", 8, 8), struct.pack("<II", stored, meant)))
        with pytest.raises(errors.InvalidFile, match="claims more bytes"):
            convert.import_file(repo, lying)
    archive(tmp_path / "script.pt", pickled, **{"code/__torch__.py": b"", "constants.pkl": pickled})
    with pytest.raises(errors.InvalidFile, match="one state alone"):
        convert.import_file(repo, tmp_path / "script.pt")
    assert nothing_was_saved(repo)


@pytest.mark.parametrize("name", ["x.bin", "x", "x.index.json"])
def test_another_kind_of_file_is_told(repo: Repo, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(errors.UnsupportedFile, match=r"neither \.safetensors nor \.pt"):
        convert.import_file(repo, tmp_path / name)


def test_what_is_no_file_is_not_waited_for(repo: Repo, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for name, says in (
        ("pipe.pt", "not a regular file"),
        ("folder.pt", "not a regular file"),
        ("gone.pt", "No such file"),
    ):
        with pytest.raises(errors.UnsupportedFile, match=says):
            convert.import_file(repo, tmp_path / name)


def test_a_checkpoint_with_a_scheduler_is_imported_as_it_is(repo: Repo, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]).state_dict()
    torch.save({"schedule": schedule, "size": torch.Size([2])}, tmp_path / "x.pt")
    found = convert.import_file(repo, tmp_path / "x.pt")
    loaded = repo.load(found.id)["model"]
    assert (loaded["schedule"], type(loaded["schedule"]["milestones"])) == (schedule, Counter)
    assert type(loaded["size"]) is torch.Size


def test_what_cannot_be_stored_is_an_error_that_names_the_key(repo: Repo, tmp_path: Path) -> None:
    torch.save({"a": {"b": torch.ones(3).to_sparse()}}, tmp_path / "x.pt")
    with pytest.raises((errors.UnsupportedValue, errors.InvalidFile), match=r'model\["a.b"\]|sparse'):
        convert.import_file(repo, tmp_path / "x.pt")
    torch.save({"a.b": torch.ones(3).untyped_storage()}, tmp_path / "z.pt")
    with pytest.raises((errors.UnsupportedValue, errors.InvalidFile), match=r'model\["a.b"\]|Storage'):
        convert.import_file(repo, tmp_path / "z.pt")
    torch.save({"a": {"b": torch.ones(3, device="meta")}}, tmp_path / "y.pt")
    with pytest.raises((errors.UnsupportedValue, errors.InvalidFile), match=r'model\["a.b"\]|meta'):
        convert.import_file(repo, tmp_path / "y.pt")
    assert nothing_was_saved(repo)


def test_an_old_torch_reads_no_pt_of_others(repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(errors.UnsupportedFile, match=r"torch 2\.10 or newer"):
        convert.import_file(repo, tmp_path / "x.pt")
    monkeypatch.setattr(torch, "__version__", "3.0.0a0+git123")
    convert.import_file(repo, tmp_path / "x.pt")


def test_torch_itself_runs_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind the check of names."""
    import castore.state.tensors

    monkeypatch.chdir(tmp_path)
    make, _ = PICKLES["runs a command"]
    with pytest.raises(pickle.UnpicklingError):
        castore.state.tensors.read_pt(archive(tmp_path / "x.pt", make()))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_what_was_read_is_independent_of_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    model = {"a": torch.arange(100_000.0)}
    save_file(model, path) if suffix == "safetensors" else torch.save(model, path)
    state, _ = convert.read(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert exact(state) == exact(model)


# -- sharded models and what only looks like a model -------------------------------------------------------------------


def shards(folder: Path, weight_map: dict[str, str]) -> dict[str, torch.Tensor]:
    """A model of tensors in several files, with the index that names the file of each."""
    model = {key: torch.full((3,), float(number)) for number, key in enumerate(weight_map)}
    for name in set(weight_map.values()):
        save_file(
            {key: model[key] for key in model if weight_map[key] == name}, folder / name, {"format": "pt", "by": "a b"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model


TWO = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


@pytest.mark.parametrize("name", ["model.safetensors.index.json", *TWO.values()])
def test_a_shard_or_the_index_stands_for_the_whole_model(repo: Repo, tmp_path: Path, name: str) -> None:
    model = shards(tmp_path, TWO)
    saved = convert.import_file(repo, tmp_path / name)
    assert exact(repo.load(saved.id)["model"]) == exact(model)
    assert saved.manifest.info["safetensors_metadata"] == {"format": "pt", "by": "a b"}


def test_a_shard_that_is_missing_or_without_its_index_is_refused(repo: Repo, tmp_path: Path) -> None:
    shards(tmp_path, TWO)
    (tmp_path / TWO["b"]).unlink()
    with pytest.raises(errors.UnsupportedFile, match=r"model-00002-of-00002\.safetensors: can't be read"):
        convert.import_file(repo, tmp_path / TWO["a"])
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(errors.UnsupportedFile, match=r"one shard of several, and model\.safetensors\.index\.json"):
        convert.import_file(repo, tmp_path / TWO["a"])
    torch.save({"a": torch.ones(1)}, tmp_path / "m-00001-of-00003.pt")
    with pytest.raises(errors.UnsupportedFile, match="one shard of several"):
        convert.import_file(repo, tmp_path / "m-00001-of-00003.pt")
    assert not repo.checkpoints()


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "../secret.safetensors"}, "not a .safetensors file beside it"),
        ({"a": "/etc/passwd"}, "not a .safetensors file beside it"),
        ({"a": "x.pt"}, "not a .safetensors file beside it"),
        ({"a": 3}, "not the index of a sharded model"),
        ({}, "it lists no tensor"),
        ({"z": "model-00001-of-00002.safetensors"}, "its shards don't hold z"),
    ],
)
def test_a_hostile_index_of_shards_is_an_error(repo: Repo, tmp_path: Path, weight_map: Any, says: str) -> None:
    shards(tmp_path, TWO)
    save_file({"a": torch.zeros(1)}, tmp_path.parent / "secret.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(errors.InvalidFile, match=re.escape(says)):
        convert.import_file(repo, index)
    assert not repo.checkpoints()


def test_metadata_of_an_imported_file_is_written_back(repo: Repo, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", {"format": "pt", "license": "mit"})
    saved = convert.import_file(repo, tmp_path / "x.safetensors")
    convert.export(repo, saved.id, tmp_path / "y.safetensors")
    with safe_open(tmp_path / "y.safetensors", framework="pt") as file:
        assert file.metadata().items() >= {("license", "mit"), ("castore_id", saved.id)}
    again = convert.import_file(repo, tmp_path / "y.safetensors")
    assert again.manifest.info["safetensors_metadata"] == {"format": "pt", "license": "mit"}
    assert again.manifest.parent == saved.id


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_pointer_of_git_lfs_is_named(repo: Repo, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(errors.UnsupportedFile, match="a pointer of Git LFS, not the file itself: run `git lfs pull`"):
        convert.import_file(repo, tmp_path / name)


@pytest.mark.parametrize("name", ["model.bin", "model", "model.safetensor", "model.onnx"])
def test_export_refuses_an_extension_that_it_does_not_write(repo: Repo, tmp_path: Path, name: str) -> None:
    repo.save(parts(1), run="r", step=1)
    with pytest.raises(errors.UnsupportedFile, match=r"export writes \.safetensors, \.pt and \.pth"):
        convert.export(repo, "latest", tmp_path / name)
    assert not (tmp_path / name).exists()


# -- a folder for transformers -----------------------------------------------------------------------------------------


def test_a_folder_has_the_weights_in_shards_and_the_configuration(repo: Repo, tmp_path: Path) -> None:
    state = {f"layer.{i}": torch.full((10, 10), float(i)) for i in range(5)}
    config = {"model": {"model_type": "gpt2", "n_layer": 5}}
    saved = repo.save({"model": state}, run="hf", step=3, config=config)
    exported = convert.export_folder(repo, "latest", tmp_path / "out", shard_bytes=900)
    assert (exported.id, exported.tensors) == (saved.id, 5)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 400
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for key, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[key], state[key])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config["model"]
    with pytest.raises(errors.RefusedPath, match="give a new folder"):
        convert.export_folder(repo, "latest", tmp_path / "out")


def test_an_exported_folder_is_imported_with_what_its_files_say(repo: Repo, tmp_path: Path) -> None:
    model = shards(tmp_path, TWO)
    first = convert.import_file(repo, tmp_path / TWO["a"])
    config = {"model": {"model_type": "gpt2"}}
    saved = repo.save({"model": model}, run="hf", step=3, config=config, info=dict(first.manifest.info))
    convert.export_folder(repo, saved.id, tmp_path / "out", shard_bytes=12)
    again = convert.import_file(repo, tmp_path / "out" / "model.safetensors.index.json")
    assert exact(repo.load(again.id)["model"]) == exact(model)
    assert again.manifest.info["safetensors_metadata"] == {"format": "pt", "by": "a b"}
    assert again.manifest.parent == saved.id


def test_a_checkpoint_without_a_configuration_of_transformers_says_what_to_do(repo: Repo, tmp_path: Path) -> None:
    repo.save({"model": {"w": torch.ones(1)}}, run="plain", step=1)
    with pytest.raises(errors.UsageError, match=r"export to a \.safetensors file instead"):
        convert.export_folder(repo, "latest", tmp_path / "out")
    assert not (tmp_path / "out").exists()
