"""Recorded episodes of Minari, the data sets of Gymnasium's foundation, read as the environments here would show them.

Minari is an optional package: pip install minari. Nothing is downloaded here: `minari download ID` does that.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from envs.errors import TaskError
from envs.gym_adapter import GymAdapter


class RecordedEpisode(NamedTuple):
    """T steps: obs {name: (T + 1, ...)}, action (T, A) in [-1, 1] or (T,), reward (T,); whether it terminated."""

    obs: dict[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    terminated: bool


class _Described(gym.Env[Any, Any]):
    """Spaces without an environment."""

    def __init__(self, observation: spaces.Space[Any], action: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation, action


class MinariData:
    """A data set that lies on this machine.

    Raises:
        TaskError: Minari is not installed, there is no such data set here, or its spaces are not supported.

    Attributes:
        task: the name of its environment, as gym:ID, or gym:module:ID where another package registers it.
        adapter: the format of observations and actions here.
    """

    def __init__(self, name: str) -> None:
        try:
            import minari
        except ImportError as error:
            raise TaskError("this needs the package minari: pip install minari") from error
        try:
            self._data = minari.load_dataset(name)
        except Exception as error:  # of many kinds, by its version
            what = " ".join(str(error).split())[:200]
            raise TaskError(f"there is no data set {name!r} here ({what}): minari download {name}") from error
        spec = self._data.env_spec
        if spec is None:
            raise TaskError(f"the data set {name} names no environment, so there is no task that it is of")
        module = str(spec.entry_point).partition(":")[0].partition(".")[0]
        self.task = f"gym:{spec.id}" if module in ("gymnasium", "None") else f"gym:{module}:{spec.id}"
        self._made = f"its environment was made with {spec.kwargs}: the task here has none" if spec.kwargs else ""
        self._cut = 0
        self.adapter = GymAdapter(_Described(self._data.observation_space, self._data.action_space), name=name)

    @property
    def note(self) -> str:
        """What of the environment the task does not say, and how many actions had to be cut off so far."""
        space = self.adapter.env.action_space
        cut = f"{self._cut:,} actions lie beyond what a task with {space} takes, and are cut off" if self._cut else ""
        return "; ".join(text for text in (self._made, cut) if text)

    def episodes(self) -> Iterator[RecordedEpisode]:
        """All episodes that have a step, in their order. Raises TaskError for choices that there are not."""
        for episode in self._data.iterate_episodes():
            length = len(episode.rewards)
            if length == 0:
                continue
            seen = [self.adapter.read(_at(episode.observations, step)) for step in range(length + 1)]
            obs = {name: np.stack([one[name] for one in seen]) for name in seen[0]}
            action = np.stack([self.adapter.unit_action(one) for one in episode.actions])
            self._cut += sum(self.adapter.beyond(one) for one in episode.actions)
            yield RecordedEpisode(obs, action, np.asarray(episode.rewards, np.float32), bool(episode.terminations[-1]))


def _at(value: Any, step: int) -> Any:
    """The part of a tree of arrays that belongs to a step."""
    if isinstance(value, Mapping):
        return {name: _at(part, step) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_at(part, step) for part in value)
    return value[step]
