"""Ranks for tests: processes that call one function together, connected by gloo."""

from __future__ import annotations

import os
import pickle
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Start = Callable[..., BaseProcess]


@dataclass(frozen=True)
class Raised:
    """What a rank ended with in place of a result."""

    kind: str
    message: str


@dataclass(frozen=True)
class Died:
    """A rank that left nothing behind."""

    exit_code: int | None


def run(
    start: Start,
    folder: Path,
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float = 90,
    awaited: Collection[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call ``function(rank, *arguments)`` on ``size`` ranks; return what each returned, Raised or Died.

    Only the ``awaited`` ones are waited for, all when None.
    """
    meeting = folder / f"ranks-{uuid.uuid4().hex}"
    meeting.mkdir()
    given = {
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "test",
    }
    processes = [
        start(
            _rank, rank, size, meeting, {**given, "LOCAL_RANK": str(rank), **(environment or {})}, function, arguments
        )
        for rank in range(size)
    ]
    deadline = time.monotonic() + seconds
    for rank, process in enumerate(processes):
        if awaited is None or rank in awaited:
            process.join(max(0.0, deadline - time.monotonic()))
    results = []
    for rank, process in enumerate(processes):
        file = meeting / str(rank)
        results.append(pickle.loads(file.read_bytes()) if file.exists() else Died(process.exitcode))
    return results


def _rank(
    rank: int,
    size: int,
    meeting: Path,
    environment: Mapping[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=size, timeout=wait)
    try:
        result = function(rank, *arguments)
    except Exception as error:
        result = Raised(type(error).__name__, str(error))
    (meeting / f"{rank}.new").write_bytes(pickle.dumps(result))
    os.rename(meeting / f"{rank}.new", meeting / str(rank))
    os._exit(0)  # as a program that doesn't wait for its process groups
