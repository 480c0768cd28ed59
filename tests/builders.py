"""Builders of manifests, states and data that several test modules use, and exact comparisons."""

from __future__ import annotations

import array
import os
import random
import stat
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from castore.format import codecs
from castore.format.ids import hash_bytes
from castore.format.manifest import Entry, Manifest, Part, encode


def manifest(step: int = 1, **fields: Any) -> Manifest:
    """Return a valid manifest; later steps are created later. ``fields`` replace those of the default."""
    defaults = {
        "run": "ci",
        "created": f"2026-01-02T03:04:05.{int(step) % 1_000_000:06d}Z",
        "parts": {"model": Part(index="ab" * 32, bytes=10, stored_bytes=9)},
    }
    return Manifest(step=step, **{**defaults, **fields})


def entry(step: int = 1, **fields: Any) -> Entry:
    """Return :func:`manifest` with its id."""
    built = manifest(step, **fields)
    return Entry(hash_bytes(encode(built)), built)


def parts(seed: int = 0) -> dict[str, Any]:
    """Return the parts of a checkpoint: a tensor of several chunks, small ones, a tied one, and plain values."""
    generator = torch.Generator().manual_seed(seed)
    big = torch.randn(50_000, generator=generator)
    model = {"big": big, "small": torch.randn(3, 5, generator=generator), "tied": big, "step": torch.tensor(seed)}
    return {"model": model, "trainer": {"seed": seed, "betas": (0.9, 0.95), "order": [3, 1, None], 7: b"\0"}}


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a dense tensor, reinterpreted as integers so that NumPy copies them unchanged."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.view(_BITS.get(tensor.element_size(), tensor.dtype)).numpy().tobytes()


def exact(value: Any) -> Any:
    """Return a value that is equal exactly for values that agree in every bit and type."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype, tuple(value.shape), bits(value)
    if kind is float:
        return kind, struct.pack("<d", value)
    if kind is complex:
        return kind, struct.pack("<dd", value.real, value.imag)
    if kind in (list, tuple):
        return kind, [exact(item) for item in value]
    if kind in (dict, OrderedDict):
        return kind, [(exact(key), exact(item)) for key, item in value.items()]
    return kind, value


def trained(count: int, seed: int = 0) -> bytes:
    """Return ``count`` float32 numbers distributed like trained weights, as bytes."""
    rng = random.Random(seed)
    return array.array("f", [rng.gauss(0, 0.02) for _ in range(count)]).tobytes()


def sparse(count: int, present: float) -> bytes:
    """Return ``count`` trained floats, of which the share ``present`` isn't zero."""
    rng = random.Random(count)
    floats = trained(count)
    return b"".join(floats[4 * i : 4 * i + 4] if rng.random() < present else bytes(4) for i in range(count))


def encoded(plain: bytes, itemsize: int = 1) -> tuple[int, bytes]:
    """Return (codec, payload)."""
    out = bytearray(len(plain) + codecs.OVERHEAD)
    codec, length = codecs.encode(plain, itemsize, memoryview(out))
    return codec, bytes(out[:length])


def tree(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return (inode, modification time, content) of every file below ``root``."""
    files_by_path = {}
    for folder, _, files in os.walk(root):
        for file in files:
            path = Path(folder, file)
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            files_by_path[str(path.relative_to(root))] = (status.st_ino, status.st_mtime_ns, content)
    return files_by_path
