"""What a training session is made of, and where it starts: first weights, or those of a checkpoint."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import castore
from castore import dcp, errors
from castore.dcp import Ranks, find
from castore.torch import warm_start
from nanecho import config as configs
from nanecho import data
from nanecho.config import Config
from nanecho.events import Began
from nanecho.losses import LossCurve
from nanecho.model import GPT, Connections
from nanecho.ranks import is_launched, local_rank, local_size, replicate, shard
from nanecho.resume import RESUMED, ResumeChoice, choose, last_step

Forward = Callable[[Tensor], Tensor]
"""Tokens (batch, time) -> logits (batch, time, vocabulary): a model, compiled or not."""

_NOT_BEGUN = Began(
    step=0, last=0, resolution=None, match=None, val_loss=None, fresh="", weights_only=False, later_step=None,
    instead_of=None,
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class TrainingSession:
    """Everything that a session uses and changes. ``best_loss`` is the lowest validation loss that was saved."""

    config: Config
    corpus: data.Corpus
    device: torch.device
    model: GPT
    optimizer: torch.optim.AdamW
    connections: Connections
    ranks: Ranks
    started: str
    environment: dict[str, Any]
    began: Began = _NOT_BEGUN
    step: int = 0
    best_loss: float | None = None
    final_loss: float | None = None
    train_losses: LossCurve = field(default_factory=LossCurve)
    parent: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    checkpoints: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """The speed of training alone, without evaluating and saving."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def forward(self) -> Forward:
        """Return the model, compiled if the config says so."""
        return torch.compile(self.model) if self.config.machine.compile else self.model

    def training_forward(self, forward: Forward) -> Forward:
        """Return what to train with: a backward pass through it leaves gradients of the batch of all ranks."""
        if self.ranks.size == 1 or self.config.machine.shard:
            return forward
        return replicate(self.model, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which to compute: bfloat16 if asked for, or if ``auto`` and the GPU has it."""
        dtype = self.config.machine.dtype
        is_native = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if dtype == "bfloat16" or (dtype == "auto" and is_native):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def to_device(self, tokens: npt.NDArray[np.int64]) -> Tensor:
        """Return tokens as a tensor on the session's device."""
        tensor = torch.from_numpy(tokens)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def make_experiment(config: Config, corpus: data.Corpus, samples: int) -> castore.Experiment:
    """Return the experiment that checkpoints of this config and data belong to."""
    return castore.Experiment(
        model=configs.critical(config.model, corpus.tokenizer.vocab_size),
        tokenizer=corpus.tokenizer.digest,
        data=corpus.digest,
        evaluation={"data": corpus.val_digest, "samples": samples, "tokens": config.model.block_size},
        metrics={"val_accuracy": castore.Metric(direction="max", low=0.0, high=1.0)},
    )


def prepare_torch(config: Config) -> torch.device:
    """Set up torch as the config says and return the device. Raise UsageError for one that cannot be used."""
    name = config.machine.device
    if name in ("auto", "cuda") and torch.cuda.is_available() and is_launched():
        name = f"cuda:{local_rank()}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()  # a device without memory, such as meta, fails here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise errors.UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    torch.set_num_threads(config.machine.threads or max(1, castore.processors() // local_size()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def fresh_session(
    repo: castore.Repo, config: Config, corpus: data.Corpus, device: torch.device, started: str, ranks: Ranks
) -> TrainingSession:
    """Return a session before its first step, with first weights and nothing resumed."""
    model = GPT(config.model, corpus.tokenizer.vocab_size)
    model.initialise(config.training.seed)
    model.to(device)
    if config.machine.shard and ranks.size > 1:
        shard(model, model.blocks)
    connections = Connections(model, config.model)
    connections.advance(0)
    connections.zero_inactive()
    return TrainingSession(
        config=config,
        corpus=corpus,
        device=device,
        model=model,
        optimizer=_optimizer(config, model, device),
        connections=connections,
        ranks=ranks,
        started=started,
        environment=_environment(repo, device, ranks),
    )


def _optimizer(config: Config, model: GPT, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); matrices decay, norms don't."""
    fused = device.type in ("cpu", "cuda")
    options = config.training
    groups = _parameter_groups(options, model)
    kind = torch.optim.AdamW if config.machine.compile else _PlainAdamW
    return kind(groups, lr=options.learning_rate, betas=_betas(options), fused=fused)


class _PlainAdamW(torch.optim.AdamW):
    """AdamW whose methods aren't wrapped to keep torch's compiler out: to do so imports all of it, for two seconds."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


def _parameter_groups(options: configs.Training, model: GPT) -> list[dict[str, Any]]:
    weights = list(model.parameters())
    return [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]


def _betas(options: configs.Training) -> tuple[float, float]:
    return options.beta1, options.beta2


def _environment(repo: castore.Repo, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    return {
        "castore": castore.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
        "git_commit": repo.git_commit(),
    }


def begin(
    repo: castore.Repo,
    experiment: castore.Experiment,
    session: TrainingSession,
    fetching: Callable[[int, int], None],
) -> Began:
    """Choose what to resume, load it into ``session`` and say where the session starts. Raise as ``choose`` does."""
    config = session.config
    ranks = session.ranks
    choice = ranks.together(lambda: choose(repo, config, experiment) if ranks.rank == 0 else ResumeChoice())[0]
    match = choice.match
    val_loss = None
    fetched = 0
    warm = None
    if not match and config.run.init_from:
        warm = ranks.locally(lambda: warm_start(session.model, repo, config.run.init_from))
        session.connections.zero_inactive()
        session.parent = warm.id
    if match:
        entry = find(repo, match.id, ranks)

        def fetch() -> int:
            return repo.fetch(entry, _parts_to_load(match), progress=fetching).bytes if ranks.rank == 0 else 0

        fetched = ranks.together(fetch)[0]
        _load(repo, match, session)
        if entry.manifest.experiment == experiment:
            val_loss = entry.manifest.metrics.get("val_loss")
        else:
            session.best_loss = None  # losses on other evaluation data say nothing here
        session.step, session.parent = match.step, match.id
        session.connections.advance(max(0, match.step - 1))
    return Began(
        step=session.step,
        last=last_step(config, session.step),
        resolution=choice.resolution,
        match=match,
        val_loss=val_loss,
        fresh=choice.fresh,
        weights_only=match is not None and match.availability == "weights-only",
        later_step=choice.later_step,
        instead_of=choice.instead_of,
        fetched=fetched,
        warm=warm,
    )


def _parts_to_load(match: castore.Match) -> Sequence[str]:
    return ["model"] if match.availability == "weights-only" else RESUMED


def _load(repo: castore.Repo, match: castore.Match, session: TrainingSession) -> None:
    others = [part for part in _parts_to_load(match) if part != "model"]
    try:
        if session.ranks.size == 1:
            state = repo.load(match.id, parts=others) if others else {}
            repo.load_into(match.id, session.model)  # its first weights are of no more use
        else:
            state = {"model": session.model.state_dict(), "trainer": {}, "optimizer": _state_to_fill(session.optimizer)}
            state = {name: part for name, part in state.items() if name == "model" or name in others}
            dcp.load(repo, state, match.id)
        if others:
            session.optimizer.load_state_dict(state["optimizer"])
            session.best_loss = state["trainer"]["best_loss"]
    except (errors.UsageError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise errors.NothingMatches(f"checkpoint {match.id[:12]} was not saved by nanecho: {reason}") from error
    # the optimizer's state brings the options of the session that saved it, but those of this session count
    fresh_groups = _parameter_groups(session.config.training, session.model)
    for group, fresh in zip(session.optimizer.param_groups, fresh_groups, strict=True):
        group.update(weight_decay=fresh["weight_decay"], betas=_betas(session.config.training))


def _state_to_fill(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an AdamW that has made steps, sharded like its parameters."""
    state = optimizer.state_dict()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, weight in enumerate(weights):
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        state["state"][number] = {"step": torch.tensor(0.0), **moments}
    return state
