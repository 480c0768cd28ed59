"""torch state <-> a tree of plain values and the bytes of its tensors.

A state is any nesting of dicts, lists and tuples with tensors and plain values as leaves. It is restored equal bit for
bit and in type; tied tensors (same memory, same view) are restored as one tensor. What torch keeps beside the data is
not restored: a Parameter becomes a Tensor, and every tensor is contiguous and on the CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from castore.errors import CorruptIndex, UnsupportedValue, UsageError
from castore.format import part_index
from castore.format.ids import Buffer
from castore.format.part_index import Index, Object, TensorRef, TensorSpec, join_key
from castore.state import objects
from castore.state.parts import Flat

_DTYPES: dict[str, torch.dtype] = {
    name: dtype for name in part_index.DTYPES if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flatten(state: Any, name: str) -> Flat:
    """Take the state of the part ``name`` apart into a tree of values and the sources of its tensors.

    Nothing is copied: the tensors must not change until they are saved. UnsupportedValue, naming the key, for a value
    that can't be stored exactly.
    """
    flattener = Flattener()
    tree = objects.take_apart(state, name, flattener.replace)
    return Flat(tree, flattener.sources)


def restore(tree: Any, tensors: list[torch.Tensor]) -> Any:
    """Return the state of a tree, with ``tensors`` in place of the references: the inverse of :func:`flatten`."""
    kind = type(tree)
    if kind is TensorRef:
        return tensors[tree.number]
    if kind in (dict, OrderedDict):
        return kind((key, restore(value, tensors)) for key, value in tree.items())
    if kind in (list, tuple):
        return kind(restore(value, tensors) for value in tree)
    if kind is Object:
        return objects.rebuild(tree, lambda item: restore(item, tensors))
    return tree


def allocate_all(part: str, index: Index) -> list[tuple[torch.Tensor, torch.Tensor]]:  # noqa: ARG001
    """Allocate an uninitialised tensor for every tensor in the index; each is filled itself."""
    with torch.inference_mode(False):  # once: entering it takes longer than making a small tensor
        tensors = [_new(spec) for spec in index.tensors]
    return list(zip(tensors, tensors, strict=True))


def allocate(spec: TensorSpec) -> torch.Tensor:
    """Allocate an uninitialised tensor in main memory, which may be trained on whatever mode the caller has set."""
    with torch.inference_mode(False):
        return _new(spec)


def _new(spec: TensorSpec) -> torch.Tensor:
    dtype = dtype_of(spec)
    try:
        return _empty(spec.shape, dtype)
    except (RuntimeError, OverflowError) as error:
        raise CorruptIndex(f"can't make a tensor of shape {spec.shape}: {error}") from error


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """Return torch's element type. CorruptIndex for one that this torch doesn't have."""
    if spec.dtype not in _DTYPES:
        raise CorruptIndex(f"this torch has no element type {spec.dtype}: a newer one wrote it")
    return _DTYPES[spec.dtype]


def _empty(shape: tuple[int, ...], dtype: torch.dtype, *, pin: bool = False) -> torch.Tensor:
    """A tensor in main memory, whatever default device the caller has set."""
    # torch warns of complex32 when asked for such a tensor, but not for a view
    made_as = torch.int32 if dtype == torch.complex32 else dtype
    tensor = torch.empty(shape, dtype=made_as, device="cpu", pin_memory=pin)
    return tensor.view(dtype) if made_as != dtype else tensor


def outline(index: Index) -> Any:
    """Return the state of a part with tensors that have a type and a shape, and no memory."""
    return restore(index.tree, outline_tensors(index))


def outline_tensors(index: Index) -> list[torch.Tensor]:
    """Return tensors of a part that have a type and a shape, and no memory."""
    return [torch.empty(spec.shape, dtype=dtype_of(spec), device="meta") for spec in index.tensors]


def move_tensors(tensors: list[torch.Tensor], device: Any) -> list[torch.Tensor]:
    """Move the tensors of a list to ``device``, in the list; None leaves them where they are.

    One at a time, so that not all of them are in memory twice.
    """
    if device is not None:
        for i, tensor in enumerate(tensors):
            tensors[i] = tensor.to(device)
    return tensors


class LoadTarget:
    """Tensors that exist already and are filled by a load: those of a module, or of a dict from parts to states.

    :meth:`place` is a :class:`castore.state.parts.PlaceTensors`. A tensor that is dense and in main memory is filled in
    place; for any other a copy is filled first, which :meth:`finish` copies into it once everything is verified.
    """

    def __init__(self, target: Any) -> None:
        parts = {"model": target} if isinstance(target, torch.nn.Module) else target
        if not isinstance(parts, Mapping):
            kind = type(target).__name__
            raise UsageError(f"can't load into a {kind}: give a module, or a dict from parts to states and modules")
        self.parts = {
            name: state.state_dict() if isinstance(state, torch.nn.Module) else state for name, state in parts.items()
        }
        self._late: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor to fill, the tensor to fill it from)

    def place(self, part: str, index: Index) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return a (tensor, tensor to fill) pair for each tensor of the index.

        UsageError, before anything is filled, when the target has other keys, element types or shapes.
        """
        leaves = ((key, as_target(leaf, key)) for key, leaf in part_index.leaves(self.parts[part]))
        targets = {key: target for key, target in leaves if target is not None}
        numbers = {key: leaf.number for key, leaf in part_index.leaves(index.tree) if type(leaf) is TensorRef}
        check_keys(part, stored=numbers.keys(), targets=targets.keys())
        placed: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(index.tensors)
        for key, number in numbers.items():
            target, spec = targets[key], index.tensors[number]
            check_fits(join_key(part, key), spec, target)
            first = placed[number]
            if first is None and can_be_filled(target):
                placed[number] = target, target
            elif first is None:
                copy_of_target = allocate(spec)
                placed[number] = target, copy_of_target
                self._late.append((target, copy_of_target))
            elif first[0].data_ptr() != target.data_ptr():  # tied in the checkpoint, but not in the target
                self._late.append((target, first[0]))
        # a tensor of the index that no key refers to is read and verified all the same
        pairs = zip(placed, index.tensors, strict=True)
        return [pair if pair is not None else (unused := allocate(spec), unused) for pair, spec in pairs]

    def finish(self) -> None:
        """Fill the tensors that could not be filled in place. Call it when all parts are loaded, thus verified."""
        with torch.no_grad():
            for target, source in self._late:
                target.copy_(source)


def as_target(leaf: Any, key: str) -> torch.Tensor | None:
    """Return the tensor to fill for a leaf of a state, which for an array is in its memory; None for other leaves."""
    if isinstance(leaf, torch.Tensor) or type(leaf).__module__ != "numpy" or type(leaf).__name__ != "ndarray":
        return leaf if isinstance(leaf, torch.Tensor) else None
    tensor: torch.Tensor = objects.tensor_of(leaf, key)
    if tensor.numel() and tensor.data_ptr() != leaf.ctypes.data:
        raise UsageError(f"can't load into the array {key}: it isn't a plain one that may be written to")
    return tensor


def check_keys(part: str, *, stored: Set[str], targets: Set[str]) -> None:
    """Raise UsageError unless the tensors of a part and those to be filled have the same keys."""
    if missing := stored - targets:
        raise UsageError(f"can't load part {part} there: it has no tensor {min(missing)}")
    if surplus := targets - stored:
        raise UsageError(f"can't load part {part} there: it has {min(surplus)}, which the checkpoint doesn't have")


def check_fits(key: str, spec: TensorSpec, target: torch.Tensor, *, any_dtype: bool = False) -> None:
    """Raise UsageError unless a stored tensor has the element type, if that matters, and shape of the one to fill."""
    dtype, shape = _NAMES.get(target.dtype), tuple(target.shape)
    if (dtype if not any_dtype else spec.dtype, shape) != (spec.dtype, spec.shape):
        stored = f"{spec.dtype} {list(spec.shape)}"
        raise UsageError(
            f"can't load {key}: the checkpoint has {stored}, the target {dtype or target.dtype} {list(shape)}"
        )


def can_be_filled(tensor: torch.Tensor) -> bool:
    """Whether bytes can be read straight into a tensor."""
    return tensor.is_cpu and tensor.is_contiguous() and not _is_alias(tensor)


def _is_alias(tensor: torch.Tensor) -> bool:
    """Whether torch would change what stands in the tensor's memory before anybody sees it."""
    return tensor.is_conj() or tensor.is_neg()


def equal_bits(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Return whether two dense tensors of one type and shape are equal bit for bit: a NaN equals the same NaN."""
    return torch.equal(_as_bytes(before), _as_bytes(after))


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """Return the largest |after - before| of an element over the largest magnitude in either tensor: 0 to 2.

    Both are dense and of one type and shape. None when either holds a NaN or an infinity, or its elements are packed.
    """
    largest = difference = 0.0
    flat = before.reshape(-1), after.reshape(-1)
    for start in range(0, before.numel(), _SLICE):
        pair = [_as_numbers(tensor[start : start + _SLICE]) for tensor in flat]
        if pair[0] is None or pair[1] is None:
            return None
        old, new = pair[0], pair[1]
        if not (torch.isfinite(old).all() and torch.isfinite(new).all()):
            return None
        largest = max(largest, old.abs().max().item(), new.abs().max().item())
        exact = _integer_difference(*(tensor[start : start + _SLICE] for tensor in flat))
        difference = max(difference, (new - old).abs().max().item() if exact is None else exact)
    return difference / largest if largest else 0.0


def _integer_difference(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """Return the largest difference of two elements; None for all but 64-bit integers.

    In double precision, 64-bit integers that differ may look equal.
    """
    if before.dtype not in (torch.int64, torch.uint64):
        return None
    # flipping the first bit of unsigned integers makes them signed and moves both equally
    a, b = (
        tensor if tensor.dtype == torch.int64 else tensor.view(torch.int64) ^ -(1 << 63) for tensor in (before, after)
    )
    # each half's difference is exact in double precision, and their sum is rounded once
    high = ((b >> 32) - (a >> 32)).double() * 2.0**32
    low = ((b & 0xFFFFFFFF) - (a & 0xFFFFFFFF)).double()
    return (high + low).abs().max().item()


_SLICE = 1 << 20  # how many elements are compared at a time, in double precision


def _as_numbers(tensor: torch.Tensor) -> torch.Tensor | None:
    try:
        return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    except (RuntimeError, NotImplementedError, TypeError):  # packed elements have no conversion to numbers
        return None


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() == 0:
        return _empty((0,), torch.uint8)
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor in memory of its own."""
    bits = _BITS.get(tensor.element_size())  # as plain integers: not every element type can be copied as itself
    return tensor.clone() if bits is None else tensor.view(bits).clone().view(tensor.dtype)


def write_pt(state: Any, path: Path) -> None:
    """Write a state to a file with torch.save."""
    torch.save(state, path)


def can_read_pt() -> bool:
    """Return whether this torch is safe for files of unknown origin: weights_only could be escaped before 2.10."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 10)


def read_pt(path: Path) -> Any:
    """Return the state in a file that torch.save wrote. No code in the file is run."""
    return torch.load(path, map_location="cpu", weights_only=True)


class TensorSource:
    """A tensor as a :class:`castore.state.parts.Source`.

    Reading copies no more than a chunk at a time, and nothing of a tensor that is dense and in main memory.
    """

    __slots__ = ("_bytes", "_is_dense", "_tensor", "dtype", "is_shared")  # a state may have 200,000 of them

    def __init__(self, tensor: torch.Tensor, *, is_shared: bool = True) -> None:
        self.dtype = _NAMES[tensor.dtype]
        self._tensor = tensor
        self._is_dense = tensor.is_cpu and tensor.is_contiguous()
        self.is_shared = is_shared and self._is_dense
        self._bytes: memoryview | None = None  # made on first read: AsyncSaver reads only the copy it made

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    def is_same_view(self, tensor: torch.Tensor) -> bool:
        """Whether this tensor, whose memory begins where that of ``tensor`` does, is tied to it."""
        mine = self._tensor
        return (mine.device, mine.dtype, mine.shape) == (tensor.device, tensor.dtype, tensor.shape) and (
            mine.stride() == tensor.stride()
        )

    def buffer(self, old: torch.Tensor | None) -> torch.Tensor:
        """Return a dense tensor in main memory to copy to: ``old`` if its type and shape fit.

        The copy of a GPU's tensor is in pinned memory, which is faster to copy to.
        """
        bits = self._bits()
        if old is not None and (old.dtype, old.shape) == (self._tensor.dtype, self._tensor.shape):
            return old
        with torch.inference_mode(False):
            return _empty(tuple(bits.shape), self._tensor.dtype, pin=bits.is_cuda)

    def copy_to(self, buffer: torch.Tensor) -> None:
        """Copy the tensor to ``buffer``. From a GPU the copy is only begun: synchronise before reading it."""
        bits = self._bits()
        buffer.view(bits.dtype).copy_(bits, non_blocking=bits.is_cuda)

    @property
    def is_cuda(self) -> bool:
        """Whether the tensor is in the memory of a GPU."""
        return self._tensor.is_cuda

    def _bits(self) -> torch.Tensor:
        # as plain integers: not every element type can be copied as itself
        return self._tensor.view(_BITS.get(self._tensor.element_size(), self._tensor.dtype))

    def read(self, start: int, stop: int) -> Buffer:
        """Return bytes [start, stop) of the dense, row-major tensor."""
        if self._is_dense:
            if start == 0 and stop == self._tensor.nbytes:  # not kept: small tensors would take more than their data
                return bytes_of(self._tensor)
            if self._bytes is None:
                self._bytes = bytes_of(self._tensor)
            return self._bytes[start:stop]
        size = self._tensor.element_size()
        bits = self._bits()
        out = _empty(((stop - start) // size,), bits.dtype)
        _copy_elements(bits, start // size, stop // size, out)
        return bytes_of(out)


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
    # whole rows in one copy, then the partial rows at both ends
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


class Flattener:
    """Numbers the tensors of a state, ties once, as their sources."""

    def __init__(self) -> None:
        self.sources: list[TensorSource] = []
        # the numbers of the sources whose memory begins at an address: the first one, and the few further ones
        self._first: dict[int, int] = {}
        self._further: dict[int, list[int]] = {}

    def replace(self, value: Any, key: str) -> TensorRef | None:
        """Return what stands for a tensor in the tree; None for any other value."""
        return self.number(value, key) if isinstance(value, torch.Tensor) else None

    def number(self, tensor: torch.Tensor, key: str) -> TensorRef:
        """Return what stands for a tensor, which is a new source unless it is tied to an earlier one."""
        check_storable(tensor, key)
        if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
            tensor = tensor.detach().resolve_conj().resolve_neg()
        number = len(self.sources)
        if tensor.numel():  # tensors without bytes have no memory that could tell them apart
            address = tensor.data_ptr()
            first = self._first.setdefault(address, number)
            for earlier in (first, *self._further.get(address, ())) if first != number else ():
                if self.sources[earlier].is_same_view(tensor):
                    return TensorRef(earlier)
            if first != number:
                self._further.setdefault(address, []).append(number)
        self.sources.append(TensorSource(tensor))
        return TensorRef(number)


def is_sharded(value: Any) -> bool:
    """Whether a value is a tensor that lies on several ranks, such as a DTensor."""
    return isinstance(value, torch.Tensor) and hasattr(value, "__create_chunk_list__")


def check_storable(tensor: torch.Tensor, key: str) -> None:
    """Raise UnsupportedValue, naming the key, for a tensor that has no exact form."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        hint = "castore.dcp.save stores it" if is_sharded(tensor) else "convert it first"
        raise UnsupportedValue(key, f"a {type(tensor).__name__} is not a plain tensor: {hint}")
    if tensor.layout != torch.strided:
        raise UnsupportedValue(key, f"a tensor of layout {tensor.layout} can't be stored: call .to_dense() first")
    if tensor.is_quantized or tensor.dtype not in _NAMES:
        raise UnsupportedValue(key, f"a tensor of dtype {tensor.dtype} can't be stored")
    if tensor.is_meta:
        raise UnsupportedValue(key, "a meta tensor has no data")


_IN_NUMPY = frozenset(
    {torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool, torch.uint8}
    | {torch.int8, torch.int16, torch.int32, torch.int64}
)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a writable view of the bytes of a contiguous tensor in main memory; the view keeps the tensor alive."""
    if not tensor.numel():
        return memoryview(bytearray())
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if tensor.dtype in _IN_NUMPY:  # the same, several times as fast
        return tensor.numpy().reshape(-1).view("u1").data
    # not view(-1): a tensor of one element cut from a strided one keeps its stride, and can't be viewed as bytes
    return _as_bytes(tensor).numpy().data
