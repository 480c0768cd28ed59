"""Compare durable saves and loads of this version with those of another commit, in turn on the same machine.

python bench/against.py COMMIT [MB]    # 1,500 MB of fp32 unless told otherwise
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 7
WORKER = """
import os, shutil, sys, tempfile, time
sys.path.insert(0, sys.argv[1])
import torch, castore
assert castore.__file__.startswith(sys.argv[1])
torch.manual_seed(0)
state = {f"t{i}": torch.randn(1024, 1024) * 0.02 for i in range(max(1, int(sys.argv[2]) * 1000_000 >> 22))}
spare = {key: torch.zeros_like(value) for key, value in state.items()}
size = sum(tensor.nbytes for tensor in state.values())
folder = tempfile.mkdtemp(dir=".")
repo = castore.Repo.init(folder)
(repo.root / "config.toml").write_text("[store]\\nthreads = 2\\n")
repo = castore.Repo.open(folder)
print("ready", flush=True)
for line in sys.stdin:
    for tensor in state.values():
        tensor.mul_(1.001)
    os.sync()
    begun = time.perf_counter()
    saved = repo.save({"model": state}, run="bench", step=int(line))
    save = time.perf_counter() - begun
    load_into = getattr(repo, "load_into", None) or (lambda selector, target: repo.load(selector, into=target))
    for _ in range(2):  # from the disk, if the save left the cache alone
        load_into(saved.id, {"model": spare})
    begun = time.perf_counter()
    load_into(saved.id, {"model": spare})
    load = time.perf_counter() - begun
    shutil.rmtree(repo.root / "objects")
    os.mkdir(repo.root / "objects")
    print(size / 1e6 / save, size / 1e6 / load, flush=True)
shutil.rmtree(folder)
"""


def start(source: Path, folder: str, size: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(source), size]
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def measure(process: subprocess.Popen[str], step: int) -> tuple[float, float]:
    """Return MB/s of a save and of a load into memory that is there, page cache warm."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{step}\n")
    process.stdin.flush()
    save, load = map(float, process.stdout.readline().split())
    return save, load


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    root = Path(__file__).resolve().parents[1]
    commit, size = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "1500"
    build = root / "build" / "bench"
    build.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        subprocess.run(["git", "init", "--quiet", folder], check=True)
        other = Path(folder) / "other"
        subprocess.run(
            ["git", "-C", str(root), "worktree", "add", "--quiet", "--detach", str(other), commit], check=True
        )
        try:
            workers = {"this": start(root, folder, size), commit: start(other, folder, size)}
            for process in workers.values():
                measure(process, 0)
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
            for number in range(1, ROUNDS + 1):
                for name in list(workers) if number % 2 else list(reversed(workers)):
                    found[name].append(measure(workers[name], number))
            for process in workers.values():
                process.communicate()
        finally:
            subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(other)], check=False)
    for column, action in enumerate(("durable save", "load into memory that is there, hot")):
        ours, theirs = ([round_[column] for round_ in found[name]] for name in workers)
        ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
        told = {name: round(statistics.median(values)) for name, values in (("this", ours), (commit, theirs))}
        print(f"{action}: {json.dumps(told)} MB/s, {ratio:.2f} times")


if __name__ == "__main__":
    main()
