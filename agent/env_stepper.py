"""Steps of vector environments, in two halves where the environments run in processes of their own; what they return
is checked here, for training, evaluation and recording.

E: number of environments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from agent.errors import BadStep, failures

Transition = tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]
"""What `VectorEnv.step` returns: observations, rewards, terminated, truncated, info."""

MOST_BAD = 100
"""Bad steps in a row, or resets, after which an environment counts as broken."""

LARGEST = float(np.finfo(np.float32).max)
NO_REWARD = np.zeros(0)


class EnvStepper:
    """One step of all environments in two halves, `send` and `receive`.

    All methods raise EnvironmentFailure for what an environment raises, and BadStep (one too) for a reward or an
    observation that is not finite as float32: the replay and the networks hold float32, where 1e39 is infinite.
    skip_bad: environments with such a step begin a new episode instead.
    """

    def __init__(self, envs: gym.vector.VectorEnv[Any, Any, Any], skip_bad: bool = False):
        self.envs: Any = envs
        self.skip_bad = skip_bad
        self.bad = np.zeros(envs.num_envs, bool)
        """Environments (E,) that began anew in the last step: what is returned of them is a first observation."""
        self.bad_steps = 0
        """Steps that were skipped so far."""
        self.in_a_row = np.zeros(envs.num_envs, int)
        self.asynchronous = hasattr(envs, "step_async")
        """Whether environments step by themselves between `send` and `receive`."""

    def reset(self, seed: int | list[int]) -> tuple[Any, dict[str, Any]]:
        """The first observations of new episodes everywhere, and the info."""
        with failures():
            obs, info = self.envs.reset(seed=seed)
        bad = not_finite(obs, np.zeros(self.envs.num_envs))
        if bad.any() and self.skip_bad:
            return self.restart(bad), info
        require_finite(obs)
        return obs, info

    def send(self, action: np.ndarray) -> None:
        """Begin a step."""
        self.action = action
        if self.asynchronous:
            with failures():
                self.envs.step_async(action)

    def receive(self) -> Transition:
        """What came of it; waits where it has to."""
        obs, reward, *rest = self.receive_unchecked()
        if not self.skip_bad:
            require_finite(obs, reward)
            return obs, reward, *rest
        self.bad = np.zeros(len(reward), bool) if all_finite(obs, reward) else not_finite(obs, reward)
        self.in_a_row = np.where(self.bad, self.in_a_row + 1, 0)
        if self.bad.any():
            self.bad_steps += int(self.bad.sum())
            if self.in_a_row.max() >= MOST_BAD:
                require_finite(obs, reward)
            obs = self.restart(self.bad)
        return obs, reward, *rest

    def receive_unchecked(self) -> Transition:
        """As `receive`, with what is not finite: see `not_finite`."""
        with failures():
            transition: Transition = self.envs.step_wait() if self.asynchronous else self.envs.step(self.action)
        return transition

    def step(self, action: np.ndarray) -> Transition:
        """Both halves at once."""
        self.send(action)
        return self.receive()

    def restart(self, which: np.ndarray) -> Any:
        """New episodes in the environments `which` (E,), the others go on; returns the observations of all."""
        for _ in range(MOST_BAD):
            with failures():
                obs, _ = self.envs.reset(options={"reset_mask": which.copy()})
            which = which & not_finite(obs, np.zeros(len(which)))
            if not which.any():
                return obs
        raise BadStep(f"{MOST_BAD} resets in a row returned observations that are not finite")


def all_finite(obs: Mapping[str, np.ndarray], reward: np.ndarray) -> bool:
    """Whether all is finite as float32; fast, because every step is asked."""
    for values in (*obs.values(), reward):
        if values.dtype == np.float32:
            if not np.isfinite(values).all():
                return False
        elif values.dtype.kind == "f" and not (np.abs(values) <= LARGEST).all():
            return False
    return True


def not_finite(obs: Mapping[str, np.ndarray], reward: np.ndarray) -> np.ndarray:
    """Environments (E,) whose observations (E, ...) or rewards (E,) are not finite as float32."""
    bad = np.zeros(len(next(iter(obs.values()))), bool)
    with np.errstate(over="ignore", invalid="ignore"):
        for values in (*obs.values(), reward):
            if values.dtype.kind == "f" and len(values):
                flat = values.reshape(len(values), -1).astype(np.float32, copy=False)
                bad |= ~np.isfinite(flat).all(1)
    return bad


def require_finite(obs: Mapping[str, np.ndarray], reward: np.ndarray | None = None) -> None:
    """Raise BadStep with the first value that is not finite as float32."""
    if all_finite(obs, NO_REWARD if reward is None else reward):
        return
    named = {} if reward is None else {"reward": reward}
    named |= {f"observation {name}": value for name, value in obs.items()}
    with np.errstate(over="ignore", invalid="ignore"):
        for name, value in named.items():
            bad = ~np.isfinite(value.astype(np.float32))
            if bad.any():
                raise BadStep(f"the environment's {name} is {value[bad].flat[0]}, which is not a finite float32")
