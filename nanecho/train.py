"""The training loop, and what it resumes from and saves. It reports events; whoever runs it shows them."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

import castore
from castore import errors
from castore.torch import AsyncSaver
from nanecho import config as configs
from nanecho import data, prepared, seeding
from nanecho.config import Config
from nanecho.events import (
    Began,
    Collected,
    Evaluated,
    Event,
    Failed,
    Finished,
    Grew,
    NotCollected,
    Prepared,
    Saved,
    Skipped,
    Stepped,
    Summary,
)
from nanecho.model import GPT, Connections
from nanecho.resume import RESUMED, choose, last_step

_SAVES_PER_GC = 10
_RECORDED_REJECTIONS = 20  # a manifest stays small however many checkpoints there are


class Diverged(errors.CastoreError):
    """The loss is no longer a number. Nothing was saved since it was."""

    def __init__(self, what: str, step: int) -> None:
        self.step = step
        super().__init__(
            f"{what} is not finite after step {step}: nothing of this step was saved; "
            "resume with a lower --learning-rate or with --grad-clip"
        )


# -- the session -----------------------------------------------------------------------------------------------------


_NOT_BEGUN = Began(
    step=0, last=0, resolution=None, match=None, val_loss=None, fresh="", weights_only=False, later_step=None,
    instead_of=None,
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Session:
    """What a session is made of, and everything that changes in it. ``best_loss`` is the lowest that was saved."""

    config: Config
    corpus: data.Corpus
    device: torch.device
    model: GPT
    optimizer: torch.optim.AdamW
    connections: Connections
    started: str
    environment: dict[str, Any]
    began: Began = _NOT_BEGUN
    step: int = 0
    best_loss: float | None = None
    final_loss: float | None = None
    parent: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    checkpoints: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Of training alone, without evaluating and saving."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    repo: castore.Repo,
    config: Config,
    *,
    started: str,
    stop: Callable[[], str] = lambda: "",
    tags: Sequence[str] = (),
    note: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Event]:
    """One session: resume, train, evaluate, save. Ends with Finished, or with Failed and an error.

    ``stop`` is asked after every step; the name of a signal makes the session save and end. ``started`` is a UTC
    time, for the record. NothingToDo when the checkpoint is at ``max_iters`` already; NothingMatches or
    NothingAvailable when there are checkpoints, but none to resume from; Diverged.
    """
    if config.run.resume not in ("best", "latest", "none"):
        repo.resolve(config.run.resume)  # a name of nothing is told before data is prepared
    device = _prepare_torch(config)
    corpus, origin = prepared.prepare(repo, config.data, config.model.block_size, started)
    windows = data.evaluation_windows(corpus.val, config.model.block_size, config.data.eval_samples)
    experiment = make_experiment(config, corpus, len(windows))
    session = fresh_session(repo, config, corpus, device, started)
    parameters = sum(weight.numel() for weight in session.model.parameters())
    yield Prepared(corpus, parameters, str(device), origin.reused, origin.reason)

    try:
        yield from _session(repo, session, experiment, windows, stop, tags, note, clock)
    except errors.CastoreError as error:
        yield Failed(_summary(session, f"error: {str(error).splitlines()[0]}"))
        raise


def _session(
    repo: castore.Repo,
    session: Session,
    experiment: castore.Experiment,
    windows: npt.NDArray[np.int64],
    stop: Callable[[], str],
    tags: Sequence[str],
    note: str,
    clock: Callable[[], float],
) -> Iterator[Event]:
    config = session.config
    began = session.began = _begin(repo, experiment, session)
    yield began
    if began.last <= session.step:
        raise errors.NothingToDo(
            f"nothing to train: checkpoint {(session.parent or '')[:12]} is at step {session.step} and --max-iters is "
            f"{config.training.max_iters}: give a higher --max-iters, or --resume none to start anew"
        )
    with AsyncSaver(repo) as saver:
        saving = _Saving(repo, session, saver, {"experiment": experiment, "tags": tags, "note": note})
        try:
            yield from _steps(session, saving, windows, stop, clock)
        except errors.CastoreError:
            # what was under way counts, whatever ended the session
            with suppress(errors.CastoreError):
                yield from saving.landed(wait=True)
            raise


def _steps(
    session: Session,
    saving: _Saving,
    windows: npt.NDArray[np.int64],
    stop: Callable[[], str],
    clock: Callable[[], float],
) -> Iterator[Event]:
    config, last = session.config, session.began.last
    forward = torch.compile(session.model) if config.machine.compile else session.model
    stopping = stop()
    while session.step < last and not stopping:
        begun = clock()
        if session.connections.advance(session.step):
            yield Grew(session.step, session.connections.density)
        loss = train_step(session, forward)
        session.seconds += clock() - begun
        stopping = stop()
        yield from saving.landed()
        if session.step % config.run.log_every == 0:
            yield Stepped(session.step, loss, session.optimizer.param_groups[0]["lr"], session.tokens_per_second)

        reasons = _reasons_to_save(config, session.step, last, stopping)
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
    yield Finished(_summary(session, stopped))


class _Saving:
    """The checkpoint that is saved while training goes on. ``fields`` are what the manifests of a session share."""

    def __init__(self, repo: castore.Repo, session: Session, saver: AsyncSaver, fields: Mapping[str, Any]) -> None:
        self._repo, self._session, self._saver, self._fields = repo, session, saver, fields
        self._step = 0
        self._reasons: tuple[str, ...] = ()

    def begin(self, reasons: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Begin to save the session as it is now. The one before must have landed: it is the parent."""
        session = self._session
        self._step, self._reasons = session.step, tuple(reasons)
        self._saver.save(
            _state(session),
            run=session.config.run.run,
            step=session.step,
            metrics=metrics,
            parent=session.parent,
            config=configs.recorded(session.config),
            info=_info(session, reasons),
            **self._fields,
        )

    def landed(self, *, wait: bool = False) -> Iterator[Event]:
        """What came of the save that was begun, if it is over, or once it is."""
        saved = self._saver.wait() if wait else self._saver.poll()
        if saved is None:
            return
        session = self._session
        session.parent = saved.id
        session.checkpoints.append(saved.id)
        yield Saved(self._step, saved, self._reasons)
        often = len(session.checkpoints) % _SAVES_PER_GC == 0
        if self._repo.config.retention.auto_gc and (often or self._step == session.began.last):
            yield _collect(self._repo, session)


def _collect(repo: castore.Repo, session: Session) -> Event:
    in_use = {one for one in (session.parent, session.began.match and session.began.match.id) if one}
    try:
        return Collected(castore.collect_garbage(repo, in_use=in_use, wait=False))
    except errors.CastoreError as error:
        return NotCollected(str(error).splitlines()[0])


def _reasons_to_save(config: Config, step: int, last: int, stopping: str) -> list[str]:
    reasons = []
    if step % config.run.save_every == 0:
        reasons.append(f"every {config.run.save_every}")
    if stopping:
        reasons.append(stopping)
    elif step == last:
        reasons.append("end")
    return reasons


def train_step(session: Session, forward: Callable[[Tensor], Tensor]) -> float:
    """Make one step; returns the training loss before it. Diverged, with the weights as they were."""
    options = session.config.training
    if session.config.model.dropout:
        # a function of the step, so that no state of a generator has to be saved
        torch.manual_seed(seeding.key("dropout", options.seed, session.step) >> 1)
    session.model.train()
    total = 0.0
    for i in range(options.grad_accum):
        rows = range(i * options.batch_size, (i + 1) * options.batch_size)
        drawn = data.batch(session.corpus.train, session.config.model.block_size, options.seed, session.step, rows)
        tokens = _to_device(drawn, session.device)
        with _autocast(session):
            loss = _loss(forward(tokens[:, :-1]), tokens[:, 1:]) / options.grad_accum
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        session.tokens += tokens[:, 1:].numel()
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
    return total


def learning_rate(options: configs.Training, step: int) -> float:
    """The rate for the step that follows ``step`` completed ones, of the whole run and not of the session.

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


def evaluate(
    session: Session, forward: Callable[[Tensor], Tensor], windows: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Mean loss a token, in nats, and the share of tokens predicted right, over always the same windows. Diverged."""
    session.model.eval()
    loss = right = 0.0
    rows = session.config.training.batch_size
    with torch.inference_mode():
        for start in range(0, len(windows), rows):
            tokens = _to_device(windows[start : start + rows], session.device)
            with _autocast(session):
                logits = forward(tokens[:, :-1])
            loss += _loss(logits, tokens[:, 1:], "sum").item()
            right += (logits.argmax(-1) == tokens[:, 1:]).sum().item()
    count = len(windows) * session.config.model.block_size
    if not math.isfinite(loss):
        raise Diverged("the validation loss", session.step)
    session.final_loss = loss / count
    return session.final_loss, right / count


def _loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


# -- beginning -------------------------------------------------------------------------------------------------------


def make_experiment(config: Config, corpus: data.Corpus, samples: int) -> castore.Experiment:
    """What the checkpoints of this configuration and data are comparable by."""
    return castore.Experiment(
        model=configs.critical(config.model, corpus.tokenizer.vocab_size),
        tokenizer=corpus.tokenizer.digest,
        data=corpus.digest,
        evaluation={"data": corpus.val_digest, "samples": samples, "tokens": config.model.block_size},
        metrics={"val_accuracy": castore.Metric(direction="max", low=0.0, high=1.0)},
    )


def fresh_session(
    repo: castore.Repo, config: Config, corpus: data.Corpus, device: torch.device, started: str
) -> Session:
    """A session before its first step, with first weights and nothing resumed."""
    model = GPT(config.model, corpus.tokenizer.vocab_size)
    model.initialise(config.training.seed)
    model.to(device)
    connections = Connections(model, config.model)
    connections.advance(0)
    connections.zero_inactive()
    return Session(
        config=config,
        corpus=corpus,
        device=device,
        model=model,
        optimizer=_optimizer(config.training, model, device),
        connections=connections,
        started=started,
        environment=_environment(repo, device),
    )


def _optimizer(options: configs.Training, model: GPT, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); matrices decay, norms don't."""
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(_groups(options, model), lr=options.learning_rate, betas=_betas(options), fused=fused)


def _groups(options: configs.Training, model: GPT) -> list[dict[str, Any]]:
    weights = list(model.parameters())
    return [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]


def _betas(options: configs.Training) -> tuple[float, float]:
    return options.beta1, options.beta2


def _begin(repo: castore.Repo, experiment: castore.Experiment, session: Session) -> Began:
    """Put the session where it is to begin."""
    config = session.config
    choice = choose(repo, config, experiment)
    match = choice.match
    if match:
        _load(repo, match, session)
        manifest = repo.find(match.id).manifest
        # losses that were measured on something else say nothing here
        if manifest.experiment != experiment:
            session.best_loss = None
        session.step, session.parent = match.step, match.id
        session.connections.advance(max(0, match.step - 1))
    return Began(
        step=session.step,
        last=last_step(config, session.step),
        resolution=choice.resolution,
        match=match,
        val_loss=manifest.metrics.get("val_loss") if match and manifest.experiment == experiment else None,
        fresh=choice.fresh,
        weights_only=match is not None and match.availability == "weights-only",
        later_step=choice.later_step,
        instead_of=choice.instead_of,
    )


def _load(repo: castore.Repo, match: castore.Match, session: Session) -> None:
    whole = match.availability != "weights-only"
    state = repo.load(match.id, parts=RESUMED if whole else ["model"])
    try:
        session.model.load_state_dict(state["model"])
        if whole:
            session.optimizer.load_state_dict(state["optimizer"])
            session.best_loss = state["trainer"]["best_loss"]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise errors.NothingMatches(f"checkpoint {match.id[:12]} is not one of nanecho's: {reason}") from error
    # a state brings its own options, but it is this session's that count
    for group, fresh in zip(
        session.optimizer.param_groups, _groups(session.config.training, session.model), strict=True
    ):
        group.update(weight_decay=fresh["weight_decay"], betas=_betas(session.config.training))


# -- saving ----------------------------------------------------------------------------------------------------------


def _state(session: Session) -> dict[str, Any]:
    return {
        "model": session.model.state_dict(),
        "optimizer": session.optimizer.state_dict(),
        "trainer": {
            "step": session.step,
            "best_loss": session.best_loss,
            "connections": {"ratio": session.connections.ratio, "density": session.connections.density},
            "tokenizer": session.corpus.tokenizer.definition,
        },
    }


def _info(session: Session, reasons: Sequence[str]) -> dict[str, Any]:
    began = session.began
    return {
        "saved_because": list(reasons),
        "connection_density": session.connections.density,
        "tokens_per_second": round(session.tokens_per_second, 1),
        "session": {
            "started": session.started,
            "start_step": began.step,
            "resumed_from": began.match.id if began.match else None,
            "fresh": began.fresh,
            "weights_only": began.weights_only,
            "resolution": _resolution(began),
        },
        "environment": session.environment,
    }


def _resolution(began: Began) -> dict[str, Any] | None:
    if began.resolution is None:
        return None
    rejected = began.resolution.rejected
    return {
        "want": began.resolution.selector,
        "match": began.match.id if began.match else None,
        "differences": list(began.match.differences) if began.match else [],
        "rejected": [{"id": one.id, "reasons": list(one.reasons)} for one in rejected[:_RECORDED_REJECTIONS]],
        "rejected_count": len(rejected),
        "damaged": [one.path.rpartition("/manifests/")[2] for one in began.resolution.damaged[:_RECORDED_REJECTIONS]],
        "instead_of": began.instead_of.id if began.instead_of else None,
    }


def _environment(repo: castore.Repo, device: torch.device) -> dict[str, Any]:
    return {
        "castore": castore.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "git_commit": repo.git_commit(),
    }


def _summary(session: Session, stopped: str) -> Summary:
    began = session.began
    return Summary(
        run=session.config.run.run,
        started=session.started,
        stopped=stopped,
        start_step=began.step,
        final_step=session.step,
        steps=session.step - began.step,
        resumed_from=began.match.id if began.match else None,
        fresh=began.fresh,
        weights_only=began.weights_only,
        resolution=_resolution(began),
        start_loss=began.val_loss,
        final_loss=session.final_loss,
        best_loss=session.best_loss,
        checkpoints=session.checkpoints,
        skipped=session.skipped,
        tokens=session.tokens,
        seconds=round(session.seconds, 3),
        tokens_per_second=round(session.tokens_per_second, 1),
        connection_density=session.connections.density,
        environment=session.environment,
    )


# -- torch -----------------------------------------------------------------------------------------------------------


def _prepare_torch(config: Config) -> torch.device:
    wanted = config.machine.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device).tolist()  # a device without memory, such as meta, fails here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise errors.UsageError(f"--device {wanted}: {str(error).splitlines()[0]}") from error
    torch.set_num_threads(config.machine.threads or castore.processors())
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


def _autocast(session: Session) -> AbstractContextManager[Any]:
    wanted, device = session.config.machine.dtype, session.device
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bfloat16" or (wanted == "auto" and native):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _to_device(tokens: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    found = torch.from_numpy(tokens)
    if device.type == "cuda":
        return found.pin_memory().to(device, non_blocking=True)
    return found.to(device)
