"""The alternatives to castore, and how each saves, loads and stores, for bench/suite.py.

A *format* saves a state in this process; a *tool* is a program that stores files. All get two threads if they can use
them, and every durable save waits until its files and its folder are on the disk.
"""

# ruff: noqa: ARG002 (all formats have the same methods, and not every one needs every argument)

from __future__ import annotations

import importlib.metadata
import importlib.util
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
    """Saves a state into an empty folder that exists, and loads it into new memory."""

    name = ""

    def prepare(self, folder: Path, durable: bool) -> None:
        """Do what is not part of a save."""

    def save(self, state: State, folder: Path, durable: bool) -> None:
        raise NotImplementedError

    def load(self, folder: Path, like: State) -> State:
        """Load everything; ``like`` has the shapes, for formats that need to know them."""
        raise NotImplementedError

    def load_part(self, folder: Path, part: str, like: State) -> State:
        """Load one part, reading as little as the format can."""
        raise NotImplementedError

    def load_one(self, folder: Path, part: str, key: str, like: State) -> Tensor:
        """Load one tensor, reading as little as the format can."""
        raise NotImplementedError

    def load_into(self, folder: Path, state: State) -> None:
        """Load everything into the tensors of ``state``."""
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


def repository(folder: Path, durable: bool, retention: str = "") -> castore.Repo:
    """Return a fresh repository with two threads and otherwise default settings."""
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
    """One file with flat keys; load_file only maps it, so a copy follows."""

    name = "safetensors"

    def save(self, state: State, folder: Path, durable: bool) -> None:
        flat = {f"{part}/{key}": tensor for part, tensors in state.items() for key, tensor in tensors.items()}
        safetensors.torch.save_file(flat, folder / "state.safetensors")
        if durable:
            sync([folder / "state.safetensors", folder])

    def load(self, folder: Path, like: State) -> State:
        state: State = {part: {} for part in like}
        for name, tensor in safetensors.torch.load_file(folder / "state.safetensors").items():
            part, _, key = name.partition("/")
            state[part][key] = tensor.clone()
        return {part: {key: state[part][key] for key in tensors} for part, tensors in like.items()}

    def load_part(self, folder: Path, part: str, like: State) -> State:
        with safetensors.safe_open(folder / "state.safetensors", "pt") as file:
            return {part: {key: file.get_tensor(f"{part}/{key}").clone() for key in like[part]}}

    def load_one(self, folder: Path, part: str, key: str, like: State) -> Tensor:
        with safetensors.safe_open(folder / "state.safetensors", "pt") as file:
            return file.get_tensor(f"{part}/{key}").clone()


class Distributed(Format):
    """torch.distributed.checkpoint: it only loads into tensors, and making them counts as loading."""

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
FORMATS: dict[str, Format] = {peer.name: peer for peer in (CASTORE, TORCH, MAPPED, SAFETENSORS, DCP)}


# -- tools -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that stores files.

    Its commands run in a new folder; ``{file}`` is the file's path, ``{name}`` its name. With ``inside`` the file must
    lie in that folder. ``kept`` is where the program puts what it stores.
    """

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
    """Keep all tools away from the user's settings and caches; look for them in ``programs``, then in PATH."""
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
    """Return the bytes of the files at or below ``path``, each counted once however many names it has."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum({(status.st_dev, status.st_ino): status.st_size for status in map(os.stat, files)}.values())


# -- versions --------------------------------------------------------------------------------------------------------


def has_zipnn() -> bool:
    return importlib.util.find_spec("zipnn") is not None


def versions() -> dict[str, str]:
    """Return the version of everything that is measured, or how to install what is missing."""
    versions = {"castore": castore.__version__, "Python": sys.version.split()[0]}
    for package in ("torch", "safetensors", "numpy", "zstandard", "blake3"):
        versions[package] = importlib.metadata.version(package)
    missing = "not installed: pip install -c constraints.txt zipnn"
    versions["ZipNN"] = importlib.metadata.version("zipnn") if has_zipnn() else missing
    for tool in TOOLS:
        versions[tool.name] = _version(tool.path) if tool.path else f"not installed: {tool.install}"
    return versions


def _version(program: str) -> str:
    option = "version" if Path(program).name in ("restic", "git-lfs") else "--version"
    done = subprocess.run([program, option], capture_output=True, text=True, check=False)
    first = (done.stdout.strip() or "unknown").splitlines()[0]
    return next((word for word in first.replace("/", " ").split() if word[0].isdigit()), first)
