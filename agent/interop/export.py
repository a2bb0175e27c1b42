"""The acting path alone (encoder, core at a fixed depth, posterior, actor) as a file that torch.export reads."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from agent.errors import UsageError
from agent.evaluation.open_loop import exit_rule
from agent.learning.dreamer import Dreamer
from agent.learning.policy import Policy
from world_model import ExitRule, LatentState, ObsSize, WorldModel


class ActingPath(nn.Module):
    """One step of acting with the mean action and the most probable latents, `loops` loops for every state.

    forward(obs, action (E, A), first (E,), deter (E, N, D), stoch (E, S, K)) -> action (E, A), deter, stoch.
    obs (E, O): the observation's entries side by side, or, with images, {name: (E, O), or (E, H, W, C) of uint8};
    action, deter and stoch: what the last call returned, or `begin`; first: True where an episode begins. Actions of a
    discrete task are one-hot.
    """

    def __init__(self, policy: Policy, loops: int):
        super().__init__()
        self.policy, self.loops = policy, loops

    def begin(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """action, deter and stoch before the first step."""
        world = self.policy.world
        state = world.initial(count)
        return torch.zeros(count, world.action_size), state.deter.detach().clone(), state.stoch.detach().clone()

    def forward(
        self, obs: Tensor | dict[str, Tensor], action: Tensor, first: Tensor, deter: Tensor, stoch: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        world = self.policy.world
        sizes = world.observation_model.vectors
        if isinstance(obs, Tensor):
            obs = dict(zip(sizes, obs.split(list(sizes.values()), -1), strict=True))
        state, _ = world.observe(obs, action, first, LatentState(deter, stoch), sample=False, max_loops=self.loops)
        taken = self.policy.behavior.actor.act(state.feat(), sample=False)
        return taken, state.deter, state.stoch


def export_policy(agent: Dreamer, path: Path, loops: int) -> ActingPath:
    """Write the averaged weights' acting path to `path` (.pt2), for any number of environments; returns its module.

    Raises UsageError when the file cannot be written, or the exported program gives other actions.
    """
    acting = ActingPath(copy.deepcopy(agent.averaged).cpu(), loops).eval()
    world = acting.policy.world
    if world.observation_model.images:  # the program may run on machines that compute in other numbers than this one
        world.observation_model.images.precision = "float32"
    example = (_observations(world, 3), *_with_first(acting, 3))
    with exit_rule(world, ExitRule()), torch.no_grad():
        batch = {0: torch.export.Dim("envs", min=1, max=1024)}
        seen = dict.fromkeys(world.obs_sizes, batch) if world.observation_model.images else batch
        program = torch.export.export(acting, example, dynamic_shapes=[seen, *[batch] * (len(example) - 1)])
        for count in (2, 5):  # other sizes than that of the example
            obs = _observations(world, count)
            want, got = acting(obs, *_with_first(acting, count)), program.module()(obs, *_with_first(acting, count))
            if not all(torch.allclose(one, other, atol=1e-5) for one, other in zip(want, got, strict=True)):
                raise UsageError("the exported program gives other actions than the agent")
    try:
        torch.export.save(program, path)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
    return acting


def _observations(world: WorldModel, count: int) -> Tensor | dict[str, Tensor]:
    """Noise in the form that the program takes."""
    if not world.observation_model.images:
        return torch.randn(count, sum(world.observation_model.vectors.values()))

    def noise(size: ObsSize) -> Tensor:
        return torch.randn(count, size) if isinstance(size, int) else torch.randint(256, (count, *size)).byte()

    return {name: noise(size) for name, size in world.obs_sizes.items()}


def _with_first(acting: ActingPath, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """action, first, deter, stoch at the beginning of an episode."""
    action, deter, stoch = acting.begin(count)
    return action, torch.ones(count, dtype=torch.bool), deter, stoch
