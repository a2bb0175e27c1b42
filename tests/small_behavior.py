"""A small actor-critic and random dreams for it."""

import copy

import torch
from torch import Tensor

from agent.learning.actor_critic import ActorCritic, BehaviorConfig, Metrics, lambda_return
from agent.spaces import ActionSpec
from world_model import LatentState, LoopStats, Rollout, TwoHot
from world_model.nets import MLP

GAMMA, LAM = 0.9, 0.95
DISCRETE, CONTINUOUS = ActionSpec(3, True), ActionSpec(2, False)


def make(spec: ActionSpec = CONTINUOUS, seed: int = 0, **cfg) -> ActorCritic:
    """A small actor-critic on 6 features, with a critic that is not flat."""
    torch.manual_seed(seed)
    cfg = {"gamma": GAMMA, "units": 16, "entropy": 0.0} | cfg
    cfg = {"actor_gradient": "reinforce"} | cfg
    ac = ActorCritic(BehaviorConfig(**cfg), 6, spec)
    ac.critic.twohot = TwoHot(21, 100.0)  # few and small bins, or random weights would mean values of thousands
    ac.critic.net = MLP(6, 16, 1, 21, out_scale=0.0)
    ac.critic.slow = copy.deepcopy(ac.critic.net).requires_grad_(False)
    with torch.no_grad():
        ac.critic.net.out.weight.normal_(std=0.3)
        ac.actor.net.out.weight.normal_(std=0.3)
    return ac


def make_rollout(spec: ActionSpec = CONTINUOUS, size: int = 4, horizon: int = 5, seed: int = 1) -> Rollout:
    """Random states, actions, rewards and continues; features are 2 x 1 tokens and one group of 4."""
    gen = torch.Generator().manual_seed(seed)
    states = LatentState(
        torch.randn(size, horizon + 1, 2, 1, generator=gen),
        torch.rand(size, horizon + 1, 1, 4, generator=gen),
    )
    if spec.discrete:
        choice = torch.randint(0, spec.size, (size, horizon), generator=gen)
        actions = torch.nn.functional.one_hot(choice, spec.size).float()
    else:
        actions = torch.randn(size, horizon, spec.size, generator=gen)
    stats = LoopStats(torch.ones(size, horizon), torch.zeros(size, horizon, 1))
    return Rollout(
        states,
        actions,
        torch.rand(size, horizon, generator=gen) * 0.1,
        torch.rand(size, horizon, generator=gen),
        stats,
        torch.ones(size),
        states.feat().transpose(0, 1),
    )


def losses(ac: ActorCritic, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Metrics]:
    """Actor loss, critic loss, returns (B, H) and metrics, in the order of `Dreamer.update`."""
    logits, values = ac.values(rollout)
    returns = lambda_return(rollout.rewards, rollout.continues, values, ac.cfg.gamma)
    actor_loss, critic_loss, metrics = ac.losses(rollout, returns, values, logits)
    return actor_loss, critic_loss, returns.detach(), metrics
