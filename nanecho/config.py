"""Every option of a training run, defined once: type, default, limits and help. Imports no torch.

The command line, the TOML file and the manifest all use these names; the structs group them for the code.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import Meta

from castore import errors

Scalar = str | int | float | bool | None

_STEPS = 999_999_999  # what a manifest can record
_SEEDS = (1 << 63) - 1


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Model"""

    n_layer: Annotated[int, Meta(ge=1, le=10_000, description="Layers.")] = 4
    n_head: Annotated[int, Meta(ge=1, le=10_000, description="Attention heads; they divide --n-embd.")] = 4
    n_embd: Annotated[int, Meta(ge=1, le=1 << 20, description="Width of the residual stream.")] = 128
    block_size: Annotated[int, Meta(ge=1, le=1 << 20, description="Context, in tokens.")] = 128
    dropout: Annotated[float, Meta(ge=0, lt=1, description="Dropout in training.")] = 0.0
    connection_ratio: Annotated[
        float, Meta(ge=0, le=1, description="Share of connections that are active at first; 1 for a dense model.")
    ] = 0.1
    connection_growth: Annotated[float, Meta(ge=0, le=1, description="Growth of that share each time.")] = 0.05
    connection_every: Annotated[int, Meta(ge=1, le=_STEPS, description="Steps between two growths.")] = 500
    connection_seed: Annotated[int, Meta(ge=0, le=_SEEDS, description="Decides which connections come first.")] = 0


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Training"""

    max_iters: Annotated[int, Meta(ge=1, le=_STEPS, description="Steps of the whole run, spanned by the schedule.")] = (
        10_000
    )
    batch_size: Annotated[int, Meta(ge=1, le=1 << 20, description="Sequences in one forward pass.")] = 16
    grad_accum: Annotated[int, Meta(ge=1, le=1 << 20, description="Forward passes in one step.")] = 1
    learning_rate: Annotated[float, Meta(gt=0, le=1e38, description="Highest learning rate.")] = 2e-3
    min_lr: Annotated[float, Meta(ge=0, le=1e38, description="Learning rate at the end.")] = 1e-4
    warmup_iters: Annotated[int, Meta(ge=0, le=_STEPS, description="Steps of linear warm-up.")] = 100
    schedule: Annotated[
        Literal["wsd", "cosine"], Meta(description="After warm-up: wsd stays, then decays; cosine decays all along.")
    ] = "wsd"
    decay_fraction: Annotated[float, Meta(gt=0, le=1, description="wsd: share of the run in which it decays.")] = 0.2
    weight_decay: Annotated[float, Meta(ge=0, le=1e38, description="Weight decay of matrices.")] = 0.1
    beta1: Annotated[float, Meta(ge=0, lt=1, description="AdamW's first decay rate.")] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1, description="AdamW's second decay rate.")] = 0.99
    grad_clip: Annotated[float, Meta(ge=0, le=1e38, description="Largest norm of the gradient; 0 doesn't clip.")] = 1.0
    seed: Annotated[int, Meta(ge=0, le=_SEEDS, description="Decides first weights, batches and dropout.")] = 1337


class Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Data"""

    data_dir: Annotated[
        str | None, Meta(description="Folder of text files. Without it: the source of Python's standard library.")
    ] = None
    tokenizer: Annotated[
        Literal["byte", "bpe"], Meta(description="byte, or bpe, learned from the data (needs the extra bpe).")
    ] = "byte"
    vocab_size: Annotated[int, Meta(ge=257, le=65536, description="Tokens of the bpe tokenizer.")] = 4096
    val_fraction: Annotated[float, Meta(gt=0, lt=1, description="Share of the data kept for validation.")] = 0.1
    eval_samples: Annotated[
        int, Meta(ge=1, le=1 << 20, description="Sequences read by an evaluation, always the same.")
    ] = 128


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Machine"""

    device: Annotated[str, Meta(description="auto, cpu, cuda, cuda:1, mps ...")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], Meta(description="auto computes in bfloat16 where the GPU has it.")
    ] = "auto"
    compile: Annotated[bool, Meta(description="Compile the model first: slow to start, faster after.")] = False
    threads: Annotated[int, Meta(ge=0, le=1024, description="Threads of torch; 0 takes one for each processor.")] = 0
    background: Annotated[bool, Meta(description="Save while training goes on, from a copy in memory.")] = True
    shard: Annotated[
        bool, Meta(description="Under torchrun: shard the model over the ranks (FSDP2); else each has it whole (DDP).")
    ] = False


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Run"""

    run: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z", description="Name under which checkpoints are saved.")
    ] = "main"
    resume: Annotated[
        str, Meta(min_length=1, description="best, latest, run:best, an id, or none to start from scratch.")
    ] = "best"
    init_from: Annotated[
        str, Meta(description="Without a checkpoint to resume: begin with the weights of this one, as far as they fit.")
    ] = ""
    session_iters: Annotated[
        int, Meta(ge=0, le=_STEPS, description="Most steps of this session; 0: to --max-iters.")
    ] = 500
    eval_every: Annotated[int, Meta(ge=1, le=_STEPS, description="Steps between two evaluations.")] = 100
    save_every: Annotated[
        int,
        Meta(ge=1, le=_STEPS, description="Steps that a killed session loses at most, beside a save under way."),
    ] = 100
    min_improvement: Annotated[
        float,
        Meta(ge=0, le=1e38, description="Fall of the validation loss that is saved between --save-every."),
    ] = 0.01
    log_every: Annotated[int, Meta(ge=1, le=_STEPS, description="Steps between reports of the training loss.")] = 10
    allow_fresh: Annotated[bool, Meta(description="Start from scratch when no checkpoint can be resumed.")] = False
    allow_data_change: Annotated[bool, Meta(description="Resume a checkpoint that was trained on other data.")] = False


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A complete and valid set of options, as :func:`make` returns it."""

    model: Model = Model()
    training: Training = Training()
    data: Data = Data()
    machine: Machine = Machine()
    run: Run = Run()


GROUPS: dict[str, type[msgspec.Struct]] = {
    "run": Run,
    "training": Training,
    "model": Model,
    "data": Data,
    "machine": Machine,
}


class Option(NamedTuple):
    """An option as a command line needs it. ``type`` is without limits, and a union with None if it may be absent."""

    name: str
    group: str
    type: Any
    default: Scalar
    help: str


def options() -> Iterator[Option]:
    """Yield every option, in the order in which to show them.

    >>> next(options()).name
    'run'
    """
    for struct in GROUPS.values():
        hints = get_type_hints(struct, include_extras=True)
        for field in msgspec.structs.fields(struct):
            bare, meta = get_args(hints[field.name])
            yield Option(field.name, struct.__doc__ or "", bare, field.default, meta.description)


def make(given: Mapping[str, Scalar], source: str = "options") -> Config:
    """Return the config with ``given`` in place of defaults. Raise UsageError that names a bad option and its limit.

    >>> make({"n_layer": 6}).model.n_layer
    6
    """
    config = _convert(given, source)
    if config.model.n_embd % config.model.n_head:
        raise errors.UsageError(
            f"{source}: n_embd {config.model.n_embd} can't be divided by n_head {config.model.n_head}"
        )
    rates = config.training
    if rates.min_lr > rates.learning_rate:
        raise errors.UsageError(f"{source}: min_lr {rates.min_lr:g} is above learning_rate {rates.learning_rate:g}")
    return config


def _convert(given: Mapping[str, Scalar], source: str) -> Config:
    groups: dict[str, dict[str, Scalar]] = {group: {} for group in GROUPS}
    where = {field: group for group, struct in GROUPS.items() for field in struct.__struct_fields__}
    for name, value in given.items():
        if name not in where:
            near = difflib.get_close_matches(name.replace("-", "_"), where, n=1)
            hint = f": did you mean {near[0]}?" if near else "; `castore train --help` lists them"
            raise errors.UsageError(f"{source}: unknown option {name!r}{hint}")
        groups[where[name]][name] = value
    try:
        return msgspec.convert(groups, Config)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at ")
        name = path.strip("`").rpartition(".")[2]
        raise errors.UsageError(f"{source}: {name}: {reason.replace('`', '')}, not {given.get(name)!r}") from error


def read_toml(text: str, source: str) -> dict[str, Scalar]:
    """Return the options in a TOML text, named as on the command line but with ``_`` for ``-``. Raise UsageError.

    >>> read_toml("n_layer = 6", "run.toml")
    {'n_layer': 6}
    """
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise errors.UsageError(f"{source}: not valid TOML: {error}") from error
    _convert(given, source)  # here, so that an error names the file
    return given


def recorded(config: Config) -> dict[str, Scalar]:
    """Return what a manifest records: every option that shapes the training, none of the machine or the session."""
    groups = (config.model, config.training, config.data)
    flat = {name: value for group in groups for name, value in msgspec.structs.asdict(group).items()}
    # a path means nothing elsewhere, and the experiment has the digest of the data and the size of the vocabulary
    del flat["data_dir"], flat["vocab_size"]
    return flat


def critical(model: Model, vocab_size: int) -> dict[str, Scalar]:
    """Return the parameters that must be equal for a checkpoint to load; its experiment records them."""
    shape = {name: value for name, value in msgspec.structs.asdict(model).items() if name != "dropout"}
    return {**shape, "vocab_size": vocab_size}
