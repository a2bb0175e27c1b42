"""Tiny worlds whose best return is known in closed form, to test what an agent can learn."""

import re
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.errors import TaskError
from envs.lights import Lights
from envs.toy_world import ToyWorld
from envs.words import Words

NAMES = (
    "cue, serial, counter, words, lights, and with numbers cue5 (5 steps of waiting), serial64 (one register of 64 "
    "positions) or serial64x3 (three of them; serial alone is serial256x2), words64 (words of 64 generators), "
    "words1-16 (of 1 to 16) or words64x4 (four shown at a time), lights5 (5 cells a side), lights5x4 (made by 4 "
    "presses) or lights5x1-4 (by 1 to 4)"
)
_NAMES = {
    "counter": re.compile(r"counter"),
    "cue": re.compile(r"cue(\d{1,5})?"),
    "serial": re.compile(r"serial(?:(\d{1,5})(?:x(\d{1,2}))?)?"),
    "words": re.compile(r"words(?:(\d{1,5})(?:-(\d{1,5}))?)?(?:x(\d{1,5}))?"),
    "lights": re.compile(r"lights(?:(\d{1,5})(?:x(\d{1,5})(?:-(\d{1,5}))?)?)?"),
}

class Cue(ToyWorld):
    """Memory: a cue is shown once, and `delay` blank steps later the action must name it.

    Observation, 4 numbers: [cue 0, cue 1, waiting, query]. The first observation shows the cue, the next
    `delay` ones are all [0, 0, 1, 0], then one is [0, 0, 0, 1], where the action is answered with reward
    +1 if it names the cue, and if not with -2 (cue 0) or 0 (cue 1), and the episode terminates (with an
    observation of zeros). Actions before the query change nothing. An episode has `delay` + 2 actions.

    A wrong answer costs more under one cue than under the other, so that the cue foretells the reward even
    before the right answer is known: with equal costs nothing leads a learner out of the saddle where cue
    and action matter only together, and the task would test that rather than memory.

    Optimal return 1.0. The best policy that forgets, always answering 0, has 0.5 on average, random
    actions 0.0.

    Args:
        delay: blank steps between cue and query, at least 0.
        render_mode: None or "rgb_array".
    """

    optimal_return = 1.0
    forgetful_return = 0.5
    random_return = 0.0

    def __init__(self, delay: int = 20, render_mode: str | None = None) -> None:
        if delay < 0:
            raise TaskError(f"the delay of a cue must be at least 0, not {delay}")
        super().__init__(0.0, 1.0, 4, render_mode)
        self.action_space = spaces.Discrete(2)
        self.delay = delay
        self._cue = 0
        self._time = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Draw a cue and show it."""
        super().reset(seed=seed)
        self._cue, self._time = int(self.np_random.integers(2)), 0
        self._show(self._cue)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Wait, or answer if the last observation was the query."""
        self._time += 1
        if self._time == self.delay + 2:
            self._show(None)
            wrong = (-2.0, 0.0)[self._cue]
            return self._observe(), 1.0 if int(action) == self._cue else wrong, True, False, {}
        self._show(2 if self._time <= self.delay else 3)
        return self._observe(), 0.0, False, False, {}

    def _show(self, entry: int | None) -> None:
        self._state[:] = 0.0
        if entry is not None:
            self._state[entry] = 1.0


class Serial(ToyWorld):
    """Prediction that takes serial work: the next position is one fixed map applied n times.

    A position is a register of bits, and the map is two steps of a feedback shift register: in a step every bit moves
    down by one place, and the free top place gets the old bottom bit xor the majority of the two top bits and the
    second lowest. A register moves by s' = map^n(s), with n drawn uniformly from 0..`max_power` at every step. Each
    step needs the bit that the one before has made, so n counts the serial work of a prediction. Several registers
    move side by side, all by the same n.

    An easier world says less about depth: positions under a random map are learned as nine tables, and with a linear
    map, or one step of this one a move, one or two loops do nearly all of it once it is learned, whatever n is.

    Observation, `registers` x bits + `max_power` numbers: the bits of s register by register, lowest first, as -1 and
    1, then the n of the coming move as a count: n ones, then zeros. Reward 1 if the action (0 or 1) equals the top bit
    of the first register after the move, else 0, so the right action follows from the observation alone. Truncated
    after 50 steps.

    Optimal return 50, random 25.

    Args:
        positions: how many a register has, 2 to the power of the number of its bits, at least 4.
        registers: how many there are, at least 1; one n moves them all.
        max_power: the largest n, at least 0.
        render_mode: None or "rgb_array".
    """

    optimal_return = 50.0
    random_return = 25.0
    steps = 50

    def __init__(
        self, positions: int = 256, registers: int = 2, max_power: int = 8, render_mode: str | None = None
    ) -> None:
        self.bits = positions.bit_length() - 1
        if positions < 4 or positions != 1 << self.bits or max_power < 0:
            raise TaskError(
                f"serial needs 4, 8, 16, .. positions, a power of two, and max_power >= 0: {positions}, {max_power}"
            )
        if registers < 1:
            raise TaskError(f"serial needs 1 register or more, not {registers}")
        self.shown = registers * self.bits
        super().__init__(-1.0, 1.0, self.shown + max_power, render_mode)
        self.action_space = spaces.Discrete(2)
        self.positions, self.registers, self.max_power = positions, registers, max_power
        place, top = np.arange(positions), self.bits - 1
        newest, second, low = place >> top, place >> top - 1, place >> 1
        majority = newest & second | second & low | low & newest
        shift = place >> 1 | ((place ^ majority) & 1) << top
        self.map = shift[shift]
        self._position = np.zeros(registers, int)
        self._power = self._time = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start at uniformly drawn positions."""
        super().reset(seed=seed)
        self._time = 0
        self._arrive(self.np_random.integers(self.positions, size=self.registers))
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Move n times along the map and compare the action with the first top bit of where that leads."""
        position = self._position
        for _ in range(self._power):
            position = self.map[position]
        self._time += 1
        self._arrive(position)
        reward = 1.0 if int(action) == position[0] >> self.bits - 1 else 0.0
        return self._observe(), reward, False, self._time >= self.steps, {}

    def _arrive(self, position: np.ndarray) -> None:
        self._position = position
        self._power = int(self.np_random.integers(self.max_power + 1))
        self._state[:] = 0.0
        self._state[: self.shown] = (2 * (position[:, None] >> np.arange(self.bits) & 1) - 1).ravel()
        self._state[self.shown : self.shown + self._power] = 1.0

    def _shades(self) -> np.ndarray:
        return np.maximum(self._state, 0.0)


class Counter(ToyWorld):
    """Bookkeeping: every number says when it was produced, so a row out of place shows.

    Observation, 2 numbers: [steps taken in this episode, episode number since the last seeded reset].
    Reward after step t is t, whatever the action (one number in [-1, 1]). Each episode's length is drawn
    uniformly from 3..12; even episodes terminate, odd ones are truncated.

    Every policy, optimal or random, has the expected return 36: the mean of L(L+1)/2 over L = 3..12.

    Args:
        render_mode: None or "rgb_array".
    """

    optimal_return = 36.0
    random_return = 36.0

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(0.0, np.inf, 2, render_mode)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._episode = -1
        self._length = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start the next episode, or episode 0 if a seed is given."""
        super().reset(seed=seed)
        self._episode = 0 if seed is not None else self._episode + 1
        self._length = int(self.np_random.integers(3, 13))
        self._state[:] = 0.0, self._episode
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Count one step."""
        self._state[0] += 1.0
        over = bool(self._state[0] >= self._length)
        terminates = self._episode % 2 == 0
        return self._observe(), float(self._state[0]), over and terminates, over and not terminates, {}

    def _shades(self) -> np.ndarray:
        return np.array([self._state[0] / 12.0, self._state[1] % 2])


def is_name(text: str) -> bool:
    """Whether the text looks like the name of a toy world; its numbers may be out of range."""
    return any(shape.fullmatch(text) for shape in _NAMES.values())


def make_toy(name: str, render_mode: str | None = None) -> ToyWorld:
    """Build the toy world of a name as NAMES describes them.

    Raises:
        TaskError: there is no such world, or its number is out of range.
    """
    for kind, shape in _NAMES.items():
        if match := shape.fullmatch(name):
            numbers = [None if group is None else int(group) for group in match.groups()]
            return _build(kind, numbers, render_mode)
    raise TaskError(f"there is no toy world {name!r}; there are {NAMES}")


def _build(kind: str, numbers: list[int | None], render_mode: str | None) -> ToyWorld:
    """The world of a kind, with the numbers of its name; None for those that are left out."""
    if kind == "counter":
        return Counter(render_mode)
    if kind == "cue":
        return Cue(render_mode=render_mode) if numbers[0] is None else Cue(numbers[0], render_mode)
    if kind == "words":
        shortest, longest, shown = numbers
        lengths = None if shortest is None else (shortest, shortest if longest is None else longest)
        return Words(lengths, shown if shown is not None else 1, render_mode)
    if kind == "lights":
        side, fewest, most = numbers
        presses = None if fewest is None else (fewest, fewest if most is None else most)
        return Lights(side if side is not None else 5, presses, render_mode)
    positions, registers = numbers
    if positions is None:
        return Serial(render_mode=render_mode)
    return Serial(positions, 1 if registers is None else registers, render_mode=render_mode)
