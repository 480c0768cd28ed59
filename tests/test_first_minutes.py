"""What the wheel holds is enough for the first minutes. Its dependencies are those of the tests: see tests/peers."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from first_minutes import build_wheel, play
from project import Project


def test_a_new_user_gets_along_with_the_wheel_and_the_readme(tmp_path: Path) -> None:
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
    play([sys.executable, "-m", "castore"], sys.executable, folder, environment)
