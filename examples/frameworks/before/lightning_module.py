"""A small network in Lightning, before castore."""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class Network(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(32, 1)
        )

    def training_step(self, batch, _):
        return torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def data():
    x = torch.randn(160, 8, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))


def build(callbacks=(), **options):
    lightning.seed_everything(3)
    best = ModelCheckpoint(dirpath="out", monitor="val_loss", save_top_k=2)
    return lightning.Trainer(
        callbacks=[best, *callbacks],
        max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", **options,
    )  # fmt: skip


def main():
    loaders = torch.utils.data.DataLoader(data(), 8, shuffle=True), torch.utils.data.DataLoader(data(), 32)
    build().fit(Network(), *loaders)


if __name__ == "__main__":
    main()
