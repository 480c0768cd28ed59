"""The examples in docstrings: they run, and every public name has one."""

from __future__ import annotations

import difflib
import doctest
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import castore

PACKAGE = Path(castore.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]

# Public names whose example is still to be written: remove a name here together with writing its example.
WITHOUT_EXAMPLE: set[str] = set()


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_names() -> dict[str, object]:
    """The classes and functions of castore.__all__ and those of castore.torch and castore.dcp."""
    public = {name: getattr(castore, name) for name in castore.__all__ if name != "__version__"}
    for face in map(importlib.import_module, ("castore.torch", "castore.dcp")):
        public |= {f"{face.__name__}.{name}": getattr(face, name) for name in face.__all__}
    return {name: value for name, value in public.items() if not isinstance(value, ModuleType)}


def has_example(value: object) -> bool:
    """Whether the value's docstring, or that of one of its methods, holds an example."""
    found = doctest.DocTestFinder(exclude_empty=True).find(value, "public", module=inspect.getmodule(value))
    return any(test.examples for test in found)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_examples_of_a_module_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module's examples start in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name_of(path))
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0
    assert results.failed == 0, "the failure is in the captured output"


def test_every_public_name_has_an_example() -> None:
    assert {name for name, value in public_names().items() if not has_example(value)} == WITHOUT_EXAMPLE


FRAMEWORKS = Path(__file__).parents[1] / "examples" / "frameworks"


def changed(name: str) -> list[str]:
    """What castore changes in a script, but for its docstring."""
    before, after = (
        path.read_text(encoding="utf-8").split('"""', 2)[2].splitlines()
        for path in (FRAMEWORKS / "before" / f"{name}.py", FRAMEWORKS / f"{name}.py")
    )
    lines = [line for line in difflib.ndiff(before, after) if line[:2] in ("+ ", "- ") and line[2:].strip()]
    unchanged = {line[2:].strip() for line in lines if line[0] == "-"} & {
        line[2:].strip() for line in lines if line[0] == "+"
    }
    return [
        f"{line[0]}{line[2:]}" for line in lines if line[2:].strip() not in unchanged
    ]  # those of another indentation


@pytest.mark.parametrize(
    ("name", "most"), [("plain_loop", 6), ("transformers_trainer", 3), ("lightning_module", 3), ("accelerate_loop", 4)]
)
def test_a_script_changes_by_few_lines_which_the_docs_show(name: str, most: int) -> None:
    lines = changed(name)
    assert 0 < sum(line[0] == "+" for line in lines) <= most
    docs = (FRAMEWORKS.parents[1] / "docs" / "frameworks.md").read_text(encoding="utf-8").splitlines()
    assert set(lines) <= set(docs)
    assert len((FRAMEWORKS / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80


def test_the_plain_loop_goes_on_after_a_kill(tmp_path: Path) -> None:
    start = [sys.executable, str(FRAMEWORKS / "plain_loop.py")]
    kill = "import plain_loop, os; plain_loop.train(after_step=lambda step: step == 37 and os.kill(os.getpid(), 9))"
    environment = os.environ | {"PYTHONPATH": str(FRAMEWORKS)}
    killed = subprocess.run([sys.executable, "-c", kill], cwd=tmp_path, env=environment, capture_output=True)
    assert killed.returncode == -9
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "castore: run main at step 30 from " in done.stderr or "castore: run main at step 20 from " in done.stderr
    other = tmp_path / "never stopped"
    other.mkdir()
    subprocess.run(start, cwd=other, capture_output=True, check=True)
    parts = [castore.Repo.open(root).find("latest").manifest.parts for root in (tmp_path, other)]
    assert (parts[0]["model"], parts[0]["optimizer"]) == (parts[1]["model"], parts[1]["optimizer"])


def test_a_failing_example_is_noticed() -> None:
    module = ModuleType("made")
    module.__doc__ = ">>> 1 + 1\n3\n"
    assert doctest.testmod(module, report=False).failed == 1
