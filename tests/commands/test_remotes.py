"""`castore remote`, `push`, `fetch`, `pull`, `status` and `ls`, with an S3 service and with a folder."""

from __future__ import annotations

import json
import re
import shutil
import signal
import tomllib
from pathlib import Path

import pytest
from bucket_service import KEY_ID, SECRET, BucketService
from project import Project

from castore.remotes.bucket import Bucket


@pytest.fixture
def bucket(s3: BucketService, trained_copy: Project) -> Project:
    """A trained project with a bucket of its own as its remote."""
    trained_copy.environment = trained_copy.environment | s3.environment()
    trained_copy.call("remote", "add", "cloud", s3.url())
    return trained_copy


def clone(project: Project, path: Path) -> Project:
    """Another machine's clone: what git would bring, and no data."""
    copy = project.copy(path)
    shutil.rmtree(copy.root / ".castore" / "objects")
    return copy


def ids(project: Project) -> list[str]:
    return [entry["id"] for entry in project.json("log")]


# -- remote ----------------------------------------------------------------------------------------------------------


def test_adding_a_remote_keeps_the_comments_of_the_settings(empty: Project) -> None:
    path = empty.root / ".castore" / "config.toml"
    before = path.read_text()
    out = empty.call("remote", "add", "cloud", "s3://models/gpt", "--push", "auto")
    assert out.startswith(f"remote  cloud: s3://models/gpt; commit {path}")
    after = path.read_text()
    assert before.strip() in after
    assert tomllib.loads(after)["remotes"] == {"cloud": "s3://models/gpt", "push": "auto"}
    empty.call("remote", "add", "disk", "../shared", "--default")
    assert empty.json("remote", "list") == [
        {"name": "cloud", "url": "s3://models/gpt", "default": False},
        {"name": "disk", "url": "../shared", "default": True},
    ]
    assert "each checkpoint is pushed to disk" in empty.call("remote", "list")
    empty.call("remote", "set-default", "cloud")
    empty.call("remote", "remove", "cloud")
    assert tomllib.loads(path.read_text())["remotes"] == {"disk": "../shared", "push": "auto"}
    assert before.strip() in path.read_text()
    assert empty.json("remote", "add", "other", "s3://models/x", "--default") == {
        "name": "other",
        "url": "s3://models/x",
    }
    assert empty.json("remote", "set-default", "disk") == {"name": "disk"}
    for name in ("other", "disk"):
        assert empty.json("remote", "remove", name) == {"name": name}
    assert tomllib.loads(path.read_text())["remotes"] == {}  # no pushes to nowhere
    for command in ("add", "list", "remove", "set-default"):
        assert f"Example: castore remote {command}" in empty.call("remote", command, "--help")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["cloud", "ssh://host/x"], "ssh:// is not a kind of remote"),
        (["push", "s3://b/x"], "remotes.push is a setting"),
        (["a b", "s3://b/x"], "a name is 1 to 64"),
        (["cloud", f"s3://{KEY_ID}:{SECRET}@bucket/x"], "a URL holds no credentials"),
        (["cloud", f"https://host/x?sig={SECRET}"], "a URL holds no credentials"),
        (["cloud", "s3://bucket/x", "--push", "always"], 'remotes.push is "auto" or "manual"'),
    ],
)
def test_what_is_no_remote_is_refused_and_nothing_changes(empty: Project, arguments: list[str], reason: str) -> None:
    before = (empty.root / ".castore" / "config.toml").read_bytes()
    err = empty.call("remote", "add", *arguments, code=2)
    assert reason in err
    assert SECRET not in err
    assert (empty.root / ".castore" / "config.toml").read_bytes() == before


def test_a_name_that_is_taken_needs_force(empty: Project) -> None:
    empty.call("remote", "add", "cloud", "s3://one")
    assert "--force" in empty.call("remote", "add", "cloud", "s3://two", code=2)
    empty.call("remote", "add", "cloud", "s3://two", "--force")
    assert [remote["url"] for remote in empty.json("remote", "list")] == ["s3://two"]


def test_without_a_remote_it_says_how_to_add_one(trained_copy: Project) -> None:
    for command in (["push"], ["fetch"], ["pull"], ["verify", "--remote", "cloud"], ["gc", "--remote", "cloud"]):
        assert "castore remote add" in trained_copy.call(*command, code=2)
    trained_copy.call("remote", "add", "one", "x")
    trained_copy.call("remote", "add", "two", "y")
    assert "several remotes (one, two)" in trained_copy.call("push", code=2)
    assert "there is no remote 'three': there is one, two" in trained_copy.call("push", "--remote", "three", code=2)


# -- push and fetch --------------------------------------------------------------------------------------------------


def test_what_one_machine_pushed_another_fetches_trains_on_and_verifies(bucket: Project, tmp_path: Path) -> None:
    out = bucket.call("push")
    assert re.search(r"pushed  2 checkpoints to cloud: \d+ objects, .* moved", out)
    assert "all there already" in bucket.call("push")
    other = clone(bucket, tmp_path / "other")
    assert {entry["availability"] for entry in other.json("log")} == {"full"}
    out = other.train("--resume", "best")
    assert re.search(r"fetch   [0-9.]+ kB from remotes, verified\nresume  ", out)
    assert "fetch " not in other.train("--resume", "best")
    assert "verify  cloud" in other.call("verify", "--remote", "cloud")
    other.call("push")
    fresh = clone(other, tmp_path / "fresh")
    assert len(fresh.json("ls", "cloud")) == len(ids(other))
    out = fresh.call("fetch", "latest", "--parts", "model")
    assert re.search(r"fetched [0-9a-f]{12}, step 12 of main \(model\): 2 objects", out)
    assert fresh.json("fetch", "latest", "--parts", "model")[0]["objects"] == 0
    assert "has no part 'modle'" in fresh.call("fetch", "--parts", "modle", code=3)
    fresh.call("pull")
    assert [part["where"] for part in fresh.json("ls", "best")] == ["local"] * 3
    fresh.call("verify", "best")


def test_status_says_what_is_where(bucket: Project, tmp_path: Path) -> None:
    newest, oldest = ids(bucket)
    bucket.call("push", newest)
    status = bucket.json("status")
    assert status["remote"] == "cloud"
    places = {entry["id"]: (entry["here"], entry["there"], entry["committed"]) for entry in status["checkpoints"]}
    parts = ["model", "optimizer", "trainer"]
    assert places[newest] == (parts, parts, False)
    assert places[oldest] == (parts, [], False)
    text = bucket.call("status")
    assert "here, and not whole in cloud (`castore push`):" in text
    assert text.count(newest[:12]) == 1  # not committed
    assert text.count(oldest[:12]) == 2
    bucket.git("add", "-A", ".castore")
    bucket.git("commit", "-qm", "x")
    assert newest[:12] not in bucket.call("status")
    assert all(entry["committed"] for entry in bucket.json("status")["checkpoints"])
    other = clone(bucket, tmp_path / "other")
    assert f"in cloud alone (`castore fetch ID`):\n  {newest[:12]}" in other.call("status")
    assert "whose data is nowhere" in other.call("status")


def test_a_checkpoint_is_fetched_without_a_clone_by_its_id(bucket: Project, tmp_path: Path) -> None:
    bucket.call("push")
    newest = ids(bucket)[0]
    url = bucket.json("remote", "list")[0]["url"]
    (tmp_path / "empty").mkdir()
    other = Project(tmp_path / "empty")
    other.environment = bucket.environment
    assert newest[:12] in other.call("ls", url)
    assert "which one?" in other.call("fetch", "--from", url, code=2)
    other.call("fetch", "--from", url, newest)
    assert ids(other) == [newest]
    other.call("verify", newest)
    short = other.start("fetch", "--from", url, newest[:9])
    out, err = short.communicate()
    assert "only the 9 digits that were given vouch for it" in err
    assert "all here" in out
    assert "has no checkpoint" in other.call("fetch", "--from", url, "0" * 64, code=3)


def test_the_best_and_the_latest_there_are_found_without_a_clone(bucket: Project, tmp_path: Path) -> None:
    url = bucket.json("remote", "list")[0]["url"]
    assert bucket.call("fetch", "--from", url, "latest", code=3)  # nothing was pushed yet
    bucket.call("push")
    newest = ids(bucket)[0]
    for number, source in enumerate((url, "cloud")):
        other = bucket.copy(tmp_path / f"other{number}")
        shutil.rmtree(other.root / ".castore" / "manifests")
        shutil.rmtree(other.root / ".castore" / "objects")
        process = other.start("fetch", "--from", source, "latest")
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert f"{newest}: latest by what {source} says; nothing else vouches for it" in err
        assert ids(other) == [newest]
        assert other.json("fetch", "--from", source, "main:best")[0]["parts"] == ["model", "optimizer", "trainer"]


def test_what_was_named_and_is_not_here_fails_the_push(bucket: Project, tmp_path: Path) -> None:
    newest, _ = ids(bucket)
    other = clone(bucket, tmp_path / "other")
    assert "its data isn't here" in other.call("push", newest, code=4)
    assert "nothing to push" in other.call("push", code=7)
    assert "no data of" in other.call("fetch", newest, code=4)
    bucket.call("push", newest)
    oldest = ids(bucket)[1]
    assert f"no data of {oldest[:12]}" in other.call("fetch", oldest, newest, code=4)
    assert [part["where"] for part in other.json("ls", newest)] == ["local"] * 3  # whatever could be fetched was


def test_a_bad_copy_is_told_and_mended(bucket: Project, tmp_path: Path) -> None:
    bucket.call("push")
    url = bucket.json("remote", "list")[0]["url"]
    remote = Bucket("stocking", url)
    for file in list(remote.files("objects")):
        remote.write_file(file.name, b"garbage", replace=True)
    other = clone(bucket, tmp_path / "other")
    assert "bad copy in cloud" in other.call("fetch", ids(bucket)[0], code=4)
    process = bucket.start("verify", "--remote", "cloud", "--json")
    found = json.loads(process.communicate()[0])
    assert (process.returncode, found["ok"]) == (5, False)
    assert all("bad copy in cloud" in finding["reason"] for finding in found["findings"])
    assert "castore push --repair" in bucket.call("verify", "--remote", "cloud", "--repair", code=2)
    bucket.call("push", "--repair")
    bucket.call("verify", "--remote", "cloud")
    other.call("fetch", ids(bucket)[0])


def test_gc_in_a_remote_asks_for_a_collector(bucket: Project) -> None:
    bucket.call("push")
    assert 'write collector = "' in bucket.call("gc", "--remote", "cloud", code=2)
    assert "would be deleted in cloud" in bucket.call("gc", "--remote", "cloud", "--dry-run")
    path = bucket.root / ".castore" / "config.toml"
    path.write_text(path.read_text().replace("[remotes]", '[remotes]\ncollector = "ci"'))
    bucket.environment = bucket.environment | {"CASTORE_COLLECTOR": "ci"}
    bucket.call("gc", "--keep", "1", "--keep-latest", "0", "--remote", "cloud")
    assert bucket.json("gc", "--keep", "1", "--keep-latest", "0", "--remote", "cloud", "--grace", "0")["marked"]
    assert bucket.json("gc", "--keep", "1", "--keep-latest", "0", "--remote", "cloud", "--grace", "0")["deleted"]
    assert "0 files, 0 B deleted in cloud" in bucket.call("gc", "--remote", "cloud")


def test_a_listing_asks_for_little(bucket: Project, s3: BucketService, tmp_path: Path) -> None:
    bucket.call("push")
    other = clone(bucket, tmp_path / "other")
    s3.requests.clear()
    assert {entry["availability"] for entry in other.json("log")} == {"full"}
    assert {request.method for request in s3.requests} == {"HEAD"}
    assert len(s3.requests) == 6  # a part each
    s3.requests.clear()
    assert "whose data is nowhere" in other.call("status")
    assert len(s3.requests) <= 8


def test_status_of_a_remote_that_refuses_says_so_and_tells_the_rest(bucket: Project, s3: BucketService) -> None:
    with s3.harming("403"):
        process = bucket.start("status")
        out, err = process.communicate()
    assert process.returncode == 0
    assert "what is there isn't known: cloud: access denied" in err
    assert "not committed" in out
    assert "3 here" in out


def test_doctor_asks_a_bucket(bucket: Project, s3: BucketService) -> None:
    assert "remote cloud: is there" in bucket.call("doctor")
    with s3.harming("403"):
        assert "remote cloud: cloud: access denied" in bucket.call("doctor")


# -- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pushing(s3: BucketService, project: Project) -> Project:
    project.environment = project.environment | s3.environment()
    project.call("init")
    project.call("remote", "add", "cloud", s3.url(), "--push", "auto")
    return project


def test_each_save_of_a_session_is_pushed(pushing: Project, tmp_path: Path) -> None:
    pushing.train()
    there = pushing.json("ls", "cloud")
    assert [entry["id"] for entry in there] == ids(pushing)
    assert all(entry["parts"] == ["model", "optimizer", "trainer"] for entry in there)
    other = clone(pushing, tmp_path / "other")
    out = other.train("--resume", "best")
    assert "resume " in out


def test_what_could_not_be_pushed_is_told_by_the_exit_code_and_is_not_lost(pushing: Project, s3: BucketService) -> None:
    with s3.harming("403", when=lambda request: request.method == "PUT"):
        err = pushing.train(code=1)
    assert re.search(r"[12] checkpoints? could not be pushed to cloud; nothing is lost, and `castore push` tries", err)
    assert "access denied" in err
    assert SECRET not in err
    assert len(ids(pushing)) == 2
    assert list((pushing.root / ".castore" / "sessions").rglob("*.json"))
    pushing.call("push")
    pushing.call("verify", "--remote", "cloud")
    assert len(pushing.json("ls", "cloud")) == 2


def test_what_could_not_be_pushed_is_not_collected(pushing: Project, s3: BucketService) -> None:
    path = pushing.root / ".castore" / "config.toml"
    settings = "keep = 1\nkeep_latest = 1\nkeep_optimizer = 1\n"
    path.write_text(
        re.sub(r"(?m)^keep(_\w+)? = .*\n", "", path.read_text()).replace("[retention]", f"[retention]\n{settings}")
    )
    with s3.harming("403", when=lambda request: request.method == "PUT"):
        pushing.train("--session-iters", "11", "--save-every", "1", code=1)
    parts = ["model", "optimizer", "trainer"]
    saved = [entry for entry in pushing.json("status")["checkpoints"] if entry["here"] != ["data"]]
    assert [entry["here"] for entry in saved] == [parts] * 11
    pushing.call("push")
    pushing.call("gc")
    saved = [entry for entry in pushing.json("status")["checkpoints"] if "data" not in entry["there"] + entry["here"]]
    assert [entry["there"] for entry in saved] == [parts] * 11
    assert sum(entry["here"] == parts for entry in saved) < 3


def test_a_session_that_is_stopped_pushes_what_it_saved(pushing: Project) -> None:
    process = pushing.training()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert [entry["id"] for entry in pushing.json("ls", "cloud")] == ids(pushing)


def test_a_session_that_is_killed_goes_on_elsewhere_from_what_was_pushed(pushing: Project, tmp_path: Path) -> None:
    process = pushing.training()
    for line in process.stdout or ():
        if line.startswith("saved") and len(pushing.json("ls", "cloud")) >= 1:
            break
    process.kill()
    process.communicate()
    there = pushing.json("ls", "cloud")
    assert there
    (tmp_path / "replacement").mkdir()
    other = Project(tmp_path / "replacement")
    other.environment = pushing.environment
    url = pushing.json("remote", "list")[0]["url"]
    other.call("fetch", "--from", url, there[0]["id"])
    out = other.train("--resume", there[0]["id"])
    assert f"resume  {there[0]['id'][:12]}, step {there[0]['step']}" in out


def test_a_planted_secret_is_in_no_output_and_no_file(pushing: Project, s3: BucketService) -> None:
    texts = []
    for harm in ("", "403", "expired"):
        with s3.harming(harm):  # type: ignore[arg-type]
            for command in (["-vv", "push"], ["-vv", "status"], ["ls", "cloud"], ["fetch"], ["doctor"], ["log"]):
                process = pushing.start(*command)
                texts += process.communicate()
    with s3.harming("403"):
        process = pushing.start("-vv", "train", "--data-dir", "texts", "--session-iters", "1", "--n-layer", "1")
        texts += process.communicate()
    for text in texts:
        assert SECRET not in text
        assert KEY_ID not in text
    for path in pushing.root.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes()
            assert KEY_ID.encode() not in path.read_bytes()
