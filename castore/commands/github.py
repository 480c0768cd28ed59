"""What runs inside a job of GitHub Actions: `castore ci restore`, `ci save` and `ci recover`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

import castore
from castore import errors
from castore.commands.console import Display, JsonOption, fields_of, print_json, print_raw, say, warn
from castore.commands.inspect import describe_match
from castore.commands.keep import KeepOptimizerOption, KeepOption, MaxSizeOption, with_changes
from castore.text import format_number, format_size

if TYPE_CHECKING:
    from castore.github.recovery import Recovered
    from castore.github.sessions import CaughtUp, RestoredSession, SavedSession, Traffic
    from castore.remotes.github_service import CacheService
    from castore.storage.catalog import BrokenFile

app = typer.Typer(
    help="Hand progress from one job of GitHub Actions to the next, through its cache.", no_args_is_help=True
)


@app.command("workflow", epilog="Example: castore ci workflow > .github/workflows/train.yml")
def ci_workflow(
    action: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Whose action.", show_default="where castore was installed from"),
    ] = None,
) -> None:
    """Print a workflow that trains every night, and hands on what was trained."""
    from castore.github.workflow import workflow

    print_raw(workflow(action))


@app.command("restore", epilog="Example: castore ci restore --resume best")
def ci_restore(
    resume: Annotated[
        str, typer.Option(metavar="WHAT", help="best, latest, an id, RUN:best, RUN:latest or none.")
    ] = "best",
    allow_fresh: Annotated[
        bool, typer.Option("--allow-fresh", help="No error when there are checkpoints but none is available.")
    ] = False,
    require_save: Annotated[
        bool, typer.Option("--require-save", help="An error at once if `ci save` could not hand on what is trained.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch what the next session starts from.

    Runs inside an action, as GitHub gives no other step access to the cache: that of castore with `mode: restore`, see
    `castore ci workflow`. The job's summary says what was done.
    """
    from castore.github import sessions, summary

    with _job("restore") as (repo, service), Display("restore", "bytes") as display:
        obstacles = sessions.obstacles(repo, service)
        if obstacles and require_save:
            raise errors.UsageError("\n  ".join(["what this job trains could not be handed on:", *obstacles]))
        warn(*(f"WARNING: what this job trains can't be handed on: {reason}" for reason in obstacles))
        caught_up = sessions.catch_up(repo, os.environ.get("GITHUB_REF", ""))
        cache, broken = sessions.connect(repo, service)
        warn(*caught_up.passed_over, *_describe_broken(broken))
        restored = sessions.restore(repo, cache, resume, allow_fresh=allow_fresh, progress=display)
    match = restored.match
    passed_over = (*caught_up.passed_over, *_describe_broken(broken), *_damaged(restored))
    _append("GITHUB_STEP_SUMMARY", summary.restored_markdown(restored, caught_up, obstacles, passed_over))
    _append_outputs(
        {
            "match": match.id if match else "",
            "run": match.run if match else "",
            "step": match.step if match else 0,
            "fresh": json.dumps(match is None),
            "can-save": json.dumps(not obstacles),
            "downloaded-bytes": restored.traffic.downloaded,
        }
    )
    if as_json:
        before = {"caught_up": fields_of(caught_up), "obstacles": obstacles}
        print_json({**fields_of(restored), "further": [entry.id for entry in restored.further], **before})
        return
    warn(*_damaged(restored))
    say(*_describe_caught_up(caught_up), *_describe_restored(restored))


def _describe_broken(broken: Iterable[BrokenFile]) -> list[str]:
    return [f"{file.path}: {file.reason}" for file in broken]


def _damaged(restored: RestoredSession) -> list[str]:
    damaged = restored.resolution.damaged if restored.resolution else ()
    return [f"{manifest.path}: {manifest.reason}" for manifest in damaged]


def _describe_caught_up(caught_up: CaughtUp) -> Iterator[str]:
    if caught_up.problem:
        yield f"WARNING {caught_up.branch} could not be asked what others pushed meanwhile: {caught_up.problem}"
    elif caught_up.files:
        yield f"also    {len(caught_up.files)} files that others pushed to {caught_up.branch} meanwhile"


def _describe_restored(restored: RestoredSession) -> Iterator[str]:
    for reason in restored.resolution.explain_rejections() if restored.resolution else ():
        yield f"no      {reason}"
    yield describe_match(restored.match) if restored.match else f"fresh   {restored.fresh}"
    if restored.resolution and restored.resolution.note:
        yield f"note    {restored.resolution.note}"
    for further in restored.further:
        step = further.manifest.step
        yield f"also    {further.id[:12]}, step {step:,}: an earlier session trained from the match up to there"
    for name, error in restored.remote_errors.items():
        yield f"WARNING remote {name} was passed over: {error}"
    yield f"moved   {_describe_traffic(restored.traffic)}"


@app.command("save", epilog="Example: castore ci save --keep 10 --commit")
def ci_save(
    keep: KeepOption = None,
    keep_optimizer: KeepOptimizerOption = None,
    max_size: MaxSizeOption = None,
    commit: Annotated[bool, typer.Option("--commit", help="Commit what is staged, and push the branch.")] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.", show_default="run, step and loss")] = "",
    as_json: JsonOption = False,
) -> None:
    """Upload what the next session needs, and record it in git.

    Collects garbage, uploads what the cache lacks of the kept checkpoints as one bundle, and, once a look-up has
    confirmed the bundle, stages its record and the manifests.
    """
    from castore.github import sessions, summary

    with _job("save") as (repo, service), Display("save", "bytes") as display:
        cache, broken = sessions.connect(repo, service)
        warn(*_describe_broken(broken))
        policy = with_changes(repo.policy, {"keep": keep, "keep_optimizer": keep_optimizer}, max_size)
        ref = os.environ.get("GITHUB_REF", "")
        saved = sessions.save(repo, cache, policy, commit=commit, message=message, ref=ref, progress=display)
    _append("GITHUB_STEP_SUMMARY", summary.saved_markdown(saved, _describe_broken(broken)))
    _append_outputs(
        {
            "bundle": saved.records[0].bundle if saved.records else "",
            "uploaded-bytes": saved.traffic.uploaded,
            "commit": saved.commit or "",
        }
    )
    if as_json:
        print_json({name: value for name, value in fields_of(saved).items() if name != "plan"})
    elif saved.skipped:
        say(f"skipped {saved.skipped}: nothing was saved")
    else:
        say(*_describe_saved(saved))
    if saved.left_out:
        sys.exit(5)


def _describe_saved(saved: SavedSession) -> Iterator[str]:
    if session := saved.session:
        steps = f"step {session.start_step:,} -> {session.final_step:,}"
        losses = f"{format_number(session.start_loss)} -> {format_number(session.final_loss)}"
        yield f"session {session.run}: {steps}, validation loss {losses}, {session.checkpoints} checkpoints"
    if saved.records:
        record = saved.records[0]
        yield f"bundle  {record.bundle[:12]}: {record.objects} objects, {format_size(record.bytes)}; confirmed"
    elif saved.unasked:
        yield f"WARNING no bundle: the cache could not be asked what it has: {saved.unasked}"
    elif saved.unconfirmed or saved.left_out:
        yield "bundle  none: there was nothing that could be uploaded"
    else:
        yield "bundle  none: the cache has everything that is kept"
    for checkpoint_id in saved.unconfirmed:
        yield f"WARNING {checkpoint_id[:12]} is kept and not here, and the cache was not seen to have all of it"
    for checkpoint_id, reason in saved.left_out:
        yield f"WARNING {checkpoint_id[:12]} was left out: {reason}"
    for path in saved.altered:
        yield f"WARNING git has other bytes of {path} than were written: `castore doctor` says more"
    if saved.not_collected:
        yield f"WARNING no garbage was collected: {saved.not_collected}"
    yield f"git     {len(saved.files)} files, {f'pushed as {saved.commit[:12]}' if saved.commit else 'staged'}"
    yield f"moved   {_describe_traffic(saved.traffic)}"


def _describe_traffic(traffic: Traffic) -> str:
    up, down = format_size(traffic.uploaded), format_size(traffic.downloaded)
    return f"{up} up, {down} down, {traffic.requests} requests to the cache"


@app.command("recover", epilog="Example: castore ci recover castore-BUNDLE --commit")
def ci_recover(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle's key, or its whole id.")],
    commit: Annotated[bool, typer.Option("--commit", help="Commit what is staged, and push the branch.")] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.", show_default="names the bundle")] = "",
    as_json: JsonOption = False,
) -> None:
    """Bring back what a session recorded and could not push.

    A failed `ci save` names the bundle that it had uploaded. The manifests travel in it too: they are staged, for you
    to look at. What is committed is trusted from then on.
    """
    from castore.github import recovery, summary

    with _job("recover") as (repo, service):
        recovered = recovery.recover(repo, service, bundle, commit=commit, message=message)
    _append("GITHUB_STEP_SUMMARY", summary.recovered_markdown(recovered))
    _append_outputs({"bundle": recovered.bundle, "commit": recovered.commit or ""})
    if as_json:
        print_json({**fields_of(recovered), "checkpoints": [entry.id for entry in recovered.checkpoints]})
    else:
        say(*_describe_recovered(recovered))
    warn(*recovered.passed_over)
    if recovered.passed_over:
        sys.exit(5)


def _describe_recovered(recovered: Recovered) -> Iterator[str]:
    yield f"bundle  {recovered.bundle[:12]}"
    for entry in recovered.checkpoints:
        loss = format_number(entry.manifest.metrics.get("val_loss"))
        yield f"new     {entry.id[:12]}: {entry.manifest.run}, step {entry.manifest.step:,}, validation loss {loss}"
    if not recovered.files:
        yield "git     has all of it: nothing was lost"
        return
    told = f"pushed as {recovered.commit[:12]}" if recovered.commit else "staged: look at them, commit and push"
    yield f"git     {len(recovered.files)} files, {told}"


@contextmanager
def _job(mode: str) -> Iterator[tuple[castore.Repo, CacheService]]:
    """Open the repository and this job's cache service; an error is also written to the job's summary."""
    from castore.github import summary
    from castore.remotes.github_service import CacheService

    service = CacheService.of_job(os.environ)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, without waiting for the network: the store survives it
    try:
        yield castore.Repo.open(), service
    except castore.CastoreError as error:
        _append("GITHUB_STEP_SUMMARY", summary.failed_markdown(f"{mode}: {error}"))
        raise


def _append(variable: str, text: str) -> None:
    """Append to the file that a variable of the job names. Failing to is no reason to fail: the work is done."""
    path = os.environ.get(variable)
    if path:
        try:
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            warn(f"can't write {variable}: {error.strerror}")


def _append_outputs(values: Mapping[str, object]) -> None:
    _append("GITHUB_OUTPUT", "".join(f"{name}={value}\n" for name, value in values.items()))
