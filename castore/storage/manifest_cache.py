"""The manifests of the work tree in one file beside them, so that reading 100,000 of them takes no 100,000 reads.

The manifests in git are the truth. An entry of the cache counts only while the file that it was made from has the same
inode, size, and times of modification and of change to the nanosecond, which nobody can set; any other file is read and
verified, and a cache that can't be read, or that is not what was written, is no cache.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from castore.errors import StorageError
from castore.format.ids import DIGEST_BYTES, ObjectId, hash_bytes
from castore.format.manifest import Entry, Experiment, Manifest
from castore.storage import fs

_VERSION = 1
_MAX_BYTES = 1 << 30
_SETTLED_SECONDS = 2.0  # a file may change again within one tick of the file system's clock, and look the same
_WORTH = 100  # so many manifests are read again rather than written to the cache each time

Stamp = tuple[int, int, int, int]
"""Inode, size in bytes, time of modification and of change in ns."""


class _Stored(msgspec.Struct, array_like=True):
    """``stamps`` are four numbers an entry. Equal experiments and configs, as most are, stand there once."""

    version: int
    paths: list[str]
    stamps: bytes
    ids: list[str]
    manifests: list[Manifest]
    experiments: list[Experiment]
    experiment_of: list[int]
    configs: list[dict[str, Any]]
    config_of: list[int]


@dataclass(frozen=True, slots=True)
class ManifestCache:
    """What was known when the cache was written, newest first: path below ``manifests/``, stamp and entry of each."""

    paths: Sequence[str] = ()
    stamps: Sequence[Stamp] = ()
    entries: Sequence[Entry] = ()


_decoder = msgspec.msgpack.Decoder(_Stored)
_encoder = msgspec.msgpack.Encoder()


def stamp_of(status: os.stat_result) -> Stamp:
    """Return the stamp of a file with this status."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read(path: Path) -> ManifestCache:
    """Return the cache in a file; an empty one if there is none, or if it can't be read."""
    try:
        data = memoryview(fs.read(path, _MAX_BYTES))
        if hash_bytes(data[DIGEST_BYTES:]) != data[:DIGEST_BYTES].hex():
            return ManifestCache()
        stored = _decoder.decode(data[DIGEST_BYTES:])
        numbers = array("q", stored.stamps)
        stamps = list(zip(*(numbers[i::4] for i in range(4)), strict=True))
        lists = (stored.paths, stamps, stored.ids, stored.manifests, stored.experiment_of, stored.config_of)
        if stored.version != _VERSION or len({len(values) for values in lists}) != 1:
            return ManifestCache()
        for manifest, experiment, config in zip(*lists[3:], strict=True):
            msgspec.structs.force_setattr(manifest, "experiment", stored.experiments[experiment])
            msgspec.structs.force_setattr(manifest, "config", stored.configs[config])
    except (FileNotFoundError, StorageError, ValueError, IndexError, msgspec.MsgspecError, RecursionError):
        return ManifestCache()
    return ManifestCache(stored.paths, stamps, list(map(Entry, map(ObjectId, stored.ids), stored.manifests)))


def write(path: Path, known: Mapping[str, tuple[Stamp, Entry]], temporary: Path) -> None:
    """Replace the cache by what is known of each path, in the order given. Not being able to is no error."""
    settled = time.time_ns() - int(_SETTLED_SECONDS * 1e9)
    kept = {path: (stamp, entry) for path, (stamp, entry) in known.items() if max(stamp[2:]) < settled}
    experiments, configs = _Table(), _Table()
    stored = _Stored(
        version=_VERSION,
        paths=list(kept),
        stamps=array("q", (number for stamp, _ in kept.values() for number in stamp)).tobytes(),
        ids=[entry.id for _, entry in kept.values()],
        manifests=[
            msgspec.structs.replace(entry.manifest, experiment=Experiment(), config={}) for _, entry in kept.values()
        ],
        experiment_of=[experiments.number(entry.manifest.experiment) for _, entry in kept.values()],
        experiments=experiments.values,
        config_of=[configs.number(entry.manifest.config) for _, entry in kept.values()],
        configs=configs.values,
    )
    try:
        data = _encoder.encode(stored)
        fs.make_directory(path.parent)
        fs.publish(path, bytes.fromhex(hash_bytes(data)) + data, temporary, durable=False, replace=True)
    except (StorageError, OverflowError):
        return


def is_worth_writing(*, read_again: int, entries: int) -> bool:
    """Whether so much was read again that the cache should be written again: it is written whole."""
    return read_again >= max(_WORTH, entries // 20)


class _Table:
    """Numbers values, equal ones alike."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._by_object: dict[int, int] = {}
        self._by_bytes: dict[bytes, int] = {}

    def number(self, value: Any) -> int:
        number = self._by_object.get(id(value))  # the caller keeps the values, so an id stays that of one
        if number is None:
            number = self._by_bytes.setdefault(_encoder.encode(value), len(self.values))
            if number == len(self.values):
                self.values.append(value)
            self._by_object[id(value)] = number
        return number
