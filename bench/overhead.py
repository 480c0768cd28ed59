"""Measure what a plain loop loses to saving every 50 steps in the background.

    python bench/overhead.py

Blocks of 50 steps of a small GPT on all processors, alternately with a save at their end and without; a block with a
save lasts until the checkpoint is stored durably. The medians of the blocks, and of the ratios of neighbours. A busy
machine moves those by more than a save costs, so the last line is the processor time of a save alone, beside that of
steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from torch import nn

import castore
from castore.torch import Checkpointer

EVERY = 50


class Model(nn.Module):
    def __init__(self, vocabulary: int = 4096, width: int = 256, layers: int = 6, length: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(tokens) + self.position))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 128 tokens a step")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)

    def step() -> None:
        tokens = torch.randint(4096, (options.batch, 128))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder, Checkpointer(castore.Repo.init(folder), model, optimizer) as saver:
        for _ in range(5):
            step()
        saver.save(1, {"val_loss": 1.0})
        saver.wait()
        size = saver.repo.checkpoints()[0].manifest
        tensors = sum(part.bytes for part in size.parts.values())
        number, ratios, plain, saving = 1, [], [], []
        for _ in range(options.rounds):
            begun = time.perf_counter()
            for _ in range(EVERY):
                step()
            plain.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            number += EVERY
            saver.save(number, {"val_loss": 1.0})  # at the start, so that training goes on beside it
            for _ in range(EVERY):
                step()
            saver.wait()
            saving.append(time.perf_counter() - begun)
            ratios.append(saving[-1] / plain[-1])
            print(f"{plain[-1]:.2f} s without a save, {saving[-1]:.2f} s with one", flush=True)
        costs, step_costs = [], []
        for _ in range(options.rounds):
            begun = time.process_time()
            step()
            step_costs.append(time.process_time() - begun)
            begun = time.process_time()
            number += 1
            saver.save(number, {"val_loss": 1.0})
            saver.wait()
            costs.append(time.process_time() - begun)
    print(f"{tensors / 1e6:.0f} MB of state, {statistics.median(plain) / EVERY * 1000:.0f} ms a step")
    print(f"overhead of a save every {EVERY} steps: {(statistics.median(ratios) - 1) * 100:.1f} %")
    cost, step_cost = statistics.median(costs), statistics.median(step_costs)
    share = cost / step_cost / EVERY * 100
    print(f"processor time: a save {cost:.2f} s, a step {step_cost:.2f} s: {share:.1f} % of {EVERY} steps")


if __name__ == "__main__":
    main()
