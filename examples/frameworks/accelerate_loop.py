"""A loop of Accelerate. Kill it, run it again: it goes on in the middle of the epoch, exactly.

pip install 'castore[accelerate]' torchdata && python accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed

from castore.integrations.accelerate import load_state, save_state


def train(epochs=3, after_step=None):
    set_seed(1)
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=True)
    )
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True
    )
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    step = load_state(accelerator, ".", run="loop")
    for epoch in range(step // len(loader), epochs):
        loader.set_epoch(epoch)
        for features, target in loader:
            loss = (model(features) - target).pow(2).mean()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 6 == 0:
                save_state(accelerator, ".", run="loop", step=step, metrics={"val_loss": loss.item()})
            if after_step:
                after_step(step)
    return model, optimizer


if __name__ == "__main__":
    train()
