from __future__ import annotations

import importlib.resources
import json
import os
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import builders
import msgspec
import pytest
import report_data
from hypothesis import given
from hypothesis import strategies as st
from project import Project

import castore
from castore import Repo, errors, stats
from castore.format.ids import ObjectId
from castore.report import html
from castore.report.collect import (
    SessionRecord,
    ancestors,
    as_json,
    as_markdown,
    collect_report,
    compare_environments,
    lanes,
)

NOW = datetime(2026, 3, 9, tzinfo=UTC)


@pytest.fixture
def told(repo: Repo) -> Repo:
    report_data.build(repo)
    return repo


# -- collecting --------------------------------------------------------------------------------------------------------


def test_every_checkpoint_is_there_with_its_score_and_where_its_data_is(told: Repo) -> None:
    found = collect_report(told, NOW)
    entries = told.checkpoints()
    assert [one.entry for one in found.checkpoints] == entries
    assert [one.score for one in found.checkpoints] == [castore.score(entry.manifest) for entry in entries]
    counts = stats.stats(told, NOW)
    for state in ("full", "weights-only", "history"):
        assert sum(one.availability == state for one in found.checkpoints) == counts.availability[state] > 0
    assert found.store == counts
    assert found.broken == ()


def test_best_and_next_are_what_resolve_says(told: Repo) -> None:
    found = collect_report(told, NOW)
    match = told.resolve("best", weights_only=True).require()
    assert found.resolution.match == match
    assert found.best == match.id
    assert len(found.experiments) == 2
    best_of_experiments = {one.entry.id for one in found.checkpoints if one.best_of_experiment}
    small = [entry for entry in told.checkpoints() if entry.manifest.run == "small"]
    assert best_of_experiments == {match.id, min(small, key=lambda entry: entry.manifest.metrics["val_loss"]).id}


def test_the_best_path_is_the_ancestry_of_the_best(told: Repo) -> None:
    found = collect_report(told, NOW)
    path = [one for one in found.checkpoints if one.on_best_path]
    assert path[0].entry.id == found.best
    assert [one.entry.manifest.parent for one in path] == [*(one.entry.id for one in path[1:]), None]
    assert {one.lane for one in path} == {0}


def test_decisions_are_those_of_gc(told: Repo) -> None:
    plan = castore.collect_garbage(told, dry_run=True, now=NOW)
    kept = {one.entry.id: (one.parts, one.reasons) for one in plan.decisions}
    found = collect_report(told, NOW)
    assert {one.entry.id: (one.keep, one.reasons) for one in found.checkpoints} == kept
    assert found.retention_problem == ""


def test_roots_that_cannot_be_read_are_told_instead(told: Repo) -> None:
    (told.root / "manifests" / "main" / "000000001-abcdefabcdef.json").write_text("{")
    found = collect_report(told, NOW)
    assert "abcdefabcdef" in found.retention_problem
    assert {one.keep for one in found.checkpoints} == {None}
    assert [one.path for one in found.broken] == ["manifests/main/000000001-abcdefabcdef.json"]
    text = as_markdown(found)
    assert "**Retention**: can't be told" in text
    assert "**can't be read**: manifests/main/000000001-abcdefabcdef.json" in text


def test_one_run_alone(told: Repo) -> None:
    found = collect_report(told, NOW, run="low-lr")
    assert {one.entry.manifest.run for one in found.checkpoints} == {"low-lr"}
    assert {one.run for one in found.sessions} == {"low-lr"}
    assert found.find(found.best) is not None


def test_nothing_is_changed(told: Repo) -> None:
    before = builders.tree(told.root)
    html.page(collect_report(told, NOW))
    assert builders.tree(told.root) == before


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_sessions_come_from_summaries_and_else_from_their_checkpoints(told: Repo) -> None:
    found = collect_report(told, NOW)
    assert [one.run for one in found.sessions] == [
        "main",
        "main",
        "wide-batch",
        "main",
        "low-lr",
        "main",
        "small",
        "main",
    ]
    cut = found.sessions[4]
    assert (cut.stopped, cut.start_step, cut.final_step, len(cut.checkpoints)) == (None, 1000, 1300, 3)
    assert (cut.tokens_per_second or 0) > 0
    whole = found.sessions[1]
    assert whole.stopped == "session-iters"
    assert whole.resolution is not None
    assert len(whole.resolution.rejected) == whole.resolution.rejected_count == 3
    assert whole.resolution.rejected[0].reasons
    by_session = [sum(one.session == i for one in found.checkpoints) for i in range(len(found.sessions))]
    assert by_session == [len(one.checkpoints) for one in found.sessions]


NO_SUMMARIES = [
    "",
    "[]",
    "{",
    '{"started": 1}',
    '{"started": "x", "resolution": {"rejected": [1]}}',
    '{"started": "x", "tokens": 1e999}',
]


@pytest.mark.parametrize("text", NO_SUMMARIES)
def test_a_file_that_is_no_summary_is_told(told: Repo, text: str) -> None:
    (told.root / "sessions" / "main" / "x.json").write_text(text)
    found = collect_report(told, NOW)
    assert [one.path for one in found.broken] == ["sessions/main/x.json"]
    assert len(found.sessions) == 8


def test_a_link_or_a_pipe_is_no_summary(told: Repo, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"started": "secret"}')
    (told.root / "sessions" / "main" / "link.json").symlink_to(tmp_path / "secret")
    os.mkfifo(told.root / "sessions" / "main" / "pipe.json")
    found = collect_report(told, NOW)
    assert len(found.broken) == 2
    assert "secret" not in json.dumps(msgspec.to_builtins(as_json(found)["sessions"]))


def test_info_that_is_not_nanechos_harms_nothing(repo: Repo) -> None:
    for i, session in enumerate((1, "x", [], {}, {"started": 1}, {"started": "a", "start_step": "b"})):
        info = {"session": session, "connection_density": "x", "tokens_per_second": True, "environment": 3}
        repo.save({"model": {"i": i}}, run="r", step=i, info=info)
    found = collect_report(repo, NOW)
    assert found.sessions == ()
    assert {one["connection_density"] for one in as_json(found)["checkpoints"]} == {None}
    assert "chart" in html.page(found)


def test_only_what_differs_between_environments_is_a_difference() -> None:
    def session(**environment: Any) -> SessionRecord:
        return SessionRecord(started="x", environment=environment)

    sessions = [session(a=1, b=[1], c=1), session(a=1, b=[2], c=1), session(), session(a=1, b=[1])]
    differences, same = compare_environments(sessions)
    assert same == {"a": 1}
    assert [(one.key, one.values) for one in differences] == [
        ("c", ((1, (0, 1)),)),
        ("b", (([1], (0, 3)), ([2], (1,)))),
    ]


# -- lineage -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=40), st.integers(0, 39))
def test_no_two_branches_overlap(shape: list[tuple[int, int]], best: int) -> None:
    entries = []
    for i, (parent, step) in enumerate(shape):
        own = entries[parent].id if parent < i else None
        entries.append(builders.entry(step, parent=own, note=str(i), created=f"2026-01-02T03:04:05.{i:06d}Z"))
    known = {entry.id: entry for entry in entries}
    path = frozenset(ancestors(entries, entries[best % len(entries)].id))
    found = lanes(entries, path)
    assert found.keys() == known.keys()
    assert {found[own] for own in path} == {0}
    spans = _branches(entries, found)
    for row, first, last, names in spans:
        for other_row, other_first, other_last, others in spans:
            if row == other_row and names != others:
                assert last < other_first or other_last < first


def _branches(entries: list[Any], found: dict[ObjectId, int]) -> list[tuple[int, int, int, frozenset[ObjectId]]]:
    """(row, first step, last step, ids) of each branch, with the place where it left its parent."""
    known = {entry.id: entry for entry in entries}
    branches: dict[ObjectId, list[ObjectId]] = {}
    head: dict[ObjectId, ObjectId] = {}
    taken: set[ObjectId] = set()
    for entry in entries:  # parents come first
        parent = entry.manifest.parent
        goes_on = parent is not None and found[parent] == found[entry.id] and parent not in taken
        if goes_on:
            taken.add(parent)
        head[entry.id] = head[parent] if goes_on else entry.id
        branches.setdefault(head[entry.id], []).append(entry.id)
    made = []
    for start, ids in branches.items():
        steps = [known[own].manifest.step for own in ids]
        parent = known[start].manifest.parent
        if parent in known:
            steps.append(known[parent].manifest.step)
        made.append((found[start], min(steps), max(steps), frozenset(ids)))
    return made


# -- the page ----------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page as a browser would find them, scripts with what is in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.cdata_elem:
            self.scripts[-1] += data


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.sampled_from(["</script>", "<!--", "<script>", "]]>", "\u2028", "&lt;/script&gt;", "\U0001f600"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(JSON, st.text())
def test_no_text_gets_out_of_the_json_element(value: Any, text: str) -> None:
    shown = {"value": value, text: text + "</script><script>alert(1)</script><!--" + text}
    inside = html.embedded(shown)
    assert re.fullmatch("[ -~]*", inside)
    assert not set("<>&") & set(inside)
    page = Elements(f'<script type="application/json">{inside}</script><p>')
    assert [tag for tag, _ in page.tags] == ["script", "p"]
    assert json.loads(page.scripts[0]) == shown


def test_a_hostile_repository_adds_no_element_to_the_page(told: Repo, tmp_path: Path) -> None:
    plain = Repo.init(tmp_path / "plain")
    plain.save({"model": {}}, run="r", step=1)
    hostile, harmless = (Elements(html.page(collect_report(repo, NOW))) for repo in (told, plain))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    data = json.loads(hostile.scripts[0])
    assert any(report_data.HOSTILE in one["tags"] for one in data["checkpoints"])


def test_the_page_loads_nothing_and_only_its_own_scripts_may_run(told: Repo) -> None:
    page = Elements(html.page(collect_report(told, NOW)))
    policy = next(
        attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not re.search("unsafe|https?:|\\*", policy)
    for tag, attributes in page.tags:
        assert "src" not in attributes
        assert tag != "link" or (attributes["href"] or "").startswith("data:")
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    for name in ("page.js", "page.css", "page.html"):
        text = (importlib.resources.files("castore.report") / name).read_text(encoding="utf-8")
        assert "innerHTML" not in text
        assert not re.search(r"(?<!w3\.org/2000/svg)https?://(?!www\.w3\.org/2000/svg)", text)


def test_nothing_inlined_ends_its_element() -> None:
    files = importlib.resources.files("castore.report")
    for text in (html.charts_script(), (files / "page.js").read_text(encoding="utf-8")):
        assert not re.search("</script|<!--", text, re.IGNORECASE)
    assert "</style" not in (files / "page.css").read_text(encoding="utf-8")


def test_the_page_has_every_field_of_every_manifest(told: Repo) -> None:
    found = collect_report(told, NOW)
    data = json.loads(Elements(html.page(found)).scripts[0])
    for one, (version, config, info), entry in zip(
        data["checkpoints"], data["manifests"], told.checkpoints(), strict=True
    ):
        made = {name: one[name] for name in ("run", "step", "created", "parent", "metrics", "tags", "note")}
        made |= {"kind": "checkpoint", "version": version, "config": data["values"][config]}
        made["experiment"] = data["experiments"][one["experiment"]]
        made["info"] = {name: data["values"][at] for name, at in info}
        made["parts"] = {name: {k: v for k, v in part.items() if k != "where"} for name, part in one["parts"].items()}
        whole = msgspec.to_builtins(entry.manifest)
        assert whole["config"]["seed"] == 2**62 + 1
        whole["config"]["seed"] = str(2**62 + 1)  # a browser would round the number
        assert made == whole


def test_without_plotly_the_package_is_named(told: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    found = collect_report(told, NOW)
    with pytest.raises(errors.PackageMissing, match=r"pip install 'castore\[report\]'"):
        html.page(found)
    assert as_markdown(found)
    assert as_json(found)


# -- Markdown ----------------------------------------------------------------------------------------------------------


def test_markdown_says_where_it_stands(told: Repo) -> None:
    found = collect_report(told, NOW)
    text = as_markdown(found)
    best = found.find(found.best)
    assert best is not None
    newest = found.checkpoints[0].entry
    assert f"**Stands at** step {newest.manifest.step:,} of run `{newest.manifest.run}`: 32 checkpoints" in text
    assert f"**Best** `{best.entry.id[:12]}`, step {best.entry.manifest.step:,}" in text
    assert text.count("\n| `") == 20
    assert "| and 12 older ones |" in text
    assert re.search(r"the policy keeps \d+ full, \d+ weights-only, \d+ history", text)


def test_markdown_takes_nothing_for_markup(told: Repo) -> None:
    text = as_markdown(collect_report(told, NOW))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {9}
    assert not re.search(r"<|\u202e|\u2028|!\[|\]\(", text)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    made = Project(tmp_path / "project")
    made.run("init")
    return made


def test_reports_agree_with_log_and_stats(project: Project) -> None:
    report_data.build(Repo.open(project.root))
    project.git("add", ".")
    project.git("commit", "-qm", "x")
    found = project.json("report")
    listed = project.json("log")
    assert len(found["checkpoints"]) == len(listed) == 32
    for one, other in zip(found["checkpoints"], listed, strict=True):
        assert {name: one[name] for name in other if name != "kind"} == {k: v for k, v in other.items() if k != "kind"}
    assert found["store"] == project.json("stats")
    assert project.json("report", "--run", "small")["run"] == "small"
    assert json.loads(project.run("report", "--format", "json")) | {"made": 0} == found | {"made": 0}
    assert project.run("report", "--format", "md").startswith("### castore: project\n")
    assert "wrote   report.html: 32 checkpoints" in project.run("report")
    page = project.run("report", "-o", "-")
    assert len(page) == pytest.approx(len((project.root / "report.html").read_text()), abs=100)


def test_a_report_replaces_a_file_and_nothing_else(project: Project) -> None:
    (project.root / "folder").mkdir()
    (project.root / "link").symlink_to("texts/0.txt")
    os.mkfifo(project.root / "pipe")
    for name in ("folder", "link", "pipe", ".castore/x.html", ".git/x", "nowhere/x.html"):
        assert "won't write" in project.run("report", "-o", name, code=2)
    (project.root / "r.md").write_text("old")
    project.run("report", "--format", "md", "-o", "r.md")
    assert "No checkpoint yet" in (project.root / "r.md").read_text()
    assert stat.S_IMODE((project.root / "r.md").stat().st_mode) == 0o644
    project.run("report", "--json", "-o", "r.json")
    assert json.loads((project.root / "r.json").read_text())["checkpoints"] == []
    names = {path.name for path in project.root.iterdir()}
    assert names == {".castore", ".git", "texts", "folder", "link", "pipe", "r.md", "r.json"}  # and no temporary file


def test_an_empty_repository_has_a_friendly_page(project: Project) -> None:
    out = project.run("report", "--run", "mine")
    assert "no checkpoint of run mine yet: `castore train` makes the first one" in out
    data = json.loads(Elements((project.root / "report.html").read_text()).scripts[0])
    assert (data["checkpoints"], data["best"], data["run"]) == ([], None, "mine")
    assert "No checkpoint yet" in project.run("report", "--format", "md")


def test_what_cannot_be_read_is_said(project: Project) -> None:
    report_data.Story(Repo.open(project.root)).session("main", None, 100, 50)
    (project.root / ".castore" / "sessions" / "main" / "bad.json").write_text("{")
    process = project.start("report")
    _, err = process.communicate()
    assert process.returncode == 0
    assert "castore: sessions/main/bad.json: not a session's summary" in err


def test_making_a_report_loads_neither_torch_nor_numpy(project: Project) -> None:
    report_data.Story(Repo.open(project.root)).session("main", None, 100, 50)
    script = (
        "import sys; sys.argv = ['castore', 'report']; from castore.__main__ import app\n"
        "app(standalone_mode=False); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project.root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
