"""Time `castore log`, `castore resolve` and `castore gc --dry-run` over many manifests, start-up included.

python bench/catalog.py [COUNT ...]          # default: 1,000 and 10,000 manifests; medians of five runs
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import castore
from castore.format import manifest
from castore.format.ids import hash_bytes

RUNS = 5


def fill(repo: castore.Repo, count: int) -> None:
    """Add ``count`` manifests like nanecho's; only the newest hundred have their data."""
    experiment = castore.Experiment(model={"n_layer": 4, "n_embd": 128}, tokenizer="ab" * 32, data="cd" * 32)
    config = {f"option_{i}": i / 10 for i in range(25)}
    for step in range(count):
        metrics = {"val_loss": 5.0 - 4.0 * step / count, "val_accuracy": step / count}
        if step >= count - 100:
            repo.save(
                {"model": {"step": step}}, run="main", step=step, metrics=metrics, experiment=experiment, config=config
            )
            continue
        parts = {
            name: manifest.Part(index=hash_bytes(f"{step}{name}".encode()), bytes=1 << 20, stored_bytes=1 << 19)
            for name in ("model", "optimizer", "trainer")
        }
        created = f"2026-01-01T00:00:00.{step:06d}Z"
        checkpoint = manifest.Manifest(
            run="main", step=step, created=created, parts=parts, metrics=metrics, experiment=experiment, config=config
        )
        repo.catalog.add(checkpoint)


def main() -> None:
    program = str(Path(sys.executable).with_name("castore"))
    for count in [int(text) for text in sys.argv[1:]] or [1_000, 10_000, 100_000]:
        with tempfile.TemporaryDirectory() as folder:
            repo = castore.Repo.init(folder)
            config = repo.root / "config.toml"
            config.write_text(config.read_text().replace("fsync = true", "fsync = false"))
            fill(castore.Repo.open(folder), count)
            time.sleep(3)  # manifests younger than that are read again, not taken from the cache
            for command in (["log"], ["resolve"], ["gc", "--dry-run"])[: 3 if count <= 10_000 else 2]:
                subprocess.run([program, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
                seconds = []
                for _ in range(RUNS):
                    begun = time.perf_counter()
                    subprocess.run([program, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
                    seconds.append(time.perf_counter() - begun)
                print(f"{count:6,} manifests  castore {' '.join(command):14} {statistics.median(seconds):.3f} s")


if __name__ == "__main__":
    main()
