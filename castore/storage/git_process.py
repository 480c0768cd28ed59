"""Runs git: the only module that starts a program.

Decisions are made from exit codes and output meant for programs, never from the wording of messages. ``LC_ALL=C`` keeps
what is shown to people the same everywhere.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from castore.errors import BareRepository, UsageError

# what a repository's settings would change in the output that is read, or have run as a program for it
_SETTINGS_OF_OURS = (
    "-c", "core.quotePath=false",
    "-c", "core.fsmonitor=false",
    "-c", "safe.bareRepository=explicit",
    "-c", "log.showSignature=false",
    "-c", "log.showRoot=true",
    "-c", "log.follow=false",
    "-c", "i18n.logOutputEncoding=UTF-8",
    "-c", "advice.graftFileDeprecated=false",
)  # fmt: skip
_MAX_SETTINGS = 1000  # in the environment

SHORT_SECONDS = 10  # for what git answers from what it has in its hands
LONG_SECONDS = 300

Done = subprocess.CompletedProcess[bytes]

# a replaced object or a graft shows another history than the one that was signed and pushed
_HISTORY_AS_IT_IS = {"GIT_NO_REPLACE_OBJECTS": "1", "GIT_GRAFT_FILE": os.devnull}

# Set by git for hooks and aliases (`git rev-parse --local-env-vars`): with them, git would answer for another
# repository or index than the one that the folder lies in.
_LOCAL = frozenset(
    (
        "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_CEILING_DIRECTORIES", "GIT_COMMON_DIR", "GIT_DIR", "GIT_GRAFT_FILE",
        "GIT_IMPLICIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_INTERNAL_SUPER_PREFIX", "GIT_NAMESPACE",
        "GIT_NO_REPLACE_OBJECTS", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_QUARANTINE_PATH", "GIT_REPLACE_REF_BASE",
        "GIT_SHALLOW_FILE", "GIT_WORK_TREE",
    )
)  # fmt: skip


def run(
    path: Path,
    arguments: Sequence[str],
    *,
    seconds: int,
    given: bytes = b"",
    read_only: bool = True,
    extra: Mapping[str, str] | None = None,
    secrets: bool = False,
) -> Done:
    """Run git in ``path`` with ``given`` as its input, and wait for it.

    BareRepository, see :func:`refuse_bare`; OSError, of which TimeoutError is one.

    Unless it is ``read_only`` git may take locks and fetch. Only with ``secrets`` does it see tokens for a server;
    ``extra`` variables are added to its environment.
    """
    refuse_bare(path)
    # hooks and helpers are other people's programs: they don't get the job's access to GitHub's cache
    environment = {
        name: value for name, value in os.environ.items() if name not in _LOCAL and not name.startswith("ACTIONS_")
    } | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", **_HISTORY_AS_IT_IS, **(extra or {})}
    if not secrets:
        environment = _without_secrets(environment)
    if read_only:
        # reading must not fetch from a promisor remote (what is here decides), nor take a lock
        environment |= {"GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(path), *_SETTINGS_OF_OURS, *arguments]
    try:
        return subprocess.run(command, input=given, capture_output=True, timeout=seconds, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"git did not end within {seconds} s") from None


def refuse_bare(path: Path) -> None:
    """Raise BareRepository if ``path``, or a folder between it and the top of its work tree, passes for a repository.

    A commit can bring such a folder. git would take it for the repository, and settings in it name programs to run.
    """
    # safe.bareRepository forbids the same, in git 2.38 and later alone
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        if os.path.exists(folder / ".git"):
            return
        if os.path.lexists(folder / "HEAD") and (
            os.path.lexists(folder / "commondir")  # says where objects and refs are
            or (os.path.lexists(folder / "objects") and os.path.lexists(folder / "refs"))
        ):
            raise BareRepository(str(folder))


def ask(path: Path, *arguments: str) -> str | None:
    """Return what git prints, without the last newline; None when it fails or isn't installed. BareRepository."""
    try:
        done = run(path, arguments, seconds=SHORT_SECONDS)
    except OSError:
        return None
    return os.fsdecode(done.stdout).removesuffix("\n") if done.returncode == 0 else None


def split_lines(out: str) -> list[str]:
    """Return the lines that are not empty, without their ends."""
    # not splitlines(): the name of a branch may contain what that takes for the end of a line
    return [line for line in out.split("\n") if line]


_SETTINGS = ("GIT_CONFIG_COUNT", "GIT_CONFIG_KEY_", "GIT_CONFIG_VALUE_")


def _count_of_settings(text: str) -> int:
    """Return how many settings for git the environment holds. UsageError when that is not a number git would take."""
    if text in ("", "0"):
        return 0
    if not (text.isascii() and text.isdigit() and int(text) <= _MAX_SETTINGS):
        raise UsageError(f"GIT_CONFIG_COUNT is {text[:40]!r}, which git does not take: correct it, or unset it")
    return int(text)


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without git settings that send an HTTP header: that is how git is given a token."""
    kept = {name: value for name, value in environment.items() if not name.startswith(_SETTINGS)}
    numbers = range(_count_of_settings(environment.get("GIT_CONFIG_COUNT", "")))
    pairs = [
        (environment.get(f"GIT_CONFIG_KEY_{number}", ""), environment.get(f"GIT_CONFIG_VALUE_{number}", ""))
        for number in numbers
    ]
    pairs = [pair for pair in pairs if not pair[0].lower().endswith("extraheader")]
    for number, (key, value) in enumerate(pairs):
        kept |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return kept | ({"GIT_CONFIG_COUNT": str(len(pairs))} if pairs else {})
