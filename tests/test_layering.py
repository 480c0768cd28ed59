from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import castore

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("castore/**/*.py"), *ROOT.glob("nanecho/**/*.py"), *ROOT.glob("cli*.py")])

# From the bottom up: a module imports from the rows above its own, never from its own row or one below.
LAYERS = [
    ["errors", "ids"],
    ["fs", "git", "words", "paths", "curves", "chunking", "codecs", "manifest"],
    ["objects", "quality"],
    ["index", "resolve", "retention", "store", "bundle", "lineage"],
    ["catalog"],
    ["config", "remotes"],
    ["checkpoint"],
    ["torch"],
    ["repo"],
    ["gc", "verify", "diff", "files", "interchange", "transfer"],
    ["stats", "ci"],
    ["doctor", "report"],
    ["checkout", "report_page"],
    ["__init__"],
]
# the only module of castore that imports a package, as what it wraps may be replaced or missing
OWNERS = {
    "blake3": "ids",
    "msgpack": "index",
    "zstandard": "codecs",
    "torch": "torch",
    "subprocess": "git",
    "safetensors": "interchange",
    "fastcdc": "files",
    "urllib3": "remotes.actions",
    "plotext": "curves",
    "matplotlib": "curves",
}
HEAVY = {"torch", "numpy"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module or module.name, whether it is imported as soon as the file is) of every import that runs."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name} has a relative import"
                yield from ((f"{child.module}.{alias.name}", at_import) for alias in child.names)
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, at_import and not is_function)

    return walk(ast.parse(path.read_text()), True)


def within(imported: str, package: str) -> bool:
    return imported == package or imported.startswith(package + ".")


def place_of(imported: str) -> str:
    """What LAYERS calls the module of castore that is imported or imported from: a folder is one place."""
    for part in imported.split(".")[1:2]:
        if (ROOT / "castore" / part).is_dir() or (ROOT / "castore" / f"{part}.py").exists():
            return part
    return "__init__"


def layer_of(module: str) -> int:
    (found,) = [i for i, row in enumerate(LAYERS) if module in row]
    return found


CASTORE = [path for path in MODULES if path.is_relative_to(ROOT / "castore")]


def test_every_module_of_castore_has_its_place() -> None:
    assert {place_of(name_of(path)) for path in CASTORE} == {module for row in LAYERS for module in row}


@pytest.mark.parametrize("path", CASTORE, ids=name_of)
def test_imports_inside_castore_point_down(path: Path) -> None:
    own = place_of(name_of(path))
    for imported, _ in imports(path):
        if within(imported, "castore") and not within(imported, f"castore.{own}"):
            other = place_of(imported)
            assert layer_of(other) < layer_of(own), f"{own} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_lower_package_knows_nothing_of_a_higher_one(path: Path) -> None:
    above = {"castore": ["nanecho", "cli", "typer", "rich"], "nanecho": ["cli", "typer", "rich"]}
    package = name_of(path).split(".")[0]
    assert [one for one, _ in imports(path) for other in above.get(package, []) if within(one, other)] == []


@pytest.mark.parametrize("path", CASTORE, ids=name_of)
def test_what_is_wrapped_is_imported_by_its_wrapper_alone(path: Path) -> None:
    own = name_of(path).removeprefix("castore.")
    for imported, _ in imports(path):
        owner = OWNERS.get(imported.split(".")[0], own)
        assert owner == own, f"{own} imports {imported}, which is {owner}'s"


@pytest.mark.parametrize("path", [path for path in MODULES if "nanecho" in path.parts], ids=name_of)
def test_nanecho_uses_public_names_of_castore_only(path: Path) -> None:
    public = {f"castore.{name}" for name in castore.__all__}
    for imported, _ in imports(path):
        if within(imported, "castore"):
            parent = imported.rpartition(".")[0]
            allowed = imported == "castore" or imported in public or "castore.torch" in (imported, parent)
            assert allowed or parent == "castore.errors", f"{imported} is not public"


# loaded by those alone who train or hold tensors
LIGHT = [path for path in MODULES if "nanecho" not in path.parts and name_of(path) != "castore.torch"]


@pytest.mark.parametrize("path", LIGHT, ids=name_of)
def test_torch_and_numpy_are_imported_where_they_are_used(path: Path) -> None:
    assert [one for one, at_import in imports(path) if at_import and one.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize("module", ["castore", "castore.checkpoint", "cli"])
def test_importing_loads_neither_torch_nor_numpy(module: str) -> None:
    script = f"import sys, {module}; print(sorted({{'torch', 'numpy', 'zstandard'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_the_public_names_exist_and_are_few() -> None:
    assert all(hasattr(castore, name) for name in castore.__all__)
    assert len(castore.__all__) <= 16
