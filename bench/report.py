"""Make and open the report of many checkpoints: seconds, bytes, and the time a browser takes to show it.

python bench/report.py [--count 1000] [--browser /usr/bin/chromium]

Opening is measured in a headless Chromium with the package playwright, and left out without it. Readable: all text and
tables are shown. Drawn: the first chart is, too. Busy: how long the page's thread worked until then, which says more
than elapsed time on a busy machine. Medians of five runs; the limits are for 1,000 checkpoints.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import report_data

import castore

RUNS = 5
MAX_SECONDS, MAX_BYTES, MAX_OPENING = 5.0, 8_000_000, 2.0
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def make(folder: Path) -> float:
    """Return the seconds that `castore report` takes, start-up included."""
    program = str(Path(sys.executable).with_name("castore"))
    begun = time.perf_counter()
    subprocess.run([program, "report"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def opening(page: Path, program: str | None) -> list[tuple[float, float, float]]:
    """Return (seconds until readable, until a chart is drawn, busy until then) of each run, in a new page each."""
    from playwright.sync_api import sync_playwright

    times = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for _ in range(RUNS):
            tab = browser.new_page(viewport={"width": 1600, "height": 1000})
            inspector = tab.context.new_cdp_session(tab)
            inspector.send("Performance.enable", {"timeDomain": "threadTicks"})
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-drawn]")
            marks = tab.evaluate("[document.documentElement.dataset.ready, document.documentElement.dataset.drawn]")
            metrics = {
                metric["name"]: metric["value"] for metric in inspector.send("Performance.getMetrics")["metrics"]
            }
            times.append((int(marks[0]) / 1000, int(marks[1]) / 1000, metrics["TaskDuration"]))
            tab.close()
        browser.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--keep-all", action="store_true", help="keep the data of all checkpoints, which is more to look at"
    )
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    parser.add_argument("--browser", default=os.environ.get("CASTORE_BROWSER") or browser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = castore.Repo.init(folder).root / "config.toml"
        text = config.read_text().replace("fsync = true", "fsync = false")
        config.write_text(text.replace("keep = 10", f"keep = {options.count}") if options.keep_all else text)
        subprocess.run(["git", "init", "--quiet", name], check=True)
        report_data.build_many(castore.Repo.open(folder), options.count)
        seconds = statistics.median(make(folder) for _ in range(RUNS))
        page = folder / "report.html"
        size = page.stat().st_size
        print(f"{options.count:,} checkpoints: made in {seconds:.2f} s, {size / 1e6:.2f} MB", flush=True)
        missed = seconds > MAX_SECONDS or size > MAX_BYTES
        try:
            times = opening(page, options.browser)
        except ImportError:
            print("opening wasn't measured: pip install playwright")
        else:
            readable, drawn, busy = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"opened: readable after {readable:.2f} s, a chart drawn after {drawn:.2f} s, busy for {busy:.2f} s")
            missed = missed or busy > MAX_OPENING
    if options.count <= 1000 and missed:
        sys.exit("over a limit")


if __name__ == "__main__":
    main()
