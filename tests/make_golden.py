"""Make the golden repository of format version 1 and the golden object of frame version 2.

Run: `python tests/make_golden.py`.

Run once per format version. A committed golden repository never changes, since it stands for repositories in use; a new
format version gets a golden repository of its own. The contents come from SHAKE-256 and exact arithmetic, so that they
do not depend on the random numbers of a library.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
import tempfile
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

import castore
from castore.format.frame import encode_frame

Pair = namedtuple("Pair", "left right", module="of_no_module")
GOLDEN = Path(__file__).parent / "golden" / "v1"
SPARSE = GOLDEN.parent / "v2"
"""Holds an object of frame version 2, in the sparse codec."""
CONFIG = '[store]\nchunk_size = "64KiB"\n'
SHOWN = 64
"""Tensors of up to this many bytes are written out in expected.json, larger ones are represented by their hash."""


def states() -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the parts of each checkpoint, and the other fields of its manifest."""
    experiment = castore.Experiment(
        model={"layers": 2, "dropout": 0.0, "activation": "gelu", "bias": False, "rope": None, "theta": 1e16},
        tokenizer="0a" * 32,
        data="0b" * 32,
        evaluation={"data": "0c" * 32, "samples": 64, "seed": 1337},
        metrics={
            "accuracy": castore.Metric(low=0.0, high=1.0),
            "bleu": castore.Metric(),
            "latency": castore.Metric(direction="min", low=1e-7, high=250.0),
        },
    )
    config = {
        "learning_rate": 1.5e-05,
        "floats": [0.0, -0.0, 1.0, 1e-05, 1e-06, 1e15, 1e16, 123456789012345680.0, 5e-324, 1.7976931348623157e308],
        "integers": [0, -1, 2**63 - 1, -(2**63)],
        "texts": ["", "Grüße, 世界 😀", 'quote " backslash \\ slash /', "\x00\x07\x08\t\n\x0b\x0c\r\x1f\x7f\u2028"],
        "nested": {"empty": {}, "list": [[], [True, False, None]], "é": 1, "z": 2, "\ue000": 3, "😀": 4, "Z": 5},
    }
    common = {"run": "golden", "experiment": experiment, "config": config}
    for step in (100, 200):
        yield (
            {"model": model(step), "optimizer": optimizer(step), "trainer": trainer(step)},
            common
            | {
                "step": step,
                "created": datetime(2025, 1, 2, 3, 4, 5, step, tzinfo=UTC),
                "metrics": {"val_loss": 250.0 / step, "accuracy": 0.5, "latency": 1e-06},
                "tags": ["golden", "first"] if step == 100 else [],
                "note": "every kind of value" if step == 100 else "",
                "info": {"tokens": step * 4096, "seconds": 0.25},
            },
        )


def model(step: int) -> OrderedDict[str, Any]:
    """Return weights: every number width of the codecs, tied tensors, tensors over several chunks, rare dtypes."""
    embedding = floats("embedding", (160, 240), torch.float32)
    state = OrderedDict(
        [
            ("embedding", embedding),
            ("head", embedding),
            ("attention", floats("attention", (40, 900), torch.bfloat16)),
            ("norm", floats(f"norm {step}", (300,), torch.float32)),
            ("bias", floats("bias", (300,), torch.bfloat16)),
            ("half", floats("half", (2, 3), torch.float16)),
            ("transposed", floats("transposed", (3, 5), torch.float32).t()),
            ("fourier", torch.complex(floats("real", (4,), torch.float32), floats("imaginary", (4,), torch.float32))),
            ("spectrum", torch.complex(floats("re", (2,), torch.float64), floats("im", (2,), torch.float64))),
            ("mask", torch.tensor([True, False, True])),
            ("scale", torch.tensor(0.125, dtype=torch.float64)),
            ("nothing", torch.empty(0, dtype=torch.float32)),
            ("flat", torch.empty((3, 0, 2), dtype=torch.int64)),
            ("special", torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])),
        ]
    )
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float8_e4m3fn"):
        dtype = getattr(torch, name)
        state[name] = torch.frombuffer(noise(name, 5 * dtype.itemsize), dtype=dtype)
    return state


def optimizer(step: int) -> dict[str, Any]:
    """Return an optimizer state: int keys, tuples, and a tensor of eight-byte numbers."""
    return {
        "state": {
            0: {"step": torch.tensor(float(step)), "exp_avg": floats("exp_avg 0", (5000,), torch.float64)},
            1: {"step": torch.tensor(float(step)), "exp_avg": floats(f"exp_avg 1 {step}", (70,), torch.float64)},
        },
        "param_groups": [{"lr": 3e-4, "betas": (0.9, 0.95), "fused": None, "maximize": False, "params": [0, 1]}],
    }


def trainer(step: int) -> dict[str, Any]:
    """Return every other kind of value; random bytes, which no codec shrinks, and a counter, which zstd does."""
    (odd_nan,) = struct.unpack("<d", struct.pack("<Q", 0xFFF8000000001234))
    return {
        "step": step,
        "rng": torch.frombuffer(noise("rng", 40_000), dtype=torch.uint8),
        "order": torch.arange(6000, dtype=torch.int64) // 7,
        "integers": [0, -1, 127, 128, 2**63, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 2**200, -(2**71)],
        "floats": [0.1, -0.0, float("nan"), odd_nan, float("inf"), -float("inf"), 5e-324],
        "complex": [complex(1.5, -0.0), complex(float("inf"), odd_nan)],
        "texts": ["", "Grüße, 世界 😀", "\x00\x7f\u2028", "x" * 300],
        "bytes": [b"", b"\x00\xff", bytes(range(256))],
        "objects": {
            "milestones": Counter({30: 1, 80: 2}),
            "default": defaultdict(int, a=1),
            "free": defaultdict(None),
            "pair": Pair(1.5, torch.arange(3)),
            "array": np.arange(6, dtype=">i4").reshape(2, 3),
            "scalars": [np.float32(0.1), np.int8(-3), np.bool_(True), np.complex64(1 - 2j), np.float16(0.5)],
            "size": torch.Size([2, 3]),
            "dtype": torch.bfloat16,
            "device": torch.device("cuda", 1),
        },
        "empty": [[], (), {}, OrderedDict()],
        "keys": {1: "one", "1": "text", -1: "minus one", 2**70: "big", "": "nothing"},
        "nested": OrderedDict(b=(True, [None, ({"deep": (False,)},)]), a=False),
    }


def noise(label: str, size: int) -> bytearray:
    """Return ``size`` pseudo-random bytes determined by ``label``."""
    return bytearray(hashlib.shake_256(label.encode()).digest(size))


def floats(label: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return numbers distributed like trained weights: sums of four uniform ones, exact in float64 before rounding."""
    count = int(np.prod(shape))
    uniform = np.frombuffer(noise(label, 16 * count), dtype="<u4").reshape(4, count)
    return torch.from_numpy((uniform.astype(np.float64).sum(axis=0) - 2.0**33) * 2.0**-38).to(dtype).reshape(shape)


# -- the expected content, expressed in JSON -------------------------------------------------------------------------


def describe(state: Any) -> dict[str, Any]:
    """Return a state as JSON that keeps every bit and every type; tensors are numbered by first occurrence."""
    tensors: list[torch.Tensor] = []
    value = _describe(state, tensors)
    return {"value": value, "tensors": [_describe_tensor(tensor) for tensor in tensors]}


def _describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        numbers = [number for number, known in enumerate(tensors) if known is value]
        if not numbers:
            tensors.append(value)
        return {"tensor": numbers[0] if numbers else len(tensors) - 1}
    kind = type(value)
    if items := _object_items(value):
        return {"object": [_describe(item, tensors) for item in items]}
    if kind in (list, tuple):
        return {kind.__name__: [_describe(item, tensors) for item in value]}
    if kind in (dict, OrderedDict):
        return {kind.__name__: [[_describe(key, tensors), _describe(item, tensors)] for key, item in value.items()]}
    if kind is float:
        return {"float": repr(value), "bits": struct.pack(">d", value).hex()}
    if kind is complex:
        return {"complex": [struct.pack(">d", half).hex() for half in (value.real, value.imag)]}
    if kind is int:
        return {"int": str(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    return value


def _object_items(value: Any) -> list[Any]:
    """Return the kind and the items of a value that is stored as an OBJECT; nothing for any other."""
    kind = type(value)
    if kind is Counter:
        return ["collections.Counter", dict(value)]
    if kind is defaultdict:
        return ["collections.defaultdict", getattr(value.default_factory, "__name__", None), dict(value)]
    if hasattr(kind, "_fields"):
        return ["namedtuple", f"{kind.__module__}:{kind.__qualname__}", kind._fields, tuple(value)]
    if kind is np.ndarray:
        return ["numpy.ndarray", value.dtype.str, torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))]
    if isinstance(value, np.generic):
        return ["numpy.generic", value.dtype.name, value.item()]
    if kind is torch.Size:
        return ["torch.Size", tuple(value)]
    if kind in (torch.dtype, torch.device):
        return [f"torch.{kind.__name__}", str(value).removeprefix("torch.")]
    return []


def _describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    content = {"bytes": data.hex()} if len(data) <= SHOWN else {"blake3": blake3(data).hexdigest()}
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), **content}


def main() -> None:
    if GOLDEN.exists() and SPARSE.exists():
        sys.exit(f"{GOLDEN.parent} is complete: what is golden is never made again")
    if not GOLDEN.exists():
        make_repository()
    if not SPARSE.exists():
        make_sparse_object()


def make_sparse_object() -> None:
    numbers = floats("sparse", (3000,), torch.float32).numpy()
    numbers[np.frombuffer(noise("zeros", 3000), dtype=np.uint8) > 90] = 0
    plain = numbers.tobytes()
    SPARSE.mkdir()
    (SPARSE / blake3(plain).hexdigest()).write_bytes(encode_frame(plain, numbers.itemsize))


def make_repository() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / ".castore"
        root.mkdir()
        (root / "config.toml").write_text(CONFIG)
        repo = castore.Repo.init(folder)
        checkpoints = []
        parent = None
        for parts, about in states():
            saved = repo.save(parts, parent=parent, **about)
            parent = saved.id
            checkpoints.append(
                {
                    "id": saved.id,
                    "file": str(saved.path.relative_to(root)),
                    "manifest": json.loads(saved.path.read_bytes()),
                    "parts": {name: describe(state) for name, state in parts.items()},
                }
            )
        # the repository's own .gitignore would keep the objects out of git
        excluded = shutil.ignore_patterns(".gitignore", ".gitattributes", ".gitkeep", "tmp", "lock")
        shutil.copytree(root, GOLDEN / "castore", ignore=excluded)
    files = sorted(path for path in (GOLDEN / "castore").rglob("*") if path.is_file())
    expected = {
        "checkpoints": checkpoints,
        "files": {str(path.relative_to(GOLDEN / "castore")): _describe_file(path.read_bytes()) for path in files},
    }
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe_file(data: bytes) -> dict[str, Any]:
    about: dict[str, Any] = {"bytes": len(data), "blake3": blake3(data).hexdigest()}
    if data[:4] == b"CSTO":
        about |= {"codec": ("raw", "zstd", "planes")[data[5]], "plain": struct.unpack_from("<Q", data, 8)[0]}
    return about


if __name__ == "__main__":
    main()
