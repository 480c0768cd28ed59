"""What a session in Python or a notebook shows of a repository."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import torch
from builders import parts

from castore import Repo
from castore.torch import Checkpointer

EVIL = "<script>alert(1)</script>\x1b[2J"


class Page(HTMLParser):
    """The text of each cell, and every tag and attribute that the page has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.names: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(name for name, _ in attrs)}
        self.cells += [""] if tag in ("td", "th") else []

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def test_reprs_tell_what_it_is(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    assert repr(repo.resolve("best")) == "<Resolution best: no match; 0 rejected>"
    saved = repo.save(parts(1), run="ci", step=5000, metrics={"acc": 0.25, "val_loss": 2.5})
    line = f"{saved.id[:12]}: step 5,000 of run ci, acc 0.25, val_loss 2.5"
    assert repr(repo) == f"<Repo {tmp_path}/.castore>"
    assert repr(repo.find("latest")) == f"<Entry {line}>"
    assert repr(saved).startswith(f"<SaveResult {line}, ")
    assert repr(saved).endswith(" kB new>")
    found = repr(repo.resolve("best"))
    assert found == f"<Resolution best: {saved.id[:12]}, step 5,000 of run ci, score 0.2857, full; 0 rejected>"
    with Checkpointer(repo, torch.nn.Linear(2, 1), run="mine", background=False) as checkpointer:
        assert repr(checkpointer) == f"<Checkpointer of Linear in {tmp_path}/.castore, run mine: nothing saved yet>"
        checkpointer.save(7, {"val_loss": 1.0})
        assert repr(checkpointer).endswith("run mine: last saved at step 7>")


def test_no_repr_passes_on_what_a_terminal_obeys(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    saved = repo.save({"model": {}}, run="r", step=1, metrics={"\x1b[2J": 1.0})
    assert all(repr(one).isprintable() for one in (saved, repo.find("latest"), repo.resolve("best")))


def test_checkpoints_are_chosen_by_run_and_tag(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    saved = [repo.save({"model": {"i": i}}, run="ab"[i % 2], step=i, tags=["x"] * (i == 1)).id for i in range(4)]
    repo.catalog.add_tag("best-so-far", saved[2])
    assert [one.id for one in repo.checkpoints(run="a")] == [saved[2], saved[0]]
    assert [one.id for one in repo.checkpoints(tag="x")] == [saved[1]]
    assert [one.id for one in repo.checkpoints(tag="best-so-far")] == [saved[2]]
    assert not repo.checkpoints(run="b", tag="best-so-far")


def test_a_notebook_shows_a_table_and_a_curve_and_runs_nothing(tmp_path: Path) -> None:
    repo = Repo.init(tmp_path)
    assert repo._repr_html_() == "<p>no checkpoint</p>"
    for i in range(25):
        repo.save({"model": {"i": i}}, run="ci", step=i * 1000, metrics={"val_loss": 4 - i / 10}, tags=[EVIL])
    html = repo._repr_html_()
    page = Page(html)
    assert page.cells[:8] == ["id", "run", "step", "score", "val loss", "size", "created", "tags"]
    assert page.cells[9:13] == ["ci", "24,000", "0.3846", "1.6000"]
    assert page.cells[-1].endswith("and 5 older")
    assert len(page.cells) == 8 * 21
    assert "polyline" in page.names
    assert "script" not in page.names
    assert "\x1b" not in html
    assert repo.checkpoints(run="nobody")._repr_html_() == "<p>no checkpoint</p>"
