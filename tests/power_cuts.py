"""What a power cut may leave of a series of operations on the disk: they are recorded, and the states built from them.

Only data that was synced, and names whose folder was synced, are sure to be there afterwards. Of the rest any part may
be, in any order: a file whose data was not synced is empty, holds zeros, is torn, or is whole; a name is old or new.
One operation is never half done: a file that is renamed has the old name or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

FOLDER = "a folder"


class Link(NamedTuple):
    """A symbolic link and what it says."""

    text: str


Content = bytes | Link | Literal["a folder"]
State = dict[str, Content]
"""What is on a disk: by path, relative to the root."""


class Operation(NamedTuple):
    """One operation. ``names`` are the names that it gives to files, by number, or takes away (None)."""

    kind: str
    path: str
    names: tuple[tuple[str, int | None], ...] = ()
    file: int = -1
    data: bytes = b""
    at: int = 0
    site: str = ""  # which function of castore asked for a sync


def read_state(root: Path) -> State:
    """Read all that is below a folder."""
    state: State = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            kept: Content = FOLDER
            if stat.S_ISLNK(mode):
                kept = Link(os.readlink(path))
            elif stat.S_ISREG(mode):
                kept = path.read_bytes()
            state[str(path.relative_to(root))] = kept
    return state


def write_state(state: Mapping[str, Content], root: Path) -> None:
    """Write a state below an empty folder."""
    for path in sorted(state):
        content = state[path]
        if content == FOLDER:
            os.mkdir(root / path)
        elif isinstance(content, Link):
            os.symlink(content.text, root / path)
        else:
            assert isinstance(content, bytes)
            (root / path).write_bytes(content)


@dataclass
class Recording:
    """What was on the disk before, all of it sure, and the operations since."""

    root: Path
    before: State
    files: dict[int, Content] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    log: list[Operation] = field(default_factory=list)


@contextlib.contextmanager
def recording(root: Path, after: Callable[[int], None] = lambda _: None) -> Iterator[Recording]:
    """Record what this process does below ``root`` while the block runs, through the functions of ``os``.

    ``after`` is called after each operation, with how many there were.
    """
    record = Recording(root, read_state(root))
    for number, (path, content) in enumerate(record.before.items()):
        record.first[path] = number
        record.files[number] = content
    recorder = _Recorder(record, after)
    originals = {name: getattr(os, name) for name in recorder.wrappers}
    try:
        for name, wrapper in recorder.wrappers.items():
            setattr(os, name, wrapper(originals[name]))
        yield record
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


class _Recorder:
    """Wraps the functions of ``os`` that change a disk. One operation at a time, so that their order is known."""

    def __init__(self, record: Recording, after: Callable[[int], None]) -> None:
        self._record = record
        self._after = after
        self._lock = threading.RLock()
        self._now = dict(record.first)  # the number of the file that has a path now
        self._open: dict[int, list[int]] = {}  # descriptor -> file, position
        self._folders: dict[int, str] = {}
        self._written: set[int] = set()  # the files that the functions of ``os`` have written to
        self._next = len(record.files)
        self.wrappers: dict[str, Callable[[Any], Any]] = {
            "open": self._wrap_open, "close": self._wrap_close, "write": self._wrap_write, "writev": self._wrap_write,
            "ftruncate": self._wrap_truncate, "fsync": self._wrap_sync, "fdatasync": self._wrap_sync,
            "mkdir": self._wrap_mkdir, "rmdir": self._wrap_remove, "unlink": self._wrap_remove,
            "replace": self._wrap_rename, "link": self._wrap_link, "symlink": self._wrap_symlink,
        }  # fmt: skip
        for name in (
            "pwrite",
            "pwritev",
            "truncate",
            "rename",
            "remove",
            "sendfile",
            "copy_file_range",
            "posix_fallocate",
        ):
            if hasattr(os, name):
                self.wrappers[name] = self._refuse

    def _path(self, path: Any) -> str | None:
        try:
            return os.path.relpath(os.fspath(path), self._record.root) if self._is_below(path) else None
        except TypeError:
            return None

    def _is_below(self, path: Any) -> bool:
        return f"{os.path.abspath(os.fspath(path))}/".startswith(f"{self._record.root}/")

    def _new_file(self, content: Content) -> int:
        number, self._next = self._next, self._next + 1
        self._record.files[number] = content
        return number

    def _add(self, kind: str, path: str, *names: tuple[str, int | None], **about: Any) -> None:
        self._record.log.append(Operation(kind, path, names, **about))
        for name, number in names:
            if number is None:
                self._now.pop(name, None)
            else:
                self._now[name] = number
        self._after(len(self._record.log))

    def _refuse(self, original: Any) -> Any:
        def refused(*arguments: Any, **options: Any) -> Any:
            if any(isinstance(item, str | Path) and self._is_below(item) for item in arguments):
                raise AssertionError(f"{original.__name__} is not recorded")
            if arguments and isinstance(arguments[0], int) and arguments[0] in self._open:
                raise AssertionError(f"{original.__name__} is not recorded")
            return original(*arguments, **options)

        return refused

    def _wrap_open(self, original: Any) -> Any:
        def wrapped(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            name = None if options.get("dir_fd") is not None else self._path(path)
            if name is None:
                return original(path, flags, *arguments, **options)
            with self._lock:
                is_new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
                descriptor: int = original(path, flags, *arguments, **options)
                if is_new:
                    self._add("create", name, (name, self._new_file(b"")))
                if name in self._now and self._record.files[self._now[name]] != FOLDER:
                    self._open[descriptor] = [self._now[name], 0]
                    self._folders.pop(descriptor, None)
                else:
                    self._folders[descriptor] = name
                    self._open.pop(descriptor, None)
                return descriptor

        return wrapped

    def _wrap_close(self, original: Any) -> Any:
        def wrapped(descriptor: int) -> None:
            with self._lock:
                self._open.pop(descriptor, None)
                self._folders.pop(descriptor, None)
                original(descriptor)

        return wrapped

    def _wrap_write(self, original: Any) -> Any:
        def wrapped(descriptor: int, data: Any) -> int:
            with self._lock:
                count: int = original(descriptor, data)
                if descriptor in self._open:
                    whole = b"".join(map(bytes, data)) if isinstance(data, list) else bytes(data)
                    file, at = self._open[descriptor]
                    self._written.add(file)
                    self._add("write", "", file=file, data=whole[:count], at=at)
                    self._open[descriptor][1] += count
                return count

        return wrapped

    def _wrap_truncate(self, original: Any) -> Any:
        def wrapped(descriptor: int, size: int) -> None:
            with self._lock:
                original(descriptor, size)
                if descriptor in self._open:
                    self._add("truncate", "", file=self._open[descriptor][0], at=size)

        return wrapped

    def _wrap_sync(self, original: Any) -> Any:
        def wrapped(descriptor: int) -> None:
            with self._lock:
                original(descriptor)
                if descriptor in self._open:
                    file = self._open[descriptor][0]
                    path = self._name_of(file)
                    if file not in self._written and (data := (self._record.root / path).read_bytes()):
                        # a library that was given the path wrote it: when exactly does not matter to what is sure
                        self._add("write", "", file=file, data=data)
                    self._add("sync", path, file=file, site=_site())
                elif descriptor in self._folders:
                    self._add("sync folder", self._folders[descriptor], site=_site())

        return wrapped

    def _name_of(self, file: int) -> str:
        return next((name for name, number in self._now.items() if number == file), "")

    def _wrap_mkdir(self, original: Any) -> Any:
        def wrapped(path: Any, *arguments: Any, **options: Any) -> None:
            with self._lock:
                original(path, *arguments, **options)
                if (name := self._path(path)) is not None:
                    self._add("mkdir", name, (name, self._new_file(FOLDER)))

        return wrapped

    def _wrap_remove(self, original: Any) -> Any:
        def wrapped(path: Any, **options: Any) -> None:
            with self._lock:
                original(path, **options)
                if (name := self._path(path)) is not None:
                    self._add("remove", name, (name, None))

        return wrapped

    def _wrap_rename(self, original: Any) -> Any:
        def wrapped(source: Any, target: Any) -> None:
            with self._lock:
                original(source, target)
                first, second = self._path(source), self._path(target)
                if first is not None and second is not None:
                    self._add("rename", second, (second, self._now[first]), (first, None))

        return wrapped

    def _wrap_link(self, original: Any) -> Any:
        def wrapped(source: Any, target: Any, **options: Any) -> None:
            with self._lock:
                original(source, target, **options)
                first, second = self._path(source), self._path(target)
                if first is not None and second is not None:
                    self._add("link", second, (second, self._now[first]))

        return wrapped

    def _wrap_symlink(self, original: Any) -> Any:
        def wrapped(text: Any, path: Any, **options: Any) -> None:
            with self._lock:
                original(text, path, **options)
                if (name := self._path(path)) is not None:
                    self._add("symlink", name, (name, self._new_file(Link(os.fspath(text)))))

        return wrapped


def _site() -> str:
    """Return the function of castore, outside the module that syncs for all, that led here."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if "castore" in path.parts and "tests" not in path.parts and path.name != "fs.py":
            return f"{path.stem}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return threading.current_thread().name.rpartition("_")[0]  # of a pool that syncs, and nothing else


# -- after the cut -----------------------------------------------------------------------------------------------------

Damage = Literal["whole", "old", "zeros", "torn"]
DAMAGES: tuple[Damage, ...] = ("whole", "old", "zeros", "torn")


@dataclass
class Cut:
    """What is sure after some of the operations, and what is not."""

    sure: dict[str, tuple[int, int | None]]  # path -> (number of the operation, file)
    pending: list[tuple[int, Operation]]  # names that may be old or new
    data: dict[int, bytes]  # as it was written
    sure_data: dict[int, bytes]
    files: Mapping[int, Content]

    def unsynced(self) -> list[int]:
        """Return the files whose data is not sure."""
        return [file for file, data in self.data.items() if self.sure_data.get(file, b"") != data]

    def state(self, done: Callable[[int], bool], damage: Callable[[int], Damage]) -> State:
        """Return the state in which the pending operations that are ``done`` happened."""
        names = dict(self.sure)
        for number, operation in self.pending:
            if done(number):
                for name, file in operation.names:
                    if names.get(name, (-1, None))[0] < number:
                        names[name] = number, file
        state: State = {}
        for name in sorted(names):
            file = names[name][1]
            parent = os.path.dirname(name)
            if file is not None and (not parent or state.get(parent) == FOLDER):
                state[name] = self._content(file, damage)
        return state

    def _content(self, file: int, damage: Callable[[int], Damage]) -> Content:
        if file not in self.data:
            return self.files[file]
        data, sure = self.data[file], self.sure_data.get(file, b"")
        if data == sure:
            return data
        match damage(file):
            case "whole":
                return data
            case "old":
                return sure
            case "zeros":
                return bytes(len(data))
            case _:
                return data[: len(data) // 2]


def cuts(record: Recording, log: Sequence[Operation] | None = None) -> Iterator[Cut]:
    """Yield what is sure after none, one, two ... all of the operations; ``log`` replaces those that were recorded."""
    data = {number: content for number, content in record.files.items() if isinstance(content, bytes)}
    first = set(record.first.values())
    sure_data = {number: content for number, content in data.items() if number in first}
    sure: dict[str, tuple[int, int | None]] = {path: (-1, number) for path, number in record.first.items()}
    pending: list[tuple[int, Operation]] = []
    for number, operation in enumerate([None, *(record.log if log is None else log)]):
        match operation:
            case None:
                pass
            case Operation("write"):
                old = data[operation.file].ljust(operation.at, b"\0")
                data[operation.file] = old[: operation.at] + operation.data + old[operation.at + len(operation.data) :]
            case Operation("truncate"):
                data[operation.file] = data[operation.file][: operation.at].ljust(operation.at, b"\0")
            case Operation("sync"):
                sure_data[operation.file] = data[operation.file]
            case Operation("sync folder"):
                kept = []
                for when, earlier in pending:
                    if os.path.dirname(earlier.path) == ("" if operation.path == "." else operation.path):
                        for name, file in earlier.names:
                            if sure.get(name, (-1, None))[0] < when:
                                sure[name] = when, file
                    else:
                        kept.append((when, earlier))
                pending = kept
            case _:
                pending = [*pending, (number, operation)]
        yield Cut(dict(sure), list(pending), dict(data), dict(sure_data), record.files)


def states(cut: Cut, rng: random.Random, samples: int, dull: str = "/tmp/") -> Iterator[State]:
    """Yield states that a cut may leave, each once: all, nothing, each pending name alone or alone missing, samples.

    Names that contain ``dull`` are pending or not by chance alone: nobody reads them.
    """
    seen: set[str] = set()
    telling = [number for number, operation in cut.pending if dull not in f"/{operation.path}"]
    unsynced = cut.unsynced()

    def plans() -> Iterator[tuple[Callable[[int], bool], Callable[[int], Damage]]]:
        yield (lambda _: False), (lambda _: "old")
        for damage in DAMAGES:
            yield (lambda _: True), (lambda _, damage=damage: damage)  # type: ignore[misc]
        for one in telling:
            yield (lambda number, one=one: number != one), (lambda _: "whole")  # type: ignore[misc]
            yield (lambda number, one=one: number == one), (lambda _: "whole")  # type: ignore[misc]
        for one in unsynced:
            for damage in DAMAGES[1:]:
                yield (lambda _: True), (lambda file, one=one, damage=damage: damage if file == one else "whole")  # type: ignore[misc]
        for _ in range(samples):
            share = rng.random()
            done = {number for number, _ in cut.pending if rng.random() < share}
            damages: dict[int, Damage] = {file: rng.choice(DAMAGES) for file in unsynced}
            yield done.__contains__, (lambda file, damages=damages: damages[file])  # type: ignore[misc]

    for done, damage in plans():
        state = cut.state(done, damage)
        if (name := digest(state)) not in seen:
            seen.add(name)
            yield state


def digest(state: Mapping[str, Content]) -> str:
    """Return what tells a state from others."""
    summed = hashlib.blake2b(digest_size=16)
    for path, content in sorted(state.items()):
        summed.update(f"{path}\0{type(content).__name__}{len(content)}\0".encode())
        summed.update(content if isinstance(content, bytes) else "".join(content).encode())
    return summed.hexdigest()
