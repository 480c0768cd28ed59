from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanecho import seeding
from nanecho.config import Model
from nanecho.model import GPT, GROWING, Connections, active_connections, connection_ratio

SMALL = Model(n_layer=2, n_head=2, n_embd=32, block_size=16, connection_ratio=0.2, connection_growth=0.3)


def made(shape: Model = SMALL) -> GPT:
    model = GPT(shape, 50)
    model.initialise(3)
    return model


def test_a_token_changes_no_logit_before_it() -> None:
    model = made().eval()
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    for at in range(16):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % 50
        after = model(changed)
        assert torch.equal(after[:, :at], before[:, :at])
        assert not torch.equal(after[:, at:], before[:, at:])


def test_equal_seeds_give_equal_weights() -> None:
    first, second, other = made(), made(), GPT(SMALL, 50)
    other.initialise(4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.token.weight, other.token.weight)


# -- connections -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 5), st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1))
def test_active_connections_have_the_nominal_density_and_are_nested(
    seed: int, size: int, left: float, right: float
) -> None:
    fewer, more = sorted((left, right))
    small, large = active_connections(seed, 7, size, fewer), active_connections(seed, 7, size, more)
    assert abs(int(small.sum()) - fewer * size) <= 0.5 + 1e-6
    assert not np.any(small & ~large)


def test_connections_are_spread_and_differ_by_matrix_and_seed() -> None:
    active = active_connections(0, 0, 10_000, 0.3)
    assert all(200 < part.sum() < 400 for part in np.split(active, 10))
    assert not np.array_equal(active, active_connections(0, 1, 10_000, 0.3))
    assert not np.array_equal(active, active_connections(1, 0, 10_000, 0.3))


def test_the_ratio_is_a_function_of_the_global_step() -> None:
    default = Model()
    assert [connection_ratio(default, step) for step in (0, 499, 500, 9000, 50_000)] == pytest.approx(
        [0.1, 0.1, 0.15, 1.0, 1.0]
    )


def growing(model: GPT) -> list[torch.Tensor]:
    return [weight for name, weight in model.named_parameters() if name.endswith(GROWING)]


def stepped(model: GPT, optimizer: torch.optim.AdamW, connections: Connections, seed: int) -> None:
    tokens = torch.from_numpy(seeding.uniform(seed, 0, 34).reshape(2, 17) % np.uint64(50)).long()
    logits = model(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    connections.mask_gradients()
    optimizer.step()
    optimizer.zero_grad()


def test_an_inactive_connection_stays_zero_without_momentum_or_decay() -> None:
    model = made()
    connections = Connections(model, SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    connections.advance(0)
    connections.zero_inactive()
    for seed in range(5):
        stepped(model, optimizer, connections, seed)
    inactive = 0
    for i, weight in enumerate(growing(model)):
        mask = torch.from_numpy(active_connections(0, i, weight.numel(), 0.2)).view(weight.shape)
        state = optimizer.state[weight]
        for values in (weight, state["exp_avg"], state["exp_avg_sq"]):
            assert not values[~mask].any()
            assert values[mask].any()
        inactive += int((~mask).sum())
    assert inactive / sum(weight.numel() for weight in growing(model)) == pytest.approx(0.8, abs=1e-4)
    assert connections.density == pytest.approx(0.2, abs=1e-4)


def test_growing_changes_no_logit_and_the_new_connections_then_learn() -> None:
    model = made()
    connections = Connections(model, SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    connections.advance(0)
    connections.zero_inactive()
    stepped(model, optimizer, connections, 0)
    tokens = torch.arange(16)[None]
    before, active = model(tokens), sum(int(weight.count_nonzero()) for weight in growing(model))
    assert connections.advance(SMALL.connection_every)
    assert connections.density == pytest.approx(0.5, abs=1e-4)
    assert torch.equal(model(tokens), before)
    stepped(model, optimizer, connections, 1)
    assert sum(int(weight.count_nonzero()) for weight in growing(model)) > 2 * active


def test_a_dense_model_masks_nothing() -> None:
    dense = Model(n_layer=1, n_head=1, n_embd=8, block_size=16, connection_ratio=1.0)
    model = made(dense)
    connections = Connections(model, dense)
    connections.advance(0)
    stepped(model, torch.optim.AdamW(model.parameters()), connections, 0)
    assert connections.density == 1.0
    assert all(weight.all() for weight in growing(model))
