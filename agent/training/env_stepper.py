"""Steps of environments, which may go on by themselves while the agent learns; and what can go wrong in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from agent.errors import NonFiniteError, failures

Arrivals = tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class Stepping:
    """One step of all environments in two halves, `begin` and `end`; these and `reset` raise EnvironmentFailure.

    Those in processes of their own step between the two (`meanwhile`); others do it all in `end`.
    """

    def __init__(self, envs: gym.vector.VectorEnv[Any, Any, Any]):
        self.envs: Any = envs
        self.meanwhile = hasattr(envs, "step_async")

    def reset(self, seed: int) -> Mapping[str, np.ndarray]:
        """The first observations of new episodes everywhere."""
        with failures():
            obs: Mapping[str, np.ndarray] = self.envs.reset(seed=seed)[0]
        finite(obs, np.zeros(0))
        return obs

    def begin(self, action: np.ndarray) -> None:
        """Act."""
        self.action = action
        if self.meanwhile:
            with failures():
                self.envs.step_async(action)

    def end(self) -> Arrivals:
        """What came of it, as `VectorEnv.step` says it; waits where it has to. Raises NonFiniteError too."""
        with failures():
            arrivals: Arrivals = self.envs.step_wait() if self.meanwhile else self.envs.step(self.action)
        finite(*arrivals[:2])
        return arrivals


def finite(obs: Mapping[str, np.ndarray], reward: np.ndarray) -> None:
    """Raise NonFiniteError for what an environment returned, before the replay keeps it."""
    for name, value in {"the environment's reward": reward, **{f"observation {k}": v for k, v in obs.items()}}.items():
        if not np.isfinite(value).all():
            raise NonFiniteError(name)
