"""Where a repository's files lie on this machine, and that nothing in it leads elsewhere.

What comes with a clone is other people's: a symbolic link in the place of a folder would have castore write, or delete,
wherever it leads. Who wants the data on another disk says so in ``local.toml``, which git must not know.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from castore.errors import ConfigError, StorageError
from castore.storage import fs, git

LOCAL = "local.toml"
NEVER_LINKS = (
    "objects", "cache", "tmp", "trash", "quarantine", "lock", "lock.gate", "manifests", "pins", "tags", "bundles",
    "sessions",
)  # fmt: skip
_OWNER = "repository"
_MAX_BYTES = 1 << 16


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    data: str = ""
    allow_link: bool = False
    shared: Literal["", "group"] = ""


@dataclass(frozen=True, slots=True)
class Location:
    """``data`` holds ``objects/``, ``tmp/``, ``trash/`` and ``quarantine/``: ``root`` itself unless set otherwise.

    ``is_shared`` if all of them are for the group of ``root`` to change, whatever the umask.
    """

    root: Path
    data: Path
    is_shared: bool = False

    @property
    def is_elsewhere(self) -> bool:
        return self.data != self.root


def locate(root: Path, *, is_new: bool = False) -> Location:
    """Return where the files of the repository ``root`` are.

    ConfigError if a link could lead elsewhere, or if data that is kept elsewhere is not there, unless it ``is_new``:
    a disk that isn't mounted is not an empty store.
    """
    settings = _read_local(root)
    if root.is_symlink() and not settings.allow_link:
        raise ConfigError(str(root), f"is a symbolic link: if it is yours, write `allow_link = true` into its {LOCAL}")
    data = root / settings.data if settings.data else root
    for folder in dict.fromkeys((root, data)):
        for name in NEVER_LINKS:
            _refuse_link(folder / name)
    if data != root and not is_new and not (data / "objects").is_dir():
        raise ConfigError(str(root / LOCAL), f"{data} holds no objects/: mount that disk, or run `castore init`")
    if (data / "objects").is_dir():
        for entry in fs.scan(data / "objects"):
            if entry.is_symlink():
                _refuse_link(Path(entry.path))
    if data != root:
        _refuse_other_owner(root, data)
    return Location(root, data, is_shared=settings.shared == "group")


def claim(location: Location) -> None:
    """Note in data that is kept elsewhere whose it is, and share what the group shares. ConfigError if it is not ours.

    Two repositories with one store would delete each other's checkpoints: each knows its own manifests only.
    """
    if location.is_elsewhere:
        fs.publish(location.data / _OWNER, os.fsencode(location.root) + b"\n", location.data / "tmp")
        _refuse_other_owner(location.root, location.data)
    share(location)


def share(location: Location) -> None:
    """Let the group change the files of a shared repository; nothing changes once that was done."""
    for folder in dict.fromkeys((location.root, location.data)) if location.is_shared else ():
        fs.share_with_group(folder)


def _refuse_other_owner(root: Path, data: Path) -> None:
    try:
        owner = os.fsdecode(fs.read(data / _OWNER, _MAX_BYTES)).removesuffix("\n")
    except FileNotFoundError:
        return
    except StorageError as error:
        raise ConfigError(str(data / _OWNER), f"can't be read: {error}") from error
    if owner != str(root) and not _is_same(Path(owner), root):
        raise ConfigError(
            str(root / LOCAL),
            f"{data} holds the data of {owner}: two repositories that share it would delete each other's. Choose "
            f"another folder or, if that one is gone or was moved here, remove {data / _OWNER} and run `castore init`",
        )


def _is_same(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except OSError:
        return False


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise ConfigError(
            str(path),
            "is a symbolic link, which could lead castore anywhere: remove it. To keep data on another disk write "
            f'`data = "/that/folder"` into {LOCAL} beside config.toml',
        )


def _read_local(root: Path) -> _Settings:
    path = root / LOCAL
    if not os.path.lexists(path):
        return _Settings()
    try:
        settings = msgspec.convert(tomllib.loads(fs.read(path, _MAX_BYTES).decode()), _Settings)
    except (StorageError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(str(path), str(error)) from error
    # with a clone it would decide for whoever cloned it
    if git.is_inside(root) and git.tracked(root, [LOCAL]) != []:
        raise ConfigError(
            str(path), "is known to git, or git can't tell: it is for this machine alone; remove it there"
        )
    if settings.data and not Path(settings.data).is_absolute():
        raise ConfigError(str(path), f"data = {settings.data!r} is not an absolute path")
    return settings
