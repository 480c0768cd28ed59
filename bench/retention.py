"""Compare what gc leaves of a run of 50 trained checkpoints with ten full raw checkpoints.

python bench/retention.py        # a dense model, because zeros of a sparse one would flatter the figure
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import castore
from nanecho import config as configs
from nanecho import events, train

OPTIONS = {
    "n_layer": 2, "n_embd": 128, "connection_ratio": 1.0, "batch_size": 4, "eval_samples": 8, "warmup_iters": 20,
    "max_iters": 500, "session_iters": 0, "eval_every": 10, "save_every": 10, "log_every": 500,
}  # fmt: skip


def main() -> None:
    program = str(Path(sys.executable).with_name("castore"))
    with tempfile.TemporaryDirectory() as folder:
        repo = castore.Repo.init(folder)
        (repo.root / "config.toml").write_text("[store]\nfsync = false\n[retention]\nauto_gc = false\n")
        repo = castore.Repo.open(folder)
        for event in train.train(repo, configs.make(OPTIONS), started="2026-01-01T00:00:00.000000Z"):
            if isinstance(event, events.Finished):
                print(f"{len(event.summary.checkpoints)} checkpoints, validation loss {event.summary.final_loss:.3f}")
        raw = sum(part.bytes for part in repo.checkpoints()[0].manifest.parts.values())
        command = [program, "gc", "--keep", "10", "--keep-optimizer", "2"]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        print(done.stdout.splitlines()[-1])
        stored = sum(path.stat().st_size for path in (repo.root / "objects").glob("*/*"))
        data = [entry for entry in repo.catalog.listing().entries if entry.manifest.kind == "dataset"]
        prepared = sum(part.stored_bytes for entry in data for part in entry.manifest.parts.values())
        kept = stored - prepared
        print(
            f"{kept / 1e6:.1f} MB of checkpoints, ten full raw ones take {10 * raw / 1e6:.1f} MB: {kept / raw / 10:.1%}"
        )
        for entry in repo.checkpoints():
            states = repo.part_states(entry)
            repo.load(entry.id, parts=[name for name in states if states[name].where == "local"])
        print("what is kept loads, every byte verified")


if __name__ == "__main__":
    main()
