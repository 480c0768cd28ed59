"""The examples in docstrings: they run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
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


def test_a_failing_example_is_noticed() -> None:
    module = ModuleType("made")
    module.__doc__ = ">>> 1 + 1\n3\n"
    assert doctest.testmod(module, report=False).failed == 1
