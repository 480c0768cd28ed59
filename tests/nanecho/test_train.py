from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from castore import Repo, errors
from castore.dcp import Ranks
from castore.format.part_index import decode_chunks
from nanecho import config as configs
from nanecho import data, events
from nanecho import train as trainer

TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 2, "eval_samples": 4, "threads": 1,
    "warmup_iters": 2, "session_iters": 4, "eval_every": 2, "save_every": 4, "min_improvement": 0.0, "log_every": 1,
}  # fmt: skip


Session = Callable[..., list[events.Event]]


@pytest.fixture
def session(repo: Repo, texts: Path) -> Session:
    """Runs one session with tiny options and returns its events."""

    def run(**options: Any) -> list[events.Event]:
        stop = options.pop("stop", lambda: "")
        config = configs.make({"data_dir": str(texts), **TINY, **options})
        opened = Repo.open(repo.root.parent)
        return list(trainer.train(opened, config, started="2026-01-01T00:00:00.000000Z", stop=stop))

    return run


def only(kind: type, session_events: list[events.Event]) -> list[Any]:
    return [event for event in session_events if isinstance(event, kind)]


def summary(session_events: list[events.Event]) -> events.Summary:
    return cast(events.Finished, session_events[-1]).summary


def remove_part(repo: Repo, checkpoint_id: str, part: str) -> None:
    """Evict what a part alone needs, as a cache would."""
    parts = repo.find(checkpoint_id).manifest.parts
    repo.store.path(parts[part].index).unlink()


# -- sessions --------------------------------------------------------------------------------------------------------


def test_a_session_learns_saves_and_the_next_goes_on_from_there(repo: Repo, session: Session) -> None:
    first = summary(session())
    second = summary(session())
    assert (first.start_step, first.final_step, first.steps, first.resumed_from) == (0, 4, 4, None)
    assert (second.start_step, second.final_step, second.resumed_from) == (4, 8, first.checkpoints[-1])
    assert second.start_loss == first.final_loss
    losses = [(made.train_losses.first, made.train_losses.every, made.train_losses.means) for made in (first, second)]
    assert [(start, every, len(means.split())) for start, every, means in losses] == [(0, 1, 4), (4, 1, 4)]
    assert float(losses[0][2].split()[0]) > float(losses[1][2].split()[-1]) > 0
    assert second.final_loss is not None
    assert first.final_loss is not None
    assert second.final_loss < first.final_loss
    assert repo.find(second.checkpoints[0]).manifest.parent == first.checkpoints[-1]


def test_the_record_says_where_a_session_came_from_and_with_what(repo: Repo, session: Session) -> None:
    first = summary(session())
    other = summary(session(n_embd=32, allow_fresh=True))
    second = summary(session())
    info = repo.find(second.checkpoints[-1]).manifest.info
    assert info["session"]["resumed_from"] == first.checkpoints[-1]
    assert info["session"]["resolution"]["rejected"] == [
        {"id": checkpoint_id, "reasons": ["model n_embd is 32 there, 16 here"]}
        for checkpoint_id in reversed(other.checkpoints)
    ]
    assert info["connection_density"] == pytest.approx(0.1, abs=1e-3)
    assert info["tokens_per_second"] > 0
    assert info["environment"]["torch"] == str(torch.__version__)
    assert "git_commit" in info["environment"]


def test_no_checkpoint_is_a_fresh_start_that_is_said(session: Session) -> None:
    (began,) = only(events.Began, session())
    assert (began.step, began.fresh) == (0, "there is no checkpoint yet")


def test_resume_none_starts_from_scratch_beside_existing_checkpoints(session: Session) -> None:
    session()
    assert summary(session(resume="none")).start_step == 0


def test_nothing_left_to_train_is_an_error_and_not_a_session_of_zero_steps(repo: Repo, session: Session) -> None:
    session(max_iters=4)
    before = repo.catalog.listing()
    with pytest.raises(errors.NothingToDo, match="at step 4 and --max-iters is 4"):
        session(max_iters=4)
    assert repo.catalog.listing() == before


def test_latest_goes_on_from_the_newest_and_best_from_the_best(session: Session) -> None:
    first = summary(session(session_iters=40, save_every=40))
    worse = summary(session(session_iters=4, learning_rate=2.0, min_lr=2.0, grad_clip=0.0, save_every=4))
    assert worse.final_loss is not None
    assert first.final_loss is not None
    assert worse.final_loss > first.final_loss
    (best,) = only(events.Began, session(resume="best", session_iters=1, save_every=100, eval_every=100))
    assert (best.step, best.later_step) == (40, 44)
    (latest,) = only(events.Began, session(resume=worse.checkpoints[-1], session_iters=1))
    assert latest.step == 44


def test_other_options_that_do_not_shape_the_model_are_listed_as_differences(session: Session) -> None:
    session()
    (began,) = only(events.Began, session(batch_size=3, seed=4))
    assert list(began.match.differences) == ["batch_size is 2 there, 3 here", "seed is 1337 there, 4 here"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_embd": 32}, "n_embd is 16 there, 32 here"),
        ({"connection_seed": 1}, "connection_seed is 0 there, 1 here"),
        ({"tokenizer": "bpe", "vocab_size": 280}, "tokenizer is"),
    ],
)
def test_an_incompatible_checkpoint_is_never_replaced_by_a_silent_fresh_start(
    session: Session, options: dict[str, Any], says: str
) -> None:
    session()
    with pytest.raises(errors.NothingMatches, match=says):
        session(**options)
    (began,) = only(events.Began, session(allow_fresh=True, **options))
    assert began.step == 0
    assert "--allow-fresh" in began.fresh
    assert says in began.resolution.rejected[0].reasons[0] + began.resolution.rejected[0].reasons[-1]


def test_other_data_is_told_by_its_content_and_allowed_on_request(session: Session, texts: Path) -> None:
    session()
    moved = texts.rename(texts.parent / "moved")
    assert summary(session(data_dir=str(moved))).start_step == 4
    (moved / "0.txt").write_text("something else\n" * 60)
    with pytest.raises(errors.NothingMatches, match="data is"):
        session(data_dir=str(moved))
    (began,) = only(events.Began, session(data_dir=str(moved), allow_data_change=True))
    assert began.step == 8
    assert any(text.startswith("data is") for text in began.match.differences)


def test_a_session_that_would_only_repeat_an_earlier_one_goes_on_from_its_end(repo: Repo, session: Session) -> None:
    good = summary(session(session_iters=20, save_every=20, eval_every=20))
    bad = {"learning_rate": 2.0, "min_lr": 2.0, "grad_clip": 0.0}
    worse = summary(session(**bad))
    assert (worse.start_step, worse.final_step) == (20, 24)
    session_events = session(**bad)
    (began,) = only(events.Began, session_events)
    assert (began.step, began.instead_of.id) == (24, good.checkpoints[-1])
    assert summary(session_events).final_step == 28
    info = repo.find(summary(session_events).checkpoints[-1]).manifest.info
    assert info["session"]["resolution"]["instead_of"] == good.checkpoints[-1]
    # with other options it is no repetition
    (began,) = only(events.Began, session(session_iters=1, save_every=100, eval_every=100))
    assert (began.step, began.later_step) == (20, 28)


def test_options_of_the_optimizer_are_this_session_s_and_not_the_checkpoint_s(repo: Repo, session: Session) -> None:
    session()
    changed = summary(session(weight_decay=0.7, beta1=0.5))
    groups = repo.load(changed.checkpoints[-1], parts=["optimizer"])["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.7, (0.5, 0.99)), (0.0, (0.5, 0.99))]


def test_a_loss_measured_on_other_data_is_not_compared_with(session: Session, texts: Path) -> None:
    session(session_iters=40, save_every=40)
    for path in texts.iterdir():
        path.write_text(path.read_text()[::-1])
    session_events = session(allow_data_change=True)
    assert (summary(session_events).start_step, summary(session_events).start_loss) == (40, None)
    assert only(events.Saved, session_events)[0].reasons[0] == "first"


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"<<<<<<< HEAD\n" + data])
def test_a_damaged_manifest_never_leads_to_a_silent_fresh_start(
    repo: Repo, session: Session, damage: Callable[[bytes], bytes]
) -> None:
    session(session_iters=2)
    (path,) = repo.root.glob("manifests/main/*.json")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(errors.CorruptManifest, match=str(path)):
        session()
    (began,) = only(events.Began, session(allow_fresh=True))
    assert began.resolution.damaged[0].path == str(path)


def test_a_checkpoint_that_is_not_of_this_trainer_is_passed_over_or_told(repo: Repo, session: Session) -> None:
    first = summary(session())
    experiment = repo.find(first.checkpoints[-1]).manifest.experiment
    partial = repo.save({"model": {}}, run="other", step=9, metrics={"val_loss": 0.0}, experiment=experiment)
    (began,) = only(events.Began, session())
    assert began.match.id == first.checkpoints[-1]
    assert began.resolution.rejected[0].reasons[0] == "optimizer, trainer: this checkpoint has no such part"
    with pytest.raises(errors.NothingMatches, match="was not saved by nanecho"):
        session(resume=partial.id)


def test_garbage_is_collected_after_saving_when_the_settings_say_so(repo: Repo, session: Session) -> None:
    config = repo.root / "config.toml"
    config.write_text(config.read_text().replace("auto_gc = false", "auto_gc = true\nkeep = 1\nkeep_optimizer = 1"))
    repo = Repo.open(repo.root.parent)
    session_events = session()
    (collected,) = only(events.Collected, session_events)
    assert collected.plan.delete
    kept = [entry.id for entry in repo.checkpoints() if repo.part_states(entry)["model"].where == "local"]
    assert kept[0] == summary(session_events).checkpoints[-1]
    assert len(kept) <= 2


def test_a_name_of_nothing_is_never_a_fresh_start(repo: Repo, session: Session) -> None:
    for name in ("nosuch:best", "0123"):
        with pytest.raises(errors.NotFound, match="no checkpoint"):
            session(resume=name)
    assert not repo.catalog.listing().entries


# -- data that is missing --------------------------------------------------------------------------------------------


def test_evicted_data_is_an_error_unless_a_fresh_start_is_allowed(repo: Repo, session: Session) -> None:
    session()
    shutil.rmtree(repo.root / "objects")
    repo = Repo.open(repo.root)
    with pytest.raises(errors.NothingAvailable, match="step 4\\): its data is not in the store"):
        session()
    (began,) = only(events.Began, session(allow_fresh=True))
    assert began.fresh.startswith("no checkpoint can be resumed")


def test_on_missing_fresh_starts_from_scratch_and_says_why(repo: Repo, session: Session, texts: Path) -> None:
    session()
    shutil.rmtree(repo.root / "objects")
    with (repo.root / "config.toml").open("a") as file:
        file.write('[resume]\non_missing = "fresh"\n')
    config = configs.make({"data_dir": str(texts), **TINY})
    session_events = list(trainer.train(Repo.open(repo.root), config, started="2026-01-01T00:00:00.000000Z"))
    (began,) = only(events.Began, session_events)
    assert 'on_missing = "fresh"' in began.fresh


def test_the_next_best_is_taken_when_the_best_is_evicted(repo: Repo, session: Session) -> None:
    first = summary(session())
    remove_part(repo, first.checkpoints[-1], "model")
    (began,) = only(events.Began, session())
    assert began.match.id == first.checkpoints[-2]
    assert began.resolution.rejected[0].id == first.checkpoints[-1]


def test_weights_alone_are_resumed_loudly_and_recorded(repo: Repo, session: Session) -> None:
    first = summary(session(eval_every=4))
    remove_part(repo, first.checkpoints[-1], "optimizer")
    session_events = session()
    (began,) = only(events.Began, session_events)
    assert (began.step, began.weights_only) == (4, True)
    assert repo.find(summary(session_events).checkpoints[-1]).manifest.info["session"]["weights_only"] is True


def test_a_damaged_object_is_an_error_and_nothing_is_taken_in_its_place(repo: Repo, session: Session) -> None:
    first = summary(session())
    best = first.checkpoints[-1]
    index = repo.find(best).manifest.parts["model"].index
    path = repo.store.path(decode_chunks(repo.store.read(index))[0].id)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(errors.CorruptObject, match=rf"part 'model' of checkpoint {best[:12]}"):
        session()


# -- saving ----------------------------------------------------------------------------------------------------------


def test_a_skipped_save_says_why_and_has_no_id(repo: Repo, session: Session) -> None:
    session_events = session(session_iters=6, save_every=100, eval_every=2, min_improvement=5.0)
    skipped = only(events.Skipped, session_events)
    assert [event.step for event in skipped] == [4]
    assert re.fullmatch(r"\d\.\d{4} is not 5 below \d\.\d{4}", skipped[0].reason)
    assert summary(session_events).skipped
    saved = [event.saved.id for event in only(events.Saved, session_events)]
    assert [entry.id for entry in reversed(repo.checkpoints())] == saved


def test_checkpoints_are_made_on_improvement_every_so_often_and_at_the_end(session: Session) -> None:
    session_events = session(session_iters=7, save_every=3, eval_every=2)
    reasons = {event.step: event.reasons for event in only(events.Saved, session_events)}
    assert reasons[2] == ("first",)
    assert reasons[3][-1] == "every 3"
    assert reasons[6][-1] == "every 3"
    assert reasons[7][-1] == "end"


def test_a_signal_ends_the_session_after_its_step_with_a_checkpoint(repo: Repo, session: Session) -> None:
    asked = iter(["", "", "", "SIGTERM"])
    session_events = session(session_iters=100, save_every=100, eval_every=100, stop=lambda: next(asked))
    assert summary(session_events).stopped == "SIGTERM"
    (saved,) = only(events.Saved, session_events)
    assert (saved.step, saved.reasons) == (3, ("first", "SIGTERM"))
    assert repo.load(saved.saved.id)["trainer"]["step"] == 3


def test_a_loss_that_is_not_a_number_stops_and_saves_nothing(repo: Repo, session: Session) -> None:
    first = summary(session())
    with pytest.raises(trainer.Diverged, match="not finite after step"):
        session(learning_rate=1e38, min_lr=1e38, grad_clip=0.0, eval_every=100, save_every=100)
    assert repo.catalog.listing().entries[0].id == first.checkpoints[-1]
    assert summary(session()).start_step == 4


def test_a_young_checkpoint_is_sparse_and_stores_small(repo: Repo, session: Session) -> None:
    big = {"n_embd": 64, "session_iters": 1}
    young = summary(session(**big)).checkpoints[-1]
    dense = summary(session(**big, connection_ratio=1.0, allow_fresh=True)).checkpoints[-1]
    sizes = [
        sum(part.stored_bytes for part in repo.find(checkpoint_id).manifest.parts.values())
        for checkpoint_id in (young, dense)
    ]
    assert sizes[0] < 0.6 * sizes[1]


def test_growth_is_reported_with_the_counted_density_and_recorded(repo: Repo, session: Session) -> None:
    session_events = session(connection_every=2)
    assert [(event.step, round(event.density, 2)) for event in only(events.Grew, session_events)] == [(2, 0.15)]
    assert repo.load(summary(session_events).checkpoints[-1])["trainer"]["connections"] == {
        "ratio": pytest.approx(0.15), "density": pytest.approx(0.15, abs=1e-3),
    }  # fmt: skip


# -- pure parts ------------------------------------------------------------------------------------------------------


def test_the_schedule_counts_from_the_first_step_of_the_run() -> None:
    options = configs.Training(max_iters=1000, warmup_iters=100, learning_rate=1.0, min_lr=0.1)
    rate = [trainer.learning_rate(options, step) for step in range(1001)]
    assert rate[:100] == sorted(rate[:100])
    assert rate[99] == 1.0
    assert set(rate[100:801]) == {1.0}
    assert rate[900] == pytest.approx(0.55)
    assert rate[1000] == pytest.approx(0.1)
    options = configs.Training(max_iters=1000, schedule="cosine")
    assert [trainer.learning_rate(options, step) for step in (100, 550, 1000)] == pytest.approx([2e-3, 1.05e-3, 1e-4])


def test_a_resumed_session_uses_the_rate_of_the_global_step(session: Session) -> None:
    session(max_iters=20, warmup_iters=10)
    rates = {event.step: event.learning_rate for event in only(events.Stepped, session(max_iters=20, warmup_iters=10))}
    assert rates == {step: pytest.approx(2e-3 * step / 10) for step in (5, 6, 7, 8)}


def test_evaluation_expects_the_next_token_and_no_other(repo: Repo, texts: Path) -> None:
    config = configs.make({"data_dir": str(texts), **TINY})
    corpus = data.load(config.data, config.model.block_size)
    session = trainer.fresh_session(repo, config, corpus, torch.device("cpu"), "", Ranks())
    windows = (np.arange(17) + np.arange(5)[:, None]) % 50

    def successor(tokens: torch.Tensor) -> torch.Tensor:
        return 100.0 * torch.nn.functional.one_hot((tokens + 1) % 50, 50).float()

    loss, accuracy = trainer.evaluate(session, successor, windows)
    assert accuracy == 1.0
    assert loss < 1e-6


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n_layr": 3}, "unknown option 'n_layr': did you mean n_layer?"),
        ({"n-layer": 3}, "did you mean n_layer?"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_embd": 30, "n_head": 4}, "can't be divided by n_head 4"),
        ({"schedule": "linear"}, "schedule"),
        ({"min_lr": 1.0}, "min_lr 1 is above learning_rate 0.002"),
    ],
)
def test_a_wrong_option_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        configs.make(given, "run.toml")
    assert says in str(caught.value)
    assert str(caught.value).startswith("run.toml: ")


def test_an_unknown_device_is_a_usage_error(session: Session) -> None:
    with pytest.raises(errors.UsageError, match="--device abacus"):
        session(device="abacus")
