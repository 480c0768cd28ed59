"""The states that bench/suite.py saves and loads: synthetic ones in the shape of GPT-2, and trained ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import castore
from nanecho import config as configs
from nanecho import events, train

State = dict[str, dict[str, Tensor]]
"""part -> key -> tensor."""

CHECKPOINTS, STEPS_APART = 9, 50

_TRAINED: dict[str, Any] = {
    "connection_ratio": 1.0,  # a dense model, so that zeros don't flatter the figures
    "block_size": 64, "eval_samples": 8, "warmup_iters": 20, "max_iters": 100_000, "resume": "none",
    "session_iters": CHECKPOINTS * STEPS_APART, "eval_every": STEPS_APART, "save_every": STEPS_APART,
    "min_improvement": 1e38, "device": "cpu",
}  # fmt: skip
_SHAPES: dict[bool, dict[str, Any]] = {
    True: {"n_layer": 4, "n_embd": 256, "batch_size": 2},
    False: {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 8},
}


def gpt2(width: int = 768, vocabulary: int = 50_257, layers: int = 12, context: int = 1024) -> dict[str, list[int]]:
    """Return the shapes of GPT-2's weights: 148 of them for 12 layers."""
    shapes = {"wte.weight": [vocabulary, width], "wpe.weight": [context, width]}
    for layer in range(layers):
        for name, rows, columns in (
            ("attn.c_attn", 3 * width, width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            shapes[f"h.{layer}.{name}.weight"] = [rows, columns]
            shapes[f"h.{layer}.{name}.bias"] = [rows]
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{layer}.{name}.weight"] = [width]
            shapes[f"h.{layer}.{name}.bias"] = [width]
    return shapes | {"ln_f.weight": [width], "ln_f.bias": [width]}


def synthetic(shapes: dict[str, list[int]], dtype: torch.dtype = torch.float32) -> State:
    """Return normal weights and both of AdamW's moments, whose magnitudes are lognormal.

    Good for timing; how well it compresses says little about a trained state.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(shape: list[int], std: float) -> Tensor:
        return torch.empty(shape).normal_(std=std, generator=generator)

    state: State = {"model": {}, "optimizer": {}}
    for name, shape in shapes.items():
        weight = normal(shape, 0.02)
        if ".ln_" in name or name.startswith("ln_"):
            weight += name.endswith("weight")
        spread = normal(shape, 1.0).exp_()
        state["model"][name] = weight.to(dtype)
        state["optimizer"][f"exp_avg.{name}"] = normal(shape, 1e-4).mul_(spread).to(dtype)
        state["optimizer"][f"exp_avg_sq.{name}"] = spread.square_().mul_(1e-9).to(dtype)
    return state


def large(size: int) -> State:
    """Return about ``size`` bytes in tensors of 100 MB and a thousand small ones, no two equal; made fast."""
    base = torch.empty(25_000_000).normal_(std=0.02)
    count = max(1, size // (base.numel() * 4))
    return {
        "model": {f"large.{i}": base * (1 + i / 1000) for i in range(count)},
        "optimizer": {f"small.{i}": base[i * 100 : i * 100 + 1000].clone() for i in range(1000)},
    }


def empty_like(state: State) -> State:
    """Return uninitialised tensors of the same shapes, in main memory."""
    return {
        part: {key: torch.empty_like(tensor, device="cpu") for key, tensor in values.items()}
        for part, values in state.items()
    }


def copy(state: Any) -> Any:
    """Return a copy of the state."""
    return mapped(state, torch.Tensor.clone)


def mapped(state: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the state with each tensor replaced by ``function`` of it."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: mapped(value, function) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(mapped(value, function) for value in state)
    return state


def tensors(state: Any) -> Iterator[Tensor]:
    """Yield every tensor of a state, in order."""
    collected: list[Tensor] = []
    mapped(state, collected.append)
    yield from collected


def nbytes(state: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors(state))


def equal(left: Any, right: Any) -> bool:
    """Return whether both have equal tensors in the same order."""
    pairs = zip(tensors(left), tensors(right), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# -- trained states -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint of a nanecho run: the arguments of a save of it."""

    step: int
    metrics: dict[str, float]
    experiment: castore.Experiment
    parts: dict[str, Any]


def trained(cache: Path, quick: bool, say: Callable[[str], None]) -> Iterator[Trained]:
    """Yield nine consecutive checkpoints, 50 steps apart, oldest first; they are trained once and kept in ``cache``."""
    options = _TRAINED | _SHAPES[quick]
    name = json.dumps([options, castore.__version__, torch.__version__], sort_keys=True)
    folder = cache / f"trained-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    repo = castore.Repo.init(folder)
    if len(repo.checkpoints()) != CHECKPOINTS:
        shutil.rmtree(folder)  # left by a training that was interrupted
        repo = castore.Repo.init(folder)
        (repo.root / "config.toml").write_text("[store]\nfsync = false\n[retention]\nauto_gc = false\n")
        repo = castore.Repo.open(folder)
        for event in train.train(repo, configs.make(options), started="2026-01-01T00:00:00.000000Z"):
            if isinstance(event, events.Stepped) and event.step % STEPS_APART == 0:
                say(f"training, step {event.step} of {CHECKPOINTS * STEPS_APART}, loss {event.loss:.2f}")
    for entry in reversed(repo.checkpoints()):
        manifest = entry.manifest
        yield Trained(manifest.step, dict(manifest.metrics), manifest.experiment, repo.load(entry.id))
