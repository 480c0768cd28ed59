"""Independent programs to test against: `make test-peers` installs them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from actions_service import Service
from azurite import Azurite

CLIENT = Path(__file__).with_name("client.mjs")
MODULES = Path(__file__).parents[2] / "build" / "peers" / "node_modules"


@dataclass(frozen=True)
class Outcome:
    """What a call of the official client gave, and what it said. It reports most failures by words alone."""

    result: Any
    said: str


class Official:
    """The official client, npm's @actions/cache, in a job on a runner of its own with an empty ``workspace``."""

    def __init__(self, modules: Path, root: Path, environment: dict[str, str]) -> None:
        self._modules = modules
        self.workspace = root / "workspace"
        temporary = root / "temporary"
        self.workspace.mkdir(parents=True)
        temporary.mkdir()
        self._environment = {
            name: value
            for name, value in os.environ.items()
            # GITHUB_SERVER_URL and proxies of the machine that runs the tests would lead it elsewhere
            if not name.startswith(("ACTIONS_", "GITHUB_", "RUNNER_")) and not name.lower().endswith("_proxy")
        }
        self._environment |= environment
        self._environment |= {"RUNNER_TEMP": str(temporary), "GITHUB_WORKSPACE": str(self.workspace)}

    def save(self, key: str, folder: str) -> Outcome:
        """Save a folder of the workspace. The result is the number of the entry, or -1."""
        return self._call("save", key, folder)

    def restore(self, key: str, folder: str, restore_keys: Sequence[str] = ()) -> Outcome:
        """Restore a folder into the workspace. The result is the key that was found, or None."""
        return self._call("restore", key, folder, *restore_keys)

    def download(self, url: str) -> bytes:
        """What is behind a signed URL, read in ranges as it does from blobs of Azure."""
        file = self.workspace / "download"
        self._call("download", url, str(file))
        return file.read_bytes()

    def _call(self, *arguments: str) -> Outcome:
        process = subprocess.run(
            ["node", str(CLIENT), str(self._modules), *arguments],
            cwd=self.workspace,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        said, _, result = process.stdout.rstrip().rpartition("\n")
        return Outcome(json.loads(result), said)


@pytest.fixture(scope="session")
def modules() -> Path:
    """Where the packages of npm are."""
    if not MODULES.is_dir():
        pytest.fail("the programs to test against are not installed: run `make test-peers`")
    return MODULES


@pytest.fixture
def official(modules: Path, tmp_path: Path) -> Callable[[dict[str, str]], Official]:
    """Makes official clients, each on a runner of its own, from the variables of a job."""
    clients: list[Official] = []

    def make(environment: dict[str, str]) -> Official:
        clients.append(Official(modules, tmp_path / f"runner-{len(clients)}", environment))
        return clients[-1]

    return make


@pytest.fixture
def service() -> Iterator[Service]:
    """The stand-in with blobs of its own."""
    with Service() as service:
        yield service


@pytest.fixture(scope="session")
def azurite(modules: Path) -> Iterator[Azurite]:
    azurite = Azurite(modules)
    yield azurite
    azurite.close()


@pytest.fixture
def azurite_service(azurite: Azurite) -> Iterator[Service]:
    """The stand-in's calls, with blobs in Azurite."""
    with Service(blobs=azurite) as service:
        yield service


@pytest.fixture(params=["service", "azurite_service"])
def any_service(request: pytest.FixtureRequest) -> Service:
    """One, then the other."""
    service: Service = request.getfixturevalue(request.param)
    return service
