"""The exit rules, each against what it says it does; and what every rule owes to its batch."""

import math

import pytest
import torch
from small import core_input, gradients, make_batch, make_core, make_world, observe, random_state, step_of, world_loss

from world_model.controls.exit_rules import Acceleration, PaperGate, PriorKL, RandomExit, Residual
from world_model.exits import RULES, HaltingBatch, HaltingState, make_rule
from world_model.latent import kl_divergence

EARLY = [name for name in RULES if name != "fixed"]


def log_prior(deter):
    """Some function of the state that is a distribution: two groups of four classes."""
    return torch.log_softmax(deter.flatten(1)[:, :8].unflatten(1, (2, 4)), -1)


def exiting(name, **settings):
    """A core whose samples leave at different depths under the rule."""
    thresholds = {"gate": 0.5, "paper": 0.5, "residual": 0.12, "acceleration": 0.15, "kl": 0.02}
    core = make_core(double=True, exit=name, exit_threshold=thresholds.get(name), **settings)
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in core.rule.parameters():
            parameter.normal_(generator=gen)
        if name == "gate":  # half of the samples leave after the first loop
            torch.manual_seed(3)
            states = core(*core_input(core, 32), 1, core.prepare())[1].states
            core.rule.threshold = float(core.rule.improvement(states[1], states[1] - states[0]).median())
    return core


def adaptive_step(core, deter, inputs, compact, cap=8):
    torch.manual_seed(3)
    return step_of(core, deter, inputs, core.prepare(), cap, log_prior=log_prior, compact=compact)


@pytest.mark.parametrize("name", EARLY)
def test_compacted_and_frozen_samples_agree_under_every_rule(name):
    core = exiting(name)
    deter, inputs = core_input(core, 32)
    compact, a = adaptive_step(core, deter, inputs, True)
    frozen, b = adaptive_step(core, deter, inputs, False)
    assert len(a.depth.unique()) >= 2, a.depth
    assert torch.equal(a.depth, b.depth)
    assert torch.allclose(compact, frozen, atol=1e-12)
    assert torch.allclose(a.residual, b.residual, atol=1e-12)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", [name for name in EARLY if name != "random"])
def test_no_rule_lets_a_sample_depend_on_its_batch(name, compact):
    core = exiting(name)
    deter, inputs = core_input(core, 16)
    together, stats = adaptive_step(core, deter, inputs, compact)
    for row in range(16):
        one = slice(row, row + 1)
        alone, own = adaptive_step(core, deter[one], inputs[one], compact)
        assert own.depth.item() == stats.depth[row].item()
        assert torch.allclose(alone[0], together[row], atol=1e-11)


def test_residual_stops_after_the_first_small_change():
    core = exiting("residual")
    deter, inputs = core_input(core, 32)
    _, stats = adaptive_step(core, deter, inputs, True)
    states = core(deter, inputs, 8, core.prepare())[1].states
    for row, depth in enumerate(stats.depth.tolist()):
        sizes = [
            float(((states[r][row] - states[r - 1][row]).norm() / states[r][row].norm()).detach())
            for r in range(1, depth + 1)
        ]
        assert all(size >= 0.12 for size in sizes[:-1])
        assert sizes[-1] < 0.12 or depth == 8


def test_kl_stops_when_the_prior_holds_still_and_not_before_the_second_loop():
    core = exiting("kl")
    deter, inputs = core_input(core, 32)
    _, stats = adaptive_step(core, deter, inputs, True)
    dynamics = core.prepare()
    priors = [log_prior(core(deter, inputs, loops, dynamics)[0]) for loops in range(1, 9)]
    kls = torch.stack([kl_divergence(a, b) for a, b in zip(priors, priors[1:], strict=False)])  # loops 2..8
    assert stats.depth.min() >= 2
    for row, depth in enumerate(stats.depth.tolist()):
        assert (kls[: depth - 2, row] >= 0.02).all()
        assert kls[depth - 2, row] < 0.02 or depth == 8


def test_the_kl_rule_says_what_it_needs():
    core = exiting("kl")
    with pytest.raises(ValueError, match="log_prior"):
        core.adaptive_step(*core_input(core, 2), core.prepare(), 4)


def run_rule(rule, states):
    """Depth (M,) at which the rule stops along given states, a list of (M, 1, D)."""
    memory = rule.begin(states[0], len(states) - 1)
    depth = torch.zeros(len(states[0]), dtype=torch.long)
    for loop in range(1, len(states)):
        now = HaltingState(loop, states[loop], states[loop] - states[loop - 1], lambda: torch.empty(0))
        stop, memory = rule.stops(now, memory)
        depth = torch.where((depth == 0) & stop, loop, depth)
    return depth.tolist()


def test_acceleration_wants_two_small_second_differences_in_a_row():
    steady = [float(k) + 10 for k in range(6)]  # second difference 0 from loop 2 on: stops at 3
    late = [10.0, 13.0, 11.0, 12.0, 13.0, 14.0]  # second differences 5, 3, 0, 0: stops at 5
    broken = [10.0, 11.0, 12.0, 15.0, 16.0, 17.0]  # 0, then 2, -2, 0: never twice
    states = [torch.tensor([[[a]], [[b]], [[c]]]) for a, b, c in zip(steady, late, broken, strict=True)]
    assert run_rule(Acceleration(1, 8, 0.01), states) == [3, 5, 0]
    assert run_rule(Residual(1, 8, 0.08), states)[0] == 3  # 1 / 13 < 0.08


def test_random_exits_with_a_generator_of_their_own_leave_the_latents_draws_alone():
    world = make_world(exit="random", exit_histogram=(1.0,))
    start, actions = random_state(world, 8), torch.zeros(8, 3, 2)
    dreams = []
    for generator in (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1), None):
        world.core.rule.generator = generator
        torch.manual_seed(0)
        dreams.append(world.imagine(start, actions, 3).feat)
    assert torch.equal(dreams[0], dreams[1])
    assert not torch.equal(dreams[0], dreams[2])


def test_random_exits_follow_their_histogram():
    core = make_core(exit="random", exit_histogram=(0.5, 0.0, 0.3, 0.2))
    deter, inputs = core_input(core, 20_000)
    for compact in (True, False):
        _, stats = adaptive_step(core, deter, inputs, compact, cap=4)
        shares = torch.bincount(stats.depth, minlength=5)[1:] / 20_000
        assert torch.allclose(shares, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.015)
        assert adaptive_step(core, deter, inputs, compact, cap=2)[1].depth.max() == 2


def test_the_papers_gate_settles_at_one_half_and_trains_nothing_else():
    world = make_world(exit="paper", mean_loops=3.0)
    batch = make_batch(world)
    loss, _ = world.exit_loss(observe(world, batch))
    for name, grad in gradients(world, loss).items():
        assert (grad is not None and bool(grad.any())) == (".rule." in name), name
    rule = PaperGate(8, 4, 0.5, alpha=1.0)
    x = torch.randn(3, 4, 5, 2, 4)  # (R, B, T, N, D)
    adam = torch.optim.Adam(rule.parameters(), lr=0.05)
    for _ in range(300):
        loss, metrics = rule.loss(HaltingBatch(x, x, None, torch.empty(0)))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert float(metrics["loop/exit_gate"]) == pytest.approx(0.5, abs=0.01)
    assert float(metrics["loop/exit_spread"]) < 0.02
    assert float(loss.detach()) == pytest.approx(-3 * math.log(2), rel=1e-3)  # the sum over three loops


@pytest.mark.parametrize("name", [name for name in RULES if name != "certified"])  # see test_certified.py
def test_every_rule_dreams_acts_and_trains(name):
    world = make_world(exit=name, mean_loops=3.0, depth="update")
    batch = make_batch(world)
    loss, _, metrics = world_loss(world, batch, 4)
    loss.backward()
    assert all(value.isfinite() for value in metrics.values())
    dream = world.imagine(random_state(world, 8), torch.zeros(8, 3, 2), 3)
    assert 1 <= int(dream.loops.depth.min()) <= int(dream.loops.depth.max()) <= world.run_cap


def test_wrong_rules_are_refused():
    with pytest.raises(ValueError, match="residual"):
        make_rule("residul", 8, 4)
    with pytest.raises(ValueError, match="histogram"):
        make_core(exit="random", exit_histogram=(0.5, -0.1))
    with pytest.raises(ValueError, match="module:Class"):
        make_rule("lookahead", 8, 4)
    assert isinstance(make_rule("kl", 8, 4), PriorKL)
    assert isinstance(make_rule("random", 8, 4), RandomExit)
    assert make_rule("random", 8, 4).histogram.tolist() == [1.0] * 4
    for weights in ((0.0, 0.0), (1.0, -1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="histogram"):
            make_rule("random", 8, 4, histogram=weights)
    assert make_rule("random", 8, 4, histogram=(1, 2)).histogram.dtype == torch.float32


def test_every_threshold_has_a_default():
    defaults = {"gate": 0.05, "residual": 0.1, "acceleration": 0.1, "kl": 0.01, "paper": 0.5}
    assert {name: make_rule(name, 8, 4).threshold for name in defaults} == defaults
    assert make_rule("residual", 8, 4, 0.3).threshold == 0.3


def test_one_loop_teaches_the_gate_nothing():
    world = make_world()
    loss, metrics = world.exit_loss(observe(world, make_batch(world), 1))
    assert (float(loss), metrics) == (0.0, {})
