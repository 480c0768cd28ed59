"""Whatever reads objects or adds any waits while another process deletes, and gives up after the time that is set."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from builders import parts

import castore
from castore import Repo, dcp, errors
from castore.diff import diff
from castore.format.manifest import Entry
from castore.policy.retention import Policy
from castore.remote_gc import collect_remote
from castore.remotes.folder import Folder
from castore.report.collect import collect_report
from castore.stats import stats
from castore.trees.add import add_tree
from castore.trees.checkout import check_out
from castore.verify import verify

CONFIG = '[store]\nchunk_size = "64KiB"\nthreads = 1\nlock_timeout = 0.2\nfsync = false\n[remotes]\ncollector = "m"\n'

Use = Callable[[Repo, Entry], object]
USES: dict[str, Use] = {
    "save": lambda repo, _: repo.save(parts(3), run="r", step=3),
    "load": lambda repo, entry: repo.load(entry.id),
    "load into": lambda repo, entry: repo.load_into(entry.id, parts(1)),
    "outline": lambda repo, entry: repo.outline(entry.id, ["model"]),
    "load tensors": lambda repo, entry: repo.load_tensors(entry.id, ["*"]),
    "resolve": lambda repo, _: repo.resolve("best"),
    "fetch": lambda repo, entry: repo.fetch(entry),
    "push": lambda repo, entry: repo.push([entry], Folder("shelf", repo.root.parent / "shelf")),
    "pin": lambda repo, entry: repo.pin(entry),
    "unpin": lambda repo, entry: repo.unpin(entry.id),
    "tag": lambda repo, entry: repo.tag(entry, "name"),
    "untag": lambda repo, _: repo.untag("good"),
    "forget": lambda repo, entry: repo.forget(entry),
    "add": lambda repo, _: add_tree(repo, repo.root / "config.toml"),
    "checkout": lambda repo, _: check_out(repo, "config.toml:latest", repo.root.parent),
    "verify": lambda repo, _: list(verify(repo)),
    "stats": lambda repo, _: stats(repo, datetime.now(UTC), errors.NotFound("nothing")),
    "diff": lambda repo, entry: diff(repo, entry, entry),
    "gc": lambda repo, _: castore.collect_garbage(repo, grace=timedelta()),
    "dry gc": lambda repo, _: castore.collect_garbage(repo, grace=timedelta(), dry_run=True),
    "remote gc": lambda repo, _: collect_remote(
        repo, Folder("shelf", repo.root.parent / "shelf"), Policy(), machine="m", grace=timedelta()
    ),
    "dcp save": lambda repo, _: dcp.save(repo, parts(4), run="r", step=4),
}


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[tuple[Repo, Entry]]:
    """A repository while somebody else holds the exclusive lock, and a checkpoint in it."""
    Repo.init(tmp_path)
    (tmp_path / ".castore" / "config.toml").write_text(CONFIG)
    repo = Repo.open(tmp_path)
    for step in (1, 2):
        repo.save(parts(step), run="r", step=step, metrics={"val_loss": 1.0})
    add_tree(repo, repo.root / "config.toml")
    entry = repo.find("latest")
    repo.catalog.add_tag("good", entry.id)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with Repo.open(tmp_path).lock(exclusive=True):
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)  # another thread is as much a stranger to a lock as another process
    holder.start()
    held.wait(60)
    with contextlib.ExitStack() as ending:
        ending.callback(holder.join)
        ending.callback(done.set)
        yield Repo.open(tmp_path), entry


@pytest.mark.parametrize("name", USES)
def test_it_waits_for_who_deletes(busy: tuple[Repo, Entry], name: str) -> None:
    with pytest.raises(errors.Locked):
        USES[name](*busy)


@pytest.fixture
def full(tmp_path: Path) -> Repo:
    """A repository with two checkpoints, as a process that begins sees it."""
    Repo.init(tmp_path)
    (tmp_path / ".castore" / "config.toml").write_text(CONFIG)
    for step in (1, 2):
        Repo.open(tmp_path).save(parts(step), run="r", step=step, metrics={"val_loss": 3.0 - step})
    return Repo.open(tmp_path)


def cannot_delete(repo: Repo) -> bool:
    with pytest.raises(errors.Locked), Repo.open(repo.root.parent).lock(exclusive=True):
        pass
    return True


def test_what_gc_reads_before_it_deletes_others_do_not_delete(full: Repo) -> None:
    tried = []
    progress = lambda done, _: tried.append((done, cannot_delete(full)))  # noqa: E731
    castore.collect_garbage(full, Policy(keep=1, keep_latest=1), grace=timedelta(), progress=progress)
    assert tried


def test_what_a_report_looks_at_others_do_not_delete(full: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    look = full.part_states_of

    def looking(entries: Sequence[Entry]) -> object:
        tried.append(cannot_delete(full))
        return look(entries)

    monkeypatch.setattr(full, "part_states_of", looking)
    collect_report(full, datetime.now(UTC))
    assert tried
