"""What may stand behind the name of a task: how it is seen (@pixels, @grid) and how often an action is repeated."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import gymnasium as gym

from envs.errors import TaskError

MOST_REPEATS = 32
"""Most simulator steps of one action."""

_REPEAT = re.compile(r"repeat([1-9][0-9]?)")


class Parts(NamedTuple):
    """A task's name taken apart: "walker_walk@repeat4@nov" is walker_walk, nov and 4."""

    base: str
    view: str = ""
    repeat: int | None = None
    """Simulator steps of an action; None where the name leaves that to the suite."""

    @property
    def name(self) -> str:
        """The name with its parts in this order, whatever order they were given in."""
        return self.base + (f"@repeat{self.repeat}" if self.repeat else "") + (f"@{self.view}" if self.view else "")


def split(name: str) -> Parts:
    """Take apart a name that `check` has accepted."""
    base, *marks = name.split("@")
    repeats = [int(found[1]) for mark in marks if (found := _REPEAT.fullmatch(mark))]
    views = [mark for mark in marks if not _REPEAT.fullmatch(mark)]
    return Parts(base, views[0] if views else "", repeats[0] if repeats else None)


def check(suite: str, name: str, views: Iterable[str], about: str) -> Parts:
    """Take a name apart whose parts may be wrong.

    Args:
        suite: of the task, for messages.
        name: with the parts behind it, in any order.
        views: the ways in which tasks of the suite can be seen.
        about: what the views are, for messages.

    Raises:
        TaskError: a part is unknown, out of range, or there twice.
    """
    base, *marks = name.split("@")
    repeats, seen = "@repeat1 to @repeat32 apply every action for so many simulator steps", list[str]()
    for mark in marks:
        if mark.startswith("repeat"):
            found = _REPEAT.fullmatch(mark)
            if found is None or int(found[1]) > MOST_REPEATS:
                raise TaskError(f"there is no @{mark}; {repeats}, for example {suite}:{base}@repeat4")
        elif mark not in views:
            raise TaskError(f"there is no variant @{mark}; {about}; {repeats}")
        other = next((one for one in seen if one.startswith("repeat") == mark.startswith("repeat")), None)
        if other is not None:
            raise TaskError(f"@{other} and @{mark} cannot be combined in {suite}:{name}: give one of them")
        seen.append(mark)
    return split(name)


def refuse(suite: str, name: str) -> None:
    """Raise TaskError where anything stands behind the name of a task that has no variants."""
    base, at, marks = name.partition("@")
    if at:
        raise TaskError(f"{suite} tasks have no variants, as dmc and gym tasks do: leave @{marks} behind {base} out")


class Repeat(gym.Wrapper[Any, Any, Any, Any]):
    """Apply every action for several steps of the environment, and sum their rewards.

    An episode that ends in between ends at once: the action then takes fewer steps. A limit of time inside this wrapper
    counts steps of the environment, so that episodes last as long as without it.

    Args:
        env: the environment to wrap.
        times: steps of one action, at least 1.
    """

    def __init__(self, env: gym.Env[Any, Any], times: int) -> None:
        super().__init__(env)
        if times < 1:
            raise ValueError(f"an action must be applied at least once, not {times} times")
        self._times = times
        fps = env.metadata.get("render_fps")
        if isinstance(fps, (int, float)):  # a frame is drawn after each action
            self.metadata = {**env.metadata, "render_fps": fps / times}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Observation and info after the last of these steps, and the sum of their rewards."""
        total = 0.0
        for _ in range(self._times):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info
