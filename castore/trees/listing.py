"""What added files hold, read from indexes alone: the items of a folder, and the versions that hold a path."""

from __future__ import annotations

import fnmatch
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from castore.errors import CastoreError, NotFound
from castore.format.ids import ObjectId
from castore.format.manifest import Entry
from castore.policy.order import newest_first
from castore.repo import Repo
from castore.state.parts import read_index
from castore.trees.tree import KIND, PART, Tree, read_tree


@dataclass(frozen=True, slots=True)
class Node:
    """Something in a tree. ``bytes`` is the size of a file or of all files in a folder, ``target`` a link's text."""

    path: str
    kind: Literal["file", "folder", "link"]
    bytes: int
    mode: int
    target: str = ""


def open_tree(repo: Repo, entry: Entry) -> Tree:
    """Return what was added, from the store or a remote. Raise NotFound for an entry that is not of kind files.

    Raise ObjectMissing or CorruptObject for an index that can't be read, UnsafePath or CorruptIndex for a hostile one.
    """
    if entry.manifest.kind != KIND or PART not in entry.manifest.parts:
        raise NotFound(f"{entry.id[:12]} holds no files; `castore log --kind files` lists what does")
    return read_tree(read_index(repo.store, repo.remotes, entry.id, entry.manifest, PART))


def list_tree(tree: Tree, path: str = "") -> list[Node]:
    """Return what is in the folder ``path``, by name; of a file or link, that one. Raise NotFound if it isn't there.

    An empty ``path`` stands for the top: what was added, or, if that is one folder, what is in it.
    """
    nodes = {node.path: node for node in _nodes(tree)}
    path = posixpath.normpath(path) if path else _top_folder(nodes)
    if path and path not in nodes:
        raise NotFound(f"there is no {path!r} in it")
    if path and nodes[path].kind != "folder":
        return [nodes[path]]
    return [nodes[item] for item in sorted(nodes) if item.rpartition("/")[0] == path]


def _top_folder(nodes: Iterable[str]) -> str:
    tops = [path for path in nodes if "/" not in path]
    return tops[0] if len(tops) == 1 and len(list(nodes)) > 1 else ""


def _nodes(tree: Tree) -> Iterator[Node]:
    sizes = dict.fromkeys(tree.folders, 0)
    for file in tree.files.values():
        yield Node(file.path, "file", file.size, file.mode)
        parent = file.path.rpartition("/")[0]
        while parent:
            sizes[parent] += file.size
            parent = parent.rpartition("/")[0]
    for path, mode in tree.folders.items():
        yield Node(path, "folder", sizes[path], mode)
    for path, target in tree.links.items():
        yield Node(path, "link", 0, 0o777, target)


@dataclass(frozen=True, slots=True)
class Found:
    """A path that versions hold, the newest first, as ``node`` is in the newest of them."""

    node: Node
    versions: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Search:
    """What :func:`find` found, by path. ``unread`` are versions whose index could not be read, with the reason."""

    found: tuple[Found, ...]
    unread: dict[ObjectId, str]


def find(repo: Repo, pattern: str) -> Search:
    """Look for files, folders and links in all that was added, whose index is in the store or in a remote.

    ``pattern`` is a name or path in which ``*``, ``?`` and ``[...]`` match as in a shell; ``*`` matches ``/`` too. One
    without ``/`` is compared with the last part of each path.
    """
    nodes: dict[str, Node] = {}
    versions: dict[str, list[Entry]] = {}
    unread = {}
    for entry in newest_first(entry for entry in repo.catalog.listing().entries if entry.manifest.kind == KIND):
        try:
            tree = open_tree(repo, entry)
        except CastoreError as error:
            unread[entry.id] = str(error)
            continue
        for node in _nodes(tree):
            name = node.path if "/" in pattern else posixpath.basename(node.path)
            if fnmatch.fnmatchcase(name, pattern):
                nodes.setdefault(node.path, node)
                versions.setdefault(node.path, []).append(entry)
    return Search(tuple(Found(nodes[path], tuple(versions[path])) for path in sorted(nodes)), unread)
