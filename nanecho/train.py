"""The training loop. It reports events and prints nothing."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

import castore
from castore import errors
from castore.dcp import Ranks
from castore.torch import AsyncSaver
from nanecho import config as configs
from nanecho import data, prepared, seeding
from nanecho.config import Config
from nanecho.events import Evaluated, Event, Failed, Finished, Grew, Prepared, Skipped, Stepped
from nanecho.ranks import check_batch, first_then_others, gathered, rows_of
from nanecho.saving import BackgroundSaving, reasons_to_save, summarise
from nanecho.session import Forward, TrainingSession, begin, fresh_session, make_experiment, prepare_torch


class Diverged(errors.CastoreError):
    """The loss is not finite any more. No step from this one on was saved."""

    def __init__(self, what: str, step: int) -> None:
        self.step = step
        super().__init__(
            f"{what} is not finite after step {step}: nothing of this step was saved; "
            "resume with a lower --learning-rate or with --grad-clip"
        )


def _tell_nobody(done: int, total: int) -> None:
    pass


def train(
    repo: castore.Repo,
    config: Config,
    *,
    started: str,
    stop: Callable[[], str] = lambda: "",
    tags: Sequence[str] = (),
    note: str = "",
    clock: Callable[[], float] = time.perf_counter,
    fetching: Callable[[int, int], None] = _tell_nobody,
    ranks: Ranks | None = None,
) -> Iterator[Event]:
    """Run one session: resume, train, evaluate and save. It ends with Finished, or with Failed and an error.

    ``stop`` is asked after every step: the name of a signal makes the session save and end, "" lets it continue.
    ``started`` is a UTC time, for the record; ``clock`` gives seconds. ``tags`` and ``note`` go into every checkpoint.
    ``fetching`` is told the bytes fetched from remotes, and how many there are. After Finished comes what is left to do
    of pushes, if config.toml asks for these. ``ranks`` train together, each in a session of its own; batches are shared
    out to them, so that the same options give the same losses by any number of ranks.

    Raise NothingToDo when the checkpoint is at ``max_iters`` already, NothingMatches or NothingAvailable when there are
    checkpoints but none to resume, Diverged when a loss is not finite, and PushIncomplete, after Finished, when
    config.toml asks for pushes and not all could be made.
    """
    ranks = ranks or Ranks()
    check_batch(config.training.batch_size, ranks)
    if config.run.resume not in ("best", "latest", "none"):
        # an unknown name is an error before data is prepared
        ranks.together(lambda: repo.resolve(config.run.resume) if ranks.rank == 0 else None)
    device = prepare_torch(config)
    corpus, origin = first_then_others(
        ranks, lambda: prepared.prepare(repo, config.data, config.model.block_size, started)
    )
    windows = data.evaluation_windows(corpus.val, config.model.block_size, config.data.eval_samples)
    experiment = make_experiment(config, corpus, len(windows))
    if any(other != experiment for other in ranks.together(lambda: experiment)):
        raise errors.UsageError("the ranks read different data: give all the same --data-dir and version of Python")
    session = fresh_session(repo, config, corpus, device, started, ranks)
    parameters = sum(weight.numel() for weight in session.model.parameters())
    yield Prepared(corpus, parameters, str(device), origin.reused, origin.reason)

    fields = {"experiment": experiment, "tags": tags, "note": note}
    try:
        yield from _run(repo, session, windows, fields, stop, clock, fetching)
    except errors.PushIncomplete:
        raise  # after its end: what it made is saved
    except errors.CastoreError as error:
        yield Failed(summarise(session, f"error: {str(error).splitlines()[0]}"))
        raise


def _run(
    repo: castore.Repo,
    session: TrainingSession,
    windows: npt.NDArray[np.int64],
    fields: Mapping[str, Any],
    stop: Callable[[], str],
    clock: Callable[[], float],
    fetching: Callable[[int, int], None],
) -> Iterator[Event]:
    """Resume, then train with saves in the background. ``fields`` are what all checkpoints of the session share."""
    session.began = begin(repo, fields["experiment"], session, fetching)
    yield session.began
    if session.began.last <= session.step:
        raise errors.NothingToDo(
            f"nothing to train: checkpoint {(session.parent or '')[:12]} is at step {session.step} and --max-iters is "
            f"{session.config.training.max_iters}: give a higher --max-iters, or --resume none to start from scratch"
        )
    with AsyncSaver(repo) as saver:
        saving = BackgroundSaving(repo, session, saver, fields)
        try:
            yield from _training_loop(session, saving, windows, stop, clock)
        except errors.CastoreError:
            # a save that was under way counts, whatever ended the session
            with suppress(errors.CastoreError):
                yield from saving.landed(wait=True)
            raise


def _training_loop(
    session: TrainingSession,
    saving: BackgroundSaving,
    windows: npt.NDArray[np.int64],
    stop: Callable[[], str],
    clock: Callable[[], float],
) -> Iterator[Event]:
    config, last = session.config, session.began.last
    forward = session.forward()
    training_forward = session.training_forward(forward)
    _settle(session, training_forward)
    (stopping,) = {name for name in session.ranks.together(stop) if name} or {""}
    while session.step < last and not stopping:
        step_began = clock()
        if session.connections.advance(session.step):
            yield Grew(session.step, session.connections.density)
        loss, stopping = train_step(session, training_forward, stop)
        session.seconds += clock() - step_began
        session.train_losses.add(loss)
        yield from saving.landed()
        if session.step % config.run.log_every == 0:
            yield Stepped(session.step, loss, session.optimizer.param_groups[0]["lr"], session.tokens_per_second)

        reasons = reasons_to_save(config, session.step, last, stopping)
        if not reasons and session.step % config.run.eval_every:
            continue
        val_loss, val_accuracy = evaluate(session, forward, windows)
        yield Evaluated(session.step, val_loss, val_accuracy)
        if session.best_loss is None:
            reasons.insert(0, "first")
        elif val_loss < session.best_loss - config.run.min_improvement:
            reasons.insert(0, f"better than {session.best_loss:.4f}")
        if not reasons:
            reason = f"{val_loss:.4f} is not {config.run.min_improvement:g} below {session.best_loss:.4f}"
            session.skipped.append(f"step {session.step}: {reason}")
            yield Skipped(session.step, reason)
            continue
        yield from saving.landed(wait=True)
        session.best_loss = val_loss if session.best_loss is None else min(val_loss, session.best_loss)
        saving.begin(reasons, {"val_loss": val_loss, "val_accuracy": val_accuracy, "train_loss": loss})
        yield from saving.landed(wait=not config.machine.background)
    yield from saving.landed(wait=True)
    stopped = stopping or ("max-iters" if session.step == config.training.max_iters else "session-iters")
    yield Finished(summarise(session, stopped))
    yield from saving.pushed()


def train_step(session: TrainingSession, forward: Forward, stop: Callable[[], str] = lambda: "") -> tuple[float, str]:
    """Make one step; return the training loss before it, and what ``stop`` says on any rank.

    Raise Diverged, which leaves the weights as they were.
    """
    options = session.config.training
    total = _backward(session, forward)
    name = stop()
    number = signal.Signals[name].value if name in signal.Signals.__members__ else int(bool(name))
    everywhere = gathered(session.ranks, total, number, device=session.device)
    total = sum(loss for loss, _ in everywhere) / session.ranks.size
    number = int(max(number for _, number in everywhere))
    name = name or (signal.Signals(number).name if number else "")
    if not math.isfinite(total):
        raise Diverged("the training loss", session.step + 1)
    session.connections.mask_gradients()
    if options.grad_clip:
        torch.nn.utils.clip_grad_norm_(session.model.parameters(), options.grad_clip)
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate(options, session.step)
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    session.step += 1
    return total, name


def _backward(session: TrainingSession, forward: Forward) -> float:
    """Leave the gradients of the step's batch in the weights; return the mean loss of this rank's rows of it."""
    options, ranks = session.config.training, session.ranks
    if session.config.model.dropout:
        # seeded by the step, so that no state of a generator has to be saved; other rows draw other numbers
        by_rank = [ranks.rank] if ranks.rank else []
        torch.manual_seed(seeding.key("dropout", options.seed, session.step, *by_rank) >> 1)
    session.model.train()
    total = 0.0
    for i in range(options.grad_accum):
        rows = rows_of(range(i * options.batch_size, (i + 1) * options.batch_size), ranks)
        sequences = data.batch(session.corpus.train, session.config.model.block_size, options.seed, session.step, rows)
        tokens = session.to_device(sequences)
        with session.autocast():
            loss = _loss(forward(tokens[:, :-1]), tokens[:, 1:]) / options.grad_accum
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        session.tokens += tokens[:, 1:].numel() * ranks.size
    return total


def _settle(session: TrainingSession, forward: Forward) -> None:
    """Have DDP arrange its gradients for good.

    It does so after the first pass, and in another order three ranks sum to other last bits: a session that resumes
    would differ from one that never stopped.
    """
    if session.ranks.size > 1 and not session.config.machine.shard:
        tokens = session.tokens
        _backward(session, forward)
        session.tokens = tokens
        session.optimizer.zero_grad(set_to_none=True)


def learning_rate(options: configs.Training, step: int) -> float:
    """Return the rate for the step after ``step`` completed ones, counted from the start of the run, not the session.

    Linear warm-up; then ``cosine`` (Loshchilov and Hutter 2017) falls to ``min_lr`` at ``max_iters``, and ``wsd``
    (warm-up, stable, decay: Hu et al. 2024) stays and falls linearly in the last ``decay_fraction`` of the run.
    """
    if step < options.warmup_iters:
        return options.learning_rate * (step + 1) / options.warmup_iters
    if options.schedule == "cosine":
        done = (step - options.warmup_iters) / max(1, options.max_iters - options.warmup_iters)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        left = min(1.0, (options.max_iters - step) / (options.decay_fraction * options.max_iters))
    return options.min_lr + max(0.0, left) * (options.learning_rate - options.min_lr)


def evaluate(session: TrainingSession, forward: Forward, windows: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return (mean loss per token in nats, share of tokens predicted right) over ``windows``. Raise Diverged.

    ``windows`` is (samples, block_size + 1) token ids, the same at every evaluation.
    """
    session.model.eval()
    loss = right = 0.0
    rows = session.config.training.batch_size
    with torch.inference_mode():
        for start in range(0, len(windows), rows):
            # every rank makes as many passes, the last ones perhaps without a window: FSDP gathers weights in each
            own = rows_of(range(start, min(start + rows, len(windows))), session.ranks)
            tokens = session.to_device(windows[own.start : own.stop])
            with session.autocast():
                logits = forward(tokens[:, :-1])
            loss += _loss(logits, tokens[:, 1:], "sum").item()
            right += (logits.argmax(-1) == tokens[:, 1:]).sum().item()
    everywhere = gathered(session.ranks, loss, right, device=session.device)
    loss, right = (sum(values) for values in zip(*everywhere, strict=True))
    count = len(windows) * session.config.model.block_size
    if not math.isfinite(loss):
        raise Diverged("the validation loss", session.step)
    session.final_loss = loss / count
    return session.final_loss, right / count


def _loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
