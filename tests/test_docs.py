"""The pages in docs/: what their blocks of console and Python say is what happens.

A block ``console`` has commands after ``$``, each with lines that are printed, in this order: of ids, numbers and
spaces the form alone counts, and ``...`` stands for any lines. A block ``python`` with a title is a file of that name,
one without is run. The blocks of a page share a folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from project import PROGRAM, Project

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r'^```(console|python)(?: title="([\w.]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PAGES = [path.name for path in sorted(DOCS.glob("*.md")) if BLOCK.search(path.read_text(encoding="utf-8"))]


def form(line: str) -> str:
    """What of a line does not change from run to run."""
    line = re.sub(r"/\S*/(?=\.castore)", "/", line)
    line = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b|\b[a-f]{12}\b", "ID", line)
    line = re.sub(r"\d[\d,.:TZ-]*", "N", line)
    return " ".join(re.sub(r"\bN [kMG]?B\b", "N B", line).split())


def missing(expected: list[str], printed: list[str]) -> list[str]:
    """The expected lines that are not there in this order."""
    rest = iter([form(line) for line in printed])
    return [line for line in expected if line != "..." and form(line) not in rest]


def commands(block: str) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_happens(page: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    programs = f"{Path(PROGRAM).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    identity = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = Project.environment_of_tests() | identity | {"PATH": programs, "COLUMNS": "160"}
    for kind, title, block in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        if title:
            (folder / title).write_text(block)
            continue
        if kind == "python":
            subprocess.run([sys.executable, "-c", block], cwd=folder, env=environment, check=True)
            continue
        for command, expected in commands(block):
            done = subprocess.run(
                ["bash", "-ec", command],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}"
            assert missing(expected, done.stdout.splitlines()) == [], f"{command}\n{done.stdout}"


def test_a_page_that_is_wrong_is_noticed() -> None:
    assert missing(["added   abcdef012345, 2 files", "..."], ["x", "added ffffffffffff, 3 files"]) == []
    assert missing(["a", "b"], ["b", "a"]) == ["b"]
    assert missing(["wrote x"], ["wrote y"]) == ["wrote x"]


def test_the_page_of_commands_says_what_help_says(tmp_path: Path) -> None:
    code = f"import runpy; print(runpy.run_path({str(DOCS / 'generate.py')!r})['page'](), end='')"
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert made == (DOCS / "cli.md").read_text(encoding="utf-8"), "run: python docs/generate.py"
    assert made.count("Example: castore") >= made.count("\n## ") - 4  # groups of commands have none


def test_every_command_is_in_the_readme_and_every_page_in_the_index() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    groups = re.findall(r"^\| `castore (\S.*?) \|", readme, re.MULTILINE)
    words = set(re.findall(r"[a-z]+", " ".join(groups)))
    commands_ = re.findall(r"^## castore (\w+)$", (DOCS / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(commands_) - words <= {"init", "train"}  # which have sections
    site = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert {path.name for path in DOCS.glob("*.md")} == set(re.findall(r"[\w-]+\.md", site.partition("nav:")[2]))


def test_links_between_pages_lead_somewhere() -> None:
    for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md", *DOCS.parent.glob("[A-Z]*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            assert "://" in target or target.startswith("mailto:") or (path.parent / target).exists(), (path, target)


def test_the_tests_that_pages_name_exist() -> None:
    named = 0
    for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for arguments in re.findall(r"`pytest ([^`]+)`", path.read_text(encoding="utf-8")):
            files, _, word = arguments.partition(" -k ")
            texts = [(DOCS.parent / file).read_text(encoding="utf-8") for file in files.split()]
            assert all(re.search(rf"^def test_\w*{word}", text, re.MULTILINE) for text in texts), arguments
            named += 1
    assert named > 20
