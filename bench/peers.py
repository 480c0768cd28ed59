"""What a user would pick instead of castore: how each saves, loads and stores, for bench/suite.py.

A *format* saves a state in this process; a *tool* is a program that stores files. All get two threads where they can
use them, and a durable save of each waits for its files and its folder to be on the disk.
"""

# ruff: noqa: ARG002 (formats are called alike, and not every one needs everything)

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import states
import torch
import torch.distributed.checkpoint as dcp
from states import State
from torch import Tensor

import castore

THREADS = 2

warnings.filterwarnings("ignore", category=UserWarning, module="torch")  # that no process group is there


def sync(paths: Iterable[Path]) -> None:
    """Wait until files or folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- formats ---------------------------------------------------------------------------------------------------------


class Format:
    """Saves a state into a folder that is there and empty, and loads it in memory of its own."""

    name = ""

    def prepare(self, folder: Path, durable: bool) -> None:
        """What isn't part of a save."""

    def save(self, state: State, folder: Path, durable: bool) -> None:
        raise NotImplementedError

    def load(self, folder: Path, like: State) -> State:
        """All of it; ``like`` has the shapes, for those who must be told."""
        raise NotImplementedError

    def load_part(self, folder: Path, part: str, like: State) -> State:
        """One part, with as little reading as there's a way to."""
        raise NotImplementedError

    def load_one(self, folder: Path, part: str, key: str, like: State) -> Tensor:
        """One tensor, likewise."""
        raise NotImplementedError

    def load_into(self, folder: Path, state: State) -> None:
        """All of it into the tensors of ``state``."""
        for to, source in zip(states.tensors(state), states.tensors(self.load(folder, state)), strict=True):
            to.copy_(source)


class Castore(Format):
    name = "castore"

    def prepare(self, folder: Path, durable: bool) -> None:
        repository(folder, durable)

    def save(self, state: State, folder: Path, durable: bool) -> None:
        castore.Repo.open(folder).save(state, run="bench", step=1)

    def load(self, folder: Path, like: State) -> State:
        return castore.Repo.open(folder).load("latest")

    def load_part(self, folder: Path, part: str, like: State) -> State:
        return castore.Repo.open(folder).load("latest", parts=[part])

    def load_one(self, folder: Path, part: str, key: str, like: State) -> Tensor:
        return castore.Repo.open(folder).load_tensors("latest", [key], parts=[part])[part][key]

    def load_into(self, folder: Path, state: State) -> None:
        castore.Repo.open(folder).load_into("latest", state)

    def explain_missing(self, option: str) -> str:
        """Why ``load`` can't be measured with an option; empty when it can."""
        if option in inspect.signature(castore.Repo.load).parameters:
            return ""
        return f"Repo.load of this castore takes no {option!r}"


def repository(folder: Path, durable: bool, retention: str = "") -> castore.Repo:
    """A fresh repository with two threads and otherwise default settings."""
    repo = castore.Repo.init(folder)
    text = f"[store]\nthreads = {THREADS}\nfsync = {str(durable).lower()}\n{retention}"
    (repo.root / "config.toml").write_text(text)
    return castore.Repo.open(folder)


class TorchSave(Format):
    name = "torch.save"

    def save(self, state: State, folder: Path, durable: bool) -> None:
        torch.save(state, folder / "state.pt")
        if durable:
            sync([folder / "state.pt", folder])

    def load(self, folder: Path, like: State) -> State:
        return torch.load(folder / "state.pt", weights_only=True)

    def load_part(self, folder: Path, part: str, like: State) -> State:
        return {part: self.load(folder, like)[part]}

    def load_one(self, folder: Path, part: str, key: str, like: State) -> Tensor:
        return self.load(folder, like)[part][key]


class TorchMapped(TorchSave):
    name = "torch.load, mmap + copy"

    def load(self, folder: Path, like: State) -> State:
        return states.copy(self._mapped(folder))

    def load_part(self, folder: Path, part: str, like: State) -> State:
        return {part: states.copy(self._mapped(folder)[part])}

    def load_one(self, folder: Path, part: str, key: str, like: State) -> Tensor:
        return self._mapped(folder)[part][key].clone()

    def load_into(self, folder: Path, state: State) -> None:
        for to, source in zip(states.tensors(state), states.tensors(self._mapped(folder)), strict=True):
            to.copy_(source)

    def _mapped(self, folder: Path) -> State:
        return torch.load(folder / "state.pt", weights_only=True, mmap=True)


class Safetensors(Format):
    """One file of flat keys; load_file only maps it, so a copy follows."""

    name = "safetensors"

    def save(self, state: State, folder: Path, durable: bool) -> None:
        flat = {f"{part}/{key}": tensor for part, one in state.items() for key, tensor in one.items()}
        safetensors.torch.save_file(flat, folder / "state.safetensors")
        if durable:
            sync([folder / "state.safetensors", folder])

    def load(self, folder: Path, like: State) -> State:
        found: State = {part: {} for part in like}
        for name, tensor in safetensors.torch.load_file(folder / "state.safetensors").items():
            part, _, key = name.partition("/")
            found[part][key] = tensor.clone()
        return {part: {key: found[part][key] for key in one} for part, one in like.items()}

    def load_part(self, folder: Path, part: str, like: State) -> State:
        with safetensors.safe_open(folder / "state.safetensors", "pt") as file:
            return {part: {key: file.get_tensor(f"{part}/{key}").clone() for key in like[part]}}

    def load_one(self, folder: Path, part: str, key: str, like: State) -> Tensor:
        with safetensors.safe_open(folder / "state.safetensors", "pt") as file:
            return file.get_tensor(f"{part}/{key}").clone()


class Distributed(Format):
    """torch.distributed.checkpoint; it loads into tensors only, and making them counts as loading."""

    name = "DCP"

    def save(self, state: State, folder: Path, durable: bool) -> None:
        dcp.save(state, storage_writer=self.writer(folder, durable), no_dist=True)
        if durable:
            sync([folder])

    def writer(self, folder: Path, durable: bool) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(folder, thread_count=THREADS, sync_files=durable)

    def load(self, folder: Path, like: State) -> State:
        made = states.empty_like(like)
        self.load_into(folder, made)
        return made

    def load_part(self, folder: Path, part: str, like: State) -> State:
        return self.load(folder, {part: like[part]})

    def load_one(self, folder: Path, part: str, key: str, like: State) -> Tensor:
        return self.load(folder, {part: {key: like[part][key]}})[part][key]

    def load_into(self, folder: Path, state: State) -> None:
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)


CASTORE, TORCH, MAPPED, SAFETENSORS, DCP = Castore(), TorchSave(), TorchMapped(), Safetensors(), Distributed()
FORMATS: dict[str, Format] = {one.name: one for one in (CASTORE, TORCH, MAPPED, SAFETENSORS, DCP)}


# -- tools -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that stores files. Its commands run in a folder of their own; ``{file}`` is the file's path, ``{name}``
    its name. With ``inside`` the file has to lie in that folder. ``kept`` is where what it stores ends up."""

    name: str
    program: str
    install: str
    start: tuple[str, ...]
    add: str
    kept: str
    inside: bool = False

    @property
    def path(self) -> str | None:
        return shutil.which(self.program)

    def begin(self, folder: Path) -> None:
        for command in self.start:
            _run(command.split(), folder)

    def store(self, folder: Path, file: Path) -> None:
        _run([word.format(file=file, name=file.name) for word in self.add.split()], folder)

    def stored(self, folder: Path) -> int:
        return size(folder / self.kept)


CASTORE_ADD = Tool(
    "castore add", "castore", "make .venv/.ready", ("castore init",), "castore add {file}", ".castore/objects"
)
TOOLS = (
    Tool(
        "restic", "restic", "apt-get install restic",
        ("restic init --quiet --repository-version latest --repo kept",),
        "restic backup --quiet --repo kept {file}", "kept",
    ),
    Tool(
        "borg, zstd,1", "borg", "apt-get install borgbackup",
        ("borg init --encryption none kept",),
        "borg create --compression zstd,1 kept::{name} {file}", "kept",
    ),
    Tool(
        "DVC", "dvc", "pip install dvc, or pipx install dvc",
        ("dvc init --no-scm --quiet", "dvc config core.analytics false", "dvc config core.check_update false"),
        "dvc add --quiet {name}", ".dvc/cache", inside=True,
    ),
    Tool(
        "git-lfs", "git-lfs", "apt-get install git-lfs",
        ("git init --quiet", "git lfs install --local", "git lfs track *.pt"),
        "git add {name}", ".git/lfs/objects", inside=True,
    ),
)  # fmt: skip


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed: {(done.stderr or done.stdout).strip()[-300:]}")


def isolate(home: Path, programs: Iterable[Path]) -> None:
    """Let no tool read or write a user's settings and caches, nor be found but in ``programs`` and PATH."""
    os.environ["PATH"] = os.pathsep.join([*map(str, programs), os.environ.get("PATH", os.defpath)])
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "BORG_BASE_DIR", "RESTIC_CACHE_DIR"):
        os.environ[name] = str(home)
    for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DVC_SITE_CACHE_DIR"):
        os.environ[name] = str(home)
    os.environ |= {
        "RESTIC_PASSWORD": "bench", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes", "DVC_NO_ANALYTICS": "1",
        "GIT_CONFIG_NOSYSTEM": "1", "GOMAXPROCS": str(THREADS), "OMP_NUM_THREADS": str(THREADS),
    }  # fmt: skip


def size(path: Path) -> int:
    """Bytes of the files at or below ``path``, each file once however many names it has."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file() and not one.is_symlink()]
    return sum({(found.st_dev, found.st_ino): found.st_size for found in map(os.stat, files)}.values())


# -- versions --------------------------------------------------------------------------------------------------------


def has_zipnn() -> bool:
    return importlib.util.find_spec("zipnn") is not None


def versions() -> dict[str, str]:
    """The version of everything that is measured, or how to install what isn't there."""
    found = {"castore": castore.__version__, "Python": sys.version.split()[0]}
    for package in ("torch", "safetensors", "numpy", "zstandard", "blake3"):
        found[package] = importlib.metadata.version(package)
    missing = "not installed: pip install -c constraints.txt zipnn"
    found["ZipNN"] = importlib.metadata.version("zipnn") if has_zipnn() else missing
    for tool in TOOLS:
        found[tool.name] = _version(tool.path) if tool.path else f"not installed: {tool.install}"
    return found


def _version(program: str) -> str:
    option = "version" if Path(program).name in ("restic", "git-lfs") else "--version"
    done = subprocess.run([program, option], capture_output=True, text=True, check=False)
    first = (done.stdout.strip() or "unknown").splitlines()[0]
    return next((word for word in first.replace("/", " ").split() if word[0].isdigit()), first)
