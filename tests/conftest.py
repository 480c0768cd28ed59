from __future__ import annotations

import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from castore import Repo

if TYPE_CHECKING:
    from bucket_service import BucketService

# a shell's background jobs ignore these, and so would every program that the tests start
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

hypothesis.settings.register_profile("suite", deadline=None, max_examples=60, database=None, print_blob=True)
hypothesis.settings.load_profile("suite")

FAST = '[store]\nchunk_size = "64KiB"\nthreads = 2\nfsync = false\nlock_timeout = 0.2\n[retention]\nauto_gc = false\n'


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    """A repository with small chunks that doesn't wait for the disk."""
    Repo.init(tmp_path)
    (tmp_path / ".castore" / "config.toml").write_text(FAST)
    return Repo.open(tmp_path)


@pytest.fixture
def state() -> Callable[..., dict[str, Any]]:
    """Makes the parts of a checkpoint: a tensor of several chunks, small ones, and plain values."""
    from builders import parts

    return parts


@pytest.fixture
def start() -> Iterator[Callable[..., BaseProcess]]:
    """Starts a function of a test module in a process of its own, which is gone when the test is over.

    The processes are forked from a clean one that has torch loaded already: it takes longer to import than to test.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "castore.torch",
            "castore.dcp_storage",
            "torch.distributed.fsdp",
            "torch.distributed.tensor.parallel",
            "torch._dynamo",  # which the first DTensor loads
            "nanecho.train",
            "pytest",
            "hypothesis",
        ]
    )
    started: list[BaseProcess] = []

    def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
        process = context.Process(target=target, args=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
        process.close()


@pytest.fixture(scope="session")
def _bucket_service() -> Iterator[BucketService]:
    from bucket_service import BucketService

    with BucketService() as service:
        yield service


@pytest.fixture
def s3(_bucket_service: BucketService, monkeypatch: pytest.MonkeyPatch) -> BucketService:
    """An S3 service that works, its credentials in the environment. All tests share one bucket."""
    from bucket_service import harmless

    for name, value in _bucket_service.environment().items():
        monkeypatch.setenv(name, value)
    _bucket_service.harm = harmless
    _bucket_service.requests.clear()
    return _bucket_service


@pytest.fixture
def rng() -> random.Random:
    return random.Random(20)
