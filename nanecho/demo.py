"""Measure what resuming is worth, with real sessions: each is a process of its own on an emptied machine.

Three lives of one training budget, for several seeds: *resumed*, sessions that each resume the best checkpoint, which a
remote keeps between them; *fresh*, as many sessions that each start from scratch; *unbroken*, one that never stops.
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
    """How much is trained: ``iters`` steps per session, evaluated ``points`` times in each."""

    seeds: int
    sessions: int
    iters: int
    points: int = 5


FULL = Size(seeds=3, sessions=5, iters=300)
QUICK = Size(seeds=2, sessions=3, iters=60, points=3)


class Point(msgspec.Struct, frozen=True):
    """A validation loss, in nats per token, after ``step`` steps of compute in this life."""

    step: int
    loss: float


class MeasuredSession(msgspec.Struct, frozen=True, kw_only=True):
    """One session: where it started, what it reached, and the bytes that it moved from and to the remote."""

    start_step: int
    final_step: int
    final_loss: float
    down: int
    up: int


class MeasuredLife(msgspec.Struct, frozen=True, kw_only=True):
    """One life with one seed. ``stored``: bytes in the remote at its end, or where it trained if it has none."""

    life: Life
    seed: int
    sessions: list[MeasuredSession]
    points: list[Point]
    stored: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All lives, in the order of ``LIVES``."""

    size: Size
    lives: list[MeasuredLife]

    def of(self, life: Life) -> list[MeasuredLife]:
        return [measured for measured in self.lives if measured.life == life]


@dataclass(frozen=True, slots=True)
class SessionsDone:
    """How many sessions have ended, of how many."""

    done: int
    total: int


class SessionFailed(errors.CastoreError):
    """A session of the demo ended with an error, or was not started because another one had."""


def run(folder: Path, program: Sequence[str], size: Size, jobs: int) -> Iterator[SessionsDone | Result]:
    """Train all lives in ``folder``, ``jobs`` at a time, with ``program`` as the command. Yield the Result last.

    Raise SessionFailed when a session fails, with the end of what it wrote to standard error.
    """
    total = size.seeds * (2 * size.sessions + 1)
    texts = _texts(folder / "texts")
    done: list[None] = []
    # the longest chains first: two of them keep two processors busy to the end
    tasks = [(life, seed) for life in LIVES for seed in range(size.seeds)]
    with ThreadPoolExecutor(jobs) as pool:
        machine = _Machine(folder, texts, program, size, lambda: done.append(None))
        futures = [pool.submit(machine.train_life, life, seed) for life, seed in tasks]
        try:
            shown = -1
            while not all(future.done() for future in futures):
                if len(done) != shown:
                    shown = len(done)
                    yield SessionsDone(shown, total)
                _wait(futures)
            yield SessionsDone(total, total)
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
    """Copy some of the source of Python's standard library into ``folder``."""
    folder.mkdir(parents=True)
    left = _TEXT_BYTES
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if (size := path.stat().st_size) <= left:
            shutil.copyfile(path, folder / path.name)
            left -= size
    return folder


class _Machine:
    """Trains lives, which several threads may do at once, each for one life."""

    def __init__(
        self, folder: Path, texts: Path, program: Sequence[str], size: Size, on_end: Callable[[], None]
    ) -> None:
        self._folder, self._texts, self._program, self._size = folder, texts, program, size
        self._on_end = on_end
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def stop(self) -> None:
        """Kill the sessions that still run, and start no more."""
        self._stopped = True
        for process in list(self._running):
            process.kill()

    def train_life(self, life: Life, seed: int) -> MeasuredLife:
        size = self._size
        root = self._folder / f"{life}-{seed}"
        if life == "fresh":
            trained = [self._session(root / str(i), life, 1000 * (seed + 1) + i) for i in range(size.sessions)]
        elif life == "resumed":
            remote = root / "remote"
            trained = [self._session(root / "machine", life, seed, remote) for _ in range(size.sessions)]
        else:
            trained = [self._session(root, life, seed)]
        points = []
        for i, (session, repo) in enumerate(trained):
            offset = i * size.iters if life == "fresh" else 0
            points += [
                Point(offset + entry.manifest.step, entry.manifest.metrics["val_loss"])
                for entry in reversed(repo.checkpoints())
                if session.start_step < entry.manifest.step <= session.final_step
            ]
        stored = remote if life == "resumed" else root
        return MeasuredLife(
            life=life, seed=seed, sessions=[session for session, _ in trained], points=points, stored=_bytes(stored)
        )

    def _session(
        self, folder: Path, life: Life, seed: int, remote: Path | None = None
    ) -> tuple[MeasuredSession, castore.Repo]:
        """Run one session; afterwards what it stored is in the remote, and the machine is empty."""
        size = self._size
        is_first = not (folder / ".castore").exists()
        repo = castore.Repo.init(folder)
        if is_first:
            settings = "[store]\nfsync = false\n[retention]\nauto_gc = false\n"
            if remote:
                settings += f"[remotes]\nremote = {json.dumps(str(remote))}\n"
            (repo.root / "config.toml").write_text(settings)
        steps = size.iters * (size.sessions if life == "unbroken" else 1)
        # the schedule of a life that starts fresh each time ends with the session
        horizon = size.iters if life == "fresh" else size.iters * size.sessions
        every = max(1, size.iters // size.points)
        options = _OPTIONS | {
            "data-dir": self._texts, "seed": seed, "session-iters": steps, "max-iters": horizon, "eval-every": every,
            "save-every": every, "connection-every": max(1, size.iters // 2),
            "resume": "best" if life == "resumed" else "none",
        }  # fmt: skip
        summary = self._train(folder, [text for name, value in options.items() for text in (f"--{name}", str(value))])
        down, up = _hand_over(repo.root / "objects", remote / "objects") if remote else (0, 0)
        self._on_end()
        session = MeasuredSession(
            start_step=summary["start_step"],
            final_step=summary["final_step"],
            final_loss=summary["final_loss"],
            down=down,
            up=up,
        )
        return session, castore.Repo.open(folder)

    def _train(self, folder: Path, options: Sequence[str]) -> dict[str, Any]:
        if self._stopped:
            raise SessionFailed("the demo was stopped")
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
            stdout, stderr = process.communicate()
        finally:
            self._running.discard(process)
        if process.returncode:
            raise SessionFailed(f"a session ended with exit code {process.returncode}: {stderr.strip()[-500:]}")
        summary: dict[str, Any] = json.loads(stdout)
        return summary


def _hand_over(machine: Path, remote: Path) -> tuple[int, int]:
    """Move the objects of a machine to the remote and empty the machine. Return (bytes fetched before, bytes moved)."""
    in_remote = {path.name for path in remote.glob("*/*")}
    on_machine = {path.name: path for path in machine.glob("*/*")}
    down = sum(path.stat().st_size for name, path in on_machine.items() if name in in_remote)
    up = 0
    for name in on_machine.keys() - in_remote:
        up += on_machine[name].stat().st_size
        target = remote / name[:2]
        target.mkdir(parents=True, exist_ok=True)
        shutil.move(on_machine[name], target / name)
    shutil.rmtree(machine)
    return down, up


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("objects/*/*") if path.is_file())


# -- in words -------------------------------------------------------------------------------------------------------


def curve(lives: Sequence[MeasuredLife]) -> list[tuple[int, float, float]]:
    """Return (step, mean loss, half the spread) over the seeds; the spread is from the lowest to the highest loss."""
    losses: dict[int, list[float]] = {}
    for life_result in lives:
        for point in life_result.points:
            losses.setdefault(point.step, []).append(point.loss)
    whole = {step: values for step, values in losses.items() if len(values) == len(lives)}
    return [(step, statistics.fmean(values), (max(values) - min(values)) / 2) for step, values in sorted(whole.items())]


def steps_to(life: MeasuredLife, loss: float) -> int | None:
    """Return the steps of compute after which a life first had a loss this low; None if it never did."""
    return next((point.step for point in life.points if point.loss <= loss), None)


def target(result: Result) -> float:
    """Return the loss to reach: the best one of fresh starts, mean over the seeds."""
    return statistics.fmean(min(point.loss for point in life.points) for life in result.of("fresh"))


def describe(result: Result) -> Iterator[str]:
    """Yield the result as lines of text, whatever it is."""
    size = result.size
    what = f"{size.sessions} sessions of {size.iters} steps"
    seeds = f"{size.seeds} seeds, mean ± half the spread" if size.seeds > 1 else "one seed"
    yield f"validation loss after each of {what}; {seeds}"
    yield f"{'session':9}{'resumed':>18}{'fresh start':>18}{'never stopped':>18}"
    for i in range(size.sessions):
        ends = [[measured.sessions[i].final_loss for measured in result.of(life)] for life in ("resumed", "fresh")]
        ends.append(
            [point.loss for measured in result.of("unbroken") for point in measured.points if _ends(point, i, size)]
        )
        yield f"{i + 1:<9}" + "".join(f"{_spread(losses):>18}" for losses in ends)
    yield ""
    goal = target(result)
    yield f"to a loss of {goal:.4f}, the best of fresh starts, mean over the seeds:"
    for life, name in zip(LIVES, ("resumed", "fresh start", "never stopped"), strict=True):
        reached = [steps_to(measured, goal) for measured in result.of(life)]
        steps_taken = [steps for steps in reached if steps is not None]
        never = f", {reached.count(None)} of {len(reached)} never" if None in reached else ""
        yield f"  {name:15}{_spread(steps_taken, 0) if steps_taken else '-':>16} steps{never}"
    resumed = result.of("resumed")
    later = [session for measured in resumed for session in measured.sessions[1:]]
    yield ""
    yield f"stored in the remote at the end: {_size(statistics.fmean(measured.stored for measured in resumed))}"
    if later:
        down, up = (statistics.fmean(getattr(session, name) for session in later) for name in ("down", "up"))
        yield f"moved by a session that resumes: {_size(down)} down, {_size(up)} up"


def _ends(point: Point, session: int, size: Size) -> bool:
    return point.step == (session + 1) * size.iters


def _spread(values: Sequence[float], digits: int = 4) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):,.{digits}f} ± {(max(values) - min(values)) / 2:,.{digits}f}"


def _size(count: float) -> str:
    """A number of bytes, for people."""
    return castore.text.format_size(round(count))
