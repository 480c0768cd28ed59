"""A plain loop. Kill it, run it again: it goes on where it was, exactly.

pip install castore && python plain_loop.py
"""

import torch

from castore.torch import Checkpointer


def train(steps=60, after_step=None):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with Checkpointer(".", model, optimizer, schedule=schedule, stop_signals=True) as checkpointer:
        for step in checkpointer.steps(steps, every="10 steps"):
            x = torch.randn(16, 8)
            loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            checkpointer.log(val_loss=loss.item())
            if after_step:
                after_step(step + 1)
    return model, optimizer


if __name__ == "__main__":
    train()
