"""Hostile bytes for every decoder: each may return a value or raise an error of castore, and take bounded memory.

    python tests/fuzz.py --seconds 60              # all of them, in turn
    python tests/fuzz.py --runs 1000000 index frame  # so many inputs, for these alone

The seeds are what castore writes, and tests/corpus, which keeps whatever once made a decoder fail. A run says how many
inputs each decoder has seen; one that fails is written to tests/corpus and named.
"""

# ruff: noqa: T201 - a program, too

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import multiprocessing
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import obstore.store
import torch
from safetensors.torch import save

from castore import Repo, config, convert
from castore.errors import CastoreError
from castore.format import bundle, manifest, part_index, tag
from castore.format.frame import decode_frame, encode_frame, plain_length
from castore.format.ids import ObjectId, hash_bytes
from castore.format.manifest import canonical
from castore.policy.fields import Filter
from castore.policy.selector import Selector
from castore.remotes import bucket, github_service, marks, packs
from castore.report.collect import _read_summaries
from castore.storage import git, git_process
from castore.trees.add import add_tree
from castore.trees.tree import read_tree

CORPUS = Path(__file__).parent / "corpus"
_LARGEST = 1 << 16  # of an input
_MEMORY = 512 << 20  # that inputs of that size may take, beside what the program has
_ID = ObjectId("ab" * 32)


@dataclass(frozen=True, slots=True)
class Target:
    """A decoder, with inputs that it takes."""

    decode: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def _frame(data: bytes) -> None:
    frame = memoryview(data)
    length = plain_length(_ID, frame)
    decode_frame(_ID, frame, memoryview(bytearray(min(length, 1 << 22))))


def _tail(data: bytes) -> None:
    bundle.read_tail(hash_bytes(data[: -bundle.TRAILER_BYTES]), data, len(data) + 100)


def _count(data: bytes) -> None:
    bundle.read_count(data[-bundle.TRAILER_BYTES :].rjust(bundle.TRAILER_BYTES, b"0"))


def _text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode("utf-8", errors="surrogateescape"))


def _file(folder: Path, name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def decode(data: bytes) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return decode


class _OneFile:
    """A remote of which every file is the same."""

    name = "remote"

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_file(self, _name: str, limit: int) -> bytes:
        return self._data[:limit]


def _marks(data: bytes) -> object:
    remote: Any = _OneFile(data)
    return marks.read(remote)


def _sessions(folder: Path) -> Callable[[bytes], object]:
    (folder / "main").mkdir()

    def decode(data: bytes) -> object:
        (folder / "main" / "1.json").write_bytes(data)
        return _read_summaries(folder, None)

    return decode


_GIT_CALLS: tuple[Callable[[Path], object], ...] = (
    lambda folder: git.tips(folder, ["manifests"]),
    lambda folder: git.index(folder, ".castore", ["manifests"]),
    lambda folder: git.files_at(folder, "HEAD", ["manifests"]),
    lambda folder: git.blobs(folder, {"ab" * 20: "there", "cd" * 20: "here"}, 1 << 20),
    lambda folder: git.worktrees(folder),
    lambda folder: git.altered(folder, ["manifests"]),
    lambda folder: git.additions(folder, "manifests"),
    lambda folder: git.signatures(folder, [_COMMIT]),
    lambda folder: git.uncommitted(folder, ["manifests"]),
)
_COMMIT = "1c6e54c9922a68be46e0f63200044b920a16daf6"  # the one that _git_seeds makes
_CUT = b"\xfe\xfe\xfe"  # between what git prints the first time, the second time and so on


def _git(folder: Path) -> Callable[[bytes], object]:
    """Everything that reads what git prints; the first byte says which."""

    def decode(data: bytes) -> object:
        texts = itertools.cycle(data[1:].split(_CUT))

        def run(*_: object, **__: object) -> git_process.Done:
            return subprocess.CompletedProcess([], 0, next(texts), b"")

        with mock.patch.object(git, "run", run), mock.patch.object(git_process, "run", run):
            return _GIT_CALLS[data[0] % len(_GIT_CALLS)](folder) if data else None

    return decode


def _git_seeds(folder: Path) -> tuple[bytes, ...]:
    """Return what git really prints for each."""
    (folder / "manifests").mkdir()
    (folder / "manifests" / "a.json").write_text("{}")
    settings = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    environment = os.environ | {f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")}
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"], ["tag", "v1"]):
        subprocess.run(["git", "-C", folder, *settings, *arguments], check=True, capture_output=True, env=environment)
    seeds = []
    for number, call in enumerate(_GIT_CALLS):
        printed = []

        def run(*arguments: Any, printed: list[bytes] = printed, **options: Any) -> git_process.Done:
            done = _real_run(*arguments, **options)
            printed.append(done.stdout)
            return done

        patched = mock.patch.object(git, "run", run), mock.patch.object(git_process, "run", run)
        with patched[0], patched[1], contextlib.suppress(CastoreError):
            call(folder)
        seeds.append(bytes([number]) + _CUT.join(printed))
    return tuple(seeds)


_real_run = git_process.run


class _Peer:
    """A server that gives the same answer, whatever it is, to each request, and hangs up."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, contextlib.suppress(OSError):
                self._drain(connection)
                connection.sendall(self.answer)

    def _drain(self, connection: socket.socket) -> None:
        asked = connection.recv(1 << 16)
        while b"\r\n\r\n" not in asked and (more := connection.recv(1 << 16)):
            asked += more
        head, _, body = asked.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0)
        while len(body) < length and (more := connection.recv(1 << 16)):
            body += more


def _cache_service() -> Callable[[bytes], object]:
    peer = _Peer()
    service = github_service.CacheService(f"http://127.0.0.1:{peer.port}/", "token", allow_http=True)
    address = f"http://127.0.0.1:{peer.port}/x?"

    def decode(data: bytes) -> None:
        peer.answer = data
        with mock.patch.object(github_service.time, "sleep"):
            for ask in (
                lambda: service.look_up("key"),
                lambda: service.reserve("key"),
                lambda: service.finish("key", 10),
                lambda: service.read(address, 0, 10),
                lambda: service.size(address),
                lambda: service.send(address, 3, lambda *_: b"abc", lambda *_: None),
            ):
                with contextlib.suppress(CastoreError):
                    ask()

    return decode


def _bucket() -> Callable[[bytes], object]:
    """A website and a bucket: files, parts of files, listings, uploads."""
    peer = _Peer()
    once: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=5)}
    options: Any = {"allow_http": True, "timeout": timedelta(seconds=5)}
    address = f"http://127.0.0.1:{peer.port}"
    keys: Any = {"endpoint": address, "region": "us-east-1", "access_key_id": "a", "secret_access_key": "b"}
    site = obstore.store.from_url(f"{address}/x", client_options=options, retry_config=once)
    s3 = obstore.store.from_url("s3://bucket/x", config=keys, client_options=options, retry_config=once)
    many = [hash_bytes(bytes([number % 256, number // 256])) for number in range(400)]

    def decode(data: bytes) -> None:
        peer.answer = data
        for remote in (bucket.Website("web", f"{address}/x", site), bucket.Bucket("s3", "s3://bucket/x", s3)):
            for ask in (
                lambda remote=remote: remote.get(_ID),
                lambda remote=remote: remote.read_file("manifests/a", 100),
                lambda remote=remote: remote.read_range("packs/a", 0, 10),
                lambda remote=remote: list(remote.files("manifests")),
                lambda remote=remote: remote.has(many[:2]),
                lambda remote=remote: remote.put(_ID, b"frame"),
            ):
                remote._connection.down = (0.0, "")  # what it remembers would hide what the rest does
                with contextlib.suppress(CastoreError):
                    ask()
        with contextlib.suppress(CastoreError):
            bucket.Bucket("s3", "s3://bucket/x", s3).has(many)

    return decode


_HEAD = b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n%s\r\n%s"


def _answers() -> tuple[bytes, ...]:
    """Return answers of servers as they should be."""
    listing = (
        b'<?xml version="1.0"?><ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated><Contents>'
        b"<Key>x/objects/ab/%s</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>e</ETag><Size>5</Size>"
        b"</Contents></ListBucketResult>" % _ID.encode()
    )
    given = (
        b'{"ok":true,"matched_key":"key","signed_download_url":"http://127.0.0.1:1/x?sig=a","signed_upload_url":"x"}'
    )
    refused = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    times = b"Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nETag: e\r\n"
    return (
        _HEAD % (200, len(given), b"", given),
        _HEAD % (200, 10, times, b"0123456789"),
        _HEAD % (206, 10, times + b"Content-Range: bytes 0-9/100\r\n", b"0123456789"),
        _HEAD % (200, len(listing), b"Content-Type: application/xml\r\n", listing),
        _HEAD % (404, 0, b"", b""),
        _HEAD % (403, len(refused), b"", refused),
        _HEAD % (503, 0, b"Retry-After: 1\r\n", b""),
        _HEAD % (302, 0, b"Location: http://127.0.0.1:1/y\r\n", b""),
        b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    )


def targets(folder: Path) -> dict[str, Target]:
    """Return every decoder by name; ``folder`` is for files."""
    repo = Repo.init(folder / "repo")
    (folder / "sessions").mkdir()
    (folder / "git").mkdir()
    weights = {"w": torch.arange(6.0), "b": torch.zeros(2, dtype=torch.bfloat16)}
    saved = repo.save({"model": weights, "trainer": {"a": [1, None, 2.5, "x", b"y", (1, 2)], 3: True}}, run="r", step=1)
    (folder / "tree" / "deep").mkdir(parents=True)
    (folder / "tree" / "deep" / "file").write_text("text")
    (folder / "tree" / "link").symlink_to("deep/file")
    added = add_tree(repo, folder / "tree")
    parts = [*saved.manifest.parts.values(), *added.manifest.parts.values()]
    indexes = tuple(repo.store.read(part.index) for part in parts)
    frames = tuple(encode_frame(bytes(range(256)) * 4, itemsize) for itemsize in (1, 2, 4, 8))
    layout = bundle.lay_out({_ID: 100, hash_bytes(b"x"): 7})
    torch.save(weights, folder / "seed.pt")
    record = bundle.Record(
        bundle=_ID, key="castore-x", created="2026-01-01T00:00:00.000000Z", bytes=10_000, objects=3, ref="main",
        parts={saved.manifest.parts["model"].index: [_ID]},
    )  # fmt: skip
    contents = bundle.Contents(ref="main", files={"manifests/r/1.json": "{}"}, parts={_ID: [None, _ID]})
    session = {"started": "2026-01-01T00:00:00.000000Z", "train_losses": {"first": 0, "every": 2, "means": "1 2.5"}}
    return {
        "frame": Target(_frame, frames),
        "index": Target(part_index.decode, indexes),
        "chunks": Target(part_index.decode_chunks, indexes),
        "tree": Target(lambda data: read_tree(part_index.decode(data)), indexes[-1:]),
        "manifest": Target(manifest.decode, (saved.path.read_bytes(), added.path.read_bytes())),
        "tag": Target(lambda data: tag.decode(data, "tag"), (tag.encode(_ID),)),
        "bundle tail": Target(_tail, (layout.tail,)),
        "bundle count": Target(_count, (layout.tail,)),
        "record": Target(bundle.decode_record, (bundle.encode_record(record),)),
        "contents": Target(bundle.decode_contents, (bundle.encode_contents(contents),)),
        "pointer": Target(packs.read_pointer, (canonical(packs.Pointer(packs={_ID: 1000})),)),
        "marks": Target(_marks, (b'{"files":["packs/a"],"objects":["' + b"ab" * 32 + b'"],"version":1}',)),
        "config": Target(_text(config.parse), (b'[retention]\nkeep = 10\nmax_size = "2GB"\n[remotes]\na = "s3://b/c"\n',)),
        "session": Target(_sessions(folder / "sessions"), (msgspec.json.encode(session),)),
        "filter": Target(_text(Filter.parse), (b'val_loss<2 and run=ci* or tags!="a b"',)),
        "selector": Target(_text(Selector.parse), (b"main:best", b"3f2a91")),
        "safetensors": Target(_file(folder, "x.safetensors", convert.read), (save(weights, {"a": "b"}),)),
        "git": Target(_git(folder), _git_seeds(folder / "git")),
        "cache service": Target(_cache_service(), _answers()),
        "bucket": Target(_bucket(), _answers()),
        "pt": Target(_file(folder, "x.pt", convert.read), ((folder / "seed.pt").read_bytes(),)),
    }  # fmt: skip


def corpus(name: str) -> list[bytes]:
    """Return the inputs that are kept for a decoder."""
    return [path.read_bytes() for path in sorted((CORPUS / name.replace(" ", "-")).glob("*"))]


_TELLING = (
    b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\xc0",
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"[" * 2000, b"{" * 2000, b'{"a":' * 500, b"\x91" * 2000, b"-1", b"1e999", b"NaN", b"\xed\xa0\x80", b"\x1b[2J",
    b"../", b"/", b"\n", b'"', b"",
)  # fmt: skip


def mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Return a seed with a few changes, of kinds that decoders stumble over."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((0, 1, 2, 4, 8, 40)))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:to] = rng.choice(_TELLING)
            case 2:
                data[at:to] = rng.randbytes(rng.randrange(9))
            case 3:
                data[at:at] = data[at:to] * rng.choice((1, 2, 50))
            case 4:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            case _:
                del data[at:to]
    return bytes(data[:_LARGEST])


def failure(target: Target, data: bytes) -> BaseException | None:
    """Return what a decoder should not have raised."""
    try:
        target.decode(data)
    except CastoreError:
        return None
    except Exception as error:
        return error
    return None


def run(target: Target, name: str, inputs: Iterable[bytes]) -> int:
    """Give a decoder all inputs and return how many. An input that fails is kept, and ends it with AssertionError."""
    count = 0
    for data in inputs:
        count += 1
        if (error := failure(target, data)) is not None:
            kept = CORPUS / name.replace(" ", "-") / hashlib.sha256(data).hexdigest()[:12]
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
            raise AssertionError(f"{name} raised {type(error).__name__} for {kept}") from error
    return count


def mutations(rng: random.Random, target: Target, name: str, seconds: float, most: int = 1 << 62) -> Iterable[bytes]:
    """Yield inputs for as long, or at most as many, as that."""
    seeds = [*target.seeds, *corpus(name)]
    end = time.monotonic() + seconds
    for count in range(most):
        if count % 64 == 0 and time.monotonic() > end:
            return
        yield mutate(rng, seeds)


def survey(name: str, seed: int, seconds: float) -> int:
    """Fuzz a decoder in this process, whose memory is capped; return how many inputs it has seen."""
    with tempfile.TemporaryDirectory() as folder:
        target = targets(Path(folder))[name]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
        run(target, name, corpus(name))
        return run(target, name, mutations(random.Random(f"{seed} {name}"), target, name, seconds))


def main() -> None:
    """Fuzz for as long as was asked for, or until there were so many inputs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="DECODER")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--runs", type=int, help="instead: go on until there were so many inputs in all")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    # a process of its own for each, as its cap can't be lifted again
    with tempfile.TemporaryDirectory() as folder:
        chosen = options.names or list(targets(Path(folder)))
    workers = len(os.sched_getaffinity(0))
    counts: Counter[str] = Counter()
    with multiprocessing.get_context("forkserver").Pool(workers, maxtasksperchild=1) as pool:
        for number in itertools.count():
            each = 10.0 if options.runs else options.seconds * workers / len(chosen)
            jobs = [pool.apply_async(survey, (name, options.seed + number, each)) for name in chosen]
            counts.update({name: job.get() for name, job in zip(chosen, jobs, strict=True)})
            if counts.total() >= (options.runs or 0):
                break
            print(f"{counts.total():,} inputs so far", flush=True)
    for name in chosen:
        print(f"{name:13} {counts[name]:>10,}")
    total = counts.total()
    print(f"{'in all':13} {total:>10,} inputs, no error but castore's own")


if __name__ == "__main__":
    sys.exit(main())
