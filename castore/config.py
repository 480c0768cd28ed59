"""``.castore/config.toml``: every setting, its default and its meaning. Pure."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Literal, TypeVar

import msgspec

from castore.errors import ConfigError
from castore.format.frame import MAX_PLAIN

TEMPLATE = """\
# castore's settings. A setting that is left out has the value shown here. What holds for one machine only is in
# local.toml beside this file, which git ignores: `data = "/another/disk/folder"` keeps the data there,
# `shared = "group"` lets the folder's group change all of it, and `allow_link = true` allows .castore to be a link.

[store]
# Maximum size of a chunk, the unit in which checkpoints are stored: 64KiB to 64MiB, a multiple of 64 bytes.
chunk_size = "4MiB"
# Number of threads that hash and compress; 0 means one per processor.
threads = 0
# Wait until the disk has written a save before reporting success. If false, a power failure can lose recent saves.
fsync = true
# How objects of 64 KiB and more are written: "auto" goes past the page cache where the file system can, on Linux, which
# is faster and leaves the cache to your data; "never" does not.
direct = "auto"
# Seconds to wait for another castore process before giving up with exit code 6.
lock_timeout = 60.0

[resume]
# If checkpoints exist but none can be used: "error" stops, "fresh" starts from scratch and says so.
on_missing = "error"
# A tie, which the later step wins: every loss and metric differs by no more than this share of itself.
tie_tolerance = 0.0001
# Allow resuming from a checkpoint trained on other data (listed as a difference).
allow_data_change = false

[retention]
# Collect garbage after `castore train` has saved.
auto_gc = true
# How many of the best checkpoints of each experiment are kept, and how many of the newest in addition.
keep = 10
keep_latest = 1
# How many of the newest kept checkpoints, in addition to the best, keep what exact resuming needs (the optimizer and
# trainer parts). The others keep only their weights.
keep_optimizer = 2
# Limit on the stored size. Above it the worst checkpoints are evicted first, but never the best, the newest or a pinned
# one; "0" means no limit.
max_size = "20GB"
# How long prepared data is kept and reused before it is prepared again.
data_ttl = "168h"
# How long objects that belong to no manifest are kept, in case their manifest is about to be written.
grace = "1d"

[remotes]
# Places that hold copies of objects, one per line: name = "URL". `castore remote add` writes such a line.
#   name = "s3://bucket/folder"         also gs://, az://, https:// (for reading), and the path of a folder
# What is missing or damaged here is fetched from there, and verified before it is used. Credentials come from the
# environment or the provider's own files, never from here. These names have a meaning of their own:
#   default = "name"                    where `castore push` and `castore status` look, if there are several
#   push = "auto"                       push each checkpoint after it was saved; "manual" is the default
#   collector = "machine"               the only machine (host name, or CASTORE_COLLECTOR there) that may run
#                                       `castore gc --remote`
"""

GITIGNORE = """\
# config.toml and manifests/ belong in git; data does not
/objects
/cache
/tmp
/trash
/quarantine
/lock
/lock.gate
/local.toml
"""

GITATTRIBUTES = """\
# an id is the hash of the file's bytes: git must neither convert, filter nor merge them
/manifests/** -text -filter -diff -merge
/bundles/** -text -filter -diff -merge
/pins/** -text -filter -diff -merge
/tags/** -text -filter -diff -merge
/sessions/** -text -filter -diff -merge
"""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)?")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_SMALLEST_CHUNK = 1 << 16
REMOTE_SETTINGS = ("default", "push", "collector")
"""The keys of section ``[remotes]`` that name no remote."""
_REMOTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Store(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section ``[store]``; what each setting means is in :data:`TEMPLATE`."""

    chunk_size: str = "4MiB"
    threads: int = 0
    fsync: bool = True
    direct: Literal["auto", "never"] = "auto"
    lock_timeout: float = 60.0


class Resume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section ``[resume]``."""

    on_missing: Literal["error", "fresh"] = "error"
    tie_tolerance: float = 1e-4
    allow_data_change: bool = False


class Retention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section ``[retention]``."""

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
    """All settings, with the defaults that :data:`TEMPLATE` writes out."""

    store: Store = msgspec.field(default_factory=Store)
    resume: Resume = msgspec.field(default_factory=Resume)
    retention: Retention = msgspec.field(default_factory=Retention)
    remotes: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def locations(self) -> dict[str, str]:
        """The remotes: name to URL or path, in order."""
        return {name: place for name, place in self.remotes.items() if name not in REMOTE_SETTINGS}

    @property
    def default_remote(self) -> str:
        """The name of the remote that commands use unless told otherwise; empty if there is none, or no way to tell."""
        names = list(self.locations)
        return self.remotes.get("default", "") or (names[0] if len(names) == 1 else "")

    @property
    def pushes(self) -> bool:
        """Whether each checkpoint is pushed after it was saved."""
        return self.remotes.get("push") == "auto"

    @property
    def collector(self) -> str:
        """The machine that may delete in remotes; empty if none may."""
        return self.remotes.get("collector", "")

    @property
    def chunk_bytes(self) -> int:
        return parse_size(self.store.chunk_size)


def parse(text: str, path: str = "config.toml") -> Config:
    """Return the settings in a TOML text. ConfigError, naming the setting, for anything unknown or out of range."""
    try:
        config = msgspec.convert(tomllib.loads(text), Config)
        _check(config)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(path, f"not valid TOML: {error}") from error
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise ConfigError(path, f"{error}{_hint(str(error))}") from error
    return config


def _hint(reason: str) -> str:
    """Where to write what is looked for in config.toml and would, there, decide for everybody with a clone."""
    is_local = any(f"unknown field `{name}`" in reason for name in ("shared", "data", "allow_link"))
    return ": that is for each machine to decide, in local.toml beside this file" if is_local else ""


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``20GB`` or ``1048576``; units with an i are powers of 1024. ValueError.

    >>> parse_size("4MiB")
    4194304
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size: write 512KiB, 4MiB or 20GB")
    number, unit = match.groups()
    base = 1024 if unit and unit[-1] in "iI" else 1000
    return int(Decimal(number) * base ** (" KMGT".index(unit[0].upper()) if unit else 0))


def parse_duration(text: str) -> timedelta:
    """Return a duration such as ``90s``, ``30min``, ``12h`` or ``0``. ValueError.

    >>> parse_duration("7d").days
    7
    """
    match = _DURATION.fullmatch(text.strip())
    if not match or not (match[2] or float(match[1]) == 0):
        raise ValueError(f"{text!r} is not a duration: write 30min, 12h or 7d")
    seconds = float(match[1]) * _SECONDS[match[2] or "s"]
    if seconds > 1e10:
        raise ValueError(f"{text!r} is longer than 300 years")
    return timedelta(seconds=seconds)


def _check(config: Config) -> None:
    """Raise ValueError, naming the setting, for a value that the types alone do not exclude."""
    chunk_bytes = _read("store.chunk_size", parse_size, config.store.chunk_size)
    if not _SMALLEST_CHUNK <= chunk_bytes <= MAX_PLAIN or chunk_bytes % 64:
        raise ValueError("store.chunk_size is not a multiple of 64 between 64KiB and 64MiB")
    if not 0 <= config.store.threads <= 256:
        raise ValueError("store.threads is not between 0 and 256")
    if not 0 <= config.store.lock_timeout <= 86400:
        raise ValueError("store.lock_timeout is not between 0 and 86400 seconds")
    if not 0 <= config.resume.tie_tolerance <= 1:
        raise ValueError("resume.tie_tolerance is not between 0 and 1")
    for name, place in config.locations.items():
        check_remote_name(name)
        if not place.strip() or "\0" in place:
            raise ValueError(f"remotes.{name} is neither a URL nor the path of a folder")
    if config.remotes.get("push", "manual") not in ("auto", "manual"):
        raise ValueError('remotes.push is "auto" or "manual"')
    if (default := config.remotes.get("default")) is not None and default not in config.locations:
        raise ValueError(f"remotes.default: there is no remote {default[:80]!r}")
    for name in ("keep", "keep_latest", "keep_optimizer"):
        if getattr(config.retention, name) < 0:
            raise ValueError(f"retention.{name} is below 0")
    _read("retention.max_size", parse_size, config.retention.max_size)
    _read("retention.data_ttl", parse_duration, config.retention.data_ttl)
    _read("retention.grace", parse_duration, config.retention.grace)


def check_remote_name(name: str) -> None:
    """Raise ValueError for a name that no remote may have."""
    if name in REMOTE_SETTINGS:
        raise ValueError(f"remotes.{name} is a setting, so no remote is called that")
    if not _REMOTE.fullmatch(name):
        raise ValueError(f"remotes.{name[:80]!r}: a name is 1 to 64 letters, digits, '.', '_' or '-'")


_T = TypeVar("_T")


def _read(setting: str, parse: Callable[[str], _T], text: str) -> _T:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
