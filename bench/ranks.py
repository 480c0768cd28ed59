"""Measure saves and loads by many ranks beside torch.distributed.checkpoint's own files.

    torchrun --nproc-per-node 2 bench/ranks.py

A state in the shape of GPT-2 with AdamW's moments, every tensor a DTensor cut by rows as FSDP2 does; by default 1 GB.
All take turns, rounds apart; medians of the rounds and of the ratios within a round. Both sync what they write
(``FileSystemWriter(sync_files=True)``), and castore verifies what it loads. Loads are the second of two, so that no
side reads from the disk; the stall is how long a save in the background holds up training, with buffers of a save
before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import states
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as files
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import castore
from castore import dcp

Times = dict[str, float]


class Bench:
    """The state, sharded, and a folder that all ranks see."""

    def __init__(self, folder: Path, layers: int) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        whole = states.synthetic(states.gpt2(layers=layers))
        self.bytes = sum(tensor.nbytes for part in whole.values() for tensor in part.values())
        self.state = {
            name: {key: distribute_tensor(tensor, mesh, [Shard(0)]) for key, tensor in part.items()}
            for name, part in whole.items()
        }
        self.target = {
            name: {key: torch.zeros_like(tensor) for key, tensor in part.items()} for name, part in self.state.items()
        }
        self.folder = folder
        self.step = 0

    def train(self) -> None:
        """Change every value."""
        with torch.no_grad():
            for part in self.state.values():
                for tensor in part.values():
                    tensor.to_local().mul_(1.001)
        self.step += 1

    def timed(self, work: Callable[[], Any]) -> float:
        """Return the seconds until every rank has done it."""
        dist.barrier()
        begun = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - begun

    def clear(self) -> castore.Repo:
        """Return a new repository, in place of what the round before left."""
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder / "files", ignore_errors=True)
            shutil.rmtree(self.folder / "castore", ignore_errors=True)
            castore.Repo.init(self.folder / "castore")
        dist.barrier()
        return castore.Repo.open(self.folder / "castore")

    def equal(self) -> bool:
        """Whether what was loaded is what was saved."""
        pairs = zip(self._locals(self.state), self._locals(self.target), strict=True)
        return all(torch.equal(saved, loaded) for saved, loaded in pairs)

    def _locals(self, state: dict[str, dict[str, DTensor]]) -> list[torch.Tensor]:
        return [tensor.to_local() for part in state.values() for tensor in part.values()]

    def round(self) -> Times:
        """Time everything once."""
        self.train()
        repo = self.clear()
        files_in = str(self.folder / "files")
        writer = FileSystemWriter(files_in, sync_files=True)
        times = {}
        times["files: save"] = self.timed(lambda: files.save(self.state, storage_writer=writer))
        times["castore: save"] = self.timed(lambda: dcp.save(repo, self.state, run="bench", step=self.step))
        times["castore: save, unchanged"] = self.timed(lambda: dcp.save(repo, self.state, run="bench", step=self.step))
        for _ in range(2):
            times["files: load"] = self.timed(
                lambda: files.load(self.target, storage_reader=FileSystemReader(files_in))
            )
        for _ in range(2):
            target: dict[str, Any] = dict(self.target)
            times["castore: load"] = self.timed(lambda target=target: dcp.load(repo, target, "latest"))
            if not self.equal():
                raise SystemExit("what was loaded differs from what was saved")
        return times | self.stalls(repo, files_in)

    def stalls(self, repo: castore.Repo, files_in: str) -> Times:
        """Time until a save in the background lets training go on."""
        times = {}
        group = dist.new_group(backend="gloo")
        writer = FileSystemWriter(files_in, sync_files=True)
        for _ in range(2):
            pending: list[Any] = []
            times["files: stall"] = self.timed(
                lambda pending=pending: pending.append(
                    files.async_save(self.state, storage_writer=writer, process_group=group)
                )
            )
            pending[0].result()
        for _ in range(2):
            times["castore: stall"] = self.timed(
                lambda pending=pending: pending.append(dcp.async_save(repo, self.state, run="bench", step=self.step))
            )
            pending[-1].result()
        return times


RATIOS = {
    "files save / castore save": ("files: save", "castore: save"),
    "files save / castore save, unchanged": ("files: save", "castore: save, unchanged"),
    "files load / castore load": ("files: load", "castore: load"),
    "files stall / castore stall": ("files: stall", "castore: stall"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6, help="layers of the state; 6 are 1 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    folder = [tempfile.mkdtemp(prefix="castore-ranks-", dir=os.environ.get("TMPDIR"))]
    dist.broadcast_object_list(folder)
    bench = Bench(Path(folder[0]), options.layers)
    bench.round()  # imports, first allocations
    rounds = [bench.round() for _ in range(options.rounds)]
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
        seconds = {name: round(statistics.median(one[name] for one in rounds), 3) for name in rounds[0]}
        ratios = {
            name: [
                round(pick([one[above] / one[below] for one in rounds]), 2) for pick in (min, statistics.median, max)
            ]
            for name, (above, below) in RATIOS.items()
        }
        result = {"ranks": dist.get_world_size(), "bytes": bench.bytes, "seconds": seconds, "ratios": ratios}
        if options.json:
            print(json.dumps(result))
        else:
            print(f"{bench.bytes / 1e6:,.0f} MB on {dist.get_world_size()} ranks, medians of {options.rounds} rounds")
            for name, value in seconds.items():
                print(f"{name:28} {value:7.3f} s")
            for name, (low, middle, high) in ratios.items():
                print(f"{name:38} {middle:6.2f}  ({low:.2f} to {high:.2f})")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
