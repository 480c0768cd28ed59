"""What tells whether all is well: `castore verify` and `doctor`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

import castore
from castore import errors
from castore.commands import completion
from castore.commands.console import Display, JsonOption, plural, print_json, say
from castore.text import format_size

if TYPE_CHECKING:
    from castore.signatures import Vouched
    from castore.verify import Finding

app = typer.Typer()


@app.command(epilog="Example: castore verify --repair")
def verify(
    selectors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]...",
            help="Only what these need, all of it.",
            show_default="everything",
            autocompletion=completion.anything,
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Quarantine what is damaged and fetch it again from a remote.")
    ] = False,
    remote: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Read what this remote holds instead.", show_default=False),
    ] = None,
    signed: Annotated[
        bool, typer.Option("--signed", help="Check instead that signed commits brought the manifests.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read everything in the store again, and check it.

    Exits with 5 when something is wrong that was not repaired. Stray files among the objects are listed, but are
    harmless and don't count. Without --repair nothing is moved or changed.

    With --signed, 5 means that no commit vouches for a checkpoint by the signature of a key that git is told to trust,
    as by gpg.ssh.allowedSignersFile. A signed merge vouches for what it adds, not for what it merges: that takes a
    squash merge, or signed commits in what is merged.
    """
    from castore.verify import verify

    repo = castore.Repo.open()
    if signed:
        if repair or remote is not None:
            raise errors.UsageError("--signed reads the history of git alone: leave out --repair and --remote")
        _verify_signed(repo, selectors, as_json)
        return
    if remote is not None:
        _verify_remote(repo, remote, selectors, repair, as_json)
        return
    with Display("verify", "bytes") as display:
        findings = list(verify(repo, selectors, repair=repair, progress=display))
    wrong = sum(not finding.is_harmless for finding in findings)
    if as_json:
        print_json({"ok": not wrong, "bytes": display.done, "findings": [_finding_json(item) for item in findings]})
    else:
        for finding in findings:
            say(*_describe_finding(finding))
        result = f"{plural(len(findings), 'finding')}, {wrong} to repair" if findings else "all is well"
        say(f"verify  {format_size(display.done)} read: {result}")
    if wrong:
        sys.exit(5)


def _verify_remote(repo: castore.Repo, name: str, selectors: list[str] | None, repair: bool, as_json: bool) -> None:
    from castore.remote_verify import verify_remote

    if repair:
        raise errors.UsageError(f"what is damaged there is mended from here: `castore push --repair --remote {name}`")
    remote = repo.publishing_remote(name)
    with Display(f"verify {remote.name}", "count") as display:
        findings = list(verify_remote(repo, remote, selectors, progress=display))
    if as_json:
        print_json({"ok": not findings, "findings": [_finding_json(item) for item in findings]})
    else:
        for finding in findings:
            say(*_describe_finding(finding))
        mend = f"{plural(len(findings), 'finding')}: `castore push --repair` where good copies are mends them"
        say(f"verify  {remote.name}, {plural(display.done, 'object')} read: {mend if findings else 'all is well'}")
    if findings:
        sys.exit(5)


def _verify_signed(repo: castore.Repo, selectors: list[str] | None, as_json: bool) -> None:
    from castore.signatures import check_signatures
    from castore.storage.catalog import Listing

    listing = Listing(tuple(map(repo.find, selectors)), ()) if selectors else repo.catalog.listing()
    entries, broken = listing.entries, listing.broken
    if not entries and not broken:
        raise errors.NothingToDo("nothing to check: there is no manifest")
    with Display("verify signatures", "spinner"):
        vouched = list(check_signatures(repo, entries))
    open_ = [item for item in vouched if item.reason]
    is_ok = not open_ and not broken
    if as_json:
        checkpoints = [dataclasses.asdict(item) for item in vouched]
        files = [{"path": str(file.path), "reason": file.reason} for file in broken]
        print_json({"ok": is_ok, "checkpoints": checkpoints, "broken": files})
    else:
        for file in broken:
            say(f"nobody  {file.path}: {file.reason}")
        for item in open_:
            say(*_describe_open(item))
        signers = ", ".join(sorted({item.signer for item in vouched if not item.reason}))
        good = plural(len(vouched) - len(open_), "manifest")
        say(f"verify  {good} of {len(vouched) + len(broken)} signed{f' by {signers}' if signers else ''}")
    if not is_ok:
        sys.exit(5)


def _describe_open(item: Vouched) -> Iterator[str]:
    commit = f"commit {item.commit[:12]}: " if item.commit else ""
    yield f"nobody  {item.id[:12]}, step {item.step:,} of {item.run}: {commit}{item.reason}"
    if item.git:
        yield f"        git says: {item.git}"


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {**dataclasses.asdict(finding), "path": str(finding.path), "harmless": finding.is_harmless}


def _describe_finding(finding: Finding) -> Iterator[str]:
    what = f"object {finding.object_id[:12]}" if finding.object_id else str(finding.path)
    yield f"{finding.kind:7} {what}: {finding.reason}"
    if finding.needed_by:
        shown = ", ".join(f"{need.part} of {need.checkpoint_id[:12]}" for need in finding.needed_by[:4])
        more = len(finding.needed_by) - 4
        yield f"        needed by {shown}{f' and {more} more' if more > 0 else ''}"
    if finding.repaired_from:
        yield f"        repaired: a good copy came from {finding.repaired_from}"


@app.command(epilog="Example: castore doctor")
def doctor(as_json: JsonOption = False) -> None:
    """Check the repository, and say what to do.

    Everything that is not ok comes with advice. Exits with 1 when there is a problem; a warning is not a problem.
    """
    from castore.doctor import examine

    checks = list(examine(datetime.now(UTC)))
    problems = sum(check.level == "problem" for check in checks)
    if as_json:
        print_json({"ok": not problems, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        for check in checks:
            say(f"{check.level:8}{check.subject}: {check.text}")
            if check.level != "ok":
                say(f"        {check.advice}")
    if problems:
        sys.exit(1)
