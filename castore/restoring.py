"""Put a loaded checkpoint into a model, an optimizer and others: all of it, or nothing."""

from __future__ import annotations

import copy
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from castore.errors import UsageError
from castore.format import part_index
from castore.format.part_index import Index, TensorRef
from castore.state import tensors
from castore.state.tensors import is_sharded

RANDOM, METADATA, RANKS = "random", "model_metadata", "ranks"
RESERVED = frozenset({RANDOM, METADATA, RANKS})
"""Names in the part ``trainer`` that are castore's own."""

_OF_EACH_RANK = 1 << 20  # bytes of tensors up to which a component's state is saved for each rank

_log = logging.getLogger(__name__)

_PREFIXES = ("_orig_mod.", "module.")  # what torch.compile and DistributedDataParallel put before names


def restore_all(
    states: Mapping[str, Any],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    others: Mapping[str, Any],
    *,
    strict: bool,
    checkpoint: str,
    fill: Callable[[dict[str, torch.Tensor]], Any] | None = None,
    rank: int = 0,
) -> None:
    """Load the ``states`` of parts into what they belong to, by way of its ``load_state_dict``.

    With ``fill`` the model's state has tensors without memory: once all else is loaded, ``fill`` gets the model's own
    tensors, by the names of the checkpoint, to read into them. Every byte must have been verified before: should the
    disk fail all the same, its error is raised, all else is as it was, and the model is partly filled.

    What was saved for each rank is taken for ``rank``; where there is nothing for it, its random generators stay.

    UsageError, naming what doesn't fit in ``checkpoint`` and what to do; then everything is as it was before, the
    random generators too. Without ``strict`` a component that only one side has is left as it is.
    """
    trainer = states.get("trainer")
    if not isinstance(trainer, Mapping) or RANDOM not in trainer:
        raise UsageError(f"checkpoint {checkpoint} was not saved by a Checkpointer: load its parts with Repo.load")
    trainer = of_rank(trainer, rank)
    if strict:
        _check_components(trainer, others, checkpoint)
        if (optimizer is not None) != ("optimizer" in states):
            which = "has no optimizer" if optimizer else "has an optimizer, and this Checkpointer was given none"
            raise UsageError(f"checkpoint {checkpoint} {which}: give the same as when it was saved, or strict=False")
    model_state = fit_model(states["model"], trainer.get(METADATA), model, checkpoint)
    targets = _targets(states["model"], model_state, model) if fill else {}
    undo: list[Callable[[], None]] = []
    # whatever the caller has set, what is loaded is to be trained on
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        try:
            _assign(states, trainer, None if fill else model_state, model, optimizer, others, undo)
        except Exception as error:
            _take_back(undo)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"checkpoint {checkpoint} doesn't fit, and nothing was changed: {reason}") from error
        if fill:
            try:
                fill(targets)
            except BaseException:
                _take_back(undo)
                raise


def for_each_rank(states: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return the states as a rank gives them to a save of all: those of the lowest, and by rank what may differ.

    That is not what holds large tensors or sharded ones: those are taken to be equal, as the model's are.
    """
    if rank == 0:
        return {**states, RANKS: {}}
    own = {name: state for name, state in states.items() if _is_small(state)}
    return {**{name: state for name, state in states.items() if name not in own}, RANKS: {rank: own}}


def _is_small(state: Any) -> bool:
    held = [leaf for _, leaf in part_index.leaves(state) if isinstance(leaf, torch.Tensor)]
    return not any(map(is_sharded, held)) and sum(tensor.nbytes for tensor in held) <= _OF_EACH_RANK


def of_rank(trainer: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return the states of a rank, with those of the lowest one where nothing was saved for it."""
    own = trainer.get(RANKS, {}).get(rank)
    shared = {name: state for name, state in trainer.items() if rank == 0 or own is not None or name != RANDOM}
    if rank and own is None:
        _log.warning("nothing was saved for rank %d: its random generators stay as they are", rank)
    return shared | (own or {})


def _take_back(undo: Sequence[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()


def _assign(
    states: Mapping[str, Any],
    trainer: Mapping[str, Any],
    model_state: OrderedDict[str, Any] | None,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    others: Mapping[str, Any],
    undo: list[Callable[[], None]],
) -> None:
    """Load everything, the model unless its state is None; ``undo`` gets what takes it back, in order."""
    for name, component in others.items():
        if name in trainer:
            _load(component, trainer[name], undo)
    if optimizer is not None and "optimizer" in states:
        old = optimizer.state_dict()
        optimizer.load_state_dict(states["optimizer"])
        undo.append(lambda: optimizer.load_state_dict(old))
    if model_state is None:
        pass
    elif _is_custom(model):
        _load(model, model_state, undo)
    else:
        model.load_state_dict(model_state)
    if RANDOM in trainer:
        before = random_state()
        undo.append(lambda: set_random_state(before))
        set_random_state(trainer[RANDOM])


def _load(component: Any, state: Any, undo: list[Callable[[], None]]) -> None:
    old = copy.deepcopy(component.state_dict())
    undo.append(lambda: component.load_state_dict(old))
    component.load_state_dict(state)


def _check_components(trainer: Mapping[str, Any], others: Mapping[str, Any], checkpoint: str) -> None:
    saved = trainer.keys() - RESERVED
    if missing := others.keys() - saved:
        raise UsageError(
            f"checkpoint {checkpoint} has no state of {min(missing)!r}: leave it out, or resume with strict=False to "
            "start it from its present state"
        )
    if surplus := saved - others.keys():
        raise UsageError(
            f"checkpoint {checkpoint} has a state of {min(surplus)!r}, which this Checkpointer was not given: give "
            f"{min(surplus)}=..., or resume with strict=False to do without it"
        )


# -- the model ---------------------------------------------------------------------------------------------------------


def fit_model(state: Any, metadata: Any, model: torch.nn.Module, checkpoint: str) -> OrderedDict[str, Any]:
    """Return what to give to ``load_state_dict``: under the model's own names, and with the versions of its modules."""
    if not isinstance(state, Mapping):
        raise UsageError(f"checkpoint {checkpoint} holds no state dict of a model")
    own = model.state_dict()
    fitted = _own_names(state, own)
    if isinstance(metadata, Mapping):
        fitted._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    if not _is_custom(model):
        _check_tensors(fitted, own, checkpoint)
    return fitted


def model_targets(outline: Any, model: torch.nn.Module, checkpoint: str) -> dict[str, torch.Tensor]:
    """Return the tensors to read a model's state into, by the names of the checkpoint: its own, if that will do.

    UsageError, if they don't fit.
    """
    fitted = fit_model(outline, None, model, checkpoint)
    targets = _targets(outline, fitted, model)
    if _is_custom(model):
        return {name: torch.empty_like(tensor) for name, tensor in targets.items()}
    return targets


def optimizer_targets(index: Index, optimizer: torch.optim.Optimizer) -> Any:
    """Return the state in a part ``optimizer`` with new tensors: each sharded like the parameter whose shape it has."""
    alike: dict[int, torch.Tensor] = {}
    try:
        saved = [number for group in index.tree["param_groups"] for number in group["params"]]
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, own, strict=True):
            for value in index.tree["state"].get(number, {}).values():
                if type(value) is TensorRef and index.tensors[value.number].shape == tuple(parameter.shape):
                    alike[value.number] = parameter
    except (KeyError, TypeError, AttributeError, ValueError):
        pass  # it is not one of torch's: its tensors are small, or else it says that it doesn't fit
    return tensors.restore(
        index.tree,
        [
            torch.empty_like(alike[i], dtype=tensors.dtype_of(spec)).detach()
            if is_sharded(alike.get(i))
            else tensors.allocate(spec)
            for i, spec in enumerate(index.tensors)
        ],
    )


def fills_in_place(model: torch.nn.Module) -> bool:
    """Whether a load is to fill the model's own tensors, and has nothing else to do."""
    return not _is_custom(model)


def _own_names(state: Mapping[str, Any], own: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return a state, in its order, under the names of ``own`` if what wrappers add is all that differs."""
    if state.keys() != own.keys():
        by_plain_name = {plain_name(key): key for key in own}
        if len(by_plain_name) == len(own) and {plain_name(key) for key in state} == by_plain_name.keys():
            return OrderedDict((by_plain_name[plain_name(key)], value) for key, value in state.items())
    return OrderedDict(state)


def plain_name(key: str) -> str:
    """Return a tensor's name without what wrappers of the model add to it."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix).replace(f".{prefix}", ".")
    return key


def _check_tensors(state: Mapping[str, Any], own: Mapping[str, Any], checkpoint: str) -> None:
    if missing := own.keys() - state.keys():
        raise UsageError(f"checkpoint {checkpoint} has no {min(missing)}, which the model has; nothing was changed")
    if surplus := state.keys() - own.keys():
        raise UsageError(f"checkpoint {checkpoint} has {min(surplus)}, which the model lacks; nothing was changed")
    for key, value in state.items():
        if own[key].is_meta:
            raise UsageError(f"{key} is on the meta device: give the model memory first, as model.to_empty(device=...)")
        if not isinstance(value, torch.Tensor) or value.shape != own[key].shape:
            there = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise UsageError(
                f"checkpoint {checkpoint} has {there} for {key}, where the model has {list(own[key].shape)}; "
                "nothing was changed"
            )


def can_be_filled(model: torch.nn.Module) -> bool:
    """Whether loading copies tensors and does no more, into memory that a checkpoint can be read into."""
    return not _is_custom(model) and all(
        tensor.is_cpu and tensor.is_contiguous() for tensor in model.state_dict().values()
    )


def has_types_of(outline: Any, model: torch.nn.Module) -> bool:
    """Whether the tensors of a model's state have the element types of the model's own; others have to be converted."""
    own = model.state_dict()
    fitted = _own_names(outline, own) if isinstance(outline, Mapping) else {}
    return all(
        isinstance(value, torch.Tensor) and key in own and own[key].dtype == value.dtype
        for key, value in fitted.items()
    )


def _targets(stored: Mapping[str, Any], fitted: Mapping[str, Any], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's own tensors by the names of the checkpoint: ``fitted`` has the same order."""
    own = model.state_dict()
    return {name: own[key] for name, key in zip(stored, fitted, strict=True)}


def _is_custom(model: torch.nn.Module) -> bool:
    """Whether loading may do more than copy tensors: what it needs is only known once it was tried."""
    plain = torch.nn.Module
    for module in model.modules():
        kind = type(module)
        registered = (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks, module._state_dict_hooks)
        # those of FSDP put its own shards in place, and are run by asking for the state
        hooks = [hook for hooks in registered for hook in hooks.values() if not _is_of_fsdp(hook)]
        overridden = any(
            getattr(kind, name, None) is not getattr(plain, name)
            for name in ("load_state_dict", "state_dict", "get_extra_state", "set_extra_state")
        )
        if hooks or overridden:
            return True
        loads = kind._load_from_state_dict
        if loads is not plain._load_from_state_dict and not kind.__module__.startswith("torch.nn.modules"):
            return True
    return False


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")


def metadata_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a state dict says of the versions of its modules: without it, a module would migrate twice."""
    return {name: dict(values) for name, values in getattr(state, "_metadata", {}).items() if values}


# -- random generators -------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """Return the states of the random generators that training draws from."""
    import numpy as np

    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    numpy = (str(kind), torch.from_numpy(keys), *rest)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`random_state` returned; that of the GPUs only if there are as many as then."""
    import numpy as np

    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
