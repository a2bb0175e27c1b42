"""The named choices of the looped core (retention, gain, width of the MLP), and its block."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import core_input, make_core, make_world

from world_model.block import Block
from world_model.retention import Retention

# ---------------------------------------------------------------------- retention and gain


@pytest.mark.parametrize("log_rate", [-200.0, -9.0, 0.0, 5.0, 80.0])
def test_the_leaky_gain_is_what_the_retention_leaves(log_rate):
    """Where Delta * exp(a) is clamped as well: no channel takes in nothing, or more than all."""
    retention = Retention(4, "leaky")
    with torch.no_grad():
        retention.log_rate.fill_(log_rate)
    decay, injection = retention()
    assert ((injection.diagonal() > 0) & (injection.diagonal() <= 1)).all()
    assert torch.allclose(injection.diagonal(), 1 - decay, atol=1e-6)


def test_a_free_retention_is_a_plain_vector_that_may_pass_one():
    free, kept = Retention(8, kind="free"), Retention(8)
    assert torch.allclose(free().decay, kept().decay, atol=1e-6)  # they start alike
    assert torch.allclose(free().injection, kept().injection, atol=1e-6)
    with torch.no_grad():
        free.decay.fill_(1.5)
    decay, _ = free()
    assert (decay == 1.5).all()
    decay.sum().backward()
    assert (free.decay.grad == 1).all()
    assert "log_rate" not in dict(free.named_parameters())


# ---------------------------------------------------------------------- block


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_block_is_residual_and_normalises_before_each_layer(tokens):
    torch.manual_seed(0)
    block = Block(tokens, 8, 2, 16)
    x = torch.randn(5, tokens, 8) * 3

    def norm(y):
        return F.layer_norm(y, (8,), eps=1e-3)

    def mlp(y):
        gate, value = block.up(y).chunk(2, -1)
        return block.down(F.silu(gate) * value)

    expected = x if tokens == 1 else x + block.merge(block.attention(block.qkv(norm(x))))
    assert torch.allclose(block(x), expected + mlp(norm(expected)), atol=1e-5)


@torch.no_grad()
def test_a_thousand_dreamed_steps_at_twice_the_training_depth_stay_bounded():
    world = make_world(mean_loops=2.0, exit="fixed")
    start = world.initial(4)
    actions = torch.randn(4, 1000, 2, generator=torch.Generator().manual_seed(0))
    dream = world.imagine(start, actions, 1000, max_loops=2 * world.cfg.loop.train_cap)
    assert dream.states.deter.isfinite().all()
    norms = dream.states.deter.norm(dim=-1)
    # The outer gate gives weighted means of normalised tokens and of the start.
    assert norms.max() <= max(math.sqrt(8) * 1.0001, float(norms[:, 0].max()))


@pytest.mark.parametrize(("expand", "hidden"), [(2.0, 16), (0.25, 2), (1, 8)])
def test_the_mlp_may_be_narrower_than_its_state(expand, hidden):
    core = make_core(expand=expand)
    assert core.block.up.weight.shape == (2 * hidden, 8)
    deter, inputs = core_input(core, 2)
    assert core(deter, inputs, 2, core.prepare())[0].isfinite().all()
