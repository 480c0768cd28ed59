"""Push what a session made while other sessions push too: how often to try, and when to give up."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from castore.errors import NotPushed
from castore.storage import git_commits

_MAX_PUSHES = 6
_MAX_REFUSALS = 2
_MAX_PAUSE = 20.0

_logger = logging.getLogger(__name__)


def publish(
    folder: Path, files: Sequence[str], removed: Sequence[str], message: str, pause: Callable[[float], None]
) -> str:
    """Commit ``files`` and the absence of ``removed``, paths below ``folder``, and push the branch that is checked out.

    What others have pushed meanwhile stays: the commit is made again on top of it. Return the commit that was pushed,
    which need not be new. The local branch moves only after that, and only to a commit right on top of its own: moved
    to one with the work of others, which isn't in the work tree, it would let the next commit here undo that work.
    NotPushed after ``_MAX_PUSHES`` tries, or when the other side has refused ``_MAX_REFUSALS`` times in a row although
    its branch had not moved.

    One refusal proves nothing: a server that is updating the branch for somebody else refuses in the same way. Failures
    without a decision are always tried again: git reports wrong credentials and a broken network by the same exit code,
    128, and by nothing else that a program can read.
    """
    remote, name = git_commits.branch(folder)
    tip = git_commits.known_tip(folder, remote, name)
    is_behind = tip is not None and git_commits.is_ancestor(folder, "HEAD", tip)
    base, reason, refusals = tip if tip and is_behind else "HEAD", "", 0
    for attempt in range(_MAX_PUSHES):
        if attempt:
            # random, as many sessions may have ended at once
            pause(min(2.0**attempt, _MAX_PAUSE) * random.uniform(0.2, 0.6))
        try:
            commit_id = git_commits.make_commit(folder, base, files, removed, message)
        except NotPushed as error:
            reason = error.reason
            continue
        result = git_commits.push(folder, remote, name, commit_id)
        if result.outcome == "pushed":
            _advance(folder, name, base, commit_id)
            return commit_id
        reason = result.reason
        _logger.warning("push %d of at most %d %s: %s", attempt + 1, _MAX_PUSHES, result.outcome, reason)
        try:
            tip = git_commits.fetch_branch(folder, remote, name)
        except NotPushed:
            tip = base  # there is no such branch yet, or the next push tells what is wrong
        refusals = 0 if result.outcome != "refused" else refusals + 1 if tip == base else 1
        if refusals == _MAX_REFUSALS:
            raise NotPushed(reason)
        base = tip
    raise NotPushed(f"{reason} ({_MAX_PUSHES} tries)")


def _advance(folder: Path, name: str, base: str, commit_id: str) -> None:
    """Let the local branch follow a commit that was pushed, if its base is where the branch is."""
    try:
        if base == "HEAD" or git_commits.is_ancestor(folder, base, "HEAD"):
            git_commits.move_branch(folder, name, commit_id)
    except NotPushed as error:  # it is pushed all the same
        _logger.warning("the local branch stays where it was: %s", error.reason)
