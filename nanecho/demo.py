"""What going on from the best is worth, measured: real sessions, each a process of its own on an emptied machine.

Three lives of one training budget, for several seeds: *resumed*, sessions that each go on from the best checkpoint,
which a remote keeps between them; *fresh*, as many sessions that each start anew; *unbroken*, one that never stops.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

import castore
from castore import errors

Life = Literal["resumed", "fresh", "unbroken"]
LIVES: tuple[Life, ...] = ("resumed", "fresh", "unbroken")

_TEXT_BYTES = 2_000_000
_OPTIONS = {
    "n-layer": 2, "n-embd": 64, "n-head": 4, "block-size": 64, "batch-size": 16, "threads": 1, "eval-samples": 64,
    "learning-rate": 0.004, "warmup-iters": 30, "connection-growth": 0.15,
    "min-improvement": 0, "log-every": 1000,
}  # fmt: skip


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """How much is trained: ``iters`` steps a session, measured ``points`` times in each."""

    seeds: int
    sessions: int
    iters: int
    points: int = 5


FULL = Size(seeds=3, sessions=5, iters=300)
QUICK = Size(seeds=2, sessions=3, iters=60, points=3)


class Point(msgspec.Struct, frozen=True):
    """A validation loss, in nats a token, after so many steps of compute in this life."""

    step: int
    loss: float


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One process: where it began, what it reached, and the bytes that it moved from and to the remote."""

    start_step: int
    final_step: int
    final_loss: float
    down: int
    up: int


class Lived(msgspec.Struct, frozen=True, kw_only=True):
    """One life with one seed. ``stored`` bytes are in the remote at its end, or where it trained if it has none."""

    life: Life
    seed: int
    sessions: list[Session]
    points: list[Point]
    stored: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All lives, resumed ones first."""

    size: Size
    lives: list[Lived]

    def of(self, life: Life) -> list[Lived]:
        return [one for one in self.lives if one.life == life]


@dataclass(frozen=True, slots=True)
class Progress:
    """Processes that have ended, of how many."""

    done: int
    total: int


def run(folder: Path, program: Sequence[str], size: Size, jobs: int) -> Iterator[Progress | Result]:
    """Live all lives in ``folder``, ``jobs`` at a time, with ``program`` as the command. Ends with the Result.

    NotFound when a session fails, with what it said.
    """
    total = size.seeds * (2 * size.sessions + 1)
    texts = _texts(folder / "texts")
    done: list[None] = []
    # the longest chains first: two of them keep two processors busy to the end
    tasks = [(life, seed) for life in LIVES for seed in range(size.seeds)]
    with ThreadPoolExecutor(jobs) as pool:
        machine = _Machine(folder, texts, program, size, lambda: done.append(None))
        futures = [pool.submit(machine.live, life, seed) for life, seed in tasks]
        try:
            shown = -1
            while not all(future.done() for future in futures):
                if len(done) != shown:
                    shown = len(done)
                    yield Progress(shown, total)
                _wait(futures)
            yield Progress(total, total)
            yield Result(size=size, lives=[future.result() for future in futures])
        finally:
            machine.stop()
            pool.shutdown(wait=True, cancel_futures=True)


def _wait(futures: Sequence[Any]) -> None:
    from concurrent.futures import FIRST_EXCEPTION, wait

    ended = wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
    for future in ended.done:
        future.result()


def _texts(folder: Path) -> Path:
    """Some of the source of Python's standard library."""
    folder.mkdir(parents=True)
    left = _TEXT_BYTES
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if (size := path.stat().st_size) <= left:
            shutil.copyfile(path, folder / path.name)
            left -= size
    return folder


class _Machine:
    """Runs lives. Several threads may each run one."""

    def __init__(
        self, folder: Path, texts: Path, program: Sequence[str], size: Size, on_end: Callable[[], None]
    ) -> None:
        self._folder, self._texts, self._program, self._size = folder, texts, program, size
        self._on_end = on_end
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def stop(self) -> None:
        """End what still runs."""
        self._stopped = True
        for process in list(self._running):
            process.kill()

    def live(self, life: Life, seed: int) -> Lived:
        size = self._size
        root = self._folder / f"{life}-{seed}"
        if life == "fresh":
            lived = [self._session(root / str(i), life, 1000 * (seed + 1) + i) for i in range(size.sessions)]
        elif life == "resumed":
            remote = root / "remote"
            lived = [self._session(root / "machine", life, seed, remote) for _ in range(size.sessions)]
        else:
            lived = [self._session(root, life, seed)]
        points = []
        for i, (session, repo) in enumerate(lived):
            offset = i * size.iters if life == "fresh" else 0
            points += [
                Point(offset + entry.manifest.step, entry.manifest.metrics["val_loss"])
                for entry in reversed(repo.checkpoints())
                if session.start_step < entry.manifest.step <= session.final_step
            ]
        stored = remote if life == "resumed" else root
        return Lived(
            life=life, seed=seed, sessions=[session for session, _ in lived], points=points, stored=_bytes(stored)
        )

    def _session(self, folder: Path, life: Life, seed: int, remote: Path | None = None) -> tuple[Session, castore.Repo]:
        """One process; what it stored is then in the remote, and the machine is empty."""
        size = self._size
        is_first = not (folder / ".castore").exists()
        repo = castore.Repo.init(folder)
        if is_first:
            settings = "[store]\nfsync = false\n[retention]\nauto_gc = false\n"
            if remote:
                settings += f"[remotes]\nremote = {json.dumps(str(remote))}\n"
            (repo.root / "config.toml").write_text(settings)
        steps = size.iters * (size.sessions if life == "unbroken" else 1)
        # whoever starts afresh each time plans for one session: its schedule ends with it
        horizon = size.iters if life == "fresh" else size.iters * size.sessions
        every = max(1, size.iters // size.points)
        options = _OPTIONS | {
            "data-dir": self._texts, "seed": seed, "session-iters": steps, "max-iters": horizon, "eval-every": every,
            "save-every": every, "connection-every": max(1, size.iters // 2),
            "resume": "best" if life == "resumed" else "none",
        }  # fmt: skip
        told = self._train(folder, [text for name, value in options.items() for text in (f"--{name}", str(value))])
        objects = repo.root / "objects"
        down = up = 0
        if remote:
            there = {path.name for path in (remote / "objects").glob("*/*")}
            here = {path.name: path for path in objects.glob("*/*")}
            down = sum(path.stat().st_size for name, path in here.items() if name in there)
            for name in here.keys() - there:
                up += here[name].stat().st_size
                target = remote / "objects" / name[:2]
                target.mkdir(parents=True, exist_ok=True)
                shutil.move(here[name], target / name)
            shutil.rmtree(objects)
        self._on_end()
        session = Session(
            start_step=told["start_step"],
            final_step=told["final_step"],
            final_loss=told["final_loss"],
            down=down,
            up=up,
        )
        return session, castore.Repo.open(folder)

    def _train(self, folder: Path, options: Sequence[str]) -> dict[str, Any]:
        if self._stopped:
            raise errors.NotFound("the demo was stopped")
        process = subprocess.Popen(
            [*self._program, "train", "--json", *options],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # one thread each: the demo runs several at once
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._running.add(process)
        try:
            out, said = process.communicate()
        finally:
            self._running.discard(process)
        if process.returncode:
            raise errors.NotFound(f"a session ended with {process.returncode}: {said.strip()[-500:]}")
        found: dict[str, Any] = json.loads(out)
        return found


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("objects/*/*") if path.is_file())


# -- what it says ----------------------------------------------------------------------------------------------------


def curve(lives: Sequence[Lived]) -> list[tuple[int, float, float]]:
    """(step, mean, half the spread) over the seeds: spread is from the lowest to the highest."""
    losses: dict[int, list[float]] = {}
    for one in lives:
        for point in one.points:
            losses.setdefault(point.step, []).append(point.loss)
    whole = {step: found for step, found in losses.items() if len(found) == len(lives)}
    return [(step, statistics.fmean(found), (max(found) - min(found)) / 2) for step, found in sorted(whole.items())]


def steps_to(lived: Lived, loss: float) -> int | None:
    """The compute, in steps, after which a life first saw a loss this low; None when it never did."""
    return next((one.step for one in lived.points if one.loss <= loss), None)


def target(result: Result) -> float:
    """The loss to be reached: the best that starting afresh saw, mean over the seeds."""
    return statistics.fmean(min(one.loss for one in lived.points) for lived in result.of("fresh"))


def describe(result: Result) -> Iterator[str]:
    """The result as lines of text: whatever came out."""
    size = result.size
    what = f"{size.sessions} sessions of {size.iters} steps"
    seeds = f"{size.seeds} seeds, mean ± half the spread" if size.seeds > 1 else "one seed"
    yield f"validation loss after each of {what}; {seeds}"
    yield f"{'session':9}{'resumed':>18}{'fresh start':>18}{'never stopped':>18}"
    for i in range(size.sessions):
        ends = [[one.sessions[i].final_loss for one in result.of(life)] for life in ("resumed", "fresh")]
        ends.append([point.loss for one in result.of("unbroken") for point in one.points if _ends(point, i, size)])
        yield f"{i + 1:<9}" + "".join(f"{_spread(found):>18}" for found in ends)
    yield ""
    goal = target(result)
    yield f"to a loss of {goal:.4f}, the best of starting afresh, mean over the seeds:"
    for life, name in zip(LIVES, ("resumed", "fresh start", "never stopped"), strict=True):
        reached = [steps_to(one, goal) for one in result.of(life)]
        found = [steps for steps in reached if steps is not None]
        never = f", {reached.count(None)} of {len(reached)} never" if None in reached else ""
        yield f"  {name:15}{_spread(found, 0) if found else '-':>16} steps{never}"
    resumed = result.of("resumed")
    later = [session for one in resumed for session in one.sessions[1:]]
    yield ""
    yield f"stored in the remote at the end: {_size(statistics.fmean(one.stored for one in resumed))}"
    if later:
        down, up = (statistics.fmean(getattr(one, name) for one in later) for name in ("down", "up"))
        yield f"moved by a session that resumes: {_size(down)} down, {_size(up)} up"


def _ends(point: Point, session: int, size: Size) -> bool:
    return point.step == (session + 1) * size.iters


def _spread(values: Sequence[float], digits: int = 4) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):,.{digits}f} ± {(max(values) - min(values)) / 2:,.{digits}f}"


def _size(count: float) -> str:
    """Bytes, for people."""
    return castore.text.format_size(round(count))
