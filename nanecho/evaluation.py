"""Score a checkpoint that was not trained, such as the mean of others: evaluate it, and save it with its metrics."""

from __future__ import annotations

import castore
from castore import errors
from castore.dcp import Ranks
from nanecho import config as configs
from nanecho import data, prepared
from nanecho.config import Config
from nanecho.events import Evaluated, Event, Prepared, Saved
from nanecho.session import fresh_session, make_experiment, prepare_torch
from nanecho.train import evaluate


def config_of(repo: castore.Repo, selector: str, given: dict[str, configs.Scalar]) -> Config:
    """Return the options that a checkpoint was trained with, and ``given`` over them. The errors of ``Repo.find``."""
    known = {option.name for option in configs.options()}
    recorded = repo.find(selector, kind="checkpoint").manifest.config
    return configs.make({**{name: value for name, value in recorded.items() if name in known}, **given})


def evaluate_checkpoint(repo: castore.Repo, config: Config, selector: str, started: str) -> list[Event]:
    """Evaluate a checkpoint of this config, and save its weights with the metrics; return what was done.

    The new checkpoint takes no space but that of its manifest. NothingMatches for a checkpoint of another shape.
    """
    entry = repo.find(selector, kind="checkpoint")
    device = prepare_torch(config)
    corpus, origin = prepared.prepare(repo, config.data, config.model.block_size, started)
    windows = data.evaluation_windows(corpus.val, config.model.block_size, config.data.eval_samples)
    session = fresh_session(repo, config, corpus, device, started, Ranks())
    session.step = entry.manifest.step
    try:
        state = repo.load_into(entry.id, session.model)["model"]
    except errors.UsageError as error:
        raise errors.NothingMatches(f"checkpoint {entry.id[:12]} is of another shape: {error}") from error
    val_loss, val_accuracy = evaluate(session, session.forward(), windows)
    saved = repo.save(
        {"model": state},
        run=entry.manifest.run,
        step=entry.manifest.step,
        experiment=make_experiment(config, corpus, len(windows)),
        metrics={"val_loss": val_loss, "val_accuracy": val_accuracy},
        parent=entry.id,
        config=configs.recorded(config),
        info={**entry.manifest.info, "evaluated": entry.id},
    )
    parameters = sum(weight.numel() for weight in session.model.parameters())
    return [
        Prepared(corpus, parameters, str(device), origin.reused, origin.reason),
        Evaluated(session.step, val_loss, val_accuracy),
        Saved(session.step, saved, ("evaluated",)),
    ]
