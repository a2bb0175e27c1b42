"""The word problem of the symmetric group S5: follow a sequence of permutations, and say where it leads.

The problem is complete for NC1 (Barrington, 1989): it is believed that no network of fixed depth solves it for words of
every length. So a model that reads a whole word needs depth that grows with it, and one that reads it step by step
needs a state.
"""

from typing import Any

import numpy as np
from gymnasium import spaces

from envs.errors import TaskError
from envs.toy_world import ToyWorld

ELEMENTS = 5
GENERATORS = np.array([[1, 0, 2, 3, 4], [1, 2, 3, 4, 0], [4, 0, 1, 2, 3]])
"""(3, 5): a swap of the first two places, the cycle of all five, and the cycle back. What is at p moves to g[p]."""
LONGEST = 64


def product(word: np.ndarray) -> np.ndarray:
    """(L,) numbers of generators, applied from first to last -> (5,) the place to which each element is moved."""
    places = np.arange(ELEMENTS)
    for generator in word:
        places = GENERATORS[generator][places]
    return places


class Words(ToyWorld):
    """Follow words of generators of S5 and answer where one element has gone.

    A word of L generators is shown, `shown` of them at each step, and L is drawn uniformly from `lengths` for every
    episode. Elements 0 to 4 start at places 0 to 4, and every generator moves all of them. After the word comes a query
    that names an element; the action there (a place, 0 to 4) pays 1 if that element has arrived at it, else 0. The
    episode then terminates with an observation of the product, so that a world model can be scored by predicting that
    one. Actions before the query change nothing. An episode has ceil(L / `shown`) + 1 actions.

    With `shown` of 1 a step composes two permutations, and what has to be kept is one of 120 states. With more, a step
    is serial work: that many compositions.

    Observation, 3 `shown` + 30 numbers, 0 or 1:
        `shown` one-hots of 3, the generators of this step in their order (zeros where the word is over);
        a one-hot of 5, the element of the query (zeros elsewhere);
        five one-hots of 5, the place of each element (zeros before the end).
    Info: `word_length`, L.

    Optimal return 1, random 0.2.

    Args:
        lengths: shortest and longest word, from 1 to 64; by default all of these.
        shown: generators that are shown together, from 1 to 64.
        render_mode: None or "rgb_array".
    """

    optimal_return = 1.0
    random_return = 1.0 / ELEMENTS

    def __init__(
        self, lengths: tuple[int, int] | None = None, shown: int = 1, render_mode: str | None = None
    ) -> None:
        self.lengths, self.shown = lengths or (1, LONGEST), shown
        if not 1 <= self.lengths[0] <= self.lengths[1] <= LONGEST:
            raise TaskError(f"words must have 1 to {LONGEST} generators, the shortest first, not {_span(self.lengths)}")
        if not 1 <= shown <= LONGEST:
            raise TaskError(f"words must show 1 to {LONGEST} generators at a time, not {shown}")
        self._query = len(GENERATORS) * shown  # where its entries begin
        super().__init__(0.0, 1.0, self._query + ELEMENTS + ELEMENTS**2, render_mode)
        self.action_space = spaces.Discrete(ELEMENTS)
        self._word, self._element, self._time = np.zeros(1, int), 0, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Draw a word and its query, and show the first generators."""
        super().reset(seed=seed)
        length = self.np_random.integers(self.lengths[0], self.lengths[1] + 1)
        self._word = self.np_random.integers(len(GENERATORS), size=length)
        self._element, self._time = int(self.np_random.integers(ELEMENTS)), 0
        self._show()
        return self._observe(), self._info()

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Go on with the word, or answer if the last observation was the query."""
        self._time += 1
        if self._time * self.shown < len(self._word) + self.shown:
            self._show()
            return self._observe(), 0.0, False, False, self._info()
        places = product(self._word)
        self._state[:] = 0.0
        self._state[self._query + ELEMENTS :].reshape(ELEMENTS, ELEMENTS)[np.arange(ELEMENTS), places] = 1.0
        reward = 1.0 if int(action) == places[self._element] else 0.0
        return self._observe(), reward, True, False, self._info()

    def _show(self) -> None:
        """The generators of this step, or the query behind the last of them."""
        now = self._word[self._time * self.shown :][: self.shown]
        self._state[:] = 0.0
        self._state[: self._query].reshape(self.shown, len(GENERATORS))[np.arange(len(now)), now] = 1.0
        if not len(now):
            self._state[self._query + self._element] = 1.0

    def _info(self) -> dict[str, int]:
        return {"word_length": len(self._word)}


def _span(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}" if numbers[0] == numbers[1] else f"{numbers[0]}-{numbers[1]}"
