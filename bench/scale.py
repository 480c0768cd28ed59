"""How cost grows with the work: model size, checkpoints in git, objects in the store, threads.

    python bench/scale.py --quick    # a minute or two; writes into build/bench alone
    python bench/scale.py            # up to 6 GB, 10,000 checkpoints and 500,000 objects; draws docs/scale-*.svg

Each figure is the fastest of up to three runs: a machine that others use too can only add. An exponent is the slope
of log(seconds) over log(work), what the program takes for next to nothing subtracted; 1 is linear. Measured is the
slope over the largest three sizes, and between the last two, where more than 1.1 is marked.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import catalog
import matplotlib
import torch
from matplotlib import figure

import castore
from castore import verify
from castore.format import ids, manifest, part_index
from castore.format.frame import encode_frame

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
MARK = 1.1
RUNS = 3
LONG_SECONDS = 6.0  # what takes longer is run once
DISK_GB = {True: 3, False: 20}

MODEL_MB = {True: (10, 100), False: (10, 100, 1000, 6000)}
CHECKPOINTS = {True: (1, 100, 1000), False: (1, 10, 100, 1000, 10_000)}
OBJECTS = {True: (1, 1000, 10_000), False: (1, 1000, 10_000, 100_000, 500_000)}
THREADS = {True: (1, 2, 4), False: (1, 2, 4, 8)}
THREADS_MB = {True: 100, False: 1000}


@dataclass(slots=True)
class Curve:
    """(work, cost) by increasing work. ``start`` is the cost of doing next to nothing, which is no growth."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)
    start: float = 0.0

    def add(self, work: float, cost: float, *, starts: bool = False) -> None:
        if starts and not self.points:
            self.start = cost
        self.points.append((work, cost))

    def growing(self) -> list[tuple[float, float]]:
        """Logarithms of the points that stand out from the start, by a fifth of it at least."""
        left = [(work, cost - self.start) for work, cost in self.points if cost > 1.2 * self.start]
        return [(math.log(work), math.log(cost)) for work, cost in left]

    def exponent(self, last: int) -> float | None:
        """The slope over the largest ``last`` sizes; None when too few of them stand out."""
        points = self.growing()[-last:]
        if len(points) < 2:
            return None
        return statistics.linear_regression(*zip(*points, strict=True)).slope

    @property
    def is_marked(self) -> bool:
        return (self.exponent(2) or 0) > MARK


@dataclass(slots=True)
class Chart:
    """Curves over the same kind of work."""

    key: str
    title: str
    work: str
    cost: str = "seconds"
    grows: bool = True
    curves: dict[str, Curve] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Curve:
        return self.curves.setdefault(name, Curve(name))


_began = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _began:4.0f} s] {text}", file=sys.stderr, flush=True)


def fastest(act: Callable[[], Any]) -> float:
    """Seconds: the least of up to three runs."""
    seconds = []
    while len(seconds) < RUNS and (not seconds or seconds[-1] < LONG_SECONDS):
        gc.collect()
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def program(folder: Path, *arguments: str) -> None:
    executable = str(Path(sys.executable).with_name("castore"))
    subprocess.run([executable, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def make_repo(folder: Path, **store: object) -> castore.Repo:
    """Return a fresh one with these settings of [store], in its own git repository, so that git looks at no other."""
    repo = castore.Repo.init(folder)
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in store.items())
    (repo.root / "config.toml").write_text(f"[store]\n{lines}[retention]\nauto_gc = false\n")
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    return castore.Repo.open(folder)


# -- model size and threads ------------------------------------------------------------------------------------------
#
# Saving and loading each run in a new process, so that neither can use memory that the other left behind.


def large(size: int) -> dict[str, dict[str, torch.Tensor]]:
    """``size`` bytes of weights in tensors of at most 100 MB, no two alike; made fast."""
    count = -(-size // 100_000_000)
    base = torch.empty(size // count // 4).normal_(std=0.02)
    return {"model": {f"layer.{i}": base * (1 + i / 1000) for i in range(count)}}


def extra_memory(act: Callable[[], Any]) -> int:
    """Bytes by which the peak was above what was in use before."""

    def now(name: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak
    before = now("VmRSS")
    act()
    return now("VmHWM") - before


def child_saves(folder: Path, size: int, threads: int) -> dict[str, float]:
    state = large(size)
    seconds: dict[str, list[float]] = {"save, durable": [], "save, no fsync": [], "save again, unchanged": []}
    memory = 0
    repo = None
    while len(seconds["save, durable"]) < (1 if size > 2e9 else RUNS):
        for name, fsync in (("save, no fsync", False), ("save, durable", True)):
            if repo:
                shutil.rmtree(repo.root.parent)
            repo = make_repo(folder, fsync=fsync, threads=threads)
            for key in (name, *(() if fsync else ("save again, unchanged",))):
                step = int(key != name)
                began = time.perf_counter()
                peak = extra_memory(lambda repo=repo, step=step: repo.save(state, run="main", step=step))
                seconds[key].append(time.perf_counter() - began)
                memory = max(memory, peak)
    return {name: min(values) for name, values in seconds.items()} | {"memory of a save": memory}


def child_loads(folder: Path, size: int, _threads: int) -> dict[str, float]:
    repo = castore.Repo.open(folder)
    checkpoint_id = repo.checkpoints()[0].id
    load_peak = extra_memory(lambda: repo.load(checkpoint_id))

    def check() -> None:
        if list(verify.verify(repo, [checkpoint_id])):
            raise SystemExit("what was saved is damaged")

    verify_peak = extra_memory(check)
    return {
        "load": fastest(lambda: repo.load(checkpoint_id)),
        "verify": fastest(check),
        "memory of a load": load_peak - size,
        "memory of a verify": verify_peak,
    }


CHILDREN = {"saves": child_saves, "loads": child_loads}


def save_and_load(scratch: Path, megabytes: int, threads: int) -> dict[str, float]:
    """Seconds and bytes of each act on a model of this size; ``threads`` as in config.toml."""
    costs: dict[str, float] = {}
    folder = scratch / "model"
    for child in CHILDREN:
        arguments = [child, str(folder), str(megabytes * 1_000_000), str(threads)]
        done = subprocess.run(
            [sys.executable, __file__, "--child", *arguments], check=True, stdout=subprocess.PIPE, text=True
        )
        costs |= json.loads(done.stdout)
    shutil.rmtree(folder)
    return costs


def model_sizes(scratch: Path, quick: bool) -> list[Chart]:
    seconds = Chart("model", "Saving, loading and verifying a model", "MB of state")
    memory = Chart("memory", "Memory beside the state", "MB of state", cost="MB")
    for megabytes in MODEL_MB[quick]:
        say(f"a model of {megabytes:,} MB")
        for name, cost in save_and_load(scratch, megabytes, 0).items():
            if name.startswith("memory of a "):
                memory[name.removeprefix("memory of a ")].add(megabytes, max(cost, 1e5) / 1e6)
            else:
                seconds[name].add(megabytes, cost)
    return [seconds, memory]


def thread_counts(scratch: Path, quick: bool) -> list[Chart]:
    megabytes = THREADS_MB[quick]
    chart = Chart("threads", f"{megabytes:,} MB by [store] threads", "threads", grows=False)
    for threads in THREADS[quick]:
        say(f"{threads} threads, {megabytes:,} MB")
        for name, cost in save_and_load(scratch, megabytes, threads).items():
            if not name.startswith("memory"):
                chart[name].add(threads, cost)
    return [chart]


# -- checkpoints in git ----------------------------------------------------------------------------------------------


def commands(folder: Path, chart: Chart, work: int, given: Sequence[Sequence[str]]) -> None:
    """Time each command of the program, start-up included. ``ID`` is the newest checkpoint that has its data."""
    newest = next(entry for entry in castore.Repo.open(folder).checkpoints() if entry.manifest.run == "main")
    for command in given:
        arguments = [newest.id if word == "ID" else word for word in command]
        chart["castore " + " ".join(command)].add(work, fastest(lambda a=arguments: program(folder, *a)), starts=True)


def checkpoints(scratch: Path, quick: bool) -> list[Chart]:
    chart = Chart("checkpoints", "Checkpoints in git, the newest hundred with their data", "checkpoints")
    given = (["log"], ["resolve"], ["gc", "--dry-run"], ["verify", "ID"], ["verify"], ["stats"])
    for count in CHECKPOINTS[quick]:
        say(f"{count:,} checkpoints")
        folder = scratch / f"checkpoints-{count}"
        catalog.fill(make_repo(folder, fsync=False), count)
        git = ["git", "-C", str(folder), "-c", "user.name=bench", "-c", "user.email=bench@localhost"]
        subprocess.run([*git, "add", "--all"], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", "checkpoints"], check=True)
        commands(folder, chart, count, given)
        shutil.rmtree(folder)
    return [chart]


# -- objects in the store --------------------------------------------------------------------------------------------

BLOCK = 2000
GONE_BESIDE = 4
OBJECT_BYTES = 512


class Filler:
    """Fills a store with small objects in blocks of at most 2,000: half of each belong to a checkpoint.

    Every checkpoint has four beside it whose data is gone.
    """

    def __init__(self, repo: castore.Repo) -> None:
        self._repo = repo
        self._random = random.Random(1)
        self.count = 0
        for number in range(256):
            (repo.store.objects / f"{number:02x}").mkdir(exist_ok=True)

    def fill(self, total: int) -> None:
        while self.count < total:
            self._block(min(BLOCK, total - self.count))

    def _block(self, size: int) -> None:
        needed = max(1, size // 2)
        chunks = [self._put(self._random.randbytes(OBJECT_BYTES)) for _ in range(needed - 1)]
        for _ in range(size - needed):
            self._put(self._random.randbytes(OBJECT_BYTES))
        refs = tuple(part_index.ChunkRef(chunk_id, OBJECT_BYTES) for chunk_id in chunks)
        tensor = part_index.TensorSpec("uint8", (OBJECT_BYTES * len(chunks),), 0)
        index_id = self._put(
            part_index.encode(
                part_index.Index(refs, (tensor,), {"block": self.count, "weight": part_index.TensorRef(0)})
            )
        )
        self._checkpoint("main", {"model": index_id})
        for number in range(GONE_BESIDE):
            names = ("model", "optimizer", "trainer")
            self._checkpoint(f"gone{number}", {name: ids.hash_bytes(self._random.randbytes(8)) for name in names})

    def _put(self, plain: bytes) -> ids.ObjectId:
        """Store an object as a save would, but without protection against power cuts and other processes."""
        object_id = ids.hash_bytes(plain)
        with open(self._repo.store.path(object_id), "wb", buffering=0) as file:
            file.write(encode_frame(plain))
        self.count += 1
        return object_id

    def _checkpoint(self, run: str, indexes: Mapping[str, ids.ObjectId]) -> None:
        created = manifest.timestamp(datetime.fromtimestamp(1_767_225_600 + self.count / 1000, UTC))
        parts = {
            name: manifest.Part(index=index_id, bytes=1 << 19, stored_bytes=1 << 19)
            for name, index_id in indexes.items()
        }
        metrics = {"val_loss": 1 + 1 / (1 + self.count)}
        self._repo.catalog.add(
            manifest.Manifest(run=run, step=self.count, created=created, parts=parts, metrics=metrics)
        )


def save_small(folder: Path) -> None:
    """Save 4 MB of weights that the store does not have."""
    repo = castore.Repo.open(folder)
    saved = repo.save({"model": {"weight": torch.randn(1_000_000)}}, run="other", step=1)
    if not saved.new_objects:
        raise SystemExit("nothing was saved")


def store_objects(scratch: Path, quick: bool) -> list[Chart]:
    chart = Chart("objects", "Objects in the store, half of them needed, a thousand by a checkpoint", "objects")
    given = (["log"], ["resolve"], ["gc", "--dry-run"], ["verify", "ID"], ["verify"], ["stats"])
    folder = scratch / "objects"
    filler = Filler(make_repo(folder, fsync=False))
    for count in OBJECTS[quick]:
        say(f"{count:,} objects")
        filler.fill(count)
        commands(folder, chart, count, given)
        chart["save of 4 MB"].add(count, fastest(lambda: save_small(folder)), starts=True)
    say("removing them")
    shutil.rmtree(folder)
    return [chart]


# -- results --------------------------------------------------------------------------------------------------------


def table(charts: Sequence[Chart]) -> str:
    out = []
    for chart in charts:
        works = [work for work, _ in next(iter(chart.curves.values())).points]
        ends = ["exponent", "at the end"] if chart.grows else ["times as fast"]
        out += ["", f"{chart.title}: {chart.cost}", ""]
        out += ["| " + " | ".join([chart.work, *(f"{work:,.0f}" for work in works), *ends]) + " |"]
        out += ["|---" + "|---:" * (len(works) + len(ends)) + "|"]
        for curve in chart.curves.values():
            cells = [_number(cost) for _, cost in curve.points]
            if chart.grows:
                whole, end = curve.exponent(3), curve.exponent(2)
                cells += ["flat" if whole is None else f"{whole:.2f}", "flat" if end is None else f"{end:.2f}"]
                cells[-1] += f" **worse than {MARK}**" if curve.is_marked else ""
            else:
                costs = [cost for _, cost in curve.points]
                cells.append(f"{costs[0] / min(costs):.1f}")
            out.append("| " + " | ".join([curve.name, *cells]) + " |")
        if chart.key == "model":
            out += ["", "the same in MB/s", ""]
            out += ["| " + " | ".join([chart.work, *(f"{work:,.0f}" for work in works)]) + " |"]
            out += ["|---" + "|---:" * len(works) + "|"]
            for curve in chart.curves.values():
                out.append("| " + " | ".join([curve.name, *(f"{x / cost:,.0f}" for x, cost in curve.points)]) + " |")
    return "\n".join(out[1:]) + "\n"


def _number(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.1f}" if cost >= 10 else f"{cost:.2f}"


COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccaa22", "#66aadd", "#aa3377", "#888888")


def draw(chart: Chart, path: Path) -> None:
    """Both axes logarithmic; readable on light and on dark."""
    grey = "#808080"
    style = {"svg.fonttype": "none", "svg.hashsalt": "castore", "font.size": 11, "text.color": grey}
    with matplotlib.rc_context(style | {"axes.labelcolor": grey}):
        drawn = figure.Figure(figsize=(8, 4.6), layout="constrained")
        axes = drawn.add_subplot()
        for curve, colour in zip(chart.curves.values(), COLOURS, strict=False):
            axes.plot(*zip(*curve.points, strict=True), color=colour, label=curve.name, linewidth=2, marker="o")
        axes.set_xscale("log")
        axes.set_yscale("log")
        if chart.grows:
            top = max((curve.points[-1] for curve in chart.curves.values()), key=lambda point: point[1])
            low = next(iter(chart.curves.values())).points[-2][0]
            axes.plot(
                [low, top[0]], [1.5 * top[1] * low / top[0], 1.5 * top[1]],
                color=grey, linestyle="--", linewidth=1, label="linear",
            )  # fmt: skip
        else:
            works = [work for work, _ in next(iter(chart.curves.values())).points]
            axes.set_xticks(works, [f"{work:.0f}" for work in works])
            axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        if chart.grows:
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_title(chart.title, fontsize=11)
        axes.set_xlabel(chart.work)
        axes.set_ylabel(chart.cost)
        axes.grid(color=grey, alpha=0.3)
        axes.tick_params(which="both", colors=grey)
        for spine in axes.spines.values():
            spine.set_color(grey)
            spine.set_alpha(0.5)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, transparent=True, metadata={"Date": None})


def report(charts: Sequence[Chart], quick: bool) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    machine = {"cores": cores, "load": os.getloadavg(), "python": platform.python_version(), "torch": torch.__version__}
    return {
        "quick": quick,
        "machine": machine,
        "seconds": time.monotonic() - _began,
        "charts": {
            chart.key: {
                "title": chart.title,
                "work": chart.work,
                "cost": chart.cost,
                "curves": {
                    curve.name: {
                        "points": curve.points,
                        "start": curve.start,
                        "exponent": curve.exponent(3) if chart.grows else None,
                        "at_the_end": curve.exponent(2) if chart.grows else None,
                        "marked": chart.grows and curve.is_marked,
                    }
                    for curve in chart.curves.values()
                },
            }
            for chart in charts
        },
    }  # fmt: skip


PARTS = {"model": model_sizes, "checkpoints": checkpoints, "objects": store_objects, "threads": thread_counts}


def stop(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes; leaves docs/ alone")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="only these")
    parser.add_argument("--folder", type=Path, default=BUILD, help="where to work: on a disk (default: build/bench)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, folder, size, threads = given.child
        print(json.dumps(CHILDREN[name](Path(folder), int(size), int(threads))))
        return
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, stop)
    given.folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(given.folder).free < DISK_GB[given.quick] * 1e9:
        raise SystemExit(f"{given.folder} has less than the {DISK_GB[given.quick]} GB free that are needed")
    charts: list[Chart] = []
    try:
        with tempfile.TemporaryDirectory(prefix="scale-", dir=given.folder) as folder:
            for part in given.only:
                charts += PARTS[part](Path(folder), given.quick)
    except KeyboardInterrupt:
        raise SystemExit("stopped: nothing was written") from None
    text = json.dumps(report(charts, given.quick), indent=2) + "\n"
    (BUILD / ("scale-quick.json" if given.quick else "scale.json")).write_text(text)
    for chart in charts:
        draw(chart, (BUILD if given.quick else ROOT / "docs") / f"scale-{chart.key}.svg")
    print(table(charts), end="")


if __name__ == "__main__":
    main()
