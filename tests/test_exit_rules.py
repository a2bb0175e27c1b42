"""The exit rules, each against what it says it does; and what every rule owes to its batch."""

import math

import pytest
import torch
from small import core_input, gradients, make_batch, make_core, make_world, random_state

from world_model.exits import (
    Acceleration,
    ExitRule,
    Lesson,
    Moment,
    PaperGate,
    PriorKL,
    RandomExit,
    Residual,
    make_rule,
)
from world_model.latent import kl_divergence

RULES = ("gate", "lookahead", "forecast", "residual", "acceleration", "kl", "paper", "random")


def log_prior(deter):
    """Some function of the state that is a distribution: two groups of four classes."""
    return torch.log_softmax(deter.flatten(1)[:, :8].unflatten(1, (2, 4)), -1)


def exiting(name, **settings):
    """A core whose samples leave at different depths under the rule."""
    thresholds = {"gate": 0.5, "lookahead": 0.5, "forecast": 0.05, "paper": 0.5}
    thresholds |= {"residual": 0.12, "acceleration": 0.15, "kl": 0.02}
    core = make_core(double=True, exit=name, exit_threshold=thresholds.get(name), **settings)
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in core.rule.parameters():
            parameter.normal_(generator=gen)
        if name in ("gate", "lookahead"):  # half of the samples leave after the first loop
            torch.manual_seed(3)
            states = core(*core_input(core, 32), 1, core.prepare())[1].states
            core.rule.threshold = float(core.rule.improvement(states[1], states[1] - states[0]).median())
    return core


def settle(core, deter, inputs, compact, cap=8):
    torch.manual_seed(3)
    return core.settle(deter, inputs, core.prepare(), cap, log_prior=log_prior, compact=compact)


@pytest.mark.parametrize("initial", ["carry", "zero", "noise"])
@pytest.mark.parametrize("name", RULES)
def test_compacted_and_frozen_samples_agree_under_every_rule(name, initial):
    core = exiting(name, initial=initial)
    deter, inputs = core_input(core, 32)
    compact, a = settle(core, deter, inputs, True)
    frozen, b = settle(core, deter, inputs, False)
    if initial != "zero":  # from nothing, all samples settle alike
        assert len(a.depth.unique()) >= 2, a.depth
    assert torch.equal(a.depth, b.depth)
    assert torch.allclose(compact, frozen, atol=1e-12)
    assert torch.allclose(a.residual, b.residual, atol=1e-12)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", [name for name in RULES if name != "random"])
def test_no_rule_lets_a_sample_depend_on_its_batch(name, compact):
    core = exiting(name)
    deter, inputs = core_input(core, 16)
    together, stats = settle(core, deter, inputs, compact)
    for row in range(16):
        one = slice(row, row + 1)
        alone, own = settle(core, deter[one], inputs[one], compact)
        assert own.depth.item() == stats.depth[row].item()
        assert torch.allclose(alone[0], together[row], atol=1e-11)


def test_residual_stops_after_the_first_small_change():
    core = exiting("residual")
    deter, inputs = core_input(core, 32)
    _, stats = settle(core, deter, inputs, True)
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
    _, stats = settle(core, deter, inputs, True)
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
        core.settle(*core_input(core, 2), core.prepare(), 4)


def run_rule(rule, states):
    """Depth (M,) at which the rule stops along given states, a list of (M, 1, D)."""
    memory = rule.begin(states[0])
    depth = torch.zeros(len(states[0]), dtype=torch.long)
    for loop in range(1, len(states)):
        now = Moment(loop, states[loop], states[loop] - states[loop - 1], lambda: torch.empty(0))
        stop, memory = rule.stops(now, memory)
        depth = torch.where((depth == 0) & stop, loop, depth)
    return depth.tolist()


def test_acceleration_wants_two_small_second_differences_in_a_row():
    steady = [float(k) + 10 for k in range(6)]  # second difference 0 from loop 2 on: stops at 3
    late = [10.0, 13.0, 11.0, 12.0, 13.0, 14.0]  # second differences 5, 3, 0, 0: stops at 5
    broken = [10.0, 11.0, 12.0, 15.0, 16.0, 17.0]  # 0, then 2, -2, 0: never twice
    states = [torch.tensor([[[a]], [[b]], [[c]]]) for a, b, c in zip(steady, late, broken, strict=True)]
    assert run_rule(Acceleration(0.01), states) == [3, 5, 0]
    assert run_rule(Residual(0.08), states)[0] == 3  # 1 / 13 < 0.08


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
    rule = RandomExit((0.5, 0.0, 0.3, 0.2))
    torch.manual_seed(0)
    depth = rule.plan(torch.zeros(20_000, 1, 1), 4)
    counts = torch.bincount(depth, minlength=5)[1:] / 20_000
    assert torch.allclose(counts, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.015)
    assert rule.plan(torch.zeros(20_000, 1, 1), 2).max() == 2


def test_the_papers_gate_settles_at_one_half_and_trains_nothing_else():
    world = make_world(exit="paper", mean_loops=3.0)
    batch = make_batch(world)
    loss, _ = world.exit_loss(world.observe_sequence(batch))
    for name, grad in gradients(world, loss).items():
        assert (grad is not None and bool(grad.any())) == (".rule." in name), name
    rule = PaperGate(8, 0.5, alpha=1.0)
    x = torch.randn(3, 4, 5, 2, 4)  # (R, B, T, N, D)
    ran = torch.ones(3, 4)
    adam = torch.optim.Adam(rule.parameters(), lr=0.05)
    for _ in range(300):
        loss, metrics = rule.loss(Lesson(x, x, None, torch.empty(0), ran))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert float(metrics["loop/exit_gate"]) == pytest.approx(0.5, abs=0.01)
    assert float(metrics["loop/exit_spread"]) < 0.02
    assert float(loss.detach()) == pytest.approx(-3 * math.log(2), rel=1e-3)  # the sum over three loops


@pytest.mark.parametrize("name", RULES)
def test_every_rule_dreams_acts_and_trains(name):
    world = make_world(exit=name, mean_loops=3.0, depth="update")
    batch = make_batch(world)
    loss, _, metrics = world.loss(batch, 4)
    loss.backward()
    assert all(value.isfinite() for value in metrics.values())
    dream = world.imagine(random_state(world, 8), torch.zeros(8, 3, 2), 3)
    assert 1 <= int(dream.loops.depth.min()) <= int(dream.loops.depth.max()) <= world.run_cap


def test_wrong_rules_are_refused():
    with pytest.raises(ValueError, match="residual"):
        make_rule("residul", 8, 4)
    with pytest.raises(ValueError, match="histogram"):
        make_core(exit="random", exit_histogram=(0.5, -0.1))
    assert isinstance(make_rule("kl", 8, 4), PriorKL)
    assert make_rule("random", 8, 4).histogram.tolist() == [1.0] * 4
    for weights in ((0.0, 0.0), (1.0, -1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="histogram"):
            make_rule("random", 8, 4, histogram=weights)
    assert make_rule("random", 8, 4, histogram=(1, 2)).histogram.dtype == torch.float32


def test_the_lookahead_goes_on_through_a_loop_that_only_prepares():
    """Loops bring 0, 0.4 and 0 nats; each is worth going on for if it brings, or leads to, more than 0.05."""
    states = torch.eye(8)[:4].view(4, 1, 1, 1, 8)  # after loops 1..4, told apart by where the one stands
    change = torch.ones(4, 1, 1, 1, 8)
    gain = torch.tensor([0.0, 0.4, 0.0]).view(3, 1, 1)
    depths = {}
    for name in ("gate", "lookahead"):
        rule = make_rule(name, 8, 4)
        adam = torch.optim.Adam(rule.parameters(), 0.02)
        for _ in range(1500):
            adam.zero_grad()
            rule.loss(Lesson(states, change, None, gain, torch.ones(4, 1)))[0].backward()
            adam.step()
        found = rule.improvement(states.flatten(0, 2), change.flatten(0, 2))[:3].tolist()
        wanted = [0.0, 0.4, 0.0] if name == "gate" else [0.35, 0.4, 0.0]
        assert found == pytest.approx(wanted, abs=0.03)
        depths[name] = next(loop for loop, value in enumerate(found, 1) if value <= 0.05 + 0.03)
    assert depths == {"gate": 1, "lookahead": 3}


def test_the_forecast_plans_the_best_depth_before_the_first_loop():
    """Two kinds of input: for one all loops bring little, for the other the third brings what the second prepares."""
    e = torch.eye(2).view(1, 2, 1, 2)  # (B, T, N, D)
    gain = torch.tensor([[0.02, 0.0, 0.04], [0.0, 0.4, 0.01]]).t().view(3, 1, 2)
    x = torch.zeros(4, 1, 2, 1, 2)
    rule = make_rule("forecast", 2, 4, threshold=0.05)
    assert rule.plan(e[0], 4).tolist() == [1, 1]  # nothing is learned yet
    adam = torch.optim.Adam(rule.parameters(), 0.02)
    for _ in range(800):
        adam.zero_grad()
        rule.loss(Lesson(x, x, e, gain, torch.ones(4, 1)))[0].backward()
        adam.step()
    assert rule.plan(e[0], 4).tolist() == [1, 3]
    assert rule.plan(e[0], 9).tolist() == [1, 3]
    assert rule.plan(e[0], 2).tolist() == [1, 1]
    with torch.no_grad():
        rule.threshold = -1.0  # loops are worth something in themselves: as many as training knew
    assert rule.plan(e[0], 9).tolist() == [4, 4]


def test_the_forecast_learns_nothing_from_loops_that_did_not_run():
    rule = make_rule("forecast", 2, 4)
    e, x, gain = torch.randn(2, 3, 1, 2), torch.zeros(4, 2, 3, 1, 2), torch.ones(3, 2, 3)
    ran = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    rule.loss(Lesson(x, x, e, gain, ran))[0].backward()
    assert (rule.read.bias.grad != 0).tolist() == [True, False, False]


def test_a_planned_depth_is_the_depth_that_runs():
    core = exiting("forecast")
    deter, inputs = core_input(core, 32)
    for compact in (True, False):
        found, stats = settle(core, deter, inputs, compact)
        wanted = core(deter, inputs, stats.depth, core.prepare())[0]
        assert torch.allclose(found, wanted, atol=1e-12)
        ran = torch.arange(8) < stats.depth[:, None]
        assert (stats.residual[ran] > 0).all()
        assert (stats.residual[~ran] == 0).all()
    deter.requires_grad_()
    whole = core(deter, inputs, stats.depth, core.prepare())[0].square().sum()
    (wanted,) = torch.autograd.grad(whole, deter)
    for compact in (True, False):
        (found,) = torch.autograd.grad(settle(core, deter, inputs, compact)[0].square().sum(), deter)
        assert torch.allclose(found, wanted, atol=1e-10)


def test_a_plan_beyond_the_cap_is_cut():
    class Far(ExitRule):
        def plan(self, e, cap):
            return torch.tensor([0, 2, 99])

    core = make_core(double=True)
    core.rule = Far()
    deter, inputs = core_input(core, 3)
    found, stats = settle(core, deter, inputs, True, cap=4)
    assert stats.depth.tolist() == [1, 2, 4]
    assert torch.allclose(found, core(deter, inputs, stats.depth, core.prepare())[0], atol=1e-12)
