from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import re
import signal
import stat
import subprocess
import sys
import urllib.error
import urllib.request
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
from castore import Repo, gc, stats
from castore.report import html
from castore.report.as_json import report_as_json
from castore.report.collect import SessionRecord, collect_report, compare_environments
from castore.report.markdown import report_as_markdown

NOW = datetime(2026, 3, 9, tzinfo=UTC)


@pytest.fixture
def told(repo: Repo) -> Repo:
    report_data.build(repo)
    return repo


# -- collecting --------------------------------------------------------------------------------------------------------


def test_every_checkpoint_is_there_with_its_score_and_where_its_data_is(told: Repo) -> None:
    report = collect_report(told, NOW)
    entries = told.checkpoints()
    assert [checkpoint.entry for checkpoint in report.checkpoints] == entries
    assert [checkpoint.score for checkpoint in report.checkpoints] == [
        castore.score(entry.manifest) for entry in entries
    ]
    counts = stats.stats(told, NOW)
    for state in ("full", "weights-only", "history"):
        assert (
            sum(checkpoint.availability == state for checkpoint in report.checkpoints) == counts.availability[state] > 0
        )
    assert report.store == counts
    assert report.broken == ()


def test_best_and_next_are_what_resolve_says(told: Repo) -> None:
    report = collect_report(told, NOW)
    match = told.resolve("best", weights_only=True).require()
    assert report.resolution.match == match
    assert report.best == match.id
    assert len(report.experiments) == 2
    best_of_experiments = {checkpoint.entry.id for checkpoint in report.checkpoints if checkpoint.best_of_experiment}
    small = [entry for entry in told.checkpoints() if entry.manifest.run == "small"]
    assert best_of_experiments == {match.id, min(small, key=lambda entry: entry.manifest.metrics["val_loss"]).id}


def test_the_best_path_is_the_ancestry_of_the_best(told: Repo) -> None:
    report = collect_report(told, NOW)
    path = [checkpoint for checkpoint in report.checkpoints if checkpoint.on_best_path]
    assert path[0].entry.id == report.best
    assert [checkpoint.entry.manifest.parent for checkpoint in path] == [
        *(checkpoint.entry.id for checkpoint in path[1:]),
        None,
    ]
    assert {checkpoint.lane for checkpoint in path} == {0}


def test_decisions_are_those_of_gc(told: Repo) -> None:
    plan = castore.collect_garbage(told, dry_run=True, now=NOW)
    kept = {decision.entry.id: (decision.parts, decision.reasons) for decision in plan.decisions}
    report = collect_report(told, NOW)
    assert {checkpoint.entry.id: (checkpoint.keep, checkpoint.reasons) for checkpoint in report.checkpoints} == kept
    assert report.retention_problem == ""


def test_gc_is_planned_once(told: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []

    def plan(*arguments: Any, **options: Any) -> castore.GCPlan:
        plans.append(options)
        return original(*arguments, **options)

    original = gc.plan_garbage
    monkeypatch.setattr(gc, "plan_garbage", plan)
    report = collect_report(told, NOW)
    assert len(plans) == 1
    assert report.store == stats.stats(told, NOW)


def test_roots_that_cannot_be_read_are_told_instead(told: Repo) -> None:
    (told.root / "manifests" / "main" / "000000001-abcdefabcdef.json").write_text("{")
    report = collect_report(told, NOW)
    assert "abcdefabcdef" in report.retention_problem
    assert {checkpoint.keep for checkpoint in report.checkpoints} == {None}
    assert [file.path for file in report.broken] == ["manifests/main/000000001-abcdefabcdef.json"]
    text = report_as_markdown(report)
    assert "**Retention**: unknown: " in text
    assert "**can't be read**: manifests/main/000000001-abcdefabcdef.json" in text


def test_one_run_alone(told: Repo) -> None:
    report = collect_report(told, NOW, run="low-lr")
    assert {checkpoint.entry.manifest.run for checkpoint in report.checkpoints} == {"low-lr"}
    assert {session.run for session in report.sessions} == {"low-lr"}
    assert report.find(report.best) is not None


def test_nothing_is_changed(told: Repo) -> None:
    before = builders.tree(told.root)
    html.report_as_html(collect_report(told, NOW))
    assert builders.tree(told.root) == before


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_sessions_come_from_summaries_and_else_from_their_checkpoints(told: Repo) -> None:
    report = collect_report(told, NOW)
    assert [session.run for session in report.sessions] == [
        "main",
        "main",
        "wide-batch",
        "main",
        "low-lr",
        "main",
        "small",
        "main",
    ]
    cut = report.sessions[4]
    assert (cut.stopped, cut.start_step, cut.final_step, len(cut.checkpoints)) == (None, 1000, 1300, 3)
    assert (cut.tokens_per_second or 0) > 0
    whole = report.sessions[1]
    assert whole.stopped == "session-iters"
    assert whole.resolution is not None
    assert len(whole.resolution.rejected) == whole.resolution.rejected_count == 3
    assert whole.resolution.rejected[0].reasons
    by_session = [
        sum(checkpoint.session == i for checkpoint in report.checkpoints) for i in range(len(report.sessions))
    ]
    assert by_session == [len(session.checkpoints) for session in report.sessions]


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
    report = collect_report(told, NOW)
    assert [file.path for file in report.broken] == ["sessions/main/x.json"]
    assert len(report.sessions) == 8


def test_a_link_or_a_pipe_is_no_summary(told: Repo, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"started": "secret"}')
    (told.root / "sessions" / "main" / "link.json").symlink_to(tmp_path / "secret")
    os.mkfifo(told.root / "sessions" / "main" / "pipe.json")
    report = collect_report(told, NOW)
    assert len(report.broken) == 2
    assert "secret" not in json.dumps(msgspec.to_builtins(report_as_json(report)["sessions"]))


def test_info_that_is_not_nanechos_harms_nothing(repo: Repo) -> None:
    for i, session in enumerate((1, "x", [], {}, {"started": 1}, {"started": "a", "start_step": "b"})):
        info = {"session": session, "connection_density": "x", "tokens_per_second": True, "environment": 3}
        repo.save({"model": {"i": i}}, run="r", step=i, info=info)
    report = collect_report(repo, NOW)
    assert report.sessions == ()
    assert {checkpoint["connection_density"] for checkpoint in report_as_json(report)["checkpoints"]} == {None}
    assert "chart" in html.report_as_html(report)


def test_only_what_differs_between_environments_is_a_difference() -> None:
    def session(**environment: Any) -> SessionRecord:
        return SessionRecord(started="x", environment=environment)

    sessions = [session(a=1, b=[1], c=1), session(a=1, b=[2], c=1), session(), session(a=1, b=[1])]
    differences, same = compare_environments(sessions)
    assert same == {"a": 1}
    assert [(difference.key, difference.values) for difference in differences] == [
        ("c", ((1, (0, 1)),)),
        ("b", (([1], (0, 3)), ([2], (1,)))),
    ]


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
    hostile, harmless = (Elements(html.report_as_html(collect_report(repo, NOW))) for repo in (told, plain))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    data = json.loads(hostile.scripts[0])
    assert any(report_data.HOSTILE in checkpoint["tags"] for checkpoint in data["checkpoints"])


def test_the_page_loads_nothing_and_only_its_own_scripts_may_run(told: Repo) -> None:
    page = Elements(html.report_as_html(collect_report(told, NOW)))
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
    for text in ((files / name).read_text(encoding="utf-8") for name in (html.CHARTS, "page.js")):
        assert not re.search("</script|<!--", text, re.IGNORECASE)
    assert "</style" not in (files / "page.css").read_text(encoding="utf-8")


def test_the_page_has_every_field_of_every_manifest(told: Repo) -> None:
    report = collect_report(told, NOW)
    data = json.loads(Elements(html.report_as_html(report)).scripts[0])
    for checkpoint, (version, config, info), entry in zip(
        data["checkpoints"], data["manifests"], told.checkpoints(), strict=True
    ):
        made = {name: checkpoint[name] for name in ("run", "step", "created", "parent", "metrics", "tags", "note")}
        made |= {"kind": "checkpoint", "version": version, "config": data["values"][config]}
        made["experiment"] = data["experiments"][checkpoint["experiment"]]
        made["info"] = {name: data["values"][at] for name, at in info}
        made["parts"] = {
            name: {k: v for k, v in part.items() if k != "where"} for name, part in checkpoint["parts"].items()
        }
        whole = msgspec.to_builtins(entry.manifest)
        assert whole["config"]["seed"] == 2**62 + 1
        whole["config"]["seed"] = str(2**62 + 1)  # a browser would round the number
        assert made == whole


def test_the_charts_are_drawn_by_what_its_makers_published() -> None:
    charts = (importlib.resources.files("castore.report") / html.CHARTS).read_bytes()
    assert hashlib.sha256(charts).hexdigest() == "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
    assert charts.startswith(b"/**\n* plotly.js (basic - minified) v4.1.1\n")


# -- Markdown ----------------------------------------------------------------------------------------------------------


def test_markdown_says_where_it_stands(told: Repo) -> None:
    report = collect_report(told, NOW)
    text = report_as_markdown(report)
    best = report.find(report.best)
    assert best is not None
    newest = report.checkpoints[0].entry
    assert f"**Progress**: step {newest.manifest.step:,} of run `{newest.manifest.run}`; 32 checkpoints" in text
    assert f"**Best**: `{best.entry.id[:12]}`, step {best.entry.manifest.step:,}" in text
    assert text.count("\n| `") == 20
    assert "| and 12 older ones |" in text
    assert re.search(r"the policy keeps \d+ full, \d+ weights-only, \d+ history", text)


def test_markdown_takes_nothing_for_markup(told: Repo) -> None:
    text = report_as_markdown(collect_report(told, NOW))
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
    report = project.json("report")
    listed = project.json("log")
    assert len(report["checkpoints"]) == len(listed) == 32
    for checkpoint, other in zip(report["checkpoints"], listed, strict=True):
        assert {name: checkpoint[name] for name in other if name != "kind"} == {
            k: v for k, v in other.items() if k != "kind"
        }
    assert report["store"] == project.json("stats")
    assert project.json("report", "--run", "small")["run"] == "small"
    assert json.loads(project.run("report", "--format", "json")) | {"made": 0} == report | {"made": 0}
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


# -- served ------------------------------------------------------------------------------------------------------------


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_served_report_follows_what_is_saved(project: Project) -> None:
    process = project.start("report", "--serve", "--port", "0")
    try:
        assert process.stdout is not None
        url = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]  # type: ignore[index]
        _, before = get(url)
        assert json.loads(Elements(before).scripts[0])["checkpoints"] == []
        stamped = json.loads(Elements(before).scripts[0])["stamp"]
        assert get(f"{url}stamp") == (200, stamped)
        report_data.Story(Repo.open(project.root)).session("main", None, 100, 50)
        assert get(f"{url}stamp")[1] != stamped
        after = json.loads(Elements(get(url)[1]).scripts[0])
        assert (len(after["checkpoints"]), after["stamp"]) == (2, get(f"{url}stamp")[1])
        assert get(url, Host="evil.example")[0] == 403
        assert get(f"{url}.castore/config.toml")[0] == 404
        assert "connect-src 'self'" in before
        assert "--port 0 takes a free one" in project.call("report", "--serve", "--port", url[17:-1], code=2)
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert "writes no file" in project.call("report", "--serve", "-o", "x.html", code=2)
    assert "connect-src" not in project.call("report", "-o", "-")


def test_the_training_loss_of_every_step_is_in_the_report(told: Repo) -> None:
    report = report_as_json(collect_report(told, NOW))
    losses = [session["train_losses"] for session in report["sessions"] if session["run"] == "main"]
    assert [(loss["first"], loss["every"], len(loss["means"])) for loss in losses[:2]] == [(0, 4, 125), (500, 4, 125)]
    for means, every in (("1.0 nan", 1), ("1,2", 1), ("1.0", 0), ("1e999", 1)):
        told.add_session("odd", NOW, {"started": "x", "train_losses": {"first": 0, "every": every, "means": means}})
        assert "not a session's summary" in collect_report(told, NOW).broken[-1].reason
