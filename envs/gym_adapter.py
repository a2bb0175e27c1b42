"""Bring any Gymnasium environment with vectors and images as observations to this package's one format."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from envs.errors import TaskError
from envs.images import check_image, image_space, is_image, resized

_NO_BOUND = 1e10  # some environments write "no bound" as a huge number; scaling to it would be useless
_ACTIONS_HELP = "supported are Discrete and Box of floating point numbers"
_OBSERVATIONS_HELP = (
    "supported are Box (vectors, uint8 images), Discrete, MultiDiscrete, MultiBinary, Dict of these, Tuple of vectors"
)


class GymAdapter(gym.Wrapper[dict[str, Any], Any, Any, Any]):
    """Observations become `{"state": (S,) float32}`, actions `Box(-1, 1, (A,))` or `Discrete(start=0)`.

    Observations: a Box is flattened; Discrete and MultiDiscrete become one-hot; the entries of a Dict (in
    the order of its space, which Gymnasium sorts by name) or Tuple are laid end to end. Bounds are dropped.
    Images, (H, W), (H, W, 1) or (H, W, 3) uint8, become entries of their own, 64 x 64: "image" where the whole
    observation is one, the images of a Dict under their names beside "state", which holds all the rest.

    Actions: each number of a Box action with two bounds is scaled from [-1, 1] to these bounds and clipped.
    A number that misses a bound (infinite, or 1e10 and more) is clipped to [-1, 1], and to the one bound it
    may have, and passed through: such an environment must be able to live with actions of that size. A Box
    of another shape than (A,) gets its shape back. A Discrete that starts elsewhere is shifted to 0.

    Args:
        env: the environment to wrap.

    Raises:
        TaskError: for spaces that are not listed above.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._name = env.spec.id if env.spec else type(env.unwrapped).__name__
        self._images, self._rest = _split(env.observation_space, self._name)
        entries: dict[str, spaces.Space[Any]] = {name: image_space(channels) for name, channels in self._images.items()}
        self._size = 0
        if self._rest is not None:
            _check_observations(self._rest, self._name)
            self._size = _flat_size(self._rest)
            entries["state"] = spaces.Box(-np.inf, np.inf, shape=(self._size,), dtype=np.float32)
        if self._size == 0 and not self._images:
            raise TaskError(f"{self._name} has an empty observation; {_OBSERVATIONS_HELP}")
        self.observation_space = spaces.Dict(entries)
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
            TaskError: the observation does not have the size, or an image not the type, that its space announces.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        self._check_images(observation)
        seen = self._observe(observation)
        if "state" in seen and seen["state"].shape != (self._size,):
            raise TaskError(
                f"{self._name} returns {seen['state'].size} numbers per observation, "
                f"but its observation space says {self._size}"
            )
        return seen, info

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Step with an action of `action_space`."""
        observation, reward, terminated, truncated, info = self.env.step(self._translate(action))
        return self._observe(observation), float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """Draw one frame, (H, W, 3) uint8 where the environment keeps to the "rgb_array" convention.

        Raises:
            TaskError: drawing needs a package that is not installed; the message names it.
        """
        try:
            return self.env.render()
        except gym.error.DependencyNotInstalled as error:
            raise TaskError(f"drawing {self._name} needs a package that is missing: {error}") from error

    def _image(self, observation: Any, name: str) -> Any:
        return observation[name] if isinstance(self.env.observation_space, spaces.Dict) else observation

    def _check_images(self, observation: Any) -> None:
        for name in self._images:
            image, space = np.asarray(self._image(observation, name)), self._image(self.env.observation_space, name)
            if (image.shape, image.dtype) != (space.shape, space.dtype):
                raise TaskError(
                    f"{self._name} returns an image of shape {image.shape} and type {image.dtype}, but its observation "
                    f"space says {space.shape} and {space.dtype}"
                )

    def _observe(self, observation: Any) -> dict[str, np.ndarray]:
        seen = {name: resized(self._image(observation, name)) for name in self._images}
        if self._rest is not None:
            rest = {name: observation[name] for name in self._rest.spaces} if self._images else observation
            seen["state"] = np.asarray(spaces.flatten(self._rest, rest), dtype=np.float32)
        return seen

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


def _split(space: spaces.Space[Any], name: str) -> tuple[dict[str, int], Any]:
    """Returns {name of an image: its channels}, and the space of all other entries (None where there are none)."""
    if is_image(space):
        assert isinstance(space, spaces.Box)
        return {"image": check_image(space, name)}, None
    if not isinstance(space, spaces.Dict):
        return {}, space
    images = {key: part for key, part in space.spaces.items() if is_image(part)}
    if not images:
        return {}, space
    for key in images:
        if key == "state" or "." in key:
            raise TaskError(f"{name} calls an image {key!r}: rename it; 'state' is the name of all vectors together")
    rest = {key: part for key, part in space.spaces.items() if key not in images}
    channels = {key: check_image(part, name) for key, part in images.items() if isinstance(part, spaces.Box)}
    return channels, spaces.Dict(rest) if rest else None


def _check_observations(space: spaces.Space[Any], name: str) -> None:
    """Raise `TaskError` unless every part of `space` flattens to a vector and none is an image."""
    if isinstance(space, spaces.Dict):
        parts = list(space.spaces.values())
    elif isinstance(space, spaces.Tuple):
        parts = list(space.spaces)
    else:
        parts = []
        if is_image(space):
            raise TaskError(f"{name} has an image inside another Dict or Tuple; {_OBSERVATIONS_HELP}")
        if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise TaskError(f"{name} has the observation space {space}; {_OBSERVATIONS_HELP}")
    for part in parts:
        _check_observations(part, name)


def _flat_size(space: spaces.Space[Any]) -> int:
    flat = spaces.flatten_space(space)
    assert isinstance(flat, spaces.Box)  # _check_observations let nothing else through
    return math.prod(flat.shape)
