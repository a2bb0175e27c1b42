"""Actor and critic, trained on imagined rollouts. Source: DreamerV3 (Hafner et al. 2025), "Actor critic learning".

docs/architecture.md lists the differences. The largest: the actor of continuous actions learns by backpropagation
through the dynamics, as in DreamerV1 and V2, because REINFORCE is too noisy with few rollouts per update
(results/walker.md). Discrete actions use REINFORCE, and imagination then needs no gradient.

Shapes: B imagined rollouts, H horizon, A actions, F features. Features of a rollout are time first, (H+1, B, F).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.learning.gaussian import normal_logp, truncated_entropy
from agent.spaces import ActionSpec
from world_model import Rollout, TwoHot
from world_model.averages import Average, alone
from world_model.latent import probabilities, sample_onehot
from world_model.nets import MLP
from world_model.ranges import AT_LEAST_FOUR, AT_LEAST_ONE, NOT_NEGATIVE, SOME_SHARE, require

Metrics = dict[str, Tensor]

LAYERS = 2  # hidden layers of actor and critic
MIN_STD = 0.1  # smallest standard deviation of a continuous action
SATURATED = 1.5  # size of a mean before its tanh from which it is held back: tanh is flat there and hides the gradient
SATURATION_WEIGHT = 0.01  # of the squared excess, against advantages of size 1
UNIMIX = 0.01  # share of the uniform distribution in a discrete policy
SLOW_RATE = 0.02  # of the slow critic, per update
ADVANTAGE_RATE = 0.01  # of the running mean size of the advantages
ADVANTAGE_FLOOR = 0.01  # lower bound of their scale, in rewards: what is smaller may be an error of the critic
LAMBDA = 0.95  # of the lambda-return
CANDIDATES, PLANNED = 64, 3  # of a plan, and its steps
REPLAY_VALUE_SCALE = 0.3  # of the critic loss on replayed rewards, whose gradient reaches the world model


@dataclass(frozen=True)
class BehaviorConfig:
    """Imagination and the actor-critic."""

    horizon: int = 10
    """H, steps of an imagined rollout."""
    starts: int | None = None
    """Rollouts per update. They start at the last rows of every sequence, at least two of each; 0 = at all rows.
    By default 64 with the dynamics gradient and 128 with REINFORCE, which is noisier and cheaper."""
    actor_gradient: Literal["auto", "dynamics", "reinforce"] = "auto"
    """Gradient of the actor: through the dynamics, or REINFORCE; auto: dynamics for continuous actions."""
    gamma: float = 0.99
    """Discount per agent step."""
    jump: int = 1
    """k, decisions for which an action is held, in imagination and acting; at most --model.jump."""
    entropy: float | None = None
    """Entropy weight, against advantages of mean size 1; divided by the root of the number of continuous dimensions.
    By default 0.1 with the dynamics gradient (with 0.025 the policy settles too early), else 0.025."""
    decisions: Literal["actor", "plan", "both", "expansion"] = "actor"
    """Who acts: the actor; plans of continuous actions; or both, plans while exploring and the actor in evaluations.
    expansion: the actor; it learns at observed states alone, by REINFORCE, with returns of dreams as targets (MVE)."""
    plan_candidates: int = CANDIDATES
    """Sequences of actions that a plan compares, half of them the actor's: fewer than two of those do not differ."""
    plan_horizon: int = PLANNED
    """Steps ahead that are planned; the critic values what comes after them."""
    units: int = 128
    """Width of actor and critic."""

    def __post_init__(self) -> None:
        whole = dict.fromkeys(("horizon", "plan_horizon", "units", "jump"), AT_LEAST_ONE)
        require(self, "--behavior.", **whole, entropy=NOT_NEGATIVE, gamma=SOME_SHARE, plan_candidates=AT_LEAST_FOUR)
        if self.starts is not None and self.starts < 0:
            raise ValueError(f"--behavior.starts must be 0 (all) or more, got {self.starts}")
        if self.decisions == "expansion" and self.actor_gradient == "dynamics":
            raise ValueError("--behavior.decisions expansion learns by reinforce: leave --behavior.actor-gradient out")
        if not self.plans and (self.plan_candidates, self.plan_horizon) != (CANDIDATES, PLANNED):
            raise ValueError(f"--behavior.decisions {self.decisions} plans nothing: give plan or both")
        if self.plans and self.jump > 1:
            raise ValueError("plans hold no actions: leave --behavior.jump out, or give --behavior.decisions actor")

    @property
    def plans(self) -> bool:
        """Whether actions are planned, at least while exploring."""
        return self.decisions in ("plan", "both")

    def without_plans(self) -> BehaviorConfig:
        """The same settings where the actor decides."""
        return replace(self, decisions="actor", plan_candidates=CANDIDATES, plan_horizon=PLANNED)


# ---------------------------------------------------------------------- mathematics


def lambda_return(
    rewards: Tensor, continues: Tensor, values: Tensor, gamma: float, lam: float | Tensor = LAMBDA
) -> Tensor:
    """TD(lambda) returns of s_0 .. s_{H-1} (DreamerV3, eq. 7), (B, H).

    rewards (B, H) r_1..r_H, continues (B, H) c_1..c_H, values (B, H+1) v_0..v_H, lam a number or (B, H):
    V_k = r_{k+1} + gamma c_{k+1} ((1 - lam) v_{k+1} + lam V_{k+1}),  V_H = v_H.
    """
    discount = gamma * continues
    base = rewards + discount * (1.0 - lam) * values[:, 1:]
    returns, last = [], values[:, -1]
    for step_base, carried in zip(base.unbind(1)[::-1], (discount * lam).unbind(1)[::-1], strict=True):
        last = step_base + carried * last
        returns.append(last)
    return torch.stack(returns[::-1], 1)


def rollout_weights(alive: Tensor, continues: Tensor, gamma: float) -> Tensor:
    """(B, H) weight of s_0 .. s_{H-1}: alive_0 * prod_{1<=j<=k} gamma c_j, the discounted chance of s_k.

    Holds c_k (was s_k alive?) and never c_{k+1} (the outcome of a_k).
    """
    steps = torch.cat([alive[:, None], gamma * continues[:, :-1]], 1)
    return torch.cumprod(steps, 1)


class AdvantageScale(nn.Module):
    """Exponential average of the size of the advantages, from 0 and not debiased, at least `floor`.

    DreamerV3 divides by the 5-95 % range of returns. That range also holds how much better one start state is than
    another: when some rollouts start upright and some fallen, it grows, and the entropy bonus outweighs the advantages
    (results/walker.md). The floor has the role of DreamerV3's max(1, range) beside an entropy weight of 3e-4.
    """

    size: Tensor

    def __init__(self, floor: float = ADVANTAGE_FLOOR):
        super().__init__()
        self.floor = floor
        self.register_buffer("size", torch.zeros(()))

    @torch.no_grad()
    def update(self, advantage: Tensor, average: Average = alone) -> Tensor:
        """(...) advantages -> the scale, 0-d."""
        size = average(advantage.abs().mean())
        self.size.lerp_(torch.where(size.isfinite(), size, self.size), ADVANTAGE_RATE)  # a bad rollout raises later
        return self.size.clamp(min=self.floor)


# ---------------------------------------------------------------------- networks


class Actor(nn.Module):
    """features (..., F) -> a distribution over actions (..., A)."""

    def __init__(self, cfg: BehaviorConfig, features: int, spec: ActionSpec):
        super().__init__()
        self.spec = spec
        outputs = spec.size if spec.discrete else 2 * spec.size
        self.net = MLP(features, cfg.units, LAYERS, outputs, out_scale=0.01)

    def parameters_of(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Discrete: (probabilities, themselves). Continuous: (mean, standard deviation), each (..., A)."""
        return self.distribution(self.net(feat))

    def distribution(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the network -> `parameters_of`."""
        if self.spec.discrete:
            probs = probabilities(out, UNIMIX)
            return probs, probs
        mean, std = out.chunk(2, -1)
        return torch.tanh(mean), (1.0 - MIN_STD) * torch.sigmoid(std + 2.0) + MIN_STD

    def act(self, feat: Tensor, sample: bool = True) -> Tensor:
        """(..., A): a sample, or the mean (continuous) or most probable (discrete, one-hot) action."""
        first, std = self.parameters_of(feat)
        if self.spec.discrete:
            return sample_onehot(first, torch.rand_like(first[..., :1]) if sample else None)
        return torch.addcmul(first, std, torch.randn_like(first)) if sample else first

    def evaluate(self, feat: Tensor, action: Tensor, out: Tensor | None = None) -> tuple[Tensor, ...]:
        """-> log-probability, entropy, saturation (...), mean deviation or entropy, 0-d. out: `net(feat)`, if known."""
        out = self.net(feat) if out is None else out
        first, std = self.distribution(out)
        if self.spec.discrete:
            logp = torch.log(first)
            entropy = -(first * logp).sum(-1)
            return (logp * action).sum(-1), entropy, torch.zeros_like(entropy), entropy.detach().mean()
        logp = normal_logp((action - first) / std) - torch.log(std)
        saturation = torch.relu(out.chunk(2, -1)[0].abs() - SATURATED).square()
        return logp.sum(-1), truncated_entropy(first, std).sum(-1), saturation.sum(-1), std.detach().mean()


class Critic(nn.Module):
    """Two-hot value of a state, and a slow copy of the network that regularises it."""

    def __init__(self, cfg: BehaviorConfig, features: int):
        super().__init__()
        self.twohot = TwoHot()
        self.net = MLP(features, cfg.units, LAYERS, len(self.twohot.bins), out_scale=0.0)
        self.slow = copy.deepcopy(self.net).requires_grad_(False)

    def value(self, feat: Tensor) -> Tensor:  # (..., F) -> (...)
        return self.twohot.mean(self.net(feat))

    def loss(self, logits: Tensor, feat: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy to the returns, and to the slow copy's value of the same states: (...)."""
        with torch.no_grad():
            slow = self.twohot.mean(self.slow(feat.detach()))
        return self.twohot.loss(logits, target, slow)


class ActorCritic(nn.Module):
    """Actor and critic on F features."""

    def __init__(self, cfg: BehaviorConfig, features: int, spec: ActionSpec):
        super().__init__()
        if cfg.plans and spec.discrete:
            raise ValueError(f"--behavior.decisions {cfg.decisions} needs continuous actions: give actor or expansion")
        self.cfg, self.spec = cfg, spec
        self.actor, self.critic = Actor(cfg, features, spec), Critic(cfg, features)
        self.scale = AdvantageScale()
        auto = not spec.discrete and cfg.decisions != "expansion"
        self.dynamics_backprop = auto if cfg.actor_gradient == "auto" else cfg.actor_gradient == "dynamics"
        """Whether the actor's gradient passes through the dynamics, so that imagination needs its gradient."""
        self.starts = cfg.starts if cfg.starts is not None else 64 if self.dynamics_backprop else 128
        entropy = cfg.entropy if cfg.entropy is not None else 0.1 if self.dynamics_backprop else 0.025
        self.entropy_weight = entropy if spec.discrete else entropy * spec.size**-0.5
        """If A dimensions contribute independently, each accounts for 1 / sqrt(A) of an advantage of size 1."""

    def policy(self, feat: Tensor) -> Tensor:
        """Features (B, F) -> sampled actions (B, A) for imagination."""
        return self.actor.act(feat.detach())

    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Logits (H+1, B, bins) on detached features, and values (B, H+1) with the gradient that the actor needs."""
        logits = self.critic.net(rollout.feat.detach())
        if self.dynamics_backprop:
            return logits, self.critic.value(rollout.feat).t()
        return logits, self.critic.twohot.mean(logits).detach().t()

    def losses(
        self, rollout: Rollout, returns: Tensor, values: Tensor, logits: Tensor, average: Average = alone
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Actor loss and critic loss, scalars for the parameters of either alone, and metrics.

        returns (B, H) of `lambda_return`; values (B, H+1) and logits (H+1, B, bins) of `values`.
        """
        feat = rollout.feat[:-1].detach()  # (H, B, F)
        weight = rollout_weights(rollout.alive, rollout.continues.detach(), self.cfg.gamma**self.cfg.jump)  # (B, H)
        if self.cfg.decisions == "expansion":  # s_0 alone, times H: the mean keeps its scale
            weight = F.pad(weight.shape[1] * weight[:, :1], (0, weight.shape[1] - 1))
        advantage = (returns - values[:, :-1]).detach()
        scale = self.scale.update(advantage[:, :1] if self.cfg.decisions == "expansion" else advantage, average)
        advantage = advantage / scale
        actions = rollout.actions.detach().transpose(0, 1)  # (H, B, A), the rest (H, B)
        logp, entropy, saturation, spread = self.actor.evaluate(feat, actions, rollout.outputs)
        objective = returns / scale if self.dynamics_backprop else logp.t() * advantage
        bonus = self.entropy_weight * entropy - SATURATION_WEIGHT * saturation
        actor_loss = -(weight * (objective + bonus.t())).mean()
        returns, values = returns.detach(), values.detach()
        critic_loss = (weight.t() * self.critic.loss(logits[:-1], feat, returns.t())).mean()
        return actor_loss, critic_loss, {
            "behavior/policy_loss": actor_loss.detach(),
            "behavior/value_loss": critic_loss.detach(),
            "behavior/entropy": entropy.detach().mean(),
            "behavior/saturation": saturation.detach().mean(),
            "behavior/spread": spread,
            "behavior/advantage_scale": scale,
            "behavior/advantage_size": advantage.abs().mean(),
            "behavior/imagined_return": returns.mean(),
            "behavior/imagined_reward": rollout.rewards.detach().mean(),
            "behavior/value": values.mean(),
        }  # fmt: skip

    def replay_loss(
        self, feat: Tensor, reward: Tensor, is_terminal: Tensor, ends: Tensor, bootstrap: Tensor,
        span: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Critic loss on replayed rows (B, L): features with gradient into the world model.

        bootstrap (B, L): imagined return of the rollout that started at each row, the bootstrap of the replayed
        lambda-return (DreamerV3). Rows that end an episode have no return of their own: weight 0. span: see `Batch`.
        """
        if reward.shape[1] < 2:
            return feat.sum() * 0.0
        # (B, L-1) each: row k of the returns has the reward, the end and the bootstrap of row k + 1
        discount = self.cfg.gamma ** (torch.ones_like(reward) if span is None else span)[:, 1:]
        continues = discount * (1.0 - is_terminal[:, 1:].float())
        lam = LAMBDA * (1.0 - ends[:, 1:].float())  # another episode follows: bootstrap there
        target = lambda_return(reward[:, 1:], continues, bootstrap, 1.0, lam)
        feat = feat[:, :-1]
        weight = 1.0 - ends[:, :-1].float()
        return REPLAY_VALUE_SCALE * (weight * self.critic.loss(self.critic.net(feat), feat, target)).mean()
