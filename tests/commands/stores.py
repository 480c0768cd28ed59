"""What tests of commands ask of a project's store, beside the program: ids, paths, damage, a remote."""

from __future__ import annotations

import shutil
from pathlib import Path

from project import Project

from castore import Repo
from castore.format import part_index
from castore.format.ids import ObjectId

SETTINGS = '[store]\nchunk_size = "64KiB"\nthreads = 2\nfsync = false\nlock_timeout = 5.0\n'


def repo_of(project: Project) -> Repo:
    return Repo.open(project.root)


def by_step(project: Project, step: int) -> ObjectId:
    """The id of the one checkpoint of this step."""
    (checkpoint_id,) = (entry.id for entry in repo_of(project).checkpoints() if entry.manifest.step == step)
    return checkpoint_id


def chunks_of(project: Project, step: int, part: str = "model") -> list[ObjectId]:
    """The ids of the chunks of a part."""
    repo = repo_of(project)
    index = repo.find(by_step(project, step)).manifest.parts[part].index
    return [chunk.id for chunk in part_index.decode_chunks(repo.store.read(index))]


def flip(path: Path) -> None:
    """Damage one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def set_remote(project: Project) -> None:
    """A folder as the remote ``shared``, with a copy of all objects."""
    shutil.copytree(project.root / ".castore" / "objects", project.root.parent / "shared" / "objects")
    (project.root / ".castore" / "config.toml").write_text(SETTINGS + '[remotes]\nshared = "../shared"\n')
