"""Repositories as an attacker would have them cloned: what stands in the place of files, and what is written in them.

    python tests/hostile_clones.py          # every thing in every place, with every command: some minutes

Each command runs in a process of its own, with little memory and little time. It may fail, with an exit code of the
documentation and a message; it must not hang, eat memory, print a secret or a control character, or change anything
outside of the repository.
"""

# ruff: noqa: T201 - a program, too

from __future__ import annotations

import errno
import gc
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch

from castore import Experiment, Repo
from castore.format.ids import hash_bytes
from castore.format.manifest import Manifest, Metric, Part, canonical, decode
from castore.trees.add import add_tree

SECRET = "what is in the secret file"
CODES = range(8)  # docs/cli.md
SECONDS = 20
_MEMORY = 1 << 30

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("log",), ("log", "--graph"), ("log", "--json"), ("show", "latest"), ("show", "latest", "--json"), ("ls", "latest"),
    ("stats",), ("status",), ("find", "*"), ("diff", "latest", "best"), ("resolve",), ("doctor",), ("verify",),
    ("verify", "--signed"), ("report", "-o", "report.html", "--force"), ("report", "--format", "md"),
    ("report", "--format", "json"), ("forget", "latest"),
    ("gc", "--dry-run"), ("tag", "latest", "again"), ("pin", "latest"), ("push", "shelf"), ("gc",), ("init",),
)  # fmt: skip

PLACES = (
    "config.toml", ".gitignore", "manifests", "manifests/main", "manifests/main/000000009-0123456789ab.json",
    "pins", f"pins/{'ab' * 32}", "tags", "tags/good", "bundles", "bundles/0123456789abcdef.json", "sessions",
    "sessions/main", "sessions/main/1.json", "objects", "objects/ab", f"objects/ab/{'ab' * 32}", "trash",
    f"trash/{'ab' * 32}", "tmp", "quarantine", "cache", "cache/manifests", "lock", "lock.gate", "local.toml",
    "repository",
)  # fmt: skip


def _sparse(path: Path, _: Path) -> None:
    with open(path, "wb") as file:
        try:
            file.truncate(1 << 40)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            file.truncate(1 << 36)


THINGS: dict[str, Callable[[Path, Path], object]] = {
    "link to a file": lambda path, outside: path.symlink_to(outside / "secret"),
    "link to a folder": lambda path, outside: path.symlink_to(outside),
    "link to zeros": lambda path, _: path.symlink_to("/dev/zero"),
    "link to itself": lambda path, _: path.symlink_to(path.name),
    "link to nothing": lambda path, _: path.symlink_to("nowhere"),
    "pipe": lambda path, _: os.mkfifo(path),
    "folder": lambda path, _: path.mkdir(),
    "a terabyte": _sparse,
    "deep JSON": lambda path, _: path.write_bytes(b'{"a":' * 200_000),
    "much JSON": lambda path, _: path.write_bytes(b"[" + b"1," * (8 << 20) + b"1]"),
    "no text": lambda path, _: path.write_bytes(bytes(range(256)) * 10),
    "an empty file": lambda path, _: path.touch(),
}


def make(root: Path) -> Path:
    """Make a repository with a little of everything, and a folder outside that is nobody's to touch."""
    outside, work = root / "outside", root / "work"
    outside.mkdir()
    (outside / "secret").write_text(SECRET)
    (outside / ("ab" * 32)).write_text(SECRET)
    work.mkdir()
    repo = Repo.init(work)
    config = repo.root / "config.toml"
    config.write_text(config.read_text().replace("[remotes]", '[remotes]\nshelf = "../shelf"'))
    repo = Repo.open(work)
    for step in (1, 2):
        state = {"model": {"w": torch.arange(20.0) + step}, "trainer": {"step": step}}
        saved = repo.save(state, run="main", step=step, metrics={"val_loss": 3.0 - step})
    (work / "file").write_text("text")
    add_tree(repo, work / "file")
    repo.catalog.pin(saved.id)
    repo.catalog.add_tag("good", saved.id)
    repo.catalog.add_session("main", "1.json", b'{"started":"2026-01-01T00:00:00.000000Z"}')
    for name in ("trash", "cache", "quarantine", "bundles"):
        (repo.root / name).mkdir(exist_ok=True)
    return work


def put(work: Path, place: str, thing: str) -> None:
    """Let a thing stand in the place of what was there."""
    path = work / ".castore" / place
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    THINGS[thing](path, work.parent / "outside")


# -- running -----------------------------------------------------------------------------------------------------------


def run(work: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command in a forked process; return its exit code, negative for a signal, and all that it printed."""
    printed = work.parent / "printed"
    child = os.fork()
    if child == 0:
        try:
            os._exit(_main(work, arguments, printed))
        except BaseException:
            with open(printed, "a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), printed.read_text(encoding="utf-8", errors="surrogateescape")


def _main(work: Path, arguments: Sequence[str], printed: Path) -> int:
    from castore.__main__ import main

    signal.alarm(SECONDS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    os.chdir(work)
    environment = {"PATH": os.environ["PATH"], "HOME": str(work.parent), "NO_COLOR": "1", "COLUMNS": "120"}
    out = io.TextIOWrapper(io.FileIO(printed, "w"), encoding="utf-8", errors="surrogateescape", write_through=True)
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch.object(sys, "argv", ["castore", *arguments]),
        mock.patch.multiple(sys, stdout=out, stderr=out),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
            return code if isinstance(code, int) else 1
    return 0


def what_is_wrong(work: Path, arguments: Sequence[str]) -> str:
    """Run a command, and return what it must not have done; empty if nothing."""
    outside = work.parent / "outside"
    before = _look(outside)
    code, printed = run(work, arguments)
    told = f"castore {' '.join(arguments)} exits {code}"
    if code not in CODES:
        return f"{told}: {printed[-2000:]}"
    if code and not printed.strip():
        return f"{told} without a word"
    if "Traceback" in printed:
        return f"{told}: {printed[-2000:]}"
    if SECRET in printed:
        return f"{told} and prints the secret"
    if odd := sorted({char for char in printed if not char.isprintable() and char != "\n"}):
        return f"{told} and prints {odd}"
    return "" if _look(outside) == before else f"{told} and changes what is outside"


def _look(folder: Path) -> list[tuple[str, int, bytes]]:
    return [(path.name, path.lstat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.iterdir())]


def _load_all() -> None:
    """Import here, once, what each command would import in its process."""
    import castore.commands
    import castore.report

    for package in (castore.commands, castore.report):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for name in ("__main__", "torch", "gc", "verify", "doctor", "diff", "stats", "pushing"):
        importlib.import_module(f"castore.{name}")
    gc.freeze()


def try_place(place: str, things: Sequence[str], commands: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield what goes wrong where each of these things stands in a place."""
    _load_all()
    with tempfile.TemporaryDirectory() as template:
        make(Path(template))
        for thing in things:
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder) / "root"
                shutil.copytree(template, root, symlinks=True)
                put(root / "work", place, thing)
                for arguments in commands:
                    if wrong := what_is_wrong(root / "work", arguments):
                        yield f"{place} is {thing}: {wrong}"


# -- hostile text ------------------------------------------------------------------------------------------------------

TEXTS = (
    "\x1b[2J\x1b]0;title\x07", "a\rb\x08\x08", "\u202e\u2066reversed", "<script>alert(1)</script>",
    '"><img src=x onerror=a()>', "]]></style></script>", "`touch touched`", "$(touch touched)", "; touch touched #",
    "\n::error::forged\n", "\n::set-output name=a::b", "| a | b |\n|---|---|", "[x](javascript:alert(1))",
    "{{ secrets.TOKEN }}", "\ud800", "\0",
)  # fmt: skip


def hostile_manifests() -> Iterator[bytes]:
    """Yield manifests with each text in each field that takes text, canonical but for what its rules may refuse."""
    part = Part(index=hash_bytes(b"x"), bytes=10, stored_bytes=10)
    plain = Manifest(run="main", step=7, created="2026-01-01T00:00:00.000000Z", parts={"model": part})
    for text in TEXTS:
        fields: tuple[dict[str, Any], ...] = (
            {"note": text}, {"tags": (text,)}, {"config": {text: text}}, {"info": {text: [text]}}, {"run": text},
            {"metrics": {text: 1.0}}, {"parts": {text: part}}, {"parent": text}, {"created": text},
            {"experiment": Experiment(model={text: text}, tokenizer=text, data=text, metrics={text: Metric()})},
        )  # fmt: skip
        for changed in fields:
            document = msgspec.to_builtins(plain)
            document.update(msgspec.to_builtins(changed))
            try:
                yield canonical(document)
            except (UnicodeEncodeError, ValueError):  # no text of JSON
                yield json.dumps(document).encode()


def plant(work: Path, data: bytes) -> None:
    """Put a manifest where a clone would have it, and the same text in the files beside it."""
    folder = work / ".castore"
    (folder / "manifests" / "main" / f"000000007-{hash_bytes(data)[:12]}.json").write_bytes(data)
    document = json.loads(data)
    session = {"started": "2026-01-01T00:00:00.000000Z", "run": "main", **document.get("config", {})}
    (folder / "sessions" / "main" / "2.json").write_text(json.dumps(session))


def try_texts(number: int, of: int, commands: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield what goes wrong for every ``of``-th manifest from ``number`` on, all in one repository."""
    _load_all()
    with tempfile.TemporaryDirectory() as folder:
        work = make(Path(folder))
        for data in itertools.islice(hostile_manifests(), number, None, of):
            plant(work, data)
        for arguments in commands:
            if wrong := what_is_wrong(work, arguments):
                yield wrong
        page = (work / "report.html").read_text() if (work / "report.html").exists() else ""
        for told in ("<script>alert(1)", "<img src=x", "]]></style></script>"):
            if told in page:
                yield f"the report holds {told}"
        if (work / "touched").exists():
            yield "a shell has run"


def is_accepted(data: bytes) -> bool:
    """Whether castore takes a manifest for one."""
    try:
        decode(data)
    except Exception:
        return False
    return True


# -- a repository in the repository ------------------------------------------------------------------------------------


def plant_repository(folder: Path, program: str) -> None:
    """Make a folder pass for a bare repository, as a commit can bring one, whose settings name a program to run."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", f"--git-dir={folder}", f"--work-tree={folder}"]
    empty = folder.parent / "empty-template"
    empty.mkdir()
    names = [path.name for path in folder.iterdir()]
    for arguments in (["init", "-q", f"--template={empty}"], ["add", "-f", *names], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    empty.rmdir()
    settings = {"core.bare": "false", "core.worktree": ".", "filter.x.clean": f"{program}; cat", "gpg.format": "ssh"}
    settings |= {"gpg.ssh.program": program, "core.fsmonitor": program, "core.hooksPath": "hooks"}
    for name, value in settings.items():
        subprocess.run(["git", "config", "--file", str(folder / "config"), name, value], check=True)
    (folder / "info").mkdir(exist_ok=True)
    (folder / "info" / "attributes").write_text("* filter=x\n")


def try_repositories(commands: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield what goes wrong where .castore, a folder in it or the one above passes for a repository of its own."""
    _load_all()
    for place in (".castore", ".castore/manifests/main", "."):
        with tempfile.TemporaryDirectory() as folder:
            work = make(Path(folder))
            plant_repository(work / place, f"touch {work.parent / 'outside' / 'ran'}")
            subprocess.run(["git", "init", "-q", folder], check=True)
            for arguments in commands:
                if wrong := what_is_wrong(work, arguments):
                    yield f"{place} is a repository: {wrong}"


def main() -> int:
    """Try everything."""
    wrong = []
    with multiprocessing.get_context("forkserver").Pool(len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.apply_async(_try_all, (place,)) for place in PLACES]
        for place, job in zip(PLACES, jobs, strict=True):
            found = job.get()
            wrong += found
            print(f"{place[:60]:60} {len(THINGS) * len(COMMANDS):4} commands, {len(found)} wrong", flush=True)
    found = list(try_texts(0, 1, COMMANDS))
    print(f"{'hostile texts':60} {len(COMMANDS):4} commands, {len(found)} wrong")
    planted = list(try_repositories(COMMANDS))
    print(f"{'a repository in the repository':60} {3 * len(COMMANDS):4} commands, {len(planted)} wrong")
    print(*wrong, *found, *planted, sep="\n")
    return 1 if wrong or found or planted else 0


def _try_all(place: str) -> list[str]:
    return list(try_place(place, list(THINGS), COMMANDS))


if __name__ == "__main__":
    sys.exit(main())
