"""The layers of the code, read from its imports: what is lower knows nothing of what is above it."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import castore

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("castore/**/*.py"), *ROOT.glob("nanecho/**/*.py"), ROOT / "cli.py"])

# From the bottom up. A file imports from its own folder and from the rows above its own; files that stand in a row side
# by side may import each other where both are in one folder, or in one group of this table. Typing-only imports count.
LAYERS = [
    ["castore.errors"],
    ["castore.format", "castore.config", "castore.text", "castore.parallel", "castore.progress",
     "castore.stopping"],
    ["castore.policy"],
    ["castore.storage"],
    ["castore.remotes"],
    ["castore.state"],
    ["castore.transfer", "castore.notebook"],
    ["castore.repo"],
    ["castore.ranks"],
    ["castore.sharding"],
    ["castore.pushing"],
    ["castore.background", "castore.restoring", "castore.dcp_storage"],
    ["castore.weights"],
    ["castore.torch", "castore.dcp"],
    ["castore.gc", "castore.verify", "castore.diff", "castore.stats", "castore.doctor", "castore.convert",
     "castore.averaging"],
    ["castore.remote_gc", "castore.remote_verify", "castore.signatures"],
    ["castore.report", "castore.github", "castore.trees", "castore.integrations"],
    ["castore"],  # the public names, which load the rest on first use
    ["castore.commands"],
    ["nanecho"],
    ["nanecho.commands"],
    ["castore.__main__"],
    ["cli", "nanecho.__main__"],
]  # fmt: skip
# the only modules that import a package: what it wraps may be replaced or missing
OWNERS = {
    "blake3": ["castore.format.ids"],
    "msgpack": ["castore.format.part_index"],
    "zstandard": ["castore.format.codecs"],
    "subprocess": ["castore.storage.git_process"],
    "safetensors": ["castore.convert"],
    "pyfastcdc": ["castore.trees.add"],
    "obstore": ["castore.remotes.bucket"],
    "tomlkit": ["castore.commands.remotes"],
    "urllib3": ["castore.remotes.github_service"],
    "plotext": ["castore.report.curves"],
    "matplotlib": ["castore.report.curves"],
    "transformers": ["castore.integrations.transformers"],
    "lightning": ["castore.integrations.lightning"],
    "accelerate": ["castore.integrations.accelerate"],
    "torch": [
        "castore.torch",
        "castore.background",
        "castore.restoring",
        "castore.weights",
        "castore.averaging",
        "castore.ranks",
        "castore.dcp",
        "castore.dcp_storage",
        "castore.state.tensors",
        "castore.state.shards",
        "castore.state.objects",
        "castore.integrations",
    ],
    "typer": ["castore.commands", "castore.__main__", "nanecho.commands"],
    "rich": ["castore.commands.console", "nanecho.commands"],
}
# what nanecho may import beside castore's public names, in its commands alone
COMMANDS_USE = ("castore.commands.console", "castore.report.curves")
DOORS = {"cli", "nanecho.__main__"}  # the program, from a checkout and for torchrun
HEAVY = {"torch", "numpy"}
HOLDS_TENSORS = {
    "castore.torch", "castore.background", "castore.restoring", "castore.weights", "castore.ranks", "castore.dcp",
    "castore.dcp_storage", "castore.state.tensors", "castore.state.shards", "castore.integrations.transformers",
    "castore.integrations.accelerate", "castore.averaging",
    "castore.integrations.lightning",
}  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def imports(path: Path, *, typing_only: bool = True) -> Iterator[tuple[str, bool]]:
    """(module or module.name, whether it is imported as soon as the file is) of every import."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                if typing_only:
                    yield from walk(child, False)
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


def module_of(imported: str) -> str | None:
    """The file of this repository that an import leads to: of ``castore.gc.collect`` it is ``castore.gc``."""
    while imported:
        if imported in NAMES:
            return imported
        imported = imported.rpartition(".")[0]
    return None


def group_of(module: str) -> str:
    """The longest name in LAYERS that the module lies in."""
    return max((name for row in LAYERS for name in row if within(module, name)), key=len)


def layer_of(module: str) -> int:
    (found,) = [number for number, row in enumerate(LAYERS) if group_of(module) in row]
    return found


CASTORE = [path for path in MODULES if path.is_relative_to(ROOT / "castore")]
PACKAGE_DOORS = {name for name, path in NAMES.items() if path.name == "__init__.py"}


def test_every_group_of_the_layers_exists() -> None:
    assert {name for row in LAYERS for name in row} <= set(NAMES)


def test_every_file_of_castore_has_its_place() -> None:
    """Nothing falls to the public names' own row by being forgotten in LAYERS."""
    assert [name for name in map(name_of, CASTORE) if group_of(name) == "castore" and name != "castore"] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own = name_of(path)
    for imported, _ in imports(path):
        other = module_of(imported)
        if other is None or group_of(other) == group_of(own):
            continue
        assert layer_of(other) < layer_of(own) or _are_siblings(own, other), f"{own} imports {other}"


def _are_siblings(own: str, other: str) -> bool:
    """Whether both are in one row: what they may do to each other, the test of circles tells."""
    return layer_of(own) == layer_of(other)


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {}
    for name, path in NAMES.items():
        found = {module_of(imported) for imported, _ in imports(path)} - {None, name}
        # `from castore.format import ids` goes through the door of a folder, which imports nothing itself
        graph[name] = found - (PACKAGE_DOORS if name != "castore" else set())
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_the_doors_of_folders_import_nothing() -> None:
    doors = {name: tuple(imports(NAMES[name])) for name in PACKAGE_DOORS - {"castore", "nanecho"}}
    assert {name: found for name, found in doors.items() if found} == {}


NANECHO = [path for path in MODULES if "nanecho" in path.parts and name_of(path) not in DOORS]


@pytest.mark.parametrize("path", NANECHO, ids=name_of)
def test_nanecho_uses_public_names_of_castore_only(path: Path) -> None:
    public = {f"castore.{name}" for name in castore.__all__}
    further = COMMANDS_USE if name_of(path) == "nanecho.commands" else ()
    for imported, _ in imports(path):
        if within(imported, "castore") and not any(within(imported, module) for module in further):
            parent = imported.rpartition(".")[0]
            for_torch = {"castore.torch", "castore.dcp"} & {imported, parent}
            allowed = imported == "castore" or imported in public or for_torch
            assert allowed or parent in ("castore.errors", "castore.text", "castore.stopping"), (
                f"{imported} is not public"
            )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_wrapped_is_imported_by_its_wrapper_alone(path: Path) -> None:
    own = name_of(path)
    for imported, _ in imports(path, typing_only=False):
        package = imported.split(".")[0]
        if path in CASTORE or package in ("typer", "rich"):
            owners = OWNERS.get(package, [own])
            assert any(within(own, owner) for owner in owners), f"{own} imports {imported}, which is for {owners}"


def test_nothing_imports_the_program_but_its_doors() -> None:
    tops = {"castore.__main__", *DOORS}
    importers = {
        (name, module_of(imported)) for name, path in NAMES.items() for imported, _ in imports(path)
        if module_of(imported) in tops
    }  # fmt: skip
    assert importers == {(door, "castore.__main__") for door in DOORS}


# loaded by those alone who train or hold tensors
LIGHT = [
    path for name, path in NAMES.items()
    if name not in HOLDS_TENSORS and (not within(name, "nanecho") or name == "nanecho.commands")
]  # fmt: skip


@pytest.mark.parametrize("path", LIGHT, ids=name_of)
def test_torch_and_numpy_are_imported_where_they_are_used(path: Path) -> None:
    assert [one for one, at_import in imports(path) if at_import and one.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize("module", ["castore", "castore.state.parts", "castore.__main__", "cli"])
def test_importing_loads_neither_torch_nor_numpy(module: str) -> None:
    heavy = {"torch", "numpy", "zstandard", "rich"}
    script = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_the_public_names_exist_and_are_few() -> None:
    assert all(hasattr(castore, name) for name in castore.__all__)
    assert len(castore.__all__) <= 16
