"""Which class serves which kind of remote: the one place to name a new one.

>>> remote = open_remote("shared", "file:///mnt/shared/castore", Path("/project"))
>>> remote.path
PosixPath('/mnt/shared/castore')
>>> open_remote("shared", "../shared", Path("/project")).path
PosixPath('/project/../shared')
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from castore.errors import ConfigError, printable
from castore.remotes.base import ConfiguredRemote, Remote
from castore.remotes.bucket import Bucket, Website
from castore.remotes.folder import Folder

PLAIN_PATH = ""
"""Stands in for the scheme of a location that has none."""

CLASSES: Mapping[str, type[ConfiguredRemote]] = {
    PLAIN_PATH: Folder,
    "file": Folder,
    "s3": Bucket,
    "gs": Bucket,
    "az": Bucket,
    "https": Website,
    "http": Website,
}
"""URL scheme -> class. tests/remotes/test_conformance.py fails until a class that is added here passes the suite."""

# `file:` needs no slashes; anything else must have them, since a folder's name may contain a colon
_SCHEME = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]*)://|(file):)", re.IGNORECASE)


def open_remote(name: str, location: str, base: Path) -> ConfiguredRemote:
    """Return the remote that ``location`` (a URL, or the path of a folder) describes; relative paths start at ``base``.

    ValueError for an unknown scheme, naming those that are known, and for a malformed location.
    """
    match = _SCHEME.match(location)
    scheme = (match[1] or match[2]).lower() if match else PLAIN_PATH
    if scheme not in CLASSES:
        known = ", ".join(f"{known}:" if known == "file" else f"{known}://" for known in CLASSES if known != PLAIN_PATH)
        raise ValueError(
            f"{scheme}:// is not a kind of remote that castore knows: write the path of a folder, or {known}"
        )
    return CLASSES[scheme].from_location(name, location, base)


def open_configured(locations: Mapping[str, str], root: Path) -> list[Remote]:
    """Open the remotes that the config.toml of the repository ``root`` (a ``.castore`` folder) names. ConfigError.

    Relative paths start in the folder that holds ``.castore``, where the project lives.
    """
    remotes: list[Remote] = []
    for name, location in locations.items():
        try:
            remotes.append(open_remote(name, location, root.parent))
        except ValueError as error:
            raise ConfigError(str(root / "config.toml"), f"remotes.{name}: {printable(str(error))}") from error
    return remotes
