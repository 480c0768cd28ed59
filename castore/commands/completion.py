"""What the shell offers for ids, runs, tags and remotes when Tab is pressed. It never fails: that would be noise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import castore
    from castore.format.manifest import Entry

_MOST = 50  # ids that are offered before the first digit is typed

Offers = list[tuple[str, str]]
"""Words and what to say of each."""


def checkpoints(context: typer.Context, incomplete: str) -> Offers:
    """Offer best and latest, of each run too, tags, and ids of checkpoints."""
    return _offer(context, incomplete, lambda repo: [*_words(repo), *_tags(repo), *_ids(repo, ("checkpoint",))])


def anything(context: typer.Context, incomplete: str) -> Offers:
    """Offer what :func:`checkpoints` does, added files and remotes."""
    return _offer(
        context,
        incomplete,
        lambda repo: [
            *_words(repo),
            *_names(repo),
            *_tags(repo),
            *_remotes(repo),
            *_ids(repo, ("checkpoint", "files")),
        ],
    )


def files(context: typer.Context, incomplete: str) -> Offers:
    """Offer what was added: the newest of each name, and ids."""
    return _offer(context, incomplete, lambda repo: [*_names(repo), *_ids(repo, ("files",))])


def runs(context: typer.Context, incomplete: str) -> Offers:
    """Offer the runs that have a checkpoint."""
    return _offer(context, incomplete, lambda repo: [(run, "run") for run in _runs(repo, "checkpoint")])


def tags(context: typer.Context, incomplete: str) -> Offers:
    """Offer the tags."""
    return _offer(context, incomplete, _tags)


def remotes(context: typer.Context, incomplete: str) -> Offers:
    """Offer the names of the remotes."""
    return _offer(context, incomplete, _remotes)


def _offer(context: typer.Context, incomplete: str, offers: Callable[[castore.Repo], Offers]) -> Offers:
    import castore

    with contextlib.suppress(Exception):
        repo = castore.Repo.open(Path(context.find_root().params.get("directory") or "."))
        fitting = {word: help for word, help in offers(repo) if word.startswith(incomplete)}
        ids = [word for word in fitting if not incomplete and len(word) == 12 and set(word) <= set("0123456789abcdef")]
        for word in ids[_MOST:]:
            del fitting[word]
        return list(fitting.items())
    return []


def _words(repo: castore.Repo) -> Offers:
    everywhere = [("best", "the best of all runs"), ("latest", "the newest of all runs")]
    of_runs = [
        (f"{run}:{word}", f"the {what} of run {run}")
        for run in _runs(repo, "checkpoint")
        for word, what in (("best", "best"), ("latest", "newest"))
    ]
    return [*everywhere, *of_runs]


def _names(repo: castore.Repo) -> Offers:
    return [(f"{name}:latest", f"the newest {name} that was added") for name in _runs(repo, "files")]


def _runs(repo: castore.Repo, kind: str) -> list[str]:
    entries = repo.catalog.listing().entries
    return list(dict.fromkeys(entry.manifest.run for entry in entries if entry.manifest.kind == kind))


def _tags(repo: castore.Repo) -> Offers:
    return [(name, f"tag of {entry_id[:12]}") for name, entry_id in repo.catalog.tags()[0].items()]


def _remotes(repo: castore.Repo) -> Offers:
    return [(name, url) for name, url in repo.config.locations.items()]


def _ids(repo: castore.Repo, kinds: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for entry in repo.catalog.listing().entries:
        if entry.manifest.kind in kinds:
            yield entry.id[:12], _describe(entry)


def _describe(entry: Entry) -> str:
    manifest = entry.manifest
    if manifest.kind == "files":
        return f"{manifest.run}, added {manifest.created[:10]}"
    loss = manifest.metrics.get("val_loss")
    return f"step {manifest.step} of {manifest.run}{'' if loss is None else f', val_loss {loss:.4f}'}"
