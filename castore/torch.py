"""torch state <-> named buffers. The only module of castore that imports torch.

A state is any nesting of dicts, lists and tuples with tensors and plain values as leaves. What comes back is equal
bit for bit and in type; tied tensors (same memory, same view) come back as one tensor. What torch keeps beside the
data doesn't: a Parameter comes back as a Tensor, and device and stride as a contiguous tensor on the CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from castore import index
from castore.checkpoint import Flat
from castore.errors import CorruptIndex, UnsupportedValue
from castore.ids import Buffer
from castore.index import TensorRef, TensorSpec, join_key

_DTYPES: dict[str, torch.dtype] = {
    name: dtype for name in index.DTYPES if isinstance(dtype := getattr(torch, name, None), torch.dtype)
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


def copy(tensor: torch.Tensor) -> torch.Tensor:
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
        self._dense = _bytes_of(tensor) if tensor.is_cpu and tensor.is_contiguous() else None

    def read(self, start: int, stop: int) -> Buffer:
        if self._dense is not None:
            return self._dense[start:stop]
        size = self._tensor.element_size()
        # as plain integers: not every element type can be copied as itself
        bits = self._tensor.view(_BITS.get(size, self._tensor.dtype))
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
        if depth > index.MAX_DEPTH:
            raise UnsupportedValue(key[:80], f"nested more than {index.MAX_DEPTH} deep (or inside itself)")
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, key)
        if kind in (dict, OrderedDict):
            for name in value:
                index.check_key(name, key)
            return kind((name, self.walk(item, join_key(key, name), depth + 1)) for name, item in value.items())
        if kind in (list, tuple):
            return kind(self.walk(item, f"{key}[{i}]", depth + 1) for i, item in enumerate(value))
        index.check_leaf(value, key)
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
