from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import exact
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from make_golden import describe
from second_reader import read_part

import castore
from castore import Repo, errors
from castore.format.ids import ObjectId
from castore.policy.retention import Policy
from castore.state import parts as state_parts
from castore.storage import fs, git_process
from castore.storage import git as git_module
from castore.storage.object_store import ObjectStore
from castore.verify import verify

ONE = Policy(keep=1, keep_latest=0, keep_optimizer=1)


def parts(seed: int, size: int = 4000) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(size, generator=generator)
    return {
        "model": {"weights": weights, "frozen": torch.arange(30_000)},
        "optimizer": {"first": weights * 0.1, "second": torch.rand(size, generator=generator)},
        "trainer": {"step": seed},
    }


def save(repo: Repo, step: int, loss: float, **options: Any) -> str:
    return repo.save(parts(step), run="main", step=step, metrics={"val_loss": loss}, **options).id


def where(repo: Repo, checkpoint_id: str) -> dict[str, str]:
    return {name: state.where for name, state in repo.part_states(repo.find(checkpoint_id)).items()}


def path_of(repo: Repo, checkpoint_id: str) -> Path:
    return repo.catalog.root / repo.find(checkpoint_id).manifest.file_name(ObjectId(checkpoint_id))


def objects(repo: Repo) -> set[str]:
    return set(repo.store.stored())


WHOLE = {"model": "local", "optimizer": "local", "trainer": "local"}
WEIGHTS = {"model": "local", "optimizer": "missing", "trainer": "missing"}
GONE = {"model": "missing", "optimizer": "missing", "trainer": "missing"}


def test_what_is_kept_loads_bit_exact_and_the_rest_is_history(repo: Repo) -> None:
    ids = [save(repo, step, 10 - step) for step in range(6)]
    plan = castore.collect_garbage(repo, Policy(keep=3, keep_latest=1, keep_optimizer=1))
    assert [where(repo, checkpoint_id) for checkpoint_id in ids] == [GONE, GONE, GONE, WEIGHTS, WEIGHTS, WHOLE]
    assert exact(repo.load(ids[5])) == exact(parts(5))
    assert exact(repo.load(ids[3], parts=["model"])) == exact({"model": parts(3)["model"]})
    assert len(repo.checkpoints()) == 6
    assert plan.freed_bytes == sum(plan.delete.values()) > 0
    assert plan.kept_bytes == sum(one.size for one in repo.store.stored().values())
    assert not any(repo.store.trash.iterdir())


def test_a_dry_run_plans_the_same_and_touches_nothing(repo: Repo) -> None:
    for step in range(4):
        save(repo, step, 10 - step)
    before = objects(repo)
    planned = castore.collect_garbage(repo, ONE, dry_run=True)
    assert objects(repo) == before
    assert castore.collect_garbage(repo, ONE) == planned
    assert objects(repo) == before - set(planned.delete)


def test_fifty_checkpoints_shrink_to_less_than_half_of_ten_raw_ones(repo: Repo) -> None:
    """The bar: at most 45 % of what ten full raw checkpoints take."""
    size = 300_000
    for step in range(50):
        state = parts(step, size)
        del state["model"]["frozen"]  # what is shared would flatter the figure
        repo.save(state, run="main", step=step, metrics={"val_loss": 1 / (step + 1)})
    castore.collect_garbage(repo, Policy(keep=10, keep_optimizer=2))
    stored = sum(one.size for one in repo.store.stored().values())
    assert stored <= 0.45 * 10 * 3 * 4 * size
    loadable = [entry for entry in repo.checkpoints() if where(repo, entry.id)["model"] == "local"]
    assert [entry.manifest.step for entry in loadable] == list(range(49, 39, -1))


# -- what counts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def git(repo: Repo) -> Callable[..., str]:
    """Runs git where the repository lives, which has one commit."""

    def run(*arguments: str, cwd: Path | None = None) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=cwd or repo.root.parent, check=True, capture_output=True, text=True
        )
        return done.stdout

    run("init", "-q", "-b", "main")
    run("add", ".castore")
    run("commit", "-qm", "begin")
    return run


Git = Callable[..., str]


def on_branch(git: Git, path: Path) -> None:
    git("checkout", "-qb", "side")
    git("add", str(path))
    git("commit", "-qm", "side")
    git("checkout", "-q", "main")


def on_remote_branch(git: Git, path: Path) -> None:
    on_branch(git, path)
    git("update-ref", "refs/remotes/origin/side", "side")
    git("branch", "-qD", "side")


def on_tag(git: Git, path: Path) -> None:
    on_branch(git, path)
    git("tag", "-am", "a tag", "kept", "side")
    git("branch", "-qD", "side")


def on_stash(git: Git, path: Path) -> None:
    git("add", str(path))
    git("stash", "push", "-q")


def on_older_stash_of_untracked_files(git: Git, path: Path) -> None:
    git("stash", "push", "-q", "--include-untracked", "--", str(path))
    (path.parent / "x").write_text("x")
    git("stash", "push", "-q", "--include-untracked", "--", str(path.parent / "x"))


def in_index(git: Git, path: Path) -> None:
    git("add", str(path))
    path.unlink()


def in_linked_worktree(git: Git, path: Path) -> None:
    root = Path(git("rev-parse", "--show-toplevel").strip())
    git("worktree", "add", "-q", "--detach", str(root / "linked"))
    moved = root / "linked" / path.relative_to(root)
    moved.parent.mkdir(parents=True, exist_ok=True)
    path.rename(moved)


def in_head_of_a_linked_worktree(git: Git, path: Path) -> None:
    on_branch(git, path)
    root = Path(git("rev-parse", "--show-toplevel").strip())
    git("worktree", "add", "-q", "--detach", str(root / "linked"), "side")
    git("branch", "-qD", "side")
    shutil.rmtree(root / "linked" / ".castore")


def on_detached_head(git: Git, path: Path) -> None:
    git("checkout", "-q", "--detach")
    git("add", str(path))
    git("commit", "-qm", "detached")
    path.unlink()
    git("rm", "-q", "--cached", str(path))


def nowhere(git: Git, path: Path) -> None:  # noqa: ARG001
    path.unlink()


def on_tag_of_a_tag(git: Git, path: Path) -> None:
    on_branch(git, path)
    git("tag", "-am", "inner", "inner", "side")
    git("tag", "-am", "outer", "outer", "inner")
    git("tag", "-d", "inner")
    git("branch", "-qD", "side")


def on_a_tree_alone(git: Git, path: Path) -> None:
    on_branch(git, path)
    git("tag", "kept", "side^{tree}")
    git("branch", "-qD", "side")


def on_a_strangely_named_branch(git: Git, path: Path) -> None:
    on_branch(git, path)
    git("branch", "-qm", "side", "si\u2028de\x85")


def in_index_of_a_linked_worktree(git: Git, path: Path) -> None:
    root = Path(git("rev-parse", "--show-toplevel").strip())
    git("worktree", "add", "-q", "--detach", str(root / "linked"))
    moved = root / "linked" / path.relative_to(root)
    moved.parent.mkdir(parents=True, exist_ok=True)
    path.rename(moved)
    git("add", str(moved), cwd=root / "linked")
    shutil.rmtree(root / "linked" / ".castore")


def in_an_autostash(git: Git, path: Path) -> None:
    root = Path(git("rev-parse", "--show-toplevel").strip())
    git("checkout", "-qb", "side")
    (root / "x").write_text("one")
    git("add", "x")
    git("commit", "-qm", "one")
    git("checkout", "-q", "main")
    (root / "x").write_text("two")
    git("add", "x")
    git("commit", "-qm", "two")
    git("add", str(path))
    with pytest.raises(subprocess.CalledProcessError):
        git("rebase", "--autostash", "side")


PLACES = [
    on_branch, on_remote_branch, on_tag, on_stash, on_older_stash_of_untracked_files, in_index, in_linked_worktree,
    in_head_of_a_linked_worktree, on_detached_head, on_tag_of_a_tag, on_a_tree_alone, on_a_strangely_named_branch,
    in_index_of_a_linked_worktree, in_an_autostash,
]  # fmt: skip


@pytest.mark.parametrize("place", [*PLACES, nowhere])
def test_a_manifest_counts_wherever_git_has_it(repo: Repo, git: Git, place: Callable[[Git, Path], None]) -> None:
    line = castore.Experiment(data="other")
    checkpoint_id = save(repo, 1, 5.0, experiment=line)
    save(repo, 2, 1.0)
    path = path_of(repo, checkpoint_id)
    data = path.read_bytes()
    place(git, path)
    assert checkpoint_id not in [entry.id for entry in repo.checkpoints()]
    castore.collect_garbage(repo, ONE, grace=timedelta())
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    assert where(repo, checkpoint_id) == (GONE if place is nowhere else WHOLE)


def on_older_stash(git: Git, path: Path) -> None:
    on_stash(git, path)
    (path.parent / "x").write_text("x")
    git("stash", "push", "-q", "--include-untracked", "--", "x")


def on_older_stash_beside_a_linked_worktree(git: Git, path: Path) -> None:
    on_older_stash(git, path)
    git("worktree", "add", "-q", "--detach", "linked")


def pop(git: Git, path: Path) -> None:  # noqa: ARG001
    git("stash", "pop", "-q", "stash@{1}")


def pop_onto_a_branch(git: Git, path: Path) -> None:
    pop(git, path)
    on_branch(git, path)


def pop_in_linked_worktree(git: Git, path: Path) -> None:
    git("stash", "pop", "-q", "stash@{1}", cwd=path.parent / "linked")


Change = Callable[[Git, Path], None]
MOVES: dict[str, tuple[Change | None, Change]] = {
    "into a stash": (None, on_stash),
    "onto a branch": (None, on_branch),
    "from a stash": (on_older_stash, pop),
    "from a stash onto a branch": (on_older_stash, pop_onto_a_branch),
    "from a stash into a linked worktree": (on_older_stash_beside_a_linked_worktree, pop_in_linked_worktree),
}


def collect_while_it_moves(repo: Repo, git: Git, move: Change, moment: int) -> bool:
    """Collect garbage, and move what is not committed before that question to git; return if there were so many."""
    run = git_process.run
    asked = 0

    def run_then(*arguments: Any, **options: Any) -> git_process.Done:
        nonlocal asked
        asked += 1
        if asked == moment:
            move(git, repo.root)
        return run(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(git_module, "run", run_then)
        patch.setattr(git_process, "run", run_then)
        # to verify what stays, gc would read the roots twice
        castore.collect_garbage(repo, ONE, grace=timedelta(), verify=False)
    return asked >= moment


@pytest.mark.parametrize("name", MOVES)
def test_what_git_moves_while_gc_reads_counts(
    repo: Repo, git: Git, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """A manifest, a pin and a tag, moved at once before any question to git."""
    before, move = MOVES[name]
    pinned, tagged, _ = ObjectId(save(repo, 1, 5.0)), ObjectId(save(repo, 2, 5.0)), save(repo, 3, 1.0)
    git("add", ".castore")
    git("commit", "-qm", "saved")
    alone = save(repo, 4, 5.0, experiment=castore.Experiment(data="other"))
    repo.catalog.pin(pinned)
    repo.catalog.add_tag("release", tagged)
    entries = {"pinned": repo.find(pinned), "tagged": repo.find(tagged), "alone": repo.find(alone)}
    for moment in itertools.count(1):
        copied = Repo.open(shutil.copytree(repo.root.parent, tmp_path_factory.mktemp("copy") / "top"))
        git_there = functools.partial(git, cwd=copied.root.parent)
        if before:
            before(git_there, copied.root)
        if not collect_while_it_moves(copied, git_there, move, moment):
            break
        for why, entry in entries.items():
            states = {part: state.where for part, state in copied.part_states(entry).items()}
            assert states == WHOLE, f"{why}: moved before question {moment} to git"
    assert moment > 5


def test_a_tag_counts_on_any_branch(repo: Repo, git: Git) -> None:
    checkpoint_id = save(repo, 1, 5.0)
    save(repo, 2, 1.0)
    git("checkout", "-qb", "side")
    repo.catalog.add_tag("release", ObjectId(checkpoint_id))
    git("add", ".castore/tags")
    git("commit", "-qm", "tag")
    git("checkout", "-q", "main")
    assert repo.catalog.tags() == ({}, [])
    (decision,) = [d for d in castore.collect_garbage(repo, ONE).decisions if d.entry.id == checkpoint_id]
    assert decision.reasons == ("tagged release elsewhere",)
    assert where(repo, checkpoint_id) == WHOLE
    git("branch", "-qD", "side")
    castore.collect_garbage(repo, ONE)
    assert where(repo, checkpoint_id) == GONE


@pytest.mark.parametrize("where_to", ["work tree", "index", "branch", "linked worktree"])
def test_a_tag_that_cannot_be_read_lets_nothing_go(repo: Repo, git: Git, where_to: str) -> None:
    save(repo, 1, 5.0)
    save(repo, 2, 1.0)
    git("add", ".castore")
    git("commit", "-qm", "saved")
    root = repo.root.parent
    if where_to == "linked worktree":
        git("worktree", "add", "-q", "--detach", str(root / "linked"))
        root = root / "linked"
    if where_to == "branch":
        git("checkout", "-qb", "side")
    broken = root / ".castore" / "tags" / "release"
    broken.parent.mkdir()
    broken.write_text("<<<<<<< HEAD\n")
    if where_to in ("index", "branch"):
        git("add", ".castore/tags")
    if where_to == "branch":
        git("commit", "-qm", "tag")
        git("checkout", "-q", "main")
    if where_to == "index":
        broken.unlink()
    before = repo.store.stored()
    with pytest.raises(castore.CastoreError, match="release"):
        castore.collect_garbage(repo, ONE)
    assert repo.store.stored() == before


def test_a_pin_counts_on_any_branch(repo: Repo, git: Git) -> None:
    checkpoint_id = save(repo, 1, 5.0)
    save(repo, 2, 1.0)
    git("checkout", "-qb", "side")
    repo.catalog.pin(ObjectId(checkpoint_id))
    git("add", ".castore/pins")
    git("commit", "-qm", "pin")
    git("checkout", "-q", "main")
    assert repo.catalog.pins() == frozenset()
    castore.collect_garbage(repo, ONE)
    assert where(repo, checkpoint_id) == WHOLE
    git("branch", "-qD", "side")
    castore.collect_garbage(repo, ONE)
    assert where(repo, checkpoint_id) == GONE


def test_a_pin_counts_in_the_index_alone(repo: Repo, git: Git) -> None:
    checkpoint_id = save(repo, 1, 5.0)
    save(repo, 2, 1.0)
    in_index(git, repo.catalog.pin(ObjectId(checkpoint_id)))
    castore.collect_garbage(repo, ONE)
    assert where(repo, checkpoint_id) == WHOLE


def test_claims_on_another_branch_never_make_anything_of_the_work_tree_go(repo: Repo, git: Git) -> None:
    mine = [save(repo, step, 5.0 - step) for step in range(3)]
    boasts = [save(repo, 100 + i, 0.0) for i in range(5)]
    git("checkout", "-qb", "pull-request")
    for checkpoint_id in boasts:
        git("add", str(path_of(repo, checkpoint_id)))
    git("commit", "-qm", "best ever")
    git("checkout", "-q", "main")
    castore.collect_garbage(repo, Policy(keep=2, keep_latest=1))
    assert [where(repo, checkpoint_id)["model"] for checkpoint_id in mine] == ["missing", "local", "local"]


def test_what_nobody_refers_to_waits_for_its_time(repo: Repo) -> None:
    kept = save(repo, 2, 1.0)
    checkpoint_id = save(repo, 1, 5.0)
    path_of(repo, checkpoint_id).unlink()
    plan = castore.collect_garbage(repo)
    assert (len(plan.delete), plan.young > 0) == (0, True)
    two_days_ago = time.time() - 2 * 86400
    for one in objects(repo):
        os.utime(repo.store.path(ObjectId(one)), (two_days_ago, two_days_ago))
    assert castore.collect_garbage(repo).delete
    assert exact(repo.load(kept)) == exact(parts(2))
    assert castore.collect_garbage(repo, grace=timedelta()).young == 0


@pytest.mark.parametrize("other", ["dropped", "forgotten"])
def test_what_is_forgotten_waits_whole_with_what_it_shares(repo: Repo, other: str) -> None:
    shared = save(repo, 1, 5.0)
    two_days_ago = time.time() - 2 * 86400
    for one in objects(repo):
        os.utime(repo.store.path(ObjectId(one)), (two_days_ago, two_days_ago))
    repo.save({"model": {"weights": torch.ones(5)}}, run="main", step=2, metrics={"val_loss": 1.0})
    checkpoint_id = save(repo, 3, 5.0)
    path = path_of(repo, checkpoint_id)
    data = path.read_bytes()
    path.unlink()
    if other == "forgotten":
        path_of(repo, shared).unlink()
    assert castore.collect_garbage(repo, ONE).delete
    path.write_bytes(data)
    assert list(verify(repo)) == []
    assert exact(repo.load(checkpoint_id)) == exact(parts(3))
    path.unlink()
    castore.collect_garbage(repo, ONE, grace=timedelta())
    assert len(objects(repo)) == 2


def test_what_killed_processes_left_in_tmp_goes_and_what_is_fresh_stays(repo: Repo) -> None:
    save(repo, 1, 5.0)
    old, fresh = repo.store.temporary / "1-old", repo.store.temporary / "2-fresh"
    for path in (old, fresh):
        path.write_bytes(b"half an object")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    castore.collect_garbage(repo, dry_run=True)
    assert old.exists()
    castore.collect_garbage(repo)
    assert (old.exists(), fresh.exists()) == (False, True)


def test_the_environment_of_a_hook_leads_gc_to_no_other_repository(
    repo: Repo, git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_id = save(repo, 1, 5.0, experiment=castore.Experiment(data="other"))
    path = path_of(repo, checkpoint_id)
    data = path.read_bytes()
    on_branch(git, path)
    save(repo, 2, 1.0)
    (tmp_path / "else").mkdir()
    git("init", "-q", cwd=tmp_path / "else")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "else" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "else"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "else" / "index"))
    castore.collect_garbage(repo, ONE, grace=timedelta())
    path.write_bytes(data)
    assert where(repo, checkpoint_id) == WHOLE


def test_a_repository_that_only_the_environment_knows_is_no_reason_to_delete(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save(repo, 1, 5.0)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "dotfiles"))
    with pytest.raises(errors.RootsUnreadable):
        castore.collect_garbage(repo, ONE)


@pytest.mark.parametrize("name", [":x", "*", "a b", "\u2603"])
def test_the_name_of_a_folder_is_no_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    repo = Repo.init(tmp_path / name)
    run = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run([*run, "init", "-q", "-b", "main"], cwd=tmp_path, check=True)
    subprocess.run([*run, "commit", "-qm", "x", "--allow-empty"], cwd=tmp_path, check=True)
    checkpoint_id = save(repo, 1, 5.0, experiment=castore.Experiment(data="other"))
    subprocess.run([*run, "checkout", "-qb", "side"], cwd=tmp_path, check=True)
    subprocess.run([*run, "add", "."], cwd=tmp_path, check=True)
    subprocess.run([*run, "commit", "-qm", "side"], cwd=tmp_path, check=True)
    subprocess.run([*run, "checkout", "-q", "main"], cwd=tmp_path, check=True)
    repo = Repo.init(tmp_path / name)
    save(repo, 2, 1.0)
    castore.collect_garbage(repo, ONE, grace=timedelta())
    assert checkpoint_id in [
        one.entry.id for one in castore.collect_garbage(repo, ONE, dry_run=True).decisions if len(one.parts) == 3
    ]
    assert repo.store.stored()


def test_a_link_to_a_repository_is_as_good_as_the_repository(repo: Repo, git: Git, tmp_path: Path) -> None:
    checkpoint_id = save(repo, 1, 5.0, experiment=castore.Experiment(data="other"))
    path = path_of(repo, checkpoint_id)
    data = path.read_bytes()
    on_branch(git, path)
    save(repo, 2, 1.0)
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".castore").symlink_to(repo.root)
    (repo.root / "local.toml").write_text("allow_link = true\n")
    castore.collect_garbage(Repo.open(elsewhere), ONE, grace=timedelta())
    path.write_bytes(data)
    assert where(repo, checkpoint_id) == WHOLE


def test_foreign_pins_and_files_take_no_room_from_the_work_tree(repo: Repo, git: Git) -> None:
    ids = [save(repo, step, 5.0 - step) for step in range(4)]
    sizes = castore.collect_garbage(repo, Policy(keep=4, keep_optimizer=0), dry_run=True).kept_bytes
    policy = Policy(keep=4, keep_optimizer=0, max_size=sizes * 2 // 3)
    before = {one.entry.id: one.parts for one in castore.collect_garbage(repo, policy, dry_run=True).decisions}
    assert () in before.values()
    git("checkout", "-qb", "side")
    for checkpoint_id in ids[:2]:
        repo.catalog.pin(ObjectId(checkpoint_id))
    git("add", ".castore/pins")
    git("commit", "-qm", "pins")
    git("checkout", "-q", "main")
    after = {one.entry.id: one.parts for one in castore.collect_garbage(repo, policy, dry_run=True).decisions}
    assert all(set(after[checkpoint_id]) >= set(before[checkpoint_id]) for checkpoint_id in before)
    assert after[ObjectId(ids[0])] == ("model", "optimizer", "trainer")


# -- what can't be told ----------------------------------------------------------------------------------------------


def broken_in_work_tree(repo: Repo, git: Git) -> None:  # noqa: ARG001
    next(iter(repo.catalog.root.glob("*/*.json"))).write_text("{")


def broken_on_branch(repo: Repo, git: Git) -> None:
    path = repo.catalog.root / "main" / "000000009-0123456789ab.json"
    path.write_text("{}")
    on_branch(git, path)


def newer_on_branch(repo: Repo, git: Git) -> None:
    path = repo.catalog.root / "main" / "000000009-0123456789ab.json"
    path.write_text('{"version": 99}')
    on_branch(git, path)


def huge_on_branch(repo: Repo, git: Git) -> None:
    path = repo.catalog.root / "main" / "000000009-0123456789ab.json"
    path.write_bytes(b" " * (2 << 20))
    on_branch(git, path)


def blob_missing(repo: Repo, git: Git) -> None:
    path = next(iter(repo.catalog.root.glob("*/*.json")))
    on_branch(git, path)
    blob = git("rev-parse", f"side:{path.relative_to(repo.root.parent)}").strip()
    (repo.root.parent / ".git" / "objects" / blob[:2] / blob[2:]).unlink()


def tree_missing(repo: Repo, git: Git) -> None:
    path = next(iter(repo.catalog.root.glob("*/*.json")))
    on_branch(git, path)
    tree = git("rev-parse", "side:.castore").strip()
    (repo.root.parent / ".git" / "objects" / tree[:2] / tree[2:]).unlink()


def git_broken(repo: Repo, git: Git) -> None:  # noqa: ARG001
    (repo.root.parent / ".git" / "HEAD").write_text("nonsense")


def git_index_broken(repo: Repo, git: Git) -> None:  # noqa: ARG001
    (repo.root.parent / ".git" / "index").write_bytes(b"DIRC but not really")


def no_manifest_at_all(repo: Repo, git: Git) -> None:  # noqa: ARG001
    shutil.rmtree(repo.catalog.root / "main")


def kept_index_damaged(repo: Repo, git: Git) -> None:  # noqa: ARG001
    best = repo.resolve("best").require().id
    path = repo.store.path(repo.find(best).manifest.parts["model"].index)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    "harm",
    [
        broken_in_work_tree, broken_on_branch, newer_on_branch, huge_on_branch, blob_missing, tree_missing, git_broken,
        git_index_broken, no_manifest_at_all, kept_index_damaged,
    ],
)  # fmt: skip
def test_nothing_goes_when_it_can_not_be_told_what_is_needed(
    repo: Repo, git: Git, harm: Callable[[Repo, Git], None]
) -> None:
    for step in range(3):
        save(repo, step, 5.0 - step)
    harm(repo, git)
    before = objects(repo)
    for dry_run in (True, False):
        with pytest.raises((errors.RootsUnreadable, errors.CorruptionError)):
            castore.collect_garbage(repo, ONE, grace=timedelta(), dry_run=dry_run)
    assert objects(repo) == before


def test_git_that_is_not_there_is_no_reason_to_delete(
    repo: Repo, git: Git, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert git("rev-parse", "HEAD")
    save(repo, 1, 5.0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.RootsUnreadable, match="git"):
        castore.collect_garbage(repo, ONE)


def test_a_shallow_clone_is_as_good_as_a_full_one(repo: Repo, git: Git, tmp_path: Path) -> None:
    checkpoint_id = save(repo, 1, 5.0)
    git("add", ".castore")
    git("commit", "-qm", "one")
    git("clone", "-q", "--depth", "1", f"file://{repo.root.parent}", str(tmp_path / "clone"))
    clone = Repo.open(tmp_path / "clone")
    shutil.copytree(repo.root / "objects", clone.root / "objects")
    castore.collect_garbage(clone, ONE)
    assert exact(clone.load(checkpoint_id)) == exact(parts(1))


# -- the trash, and others at work -----------------------------------------------------------------------------------


def test_a_load_takes_back_from_the_trash_what_it_wants(repo: Repo) -> None:
    checkpoint_id = save(repo, 1, 5.0)
    repo.store.discard(sorted(repo.store.stored()))
    assert where(repo, checkpoint_id) == GONE
    assert exact(repo.load(checkpoint_id)) == exact(parts(1))
    repo.store.empty_trash(repo.store.list_trash())
    assert exact(repo.load(checkpoint_id)) == exact(parts(1))


def test_a_save_takes_back_from_the_trash_what_it_needs(repo: Repo) -> None:
    save(repo, 1, 5.0)
    before = objects(repo)
    repo.store.discard(sorted(before, key=str))  # type: ignore[arg-type]
    again = repo.save(parts(1), run="again", step=1, metrics={"val_loss": 5.0})
    assert again.new_objects == 0
    assert objects(repo) == before
    repo.store.empty_trash(repo.store.list_trash())
    assert exact(Repo.open(repo.root.parent).load(again.id)) == exact(parts(1))


def collect_beside_a_load(repo: Repo, checkpoint_id: str, names: list[str], moment: int) -> bool:
    """Collect garbage, and begin a load at that moment of emptying the trash; its chunks are read when gc is done.

    Return whether emptying took so many moments: its beginning is one, and each removal. What is loaded must be right.
    """
    expected = {name: exact(parts(0)[name]) for name in names}
    reader = Repo.open(repo.root.parent)
    is_under_way, is_collected = threading.Event(), threading.Event()
    read_chunks, empty_trash, unlink = state_parts._read_chunks, ObjectStore.empty_trash, fs.unlink
    moments = 0

    def read_later(*arguments: Any) -> None:
        is_under_way.set()
        assert is_collected.wait(60)
        read_chunks(*arguments)

    def load() -> None:
        with contextlib.suppress(errors.ObjectMissing):
            loaded = reader.load(checkpoint_id, names)
            assert {name: exact(part) for name, part in loaded.items()} == expected
        is_under_way.set()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as loader:
        loading = []

        def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                nonlocal moments
                if moments == moment:
                    loading.append(loader.submit(load))
                    assert is_under_way.wait(60)
                moments += 1
                return operation(*arguments)

            return run

        patch.setattr(state_parts, "_read_chunks", read_later)
        patch.setattr(ObjectStore, "empty_trash", counted(empty_trash))
        patch.setattr(fs, "unlink", counted(unlink))
        castore.collect_garbage(repo, ONE)
        is_collected.set()
        for one in loading:
            one.result()
    return moments > moment


@pytest.mark.parametrize("names", [["model"], ["optimizer", "model"], ["model", "optimizer", "trainer"]])
def test_a_load_while_the_trash_is_emptied_finds_a_part_whole_or_not_at_all(
    repo: Repo, tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    dropped, kept = save(repo, 0, 5.0), save(repo, 1, 1.0)
    saved = repo.root.parent
    found, moment = [], 0
    while True:
        repo = Repo.open(shutil.copytree(saved, tmp_path_factory.mktemp("copy") / str(moment)))
        if not collect_beside_a_load(repo, dropped, names, moment):
            break
        assert list(verify(repo)) == []
        assert where(repo, kept) == WHOLE
        found.append(where(repo, dropped)[names[0]])
        castore.collect_garbage(repo, ONE)
        assert where(repo, dropped) == GONE
        assert not any(repo.store.trash.iterdir())
        moment += 1
    assert found == sorted(found)
    assert set(found) == {"local", "missing"}


def test_a_gc_cut_short_takes_nothing_along_that_is_kept_by_now(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [save(repo, step, 5.0 - step) for step in range(3)]
    monkeypatch.setattr(repo.store, "empty_trash", lambda _: None)
    castore.collect_garbage(repo, ONE)
    monkeypatch.undo()
    repo.catalog.pin(ObjectId(ids[0]))
    castore.collect_garbage(Repo.open(repo.root.parent), ONE)
    assert [where(repo, checkpoint_id) for checkpoint_id in ids] == [WHOLE, GONE, WHOLE]


def test_chunks_stay_while_the_index_that_lists_them_is_in_quarantine(repo: Repo) -> None:
    checkpoint_id = save(repo, 1, 5.0)
    path = repo.store.path(repo.find(checkpoint_id).manifest.parts["model"].index)
    path.write_bytes(path.read_bytes() + b"?")
    with pytest.raises(errors.CorruptObject):
        repo.load(checkpoint_id)
    assert not path.exists()
    before = objects(repo)
    with pytest.raises(errors.CorruptObject, match="in quarantine"):
        # to verify what stays, gc would read the roots twice
        castore.collect_garbage(repo, ONE, grace=timedelta(), verify=False)
    assert objects(repo) == before


@pytest.mark.parametrize("folder", ["trash", "tmp"])
def test_a_link_in_place_of_a_folder_leads_to_no_deletion(repo: Repo, tmp_path: Path, folder: str) -> None:
    save(repo, 1, 5.0)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    os.utime(victim / "precious", (0, 0))
    shutil.rmtree(repo.root / folder, ignore_errors=True)
    (repo.root / folder).symlink_to(victim)
    with pytest.raises(errors.StorageError, match="symbolic link"):
        castore.collect_garbage(repo, ONE)
    assert (victim / "precious").exists()


def test_a_folder_in_the_trash_is_passed_over(repo: Repo) -> None:
    for step in range(2):
        save(repo, step, 5.0 - step)
    (repo.store.trash / "folder").mkdir(parents=True)
    castore.collect_garbage(repo, ONE)
    assert [path.name for path in repo.store.trash.iterdir()] == ["folder"]


@pytest.mark.parametrize("at", range(10))
def test_a_gc_that_is_cut_short_leaves_no_half_part(repo: Repo, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    ids = [save(repo, step, 5.0 - step) for step in range(3)]
    left = [at]
    rename = fs.rename

    def cut(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(fs, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        castore.collect_garbage(repo, ONE)
    monkeypatch.undo()
    for checkpoint_id in ids:
        for part, state in repo.part_states(repo.find(checkpoint_id)).items():
            # all or nothing: an index goes before what it lists
            assert state.where == "local" or state.reason == "its data is not in the store", part
    castore.collect_garbage(repo, ONE)
    assert [where(repo, checkpoint_id) for checkpoint_id in ids] == [GONE, GONE, WHOLE]
    assert not any(repo.store.trash.iterdir())


def write_for_a_while(path: Path, run: str, seconds: float) -> None:
    repo = Repo.open(path)
    deadline = time.monotonic() + seconds
    step = 0
    while time.monotonic() < deadline:
        step += 1
        state = {"model": {"own": torch.full((9000,), step * 1.0), "shared": torch.arange(30_000) + step % 3}}
        saved = repo.save(state, run=run, step=step, metrics={"val_loss": 1 / step}, tags=["soak"])
        assert exact(repo.load(saved.id)) == exact(state)


def collect_for_a_while(path: Path, seconds: float) -> None:
    repo = Repo.open(path)
    deadline = time.monotonic() + seconds
    policy = Policy(keep=2, keep_latest=8, keep_optimizer=9)
    while time.monotonic() < deadline:
        castore.collect_garbage(repo, policy, grace=timedelta())


@pytest.mark.slow
def test_writers_and_gc_at_once_lose_nothing(tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    """Each writer loads what it has just saved; bench/soak.py does this for a minute, with kills."""
    Repo.init(tmp_path)
    config = tmp_path / ".castore" / "config.toml"
    config.write_text('[store]\nchunk_size = "64KiB"\nthreads = 1\nfsync = false\n')
    running = [start(write_for_a_while, tmp_path, f"run{i}", 4.0) for i in range(3)]
    running.append(start(collect_for_a_while, tmp_path, 4.0))
    for process in running:
        process.join()
        assert process.exitcode == 0
    repo = Repo.open(tmp_path)
    plan = castore.collect_garbage(repo, Policy(keep=2, keep_latest=8, keep_optimizer=9), grace=timedelta())
    assert len(repo.checkpoints()) > 10
    for decision in plan.decisions:
        if decision.parts:
            repo.load(decision.entry.id, parts=decision.parts)


class Model(RuleBasedStateMachine):
    """A repository against a dict: whatever gc says it keeps loads bit-exact, at any time."""

    saved = Bundle("saved")

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        Repo.init(self.folder.name)
        config = Path(self.folder.name, ".castore", "config.toml")
        config.write_text('[store]\nchunk_size = "64KiB"\nthreads = 1\nfsync = false\n')
        self.repo = Repo.open(self.folder.name)
        self.state: dict[str, dict[str, Any]] = {}
        self.promised: dict[str, tuple[str, ...]] = {}
        self.step = 0

    @rule(target=saved, seed=st.integers(0, 4), loss=st.sampled_from([0.5, 1.0, 2.0]), experiment=st.sampled_from("ab"))
    def save(self, seed: int, loss: float, experiment: str) -> str:
        self.step += 1
        checkpoint_id = self.repo.save(
            parts(seed),
            run="r",
            step=self.step,
            metrics={"val_loss": loss},
            experiment=castore.Experiment(data=experiment),
        ).id
        self.state[checkpoint_id] = parts(seed)
        self.promised[checkpoint_id] = tuple(parts(seed))
        return checkpoint_id

    @rule(checkpoint_id=saved)
    def pin(self, checkpoint_id: str) -> None:
        self.repo.catalog.pin(ObjectId(checkpoint_id))

    @rule(checkpoint_id=saved)
    def unpin(self, checkpoint_id: str) -> None:
        self.repo.catalog.unpin(ObjectId(checkpoint_id))

    @rule(target=saved, checkpoint_id=consumes(saved))
    def forget(self, checkpoint_id: str) -> Any:
        self.repo.catalog.forget(self.repo.find(checkpoint_id))
        self.promised.pop(checkpoint_id)
        return multiple()

    @rule(
        keep=st.integers(0, 3), latest=st.integers(0, 2), optimizer=st.integers(0, 2),
        max_size=st.sampled_from([None, 0, 60_000, 300_000]), grace=st.sampled_from([0, 86400]),
    )  # fmt: skip
    def collect(self, keep: int, latest: int, optimizer: int, max_size: int | None, grace: int) -> None:
        policy = Policy(keep=keep, keep_latest=latest, keep_optimizer=optimizer, max_size=max_size)
        if not self.promised:
            return
        plan = castore.collect_garbage(self.repo, policy, grace=timedelta(seconds=grace))
        kept = {decision.entry.id: decision.parts for decision in plan.decisions}
        assert kept.keys() == self.promised.keys()
        self.promised = {
            checkpoint_id: tuple(part for part in self.promised[checkpoint_id] if part in kept[ObjectId(checkpoint_id)])
            for checkpoint_id in self.promised
        }

    @rule()
    def reopen(self) -> None:
        self.repo = Repo.open(self.folder.name)

    @invariant()
    def everything_promised_loads(self) -> None:
        for checkpoint_id, names in getattr(self, "promised", {}).items():
            wanted = {name: self.state[checkpoint_id][name] for name in names}
            assert exact(self.repo.load(checkpoint_id, parts=names)) == exact(wanted)

    @invariant()
    def another_reader_finds_the_same(self) -> None:
        for checkpoint_id, names in getattr(self, "promised", {}).items():
            manifest = self.repo.find(checkpoint_id).manifest
            for name in names:
                read = read_part(self.repo.root, manifest.parts[name].index)
                assert read == describe(self.state[checkpoint_id][name])

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
