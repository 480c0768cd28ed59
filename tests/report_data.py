"""Repositories to make reports of: several runs, resumed sessions, growth, and data that is gone."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from castore import Experiment, Metric, Repo, gc
from castore.errors import CastoreError
from castore.policy.retention import Policy

HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'
DISGUISED = "a\u202egnp.exe <b>bold</b> & \u2028 | `code` ${x}"
MERGES = random.Random(0).randbytes(30_000)
START = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)

ENVIRONMENT = {
    "castore": "0.1.0",
    "torch": "2.13.0+cpu",
    "python": "3.11.7",
    "system": "Linux x86_64",
    "device": "cpu",
    "threads": 2,
    "git_commit": "76dc1132521033b18c51f3ecb4ffbaa380f7a89f",
}


def experiment_of(n_layer: int = 4) -> Experiment:
    return Experiment(
        model={"n_layer": n_layer, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 257},
        tokenizer="1c" * 32,
        data="13" * 32,
        evaluation={"samples": 128, "tokens": 128, "data": "20" * 32},
        metrics={"val_accuracy": Metric(low=0.0, high=1.0)},
    )


class Story:
    """Records sessions as a trainer would."""

    def __init__(self, repo: Repo, seed: int = 1) -> None:
        self.repo = repo
        self.rng = random.Random(seed)
        self.now = START

    def train_losses(self, first: int, steps: int, worse: float) -> dict[str, Any]:
        means = [
            1.28 + worse + 3.9 * math.exp(-(first + at) / 900) + self.rng.gauss(0, 0.06) for at in range(0, steps, 4)
        ]
        return {"first": first, "every": 4, "means": " ".join(f"{mean:.5g}" for mean in means)}

    def session(
        self,
        run: str,
        start: str | None,
        steps: int,
        every: int,
        *,
        stopped: str | None = "session-iters",
        tags: tuple[str, ...] = (),
        note: str = "",
        environment: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        rejected: int = 0,
        of: Experiment | None = None,
        worse: float = 0.0,
    ) -> str:
        """Train ``steps`` from checkpoint ``start`` and return the id of the last checkpoint.

        Without ``stopped`` the session leaves no summary.
        """
        self.now += timedelta(hours=6)
        started, resumed = self.now, self.repo.find(start).manifest if start else None
        step = resumed.step if resumed else 0
        facts = {**ENVIRONMENT, "git_commit": f"{self.rng.getrandbits(160):040x}", **(environment or {})}
        passed = [
            {"id": f"{i:064x}", "reasons": ["model: n_layer is 2 there, 4 here", "the data of part model is gone"]}
            for i in range(rejected)
        ]
        choice = {
            "want": "best",
            "match": start,
            "differences": ["config: learning_rate is 0.002 there, 0.001 here"] if start and config else [],
            "rejected": passed,
            "rejected_count": len(passed),
            "damaged": [],
            "instead_of": None,
        }
        beginning = {
            "started": f"{started:%Y-%m-%dT%H:%M:%S.%fZ}",
            "start_step": step,
            "resumed_from": start,
            "fresh": "" if start else "there is no checkpoint yet",
            "weights_only": False,
            "resolution": choice,
        }
        made: list[str] = []
        losses: list[float] = []
        parent, density, speed = start, 0.1, 12_000 + self.rng.random() * 1000
        for at in range(step + every, step + steps + 1, every):
            self.now += timedelta(minutes=7)
            loss = 1.35 + worse + 3.9 * math.exp(-at / 900) + self.rng.gauss(0, 0.012)
            density = min(1.0, 0.1 + 0.05 * (at // 500))
            saved = self.repo.save(
                {
                    "model": {"step": at, "weights": self.rng.randbytes(60_000)},
                    "optimizer": {"moments": bytes(40_000) + self.rng.randbytes(20_000)},
                    "trainer": {"step": at},
                    "tokenizer": {"merges": MERGES},  # equal in all checkpoints, so stored once
                },
                run=run,
                step=at,
                parent=parent,
                experiment=of or experiment_of(),
                metrics={
                    "val_loss": loss,
                    "train_loss": loss - 0.05 - 0.1 * self.rng.random(),
                    "val_accuracy": 1 / (1 + loss),
                    **({"other": loss + 1, HOSTILE: loss} if run == "small" else {}),
                },
                tags=tags if at == step + steps else (),
                note=note if at == step + steps else "",
                config={"learning_rate": 0.002, "batch_size": 16, "seed": 2**62 + 1, **(config or {})},
                info={
                    "saved_because": ["every 100"],
                    "connection_density": density,
                    "tokens_per_second": round(speed, 1),
                    "session": beginning,
                    "environment": facts,
                },
                created=self.now,
            )
            made.append(saved.id)
            losses.append(loss)
            parent = saved.id
        if stopped is not None:
            summary = {
                **beginning,
                "run": run,
                "stopped": stopped,
                "final_step": step + steps,
                "steps": steps,
                "start_loss": resumed.metrics["val_loss"] if resumed else None,
                "final_loss": losses[-1],
                "best_loss": min(losses),
                **({"train_losses": self.train_losses(step, steps, worse)} if run == "main" else {}),
                "checkpoints": made,
                "skipped": ["step 150: the disk is full"] if rejected else [],
                "tokens": steps * 2048,
                "seconds": steps * 2048 / speed,
                "tokens_per_second": round(speed, 1),
                "connection_density": density,
                "environment": facts,
            }
            self.repo.add_session(run, started, summary)
        assert parent is not None
        return parent


def build(repo: Repo) -> None:
    """Save runs of two experiments with branches, hostile text, and checkpoints whose data is partly or wholly gone."""
    story = Story(repo)
    first = story.session("main", None, 500, 100)
    second = story.session("main", first, 500, 100, rejected=3, tags=("stable",))
    story.session("wide-batch", first, 400, 100, config={"batch_size": 64}, worse=0.08, stopped="SIGTERM")
    third = story.session("main", second, 600, 100, environment={"threads": 4, "torch": "2.14.0+cpu"})
    story.session("low-lr", second, 300, 100, config={"learning_rate": 0.001}, worse=0.03, stopped=None)
    story.session(
        "main", third, 400, 100, config={"learning_rate": 0.001}, tags=(HOSTILE, DISGUISED, "release"), note=HOSTILE
    )
    story.session(
        "small",
        None,
        300,
        100,
        of=experiment_of(2),
        worse=0.6,
        environment={HOSTILE: HOSTILE},
        stopped="loss was not finite",
    )
    story.session("main", third, 200, 100, worse=-0.02, environment={"device": "NVIDIA H100 80GB HBM3"})
    gc.collect_garbage(repo, Policy(keep=8, keep_optimizer=3), now=story.now + timedelta(days=3), grace=timedelta(0))


def build_many(repo: Repo, count: int, sessions: int = 40) -> None:
    """Save ``count`` checkpoints in ``sessions`` sessions, each resumed from the newest checkpoint or an older one."""
    story = Story(repo)
    each = max(1, count // sessions)
    ends: list[str] = []
    for i in range(sessions):
        back = 2 if i % 7 == 6 else 1
        start = ends[-back] if len(ends) >= back else None
        run = ("main", "wide-batch", "low-lr")[i % 7 == 6 and 1 + i % 2]
        environment = {"threads": 2 + 2 * (i > 20)}
        ends.append(story.session(run, start, each * 50, 50, environment=environment, rejected=min(i, 20)))
    try:
        gc.collect_garbage(repo, now=story.now + timedelta(days=3), grace=timedelta(0))
    except CastoreError as error:
        raise AssertionError(error) from error
