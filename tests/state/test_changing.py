"""Memory that others write to while it is saved is never stored under the id of other bytes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact

from castore import Repo
from castore.errors import StateChanged
from castore.format.ids import hash_bytes
from castore.torch import AsyncSaver
from castore.verify import verify


def change_after_the_first_hash(monkeypatch: pytest.MonkeyPatch, tensor: torch.Tensor) -> None:
    calls: list[int] = []

    def hash_and_change(data: Any) -> Any:
        hashed = hash_bytes(data)
        if len(data) == tensor.nbytes and not calls:
            calls.append(1)
            tensor.add_(1)
        return hashed

    monkeypatch.setattr("castore.storage.object_store.hash_bytes", hash_and_change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)  # planes, and as it is
def test_a_tensor_that_changes_between_hashing_and_encoding_fails_the_save(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = (torch.rand(16_000, generator=generator) * 100).to(dtype)
    change_after_the_first_hash(monkeypatch, tensor)
    with pytest.raises(StateChanged, match=r'model\["weights"\] changed while it was saved, so nothing was'):
        repo.save({"model": {"other": 1, "weights": tensor}}, run="r", step=1)
    assert repo.checkpoints() == []
    assert list(verify(repo)) == []
    monkeypatch.undo()
    saved = repo.save({"model": {"weights": tensor}}, run="r", step=1)
    assert exact(repo.load(saved.id)["model"]["weights"]) == exact(tensor)


def test_a_tensor_that_changes_where_others_did_not_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is expected to be there already is hashed where it is, and copied when it proves to be new."""
    (Repo.init(tmp_path).root / "config.toml").write_text("[store]\nthreads = 1\n")
    repo = Repo.open(tmp_path)
    frozen, tensor = torch.arange(8_000.0), torch.arange(16_000.0)
    # parts are stored one after another, and the first has made the writer expect what it has
    repo.save({"model": {"frozen": frozen}}, run="r", step=1)
    change_after_the_first_hash(monkeypatch, tensor)
    with pytest.raises(StateChanged):
        repo.save({"model": {"frozen": frozen}, "optimizer": {"weights": tensor}}, run="r", step=2)
    assert list(verify(repo)) == []


def test_a_save_in_the_background_reads_a_copy_that_nobody_writes_to(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.arange(16_000.0)
    expected = exact(tensor.clone())
    change_after_the_first_hash(monkeypatch, tensor)
    with AsyncSaver(repo) as saver:
        saver.save({"model": {"weights": tensor}}, run="r", step=1)
    assert exact(repo.load("latest")["model"]["weights"]) == expected


def test_whatever_a_thread_writes_what_is_acknowledged_loads(repo: Repo) -> None:
    tensor = torch.rand(400_000)
    is_over = threading.Event()

    def train() -> None:
        while not is_over.is_set():
            tensor.mul_(1.0001)

    thread = threading.Thread(target=train)
    thread.start()
    outcomes = set()
    try:
        for step in range(20):
            try:
                saved = repo.save({"model": {"weights": tensor}}, run="r", step=step)
                repo.load(saved.id)
                outcomes.add("saved")
            except StateChanged:
                outcomes.add("refused")
    finally:
        is_over.set()
        thread.join()
    assert outcomes
    assert list(verify(repo)) == []
