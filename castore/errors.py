"""Every error that castore raises, grouped by what a caller does about it.

The groups are the direct subclasses of :class:`CastoreError`: a program maps groups to exit codes and need not know
the leaves. A leaf carries its data as fields, and its message says what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class CastoreError(Exception):
    """Base class of every error that castore raises on purpose.

    >>> try:
    ...     raise UnknownId("0123", near=["0124abcd"])
    ... except CastoreError as error:
    ...     print(error)
    no checkpoint '0123'; did you mean 0124abcd?
    """


def printable(text: str) -> str:
    r"""Return ``text`` with every character escaped that could control a terminal or disguise other text.

    For any text from a file, a manifest or a branch: its author may be hostile.

    >>> printable("main\x1b[2J")
    'main\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(map(_escape_character, text))


def describe(error: BaseException) -> str:
    """Return an error in words. One of castore speaks for itself; of any other the kind is named, too.

    >>> describe(MemoryError()), describe(RuntimeError("can't start new thread"))
    ('MemoryError', "RuntimeError: can't start new thread")
    """
    if isinstance(error, CastoreError):
        return str(error)
    kind = type(error).__name__
    return printable(f"{kind}: {error}" if str(error) else kind)


def _escape_character(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()


# -- the request is wrong: change it -------------------------------------------------------------------------------


class UsageError(CastoreError):
    """The request itself is wrong: the same call will fail again."""


class RepoNotFound(UsageError):
    """No ``.castore/`` at or above ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"no .castore/ in {printable(path)} or above it: run `castore init` in the project's folder")


class ConfigError(UsageError):
    """``config.toml`` is missing, unreadable or holds an invalid setting."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{printable(path)}: {reason}")


class UnsupportedValue(UsageError):
    """A state holds a value that the format can't represent exactly; ``key`` says where."""

    def __init__(self, key: str, reason: str) -> None:
        self.key, self.reason = key, reason
        super().__init__(f"can't store {key}: {reason}")


class InvalidManifest(UsageError):
    """A manifest to be written breaks a rule, such as a metric that is not finite."""


class UnsupportedFile(UsageError):
    """A file, folder or link that can't be stored exactly, or a file that can't be imported."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{printable(path)}: {reason}")


class RefusedPath(UsageError):
    """Output was not written to ``path``: something exists there, or it is a protected place."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"won't write {printable(path)}: {reason}")


class NotInActions(UsageError):
    """The GitHub Actions cache was used outside a job of GitHub Actions."""


class PackageMissing(UsageError):
    """``feature`` needs a package that isn't installed; ``extra`` is the extra of castore that brings it."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        self.feature, self.package, self.extra = feature, package, extra
        super().__init__(f"{feature} needs the package {package}: pip install 'castore[{extra}]'")


# -- nothing matches: ask for something else -----------------------------------------------------------------------


class NotFound(CastoreError):
    """Nothing matches the request."""


class UnknownId(NotFound):
    """No manifest has this id or prefix; ``near`` lists similar ids."""

    def __init__(self, selector: str, near: Sequence[str] = ()) -> None:
        self.selector, self.near = selector, tuple(near)
        hint = f"; did you mean {', '.join(self.near)}?" if self.near else "; `castore log` lists them"
        super().__init__(f"no checkpoint {selector!r}{hint}")


class AmbiguousId(NotFound):
    """A prefix matches several manifests, whose ids are ``matches``."""

    def __init__(self, selector: str, matches: Sequence[str]) -> None:
        self.selector, self.matches = selector, tuple(matches)
        shown = ", ".join(match[:16] for match in self.matches[:5])
        super().__init__(f"{selector!r} matches {len(self.matches)} checkpoints ({shown}): give more digits")


class NothingMatches(NotFound):
    """No manifest is compatible with what the run needs."""


# -- the data is missing: fetch it, or start from something else ---------------------------------------------------


class DataMissing(CastoreError):
    """A manifest exists, but its data is not available."""


class ObjectMissing(DataMissing):
    """An object is in neither the store nor any remote; ``elsewhere`` is what remotes say of it."""

    def __init__(self, object_id: str, part: str = "", manifest: str = "", elsewhere: str = "") -> None:
        self.object_id, self.part, self.manifest, self.elsewhere = object_id, part, manifest, elsewhere
        super().__init__(f"object {object_id[:12]} is missing{_where(part, manifest)}{printable(elsewhere)}")


class NothingAvailable(DataMissing):
    """Compatible manifests exist, but the data of none of them is available."""


class ManifestsHidden(DataMissing):
    """Git has manifests that the work tree lacks, as in a sparse checkout: that is not a repository without any."""

    def __init__(self, count: int, folder: str) -> None:
        self.count, self.folder = count, folder
        super().__init__(
            f"git has manifests ({count}) and the work tree has none, as in a sparse checkout: "
            f"`git sparse-checkout add .castore` or `git checkout -- {printable(folder)}` brings them"
        )


class GitUnreadable(DataMissing):
    """Git could not be asked, lacks what it was asked for, or answers in a way that castore does not understand."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class BareRepository(GitUnreadable):
    """The folder ``path`` passes for a git repository of its own: git was not run, which would obey its settings."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"{printable(path)} looks like a git repository of its own, by its HEAD, objects and refs: git was not "
            "asked, as it would run the programs that settings there name. Remove HEAD there, and don't trust the "
            "commit that brought it; or move .castore elsewhere"
        )


class RootsUnreadable(DataMissing):
    """The manifests still in use could not all be determined, so nothing was deleted."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"nothing was deleted, as it can't be told what is still needed: {reason}")


# -- bytes fail verification: do not use them ----------------------------------------------------------------------


class CorruptionError(CastoreError):
    """Stored bytes fail verification. Damaged data is never returned."""


class CorruptObject(CorruptionError):
    """An object does not decode to the bytes that its id is the hash of; ``elsewhere`` is what remotes say of it."""

    def __init__(self, object_id: str, reason: str, part: str = "", manifest: str = "", elsewhere: str = "") -> None:
        self.object_id, self.reason, self.elsewhere = object_id, reason, elsewhere
        self.part, self.manifest = part, manifest
        where = f"{_where(part, manifest)}{printable(elsewhere)}"
        next_step = "`castore verify --repair` looks for a good copy"
        super().__init__(f"object {object_id[:12]} is damaged ({reason}){where}: {next_step}")


class CorruptIndex(CorruptionError):
    """An index whose hash is right does not describe a part."""


class CorruptManifest(CorruptionError):
    """A manifest file is invalid, or its content does not belong under its name."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{printable(path)}: {reason}")


class CorruptTag(CorruptionError):
    """The file of a tag holds something else than the id of a checkpoint."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{printable(path)}: {reason}")


class UnsupportedVersion(CorruptionError):
    """The data has a format version that this castore does not know: a newer castore wrote it."""

    def __init__(self, what: str, version: object) -> None:
        self.what, self.version = what, version
        super().__init__(
            f"{printable(what)} has format version {version}, which this castore can't read: upgrade castore"
        )


class CorruptBundle(CorruptionError):
    """A bundle or a bundle record is invalid, or does not match its id."""


class UnsafePath(CorruptionError):
    """A stored tree holds a path or link that could write outside its folder. Nothing of it was written."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"the tree holds {path[:200]!r}, {reason}: nothing was written")


class InvalidFile(CorruptionError):
    """A file to be imported is damaged, or is not of the type it claims. Nothing of it was saved."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{printable(path)}: {reason}; nothing was imported")


# -- a remote failed: try again, or check its permissions and limits -----------------------------------------------


class RemoteError(CastoreError):
    """A remote was unreachable or refused a request. The local store is intact."""


class RemoteUnavailable(RemoteError):
    """The remote gave no usable answer."""

    def __init__(self, remote: str, reason: str) -> None:
        self.remote, self.reason = remote, reason
        super().__init__(f"{remote}: {reason}")


class UploadRefused(RemoteError):
    """The remote refused an upload: no record refers to the data, so the next session won't find it."""

    def __init__(self, remote: str, reason: str) -> None:
        self.remote, self.reason = remote, reason
        super().__init__(f"nothing was uploaded to {remote}: {reason}")


class PushIncomplete(RemoteError):
    """Checkpoints could not be pushed; ``ids`` are theirs. They are in the store, and nothing is lost."""

    def __init__(self, remote: str, ids: Sequence[str], reason: str) -> None:
        self.remote, self.ids, self.reason = remote, tuple(ids), reason
        count = f"{len(ids)} checkpoint{'s' if len(ids) != 1 else ''}"
        super().__init__(
            f"{count} could not be pushed to {remote}; nothing is lost, and `castore push` tries again\n  {reason}"
        )


class CollectionStopped(RemoteError):
    """A collection in a remote was told to stop. What it had not deleted by then is still marked."""

    def __init__(self, remote: str) -> None:
        self.remote = remote
        super().__init__(
            f"gc in {remote} stopped: another one began there, or a push waited in vain for it; run it again later"
        )


class NotPushed(RemoteError):
    """A commit could not be made or pushed; its files are staged or committed locally.

    ``key`` is that of the bundle that was uploaded before, from which `castore ci recover` makes the files again.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        self.reason, self.key = reason, key
        recover = f"\n  what was uploaded can be brought back: castore ci recover {key}" if key else ""
        super().__init__(f"not pushed, so the next session won't know of it: {reason}{recover}")


# -- another process is at work: wait ------------------------------------------------------------------------------


class Locked(CastoreError):
    """Another process holds the store's lock; ``seconds`` is how long this one waited."""

    def __init__(self, path: str, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        super().__init__(
            f"{printable(path)} is held by another castore process (waited {seconds:g} s): try again when it is done"
        )


class StateChanged(CastoreError):
    """A tensor was written to while it was saved: nothing became visible. ``key`` names it where that is known."""

    def __init__(self, key: str = "") -> None:
        self.key = key
        what = key or "the state"
        super().__init__(f"{what} changed while it was saved, so nothing was: save a copy, or stop what writes to it")


class RankFailed(CastoreError):
    """Ranks were to save or load together, and another one could not; ``rank`` is which, None where nobody knows."""

    def __init__(self, rank: int | None, reason: str) -> None:
        self.rank, self.reason = rank, reason
        which = "another rank" if rank is None else f"rank {rank}"
        super().__init__(f"{which} failed, so all of them stop: {printable(reason)}")


class FileChanged(CastoreError):
    """A file was written to while it was read: the bytes that were read may never have been its content."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"{printable(path)} changed while it was read: nothing was added; try again when nothing writes to it"
        )


# -- there is nothing to do: continue ------------------------------------------------------------------------------


class NothingToDo(CastoreError):
    """The requested work is empty. Raised so that it is not mistaken for work done."""


# -- the machine failed: free space, repair the disk ---------------------------------------------------------------


class StorageError(CastoreError):
    """The file system refused an operation. Everything stored before is intact."""

    def __init__(self, action: str, path: str, error: OSError) -> None:
        self.action, self.path, self.errno = action, path, error.errno
        super().__init__(f"can't {action} {printable(path)}: {error.strerror or error}")


def _where(part: str, manifest: str) -> str:
    if not part:
        return ""
    return f" (part {part!r} of checkpoint {manifest[:12]})" if manifest else f" (part {part!r})"
