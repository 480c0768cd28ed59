"""Faults put into castore on purpose: each must make its check fail.

    python tests/mutants.py           # each fault in turn, in copies of the source: some minutes
    python tests/mutants.py lock      # those whose name has this in it

Each takes away one thing that keeps data safe: a sync, a lock, the check of a hash, an order. The checks run without any
fault first, and must pass.
"""

# ruff: noqa: E501, T201 - a program, which quotes source text as it stands

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("castore", "nanecho", "tests", "cli.py", "pyproject.toml", "README.md", "docs", "Makefile")


@dataclass(frozen=True)
class Mutant:
    """In ``file``, the ``nth`` occurrence of ``old`` becomes ``new``; ``check``, a command for Python, must fail."""

    name: str
    file: str
    old: str
    new: str
    check: tuple[str, ...]
    nth: int = 0


def _sync(name: str, file: str, old: str, scenario: str) -> Mutant:
    new = old
    for call in ("fs.sync_directory(", "sync_directory(", "fs.sync(", "sync("):
        new = new.replace(call, "(lambda *_: None)(") if new == old else new
    for folders in ("sorted(self._directories)", "sorted(above | folders)"):
        new = new.replace(folders, "[]")
    return Mutant(f"sync: {name}", file, old, new, ("tests/crash_states.py", "--no-kills", scenario))


def _lock(use: str, file: str, old: str, nth: int = 0) -> Mutant:
    new = old
    for call in (
        "self.lock()",
        "repo.lock()",
        "self._lock()",
        " lock()",
        "repo.lock(exclusive=not dry_run, wait=wait)",
    ):
        new = new.replace(call, " __import__('contextlib').nullcontext()")
    return Mutant(
        f"lock: {use}", file, old, new, _pytest(f"tests/test_locking.py::test_it_waits_for_who_deletes[{use}]"), nth
    )


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments)


_REPO = "castore/repo.py"
_STORE = "castore/storage/object_store.py"
_CATALOG = "castore/storage/catalog.py"
_WITH = "with self.lock():"

MUTANTS = (
    _sync("data of an object", _STORE, "fs.sync(descriptor, temp)", "save"),
    _sync("names of objects", _STORE, "list(self._finishers.map(fs.sync_directory, sorted(self._directories)))", "save"),
    _sync("between what gc moves", _STORE, "fs.sync_directory(self.trash)", "gc"),
    _sync("between what gc brings back", _STORE, "sorted(folders)):\n                    fs.sync_directory(folder)", "gc after a cut gc"),
    _sync("chunks before an index", _STORE, "map_all(fs.sync_directory, sorted(above | folders)", "pull"),
    _sync("data of a file that is published", "castore/storage/fs.py", "                sync(descriptor, temporary)", "tag"),
    _sync("name of a file that is published", "castore/storage/fs.py", "            sync_directory(path.parent)", "pin"),
    _sync("first folder of manifests", _CATALOG, "fs.sync_directory(self.root.parent)", "pull"),
    _sync("folder of a run", _CATALOG, "fs.sync_directory(self.root)", "first save"),
    _sync("folder of pins", _CATALOG, "fs.sync_directory(folder.parent)", "pin"),
    _sync("data of a file that is checked out", "castore/storage/output_file.py", "fs.sync(self._descriptor, self._temporary)", "checkout"),
    _sync("folders of a checkout", "castore/trees/checkout.py", "fs.sync_directory(self._folder / name)", "checkout"),
    _sync("a new repository", _REPO, "fs.sync_directory(root.parent)", "init"),
    _sync("folders of a shelf", "castore/remotes/folder.py", "fs.sync_directory(folder.parent)", "push"),
    _sync("what is removed of the catalog", _CATALOG, "            fs.sync_directory(path.parent)", "forget"),
    _sync("between what gc deletes", _STORE, "groups[number - 1]}):\n                    fs.sync_directory(folder)", "gc"),
    _sync("what is removed from a shelf", "castore/remotes/folder.py", "fs.sync_directory(folder)", "remote gc"),
    _sync("name of an exported file", "castore/storage/output_file.py", "fs.sync_directory(target.parent)", "export"),
    _sync("a copy that is mended", "castore/remotes/folder.py", "fs.sync_directory(path.parent)", "repair"),
    _lock("save", _REPO, _WITH, 0),
    _lock("outline", _REPO, _WITH, 1),
    _lock("load tensors", _REPO, _WITH, 2),
    _lock("load", _REPO, _WITH, 3),
    _lock("load into", _REPO, _WITH, 3),
    _lock("resolve", _REPO, _WITH, 4),
    _lock("pin", _REPO, _WITH, 5),
    _lock("unpin", _REPO, _WITH, 6),
    _lock("tag", _REPO, _WITH, 7),
    _lock("untag", _REPO, _WITH, 8),
    _lock("forget", _REPO, _WITH, 9),
    _lock("checkout", "castore/trees/checkout.py", "with repo.lock(), "),
    _lock("add", "castore/trees/add.py", "with repo.lock():"),
    _lock("verify", "castore/verify.py", "with repo.lock():"),
    _lock("remote gc", "castore/remote_gc.py", "with repo.lock():"),
    _lock("stats", "castore/stats.py", "with repo.lock():"),
    _lock("diff", "castore/diff.py", "with repo.lock():"),
    _lock("fetch", "castore/transfer.py", "    with lock():"),
    _lock("push", "castore/transfer.py", "with self._lock(), "),
    _lock("gc", "castore/gc.py", "with repo.lock(exclusive=not dry_run, wait=wait):"),
    Mutant(
        "lock: of all", _REPO, 'with fs.lock(self.root / "lock", exclusive=exclusive, timeout=timeout):', "if True:",
        _pytest("tests/test_locking.py"),
    ),
    Mutant(
        "lock: report", "castore/report/collect.py", "with repo.lock():", "if True:",
        _pytest("tests/test_locking.py", "-k", "report"),
    ),
    _lock("dcp save", "castore/sharding.py", "held.enter_context(repo.lock())"),
    Mutant(
        "lock: gc while it reads", "castore/gc.py", "with repo.lock(wait=wait):", "if True:",
        _pytest("tests/test_locking.py", "-k", "gc_reads"),
    ),
    Mutant("lock: log", "castore/commands/log.py", "with repo.lock():", "if True:", _pytest("tests/commands/test_exchange.py", "-k", "locked")),
    Mutant("lock: upload", "castore/github/bundling.py", "with repo.lock():", "if True:", _pytest("tests/github/test_recovery.py", "-k", "waits")),
    Mutant("lock: recover", "castore/github/recovery.py", "with repo.lock():", "if True:", _pytest("tests/github/test_recovery.py", "-k", "waits")),
    Mutant(
        "lock: gc among others", "castore/gc.py", "exclusive=not dry_run", "exclusive=False",
        _pytest("tests/test_gc.py", "-k", "lock or wait or busy or at_once"),
    ),
    Mutant("hash: of an object", "castore/format/frame.py", "if actual_id != object_id:", "if False:", _pytest("tests/format/test_frame.py")),
    Mutant(
        "hash: of a bundle's index", "castore/format/bundle.py", " or hash_bytes(index) != bundle_id", "",
        _pytest("tests/format/test_bundle.py"),
    ),
    Mutant(
        "hash: of the cache of manifests", "castore/storage/manifest_cache.py", "if hash_bytes(data[DIGEST_BYTES:]) != ", "if False and ",
        _pytest("tests/storage/test_manifest_cache.py"),
    ),
    Mutant("hash: of what others may write to", _STORE, "if hash_bytes(copied) != object_id:", "if False:", _pytest("tests/state/test_changing.py")),
    Mutant("hash: of a manifest's name", _CATALOG, 'if not path.endswith("/" + file_name):', "if False:", _pytest("tests/storage/test_catalog.py")),
    Mutant("hash: canonical manifests", "castore/format/manifest.py", "if canonical(manifest) != data:", "if False:", _pytest("tests/format/test_manifest.py")),
    Mutant("hash: of a record's name", _CATALOG, "if record.file_name != path.name:", "if False:", _pytest("tests/storage/test_catalog.py")),
    Mutant("hash: of files that are there", "castore/trees/compare.py", ' and hash_bytes(b"".join(there)) == chunk.id', "", _pytest("tests/trees")),
    Mutant(
        "hash: of the blob that a signature covers", "castore/signatures.py",
        " and hash_bytes(contents[blob]) == entry_id", "", _pytest("tests/test_signatures.py"),
    ),
    Mutant("hash: what is deduplicated against", _STORE, "            self._store.read_into(object_id, memoryview(bytearray(length)))\n", "            pass\n", _pytest("tests/storage/test_object_store.py")),
    Mutant("order: chunks before indexes", "castore/policy/retention.py", "return lambda object_id: ranks.get(object_id, 2)", "return lambda object_id: -ranks.get(object_id, 2)", _pytest("tests/test_gc_damage.py", "tests/test_gc.py")),
    Mutant(
        "order: name before data", _STORE, "            fs.rename(temp, path)\n", "", ("tests/crash_states.py", "--no-kills", "save"),
    ),
)  # fmt: skip


def changed(mutant: Mutant, root: Path) -> str:
    """Return the text of the file that has the fault. ValueError if there is nothing to change."""
    pieces = (root / mutant.file).read_text(encoding="utf-8").split(mutant.old)
    if len(pieces) < mutant.nth + 2:
        raise ValueError(f"{mutant.name}: {mutant.file} has no such text: {mutant.old}")
    head, tail = mutant.old.join(pieces[: mutant.nth + 1]), mutant.old.join(pieces[mutant.nth + 1 :])
    return f"{head}{mutant.new}{tail}"


def _check(mutant: Mutant | None, command: tuple[str, ...]) -> tuple[int, str, float]:
    """Run a command in a copy of the source, with a fault or without; return its exit code, what it said, seconds."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, root / name)
        if mutant is not None:
            (root / mutant.file).write_text(changed(mutant, root), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
        ran = subprocess.run(
            [sys.executable, *command],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        return ran.returncode, ran.stdout[-1500:] + ran.stderr[-1500:], time.monotonic() - begun


def _without_faults(checks: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return commands that together run all checks: tests that are named by their files alone run as one."""
    tests: dict[str, None] = {}
    others: dict[tuple[str, ...], None] = {}
    for check in checks:
        if check[: len(_pytest())] == _pytest() and "-k" not in check:
            tests |= dict.fromkeys(check[len(_pytest()) :])
        else:
            others[check] = None
    return [*others, *([_pytest(*tests)] if tests else [])]


def main() -> int:
    """Try all mutants whose name has the word that was given in it."""
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in sys.argv[1:])]
    survived = 0
    with multiprocessing.get_context("forkserver").Pool(len(os.sched_getaffinity(0))) as pool:
        commands = _without_faults([mutant.check for mutant in chosen])
        for command, (code, said, _) in zip(
            commands, pool.starmap(_check, [(None, one) for one in commands]), strict=True
        ):
            if code:
                raise SystemExit(f"without any fault, {' '.join(command)} exits {code}:\n{said}")
        print(f"{len(commands)} checks pass without a fault", flush=True)
        jobs = [pool.apply_async(_check, (mutant, mutant.check)) for mutant in chosen]
        for mutant, job in zip(chosen, jobs, strict=True):
            code, said, seconds = job.get()
            survived += code == 0
            print(f"{'caught' if code else 'SURVIVED':8} {mutant.name:45} {seconds:6.1f} s", flush=True)
            if code not in (0, 1):
                print(said)
    print(f"{len(chosen)} faults, {len(chosen) - survived} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
