from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from memory import PEAK

from castore import Repo

MIB = 1 << 20
STATE, LIMIT = 600 * MIB, 256 * MIB

SAVE = """
import sys, torch, castore
# a large tensor, many small ones, and one that is not dense: each takes another way
state = {"noise": torch.empty(90 << 20).normal_(std=0.02), "zeros": torch.zeros(40 << 20, dtype=torch.int16),
         "small": [torch.ones(1000) for _ in range(2000)], "view": torch.empty(6000, 6000).normal_().T}
state["zeros"] += 1
before = peak()
size = sum(t.numel() * t.element_size() for t in [state["noise"], state["zeros"], state["view"], *state["small"]])
saved = castore.Repo.open(sys.argv[1]).save({"model": state}, run="ci", step=1)
print(saved.id, size, peak() - before)
"""
LOAD = """
import sys, torch, castore
before = peak()
state = castore.Repo.open(sys.argv[1]).load(sys.argv[2])["model"]
size = sum(t.numel() * t.element_size() for t in [state["noise"], state["zeros"], state["view"], *state["small"]])
print(sys.argv[2], size, peak() - before - size)
"""


def run(script: str, *arguments: str) -> tuple[str, int, int]:
    program = [sys.executable, "-c", PEAK + script]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    checkpoint_id, size, extra = done.stdout.split()
    return checkpoint_id, int(size), int(extra)


@pytest.mark.slow
def test_saving_and_loading_take_little_memory_beside_the_state_itself(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    (repo.root / "config.toml").write_text('[store]\nchunk_size = "4MiB"\nthreads = 8\nfsync = false\n')
    checkpoint_id, size, extra = run(SAVE, str(tmp_path))
    assert size > 0.95 * STATE
    assert extra < LIMIT
    _, loaded, extra = run(LOAD, str(tmp_path), checkpoint_id)
    assert loaded == size
    assert extra < LIMIT


RESUME = """
import sys, torch, castore
from castore.torch import Checkpointer
model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(6)))  # 403 MB
checkpointer = Checkpointer(castore.Repo.open(sys.argv[1]), model, run="r")
if sys.argv[2] == "save":
    with checkpointer:
        checkpointer.save(1, {"val_loss": 1.0})
    print("saved", sum(value.double().sum().item() for value in model.state_dict().values()), 0)
else:
    before = peak()
    assert checkpointer.resume() == 1
    extra = peak() - before
    print("loaded", sum(value.double().sum().item() for value in model.state_dict().values()), extra)
"""


@pytest.mark.slow
def test_a_model_is_resumed_where_it_is_and_is_never_in_memory_twice(tmp_path: Path) -> None:
    (Repo.init(tmp_path).root / "config.toml").write_text("[store]\nthreads = 2\nfsync = false\n")
    results = []
    for action in ("save", "resume"):
        program = [sys.executable, "-c", PEAK + RESUME, str(tmp_path), action]
        results.append(subprocess.run(program, capture_output=True, text=True, check=True).stdout.split())
    assert results[0][1] == results[1][1]
    assert int(results[1][2]) < 100 * MIB, results
