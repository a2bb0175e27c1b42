"""Planning at decision time: it finds what is known to be best, row by row, and what a run carries of it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import metronomes, untrained

from agent.evaluation.episodes import run_episodes
from agent.learning.actor_critic import ActorCritic, BehaviorConfig
from agent.learning.dreamer import Dreamer
from agent.learning.planning import plan, use_plan
from agent.runs.presets import preset
from agent.spaces import ActionSpec
from envs import make_vector_env
from world_model import LatentState, LoopStats, Rollout

TARGETS = torch.tensor([[0.6, -0.3], [-0.8, 0.1], [0.0, 0.9]])
"""(E, A) the best action of each environment."""


class KnownWorld:
    """Reward -|a - target|^2 in every step, times `worth`; the first entries of deter are the target, and nothing
    moves."""

    action_size = 2

    def __init__(self):
        self.rows, self.worth = 0, 1.0

    def imagine(self, start, source, horizon, max_loops=None, sample=True):
        feat, target = start.feat(), start.deter.flatten(1)[:, :2]
        actions = source if isinstance(source, torch.Tensor) else torch.stack([source(feat)] * horizon, 1)
        self.rows += len(feat)
        rewards = -self.worth * (actions - target[:, None]).square().sum(-1)
        ones = torch.ones_like(rewards)
        return Rollout(
            states=start, actions=actions, rewards=rewards, continues=ones, loops=LoopStats(ones, ones),
            alive=ones[:, 0], feat=feat.expand(horizon + 1, *feat.shape),
        )  # fmt: skip


def planner(candidates=64, horizon=3):
    torch.manual_seed(0)
    cfg = BehaviorConfig(decisions="plan", plan_candidates=candidates, plan_horizon=horizon, units=16)
    behavior = ActorCritic(cfg, 8, ActionSpec(2, False))
    state = LatentState(torch.cat([TARGETS, torch.zeros(3, 2)], 1).view(3, 1, 4), torch.zeros(3, 1, 4))
    return KnownWorld(), behavior, state


def test_the_best_actions_are_found():
    world, behavior, state = planner(256)
    actions, mean, std = plan(world, behavior, state, None, torch.ones(3, dtype=torch.bool))
    assert actions.shape == (3, 3, 2)
    assert torch.allclose(actions, TARGETS[:, None].expand(3, 3, 2), atol=0.2)
    assert torch.allclose(mean, TARGETS, atol=0.2)
    assert std.mean() < 0.3


def test_a_plan_goes_on_from_the_one_before_unless_the_episode_is_new():
    world, behavior, state = planner(8)
    going = torch.tensor([True, True, False])
    warm = TARGETS[:, None].expand(3, 3, 2).clone()
    errors = torch.zeros(3)
    for seed in range(20):
        torch.manual_seed(seed)
        mean = plan(world, behavior, state, warm, going).actions
        errors += (mean[:, 0] - TARGETS).norm(dim=-1)
    cold = torch.zeros(3)
    for seed in range(20):
        torch.manual_seed(seed)
        mean = plan(world, behavior, state, None, going).actions
        cold += (mean[:, 0] - TARGETS).norm(dim=-1)
    assert (errors[:2] < cold[:2]).all()
    assert errors[2] == pytest.approx(cold[2].item(), rel=0.3)


def test_a_row_does_not_depend_on_the_others():
    """With random numbers that are the same for every row, a batch of three plans as each alone."""
    world, behavior, state = planner(16)
    behavior.actor.net.out.weight.data.zero_()

    def same(*shape, **_):
        gen = torch.Generator().manual_seed(1)
        return torch.randn(*shape[1:], generator=gen).expand(*shape).clone() if len(shape) == 4 else torch.zeros(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", same)
        patch.setattr(torch, "randn_like", torch.zeros_like)
        going = torch.ones(3, dtype=torch.bool)
        together = plan(world, behavior, state, None, going)
        for row in range(3):
            alone = plan(world, behavior, state.map(lambda leaf, r=row: leaf[r : r + 1]), None, going[:1])
            for part, other in zip(together, alone, strict=True):
                assert torch.allclose(part[row], other[0], atol=1e-5)


def test_an_agent_that_plans_trains_saves_its_plan_and_goes_on(make_trainer, tmp_path):
    config = preset("debug")
    config = replace(config, behavior=replace(config.behavior, decisions="both", plan_candidates=8, plan_horizon=2))
    options = {"config": config, "steps": 130, "prefill": 100, "eval_every": 0}
    trainer = make_trainer(tmp_path / "one", **options)
    assert trainer.run()
    assert trainer.memory.plan.shape == (1, 2, 1)
    other = make_trainer(tmp_path / "other", **options)
    saved = {"step": trainer.step, "agent": trainer.agent.state_dict(), "replay": trainer.replay.state_dict()}
    other.load_state_dict(saved | {"trainer": trainer.state_dict()})
    assert torch.equal(other.memory.plan, trainer.memory.plan)


def test_agents_trained_without_can_plan_and_episodes_are_repeatable():
    agent = untrained(metronomes)
    torch.nn.init.normal_(agent.averaged.world.reward.out.weight)  # or all plans would be worth the same
    use_plan(agent.averaged.behavior, 16, 2)
    one, other = (run_episodes(agent, metronomes, 2, 1_000_000_000, say=lambda line: None) for _ in range(2))
    assert [row["return"] for row in one] == [row["return"] for row in other]
    use_plan(agent.averaged.behavior, 0, 2)
    assert agent.averaged.behavior.cfg.decisions == "actor"
    plain = run_episodes(agent, metronomes, 2, 1_000_000_000, say=lambda line: None)
    assert [row["return"] for row in plain] != [row["return"] for row in one]


@pytest.mark.parametrize(
    ("decisions", "explores", "evaluates"),
    [("actor", False, False), ("both", True, False), ("plan", True, True), ("expansion", False, False)],
)
def test_who_decides_while_exploring_and_in_evaluations(decisions, explores, evaluates):
    config = preset("debug")
    spaces = untrained(metronomes).spaces
    behavior = replace(config.behavior, decisions=decisions)
    agent = Dreamer(config.model, behavior, config.optimizer, spaces)
    obs = {name: np.zeros((2, size), np.float32) for name, size in spaces.obs.items()}
    for explore, planned in ((True, explores), (False, evaluates)):
        found = agent.act(obs, None, np.ones(2, bool), explore)[1].plan
        assert (found is not None) == planned
        assert not planned or found.shape == (2, 3, 1)


def test_with_the_fewest_candidates_plans_still_move_the_actor():
    world, behavior, state = planner(4)
    world.worth = 100.0
    found = plan(world, behavior, state, None, torch.ones(3, dtype=torch.bool))
    assert (found.mean - behavior.actor.parameters_of(state.feat())[0]).abs().max() > 0.05


def test_the_policy_acts_where_all_scores_are_the_same():
    world, behavior, state = planner(64)
    own, own_std = behavior.actor.parameters_of(state.feat())
    for worth, trusted in ((0.0, 0.0), (1e-4, 0.02), (100.0, 1.0)):
        world.worth = worth
        found = plan(world, behavior, state, None, torch.ones(3, dtype=torch.bool))
        torch.testing.assert_close(found.mean, torch.lerp(own, found.actions[:, 0], trusted), atol=0.08, rtol=0.0)
        assert (found.std.mean() > 0.8) == (trusted < 0.5)
    assert own_std.mean() > 0.8


def test_choices_are_not_planned():
    agent = untrained(partial(make_vector_env, "toy:cue5", seed=0))
    with pytest.raises(ValueError, match="continuous actions"):
        use_plan(agent.averaged.behavior, 16, 2)
    with pytest.raises(ValueError, match="needs continuous actions: give actor"):
        ActorCritic(BehaviorConfig(decisions="plan"), 8, ActionSpec(2, True))
    with pytest.raises(ValueError, match="plan-horizon must be at least 1"):
        BehaviorConfig(decisions="plan", plan_candidates=8, plan_horizon=0)
    with pytest.raises(ValueError, match="plan-candidates must be at least 4, got 2"):
        BehaviorConfig(decisions="plan", plan_candidates=2)
    with pytest.raises(ValueError, match="--plan must be 0 .the actor decides. or at least 4, got 3"):
        use_plan(untrained(metronomes).averaged.behavior, 3, 2)
    with pytest.raises(ValueError, match="plans hold no actions"):
        BehaviorConfig(jump=4, decisions="both")
    with pytest.raises(ValueError, match="plans nothing"):
        BehaviorConfig(plan_candidates=8)
