"""Checkpoints <-> files that other programs read: safetensors, and ``.pt`` as torch.save writes it.

An imported file is treated as hostile. Its claims are checked against its size before anything is allocated or hashed,
and a ``.pt`` may name only what plain tensors are made of before torch's own weights-only reader sees it.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from castore.errors import (
    InvalidFile,
    NotFound,
    RefusedPath,
    StorageError,
    UnsupportedFile,
    UnsupportedValue,
    UsageError,
)
from castore.format.ids import is_object_id
from castore.format.manifest import Entry, Experiment
from castore.format.part_index import MAX_DEPTH
from castore.repo import Repo, SaveResult
from castore.storage import fs, output_file, safe_paths

if TYPE_CHECKING:
    import torch

PT = (".pt", ".pth")
_SAFETENSORS = ".safetensors"
_INSTEAD = "export to a .pt instead"
_MAX_HEADER = 90_000_000  # safetensors refuses headers of more than 100 MB

# Limits for imported files. Real tensors take as much as their file, a little less or, when views overlap, more.
_MAX_GROWTH = 8
_MAX_VALUES = 1_000_000
_MAX_NAME = 1000
_MAX_PICKLE = 32 << 20
_MAX_KEPT_METADATA = 64 << 10  # characters, so that a manifest stays small
_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.(?:safetensors|pt|pth)")
_LFS = b"version https://git-lfs.github.com/spec/"


# -- export ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file that was written completely. ``tensors`` counts names, of which a tied tensor has several."""

    id: str
    part: str
    path: Path
    tensors: int
    bytes: int


def export(repo: Repo, selector: str, out: Path, *, part: str = "model", force: bool = False) -> Exported:
    """Write one part of a checkpoint to a file: as torch.save does if its name ends in .pt or .pth, or .safetensors.

    In safetensors nested states become names with dots, and a tied tensor is written once for each of its names. The
    file appears complete or not at all, and replaces another only with ``force``. Raise RefusedPath if ``out`` may not
    be written to, UnsupportedFile for another extension,
    UnsupportedValue naming the key that safetensors can't hold, and what :meth:`castore.Repo.load` does.
    """
    output_file.check_target(out, replace=force)  # before anything is read
    if out.suffix.lower() not in (_SAFETENSORS, *PT):
        raise UnsupportedFile(str(out), f"export writes {_SAFETENSORS}, .pt and .pth: use one of these names")
    entry = repo.find(selector, kind="checkpoint")
    state = repo.load(entry.id, [part])[part]
    if out.suffix.lower() in PT:
        count = sum(_is_tensor(value) for _, value in _named_leaves(state))
        fill = functools.partial(_write_pt, state=state)
    else:
        tensors = _named_tensors(state)
        count = len(tensors)
        fill = functools.partial(_write_safetensors, tensors=tensors, metadata=_metadata(entry, part))
    size = output_file.write_with(fill, out, replace=force, durable=repo.config.store.fsync)
    return Exported(id=entry.id, part=part, path=out, tensors=count, bytes=size)


FILES = "files"
"""The part that holds what from_pretrained reads beside the weights: a dict from paths to tensors of bytes."""

_FILES = (".json", ".txt", ".jinja", ".model", ".tiktoken")
_FOLDER_SHARD = 5_000_000_000  # bytes of tensors in one file, as transformers has it


def export_folder(
    repo: Repo, selector: str, folder: Path, *, part: str = "model", shard_bytes: int = _FOLDER_SHARD
) -> Exported:
    """Write a model as a new folder that ``from_pretrained`` of Hugging Face's transformers loads.

    Weights go into safetensors of at most ``shard_bytes``, with an index if there are several, and what CastoreCallback
    recorded beside them into the files that it is of: config.json, and those of a tokenizer. RefusedPath if the folder
    exists and isn't empty; UsageError for a checkpoint without such a configuration; else as :func:`export`. The folder
    is complete, or without config.json.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RefusedPath(str(folder), "it exists: give a new folder")
    entry = repo.find(selector, kind="checkpoint")
    config = entry.manifest.config.get("model")
    if not isinstance(config, dict) or "model_type" not in config:
        raise UsageError(
            f"checkpoint {entry.id[:12]} has no configuration of transformers, as CastoreCallback records it: "
            "export to a .safetensors file instead"
        )
    tensors = _named_tensors(repo.load(entry.id, [part])[part])
    files = _files(repo.load(entry.id, [FILES])[FILES]) if FILES in entry.manifest.parts else {}
    fs.make_directory(folder)
    for name, data in files.items():
        fs.make_directory((folder / name).parent)
        output_file.write(folder / name, data, durable=repo.config.store.fsync)
    shards = _shards(tensors, shard_bytes)
    written = 0
    for name, held in shards.items():
        fill = functools.partial(_write_safetensors, tensors=held, metadata=_metadata(entry, part))
        written += output_file.write_with(fill, folder / name, durable=repo.config.store.fsync)
    if len(shards) > 1:
        weight_map = {tensor: name for name, held in shards.items() for tensor in held}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(
            repo, folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    _write_json(repo, folder / "config.json", config)  # last: without it the folder is no model
    return Exported(id=entry.id, part=part, path=folder, tensors=len(tensors), bytes=written)


def is_beside_weights(path: str) -> bool:
    """Whether a file is plain data of a model, such as a tokenizer's: no code, and nothing that names other weights."""
    name = path.rpartition("/")[2]
    names_weights = name in ("config.json", "adapter_config.json") or name.endswith(".index.json")
    return not safe_paths.why_not_member(path) and name.endswith(_FILES) and not names_weights


def _files(state: Any) -> dict[str, bytes]:
    """Return what is in the part ``files``. InvalidFile for what could be taken for more than data of a model."""
    files = {}
    for name, held in state.items() if isinstance(state, dict) else ():
        if not isinstance(name, str) or not is_beside_weights(name):
            raise InvalidFile(str(name)[:200], f"a checkpoint must not bring it in its part {FILES}")
        if not _is_tensor(held) or held.dim() != 1 or held.element_size() != 1:
            raise InvalidFile(name[:200], f"in the part {FILES} it is not the bytes of a file")
        files[name] = held.numpy().tobytes()
    return files


def _shards(tensors: Mapping[str, torch.Tensor], limit: int) -> dict[str, dict[str, torch.Tensor]]:
    """Share tensors out to files, in order, by the names that transformers gives them."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": held for i, held in enumerate(shards, 1)}


def _write_json(repo: Repo, path: Path, value: Any) -> None:
    data = msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    output_file.write(path, data, durable=repo.config.store.fsync)


def _metadata(entry: Entry, part: str) -> dict[str, str]:
    """What a safetensors file says of itself: what an imported one said, and which checkpoint this is."""
    kept = entry.manifest.info.get("safetensors_metadata")
    kept = kept if isinstance(kept, dict) and all(isinstance(value, str) for value in kept.values()) else {}
    return {
        **kept,
        "format": "pt",
        "castore_id": entry.id,
        "castore_run": entry.manifest.run,
        "castore_step": str(entry.manifest.step),
        "castore_part": part,
    }


def _named_leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, leaf) for every leaf of a state, nested keys joined by dots. An empty container is a leaf."""
    prefix = f"{key}." if key else ""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _named_leaves(item, f"{prefix}{name}")
    elif isinstance(value, list | tuple) and value:
        for i, item in enumerate(value):
            yield from _named_leaves(item, f"{prefix}{i}")
    else:
        yield key, value


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "data_ptr") and hasattr(value, "layout")  # a storage has no layout


def _named_tensors(state: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a state by name. Raise UnsupportedValue naming the first thing safetensors can't hold."""
    from safetensors import SafetensorError

    tensors: dict[str, torch.Tensor] = {}
    length = 0
    for name, value in _named_leaves(state):
        length += len(name)
        if length > _MAX_HEADER:
            raise UnsupportedValue(name[:200], f"safetensors has no room for such long names: {_INSTEAD}")
        if not _is_tensor(value):
            what = "an empty container" if isinstance(value, dict | list | tuple) else f"a {type(value).__name__}"
            raise UnsupportedValue(name or "this part", f"safetensors holds tensors, not {what}: {_INSTEAD}")
        if name in tensors:
            raise UnsupportedValue(name, f"two tensors have this name once nested keys are joined: {_INSTEAD}")
        if name == "__metadata__":
            raise UnsupportedValue(name, f"safetensors keeps this name for itself: {_INSTEAD}")
        try:
            _spec(value)
        except SafetensorError:
            dtype = str(value.dtype).removeprefix("torch.")
            raise UnsupportedValue(name, f"safetensors knows no {dtype}: {_INSTEAD}") from None
        tensors[name] = value
    return tensors


def _spec(tensor: torch.Tensor) -> Any:
    """Describe a tensor to safetensors by the address of its bytes: the tensor must outlive the description."""
    from safetensors import TensorSpec

    return TensorSpec(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=list(tensor.shape),
        data_ptr=tensor.data_ptr(),
        data_len=tensor.nbytes,
    )


def _write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    from safetensors import SafetensorError, serialize_file

    try:
        serialize_file({name: _spec(tensor) for name, tensor in tensors.items()}, path, dict(metadata))
    except (SafetensorError, OSError) as error:
        raise StorageError("write", str(path), OSError(errno.EIO, str(error))) from error


def _write_pt(path: Path, state: Any) -> None:
    import castore.state.tensors

    try:
        castore.state.tensors.write_pt(state, path)
    except (RuntimeError, OSError) as error:
        raise StorageError("write", str(path), OSError(errno.EIO, str(error).splitlines()[0])) from error


# -- import ----------------------------------------------------------------------------------------------------------


def import_file(
    repo: Repo,
    path: Path,
    *,
    run: str | None = None,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    like: str | None = None,
    tags: Sequence[str] = (),
    note: str = "",
    created: datetime | None = None,
) -> SaveResult:
    """Store the tensors of a file as part ``model`` of a new checkpoint.

    ``like`` selects a checkpoint whose experiment and configuration the new one takes, and run and step unless given:
    the caller vouches that they fit. Otherwise the run is ``imported`` and the step 0. Raise UnsupportedFile for any
    other kind of file, InvalidFile for one that is damaged or hostile, UnsupportedValue naming the key of what can't
    be stored. Then nothing was saved.
    """
    similar = repo.find(like, kind="checkpoint") if like else None
    pattern = similar.manifest if similar else None
    state, metadata = read(path)
    claimed = metadata.pop("castore_id", "")
    exported_from = claimed if is_object_id(claimed) else ""
    info: dict[str, Any] = {"imported_from": path.name.encode(errors="replace").decode()[:200]}
    kept = {name: value for name, value in metadata.items() if not name.startswith("castore_")}
    if kept and sum(len(name) + len(value) for name, value in kept.items()) <= _MAX_KEPT_METADATA:
        info["safetensors_metadata"] = kept
    if similar:
        info["like"] = similar.id
    if exported_from:
        info["exported_from"] = exported_from
    return repo.save(
        {"model": state},
        run=run or (pattern.run if pattern else "imported"),
        step=step if step is not None else pattern.step if pattern else 0,
        metrics=metrics,
        experiment=pattern.experiment if pattern else Experiment(),
        parent=exported_from if exported_from and _is_here(repo, exported_from) else None,
        tags=tags,
        note=note,
        config=pattern.config if pattern else None,
        info=info,
        created=created,
    )


def read(path: Path) -> tuple[Any, dict[str, str]]:
    """Return (the state in a file, what it says of itself in the metadata of a safetensors file).

    The index of a sharded model, or any of its shards beside that index, stands for the whole model. Raise
    UnsupportedFile or InvalidFile. No code in the file is run, and reading takes at most a few times its size in
    memory.
    """
    size = _check_readable(path)
    suffix = path.suffix.lower()
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    if shard := _SHARD.fullmatch(path.name):
        index = path.with_name(shard[1] + _INDEX)
        if suffix == _SAFETENSORS and index.is_file():
            return _read_shards(index)
        raise UnsupportedFile(str(path), f"one shard of several, and {index.name} is not beside it: put it there")
    if suffix == _SAFETENSORS:
        return _read_safetensors(path)
    if suffix in PT:
        _check_pt(path, size)
        state = _read_pt(path)
        _check_claims(path, state, size)
        return state, {}
    raise UnsupportedFile(str(path), f"neither {_SAFETENSORS} nor {' nor '.join(PT)}")


def _is_here(repo: Repo, checkpoint_id: str) -> bool:
    try:
        return repo.find(checkpoint_id).manifest.kind == "checkpoint"
    except NotFound:
        return False


def _check_readable(path: Path) -> int:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedFile(str(path), "not a regular file")
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise UnsupportedFile(str(path), "a pointer of Git LFS, not the file itself: run `git lfs pull` first")
            return status.st_size
    except OSError as error:
        raise UnsupportedFile(str(path), f"can't be read: {error.strerror}") from error


def _read_shards(index: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return (every tensor that the index of a sharded model lists, the metadata of its shards)."""
    state: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    weight_map = _read_weight_map(index)
    for name in sorted(set(weight_map.values())):
        shard = index.with_name(name)
        _check_readable(shard)
        tensors, said = _read_safetensors(shard)
        metadata |= said
        state |= {key: tensor for key, tensor in tensors.items() if weight_map.get(key) == name}
    if missing := weight_map.keys() - state.keys():
        raise InvalidFile(str(index), f"its shards don't hold {min(missing)[:200]}")
    return state, metadata


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return which file beside the index holds each tensor. A shard's name that leads elsewhere is refused."""
    try:
        weight_map = msgspec.json.decode(fs.read(index, _MAX_HEADER), type=_ShardIndex).weight_map
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidFile(str(index), f"not the index of a sharded model ({_first_line(error)})") from error
    for name in weight_map.values():
        if safe_paths.why_not_member(name) or "/" in name or not name.endswith(_SAFETENSORS):
            raise InvalidFile(str(index), f"it lists {name[:200]!r}, which is not a {_SAFETENSORS} file beside it")
    if not weight_map:
        raise InvalidFile(str(index), "it lists no tensor")
    return weight_map


class _ShardIndex(msgspec.Struct):
    weight_map: dict[str, str]


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import safe_open

    import castore.state.tensors

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            # copies: the file is mapped into memory, and one that changed while it is saved would store wrong bytes
            return {
                name: castore.state.tensors.copy_tensor(file.get_tensor(name)) for name in names
            }, file.metadata() or {}
    except Exception as error:  # whatever a parser makes of hostile bytes
        raise InvalidFile(str(path), f"not a valid safetensors file ({_first_line(error)})") from error


def _read_pt(path: Path) -> Any:
    import castore.state.tensors

    if not castore.state.tensors.can_read_pt():
        raise UnsupportedFile(str(path), "reading a .pt safely takes torch 2.10 or newer: upgrade it")
    try:
        return castore.state.tensors.read_pt(path)
    except Exception as error:  # whatever a parser makes of hostile bytes
        raise InvalidFile(str(path), f"torch can't read it as weights only ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# What plain tensors in plain containers are pickled with. torch allows more, such as a bytearray of any size.
_ALLOWED = {
    "collections OrderedDict",
    "collections Counter",  # as MultiStepLR has one
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    "torch.storage TypedStorage",
    "torch Size",
    "torch device",
    "builtins complex",
    "_codecs encode",  # bytes
}


def _is_allowed(name: str) -> bool:
    module, _, attribute = name.partition(" ")
    plain = module == "torch" and attribute.isidentifier() and (attribute[0].islower() or attribute.endswith("Storage"))
    return name in _ALLOWED or plain


def _check_pt(path: Path, size: int) -> None:
    """Raise InvalidFile unless it is an uncompressed zip with one small pickle that names only parts of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
                raise InvalidFile(str(path), "it is compressed or encrypted, which torch.save never does")
            # compress_size is how much zipfile reads, whatever file_size says
            if sum(max(member.compress_size, member.file_size) for member in members) > size:
                raise InvalidFile(str(path), "it claims more bytes than it has")
            pickles = [member for member in members if member.filename.endswith((".pkl", ".pickle"))]
            if len(pickles) != 1 or pickles[0].filename.rpartition("/")[2] != "data.pkl":
                raise InvalidFile(str(path), "it does not hold one state alone, as torch.save writes it")
            if pickles[0].file_size > _MAX_PICKLE:
                raise InvalidFile(str(path), f"its values other than tensors take {pickles[0].file_size} bytes")
            data = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, UnicodeError) as error:
        raise InvalidFile(str(path), f"not the zip that torch.save writes ({_first_line(error)})") from error
    _check_pickle(path, data)


def _check_pickle(path: Path, data: bytes) -> None:
    """Raise InvalidFile if the pickle names anything but parts of tensors. It is read without being executed."""
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "GLOBAL" and not _is_allowed(str(argument)):
                raise InvalidFile(
                    str(path), f"it asks for {str(argument)[:100].replace(' ', '.')}, which is not part of a tensor"
                )
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                raise InvalidFile(str(path), f"its pickle has a {opcode.name}, which torch.save never writes")
    except (ValueError, UnicodeError, IndexError, OverflowError) as error:
        raise InvalidFile(str(path), f"its pickle is damaged ({_first_line(error)})") from error


def _check_claims(path: Path, state: Any, size: int) -> None:
    """Raise InvalidFile if little data stands for much: lists in lists in lists, a few bytes seen as a huge tensor."""
    claimed = count = 0
    views: set[tuple[Any, ...]] = set()
    pending: list[tuple[Any, int]] = [(state, 0)]
    while pending:
        value, depth = pending.pop()
        count += 1
        if isinstance(value, dict):
            if any(isinstance(name, str) and len(name) > _MAX_NAME for name in value):
                raise InvalidFile(str(path), f"it has a name of more than {_MAX_NAME} characters")
            pending += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list | tuple):
            pending += [(item, depth + 1) for item in value]
        elif _is_tensor(value) and not value.is_sparse and not value.is_quantized:
            view = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            claimed += 0 if view in views else value.nbytes
            views.add(view)
        if count + len(pending) > _MAX_VALUES or depth > MAX_DEPTH:
            raise InvalidFile(str(path), f"more than {_MAX_VALUES} values, or more than {MAX_DEPTH} nested")
        if claimed > _MAX_GROWTH * size:
            raise InvalidFile(str(path), f"its tensors claim more than {_MAX_GROWTH} times the bytes that it has")
