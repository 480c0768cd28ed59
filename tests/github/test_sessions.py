"""Sessions that hand their progress on: real clones with stores of their own, real git, a strict stand-in service."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import actions_service
import msgspec
import pytest
from actions_service import Service as Cache
from machines import MAIN, Machine, World, parts

import castore
from castore import Repo
from castore.errors import NotPushed, RemoteUnavailable, UploadRefused, UsageError
from castore.github import sessions, summary
from castore.policy.retention import Policy
from castore.progress import ignore_progress
from castore.remotes.github_service import CacheService

# -- the whole story, by the installed program -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_session_on_another_machine_goes_on_exactly_where_the_first_one_ended(world: World) -> None:
    first = world.machine()
    assert "fresh   there is no checkpoint yet" in first.run("ci", "restore")
    assert first.told() == {
        "match": "", "run": "", "step": "0", "fresh": "true", "can-save": "true", "downloaded-bytes": "0"
    }  # fmt: skip
    first.train("--max-iters", "8")
    out = first.run("ci", "save", "--commit")
    assert "confirmed" in out
    assert "pushed as" in out
    summary = first.summary.read_text()
    assert "Nothing to resume from" in summary
    assert "| `main` | step 0 to 4 (4) |" in summary
    assert first.git("status", "--porcelain", "-uno") == ""

    second = world.machine()
    assert second.stored() == 0
    out = second.run("ci", "restore", "--resume", "best")
    assert "match   " in out
    before = second.told()
    assert (before["step"], before["fresh"]) == ("4", "false")
    assert int(before["downloaded-bytes"]) > 0
    second.train("--max-iters", "8")
    second.run("ci", "save", "--commit")
    (session,) = [
        json.loads(path.read_text())
        for path in (second.root / ".castore" / "sessions" / "main").iterdir()
        if not (first.root / ".castore" / "sessions" / "main" / path.name).exists()
    ]
    assert (session["resumed_from"], session["start_step"], session["final_step"]) == (before["match"], 4, 8)
    assert "Resuming from step **4**" in second.summary.read_text()

    # and what it has then is what one machine would have had that never stopped
    alone = world.machine()
    alone.train("--resume", "none", "--run", "alone", "--max-iters", "8", "--session-iters", "8")
    ends = [
        next(entry.manifest for entry in machine.repo.checkpoints() if entry.manifest.run == run)
        for machine, run in ((second, "main"), (alone, "alone"))
    ]
    assert [end.step for end in ends] == [8, 8]
    assert ends[0].parts["model"].index == ends[1].parts["model"].index
    assert ends[0].parts["optimizer"].index == ends[1].parts["optimizer"].index


def test_a_bundle_that_is_gone_ends_restore_and_training_with_4(world: World, one: castore.SaveResult) -> None:
    world.cache.evict(world.cache.entries()[0].key)
    machine = world.machine()
    said = machine.run("ci", "restore", code=4)
    assert one.id[:12] in said
    assert "not in the cache: evicted" in said
    assert machine.stored() == 0
    assert "castore: failed" in machine.summary.read_text()
    assert not machine.outputs.exists()
    # the escape, and the one that is for ever
    assert "--allow-fresh allows" in machine.run("ci", "restore", "--allow-fresh")
    world.configure(machine, '[resume]\non_missing = "fresh"\n')
    assert machine.json("ci", "restore")["fresh"].startswith("no checkpoint can be resumed")


def test_outside_of_actions_it_says_so_and_changes_nothing(world: World) -> None:
    machine = world.machine()
    machine.environment = {
        name: value for name, value in machine.environment.items() if not name.startswith(("ACTIONS_", "GITHUB_"))
    }
    for command in ("restore", "save"):
        assert "no job of GitHub Actions" in machine.run("ci", command, code=2)
    machine.environment |= {"GITHUB_ACTIONS": "true"}
    assert "`castore ci workflow` prints" in machine.run("ci", "save", code=2)


@pytest.mark.usefixtures("one")
def test_the_token_is_shown_nowhere_and_no_other_program_sees_it(world: World) -> None:
    machine = world.machine()
    for name in ("pre-commit", "pre-push", "reference-transaction", "post-index-change"):
        hook = machine.root / ".git" / "hooks" / name
        hook.write_text("#!/bin/sh\nenv >> .git/seen\n")
        hook.chmod(0o755)
    token = machine.job["ACTIONS_RUNTIME_TOKEN"]
    key = "http.https://github.com/.extraheader"
    machine.environment |= {"GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": key, "GIT_CONFIG_VALUE_0": "basic hunter2"}
    machine.environment |= {"GIT_CONFIG_KEY_1": "user.name", "GIT_CONFIG_VALUE_1": "somebody"}
    said = machine.run("ci", "restore") + machine.run("ci", "save", "--json")
    machine.checkpoint(20, 2.0)
    said += machine.run("ci", "save", "--commit")
    seen = (machine.root / ".git" / "seen").read_text()
    assert "GITHUB_ACTIONS" in seen
    assert "hunter2" not in seen
    assert machine.git("log", "-1", "--format=%an") == "somebody\n"
    world.cache.fault("CreateCacheEntry", actions_service.answer(400))
    machine.checkpoint(30, 1.0)
    said += machine.run("ci", "save", code=1)
    assert "HTTP 400" in said
    for text in (said, seen, machine.summary.read_text(), machine.outputs.read_text()):
        assert token not in text
        assert "sig=" not in text


# -- restoring -------------------------------------------------------------------------------------------------------


def test_only_the_match_is_fetched(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    machine.restore()
    for step, loss in ((20, 2.0), (30, 2.5)):
        machine.checkpoint(step, loss, parent=one.id)
    machine.save()
    other = world.machine()
    before = world.cache.downloaded_bytes
    restored = other.restore()
    assert restored.match is not None
    assert restored.match.step == 20
    moved = world.cache.downloaded_bytes - before
    stored = sum(part.stored_bytes for part in other.repo.find(restored.match.id).manifest.parts.values())
    assert stored <= moved < 1.1 * stored
    assert restored.traffic.downloaded == moved
    assert other.repo.load(restored.match.id).keys() == {"model", "optimizer", "trainer"}


@pytest.mark.usefixtures("one")
def test_what_is_here_already_is_not_fetched(world: World) -> None:
    machine = world.machine()
    machine.restore()
    before = len(world.cache.log)
    assert machine.restore().match is not None
    assert len(world.cache.log) == before


def poisoned(cache: Cache, key: str) -> None:
    data = bytearray(cache.blob(key))
    data[60:2000] = bytes(1940)
    cache.replace(key, bytes(data))


def truncated(cache: Cache, key: str) -> None:
    cache.truncate(key, 5000)


def evicted(cache: Cache, key: str) -> None:
    cache.evict(key)


@pytest.mark.parametrize("harm", [poisoned, truncated, evicted])
@pytest.mark.usefixtures("pauses")
def test_the_best_that_can_be_had_is_taken_and_the_better_one_told(
    world: World,
    one: castore.SaveResult,
    harm: Any,
) -> None:
    machine = world.machine()
    better = machine.checkpoint(20, 2.0)
    (record,) = machine.save().records
    harm(world.cache, record.key)
    other = world.machine()
    restored = other.restore()
    assert restored.match is not None
    assert restored.match.id == one.id
    assert restored.resolution is not None
    (rejected,) = restored.resolution.rejected
    assert rejected.id == better.id
    assert any(record.bundle[:12] in reason or "copy is corrupt" in reason for reason in rejected.reasons)
    assert other.repo.load(one.id)
    text = summary.restored_markdown(restored)
    assert f"`{better.id[:12]}` of `a` | 20 |" in text


@pytest.mark.usefixtures("one")
def test_a_remote_that_was_passed_over_is_told_of(world: World) -> None:
    first = world.machine()
    first.restore()
    machine = world.machine()
    shutil.copytree(first.repo.store.objects, machine.root / "shared" / "objects")
    for path in (machine.root / "shared").rglob("?" * 64):
        path.write_bytes(path.read_bytes()[:-1])
    world.configure(machine, '[remotes]\nshared = "shared"\n')
    said = machine.run("ci", "restore")
    assert "match   " in said
    assert "WARNING remote shared was passed over: its copy of object " in said
    assert "**A remote was passed over**: shared: its copy of object " in machine.summary.read_text()


@pytest.mark.usefixtures("one")
def test_swapped_bundles_are_misses(world: World) -> None:
    machine = world.machine()
    machine.checkpoint(20, 2.0)
    machine.save()
    world.cache.swap(*(entry.key for entry in world.cache.entries()))
    other = world.machine()
    assert "index does not match its id" in other.run("ci", "restore", code=4)
    assert other.stored() == 0


def test_a_pull_request_sees_what_the_default_branch_has_but_not_the_other_way_round(
    world: World, one: castore.SaveResult
) -> None:
    pull = world.machine(ref="refs/pull/7/merge")
    assert pull.restore().match is not None
    pull.checkpoint(20, 2.0)
    assert pull.save().commit
    # its manifest was merged, but its data stays where only that pull request sees it
    restored = world.machine().restore()
    assert restored.match is not None
    assert restored.match.id == one.id


@pytest.mark.usefixtures("one")
def test_a_job_that_may_only_read_restores_and_saves_nothing(world: World) -> None:
    machine = world.machine(ref="refs/pull/8/merge", mode="read")
    assert machine.restore().match is not None
    machine.checkpoint(20, 2.0)
    assert "skipped this job may not write to the cache (ACTIONS_CACHE_MODE = read)" in machine.run("ci", "save")
    assert machine.git("diff", "--cached", "--name-only") == ""
    assert "Nothing was saved" in machine.summary.read_text()


def test_where_sessions_from_the_best_have_led_is_fetched_too(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    machine.restore()
    worse = machine.checkpoint(20, 9.0, parent=one.id)
    machine.save()
    other = world.machine()
    restored = other.restore()
    assert restored.match is not None
    assert restored.match.id == one.id
    assert [entry.id for entry in restored.further] == [worse.id]
    assert other.repo.load(worse.id)
    assert "trained on from there to step 20" in summary.restored_markdown(restored)


def test_weights_alone_are_taken_when_there_is_nothing_else(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    machine.restore()
    repo = machine.repo
    optimizer = [repo.find(one.id).manifest.parts[name].index for name in ("optimizer", "trainer")]
    repo.store.discard(optimizer)
    repo.store.empty_trash(repo.store.list_trash())
    for entry in world.cache.entries():
        world.cache.evict(entry.key)
    machine.save()
    restored = world.machine().restore()
    assert restored.match is not None
    assert restored.match.availability == "weights-only"


@pytest.mark.usefixtures("one")
def test_none_is_none(world: World) -> None:
    before = len(world.cache.log)
    assert "as --resume none asks for" in world.machine().run("ci", "restore", "--resume", "none")
    assert len(world.cache.log) == before


@pytest.mark.usefixtures("world")
def test_hostile_text_in_the_summary_is_text(one: castore.SaveResult) -> None:
    rejected = castore.Rejected(
        id=one.id,
        step=3,
        run="a",
        score=None,
        reasons=("|<script>@all [x](http://x) `a` \x1b[2J\n# b",),
        unavailable=True,
    )
    restored = sessions.RestoredSession(
        resolution=castore.Resolution("best", None, (rejected,)),
        match=None,
        further=(),
        fresh="**a**",
        traffic=sessions.Traffic(uploaded=0, downloaded=0, requests=0),
    )
    row = next(line for line in summary.restored_markdown(restored).splitlines() if line.startswith("| `"))
    assert row.count("|") == 5
    assert not {"<", "@", "[", "\x1b", "*"} & set(row)


# -- saving ----------------------------------------------------------------------------------------------------------


def test_a_session_uploads_what_it_made_and_no_more(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    machine.restore()
    saved = machine.checkpoint(20, 2.0, parent=one.id)
    outcome = machine.save()
    assert outcome.records
    stored = sum(part.stored_bytes for part in saved.manifest.parts.values())
    assert outcome.traffic.uploaded < 1.1 * stored
    assert outcome.session is not None
    assert (outcome.session.start_step, outcome.session.final_step, outcome.session.start_loss) == (10, 20, 3.0)
    again = machine.save()
    assert again.records == ()
    assert again.files == ()
    assert again.traffic.uploaded == 0


def test_what_others_hold_is_relied_on(world: World, one: castore.SaveResult) -> None:
    """The same weights with another optimizer: only that goes up, and the checkpoint can be had with both bundles."""
    machine = world.machine()
    machine.restore()
    state = parts(10) | {"trainer": parts(11)["trainer"] | {"epoch": 3}}
    saved = machine.repo.save(state, run="a", step=20, metrics={"val_loss": 2.0}, parent=one.id)
    outcome = machine.save()
    assert outcome.records
    assert outcome.traffic.uploaded < 0.5 * sum(part.stored_bytes for part in saved.manifest.parts.values())
    other = world.machine()
    match = other.restore().match
    assert match is not None
    assert match.id == saved.id
    assert other.repo.load(saved.id)["trainer"]["epoch"] == 3


@pytest.mark.usefixtures("one")
def test_a_checkpoint_of_which_all_is_there_needs_a_record_alone(world: World) -> None:
    machine = world.machine()
    machine.restore()
    state = parts(10)
    mixed = {"model": state["model"], "optimizer": state["optimizer"], "other": state["trainer"]}
    saved = machine.repo.save(mixed, run="b", step=20, metrics={"val_loss": 2.0})
    outcome = machine.save()
    assert outcome.records == () or outcome.traffic.uploaded < 20_000
    match = world.machine().restore().match
    assert match is not None
    assert match.id == saved.id


@pytest.mark.usefixtures("one")
def test_what_was_evicted_and_is_here_is_uploaded_again(world: World) -> None:
    machine = world.machine()
    machine.restore()
    world.cache.evict(world.cache.entries()[0].key)
    assert machine.save().records
    assert world.machine().restore().match is not None


@pytest.mark.usefixtures("one")
def test_what_was_damaged_on_the_disk_is_left_out_and_the_rest_handed_on(world: World) -> None:
    machine = world.machine()
    good, bad = machine.checkpoint(20, 2.0), machine.checkpoint(30, 1.0)
    store = machine.repo.store
    path = next(
        store.path(object_id)
        for object_id in store.stored().keys() - _objects(machine, good.id)
        if object_id not in {part.index for part in bad.manifest.parts.values()}
    )
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said = machine.run("ci", "save", "--commit", code=5)
    assert said == ""
    assert f"left out: `{bad.id[:12]}`" in machine.summary.read_text()
    match = world.machine().restore().match
    assert match is not None
    assert match.id == good.id


def _objects(machine: Machine, checkpoint_id: str) -> set[str]:
    from castore.format import part_index

    repo = machine.repo
    object_ids: set[str] = set()
    for part in repo.find(checkpoint_id).manifest.parts.values():
        object_ids |= {part.index, *(chunk.id for chunk in part_index.decode_chunks(repo.store.read(part.index)))}
    return object_ids


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("CreateCacheEntry", "HTTP 503"), ("PUT", "HTTP 503"), ("FinalizeCacheEntryUpload", "HTTP 503")],
)
@pytest.mark.usefixtures("pauses")
def test_nothing_is_told_to_git_of_what_was_not_uploaded(world: World, fault: str, reason: str) -> None:
    machine = world.machine()
    machine.checkpoint(10, 3.0)
    world.cache.fault(fault, actions_service.answer(503), times=1000)
    with pytest.raises(castore.errors.RemoteError, match=reason):
        machine.save()
    assert machine.git("diff", "--cached", "--name-only") == ""
    assert not (machine.root / ".castore" / "bundles").exists()
    world.cache.faults.clear()
    assert machine.save().commit


def test_a_write_that_is_denied_is_refused_in_its_words(world: World) -> None:
    machine = world.machine()
    machine.checkpoint(10, 3.0)
    machine.environment |= {"ACTIONS_RUNTIME_TOKEN": world.cache.token(MAIN, write=False)}
    said = machine.run("ci", "save", "--commit", code=1)
    assert "cache write denied" in said
    assert machine.git("log", "--oneline").count("\n") == 1


def test_an_upload_that_can_not_be_confirmed_is_none(world: World) -> None:
    machine = world.machine(mode="write-only")
    machine.checkpoint(10, 3.0)
    with pytest.raises(UploadRefused, match="couldn't be confirmed"):
        machine.save()


@pytest.mark.usefixtures("one")
def test_records_of_what_is_long_gone_are_removed(world: World) -> None:
    world.cache.evict(world.cache.entries()[0].key)
    machine = world.machine()
    saved = machine.checkpoint(20, 2.0)
    now = datetime.now(UTC)
    assert len(list((machine.root / ".castore" / "bundles").iterdir())) == 1
    machine.save(now=now + timedelta(days=13))
    assert len(list((machine.root / ".castore" / "bundles").iterdir())) == 2
    machine.save(now=now + timedelta(days=15), ref="refs/heads/other")
    assert len(list((world.machine().root / ".castore" / "bundles").iterdir())) == 2
    machine.save(now=now + timedelta(days=15))
    other = world.machine()
    (path,) = (other.root / ".castore" / "bundles").iterdir()
    assert saved.manifest.parts["model"].index in path.read_text()


def test_keep_and_max_size_are_those_of_gc(world: World) -> None:
    machine = world.machine()
    for step in range(1, 6):
        machine.checkpoint(step, 6.0 - step)
    outcome = machine.save(policy=replace(machine.repo.policy, keep=2, keep_optimizer=1))
    assert outcome.plan is not None
    assert sum(bool(decision.parts) for decision in outcome.plan.decisions) == 2
    assert "usage" not in machine.run("ci", "save", "--keep", "2", "--max-size", "1GB").lower()
    assert "is not a size" in machine.run("ci", "save", "--max-size", "much", code=2)


@pytest.mark.usefixtures("one")
def test_manifests_whose_data_is_gone_take_nobodys_place(world: World) -> None:
    machine = world.machine()
    machine.restore()
    for step in range(20, 31):
        machine.checkpoint(step, 1.0)
    machine.save(policy=replace(machine.repo.policy, keep=20))
    for entry in world.cache.entries():
        world.cache.evict(entry.key)
    other = world.machine()
    mine = [other.checkpoint(step, 5.0 - step / 1000).id for step in range(31, 34)]
    outcome = other.save(policy=replace(other.repo.policy, keep=2, keep_latest=0))
    assert outcome.plan is not None
    assert [decision.entry.id for decision in outcome.plan.decisions if decision.parts] == mine[:0:-1]


# -- git -------------------------------------------------------------------------------------------------------------


def test_sessions_that_end_at_once_both_arrive(world: World) -> None:
    machines = [world.machine() for _ in range(3)]
    saved = [machine.checkpoint(10 + i, 3.0 - i) for i, machine in enumerate(machines)]
    processes = [machine.start("ci", "save", "--commit") for machine in machines]
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    assert {entry.id for entry in world.machine().repo.checkpoints()} == {result.id for result in saved}


def test_only_what_is_castores_is_committed(world: World) -> None:
    machine = world.machine()
    (machine.root / "texts" / "0.txt").write_text("changed")
    (machine.root / "mine.txt").write_text("mine")
    machine.git("add", "mine.txt")
    before = machine.git("rev-parse", "HEAD").strip()
    first = machine.checkpoint(10, 3.0)
    other = world.machine()
    second = other.checkpoint(10, 2.0)
    other.save()
    outcome = machine.save()  # others were faster, and there is work under way
    assert outcome.commit
    names = subprocess.run(
        ["git", "-C", str(world.origin), "diff", "--name-only", f"{before}..main"], capture_output=True, text=True
    ).stdout.split()
    assert len(names) == 4
    assert all(name.startswith((".castore/manifests/", ".castore/bundles/")) for name in names)
    status = machine.git("status", "--porcelain").splitlines()
    assert {"A  mine.txt", " M texts/0.txt"} <= set(status)
    assert all(line.startswith("A  .castore/") for line in set(status) - {"A  mine.txt", " M texts/0.txt"})
    assert {entry.id for entry in world.machine().repo.checkpoints()} == {first.id, second.id}


def test_a_push_that_is_forbidden_fails_honestly(world: World) -> None:
    machine = world.machine()
    hook = world.origin / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho this branch is protected\nexit 1\n")
    hook.chmod(0o755)
    machine.checkpoint(10, 3.0)
    said = machine.run("ci", "save", "--commit", code=1)
    assert "not pushed, so the next session won't know of it" in said
    assert "remote rejected" in said


def test_after_a_refused_push_the_next_commit_of_the_job_deletes_nothing(world: World) -> None:
    machine = world.machine()
    before = machine.git("rev-parse", "HEAD")
    hook = world.origin / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    saved = machine.checkpoint(10, 3.0)
    with pytest.raises(NotPushed):
        machine.save()
    assert machine.git("rev-parse", "HEAD") == before
    (machine.root / "results.txt").write_text("done")
    machine.git("add", "results.txt")
    machine.git("commit", "-qm", "results")
    assert machine.git("show", "--name-status", "--format=").split() == ["A", "results.txt"]
    hook.unlink()
    machine.save()
    fresh = world.machine()
    assert [entry.id for entry in fresh.repo.checkpoints()] == [saved.id]
    assert (fresh.root / "results.txt").is_file()


def test_a_push_won_on_the_second_try_leaves_the_branch_where_a_pull_can_follow(world: World) -> None:
    machine, other = world.machine(), world.machine()
    (other.root / "new.txt").write_text("of others")
    other.git("add", "new.txt")
    other.git("commit", "-qm", "others")
    other.git("push", "-q", "origin", "main")
    machine.checkpoint(10, 3.0)
    outcome = machine.save()
    assert outcome.commit
    (machine.root / "results.txt").write_text("done")
    machine.git("add", "results.txt")
    machine.git("commit", "-qm", "results")
    machine.git("pull", "-q", "--rebase", "origin", "main")
    machine.git("push", "-q", "origin", "main")
    fresh = world.machine()
    assert (fresh.root / "new.txt").is_file()
    assert (fresh.root / "results.txt").is_file()
    assert len(fresh.repo.checkpoints()) == 1
    assert machine.git("merge-base", "--is-ancestor", outcome.commit, "HEAD") == ""


def test_what_others_removed_meanwhile_stays_removed(world: World, one: castore.SaveResult) -> None:
    first = world.machine()
    first.repo.catalog.pin(one.id)
    second = first.checkpoint(20, 2.0, parent=one.id)
    first.save()
    late, other = world.machine(), world.machine()
    other.repo.unpin(one.id)
    other.repo.forget(other.repo.find(second.id))
    other.git("add", "-A", ".castore")
    other.git("commit", "-qm", "unpin, forget")
    other.git("push", "-q", "origin", "main")
    third = late.checkpoint(30, 1.0)
    late.save()
    fresh = world.machine().repo
    assert fresh.catalog.pins() == frozenset()
    assert {entry.id for entry in fresh.checkpoints()} == {one.id, third.id}


# -- what others pushed while a job was queued ------------------------------------------------------------------------


def test_a_queued_session_goes_on_from_where_the_one_before_it_ended(world: World, one: castore.SaveResult) -> None:
    queued, running = world.machine(), world.machine()
    queued.git("checkout", "-q", "--detach")
    running.restore()
    second = running.checkpoint(20, 2.0, parent=one.id)
    running.repo.pin(running.repo.find(one.id))
    running.git("rm", "-q", "texts/1.txt")
    running.git("commit", "-qm", "code moves on")
    assert running.save().commit
    out = queued.run("ci", "restore")
    assert "also    3 files that others pushed to main meanwhile" in out
    assert queued.told()["match"] == second.id
    assert queued.repo.catalog.pins() == {one.id}
    assert (queued.root / "texts" / "1.txt").is_file()
    assert "3 files that others pushed to main meanwhile were added" in queued.summary.read_text()
    queued.git("checkout", "-q", "main")
    third = queued.checkpoint(30, 1.0, parent=second.id)
    said = queued.run("ci", "save", "--commit")
    assert "1 checkpoints" in said
    assert {entry.id for entry in world.machine().repo.checkpoints()} == {one.id, second.id, third.id}
    queued.git("pull", "-q", "--rebase", "--autostash", "origin", "main")
    assert queued.git("status", "--porcelain") == ""


def test_a_branch_that_can_not_be_asked_is_told_and_no_reason_to_stop(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    machine.git("remote", "set-url", "origin", "file:///nowhere.git")
    out = machine.run("ci", "restore")
    assert "WARNING main could not be asked what others pushed meanwhile: git fetch: " in out
    assert machine.told()["match"] == one.id
    assert "could not be asked" in machine.summary.read_text()


@pytest.mark.usefixtures("one")
def test_what_is_damaged_at_the_tip_is_passed_over_and_told(world: World) -> None:
    queued, hostile = world.machine(), world.machine()
    folder = hostile.root / ".castore"
    (folder / "manifests" / "a" / "000000099-0123456789ab.json").write_text("{}")
    (folder / "bundles" / "0123456789abcdef.json").write_text("[]")
    (folder / "tags").mkdir()
    (folder / "tags" / "release").write_text("not an id\n")
    (folder / "objects").mkdir(exist_ok=True)
    (folder / "objects" / "x").write_text("data")
    hostile.git("add", "-f", ".castore")
    hostile.git("commit", "-qm", "hostile")
    hostile.git("push", "-q", "origin", "main")
    process = queued.start("ci", "restore")
    _, err = process.communicate()
    assert process.returncode == 0
    for name in ("000000099-0123456789ab.json", "0123456789abcdef.json", "tags/release"):
        assert name in err
        assert name in queued.summary.read_text().replace("&#45;", "-").replace("&#46;", ".").replace("\\", "")
        assert not (queued.root / ".castore" / "bundles" / name).exists()
    assert not (queued.root / ".castore" / "objects" / "x").exists()
    assert len(queued.repo.checkpoints()) == 1


# -- what save will need ----------------------------------------------------------------------------------------------


def forbidden(machine: Machine) -> None:
    machine.git("remote", "set-url", "--push", "origin", "file:///nowhere.git")


def detached(machine: Machine) -> None:
    machine.git("checkout", "-q", "--detach")


def without_origin(machine: Machine) -> None:
    machine.git("remote", "remove", "origin")


def read_only(machine: Machine) -> None:
    machine.environment["ACTIONS_CACHE_MODE"] = "read"


@pytest.mark.parametrize(
    ("obstacle", "says"),
    [
        (forbidden, "a push to main failed: git push: "),
        (detached, "no branch is checked out"),
        (without_origin, "it isn't known where to"),
        (read_only, "this job may not write to the cache (ACTIONS_CACHE_MODE = read)"),
    ],
)
def test_what_will_keep_save_from_its_work_is_told_before_training(
    world: World, one: castore.SaveResult, obstacle: Any, says: str
) -> None:
    machine = world.machine()
    obstacle(machine)
    process = machine.start("ci", "restore")
    _, err = process.communicate()
    assert process.returncode == 0
    assert f"castore: WARNING: what this job trains can't be handed on: {says}" in err
    assert (machine.told()["can-save"], machine.told()["match"]) == ("false", one.id)
    assert "What this job trains can't be handed on" in machine.summary.read_text()
    assert says in machine.run("ci", "restore", "--require-save", code=2)


@pytest.mark.usefixtures("one")
def test_where_nothing_is_in_the_way_of_save_nothing_is_told(world: World) -> None:
    machine = world.machine()
    before = subprocess.run(["git", "-C", str(world.origin), "show-ref"], capture_output=True).stdout
    process = machine.start("ci", "restore", "--require-save")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, ""), out
    assert machine.told()["can-save"] == "true"
    assert subprocess.run(["git", "-C", str(world.origin), "show-ref"], capture_output=True).stdout == before


@pytest.mark.parametrize("ref", ["refs/pull/7/merge", "refs/tags/v1", ""])
def test_what_is_no_branch_asks_nobody(world: World, ref: str) -> None:
    machine = world.machine()
    machine.git("checkout", "-q", "--detach")
    machine.git("remote", "set-url", "origin", "file:///nowhere.git")
    assert sessions.catch_up(machine.repo, ref) == sessions.CaughtUp()


@pytest.mark.usefixtures("one")
def test_a_job_that_has_checked_out_another_branch_gets_nothing_of_its_own(world: World) -> None:
    machine = world.machine()
    machine.git("checkout", "-q", "-b", "other")
    machine.git("push", "-q", "origin", "other")
    other = world.machine()
    other.checkpoint(20, 2.0)
    other.save()
    assert sessions.catch_up(machine.repo, MAIN) == sessions.CaughtUp(branch="other")


def test_that_the_cache_has_everything_is_asked_and_not_assumed(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    assert "the cache has everything that is kept" in machine.run("ci", "save")
    world.cache.fault("GetCacheEntryDownloadURL", actions_service.answer(403, {}, b"{}"), times=1000)
    said = machine.run("ci", "save")
    assert "WARNING no bundle: the cache could not be asked what it has: HTTP 403" in said
    assert "could not be asked what it has" in machine.summary.read_text()
    assert one.id


def test_a_save_asks_for_the_bundles_in_use_however_long_the_history_is(world: World) -> None:
    asked = []
    parent = None
    for step in range(10, 70, 10):
        machine = world.machine()
        parent = machine.checkpoint(step, 3.0 - step / 100, parent=parent).id
        before = world.cache.count("GetCacheEntryDownloadURL")
        assert machine.save(policy=Policy(keep=2, keep_optimizer=1)).commit
        asked.append(world.cache.count("GetCacheEntryDownloadURL") - before)
    assert asked == [1, 2, 2, 2, 2, 2]  # the bundle of the other that is kept, and the new one


def test_a_pinned_checkpoint_that_is_nowhere_is_told(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    machine.repo.catalog.pin(one.id)
    for entry in world.cache.entries():
        world.cache.evict(entry.key)
    said = machine.run("ci", "save")
    assert f"WARNING {one.id[:12]} is kept and not here, and the cache was not seen to have all of it" in said
    assert "was not seen to have all of it" in machine.summary.read_text()


def test_a_push_that_never_gets_through_ends(world: World) -> None:
    machine = world.machine()
    machine.git("remote", "set-url", "origin", "https://user:hunter2@127.0.0.1:1/x.git")
    machine.checkpoint(10, 3.0)
    waits: list[float] = []
    with pytest.raises(NotPushed, match="6 tries") as caught:
        machine.save(pause=waits.append)
    assert len(waits) == 5
    assert "hunter2" not in str(caught.value)


def test_without_a_branch_nothing_is_uploaded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    machine = world.machine()
    machine.git("checkout", "-q", "--detach")
    machine.checkpoint(10, 3.0)
    with pytest.raises(NotPushed, match="no branch is checked out"):
        machine.save()
    assert world.cache.entries() == []
    machine.git("checkout", "-q", "main")
    machine.save()
    assert machine.git("log", "-1", "--format=%an %s").startswith("github-actions[bot] castore: a at step 10")


def test_without_git_nothing_is_uploaded(tmp_path: Path, cache: Cache) -> None:
    repo = Repo.init(tmp_path)
    repo.save(parts(1), run="a", step=1)
    remote, _ = sessions.connect(repo, CacheService.of_job(cache.environment()))
    with pytest.raises(UsageError, match="not a git repository"):
        sessions.save(repo, remote, progress=ignore_progress)
    assert cache.entries() == []


def test_prepared_data_stays_here(world: World) -> None:
    machine = world.machine()
    machine.repo.save({"data": parts(3)["model"]}, run="data", step=0, kind="dataset")
    machine.checkpoint(10, 3.0)
    machine.save()
    assert [path.name for path in (world.machine().root / ".castore" / "manifests").iterdir() if path.is_dir()] == ["a"]


def test_what_was_committed_and_not_pushed_is_pushed_by_the_next_save(world: World) -> None:
    machine = world.machine()
    hook = world.origin / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    saved = machine.checkpoint(10, 3.0)
    with pytest.raises(NotPushed):
        machine.save()
    hook.unlink()
    assert machine.save().commit
    assert [entry.id for entry in world.machine().repo.checkpoints()] == [saved.id]


@pytest.mark.parametrize(
    "odd",
    [
        ["tag", "main"],
        ["config", "branch.main.remote", "."],
        ["config", "push.default", "nothing"],
        ["config", "core.autocrlf", "true"],
        ["config", "commit.gpgSign", "true"],
        ["config", "--unset", "branch.main.remote"],
        ["remote", "rename", "origin", "elsewhere"],
    ],
    ids=" ".join,
)
def test_odd_settings_of_git_change_nothing(world: World, odd: list[str]) -> None:
    machine = world.machine()
    machine.git(*odd)
    saved = machine.checkpoint(10, 3.0)
    machine.save()
    match = world.machine().restore().match
    assert match is not None
    assert match.id == saved.id


def test_manifests_that_git_ignores_are_committed_all_the_same(world: World) -> None:
    machine = world.machine()
    (machine.root / ".gitignore").write_text("*.json\n.castore/\n")
    machine.checkpoint(10, 3.0)
    assert len(machine.save().files) == 2
    assert world.machine().restore().match is not None
    machine.checkpoint(20, 2.0)
    machine.save(commit=False)
    assert machine.git("diff", "--cached", "--name-only").count(".castore/") == 2


def test_pins_are_committed_too(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    machine.repo.catalog.pin(one.id)
    machine.save()
    assert world.machine().repo.catalog.pins() == {one.id}


def broken_here(machine: Machine) -> None:
    (machine.root / ".castore" / "manifests" / "a" / "000000001-000000000000.json").write_text("{}")


def broken_on_another_branch(machine: Machine) -> None:
    broken_here(machine)
    machine.git("checkout", "-q", "-b", "other")
    machine.git("add", ".castore/manifests/a/000000001-000000000000.json")
    machine.git("commit", "-qm", "hostile")
    machine.git("checkout", "-q", "main")


def damaged_index(machine: Machine) -> None:
    repo = machine.repo
    (entry,) = [entry for entry in repo.checkpoints() if entry.manifest.step == 10]
    path = repo.store.path(entry.manifest.parts["model"].index)
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("harm", [broken_here, broken_on_another_branch, damaged_index])
@pytest.mark.usefixtures("one")
def test_a_session_is_handed_on_when_garbage_can_not_be_collected(world: World, harm: Any) -> None:
    machine = world.machine()
    machine.restore()
    harm(machine)
    saved = machine.checkpoint(20, 2.0)
    out = machine.run("ci", "save", "--commit")
    assert "WARNING no garbage was collected" in out
    assert "No garbage was collected" in machine.summary.read_text()
    restored = world.machine().restore()
    assert restored.match is not None
    assert restored.match.id == saved.id


def test_more_parts_than_a_record_takes_are_in_several(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castore.format.bundle.PARTS_OF_A_RECORD", 2)
    machine = world.machine()
    saved = machine.checkpoint(10, 3.0)
    assert len(machine.save().records) == 2
    assert world.machine().restore().match is not None
    assert saved.id


def test_a_record_that_promises_too_much_does_not_keep_a_checkpoint_from_going_up(
    world: World, one: castore.SaveResult
) -> None:
    machine = world.machine()
    repo = machine.repo
    (record,), _ = repo.catalog.records()
    saved = machine.checkpoint(20, 2.0)
    wrong = {part.index: [record.bundle] for part in saved.manifest.parts.values()}
    repo.catalog.add_record(msgspec.structs.replace(record, parts=wrong))
    assert machine.save().records
    match = world.machine().restore().match
    assert match is not None
    assert match.id == saved.id != one.id


def test_max_size_counts_what_only_the_cache_has(world: World) -> None:
    kept = []
    for step in range(1, 5):
        machine = world.machine()
        saved = machine.checkpoint(step, 6.0 - step)
        stored = sum(part.stored_bytes for part in saved.manifest.parts.values())
        outcome = machine.save(policy=replace(machine.repo.policy, keep_optimizer=9, max_size=int(2.5 * stored)))
        assert outcome.plan is not None
        kept.append(sum(bool(decision.parts) for decision in outcome.plan.decisions))
    assert kept == [1, 2, 2, 2]


def test_a_cache_that_can_not_be_asked_is_not_one_that_lost_everything(
    world: World, one: castore.SaveResult, pauses: list[float]
) -> None:
    world.cache.fault("GetCacheEntryDownloadURL", actions_service.answer(503), times=1000)
    for allow_fresh in (False, True):
        with pytest.raises(RemoteUnavailable, match=r"503; so it can't be told which checkpoints"):
            world.machine().restore(allow_fresh=allow_fresh)
    assert pauses
    assert world.machine().restore("none").fresh
    assert one.id


def test_records_that_are_none_are_told(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    (path,) = (machine.root / ".castore" / "bundles").iterdir()
    path.write_text(path.read_text() + "\n")
    process = machine.start("ci", "restore")
    _, said = process.communicate()
    assert process.returncode == 4
    assert f"{path.name}: not a valid bundle record" in said
    assert one.id[:12] in said


def test_where_other_settings_have_led_is_fetched_too(world: World, one: castore.SaveResult) -> None:
    machine = world.machine()
    machine.restore()
    state = parts(20)
    worse = machine.repo.save(
        state, run="a", step=20, metrics={"val_loss": 9.0}, parent=one.id, config={"learning_rate": 5.0}
    )
    machine.save()
    assert [entry.id for entry in world.machine().restore().further] == [worse.id]


@pytest.mark.parametrize("name", ["x\n::add-mask::o\n", "x\n  ::stop-commands::o"])
def test_a_name_cannot_give_orders_to_the_runner(world: World, name: str) -> None:
    machine = world.machine()
    folder = machine.root / ".castore" / "manifests" / name
    folder.mkdir()
    (folder / "foo.json").write_text("{}")
    for command in ("restore", "save"):
        out, err = machine.start("ci", command).communicate()
        assert not any(line.strip().startswith("::") for line in (out + err + machine.summary.read_text()).splitlines())


def test_what_is_staged_is_what_was_written_whatever_filters_say(world: World) -> None:
    machine = world.machine()
    machine.train()
    machine.git("config", "filter.upper.clean", "tr a-z A-Z")
    (machine.root / ".gitattributes").write_text("*.json filter=upper\n")
    (machine.root / ".castore" / ".gitattributes").unlink()
    saved = machine.save(commit=False)
    assert saved.altered == ()
    staged = machine.git("diff", "--cached", "--name-only").split()
    assert any(path.startswith(".castore/manifests/") for path in staged)
    for path in staged:
        if path.endswith(".json"):
            assert machine.git("show", f":{path}").encode() == (machine.root / path).read_bytes()
