"""Bring any Gymnasium environment with vector observations to this package's one format."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from envs.errors import TaskError

_NO_BOUND = 1e10  # some environments write "no bound" as a huge number; scaling to it would be useless
_ACTIONS_HELP = "supported are Discrete and Box of floating point numbers"
_OBSERVATIONS_HELP = (
    "supported are Box (vectors), Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of these"
)


class GymAdapter(gym.Wrapper[dict[str, Any], Any, Any, Any]):
    """Observations become `{"state": (S,) float32}`, actions `Box(-1, 1, (A,))` or `Discrete(start=0)`.

    Observations: a Box is flattened; Discrete and MultiDiscrete become one-hot; the entries of a Dict (in
    the order of its space, which Gymnasium sorts by name) or Tuple are laid end to end. Bounds are dropped.

    Actions: each number of a Box action with two bounds is scaled from [-1, 1] to these bounds and clipped.
    A number that misses a bound (infinite, or 1e10 and more) is clipped to [-1, 1], and to the one bound it
    may have, and passed through: such an environment must be able to live with actions of that size. A Box
    of another shape than (A,) gets its shape back. A Discrete that starts elsewhere is shifted to 0.

    Args:
        env: the environment to wrap.

    Raises:
        TaskError: for images, and for spaces that are not listed above.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._name = env.spec.id if env.spec else type(env.unwrapped).__name__
        _check_observations(env.observation_space, self._name)
        self._size = _flat_size(env.observation_space)
        if self._size == 0:
            raise TaskError(f"{self._name} has an empty observation; {_OBSERVATIONS_HELP}")
        self.observation_space = spaces.Dict(
            {"state": spaces.Box(-np.inf, np.inf, shape=(self._size,), dtype=np.float32)}
        )
        inner = env.action_space
        if isinstance(inner, spaces.Discrete):
            self.action_space = spaces.Discrete(int(inner.n))
        elif isinstance(inner, spaces.Box) and np.issubdtype(inner.dtype, np.floating) and 0 not in inner.shape:
            self.action_space = spaces.Box(-1.0, 1.0, shape=(math.prod(inner.shape),), dtype=np.float32)
            # float64, so that the scaling is exact where the environment works in float64
            low, high = inner.low.astype(np.float64), inner.high.astype(np.float64)
            self._bounded = (low > -_NO_BOUND) & (high < _NO_BOUND)
            self._low, self._high = low, high
            self._base = np.where(self._bounded, low, 0.0)
            self._span = np.where(self._bounded, high, 0.0) - self._base
        else:
            raise TaskError(f"{self._name} has the action space {inner}; {_ACTIONS_HELP}")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode.

        Raises:
            TaskError: the observation does not have the size that its space announces.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        state = self._flatten(observation)
        if state.shape != (self._size,):
            raise TaskError(
                f"{self._name} returns {state.size} numbers per observation, "
                f"but its observation space says {self._size}"
            )
        return {"state": state}, info

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Step with an action of `action_space`."""
        observation, reward, terminated, truncated, info = self.env.step(self._translate(action))
        return {"state": self._flatten(observation)}, float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """Draw one frame, (H, W, 3) uint8 where the environment keeps to the "rgb_array" convention.

        Raises:
            TaskError: drawing needs a package that is not installed; the message names it.
        """
        try:
            return self.env.render()
        except gym.error.DependencyNotInstalled as error:
            raise TaskError(f"drawing {self._name} needs a package that is missing: {error}") from error

    def _flatten(self, observation: Any) -> np.ndarray:
        return np.asarray(spaces.flatten(self.env.observation_space, observation), dtype=np.float32)

    def _translate(self, action: Any) -> Any:
        inner = self.env.action_space
        if isinstance(inner, spaces.Discrete):
            return int(action) + int(inner.start)
        assert isinstance(inner, spaces.Box)
        unit = np.clip(np.asarray(action, dtype=np.float64).reshape(inner.shape), -1.0, 1.0)
        scaled = np.where(self._bounded, self._base + (unit + 1.0) * 0.5 * self._span, unit)
        return np.clip(scaled, self._low, self._high).astype(inner.dtype)


class SeedFirstReset(gym.Wrapper[Any, Any, Any, Any]):
    """Use `seed` for the first reset that brings none, so an environment can be seeded where it is made.

    `make_env(task, seed=3).reset()` then equals `make_env(task).reset(seed=3)`, whatever the environment
    does with its seed.
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int) -> None:
        super().__init__(env)
        self._seed: int | None = seed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """Reset with `seed`, or with the seed of the constructor if this is the first reset."""
        first, self._seed = self._seed, None
        return self.env.reset(seed=first if seed is None else seed, options=options)


def _check_observations(space: spaces.Space[Any], name: str) -> None:
    """Raise `TaskError` unless every part of `space` flattens to a vector and none is an image."""
    if isinstance(space, spaces.Dict):
        parts = list(space.spaces.values())
    elif isinstance(space, spaces.Tuple):
        parts = list(space.spaces)
    else:
        parts = []
        if isinstance(space, spaces.Box):
            rank = len(space.shape)
            if rank >= 3 or (rank == 2 and space.dtype == np.uint8):
                raise TaskError(
                    f"{name} observes images of shape {space.shape}; pixels are not supported yet"
                )
        elif not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise TaskError(f"{name} has the observation space {space}; {_OBSERVATIONS_HELP}")
    for part in parts:
        _check_observations(part, name)


def _flat_size(space: spaces.Space[Any]) -> int:
    flat = spaces.flatten_space(space)
    assert isinstance(flat, spaces.Box)  # _check_observations let nothing else through
    return math.prod(flat.shape)
