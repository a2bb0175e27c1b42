"""Dreams as one operation: the same rollouts and gradients as step by step."""

import weakref
from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
import torch
from small_fused import CASES, PLAIN_SCANS, batch_of, compiler, make

from agent.execution import Eager, make_execution
from agent.execution.fused import dream, fuse, fused_layers, scan
from agent.execution.fused.world import FusedWorldModel
from world_model import LatentState

pytestmark = compiler


def dream_of(agent, fused, horizon=4, count=9):
    """A rollout with the gradient of the actor of all its features."""
    with fused_layers() if fused else nullcontext():
        torch.manual_seed(3)
        state = agent.world.initial(count)
        start = LatentState(torch.randn_like(state.deter), torch.zeros_like(state.stoch))
        jump = max(1, agent.world.cfg.jump - 1)
        rollout = agent.world.imagine(start, agent.behavior.policy, horizon, grad=True, jump=jump)
        torch.manual_seed(4)
        weights = list(agent.behavior.actor.parameters())
        total = (rollout.feat * torch.randn_like(rollout.feat)).sum() + rollout.rewards.sum()
        return rollout, torch.autograd.grad(total, weights)


@pytest.mark.parametrize("case", ["vectors", "certified", "images", "jumps"])
def test_a_dream_whose_samples_stop_after_different_loops_is_the_same(case):
    config, spaces = CASES[case]
    loop = replace(config.model.loop, mean_loops=3.0)
    plain, fused = (make(replace(config, model=replace(config.model, loop=loop)), spaces) for _ in range(2))
    for agent in (plain, fused):
        torch.manual_seed(5)
        with torch.no_grad():
            agent.behavior.actor.net.out.weight.normal_()  # actions beyond 1 among them
            agent.world.reward.out.weight.normal_()
            rule = agent.world.core.rule
            rule.state.weight.normal_()
            rule.change.weight.normal_()
            rule.state.bias.fill_(rule.threshold)
    fuse(fused)
    (expected, gradients), (rollout, its) = dream_of(plain, False), dream_of(fused, True)
    depths = expected.loops.depth
    assert len(depths.unique()) >= 3, "too few different depths to show anything"
    assert (expected.actions.abs() > 1.0).any()
    assert torch.equal(rollout.loops.depth, depths)
    assert rollout.loops.depth.dtype == depths.dtype
    for name in ("feat", "actions", "rewards", "continues", "alive"):
        torch.testing.assert_close(getattr(rollout, name), getattr(expected, name), rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(rollout.loops.residual, expected.loops.residual, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.states.deter, expected.states.deter, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(its, gradients, strict=True):
        assert theirs.abs().sum() > 0
        assert (mine - theirs).norm() < 1e-4 * theirs.norm()


def test_a_dream_from_states_with_gradient_keeps_it():
    agent = make(*CASES["vectors"])
    fuse(agent)
    start = agent.world.initial(3).map(lambda leaf: leaf.detach().clone().requires_grad_())
    with fused_layers():
        agent.world.imagine(start, agent.behavior.policy, 2, grad=True).feat.square().sum().backward()
    assert start.deter.grad.abs().sum() > 0


def test_a_dream_is_one_operation_where_it_can_be(monkeypatch):
    dreams = []
    monkeypatch.setattr(FusedWorldModel, "dream", lambda self, *given, **_: dreams.append(given))
    plain = PLAIN_SCANS | {"choices, through the dynamics", "exits that ask the prior"}
    for case in CASES:
        agent = make(*CASES[case])
        fuse(agent)
        dreams.clear()
        with fused_layers(), suppress(AttributeError):  # nothing was dreamed
            agent.update(batch_of(agent), 2, Eager(agent))
        assert bool(dreams) == (case not in plain), case


def test_dreams_beside_the_updates_stay_plain(monkeypatch):
    """Those of a number of loops, or of a policy of one's own; and all that are outside of an update."""
    monkeypatch.setattr(FusedWorldModel, "dream", lambda *_, **options: pytest.fail("it was fused"))
    agent = make(*CASES["vectors"])
    fuse(agent)
    start = agent.world.initial(3)
    with fused_layers():
        for policy, options in (
            (agent.behavior.policy, {"grad": True, "max_loops": 1}),
            (agent.behavior.policy, {"grad": True, "sample": False}),
            (agent.behavior.actor.act, {"grad": True}),
            (lambda feat: torch.zeros(3, 3), {"grad": True}),
            (torch.zeros(3, 2, 3), {"grad": True}),
        ):
            assert agent.world.imagine(start, policy, 2, **options).rewards.shape == (3, 2)
        assert not agent.world.one_operation(start, torch.zeros(3, 2, 2, 3))  # steps of two decisions
    assert agent.world.imagine(start, agent.behavior.policy, 2).rewards.shape == (3, 2)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", ["choices", "REINFORCE", "jumps", "jumps of choices", "simplicial latents"])
def test_a_dream_without_gradient_is_the_same(case, given):
    """Of the actor, or of given actions, which are longer than the dream and beyond 1 in part."""
    plain, fused = (make(*CASES[case]) for _ in range(2))
    fuse(fused)
    results = []
    for agent in (plain, fused):
        torch.manual_seed(5)
        with torch.no_grad():
            agent.behavior.actor.net.out.weight.normal_()
            agent.world.reward.out.weight.normal_(0.0, 0.1)
        with fused_layers():
            torch.manual_seed(3)
            state, jump = agent.world.initial(9), max(1, agent.world.cfg.jump - 1)
            start = LatentState(torch.randn_like(state.deter), torch.zeros_like(state.stoch))
            policy = 2.0 * torch.randn(9, 5, agent.spaces.action.size) if given else agent.behavior.policy
            results.append(agent.world.imagine(start, policy, 4, jump=jump))
    expected, rollout = results
    assert not rollout.feat.requires_grad
    assert rollout.outputs is None
    assert torch.equal(rollout.loops.depth, expected.loops.depth)
    for name in ("actions", "feat", "rewards", "continues"):  # rewards are large, and sums of large numbers
        close = {"rtol": 1e-3, "atol": 1e-3} if name == "rewards" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(getattr(rollout, name), getattr(expected, name), **close, msg=name)
    if "choices" in case and not given:
        assert len(rollout.actions.argmax(-1).unique()) > 1
        assert set(rollout.actions.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("module", [scan, dream])
def test_scan_and_dream_are_freed_with_their_update(module):
    """Their outputs are not held by what made them: nothing collects such a circle."""
    agent = make(*CASES["vectors"])
    execution = make_execution(agent)
    alive = []
    with pytest.MonkeyPatch.context() as patch:
        kept = module.Kept.__init__

        def watched(self, *given):
            kept(self, *given)
            alive.append(weakref.ref(self))

        patch.setattr(module.Kept, "__init__", watched)
        for _ in range(3):
            execution.update(batch_of(agent))
    assert len(alive) == 3
    assert not any(reference() for reference in alive)
