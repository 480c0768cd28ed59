"""Which checkpoint a session begins with, and why. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import castore
from castore import errors
from nanecho import config as configs
from nanecho.config import Config

RESUMED = ("model", "optimizer", "trainer")
"""The parts of a checkpoint that a session needs to go on as if it had never stopped."""


def last_step(config: Config, step: int) -> int:
    """Where a session that begins at ``step`` is to end."""
    last = config.training.max_iters
    return min(last, step + config.run.session_iters) if config.run.session_iters else last


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to begin with: a match, or the reason for a fresh start."""

    resolution: castore.Resolution | None = None
    match: castore.Match | None = None
    fresh: str = ""
    later_step: int | None = None
    instead_of: castore.Match | None = None


def choose(repo: castore.Repo, config: Config, experiment: castore.Experiment) -> Choice:
    """CorruptManifest, NothingMatches or NothingAvailable when none can be resumed and starting anew isn't allowed."""
    want = config.run.resume
    if want == "none":
        return Choice(fresh="as --resume none asks for")

    def resolve(want: str) -> castore.Resolution:
        return repo.resolve(
            want,
            experiment,
            config=configs.recorded(config),
            parts=RESUMED,
            allow_data_change=config.run.allow_data_change or None,
            weights_only=True,
        )

    resolution = resolve(want)
    if resolution.match:
        if resolution.selector != "best":
            return Choice(resolution=resolution, match=resolution.match)
        return _go_on(repo, config, experiment, resolution, resolve)
    if why := repo.fresh_start(resolution, allow_fresh=config.run.allow_fresh):
        return Choice(resolution=resolution, fresh=why)
    try:
        return Choice(resolution=resolution, match=resolution.require())
    except (errors.NothingMatches, errors.NothingAvailable) as error:
        raise type(error)(f"{error}\n  to start anew instead: --allow-fresh, or --resume none") from None


def _go_on(
    repo: castore.Repo,
    config: Config,
    experiment: castore.Experiment,
    resolution: castore.Resolution,
    resolve: Callable[[str], castore.Resolution],
) -> Choice:
    """The best one, unless this whole session has been trained from it before: then where that led to.

    Training is a function of the checkpoint and the options, so a session from the same checkpoint with the same
    options would only repeat what is there, and so would the next, for ever.
    """
    best = resolution.match
    assert best is not None
    furthest = repo.furthest(repo.find(best.id), configs.recorded(config))
    if furthest and best.step < last_step(config, best.step) <= furthest.manifest.step:
        instead = resolve(furthest.id)
        if instead.match and instead.match.availability == "full":
            return Choice(resolution=resolution, match=instead.match, instead_of=best)
    later = [
        entry.manifest.step
        for entry in repo.checkpoints()
        if entry.manifest.experiment == experiment
        and entry.manifest.step > best.step
        and (castore.score(entry.manifest) or 0) < (best.score or 0)
    ]
    return Choice(resolution=resolution, match=best, later_step=max(later, default=None))
