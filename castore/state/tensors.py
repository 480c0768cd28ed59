"""torch state <-> named buffers.

A state is any nesting of dicts, lists and tuples with tensors and plain values as leaves. What comes back is equal
bit for bit and in type; tied tensors (same memory, same view) come back as one tensor. What torch keeps beside the
data doesn't: a Parameter comes back as a Tensor, and device and stride as a contiguous tensor on the CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from castore.errors import CorruptIndex, UnsupportedValue, UsageError
from castore.format import part_index
from castore.format.ids import Buffer
from castore.format.part_index import Index, TensorRef, TensorSpec, join_key
from castore.state.parts import Flat

_DTYPES: dict[str, torch.dtype] = {
    name: dtype for name in part_index.DTYPES if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flatten(state: Any, name: str) -> Flat:
    """Take a state apart. UnsupportedValue, naming the key, for what can't be stored exactly.

    Nothing is copied: the tensors must not change until the save is over.
    """
    flattener = _Flattener()
    tree = flattener.walk(state, name, 0)
    return Flat(tree, flattener.sources)


def restore(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """The inverse of :func:`flatten`, with ``tensors`` in place of the references."""
    kind = type(tree)
    if kind is TensorRef:
        return tensors[tree.number]
    if kind in (dict, OrderedDict):
        return kind((key, restore(value, tensors)) for key, value in tree.items())
    if kind in (list, tuple):
        return kind(restore(value, tensors) for value in tree)
    return tree


def allocate_all(name: str, found: Index) -> list[tuple[torch.Tensor, memoryview]]:  # noqa: ARG001
    """New tensors for those of a part, each with its bytes."""
    return [allocate(spec) for spec in found.tensors]


def allocate(spec: TensorSpec) -> tuple[torch.Tensor, memoryview]:
    """An uninitialised tensor in main memory, and its bytes."""
    if spec.dtype not in _DTYPES:
        raise CorruptIndex(f"this torch has no element type {spec.dtype}: a newer one wrote it")
    dtype = _DTYPES[spec.dtype]
    try:
        if dtype == torch.complex32:  # torch warns of the type when asked for such a tensor, but not for a view
            tensor = torch.empty(spec.shape, dtype=torch.int32).view(dtype)
        else:
            tensor = torch.empty(spec.shape, dtype=dtype)
    except (RuntimeError, OverflowError) as error:
        raise CorruptIndex(f"can't make a tensor of shape {spec.shape}: {error}") from error
    return tensor, _bytes_of(tensor)


def move_tensors(tensors: list[torch.Tensor], device: Any) -> list[torch.Tensor]:
    """The tensors on ``device``, one after another, so that there are never two of all; None is where they are."""
    if device is not None:
        for i, tensor in enumerate(tensors):
            tensors[i] = tensor.to(device)
    return tensors


class Into:
    """Where tensors go that exist already: each part's at the same keys of a state, or of a module's.

    ``found`` is what :func:`castore.checkpoint.load_parts` takes. A tensor that is dense in main memory is filled in
    place; for another a copy is made first, which :meth:`finish` puts there once all of it was verified.
    """

    def __init__(self, into: Any) -> None:
        parts = {"model": into} if isinstance(into, torch.nn.Module) else into
        if not isinstance(parts, Mapping):
            raise UsageError(f"into is a module, or maps parts to states and modules: not {type(into).__name__}")
        self.parts = {
            name: state.state_dict() if isinstance(state, torch.nn.Module) else state for name, state in parts.items()
        }
        self._late: list[tuple[torch.Tensor, torch.Tensor]] = []

    def find(self, name: str, found: Index) -> list[tuple[torch.Tensor, memoryview]]:
        """The tensors of a part, each with bytes to fill. UsageError, before anything is filled, if one doesn't fit."""
        targets = {key: leaf for key, leaf in part_index.leaves(self.parts[name]) if isinstance(leaf, torch.Tensor)}
        wanted = {key: leaf.number for key, leaf in part_index.leaves(found.tree) if type(leaf) is TensorRef}
        for keys, what in ((wanted.keys() - targets.keys(), "has no tensor"), (targets.keys() - wanted.keys(), "has")):
            if keys:
                tail = "" if what == "has no tensor" else ", which the checkpoint doesn't have"
                raise UsageError(f"can't load part {name} there: it {what} {min(keys)}{tail}")
        made: list[tuple[torch.Tensor, memoryview] | None] = [None] * len(found.tensors)
        for key, number in wanted.items():
            target, spec = targets[key], found.tensors[number]
            if (_NAMES.get(target.dtype), tuple(target.shape)) != (spec.dtype, spec.shape):
                there = f"{spec.dtype} {list(spec.shape)}"
                raise UsageError(
                    f"can't load {join_key(name, key)}: the checkpoint has {there}, there is "
                    f"{_NAMES.get(target.dtype, target.dtype)} {list(target.shape)}"
                )
            first = made[number]
            if first is None and target.is_cpu and target.is_contiguous() and not _is_alias(target):
                made[number] = target, _bytes_of(target.detach())
            elif first is None:
                copy_first, view = allocate(spec)
                made[number] = target, view
                self._late.append((target, copy_first))
            elif first[0].data_ptr() != target.data_ptr():  # tied there, but not here
                self._late.append((target, first[0]))
        return [one if one is not None else allocate(spec) for one, spec in zip(made, found.tensors, strict=True)]

    def finish(self) -> None:
        """Fill what could not be filled in place. Nothing of it is torn: whatever was read was verified."""
        with torch.no_grad():
            for target, source in self._late:
                target.copy_(source)


def _is_alias(tensor: torch.Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two dense tensors of one type and shape are equal in every bit: NaN is equal to the same NaN."""
    return torch.equal(_as_bytes(one), _as_bytes(other))


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """The largest |after - before| of an element over the largest magnitude in either tensor: 0 to 2.

    Both are dense and of one type and shape. None when there is a NaN or an infinity, or for packed bits.
    """
    largest = difference = 0.0
    flat = before.reshape(-1), after.reshape(-1)
    for start in range(0, before.numel(), _SLICE):
        pair = [_as_numbers(tensor[start : start + _SLICE]) for tensor in flat]
        if pair[0] is None or pair[1] is None:
            return None
        one, other = pair[0], pair[1]
        if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
            return None
        largest = max(largest, one.abs().max().item(), other.abs().max().item())
        exact = _difference(*(tensor[start : start + _SLICE] for tensor in flat))
        difference = max(difference, (other - one).abs().max().item() if exact is None else exact)
    return difference / largest if largest else 0.0


def _difference(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """The largest difference of two elements of 64-bit integers, which double precision may take for equal."""
    if one.dtype not in (torch.int64, torch.uint64):
        return None
    # flipping the first bit of unsigned ones makes them signed and moves both equally
    a, b = (part if part.dtype == torch.int64 else part.view(torch.int64) ^ -(1 << 63) for part in (one, other))
    # each half's difference is exact in double precision, and their sum is rounded once
    high = ((b >> 32) - (a >> 32)).double() * 2.0**32
    low = ((b & 0xFFFFFFFF) - (a & 0xFFFFFFFF)).double()
    return (high + low).abs().max().item()


_SLICE = 1 << 20  # elements that are compared at a time, in double precision


def _as_numbers(tensor: torch.Tensor) -> torch.Tensor | None:
    try:
        return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    except (RuntimeError, NotImplementedError, TypeError):  # packed elements are no numbers
        return None


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The same in memory of its own; as plain integers, since not every element type can be copied as itself."""
    bits = _BITS.get(tensor.element_size())
    return tensor.clone() if bits is None else tensor.view(bits).clone().view(tensor.dtype)


def write_pt(state: Any, path: Path) -> None:
    """Write a state as torch.save does."""
    torch.save(state, path)


def can_read_pt() -> bool:
    """Whether this torch can be trusted with the files of others: weights_only could be escaped before 2.10."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 10)


def read_pt(path: Path) -> Any:
    """The state in a file that torch.save wrote. No code in it is run; there is no other way of reading one."""
    return torch.load(path, map_location="cpu", weights_only=True)


class TensorSource:
    """A tensor as a :class:`castore.checkpoint.Source`. Copies a chunk at a time, and only what isn't dense in main
    memory already."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = _NAMES[tensor.dtype]
        self.shape = tuple(tensor.shape)
        self._tensor = tensor
        self._is_dense = tensor.is_cpu and tensor.is_contiguous()
        self._bytes: memoryview | None = None  # made when it is first read: who saves a copy reads that alone

    def buffer(self, old: torch.Tensor | None) -> torch.Tensor:
        """Dense main memory for a copy: that of ``old`` if it fits. Pinned for what a GPU has: it copies faster."""
        bits = self._bits()
        if old is not None and (old.dtype, old.shape) == (self._tensor.dtype, self._tensor.shape):
            return old
        return torch.empty(bits.shape, dtype=bits.dtype, pin_memory=bits.is_cuda).view(self._tensor.dtype)

    def copy_to(self, buffer: torch.Tensor) -> None:
        """Copy the tensor; from a GPU without waiting for it."""
        bits = self._bits()
        buffer.view(bits.dtype).copy_(bits, non_blocking=bits.is_cuda)

    @property
    def is_cuda(self) -> bool:
        return self._tensor.is_cuda

    def _bits(self) -> torch.Tensor:
        # as plain integers: not every element type can be copied as itself
        return self._tensor.view(_BITS.get(self._tensor.element_size(), self._tensor.dtype))

    def read(self, start: int, stop: int) -> Buffer:
        if self._is_dense:
            if self._bytes is None:
                self._bytes = _bytes_of(self._tensor)
            return self._bytes[start:stop]
        size = self._tensor.element_size()
        bits = self._bits()
        out = torch.empty((stop - start) // size, dtype=bits.dtype)
        _copy_elements(bits, start // size, stop // size, out)
        return _bytes_of(out)


def _copy_elements(tensor: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
    """Copy elements [start, stop) in row-major order into ``out``, without making the whole tensor dense."""
    if tensor.dim() <= 1:
        out.copy_(tensor.reshape(-1)[start:stop])
        return
    row = tensor.numel() // tensor.shape[0]
    first, last = start // row, (stop - 1) // row
    if start == first * row and stop == (last + 1) * row:
        out.view(last - first + 1, *tensor.shape[1:]).copy_(tensor[first : last + 1])
        return
    # whole rows in one copy, the partial ones at both ends by themselves
    at = start
    while at < stop:
        i = at // row
        if at == i * row and stop >= at + row:
            end = stop // row * row
            _copy_elements(tensor, at, end, out[at - start : end - start])
        else:
            end = min(stop, (i + 1) * row)
            _copy_elements(tensor[i], at - i * row, end - i * row, out[at - start : end - start])
        at = end


class _Flattener:
    def __init__(self) -> None:
        self.sources: list[TensorSource] = []
        self._seen: dict[tuple[Any, ...], TensorRef] = {}

    def walk(self, value: Any, key: str, depth: int) -> Any:
        if depth > part_index.MAX_DEPTH:
            raise UnsupportedValue(key[:80], f"nested more than {part_index.MAX_DEPTH} deep (or inside itself)")
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, key)
        if kind in (dict, OrderedDict):
            for name in value:
                part_index.check_key(name, key)
            return kind((name, self.walk(item, join_key(key, name), depth + 1)) for name, item in value.items())
        if kind in (list, tuple):
            return kind(self.walk(item, f"{key}[{i}]", depth + 1) for i, item in enumerate(value))
        part_index.check_leaf(value, key)
        return value

    def _tensor(self, tensor: torch.Tensor, key: str) -> TensorRef:
        _check_storable(tensor, key)
        tensor = tensor.detach().resolve_conj().resolve_neg()
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        # tensors without bytes have no memory that could tell them apart
        if tensor.numel() and identity in self._seen:
            return self._seen[identity]
        ref = TensorRef(len(self.sources))
        self.sources.append(TensorSource(tensor))
        self._seen[identity] = ref
        return ref


def _check_storable(tensor: torch.Tensor, key: str) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise UnsupportedValue(key, f"a {type(tensor).__name__} is not a plain tensor: convert it first")
    if tensor.layout != torch.strided:
        raise UnsupportedValue(key, f"a tensor of layout {tensor.layout} can't be stored: call .to_dense() first")
    if tensor.is_quantized or tensor.dtype not in _NAMES:
        raise UnsupportedValue(key, f"a tensor of dtype {tensor.dtype} can't be stored")
    if tensor.is_meta:
        raise UnsupportedValue(key, "a meta tensor has no data")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, which the view keeps alive."""
    # not view(-1): what is left of a strided tensor of one element keeps the stride, and can't be seen as bytes
    return _as_bytes(tensor).numpy().data if tensor.numel() else memoryview(bytearray())
