"""Every error that castore raises, grouped by what a caller would do about it.

The groups are the direct children of :class:`CastoreError`; a program maps a group to an exit code and never
needs to know the leaves. Leaves carry their data as fields and say in their message what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class CastoreError(Exception):
    """Base of everything castore raises on purpose."""


def printable(text: str) -> str:
    """``text`` on one line, with what could steer a terminal or disguise other text written as an escape.

    For whatever comes from a file, a manifest or a branch: its author may be hostile.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in text)


# -- the caller asked for something that can't be done: change the call -------------------------------------------


class UsageError(CastoreError):
    """The request itself is wrong; the same call will fail again."""


class RepoNotFound(UsageError):
    """No ``.castore/`` at or above ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"no .castore/ in {printable(path)} or above it: run `castore init` where the project lives")


class ConfigError(UsageError):
    """``config.toml`` can't be used as it is."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{printable(path)}: {reason}")


class UnsupportedValue(UsageError):
    """A state holds a value that the format has no exact form for; ``key`` says where."""

    def __init__(self, key: str, reason: str) -> None:
        self.key, self.reason = key, reason
        super().__init__(f"can't store {key}: {reason}")


class InvalidManifest(UsageError):
    """A manifest that was about to be written breaks a rule, such as a metric that is not finite."""


class UnsupportedFile(UsageError):
    """A file, folder or link that can't be kept exactly, or one that can't be imported; ``path`` names it."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{printable(path)}: {reason}")


class RefusedPath(UsageError):
    """Nothing is written there: something is in the way, or it is a place where output never goes."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"won't write {printable(path)}: {reason}")


class NotInActions(UsageError):
    """GitHub's cache is within reach of jobs of GitHub Actions alone."""


class PackageMissing(UsageError):
    """What was asked for takes a package that isn't installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        self.what, self.package, self.extra = what, package, extra
        super().__init__(f"{what} needs the package {package}: pip install 'castore[{extra}]'")


# -- nothing fits: ask for something else --------------------------------------------------------------------------


class NotFound(CastoreError):
    """Nothing matches what was asked for."""


class UnknownId(NotFound):
    """No manifest has this id or prefix; ``near`` lists ids that look alike."""

    def __init__(self, wanted: str, near: Sequence[str] = ()) -> None:
        self.wanted, self.near = wanted, tuple(near)
        hint = f"; did you mean {', '.join(self.near)}?" if self.near else "; `castore log` lists them"
        super().__init__(f"no checkpoint {wanted!r}{hint}")


class AmbiguousId(NotFound):
    """A prefix fits several manifests."""

    def __init__(self, wanted: str, matches: Sequence[str]) -> None:
        self.wanted, self.matches = wanted, tuple(matches)
        shown = ", ".join(match[:16] for match in self.matches[:5])
        super().__init__(f"{wanted!r} fits {len(self.matches)} checkpoints ({shown}): give more digits")


class NothingMatches(NotFound):
    """No manifest is compatible with what the run needs."""


# -- the data is not here: fetch it, or start from something else --------------------------------------------------


class DataMissing(CastoreError):
    """History knows the checkpoint, but its data can't be had."""


class ObjectMissing(DataMissing):
    """An object is neither in the store nor in any remote."""

    def __init__(self, object_id: str, part: str = "", manifest: str = "") -> None:
        self.object_id, self.part, self.manifest = object_id, part, manifest
        super().__init__(f"object {object_id[:12]} is missing{_where(part, manifest)}")


class NothingAvailable(DataMissing):
    """Compatible manifests exist, but the data of none of them can be had."""


class RootsUnreadable(DataMissing):
    """It can't be told which checkpoints are still needed, so nothing may be deleted."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"nothing was deleted, as it can't be told what is still needed: {reason}")


# -- bytes are not what they should be: distrust them --------------------------------------------------------------


class CorruptionError(CastoreError):
    """Stored bytes fail verification. Damaged data is never returned."""


class CorruptObject(CorruptionError):
    """An object does not decode to the bytes that its id names."""

    def __init__(self, object_id: str, reason: str, part: str = "", manifest: str = "") -> None:
        self.object_id, self.reason, self.part, self.manifest = object_id, reason, part, manifest
        next_step = "`castore verify --repair` looks for a good copy"
        super().__init__(f"object {object_id[:12]} is damaged ({reason}){_where(part, manifest)}: {next_step}")


class CorruptIndex(CorruptionError):
    """An index, though its hash is right, does not describe a part."""


class CorruptManifest(CorruptionError):
    """A manifest file is not valid, or not the one that its name says."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{printable(path)}: {reason}")


class UnsupportedVersion(CorruptionError):
    """Data in a format that this castore does not know: a newer castore wrote it."""

    def __init__(self, what: str, version: object) -> None:
        self.what, self.version = what, version
        super().__init__(
            f"{printable(what)} has format version {version}, which this castore can't read: upgrade castore"
        )


class CorruptBundle(CorruptionError):
    """A bundle, or the record of one, is not what its id says."""


class UnsafePath(CorruptionError):
    """A tree of files holds a path or link that could write where it shouldn't. Nothing of it was written."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"the tree holds {path[:200]!r}, {reason}: nothing was written")


class InvalidFile(CorruptionError):
    """A file that was to be imported is damaged, or not what it pretends to be. Nothing of it was saved."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{printable(path)}: {reason}; nothing was imported")


# -- a remote failed: try again, or see what it allows ---------------------------------------------------------------


class RemoteError(CastoreError):
    """A remote could not be asked, or refused. What is stored here is intact."""


class RemoteUnavailable(RemoteError):
    """The remote gives no answer that can be used."""

    def __init__(self, remote: str, reason: str) -> None:
        self.remote, self.reason = remote, reason
        super().__init__(f"{remote}: {reason}")


class UploadRefused(RemoteError):
    """What was made here could not be handed on: nothing refers to it, and the next session won't find it."""

    def __init__(self, remote: str, reason: str) -> None:
        self.remote, self.reason = remote, reason
        super().__init__(f"nothing was handed on to {remote}: {reason}")


class NotPushed(RemoteError):
    """A commit could not be made or pushed; what it holds is staged or committed here."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"not pushed, so the next session won't know of it: {reason}")


# -- somebody else is at work: wait --------------------------------------------------------------------------------


class Locked(CastoreError):
    """Another process holds the store's lock."""

    def __init__(self, path: str, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        super().__init__(
            f"{printable(path)} is held by another castore process (waited {seconds:g} s): try again when it is done"
        )


# -- the request is already fulfilled ------------------------------------------------------------------------------


class NothingToDo(CastoreError):
    """The work asked for is zero, which is said rather than passed over."""


# -- the machine failed: free space, mend the disk -----------------------------------------------------------------


class FileChanged(CastoreError):
    """A file was written to while it was read, so that what was read may never have been in it."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"{printable(path)} changed while it was read: nothing was added; try again when it is at rest"
        )


class StorageError(CastoreError):
    """The file system refused an operation. What was stored before is intact."""

    def __init__(self, action: str, path: str, error: OSError) -> None:
        self.action, self.path, self.errno = action, path, error.errno
        super().__init__(f"can't {action} {printable(path)}: {error.strerror or error}")


def _where(part: str, manifest: str) -> str:
    if not part:
        return ""
    return f" (part {part!r} of checkpoint {manifest[:12]})" if manifest else f" (part {part!r})"
