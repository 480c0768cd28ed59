"""A GPT with connections that grow, in one file.

The transformer is GPT-2's (Radford et al. 2019): pre-normalisation, learned positions, tied embeddings, no biases.
What differs is :class:`Connections`: the attention output and both MLP matrices start sparse and fill up as
training goes on.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from nanecho import config, ranks, seeding


class Attention(nn.Module):
    """Causal self-attention: (batch, time, width) -> the same shape; position t sees positions up to t."""

    def __init__(self, shape: config.Model) -> None:
        super().__init__()
        self.heads = shape.n_head
        self.dropout = shape.dropout
        self.qkv = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=False)
        self.out = nn.Linear(shape.n_embd, shape.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return functional.dropout(self.out(y.transpose(1, 2).reshape(batch, time, width)), dropout)


class MLP(nn.Module):
    """(batch, time, width) -> the same shape, through four times the width."""

    def __init__(self, shape: config.Model) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.up = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=False)
        self.down = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(functional.gelu(self.up(x)))
        return functional.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream: (batch, time, width) -> the same shape."""

    def __init__(self, shape: config.Model) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.n_embd, bias=False)
        self.attention = Attention(shape)
        self.norm2 = nn.LayerNorm(shape.n_embd, bias=False)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = x + self.attention(self.norm1(x))
        mixed: Tensor = attended + self.mlp(self.norm2(attended))
        return mixed


class GPT(nn.Module):
    """Tokens (batch, time), int64, time at most ``block_size`` -> logits (batch, time, vocabulary).

    The logits at t depend on tokens up to t alone and predict token t + 1.
    """

    def __init__(self, shape: config.Model, vocab_size: int) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.token = nn.Embedding(vocab_size, shape.n_embd)
        self.position = nn.Embedding(shape.block_size, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = nn.LayerNorm(shape.n_embd, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        x = functional.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.token.weight)  # tied: the embedding is the output matrix too

    def initialise(self, seed: int) -> None:
        """Set first weights: normal with deviation 0.02, less for matrices that add to the residual stream (GPT-2)."""
        generator = torch.Generator().manual_seed(seeding.key("weights", seed) >> 1)
        into_residual = 0.02 / math.sqrt(2 * len(self.blocks))
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() < 2:
                    weight.fill_(1.0)
                else:
                    deviation = into_residual if name.endswith(("out.weight", "down.weight")) else 0.02
                    weight.copy_(torch.normal(0.0, deviation, weight.shape, generator=generator))


# -- connections -----------------------------------------------------------------------------------------------------

GROWING = ("attention.out.weight", "mlp.up.weight", "mlp.down.weight")


def connection_ratio(shape: config.Model, step: int) -> float:
    """Return the nominal share of active connections during step ``step`` + 1, counted from the start of the run."""
    return min(1.0, shape.connection_ratio + shape.connection_growth * (step // shape.connection_every))


def active_connections(seed: int, matrix: int, size: int, ratio: float) -> npt.NDArray[np.bool_]:
    """Return which of a matrix's ``size`` weights are active: ``round(ratio * size)`` of them.

    Every weight has a fixed pseudo-random priority and the lowest are active, so a higher ratio only adds weights.
    """
    count = round(ratio * size)
    if count in (0, size):
        return np.full(size, count == size)
    priority = seeding.uniform(seeding.key("connections", seed, matrix), 0, size)
    # SplitMix64 is a bijection of its counter, so no two priorities are equal
    active: npt.NDArray[np.bool_] = priority <= np.partition(priority, count - 1)[count - 1]
    return active


class Connections:
    """Keeps the inactive weights of a model at exactly zero and without gradient, momentum or decay.

    A weight that starts from zero, whose gradient is zero, is moved by nothing: AdamW's moments and decay stay zero.
    So a connection that becomes active changes no output at that step, and then learns.
    """

    def __init__(self, model: GPT, shape: config.Model) -> None:
        self._shape = shape
        self._weights = [weight for name, weight in model.named_parameters() if name.endswith(GROWING)]
        self._inactive: list[Tensor] = []
        self.ratio = -1.0
        self.density = 0.0

    def advance(self, step: int) -> bool:
        """Set the masks for the step after ``step`` completed ones. Return whether connections became active."""
        ratio = connection_ratio(self._shape, step)
        if ratio == self.ratio:
            return False
        self.ratio = ratio
        active = [
            active_connections(self._shape.connection_seed, i, weight.numel(), ratio)
            for i, weight in enumerate(self._weights)
        ]
        self.density = sum(int(mask.sum()) for mask in active) / sum(len(mask) for mask in active)
        self._inactive = [
            ranks.own_part(torch.from_numpy(~mask).view(weight.shape), weight).to(weight.device)
            for mask, weight in zip(active, self._weights, strict=True)
        ]
        if all(mask.all() for mask in active):
            self._inactive = []  # a dense model masks nothing
        return True

    def zero_inactive(self) -> None:
        """Set the inactive weights of a fresh model to zero."""
        with torch.no_grad():
            for weight, inactive in zip(self._weights, self._inactive, strict=False):
                ranks.local(weight).masked_fill_(inactive, 0.0)

    def mask_gradients(self) -> None:
        """Zero the gradients of inactive weights: after the backward pass, before clipping."""
        for weight, inactive in zip(self._weights, self._inactive, strict=False):
            if weight.grad is not None:
                ranks.local(weight.grad).masked_fill_(inactive, 0.0)
