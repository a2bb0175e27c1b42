"""Actor and critic, trained in imagination.

The mathematics stands as pure functions beside the modules: `lambda_return`, `entropy_weight`, `rollout_weights`.
Source: DreamerV3 (Hafner et al. 2025), "Actor critic learning"; but where actions are continuous, the actor
learns through the world model, as in DreamerV1 and 2: with few dreams per update the likelihood's gradient is too
noisy (results/walker.md). With discrete actions it is REINFORCE, and imagination needs no gradient.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from agent.learning.scales import AdvantageScale, Budget, EntropyWeight, trust_of
from agent.spaces import ActionSpec
from world_model import Rollout, TwoHot
from world_model.latent import probabilities, sample_onehot
from world_model.nets import MLP
from world_model.ranges import ABOVE_ZERO, AT_LEAST_ONE, NOT_NEGATIVE, SOME_SHARE, require

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class BehaviorConfig:
    """Imagination and the actor-critic."""

    horizon: int = 10
    """H, imagined steps per rollout."""
    adaptive: Literal["none", "loops"] = "none"
    """Trust a dream only as far as it has not spent its budget of loops: half of the horizon times the running mean of
    a step. From there on its rewards count less and the critic more, down to nothing at twice the budget."""
    starts: int | None = None
    """Start states per update, taken from the end of every replayed sequence, at least two of each; 0 = all of them.
    By default 64 where the actor learns through the world model, and 128 by the likelihood, whose gradient is noisier
    and cheaper; more where sequences are many."""
    actor_gradient: Literal["auto", "dynamics", "reinforce"] = "auto"
    """How the actor learns: through the world model, from the likelihood of its actions, or (auto) in the first
    way where actions are continuous and in the second where they are discrete."""
    gamma: float = 0.99
    """Discount per agent step."""
    lam: float = 0.95
    """Lambda of the lambda-return."""
    entropy: float | None = None
    """Weight of the entropy bonus, against advantages of mean size 1, divided by the root of the action's size. By
    default 0.1 where the actor learns through the world model (with 0.025 it settles too early), else 0.025."""
    spread: float | None = None
    """Mean standard deviation of continuous actions that the entropy weight is steered to hold, within a tenth and ten
    times its value; by default the weight is fixed."""
    units: int = 128
    """Width of actor and critic."""
    layers: int = 2
    """Hidden layers of actor and critic."""
    min_std: float = 0.1
    """Smallest standard deviation of a continuous action."""
    unimix: float = 0.01
    """Share of the uniform distribution in a discrete policy."""
    slow_rate: float = 0.02
    """Rate at which the slow critic follows the critic, per update."""
    slow_scale: float = 1.0
    """Weight of the critic's pull towards its slow copy."""
    replay_value_scale: float = 0.3
    """Weight of the critic's loss on replayed rewards; its gradient reaches the world model."""
    advantage_rate: float = 0.01
    """Rate of the running mean size of the advantages, by which they are divided."""
    advantage_floor: float = 1.0
    """Advantages are divided by at least this much (rewards): while little is won, the policy keeps exploring."""

    def __post_init__(self) -> None:
        whole = dict.fromkeys(("horizon", "units", "layers"), AT_LEAST_ONE)
        shares = dict.fromkeys(("min_std", "slow_rate", "advantage_rate"), SOME_SHARE)
        loose = dict.fromkeys(("entropy", "slow_scale", "replay_value_scale"), NOT_NEGATIVE)
        require(self, "--behavior.", spread=SOME_SHARE)
        require(self, "--behavior.", **whole, **shares, **loose, advantage_floor=ABOVE_ZERO, unimix=(0.0, 0.99))
        if self.starts is not None and self.starts < 0:
            raise ValueError(f"--behavior.starts must be 0 (all) or more, got {self.starts}")
        if not 0.0 < self.gamma <= 1.0 or not 0.0 <= self.lam <= 1.0:
            raise ValueError("--behavior.gamma must lie in (0, 1] and --behavior.lam in [0, 1]")


def lambda_return(
    rewards: Tensor, continues: Tensor, values: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """TD(lambda) returns of s_0 .. s_{H-1}.

    rewards (B, H) r_1..r_H, continues (B, H) c_1..c_H, values (B, H+1) v_0..v_H, lam one number or (B, H)
    lam_1..lam_H -> (B, H) with
    R_k = r_{k+1} + gamma c_{k+1} ((1 - lam_{k+1}) v_{k+1} + lam_{k+1} R_{k+1}),  R_H = v_H.
    """
    discount = gamma * continues
    base = rewards + discount * (1.0 - lam) * values[:, 1:]
    returns, last = [], values[:, -1]
    for step_base, carried in zip(base.unbind(1)[::-1], (discount * lam).unbind(1)[::-1], strict=True):
        last = step_base + carried * last
        returns.append(last)
    return torch.stack(returns[::-1], 1)


def entropy_weight(entropy: float, spec: ActionSpec) -> float:
    """Weight of the summed entropy of an action's A dimensions: entropy / sqrt(A); a discrete choice is one dimension.

    Where A dimensions move the return independently, an advantage of size 1 holds 1 / sqrt(A) of each. Divided
    so, the bonus weighs the same against what one dimension is worth, whether a cart has 1 or a walker has 6.
    """
    return entropy if spec.discrete else entropy * spec.size**-0.5


def rollout_weights(alive: Tensor, continues: Tensor, gamma: float) -> Tensor:
    """(B, H) weight of s_0 .. s_{H-1}: alive_0 * prod_{1<=j<=k} gamma c_j, the chance that s_k is reached.

    Holds c_k (was s_k alive?) and never c_{k+1} (the outcome of a_k).
    """
    steps = torch.cat([alive[:, None], gamma * continues[:, :-1]], 1)
    return torch.cumprod(steps, 1)


class Actor(nn.Module):
    """features (..., F) -> a distribution over actions (..., A)."""

    def __init__(self, cfg: BehaviorConfig, features: int, spec: ActionSpec):
        super().__init__()
        self.cfg, self.spec = cfg, spec
        outputs = spec.size if spec.discrete else 2 * spec.size
        self.net = MLP(features, cfg.units, cfg.layers, outputs, out_scale=0.01)

    def parameters_of(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Discrete: (probabilities, themselves). Continuous: (mean, standard deviation), each (..., A)."""
        out = self.net(feat)
        if self.spec.discrete:
            probs = probabilities(out, self.cfg.unimix)
            return probs, probs
        mean, spread = out.chunk(2, -1)
        return torch.tanh(mean), (1.0 - self.cfg.min_std) * torch.sigmoid(spread + 2.0) + self.cfg.min_std

    def act(self, feat: Tensor, sample: bool = True) -> Tensor:
        """(..., A): a sample, or the mean (continuous) or most probable (discrete, one-hot) action."""
        first, std = self.parameters_of(feat)
        if self.spec.discrete:
            return sample_onehot(first, torch.rand_like(first[..., :1]) if sample else None)
        return torch.addcmul(first, std, torch.randn_like(first)) if sample else first

    def evaluate(self, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> log-probability (...), entropy (...), and the mean standard deviation or entropy share, 0-d."""
        first, std = self.parameters_of(feat)
        if self.spec.discrete:
            logp = torch.log(first)
            entropy = -(first * logp).sum(-1)
            return (logp * action).sum(-1), entropy, entropy.detach().mean()
        log_std = torch.log(std)
        squared = ((action - first) / std).square()
        logp = -(0.5 * squared + log_std + 0.9189385332046727).sum(-1)  # 0.5 log(2 pi)
        return logp, (log_std + 1.4189385332046727).sum(-1), std.detach().mean()


class Critic(nn.Module):
    """Two-hot value of a state, and a slow copy that steadies it."""

    def __init__(self, cfg: BehaviorConfig, features: int, bins: int, limit: float):
        super().__init__()
        self.cfg = cfg
        self.twohot = TwoHot(bins, limit)
        self.net = MLP(features, cfg.units, cfg.layers, bins, out_scale=0.0)
        self.slow = copy.deepcopy(self.net).requires_grad_(False)

    def value(self, feat: Tensor) -> Tensor:  # (..., F) -> (...)
        return self.twohot.mean(self.net(feat))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the slow copy towards the critic."""
        torch._foreach_lerp_(list(self.slow.parameters()), list(self.net.parameters()), self.cfg.slow_rate)

    def loss(self, logits: Tensor, feat: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy to the returns, and to what the slow copy says of the same states: (...)."""
        with torch.no_grad():
            slow = self.twohot.mean(self.slow(feat.detach()))
        return self.twohot.loss(logits, target, slow, self.cfg.slow_scale)


class ActorCritic(nn.Module):
    """features F, action spec, and the bins of the value head."""

    def __init__(self, cfg: BehaviorConfig, features: int, spec: ActionSpec, bins: int, limit: float):
        super().__init__()
        self.cfg, self.spec = cfg, spec
        self.actor = Actor(cfg, features, spec)
        self.critic = Critic(cfg, features, bins, limit)
        self.scale = AdvantageScale(cfg.advantage_rate, cfg.advantage_floor)
        self.budget = Budget(cfg.advantage_rate, cfg.horizon) if cfg.adaptive != "none" else None
        self.last_lengths: Tensor | None = None
        """Steps of each dream of the last update that counted, where the horizon is adaptive."""
        self.through = cfg.actor_gradient == "dynamics" or (cfg.actor_gradient == "auto" and not spec.discrete)
        """Whether the actor learns through the world model, and dreams need their gradient."""
        self.starts = cfg.starts if cfg.starts is not None else 64 if self.through else 128
        entropy = cfg.entropy if cfg.entropy is not None else 0.1 if self.through else 0.025
        self.entropy = EntropyWeight(entropy_weight(entropy, spec), None if spec.discrete else cfg.spread)

    def policy(self, feat: Tensor) -> Tensor:
        """Features (B, F) -> sampled actions (B, A) for imagination."""
        return self.actor.act(feat.detach())

    def loss(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Metrics]:
        """Actor and critic losses on one rollout, two scalars to be differentiated each by its own module.

        Returns policy loss, value loss, the (B, H) imagined returns, and metrics.
        """
        feat = rollout.feat.detach()  # (H+1, B, F): time first
        logits = self.critic.net(feat)
        through = self.through
        values = self.critic.value(rollout.feat) if through else self.critic.twohot.mean(logits).detach()
        values = values.t()  # (B, H+1)
        trust = self.trust(rollout)
        lam = self.cfg.lam if trust is None else self.cfg.lam * trust
        returns = lambda_return(rollout.rewards, rollout.continues, values, self.cfg.gamma, lam)
        weight = rollout_weights(rollout.alive, rollout.continues.detach(), self.cfg.gamma)
        if trust is not None:  # what a step teaches counts as far as the state it begins in is trusted
            weight = weight * torch.cat([torch.ones_like(trust[:, :1]), trust[:, :-1]], 1)
        advantage = (returns - values[:, :-1]).detach()
        scale = self.scale.update(advantage)
        advantage = advantage / scale
        logp, entropy, spread = self.actor.evaluate(feat[:-1], rollout.actions.detach().transpose(0, 1))  # (H, B)
        gain = returns / scale if through else logp.t() * advantage
        bonus = self.entropy.update(spread) * entropy.t()
        policy_loss = -(weight * (gain + bonus)).mean()
        returns, values = returns.detach(), values.detach()
        value_loss = (weight.t() * self.critic.loss(logits[:-1], feat[:-1], returns.t())).mean()
        more = {} if self.last_lengths is None else {"behavior/dream_length": self.last_lengths.mean()}
        if self.entropy.target is not None:
            more["behavior/entropy_weight"] = self.entropy.weight.clone()
        return policy_loss, value_loss, returns, more | {
            "behavior/policy_loss": policy_loss.detach(),
            "behavior/value_loss": value_loss.detach(),
            "behavior/entropy": entropy.detach().mean(),
            "behavior/spread": spread,
            "behavior/advantage_scale": scale,
            "behavior/advantage_size": advantage.abs().mean(),
            "behavior/imagined_return": returns.mean(),
            "behavior/imagined_reward": rollout.rewards.detach().mean(),
            "behavior/value": values.mean(),
        }

    def trust(self, rollout: Rollout) -> Tensor | None:
        """(B, H) how far each imagined step is trusted; None where all are."""
        if self.budget is None:
            return None
        cost = rollout.loops.depth.float()
        trust = trust_of(cost, self.budget.update(cost))
        self.last_lengths = trust.cumprod(1).sum(1)
        return trust

    def replay_loss(
        self, feat: Tensor, reward: Tensor, is_terminal: Tensor, is_last: Tensor, boot: Tensor
    ) -> Tensor:
        """Critic loss on replayed rows (B, L): features with gradient into the world model.

        boot (B, L): imagined return of the dream that started at each row, the bootstrap of the replayed
        lambda-return (DreamerV3). Rows that end an episode have no return of their own: weight 0.
        """
        if reward.shape[1] < 2:
            return feat.sum() * 0.0
        live = 1.0 - is_terminal[:, 1:].float()
        mixed = 1.0 - is_last[:, 1:].float()  # behind a last row lies another episode: bootstrap there
        last, returns = boot[:, -1], []
        for t in range(reward.shape[1] - 2, -1, -1):
            ahead = torch.lerp(boot[:, t + 1], last, self.cfg.lam * mixed[:, t])
            last = reward[:, t + 1] + self.cfg.gamma * live[:, t] * ahead
            returns.append(last)
        target = torch.stack(returns[::-1], 1)  # (B, L-1)
        feat = feat[:, :-1]
        weight = 1.0 - is_last[:, :-1].float()
        loss = (weight * self.critic.loss(self.critic.net(feat), feat, target)).mean()
        return self.cfg.replay_value_scale * loss


