"""``.castore/config.toml``: every setting, its default and what it does. Pure."""

from __future__ import annotations

import re
import tomllib
from datetime import timedelta
from decimal import Decimal
from typing import Literal

import msgspec

from castore.errors import ConfigError
from castore.format.frame import MAX_PLAIN

TEMPLATE = """\
# castore's settings. A line that is missing means the value shown here.

[store]
# Largest piece of a checkpoint that is stored as one object: 64KiB to 64MiB.
chunk_size = "4MiB"
# Threads that hash and compress; 0 takes one for each processor.
threads = 0
# Whether a save waits until the disk has it. Without, a power cut can lose what was saved last.
fsync = true
# Seconds to wait for another castore process before giving up with exit code 6.
lock_timeout = 60.0

[resume]
# When checkpoints exist but none can be used: "error" stops, "fresh" starts anew and says so.
on_missing = "error"
# Scores closer than this are a tie, which the later step wins.
tie_tolerance = 0.0001
# Whether a checkpoint trained on other data may be resumed (listed as a difference).
allow_data_change = false

[retention]
# Whether `castore train` collects garbage after it has saved.
auto_gc = true
# Of checkpoints that are comparable, how many of the best are kept, and how many of the newest beside them.
keep = 10
keep_latest = 1
# How many of the newest that are kept can be resumed exactly, beside the best: the rest keep their weights alone.
keep_optimizer = 2
# Above this the worst go first, but never the best, the newest or a pinned one; "0" is no limit.
max_size = "20GB"
# How long prepared data is used before it is prepared again.
data_ttl = "168h"
# Objects that belong to no manifest stay for so long, in case one is on its way.
grace = "1d"

[remotes]
# Folders with copies of objects, such as another store on a shared disk, each as a line
#   name = "path"
# with a relative path starting in the folder that holds .castore. An object at path/objects/ab/abcd... is fetched when
# it is missing or damaged here, and verified before it is used.
"""

GITIGNORE = """\
# config.toml and manifests/ belong in git; data does not
/objects
/tmp
/trash
/quarantine
/lock
"""

GITATTRIBUTES = """\
# an id is the hash of the file's bytes: line endings stay as they are
/manifests/** -text
/bundles/** -text
"""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)?")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_SMALLEST_CHUNK = 1 << 16
_REMOTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Store(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    chunk_size: str = "4MiB"
    threads: int = 0
    fsync: bool = True
    lock_timeout: float = 60.0


class Resume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    on_missing: Literal["error", "fresh"] = "error"
    tie_tolerance: float = 1e-4
    allow_data_change: bool = False


class Retention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    auto_gc: bool = True
    keep: int = 10
    keep_latest: int = 1
    keep_optimizer: int = 2
    max_size: str = "20GB"
    data_ttl: str = "168h"
    grace: str = "1d"

    @property
    def grace_period(self) -> timedelta:
        return parse_duration(self.grace)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings. The defaults are those of :data:`TEMPLATE`."""

    store: Store = msgspec.field(default_factory=Store)
    resume: Resume = msgspec.field(default_factory=Resume)
    retention: Retention = msgspec.field(default_factory=Retention)
    remotes: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def chunk_bytes(self) -> int:
        return parse_size(self.store.chunk_size)


def parse(text: str, path: str = "config.toml") -> Config:
    """The settings in a TOML text. ConfigError, naming the setting, for anything unknown or out of range."""
    try:
        config = msgspec.convert(tomllib.loads(text), Config)
        _check(config)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, f"not valid TOML: {error}") from error
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise ConfigError(path, str(error)) from error
    return config


def parse_size(text: str) -> int:
    """Bytes in a size such as ``4MiB``, ``20GB`` or ``1048576``; units with an i are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size: write 512KiB, 4MiB or 20GB")
    number, unit = match.groups()
    base = 1024 if unit and unit[-1] in "iI" else 1000
    return int(Decimal(number) * base ** (" KMGT".index(unit[0].upper()) if unit else 0))


def parse_duration(text: str) -> timedelta:
    """A duration such as ``90s``, ``30min``, ``12h`` or ``7d``; ``0`` is none."""
    match = _DURATION.fullmatch(text.strip())
    if not match or not (match[2] or float(match[1]) == 0):
        raise ValueError(f"{text!r} is not a duration: write 30min, 12h or 7d")
    seconds = float(match[1]) * _SECONDS[match[2] or "s"]
    if seconds > 1e10:
        raise ValueError(f"{text!r} is longer than anything lasts")
    return timedelta(seconds=seconds)


def _check(config: Config) -> None:
    try:
        chunk_bytes = config.chunk_bytes
    except ValueError as error:
        raise ValueError(f"store.chunk_size: {error}") from error
    if not _SMALLEST_CHUNK <= chunk_bytes <= MAX_PLAIN or chunk_bytes % 64:
        raise ValueError("store.chunk_size is not a multiple of 64 between 64KiB and 64MiB")
    if not 0 <= config.store.threads <= 256:
        raise ValueError("store.threads is not between 0 and 256")
    if not 0 <= config.store.lock_timeout <= 86400:
        raise ValueError("store.lock_timeout is not between 0 and 86400 seconds")
    if not 0 <= config.resume.tie_tolerance <= 1:
        raise ValueError("resume.tie_tolerance is not between 0 and 1")
    for name, place in config.remotes.items():
        if not _REMOTE.fullmatch(name):
            raise ValueError(f"remotes.{name[:80]!r}: a name is 1 to 64 letters, digits, '.', '_' or '-'")
        if not place.strip() or "\0" in place:
            raise ValueError(f"remotes.{name} is not the path of a folder")
    for name in ("keep", "keep_latest", "keep_optimizer"):
        if getattr(config.retention, name) < 0:
            raise ValueError(f"retention.{name} is below 0")
    for name, parse in (("max_size", parse_size), ("data_ttl", parse_duration), ("grace", parse_duration)):
        try:
            parse(getattr(config.retention, name))
        except ValueError as error:
            raise ValueError(f"retention.{name}: {error}") from error
