"""The first minutes of a new user in a clean environment, on each Python that the machine has."""

from __future__ import annotations

import glob
import shutil
import subprocess
from pathlib import Path

import pytest
from first_minutes import ROOT, build_wheel, play
from project import Project

pytestmark = pytest.mark.peers


def pythons() -> list[str]:
    """The Pythons from 3.11 on: on the PATH, and those of pyenv."""
    found = {}
    for minor in range(11, 15):
        name = f"python3.{minor}"
        for path in [
            shutil.which(name),
            *sorted(glob.glob(str(Path.home() / ".pyenv" / "versions" / "*" / "bin" / name))),
        ]:
            if path and not subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode:
                found[name] = path
    return list(found.values())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("python", pythons(), ids=lambda path: Path(path).name)
def test_a_new_user_gets_along(python: str, tmp_path: Path) -> None:
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True)
    programs = tmp_path / "venv" / "bin"
    wheel = build_wheel(tmp_path, str(programs / "python"))
    pip = [str(programs / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), f"castore[all] @ {wheel.as_uri()}"], check=True)
    folder = tmp_path / "project"
    folder.mkdir()
    play([str(programs / "castore")], str(programs / "python"), folder, Project.environment_of_tests())
