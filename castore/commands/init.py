"""`castore init`: make a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import castore
from castore.commands.console import JsonOption, print_json, say

app = typer.Typer()


@app.command(epilog="Example: castore init && git add .castore")
def init(
    path: Annotated[Path, typer.Argument(help="Where the project lives.", show_default="here")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Create .castore/ with its settings.

    An existing one keeps its settings and its data.
    """
    repo = castore.Repo.init(path)
    if as_json:
        print_json({"root": str(repo.root)})
    else:
        say(f"{repo.root} is ready: commit it. It holds settings and, later, manifests; git ignores the data.")
