"""A real Chromium for the tests in this folder, which run on request: ``make test-browser``.

The browser is that of ``CASTORE_BROWSER``, or one on the PATH, or playwright's own.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = os.environ.get("CASTORE_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        # a container has no sandbox for the browser to use; the pages it shows are made here
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the report of a full repository (full.html) and of an empty one (empty.html)."""
    import report_data

    from castore import Repo
    from castore.report import html
    from castore.report.collect import collect_report

    folder = tmp_path_factory.mktemp("pages")
    now = datetime(2026, 3, 9, tzinfo=UTC)
    for name in ("full", "empty"):
        repo = Repo.init(folder / name)
        if name == "full":
            report_data.build(repo)
        text = html.report_as_html(collect_report(repo, now))
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder
