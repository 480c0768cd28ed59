"""Values that frameworks keep beside tensors <-> :class:`castore.format.part_index.Object`: stored as what they are.

Nothing is imported by a name that was stored, and no code of a stored type runs: a named tuple gets its own type back
where the program has imported that already and its fields are the same, else an equal one made for it.
"""

from __future__ import annotations

import builtins
import keyword
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

from castore.errors import CorruptIndex, UnsupportedValue
from castore.format import part_index
from castore.format.part_index import Object, join_key

_FACTORIES: dict[str, type] = {
    name: getattr(builtins, name)
    for name in ("bool", "bytes", "complex", "dict", "float", "int", "list", "set", "str", "tuple")
}
_NUMBERS = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "float32", "float64", "complex64", "complex128"}
)  # fmt: skip


def take_apart(value: Any, key: str, replace: Callable[[Any, str], Any] = lambda _value, _key: None) -> Any:
    """Return the tree of a state: containers of plain values, with an Object for each value of a type known here.

    ``replace`` returns what stands for a value, at a readable path, or None to leave that to this function.
    UnsupportedValue, naming the key, for a value that can't be stored exactly.
    """
    return _take_apart(value, key, replace, 0)


def _take_apart(value: Any, key: str, replace: Callable[[Any, str], Any], depth: int) -> Any:
    if depth > part_index.MAX_DEPTH:
        raise UnsupportedValue(key[:80], f"nested more than {part_index.MAX_DEPTH} deep (or inside itself)")
    if (replaced := replace(value, key)) is not None:
        return replaced
    kind = type(value)
    if kind in (dict, OrderedDict):
        for name in value:
            part_index.check_key(name, key)
        pairs = value.items()
        return kind((name, _take_apart(item, join_key(key, name), replace, depth + 1)) for name, item in pairs)
    if kind in (list, tuple):
        return kind(_take_apart(item, f"{key}[{i}]", replace, depth + 1) for i, item in enumerate(value))
    if described := describe(value, key):
        return Object(described.kind, tuple(_take_apart(item, key, replace, depth + 1) for item in described.items))
    part_index.check_leaf(value, key)
    return value


def describe(value: Any, key: str) -> Object | None:
    """Return what stands for a value in a tree, whose items are yet to be described; None for a value of other types.

    UnsupportedValue, naming ``key``, for a value of these types that can't be stored exactly.
    """
    kind = type(value)
    if kind is Counter:
        return Object("collections.Counter", (dict(value),))
    if kind is defaultdict:
        return Object("collections.defaultdict", (_factory_name(value.default_factory, key), dict(value)))
    if isinstance(value, tuple) and kind is not tuple:
        return _describe_tuple(value, key)
    if (torch := sys.modules.get("torch")) and kind in (torch.dtype, torch.device):
        return Object(f"torch.{kind.__name__}", (str(value).removeprefix("torch."),))
    if numpy := sys.modules.get("numpy"):
        if kind is numpy.ndarray:
            return Object("numpy.ndarray", (value.dtype.str, tensor_of(value, key)))
        if isinstance(value, numpy.generic):
            return _describe_number(value, key)
    return None


def _factory_name(factory: Any, key: str) -> str | None:
    if factory is None:
        return None
    name = getattr(factory, "__name__", "")
    if _FACTORIES.get(name) is not factory:
        names = ", ".join(_FACTORIES)
        raise UnsupportedValue(key, f"a defaultdict is stored if its factory is one of {names}: use a dict instead")
    return name


def _describe_tuple(value: tuple[Any, ...], key: str) -> Object:
    kind = type(value)
    if (torch := sys.modules.get("torch")) and kind is torch.Size:
        return Object("torch.Size", (tuple(value),))
    fields: Any = getattr(kind, "_fields", None)
    if not _are_fields(fields) or len(fields) != len(value) or getattr(value, "__dict__", None):
        raise UnsupportedValue(key, f"{kind.__module__}.{kind.__qualname__} is a special tuple: use a plain one")
    return Object("namedtuple", (f"{kind.__module__}:{kind.__qualname__}", fields, tuple(value)))


def _are_fields(fields: Any) -> bool:
    return type(fields) is tuple and all(
        type(name) is str and name.isidentifier() and not keyword.iskeyword(name) for name in fields
    )


def _describe_number(value: Any, key: str) -> Object:
    name = value.dtype.name
    if name in _NUMBERS:
        number = value.item()
        if value.dtype.type(number).tobytes() == value.tobytes():
            return Object("numpy.generic", (name, number))
    raise UnsupportedValue(key, f"a NumPy scalar of type {name} can't be stored exactly: use a Python value")


def tensor_of(array: Any, key: str) -> Any:
    """Return a tensor with the elements of an array, in the same memory where that is possible."""
    import torch

    if array.dtype.name not in _NUMBERS:
        raise UnsupportedValue(key, f"a NumPy array of type {array.dtype} can't be stored: use one of numbers")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch takes no strides below 0, and warns of memory that must not be written to
    plain = native if native.flags.c_contiguous and native.flags.writeable else native.copy(order="C")
    return torch.from_numpy(plain)


def rebuild(described: Object, restore: Callable[[Any], Any]) -> Any:
    """Return the value that an Object stands for; ``restore`` is applied to its items. CorruptIndex if it can't be."""
    *how, held = map(restore, described.items)
    try:
        return _REBUILD[described.kind](*how, held)
    except CorruptIndex:
        raise
    except Exception as error:
        raise CorruptIndex(f"index is damaged: no {described.kind} can be made of its items: {error}") from error


def _need(condition: bool) -> None:
    if not condition:
        raise ValueError("they are not what castore writes")


def _rebuild_counter(counts: Any) -> Any:
    _need(type(counts) is dict)
    return Counter(counts)


def _rebuild_defaultdict(factory: Any, values: Any) -> Any:
    _need(type(values) is dict and (factory is None or factory in _FACTORIES))
    return defaultdict(None if factory is None else _FACTORIES[factory], values)


def _rebuild_namedtuple(name: Any, fields: Any, values: Any) -> Any:
    _need(type(name) is str and _are_fields(fields) and type(values) is tuple and len(values) == len(fields))
    return tuple.__new__(_tuple_type(name, fields), values)


def _tuple_type(name: str, fields: tuple[str, ...]) -> type[tuple[Any, ...]]:
    imported = _imported(name)
    if imported is not None and issubclass(imported, tuple) and getattr(imported, "_fields", None) == fields:
        return imported
    module, _, qualname = name.partition(":")
    made: Any = namedtuple(qualname.rpartition(".")[2], fields, module=module)  # type: ignore[misc]
    made.__qualname__ = qualname  # so that it is stored under the same name again
    return made


def _imported(name: str) -> type[Any] | None:
    """Return the class of this name if the program has imported it; asking a module for it might import something."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for step in qualname.split("."):
        found = vars(found).get(step) if hasattr(found, "__dict__") else None
    return found if isinstance(found, type) else None


def _rebuild_array(dtype: Any, tensor: Any) -> Any:
    import numpy

    kind = numpy.dtype(dtype)
    _need(kind.name in _NUMBERS)
    array = tensor.cpu().numpy()
    _need(array.dtype == kind.newbyteorder("="))
    return array.astype(kind, copy=False)


def _rebuild_number(dtype: Any, number: Any) -> Any:
    import numpy

    _need(dtype in _NUMBERS and type(number) in (bool, int, float, complex))
    return numpy.dtype(dtype).type(number)


def _rebuild_size(extents: Any) -> Any:
    import torch

    _need(type(extents) is tuple)
    return torch.Size(extents)


def _rebuild_dtype(name: Any) -> Any:
    import torch

    dtype = vars(torch).get(name)
    _need(isinstance(dtype, torch.dtype))
    return dtype


def _rebuild_device(name: Any) -> Any:
    import torch

    _need(type(name) is str)
    return torch.device(name)


_REBUILD: dict[str, Callable[..., Any]] = {
    "collections.Counter": _rebuild_counter,
    "collections.defaultdict": _rebuild_defaultdict,
    "namedtuple": _rebuild_namedtuple,
    "numpy.ndarray": _rebuild_array,
    "numpy.generic": _rebuild_number,
    "torch.Size": _rebuild_size,
    "torch.dtype": _rebuild_dtype,
    "torch.device": _rebuild_device,
}
