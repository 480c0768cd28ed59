"""The tree in an index of kind ``files``, as values: what :mod:`castore.trees.add` wrote, or what a hostile author did.

All of it is checked before anything is made of it (:mod:`castore.storage.safe_paths`): no path leads out of the folder,
through a link, or into ``.git`` or ``.castore``; no link leads out of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from castore.errors import CorruptIndex, UnsafePath
from castore.format import manifest
from castore.format.part_index import Index, TensorRef, TensorSpec
from castore.storage import safe_paths

KIND: manifest.Kind = "files"
PART = "files"

MODE = 0o777
"""Permissions that are kept: no set-user-id, set-group-id or sticky, as data must not give itself rights."""

_NO_TREE = "the index does not describe a tree of files"


@dataclass(frozen=True, slots=True)
class File:
    """A file of a tree: ``path`` begins with the name it was added by, ``size`` is in bytes."""

    path: str
    mode: int
    size: int


@dataclass(slots=True)
class Tree:
    """A tree that is safe to write: each folder comes before what is in it, each file is a tensor of its own.

    ``files`` are by the number of their tensor, ``folders`` have their permissions, ``links`` the text they hold.
    """

    files: dict[int, File] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    bytes: int = 0

    def paths(self) -> list[str]:
        """Return all paths, sorted."""
        return sorted([*self.folders, *self.links, *(file.path for file in self.files.values())])


def read_tree(index: Index) -> Tree:
    """Return the tree that the index describes. Raise CorruptIndex or UnsafePath if it could do any harm."""
    if type(index.tree) is not dict:
        raise CorruptIndex(_NO_TREE)
    tree = Tree()
    for path in sorted(index.tree, key=str):
        if type(path) is not str:
            raise CorruptIndex(f"{_NO_TREE}: a path is a number")
        if reason := safe_paths.why_not_member(path):
            raise UnsafePath(path, reason)
        parent = path.rpartition("/")[0]
        if parent and parent not in tree.folders:
            raise UnsafePath(path, "which is not in a folder of the tree")
        _read_node(tree, path, index.tree[path], index.tensors)
    return tree


def _read_node(tree: Tree, path: str, node: Any, tensors: Sequence[TensorSpec]) -> None:
    match node:
        case {"link": str(target), **rest} if not rest:
            if reason := safe_paths.why_not_link(path, target):
                raise UnsafePath(path, reason)
            tree.links[path] = target
        case {"mode": int(mode), **rest} if not rest and mode >= 0:
            tree.folders[path] = mode & MODE
        case {"mode": int(mode), "data": TensorRef(number), **rest} if not rest and mode >= 0:
            spec = tensors[number]
            # a file twice would let a small index fill any disk
            if spec.dtype != "uint8" or len(spec.shape) != 1 or number in tree.files:
                raise CorruptIndex(f"{_NO_TREE}: {path[:200]!r} has no data of its own")
            tree.files[number] = File(path, mode & MODE, spec.nbytes)
            tree.bytes += spec.nbytes
        case _:
            raise CorruptIndex(f"{_NO_TREE}: {path[:200]!r} is neither file, folder nor link")
