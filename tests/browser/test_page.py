from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import report_data
from playwright.sync_api import Browser, Page, expect

from castore import Repo

pytestmark = pytest.mark.peers

SIZES = [(375, 812), (1024, 768), (1600, 1000)]
SCHEMES: list[Any] = ["light", "dark"]


class Watched:
    """A page of a browser, with all that it complained about and asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path) -> Page:
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")
        return self.page


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1600, "height": 1000}, color_scheme="light")
    yield Watched(context.new_page())
    context.close()


@pytest.fixture
def page(watched: Watched, pages: Path) -> Iterator[Page]:
    """The full report, which neither complains nor asks for anything whatever a test does with it."""
    yield watched.open(pages / "full.html")
    assert watched.complaints == []
    assert [url for url in watched.requests if not url.startswith(("file:", "data:"))] == []
    assert {url for url in watched.requests if url.startswith("file:")} == {(pages / "full.html").as_uri()}


@pytest.fixture
def data(page: Page) -> dict[str, Any]:
    page_data: dict[str, Any] = json.loads(page.locator("#data").text_content() or "")
    return page_data


def drawn(page: Page, chart: str) -> int:
    """How many points a chart shows, once it has been drawn."""
    page.locator(chart).scroll_into_view_if_needed()
    page.wait_for_selector(f"{chart} .points path")
    return page.locator(f"{chart} .points path").count()


def rows(page: Page, table: str = "#checkpoints") -> list[list[str]]:
    texts: list[list[str]] = page.locator(f"{table} table").first.evaluate(
        "table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return texts


def test_charts_have_a_point_for_each_checkpoint_and_a_star_for_the_best(page: Page, data: dict[str, Any]) -> None:
    many = len(data["checkpoints"])
    assert many == 32
    assert drawn(page, "#chart-loss") == drawn(page, "#chart-score") == drawn(page, "#chart-lineage") == many + 1
    assert drawn(page, "#chart-density") == many
    page.locator("#quality .legend button", has_text="main").click()
    others = sum(checkpoint["run"] != "main" for checkpoint in data["checkpoints"])
    assert drawn(page, "#chart-loss") == others
    assert drawn(page, "#chart-lineage") == others
    page.get_by_role("button", name="By session").click()
    assert page.locator("#quality .legend button").count() == len(data["sessions"])
    page.get_by_role("button", name="Log scale").click()
    assert drawn(page, "#chart-loss") == many + 1


def test_another_metric_can_be_chosen(page: Page, data: dict[str, Any]) -> None:
    drawn(page, "#chart-score")
    page.get_by_label("Measure").select_option(label="other")
    assert drawn(page, "#chart-score") == 3  # of those that have it; the best has none
    assert {checkpoint["run"] for checkpoint in data["checkpoints"] if "other" in checkpoint["metrics"]} == {"small"}


def test_the_table_sorts(page: Page) -> None:
    head = page.locator("#checkpoints th", has_text="Val loss")
    for direction, order in (("descending", -1), ("ascending", 1)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        losses = [float(row[3]) for row in rows(page)]
        assert losses == sorted(losses, reverse=order < 0)
    assert losses[0] < 1.9
    page.get_by_role("button", name="Show 7 more").click()
    assert len(rows(page)) == 32
    page.locator("#checkpoints th", has_text="Step").get_by_role("button").click()
    steps = [int(row[2].replace(",", "")) for row in rows(page)]
    assert steps == sorted(steps, reverse=True)


def test_the_table_filters(page: Page, data: dict[str, Any]) -> None:
    told = page.locator("#checkpoints .tablefoot [aria-live]")
    page.get_by_label("Run", exact=True).select_option("low-lr")
    assert {row[1] for row in rows(page)} == {"low-lr"}
    expect(told).to_have_text("3 of 32 rows")
    page.get_by_label("Run", exact=True).select_option("")
    page.get_by_label("Data").select_option("weights-only")
    assert {row[5] for row in rows(page)} == {"weights-only"}
    page.get_by_label("Data").select_option("")
    page.get_by_role("checkbox", name="Path to the best").check()
    assert len(rows(page)) == sum(checkpoint["on_best_path"] for checkpoint in data["checkpoints"])
    page.get_by_label("Filter checkpoints").fill("STABLE main")
    assert len(rows(page)) == 1
    page.get_by_label("Filter checkpoints").fill(data["best"][:9])
    assert rows(page)[0][0].startswith(data["best"][:12])
    page.get_by_label("Filter checkpoints").fill("nothing like it")
    assert rows(page) == []


def manifest(page: Page) -> dict[str, Any]:
    page.locator("#panel summary", has_text="All fields").click()
    shown: dict[str, Any] = json.loads(page.locator("#manifest-json").inner_text())
    return shown


def expected_manifest(pages: Path, checkpoint_id: str) -> dict[str, Any]:
    expected: dict[str, Any] = msgspec.to_builtins(Repo.open(pages / "full").find(checkpoint_id).manifest)
    expected["config"]["seed"] = str(expected["config"]["seed"])
    return expected


def test_a_row_shows_the_whole_manifest(page: Page, data: dict[str, Any], pages: Path) -> None:
    page.locator("#checkpoints tr.best td").nth(2).click()
    expect(page.locator("#panel")).to_be_visible()
    expect(page.locator("#panel")).to_contain_text(data["best"])
    assert manifest(page) == expected_manifest(pages, data["best"])
    parent = next(checkpoint["parent"] for checkpoint in data["checkpoints"] if checkpoint["id"] == data["best"])
    page.locator("#panel").get_by_role("button", name=parent[:12]).first.click()
    expect(page.locator("#panel")).to_contain_text(parent)
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    assert page.evaluate("document.activeElement.dataset.id") == data["best"]


@pytest.mark.parametrize("chart", ["#chart-loss", "#chart-lineage"])
def test_a_point_tells_exact_values_and_shows_its_manifest(
    page: Page, data: dict[str, Any], pages: Path, chart: str
) -> None:
    drawn(page, chart)
    place = page.locator(f"{chart} .points path").last.bounding_box()  # the star, which is drawn last
    assert place is not None
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    expect(page.locator("#tip")).to_contain_text(data["best"][:12])
    best = next(checkpoint for checkpoint in data["checkpoints"] if checkpoint["id"] == data["best"])
    expect(page.locator("#tip")).to_contain_text(str(best["metrics"]["val_loss"]))
    page.mouse.down()
    page.mouse.up()
    expect(page.locator("#panel")).to_contain_text(data["best"])
    assert manifest(page) == expected_manifest(pages, data["best"])


def test_charts_can_be_used_with_the_keyboard(page: Page, data: dict[str, Any]) -> None:
    drawn(page, "#chart-loss")
    page.locator("#chart-loss").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    told = page.locator("#tip b").inner_text()
    assert any(checkpoint["id"].startswith(told[:12]) for checkpoint in data["checkpoints"])
    page.keyboard.press("Enter")
    expect(page.locator("#panel")).to_contain_text(told[:12])
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "chart-loss"


def test_hostile_text_is_text(page: Page) -> None:
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, main script").count() == 0
    assert page.locator("#checkpoints .badge", has_text=report_data.HOSTILE).count() == 1
    expect(page.locator("#environment")).to_contain_text(report_data.HOSTILE)
    expect(page.locator("#checkpoints")).to_contain_text("a\\u202egnp.exe <b>bold</b> & \\u2028 | `code` ${x}")
    page.locator("#checkpoints tr.best td").nth(2).click()
    expect(page.locator("#panel")).to_contain_text(report_data.HOSTILE)
    assert page.evaluate("window.hacked") is None


def test_no_other_script_or_style_can_run(watched: Watched, pages: Path) -> None:
    page = watched.open(pages / "full.html")
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked = 1'>");
            document.body.insertAdjacentHTML("beforeend", "<style>body { margin-left: 99px }</style>");
            return fetch("data:,x").catch(() => {});
        }"""
    )
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("getComputedStyle(document.body).marginLeft") == "0px"
    assert len(watched.complaints) >= 4
    assert all(
        "Content Security Policy" in complaint or "Failed to load" in complaint for complaint in watched.complaints
    )


def test_the_theme_can_be_chosen(page: Page) -> None:
    button, background = page.locator("#theme"), "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(247, 247, 245)"
    button.click()
    button.click()
    expect(button).to_have_text("Theme: dark")
    assert page.evaluate(background) == "rgb(18, 20, 22)"
    page.reload()
    page.wait_for_selector("html[data-ready]")
    expect(button).to_have_text("Theme: dark")
    page.emulate_media(media="print")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    expect(page.locator("nav")).to_be_hidden()
    page.evaluate("localStorage.clear()")


def test_the_page_of_an_empty_repository_says_what_to_do(watched: Watched, pages: Path) -> None:
    page = watched.open(pages / "empty.html")
    expect(page.locator("h1")).to_have_text("No checkpoint yet")
    expect(page.locator("pre")).to_have_text("castore train")
    assert watched.complaints == []


CONTRASTS = """() => {
    const luminance = (colour) => {
        const parts = colour.map((one) => one / 255)
            .map((one) => one <= .03928 ? one / 12.92 : ((one + .055) / 1.055) ** 2.4);
        return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
    };
    const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const isSeen = walker.currentNode.data.trim() && element.checkVisibility();
        if (!isSeen || element.closest("script, svg, .skip")) continue;
        let behind = element;
        while (behind && (numbers(getComputedStyle(behind).backgroundColor)[3] ?? 1) < 1) behind = behind.parentElement;
        const [a, b] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
            .map((colour) => luminance(numbers(colour).slice(0, 3)));
        const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (contrast < 4.5) found.push([contrast, walker.currentNode.data.slice(0, 40), element.className]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_readable_at_any_size(
    browser: Browser, pages: Path, size: tuple[int, int], scheme: Any, tmp_path: Path
) -> None:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    watched = Watched(context.new_page())
    page = watched.open(pages / "full.html")
    for chart in ("#chart-loss", "#chart-score", "#chart-density", "#chart-lineage"):
        drawn(page, chart)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(CONTRASTS) == []
    small = page.evaluate(
        "[...document.querySelectorAll('main button, main select')].filter(one => one.checkVisibility())"
        ".filter(one => one.getBoundingClientRect().height < 16).map(one => one.textContent)"
    )
    assert small == []
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].filter(one => !one.textContent.trim()"
        " && !one.ariaLabel && !one.labels?.length).map(one => one.outerHTML)"
    )
    assert unnamed == []
    folder = Path(os.environ.get("CASTORE_SCREENSHOTS") or tmp_path)
    page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
    page.screenshot(path=folder / f"report-{size[0]}-{scheme}.png", full_page=True)
    page.locator("#checkpoints tr.best td").first.click()
    assert page.locator("#panel").evaluate("panel => panel.scrollWidth <= panel.clientWidth")
    page.screenshot(path=folder / f"panel-{size[0]}-{scheme}.png")
    assert watched.complaints == []
    context.close()


def test_settings_of_runs_stand_side_by_side(page: Page) -> None:
    table = page.locator("table.settings")
    assert table.locator("thead th").all_inner_texts()[0] == "Setting"
    rows_ = [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]
    assert [row[0] for row in rows_] == ["batch_size", "learning_rate"]
    assert rows_[0][1:] == ["16", "16", "16", "64"]
    heads = page.locator("#checkpoints thead th").all_inner_texts()
    assert [head for head in heads if head in ("batch_size", "learning_rate")] == ["batch_size", "learning_rate"]


def test_a_served_page_follows_what_is_saved(browser: Browser, tmp_path: Path) -> None:
    from castore.report import html, serve
    from castore.report.collect import collect_report

    repo = Repo.init(tmp_path)
    story = report_data.Story(repo)
    story.session("main", None, 100, 50)
    now = story.now
    made = serve.Server(0, lambda: serve.stamp(repo), lambda mark: html.report_as_html(
        collect_report(repo, now), mark).encode())  # fmt: skip
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    context = browser.new_context()
    try:
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(made.url)
        expect(page.locator(".title .soft")).to_contain_text("2 checkpoints")
        story.session("main", repo.find("latest").id, 100, 50)
        expect(page.locator(".title .soft")).to_contain_text("4 checkpoints", timeout=10_000)
        assert complaints == []
    finally:
        made.shutdown()
        thread.join()
        made.server_close()
    expect(page.locator("#foot")).to_contain_text("has ended", timeout=10_000)
    context.close()
