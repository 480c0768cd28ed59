"""Write docs/cli.md: the help of every command, as the program prints it.

python docs/generate.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

PAGE = Path(__file__).with_name("cli.md")


def page() -> str:
    """Return the page."""
    os.environ["COLUMNS"] = "100"
    from castore.__main__ import app

    sections = [_section(path, context) for path, context in _walk(typer.main.get_command(app), "castore", None)]
    return "# Commands\n\nWhat `--help` prints, made by `python docs/generate.py`.\n\n" + "\n".join(sections)


def _walk(command: Any, name: str, parent: Any) -> Iterator[tuple[str, Any]]:
    context = command.make_context(name, [], parent=parent, resilient_parsing=True, max_content_width=100)
    context.terminal_width = 100
    yield context.command_path, context
    for child in getattr(command, "commands", {}).values():
        if not child.hidden:
            yield from _walk(child, child.name or "", context)


def _section(path: str, context: Any) -> str:
    return f"## {path}\n\n```text\n{context.get_help().rstrip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
