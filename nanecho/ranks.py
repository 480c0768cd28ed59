"""The processes that train one model together, as torchrun starts them: what each of them does of a step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from castore import errors
from castore.dcp import Ranks, ranks_of
from castore.errors import UsageError

_T = TypeVar("_T")


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes that torchrun started, for the time of the block; without it, be alone."""
    if not is_launched():
        yield Ranks()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ranks_of()
    finally:
        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether torchrun started this process beside others."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def local_rank() -> int:
    """Return this process's number on its machine, 0 if it is alone."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def local_size() -> int:
    """Return how many processes torchrun started on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_launched() else 1


def first_then_others(ranks: Ranks, function: Callable[[], _T]) -> _T:
    """Call ``function`` on one rank of each machine, and then on the others, which find what it has left."""
    results: list[_T] = []

    def call(is_turn: bool) -> None:
        if is_turn:
            results.append(function())

    ranks.together(lambda: call(local_rank() == 0))
    ranks.together(lambda: call(local_rank() != 0))
    return results[0]


def rows_of(rows: range, ranks: Ranks) -> range:
    """Return the rows of a batch that this rank computes: as many as every other, but for the last ones.

    >>> rows_of(range(4, 8), Ranks())
    range(4, 8)
    """
    each = -(-len(rows) // ranks.size)
    return rows[ranks.rank * each : (ranks.rank + 1) * each]


def check_batch(batch_size: int, ranks: Ranks) -> None:
    """Raise UsageError unless a batch can be shared out evenly, so that the mean over ranks is that of the batch."""
    if batch_size % ranks.size:
        raise UsageError(f"--batch-size {batch_size} can't be shared out evenly to {ranks.size} ranks")


def shard(model: nn.Module, blocks: nn.ModuleList) -> None:
    """Shard a model over the ranks (FSDP2): each block is gathered when it is needed."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks:
        fully_shard(block)
    fully_shard(model)


def replicate(model: nn.Module, device: torch.device) -> nn.parallel.DistributedDataParallel:
    """Return a model whose gradients are averaged over the ranks (DDP)."""
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor, in the same memory."""
    whole: Any = tensor
    return whole.to_local() if hasattr(whole, "to_local") else tensor


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank has of another one of the same shape."""
    sharded: Any = like
    if not hasattr(sharded, "to_local"):
        return whole
    boxes = sharded.__create_chunk_list__()
    if not boxes or not all(boxes[0].sizes):
        return whole.new_empty(local(like).shape)
    return whole[tuple(slice(at, at + size) for at, size in zip(boxes[0].offsets, boxes[0].sizes, strict=True))]


def gathered(ranks: Ranks, *values: float, device: torch.device) -> list[list[float]]:
    """Return the numbers that each rank gave, in the order of the ranks."""
    if ranks.size == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    shared = [torch.empty_like(own) for _ in range(ranks.size)]
    try:
        dist.all_gather(shared, own)
    except RuntimeError as error:
        raise errors.RankFailed(None, str(error).splitlines()[0]) from error
    return [one.tolist() for one in shared]
