"""Checkpoints whose manifests were brought by signed commits, with real keys."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from project import Project

from castore import Repo
from castore.format.manifest import MAX_BYTES
from castore.signatures import check_signatures
from castore.storage import git, git_process


@pytest.fixture
def signing(tmp_path: Path) -> Project:
    """A repository in which git signs with a key that it trusts; another key, ``other``, is there too."""
    for name in ("mine", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project")
    project.call("init")
    (tmp_path / "allowed").write_text(f"me@example.com {(tmp_path / 'mine.pub').read_text()}")
    for key, value in (
        ("gpg.format", "ssh"),
        ("user.signingkey", str(tmp_path / "mine")),
        ("gpg.ssh.allowedSignersFile", str(tmp_path / "allowed")),
    ):
        project.git("config", key, value)
    return project


def save(project: Project, step: int, *commit: str) -> str:
    """A checkpoint whose manifest is committed with these options; its id."""
    saved = Repo.open(project.root).save({"model": {"step": step}}, run="main", step=step)
    if commit:
        project.git("add", ".castore")
        project.git("commit", "-q", "-m", "x", *commit)
    return saved.id


def vouched(project: Project, *arguments: str, code: int) -> dict[str, str]:
    """The reason for each checkpoint that nobody vouches for; the signer of the others."""
    process = project.start("verify", "--signed", "--json", *arguments)
    out, err = process.communicate()
    assert process.returncode == code, err
    shown = json.loads(out)
    assert shown["ok"] == (code == 0)
    return {item["id"]: item["reason"] or item["signer"] for item in shown["checkpoints"]}


def test_a_signed_commit_vouches_for_what_it_brings(signing: Project) -> None:
    first = save(signing, 1, "-S")
    assert vouched(signing, code=0) == {first: "me@example.com"}
    assert "1 manifest of 1 signed by me@example.com" in signing.call("verify", "--signed")
    second = save(signing, 2, "--no-gpg-sign")
    assert vouched(signing, code=5) == {first: "me@example.com", second: "it has no signature"}
    assert vouched(signing, first[:8], code=0) == {first: "me@example.com"}
    third = save(signing, 3)
    assert vouched(signing, third, code=5)[third].startswith("no commit in the history of HEAD")


def test_a_manifest_that_can_not_be_read_is_vouched_for_by_nobody(signing: Project) -> None:
    checkpoint = save(signing, 1)
    folder = signing.root / ".castore" / "manifests" / "main"
    broken = folder / "000000002-0123456789ab.json"
    broken.write_text("{}")
    save(signing, 3, "-S")
    process = signing.start("verify", "--signed", "--json")
    out, _ = process.communicate()
    assert process.returncode == 5
    shown = json.loads(out)
    assert not shown["ok"]
    assert [file["path"] for file in shown["broken"]] == [str(broken)]
    assert len(shown["checkpoints"]) == 2
    out = told(signing)
    assert f"nobody  {broken}: " in out
    assert "2 manifests of 3 signed" in out
    assert vouched(signing, checkpoint, code=0) == {checkpoint: "me@example.com"}
    for path in folder.iterdir():
        path.write_text("{}")
    assert "0 manifests of 3 signed" in told(signing)


def test_a_signed_commit_vouches_for_the_bytes_that_it_brought_and_no_others(signing: Project) -> None:
    checkpoint = save(signing, 1)
    (manifest,) = (signing.root / ".castore" / "manifests" / "main").glob("*.json")
    good = manifest.read_bytes()
    for data, sign in ((b"{}", "-S"), (None, "-S"), (good, "--no-gpg-sign")):
        manifest.unlink() if data is None else manifest.write_bytes(data)
        signing.git("add", "-A", ".castore")
        signing.git("commit", "-q", "-m", "x", sign)
    assert vouched(signing, code=5) == {checkpoint: "it has no signature"}


def test_a_key_that_is_not_allowed_vouches_for_nothing(signing: Project) -> None:
    signing.git("config", "user.signingkey", str(signing.root.parent / "other"))
    checkpoint = save(signing, 1, "-S")
    assert vouched(signing, code=5) == {checkpoint: "the key is good, and not one that git is told to trust"}


def test_a_key_that_git_trusts_too_little_vouches_for_nothing(signing: Project) -> None:
    checkpoint = save(signing, 1, "-S")
    signing.git("config", "gpg.minTrustLevel", "ultimate")
    with pytest.raises(subprocess.CalledProcessError):
        signing.git("verify-commit", "HEAD")
    assert vouched(signing, code=5) == {checkpoint: "git verify-commit refuses it, as by gpg.minTrustLevel"}


def test_a_signature_of_another_branch_counts_once_it_is_merged(signing: Project) -> None:
    save(signing, 1, "-S")
    signing.git("checkout", "-q", "-b", "side")
    second = save(signing, 2, "-S")
    signing.git("checkout", "-q", "-")
    signing.git("commit", "-q", "--allow-empty", "-m", "main goes on")
    assert second not in vouched(signing, code=0)
    signing.git("merge", "-q", "--no-ff", "-m", "merge", "side")
    assert vouched(signing, second, code=0) == {second: "me@example.com"}


@pytest.fixture
def unsigned_side(signing: Project) -> tuple[Project, str]:
    """A signed history, beside which a branch ``side`` has a checkpoint that nobody signed; and its id."""
    save(signing, 1, "-S")
    signing.git("checkout", "-q", "-b", "side")
    checkpoint = save(signing, 2, "--no-gpg-sign")
    signing.git("checkout", "-q", "-")
    save(signing, 3, "-S")
    return signing, checkpoint


def test_a_signed_merge_does_not_vouch_for_what_it_merges(unsigned_side: tuple[Project, str]) -> None:
    project, checkpoint = unsigned_side
    project.git("merge", "-q", "-S", "-m", "merge", "side")
    assert vouched(project, checkpoint, code=5) == {checkpoint: "it has no signature"}


def test_a_signed_squash_merge_vouches_for_what_it_merges(unsigned_side: tuple[Project, str]) -> None:
    project, checkpoint = unsigned_side
    project.git("merge", "-q", "--squash", "side")
    project.git("commit", "-q", "-S", "-m", "squashed")
    assert vouched(project, code=0)[checkpoint] == "me@example.com"


def test_who_merged_unsigned_work_can_sign_it_again(unsigned_side: tuple[Project, str]) -> None:
    """As docs/reliability.md says."""
    project, checkpoint = unsigned_side
    project.git("merge", "-q", "-S", "-m", "merge", "side")
    project.git("rm", "-q", "-r", "--cached", ".castore/manifests")
    project.git("commit", "-q", "-S", "-m", "out")
    project.git("add", ".castore")
    project.git("commit", "-q", "-S", "-m", "in again")
    assert vouched(project, code=0)[checkpoint] == "me@example.com"


def test_a_signed_merge_vouches_for_what_none_of_its_parents_has(unsigned_side: tuple[Project, str]) -> None:
    project, unsigned = unsigned_side
    project.git("merge", "-q", "--no-commit", "side")
    checkpoint = save(project, 4, "-S")
    assert len(project.git("rev-parse", "HEAD^@").split()) == 2
    shown = vouched(project, code=5)
    assert shown[checkpoint] == "me@example.com"
    assert shown[unsigned] == "it has no signature"


def test_a_forged_signature_is_told(signing: Project) -> None:
    checkpoint = save(signing, 1, "-S")
    raw = subprocess.run(
        ["git", "cat-file", "commit", "HEAD"], cwd=signing.root, capture_output=True, check=True
    ).stdout
    forged = raw.replace(b"\n\nx\n", b"\n\nanother message\n")
    assert forged != raw
    made = subprocess.run(
        ["git", "hash-object", "-w", "-t", "commit", "--stdin"],
        cwd=signing.root,
        input=forged,
        capture_output=True,
        check=True,
    )
    signing.git("update-ref", "HEAD", made.stdout.decode().strip())
    assert vouched(signing, code=5) == {checkpoint: "its signature is wrong, or git can't check it"}


@pytest.mark.parametrize("way", ["the file of grafts", "a replaced commit"])
def test_a_commit_that_lost_its_parents_has_brought_no_more_for_it(signing: Project, way: str) -> None:
    unsigned = save(signing, 1, "--no-gpg-sign")
    second = save(signing, 2, "-S")
    signed = signing.git("rev-parse", "HEAD").strip()
    if way == "a replaced commit":
        signing.git("replace", "--graft", signed)
    else:
        grafts = signing.root / ".git" / "info" / "grafts"
        grafts.parent.mkdir(exist_ok=True)
        grafts.write_text(f"{signed}\n")
    assert vouched(signing, code=5) == {unsigned: "it has no signature", second: "me@example.com"}
    assert "hint" not in signing.run("verify", "--signed", code=5)


def test_what_stands_in_for_a_signed_tree_is_not_vouched_for(signing: Project) -> None:
    signing.git("commit", "-q", "-S", "--allow-empty", "-m", "nothing")
    signed = signing.git("rev-parse", "HEAD^{tree}").strip()
    checkpoint = save(signing, 1, "--no-gpg-sign")
    signing.git("replace", signed, signing.git("rev-parse", "HEAD^{tree}").strip())
    assert vouched(signing, code=5) == {checkpoint: "it has no signature"}


def told(project: Project, *arguments: str) -> str:
    """What is said of the first checkpoint that nobody vouches for, and what git says of it."""
    process = project.start("verify", "--signed", *arguments)
    out, err = process.communicate()
    assert process.returncode == 5, err
    return out


def test_git_that_is_not_told_whom_to_trust_says_so(signing: Project) -> None:
    save(signing, 1, "-S")
    signing.git("config", "--unset", "gpg.ssh.allowedSignersFile")
    out = told(signing)
    assert "git isn't told whose keys to trust: `git config gpg.ssh.allowedSignersFile FILE`" in out
    assert "git says: error: gpg.ssh.allowedSignersFile needs to be configured" in out


def test_a_program_that_is_missing_is_told_by_git(signing: Project) -> None:
    save(signing, 1, "-S")
    signing.git("config", "gpg.ssh.program", "/nowhere/ssh-keygen")
    out = told(signing)
    assert "its signature is wrong, or git can't check it" in out
    assert "git says: " in out
    assert "/nowhere/ssh-keygen" in out


def test_a_broken_file_of_allowed_signers_is_told_by_git(signing: Project) -> None:
    save(signing, 1, "-S")
    allowed = signing.root.parent / "allowed"
    allowed.write_text("me@example.com garbage\n")
    out = told(signing)
    assert "git says: " in out
    assert f"{allowed}:1: " in out


def test_a_revoked_key_vouches_for_nothing(signing: Project) -> None:
    checkpoint = save(signing, 1, "-S")
    signing.git("config", "gpg.ssh.revocationFile", str(signing.root.parent / "mine.pub"))
    assert vouched(signing, code=5) == {checkpoint: "its signature is wrong, or git can't check it"}


def test_without_gpg_a_signature_of_gpg_is_one_that_can_not_be_checked(signing: Project) -> None:
    signing.git("config", "gpg.format", "openpgp")
    fake = signing.root.parent / "fake-gpg"
    signature = "-----BEGIN PGP SIGNATURE-----"
    fake.write_text(f"#!/bin/sh\ncat >/dev/null\necho '[GNUPG:] SIG_CREATED x' >&2\necho '{signature}'\n")
    fake.chmod(0o755)
    signing.git("config", "gpg.program", str(fake))
    checkpoint = save(signing, 1, "-S")
    signing.git("config", "gpg.program", "/nowhere/gpg")
    assert vouched(signing, code=5) == {checkpoint: "git can't check its signature"}
    assert "/nowhere/gpg" in told(signing)


def test_words_of_git_control_no_terminal(signing: Project) -> None:
    save(signing, 1, "-S")
    program = signing.root.parent / "program"
    program.write_text("#!/bin/sh\ncat >/dev/null\nprintf '\\033[2Jhostile' >&2\nexit 1\n")
    program.chmod(0o755)
    signing.git("config", "gpg.ssh.program", str(program))
    assert "\\x1b[2Jhostile" in told(signing)


def test_many_commits_take_few_processes(signing: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(4):
        save(signing, step, "-S")
    save(signing, 5, "--no-gpg-sign")
    commands = []

    def run(path: Path, arguments: Sequence[str], **options: Any) -> git_process.Done:
        commands.append(arguments)
        return real(path, arguments, **options)

    real = git_process.run
    monkeypatch.setattr(git, "run", run)
    repo = Repo.open(signing.root)
    assert len(list(check_signatures(repo, repo.catalog.listing().entries))) == 5
    assert len(commands) < 10


def test_a_shallow_clone_is_no_proof(signing: Project, tmp_path: Path) -> None:
    save(signing, 1, "-S")
    save(signing, 2, "-S")
    clone = tmp_path / "clone"
    signing.git("clone", "-q", "--depth", "1", signing.root.as_uri(), str(clone))
    environment = signing.environment | {"PWD": str(clone)}
    process = signing.start("-C", os.fspath(clone), "verify", "--signed", env=environment)
    _, err = process.communicate()
    assert process.returncode == 4
    assert "git fetch --unshallow" in err
    assert "deleted" not in err


def test_outside_of_a_work_tree_nobody_vouches_and_nothing_is_said_of_deletion(signing: Project) -> None:
    save(signing, 1, "-S")
    shutil.rmtree(signing.root / ".git")
    err = signing.call("verify", "--signed", code=4)
    assert err.startswith("castore: git rev-parse failed: fatal: not a git repository")


def test_files_named_like_commits_are_no_obstacle(signing: Project) -> None:
    checkpoint = save(signing, 1, "-S")
    for name in (signing.git("rev-parse", "HEAD").strip(), "HEAD", "FETCH_HEAD", "-"):
        (signing.root / ".castore" / name).touch()
    assert vouched(signing, code=0) == {checkpoint: "me@example.com"}


SETTINGS = (
    ("log.showRoot", "false"), ("i18n.logOutputEncoding", "UTF-16"), ("log.follow", "true"), ("diff.relative", "true"),
    ("diff.renames", "copies"), ("log.diffMerges", "off"), ("color.ui", "always"), ("log.decorate", "full"),
    ("log.showSignature", "true"), ("log.abbrevCommit", "true"), ("core.abbrev", "5"), ("format.pretty", "raw"),
)  # fmt: skip


def test_what_a_commit_brought_does_not_depend_on_settings_for_people(signing: Project) -> None:
    signing.git("add", ".castore")
    checkpoint = save(signing, 1, "-S")
    assert signing.git("rev-list", "--count", "HEAD").strip() == "1"
    for name, value in SETTINGS:
        signing.git("config", name, value)
        assert vouched(signing, code=0) == {checkpoint: "me@example.com"}, name
        signing.git("config", "--unset", name)


@pytest.mark.parametrize("wrong", [b"{}", b" " * (MAX_BYTES + 1)], ids=["small", "too large"])
def test_what_was_wrong_and_is_corrected_by_a_signed_commit_is_vouched_for(signing: Project, wrong: bytes) -> None:
    checkpoint = save(signing, 1)
    (manifest,) = (signing.root / ".castore" / "manifests" / "main").glob("*.json")
    good = manifest.read_bytes()
    for data, sign in ((wrong, "--no-gpg-sign"), (good, "-S")):
        manifest.write_bytes(data)
        signing.git("add", "-A", ".castore")
        signing.git("commit", "-q", "-m", "x", sign)
    assert vouched(signing, code=0) == {checkpoint: "me@example.com"}


def test_a_signed_commit_that_only_lets_a_manifest_be_run_vouches_for_nothing(signing: Project) -> None:
    checkpoint = save(signing, 1, "--no-gpg-sign")
    (manifest,) = (signing.root / ".castore" / "manifests" / "main").glob("*.json")
    manifest.chmod(0o755)
    signing.git("commit", "-q", "-a", "-S", "-m", "mode")
    assert vouched(signing, code=5) == {checkpoint: "it has no signature"}


def test_before_the_first_commit_nobody_vouches(signing: Project) -> None:
    checkpoint = save(signing, 1)
    assert vouched(signing, code=5) == {checkpoint: "no commit in the history of HEAD brought it: commit it"}


@pytest.mark.parametrize("name", [":(top)x", ":", "-x", "a\nb", '"q', os.fsdecode(b"caf\xe9")])
def test_the_name_of_the_folder_does_not_matter(signing: Project, name: str) -> None:
    (signing.root / name).mkdir()
    shutil.move(signing.root / ".castore", signing.root / name / ".castore")
    checkpoint = Repo.open(signing.root / name).save({"model": {"step": 1}}, run="main", step=1).id
    signing.git("add", ".")
    signing.git("commit", "-q", "-S", "-m", "x")
    signing.root = signing.root / name
    assert vouched(signing, code=0) == {checkpoint: "me@example.com"}


def test_it_is_an_error_to_ask_for_more(signing: Project) -> None:
    assert "nothing to check" in signing.call("verify", "--signed", code=7)
    assert "leave out --repair" in signing.call("verify", "--signed", "--repair", code=2)
