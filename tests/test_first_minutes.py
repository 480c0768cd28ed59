"""The wheel holds what castore needs. tests/peers plays the first minutes with it, in clean environments."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from first_minutes import build_wheel
from project import Project


def test_the_wheel_is_complete(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, sys.executable)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"castore", "nanecho"}
    folder = tmp_path / "project"
    folder.mkdir()
    environment = Project.environment_of_tests() | {"PYTHONPATH": str(tmp_path / "installed")}
    where = [sys.executable, "-c", "import castore, nanecho; print(castore.__file__, nanecho.__file__)"]
    found = subprocess.run(
        where, cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert all(Path(path).is_relative_to(tmp_path / "installed") for path in found)

    def castore(*arguments: str) -> str:
        command = [sys.executable, "-m", "castore", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout

    castore("init")
    assert "wrote   report.html" in castore("report")
    assert castore("ci", "workflow", "--action", "you/castore").startswith("name: train\n")
    assert "castore/format/FORMAT.md" in names
    assert "castore/py.typed" in names
