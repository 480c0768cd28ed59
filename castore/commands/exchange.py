"""What moves weights and files in and out: `castore export`, `import`, `add` and `checkout`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import castore
from castore import errors
from castore.commands import completion
from castore.commands.console import (
    Display,
    JsonOption,
    NoteOption,
    Selector,
    TagsOption,
    check_one_line,
    fields_of,
    plural,
    print_json,
    say,
)
from castore.text import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from castore.format.manifest import Entry
    from castore.trees.add import Added
    from castore.trees.checkout import CheckedOut

app = typer.Typer()

# -- weights ---------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore export best model.safetensors")
def export(
    selector: Selector,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A new file: .safetensors, or .pt for torch.load; or a new folder."),
    ],
    part: Annotated[str, typer.Option(help="Which part of the checkpoint.")] = "model",
    layout: Annotated[
        Literal["file", "transformers"],
        typer.Option("--format", help="transformers: a folder for from_pretrained of Hugging Face."),
    ] = "file",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint's weights to a file for other programs."""
    from castore import convert

    repo = castore.Repo.open()
    if force and layout == "transformers":
        raise errors.UsageError("--force replaces a file, never a folder: name a new folder, or delete this one")
    with Display("exporting", "spinner"):
        if layout == "transformers":
            exported = convert.export_folder(repo, selector, out, part=part)
        else:
            exported = convert.export(repo, selector, out, part=part, force=force)
    if as_json:
        print_json({**dataclasses.asdict(exported), "path": str(exported.path)})
    else:
        size = format_size(exported.bytes)
        say(f"wrote {exported.path}: {exported.tensors} tensors, {size}, of checkpoint {exported.id[:12]}")


@app.command("import", epilog="Example: castore import model.safetensors --run imported --metric val_loss=2.3")
def import_file(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .safetensors file, or a .pt or .pth of weights only.")
    ],
    run: Annotated[str | None, typer.Option(help="Run of the new checkpoint.", show_default="imported")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Training steps behind it.", show_default="0")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A metric of it; may be repeated.")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Take experiment, settings, run and step from this checkpoint.", show_default=False
        ),
    ] = None,
    tag: TagsOption = None,
    note: NoteOption = "",
    as_json: JsonOption = False,
) -> None:
    """Store the tensors of a file as a new checkpoint. No code in the file is run.

    --like claims that the two are comparable and that either can be resumed in place of the other: use it only if that
    is true.
    """
    from castore import convert

    repo = castore.Repo.open()
    metrics = dict(_parse_metric(text) for text in metric or ())
    check_one_line(note, *(tag or ()))
    with Display("importing", "spinner"):
        saved = convert.import_file(
            repo, file, run=run, step=step, metrics=metrics, like=like, tags=tag or (), note=note
        )
    if as_json:
        print_json({"id": saved.id, "path": str(saved.path), "new_bytes": saved.new_bytes})
    else:
        manifest = saved.manifest
        say(f"saved {saved.id}: step {manifest.step:,} of run {manifest.run}, {format_size(saved.new_bytes)} new")


@app.command(epilog="Example: castore average best:5 -o soup")
def average(
    which: Annotated[
        list[str],
        typer.Argument(
            metavar="WHICH...",
            help="best:5 or main:latest:3, or two ids and more.",
            autocompletion=completion.checkpoints,
        ),
    ],
    run: Annotated[str, typer.Option("-o", "--run", metavar="RUN", help="Run that the mean is saved in.")],
    decay: Annotated[
        float | None,
        typer.Option("--ema", metavar="DECAY", help="Moving average by step, not a plain mean.", show_default=False),
    ] = None,
    note: NoteOption = "",
    as_json: JsonOption = False,
) -> None:
    """Save the mean of several checkpoints' weights as a checkpoint.

    It has no optimizer, and no score until it is evaluated: `castore train --evaluate ID` does that for nanecho.
    """
    from castore import averaging

    repo = castore.Repo.open()
    check_one_line(note)
    with Display("averaging", "spinner"):
        averaged = averaging.average(repo, _entries(repo, which), run=run, decay=decay, note=note)
    saved = averaged.saved
    if as_json:
        of = {entry.id: share for entry, share in zip(averaged.of, averaged.shares, strict=True)}
        print_json({"id": saved.id, "path": str(saved.path), "of": of, "new_bytes": saved.new_bytes})
        return
    for entry, share in zip(averaged.of, averaged.shares, strict=True):
        say(f"{share:6.1%}  {entry.id[:12]}  step {entry.manifest.step:,} of run {entry.manifest.run}")
    say(f"saved   {saved.id[:12]}, their mean, in run {run}: {format_size(saved.new_bytes)} new")


def _entries(repo: castore.Repo, which: Sequence[str]) -> list[Entry]:
    """Return the checkpoints that ``best:5``, or several selectors, ask for."""
    from castore import averaging

    if len(which) > 1:
        return [repo.find(one, kind="checkpoint") for one in which]
    selector, _, count = which[0].rpartition(":")
    if not selector or not count.isdecimal() or selector.rpartition(":")[2] not in ("best", "latest"):
        raise errors.UsageError(f"{which[0]} is one checkpoint: give two, or best:5 or latest:5")
    return averaging.choose(repo, selector, int(count))


def _parse_metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        if name:
            return name, float(value)
    except ValueError:
        pass
    raise errors.UsageError(f"--metric {text} is not NAME=VALUE, such as val_loss=2.3")


# -- files -----------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: castore add data/books --name books")
def add(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file, or a folder with everything in it.")],
    name: Annotated[
        str | None, typer.Option(help="Name to list it under.", show_default="the last part of the path")
    ] = None,
    tag: TagsOption = None,
    note: NoteOption = "",
    as_json: JsonOption = False,
) -> None:
    """Store any file or folder.

    Data that is in the store already takes no space: an edit costs a chunk or two. Names, permissions, links and empty
    folders are kept. Folders called .git and .castore are skipped.
    """
    from castore.trees.add import add_tree

    repo = castore.Repo.open()
    check_one_line(note, *(tag or ()))
    with Display("add", "bytes") as display:
        added = add_tree(repo, path, name=name, tags=tag or (), note=note, progress=display)
    if as_json:
        shown = {key: value for key, value in fields_of(added).items() if key != "manifest"}
        print_json({**shown, "path": str(added.path), "name": added.manifest.run})
        return
    say(*(f"skipped {skipped}, which is never checked out" for skipped in added.skipped))
    size = format_size(added.new_bytes)
    say(f"added   {added.id[:12]}, {added.manifest.run}: {_describe_tree(added)}, {size} new")


@app.command(epilog="Example: castore checkout books:latest data")
def checkout(
    selector: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="First digits of the id of what was added, or latest, or NAME:latest.",
            autocompletion=completion.files,
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to put it.", show_default="here")] = Path(),
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite and delete even what no added version holds.")
    ] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what this version lacks from its folders.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write added files back, every byte verified.

    Files that are the same already are left alone; those of another version are replaced. What no added version holds,
    such as an edit, is only overwritten or deleted with --force.
    """
    from castore.trees.checkout import check_out

    repo = castore.Repo.open()
    with Display("checkout", "bytes") as display:
        written = check_out(repo, selector, folder, force=force, delete=delete, progress=display)
    if as_json:
        print_json({**fields_of(written), "paths": [str(path) for path in written.paths]})
    else:
        say(*_describe_checkout(written))


def _describe_checkout(written: CheckedOut) -> Iterator[str]:
    paths = ", ".join(map(str, written.paths)) or "nothing, as the tree is empty"
    whole = f"{paths}: {_describe_tree(written)}, of {written.id[:12]}"
    yield from _list_paths("overwrote", "which no version holds", set(written.overwritten) & set(written.lost))
    yield from _list_paths("deleted", "which no version holds", set(written.deleted) & set(written.lost))
    yield from _list_paths("deleted", "which another version holds", set(written.deleted) - set(written.lost))
    if written.paths and not written.written:
        yield f"same    {whole}"
    elif written.written == written.files + written.links:
        yield f"wrote   {whole}"
    else:
        yield f"wrote   {plural(written.written, 'file')} that differed, in {whole}"


def _list_paths(verb: str, which: str, paths: Iterable[str]) -> Iterator[str]:
    listed = sorted(paths)
    yield from (f"{verb} {path}, {which}" for path in listed[:20])
    if len(listed) > 20:
        yield f"{verb} {len(listed) - 20:,} more"


def _describe_tree(tree: Added | CheckedOut) -> str:
    counts = {"file": tree.files, "folder": tree.folders, "link": tree.links}
    return ", ".join([*(plural(count, noun) for noun, count in counts.items() if count), format_size(tree.bytes)])
