"""Measure saving and loading a state of very many tiny tensors: seconds, and memory beside the state.

python bench/tiny.py [COUNT]    # 200,000 tensors of 40 bytes unless told otherwise
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time

import torch

import castore


def resident(field: str) -> float:
    """MB of this process: ``VmRSS`` now, or ``VmHWM`` at most so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith(field))


def make(count: int) -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.full((10,), float(i)) for i in range(count)}


def measure(action: str, folder: str, count: int) -> dict[str, float]:
    repo = castore.Repo.open(folder)
    repo.save({"model": make(3)}, run="warm-up", step=0)
    repo.load("latest")
    before = resident("VmRSS")
    state = make(count)
    gc.collect()
    size = resident("VmRSS") - before
    if action == "load":
        del state
        gc.collect()
        before = resident("VmRSS")
    peak = resident("VmHWM")
    begun = time.perf_counter()
    if action == "save":
        repo.save({"model": state}, run="tiny", step=1)
    else:
        state = repo.load("tiny:latest")["model"]
    seconds = time.perf_counter() - begun
    beside = resident("VmHWM") - (peak if action == "save" else max(peak, before + size))
    return {"seconds": seconds, "state": size, "beside": beside}


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    with tempfile.TemporaryDirectory() as folder:
        castore.Repo.init(folder)
        for action in ("save", "load"):
            command = [sys.executable, __file__, action, folder, str(count)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{action} {count:,} tensors: {found['seconds']:.2f} s, {found['beside']:.0f} MB beside "
                f"{found['state']:.0f} MB of state"
            )


if __name__ == "__main__":
    main()
