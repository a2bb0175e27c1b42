"""What is loaded from experiments/ by name: the exit rules Lookahead and Forecast, and the core without memory."""

import dataclasses

import pytest
import torch
from small import core_input, forward_at, make_batch, make_core, make_world, observe, random_state, step_of, world_loss

from experiments.exit_rules import Forecast, Lookahead
from experiments.memoryless import MemorylessCore
from world_model import WorldModel
from world_model.exits import Gate, HaltingBatch, make_rule

RULES = "experiments.exit_rules:Lookahead", "experiments.exit_rules:Forecast"


def exiting(name):
    """A core whose samples leave at different depths under the rule."""
    core = make_core(double=True, exit=name)
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in core.rule.parameters():
            parameter.normal_(generator=gen)
        if isinstance(core.rule, Lookahead):  # half of the samples leave after the first loop
            states = core(*core_input(core, 32), 1, core.prepare())[1].states
            core.rule.threshold = float(core.rule.improvement(states[1], states[1] - states[0]).median())
    return core


# ---------------------------------------------------------------------- exit rules


@pytest.mark.parametrize("name", RULES)
def test_the_rules_are_loaded_by_name_with_a_default_threshold(name):
    rule = make_rule(name, 8, 4)
    assert type(rule).__name__ == name.partition(":")[2]
    assert rule.threshold == 0.05
    assert make_rule(name, 8, 4, 0.2).threshold == 0.2


@pytest.mark.parametrize("name", RULES)
def test_compacted_and_frozen_samples_agree(name):
    core = exiting(name)
    deter, inputs = core_input(core, 32)
    (compact, a), (frozen, b) = (
        step_of(core, deter, inputs, core.prepare(), 8, compact=compact) for compact in (True, False)
    )
    assert len(a.depth.unique()) >= 2
    assert torch.equal(a.depth, b.depth)
    assert torch.allclose(compact, frozen, atol=1e-12)
    assert torch.allclose(a.residual, b.residual, atol=1e-12)
    assert torch.allclose(compact, forward_at(core, deter, inputs, a.depth), atol=1e-12)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("loops", [1, 4])
def test_every_rule_dreams_and_trains(name, loops):
    world = make_world(exit=name, mean_loops=3.0, depth="update")
    loss, _, metrics = world_loss(world, make_batch(world), loops)
    loss.backward()
    assert all(value.isfinite() for value in metrics.values())
    assert all((p.grad is not None and p.grad.any()) == (loops > 1) for p in world.core.rule.parameters())
    dream = world.imagine(random_state(world, 8), torch.zeros(8, 3, 2), 3)
    assert 1 <= int(dream.loops.depth.min()) <= int(dream.loops.depth.max()) <= world.run_cap


def test_the_lookahead_goes_on_through_a_loop_that_only_prepares():
    """Loops bring 0, 0.4 and 0 nats; each is worth going on for if it brings, or leads to, more than 0.05."""
    states = torch.eye(8)[:4].view(4, 1, 1, 1, 8)  # after loops 1..4, told apart by where the one stands
    change = torch.ones(4, 1, 1, 1, 8)
    gain = torch.tensor([0.0, 0.4, 0.0]).view(3, 1, 1)
    depths = {}
    for kind in (Gate, Lookahead):
        rule = kind(8, 4)
        adam = torch.optim.Adam(rule.parameters(), 0.02)
        for _ in range(1500):
            adam.zero_grad()
            rule.loss(HaltingBatch(states, change, None, gain))[0].backward()
            adam.step()
        predicted = rule.improvement(states.flatten(0, 2), change.flatten(0, 2))[:3].tolist()
        expected = [0.0, 0.4, 0.0] if kind is Gate else [0.35, 0.4, 0.0]
        assert predicted == pytest.approx(expected, abs=0.03)
        depths[kind] = next(loop for loop, value in enumerate(predicted, 1) if value <= 0.05 + 0.03)
    assert depths == {Gate: 1, Lookahead: 3}


def planned(rule, e, cap):
    return rule.begin(e, cap)[0].tolist()


def test_the_forecast_plans_the_best_depth_before_the_first_loop():
    """Two kinds of input: for one all loops bring little, for the other the third brings what the second prepares."""
    e = torch.eye(2).view(1, 2, 1, 2)  # (B, T, N, D)
    gain = torch.tensor([[0.02, 0.0, 0.04], [0.0, 0.4, 0.01]]).t().view(3, 1, 2)
    x = torch.zeros(4, 1, 2, 1, 2)
    rule = Forecast(2, 4)
    assert planned(rule, e[0], 4) == [1, 1]  # nothing is learned yet
    adam = torch.optim.Adam(rule.parameters(), 0.02)
    for _ in range(800):
        adam.zero_grad()
        rule.loss(HaltingBatch(x, x, e, gain))[0].backward()
        adam.step()
    assert planned(rule, e[0], 4) == [1, 3]
    assert planned(rule, e[0], 9) == [1, 3]
    assert planned(rule, e[0], 2) == [1, 1]
    with torch.no_grad():
        rule.threshold = -1.0  # loops are worth something in themselves: as many as training knew
    assert planned(rule, e[0], 9) == [4, 4]


def test_the_forecast_learns_nothing_about_loops_that_did_not_run():
    rule = Forecast(2, 4)
    x = torch.zeros(2, 2, 3, 1, 2)
    rule.loss(HaltingBatch(x, x, torch.randn(2, 3, 1, 2), torch.ones(1, 2, 3)))[0].backward()
    assert (rule.read.bias.grad != 0).tolist() == [True, False, False]


# ---------------------------------------------------------------------- the core without memory


def memoryless():
    world = make_world(exit="fixed")
    torch.manual_seed(0)
    cfg = dataclasses.replace(world.cfg, core="experiments.memoryless:MemorylessCore")
    return WorldModel(cfg, world.obs_sizes, world.action_size)


def test_without_memory_no_row_depends_on_earlier_observations(fixed_levels):
    world = memoryless()
    assert isinstance(world.core, MemorylessCore)
    batch, other = make_batch(world), make_batch(world, seed=9)
    mixed = batch._replace(
        obs={k: torch.cat([other.obs[k][:, :4], v[:, 4:]], 1) for k, v in batch.obs.items()},
        start=random_state(world),
    )
    for model, cut in ((world, True), (make_world(), False)):
        first, second = (observe(model, b).states for b in (batch, mixed))
        assert not torch.allclose(first.stoch[:, :4], second.stoch[:, :4])
        assert torch.equal(first.deter[:, 4:], second.deter[:, 4:]) is cut


def test_without_memory_acting_equals_the_training_scan(fixed_levels):
    world = memoryless()
    batch = make_batch(world)
    expected = observe(world, batch).states
    state = random_state(world)
    for t in range(6):
        obs = {k: v[:, t] for k, v in batch.obs.items()}
        state, _ = world.observe(obs, batch.prev_action[:, t], batch.is_first[:, t], state)
        assert torch.allclose(state.deter, expected.deter[:, t], atol=1e-5)
        assert torch.equal(state.stoch, expected.stoch[:, t])


def test_without_memory_the_output_is_the_state_and_the_action_counts():
    world = memoryless()
    start, actions = random_state(world), torch.tensor([[0.5, -0.5]] * 3)
    other = start.map(lambda leaf: leaf.flip(0))
    deter = world.dream_step(start, actions, world.core.prepare())[0].deter
    assert torch.equal(world.dream_step(other, actions, world.core.prepare())[0].deter, deter)
    assert not torch.allclose(world.dream_step(start, -actions, world.core.prepare())[0].deter, deter)
    with torch.no_grad():
        world.core.update_gate.bias.add_(3.0)  # there is no outer gate
    assert torch.equal(world.dream_step(start, actions, world.core.prepare())[0].deter, deter)
