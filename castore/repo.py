"""A repository: find, open or create ``.castore/``; save, find, resolve and load checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import itertools
import logging
import operator
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from castore import config as configs
from castore import transfer
from castore.errors import (
    ConfigError,
    CorruptionError,
    InvalidManifest,
    NotFound,
    NothingAvailable,
    RepoNotFound,
    StorageError,
    UsageError,
    printable,
)
from castore.format import manifest
from castore.format.ids import ObjectId, is_object_id
from castore.format.manifest import Entry, Experiment, Kind, Manifest, describe
from castore.notebook import Checkpoints
from castore.parallel import processors
from castore.policy import lineage
from castore.policy.resolution import Damaged, PartState, Requirement, Resolution, resolve
from castore.policy.retention import Policy, policy_of
from castore.policy.scoring import score
from castore.policy.selector import Selector
from castore.progress import Progress, ignore_progress
from castore.remotes.base import PublishingRemote, Remote, is_publishing
from castore.remotes.registry import open_configured
from castore.state import objects
from castore.state import parts as state_parts
from castore.state.parts import Flat, PlaceTensors
from castore.storage import fs, git
from castore.storage.catalog import Catalog, Listing
from castore.storage.location import claim, locate, share
from castore.storage.object_store import ObjectStore
from castore.text import format_size
from castore.transfer import Pulled, Pushed

_log = logging.getLogger(__name__)

FOLDER = ".castore"
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveResult:
    """A checkpoint that is on the disk: its id, its manifest and that file's ``path``, and what the save added.

    ``new_objects`` and ``new_bytes`` (as stored) count only what the store did not have before. ``warnings`` say what
    may surprise later; they are logged, too.

        >>> import tempfile
        >>> repo = Repo.init(tempfile.mkdtemp())
        >>> saved = repo.save({"trainer": {"step": 1}}, run="main", step=1)
        >>> saved.new_objects, saved.path.name == f"000000001-{saved.id[:12]}.json"
        (1, True)
    """

    id: ObjectId
    manifest: Manifest
    path: Path
    new_objects: int
    new_bytes: int
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        added = f"{format_size(self.new_bytes)} new"
        return (
            f"<SaveResult {describe(Entry(self.id, self.manifest))}, {added}{', with warnings' * bool(self.warnings)}>"
        )


class Repo:
    """An open repository; ``root`` is its ``.castore`` folder. Every error derives from :class:`castore.CastoreError`.

    It is cheap to open, and may be used by several threads and beside other processes.

        >>> import tempfile
        >>> repo = Repo.init(tempfile.mkdtemp())
        >>> saved = repo.save({"trainer": {"order": [2, 0, 1]}}, run="main", step=500, metrics={"val_loss": 2.31})
        >>> repo.load("best")
        {'trainer': {'order': [2, 0, 1]}}
        >>> repo.find("main:latest").id == repo.find(saved.id[:8]).id == saved.id
        True
        >>> repo.resolve("best").require().step
        500
    """

    def __init__(self, root: Path, config: configs.Config) -> None:
        self.root = root
        self.config = config
        self.location = locate(root)
        share(self.location)
        self.store = ObjectStore(self.location.data, durable=config.store.fsync, direct=config.store.direct == "auto")
        self.catalog = Catalog(root, durable=config.store.fsync)
        self.remotes: list[Remote] = open_configured(config.locations, root)
        self._unscored_runs: set[str] = set()

    def __repr__(self) -> str:
        return f"<Repo {printable(str(self.root))}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the checkpoints."""
        return self.checkpoints()._repr_html_()

    # -- opening -----------------------------------------------------------------------------------------------------

    @classmethod
    def init(cls, path: str | os.PathLike[str] = ".") -> Repo:
        """Create ``path/.castore``, or add what an existing one lacks; existing files are left as they are."""
        root = Path(path).resolve() / FOLDER
        location = locate(root, is_new=True)
        data = location.data
        for folder in (root / "manifests", root / "tmp", *(data / name for name in ("objects", "tmp", "trash"))):
            fs.make_directory(folder)
        claim(location)
        fs.sync_directory(root.parent)
        fs.publish(root / ".gitignore", configs.GITIGNORE.encode(), root / "tmp")
        fs.publish(root / ".gitattributes", configs.GITATTRIBUTES.encode(), root / "tmp")
        # git keeps no empty folder, and a clone must have the folder that manifests go to
        fs.publish(root / "manifests" / ".gitkeep", b"", root / "tmp")
        # last: to open(), a folder with a configuration is a repository
        fs.publish(root / "config.toml", configs.TEMPLATE.encode(), root / "tmp")
        return cls.open(root.parent)

    @classmethod
    def open(cls, path: str | os.PathLike[str] = ".") -> Repo:
        """Open the repository in ``path`` or, like git, in the nearest folder above it. RepoNotFound, ConfigError."""
        start = Path(path).resolve()
        for folder in (start, *start.parents):
            root = folder / FOLDER
            if os.path.isdir(root):
                break
        else:
            raise RepoNotFound(str(start))
        path = root / "config.toml"
        try:
            data = fs.read(path, _MAX_CONFIG_BYTES)
        except FileNotFoundError:
            # the search doesn't go on further up: it would find another repository, with other checkpoints
            raise ConfigError(str(path), "is missing: `castore init` writes a new one") from None
        except StorageError as error:
            raise ConfigError(str(path), f"can't be read: {error}") from error
        return cls(root, configs.parse(data.decode(errors="replace"), str(path)))

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool = False, wait: bool = True) -> Iterator[None]:
        """Hold the repository's lock while the block runs.

        Shared, it keeps other processes from deleting; ``exclusive``, from doing anything. Raise Locked if it is not
        free within the configured time, or at once without ``wait``.
        """
        timeout = self.config.store.lock_timeout if wait else 0.0
        with fs.lock(self.root / "lock", exclusive=exclusive, timeout=timeout):
            yield

    @property
    def threads(self) -> int:
        """How many threads hash and compress: as configured, or one for each processor."""
        return self.config.store.threads or processors()

    def remote(self, name: str = "") -> Remote:
        """Return a remote by its name, the default one without. UsageError if there is none, or none by default."""
        wanted = name or self.config.default_remote
        for remote in self.remotes:
            if remote.name == wanted:
                return remote
        names = ", ".join(remote.name for remote in self.remotes)
        if not names:
            raise UsageError("there is no remote: `castore remote add NAME URL` adds one")
        if name:
            raise UsageError(f"there is no remote {name!r}: there is {names}")
        raise UsageError(f"there are several remotes ({names}): name one, or `castore remote set-default NAME`")

    def publishing_remote(self, name: str = "") -> PublishingRemote:
        """Return a remote that can be written to; see :meth:`remote`. UsageError for one that is for reading alone."""
        remote = self.remote(name)
        if not is_publishing(remote):
            raise UsageError(f"remote {remote.name} is for reading alone")
        return remote

    @property
    def policy(self) -> Policy:
        """What garbage collection keeps, as configured."""
        return policy_of(self.config)

    # -- saving ------------------------------------------------------------------------------------------------------

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
        kind: Kind = "checkpoint",
    ) -> SaveResult:
        """Store a checkpoint: ``parts`` maps names to states, any nesting of dicts, lists, tensors and plain values.

        On return the checkpoint is durable: it survives a power cut. ``step`` counts completed training steps.
        ``metrics`` are finite; ``val_loss`` and those that ``experiment`` declares make up the score. ``parent`` is the
        selector of the checkpoint that training went on from. ``config`` and ``info`` are JSON, recorded as given.
        ``created`` defaults to now. A save of kind ``dataset`` holds prepared data: no metrics, no experiment.

        UnsupportedValue, InvalidManifest, StorageError or Locked; then nothing becomes visible.
        """
        draft = self.draft(
            parts,
            run=run,
            step=step,
            metrics=metrics,
            experiment=experiment,
            parent=parent,
            tags=tags,
            note=note,
            config=config,
            info=info,
            created=created,
            kind=kind,
        )
        flat = {name: _flatten(state, name) for name, state in parts.items()}
        with self.lock():
            saved = state_parts.save_parts(self.store, flat, self.config.chunk_bytes, self.threads)
            final = msgspec.structs.replace(draft, parts=saved.parts)
            checkpoint_id, path = self.catalog.add(final)
        return SaveResult(
            id=checkpoint_id,
            manifest=final,
            path=path,
            new_objects=saved.new_objects,
            new_bytes=saved.new_bytes,
            warnings=self.warn_unscored(final),
        )

    def check_save(self, parts: Iterable[str], **fields: Any) -> None:
        """Raise what :meth:`save` would for these names of parts and keyword arguments, without looking at any state.

        UsageError for an unknown keyword, InvalidManifest for what can't be recorded.
        """
        known = inspect.signature(self.draft).parameters.keys() - {"parts"}
        for name in sorted(fields.keys() - known):
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(f"a save takes no {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        for name in ("run", "step"):
            if name not in fields:
                raise UsageError(f"a save needs a {name}")
        self.draft(parts, **fields)

    def draft(
        self,
        parts: Iterable[str],
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
        kind: Kind = "checkpoint",
    ) -> Manifest:
        """Return the manifest of a save before its parts are stored: what can't be recorded fails here."""
        parent_id = self._parent_id(parent) if parent else None
        draft = Manifest(
            kind=kind,
            run=run,
            step=_check_step(step),
            created=self._time_after(parent_id, created or datetime.now(UTC)),
            parent=parent_id,
            parts=dict.fromkeys(parts, _PLACEHOLDER),
            experiment=experiment or Experiment(),
            metrics={name: _check_metric(name, value) for name, value in (metrics or {}).items()},
            tags=sorted(set(_check_names(tags, "tags"))),
            note=note,
            config=dict(config or {}),
            info=dict(info or {}),
        )
        self.catalog.check_run(run)
        manifest.encode(draft)
        return draft

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self.config)

    def _time_after(self, parent_id: ObjectId | None, moment: datetime) -> str:
        """Return the time to record: ``moment``, but later than that of the parent, whose clock may have been ahead."""
        time = manifest.timestamp(moment)
        with contextlib.suppress(CorruptionError, StorageError, OverflowError):  # of the parent: that is for verify
            for parent in self.catalog.matching(parent_id or ""):
                if parent.manifest.created >= time:
                    before = datetime.fromisoformat(parent.manifest.created)
                    time = manifest.timestamp(before + timedelta(microseconds=1))
        return time

    def warn_unscored(self, saved: Manifest) -> tuple[str, ...]:
        """Return, and log once a run, that nothing was measured by which the best could be told."""
        if saved.kind != "checkpoint" or score(saved) is not None:
            return ()
        text = "neither val_loss nor a metric that the experiment declares: `best` will be the newest"
        if saved.run not in self._unscored_runs:
            self._unscored_runs.add(saved.run)
            _log.warning("run %s is saved with %s", saved.run, text)
        return (text,)

    def _parent_id(self, selector: str) -> ObjectId:
        # a full id is taken as it is: the manifest of a parent may have been removed
        return ObjectId(selector) if is_object_id(selector) else self.find(selector).id

    def add_session(self, run: str, started: datetime, summary: Mapping[str, Any]) -> Path:
        """Write a session's summary as JSON to ``sessions/<run>/``, to be committed beside the manifests.

        Returns the path of the file. InvalidManifest for a ``run`` that can't be the name of one.
        """
        data = msgspec.json.format(msgspec.json.encode(summary, order="sorted"), indent=2) + b"\n"
        return self.catalog.add_session(run, f"{started.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}.json", data)

    def git_commit(self) -> str | None:
        """Return the commit checked out where the repository lives, with ``-dirty`` if tracked files differ from it."""
        return git.commit(self.root.parent)

    # -- loading -----------------------------------------------------------------------------------------------------

    def load(self, selector: str, parts: Sequence[str] | None = None, *, device: Any = None) -> dict[str, Any]:
        """Return the state of each part of a checkpoint, or of those named; its tensors are moved to ``device``.

        ``selector`` is as in :meth:`find`. Every byte is verified. The errors of :meth:`find`; NotFound for a part that
        the checkpoint lacks; ObjectMissing, CorruptObject or CorruptIndex naming object, part and manifest: another
        checkpoint is never loaded in its place.
        """
        from castore.state import tensors

        entry = self.find(selector)
        return self._load_parts(entry, _choose_parts(entry, parts), tensors.allocate_all, device)

    def load_into(self, selector: str, target: Any, parts: Sequence[str] | None = None) -> dict[str, Any]:
        """Fill the tensors of ``target`` where they are, and return the states of its parts, made of those tensors.

        ``target`` is a module, which takes the part ``model``, or a dict from parts to states and modules. Values that
        are no tensors are in what is returned, and not changed in ``target``. Errors as those of :meth:`load`, and
        after one some tensors are filled and some not; UsageError, before any is, when ``target`` doesn't fit.
        """
        from castore.state import tensors

        entry = self.find(selector)
        load_target = tensors.LoadTarget(target)
        names = _choose_parts(entry, load_target.parts if parts is None else parts)
        for name in names:
            if name not in load_target.parts:
                raise UsageError(f"can't load part {name}: the target has no place for it")
        loaded = self._load_parts(entry, names, load_target.place, None)
        load_target.finish()
        return loaded

    def outline(self, selector: str, parts: Sequence[str]) -> dict[str, Any]:
        """Read and verify every byte of these parts; return their states with tensors on the device ``meta``.

        They have types and shapes, and take no memory: to see whether a checkpoint fits before :meth:`load_into`.
        Errors as those of :meth:`load`.
        """
        from castore.state import tensors

        entry = self.find(selector)
        names = _choose_parts(entry, parts)
        with self.lock():
            indexes = state_parts.check_parts(self.store, entry.id, entry.manifest, names, self.threads, self.remotes)
        return {name: tensors.outline(index) for name, index in indexes.items()}

    def load_tensors(
        self, selector: str, patterns: Sequence[str], parts: Sequence[str] | None = None, *, device: Any = None
    ) -> dict[str, dict[str, Any]]:
        """Return, for each part of a checkpoint or those named, the tensors whose key matches one of ``patterns``.

        Keys are as ``castore diff`` prints them; patterns such as ``blocks.0.*`` are those of :mod:`fnmatch`. No chunks
        but those of these tensors are read. Errors as those of :meth:`load`; NotFound for a pattern without a match.
        """
        from castore.state import tensors

        entry = self.find(selector)
        names, patterns = _choose_parts(entry, parts), _check_names(patterns, "patterns")
        with self.lock():
            loaded = state_parts.load_matching(
                self.store,
                entry.id,
                entry.manifest,
                names,
                patterns,
                tensors.allocate,
                tensors.bytes_of,
                self.threads,
                self.remotes,
            )
        states = {}
        for name in names:
            numbers, by_number = loaded.pop(name)
            moved = dict(zip(by_number, tensors.move_tensors(list(by_number.values()), device), strict=True))
            states[name] = {key: moved[number] for key, number in numbers.items()}
        return states

    def _load_parts(self, entry: Entry, names: Sequence[str], place: PlaceTensors, device: Any) -> dict[str, Any]:
        from castore.state import tensors

        with self.lock():
            loaded = state_parts.load_parts(
                self.store, entry.id, entry.manifest, names, place, tensors.bytes_of, self.threads, self.remotes
            )
        states = {}
        for name in names:
            tree, placed = loaded.pop(name)  # popped, so that what has been moved to the device is freed here
            states[name] = tensors.restore(tree, tensors.move_tensors(placed, device))
        return states

    # -- remotes -----------------------------------------------------------------------------------------------------

    def fetch(
        self,
        wanted: str | Entry,
        parts: Iterable[str] | None = None,
        *,
        remotes: Sequence[Remote] | None = None,
        progress: Progress = ignore_progress,
    ) -> Pulled:
        """Fetch what the store lacks of a checkpoint, or of these parts of it, every byte verified.

        Loading fetches by itself; this is for doing it before, with ``progress`` (in bytes), and from some of the
        ``remotes`` alone. The errors of :meth:`find`; ObjectMissing when no remote has a good copy of something: what
        was fetched until then stays.
        """
        entry = self.find(wanted) if isinstance(wanted, str) else wanted
        names = _choose_parts(entry, parts)
        return transfer.pull(
            self.store, self.lock, self.remotes if remotes is None else remotes, entry, names, progress
        )

    def push(
        self,
        entries: Sequence[Entry],
        remote: PublishingRemote | None = None,
        *,
        repair: bool = False,
        progress: Progress = ignore_progress,
    ) -> Pushed:
        """Copy what a remote, the default one when None, lacks of these checkpoints: chunks, indexes, then manifests.

        Errors and details are those of :func:`castore.transfer.push`.
        """
        target = remote or self.publishing_remote()
        return transfer.push(self.store, self.lock, entries, target, repair=repair, progress=progress)

    # -- finding -----------------------------------------------------------------------------------------------------

    def find(self, selector: str, *, kind: Kind | None = None) -> Entry:
        """Return the manifest that a selector names: the first digits of its id, a tag, ``best``, ``run:latest`` ...

        ``kind`` is what it must be, anything when None. ``best`` and ``latest`` are those of checkpoints that
        :meth:`resolve` finds available; ``latest`` of another kind is the newest manifest of that kind, and so is
        ``books:latest`` where all that has the name ``books`` is of another kind. UnknownId, AmbiguousId, NotFound,
        NothingMatches or NothingAvailable.
        """
        parsed = Selector.parse(selector, kind)
        if not parsed.is_relative:
            tagged = self.catalog.tagged(parsed.name)
            matches = self.catalog.matching(tagged or parsed.name)
            if tagged and not matches:
                raise NotFound(f"tag {parsed.name} names {tagged[:12]}, whose manifest isn't here: restore it from git")
            return parsed.choose(matches, itertools.chain(self.catalog.tags()[0], self.catalog.known_ids()))
        if kind is None and parsed.run:
            parsed = parsed.widened(self.catalog.listing().entries)
        if parsed.kind == "checkpoint":
            return self.find(self.resolve(selector).require().id)
        return parsed.newest(self.catalog.listing().entries)

    def resolve(
        self,
        selector: str = "best",
        experiment: Experiment | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        parts: Sequence[str] | None = None,
        allow_data_change: bool | None = None,
        weights_only: bool = False,
    ) -> Resolution:
        """Resolve a selector to the checkpoint to use: compatible with ``experiment``, and its data available.

        ``experiment`` defaults to that of the newest candidate. ``parts`` are those that must be available, all when
        None; with ``weights_only``, a checkpoint that has only its model left will do if there is no other. ``config``
        is compared to list the differences. Changes nothing in the store. UnknownId, AmbiguousId, NotFound.
        """
        parsed = Selector.parse(selector, "checkpoint")
        if parsed.is_relative:
            listing = self.catalog.listing()
            requested, candidates = parsed.name, parsed.candidates(listing.entries)
        else:
            entry = self.find(selector, kind="checkpoint")
            listing = Listing((), ())
            requested, candidates = entry.id, [entry]
        if experiment is None:
            experiment = candidates[0].manifest.experiment if candidates else Experiment()
        requirement = Requirement(
            selector=requested,
            experiment=experiment,
            config=config,
            parts=_check_names(parts, "parts") if parts is not None else None,
            weights_only=weights_only,
            allow_data_change=self.config.resume.allow_data_change if allow_data_change is None else allow_data_change,
            tie_tolerance=self.config.resume.tie_tolerance,
        )
        with self.lock():
            resolution = resolve(requirement, candidates, self.part_states)
        damaged = tuple(Damaged(str(broken.path), broken.reason) for broken in listing.broken)
        return dataclasses.replace(resolution, damaged=damaged)

    def fresh_start(self, resolution: Resolution, *, allow_fresh: bool) -> str | None:
        """Return the reason starting from scratch is allowed, or None. Asked of a resolution without a match."""
        if not resolution.rejected and not resolution.damaged:
            return "there is no checkpoint yet"
        if not allow_fresh and self.config.resume.on_missing != "fresh":
            return None
        permission = "--allow-fresh" if allow_fresh else 'on_missing = "fresh" in config.toml'
        return f"no checkpoint can be resumed, and {permission} allows that"

    def checkpoints(self, *, run: str | None = None, tag: str | None = None) -> Checkpoints:
        """Return every checkpoint of the work tree, newest first: a list. ``run`` and ``tag`` choose among them.

        >>> import tempfile
        >>> repo = Repo.init(tempfile.mkdtemp())
        >>> for run in ("a", "b"):
        ...     saved = repo.save({"model": {"w": 1}}, run=run, step=500, metrics={"val_loss": 2.5})
        >>> [entry.manifest.run for entry in repo.checkpoints(run="a")]
        ['a']
        """
        named = self.catalog.tags()[0].get(tag) if tag is not None else None
        return Checkpoints(
            entry
            for entry in Selector.parse("latest").candidates(self.catalog.listing().entries)
            if run in (None, entry.manifest.run) and (tag is None or entry.id == named or tag in entry.manifest.tags)
        )

    def datasets(self, config: Mapping[str, Any]) -> list[Entry]:
        """Return the prepared data of the work tree that was saved with exactly this ``config``, newest first."""
        datasets = Selector.parse("latest", "dataset").candidates(self.catalog.listing().entries)
        return [entry for entry in datasets if entry.manifest.config == dict(config)]

    def furthest(self, entry: Entry, config: Mapping[str, Any]) -> Entry | None:
        """Return the descendant with the most steps trained with exactly this config, or None.

        Only descendants of the same experiment count.
        """
        experiment = entry.manifest.experiment
        comparable = [other for other in self.checkpoints() if other.manifest.experiment == experiment]
        return lineage.furthest(comparable, entry.id, config)

    def pin(self, entry: Entry) -> tuple[Path, dict[str, PartState]]:
        """Keep all of a checkpoint whatever the policy says; return the pin's path and where the parts' data is.

        NothingAvailable if no data is left that a pin could keep.
        """
        with self.lock():  # gc may be about to delete the data
            states = self._keepable(entry, "pinned")
            return self.catalog.pin(entry.id), states

    def unpin(self, checkpoint_id: ObjectId) -> bool:
        """Remove a pin; return whether there was one in the work tree. A pin in another branch still counts."""
        with self.lock():
            return self.catalog.unpin(checkpoint_id)

    def tag(self, entry: Entry, name: str, *, move: bool = False) -> tuple[Path, dict[str, PartState]]:
        """Give a checkpoint a name, which also keeps all of it; return the tag's path and where the parts' data is.

        With ``move``, a tag that names another checkpoint is taken from it. UsageError for a name that no tag may have
        or, without ``move``, that another has; NothingAvailable if no data is left to keep.
        """
        with self.lock():
            states = self._keepable(entry, "tagged")
            return self.catalog.add_tag(name, entry.id, move=move), states

    def untag(self, name: str) -> None:
        """Remove a tag. One of that name in another branch still counts. NotFound if there is none here."""
        with self.lock():
            if not self.catalog.remove_tag(name):
                raise NotFound(f"there is no tag {name!r}; `castore tag` lists them")

    def _keepable(self, entry: Entry, verb: str) -> dict[str, PartState]:
        """Return where the data of each part is. NothingAvailable if there is none: nothing could be kept."""
        states = self.part_states(entry)
        if all(state.where == "missing" for state in states.values()):
            reason = next(iter(states.values())).reason
            raise NothingAvailable(f"{entry.id[:12]} can't be {verb}, as no data of it is left to keep: {reason}")
        return states

    def forget(self, entry: Entry) -> Path:
        """Remove a manifest from the work tree, so that gc may delete its data; return its path."""
        with self.lock():
            return self.catalog.forget(entry)

    def part_states_of(self, entries: Iterable[Entry]) -> dict[ObjectId, dict[str, PartState]]:
        """Return :meth:`part_states` of many checkpoints, which asks remotes little.

        What only a remote has counts as there when its index is, which was pushed last; only reading tells.
        """
        manifests = {entry.id: entry.manifest for entry in entries}
        return state_parts.part_states_of(self.store, manifests, self.remotes)

    def part_states(self, entry: Entry) -> dict[str, PartState]:
        """Return where the data of each part of a checkpoint is: in the store, in a remote, or nowhere."""
        return state_parts.part_states(self.store, entry.manifest, self.remotes)


def _choose_parts(entry: Entry, parts: Iterable[str] | None) -> tuple[str, ...]:
    """Return the names of the parts to load, all when None. NotFound for one that the checkpoint lacks."""
    names = tuple(dict.fromkeys(entry.manifest.parts if parts is None else _check_names(parts, "parts")))
    for name in names:
        if name not in entry.manifest.parts:
            has = ", ".join(entry.manifest.parts)
            raise NotFound(f"checkpoint {entry.id[:12]} has no part {name!r}: it has {has}")
    return names


def _check_names(names: Iterable[str], argument: str) -> tuple[str, ...]:
    if isinstance(names, str):  # whose letters would be taken for names
        raise UsageError(f"{argument} is a list of names, not the one string {names!r}")
    return tuple(names)


_PLACEHOLDER = manifest.Part(index=ObjectId("0" * 64), bytes=0, stored_bytes=0)


def _check_step(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError as error:
        raise InvalidManifest(f"can't record this checkpoint: step is a whole number, not {step!r}") from error


def _check_metric(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidManifest(f"can't record metric {name}: {error}") from error


def _flatten(state: Any, part: str) -> Flat:
    if isinstance(state, Flat):
        return state  # taken apart already, by a saver that works in the background
    # one of them is loaded if the state holds a tensor or an array; castore loads neither for a state without one
    if "torch" in sys.modules or "numpy" in sys.modules:
        from castore.state import tensors

        return tensors.flatten(state, part)
    return Flat(objects.take_apart(state, part), ())
