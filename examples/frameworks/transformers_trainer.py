"""A small GPT-2 in the Trainer of Hugging Face. Kill it, run it again: it goes on where it was, exactly.

pip install 'castore[transformers]' && python transformers_trainer.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from castore.integrations.transformers import CastoreCallback, materialize


class Sequences(torch.utils.data.Dataset):
    def __init__(self, count, seed):
        self.tokens = torch.randint(0, 97, (count, 33), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


def build(output_dir="out", max_steps=60, **options):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4))
    arguments = TrainingArguments(
        output_dir=output_dir, max_steps=max_steps, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        logging_steps=5, save_steps=10, eval_strategy="steps", eval_steps=10, learning_rate=3e-3, warmup_steps=5,
        load_best_model_at_end=True, save_total_limit=1, report_to=[], disable_tqdm=True, seed=7, **options,
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=Sequences(200, seed=1), eval_dataset=Sequences(32, seed=2)
    )


def main():
    trainer = build()
    CastoreCallback(".", run="gpt2").attach(trainer)
    trainer.train(resume_from_checkpoint=materialize(".", run="gpt2", output_dir="out", model=trainer.model))


if __name__ == "__main__":
    main()
