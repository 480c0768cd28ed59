"""Compare castore with its alternatives: speed, stored bytes and memory; medians, spreads and ratios.

    python bench/suite.py --quick    # small states, some minutes on two cores
    python bench/suite.py            # GPT-2's 1.5 GB of training state, and 6 GB for memory

Every round runs each contender once, the order reversed from round to round; a ratio is the median over rounds of
what a peer took divided by what castore took in the same round. The disk is synced between runs; output goes to a fresh
folder and is removed outside of the timing; where each contender overwrites its own, the title says so. Memory is
touched first, since a page that a virtual machine has never used takes longer to get. The whole process tree is limited
to two cores. A peer that is not installed is left out, and the output says how to install it. Writes JSON and a
Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import mmap
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import blake3
import catalog
import numpy as np
import peers
import states
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from states import State

import castore
import castore.torch
from castore import verify
from castore.format import codecs, ids
from castore.format.frame import HEADER_BYTES, bound, decode_frame, encode_frame, encode_frame_into
from castore.storage import fs
from nanecho import config as configs
from nanecho import events, train

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
CHUNK = 4 << 20
DISK_GB = {True: 4, False: 16}  # free space that a run needs; its output has the most that it used
MEMORY_STATE = {True: 1_000_000_000, False: 6_000_000_000}
SLOW_ROUNDS = 3

Act = Callable[[], Any]


def nothing(_: Any) -> None:
    """Do nothing: for contenders that need no check and nothing done afterwards."""


def _give_back() -> None:
    """Return free memory to the system: a session that resumes is a new process, and new memory takes time to get.

    Without this, a run after one of the same sizes may find its memory warm, by chance of the allocator.
    """
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class Contender:
    """``prepare`` gets a fresh empty folder and returns what is timed. ``check`` gets the result of the warm-up and
    raises if it is wrong; ``finish`` gets every result. Neither is timed."""

    name: str
    prepare: Callable[[Path], Act]
    check: Callable[[Any], None] = nothing
    finish: Callable[[Any], None] = nothing


@dataclass(frozen=True, slots=True)
class Row:
    """Samples of each contender, the first of which the others are compared with; less is better: seconds, bytes or a
    share. ``unit`` is how they are shown; MB/s are ``size`` bytes by the sample."""

    key: str
    title: str
    unit: str
    samples: dict[str, list[float]]
    size: int = 0

    def shown(self, sample: float) -> float:
        scale = {"s": 1, "ms": 1e3, "MB": 1e-6, "%": 100}
        return self.size / 1e6 / sample if self.unit == "MB/s" else sample * scale[self.unit]

    def figures(self, name: str) -> tuple[float, float, float]:
        """Median, lowest and highest, as shown."""
        values = [self.shown(sample) for sample in self.samples[name]]
        return statistics.median(values), min(values), max(values)

    def ratio(self, name: str) -> float:
        """Return how many times as good the first contender is as ``name``: the median over rounds."""
        first = next(iter(self.samples.values()))
        return statistics.median(theirs / ours for theirs, ours in zip(self.samples[name], first, strict=True))


@dataclass(slots=True)
class Bench:
    """The measurements: where they are made, how often, and their results."""

    scratch: Path
    quick: bool
    groups: Collection[str]
    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    disk_peak: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def rounds(self) -> int:
        return 5 if self.quick else 7

    def say(self, text: str) -> None:
        """Show the progress on standard error."""
        line = f"[{time.monotonic() - self.began:4.0f} s] {text}"
        print(f"\r\033[K{line}" if sys.stderr.isatty() else line, end="", file=sys.stderr, flush=True)
        if not sys.stderr.isatty():
            print(file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def compare(
        self,
        key: str,
        title: str,
        unit: str,
        contenders: Sequence[Contender],
        *,
        size: int = 0,
        rounds: int = 0,
        warm_up: bool = True,
    ) -> None:
        """Time the contenders in turn, after a warm-up. A peer that fails is left out; castore, the first, may not."""
        running = list(contenders)
        samples: dict[str, list[float]] = {contender.name: [] for contender in running}
        rounds = rounds or self.rounds
        if not sys.stderr.isatty():
            self.say(title)
        for number in range(0 if warm_up else 1, rounds + 1):
            for contender in list(running if number % 2 else reversed(running)):
                if sys.stderr.isatty():
                    self.say(f"{title}: {f'round {number} of {rounds}' if number else 'warm-up'}, {contender.name}")
                try:
                    seconds = self._once(contender, is_warm_up=number == 0)
                except Exception as error:
                    if contender is contenders[0]:
                        raise
                    self.note(f"{title}: {contender.name} is left out, it failed: {type(error).__name__}: {error}")
                    running.remove(contender)
                    del samples[contender.name]
                    continue
                if number:
                    samples[contender.name].append(seconds)
        self.rows[key] = Row(key, title, unit, samples, size)

    def _once(self, contender: Contender, *, is_warm_up: bool) -> float:
        """Seconds of one run. The disk is synced before and after, so that no run pays for another's dirty pages."""
        folder = self.fresh()
        try:
            act = contender.prepare(folder)
            if any(folder.iterdir()):
                os.sync()
            gc.collect()
            _give_back()
            gc.disable()
            began = time.perf_counter()
            result = act()
            seconds = time.perf_counter() - began
            gc.enable()
            contender.finish(result)
            if is_warm_up:
                contender.check(result)
            self.disk_peak = max(self.disk_peak, peers.size(self.scratch))
        finally:
            gc.enable()
            has_written = any(folder.iterdir())
            shutil.rmtree(folder)
        if has_written:
            os.sync()
        return seconds

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def measured(self, key: str, title: str, unit: str, values: dict[str, float]) -> None:
        """Add a row of values that need no repetition."""
        self.say(title)
        self.rows[key] = Row(key, title, unit, {name: [value] for name, value in values.items()})


# -- saving and loading ----------------------------------------------------------------------------------------------

FORMATS: tuple[peers.Format, ...] = (peers.CASTORE, peers.TORCH, peers.SAFETENSORS, peers.DCP)
LOADERS: tuple[peers.Format, ...] = (peers.CASTORE, peers.TORCH, peers.MAPPED, peers.SAFETENSORS, peers.DCP)


def saving(peer: peers.Format, state: State, durable: bool) -> Contender:
    def prepare(folder: Path) -> Act:
        peer.prepare(folder, durable)
        return lambda: peer.save(state, folder, durable)

    return Contender(peer.name + (" + fsync" if durable and peer is not peers.CASTORE else ""), prepare)


def saves(bench: Bench, key: str, label: str, state: State, *, both: bool = True) -> None:
    size = states.nbytes(state)
    for durable in (True, False) if both else (True,):
        contenders = [saving(peer, state, durable) for peer in FORMATS]
        how = "durable" if durable else "no fsync"
        name = f"{key}-{'durable' if durable else 'no-fsync'}"
        bench.compare(name, f"save, {how}, {label}", "MB/s", contenders, size=size)


def overwriting_saves(bench: Bench, key: str, label: str, state: State) -> None:
    """Measure durable saves in which each contender replaces what it wrote in the round before.

    The pages and blocks that it frees come back at once, which new files don't have. castore deletes the older
    checkpoint between rounds, untimed, as its gc would.
    """
    folders: dict[str, Path] = {}

    def saving_again(peer: peers.Format) -> Contender:
        def prepare(_: Path) -> Act:
            if peer.name not in folders:
                folders[peer.name] = bench.fresh()
                peer.prepare(folders[peer.name], True)
            for tensor in states.tensors(state):
                tensor.mul_(1.0001)
            os.sync()
            return lambda: peer.save(state, folders[peer.name], True)

        def finish(_: Any) -> None:
            if peer is peers.CASTORE:
                repo = castore.Repo.open(folders[peer.name])
                for older in repo.checkpoints()[1:]:
                    repo.forget(older)
                castore.collect_garbage(repo, grace=timedelta())

        return Contender(peer.name + ("" if peer is peers.CASTORE else " + fsync"), prepare, finish=finish)

    title = f"save, durable, each over its own of the round before, {label}"
    bench.compare(
        f"{key}-overwrite", title, "MB/s", [saving_again(peer) for peer in FORMATS], size=states.nbytes(state)
    )
    for folder in folders.values():
        shutil.rmtree(folder)


def limits(bench: Bench, key: str, label: str, state: State) -> None:
    """Measure how near a durable save comes to hashing and encoding alone, and what it leaves in the page cache."""
    views = [
        (tensor.reshape(-1).view(torch.uint8).numpy().data, tensor.element_size()) for tensor in states.tensors(state)
    ]
    pieces = [(view[start : start + CHUNK], width) for view, width in views for start in range(0, len(view), CHUNK)]
    memory = threading.local()

    def encode(piece: tuple[memoryview, int]) -> None:
        if not hasattr(memory, "out"):
            memory.out = memoryview(bytearray(bound(CHUNK)))
        encode_frame_into(*piece, memory.out)

    def hash_and_encode(piece: tuple[memoryview, int]) -> None:
        ids.hash_bytes(piece[0])
        encode(piece)

    def on_two_threads(function: Callable[[tuple[memoryview, int]], None]) -> Act:
        def act() -> None:
            with ThreadPoolExecutor(peers.THREADS) as pool:
                list(pool.map(function, pieces))

        return act

    buffer = memoryview(mmap.mmap(-1, bound(CHUNK) // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE))
    sizes = [encode_frame_into(*piece, buffer) for piece in pieces]

    def write_alone(folder: Path) -> Act:
        def write(numbered: tuple[int, int]) -> None:
            number, size = numbered
            descriptor, path = fs.create_temporary(folder, direct=True)
            with fs.closing(descriptor, path):
                fs.write_direct(descriptor, path, buffer, size)
                fs.sync(descriptor, path)
            fs.rename(path, folder / f"{number}")

        def act() -> None:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(write, enumerate(sizes)))

        return act

    cached: list[float] = []

    def measure_cache(saved: Any) -> None:
        cached.append(sum(cached_bytes(path) for path in saved.rglob("*") if path.is_file()))

    def save(folder: Path) -> Act:
        peers.CASTORE.prepare(folder, True)

        def act() -> Path:
            peers.CASTORE.save(state, folder, True)
            return folder / ".castore" / "objects"

        return act

    contenders = [
        Contender("castore", save, finish=measure_cache),
        Contender("BLAKE3 and encoding alone, two threads", lambda _: on_two_threads(hash_and_encode)),
        Contender("encoding alone, two threads", lambda _: on_two_threads(encode)),
        Contender("writing what is stored alone, eight threads", write_alone),
    ]
    bench.compare(
        f"{key}-limit", f"save, durable, and what limits it, {label}", "MB/s", contenders, size=states.nbytes(state)
    )
    bench.measured(
        f"{key}-cache", f"page cache left behind by a save, {label}", "MB", {"castore": statistics.median(cached)}
    )


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    size = path.stat().st_size
    if not size:
        return 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as data:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = np.frombuffer(data, np.uint8).ctypes.data
        if _LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def repeated_saves(bench: Bench, label: str, state: State) -> None:
    """Measure saving a state that is stored already, and one that mostly is."""
    size = states.nbytes(state)
    folder = bench.fresh()
    repo = peers.repository(folder, durable=True)
    repo.save(state, run="bench", step=0)

    def again(_: Path) -> Act:
        return lambda: repo.save(state, run="bench", step=0)

    def reopened(_: Path) -> Act:
        fresh = castore.Repo.open(folder)
        return lambda: fresh.save(state, run="bench", step=0)

    views = [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in states.tensors(state)]
    pieces = [view[start : start + CHUNK] for view in views for start in range(0, len(view), CHUNK)]

    def hashing(_: Path) -> Act:
        def act() -> None:
            with ThreadPoolExecutor(peers.THREADS) as pool:
                list(pool.map(lambda piece: blake3.blake3(piece).digest(), pieces))

        return act

    contenders = [
        Contender("castore", again),
        Contender("castore, in a new process: stored copies are verified", reopened),
        Contender("BLAKE3 of the same bytes, two threads", hashing),
    ]
    bench.compare("unchanged", f"save again unchanged, durable, {label}", "MB/s", contenders, size=size)

    changing = list(states.tensors(state))[50::100]  # not the embedding, a third of all
    share = sum(tensor.nbytes for tensor in changing) / size

    def changed(peer: peers.Format) -> Contender:
        def prepare(target: Path) -> Act:
            for tensor in changing:
                tensor.mul_(1.001)
            if peer is peers.CASTORE:
                return lambda: repo.save(state, run="bench", step=1)
            return lambda: peer.save(state, target, True)

        return Contender(peer.name + ("" if peer is peers.CASTORE else " + fsync"), prepare)

    title = f"save after 1 % of the tensors changed ({share:.1%} of the bytes), durable, {label}"
    bench.compare("changed", title, "MB/s", [changed(peer) for peer in FORMATS], size=size)
    shutil.rmtree(folder)


def keep(bench: Bench, state: State) -> dict[str, Path]:
    """Save the state once in each format, to be loaded; return the folders."""
    kept = {}
    for peer in FORMATS:
        folder = kept[peer.name] = bench.fresh()
        peer.prepare(folder, False)
        peer.save(state, folder, False)
    kept[peers.MAPPED.name] = kept[peers.TORCH.name]
    os.sync()
    return kept


def warm(folder: Path) -> None:
    """Read every file into the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(CHUNK):
                    pass


def chill(folder: Path) -> bool:
    """Ask the kernel to drop the files from the page cache; return whether it did for 99 in 100."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    held = 0
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            with contextlib.suppress(BlockingIOError):  # not in the page cache
                held += os.preadv(descriptor, [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
        finally:
            os.close(descriptor)
    return held <= len(files) / 100


Load = Callable[[peers.Format, Path], Any]


def loading(bench: Bench, peer: peers.Format, folder: Path, load: Load, expected: Any, *, cold: bool) -> Contender:
    def prepare(_: Path) -> Act:
        if not cold:
            warm(folder)
        elif not chill(folder):
            bench.note("cold: the kernel kept files in the page cache, so these figures are too high")
        return lambda: load(peer, folder)

    def check(result: Any) -> None:
        if not states.equal(result, expected):
            raise ValueError("what was loaded is not what was saved")

    return Contender(peer.name, prepare, check)


def loads(bench: Bench, key: str, label: str, state: State, *, everything: bool = True) -> None:
    kept = keep(bench, state)
    size = states.nbytes(state)

    def compare(what: str, title: str, unit: str, load: Load, expected: Any, size: int, cold: bool = False) -> None:
        contenders = [loading(bench, peer, kept[peer.name], load, expected, cold=cold) for peer in LOADERS]
        bench.compare(f"{key}-{what}", f"{title}, {label}", unit, contenders, size=size)

    def whole(peer: peers.Format, folder: Path) -> Any:
        return peer.load(folder, state)

    compare("hot", "load, page cache warm", "MB/s", whole, state, size)
    if everything:
        compare("cold", "load, page cache dropped", "MB/s", whole, state, size, cold=True)
        model = {"model": state["model"]}

        def part(peer: peers.Format, folder: Path) -> Any:
            return peer.load_part(folder, "model", state)

        compare("part", "load the model alone", "MB/s", part, model, states.nbytes(model))
        name = "h.0.mlp.c_fc.weight"

        def single(peer: peers.Format, folder: Path) -> Any:
            return peer.load_one(folder, "model", name, state)

        compare("one", "load one tensor", "ms", single, state["model"][name], state["model"][name].nbytes)
        there = states.empty_like(state)
        states.mapped(there, torch.Tensor.zero_)

        def into(peer: peers.Format, folder: Path) -> Any:
            peer.load_into(folder, there)
            return there

        compare("into", "load into tensors that are there", "MB/s", into, state, size)
        compare("into-cold", "load into tensors that are there, cache dropped", "MB/s", into, state, size, cold=True)
        del there
        verifying(bench, label, kept["castore"], size)
        if "stores" in bench.groups:
            stores(bench, label, kept["torch.save"] / "state.pt", state)
    for folder in set(kept.values()):
        shutil.rmtree(folder)


def verifying(bench: Bench, label: str, folder: Path, size: int) -> None:
    repo = castore.Repo.open(folder)
    checkpoint_id = repo.checkpoints()[0].id

    def act() -> None:
        if findings := list(verify.verify(repo, [checkpoint_id])):
            raise ValueError(f"verify found {findings}")

    contenders = [
        Contender("castore verify", lambda _: act),
        Contender("castore load", lambda _: lambda: repo.load(checkpoint_id)),
    ]
    bench.compare("verify", f"verify, page cache warm, {label}", "MB/s", contenders, size=size)


def stores(bench: Bench, label: str, file: Path, state: State) -> None:
    """Measure storing one file with programs, and with castore both from the file and, as intended, from the state."""
    contenders = [Contender("castore, the state", saving(peers.CASTORE, state, True).prepare)]
    contenders += [storing(tool, [file]) for tool in (peers.CASTORE_ADD, *peers.TOOLS) if tool.path]
    size = states.nbytes(state)
    title = f"store once, {label}; programs get torch.save's file"
    bench.compare("store", title, "MB/s", contenders, size=size, rounds=SLOW_ROUNDS, warm_up=not bench.quick)


def storing(tool: peers.Tool, files: Sequence[Path], sizes: dict[str, float] | None = None) -> Contender:
    def prepare(folder: Path) -> Act:
        tool.begin(folder)
        inputs = [Path(shutil.copy(file, folder)) for file in files] if tool.inside else files

        def act() -> Path:
            for file in inputs:
                tool.store(folder, file)
            return folder

        return act

    def finish(folder: Path) -> None:
        if sizes is not None:
            sizes[tool.name] = tool.stored(folder)

    return Contender(tool.name, prepare, finish=finish)


# -- trained states --------------------------------------------------------------------------------------------------


def sequence(bench: Bench, run: Sequence[states.Trained]) -> None:
    """Measure storing nine consecutive checkpoints one after another in the same place: time and bytes."""
    folder = bench.fresh()
    files = [folder / f"step-{checkpoint.step}.pt" for checkpoint in run]
    for checkpoint, file in zip(run, files, strict=True):
        torch.save(checkpoint.parts, file)
    everything: dict[str, float] = {"castore": 0}
    after: dict[str, float] = {"castore": 0}

    def prepare(target: Path) -> Act:
        repo = peers.repository(target, durable=True)

        def act() -> castore.Repo:
            for checkpoint in run:
                repo.save(
                    checkpoint.parts,
                    run="bench",
                    step=checkpoint.step,
                    metrics=checkpoint.metrics,
                    experiment=checkpoint.experiment,
                )
            return repo

        return act

    def finish(repo: castore.Repo) -> None:
        everything["castore"] = peers.size(repo.root / "objects")
        plan = castore.collect_garbage(repo, grace=timedelta())
        after["castore"] = peers.size(repo.root / "objects")
        parts = {checkpoint.step: checkpoint.parts for checkpoint in run}
        after["the parts that castore kept, raw"] = sum(
            states.nbytes(parts[decision.entry.manifest.step][part])
            for decision in plan.decisions
            for part in decision.parts
        )

    def archive(target: Path) -> Act:
        def act() -> None:
            compressor = zstandard.ZstdCompressor(level=1, threads=peers.THREADS)
            with (
                open(target / "all.tar.zst", "wb") as out,
                compressor.stream_writer(out) as packed,
                tarfile.open(fileobj=packed, mode="w|") as tar,
            ):
                for file in files:
                    tar.add(file, file.name)
            everything["tar + zstd -1"] = (target / "all.tar.zst").stat().st_size

        return act

    contenders = [
        Contender("castore", prepare, finish=finish),
        *(storing(tool, files, everything) for tool in peers.TOOLS if tool.path),
        Contender("tar + zstd -1", archive),
    ]
    label = f"{len(run)} trained checkpoints in a row"
    size = sum(states.nbytes(checkpoint.parts) for checkpoint in run)
    rounds = 1 if bench.quick else SLOW_ROUNDS
    bench.compare("sequence-time", f"store {label}", "MB/s", contenders, size=size, rounds=rounds, warm_up=False)
    everything["torch.save, the files"] = after["torch.save, the files"] = peers.size(folder)
    bench.measured("sequence-all", f"bytes of {label}, everything kept", "MB", everything)
    after |= {name: value for name, value in everything.items() if name != "castore"}
    bench.measured("sequence-kept", f"bytes of {label}, castore after gc by its default retention", "MB", after)
    bench.note(
        "default retention keeps every model of these nine, and the optimizer of the newest two and the best; the "
        "others keep all that they were given. The row with everything kept compares like with like."
    )
    shutil.rmtree(folder)


def to_bfloat16(parts: Any) -> Any:
    return states.mapped(parts, lambda tensor: tensor.to(torch.bfloat16) if tensor.dim() else tensor)


def compression(bench: Bench, newest: states.Trained) -> None:
    """Measure the bytes of one trained checkpoint, and encoding and decoding on one core."""
    for name, parts in (("fp32", newest.parts), ("bf16", to_bfloat16(newest.parts))):
        distinct = {id(tensor): tensor for tensor in states.tensors(parts) if tensor.dim()}  # tied ones once
        blob = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in distinct.values())
        width = 4 if name == "fp32" else 2
        dtype = "float32" if name == "fp32" else "bfloat16"
        folder = bench.fresh()
        repo = peers.repository(folder, durable=False)
        repo.save(parts, run="bench", step=1)
        values: dict[str, float] = {"castore, index included": peers.size(repo.root / "objects")}
        if peers.has_zipnn():
            values |= {
                f"ZipNN, {label}": sum(len(zipnn(dtype).compress(bytearray(piece))) for piece in cut(blob, length))
                for label, length in ZIPNN_PIECES.items()
            }
        else:
            bench.note("ZipNN is left out: pip install -c constraints.txt zipnn")
        values["zstd -1"] = len(zstandard.ZstdCompressor(level=1).compress(blob))
        values["raw"] = len(blob)
        shutil.rmtree(folder)
        bench.measured(f"bytes-{name}", f"bytes of one trained checkpoint, {name}", "MB", values)
        encoding(bench, name, blob, width, dtype)


ZIPNN_PIECES = {"4 MiB pieces": CHUNK, "in one piece": 1 << 40}


def cut(blob: bytes, length: int) -> list[bytes]:
    return [blob[start : start + length] for start in range(0, len(blob), length)]


@functools.cache
def zipnn(dtype: str) -> Any:
    from zipnn import ZipNN

    return ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1)


def encoding(bench: Bench, name: str, blob: bytes, width: int, dtype: str) -> None:
    pieces = cut(blob, CHUNK)

    # what comes out is dropped at once, as a save drops what it has written
    def encode(_: Path) -> Act:
        return lambda: drop(encode_frame(piece, width) for piece in pieces)

    def hash_and_encode(_: Path) -> Act:
        return lambda: drop((ids.hash_bytes(piece), encode_frame(piece, width)) for piece in pieces)

    def compress(length: int, _: Path) -> Act:
        fresh = [bytearray(piece) for piece in cut(blob, length)]  # ZipNN shuffles its input in place
        return lambda: drop(zipnn(dtype).compress(piece) for piece in fresh)

    ours = [Contender("castore", encode), Contender("castore, BLAKE3 included", hash_and_encode)]
    zipnns = ZIPNN_PIECES.items() if peers.has_zipnn() else ()
    theirs = [Contender(f"ZipNN, {label}", functools.partial(compress, length)) for label, length in zipnns]
    title = f"on one core, trained checkpoint, {name}"
    bench.compare(f"encode-{name}", f"encode {title}", "MB/s", ours + theirs, size=len(blob))

    frames = [(ids.hash_bytes(piece), encode_frame(piece, width)) for piece in pieces]
    outs = [memoryview(bytearray(len(piece))) for piece in pieces]

    def decode() -> None:
        for (object_id, frame), out in zip(frames, outs, strict=True):
            decode_frame(object_id, memoryview(frame), out)

    def decode_alone() -> None:
        for (_, frame), out in zip(frames, outs, strict=True):
            codecs.decode(frame[5], memoryview(frame)[HEADER_BYTES:], out)

    def decompress(length: int, _: Path) -> Act:
        packed = [zipnn(dtype).compress(bytearray(piece)) for piece in cut(blob, length)]
        if b"".join(map(zipnn(dtype).decompress, packed)) != blob:
            raise ValueError("what was decoded is not what was encoded")
        return lambda: drop(map(zipnn(dtype).decompress, packed))

    ours = [
        Contender("castore, verified by BLAKE3", lambda _: decode),
        Contender("castore, not verified", lambda _: decode_alone),
    ]
    theirs = [Contender(f"ZipNN, {label}", functools.partial(decompress, length)) for label, length in zipnns]
    bench.compare(f"decode-{name}", f"decode {title}", "MB/s", ours + theirs, size=len(blob))


def drop(results: Iterable[Any]) -> None:
    for _ in results:
        pass


# -- memory, stalls and start-up -------------------------------------------------------------------------------------


def memory(bench: Bench) -> None:
    size = MEMORY_STATE[bench.quick]
    if available() < 1.3 * size + 1e9:
        bench.note(f"memory: left out, {size / 1e9:g} GB of state need more than there is")
        return
    used: dict[str, dict[str, float]] = {"save": {}, "load": {}}
    for peer in FORMATS[:2] if bench.quick else FORMATS:
        folder = bench.fresh()
        peer.prepare(folder, True)
        for action, bytes_of in used.items():
            bench.say(f"memory of {peer.name}'s {action} of {size / 1e9:g} GB")
            command = [sys.executable, str(ROOT / "bench" / "memory.py"), action, peer.name, str(folder), str(size)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                if peer is peers.CASTORE:
                    raise RuntimeError(done.stderr[-2000:])
                bench.note(f"memory of {peer.name}'s {action} is left out, it failed: {done.stderr.strip()[-200:]}")
                break
            bytes_of[peer.name] = float(done.stdout)
            bench.disk_peak = max(bench.disk_peak, peers.size(bench.scratch))
        shutil.rmtree(folder)
        os.sync()
    bench.note(
        "peak memory counts pages of a mapped file, as safetensors' load has them, though the kernel can drop them"
    )
    for action, bytes_of in used.items():
        bench.measured(f"memory-{action}", f"peak memory beside a state of {size / 1e9:g} GB, {action}", "MB", bytes_of)


def available() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))


def stall(bench: Bench, label: str, state: State) -> None:
    """Measure how long training stands still for a save in the background."""

    def change() -> None:
        for tensor in states.tensors(state):
            tensor.mul_(1.001)

    def saving_by(saver: castore.torch.AsyncSaver) -> Act:
        def act() -> castore.torch.AsyncSaver:
            saver.save(state, run="bench", step=2)
            return saver

        return act

    def steady(folder: Path) -> Act:
        saver = castore.torch.AsyncSaver(peers.repository(folder, durable=True))
        saver.save(state, run="bench", step=1)
        saver.wait()
        change()  # as a training step would, so that nothing is deduplicated
        return saving_by(saver)

    def first(folder: Path) -> Act:
        return saving_by(castore.torch.AsyncSaver(peers.repository(folder, durable=True)))

    def distributed(folder: Path) -> Act:
        def act() -> Any:
            return dcp.async_save(state, storage_writer=peers.DCP.writer(folder, True), no_dist=True)

        return act

    def into(_: Path) -> Act:
        there = states.copy(state)

        def act() -> None:
            for to, source in zip(states.tensors(there), states.tensors(state), strict=True):
                to.copy_(source)

        return act

    contenders = [
        Contender("castore", steady, finish=lambda saver: saver.wait()),
        Contender("castore, a saver's first save", first, finish=lambda saver: saver.wait()),
        Contender("DCP async_save", distributed, finish=lambda future: future.result()),
        Contender("one copy of the state", lambda _: lambda: states.copy(state)),
        Contender("one copy into memory that is there", into),
    ]
    bench.compare("stall", f"stall of an asynchronous save, {label}", "ms", contenders)


def overhead(bench: Bench) -> None:
    """Measure the share of nanecho's time that saving takes: the stalled loop, and slower steps after it.

    Measured within one session, since two sessions differ by more than that: the time from an evaluation to the tenth
    step after it, minus ten steps of the usual length.
    """
    folder = bench.fresh()
    repo = castore.Repo.init(folder)
    steps = 200 if bench.quick else 500
    title = f"training overhead of saving, {steps} steps with default options"
    bench.say(title)
    config = configs.make({"session_iters": steps, "log_every": 1, "device": "cpu", "threads": peers.THREADS})
    passed: list[tuple[events.Event, float]] = []
    at = time.perf_counter()
    for event in train.train(repo, config, started="2026-01-01T00:00:00.000000Z"):
        now = time.perf_counter()
        passed.append((event, now - at))
        at = now
    quiet: list[float] = []
    busy = stalls = 0.0
    busy_steps = saves = number = 0
    since_save = 10
    for event, seconds in passed:
        is_step = isinstance(event, events.Stepped)
        number += is_step
        if isinstance(event, events.Evaluated):
            since_save = 0
        elif since_save < 10:
            busy += seconds
            if not since_save:  # up to the end of the first step after it
                stalls += seconds
                saves += is_step
            busy_steps += is_step
            since_save += is_step
        elif is_step and number > 20:  # the first ones are slower
            quiet.append(seconds)
    step = statistics.fmean(quiet)
    spent, stalls = busy - busy_steps * step, stalls - saves * step
    whole = sum(seconds for event, seconds in passed if not isinstance(event, events.Prepared | events.Began))
    noise = statistics.stdev(quiet) * busy_steps**0.5
    bench.note(
        f"training overhead: {noise / whole:.1%} is its standard error; the loop stood still {stalls / whole:.2%}"
    )
    bench.measured("overhead", title, "%", {"castore": max(spent, stalls) / whole})  # noise hides no stall
    shutil.rmtree(folder)


def commands(bench: Bench) -> None:
    """Measure the start-up of commands that people type."""
    folder = bench.fresh()
    catalog.fill(peers.repository(folder, durable=False), 1000)

    def running(*command: str) -> Contender:
        def act() -> None:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        return Contender(" ".join(command), lambda _: act)

    program = shutil.which("castore")
    if program is None:
        bench.note("commands: castore is not in PATH")
        return
    helps = [running(tool.program, "--help") for tool in peers.TOOLS if tool.path and tool.program != "git-lfs"]
    bench.compare("help", "start-up of a program, --help", "ms", [running("castore", "--help"), *helps])
    bench.compare("log", "castore log of 1,000 manifests", "ms", [running("castore", "log")])
    shutil.rmtree(folder)


# -- bars ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and its limit, a minimum or a maximum. The value is None if it could not be measured."""

    what: str
    value: float | None
    limit: float
    at_most: bool
    unit: str

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        passed = self.value <= self.limit if self.at_most else self.value >= self.limit
        margin = abs(self.value / self.limit - 1)
        return f"{'pass' if passed else 'FAIL'}, by {margin:.0%}"


def bars(rows: dict[str, Row]) -> list[Bar]:
    def times(key: str, *names: str) -> float | None:
        """Return how many times as good castore is as the best of the peers named."""
        ratios = [rows[key].ratio(name) for name in names if key in rows and name in rows[key].samples]
        return min(ratios) if ratios else None

    def share(key: str, *names: str) -> float | None:
        ratio = times(key, *names)
        return 1 / ratio if ratio else None

    def figure(key: str) -> float | None:
        return rows[key].figures(next(iter(rows[key].samples)))[0] if key in rows else None

    zipnns = [f"ZipNN, {label}" for label in ZIPNN_PIECES]
    return [
        Bar(
            "durable save by torch.save + fsync, new files",
            times("fp32-durable", "torch.save + fsync"), 2.5, False, "x",
        ),
        Bar("the same, each over its own", times("fp32-overwrite", "torch.save + fsync"), 1.1, False, "x"),
        Bar("durable save by DCP + fsync", times("fp32-durable", "DCP + fsync"), 1.0, False, "x"),
        Bar(
            "durable save by BLAKE3 and encoding alone",
            times("fp32-limit", "BLAKE3 and encoding alone, two threads"), 0.8, False, "x",
        ),
        Bar("page cache left by a save", figure("fp32-cache"), 50, True, "MB"),
        Bar(
            "verified load into a model, hot, by torch.load and a copy",
            times("fp32-into", "torch.save"), 1.5, False, "x",
        ),
        Bar("the same, cold", times("fp32-into-cold", "torch.save"), 1.2, False, "x"),
        Bar("verified load, new memory, hot, by torch.load", times("fp32-hot", "torch.save"), 0.9, False, "x"),
        Bar(
            "unchanged save by BLAKE3 on two threads",
            times("unchanged", "BLAKE3 of the same bytes, two threads"), 0.8, False, "x",
        ),
        Bar("bytes, trained fp32, by ZipNN", share("bytes-fp32", *zipnns), 0.99, True, "x"),
        Bar("bytes, trained bf16, by ZipNN", share("bytes-bf16", *zipnns), 0.99, True, "x"),
        Bar("bytes of nine, default retention, by borg", share("sequence-kept", "borg, zstd,1"), 0.5, True, "x"),
        Bar("bytes of nine, default retention, by DVC", share("sequence-kept", "DVC"), 0.5, True, "x"),
        Bar("encode on one core, fp32, by ZipNN", times("encode-fp32", *zipnns), 1.8, False, "x"),
        Bar("memory beside the state, save", figure("memory-save"), 256, True, "MB"),
        Bar("memory beside the state, load", figure("memory-load"), 256, True, "MB"),
        Bar("stall by one copy", share("stall", "one copy into memory that is there"), 1.05, True, "x"),
        Bar("training overhead", figure("overhead"), 1.0, True, "%"),
        Bar("verify by load", times("verify", "castore load"), 0.8, False, "x"),
        *(
            Bar(f"store by {name}", times("store", name), 5.0, False, "x")
            for name in ("DVC", "restic", "borg, zstd,1")
        ),
        Bar("castore --help", figure("help"), 200, True, "ms"),
        Bar("castore log of 1,000 manifests", figure("log"), 400, True, "ms"),
    ]  # fmt: skip


# -- output ----------------------------------------------------------------------------------------------------------


def machine(folder: Path) -> dict[str, Any]:
    """What it ran on; no names and no paths."""
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory_bytes / 1e9, 1),
        "file_system": file_system(folder),
        "system": f"{platform.system()} {platform.release()}",
    }


def file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on."""
    real = str(folder.resolve())
    best = ("", "unknown")
    with open("/proc/self/mounts") as file:
        for line in file:
            _, point, kind = line.split()[:3]
            if Path(real).is_relative_to(point) and len(point) >= len(best[0]):
                best = (point, kind)
    return best[1]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also readable as it is; columns after the second are numbers."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 2) if i < 2 else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *map(line, lines)])


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def markdown(report: dict[str, Any], rows: dict[str, Row], judged: Sequence[Bar]) -> str:
    lines = []
    for row in rows.values():
        for i, (name, samples) in enumerate(row.samples.items()):
            median, low, high = row.figures(name)
            spread = f"{number(low)} .. {number(high)}" if len(samples) > 1 else ""
            better = f"{row.ratio(name):.2f} x" if i and row.samples[name][0] else ""
            cells = [row.title if i == 0 else "", name, f"{number(median)} {row.unit}", spread, str(len(samples))]
            lines.append([*cells, better])
    limits = [
        [bar.what, "at most" if bar.at_most else "at least", f"{bar.limit:g} {bar.unit}",
         f"{bar.value:.3g} {bar.unit}" if bar.value is not None else "", bar.verdict]
        for bar in judged
    ]  # fmt: skip
    on = report["machine"]
    text = [
        f"# castore beside its peers, {report['mode']}",
        "",
        f"{on['processor']}, held to {on['cores']} cores, {on['memory_gb']} GB, {on['file_system']}, {on['system']}; "
        f"{report['seconds']:.0f} s, at most {report['disk_peak_bytes'] / 1e9:.1f} GB of disk.",
        "",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
        "",
        "Medians; the last column says how many times as good castore (the first of each group) is: the median over "
        "rounds.",
        "",
        table(["what", "who", "median", "min .. max", "runs", "castore is"], lines),
        "",
        *(["The bars are meant for the full run:", ""] if "quick" in report["mode"] else []),
        table(["bar", "should be", "limit", "is", "verdict"], limits),
        "",
        *(f"* {note}" for note in report["notes"]),
    ]
    return "\n".join(text) + "\n"


def write(out: Path, bench: Bench, on: dict[str, Any]) -> None:
    judged = bars(bench.rows)
    report = {
        "mode": "quick: small states, where fixed costs weigh more" if bench.quick else "full",
        "machine": on,
        "versions": peers.versions(),
        "seconds": round(time.monotonic() - bench.began, 1),
        "disk_peak_bytes": bench.disk_peak,
        "notes": bench.notes,
        "rows": [
            {
                "key": row.key, "title": row.title, "unit": row.unit, "state_bytes": row.size or None,
                "found": {
                    name: dict(zip(("median", "min", "max"), row.figures(name), strict=True))
                    | {"samples": [round(row.shown(sample), 4) for sample in row.samples[name]]}
                    for name in row.samples
                },
                "castore_is_times": {name: row.ratio(name) for name in list(row.samples)[1:] if row.samples[name][0]},
            }
            for row in bench.rows.values()
        ],
        "bars": [
            {"what": bar.what, "value": bar.value, "at_most" if bar.at_most else "at_least": bar.limit,
             "unit": bar.unit, "verdict": bar.verdict}
            for bar in judged
        ],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    name = "quick" if bench.quick else "full"
    text = markdown(report, bench.rows, judged)
    (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / f"{name}.md").write_text(text)
    print(text)


# -- the whole -------------------------------------------------------------------------------------------------------


GROUPS = ("sequence", "compression", "saves", "loads", "stores", "repeated", "stall", "memory", "commands", "overhead")


def measure(bench: Bench) -> None:
    """Every row of the groups asked for, the big states one at a time."""
    groups = bench.groups
    shapes = states.gpt2(192, 16_384) if bench.quick else states.gpt2()
    for tool in peers.TOOLS:
        if not tool.path:
            bench.note(f"{tool.name} is left out: {tool.install}")
    if {"sequence", "compression"} & set(groups):
        run = list(states.trained(BUILD, bench.quick, bench.say))
        if "sequence" in groups:
            sequence(bench, run)
        if "compression" in groups:
            compression(bench, run[-1])
        del run
    for key, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if not {"saves", "loads", "stores", "repeated", "stall"} & set(groups):
            break
        bench.say(f"making a state in GPT-2's shape, {key}")
        state = states.synthetic(shapes, dtype)
        label = f"GPT-2's shape, {states.nbytes(state) / 1e6:,.0f} MB {key}"
        everything = key == "fp32"
        if "saves" in groups:
            saves(bench, key, label, state, both=everything)
        if everything and "saves" in groups:
            overwriting_saves(bench, key, label, state)
            limits(bench, key, label, state)
        if {"loads", "stores"} & set(groups):
            loads(bench, key, label, state, everything=everything)
        if everything and "repeated" in groups:
            repeated_saves(bench, label, state)
        if everything and "stall" in groups:
            stall(bench, label, state)
        del state
    bench.note("states in GPT-2's shape are synthetic: take compressibility from the trained checkpoints only")
    bench.note("restic also encrypts, and can't be told not to; DVC and git-lfs don't wait for the disk")
    for name, act in (("memory", memory), ("commands", commands), ("overhead", overhead)):
        if name in groups:
            act(bench)


def touch_memory() -> None:
    """Use most of what is free once: a virtual machine's host hands out a page when it is first touched."""
    with mmap.mmap(-1, int(0.8 * available()), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1


def stop(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small states, some minutes")
    parser.add_argument("-o", "--out", type=Path, default=BUILD, help="folder of the results (default: build/bench)")
    parser.add_argument("--folder", type=Path, default=BUILD, help="where to work: on a disk (default: build/bench)")
    parser.add_argument("--only", action="append", choices=GROUPS, help="these rows alone; may be repeated")
    given = parser.parse_args()
    if given.only:
        given.out /= "only"  # beside the whole, not in its place
    given.folder.mkdir(parents=True, exist_ok=True)
    if file_system(given.folder) in ("tmpfs", "ramfs"):
        raise SystemExit(f"{given.folder} is in memory: give a --folder on a disk")
    free = shutil.disk_usage(given.folder).free
    if free < DISK_GB[given.quick] * 1e9:
        raise SystemExit(f"{given.folder} has {free / 1e9:.1f} GB free, {DISK_GB[given.quick]} are needed")
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, stop)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: peers.THREADS])
    torch.set_num_threads(peers.THREADS)
    try:
        with tempfile.TemporaryDirectory(prefix="suite-", dir=given.folder) as folder:
            scratch = Path(folder)
            # a repository of its own, so that git looks at no other
            subprocess.run(["git", "init", "--quiet", folder], check=True)
            (scratch / "home").mkdir()
            peers.isolate(scratch / "home", [Path(sys.executable).parent, BUILD / "venv" / "bin"])
            bench = Bench(scratch, given.quick, given.only or GROUPS)
            touch_memory()
            gc.freeze()  # what was imported needn't be looked through before every run
            measure(bench)
            write(given.out, bench, machine(scratch))
    except KeyboardInterrupt:
        raise SystemExit("\nstopped: nothing was written") from None


if __name__ == "__main__":
    main()
