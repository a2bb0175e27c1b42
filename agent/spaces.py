"""What an agent knows of an environment: sizes of its observations and of its actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from world_model import ObsSize


@dataclass(frozen=True)
class ActionSpec:
    """size: dimensions of a continuous action, or the number of choices of a discrete one."""

    size: int
    discrete: bool


class Spaces(NamedTuple):
    """Sizes of the environment, all that the agent knows of it: obs {name: O, or (H, W, C) of an image}, the action."""

    obs: dict[str, ObsSize]
    action: ActionSpec

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Spaces:
        """From plain values, as a checkpoint or data set holds them: see `plain`. Raises ValueError for others."""
        try:
            obs = {name: size if isinstance(size, int) else tuple(size) for name, size in plain["obs"].items()}
            action = ActionSpec(**plain["action"])
            sizes = [*(part for size in obs.values() for part in (size if isinstance(size, tuple) else (size,)))]
            good = bool(obs) and all(isinstance(name, str) for name in obs) and isinstance(action.discrete, bool)
            good &= all(isinstance(size, int) or len(size) == 3 for size in obs.values())
            good &= all(type(size) is int and size > 0 for size in (*sizes, action.size))
        except (KeyError, TypeError, AttributeError):
            good = False
        if not good:
            told = str(plain)[:200]
            raise ValueError(f"these are no sizes of observations and actions: {told}; use a file of this program")
        return cls(obs, action)

    def plain(self) -> dict[str, Any]:
        """As numbers, lists and dictionaries."""
        obs = {name: size if isinstance(size, int) else list(size) for name, size in self.obs.items()}
        return {"obs": obs, "action": {"size": self.action.size, "discrete": self.action.discrete}}

    def arrays(self, obs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Copies of the observations: float32 vectors (..., O), uint8 images (..., H, W, C).

        Raises ValueError where an entry is missing.
        """
        if missing := self.obs.keys() - obs.keys():
            given = ", ".join(map(repr, obs)) or "none"
            raise ValueError(
                f"the observation has no entry {', '.join(map(repr, sorted(missing)))} (it has {given}): give the "
                "observations of the environment that the agent was trained in, as envs.make_env makes it"
            )
        kinds = {name: np.float32 if isinstance(size, int) else np.uint8 for name, size in self.obs.items()}
        return {name: np.array(obs[name], kind) for name, kind in kinds.items()}


def spaces_of(envs: gym.vector.VectorEnv[Any, Any, Any]) -> Spaces:
    """The sizes that the agent needs to know of environments with observations of vectors and uint8 images."""
    return sizes_of(envs.single_observation_space, envs.single_action_space)


def sizes_of(obs: gym.Space[Any], action: gym.Space[Any]) -> Spaces:
    """The sizes of an observation and an action space in the format of `envs`."""
    assert isinstance(obs, gym.spaces.Dict)
    sizes: dict[str, ObsSize] = {}
    for name, space in obs.items():
        image = space.dtype == np.uint8
        sizes[name] = cast(ObsSize, space.shape) if image else gym.spaces.flatdim(space)
    discrete = isinstance(action, gym.spaces.Discrete)
    return Spaces(sizes, ActionSpec(gym.spaces.flatdim(action), discrete))


def gym_spaces(spaces: Spaces) -> tuple[gym.spaces.Dict, gym.Space[Any]]:
    """Gymnasium's observation and action space of these sizes."""
    box, spec = gym.spaces.Box, spaces.action
    entries: dict[str, gym.Space[Any]] = {
        name: box(-np.inf, np.inf, (size,), np.float32) if isinstance(size, int) else box(0, 255, size, np.uint8)
        for name, size in spaces.obs.items()
    }
    action = gym.spaces.Discrete(spec.size) if spec.discrete else box(-1.0, 1.0, (spec.size,), np.float32)
    return gym.spaces.Dict(entries), action


def to_env(action: Tensor, spec: ActionSpec) -> Tensor:
    """(B, A) policy output -> what the environment takes: clipped vectors, or indices (B,)."""
    return action.argmax(-1) if spec.discrete else action.clamp(-1.0, 1.0)


def from_env(action: Tensor, spec: ActionSpec) -> Tensor:
    """The inverse of `to_env`: (B, A) float, one-hot for discrete actions."""
    return F.one_hot(action.long(), spec.size).float() if spec.discrete else action.float()
