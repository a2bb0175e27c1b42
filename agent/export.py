"""The acting path alone (encoder, core at a fixed depth, posterior, actor) as a file that torch.export reads."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from agent.checkpoint import UsageError
from agent.dreamer import Dreamer
from agent.open_loop import exit_rule
from agent.policy import Policy
from world_model import ExitRule, LatentState


class ActingPath(nn.Module):
    """One step of acting with the mean action and the most probable latents, `loops` loops for every state.

    forward(obs (E, O), action (E, A), first (E,), deter (E, N, D), stoch (E, S, K)) -> action (E, A), deter, stoch.
    obs: the observation's entries side by side; action, deter and stoch: what the last call returned, or `begin`;
    first: True where an episode begins. Actions of a discrete task are one-hot.
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
        self, obs: Tensor, action: Tensor, first: Tensor, deter: Tensor, stoch: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        world = self.policy.world
        sizes = world.senses.vectors
        parts = dict(zip(sizes, obs.split(list(sizes.values()), -1), strict=True))
        state, _ = world.observe(parts, action, first, LatentState(deter, stoch), sample=False, max_loops=self.loops)
        taken = self.policy.behavior.actor.act(state.feat(), sample=False)
        return taken, state.deter, state.stoch


def export_policy(agent: Dreamer, path: Path, loops: int) -> ActingPath:
    """Write the averaged weights' acting path to `path` (.pt2), for any number of environments; returns its module.

    Raises UsageError when the file cannot be written, or the exported program gives other actions.
    """
    acting = ActingPath(copy.deepcopy(agent.averaged).cpu(), loops).eval()
    world = acting.policy.world
    if world.senses.images:
        raise UsageError("agents that see images cannot be exported: the program takes vectors only")
    size = sum(world.senses.vectors.values())
    example = (torch.randn(3, size), *_with_first(acting, 3))
    with exit_rule(world, ExitRule()), torch.no_grad():
        batch = torch.export.Dim("envs", min=1, max=1024)
        program = torch.export.export(acting, example, dynamic_shapes=[{0: batch}] * len(example))
        for count in (2, 5):  # other sizes than that of the example
            obs = torch.randn(count, size)
            want, got = acting(obs, *_with_first(acting, count)), program.module()(obs, *_with_first(acting, count))
            if not all(torch.allclose(one, other, atol=1e-5) for one, other in zip(want, got, strict=True)):
                raise UsageError("the exported program gives other actions than the agent")
    try:
        torch.export.save(program, path)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
    return acting


def _with_first(acting: ActingPath, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """action, first, deter, stoch at the beginning of an episode."""
    action, deter, stoch = acting.begin(count)
    return action, torch.ones(count, dtype=torch.bool), deter, stoch
