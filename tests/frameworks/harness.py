"""Runs an example in a process of its own: until it kills itself, or to its end, of which it prints a digest."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "frameworks"))

import torch  # noqa: E402

import castore  # noqa: E402

torch.set_num_threads(1)


def digest(value: Any) -> str:
    """A hash of every bit in a state."""
    found = hashlib.sha256()

    def walk(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found.update(item.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                found.update(str(key).encode())
                walk(item[key])
        elif isinstance(item, list | tuple):
            for one in item:
                walk(one)
        else:
            found.update(repr(item).encode())

    walk(value)
    return found.hexdigest()[:16]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def report(model: Any, optimizer: Any, **more: Any) -> None:
    state = {"model": digest(model.state_dict()), "optimizer": digest(optimizer.state_dict())}
    sys.stdout.write("RESULT " + json.dumps(state | {"random": digest(torch.get_rng_state())} | more) + "\n")


def transformers(at: int, *, replace: bool, terminate: bool = False, logging: int = 5, **options: Any) -> None:
    from transformers import TrainerCallback

    from castore.integrations.transformers import CastoreCallback, materialize

    example = importlib.import_module("transformers_trainer")

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if state.global_step == at:
                os.kill(os.getpid(), signal.SIGTERM if terminate else signal.SIGKILL)
            if terminate and state.global_step >= at:
                time.sleep(0.5)  # the Trainer saves three seconds after the signal

    trainer = example.build(max_steps=30, use_cpu=True, **options)
    trainer.args.logging_steps = logging
    trainer.add_callback(Kill())
    CastoreCallback(".", run="gpt2", background=False).attach(trainer, replace_folders=replace)
    folder = materialize(".", run="gpt2", output_dir="out", model=trainer.model)
    trainer.train(resume_from_checkpoint=folder)
    names = ("loss", "eval_loss", "grad_norm", "learning_rate", "step")
    log = [
        {key: one[key] for key in names if key in one}
        for one in trainer.state.log_history
        if "train_runtime" not in one
    ]
    folders = sorted(os.listdir("out")) if os.path.isdir("out") else []
    report(
        trainer.model, trainer.optimizer, schedule=digest(trainer.lr_scheduler.state_dict()), log=log,
        best=[trainer.state.best_metric, trainer.state.best_global_step], folders=folders, resumed=folder is not None,
    )  # fmt: skip


def lightning(at: int, *, stateful: bool = False, every: int = 0) -> None:
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    example = importlib.import_module("lightning_module")

    class Kill(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == at:
                kill()

    callbacks = [ModelCheckpoint(dirpath="steps", every_n_train_steps=every, save_top_k=-1)] if every else []
    several = {"devices": int(os.environ["WORLD_SIZE"]), "strategy": "ddp"} if "WORLD_SIZE" in os.environ else {}
    trainer = example.build(callbacks=[*callbacks, Kill()], **several)
    resumed = any(entry.manifest.run == "network" for entry in castore.Repo.open(".").checkpoints())
    loader = torch.utils.data.DataLoader
    if stateful:
        from torchdata.stateful_dataloader import StatefulDataLoader as loader
    module = example.Network()
    validation = torch.utils.data.DataLoader(example.data(), 32)
    trainer.fit(module, loader(example.data(), 8, shuffle=True), validation, ckpt_path="castore:latest")
    files = sorted(os.listdir("out"))
    report(module, trainer.optimizers[0], step=trainer.global_step, files=files, resumed=resumed)


def accelerate(at: int) -> None:
    example = importlib.import_module("accelerate_loop")
    model, optimizer = example.train(after_step=lambda step: kill() if step == at else None)
    report(model, optimizer)


if __name__ == "__main__":
    name, root, at, options = sys.argv[1:]
    os.chdir(root)
    {"transformers": transformers, "lightning": lightning, "accelerate": accelerate}[name](
        int(at), **json.loads(options)
    )
