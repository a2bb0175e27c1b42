"""The two networks that evaluation needs, and what acting carries from step to step."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.learning.actor_critic import ActorCritic
from agent.learning.noise import begin_noise, next_noise, noise_of
from agent.learning.planning import plan
from world_model import LatentState, WorldModel


class Memory(NamedTuple):
    """What acting carries from step to step: the latent state, the last policy output (E, A); where continuous actions
    are sampled, the processes (E, P, A) of the noise; where they are planned, the plan (E, H, A); where they are held
    (`--behavior.jump`), for how many decisions more (E,)."""

    state: LatentState
    action: Tensor
    noise: Tensor | None = None
    plan: Tensor | None = None
    holds: Tensor | None = None

    def plain(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        optional = {"noise": self.noise, "plan": self.plan, "holds": self.holds}
        present = {name: leaf for name, leaf in optional.items() if leaf is not None}
        return {**self.state._asdict(), "action": self.action, **present}

    def clone(self) -> Memory:
        """A copy, of which gradients can be taken."""
        return Memory.of({name: leaf.clone() for name, leaf in self.plain().items()}, self.action.device)

    @classmethod
    def of(cls, plain: dict[str, Tensor], device: torch.device) -> Memory:
        """The inverse of `plain`, on this device."""
        leaves = {name: leaf.to(device) for name, leaf in plain.items()}
        state = LatentState(leaves["deter"], leaves["stoch"])
        return cls(state, leaves["action"], leaves.get("noise"), leaves.get("plan"), leaves.get("holds"))


class Policy(nn.Module):
    """World model and actor-critic; the averaged weights, which evaluations play, are a copy of this."""

    def __init__(self, world: WorldModel, behavior: ActorCritic):
        super().__init__()
        self.world, self.behavior = world, behavior

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by optimiser."""
        modules = {"world": self.world, "actor": self.behavior.actor, "critic": self.behavior.critic.net}
        return {name: list(module.parameters()) for name, module in modules.items()}

    @torch.inference_mode()  # not no_grad: counting versions took an eighth of the time of a single row
    def act(
        self,
        obs: dict[str, Tensor],
        memory: Memory | None,
        is_first: Tensor,
        explore: bool,
        max_loops: int | None = None,
    ) -> tuple[Tensor, Memory, Tensor]:
        """-> policy output (E, A), memory, loops used (E,). explore samples latents and actions. Clone the memory where
        gradients are to be taken."""
        if memory is None:
            action = torch.zeros(len(is_first), self.world.action_size, device=is_first.device)
            memory = Memory(self.world.initial(len(is_first)), action)
        state, stats = self.world.observe(obs, memory.action, is_first, memory.state, explore, max_loops)
        if self.behavior.spec.discrete:
            action, holds = self.hold(self.behavior.actor.act(state.feat(), explore), memory, is_first)
            return action, Memory(state, action, holds=holds), stats.depth
        plans, noise = None, None
        if self.behavior.cfg.plans:
            plans, action, std = plan(self.world, self.behavior, state, memory.plan, ~is_first, max_loops)
        else:
            action, std = self.behavior.actor.parameters_of(state.feat())
        if explore:
            noise = begin_noise(action) if memory.noise is None else next_noise(memory.noise)
            action = torch.addcmul(action, std, noise_of(noise))
        action, holds = self.hold(action, memory, is_first)
        return action, Memory(state, action, noise, plans, holds), stats.depth

    @property
    def holds_actions(self) -> bool:
        """Whether acting decides at every `jump`-th decision alone."""
        return self.behavior.cfg.jump > 1

    def hold(self, action: Tensor, memory: Memory, is_first: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> the action (E, A) to take, and for how many decisions more (E,).

        In imagination an action is held for `jump` decisions. An agent of cheetah_run that decided anew at each of them
        got a tenth of the rewards that it imagined.
        """
        if not self.holds_actions:
            return action, None
        left = torch.zeros_like(is_first, dtype=torch.long) if memory.holds is None else memory.holds
        held = (left > 0) & ~is_first
        action = torch.where(held[:, None], memory.action, action)
        return action, torch.where(held, left - 1, self.behavior.cfg.jump - 1)

    def act_randomly(self, memory: Memory) -> Memory:
        """With a random action instead of the one that `act` took: uniformly distributed, and with its noise."""
        action = memory.action
        if memory.noise is None:
            choice = torch.randint(action.shape[-1], action.shape[:-1], device=action.device)
            return memory._replace(action=F.one_hot(choice, action.shape[-1]).float())
        return memory._replace(action=torch.erf(noise_of(memory.noise) * 0.5**0.5))
