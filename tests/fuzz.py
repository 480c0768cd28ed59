"""Hostile bytes for every decoder: each may return a value or raise an error of castore, and take bounded memory.

    python tests/fuzz.py --seconds 60              # all of them, in turn
    python tests/fuzz.py --seconds 60 index frame  # these alone

The seeds are what castore writes, and tests/corpus, which keeps whatever once made a decoder fail. A run says how many
inputs each decoder has seen; one that fails is written to tests/corpus and named.
"""

# ruff: noqa: T201 - a program, too

from __future__ import annotations

import argparse
import hashlib
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save

from castore import Repo, config, convert
from castore.errors import CastoreError
from castore.format import bundle, manifest, part_index, tag
from castore.format.frame import decode_frame, encode_frame, plain_length
from castore.format.ids import ObjectId, hash_bytes
from castore.policy.fields import Filter
from castore.policy.selector import Selector
from castore.report.collect import _read_summaries
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


def _sessions(folder: Path) -> Callable[[bytes], object]:
    (folder / "main").mkdir()

    def decode(data: bytes) -> object:
        (folder / "main" / "1.json").write_bytes(data)
        return _read_summaries(folder, None)

    return decode


def targets(folder: Path) -> dict[str, Target]:
    """Return every decoder by name; ``folder`` is for files."""
    repo = Repo.init(folder / "repo")
    (folder / "sessions").mkdir()
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
        "record": Target(bundle.decode_record, (b'{"bundle":"' + b"ab" * 32 + b'"}',)),
        "contents": Target(bundle.decode_contents, (b"\x80",)),
        "config": Target(_text(config.parse), (b'[retention]\nkeep = 10\nmax_size = "2GB"\n[remotes]\na = "s3://b/c"\n',)),
        "session": Target(_sessions(folder / "sessions"), (msgspec.json.encode(session),)),
        "filter": Target(_text(Filter.parse), (b'val_loss<2 and run=ci* or tags!="a b"',)),
        "selector": Target(_text(Selector.parse), (b"main:best", b"3f2a91")),
        "safetensors": Target(_file(folder, "x.safetensors", convert.read), (save(weights, {"a": "b"}),)),
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


def main() -> None:
    """Fuzz for as long as was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="DECODER")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = {name: target for name, target in targets(Path(folder)).items() if name in (options.names or [name])}
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
        print(f"seed {options.seed}", flush=True)
        total = 0
        for name, target in chosen.items():
            rng = random.Random(f"{options.seed} {name}")
            run(target, name, corpus(name))
            count = run(target, name, mutations(rng, target, name, options.seconds / len(chosen)))
            total += count
            print(f"{name:13} {count:>10,}", flush=True)
        print(f"{'in all':13} {total:>10,} inputs, no error but castore's own")


if __name__ == "__main__":
    sys.exit(main())
