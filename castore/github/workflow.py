"""A workflow that trains, for whoever has castore installed: it names the repository that castore came from."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import re
import urllib.parse
from contextlib import suppress
from pathlib import Path

from castore.errors import UsageError
from castore.storage import git_process

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def workflow(repository: str | None = None) -> str:
    """Return the text of a workflow that uses the action of ``repository``, such as ``you/castore``.

    By default that is the repository on GitHub that this castore was installed from: by ``pip install git+URL``, or
    from a clone of it. UsageError if that is not known, or if ``repository`` is not OWNER/NAME.
    """
    repository = repository or installed_from()
    if repository is None:
        raise UsageError("where the action is isn't known: --action OWNER/castore says whose castore on GitHub to use")
    if not _REPOSITORY.fullmatch(repository):
        raise UsageError(f"--action {repository} is not OWNER/NAME, such as you/castore")
    text = (importlib.resources.files("castore.github") / "train.yml").read_text(encoding="utf-8")
    return text.replace("OWNER/castore", repository)


def installed_from() -> str | None:
    """Return OWNER/NAME of the repository on GitHub that castore was installed from; None if it isn't known."""
    with suppress(importlib.metadata.PackageNotFoundError, json.JSONDecodeError, OSError):
        # what pip recorded of where the package came from: PEP 610
        origin = json.loads(importlib.metadata.distribution("castore").read_text("direct_url.json") or "{}")
        url = urllib.parse.urlsplit(str(origin.get("url", "")))
        if url.scheme == "file":
            clone = Path(urllib.parse.unquote(url.path))
            return _on_github(git_process.ask(clone, "remote", "get-url", "origin") or "")
        return _on_github(url.geturl())
    return None


def _on_github(url: str) -> str | None:
    """Return OWNER/NAME of a URL, as git takes one.

    >>> _on_github("https://github.com/you/castore.git"), _on_github("git@github.com:you/castore")
    ('you/castore', 'you/castore')
    """
    match = re.search(rf"(?:^|[@/])github\.com[:/]({_REPOSITORY.pattern}?)(?:\.git)?/?$", url, re.ASCII)
    return match[1] if match else None
