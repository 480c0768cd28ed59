"""Decide which checkpoint a session resumes, and why. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import castore
from castore import errors
from nanecho import config as configs
from nanecho.config import Config

RESUMED = ("model", "optimizer", "trainer")
"""The parts of a checkpoint that a session needs to continue as if it had never stopped."""


def last_step(config: Config, step: int) -> int:
    """Return the step at which a session that starts at ``step`` is to end."""
    last = config.training.max_iters
    return min(last, step + config.run.session_iters) if config.run.session_iters else last


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeChoice:
    """The checkpoint to resume, or the reason for a fresh start; the fields mean what they do in ``events.Began``."""

    resolution: castore.Resolution | None = None
    match: castore.Match | None = None
    fresh: str = ""
    later_step: int | None = None
    instead_of: castore.Match | None = None


def choose(repo: castore.Repo, config: Config, experiment: castore.Experiment) -> ResumeChoice:
    """Choose the checkpoint to resume, or a fresh start.

    Raise CorruptManifest, NothingMatches or NothingAvailable when none can be resumed and a fresh start is not allowed.
    """
    want = config.run.resume
    if want == "none":
        return ResumeChoice(fresh="as --resume none asks for")

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
            return ResumeChoice(resolution=resolution, match=resolution.match)
        return _continue_from_best(repo, config, experiment, resolution, resolution.match, resolve)
    if why := repo.fresh_start(resolution, allow_fresh=config.run.allow_fresh or bool(config.run.init_from)):
        return ResumeChoice(resolution=resolution, fresh=why)
    try:
        return ResumeChoice(resolution=resolution, match=resolution.require())
    except (errors.NothingMatches, errors.NothingAvailable) as error:
        raise type(error)(f"{error}\n  to start from scratch instead: --allow-fresh, or --resume none") from None


def _continue_from_best(
    repo: castore.Repo,
    config: Config,
    experiment: castore.Experiment,
    resolution: castore.Resolution,
    best: castore.Match,
    resolve: Callable[[str], castore.Resolution],
) -> ResumeChoice:
    """Choose the best checkpoint, or where this very session led when it was trained from there before.

    Training is a function of the checkpoint and the options, so a session from the same checkpoint with the same
    options would only repeat what is there, and so would every session after it.
    """
    furthest = repo.furthest(repo.find(best.id), configs.recorded(config))
    if furthest and best.step < last_step(config, best.step) <= furthest.manifest.step:
        instead = resolve(furthest.id)
        if instead.match and instead.match.availability == "full":
            return ResumeChoice(resolution=resolution, match=instead.match, instead_of=best)
    later = [
        entry.manifest.step
        for entry in repo.checkpoints()
        if entry.manifest.experiment == experiment
        and entry.manifest.step > best.step
        and (castore.score(entry.manifest) or 0) < (best.score or 0)
    ]
    return ResumeChoice(resolution=resolution, match=best, later_step=max(later, default=None))
