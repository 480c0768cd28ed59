"""A reader in another language, made from FORMAT.md alone, finds what castore has saved."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import parts, sparse
from make_golden import describe

from castore import Repo

READER = Path(__file__).with_name("reader.mjs")
MODULES = Path(__file__).parents[2] / "build" / "peers" / "node_modules"
GOLDEN = Path(__file__).parents[1] / "golden"


def read(root: Path, *arguments: str) -> Any:
    command = ["node", str(READER), str(MODULES), str(root), *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def bits_alone(described: Any) -> Any:
    """Of a float, JavaScript's notation differs from Python's; its bits don't."""
    if isinstance(described, dict):
        return {name: bits_alone(value) for name, value in described.items() if name != "float"}
    return [bits_alone(value) for value in described] if isinstance(described, list) else described


def test_it_finds_everything_in_the_golden_repository() -> None:
    expected = json.loads((GOLDEN / "v1" / "expected.json").read_text(encoding="utf-8"))["checkpoints"]
    assert read(GOLDEN / "v1" / "castore") == {one["id"]: bits_alone(one["parts"]) for one in expected}


def test_it_reads_the_golden_sparse_object(tmp_path: Path) -> None:
    (golden,) = (GOLDEN / "v2").iterdir()
    (tmp_path / "objects" / golden.name[:2]).mkdir(parents=True)
    shutil.copy(golden, tmp_path / "objects" / golden.name[:2] / golden.name)
    assert read(tmp_path, golden.name) == golden.name


def test_it_finds_what_was_saved_a_moment_ago(repo: Repo) -> None:
    zeros = torch.from_numpy(np.frombuffer(bytearray(sparse(60_000, 0.1)), dtype="<f4"))
    states = [parts(seed) | {"optimizer": {"exp_avg": zeros * seed, "half": zeros.bfloat16()}} for seed in range(3)]
    saved = {repo.save(state, run="r", step=step).id: state for step, state in enumerate(states)}
    expected = {key: {name: bits_alone(describe(part)) for name, part in state.items()} for key, state in saved.items()}
    assert read(repo.root) == expected


def test_it_refuses_what_was_changed(repo: Repo) -> None:
    saved = repo.save(parts(), run="r", step=1)
    path = repo.store.path(saved.manifest.parts["trainer"].index)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(subprocess.CalledProcessError) as raised:
        read(repo.root)
    assert b"damaged: hash" in raised.value.stderr
