"""Actor and critic that use the kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agent.execution.fused.functions import chain
from agent.execution.fused.networks import FusedMLP
from agent.execution.fused.scope import frozen_weights, fusible
from agent.learning.actor_critic import ActorCritic, Critic
from world_model import Rollout


class FusedActorCritic(ActorCritic):
    """Logits and values of a rollout are computed once: those have the gradient of weights, these that of features."""

    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        net = self.critic.net
        if not (self.dynamics_backprop and fusible(rollout.feat) and isinstance(net, FusedMLP)):
            return super().values(rollout)
        known: list[Any] = []
        logits = chain(rollout.feat.detach(), net.layers(), known=known)
        with frozen_weights():
            same = chain(rollout.feat, net.layers(), known=known)
        return logits, self.critic.twohot.mean(same).t()


class FusedCritic(Critic):
    """The gradient of a value is the actor's: it ends at the inputs."""

    def value(self, feat: Tensor) -> Tensor:
        with frozen_weights(fusible(feat)):
            return super().value(feat)
