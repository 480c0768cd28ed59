"""``.castore/config.toml``: every setting, its default and what it does. Pure."""

from __future__ import annotations

import re
import tomllib
from decimal import Decimal
from typing import Literal

import msgspec

from castore.errors import ConfigError
from castore.objects import MAX_PLAIN

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
"""

GITIGNORE = """\
# config.toml and manifests/ belong in git; data does not
/objects/
/tmp/
/trash/
/quarantine/
/lock
"""

GITATTRIBUTES = """\
# an id is the hash of the file's bytes: line endings stay as they are
/manifests/** -text
"""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_SMALLEST_CHUNK = 1 << 16


class Store(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    chunk_size: str = "4MiB"
    threads: int = 0
    fsync: bool = True
    lock_timeout: float = 60.0


class Resume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    on_missing: Literal["error", "fresh"] = "error"
    tie_tolerance: float = 1e-4
    allow_data_change: bool = False


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings. The defaults are those of :data:`TEMPLATE`."""

    store: Store = msgspec.field(default_factory=Store)
    resume: Resume = msgspec.field(default_factory=Resume)

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
