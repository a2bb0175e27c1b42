"""Export of the policy: encoder, core at a fixed depth, posterior and actor as one program for torch.export.load.

Symbols: E environments, O entries of an observation, A dimensions of the policy's action, (N, D) deterministic and
(S, K) stochastic state.
"""

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


class ExportablePolicy(nn.Module):
    """One step of acting with the mean action and the most probable latents, `loops` loops for every state.

    forward(obs, action (E, A), is_first (E,), deter (E, N, D), stoch (E, S, K)) -> action (E, A), deter, stoch.
    obs (E, O): the flattened observation, or, with images, {name: (E, O), or (E, H, W, C) uint8}; action, deter and
    stoch: what the last call returned, or `initial`; is_first: True where an episode begins. Actions of a discrete
    task are one-hot.
    """

    def __init__(self, policy: Policy, loops: int):
        super().__init__()
        self.policy, self.loops = policy, loops

    def initial(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """action, deter and stoch before the first step of `count` environments."""
        world = self.policy.world
        state = world.initial(count)
        return torch.zeros(count, world.action_size), state.deter.detach().clone(), state.stoch.detach().clone()

    def forward(
        self, obs: Tensor | dict[str, Tensor], action: Tensor, is_first: Tensor, deter: Tensor, stoch: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        world = self.policy.world
        sizes = world.observation_model.vectors
        if isinstance(obs, Tensor):
            obs = dict(zip(sizes, obs.split(list(sizes.values()), -1), strict=True))
        state, _ = world.observe(obs, action, is_first, LatentState(deter, stoch), sample=False, max_loops=self.loops)
        return self.policy.behavior.actor.act(state.feat(), sample=False), state.deter, state.stoch


def export_policy(agent: Dreamer, path: Path, loops: int) -> ExportablePolicy:
    """Write the policy with averaged weights to `path` (.pt2), for any number of environments; returns its module.

    Raises UsageError when the file cannot be written, or the exported program gives other actions than the module.
    """
    if path.exists() and path.suffix != ".pt2":  # it could be a checkpoint
        raise UsageError(f"{path} exists and is no exported program: give a new name, by custom ending in .pt2")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.absolute().parent}")
    module = ExportablePolicy(copy.deepcopy(agent.averaged).cpu(), loops).eval()
    world = module.policy.world
    if world.observation_model.images:  # the program may run on machines without bfloat16
        world.observation_model.images.precision = "float32"
    example = (_random_observations(world, 3), *_first_inputs(module, 3))
    with exit_rule(world, ExitRule()), torch.no_grad():
        batch = {0: torch.export.Dim("envs", min=1, max=1024)}
        obs_shapes = dict.fromkeys(world.obs_sizes, batch) if world.observation_model.images else batch
        program = torch.export.export(module, example, dynamic_shapes=[obs_shapes, *[batch] * (len(example) - 1)])
        for count in (2, 5):  # other batch sizes than that of the example
            inputs = _random_observations(world, count), *_first_inputs(module, count)
            pairs = zip(module(*inputs), program.module()(*inputs), strict=True)
            if not all(torch.allclose(output, exported, atol=1e-5) for output, exported in pairs):
                raise UsageError("the exported program gives other actions than the agent")
    try:
        torch.export.save(program, path)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be written ({error}): make room, or give another place") from error
    return module


def export_notes(agent: Dreamer) -> list[str]:
    """What the agent does when it acts and the exported program does not."""
    cfg = agent.averaged.behavior.cfg
    notes = ["this is the actor, and evaluations of this run plan"] if cfg.plans else []
    if agent.averaged.holds_actions:
        held, when = f"the agent holds every action for {cfg.jump} decisions", f"at every {cfg.jump}th alone"
        notes.append(f"{held}: call the program at each, with the action that was taken, and take its new one {when}")
    return notes


def _random_observations(world: WorldModel, count: int) -> Tensor | dict[str, Tensor]:
    """Random observations in the form that the program takes."""
    if not world.observation_model.images:
        return torch.randn(count, sum(world.observation_model.vectors.values()))

    def noise(size: ObsSize) -> Tensor:
        return torch.randn(count, size) if isinstance(size, int) else torch.randint(256, (count, *size)).byte()

    return {name: noise(size) for name, size in world.obs_sizes.items()}


def _first_inputs(module: ExportablePolicy, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """action, is_first, deter, stoch at the beginning of an episode."""
    action, deter, stoch = module.initial(count)
    return action, torch.ones(count, dtype=torch.bool), deter, stoch
