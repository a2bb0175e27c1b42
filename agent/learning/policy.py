"""The two networks that evaluation needs, and what acting carries from step to step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from agent.learning.actor_critic import ActorCritic
from world_model import LatentState, WorldModel


class Memory(NamedTuple):
    """What acting carries from step to step: the latent state and the last policy output (E, A)."""

    state: LatentState
    action: Tensor


class Policy(nn.Module):
    """The two networks that evaluation needs; the averaged weights are a copy of this."""

    def __init__(self, world: WorldModel, behavior: ActorCritic):
        super().__init__()
        self.world, self.behavior = world, behavior

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by optimiser."""
        modules = {"world": self.world, "actor": self.behavior.actor, "critic": self.behavior.critic.net}
        return {name: list(module.parameters()) for name, module in modules.items()}

    @torch.no_grad()
    def act(
        self,
        obs: dict[str, Tensor],
        memory: Memory | None,
        is_first: Tensor,
        explore: bool,
        max_loops: int | None = None,
    ) -> tuple[Tensor, Memory, Tensor]:
        """-> policy output (E, A), memory, loops used (E,). explore samples latents and actions."""
        if memory is None:
            action = torch.zeros(len(is_first), self.world.action_size, device=is_first.device)
            memory = Memory(self.world.initial(len(is_first)), action)
        state, stats = self.world.observe(obs, memory.action, is_first, memory.state, explore, max_loops)
        action = self.behavior.actor.act(state.feat(), explore)
        return action, Memory(state, action), stats.depth
