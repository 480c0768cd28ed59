"""Compare tokens per second of a training step of nanecho and of nanoGPT, with the same config, in one process.

    python bench/throughput.py --nanogpt PATH    # PATH: a checkout of github.com/karpathy/nanoGPT

The two take turns, so that a noisy machine disturbs both equally; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import castore
from nanecho import config as configs
from nanecho import data, train

STEPS, ROUNDS = 20, 7


def nanecho_step(config: configs.Config, corpus: data.Corpus) -> Callable[[], None]:
    with tempfile.TemporaryDirectory() as folder:
        repo = castore.Repo.init(folder)
        session = train.fresh_session(repo, config, corpus, torch.device("cpu"), "")
    return lambda: (train.train_step(session, session.model), None)[1]


def nanogpt_step(path: Path, config: configs.Config, corpus: data.Corpus) -> Callable[[], None]:
    """Return one iteration of nanoGPT's train.py: batch, forward, backward, clip, AdamW."""
    sys.path.insert(0, str(path))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    shape, options = config.model, config.training
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size}
    model = GPT(GPTConfig(**sizes, dropout=shape.dropout, vocab_size=corpus.tokenizer.vocab_size, bias=False))
    betas = (options.beta1, options.beta2)
    optimizer = model.configure_optimizers(options.weight_decay, options.learning_rate, betas, "cpu")
    model.train()

    def step() -> None:
        starts = torch.randint(len(corpus.train) - shape.block_size, (options.batch_size,))
        rows = [torch.from_numpy(corpus.train[i : i + shape.block_size + 1].astype(np.int64)) for i in starts]
        tokens = torch.stack(rows)
        _, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT")
    given = parser.parse_args()
    config = configs.make({})
    torch.set_num_threads(castore.processors())
    corpus = data.load(config.data, config.model.block_size)
    steps = {"nanecho": nanecho_step(config, corpus)}
    if given.nanogpt:
        steps["nanoGPT"] = nanogpt_step(given.nanogpt, config, corpus)
    else:
        print("nanoGPT: left out, give --nanogpt PATH")
    tokens = STEPS * config.training.batch_size * config.model.block_size
    speeds_of: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begun = time.perf_counter()
            for _ in range(STEPS):
                step()
            speeds_of[name].append(tokens / (time.perf_counter() - begun))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {ROUNDS} rounds of {STEPS} steps")
    for name, speeds in speeds_of.items():
        print(f"{name:8} {statistics.median(speeds):10,.0f} tokens/s  ({min(speeds):,.0f} to {max(speeds):,.0f})")
    if given.nanogpt:
        ratios = [ours / theirs for ours, theirs in zip(speeds_of["nanecho"], speeds_of["nanoGPT"], strict=True)]
        print(f"ratio    {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
