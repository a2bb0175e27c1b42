"""Dreams that are trusted only so far: the budget, and what it does to returns."""

import pytest
import torch

from agent.learning.actor_critic import ActorCritic, BehaviorConfig, lambda_return
from agent.learning.scales import Budget, trust_of
from agent.spaces import ActionSpec
from world_model import LatentState
from world_model.core import LoopStats
from world_model.types import Rollout


def test_trust_is_whole_within_the_budget_and_gone_at_twice_it():
    spent = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 3.0, 0.0, 0.0]])
    assert torch.allclose(
        trust_of(spent, torch.tensor(2.0)),
        torch.tensor([[1.0, 1.0, 0.5, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]]),
    )


def test_returns_with_a_lambda_for_every_step():
    gen = torch.Generator().manual_seed(0)
    rewards, continues, values = (torch.rand(3, n, generator=gen) for n in (4, 4, 5))
    same = lambda_return(rewards, continues, values, 0.9, torch.full((3, 4), 0.7))
    assert torch.allclose(same, lambda_return(rewards, continues, values, 0.9, 0.7))
    cut = torch.tensor([0.7, 0.0, 0.7, 0.7]).expand(3, 4)  # at s_2 the critic takes over
    short = lambda_return(rewards[:, :2], continues[:, :2], values[:, :3], 0.9, 0.7)
    assert torch.allclose(lambda_return(rewards, continues, values, 0.9, cut)[:, :2], short)


def test_the_budget_is_half_of_the_horizon_at_the_usual_pace():
    budget = Budget(rate=0.5, horizon=8)
    assert budget.update(torch.full((2, 8), 3.0)) == pytest.approx(12.0)
    assert budget.update(torch.full((2, 8), 5.0)) == pytest.approx(16.0)


def rollout_of(size=4, horizon=6, depth=None):
    gen = torch.Generator().manual_seed(1)
    deter = torch.randn(size, horizon + 1, 2, 8, generator=gen)
    stoch = torch.rand(size, horizon + 1, 3, 4, generator=gen)
    states = LatentState(deter, stoch)
    depth = torch.ones(size, horizon, dtype=torch.long) if depth is None else depth
    return Rollout(
        states, torch.rand(size, horizon, 2, generator=gen), torch.rand(size, horizon, generator=gen),
        torch.ones(size, horizon), LoopStats(depth, torch.zeros(size, horizon, 2)), torch.ones(size),
        states.feat().transpose(0, 1),
    )  # fmt: skip


def actor_critic(adaptive):
    torch.manual_seed(0)
    cfg = BehaviorConfig(horizon=6, units=16, adaptive=adaptive, actor_gradient="reinforce")
    return ActorCritic(cfg, 2 * 8 + 3 * 4, ActionSpec(2, False), 21, 100.0)


def test_steps_beyond_the_budget_teach_nothing():
    depth = torch.ones(4, 6, dtype=torch.long)
    depth[:, 3:] = 100
    ac = actor_critic("loops")
    ac.budget.pace.fill_(1.0)
    ac.budget.rate = 0.0  # a budget of 3
    rollout = rollout_of(depth=depth)
    _, _, returns, metrics = ac.loss(rollout)
    assert metrics["behavior/dream_length"] == pytest.approx(3.0)
    changed = rollout._replace(rewards=rollout.rewards + torch.tensor([0.0] * 4 + [9.0] * 2))  # r_5, r_6
    assert torch.allclose(ac.loss(changed)[2][:, :3], returns[:, :3])
    heard = rollout._replace(rewards=rollout.rewards + torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, 0.0]))  # r_3
    assert (ac.loss(heard)[2][:, 0] > returns[:, 0] + 1).all()


def test_dreams_differ_in_length_by_what_they_cost():
    depth = torch.ones(4, 6, dtype=torch.long)
    depth[2:] = 4
    ac = actor_critic("loops")
    ac.loss(rollout_of(depth=depth))
    lengths = ac.last_lengths
    assert (lengths[:2] > lengths[2:] + 1).all()
    plain = actor_critic("none")
    plain.loss(rollout_of())
    assert plain.last_lengths is None


def test_a_run_with_an_adaptive_horizon(script, tmp_path):
    words = ("toy:cue5", "--preset", "debug", "--steps", 300, "--no-video", "--train.eval-every", 0, "--run-dir", "run")
    done = script("train_agent.py", *words, "--behavior.adaptive", "loops")
    assert done.returncode == 0, done.stderr
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2]
    assert "behavior/dream_length" in last
