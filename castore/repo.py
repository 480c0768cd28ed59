"""A repository: ``.castore/`` found, opened or made, and everything that is done with one."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import operator
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from castore import config as configs
from castore.errors import ConfigError, InvalidManifest, NotFound, RepoNotFound, StorageError, UsageError
from castore.format import manifest, part_index
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import Entry, Experiment, Manifest
from castore.format.part_index import TensorRef
from castore.policy import lineage
from castore.policy.resolution import Damaged, PartState, Requirement, Resolution, resolve
from castore.policy.retention import Policy, policy_of
from castore.remotes import fallback
from castore.remotes.base import Remote
from castore.remotes.registry import open_configured
from castore.state.parts import Flat, load_parts, load_tensors, locate_errors, part_states, save_parts
from castore.storage import fs, git
from castore.storage.catalog import Catalog, Listing
from castore.storage.object_store import ObjectStore

FOLDER = ".castore"
_RELATIVE = ("best", "latest")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveResult:
    """A checkpoint that is durable: its id and manifest, and what it added to the store."""

    id: ObjectId
    manifest: Manifest
    path: Path
    new_objects: int
    new_bytes: int


class Repo:
    """An open repository. Cheap to make; may be used from several threads and beside other processes.

    ``root`` is the ``.castore`` folder. Everything raised derives from :class:`castore.CastoreError`.
    """

    def __init__(self, root: Path, config: configs.Config) -> None:
        self.root = root
        self.config = config
        self.store = ObjectStore(root, durable=config.store.fsync)
        self.catalog = Catalog(root, durable=config.store.fsync)
        self.remotes: list[Remote] = open_configured(config.remotes, root)

    # -- opening -----------------------------------------------------------------------------------------------------

    @classmethod
    def init(cls, path: str | os.PathLike[str] = ".") -> Repo:
        """Make ``path/.castore``, or complete one that is there; existing files are left as they are."""
        root = Path(path).resolve() / FOLDER
        for name in ("manifests", "objects", "tmp"):
            fs.make_directory(root / name)
        fs.sync_directory(root.parent)
        fs.publish(root / ".gitignore", configs.GITIGNORE.encode(), root / "tmp")
        fs.publish(root / ".gitattributes", configs.GITATTRIBUTES.encode(), root / "tmp")
        # git keeps no empty folder, and a clone must find the place where manifests go
        fs.publish(root / "manifests" / ".gitkeep", b"", root / "tmp")
        # last, since a folder with a configuration is what open takes for a repository
        fs.publish(root / "config.toml", configs.TEMPLATE.encode(), root / "tmp")
        return cls.open(root.parent)

    @classmethod
    def open(cls, path: str | os.PathLike[str] = ".") -> Repo:
        """The repository at ``path`` or, as git does, in the nearest folder above it. RepoNotFound, ConfigError."""
        start = Path(path).resolve()
        for folder in (start, *start.parents):
            root = folder / FOLDER
            if os.path.isdir(root):
                break
        else:
            raise RepoNotFound(str(start))
        path = root / "config.toml"
        try:
            data = fs.read(path, 1 << 20)
        except FileNotFoundError:
            # not looked for further up: that would be another repository, with other checkpoints
            raise ConfigError(str(path), "is missing: `castore init` writes it anew") from None
        except StorageError as error:
            raise ConfigError(str(path), f"can't be read: {error}") from error
        return cls(root, configs.parse(data.decode(errors="replace"), str(path)))

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool = False, wait: bool = True) -> Iterator[None]:
        """Keep others from deleting (shared) or from doing anything (exclusive). Locked after the configured time."""
        timeout = self.config.store.lock_timeout if wait else 0.0
        with fs.lock(self.root / "lock", exclusive=exclusive, timeout=timeout):
            yield

    @property
    def threads(self) -> int:
        """How many threads hash and compress."""
        return self.config.store.threads or processors()

    @property
    def policy(self) -> Policy:
        """What gc keeps, by the settings."""
        return policy_of(self.config)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save(
        self,
        parts: Mapping[str, Any],
        *,
        run: str,
        step: int,
        metrics: Mapping[str, float] | None = None,
        experiment: Experiment | None = None,
        parent: str | None = None,
        tags: Sequence[str] = (),
        note: str = "",
        config: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        created: datetime | None = None,
        kind: manifest.Kind = "checkpoint",
    ) -> SaveResult:
        """Store a checkpoint: each part any nested state dict. When this returns it survives a power cut.

        ``step`` counts completed training steps; ``metrics`` are finite, ``val_loss`` and those that ``experiment``
        declares make the score. ``config`` and ``info`` are JSON, recorded as they are. ``created`` is now unless
        given. Of ``kind`` ``dataset`` it is prepared data, which has neither metrics nor an experiment.
        Raises UnsupportedValue, InvalidManifest, StorageError or Locked; then nothing became visible.
        """
        draft = Manifest(
            kind=kind,
            run=run,
            step=_whole(step),
            created=manifest.timestamp(created or datetime.now(UTC)),
            parent=self._full_id(parent) if parent else None,
            parts=dict.fromkeys(parts, _PLACEHOLDER),
            experiment=experiment or Experiment(),
            metrics={name: _number(name, value) for name, value in (metrics or {}).items()},
            tags=sorted(set(_names(tags, "tags"))),
            note=note,
            config=dict(config or {}),
            info=dict(info or {}),
        )
        manifest.encode(draft)  # what can't be recorded fails before gigabytes are written
        flat = {name: _flatten(state, name) for name, state in parts.items()}
        with self.lock():
            saved = save_parts(self.store, flat, self.config.chunk_bytes, self.threads)
            final = msgspec.structs.replace(draft, parts=saved.parts)
            own, path = self.catalog.add(final)
        return SaveResult(id=own, manifest=final, path=path, new_objects=saved.new_objects, new_bytes=saved.new_bytes)

    def load(
        self,
        wanted: str,
        parts: Sequence[str] | None = None,
        *,
        tensors: Sequence[str] | None = None,
        into: Any = None,
        device: Any = None,
    ) -> dict[str, Any]:
        """The state of checkpoint ``wanted`` (an id or a unique prefix), of all its parts or of those named.

        With ``tensors``, patterns such as ``blocks.0.*``, only the tensors of a matching key are read, and each part
        is a flat dict of them. With ``into``, a module or a dict from parts to states and modules, tensors are filled
        in place where they are; an error then leaves some filled and some not. ``device`` is where new ones go.

        Every byte is verified. Raises UnknownId or AmbiguousId; NotFound for a part or tensor it doesn't have;
        UsageError when ``into`` doesn't fit; ObjectMissing, CorruptObject or CorruptIndex naming object, part and
        manifest: never another checkpoint in its place.
        """
        if into is not None and (tensors is not None or device is not None):
            raise UsageError("into says where tensors go: tensors and device can't be given beside it")
        entry = self.find(wanted)
        import castore.state.tensors

        target = castore.state.tensors.Into(into) if into is not None else None
        every = target.parts if target else entry.manifest.parts
        names = tuple(every) if parts is None else _names(parts, "parts")
        for name in names:
            if name not in entry.manifest.parts:
                have = ", ".join(entry.manifest.parts)
                raise NotFound(f"checkpoint {entry.id[:12]} has no part {name!r}: it has {have}")
            if target and name not in target.parts:
                raise UsageError(f"part {name} is to be loaded, but into has no place for it")
        if tensors is not None:
            with self.lock():
                return self._load_tensors(entry, names, _names(tensors, "tensors"), device)
        make = target.find if target else castore.state.tensors.allocate_all
        with self.lock():
            loaded = load_parts(self.store, entry.id, entry.manifest, names, make, self.threads, self.remotes)
        if target:
            target.finish()
        found = {}
        for name in names:
            tree, made = loaded.pop(name)
            found[name] = castore.state.tensors.restore(tree, castore.state.tensors.move_tensors(made, device))
        return found

    def _load_tensors(self, entry: Entry, names: Sequence[str], patterns: Sequence[str], device: Any) -> dict[str, Any]:
        import castore.state.tensors

        found: dict[str, Any] = {}
        unmatched = set(patterns)
        for name in names:
            with locate_errors(name, entry.id):
                data, _ = fallback.read(self.store, self.remotes, entry.manifest.parts[name].index)
                described = part_index.decode(data)
                keys = {key: leaf.number for key, leaf in part_index.leaves(described.tree) if type(leaf) is TensorRef}
                wanted: dict[str, int] = {}
                for pattern in patterns:
                    matches = [key for key in keys if key == pattern or fnmatch.fnmatchcase(key, pattern)]
                    wanted.update((key, keys[key]) for key in matches)
                    unmatched -= {pattern} if matches else set()
                made = load_tensors(
                    self.store,
                    described,
                    sorted(set(wanted.values())),
                    castore.state.tensors.allocate,
                    self.threads,
                    self.remotes,
                )
            moved = dict(zip(made, castore.state.tensors.move_tensors(list(made.values()), device), strict=True))
            found[name] = {key: moved[number] for key, number in wanted.items()}
        if unmatched:
            near = f"such as {min(keys)}" if keys else "none at all"
            raise NotFound(f"checkpoint {entry.id[:12]} has no tensor {min(unmatched)}: part {names[-1]} has {near}")
        return found

    def resolve(
        self,
        want: str = "best",
        experiment: Experiment | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        parts: Sequence[str] | None = None,
        allow_data_change: bool | None = None,
        weights_only: bool = False,
    ) -> Resolution:
        """The checkpoint to use: ``best``, ``latest`` or an id, compatible with ``experiment`` and available.

        ``run:best`` and ``run:latest`` look at one run. Without a ``experiment``, that of the newest checkpoint. With
        ``weights_only``, one of which only the model is left will do when there is no other. Changes nothing, whatever
        it finds. UnknownId, AmbiguousId.
        """
        run, _, name = want.rpartition(":")
        listing = self.catalog.listing() if name in _RELATIVE else Listing((), ())
        if name in _RELATIVE:
            want = name
            entries = [entry for entry in _checkpoints(listing) if run in ("", entry.manifest.run)]
            if run and not entries:
                runs = sorted({entry.manifest.run for entry in _checkpoints(listing)})
                raise NotFound(f"no checkpoint of run {run!r}" + (f"; runs: {', '.join(runs)}" if runs else ""))
        else:
            entry = self.catalog.find(want)
            if entry.manifest.kind != "checkpoint":
                raise NotFound(f"{entry.id[:12]} is no checkpoint but {entry.manifest.kind}")
            want, entries = entry.id, [entry]
        if experiment is None:
            experiment = entries[0].manifest.experiment if entries else Experiment()
        requirement = Requirement(
            want=want,
            experiment=experiment,
            config=config,
            parts=_names(parts, "parts") if parts is not None else None,
            weights_only=weights_only,
            allow_data_change=self.config.resume.allow_data_change if allow_data_change is None else allow_data_change,
            tie_tolerance=self.config.resume.tie_tolerance,
        )
        with self.lock():
            found = resolve(requirement, entries, self.part_states)
        damaged = tuple(Damaged(str(broken.path), broken.reason) for broken in listing.broken)
        return dataclasses.replace(found, damaged=damaged)

    def fresh_start(self, found: Resolution, *, allow_fresh: bool) -> str:
        """Why a run to which ``found`` gives no match may begin anew; empty when it may not."""
        if not found.rejected and not found.damaged:
            return "there is no checkpoint yet"
        if not allow_fresh and self.config.resume.on_missing != "fresh":
            return ""
        why = "--allow-fresh" if allow_fresh else 'on_missing = "fresh" in config.toml'
        return f"no checkpoint can be resumed, and {why} allows that"

    def find(self, wanted: str) -> Entry:
        """The manifest that ``wanted`` names: first digits of its id, or ``best`` and so on as in :meth:`resolve`.

        UnknownId, AmbiguousId, NothingMatches, NothingAvailable.
        """
        if wanted.rpartition(":")[2] in _RELATIVE:
            wanted = self.resolve(wanted).require().id
        return self.catalog.find(wanted)

    def checkpoints(self) -> list[Entry]:
        """Every checkpoint of the work tree, newest first."""
        return _checkpoints(self.catalog.listing())

    def furthest(self, wanted: Entry, config: Mapping[str, Any]) -> Entry | None:
        """Where sessions with exactly these settings have led from ``wanted``, in its line; None when nowhere."""
        comparable = [entry for entry in self.checkpoints() if entry.manifest.experiment == wanted.manifest.experiment]
        return lineage.furthest(comparable, wanted.id, config)

    def datasets(self, config: Mapping[str, Any]) -> list[Entry]:
        """Prepared data of the work tree, saved with exactly this ``config``, newest first, whatever its age."""
        entries = self.catalog.listing().entries
        return [one for one in entries if one.manifest.kind == "dataset" and one.manifest.config == dict(config)]

    def part_states(self, entry: Entry) -> dict[str, PartState]:
        """Where the data of each part of a checkpoint is."""
        return part_states(self.store, entry.manifest, self.remotes)

    def add_session(self, run: str, started: datetime, summary: Mapping[str, Any]) -> Path:
        """Keep a session's summary as JSON in ``sessions/<run>/``, to be committed beside the manifests."""
        if not manifest.RUN.fullmatch(run):
            raise InvalidManifest(f"run {run[:80]!r} is not 1 to 64 letters, digits, '.', '_' or '-'")
        folder = self.root / "sessions" / run
        path = folder / f"{started.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}.json"
        data = msgspec.json.format(msgspec.json.encode(summary, order="sorted"), indent=2) + b"\n"
        fs.make_directory(folder)
        if self.config.store.fsync:
            fs.sync_directory(self.root)
            fs.sync_directory(folder.parent)
        fs.publish(path, data, self.root / "tmp", durable=self.config.store.fsync)
        return path

    def git_commit(self) -> str | None:
        """The commit checked out where the repository lives, with ``-dirty`` when tracked files differ from it."""
        return git.commit(self.root.parent)

    def _full_id(self, wanted: str) -> ObjectId:
        return ObjectId(wanted) if is_object_id(wanted) else self.find(wanted).id


def _checkpoints(listing: Listing) -> list[Entry]:
    return [entry for entry in listing.entries if entry.manifest.kind == "checkpoint"]


def _names(given: Iterable[str], what: str) -> tuple[str, ...]:
    if isinstance(given, str):
        raise UsageError(f"{what} is a list of names, not the one string {given!r}")
    return tuple(given)


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_PLACEHOLDER = manifest.Part(index=ObjectId("0" * 64), bytes=0, stored_bytes=0)


def _whole(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError as error:
        raise InvalidManifest(f"can't record this checkpoint: step is a whole number, not {step!r}") from error


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidManifest(f"can't record metric {name}: {error}") from error


def _flatten(state: Any, name: str) -> Flat:
    if isinstance(state, Flat):
        return state  # taken apart already, by who saves in the background
    # a state that holds a tensor implies that torch is loaded; castore doesn't load it for one that holds none
    if "torch" in sys.modules:
        import castore.state.tensors

        return castore.state.tensors.flatten(state, name)
    return Flat(state, ())
