"""The looped core: retention, closed form, depth, block, memory and stability."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CORE_INPUTS, core_input, exit_bias, make_core
from torch import nn

from world_model import block
from world_model.core import CoreSizes
from world_model.looped import LONGEST_MEMORY, LoopConfig, LoopedCore, sample_depth
from world_model.retention import Retention

# ---------------------------------------------------------------------- retention


@settings(deadline=None, max_examples=100)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_retention_stays_inside_zero_and_one(rate, delta):
    retention = Retention(4)
    with torch.no_grad():
        retention.log_rate.fill_(rate)
        retention.delta.fill_(delta)
    decay = retention().decay
    assert decay.dtype == torch.float32
    assert ((decay > 0) & (decay < 1)).all()
    log = -torch.log(decay.detach().double())
    assert ((log > 0.9e-4) & (log < 20.01)).all()
    decay.sum().backward()
    assert retention.log_rate.grad.isfinite().all()
    assert retention.delta.grad.isfinite().all()


def test_retention_is_the_formula_and_starts_spread():
    retention = Retention(16)
    decay, injection = retention()
    assert torch.allclose(decay[[0, -1]], torch.tensor([0.5, 0.995]), atol=1e-5)
    assert (decay.diff() > 0).all()
    with torch.no_grad():
        retention.delta.normal_()
        retention.log_rate.normal_()
        retention.matrix.normal_()
    decay, injection = retention()
    delta = F.softplus(retention.delta)
    assert torch.allclose(decay, torch.exp(-delta * retention.log_rate.exp()), atol=1e-6)
    e = torch.randn(16)
    assert torch.allclose(injection @ e, delta * (retention.matrix @ e), atol=1e-4)


@pytest.mark.parametrize("loops", [1, 2, 5, 40])
def test_linear_loop_has_the_closed_form(loops):
    core = make_core(double=True)
    with torch.no_grad():
        core.block.merge.weight.zero_()
        core.block.down.weight.zero_()
        core.retention.matrix.normal_()
    core.loop_norm = nn.Identity()
    dynamics = core.prepare()
    deter, inputs = core_input(core, 4)
    _, (states, *_) = core(deter, inputs, loops, dynamics)
    e, _ = core.prelude(deter, inputs)
    power = dynamics.decay**loops
    expected = power * deter + (1 - power) / (1 - dynamics.decay) * (e @ dynamics.injection.t())
    assert len(states) == loops + 1
    assert torch.allclose(states[-1], expected, atol=1e-10)


@pytest.mark.parametrize("loops", [1, 3, 40])
def test_leaky_loop_moves_towards_its_input_as_fast_as_it_forgets(loops):
    core = make_core(double=True, gain="leaky")
    with torch.no_grad():
        core.block.merge.weight.zero_()
        core.block.down.weight.zero_()
    core.loop_norm = nn.Identity()
    dynamics = core.prepare()
    deter, inputs = core_input(core, 4)
    _, (states, *_) = core(deter, inputs, loops, dynamics)
    e, _ = core.prelude(deter, inputs)  # the injection matrix starts as the identity
    assert torch.allclose(states[-1], torch.lerp(e, deter, dynamics.decay**loops), atol=1e-10)


# ---------------------------------------------------------------------- depth


@pytest.mark.parametrize("mean", [2.0, 2.5, 3.0])
def test_sample_depth_follows_a_clamped_poisson(mean):
    torch.manual_seed(0)
    drawn = [sample_depth(LoopConfig(mean_loops=mean)) for _ in range(10_000)]
    assert all(type(loops) is int for loops in drawn)
    assert set(drawn) == set(range(1, round(2 * mean) + 1))
    chance = [math.exp(-mean) * mean**k / math.factorial(k) for k in range(60)]
    expected = sum(p * min(max(k, 1), round(2 * mean)) for k, p in enumerate(chance))
    assert sum(drawn) / len(drawn) == pytest.approx(expected, abs=0.05)


def test_a_fixed_depth_is_the_mean_and_draws_no_random_number():
    before = torch.get_rng_state()
    assert sample_depth(LoopConfig(mean_loops=5.0, depth="fixed")) == 5
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"mean_loops": 0.5},
        {"max_loops": 0},
        {"width": 0},
        {"expand": 0.001},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        LoopConfig(**wrong)


def test_the_outer_gate_starts_with_time_constants_up_to_the_longest():
    core = make_core()
    steps = 1.0 / torch.sigmoid(core.update_gate.bias.detach())
    assert float(steps.max()) == pytest.approx(LONGEST_MEMORY, rel=1e-4)
    assert float(steps.min()) == pytest.approx(1.368, rel=1e-3)


# ---------------------------------------------------------------------- block and tokens


def test_block_does_not_know_the_order_of_tokens():
    core = make_core(tokens=5, double=True)
    with torch.no_grad():
        core.block.merge.weight.mul_(10)
    x, _ = core_input(core, 3)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(core.block(x)[:, order], core.block(x[:, order]), atol=1e-6)


def test_tokens_see_each_other():
    core = make_core(double=True)
    x, _ = core_input(core, 2)
    moved = x.clone()
    moved[:, 1] += torch.linspace(-1, 1, 8)
    assert (core.block(x)[:, 0] - core.block(moved)[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("few", [None, 0, 100])  # most tokens for which it is written out; None: as it is
@pytest.mark.parametrize("tokens", [2, 4, 8, 9])
def test_written_out_attention_equals_the_fused_call(monkeypatch, tokens, few):
    core, fused, calls = make_core(tokens=tokens), F.scaled_dot_product_attention, []
    core.block.heads = 2
    qkv, weight = torch.randn(6, tokens, 24), torch.randn(6, tokens, 8)
    found = []
    for mine in (False, True):
        x = qkv.clone().requires_grad_()
        if mine:
            monkeypatch.setattr(block, "FEW", block.FEW if few is None else few)
            monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *parts: (calls.append(1), fused(*parts))[1])
            out = core.block.attention(x)
        else:
            query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in x.chunk(3, -1))
            out = fused(query, key, value).transpose(1, 2).flatten(2)
        found.append((out, torch.autograd.grad((weight * out).sum(), x)[0]))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=2e-6)
    assert bool(calls) is {None: tokens > 8, 0: True, 100: False}[few]


def test_a_block_in_float64_rounds_nothing_to_float32(monkeypatch):
    """Searches for the largest expansion run in it, over distances at which float32 would be all rounding."""
    torch.manual_seed(0)
    layer, x = block.Block(4, 16, 2, 32).double(), torch.randn(3, 4, 16, dtype=torch.float64)
    written = layer(x)
    monkeypatch.setattr(block, "FEW", 0)  # the fused call
    assert torch.allclose(layer(x), written, rtol=0.0, atol=1e-12)


def test_one_token_needs_no_attention():
    core = make_core(tokens=1, width=24)
    matrices = [p.shape for p in core.block.parameters() if p.dim() > 1]
    assert matrices == [(96, 24), (24, 48)]
    deter, inputs = core_input(core, 3)
    result, _ = core.adaptive_step(deter, inputs, core.prepare(), 4)
    assert result.shape == (3, 1, 24)
    assert result.isfinite().all()


# ---------------------------------------------------------------------- memory


def walk(core: LoopedCore, steps: int, loops: int, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `steps` environment steps; returns the first and the last state."""
    first, _ = core_input(core, batch)
    first.requires_grad_()
    deter, dynamics = first, core.prepare()
    for step in range(steps):
        deter = core(deter, core_input(core, batch, seed=step + 10)[1], loops, dynamics)[0]
    return first, deter


def test_gradient_reaches_back_ten_steps():
    first, last = walk(make_core(), 10, 4)
    (grad,) = torch.autograd.grad(last.square().mul(torch.linspace(0.5, 1.5, 8)).sum(), first)
    assert (grad.flatten(1).norm(dim=1) > 1e-4).all()


def test_gradient_reaches_back_through_the_prelude_alone():
    core = make_core()
    with torch.no_grad():  # the loops forget their start entirely, and the outer gate keeps nothing
        core.retention.log_rate.fill_(50.0)
        core.update_gate.bias.fill_(100.0)
    first, last = walk(core, 10, 6)
    (grad,) = torch.autograd.grad(last.mul(torch.linspace(-1, 1, 8)).sum(), first)
    assert (grad.flatten(1).norm(dim=1) > 1e-7).all()


def test_outer_gate_mixes_old_state_and_output():
    core = make_core()
    deter, inputs = core_input(core, 4)
    dynamics = core.prepare()
    with torch.no_grad():
        core.update_gate.weight.zero_()
        core.update_gate.bias.fill_(-100.0)
    assert torch.allclose(core(deter, inputs, 3, dynamics)[0], deter, atol=1e-6)
    with torch.no_grad():
        core.update_gate.bias.fill_(100.0)
    written = core(deter, inputs, 3, dynamics)[0]
    with torch.no_grad():
        core.update_gate.bias.fill_(0.0)
    assert torch.allclose(core(deter, inputs, 3, dynamics)[0], (deter + written) / 2, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@torch.no_grad()
def test_a_thousand_steps_at_twice_the_training_depth_stay_bounded(scale):
    core = exit_bias(make_core(mean_loops=2.0), 100.0)
    for p in core.parameters():
        if p.dim() > 1:  # matrices; gains and biases stay
            p.mul_(scale)
    gen = torch.Generator().manual_seed(4)
    deter, dynamics = torch.zeros(2, 3, 8), core.prepare()
    cap, inputs = 2 * core.cfg.train_cap, torch.randn(1000, 2, CORE_INPUTS, generator=gen) * 3
    peak = 0.0
    for step in range(1000):
        deter, _ = core.adaptive_step(deter, inputs[step], dynamics, cap)
        peak = max(peak, float(deter.abs().max()))
    assert deter.isfinite().all()
    # A normalised token of width D has norm sqrt(D), and the gate gives weighted means of such tokens.
    assert 0.0 < peak <= math.sqrt(8) * 1.0001


@torch.no_grad()
def test_more_loops_do_not_grow_the_state():
    core = make_core()
    deter, inputs = core_input(core, 4)
    states = core(deter, inputs, 64, core.prepare())[1].states
    norms = torch.stack([x.norm(dim=-1) for x in states[1:]])
    assert torch.allclose(norms, torch.full_like(norms, math.sqrt(8)), rtol=1e-2)


def test_state_latents_and_action_enter_the_prelude_with_equal_say():
    torch.manual_seed(0)
    core = LoopedCore(LoopConfig(tokens=1, width=64, units=256), CoreSizes(groups=8, classes=8, actions=1))
    latents = F.one_hot(torch.randint(0, 8, (500, 8)), 8).float().flatten(1)
    parts = [torch.randn(500, 64), latents, torch.randn(500, 1)]
    for part, columns in zip(parts, core.prelude_in.weight.split([64, 64, 1], 1), strict=True):
        share = float((part @ columns.detach().t()).square().mean())
        assert share == pytest.approx(1 / 3, rel=0.25)


@pytest.mark.parametrize(("width", "heads"), [(128, 4), (64, 4), (96, 4), (16, 2), (30, 2), (8, 1), (15, 1)])
def test_heads_follow_the_width(width, heads):
    assert LoopConfig(width=width).heads == heads
