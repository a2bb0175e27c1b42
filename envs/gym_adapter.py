"""Bring any Gymnasium environment with vectors and images as observations to this package's one format."""

import math
import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from envs.checks import explain_reset, flag, number, split_reset, split_step
from envs.errors import BadReturn, TaskError
from envs.observations import ObservationReader

_NO_BOUND = 1e10  # some environments write "no bound" as a huge number; scaling to it would be useless
_ACTIONS_HELP = "supported are Discrete and Box of floating point numbers"
_close_noted: set[str] = set()  # names of tasks


class GymAdapter(gym.Wrapper[dict[str, Any], Any, Any, Any]):
    """Observations become `{"state": (S,) float32}`, actions `Box(-1, 1, (A,))` or `Discrete(start=0)`.

    Observations: a Box is flattened; Discrete and MultiDiscrete become one-hot; the entries of a Dict (in
    the order of its space, which Gymnasium sorts by name) or Tuple are laid end to end. Bounds are dropped.
    Images, (H, W), (H, W, 1) or (H, W, 3) uint8, become entries of their own, 64 x 64: "image" where the whole
    observation is one, the images of a Dict under their names beside "state", which holds all the rest. Grids of codes
    (see `images.kind_of`) belong to "state", one-hot where there are 3 to 16 codes; `how_shown` says so.

    Actions: each number of a Box action with two bounds is scaled from [-1, 1] to these bounds and clipped.
    A number that misses a bound (infinite, or 1e10 and more) is clipped to [-1, 1], and to the one bound it
    may have, and passed through: such an environment must be able to live with actions of that size. A Box
    of another shape than (A,) gets its shape back. A Discrete that starts elsewhere is shifted to 0.

    All that the environment returns is checked, in every step. Its info stays outside: nothing here needs it, and
    those of several copies may not fit together.

    Args:
        env: the environment to wrap.
        variant: "grid" or "image" reads every array that may be either as the one or the other.
        name: what the task is called in messages.

    Attributes:
        how_shown: a line for each array that is shown otherwise than one might expect.

    Raises:
        TaskError: for spaces that are not listed above.
    """

    def __init__(self, env: gym.Env[Any, Any], variant: str = "", name: str = "") -> None:
        super().__init__(env)
        self._name = name or (env.spec.id if env.spec else type(env.unwrapped).__name__)
        self._steps = 0
        inner, observed = (getattr(env, f"{kind}_space", None) for kind in ("action", "observation"))
        if not isinstance(inner, spaces.Space) or not isinstance(observed, spaces.Space):
            raise TaskError(f"{self._name} needs an observation_space and an action_space of gymnasium.spaces")
        self._read = ObservationReader(observed, self._name, variant)
        self.observation_space, self.how_shown = self._read.space, self._read.notes
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
            BadReturn: what came back is not what Gymnasium, or the observation space, announces.
        """
        self._steps = 0
        try:
            return self._read(split_reset(self.env.reset(seed=seed, options=options))), {}
        except TypeError as error:
            if explained := explain_reset(error):
                raise BadReturn(f"{self._name}: {explained}") from error
            raise
        except BadReturn as error:
            raise BadReturn(f"{self._name}, at a reset: {error}") from None

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Step with an action of `action_space`. Raises BadReturn as `reset`."""
        self._steps += 1
        returned = self.env.step(self._translate(action))
        try:
            observation, reward, terminated, truncated, _ = split_step(returned)
            seen = self._read(observation)
            if type(reward) is not float:
                reward = number(reward)
            if type(terminated) is not bool or type(truncated) is not bool:
                terminated, truncated = flag(terminated, "terminated"), flag(truncated, "truncated")
            return seen, reward, terminated, truncated, {}
        except BadReturn as error:
            raise BadReturn(f"{self._name}, in step {self._steps} of an episode: {error}") from None

    def render(self) -> Any:
        """Draw one frame, (H, W, 3) uint8 where the environment keeps to the "rgb_array" convention.

        Raises:
            TaskError: drawing needs a package that is not installed; the message names it.
        """
        try:
            return self.env.render()
        except gym.error.DependencyNotInstalled as error:
            raise TaskError(f"drawing {self._name} needs a package that is missing: {error}") from error

    def close(self) -> None:
        """Close the environment; a failure is a note, because what was done with the environment is worth keeping."""
        try:
            self.env.close()
        except (Exception, SystemExit) as error:
            if self._name not in _close_noted:  # once is enough for all copies
                _close_noted.add(self._name)
                print(f"note: closing {self._name} failed: {type(error).__name__}: {error}", file=sys.stderr)

    def read(self, observation: Any) -> dict[str, np.ndarray]:
        """An observation of the inner environment as this one shows it. Raises BadReturn."""
        return self._read(observation)

    def unit_action(self, action: Any) -> Any:
        """The inverse of what `step` does with an action: one of the inner environment as one of `action_space`.

        Raises TaskError for a choice that the environment does not have; numbers beyond the bounds are cut off.
        """
        inner = self.env.action_space
        if isinstance(inner, spaces.Discrete):
            if not 0 <= int(action) - int(inner.start) < inner.n:
                last = inner.start + inner.n - 1
                raise TaskError(f"{self._name} has no action {action}: it must be from {inner.start} to {last}")
            return int(action) - int(inner.start)
        return np.clip(self._in_units(action), -1.0, 1.0).astype(np.float32).ravel()

    def beyond(self, action: Any) -> bool:
        """Whether `unit_action` would cut numbers off, by more than rounding."""
        box = isinstance(self.env.action_space, spaces.Box)
        return box and bool((np.abs(self._in_units(action)) > 1.0 + 1e-4).any())

    def _in_units(self, action: Any) -> np.ndarray:
        """Numbers of the inner environment, from -1 to 1 where they lie inside of its bounds."""
        given = np.asarray(action, np.float64).reshape(self._bounded.shape)
        span = np.where(self._span == 0.0, 1.0, self._span)
        return np.where(self._bounded, 2.0 * (given - self._base) / span - 1.0, given)

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
