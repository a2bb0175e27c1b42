"""Planning at decision time: sequences of actions are improved in the world model before the first one is taken.

Source: model-predictive path integral control as in TD-MPC2 (Hansen et al. 2024), with lambda returns for its n-step
sums: candidates are scored in imagination, the best ones make the next candidates, and the policy proposes some.

Shapes: E environments, N candidates of each, H steps, A actions. Everything is for one environment alone: no row of a
batch depends on the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from agent.learning.actor_critic import ActorCritic, lambda_return
from world_model import LatentState, Rollout, WorldModel
from world_model.ranges import AT_LEAST_FOUR

ITERATIONS = 4
PROPOSALS = 0.5
"""Share of the candidates that are rollouts of the policy; they stay through all iterations."""
ELITES = 0.125
"""Share of the candidates that make the next ones."""
TEMPERATURE = 0.5
"""Of the elites' weights, in standard deviations of all scores."""
LARGEST_STD, SMALLEST_STD = 0.3, 0.05
"""Of the candidates around their mean. With 1.0 instead of 0.3 returns were lower (results/notes/suite.md)."""
EVEN_SPREAD = 0.01
"""Spread of the policy's scores, in rewards, at which plan and policy count the same."""


class Plan(NamedTuple):
    """actions (E, H, A): the mean of the search, with which the next one begins; mean and std (E, A): of the action
    that is taken now."""

    actions: Tensor
    mean: Tensor
    std: Tensor


@torch.no_grad()
def plan(
    world: WorldModel, behavior: ActorCritic, state: LatentState, warm: Tensor | None, going: Tensor,
    max_loops: int | None = None,
) -> Plan:  # fmt: skip
    """state: of E environments; warm (E, H, A): the actions of the plan before, if there is one, from which the search
    begins where an episode is going on (E,).

    Where what the policy proposes has nearly the same score, whatever it is, the search would settle on what is best by
    chance, and explore no more: the policy acts there, the more the smaller the differences are.
    """
    cfg, envs, candidates = behavior.cfg, len(going), behavior.cfg.plan_candidates
    horizon, size = cfg.plan_horizon, world.action_size
    proposed = max(1, round(PROPOSALS * candidates))
    elites, others = max(2, round(ELITES * candidates)), max(1, candidates - proposed)

    def score(rollout: Rollout) -> Tensor:  # (E * N, H) -> (E, N)
        values = behavior.critic.value(rollout.feat).t()
        return lambda_return(rollout.rewards, rollout.continues, values, cfg.gamma)[:, 0].view(envs, -1)

    def imagine(actions: Tensor | None, count: int) -> Rollout:
        start = state.map(lambda leaf: leaf.repeat_interleave(count, 0))
        source = behavior.policy if actions is None else actions.flatten(0, 1)
        return world.imagine(start, source, horizon, max_loops=max_loops)

    rollout = imagine(None, proposed)
    proposals = rollout.actions.clamp(-1.0, 1.0).view(envs, proposed, horizon, size)  # (E, P, H, A)
    proposal_scores = score(rollout)
    mean = proposals.mean(1)  # (E, H, A)
    if warm is not None:  # its last action is guessed to be repeated
        mean = torch.where(going[:, None, None], torch.cat([warm[:, 1:], warm[:, -1:]], 1), mean)
    std = torch.full_like(mean, LARGEST_STD)
    for _ in range(ITERATIONS):
        noise = torch.randn(envs, others, horizon, size, device=mean.device)
        actions = torch.addcmul(mean[:, None], std[:, None], noise).clamp(-1.0, 1.0)  # (E, N-P, H, A)
        scores = torch.cat([proposal_scores, score(imagine(actions, others))], 1)  # (E, N)
        best, index = scores.topk(elites, 1)
        # (E, elites, H, A), and weights (E, elites, 1, 1)
        chosen = torch.cat([proposals, actions], 1).gather(1, index[:, :, None, None].expand(-1, -1, horizon, size))
        temperature = TEMPERATURE * scores.std(1, keepdim=True).clamp(min=1e-6)
        weight = torch.softmax((best - best[:, :1]) / temperature, 1)[:, :, None, None]
        mean = (weight * chosen).sum(1)
        std = (weight * (chosen - mean[:, None]).square()).sum(1).sqrt().clamp(SMALLEST_STD, LARGEST_STD)
    spread = proposal_scores.std(1, keepdim=True) if proposed > 1 else torch.zeros_like(mean[:, 0, :1])  # (E, 1)
    trust = spread / (spread + EVEN_SPREAD)
    own, own_std = behavior.actor.parameters_of(state.feat())  # (E, A) each
    return Plan(mean, torch.lerp(own, mean[:, 0], trust), torch.lerp(own_std, std[:, 0], trust))


def use_plan(behavior: ActorCritic, candidates: int, horizon: int) -> None:
    """Let an agent plan with so many candidates and steps ahead; 0 candidates: the actor decides.

    Plans are of single decisions, also those of an agent that holds its actions (`--behavior.jump`).

    Raises ValueError where its actions are choices, and for numbers that `BehaviorConfig` refuses.
    """
    if candidates and behavior.spec.discrete:
        raise ValueError("--plan plans continuous actions, and this task's are choices: leave it out")
    if 0 < candidates < AT_LEAST_FOUR[0]:
        raise ValueError(f"--plan must be 0 (the actor decides) or at least 4, got {candidates}")
    if candidates:
        single = replace(behavior.cfg, jump=1)
        behavior.cfg = replace(single, decisions="plan", plan_candidates=candidates, plan_horizon=horizon)
    else:
        behavior.cfg = behavior.cfg.without_plans()
