"""What a session saves and records: checkpoints in the background, their manifests' info, and its summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import castore
from castore import errors
from castore.torch import AsyncSaver
from nanecho import config as configs
from nanecho.config import Config
from nanecho.events import Began, Collected, Event, NotCollected, Pushing, Saved, Summary, TrainLosses
from nanecho.session import TrainingSession

_SAVES_PER_GC = 10
_RECORDED_REJECTIONS = 20  # a manifest stays small however many checkpoints there are


class BackgroundSaving:
    """Saves a session's checkpoints while training continues, one at a time.

    ``fields`` are the arguments of a save that all checkpoints of the session share.
    """

    def __init__(
        self, repo: castore.Repo, session: TrainingSession, saver: AsyncSaver, fields: Mapping[str, Any]
    ) -> None:
        self._repo, self._session, self._saver, self._fields = repo, session, saver, fields
        self._step = 0
        self._reasons: tuple[str, ...] = ()
        self._gc_is_due = False

    def begin(self, reasons: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Start to save the session as it is now. The save before must have ended: it becomes the parent."""
        session = self._session
        self._step, self._reasons = session.step, tuple(reasons)
        self._saver.save(
            _state(session),
            run=session.config.run.run,
            step=session.step,
            metrics=metrics,
            parent=session.parent,
            config=configs.recorded(session.config),
            info=_info(session, reasons),
            **self._fields,
        )

    def landed(self, *, wait: bool = False) -> Iterator[Event]:
        """Report the save that was begun, once it has ended; with ``wait``, wait for that."""
        saved = self._saver.wait() if wait else self._saver.poll()
        if saved is None:
            return
        session = self._session
        session.parent = saved.id
        session.checkpoints.append(saved.id)
        yield Saved(self._step, saved, self._reasons)
        self._gc_is_due |= len(session.checkpoints) % _SAVES_PER_GC == 0 or self._step == session.began.last
        yield from self._collect_garbage()

    def pushed(self) -> Iterator[Event]:
        """Wait until all checkpoints are pushed, if that is asked for, and report. PushIncomplete."""
        if unpushed := self._saver.unpushed:
            yield Pushing(len(unpushed))
        try:
            self._saver.finish_pushing()
        finally:
            yield from self._collect_garbage()

    def _collect_garbage(self) -> Iterator[Event]:
        """Collect garbage when it is time to, and no push holds the lock."""
        is_due = self._gc_is_due and self._session.ranks.rank == 0
        if is_due and self._repo.config.retention.auto_gc and not self._saver.is_pushing:
            self._gc_is_due = False
            yield _collect_garbage(self._repo, self._session, self._saver.unpushed)


def _collect_garbage(repo: castore.Repo, session: TrainingSession, unpushed: Sequence[str]) -> Event:
    resumed = session.began.match.id if session.began.match else None
    in_use = {checkpoint_id for checkpoint_id in (session.parent, resumed, *unpushed) if checkpoint_id}
    try:
        return Collected(castore.collect_garbage(repo, in_use=in_use, wait=False))
    except errors.CastoreError as error:
        return NotCollected(str(error).splitlines()[0])


def reasons_to_save(config: Config, step: int, last: int, stopping: str) -> list[str]:
    """Return why ``step`` is saved whatever its loss: on schedule, or as the last of the session."""
    reasons = []
    if step % config.run.save_every == 0:
        reasons.append(f"every {config.run.save_every}")
    if stopping:
        reasons.append(stopping)
    elif step == last:
        reasons.append("end")
    return reasons


def summarise(session: TrainingSession, stopped: str) -> Summary:
    """Return the summary of a session that ended because of ``stopped``."""
    began = session.began
    return Summary(
        run=session.config.run.run,
        started=session.started,
        stopped=stopped,
        start_step=began.step,
        final_step=session.step,
        steps=session.step - began.step,
        resumed_from=began.match.id if began.match else None,
        fresh=began.fresh,
        weights_only=began.weights_only,
        resolution=_resolution(began),
        start_loss=began.val_loss,
        final_loss=session.final_loss,
        best_loss=session.best_loss,
        train_losses=TrainLosses(
            first=began.step,
            every=session.train_losses.every,
            means=" ".join(f"{mean:.5g}" for mean in session.train_losses.means),
        ),
        checkpoints=session.checkpoints,
        skipped=session.skipped,
        tokens=session.tokens,
        seconds=round(session.seconds, 3),
        tokens_per_second=round(session.tokens_per_second, 1),
        connection_density=session.connections.density,
        environment=session.environment,
    )


def _state(session: TrainingSession) -> dict[str, Any]:
    return {
        "model": session.model.state_dict(),
        "optimizer": session.optimizer.state_dict(),
        "trainer": {
            "step": session.step,
            "best_loss": session.best_loss,
            "connections": {"ratio": session.connections.ratio, "density": session.connections.density},
            "tokenizer": session.corpus.tokenizer.definition,
        },
    }


def _info(session: TrainingSession, reasons: Sequence[str]) -> dict[str, Any]:
    began = session.began
    return {
        "saved_because": list(reasons),
        "connection_density": session.connections.density,
        "tokens_per_second": round(session.tokens_per_second, 1),
        "session": {
            "started": session.started,
            "start_step": began.step,
            "resumed_from": began.match.id if began.match else None,
            "fresh": began.fresh,
            "weights_only": began.weights_only,
            "init_from": began.warm.summary if began.warm else None,
            "resolution": _resolution(began),
        },
        "environment": session.environment,
    }


def _resolution(began: Began) -> dict[str, Any] | None:
    if began.resolution is None:
        return None
    rejected = began.resolution.rejected
    damaged = began.resolution.damaged[:_RECORDED_REJECTIONS]
    return {
        "want": began.resolution.selector,
        "match": began.match.id if began.match else None,
        "differences": list(began.match.differences) if began.match else [],
        "rejected": [
            {"id": checkpoint.id, "reasons": list(checkpoint.reasons)} for checkpoint in rejected[:_RECORDED_REJECTIONS]
        ],
        "rejected_count": len(rejected),
        "damaged": [file.path.rpartition("/manifests/")[2] for file in damaged],
        "instead_of": began.instead_of.id if began.instead_of else None,
    }
