"""Checkpoints <-> files that other programs read: safetensors, and ``.pt`` as torch.save writes it.

A file that is imported is hostile. Its claims are held against its size before anything is allocated or hashed, and a
``.pt`` may name nothing but what plain tensors are made of before torch's own weights-only reader sees it.
"""

from __future__ import annotations

import errno
import io
import os
import pickletools
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from castore.errors import InvalidFile, NotFound, RefusedPath, StorageError, UnsupportedFile, UnsupportedValue
from castore.format.ids import is_object_id
from castore.format.manifest import Experiment
from castore.format.part_index import MAX_DEPTH
from castore.repo import Repo, SaveResult
from castore.storage import fs, safe_paths

if TYPE_CHECKING:
    import torch

PT = (".pt", ".pth")
_SAFETENSORS = ".safetensors"
_INSTEAD = "export to a .pt instead"
_MAX_HEADER = 90_000_000  # safetensors refuses headers of more than 100 MB

# Of what is imported. A real file's tensors take as much as the file, a little less or, when views overlap, more.
_MAX_GROWTH = 8
_MAX_VALUES = 1_000_000
_MAX_NAME = 1000
_MAX_PICKLE = 32 << 20


# -- export ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file that is complete and durable. ``tensors`` counts names: a tied tensor has several."""

    id: str
    part: str
    path: Path
    tensors: int
    bytes: int


def export(repo: Repo, wanted: str, out: Path, *, part: str = "model", force: bool = False) -> Exported:
    """Write one part of a checkpoint to a file: safetensors, or what torch.save writes when its name ends in .pt, .pth.

    In safetensors nested states become names with dots, and a tied tensor is written for each of its names. The file
    appears complete or not at all. RefusedPath when it exists (unless ``force``), or is no place to write to;
    UnsupportedValue naming the key that safetensors can't hold; what :meth:`castore.Repo.load` raises.
    """
    safe_paths.check_target(out)
    _check_free(out, force)
    entry = repo.find(wanted, kind="checkpoint")
    state = repo.load(entry.id, [part])[part]
    metadata = {
        "format": "pt",
        "castore_id": entry.id,
        "castore_run": entry.manifest.run,
        "castore_step": str(entry.manifest.step),
        "castore_part": part,
    }
    as_pt = out.suffix.lower() in PT
    named = {} if as_pt else _named_tensors(state)
    descriptor, temp = fs.create_temporary(out.parent)
    try:
        fs.close(descriptor, temp)
        _write_pt(temp, state) if as_pt else _write_safetensors(temp, named, metadata)
        size = _settle(temp, repo.config.store.fsync)
        _place(temp, out, force)
    finally:
        fs.unlink(temp)
    if repo.config.store.fsync:
        fs.sync_directory(out.parent)
    tensors = sum(_is_tensor(value) for _, value in _named(state)) if as_pt else len(named)
    return Exported(id=entry.id, part=part, path=out, tensors=tensors, bytes=size)


def _check_free(out: Path, force: bool) -> None:
    found = safe_paths.status(out)
    if safe_paths.is_folder(found) or not out.name:
        raise RefusedPath(str(out), "it is a folder")
    if found is not None and not safe_paths.is_replaceable(found):
        raise RefusedPath(str(out), "it is no regular file")
    if found is not None and not force:
        raise RefusedPath(str(out), "it exists: --force replaces it")
    if not safe_paths.is_folder(safe_paths.status(Path(os.path.realpath(out.parent)))):
        raise RefusedPath(str(out), "the folder isn't there")


def _named(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a state with its name, nested keys joined by dots. An empty container is a leaf."""
    prefix = f"{key}." if key else ""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _named(item, f"{prefix}{name}")
    elif isinstance(value, list | tuple) and value:
        for i, item in enumerate(value):
            yield from _named(item, f"{prefix}{i}")
    else:
        yield key, value


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "data_ptr")


def _named_tensors(state: Any) -> dict[str, torch.Tensor]:
    """What safetensors can hold, by name. UnsupportedValue, naming the first thing that it can't."""
    from safetensors import SafetensorError

    found: dict[str, torch.Tensor] = {}
    length = 0
    for name, value in _named(state):
        length += len(name)
        if length > _MAX_HEADER:
            raise UnsupportedValue(name[:200], f"safetensors has no room for such long names: {_INSTEAD}")
        if not _is_tensor(value):
            what = "an empty container" if isinstance(value, dict | list | tuple) else f"a {type(value).__name__}"
            raise UnsupportedValue(name or "this part", f"safetensors holds tensors, not {what}: {_INSTEAD}")
        if name in found:
            raise UnsupportedValue(name, f"two tensors have this name once nested keys are joined: {_INSTEAD}")
        if name == "__metadata__":
            raise UnsupportedValue(name, f"safetensors keeps this name for itself: {_INSTEAD}")
        try:
            _spec(value)
        except SafetensorError:
            dtype = str(value.dtype).removeprefix("torch.")
            raise UnsupportedValue(name, f"safetensors knows no {dtype}: {_INSTEAD}") from None
        found[name] = value
    return found


def _spec(tensor: torch.Tensor) -> Any:
    """The tensor's bytes where they lie: the tensor must outlive it."""
    from safetensors import TensorSpec

    return TensorSpec(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=list(tensor.shape),
        data_ptr=tensor.data_ptr(),
        data_len=tensor.nbytes,
    )


def _write_safetensors(path: Path, named: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    from safetensors import SafetensorError, serialize_file

    try:
        serialize_file({name: _spec(tensor) for name, tensor in named.items()}, path, dict(metadata))
    except (SafetensorError, OSError) as error:
        raise StorageError("write", str(path), OSError(errno.EIO, str(error))) from error


def _write_pt(path: Path, state: Any) -> None:
    import castore.state.tensors

    try:
        castore.state.tensors.write_pt(state, path)
    except (RuntimeError, OSError) as error:
        raise StorageError("write", str(path), OSError(errno.EIO, str(error).splitlines()[0])) from error


def _settle(path: Path, durable: bool) -> int:
    """Make what a library wrote durable; returns its size."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError("open", str(path), error) from error
    try:
        # safetensors makes its file readable to its owner alone
        mask = os.umask(0)
        os.umask(mask)
        fs.set_mode(path, 0o666 & ~mask, descriptor)
        if durable:
            fs.sync(descriptor, path)
        return os.fstat(descriptor).st_size
    finally:
        fs.close(descriptor, path)


def _place(temp: Path, out: Path, force: bool) -> None:
    if force:
        fs.rename(temp, out)
    elif not fs.link(temp, out):
        raise RefusedPath(str(out), "it was made meanwhile: --force replaces it")


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

    ``like`` names a checkpoint whose line and configuration the new one takes, and run and step unless given: the
    caller vouches that they fit. Otherwise the run is ``imported`` and the step 0. UnsupportedFile for what is no such
    file; InvalidFile for one that is damaged or hostile; UnsupportedValue naming the key of what can't be stored. Then
    nothing was saved.
    """
    model = repo.find(like, kind="checkpoint") if like else None
    pattern = model.manifest if model else None
    state, exported_from = read(path)
    info: dict[str, Any] = {"imported_from": path.name.encode(errors="replace").decode()[:200]}
    if model:
        info["like"] = model.id
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


def read(path: Path) -> tuple[Any, str]:
    """(the state in a file, the id of the checkpoint that it says it was exported from, or nothing).

    UnsupportedFile, InvalidFile. No code in it is run, and it costs no memory beyond a few times its size.
    """
    size = _check_readable(path)
    suffix = path.suffix.lower()
    if suffix == _SAFETENSORS:
        state, metadata = _read_safetensors(path)
        claimed = metadata.get("castore_id")
        return state, claimed if claimed and is_object_id(claimed) else ""
    if suffix in PT:
        _check_pt(path, size)
        state = _read_pt(path)
        _check_claims(path, state, size)
        return state, ""
    raise UnsupportedFile(str(path), f"neither {_SAFETENSORS} nor {' nor '.join(PT)}")


def _is_here(repo: Repo, own: str) -> bool:
    try:
        return repo.find(own).manifest.kind == "checkpoint"
    except NotFound:
        return False


def _check_readable(path: Path) -> int:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise UnsupportedFile(str(path), "no regular file")
        with open(path, "rb"):
            return found.st_size
    except OSError as error:
        raise UnsupportedFile(str(path), f"can't be read: {error.strerror}") from error


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
        raise InvalidFile(str(path), f"no valid safetensors file ({_first_line(error)})") from error


def _read_pt(path: Path) -> Any:
    import castore.state.tensors

    if not castore.state.tensors.can_read_pt():
        raise UnsupportedFile(str(path), "reading the .pt of others safely takes torch 2.10 or newer: upgrade it")
    try:
        return castore.state.tensors.read_pt(path)
    except Exception as error:  # whatever a parser makes of hostile bytes
        raise InvalidFile(str(path), f"torch can't read it as weights alone ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# What plain tensors in plain containers are pickled with. torch allows more, such as a bytearray of any size.
_ALLOWED = {
    "collections OrderedDict",
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
    """InvalidFile unless it is an uncompressed zip with one small pickle, which names nothing but parts of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1 for one in members):
                raise InvalidFile(str(path), "it is compressed or encrypted, as torch.save never does")
            if sum(one.file_size for one in members) > size:
                raise InvalidFile(str(path), "it claims more bytes than it has")
            pickles = [one for one in members if one.filename.endswith((".pkl", ".pickle"))]
            if len(pickles) != 1 or pickles[0].filename.rpartition("/")[2] != "data.pkl":
                raise InvalidFile(str(path), "it holds no state alone: it isn't what torch.save writes of one")
            if pickles[0].file_size > _MAX_PICKLE:
                raise InvalidFile(str(path), f"its values other than tensors take {pickles[0].file_size} bytes")
            data = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, UnicodeError) as error:
        raise InvalidFile(str(path), f"not the zip that torch.save writes ({_first_line(error)})") from error
    _check_pickle(path, data)


def _check_pickle(path: Path, data: bytes) -> None:
    """Reads what the pickle names without doing what it says."""
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "GLOBAL" and not _is_allowed(str(argument)):
                raise InvalidFile(
                    str(path), f"it asks for {str(argument)[:100].replace(' ', '.')}, no part of a tensor"
                )
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                raise InvalidFile(str(path), f"its pickle has a {opcode.name}, as torch.save never writes")
    except (ValueError, UnicodeError, IndexError, OverflowError) as error:
        raise InvalidFile(str(path), f"its pickle is damaged ({_first_line(error)})") from error


def _check_claims(path: Path, state: Any, size: int) -> None:
    """InvalidFile when little data stands for much: lists in lists in lists, a few bytes seen as a huge tensor."""
    claimed = count = 0
    views: set[tuple[Any, ...]] = set()
    waiting: list[tuple[Any, int]] = [(state, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if isinstance(value, dict):
            if any(isinstance(name, str) and len(name) > _MAX_NAME for name in value):
                raise InvalidFile(str(path), f"it has a name of more than {_MAX_NAME} characters")
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list | tuple):
            waiting += [(item, depth + 1) for item in value]
        elif _is_tensor(value) and not value.is_sparse and not value.is_quantized:
            view = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            claimed += 0 if view in views else value.nbytes
            views.add(view)
        if count + len(waiting) > _MAX_VALUES or depth > MAX_DEPTH:
            raise InvalidFile(str(path), f"more than {_MAX_VALUES} values, or more than {MAX_DEPTH} in one another")
        if claimed > _MAX_GROWTH * size:
            raise InvalidFile(str(path), f"its tensors claim more than {_MAX_GROWTH} times the bytes that it has")
