"""Real trainings that are killed, lose their output folder, and go on: all of it equals an uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from castore import Repo, collect_garbage
from castore.convert import export_folder
from castore.policy.retention import Policy

pytestmark = pytest.mark.peers
HARNESS = Path(__file__).parent / "harness.py"
PYTHON = os.environ.get("CASTORE_FRAMEWORKS_PYTHON") or str(
    Path(__file__).parents[2] / "build" / "frameworks" / "venv" / "bin" / "python"
)


def train(name: str, root: Path, at: int = 0, code: int = 0, ranks: int = 1, **options: Any) -> dict[str, Any]:
    """Run an example; return what it reports at its end, nothing if it is killed."""
    root.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [PYTHON, *torchrun, str(HARNESS), name, str(root), str(at), json.dumps(options)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(results[-1].removeprefix("RESULT ")) if results else {}


@pytest.mark.parametrize(
    ("name", "killed_at", "options"),
    [("transformers", 23, {"replace": True}), ("lightning", 23, {}), ("accelerate", 9, {})],
    ids=["transformers", "lightning", "accelerate"],
)
def test_two_ranks_go_on_exactly(tmp_path: Path, name: str, killed_at: int, options: dict[str, Any]) -> None:
    whole = train(name, tmp_path / "whole", ranks=2, **options)
    train(name, tmp_path / "killed", killed_at, code=1, ranks=2, **options)  # torchrun's own code
    shutil.rmtree(tmp_path / "killed" / "out", ignore_errors=True)
    resumed = train(name, tmp_path / "killed", ranks=2, **options)
    equal = {"model", "optimizer", "schedule", "log", "step"} & whole.keys()
    assert {key: resumed[key] for key in equal} == {key: whole[key] for key in equal}
    assert whole.get("resumed", False) is not resumed.get("resumed", True)


EXAMPLES = Path(__file__).parents[2] / "examples" / "frameworks"


@pytest.mark.parametrize("name", ["transformers_trainer", "lightning_module", "accelerate_loop"])
def test_an_example_runs_and_goes_on(tmp_path: Path, name: str) -> None:
    before, after = EXAMPLES / "before" / f"{name}.py", EXAMPLES / f"{name}.py"
    for script, saved in ((before, 0), (after, 1)):
        process = subprocess.Popen(
            [PYTHON, str(script)], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        manifests: list[Path] = []
        while process.poll() is None and not manifests and time.monotonic() < deadline:
            time.sleep(0.05)
            manifests = list((tmp_path / ".castore").glob("manifests/*/*"))
        if saved:
            process.kill()
        _, err = process.communicate()
        assert process.returncode in ((0, -9) if saved else (0,)), err.decode()[-2000:]
        assert bool(manifests) == bool(saved)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    done = subprocess.run([PYTHON, str(after)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    newest = Repo.open(tmp_path).checkpoints()[0]
    assert newest.manifest.step == {"transformers_trainer": 60, "lightning_module": 60, "accelerate_loop": 24}[name]


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "killed_at"), [({}, 23), ({"bf16": True}, 14), ({"dataloader_num_workers": 2}, 27)], ids=str
)
@pytest.mark.parametrize("replace", [True, False])
def test_the_trainer_goes_on_exactly(tmp_path: Path, options: dict[str, Any], killed_at: int, replace: bool) -> None:
    whole = train("transformers", tmp_path / "whole", replace=replace, **options)
    train("transformers", tmp_path / "killed", killed_at, code=-9, replace=replace, **options)
    shutil.rmtree(tmp_path / "killed" / "out", ignore_errors=True)
    resumed = train("transformers", tmp_path / "killed", replace=replace, **options)
    assert not whole.pop("resumed")
    assert resumed.pop("resumed")
    folders = whole.pop("folders"), resumed.pop("folders")
    assert resumed == whole
    assert bool(folders[0]) != replace


def killed_and_resumed(root: Path, name: str, killed_at: int, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run reports that never stopped, and one that was killed."""
    whole = train(name, root / "whole", **options)
    train(name, root / "killed", killed_at, code=-9, **options)
    return whole, train(name, root / "killed", **options)


# what docs/frameworks.md says is not exact: should a framework mend it, this tells
def test_a_mean_over_steps_before_a_kill_is_lost_by_the_trainer(tmp_path: Path) -> None:
    whole, resumed = killed_and_resumed(tmp_path, "transformers", 23, replace=True, logging=7)
    logged = [{one["step"]: one["loss"] for one in run["log"] if "loss" in one} for run in (whole, resumed)]
    assert list(logged[0]) == list(logged[1]) == [7, 14, 21, 28]
    assert logged[0].pop(21) != logged[1].pop(21)  # of the steps 15 to 21, the first six were before the kill
    assert logged[0] == logged[1]
    assert (whole["model"], whole["optimizer"]) == (resumed["model"], resumed["optimizer"])


def test_the_trainers_metrics_make_the_score(tmp_path: Path) -> None:
    result = train("transformers", tmp_path / "run", replace=True)
    repo = Repo.open(tmp_path / "run")
    losses = {entry.manifest.step: entry.manifest.metrics["val_loss"] for entry in repo.checkpoints()}
    assert list(losses) == [30, 20, 10]
    assert repo.find("gpt2:best").manifest.step == min(losses, key=losses.__getitem__) == result["best"][1]
    assert repo.find("gpt2:best").manifest.metrics["val_loss"] == pytest.approx(result["best"][0])
    # save_total_limit=1 is for folders: what castore keeps, its own collection decides, and that leaves the best
    collect_garbage(repo, Policy(keep=1), grace=timedelta(0))
    assert {entry.manifest.step for entry in repo.checkpoints()} >= {result["best"][1], 30}
    assert repo.load("gpt2:best").keys() == repo.load("gpt2:latest").keys()


def test_the_trainer_saves_for_sigterm(tmp_path: Path) -> None:
    train("transformers", tmp_path / "run", 13, replace=True, terminate=True, enable_jit_checkpoint=True)
    saved = Repo.open(tmp_path / "run").find("gpt2:latest").manifest
    assert saved.step not in (10, 20, 30)
    assert train("transformers", tmp_path / "run", replace=True)["resumed"]


LOAD = """
import sys, torch, castore
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
stored = castore.Repo.open(sys.argv[1]).load("gpt2:best", ["model"])["model"]
loaded = model.state_dict()
assert stored.keys() == loaded.keys()
assert all(torch.equal(stored[key], loaded[key]) for key in stored)
assert model.lm_head.weight is model.transformer.wte.weight
"""


def test_an_exported_folder_is_loaded_by_transformers(tmp_path: Path) -> None:
    train("transformers", tmp_path / "run", replace=True)
    repo = Repo.open(tmp_path / "run")
    for limit in (5_000_000_000, 100_000):
        folder = tmp_path / f"model{limit}"
        export_folder(repo, "gpt2:best", folder, shard_bytes=limit)
        assert (folder / "model.safetensors.index.json").exists() == (limit == 100_000)
        done = subprocess.run(
            [PYTHON, "-c", LOAD, str(tmp_path / "run"), str(folder)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]


TOKENIZED = """
import pathlib, sys, torch, castore
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer,
    TrainingArguments,
)
from castore.convert import export_folder
from castore.policy.retention import Policy
from castore.integrations.transformers import CastoreCallback

words = {"[UNK]": 0, "to": 1, "be": 2, "or": 3, "not": 4}
made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=made, unk_token="[UNK]", pad_token="[UNK]", chat_template="{{ messages }}"
)
model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
model.generation_config.top_k = 3
data = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}] * 4
arguments = TrainingArguments(
    output_dir=sys.argv[1] + "/out", max_steps=1, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
)
trainer = Trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
CastoreCallback(sys.argv[1], run="words").attach(trainer, replace_folders=True)
trainer.train()
export_folder(castore.Repo.open(sys.argv[1]), "words:latest", pathlib.Path(sys.argv[1]) / "model")
loaded = AutoTokenizer.from_pretrained(sys.argv[1] + "/model")
assert loaded("to be or what")["input_ids"] == tokenizer("to be or what")["input_ids"] == [1, 2, 3, 0]
assert loaded.chat_template == "{{ messages }}"
again = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model")
assert again.generation_config.top_k == 3
assert torch.equal(again.state_dict()["transformer.wte.weight"], trainer.model.state_dict()["transformer.wte.weight"])
"""


def test_an_export_has_the_tokenizer_and_the_settings_of_generation(tmp_path: Path) -> None:
    done = subprocess.run([PYTHON, "-c", TOKENIZED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


# -- lightning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "killed_at"), [({}, 47), ({"stateful": True, "every": 7}, 31)], ids=str)
def test_lightning_goes_on_exactly(tmp_path: Path, options: dict[str, Any], killed_at: int) -> None:
    whole = train("lightning", tmp_path / "whole", **options)
    train("lightning", tmp_path / "killed", killed_at, code=-9, **options)
    resumed = train("lightning", tmp_path / "killed", **options)
    assert (whole.pop("resumed"), resumed.pop("resumed")) == (False, True)
    assert (resumed["model"], resumed["optimizer"], resumed["step"]) == (
        whole["model"],
        whole["optimizer"],
        whole["step"],
    )
    assert len(resumed["files"]) == 2  # the best two, as files that name them
    repo = Repo.open(tmp_path / "killed")
    named = json.loads((tmp_path / "killed" / "out" / resumed["files"][0]).read_text())["castore"]
    assert repo.find(named).manifest.run == "network"


@pytest.mark.parametrize(
    ("options", "killed_at"), [({"every": 7}, 31), ({"stateful": True}, 47)], ids=["mid-epoch", "stateful at its end"]
)
def test_lightning_is_not_exact_where_an_order_of_data_is_lost(
    tmp_path: Path, options: dict[str, Any], killed_at: int
) -> None:
    whole, resumed = killed_and_resumed(tmp_path, "lightning", killed_at, **options)
    assert resumed["resumed"]
    assert whole["step"] == resumed["step"]
    assert whole["model"] != resumed["model"]


REFUSED = """
import lightning, sys
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from castore.integrations.lightning import CastoreCheckpointIO, RandomStates
from lightning_module import Network, build, data
import torch

loader = torch.utils.data.DataLoader(data(), 8)
for name, options in (
    ("no checkpoint yet", {}),
    ("wrap another CheckpointIO", {"plugins": [AsyncCheckpointIO(CastoreCheckpointIO("."))]}),
    ("past castore", {"strategy": lightning.pytorch.strategies.ModelParallelStrategy()}),
):
    plain = {"logger": False, "accelerator": "cpu", "max_epochs": 1, "callbacks": [RandomStates()]}
    trainer = lightning.Trainer(**{"plugins": [CastoreCheckpointIO(".")], **plain, **options})
    try:
        if options:
            trainer.fit(Network(), loader)
        else:
            trainer.validate(Network(), loader, ckpt_path="castore:latest")
    except Exception as error:
        assert name in str(error), error
    else:
        raise AssertionError(name)
"""


def test_lightning_is_told_what_would_go_past_castore(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(
        [PYTHON, "-c", REFUSED], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -- accelerate --------------------------------------------------------------------------------------------------------


def test_accelerate_goes_on_exactly_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    whole = train("accelerate", tmp_path / "whole")
    train("accelerate", tmp_path / "killed", 15, code=-9)
    assert Repo.open(tmp_path / "killed").find("loop:latest").manifest.step == 12
    assert train("accelerate", tmp_path / "killed") == whole
