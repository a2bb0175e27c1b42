"""Steps of vector environments, asynchronous where the environments run in processes of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from agent.errors import NonFiniteError, failures

Transition = tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]
"""What `VectorEnv.step` returns: observations, rewards, terminated, truncated, info."""


class EnvStepper:
    """One step of all environments in two halves, `send` and `receive`.

    All methods raise EnvironmentFailure for what an environment raises, and NonFiniteError for what is not finite.
    """

    def __init__(self, envs: gym.vector.VectorEnv[Any, Any, Any]):
        self.envs: Any = envs
        self.asynchronous = hasattr(envs, "step_async")
        """Whether environments step by themselves between `send` and `receive`."""

    def reset(self, seed: int) -> Mapping[str, np.ndarray]:
        """The first observations of new episodes everywhere."""
        with failures():
            obs: Mapping[str, np.ndarray] = self.envs.reset(seed=seed)[0]
        check_finite(obs, np.zeros(0))
        return obs

    def send(self, action: np.ndarray) -> None:
        """Begin a step."""
        self.action = action
        if self.asynchronous:
            with failures():
                self.envs.step_async(action)

    def receive(self) -> Transition:
        """What came of it; waits where it has to."""
        with failures():
            transition: Transition = self.envs.step_wait() if self.asynchronous else self.envs.step(self.action)
        check_finite(*transition[:2])
        return transition


def check_finite(obs: Mapping[str, np.ndarray], reward: np.ndarray) -> None:
    """Raise NonFiniteError for what an environment returned, before the replay keeps it."""
    for name, value in {"the environment's reward": reward, **{f"observation {k}": v for k, v in obs.items()}}.items():
        if not np.isfinite(value).all():
            raise NonFiniteError(name)
