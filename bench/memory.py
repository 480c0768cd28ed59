"""Measure the peak memory of one save or load beside the state itself, for bench/suite.py: one process for each.

python bench/memory.py save|load FORMAT FOLDER STATE_BYTES      # prints bytes
"""

from __future__ import annotations

import sys
from pathlib import Path

import peers
import states
import torch


def memory(field: str) -> int:
    """VmRSS or VmHWM. Not ru_maxrss: a child's begins at the peak of the process that started it."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def main() -> None:
    action, name, place, size = sys.argv[1:]
    torch.set_num_threads(peers.THREADS)
    peer, folder = peers.FORMATS[name], Path(place)
    # loading needs only its shapes, which take no memory
    with torch.device("cpu" if action == "save" else "meta"):
        state = states.large(int(size))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    before = memory("VmRSS")
    if action == "save":
        peer.save(state, folder, durable=True)
        print(memory("VmHWM") - before)
    else:
        loaded = peer.load(folder, state)
        print(memory("VmHWM") - before - states.nbytes(loaded))


if __name__ == "__main__":
    main()
